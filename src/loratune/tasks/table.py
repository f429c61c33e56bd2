"""The tasks by PEFT's names, and what the front door asks of them.

SEGMENTATION is a name of ours: PEFT has none, and its files say null.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loratune.adapter.config import LoraConfig
from loratune.data.rows import Row
from loratune.errors import DataError
from loratune.model import heads
from loratune.tasks.answer import Answer
from loratune.tasks.classify import Classify
from loratune.tasks.embed import Embed, find_scores
from loratune.tasks.labels import Find, Labels, find_classes, find_tags, fit, labels_of, no_labels, rows_of
from loratune.tasks.segment import Segment, find_masks
from loratune.tasks.tag import Tag
from loratune.tasks.task import Task
from loratune.tasks.translate import Translate


@dataclass(frozen=True)
class Entry:
    """task: what rows, losses and figures are; find: what reads the labels off the training rows; headed: whether the
    model has a head beside its trunk, which is trained whole; card: what the hub calls it."""

    task: type[Task]
    find: Find
    headed: bool
    card: str


TASKS: dict[str, Entry] = {
    "SEQ_CLS": Entry(Classify, find_classes, True, "text-classification"),
    "TOKEN_CLS": Entry(Tag, find_tags, True, "token-classification"),
    "QUESTION_ANS": Entry(Answer, no_labels, True, "question-answering"),
    "SEQ_2_SEQ_LM": Entry(Translate, no_labels, False, "text2text-generation"),
    "FEATURE_EXTRACTION": Entry(Embed, find_scores, False, "sentence-similarity"),
    "SEGMENTATION": Entry(Segment, find_masks, True, "image-segmentation"),
}


def find_labels(
    task_type: str | None, specs: Sequence[str], format: str | None, columns: Mapping[str, str] | None
) -> Labels:
    """Returns the labels of a task's training rows, if it has any; raises DataError that names file and line."""
    entry = TASKS.get(task_type or "")
    if entry is None:
        return Labels()
    return entry.find(_fitting(rows_of(specs, format, columns), task_type or "", entry.task.kinds), ", ".join(specs))


def _fitting(rows: Iterable[Row], task_type: str, kinds: Sequence[str]) -> Iterator[Row]:
    for row in rows:
        if row.kind not in kinds:
            raise DataError(
                f"{row.where}: a {row.kind} row does not fit {task_type}, which takes {' or '.join(kinds)} rows. Name "
                "the columns (--column text=...), or choose another --task."
            )
        yield row


def with_head(lora: LoraConfig, model: nn.Module) -> LoraConfig:
    """Returns an adapter's settings with the head of its task among the modules that are trained and saved whole."""
    entry = TASKS.get(lora.task_type or "")
    if entry is None or not entry.headed:
        return lora
    return lora.with_(modules_to_save=tuple(dict.fromkeys([*(lora.modules_to_save or ()), *heads.to_save(model)])))


def task_of(
    task_type: str | None, model: Any, tokenizer: Any, found: Labels | None = None, **settings: Any
) -> Task | None:
    """Returns the task of a loaded model, or None for one that continues text; `found` are the labels of its data, and
    `settings` what `Task` takes.

    Raises ConfigError for a head that does not fit them.
    """
    if task_type not in TASKS:
        return None
    if found is not None:
        fit(model.config, found)
    return TASKS[task_type].task(model, tokenizer, labels_of(model.config), max_positions(model), **settings)


def max_positions(model: Any) -> int | None:
    """Returns how many tokens a model reads; of positions counted from behind the padding token (RoBERTa), the rest."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    return limit


def card(task_type: str | None) -> str:
    """Returns what the hub calls a task, for an adapter's card."""
    return TASKS[task_type].card if task_type in TASKS else "text-generation"
