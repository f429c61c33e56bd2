"""Making the tensors of an adapter for a model: new ones from a configuration, or a file's in their places."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loratune.adapter import sites
from loratune.adapter.adapter import Adapter
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank, Tied, TokenRows
from loratune.adapter.fingerprint import Fingerprint
from loratune.adapter.hosts import needs_float32
from loratune.adapter.inits import Begin, embedding, initialiser, is_subtracted, kaiming
from loratune.adapter.matching import within
from loratune.adapter.modules import logical_modules, parameter_at, ties
from loratune.adapter.sites import Site
from loratune.adapter.variants import row_norms
from loratune.adapter.wrapper import lookup, parent_of, unwrapped
from loratune.errors import AdapterError


def new_adapter(
    model: nn.Module, config: LoraConfig, found: Sequence[Site], base: Fingerprint, seed: int | None
) -> Adapter:
    """Begins every factor, trained bias and trained module of a configuration; the model is only read."""
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    adapter = Adapter(config, {}, base=base)
    for site in found:
        adapter.factors[site.path] = _new_factor(site, config, seed, adapter.factors)
    copies = _Copies(model, config)
    for path in sites.bias_paths(model, config, found):
        adapter.biases[path] = _trained_copy(parameter_at(model, path))
    for path in sites.saved_paths(model, config):
        adapter.saved[path] = copies.of(path)
    return adapter


def _new_factor(site: Site, config: LoraConfig, seed: int, others: dict[str, LowRank]) -> LowRank:
    if site.tied_to is not None:
        return Tied(others[site.tied_to], transposed=site.turned)
    dtype = needs_float32(site.weight)
    if site.tokens is not None:
        return TokenRows(torch.tensor(site.tokens), *site.sizes, dtype)
    A, B = (half.to(dtype) for half in _begin(site, config, seed))
    factor = LowRank(
        A,
        B,
        site.scale,
        config.lora_dropout if site.host.takes_dropout else 0.0,
        bias=torch.zeros(B.shape[0], dtype=dtype) if config.lora_bias else None,
        magnitude=torch.zeros(B.shape[0], dtype=dtype) if config.use_dora else None,
        start=(A.clone(), B.clone()) if is_subtracted(config.init_lora_weights) else None,
        groups=site.groups,
    )
    if factor.magnitude is not None:  # DoRA begins with the norms W has, so that step 0 is the base model
        factor.magnitude.data.copy_(row_norms(site.host, site.weight, factor.to(site.weight.device)))
    return factor


def _begin(site: Site, config: LoraConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Begins A and B from a generator of the site's own, keyed by the seed and the path: other sites do not matter."""
    generator = torch.Generator().manual_seed(seed ^ int.from_bytes(_hash(site.path), "big") & (2**62 - 1))
    shape_A, shape_B = site.shapes()
    if site.host.kind == "Parameter" and len(shape_A) == 3:  # all experts as one factor, then apart
        experts, rank, inputs = shape_A
        A, B = kaiming(Begin(experts * rank, (inputs,), shape_B[1], site.scale, generator))
        if config.init_lora_weights is False:
            B.uniform_(-1, 1, generator=generator).mul_((experts * rank) ** -0.5)
        return A.view(shape_A), B.view(shape_B[1], rank, experts).permute(2, 0, 1).contiguous()
    begin = Begin(
        rank=site.rank,
        inputs=shape_A[1:],
        outputs=shape_B[0],
        scale=site.scale,
        generator=generator,
        weight=site.host.rows(site.weight) if site.groups == 1 else None,
    )
    initialise = initialiser(config.init_lora_weights)
    assert initialise is not None
    if site.host.kind == "Embedding" and config.init_lora_weights in (True, "gaussian"):
        initialise = embedding
    A, B = initialise(begin)
    return A, B[:, : shape_B[1]].contiguous()


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


def _trained_copy(parameter: Tensor | None) -> nn.Parameter:
    assert parameter is not None
    return nn.Parameter(parameter.detach().clone())


