"""How a model with a task's head runs on examples: rows of like length padded together, or packed where that is exact.

The head's own forward makes the logits; the loss is ours, a sum over the task's units. The base's own dropout is off,
as everywhere here, and so is a trained head's: a mask from a generator's history would not survive a resume.
Shapes: N rows of a padded batch, L their length, n losses.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from loratune.adapter.dropout import Span
from loratune.data.encode import Document
from loratune.data.examples import Example
from loratune.tasks.packing import Packing, relative, sorted_packs
from loratune.tasks.task import Task, TaskBatch

_STILL = (nn.Dropout, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage]

_PROBE_LENGTHS = (5, 9, 3)
# Packed and padded differ by rounding only; a row that sees another moves the result by more than 1 %.
_PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class TaskModel:
    """A model with a task's head made ready for examples; a `Runner`. `notes` says why an encoder is not packed."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model, self.task = model, task
        self.notes: list[str] = []
        self._still = [module for module in model.modules() if isinstance(module, _STILL)]
        config: Any = model.config
        self._padding = {"input_ids": getattr(config.get_text_config(), "pad_token_id", None) or 0}
        self.packing = self._probed(Packing.of(model) if task.packs else None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def close(self) -> None:
        """Gives the model the forward and the attention that it had before."""
        if self.packing is not None:
            self.packing.close()
            self.packing = None

    @torch.no_grad()
    def _probed(self, packing: Packing | None) -> Packing | None:
        """Compares three short rows packed with the same padded; where they differ, rows are padded."""
        if packing is None:
            return None
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(4, embedding.num_embeddings, (n,), generator=generator).numpy() for n in _PROBE_LENGTHS]
        inputs = self._padded([{"input_ids": each} for each in ids], max(_PROBE_LENGTHS))
        trunk: Any = self.model.base_model
        mask = inputs["attention_mask"].bool()
        plain = trunk(**inputs).last_hidden_state[mask]
        try:
            with packing.row(_PROBE_LENGTHS, inputs["attention_mask"]):
                found = trunk(**inputs).last_hidden_state[mask]
            difference = relative(found, plain)
        except (TypeError, ValueError, RuntimeError, AttributeError):  # layers that do not take a packed row
            difference = math.inf
        if difference <= _PROBE_TOLERANCE[plain.dtype]:
            return packing
        packing.close()
        self.notes.append(
            f"{type(self.model).__name__} cannot be packed (it would differ by {difference:.1e}): padded."
        )
        return None

    def cut(self, documents: Sequence[Document], max_tokens: int) -> list[list[int]]:
        """Returns the positions of the examples of each micro-batch."""
        if self.packing is not None and self.task.cuts_freely:
            return sorted_packs([document.num_tokens for document in documents], max_tokens)
        return self.task.cut(documents, max_tokens)

    def batch(self, documents: Sequence[Document], keys: Sequence[int]) -> TaskBatch:
        """Makes a micro-batch of examples; `keys` name them for the dropout masks."""
        examples = cast(Sequence[Example], documents)
        if (made := self.task.batch(examples, keys)) is not None:
            return made
        width = max(self.task.extent(example) for example in examples)
        owners = np.repeat(np.arange(len(examples)), [example.num_labels for example in examples])
        rows = [row for example in examples for row in self.task.rows(example)]
        lengths = [self.task.extent(example) for example in examples for _ in self.task.rows(example)]
        share = len(rows) // len(examples)  # rows of an example, each with masks of its own
        packed = self.packing is not None
        if packed:
            lengths = [len(row["input_ids"]) for row in rows]
        starts = np.cumsum([0, *lengths]).tolist() if packed else [width * number for number in range(len(rows) + 1)]
        return TaskBatch(
            inputs=self._padded(rows, width) | self.task.inputs(examples, width),
            examples=examples,
            owners=torch.from_numpy(owners).to(self.device),
            spans=tuple(
                Span(keys[number // share] * share + number % share, starts[number], length)
                for number, length in enumerate(lengths)
            ),
            num_positions=starts[-1],
            lengths=lengths if packed else None,
        )

    def _padded(self, rows: Sequence[dict[str, Any]], width: int) -> dict[str, Tensor]:
        shape = len(rows), width
        filled = {name: np.full(shape, self._padding.get(name, 0), np.int64) for name in rows[0]}
        mask = np.zeros(shape, np.int64)
        for number, row in enumerate(rows):
            mask[number, : len(row["input_ids"])] = 1
            for name, values in row.items():
                filled[name][number, : len(values)] = values
        return {
            name: torch.from_numpy(each).to(self.device) for name, each in {**filled, "attention_mask": mask}.items()
        }

    def outputs(self, batch: TaskBatch) -> Any:
        """Runs the model with its head; returns its own outputs."""
        for module in self._still:
            module.eval()
        if self.packing is None or batch.lengths is None:
            return self.model(**batch.inputs)
        with self.packing.row(batch.lengths, batch.inputs["attention_mask"]):
            return self.model(**batch.inputs)

    def losses(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Returns (the sum of the batch's losses, differentiable; each loss, (n,) detached)."""
        each = self.task.losses(self.outputs(batch), batch)
        return each.sum(), each.detach()

    @torch.no_grad()
    def results(self, batch: TaskBatch) -> tuple[Tensor, list[Any]]:
        """Returns each loss (n,), and what is predicted for each example."""
        outputs = self.outputs(batch)
        return self.task.losses(outputs, batch), self.task.predict(outputs, batch)

    @torch.no_grad()
    def own_losses(self, documents: Sequence[Document]) -> list[float] | None:
        """Returns the sum of each example's losses as the model itself computes it, alone; None where it does not."""
        losses: list[float] = []
        for document in documents:
            batch = self.batch([document], [0])
            labels = self.task.own_labels(batch.examples[0])
            if labels is None:
                return None
            losses.append(float(self.model(**batch.inputs, **labels).loss) * batch.num_labels)
        return losses
