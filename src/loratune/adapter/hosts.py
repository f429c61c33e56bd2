"""Hosts: how a low-rank factor meets each kind of frozen layer. One table, one entry per kind.

A host offers what the frozen layer does to an input (`forward`) and to an output's gradient (`input_grad`), never a
raw weight, so that other storage of W plugs in; and it knows how its weight lies in memory.
Shapes: T tokens, I inputs, O outputs, K the weights of one output.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapter.factor import LowRank


@dataclass(frozen=True, slots=True)
class Host:
    """One kind of layer.

    inputs(module) -> the shape of one row of A; outputs(module) -> O; forward(module, x) -> y with the bias;
    linear(module, x) -> y without it; input_grad(module, g_TO) -> g W, (T, I), or None where there is no fused path;
    update(module, factor, x) -> the update in the output's shape; oriented(delta) -> a delta as the kind stores its
    weight; output_dim: the dimension of the stored weight that counts outputs; channel_dim: that of y.
    """

    kind: str
    inputs: Callable[[Any], tuple[int, ...]]
    outputs: Callable[[Any], int]
    update: Callable[[Any, LowRank, Tensor], Tensor]
    linear: Callable[[Any, Tensor], Tensor]
    oriented: Callable[[Tensor], Tensor]
    output_dim: int = 0
    channel_dim: int = -1
    forward: Callable[[Any, Tensor], Tensor] | None = None
    input_grad: Callable[[Any, Tensor], Tensor] | None = None
    takes_dropout: bool = True

    @property
    def fan_in_fan_out(self) -> bool:
        return self.kind == "Conv1D"

    def sizes(self, module: Any) -> tuple[int, int]:
        """(I, O): the number of weights of one output, and of outputs."""
        return math.prod(self.inputs(module)), self.outputs(module)

    def rows(self, weight: Tensor) -> Tensor:
        """Returns a stored weight as (O, K)."""
        return weight.movedim(self.output_dim, 0).flatten(1)

    def along_outputs(self, vector_O: Tensor, like: Tensor) -> Tensor:
        """Returns a vector of O entries shaped so that it multiplies an output y channel by channel."""
        shape = [1] * like.ndim
        shape[self.channel_dim] = -1
        return vector_O.view(shape)

    def along_weight(self, vector_O: Tensor, weight: Tensor) -> Tensor:
        """Returns a vector of O entries shaped so that it multiplies a stored weight row by row."""
        shape = [1] * weight.ndim
        shape[self.output_dim] = -1
        return vector_O.view(shape)


def _same(delta: Tensor) -> Tensor:
    return delta


def _update_linear(module: nn.Module, factor: LowRank, x_TI: Tensor) -> Tensor:
    return factor.update(x_TI)


def _linear_without_bias(module: Any, x: Tensor) -> Tensor:
    y = module(x)
    return y if module.bias is None else y - module.bias


def _update_embedding(module: nn.Embedding, factor: LowRank, ids: Tensor) -> Tensor:
    """One-hot inputs pick columns of A; a scaled embedding (Gemma) scales its update too, as W + s B A would be."""
    A, B = factor.pair(factor.A.dtype)
    # The rows of W come from `embedding` with its own settings: a padding row, whose gradient is zero, stays as it is.
    rows = F.embedding(ids, A.T, padding_idx=module.padding_idx)
    update = (rows * factor.scale) @ B.T
    scale = getattr(module, "embed_scale", None)
    return update.to(module.weight.dtype) * (1.0 if scale is None else scale)


_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def _convolved(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Convolves as the layer does: its stride, padding, padding mode and dilation, with another weight."""
    padding = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    return _CONV[weight.ndim](x, weight, bias, module.stride, padding, module.dilation, groups)


def _update_conv(module: Any, factor: LowRank, x: Tensor) -> Tensor:
    """A convolves as the layer does and B mixes its R channels point by point, group by group."""
    A, B = factor.pair(x.dtype)
    z = _convolved(module, x, A, None, factor.groups)
    point = B[(...,) + (None,) * (A.ndim - 2)] * factor.scale
    bias = None if factor.bias is None else factor.bias.to(x.dtype) * factor.scale
    return _CONV[A.ndim](z, point, bias, groups=factor.groups)


