"""What a run leaves beside its checkpoints: the adapter with its card, samples, and the loss of every held-out row."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loratune import files
from loratune.adapter import peft_format
from loratune.adapter.config import ABOUT
from loratune.evaluate.samples import Sample
from loratune.model import embedded
from loratune.report.run_files import EVALUATIONS, SAMPLES, RunFiles
from loratune.tasks.model import TaskModel
from loratune.tasks.table import card
from loratune.train import loop
from loratune.train.loop import Run


def write_evaluations(state: Run) -> None:
    """Writes the loss of every held-out row at each evaluation, so that runs on the same rows can be paired."""
    labels = [document.num_labels for document in state.validation.documents]
    rows = {"digest": state.validation.digest, "labels": labels}
    losses = {str(step): list(each.document_losses) for step, each in state.evaluations.items()}
    before = RunFiles(state.output).documents  # of the process that this one goes on from, if on the same rows
    if before and all(before[key] == value for key, value in rows.items()):
        losses = before["losses"] | losses
    files.write_json(state.output / EVALUATIONS, rows | {"losses": losses})


def write_samples(output: Path, before: tuple[Sample, ...], after: tuple[Sample, ...]) -> None:
    lines = [
        json.dumps({"when": when, **each.to_json()}, ensure_ascii=False)
        for when, samples in (("before", before), ("after", after))
        for each in samples
    ]
    files.atomic_write(output / SAMPLES, "\n".join(lines) + "\n")


def write_adapter(state: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the run's adapter/: PEFT's two files, the tokenizer, a model card, and the terms of the base."""
    adapter, model = state.attached.adapter, state.causal.model
    config, tensors = peft_format.encode(adapter, model)
    base = config["base_model_name_or_path"]
    with files.staged_directory(state.output / "adapter", replace=True) as staging:
        peft_format.write_into(staging, config, tensors, adapter.base)
        tokenizer.save_pretrained(str(staging))
        about = {"data_kind": state.train.kind, "steps": state.step, "best": state.best, "ended": state.is_over}
        about |= _task_of(state)
        about |= {"label": loop.NOT_IDENTICAL, "continued": state.continued} if state.continued else {}
        files.write_json(staging / ABOUT, about)
        files.atomic_write(staging / "README.md", _model_card(base, state))
        write_terms(staging, base)


def _task_of(state: Run) -> dict[str, Any]:
    """What a task's adapter needs to be loaded again: PEFT's own file has no place for the labels' names."""
    if not isinstance(state.causal, TaskModel):
        return {}
    labels = state.causal.task.labels
    return {
        "task_type": state.attached.config.task_type,
        "labels": list(labels.names),
        "problem": labels.problem,
    }


def write_terms(folder: Path, base: str | None) -> None:
    """Writes the terms that come with a base model (Gemma's: section 3.1 asks for them and a NOTICE) into a folder."""
    notice = embedded.notice(base) if base else None
    if base is None or notice is None:
        return
    files.atomic_write(folder / "NOTICE", notice + "\n")
    for terms in embedded.terms_files(base):
        files.atomic_write(folder / terms.name, terms.read_bytes())


def _model_card(base: str | None, state: Run) -> str:
    kept = state.best["step"] if state.best else state.step
    front = [
        "---",
        f"base_model: {base}",
        "library_name: peft",
        f"pipeline_tag: {card(state.attached.config.task_type)}",
        "tags: [lora, loratune]",
    ]
    body = [
        "---",
        "",
        f"# LoRA adapter for {base}",
        "",
        f"Trained with loratune on {len(state.train):,} rows; weights of step {kept} of {state.num_steps}.",
        "",
        "```",
        state.attached.summary(),
        "```",
        "",
    ]
    return "\n".join(front + body)
