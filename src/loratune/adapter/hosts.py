"""Hosts: how a low-rank factor meets each kind of frozen layer. One table, one entry per kind.

A host offers what the frozen layer does to an input (`forward`) and to an output's gradient (`input_grad`), never a
raw weight, so that other storage of W plugs in; and it knows how its weight lies in memory (`oriented`).
Shapes: T tokens, I inputs, O outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapter.factor import LowRank


@dataclass(frozen=True, slots=True)
class Host:
    """One kind of layer.

    sizes(module) -> (I, O); forward(module, x_TI) -> y_TO with the bias; input_grad(module, g_TO) -> g W, (T, I), or
    None where the kind has no fused path; update(module, factor, x) -> the update in the output's shape;
    oriented(delta_OI) -> the delta as the kind stores its weight. `fan_in_fan_out`: the weight is stored (I, O).
    """

    kind: str
    sizes: Callable[[Any], tuple[int, int]]
    update: Callable[[Any, LowRank, Tensor], Tensor]
    oriented: Callable[[Tensor], Tensor]
    forward: Callable[[Any, Tensor], Tensor] | None = None
    input_grad: Callable[[Any, Tensor], Tensor] | None = None
    fan_in_fan_out: bool = False
    takes_dropout: bool = True


def _update_linear(module: nn.Module, factor: LowRank, x_TI: Tensor) -> Tensor:
    return factor.update(x_TI)


def _update_embedding(module: nn.Embedding, factor: LowRank, ids: Tensor) -> Tensor:
    """One-hot inputs pick columns of A; a scaled embedding (Gemma) scales its update too, as W + s B A would be."""
    rows = F.embedding(ids, factor.A.T)
    update = (rows * factor.scale) @ factor.B.T
    scale = getattr(module, "embed_scale", None)
    return update.to(module.weight.dtype) * (1.0 if scale is None else scale)


LINEAR = Host(
    kind="Linear",
    sizes=lambda module: (module.in_features, module.out_features),
    update=_update_linear,
    oriented=lambda delta: delta,
    forward=lambda module, x: F.linear(x, module.weight, module.bias),
    input_grad=lambda module, g: g @ module.weight,
)
# A Linear subclass with a forward of its own (a quantised one, say) is called as it is, on the plain path.
OTHER_LINEAR = Host(kind="Linear", sizes=LINEAR.sizes, update=_update_linear, oriented=LINEAR.oriented)
CONV1D = Host(
    kind="Conv1D",
    sizes=lambda module: (module.weight.shape[0], module.weight.shape[1]),
    update=_update_linear,
    oriented=lambda delta: delta.T,
    forward=lambda module, x: module.bias.addmm(x, module.weight) if module.bias is not None else x @ module.weight,
    input_grad=lambda module, g: g @ module.weight.T,
    fan_in_fan_out=True,
)
EMBEDDING = Host(
    kind="Embedding",
    sizes=lambda module: (module.num_embeddings, module.embedding_dim),
    update=_update_embedding,
    oriented=lambda delta: delta.T,
    takes_dropout=False,
)


def host_of(module: nn.Module) -> Host | None:
    """Returns the host for a module, or None if a factor cannot be attached to its kind."""
    if isinstance(module, nn.Linear):
        return LINEAR if type(module).forward is nn.Linear.forward else OTHER_LINEAR
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' GPT-2 layer: weight is (I, O)
        return CONV1D
    return EMBEDDING if isinstance(module, nn.Embedding) else None


HOST_KINDS = ("Linear", "Conv1D", "Embedding")
