"""Adapters, the base and floors on the rows of a file: figures with intervals, paired tests, and every prediction."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune.adapter import peft_format
from loratune.adapter.adapter import Adapter
from loratune.adapter.attach import attach
from loratune.adapter.config import ABOUT
from loratune.data.dataset import Dataset, load_dataset
from loratune.data.encode import Document, Encoder
from loratune.data.examples import Example
from loratune.errors import ConfigError
from loratune.evaluate import metrics, text
from loratune.evaluate.generate import generate, text_of
from loratune.evaluate.interval import Interval
from loratune.evaluate.loss import evaluate
from loratune.evaluate.samples import prompt_length
from loratune.model import heads
from loratune.model.causal import CausalModel
from loratune.model.load import load_model
from loratune.tasks.choices import likeliest
from loratune.tasks.classify import Classify
from loratune.tasks.evaluation import evaluate_task
from loratune.tasks.floors import FLOORS
from loratune.tasks.labels import Labels, rows_of
from loratune.tasks.model import TaskModel
from loratune.tasks.table import TASKS, find_labels, max_positions, task_of
from loratune.tasks.task import Scores, Task

BASE = "base"


@dataclass(frozen=True)
class Question:
    """What is asked: which rows, and how they are read and run. train: the rows that floors learn from; answers: how
    many rows a model that continues text answers greedily."""

    data: str
    model: str | None = None
    task_type: str | None = None
    base: bool = False
    floors: tuple[str, ...] = ()
    train: str | None = None
    format: str | None = None
    columns: Mapping[str, str] | None = None
    reject: bool = False
    answers: int = 100
    micro_batch_tokens: int = 4096


@dataclass(frozen=True)
class Judged:
    """What one of them reached; records: each prediction as JSON."""

    name: str
    scores: Scores
    records: list[dict[str, Any]] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        figures = {name: {key: metrics.defined(value) for key, value in each._asdict().items()}
                   for name, each in self.scores.figures.items()}  # fmt: skip
        return {"name": self.name, "figures": figures, "tables": self.scores.tables}


@dataclass(frozen=True)
class Paired:
    """The difference of the first figure of two on the same rows, other less one; clear where 0 is outside."""

    one: str
    other: str
    figure: str
    difference: Interval

    def to_json(self) -> dict[str, Any]:
        return {"one": self.one, "other": self.other, "figure": self.figure, **self.difference._asdict()}


def judge(
    folders: Mapping[str, Path], asked: Question, notify: Callable[[str], None] | None = None
) -> tuple[list[Judged], list[Paired]]:
    """Returns what adapters (name -> folder), the base and floors reach on rows, and the paired tests of all with the
    first. Raises ConfigError for adapters of different tasks, bases or labels, AdapterError and DataError.
    """
    adapters = {name: peft_format.read(folder) for name, folder in folders.items()}
    known = [task_beside(folders[name], each.config.task_type) for name, each in adapters.items()]
    task_type = _same("task", [asked.task_type, *known]) or "CAUSAL_LM"
    base = asked.model or _same("base model", [each.config.base_model_name_or_path for each in adapters.values()])
    if base is None:
        raise ConfigError("no base model is known: the adapter's own record names none. Give it with --model.")
    _check_floors(asked, task_type)
    labels = _labels(list(folders.values()), asked, task_type)
    model, tokenizer = load_model(base, task_type=task_type, labels=labels.names, problem=labels.problem, notify=notify)
    if task_type in TASKS:
        judged = _judge_task(model, tokenizer, task_type, labels, adapters, asked)
    else:
        judged = _judge_causal(model, tokenizer, adapters, asked)
    return judged, [_paired(judged[0], other) for other in judged[1:]]


def _check_floors(asked: Question, task_type: str) -> None:
    unknown = [name for name in asked.floors if name not in FLOORS]
    if unknown:
        raise ConfigError(f"--baseline {unknown[0]} is not known; expected {' or '.join(FLOORS)}.")
    if asked.floors and (asked.train is None or task_type not in TASKS):
        raise ConfigError(
            "a baseline learns from training rows of a task with labels: give them with --train FILE, and the task "
            "with --task if no adapter names it."
        )


def _same(what: str, values: Sequence[Any]) -> Any:
    found = list(dict.fromkeys(value for value in values if value is not None))
    if len(found) > 1:
        raise ConfigError(f"the adapters are not of one {what}: {', '.join(map(str, found))}. Evaluate them apart.")
    return found[0] if found else None


def _labels(folders: Sequence[Path], asked: Question, task_type: str) -> Labels:
    """The labels that adapters were trained on, else those of the floors' training rows, else of the rows."""
    known: list[Labels] = []
    for folder in folders:
        found = labels_beside(folder)
        known += [found] if found.names else []
    return _same("set of labels", known) or find_labels(
        task_type, [asked.train or asked.data], asked.format, asked.columns
    )


def labels_beside(folder: Path) -> Labels:
    """Returns the labels that were written beside an adapter; none where another tool wrote it."""
    about = _about(folder)
    return Labels(tuple(about.get("labels") or ()), about.get("problem"))


def task_beside(folder: Path, named: str | None) -> str | None:
    """Returns the task that an adapter's own configuration names, else the one that was written beside it."""
    return named or _about(folder).get("task_type")


def _about(folder: Path) -> dict[str, Any]:
    file = folder / ABOUT
    try:
        return dict(json.loads(file.read_bytes())) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is damaged, so the task and its labels are not known: {error}.") from error


