"""The library's front door: load a model, attach, train, resume, export. What the command line calls."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune import files
from loratune.adapter import peft_format, roles
from loratune.adapter.attach import Attached, attach, attached_to, load_adapter
from loratune.adapter.fingerprint import fingerprint
from loratune.data.dataset import Dataset, hold_out, load_dataset
from loratune.data.encode import Encoder
from loratune.errors import CheckpointError, ConfigError, DataError
from loratune.evaluate.loss import Evaluation
from loratune.evaluate.samples import Sample, sample
from loratune.model import embedded
from loratune.model.causal import CausalModel
from loratune.model.load import load_model
from loratune.train import checkpoint, loop
from loratune.train.config import DataConfig, ResolvedConfig, RunConfig, adapter_overrides, dump, load_run_config
from loratune.train.loop import OnEvent, Run
from loratune.train.optim import Optimizer

__all__ = ["RunResult", "adapter_info", "attach", "load_adapter", "load_model", "resume", "run", "train"]

RUN_FILE, SAMPLES, ABOUT = "run.yaml", "samples.jsonl", "loratune.json"


@dataclass(frozen=True)
class RunResult:
    """What a run ended with. before: the held-out evaluation of the base model; after: that of the adapter kept."""

    output: Path
    status: str
    steps: int
    before: Evaluation | None
    after: Evaluation | None
    samples_before: tuple[Sample, ...]
    samples_after: tuple[Sample, ...]
    seconds: float


def _quiet(event: dict[str, Any]) -> None:
    pass


def run(resolved: ResolvedConfig, on_event: OnEvent = _quiet) -> RunResult:
    """Does a whole run from its configuration: load, attach, train, save. Nothing is written before all is checked.

    Raises ConfigError, DataError or AdapterError before the first step; TrainingError during the run.
    """
    config = resolved.config
    output = Path(config.output)
    check_output(output)
    _check_task(config.adapter.task_type)
    lora = config.adapter.to_lora_config()
    model, tokenizer = load_model(config.model, notify=_notifier(on_event))
    attached = attach(model, lora, seed=config.train.seed)
    return _start(attached, tokenizer, resolved, output, on_event)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | Path,
    output: str | Path,
    validation: str | Path | None = None,
    format: str | None = None,
    on_event: OnEvent = _quiet,
    **settings: Any,
) -> RunResult:
    """Trains the one active adapter of a model on a file of rows; `settings` are the fields of TrainConfig.

    Raises AdapterError if no adapter is attached; otherwise as `run`.
    """
    attached = attached_to(model)
    check_output(Path(output))
    _check_task(attached.config.task_type)
    overrides = {f"train.{name}": value for name, value in settings.items()} | {
        "model": model.name_or_path or "(in memory)",
        "output": str(output),
        "data.train": str(data),
        "data.validation": None if validation is None else str(validation),
        "data.format": format,
    }
    resolved = load_run_config(None, overrides | adapter_overrides(attached.config), caller="loratune.train")
    return _start(attached, tokenizer, resolved, Path(output), on_event)


def resume(run_dir: str | Path, on_event: OnEvent = _quiet) -> RunResult:
    """Continues a run from its newest complete checkpoint, bit for bit as if it had not stopped on the same machine.

    Raises CheckpointError if there is none, or if model, data, settings or versions are not those of the run.
    """
    output = Path(run_dir)
    if not (output / RUN_FILE).is_file():
        raise ConfigError(f"{output} is not a run: {RUN_FILE} is missing.")
    resolved = load_run_config(output / RUN_FILE, {})
    saved, skipped = checkpoint.newest(output)
    notify = _notifier(on_event)
    for reason in skipped:
        notify(f"skipped: {reason}")
    config = resolved.config
    model, tokenizer = load_model(config.model, notify=notify)
    attached = attach(model, config.adapter.to_lora_config(), seed=config.train.seed)
    state = _prepare(attached, tokenizer, config, output, on_event)
    _check_identity(saved, state.identity)
    loop.restore(state, saved)
    notify(f"resuming at step {state.step} of {state.num_steps} from {saved.path}")
    return _finish(state, tokenizer, on_event, before=None, samples_before=())


def _start(
    attached: Attached, tokenizer: PreTrainedTokenizerBase, resolved: ResolvedConfig, output: Path, on_event: OnEvent
) -> RunResult:
    config = resolved.config
    _check_coverage(attached, config.train.allow_uneven)
    on_event({"event": "summary", "text": attached.summary(), "trainable": attached.adapter.num_parameters()})
    state = _prepare(attached, tokenizer, config, output, on_event)
    samples_before = sample(state.causal.model, tokenizer, state.validation.documents)
    with files.staged_directory(output) as staging:
        files.atomic_write(staging / RUN_FILE, dump(resolved))
    return _finish(state, tokenizer, on_event, before=0, samples_before=samples_before)


def _prepare(
    attached: Attached, tokenizer: PreTrainedTokenizerBase, config: RunConfig, output: Path, on_event: OnEvent
) -> Run:
    """Makes everything a run needs, and writes nothing."""
    model: Any = attached.model
    encoder = Encoder(tokenizer, _context_length(model))
    training, validation = _datasets(config.data, encoder)
    _check_ids(model, training, validation)
    causal = CausalModel(model)
    for note in causal.notes:
        on_event({"event": "notice", "message": note})
    return Run(
        output=output,
        config=config.train,
        causal=causal,
        attached=attached,
        optimizer=Optimizer(attached.adapter, config.train),
        train=training,
        validation=validation,
        identity=_identity(attached, tokenizer, config, training, validation),
        on_event=on_event,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _check_ids(model: Any, *datasets: Dataset) -> None:
    """A tokenizer may know a token more than the embedding has rows (Gemma 3's image token); no row may use it."""
    rows: int = model.get_input_embeddings().num_embeddings
    for dataset in datasets:
        for document, source in zip(dataset.documents, dataset.sources, strict=True):
            if document.input_ids.max() >= rows:
                raise DataError(
                    f"{source}: token {document.input_ids.max()} is not in the model, which has {rows:,} tokens."
                )


def _datasets(config: DataConfig, encoder: Encoder) -> tuple[Dataset, Dataset]:
    training = load_dataset(config.train, encoder, config.format)
    if config.validation is None:
        return hold_out(training)
    return training, load_dataset(config.validation, encoder, config.format)


def _finish(
    state: Run,
    tokenizer: PreTrainedTokenizerBase,
    on_event: OnEvent,
    before: int | None,
    samples_before: tuple[Sample, ...],
) -> RunResult:
    """Trains to the end or a stop, then writes the adapter that is kept: the best by evaluation, else the last."""
    started = time.perf_counter()
    on_event(
        {
            "event": "start",
            "step": state.step,
            "num_steps": state.num_steps,
            "num_documents": len(state.train),
            "num_tokens": state.train.num_tokens,
            "num_label_tokens": state.train.num_labels,
            "num_validation": len(state.validation),
        }
    )
    try:
        status = loop.train(state)
        loop.use_best(state)
        samples_after = sample(state.causal.model, tokenizer, state.validation.documents)
        _write_adapter(state, tokenizer)
    finally:
        state.causal.close()
    _write_samples(state.output, samples_before, samples_after)
    seconds = time.perf_counter() - started
    on_event({"event": "end", "status": status, "steps": state.step, "output": str(state.output), "seconds": seconds})
    return RunResult(
        output=state.output,
        status=status,
        steps=state.step,
        before=state.evaluations.get(before) if before is not None else None,
        after=state.evaluations.get(state.best["step"]) if state.best else None,
        samples_before=samples_before,
        samples_after=samples_after,
        seconds=seconds,
    )


def _write_samples(output: Path, before: tuple[Sample, ...], after: tuple[Sample, ...]) -> None:
    lines = [
        json.dumps({"when": when, **each.to_json()}, ensure_ascii=False)
        for when, samples in (("before", before), ("after", after))
        for each in samples
    ]
    files.atomic_write(output / SAMPLES, "\n".join(lines) + "\n")


def _write_adapter(state: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the run's adapter/: PEFT's two files, the tokenizer, a model card, and the terms of the base."""
    adapter, model = state.attached.adapter, state.causal.model
    config, tensors = peft_format.encode(adapter, model)
    base = config["base_model_name_or_path"]
    with files.staged_directory(state.output / "adapter", replace=True) as staging:
        peft_format.write_into(staging, config, tensors, adapter.base)
        tokenizer.save_pretrained(str(staging))
        files.write_json(staging / ABOUT, {"data_kind": state.train.kind, "steps": state.step, "best": state.best})
        files.atomic_write(staging / "README.md", _model_card(base, state))
        write_terms(staging, base)


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
        "pipeline_tag: text-generation",
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


def adapter_info(path: str | Path) -> dict[str, Any]:
    """Returns what an adapter on disk is: settings, sites with ranks and norms, sizes. No base model is needed."""
    folder = adapter_folder(Path(path))
    adapter = peft_format.read(folder)
    sites = [
        {
            "path": site,
            "r": factor.rank,
            "inputs": factor.A.shape[1],
            "outputs": factor.B.shape[0],
            "scale": factor.scale,
            "norm_A": float(factor.A.detach().norm()),
            "norm_B": float(factor.B.detach().norm()),
            "norm_update": _update_norm(factor.A, factor.B, factor.scale),
        }
        for site, factor in adapter.factors.items()
    ]
    config = json.loads((folder / peft_format.CONFIG).read_bytes())
    return {
        "path": str(folder),
        "config": {name: value for name, value in config.items() if value not in (None, {}, [], False)},
        "base": {"name": config.get("base_model_name_or_path"), "fingerprint": adapter.base is not None},
        "sites": sites,
        "roles": {role: sum(role in roles.roles_of(site) for site in adapter.factors) for role in roles.ROLES},
        "num_parameters": adapter.num_parameters() + sum(tensor.numel() for tensor in adapter.loose.values()),
        "bytes": sum(file.stat().st_size for file in (folder / peft_format.WEIGHTS, folder / peft_format.CONFIG)),
    }


def _update_norm(A: torch.Tensor, B: torch.Tensor, scale: float) -> float:
    """Returns the Frobenius norm of s B A from rank-sized products: sqrt(trace(A A^T B^T B)) s."""
    a, b = A.detach().double(), B.detach().double()
    return scale * float(((a @ a.T) * (b.T @ b)).sum().clamp_min(0).sqrt())


def adapter_folder(path: Path) -> Path:
    """Returns the adapter of a run directory, or the directory itself if it is one; raises ConfigError."""
    for folder in (path, path / "adapter"):
        if (folder / peft_format.CONFIG).is_file():
            return folder
    raise ConfigError(f"{path} is neither an adapter ({peft_format.CONFIG}) nor a finished run (adapter/).")


def check_output(output: Path) -> None:
    if output.exists():
        raise ConfigError(
            f"the output directory {output} exists already. Choose another name, or continue it: "
            f"loratune train --resume {output}"
        )


def _check_task(task_type: str | None) -> None:
    if task_type not in (None, "CAUSAL_LM"):
        raise ConfigError(f"task_type {task_type} cannot be trained yet; CAUSAL_LM can.")


def _check_coverage(attached: Attached, allow_uneven: bool) -> None:
    uneven = roles.coverage(attached.model, list(attached.adapter.factors)).uneven
    chosen = attached.config.layers_to_transform
    if uneven and not allow_uneven and not chosen:
        raise ConfigError(
            f"the targets adapt {', '.join(uneven)} in some layers only:\n{attached.summary()}\n"
            "If that is meant, set allow_uneven: true (--allow-uneven)."
        )


def _context_length(model: Any) -> int | None:
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _identity(
    attached: Attached, tokenizer: PreTrainedTokenizerBase, config: RunConfig, training: Dataset, validation: Dataset
) -> dict[str, Any]:
    """Returns what must be the same for a resumed run to be the same run."""
    base = attached.adapter.base or fingerprint(attached.model)
    schedule = config.train.model_dump(exclude={"keep", "save_every"})
    return {
        "base": base.to_json(),
        "data": {"train": training.digest, "validation": validation.digest},
        "tokenizer": _tokenizer_digest(tokenizer),
        "adapter": config.adapter.model_dump(mode="json"),
        "train": schedule,
        "precision": str(next(attached.model.parameters()).dtype),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    import hashlib

    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256((content + str(tokenizer.chat_template)).encode()).hexdigest()


def _check_identity(saved: checkpoint.Checkpoint, identity: dict[str, Any]) -> None:
    before = json.loads(json.dumps(saved.state["identity"]))
    now = json.loads(json.dumps(identity))
    changed = [name for name in now if now[name] != before.get(name)]
    if changed:
        detail = "; ".join(f"{name}: was {_short(before.get(name))}, is {_short(now[name])}" for name in changed)
        raise CheckpointError(
            f"{saved.path} belongs to a run with other settings, so it would not continue it: {detail}."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _notifier(on_event: OnEvent) -> Callable[[str], None]:
    return lambda message: on_event({"event": "notice", "message": message})
