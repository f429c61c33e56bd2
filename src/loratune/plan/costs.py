"""What one token, one label and one step cost on a model: memory and operations, from shapes alone.

Shapes: H hidden, F width of the MLP, N heads of size D (K for keys and values), V vocabulary, T tokens of a
micro-batch, n labels, R numbers of the factors. Every figure follows from how `model/blocks.py`, `model/attention.py`
and `model/loss.py` compute; where a family is run by its own code, what is kept is about the inputs and outputs of its
linear layers (counted over tiny families: see tests/plan/test_costs.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loratune.adapter.adapter import Adapter
from loratune.adapter.hosts import host_of
from loratune.explain import facts
from loratune.model import layers
from loratune.model.attention import SHORT_TOKENS
from loratune.model.blocks import ATTENTION, MLP
from loratune.model.loss import BLOCK_ROWS, CHUNK, WHOLE_ROWS
from loratune.plan.work import Pack
from loratune.train.measure import checkpoint_bytes

FLOAT32 = 4


@dataclass(frozen=True)
class Base:
    """A base model's shapes. stored: the type of its files; sizes: (outputs, inputs) of each linear layer but the head;
    is_blocks: whether every layer runs as one function; heads: query heads over all layers; contexts: N D over all
    layers."""

    model: nn.Module
    dtype: torch.dtype  # that it computes in
    stored: torch.dtype
    device: torch.device
    num_parameters: int
    sizes: dict[str, tuple[int, int]]
    head: str | None
    vocabulary: int
    hidden: int
    num_layers: int
    packs: bool
    is_blocks: bool
    kept: int  # floats a token that the blocks of all layers keep, gate and up apart
    gates: int  # those of gate and up, of all layers
    width: int  # F
    late: tuple[str, ...]  # the linear layers behind the last attention, which only rows with a label pass
    trunk: int  # weights of the linear layers that a token passes, the head apart
    heads: int
    contexts: int

    @property
    def bytes_per_float(self) -> int:
        return self.dtype.itemsize


def base_of(model: nn.Module, dtype: torch.dtype, device: torch.device, stored: torch.dtype = torch.float32) -> Base:
    """Reads the shapes of a plain model, which may be on the meta device."""
    shapes = facts.of(model, dtype)
    config: Any = getattr(model.config, "get_text_config", lambda: model.config)()  # pyright: ignore
    output = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    head = next((path for path, module in model.named_modules() if module is output), None) if output else None
    sizes = {path: _sizes(model.get_submodule(path)) for path in shapes.paths if path != head}
    known_layers: list[Any] = [module for module in model.modules() if layers.norms_of(module)]
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    vocabulary, hidden = (int(size) for size in embedding.weight.shape)
    num_layers, heads = int(config.num_hidden_layers), int(getattr(config, "num_attention_heads", 0) or 0)
    width = int(getattr(config, "head_dim", 0) or hidden // max(1, heads))
    return Base(
        model=model,
        dtype=dtype,
        stored=stored,
        device=device,
        num_parameters=shapes.num_parameters,
        sizes=sizes,
        head=head,
        vocabulary=vocabulary,
        hidden=hidden,
        num_layers=num_layers,
        packs=bool(getattr(type(model), "_can_set_attn_implementation", bool)()),
        is_blocks=len(known_layers) == num_layers and dtype in (torch.float32, torch.float64),
        kept=sum(_kept(layer) for layer in known_layers),
        gates=sum(2 * _sizes(layer.mlp.up_proj)[0] for layer in known_layers),
        width=max((_sizes(layer.mlp.up_proj)[0] for layer in known_layers), default=0),
        late=_late(model, known_layers[-1]) if known_layers else (),
        trunk=shapes.frozen_weights - (vocabulary * hidden if head in shapes.paths else 0),
        heads=num_layers * heads,
        contexts=num_layers * heads * width,
    )


def _sizes(module: nn.Module) -> tuple[int, int]:
    host = host_of(module)
    assert host is not None
    inputs, outputs = host.sizes(module)
    return outputs, inputs


def _late(model: nn.Module, last: Any) -> tuple[str, ...]:
    names = {id(getattr(last.mlp, name)) for name in MLP} | {id(last.self_attn.o_proj)}
    return tuple(path for path, module in model.named_modules() if id(module) in names)


@dataclass(frozen=True)
class Costs:
    """Bytes and operations of a configuration on a model."""

    weights: int  # bytes of the base
    num_trained: int
    kept: int  # bytes a token, of all layers, until the backward pass
    kept_long: int  # the same, more, where a document is longer than attention that is written out takes
    weights_of_attention: int  # bytes a square, of all layers, where it is written out
    passing: int  # bytes a token, in the backward pass of one layer
    by_label: int  # bytes a label
    loss: int  # bytes, whatever the batch
    own_loss: int  # bytes a token of the rows on which our loss is compared with the model's own
    token_flops: float
    label_flops: float
    square_flops: float
    checkpoint: int  # bytes on disk
    adapter: int

    @property
    def trained(self) -> int:
        """Bytes of what is trained, in float32: the numbers, their gradients and two moments."""
        return 4 * FLOAT32 * self.num_trained

    def step_bytes(self, pack: Pack) -> int:
        """Returns the most that a micro-batch takes above the model and what is trained."""
        is_short = pack.longest <= SHORT_TOKENS
        attention = self.weights_of_attention * pack.squares if is_short else self.kept_long * pack.tokens
        return (self.kept + self.passing) * pack.tokens + attention + self.by_label * pack.labels + self.loss

    def step_flops(self, work: Pack) -> float:
        """Returns the operations of a training step: forward, the gradients of inputs and of factors."""
        return self.token_flops * work.tokens + self.label_flops * work.labels + self.square_flops * work.squares


def costs_of(base: Base, adapter: Adapter, *, recompute: bool, as_stored: bool = False) -> Costs:
    """Returns what an adapter on a model costs; the adapter's tensors may be on the meta device. as_stored: whether the
    base's weights stay in memory as they are stored."""
    size, factors = base.bytes_per_float, {path: _numbers(each) for path, each in adapter.factors.items()}
    head_numbers = factors.pop(base.head, 0) if base.head else 0
    whole_head = base.head in adapter.saved
    is_blocks = base.is_blocks and not adapter.config.use_dora
    kept, passing = _block_floats(base, recompute) if is_blocks else _plain_floats(base)
    kept += sum(each.rank for path, each in adapter.factors.items() if path != base.head) if is_blocks else 0  # z
    is_again = recompute and is_blocks  # gate and up, and the attention's P
    again = 2 * sum(_weights(base, name) for name in ("gate_proj", "up_proj")) if is_again else 0
    late = () if not is_blocks or _draws_late(base, adapter) else base.late
    late_floats = sum(
        base.sizes[path][0] for path in late if not (recompute and path.endswith(("gate_proj", "up_proj")))
    )
    late_flops = sum(4.0 * base.sizes[path][0] * base.sizes[path][1] + 6.0 * factors.get(path, 0) for path in late)
    head_weights = base.vocabulary * base.hidden if base.head else 0
    of_head = base.vocabulary * (base.hidden if whole_head else adapter.factors[base.head].rank if head_numbers else 0)  # pyright: ignore
    return Costs(
        weights=base.num_parameters * (base.stored.itemsize if as_stored else size),
        num_trained=adapter.num_parameters(),
        kept=(kept - late_floats) * size,
        kept_long=2 * base.contexts * size,
        weights_of_attention=0 if is_again else base.heads * size,
        passing=passing * size,
        by_label=(3 * base.hidden + late_floats) * size,
        loss=_loss_floats(base, of_head) * size,
        own_loss=3 * base.vocabulary * FLOAT32,
        token_flops=4.0 * base.trunk + 6.0 * sum(factors.values()) + again - late_flops,
        label_flops=4.0 * head_weights + 6.0 * head_numbers + 2.0 * head_weights * whole_head + late_flops,
        square_flops=(14.0 if is_again else 12.0) * base.contexts,
        checkpoint=checkpoint_bytes(adapter),
        adapter=FLOAT32 * adapter.num_parameters(),
    )


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _draws_late(base: Base, adapter: Adapter) -> bool:
    """Whether a dropout mask is drawn behind the last attention: masks are drawn for every position."""
    return any(adapter.factors[path].dropout for path in base.late if path in adapter.factors)