def _rows(spec: str, encoder: Any, asked: Question) -> Dataset:
    return load_dataset(spec, cast(Encoder, encoder), asked.format, columns=asked.columns, reject=asked.reject)


def _judge_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task_type: str, labels: Labels,
    adapters: Mapping[str, Adapter], asked: Question,
) -> list[Judged]:  # fmt: skip
    task = task_of(task_type, model, tokenizer, labels)
    assert task is not None
    if asked.base and any(heads.new_modules(model)) and TASKS[task_type].headed:
        found = f"{model.name_or_path} has no head for {task_type}"
        raise ConfigError(f"{found}: compare with --baseline probe instead.")
    documents = _rows(asked.data, task, asked).documents
    judged = _each(model, adapters, asked, lambda name: _task_judged(name, model, task, documents, asked))
    return judged + _floors(model, task, documents, asked)


def _each(
    model: PreTrainedModel, adapters: Mapping[str, Adapter], asked: Question, judged: Callable[[str], Judged]
) -> list[Judged]:
    """Returns what is found with each adapter attached in turn, then, if asked for, without any."""
    found: list[Judged] = []
    for name, adapter in adapters.items():
        attached = attach(model, adapter)
        attached.train_mode(False)
        found.append(judged(name))
        attached.detach()
    return found + ([judged(BASE)] if asked.base else [])


def _task_judged(name: str, model: Any, task: Task, documents: Sequence[Document], asked: Question) -> Judged:
    runner = TaskModel(model, task)
    try:
        found = evaluate_task(runner, documents, asked.micro_batch_tokens)
    finally:
        runner.close()
    figures = found.scores.figures | {"loss": Interval(found.loss, found.low, found.high)}
    scores = Scores(figures, found.scores.counts, found.scores.statistic, found.scores.tables)
    return Judged(name, scores, task.records(_examples(documents), found.predictions))


def _floors(model: Any, task: Task, documents: Sequence[Document], asked: Question) -> list[Judged]:
    if not asked.floors:
        return []
    training, examples = _examples(_rows(asked.train or "", task, asked).documents), _examples(documents)
    runner = TaskModel(model, task)
    try:
        said = {name: FLOORS[name](runner, training, examples, asked.micro_batch_tokens) for name in asked.floors}
    finally:
        runner.close()
    return [Judged(name, task.score(examples, each), task.records(examples, each)) for name, each in said.items()]


def _examples(documents: Sequence[Document]) -> list[Example]:
    return cast(list[Example], list(documents))


def _judge_causal(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapters: Mapping[str, Adapter], asked: Question
) -> list[Judged]:
    kind = next((row.kind for row in rows_of([asked.data], asked.format, asked.columns)), "")
    if kind == "classification":
        return _judge_choices(model, tokenizer, adapters, asked)
    data = _rows(asked.data, Encoder(tokenizer, max_positions(model)), asked)
    return _each(model, adapters, asked, lambda name: _causal_judged(name, model, tokenizer, data, asked))


def _judge_choices(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapters: Mapping[str, Adapter], asked: Question
) -> list[Judged]:
    """Labelled texts put to a model that continues text: it says the label whose name is likeliest behind the text."""
    labels = find_labels("SEQ_CLS", [asked.data], asked.format, asked.columns)
    encoder = Encoder(tokenizer, max_positions(model))
    task = Classify(model, tokenizer, labels, max_positions(model))
    examples = _examples(_rows(asked.data, task, asked).documents)

    def judged(name: str) -> Judged:
        said = likeliest(model, encoder, [example.row for example in examples], labels, asked.micro_batch_tokens)
        return Judged(name, task.score(examples, said), task.records(examples, said))

    return _each(model, adapters, asked, judged)


def _causal_judged(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, asked: Question
) -> Judged:
    """The loss of all rows, and greedy answers to the first ones that have a prompt."""
    runner = CausalModel(model)
    try:
        found = evaluate(runner, data.documents, asked.micro_batch_tokens)
    finally:
        runner.close()
    figures = {"loss": Interval(found.loss, found.low, found.high)}
    counts = np.array([found.document_losses, found.document_labels]).T
    records = [
        {"where": source, "loss": loss / labels}
        for source, loss, labels in zip(data.sources, found.document_losses, found.document_labels, strict=True)
    ]
    if data.kind != "text" and asked.answers:
        said, references = _answers(model, tokenizer, data.documents[: asked.answers])
        figures |= text.text_figures(said, references)
        for record, answer, reference in zip(records, said, references):
            record |= {"predicted": answer, "label": reference}
    return Judged(name, Scores(figures, counts, metrics.ratio), records)


def _answers(model: Any, tokenizer: Any, documents: Sequence[Document]) -> tuple[list[str], list[str]]:
    cuts = [prompt_length(document) for document in documents]
    prompts = [document.input_ids[:cut].tolist() for document, cut in zip(documents, cuts, strict=True)]
    wanted = [document.input_ids[cut:].tolist() for document, cut in zip(documents, cuts, strict=True)]
    longest = max(map(len, wanted))
    limit = max_positions(model)
    room = longest if limit is None else limit - max(map(len, prompts))
    answers = generate(model, tokenizer, prompts, max(1, min(longest + longest // 4 + 4, room)))
    return [text_of(tokenizer, each) for each in answers], [text_of(tokenizer, each) for each in wanted]


def _paired(one: Judged, other: Judged) -> Paired:
    difference = metrics.paired(one.scores.counts, other.scores.counts, one.scores.statistic)
    return Paired(one.name, other.name, next(iter(one.scores.figures)), difference)