class _Copies:
    """Copies of modules of the base, to be trained: with `ensure_weight_tying` what is one tensor there stays one."""

    def __init__(self, model: nn.Module, config: LoraConfig) -> None:
        self.model = model
        shared = ties(model) if config.ensure_weight_tying else {}
        self.tied = {*shared, *shared.values()}
        self.memo: dict[int, Any] = {}

    def of(self, path: str) -> nn.Module:
        """Returns a trainable copy, without the wrappers that other adapters put inside the module."""
        is_tied = any(within(each, [path]) for each in self.tied)
        copied = copy.deepcopy(lookup(self.model, path), self.memo if is_tied else {})
        for path, inner in list(copied.named_modules()):
            if unwrapped(inner) is not inner:
                owner, name = parent_of(copied, path)
                owner._modules[name] = unwrapped(inner)
        return copied.requires_grad_(True)


# ---- what a file holds ----------------------------------------------------------------------------------------------


def fitted_to(adapter: Adapter, found: Sequence[Site]) -> Adapter:
    """Returns the adapter with the paths and shapes of a model's sites: PEFT's keys name modules, and its files hold
    stacked experts in one matrix, a grouped convolution's A for all inputs, and token rows as they are."""
    by_key = {name: site for site in found if site.tied_to is None for name in (site.key, site.path)}
    fitted: dict[str, LowRank] = {}
    loose = dict(adapter.loose)
    for key, factor in adapter.factors.items():
        site = by_key.get(key)
        fitted[key if site is None else site.path] = factor if site is None else _shaped(factor, site)
    for site in found:
        rows = loose.pop(f"{site.path}.trainable_tokens_delta", None) if site.tokens else None
        if rows is not None:
            fitted[site.path] = _token_rows(site, rows)
    for site in found:
        if site.tied_to is not None and site.tied_to in fitted:
            fitted[site.path] = _tied(site, fitted[site.tied_to], fitted.get(site.path))
    return replace(adapter, factors=fitted, loose=loose, biases=dict(adapter.biases), saved=dict(adapter.saved))


def _tied(site: Site, source: LowRank, stored: LowRank | None) -> Tied:
    """Returns the factor of a tied layer; a file brings one for it too, which must be the same update."""
    tied = Tied(source, transposed=site.turned)
    if stored is not None and not isinstance(stored, Tied):
        probe = torch.randn(tied.A.shape[1], dtype=tied.A.dtype, generator=torch.Generator().manual_seed(0))
        shapes = stored.A.shape[1] == tied.A.shape[1] and stored.B.shape[0] == tied.B.shape[0]
        if not shapes or not torch.allclose(stored.update(probe), tied.update(probe), rtol=1e-3, atol=1e-5):
            raise AdapterError(
                f"ensure_weight_tying: {site.path} and {site.tied_to} share a weight, but the adapter changes them "
                'differently. To use it as it is, set "ensure_weight_tying": false and name both in target_modules in '
                "its adapter_config.json. Nothing was attached."
            )
    return tied


def _shaped(factor: LowRank, site: Site) -> LowRank:
    if (tuple(factor.A.shape), tuple(factor.B.shape)) == site.shapes():
        factor.groups = site.groups
        return factor
    return _unstacked(factor, site) if site.host.kind == "Parameter" else _grouped(factor, site)


def _grouped(factor: LowRank, site: Site) -> LowRank:
    """PEFT's A of a grouped convolution sees all inputs; ours sees its group's, which is the same if the rest is 0."""
    groups = site.groups
    if groups == 1:
        return factor
    factor.groups = groups
    blocks = factor.A.detach().unflatten(0, (groups, -1)).unflatten(2, (groups, -1))  # (g, R/g, g, I/g, ...)
    own = torch.stack([blocks[group, :, group] for group in range(groups)])
    if blocks.count_nonzero() != own.count_nonzero():
        raise AdapterError(
            f"{site.path}: this factor mixes the inputs of {groups} groups, which no grouped convolution's weight can "
            "hold: it could not be merged. Nothing was attached."
        )
    factor.A = nn.Parameter(own.flatten(0, 1))
    return factor