def _weights(base: Base, name: str) -> int:
    return sum(outputs * inputs for path, (outputs, inputs) in base.sizes.items() if path.endswith(name))


def _kept(layer: Any) -> int:
    """x, q, k, v, what attention returned, o or the state after it, and down where a norm follows it."""
    q, k, v, o = (_sizes(getattr(layer.self_attn, name)) for name in ATTENTION)
    norms = layers.norms_of(layer)
    assert norms is not None
    return q[1] + q[0] + k[0] + v[0] + o[1] + o[0] + (_sizes(layer.mlp.down_proj)[0] if norms[3] else 0)


def _block_floats(base: Base, recompute: bool) -> tuple[int, int]:
    """Returns (what all layers keep of a token, the most that passes through one in the backward pass).

    Passing: activated, its product with up, and three gradients of that width; four of the hidden size.
    """
    if recompute:
        return base.kept, 7 * base.width + 4 * base.hidden
    return base.kept + base.gates, 5 * base.width + 4 * base.hidden


def _plain_floats(base: Base) -> tuple[int, int]:
    widest = max(outputs for outputs, _ in base.sizes.values())
    return sum(outputs + inputs for outputs, inputs in base.sizes.values()), 4 * widest


def _loss_floats(base: Base, of_head: int) -> int:
    """Logits of a chunk of the vocabulary, or of all of it where the head learns; `of_head` numbers twice."""
    if base.head is None:
        return 0
    if of_head or base.device.type == "cuda":
        return base.vocabulary * WHOLE_ROWS + 2 * of_head
    return 2 * min(CHUNK, base.vocabulary) * BLOCK_ROWS


def shapes_to_measure(base: Base) -> list[tuple[int, int]]:
    """Returns the four shapes that hold most of the weights."""
    totals: dict[tuple[int, int], int] = {}
    for shape in base.sizes.values():
        totals[shape] = totals.get(shape, 0) + shape[0] * shape[1]
    return sorted(totals, key=lambda shape: -totals[shape])[:4]


def missing_roles(base: Base, preset: str) -> Iterator[str]:
    """Yields the roles of a preset that the model has no layer for."""
    from loratune.adapter import roles

    covered = roles.coverage(base.model, ())
    yield from (role for role in roles.PRESETS[preset] if not covered.roles[role].names)
