"""The loss of a head, on label rows only, with the gradient formed in the forward pass and no logits kept.

Logits exist for a chunk of the vocabulary at a time, transposed (C, n): their exponentials are summed and multiplied
into the gradient at once, and what was summed before is scaled where a larger logit turns up (as in flash attention,
Dao et al. 2022). Only where the head itself learns, whose gradient needs the final sums, does a block of (V, n) exist.
On a CPU both products run at full speed in this layout (measured 132 against 102 GFLOP/s).

Shapes: n label rows, H hidden, V vocabulary, C a chunk of it, R rank of the head's own adapter (z_nR is its rank-sized
activation).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

CHUNK = 2048  # of the vocabulary: the exponentials of 320 rows stay in the cache
BLOCK_ROWS = 1024  # rows at a time; with more, a chunk of their logits leaves the cache
WHOLE_ROWS = 320  # rows at a time where the whole vocabulary's logits are needed; beyond, there is nothing to gain
# What exp gives below this adds nothing to a sum of at least 1, and is taken for this: below e^-87 float32 has but
# denormal numbers, with which a processor is up to 70 times slower, and a model that is sure of its answer has many.
_LEAST = {torch.float32: -60.0, torch.float64: -600.0}
EVEN_ROWS = 16  # a block of 153 rows runs at 97 GFLOP/s, of 160 at 159: rows are filled up to a multiple of this


@dataclass(frozen=True)
class HeadShape:
    """logits = cap(logit_scale * (W h + b + lora_scale * B z)), where cap(l) = softcap * tanh(l / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None
    lora_scale: float = 0.0


class _LabelLoss(Function):
    """(sum of -log softmax(logits)[label] over the rows, the same per row). The sum alone is differentiable.

    With p = softmax(l): dl = p - onehot(label); d h = W^T dl, and so on for each input that needs it.
    """

    @staticmethod
    def forward(
        ctx: Any, h_nH: Tensor, W_VH: Tensor, bias_V: Tensor | None, z_nR: Tensor | None, B_VR: Tensor | None,
        labels_n: Tensor, shape: HeadShape, memory: Tensor | None, with_grad: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        needs = ctx.needs_input_grad[:5] if with_grad else (False,) * 5
        losses_n, grads = _blocks((h_nH, W_VH, bias_V, z_nR, B_VR), needs, labels_n, shape, memory)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(losses_n)
        return losses_n.sum(), losses_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return (*(None if grad is None else grad * g.to(grad.dtype) for grad in ctx.saved_tensors), *(None,) * 4)


class _RowLosses(Function):
    """Each row's -log softmax(logits)[label], differentiable: the backward pass makes the logits again, and each row's
    dl is multiplied by the gradient of its loss."""

    @staticmethod
    def forward(
        ctx: Any, h_nH: Tensor, W_VH: Tensor, bias_V: Tensor | None, z_nR: Tensor | None, B_VR: Tensor | None,
        labels_n: Tensor, shape: HeadShape, memory: Tensor | None,
    ) -> Tensor:  # fmt: skip
        given = (h_nH, W_VH, bias_V, z_nR, B_VR)
        ctx.save_for_backward(*given, labels_n)
        ctx.shape, ctx.memory = shape, memory
        return _blocks(given, (False,) * 5, labels_n, shape, memory)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_n: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        *given, labels_n = ctx.saved_tensors
        _, grads = _blocks(given, ctx.needs_input_grad[:5], labels_n, ctx.shape, ctx.memory, g_n)
        return (*grads, *(None,) * 3)


def _blocks(
    given: Sequence[Any], needs: Sequence[bool], labels_n: Tensor, shape: HeadShape, memory: Tensor | None,
    weights_n: Tensor | None = None,
) -> "tuple[Tensor, _Gradients]":  # fmt: skip
    """Returns (each row's loss (n,), the gradients of what needs one, of the sum of the losses times their weights).

    given: h, W, bias, z and B as in `label_loss`; weights_n (n,), 1 where there are none.
    """
    h_nH, W_VH, bias_V, z_nR, B_VR = given
    head = _Head(W_VH, bias_V, B_VR, shape)
    grads = _Gradients(*(None if x is None or not need else torch.zeros_like(x) for x, need in zip(given, needs)))
    whole = grads.of_head or W_VH.device.type != "cpu"
    chunk, most = (len(W_VH), WHOLE_ROWS) if whole else (min(CHUNK, len(W_VH)), BLOCK_ROWS)
    # Blocks of even size: ceil(n / k) rows each, so that the last one is not thin.
    size = _filled_up(math.ceil(len(h_nH) / max(1, math.ceil(len(h_nH) / most))))
    buffer = _buffer(memory, W_VH, chunk * size)
    losses_n = torch.empty(len(h_nH), dtype=_wide(h_nH.dtype), device=h_nH.device)
    for start in range(0, len(h_nH), size):
        rows = slice(start, min(start + size, len(h_nH)))
        z, weights = (None if each is None else each[rows] for each in (z_nR, weights_n))
        losses_n[rows] = _block(h_nH[rows], z, labels_n[rows], weights, rows, head, grads, buffer, chunk)
    return losses_n, grads


class _Head(NamedTuple):
    """What turns a hidden state into logits."""

    W_VH: Tensor
    bias_V: Tensor | None
    B_VR: Tensor | None
    shape: HeadShape

    def logits(self, part: slice, h: Tensor, z: Tensor | None, buffer: Tensor) -> Tensor:
        """Returns those of a chunk of the vocabulary, (C, n), in at least float32. h and z carry their scales."""
        W = self.W_VH[part]
        l_Cn = torch.mm(W, h.to(W.dtype).T, out=buffer[: len(W) * len(h)].view(len(W), len(h)))
        if z is not None and self.B_VR is not None:
            l_Cn.addmm_(self.B_VR[part].to(l_Cn.dtype), z.to(l_Cn.dtype).T)
        if self.bias_V is not None:
            l_Cn.add_(self.bias_V[part, None], alpha=self.shape.logit_scale)
        l_Cn = l_Cn.to(_wide(l_Cn.dtype))
        cap = self.shape.softcap
        return l_Cn if cap is None else l_Cn.div_(cap).tanh_().mul_(cap)


class _Gradients(NamedTuple):
    """The gradient of each input that needs one; those of the head itself have the vocabulary's size."""

    h_nH: Tensor | None
    W_VH: Tensor | None
    bias_V: Tensor | None
    z_nR: Tensor | None
    B_VR: Tensor | None

    @property
    def of_head(self) -> bool:
        return any(each is not None for each in (self.W_VH, self.bias_V, self.B_VR))


class _Product:
    """The gradient of a block of h (or z): e^T W (or B) summed chunk by chunk, then divided, less the label's row."""

    def __init__(self, rows: Tensor, right: Tensor) -> None:
        self.right = right
        self.total = torch.zeros(rows.shape, dtype=_wide(right.dtype), device=rows.device)

    def add(self, part: slice, e_Cn: Tensor, shrink_n: Tensor) -> None:
        right = self.right[part].to(e_Cn.dtype)
        self.total.mul_(shrink_n[:, None])
        if self.total.dtype == e_Cn.dtype:
            self.total.addmm_(e_Cn.T, right)
        else:
            self.total.add_(e_Cn.T @ right)

    def finish(self, labels: Tensor, inverse_n: Tensor, at_label_n: Tensor) -> Tensor:
        return self.total.mul_(inverse_n[:, None]).sub_(self.right[labels] * at_label_n[:, None])


def _filled_up(rows: int) -> int:
    return max(1, math.ceil(rows / EVEN_ROWS)) * EVEN_ROWS


def _buffer(memory: Tensor | None, W_VH: Tensor, numel: int) -> Tensor:
    if memory is None or len(memory) < numel:
        memory = torch.empty(numel, dtype=W_VH.dtype, device=W_VH.device)
    return memory[:numel]


def loss_memory(W_VH: Tensor) -> Tensor:
    """Returns the memory that a learning head's block of logits needs, to be kept for a run: fresh pages cost more than
    they look."""
    return torch.empty(W_VH.shape[0] * WHOLE_ROWS, dtype=W_VH.dtype, device=W_VH.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _block(
    h: Tensor, z: Tensor | None, labels: Tensor, weights: Tensor | None, rows: slice, head: _Head, grads: _Gradients,
    buffer: Tensor, chunk: int,
) -> Tensor:  # fmt: skip
    """Returns the losses of one block of rows and adds its share to the gradients, chunk by chunk of the vocabulary.

    The block is filled up with rows of zeros, whose share in every gradient is zero.
    """
    real, shape = len(labels), head.shape
    fill = (0, 0, 0, _filled_up(real) - real)
    labels, h = F.pad(labels, fill[2:]), F.pad(h * shape.logit_scale, fill)
    z = None if z is None else F.pad(z * (shape.lora_scale * shape.logit_scale), fill)
    by_h = None if grads.h_nH is None else _Product(h, head.W_VH)
    by_z = None if grads.z_nR is None or z is None or head.B_VR is None else _Product(z, head.B_VR)
    sum_n = torch.zeros(len(h), dtype=_wide(head.W_VH.dtype), device=h.device)
    top_n, label_n = torch.full_like(sum_n, -torch.inf), torch.zeros_like(sum_n)
    e_Cn = sum_n  # the last chunk's exponentials, of the whole vocabulary where the head learns
    for start in range(0, len(head.W_VH), chunk):
        part = slice(start, min(start + chunk, len(head.W_VH)))
        l_Cn = head.logits(part, h, z, buffer)
        inside = (labels >= part.start) & (labels < part.stop)
        picked = l_Cn.gather(0, (labels - part.start).clamp(0, len(l_Cn) - 1)[None])[0]
        label_n = torch.where(inside, picked, label_n)
        slope_Cn = None if shape.softcap is None else 1 - (l_Cn / shape.softcap).square_()
        higher_n = torch.maximum(top_n, l_Cn.amax(0))
        shrink_n, top_n = (top_n - higher_n).exp_(), higher_n
        e_Cn = l_Cn.sub_(top_n).clamp_(min=_LEAST[l_Cn.dtype]).exp_()
        sum_n = sum_n * shrink_n + e_Cn.sum(0)
        e_Cn = (e_Cn if slope_Cn is None else e_Cn.mul_(slope_Cn)).to(head.W_VH.dtype)
        for product in (by_h, by_z):
            if product is not None:
                product.add(part, e_Cn, shrink_n)
    at_label_n = torch.ones_like(sum_n) if shape.softcap is None else 1 - (label_n / shape.softcap).square()
    inverse_n = 1 / sum_n
    for factor_n in (inverse_n, at_label_n):
        factor_n[real:] = 0  # the rows that only fill the block up
        if weights is not None:
            factor_n[:real].mul_(weights)
    for grad, product, scale in ((grads.h_nH, by_h, 1.0), (grads.z_nR, by_z, shape.lora_scale)):
        if grad is not None and product is not None:
            found = product.finish(labels, inverse_n, at_label_n)[:real]
            grad[rows] = (found * (scale * shape.logit_scale)).to(grad.dtype)
    _add_of_head(grads, labels, shape, h, z, e_Cn, inverse_n, at_label_n)
    return (sum_n.log() + top_n - label_n)[:real]


def _add_of_head(
    grads: _Gradients, labels: Tensor, shape: HeadShape, h: Tensor, z: Tensor | None, e_Vn: Tensor, inverse_n: Tensor,
    at_label_n: Tensor,
) -> None:  # fmt: skip
    """Adds this block's gradients of the head itself: dl = e / sum - onehot, without dividing the large matrix or
    writing its label rows.

    `inverse_n` is 1 / sum and `at_label_n` the weight of the onehot's part; both go into what multiplies the matrix.
    """
    for grad, right in ((grads.W_VH, h), (grads.B_VR, z)):
        if grad is not None and right is not None:
            grad.add_((e_Vn @ (right * inverse_n[:, None]).to(e_Vn.dtype)).to(grad.dtype))
            grad.index_add_(0, labels, (-right * at_label_n[:, None]).to(grad.dtype))
    if grads.bias_V is not None:
        grads.bias_V.add_((e_Vn @ inverse_n.to(e_Vn.dtype)).to(grads.bias_V.dtype), alpha=shape.logit_scale)
        grads.bias_V.index_add_(0, labels, (-shape.logit_scale * at_label_n).to(grads.bias_V.dtype))


def label_loss(
    h_nH: Tensor,
    labels_n: Tensor,
    W_VH: Tensor,
    bias_V: Tensor | None = None,
    z_nR: Tensor | None = None,
    B_VR: Tensor | None = None,
    shape: HeadShape = HeadShape(),  # frozen
    memory: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (sum of the label rows' cross-entropies, each row's), the sum differentiable in every input.

    h (n, H) hidden states that predict; labels (n,) int64; W (V, H), bias (V,); z (n, R) = A dropout(h) and B (V, R) of
    an adapted head; memory: `loss_memory(W)`, kept by the caller. Only inputs that require grad cost anything more.
    Their gradients are formed in the forward pass, from the logits that are there.
    """
    return _LabelLoss.apply(h_nH, W_VH, bias_V, z_nR, B_VR, labels_n, shape, memory, torch.is_grad_enabled())  # type: ignore[return-value]


def label_log_probs(
    h_nH: Tensor,
    labels_n: Tensor,
    W_VH: Tensor,
    bias_V: Tensor | None = None,
    z_nR: Tensor | None = None,
    B_VR: Tensor | None = None,
    shape: HeadShape = HeadShape(),  # frozen
    memory: Tensor | None = None,
) -> Tensor:
    """Returns log softmax(logits)[label] of each row, (n,), differentiable in every input: for losses that are more
    than a sum over labels, such as those of preference tuning.

    Takes what `label_loss` takes, and keeps no logits either: the backward pass makes them again.
    """
    return -_RowLosses.apply(h_nH, W_VH, bias_V, z_nR, B_VR, labels_n, shape, memory)  # type: ignore[operator]
