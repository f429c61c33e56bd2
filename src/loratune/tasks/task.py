"""What a task decides: how its rows become examples, what the loss of the model's outputs is, and what is measured."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.adapter.dropout import Noise, Span
from loratune.data.encode import Document, LongRow
from loratune.data.examples import Example
from loratune.data.masks import Marks
from loratune.data.pack import length_groups
from loratune.data.rows import Row
from loratune.data.strict_json import strings
from loratune.errors import ConfigError, DataError
from loratune.evaluate.interval import Interval
from loratune.evaluate.metrics import Counts, Statistic
from loratune.evaluate.samples import Sample
from loratune.tasks.labels import Labels

_SAID = ("where", "predicted", "label", "probability")  # of a record
_NOTHING = re.compile(r"(?!)")  # found nowhere
IGNORED = -100  # the target of a position without a loss, as transformers has it


@dataclass(frozen=True)
class TaskBatch:
    """A micro-batch. owners (n,): the example of each loss; spans: where each one's tokens stand."""

    inputs: dict[str, Any]
    examples: Sequence[Example]
    owners: Tensor
    spans: tuple[Span, ...]
    num_positions: int
    lengths: list[int] | None = None  # of the rows, where they are packed

    @property
    def num_labels(self) -> int:
        return len(self.owners)

    def noise(self, seed: int, step: int) -> Noise:
        """Returns what the dropout masks of this batch depend on."""
        return Noise(seed, step, self.spans, self.num_positions)


@dataclass(frozen=True)
class Scores:
    """figures: by name, each with its 95% interval, the first being what models are compared by; tables: by name, rows
    of the same keys; counts (U, K) and statistic: what the first figure is of, one row a unit, for paired tests."""

    figures: dict[str, Interval]
    counts: Counts
    statistic: Statistic
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, list[dict[str, Any]]])