def _linear_conv(module: Any, x: Tensor) -> Tensor:
    return _convolved(module, x, module.weight, None, module.groups)


LINEAR = Host(
    kind="Linear",
    inputs=lambda module: (module.in_features,),
    outputs=lambda module: module.out_features,
    update=_update_linear,
    linear=lambda module, x: F.linear(x, module.weight),
    oriented=_same,
    forward=lambda module, x: F.linear(x, module.weight, module.bias),
    input_grad=lambda module, g: g @ module.weight,
)
# A Linear subclass with a forward of its own (a quantised one, say) is called as it is, on the plain path.
OTHER_LINEAR = Host(
    kind="Linear",
    inputs=LINEAR.inputs,
    outputs=LINEAR.outputs,
    update=_update_linear,
    linear=_linear_without_bias,
    oriented=_same,
)
CONV1D = Host(
    kind="Conv1D",
    inputs=lambda module: (module.weight.shape[0],),
    outputs=lambda module: module.weight.shape[1],
    update=_update_linear,
    linear=lambda module, x: x @ module.weight,
    oriented=lambda delta: delta.T,
    output_dim=1,
    forward=lambda module, x: x @ module.weight if module.bias is None else module.bias.addmm(x, module.weight),
    input_grad=lambda module, g: g @ module.weight.T,
)
EMBEDDING = Host(
    kind="Embedding",
    inputs=lambda module: (module.num_embeddings,),
    outputs=lambda module: module.embedding_dim,
    update=_update_embedding,
    linear=lambda module, ids: module(ids),
    oriented=lambda delta: delta.T,
    output_dim=1,
    takes_dropout=False,
)
CONV = Host(
    kind="Conv",
    inputs=lambda module: (module.in_channels // module.groups, *module.kernel_size),
    outputs=lambda module: module.out_channels,
    update=_update_conv,
    linear=_linear_conv,
    oriented=_same,
    channel_dim=1,
)


def host_of(module: nn.Module) -> Host | None:
    """Returns the host for a module, or None if a factor cannot be attached to its kind."""
    if isinstance(module, nn.Linear):
        return LINEAR if type(module).forward is nn.Linear.forward else OTHER_LINEAR
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' GPT-2 layer: weight is (I, O)
        return CONV1D
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return CONV
    return EMBEDDING if isinstance(module, nn.Embedding) else None


HOST_KINDS = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention")


# ---- parameters without a layer of their own -----------------------------------------------------------------------


def stacked(name: str, module: nn.Module) -> Host:
    """Returns the host of one parameter of a module, 2-D (O, I) or stacked experts (E, O, I), or (E, I, O) where the
    module says `is_transposed`: the layer computes with W + s B A in W's place."""
    weight: Tensor = attrgetter(name)(module)  # while FSDP computes, it is no Parameter
    swapped = weight.ndim == 3 and bool(getattr(module, "is_transposed", False))
    outputs, inputs = (weight.shape[-1], weight.shape[-2]) if swapped else (weight.shape[-2], weight.shape[-1])
    return Host(
        kind="Parameter",
        inputs=lambda _: (inputs,),
        outputs=lambda _: outputs,
        update=_no_update,
        linear=_no_update,
        oriented=(lambda delta: delta.transpose(-1, -2)) if swapped else _same,
        takes_dropout=False,
    )


def _no_update(*_: Any) -> Tensor:
    raise AssertionError("a parameter's factor changes the weight, not the output")


def num_experts(weight: Tensor) -> int | None:
    """Returns E of a stacked parameter, None of a plain matrix."""
    return weight.shape[0] if weight.ndim == 3 else None


def needs_float32(weight: Tensor) -> torch.dtype:
    """Factors are float32, or float64 where the base is: never the half precision of a stored base."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
