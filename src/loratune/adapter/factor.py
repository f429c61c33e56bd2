"""LowRank: the two small matrices of LoRA at one site, and the mathematics done with them.

Shapes: T tokens, I inputs, O outputs, R rank.  A_RI (R, I), B_OR (O, R), x_TI (T, I).
"""

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """The update s B A of one frozen weight: y = W x + s B (A x).

    A: (R, I), B: (O, R), both float32 (float64 where the base is), trainable; scale s: a plain number.
    Hu et al. 2021, arXiv 2106.09685, equation 3.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        assert A.shape[0] == B.shape[1], (A.shape, B.shape)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale
        self.dropout = dropout

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def update(self, x_TI: Tensor) -> Tensor:
        """Returns s B (A x) in the type of x: (..., I) -> (..., O)."""
        z_TR = x_TI @ self.A.to(x_TI.dtype).T
        return (z_TR * self.scale) @ self.B.to(x_TI.dtype).T

    def delta(self) -> Tensor:
        """Returns s B A in full, (O, I), in the factors' own type: what merging adds to W."""
        with torch.no_grad():
            return (self.B * self.scale) @ self.A

    def num_parameters(self) -> int:
        return self.A.numel() + self.B.numel()

    def extra_repr(self) -> str:
        rank, inputs = self.A.shape
        return f"in={inputs}, out={self.B.shape[0]}, r={rank}, scale={self.scale:g}, dropout={self.dropout:g}"
