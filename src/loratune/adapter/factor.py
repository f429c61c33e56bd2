"""LowRank: the two small matrices of LoRA at one site, and the mathematics done with them.

Shapes: T tokens, I inputs, O outputs, R rank, E experts.  A_RI (R, I), B_OR (O, R), x_TI (T, I).
A convolution's A is (R, I / groups, *kernel) and its B (O, R / groups); stacked experts have A (E, R, I), B (E, O, R).
"""

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """The update s B A of one frozen weight: y = W x + s B (A x).

    A and B are float32 (float64 where the base is), trainable; the scale s is a plain number.
    Hu et al. 2021, arXiv 2106.09685, equation 3.

    bias: (O,) trained bias of B (`lora_bias`), scaled as B is. magnitude: (O,) trained magnitudes m of DoRA.
    start: (A0, B0), frozen, for beginnings other than B A = 0 (PiSSA, OLoRA, orthogonal): the update is
    s (B A - B0 A0), of rank 2 R, so that the base weight need not change and step 0 is the base model.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: float = 0.0,
        *,
        bias: Tensor | None = None,
        magnitude: Tensor | None = None,
        start: tuple[Tensor, Tensor] | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.register_buffer("A0", None if start is None else start[0])
        self.register_buffer("B0", None if start is None else start[1])
        self.scale = scale
        self.dropout = dropout
        self.groups = groups

    @property
    def rank(self) -> int:
        """R, the rank of what is trained (of each expert)."""
        return self.A.shape[-2 if self.A.ndim == 3 and self.B.ndim == 3 else 0]

    @property
    def is_plain(self) -> bool:
        """Whether the update is s B A x and nothing else."""
        return self.bias is None and self.magnitude is None and self.A0 is None

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns (A, B) of the whole update in a type; with a `start`, A above A0 and B beside -B0."""
        A, B = self.A, self.B
        if self.A0 is not None:
            A, B = torch.cat([A, self.A0]), torch.cat([B, -self.B0], dim=1)  # type: ignore[operator]
        return A.to(dtype), B.to(dtype)

    def update(self, x_TI: Tensor) -> Tensor:
        """Returns s (B (A x) + bias) in the type of x: (..., I) -> (..., O)."""
        A_RI, B_OR = self.pair(x_TI.dtype)
        update = ((x_TI @ A_RI.T) * self.scale) @ B_OR.T
        return update if self.bias is None else update + self.bias.to(x_TI.dtype) * self.scale

    def delta(self) -> Tensor:
        """Returns s B A in full, (O, I), (O, I / groups, *kernel) or (E, O, I), in the factors' own type."""
        with torch.no_grad():
            return self.live_delta()

    def live_delta(self) -> Tensor:
        """`delta`, differentiable."""
        A, B = self.pair(self.A.dtype)
        if B.ndim == 3:
            return (B * self.scale) @ A
        blocks = (self.groups, -1)
        delta = (B.reshape(*blocks, B.shape[1]) * self.scale) @ A.reshape(*blocks, A[0].numel())
        return delta.reshape(B.shape[0], *A.shape[1:])

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def extra_repr(self) -> str:
        shapes = f"A={tuple(self.A.shape)}, B={tuple(self.B.shape)}"
        return f"{shapes}, r={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class TokenRows(LowRank):
    """Trained rows of an embedding (`trainable_token_indices`) as a factor: s = 1, A one-hot and frozen, B the change.

    W[token_j] + B[:, j]: A (R, tokens) picks the R chosen rows, B (dim, R) starts at zero.
    """

    def __init__(self, indices: Tensor, num_rows: int, dim: int, dtype: torch.dtype) -> None:
        one_hot = torch.zeros(len(indices), num_rows, dtype=dtype)
        one_hot[torch.arange(len(indices)), indices] = 1.0
        super().__init__(one_hot, torch.zeros(dim, len(indices), dtype=dtype), 1.0)
        del self._parameters["A"]
        self.register_buffer("A", one_hot)
        self.register_buffer("indices", indices)


class Tied(LowRank):
    """The factor of a layer that shares its weight with an adapted one: the same tensors, and none of its own.

    transposed: for a head (O, I) whose embedding stores A over tokens and B over dimensions: W + s (B A)^T.
    """

    def __init__(self, source: LowRank, *, transposed: bool) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(source=source, transposed=transposed)
        self.bias = self.magnitude = self.A0 = self.B0 = None  # type: ignore[assignment]

    @property
    def source(self) -> LowRank:
        return self.__dict__["source"]

    @property
    def transposed(self) -> bool:
        return self.__dict__["transposed"]

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.source.scale

    @property
    def dropout(self) -> float:  # type: ignore[override]
        return self.source.dropout

    @property
    def groups(self) -> int:  # type: ignore[override]
        return self.source.groups

    @property
    def A(self) -> Tensor:  # type: ignore[override]
        return self.source.B.T if self.transposed else self.source.A

    @property
    def B(self) -> Tensor:  # type: ignore[override]
        return self.source.A.T if self.transposed else self.source.B

    @property
    def is_plain(self) -> bool:
        return self.source.is_plain

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns (A, B) of the whole update: the source's, or where transposed (B^T, A^T)."""
        A, B = self.source.pair(dtype)
        return (B.T, A.T) if self.transposed else (A, B)

    def live_delta(self) -> Tensor:
        """The source's update, bit for bit: merged, both layers hold the same weight again."""
        delta = self.source.live_delta()
        return delta.T if self.transposed else delta
