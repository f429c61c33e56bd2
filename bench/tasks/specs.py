"""The real tasks: on which model, from which rows, how many, and how long each method trains on them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import rows
from encoder import model_folder
from rows import Found

# The rates of full fine-tuning, of which the better by validation loss counts; adapters have one at every task, the
# default of loratune (5e-4).
GEMMA_RATES, MINILM_RATES = (2e-5, 1e-4), (5e-5, 3e-4)
MODELS: dict[str, Callable[[], str]] = {"gemma": lambda: "google/gemma-3-270m", "minilm": lambda: str(model_folder())}


class Method(NamedTuple):
    """A method by its name in `methods.METHODS`, and whether a seed changes it."""

    name: str
    trains: bool


FULL = ("full, lower rate", "full, higher rate")
_OF_ALL = tuple(Method(name, True) for name in ("LoRA fast", "LoRA deep", *FULL))
_HEAD, _PROBE, _MAJORITY = Method("head only", True), Method("linear probe", False), Method("majority", False)
# A model that continues text has no head of its own, and tags have no probe.
_MORE = {"SEQ_CLS": (_HEAD, _PROBE, _MAJORITY), "TOKEN_CLS": (_HEAD, _MAJORITY)}
_BASE = (Method("base model", False),)


@dataclass(frozen=True)
class Spec:
    """micro: tokens a micro-batch, short enough that rows padded together are of like lengths."""

    about: str
    model: str
    task_type: str
    build: Callable[[], Iterator[Found]]
    train: int
    validation: int
    test: int
    epochs: int
    batch: int
    micro: int
    rates: tuple[float, float]
    seeds: int
    metrics: tuple[str, ...]

    @property
    def methods(self) -> tuple[Method, ...]:
        return (*_OF_ALL, *_MORE.get(self.task_type, _BASE))

    def write(self, folder: Path, share: float) -> None:
        """Writes the rows; `share` of their number, for a trial."""
        counts = {name: max(40, round(getattr(self, name) * share)) for name in rows.SPLITS}
        rows.write(folder, self.build, counts)


def _gemma(about: str, task_type: str, build: Callable[[], Iterator[Found]], train: int, test: int, *metrics: str):
    return Spec(about, "gemma", task_type, build, train, 80, test, 1, 8, 256, GEMMA_RATES, 1, metrics)


def _minilm(about: str, task_type: str, build: Callable[[], Iterator[Found]], *metrics: str):
    return Spec(about, "minilm", task_type, build, 1600, 300, 1200, 2, 16, 4096, MINILM_RATES, 3, metrics)


SPECS = {
    "section": _minilm(
        "a Debian package's description -> its section, one of ten", "SEQ_CLS", rows.section, "accuracy", "macro_f1"
    ),
    "size": _minilm(
        "a Debian package's description -> log10 of its installed size", "SEQ_CLS", rows.size, "pearson", "spearman"
    ),
    "acceptability": _gemma(
        "a Ukrainian sentence -> whether its annotator left it as it was",
        "SEQ_CLS", rows.acceptability, 320, 300, "accuracy", "matthews",
    ),
    "error_spans": _gemma(
        "the words of a Ukrainian sentence -> its errors, of four kinds",
        "TOKEN_CLS", rows.error_spans, 320, 240, "span_f1", "token_accuracy",
    ),
    "correction": _gemma(
        "a Ukrainian sentence that was changed -> as it was corrected",
        "CAUSAL_LM", rows.correction, 200, 80, "f0_5", "precision", "recall",
    ),
    "origin": _gemma(
        "the beginning of a Ukrainian text -> whether it is a translation",
        "SEQ_CLS", rows.origin, 240, 240, "accuracy", "matthews",
    ),
}  # fmt: skip