def _unstacked(factor: LowRank, site: Site) -> LowRank:
    shape_A, shape_B = site.shapes()
    if len(shape_A) == 2:
        return factor
    experts, rank, inputs = shape_A
    if factor.A.shape != (experts * rank, inputs) or factor.B.shape != (shape_B[1], experts * rank):
        raise AdapterError(
            f"{site.path}: found A {tuple(factor.A.shape)} and B {tuple(factor.B.shape)}, expected "
            f"{(experts * rank, inputs)} and {(shape_B[1], experts * rank)} for {experts} experts. A file of PEFT 0.18 "
            "holds them the other way round: load and save it once with a newer PEFT. Nothing was attached."
        )
    A = factor.A.detach().reshape(shape_A)
    B = factor.B.detach().reshape(shape_B[1], rank, experts).permute(2, 0, 1).contiguous()
    return LowRank(A, B, site.scale)


def _token_rows(site: Site, rows: Tensor) -> TokenRows:
    assert site.tokens is not None
    index = torch.tensor(site.tokens)
    factor = TokenRows(index, *site.sizes, needs_float32(site.weight))
    if rows.shape != (len(index), site.sizes[1]):
        raise AdapterError(f"{site.path}: found rows {tuple(rows.shape)}, expected {(len(index), site.sizes[1])}.")
    weight = site.weight.detach()[index.to(site.weight.device)].cpu()
    factor.B.data.copy_((rows.to(factor.B.dtype) - weight.to(factor.B.dtype)).T)
    return factor


def place_loose(model: nn.Module, adapter: Adapter, found: Sequence[Site]) -> None:
    """Gives the file's other tensors their place: trained biases and saved modules. All must fit, none may be left.

    What has its place already (the adapter was attached before) keeps it. On an error the adapter is as it was.
    """
    loose, saved, biases = dict(adapter.loose), dict(adapter.saved), dict(adapter.biases)
    copies, filled = _Copies(model, adapter.config), set[int]()
    for path in sites.saved_paths(model, adapter.config):
        if path not in saved:
            saved[path] = _filled(copies.of(path), path, loose, filled)
    for path in sites.bias_paths(model, adapter.config, found):
        if path not in biases:
            biases[path] = nn.Parameter(_taken(loose, path, parameter_at(model, path)))
    for path in list(loose):
        _drop_unchanged(model, path, loose)
    if loose:
        raise AdapterError(
            f"{len(loose)} tensors of the adapter have no place in {type(model).__name__}; first: "
            f"{next(iter(loose))}. Nothing was attached."
        )
    adapter.loose, adapter.saved, adapter.biases = loose, saved, biases


def _filled(copied: nn.Module, path: str, loose: dict[str, Tensor], filled: set[int]) -> nn.Module:
    """Gives a module the file's tensors; one that a module before it shares (`filled`) must bring the same values."""
    for name, tensor in copied.state_dict(keep_vars=True).items():  # buffers too: the running means of a batch norm
        value = _taken(loose, f"{path}.{name}", tensor)
        if id(tensor) in filled and not torch.equal(tensor, value):
            raise AdapterError(
                f"ensure_weight_tying: {path}.{name} is one tensor with another module's, but the adapter holds other "
                "values for it. Nothing was attached."
            )
        filled.add(id(tensor))
        tensor.data.copy_(value)
    return copied


def _taken(loose: dict[str, Tensor], path: str, like: Tensor | None) -> Tensor:
    assert like is not None
    tensor = loose.pop(path, None)
    if tensor is None:
        raise AdapterError(f"the adapter lacks the trained tensor {path}. Nothing was attached.")
    if tensor.shape != like.shape:
        raise AdapterError(f"{path}: found {tuple(tensor.shape)}, expected {tuple(like.shape)}. Nothing was attached.")
    return tensor.to(like.device, like.dtype)


def _drop_unchanged(model: nn.Module, path: str, loose: dict[str, Tensor]) -> None:
    """PEFT also writes an adapted embedding or head in full, bias included; it must be the base's, rounding aside."""
    owner, _, name = path.rpartition(".")
    module = dict(logical_modules(model)).get(owner)
    base = module._parameters.get(name) if module is not None else None
    if base is None:
        return
    stored = loose[path]
    if stored.shape != base.shape or not torch.allclose(
        stored.float(), base.detach().float().cpu(), rtol=2**-7, atol=1e-4
    ):
        raise AdapterError(
            f"the adapter brings its own {path} {tuple(stored.shape)}, which is not the base's {tuple(base.shape)}: "
            "the vocabulary was resized or the embedding trained. Load that base model. Nothing was attached."
        )
    del loose[path]
