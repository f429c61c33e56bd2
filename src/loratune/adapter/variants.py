"""Variants: what a factor adds to a frozen layer's output. Plain LoRA, and DoRA.

DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): y = m (W + s B A) x / ||W + s B A||, the norm of each output's row
taken as a constant in the gradient (section 4.3). Shapes: O outputs, K the weights of one output.
"""

from typing import Any

import torch
from torch import Tensor

from loratune.adapter.factor import LowRank
from loratune.adapter.hosts import Host


def added(host: Host, base: Any, factor: LowRank, x: Tensor, x_dropped: Tensor, y: Tensor) -> Tensor:
    """Returns what a factor adds to the frozen output y = W x + b; `x_dropped` is what the adapter sees of x."""
    update = host.update(base, factor, x_dropped)
    if factor.magnitude is None:
        return update
    scale = host.along_outputs(magnitude_scale(host, base.weight, factor).to(y.dtype), y)
    if x_dropped is x:
        bias = getattr(base, "bias", None)
        linear = y if bias is None else y - host.along_outputs(bias, y)
    else:
        linear = host.linear(base, x_dropped)
    return (scale - 1) * linear + scale * update


def magnitude_scale(host: Host, weight: Tensor, factor: LowRank) -> Tensor:
    """Returns m / ||W + s B A||, (O,), differentiable in m alone."""
    assert factor.magnitude is not None
    return factor.magnitude / row_norms(host, weight, factor)


@torch.no_grad()
def row_norms(host: Host, weight: Tensor, factor: LowRank) -> Tensor:
    """Returns the norm of each output's row of W + s B A, (O,), without forming B A where A is a matrix:

    ||W_o||^2 + 2 s (W A^T)_o . B_o + s^2 B_o (A A^T) B_o^T.
    """
    A, B = factor.pair(factor.A.dtype)
    rows_OK = host.rows(weight).to(A.dtype)
    if factor.groups > 1:
        return (rows_OK + factor.delta().flatten(1)).norm(dim=1)
    A_RK = A.flatten(1)
    cross = ((rows_OK @ A_RK.T) * B).sum(1)
    own = ((B @ (A_RK @ A_RK.T)) * B).sum(1)
    return (rows_OK.square().sum(1) + 2 * factor.scale * cross + factor.scale**2 * own).clamp_min(0).sqrt()


def merged(host: Host, weight: Tensor, factor: LowRank) -> Tensor:
    """Returns the weight with a factor's update in it, in the weight's own type: W + s B A, or DoRA's rescaled form."""
    total = weight + host.oriented(factor.live_delta().to(weight.device, weight.dtype))
    if factor.magnitude is None:
        return total
    return total * host.along_weight(magnitude_scale(host, weight, factor).to(weight.dtype), total)
