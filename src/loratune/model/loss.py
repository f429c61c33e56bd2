"""The loss of a frozen head, on label rows only, with the gradient formed in the forward pass.

Logits never exist for prompt positions, and for label positions only a block of them at a time, transposed (V, n) in a
buffer that is reused: on a CPU both products then run at full speed (measured 132 against 102 GFLOP/s).

Shapes: n label rows, H hidden, V vocabulary, R rank of the head's own adapter (z_nR is its rank-sized activation).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK_ROWS = 320  # 16-row blocks run at half the speed; beyond 320 there is nothing more to gain
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
        needs = ctx.needs_input_grad if with_grad else (False,) * 5
        inputs = (h_nH, W_VH, bias_V, z_nR, B_VR)
        grads = [torch.zeros_like(x) if x is not None and need else None for x, need in zip(inputs, needs)]
        losses_n = torch.empty(len(h_nH), dtype=_wide(h_nH.dtype), device=h_nH.device)
        # Blocks of even size: ceil(n / k) rows each, so that the last one is not thin.
        size = _filled_up(math.ceil(len(h_nH) / max(1, math.ceil(len(h_nH) / BLOCK_ROWS))))
        buffer = _buffer(memory, W_VH, size)
        for start in range(0, len(h_nH), size):
            rows = slice(start, min(start + size, len(h_nH)))
            losses_n[rows] = _block(inputs, grads, labels_n[rows], rows, shape, buffer)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(losses_n)
        return losses_n.sum(), losses_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return (*(None if grad is None else grad * g.to(grad.dtype) for grad in ctx.saved_tensors), *(None,) * 4)


def _filled_up(rows: int) -> int:
    return max(1, math.ceil(rows / EVEN_ROWS)) * EVEN_ROWS


def _buffer(memory: Tensor | None, W_VH: Tensor, size: int) -> Tensor:
    numel = W_VH.shape[0] * size
    memory = torch.empty(numel, dtype=W_VH.dtype, device=W_VH.device) if memory is None else memory
    return memory[:numel].view(W_VH.shape[0], size)


def loss_memory(W_VH: Tensor) -> Tensor:
    """Returns the memory a block of logits needs, to be kept for a run: fresh pages cost more than they look."""
    return torch.empty(W_VH.shape[0] * BLOCK_ROWS, dtype=W_VH.dtype, device=W_VH.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _block(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    grads: list[Tensor | None],
    labels: Tensor,
    rows: slice,
    shape: HeadShape,
    buffer: Tensor,
) -> Tensor:
    """Returns the losses of one block of rows and adds its share to the gradients.

    The block is filled up with rows of zeros, whose share in every gradient is zero.
    """
    h_nH, W_VH, bias_V, z_nR, B_VR = inputs
    real = len(labels)
    fill = (0, 0, 0, _filled_up(real) - real)
    labels = F.pad(labels, fill[2:])
    h = F.pad(h_nH[rows] * shape.logit_scale if shape.logit_scale != 1.0 else h_nH[rows], fill)
    l_Vn = torch.mm(W_VH, h.to(W_VH.dtype).T, out=buffer) if len(h) == buffer.shape[1] else W_VH @ h.to(W_VH.dtype).T
    z = None
    if z_nR is not None and B_VR is not None:
        z = F.pad(z_nR[rows] * (shape.lora_scale * shape.logit_scale), fill)
        l_Vn.addmm_(B_VR.to(l_Vn.dtype), z.to(l_Vn.dtype).T)
    if bias_V is not None:
        l_Vn.add_(bias_V[:, None], alpha=shape.logit_scale)
    l_Vn = l_Vn.to(_wide(l_Vn.dtype))
    if shape.softcap is not None:
        l_Vn.div_(shape.softcap).tanh_().mul_(shape.softcap)
    slope_Vn = None if shape.softcap is None else 1 - (l_Vn / shape.softcap).square_()

    top_n = l_Vn.amax(0)
    label_n = l_Vn.gather(0, labels[None])[0]
    e_Vn = l_Vn.sub_(top_n).exp_()
    sum_n = e_Vn.sum(0)
    losses = sum_n.log() + top_n - label_n
    if any(grad is not None for grad in grads):
        _accumulate(inputs, grads, labels, rows, shape, h, z, e_Vn, sum_n, slope_Vn)
    return losses[:real]


def _accumulate(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    grads: list[Tensor | None],
    labels: Tensor,
    rows: slice,
    shape: HeadShape,
    h: Tensor,
    z: Tensor | None,
    e_Vn: Tensor,
    sum_n: Tensor,
    slope_Vn: Tensor | None,
) -> None:
    """Adds this block's gradients: dl = e / sum - onehot, without dividing the large matrix or writing its label rows.

    `inverse` is 1 / sum and `at_label` the weight of the onehot's part, both folded into what multiplies the matrix.
    """
    _, W_VH, _, _, B_VR = inputs
    dh_nH, dW_VH, dbias_V, dz_nR, dB_VR = grads
    at_label = torch.ones_like(sum_n)
    if slope_Vn is not None:
        at_label = slope_Vn.gather(0, labels[None])[0]
        e_Vn.mul_(slope_Vn)
    inverse, real = 1 / sum_n, rows.stop - rows.start
    inverse[real:] = at_label[real:] = 0  # the rows that only fill the block up
    e_Vn = e_Vn.to(W_VH.dtype)
    if dh_nH is not None:
        g = (e_Vn.T @ W_VH).to(_wide(W_VH.dtype)).mul_(inverse[:, None]).sub_(W_VH[labels] * at_label[:, None])
        dh_nH[rows] = (g[:real] * shape.logit_scale).to(dh_nH.dtype)
    if dz_nR is not None and B_VR is not None:
        g = (e_Vn.T @ B_VR.to(e_Vn.dtype)).mul_(inverse[:, None]).sub_(B_VR[labels] * at_label[:, None])
        dz_nR[rows] = (g[:real] * (shape.lora_scale * shape.logit_scale)).to(dz_nR.dtype)
    for grad, right in ((dW_VH, h), (dB_VR, z)):
        if grad is not None and right is not None:
            grad.add_((e_Vn @ (right * inverse[:, None]).to(e_Vn.dtype)).to(grad.dtype))
            grad.index_add_(0, labels, (-right * at_label[:, None]).to(grad.dtype))
    if dbias_V is not None:
        dbias_V.add_((e_Vn @ inverse.to(e_Vn.dtype)).to(dbias_V.dtype), alpha=shape.logit_scale)
        dbias_V.index_add_(0, labels, (-shape.logit_scale * at_label).to(dbias_V.dtype))


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
    """
    return _LabelLoss.apply(h_nH, W_VH, bias_V, z_nR, B_VR, labels_n, shape, memory, torch.is_grad_enabled())  # type: ignore[return-value]
