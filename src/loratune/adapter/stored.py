"""What the factors of a file are before a model has placed them: stacked experts, groups, an older layout of experts.

Shapes: O outputs, I inputs, R rank of each expert, E experts. PEFT stores the factors of a parameter W (E, O, I) as
A (E R, I) and B (O, R E); PEFT 0.18 stored them the other way round, A (E R, O) and B (I, R E).
"""

import torch
from torch import Tensor

from loratune.adapter.adapter import Adapter
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank
from loratune.errors import AdapterError

_INNER = ".base_layer"


def is_stacked(config: LoraConfig, path: str, factor: LowRank) -> bool:
    """Whether a factor read from a file holds all the experts of a layer in one: its rows are more than the rank."""
    return bool(config.target_parameters) and factor.A.shape[0] != config.rank(path)


def ungrouped(factor: LowRank) -> LowRank:
    """Returns a grouped convolution's factor with B (O, R) in place of (O, R / groups); others as they are."""
    if factor.groups == 1:
        return factor
    blocks = factor.B.detach().flatten(1).chunk(factor.groups)
    return LowRank(factor.A.detach(), torch.block_diag(*blocks), factor.scale)


def expert_layout(adapter: Adapter) -> str | None:
    """Returns "peft" or "peft-0.18", the layout of a file's stacked experts; None if the file cannot tell.

    A gate_up_proj (2 F, H) and a down_proj (H, F) of one module tell: in today's layout A of the first (inner) has as
    many columns, H, as B of the second has rows; in the older one the rows of the first B and the columns of the
    second A are H. Both never hold at once.
    """
    votes: set[str] = set()
    for path, outer in adapter.factors.items():
        inner = adapter.factors.get(path + _INNER)
        if inner is None or not is_stacked(adapter.config, path, outer):
            continue
        if inner.A.shape[1] == outer.B.shape[0]:
            votes.add("peft")
        if inner.B.shape[0] == outer.A.shape[1]:
            votes.add("peft-0.18")
    return votes.pop() if len(votes) == 1 else None


def to_current_layout(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns (A, B) of stacked experts in today's layout from those of PEFT 0.18: each expert's update transposed.

    Raises AdapterError if `rank` does not divide them. The columns of B count the experts fastest: (O, R, E).
    """
    rows, experts = A.shape[0], A.shape[0] // rank
    if rows % rank or B.shape[1] != rows:
        raise AdapterError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are not those of experts of rank {rank}.")
    new_A = B.reshape(B.shape[0], rank, experts).permute(2, 1, 0).reshape(rows, B.shape[0])
    new_B = A.reshape(experts, rank, A.shape[1]).permute(2, 1, 0).reshape(A.shape[1], rows)
    return new_A.contiguous(), new_B.contiguous()
