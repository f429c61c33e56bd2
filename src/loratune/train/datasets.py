"""What a run trains and evaluates on, and the ledger that accounts for every row of it."""

import json
from pathlib import Path
from typing import cast

from loratune.data.dataset import Dataset, hold_out, load_dataset
from loratune.data.encode import Encoder
from loratune.data.examples import RowEncoder
from loratune.data.ledger import Ledger
from loratune.data.sources import folder_splits
from loratune.data.tokenise import Notify
from loratune.errors import DataError
from loratune.train.config import DataConfig

LEDGER = "ledger.jsonl"


def load_datasets(
    config: DataConfig, encoder: RowEncoder, cache: Path | None, notify: Notify
) -> tuple[Dataset, Dataset]:
    """Returns (training, validation): the rows of `validation`, else of the folder's validation files, else held out.

    Says what the ledgers note. Raises what `load_dataset` raises, and DataError for fewer than two rows to evaluate on.
    """

    def load(spec: str | dict[str, float]) -> Dataset:
        return load_dataset(
            spec,
            cast(Encoder, encoder),  # nothing else is asked of it where no tokens are stored
            config.format,
            columns=config.columns,
            reject=config.reject,
            cache=cache if config.cache and isinstance(encoder, Encoder) else None,  # a task's data are small
            notify=notify,
        )

    training = load(config.train)
    spec = config.validation or _validation_files(config.train)
    if spec is None:
        _tell("", training.ledger, notify)
        return _held_out(training)
    validation = load(spec)
    validation.ledger.note_overlap(training.ledger)
    _tell("training: ", training.ledger, notify)
    _tell("validation: ", validation.ledger, notify)
    if len(validation) < 2:
        raise DataError(f"{spec} holds one row; an evaluation with an interval needs two. Add rows.")
    return training, validation


def check_ids(num_ids: int, *datasets: Dataset) -> None:
    """A tokenizer may know a token more than the embedding has rows (Gemma 3's image token); no row may use it."""
    for dataset in datasets:
        index = dataset.documents.first_beyond(num_ids)
        if index is not None:
            token = dataset.documents[index].input_ids.max()
            raise DataError(
                f"{dataset.sources[index]}: token {token} is not in the model, which has {num_ids:,} tokens."
            )


def ledger_lines(training: Dataset, validation: Dataset) -> str:
    """Returns ledger.jsonl: for the training and the validation data their counts and notes, then each rejected row.

    Rows held out of the training data are counted there, as `held_out`.
    """
    if validation.ledger is training.ledger:
        return _named("train", training.ledger, held_out=len(set(validation.sources)))
    return _named("train", training.ledger, held_out=0) + _named("validation", validation.ledger)


def _named(split: str, ledger: Ledger, **counts: int) -> str:
    head, *rejects = ledger.to_json_lines().splitlines(keepends=True)
    first = {"split": split, **json.loads(head), **counts}
    return "".join([json.dumps(first, ensure_ascii=False) + "\n", *rejects])


def _tell(prefix: str, ledger: Ledger, notify: Notify) -> None:
    if ledger.rejects:
        first = ledger.rejects[0]
        notify(
            f"{prefix}{len(ledger.rejects):,} of {ledger.rows_in:,} rows are left out, listed in {LEDGER}; "
            f"first: {first.where}: {first.reason}"
        )
    for name, note in ledger.notes.items():
        notify(f"{prefix}{name}: {note.count:,}, such as {note.examples[0]}")


def _validation_files(spec: str | dict[str, float]) -> str | None:
    """A folder with training files may have some for validation too."""
    if isinstance(spec, str) and Path(spec).is_dir() and "validation" in folder_splits(Path(spec)):
        return str(Path(spec, "validation"))
    return None


def _held_out(rows: Dataset) -> tuple[Dataset, Dataset]:
    """Holds out 5%; of few rows the smallest larger share that gives the two that an interval needs."""
    for share in (0.05, 0.1, 0.2, 0.5, 1.0):
        training, validation = hold_out(rows, share)
        if len(validation) > 1:
            return training, validation
    raise DataError(
        f"{rows.sources[0]}: {len(rows)} rows are too few to hold out two for evaluation. "
        "Add rows, or give a validation file."
    )
