"""Making the tensors of an adapter for a model: new ones from a configuration, or a file's in their places."""

import copy
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loratune.adapter import sites
from loratune.adapter.adapter import Adapter
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank
from loratune.adapter.fingerprint import Fingerprint
from loratune.adapter.inits import INITS, embedding
from loratune.adapter.sites import Site, owner_of
from loratune.adapter.wrapper import unwrapped
from loratune.errors import AdapterError


def new_adapter(
    model: nn.Module, config: LoraConfig, found: Sequence[Site], base: Fingerprint, seed: int | None
) -> Adapter:
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    factors = {site.path: _new_factor(site, config, seed) for site in found}
    adapter = Adapter(config, factors, base=base)
    for path in sites.bias_paths(model, config, found):
        adapter.biases[path] = _trained_copy(owner_of(model, path)._parameters["bias"])
    for path in sites.saved_paths(model, config):
        adapter.saved[path] = _trained_module(model.get_submodule(path))
    return adapter


def _new_factor(site: Site, config: LoraConfig, seed: int) -> LowRank:
    """Begins a factor from a generator of its own, keyed by the seed and the path: other sites do not matter."""
    generator = torch.Generator().manual_seed(seed ^ int.from_bytes(_hash(site.path), "big") & (2**62 - 1))
    initialise = embedding if site.host.kind == "Embedding" else INITS[config.init_lora_weights]
    A, B = initialise(site.rank, *site.sizes, generator)
    dtype = factor_dtype(site.module)
    return LowRank(A.to(dtype), B.to(dtype), site.scale, config.lora_dropout)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


def factor_dtype(module: nn.Module) -> torch.dtype:
    """Factors are float32, or float64 where the base is: never the half precision of a stored base."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _trained_copy(parameter: Tensor | None) -> nn.Parameter:
    assert parameter is not None
    return nn.Parameter(parameter.detach().clone())


def _trained_module(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    return copied.requires_grad_(True)


def place_loose(model: nn.Module, adapter: Adapter, found: Sequence[Site]) -> None:
    """Gives the file's other tensors their place: trained biases and saved modules. All must fit, none may be left.

    What has its place already (the adapter was attached before) keeps it. On an error the adapter is as it was.
    """
    loose, saved, biases = dict(adapter.loose), dict(adapter.saved), dict(adapter.biases)
    for path in sites.saved_paths(model, adapter.config):
        if path not in saved:
            saved[path] = _filled(model.get_submodule(path), path, loose)
    for path in sites.bias_paths(model, adapter.config, found):
        if path not in biases:
            biases[path] = nn.Parameter(_taken(loose, path, owner_of(model, path)._parameters["bias"]))
    for path in list(loose):
        _drop_unchanged(model, path, loose)
    if loose:
        raise AdapterError(
            f"{len(loose)} tensors of the adapter have no place in {type(model).__name__}; first: "
            f"{next(iter(loose))}. Nothing was attached."
        )
    adapter.loose, adapter.saved, adapter.biases = loose, saved, biases


def _filled(module: nn.Module, path: str, loose: dict[str, Tensor]) -> nn.Module:
    copied = _trained_module(module)
    for name, tensor in copied.state_dict().items():  # buffers too: the running means of a batch norm
        tensor.copy_(_taken(loose, f"{path}.{name}", tensor))
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
    if owner not in dict(sites.logical_modules(model)):
        return
    base, stored = unwrapped(model.get_submodule(owner))._parameters.get(name), loose[path]
    if base is None:
        return
    if stored.shape != base.shape or not torch.allclose(
        stored.float(), base.detach().float().cpu(), rtol=2**-7, atol=1e-4
    ):
        raise AdapterError(
            f"the adapter brings its own {path} {tuple(stored.shape)}, which is not the base's {tuple(base.shape)}: "
            "the vocabulary was resized or the embedding trained. Load that base model. Nothing was attached."
        )
    del loose[path]
