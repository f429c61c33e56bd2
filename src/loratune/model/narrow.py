"""Frozen weights that stay in memory as they are stored, in two bytes, and are computed with as float32.

To everything that looks at it, a Narrow is the float32 tensor that loading as float32 gives, so that every layer of
every family computes the same bits: an operation gets the values widened, for its own time; a view, and rows that are
picked (an embedding's, a part of the head), stay narrow until then. What autograd keeps for the backward pass is the
Narrow itself. Widening takes 0.1 ns a value, a product of 512 tokens with it 10 ns; what is large (a head) is widened a
stretch of columns at a time, so that nothing of its size is ever copied.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.errors import ConfigError

DTYPES = (torch.bfloat16, torch.float16)
_Model = TypeVar("_Model", bound=nn.Module)
_aten = torch.ops.aten
_VIEWS: frozenset[Any] = frozenset((
    _aten.alias.default, _aten.detach.default, _aten.t.default, _aten.transpose.int, _aten.permute.default,
    _aten.view.default, _aten._unsafe_view.default, _aten.slice.Tensor, _aten.select.int, _aten.unsqueeze.default,
    _aten.squeeze.default, _aten.squeeze.dim, _aten.expand.default,
))  # fmt: skip
_PICKED: frozenset[Any] = frozenset((
    _aten.embedding.default, _aten.index.Tensor, _aten.index_select.default, _aten.gather.default,
))  # fmt: skip
_PRODUCTS: frozenset[Any] = frozenset((_aten.mm.default, _aten.addmm.default))
MOST = 1 << 22  # values widened at a time, 16 MB: a head (32768, 640) takes 7 ms for one token, widened whole 44 ms


class Narrow(Tensor):
    """A frozen float32 tensor whose values are held in `held`, as bfloat16 or float16.

    Writing to it raises ConfigError; a copy of it, which may be trained, is a plain float32 tensor.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls: type["Narrow"], held: Tensor) -> "Narrow":
        return Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=torch.float32,
            device=held.device, requires_grad=False,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Narrow({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return memo.setdefault(id(self), nn.Parameter(self.held.float(), requires_grad=self.requires_grad))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _VIEWS:
            return cls(func(_held(args[0]), *args[1:], **(kwargs or {})))
        if func in _PICKED:
            return func(_held(args[0]), *args[1:], **(kwargs or {})).float()
        if func in _PRODUCTS and isinstance(args[-1], Narrow) and args[-1].numel() > MOST and not kwargs:
            return _product(func, *args)
        if func._schema.is_mutable:
            _refuse_writing(func, args)
        return func(*map(_wide, args), **{key: _wide(value) for key, value in (kwargs or {}).items()})


def _held(value: Tensor) -> Tensor:
    return value.held if isinstance(value, Narrow) else value


def _wide(value: Any) -> Any:
    if isinstance(value, Narrow):
        return value.held.float()
    return [_wide(each) for each in value] if isinstance(value, list | tuple) else value


def _product(func: Any, *args: Any) -> Tensor:
    """Returns (bias +) x W for a large W (I, O), columns at a time."""
    *bias, x, right = args
    count = max(1, MOST // right.shape[0])
    parts = [slice(start, start + count) for start in range(0, right.shape[1], count)]
    return torch.cat([func(*(_wide(b)[..., part] for b in bias), _wide(x), _wide(right[:, part])) for part in parts], 1)


def _refuse_writing(func: Any, args: tuple[Any, ...]) -> None:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if isinstance(value, Narrow) and argument.alias_info is not None and argument.alias_info.is_write:
            raise ConfigError(
                f"{func} would write to a base weight that is held as {value.held.dtype}, which is frozen. Load the "
                'model with dtype="float32" to change its weights.'
            )


@contextmanager
def as_stored() -> Generator[None]:
    """Within the block, a model that is loaded as float32 keeps every stored tensor in its own type.

    transformers asks a model which of its tensors are to be loaded in another type: all of them, None being their own.
    """
    before = PreTrainedModel._get_dtype_plan
    PreTrainedModel._get_dtype_plan = lambda self, dtype: {"*": None}  # pyright: ignore
    try:
        yield
    finally:
        PreTrainedModel._get_dtype_plan = before


def narrow(model: _Model) -> _Model:
    """Puts a Narrow in the place of every parameter of two bytes, makes all else float32, and returns the model.

    A weight that several modules share stays one. The model saves what it holds.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                module._parameters[name] = made.setdefault(id(parameter), _narrowed(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()
    model.register_state_dict_post_hook(_save_held)
    return model


def _narrowed(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype not in DTYPES:
        return nn.Parameter(parameter.detach().float(), requires_grad=False)
    made: Any = Narrow(parameter.detach().clone())  # it was a view of the file, which somebody may write to
    return nn.Parameter(made, requires_grad=False)


def _save_held(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, value in state.items():
        state[name] = _held(value)


def held_bytes(model: nn.Module) -> int:
    """Returns the bytes that a model's parameters take in memory, each once."""
    return sum(_held(parameter).nbytes for parameter in model.parameters())
