"""What the training loop and the evaluation ask of a model: `CausalModel` and `TaskModel` give it."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loratune.adapter.dropout import Noise
from loratune.data.encode import Document


class Batch(Protocol):
    """A micro-batch. owners (n,): which document of the batch each of its n losses belongs to."""

    @property
    def owners(self) -> Tensor: ...
    @property
    def num_labels(self) -> int: ...

    def noise(self, seed: int, step: int) -> Noise:
        """Returns what the dropout masks of this batch depend on: never on how a step was cut."""
        ...


class Runner(Protocol):
    """A model made ready for documents. `notes` says what could not be done the fast way, and why.

    The loss of a step is the sum of `losses` over its micro-batches by the number of labels in it, so its gradient does
    not depend on the cut.
    """

    model: nn.Module
    notes: list[str]

    @property
    def device(self) -> torch.device: ...

    def cut(self, documents: Sequence[Document], max_tokens: int) -> list[list[int]]:
        """Returns the positions of the documents of each micro-batch; every document is in one of them."""
        ...

    def batch(self, documents: Sequence[Document], keys: Sequence[int]) -> Any:
        """Makes a micro-batch (`Batch`) of documents; `keys` name them for the dropout masks."""
        ...

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Returns (the sum of the batch's losses, differentiable; each loss, (n,) detached)."""
        ...

    def own_losses(self, documents: Sequence[Document]) -> list[float] | None:
        """Returns the sum of each document's losses as the model itself computes it, alone; None where it does not."""
        ...

    def close(self) -> None:
        """Gives the model back as it was."""
        ...
