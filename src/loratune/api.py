"""The library's front door: load a model, attach, train, resume, export. What the command line calls."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune import files, outputs
from loratune.adapter import peft_format
from loratune.adapter.attach import Attached, attach, attached_to, load_adapter
from loratune.errors import ConfigError
from loratune.evaluate.loss import Evaluation
from loratune.evaluate.samples import Sample, sample
from loratune.export.consumers import check
from loratune.export.convert import convert
from loratune.export.merged import export_merged
from loratune.ladder import climb
from loratune.ladder.record import LADDER, record
from loratune.language import language as system_language
from loratune.model.load import load_model
from loratune.plan import plan as planning
from loratune.plan.estimate import attached_skeleton, subject_of
from loratune.plan.measure import measure as measure_steps
from loratune.plan.plan import Plan
from loratune.prepare import begin_ladder, check_coverage, load, notifier, prepare
from loratune.report import adapters as adapter_reports
from loratune.report import figures
from loratune.report.ladder_texts import verdict, why
from loratune.report.run_page import run_page
from loratune.tasks import labels
from loratune.tasks.evaluation import task_samples
from loratune.tasks.model import TaskModel
from loratune.tasks.table import TASKS, find_labels
from loratune.train import checkpoint, identity, loop, replay
from loratune.train.config import ResolvedConfig, adapter_overrides, dump, load_run_config
from loratune.train.datasets import LEDGER, ledger_lines
from loratune.train.loop import OnEvent, Run
from loratune.train.signals import stop_on_signals

__all__ = [
    "RunResult",
    "adapter_info",
    "attach",
    "export_merged",
    "load_adapter",
    "load_model",
    "plan",
    "resume",
    "run",
    "train",
]

RUN_FILE, REPORT = "run.yaml", "report.html"


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
    return _start(*load(config, notifier(on_event)), resolved, output, on_event)


def plan(
    resolved: ResolvedConfig, *, measure: bool = True, memory: int | None = None, on_event: OnEvent = _quiet
) -> Plan:
    """Returns what a run will take on this machine, before it runs: memory, time and disk, and whether it fits.

    An estimate from shapes and rows alone, then, where it says that the run fits, real steps on the loaded model.
    Nothing is written. memory: bytes that the process may take, instead of what is free now. Raises as `run` does.
    """
    config, notify = resolved.config, _once(notifier(on_event))
    if config.adapter.task_type != "CAUSAL_LM":
        raise ConfigError(
            f"plan knows the costs of CAUSAL_LM only, not of {config.adapter.task_type}; train it as it is."
        )
    subject = subject_of(config, notify)
    with attached_skeleton(subject, config) as attached:
        check_coverage(attached, config.train.allow_uneven)
    made = planning.draft(subject, config, memory)
    if not (measure and made.fits):
        return made
    notify("measuring: the largest step of the run, then a usual one")
    started = time.perf_counter()
    attached, tokenizer = load(config, notify)
    state = prepare(attached, tokenizer, config, Path(config.output), _notices_only(notify))
    try:
        measured = measure_steps(state, tokenizer, made.estimate.work, time.perf_counter() - started)
    finally:
        state.causal.close()
    return planning.with_measurement(made, measured, subject, config)


def _once(notify: Callable[[str], None]) -> Callable[[str], None]:
    """Says each message the first time only."""
    said: set[str] = set()

    def say(message: str) -> None:
        if message not in said:
            said.add(message)
            notify(message)

    return say


def _notices_only(notify: Callable[[str], None]) -> OnEvent:
    def on_event(event: dict[str, Any]) -> None:
        if "message" in event:
            notify(event["message"])

    return on_event


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | Path | Mapping[str, float],
    output: str | Path,
    validation: str | Path | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    reject: bool = False,
    train_on: str = "completion",
    long: str = "stop",
    cache: bool = True,
    on_event: OnEvent = _quiet,
    **settings: Any,
) -> RunResult:
    """Trains the one active adapter of a model on rows; `settings` are the fields of TrainConfig.

    `data` and the arguments from `validation` to `cache` are those of DataConfig.
    Raises AdapterError if no adapter is attached; otherwise as `run`.
    """
    attached = attached_to(model)
    check_output(Path(output))
    overrides = {f"train.{name}": value for name, value in settings.items()} | {
        "model": model.name_or_path or "(in memory)",
        "output": str(output),
        "data.train": dict(data) if isinstance(data, Mapping) else str(data),
        "data.validation": None if validation is None else str(validation),
        "data.format": format,
        "data.columns": columns and dict(columns),
        "data.reject": reject,
        "data.train_on": train_on,
        "data.long": long,
        "data.cache": cache,
    }
    resolved = load_run_config(None, overrides | adapter_overrides(attached.config), caller="loratune.train")
    rows, task_type = resolved.config.data, attached.config.task_type
    if task_type in TASKS:
        labels.fit(model.config, find_labels(task_type, rows.specs, rows.format, rows.columns))
    return _start(attached, tokenizer, resolved, Path(output), on_event)


def resume(
    run_dir: str | Path, on_event: OnEvent = _quiet, *, allow_changed: bool = False, verify: bool = False
) -> RunResult:
    """Continues a run from its newest complete checkpoint, bit for bit as if it had not stopped on the same machine.

    A run that ended before its first checkpoint begins again, which is the same.
    Raises CheckpointError for no complete one, or if model, data, settings or versions are not those of the run;
    `allow_changed` goes on with those of now, and the run is labelled as not identical. `verify` first repeats the last
    steps from the checkpoint before, and raises CheckpointError unless they end in the same bits.
    Paths in run.yaml are relative to where the run was started: see `working_directory`.
    """
    output = Path(run_dir)
    resolved = _configuration_of(output)
    notify = notifier(on_event)
    with files.locked(output):
        if not checkpoint.folders(output) and not (output / "adapter").exists():
            notify(f"{output} has no checkpoint yet: beginning at step 0")
            return _start(*load(resolved.config, notify), resolved, output, on_event, again=True)
        return _resume(resolved, output, on_event, allow_changed=allow_changed, verify=verify)


def _resume(
    resolved: ResolvedConfig, output: Path, on_event: OnEvent, *, allow_changed: bool, verify: bool
) -> RunResult:
    notify = notifier(on_event)
    saved, skipped = checkpoint.newest(output)
    for reason in skipped:
        notify(f"skipped: {reason}")
    attached, tokenizer = load(resolved.config, notify)
    state = prepare(attached, tokenizer, resolved.config, output, on_event)
    begin_ladder(state, resolved.config)
    changed = identity.check(saved, state.identity, allow=allow_changed)
    if verify and state.guide is not None:
        raise ConfigError("the steps of a ladder cannot be verified: a trial may lie between. Resume without it.")
    if verify:
        first = replay.verify(state, saved)
        notify(f"the last steps, from {first} to {saved.step}, were done again: the same bits")
    loop.restore(state, saved)
    if changed:
        loop.label_changed(state, changed)
        notify(f"{loop.NOT_IDENTICAL}: {'; '.join(changed)}")
        _label(output / RUN_FILE, state.step, changed)
    notify(f"resuming at step {state.step} of {state.num_steps} from {saved.path}")
    return _finish(state, tokenizer, on_event, before=None)


def _configuration_of(run: Path) -> ResolvedConfig:
    """Returns a run's configuration; raises ConfigError, also where its data cannot be found from here."""
    if not (run / RUN_FILE).is_file():
        raise ConfigError(f"{run} is not a run: {RUN_FILE} is missing.")
    resolved = load_run_config(run / RUN_FILE, {})
    home = working_directory(run)
    local = [Path(spec.partition("#")[0]) for spec in resolved.config.data.specs if not spec.startswith("hub:")]
    if home is not None and home != Path.cwd() and local and not any(path.exists() for path in local):
        raise ConfigError(f"{run / RUN_FILE}: its paths are relative to {home}. Resume from that directory.")
    return resolved