class Task(ABC):
    """One task on one model's tokenizer and labels; `max_tokens` is the longest row that the model takes.

    Also a `RowEncoder`. Rows are never cut: one beyond the limit is refused with LongRow.
    """

    kinds: ClassVar[tuple[str, ...]]  # of rows
    packs: ClassVar[bool] = True  # whether rows may run packed, where the model is an encoder
    tokens: ClassVar[bool] = True  # whether rows are tokens of a vocabulary
    cuts_freely: ClassVar[bool] = True  # whether any cut of a step into micro-batches gives the same gradient

    def __init__(
        self, model: Any, tokenizer: Any, labels: Labels, max_tokens: int | None, *, long: str = "stop",
        train_on: str = "completion", batch_size: int = 8,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.labels, self.max_tokens = model, tokenizer, labels, max_tokens
        self.long, self.train_on, self.batch_size = long, train_on, batch_size
        self.special = Marks.of(tokenizer).pattern if self.tokens else _NOTHING

    # ---- rows --------------------------------------------------------------------------------------------------------

    def prepare(self, rows: Sequence[Row]) -> None:
        """Rows of tasks are short: nothing is prepared ahead."""
        return

    def finish(self, rows: Sequence[Row], prepared: None) -> list[list[Example] | DataError]:
        """Returns what `encode_many` returns."""
        return self.encode_many(rows)

    def encode_many(self, rows: Sequence[Row]) -> list[list[Example] | DataError]:
        """Returns each row's examples, or the reason `file:line: why` for which it has none."""
        results: list[list[Example] | DataError] = []
        for row in rows:
            try:
                self._refuse(row)
                results.append(self.encode(row))
            except DataError as error:
                located = type(error)(f"{row.where}: {error}")
                located.__cause__ = error
                results.append(located)
        return results

    def _refuse(self, row: Row) -> None:
        if row.kind not in self.kinds:
            raise DataError(f"a {row.kind} row does not fit this task; expected {' or '.join(self.kinds)} rows.")
        for text in strings(row.value):
            if found := self.special.search(text):
                raise DataError(
                    f"the text spells out the special token {found[0]!r}, which the tokenizer would take for a control "
                    "token; remove or rewrite it."
                )

    @abstractmethod
    def encode(self, row: Row) -> list[Example]:
        """Returns a row's examples, mostly one; raises DataError with the reason."""

    def fits(self, ids: Sequence[int]) -> Sequence[int]:
        """Returns token ids that the model can read; raises LongRow for more than its limit, DataError for none."""
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise LongRow(
                f"the row is {len(ids)} tokens long, the limit is {self.max_tokens}. Rows are never cut: shorten it, "
                "or leave such rows out with --long drop."
            )
        if not ids:
            raise DataError("the tokenizer makes no token of the row.")
        return ids

    def check(self, training: Sequence[Any], sources: Sequence[str]) -> None:
        """Raises DataError where the training examples, as they were split, cannot teach the task."""
        return

    def digest(self, *examples: Sequence[Any]) -> str | None:
        """Returns the sha256 of what the rows name besides what stands in them, for a resumed run to be the same."""
        return None

    # ---- model -------------------------------------------------------------------------------------------------------

    def cut(self, documents: Sequence[Document], max_tokens: int) -> list[list[int]]:
        """Returns the positions of the examples of each micro-batch: like lengths together."""
        return length_groups([self.extent(cast(Example, each)) for each in documents], max_tokens)

    def extent(self, example: Example) -> int:
        """Returns how many positions of a batch an example's widest row takes."""
        return example.num_tokens

    def rows(self, example: Example) -> list[dict[str, NDArray[np.int32]]]:
        """Returns the rows of an example in a batch, one as a rule: the token ids and the other columns of each."""
        return [{"input_ids": example.input_ids, **example.columns}]

    def inputs(self, examples: Sequence[Example], width: int) -> dict[str, Any]:
        """Returns what the model takes besides its rows."""
        return {}

    def batch(self, examples: Sequence[Example], keys: Sequence[int]) -> TaskBatch | None:
        """Returns a micro-batch of what is not rows of tokens; None for those."""
        return None

    @abstractmethod
    def losses(self, outputs: Any, batch: TaskBatch) -> Tensor:
        """Returns the losses (n,) of the batch's examples, in their order, each with `num_units` of them."""

    @abstractmethod
    def own_labels(self, example: Example) -> dict[str, Tensor] | None:
        """Returns the keywords with which the model computes its own loss of one example alone; None if it cannot."""

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """Returns an array as a tensor where the model is."""
        return torch.from_numpy(array).to(next(self.model.parameters()).device)

    def targets(self, batch: TaskBatch) -> Tensor:
        """Returns the targets of a batch's examples, all of one shape, stacked."""
        return self.tensor(np.stack([example.target for example in batch.examples]))

    def padded_targets(self, examples: Sequence[Example], width: int) -> Tensor:
        """Returns targets of one number a position, (N, width), filled up with what makes no loss."""
        rows = np.full((len(examples), width), IGNORED, np.int64)
        for row, example in zip(rows, examples, strict=True):
            row[: len(example.target)] = example.target
        return self.tensor(rows)

    # ---- figures -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, outputs: Any, batch: TaskBatch) -> list[Any]:
        """Returns what the model says of each example of a batch."""

    @abstractmethod
    def score(self, examples: Sequence[Example], predictions: Sequence[Any]) -> Scores:
        """Returns the task's figures over examples and what was predicted for them."""

    @abstractmethod
    def record(self, example: Example, prediction: Any) -> dict[str, Any]:
        """Returns a prediction as JSON: what was read, "predicted", and what is right under "label"."""

    def records(self, examples: Sequence[Example], predictions: Sequence[Any]) -> list[dict[str, Any]]:
        """Returns the predictions as JSON, one a row of the data, with `file:line` of it."""
        return [
            {"where": example.row.where, **self.record(example, prediction)}
            for example, prediction in zip(examples, predictions, strict=True)
        ]

    def samples(self, examples: Sequence[Example], predictions: Sequence[Any]) -> tuple[Sample, ...]:
        """Returns predictions as people read them."""
        return tuple(
            Sample(
                "\n".join(str(value) for key, value in record.items() if key not in _SAID),
                str(record["predicted"]),
                str(record["label"]),
            )
            for record in self.records(examples, predictions)
        )


def as_float(logits: Tensor) -> Tensor:
    """Losses are computed in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def tokenized(tokenizer: Any, *texts: Any, **how: Any) -> Any:
    """Returns the tokenizer's own encoding, special tokens added, nothing padded, cut or warned about."""
    return tokenizer(*texts, padding=False, truncation=False, verbose=False, **how)


def columns_of(encoding: Any) -> dict[str, list[int]]:
    """Returns the inputs besides ids and mask that a model of this tokenizer expects."""
    return {"token_type_ids": encoding["token_type_ids"]} if "token_type_ids" in encoding else {}


def needs_backend(tokenizer: Any, task: str) -> None:
    """Raises ConfigError for a tokenizer that cannot say which characters its tokens are of."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{task} needs a tokenizer with tokenizer.json, to know which text each token is of.")
