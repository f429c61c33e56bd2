"""From a configuration to a run that is ready to train: model, adapter, rows, all checks; nothing is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loratune.adapter.attach import Attached, attach
from loratune.adapter.summary import coverage
from loratune.data.dataset import Dataset
from loratune.data.deferred import Deferred
from loratune.data.encode import Encoder
from loratune.errors import ConfigError
from loratune.evaluate.loss import evaluate
from loratune.ladder import climb
from loratune.model import heads
from loratune.model.causal import CausalModel
from loratune.model.gguf import cache_root
from loratune.model.load import load_model
from loratune.tasks.evaluation import evaluate_task
from loratune.tasks.model import TaskModel
from loratune.tasks.table import find_labels, task_of, with_head
from loratune.tasks.task import Task
from loratune.train import identity
from loratune.train.config import RunConfig
from loratune.train.datasets import check_ids, load_datasets
from loratune.train.loop import OnEvent, Run
from loratune.train.optim import Optimizer
from loratune.train.rehearsal import rehearse


def load(config: RunConfig, notify: Callable[[str], None]) -> tuple[Attached, PreTrainedTokenizerBase]:
    """Loads the base model, with the head and the labels of its task, and attaches a new adapter; raises as `run`."""
    lora = config.adapter.to_lora_config()  # what is wrong with it is said before a model is loaded
    task_type, data = lora.task_type or "CAUSAL_LM", config.data
    labels = find_labels(task_type, data.specs, data.format, data.columns)
    model, tokenizer = load_model(
        config.model, dtype=config.train.dtype, task_type=task_type, labels=labels.names, problem=labels.problem,
        notify=notify, defer=True,
    )  # fmt: skip
    return attach(model, with_head(lora, model), seed=config.train.seed), tokenizer


def prepare(
    attached: Attached, tokenizer: PreTrainedTokenizerBase, config: RunConfig, output: Path, on_event: OnEvent
) -> Run:
    """Makes everything a run needs, and writes nothing."""
    model: Any = attached.model
    data = config.data
    task = _task(attached, tokenizer, config)
    num_ids = None if task and not task.tokens else model.get_input_embeddings().num_embeddings
    encoder = task or Encoder(
        tokenizer, _context_length(model), train_on=data.train_on, long=data.long, num_ids=num_ids
    )
    training, validation = load_datasets(data, encoder, cache_root() / "tokens", notifier(on_event))
    if task is not None:
        task.check(training.documents, training.sources)
    if task is not None and num_ids is not None:
        check_ids(num_ids, training, validation)
    keep_frozen, recompute = config.train.keep_frozen_mb * 10**6, config.train.recompute
    causal = TaskModel(model, task) if task else CausalModel(model, recompute=recompute, keep_frozen=keep_frozen)
    if task and keep_frozen:
        causal.notes.append(
            f"keep_frozen_mb changes nothing: a task ({attached.config.task_type}) runs its layers each time."
        )
    for note in causal.notes:
        on_event({"event": "notice", "message": note})
    state = Run(
        output=output,
        config=config.train,
        causal=causal,
        attached=attached,
        optimizer=Optimizer(attached.adapter, config.train),
        train=training,
        validation=validation,
        identity=identity.identity(attached, tokenizer, config, training, validation)
        | _files_of(task, training, validation)
        | ({"ladder": config.ladder.model_dump()} if config.ladder else {}),
        on_event=_reading(tokenizer, on_event) if isinstance(tokenizer, Deferred) else on_event,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        evaluate=evaluate_task if task else evaluate,
    )
    rehearse(state)
    return state


def _reading(tokenizer: Deferred, on_event: OnEvent) -> OnEvent:
    """Reads a deferred tokenizer after the first step: the run's end needs it, and what is wrong is said early."""

    def and_read(event: dict[str, Any]) -> None:
        on_event(event)
        if event.get("event") == "step":
            tokenizer.read()

    return and_read


def _task(attached: Attached, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> Task | None:
    """Returns the task of a run with its head begun, or None for a run that continues text."""
    task = task_of(
        attached.config.task_type, attached.model, tokenizer, long=config.data.long, train_on=config.data.train_on,
        batch_size=config.train.batch_size,
    )  # fmt: skip
    heads.begin(attached.model, attached.adapter.saved, config.train.seed)
    return task


def _files_of(task: Task | None, training: Dataset, validation: Dataset) -> dict[str, str]:
    """Returns the digest of the files that a task's rows name, where they do."""
    digest = task.digest(training.documents, validation.documents) if task else None
    return {} if digest is None else {"files": digest}


def begin_ladder(state: Run, config: RunConfig) -> None:
    """Makes a run climb, if its configuration says so."""
    if config.ladder is not None:
        climb.begin(state, config.ladder)


def check_coverage(attached: Attached, allow_uneven: bool) -> None:
    """Raises ConfigError where a target is in some layers only, unless that is allowed or the layers were chosen."""
    uneven = coverage(attached.model, attached.adapter).uneven
    chosen = attached.config.layers_to_transform
    if uneven and not allow_uneven and not chosen:
        raise ConfigError(
            f"the targets adapt {', '.join(uneven)} in some layers only:\n{attached.summary()}\n"
            "If that is meant, set allow_uneven: true (--allow-uneven)."
        )


def _context_length(model: Any) -> int | None:
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def notifier(on_event: OnEvent) -> Callable[[str], None]:
    """Returns what passes messages on as events."""
    return lambda message: on_event({"event": "notice", "message": message})