def working_directory(run: Path) -> Path | None:
    """Returns where a run was started, which the relative paths of its run.yaml refer to; None if that is not known.

    It is what is left of the run's own path without the `output` in its file, so a project may move as a whole.
    """
    output = Path(load_run_config(run / RUN_FILE, {}).config.output)
    place, parts = run.resolve(), output.parts
    if output.is_absolute() or ".." in parts or place.parts[-len(parts) :] != parts:
        return None
    return place.parents[len(parts) - 1]


def _label(file: Path, step: int, changed: list[str]) -> None:
    """Adds to a run's file, as a comment, that the run is not one run any more."""
    label = f"# from step {step}: {loop.NOT_IDENTICAL}: {'; '.join(changed)}\n"
    files.atomic_write(file, file.read_text("utf-8") + label)


def _start(
    attached: Attached,
    tokenizer: PreTrainedTokenizerBase,
    resolved: ResolvedConfig,
    output: Path,
    on_event: OnEvent,
    *,
    again: bool = False,
) -> RunResult:
    """Begins a run; `again`, in the locked directory of one that ended before its first checkpoint."""
    config = resolved.config
    check_coverage(attached, config.train.allow_uneven)
    on_event({"event": "summary", "text": attached.summary(), "trainable": attached.adapter.num_parameters()})
    state = prepare(attached, tokenizer, config, output, on_event)
    ledger = ledger_lines(state.train, state.validation)  # of all the rows, before a ladder sets some apart
    begin_ladder(state, config)
    if again:
        return _finish(state, tokenizer, on_event, before=0)
    with files.staged_directory(output) as staging:
        files.atomic_write(staging / RUN_FILE, dump(resolved))
        files.atomic_write(staging / LEDGER, ledger)
    with files.locked(output):
        return _finish(state, tokenizer, on_event, before=0)


