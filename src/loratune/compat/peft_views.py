"""Factors whose tensors live in a layer's containers, named as PEFT names them (`lora_A["default"].weight`).

A factor reads them there, so that whatever moves, casts, shards or replaces them is seen by both. Shapes as in
`loratune.adapter.factor`; PEFT keeps the B of a convolution with a kernel of size 1, stacked experts in one matrix, and
the rows of an embedding themselves, not their change.
"""

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from loratune.adapter.factor import LowRank, Tied, TokenRows

if TYPE_CHECKING:
    from loratune.compat.peft_layers import LoraLayer
    from loratune.compat.peft_wrappers import TrainableTokensWrapper


class Tensors(nn.Module):
    """A holder of one trained tensor called `weight`, and of a start (A0, B0) that is not saved."""

    def __init__(self, weight: Tensor | None = None, start: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight)
        self.register_buffer("A0", None if start is None else start[0], persistent=False)
        self.register_buffer("B0", None if start is None else start[1], persistent=False)


class TiedTensor(nn.Module):
    """What stands for A or B of a head that is tied to an embedding: `weight` is the other's tensor, turned round."""

    def __init__(self, factor: Tied, name: str) -> None:
        super().__init__()
        self.__dict__.update(factor=factor, name=name)

    @property
    def weight(self) -> Tensor:
        return getattr(self.__dict__["factor"], self.__dict__["name"])


class View(LowRank):
    """A factor whose tensors live in a layer's containers; it has none of its own."""

    def __init__(self, layer: "LoraLayer", name: str, source: LowRank, experts: int | None) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(layer=layer, name=name, experts=experts)
        self.scale, self.dropout, self.groups = source.scale, source.dropout, source.groups
        self.lora_alpha = source.scale * source.rank

    def _held(self, container: str) -> Any:
        modules, name = getattr(self.__dict__["layer"], container), self.__dict__["name"]
        return modules[name] if name in modules else None  # noqa: SIM401  # a ModuleDict has no get

    @property
    def _pair(self) -> tuple[Any, Any]:
        layer, name = self.__dict__["layer"], self.__dict__["name"]
        if name in layer.lora_embedding_A:
            return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        return layer.lora_A[name].weight, layer.lora_B[name].weight

    @property
    def A(self) -> Any:  # type: ignore[override]
        experts = self.__dict__["experts"]
        return self._pair[0] if experts is None else self._pair[0].unflatten(0, (experts, -1))

    @property
    def B(self) -> Any:  # type: ignore[override]
        B, experts = self._pair[1], self.__dict__["experts"]
        if experts is not None:
            return B.unflatten(1, (-1, experts)).permute(2, 0, 1)
        return B if B.ndim == 2 else B.flatten(1)  # a convolution's B has a kernel of size 1

    @property
    def bias(self) -> Any:  # type: ignore[override]
        return getattr(self._held("lora_B"), "bias", None)

    @property
    def magnitude(self) -> Any:  # type: ignore[override]
        found = self._held("lora_magnitude_vector")
        return None if found is None else found.weight.flatten()

    @property
    def A0(self) -> Any:  # type: ignore[override]
        return getattr(self._held("lora_start"), "A0", None)

    @property
    def B0(self) -> Any:  # type: ignore[override]
        return getattr(self._held("lora_start"), "B0", None)

    @property
    def is_plain(self) -> bool:
        """Whether the fused path may be taken: not with a scale that is a tensor (hot-swap), which addmm's alpha would
        read back to the host at every layer."""
        return not isinstance(self.scale, Tensor) and super().is_plain

    def set_scale(self, scale: float) -> None:
        """Sets the scale that the configuration gives, in place where it is a tensor."""
        self.lora_alpha = scale * self.rank
        if isinstance(self.scale, Tensor):
            self.scale.fill_(scale)
        else:
            self.scale = scale

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
        """Yields the trained tensors as PEFT shapes them."""
        magnitude = self._held("lora_magnitude_vector")
        tensors = {"A": self._pair[0], "B": self._pair[1], "bias": self.bias}
        tensors["magnitude"] = None if magnitude is None else magnitude.weight
        yield from ((key, value) for key, value in tensors.items() if value is not None)

    def take(self, other: LowRank) -> None:
        """Gives the tensors the values of another factor, in place where the shapes agree."""
        experts = self.__dict__["experts"]
        A, B, start = other.A.detach(), other.B.detach(), self._held("lora_start")
        if start is not None and other.A0 is None:  # the file's form, rank 2 R: A above A0 and B beside -B0
            rank = A.shape[0] // 2
            start.A0, start.B0 = A[rank:].to(start.A0), -B[:, rank:].to(start.B0)
            A, B = A[:rank], B[:, :rank]
        if experts is not None:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        values: dict[str, Any] = {"A": A, "B": B, "bias": other.bias, "magnitude": other.magnitude}
        for key, parameter in self.named_parameters():
            value = values[key]
            if value.numel() == parameter.numel():
                parameter.data.copy_(value.reshape(parameter.shape))
            else:  # another rank
                parameter.data = value[(...,) + (None,) * (parameter.ndim - value.ndim)].to(parameter, copy=True)


class RowsView(TokenRows):
    """Trained rows of an embedding, kept as PEFT keeps them: the rows themselves, whose change is the factor's B."""

    def __init__(self, layer: "TrainableTokensWrapper", name: str, source: TokenRows) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(layer=layer, name=name)
        self.bias = self.magnitude = self.A0 = self.B0 = None  # type: ignore[assignment]
        self.scale, self.dropout, self.groups, self.lora_alpha = 1.0, 0.0, 1, source.rank

    @property
    def rows(self) -> nn.Parameter:
        return self.__dict__["layer"].token_adapter.trainable_tokens_delta[self.__dict__["name"]]

    @property
    def A(self) -> Any:  # type: ignore[override]
        return self.__dict__["layer"].token_adapter.one_hot[self.__dict__["name"]].A0

    @property
    def indices(self) -> Any:  # type: ignore[override]
        return self.A.argmax(dim=1)

    @property
    def original(self) -> Tensor:
        """The base's rows; merging replaces the weight they are from."""
        return self.__dict__["layer"].token_adapter.trainable_tokens_original[self.__dict__["name"]].to(self.rows)

    @property
    def B(self) -> Any:  # type: ignore[override]
        return (self.rows - self.original).T

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
        yield "rows", self.rows

    def take(self, other: LowRank) -> None:
        self.rows.data.copy_(self.original + other.B.detach().T.to(self.rows))


class Values(MutableMapping[str, Any]):
    """One number of each adapter at a layer, by name, read and written where the factor keeps it."""

    def __init__(self, layer: "LoraLayer", attribute: str) -> None:
        self.layer, self.attribute = layer, attribute

    def __getitem__(self, name: str) -> Any:
        return getattr(self.layer.placed[name][0], self.attribute)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.layer.placed[name][0], self.attribute, value)

    def __delitem__(self, name: str) -> None:
        del self.layer.placed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer.placed)

    def __len__(self) -> int:
        return len(self.layer.placed)
