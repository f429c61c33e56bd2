"""Rows of a task as tokens, with what the model is to say of them; and what makes them of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from loratune.data.encode import Document
from loratune.data.rows import Row
from loratune.errors import DataError


@dataclass(frozen=True, eq=False)
class Example(Document):
    """One row of a task, or a part of one: the tokens that are read, and the target.

    target: what the task asks for, in the task's own shape; num_units: how many losses it makes; columns: further
    inputs, one entry a token (`token_type_ids`); row: where it is from; extra: what the task's metrics need besides.
    """

    target: npt.NDArray[Any]
    num_units: int
    row: Row
    columns: Mapping[str, npt.NDArray[np.int32]] = field(default_factory=dict[str, npt.NDArray[np.int32]])
    extra: Any = None

    @property
    def num_labels(self) -> int:
        return self.num_units

    @classmethod
    def of(
        cls, ids: Sequence[int], target: npt.NDArray[Any], row: Row, *, num_units: int = 1,
        columns: Mapping[str, Sequence[int]] | None = None, extra: Any = None,
    ) -> "Example":  # fmt: skip
        """Makes an example of token ids; every token is read, so `trained` marks all of them."""
        named = {name: np.array(each, dtype=np.int32) for name, each in (columns or {}).items()}
        input_ids = np.array(ids, dtype=np.int32)
        return cls(input_ids, np.ones(len(ids), np.bool_), target, num_units, row, named, extra)


class RowEncoder(Protocol):
    """What makes documents of rows; `long` is what becomes of rows beyond the limit, "drop" leaves them out."""

    long: str

    def prepare(self, rows: Sequence[Row], /) -> Any:
        """Does what can be done before the tokenizer is called, in a thread of its own."""
        ...

    def finish(self, rows: Sequence[Row], prepared: Any, /) -> Sequence[Sequence[Document] | DataError]:
        """Returns the documents of each row, or the reason `file:line: why` for which it has none."""
        ...
