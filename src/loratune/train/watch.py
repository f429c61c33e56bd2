"""What is looked at before the first step: every factor must reach the loss.

A model that reads a layer's `.weight` past its wrapper computes without the adapter, and nothing else would show it.
"""

import torch

from loratune.adapter.attach import Attached
from loratune.data.dataset import Dataset
from loratune.errors import TrainingError
from loratune.model.causal import CausalModel

_LOOKED_AT = 32  # documents, of which the longest is used
_MIN_TOKENS = 4  # with one position to look at, attention's query and key have no gradient


def check_reached(causal: CausalModel, attached: Attached, training: Dataset) -> None:
    """Runs one document forward and backward and raises TrainingError for factors that get no gradient.

    Where B is zero its gradient is s g^T (A x), which is zero only if the layer's output does not reach the loss. No
    parameter is changed; gradients are cleared again.
    """
    document = max(training.documents[:_LOOKED_AT], key=lambda each: each.num_tokens)
    if document.num_tokens < _MIN_TOKENS:
        return
    total, _ = causal.losses(causal.batch([document], [0]))
    total.backward()
    dead = [path for path, factor in attached.adapter.factors.items() if not _has_gradient(list(factor.parameters()))]
    for _, parameter in attached.adapter.named_parameters():
        parameter.grad = None
    if dead:
        raise TrainingError(
            f"{len(dead)} of {len(attached.adapter.factors)} factors do not reach the loss; first: {dead[0]}. The "
            "model does not call that layer, or reads its weight past the adapter. Leave it out of target_modules."
        )


def _has_gradient(parameters: list[torch.nn.Parameter]) -> bool:
    """Whether any of them has one that is not zero; what shares another factor's tensors has none of its own."""
    return not parameters or any(p.grad is not None and bool(p.grad.count_nonzero()) for p in parameters)