def _ladder_record(state: Run) -> dict[str, Any] | None:
    """Returns what a climb that has ended came to, with every decision's reason in words; None for another run."""
    if not (isinstance(state.guide, climb.Climb) and state.is_over):
        return None
    found = record(state, state.guide)
    decisions = [{**each, "why": why(each)} for each in found["decisions"]]
    return {**found, "decisions": decisions, "verdict": verdict(found)}


def _samples(state: Run, tokenizer: PreTrainedTokenizerBase) -> tuple[Sample, ...]:
    """Returns what the model says of the first held-out rows."""
    if isinstance(state.causal, TaskModel):
        return task_samples(state.causal, state.validation.documents)
    return sample(state.causal.model, tokenizer, state.validation.documents)


def _finish(
    state: Run,
    tokenizer: PreTrainedTokenizerBase,
    on_event: OnEvent,
    before: int | None,
) -> RunResult:
    """Trains to the end or a stop, then writes the adapter that is kept, the best by evaluation, else the last, and
    what the base model and the tuned one answer."""
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
    with stop_on_signals(), closing(state.causal):  # a signal that comes at the end waits until all is written
        status = loop.train(state)
        loop.use_best(state)
        ladder = _ladder_record(state)
        with state.attached.disabled():
            samples_before = _samples(state, tokenizer)
        samples_after = _samples(state, tokenizer)
        with loop.saying_what_is_saved(state):
            outputs.write_adapter(state, tokenizer)
            outputs.write_samples(state.output, samples_before, samples_after)
            outputs.write_evaluations(state)
            if ladder is not None:
                files.write_json(state.output / LADDER, ladder)
            write_report(state.output)
    seconds = time.perf_counter() - started
    end = {"event": "end", "status": status, "steps": state.step, "output": str(state.output), "seconds": seconds}
    on_event({**end, "label": loop.NOT_IDENTICAL} if state.continued else end)
    if ladder is not None:
        on_event({"event": "ladder", **ladder})
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


def write_report(run: Path, language: str | None = None) -> Path:
    """Writes a run's page, report.html, in English or Ukrainian ("en", "uk"; None: the system's); returns its path."""
    page = run / REPORT
    files.atomic_write(page, run_page(run, language or system_language()))
    return page


def adapter_info(
    path: str | Path, *, model: str | None = None, notify: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Returns what an adapter on disk is: see `report.adapters.info`; a base `model` adds amplification factors."""
    return adapter_reports.info(adapter_folder(Path(path)), model, notify)


def adapter_diff(one: str | Path, other: str | Path, *, figure: str | Path | None = None) -> dict[str, Any]:
    """Returns how two adapters differ: see `report.adapters.diff`; writes it to `figure` as SVG if given."""
    report = adapter_reports.diff(adapter_folder(Path(one)), adapter_folder(Path(other)))
    if figure is not None:
        files.atomic_write(Path(figure), figures.similarity_figure(report))
    return report


def adapter_check(path: str | Path, consumers: Sequence[str] | None = None) -> dict[str, list[dict[str, str]]]:
    """Returns what each consumer will refuse or apply wrongly: severity, what, advice; see `export.consumers`."""
    found = check(peft_format.read(adapter_folder(Path(path))), consumers)
    return {name: [asdict(each) for each in findings] for name, findings in found.items()}


def adapter_convert(path: str | Path, target: str | Path, to: str, **options: Any) -> dict[str, Any]:
    """Writes an adapter in another format, type, rank or layout: see `export.convert.convert`."""
    return convert(adapter_folder(Path(path)), Path(target), to, **options)


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
