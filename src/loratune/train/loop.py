"""The training loop: a function over values. One optimizer step is `train_step`; it reads on one screen.

The gradient of a step is that of the sum of its label losses over their number, so it does not depend on how the
documents are cut into micro-batches, packed or padded.
"""

import gc
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from loratune import files
from loratune.adapter import peft_format
from loratune.adapter.attach import Attached
from loratune.data.dataset import Dataset
from loratune.data.encode import Document
from loratune.data.pack import step_rows
from loratune.errors import CheckpointError, ConfigError, TrainingError
from loratune.evaluate.loss import Evaluation, evaluate
from loratune.evaluate.protocol import Runner
from loratune.train import checkpoint, schedule, watch
from loratune.train.config import TrainConfig
from loratune.train.guide import Guide
from loratune.train.measure import check_space, checkpoint_bytes, is_out_of_memory, peak_memory_bytes
from loratune.train.optim import Optimizer
from loratune.train.signals import stop_on_signals

OnEvent = Callable[[dict[str, Any]], None]
METRICS = "metrics.jsonl"
NOT_IDENTICAL = "continued, not identical"
_PARAMETER = "parameter."
_STATE = ("step", "best", "stale", "micro_batch_tokens", "continued")  # of a Run, kept as they are
_Result = TypeVar("_Result")


@dataclass
class Run:
    """Everything a run is made of. `step` steps are done; `best` is the best evaluation so far as {step, loss}, and
    `stale` the number of evaluations since. micro_batch_tokens: the configuration's, or less once memory ran out.
    continued: where the run was taken up with something changed, as {step, changed}. log: metrics.jsonl while open.
    """

    output: Path
    config: TrainConfig
    causal: Runner
    attached: Attached
    optimizer: Optimizer
    train: Dataset
    validation: Dataset
    identity: dict[str, Any]
    on_event: OnEvent
    num_parameters: int
    step: int = 0
    best: dict[str, Any] | None = None
    stale: int = 0
    num_metrics: int = 0
    continued: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    course: watch.Course = field(default_factory=watch.Course)
    log: files.JsonLines | None = None
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    guide: Guide | None = None
    evaluate: Callable[..., Evaluation] = evaluate  # (runner, documents, max_tokens); a task's adds its figures

    def __post_init__(self) -> None:
        self.micro_batch_tokens = self.config.micro_batch_tokens
        self.gates = watch.Gates(self.attached)

    def tell(self, event: dict[str, Any], **shown: Any) -> None:
        """Writes an event into metrics.jsonl and sends it on, with what else is only shown."""
        if self.log is not None:
            with saying_what_is_saved(self):
                self.log.write(event)
        self.on_event({**event, **shown})

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train) / self.config.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run: the epochs', at least 1, or `max_steps` if that is fewer."""
        steps = max(1, math.ceil(self.config.epochs * self.steps_per_epoch - 1e-9))
        return min(steps, self.config.max_steps or steps)

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or the held-out loss has not fallen for `patience` evaluations."""
        return self.step >= self.num_steps or (self.config.patience is not None and self.stale >= self.config.patience)

    def learning_rate(self) -> float:
        """Returns the learning rate of the step about to be done."""
        if self.guide is not None:
            return self.guide.learning_rate(self)
        warmup = schedule.warmup_steps(self.config, self.num_steps)
        peak = schedule.peak_rate(self.config, self.num_parameters)
        return schedule.rate(self.step, self.num_steps, warmup, peak)

    def rows_of_step(self) -> list[int]:
        """Returns the training rows of the step about to be done: a pure function of (seed, step)."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        return step_rows(len(self.train), self.config.batch_size, self.config.seed, epoch, position)


def train_step(run: Run) -> dict[str, Any]:
    """Does one optimizer step; returns its metrics. Raises TrainingError, with no parameter changed, for a loss or a
    gradient that is not finite and for a factor without one; after the update for one that did not move."""
    rows = run.rows_of_step()
    documents = [run.train.documents[row] for row in rows]
    num_labels = sum(document.num_labels for document in documents)
    loss = within_memory(run, documents, lambda: _accumulate(run, rows, documents, num_labels))
    norm = float(run.optimizer.clip())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        run.optimizer.clear()
        raise _not_finite(run, rows, loss, norm)
    return update(run, documents, loss, norm)


def update(run: Run, documents: Sequence[Document], loss: float, norm: float) -> dict[str, Any]:
    """Updates the parameters from the gradient of a step, clipped and finite; returns the step's metrics. Raises
    TrainingError for a factor without a gradient and, after the update, for one that did not move."""
    learning_rate = run.learning_rate()
    with run.gates.update(run.step, learning_rate, documents):
        _update(run, learning_rate)
    run.step += 1
    return {
        "step": run.step,
        "epoch": run.step / run.steps_per_epoch,
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "num_tokens": sum(document.num_tokens for document in documents),
        "num_label_tokens": sum(document.num_labels for document in documents),
    }


def _update(run: Run, learning_rate: float) -> None:
    """Updates the parameters; where memory runs out, some of them are updated, so the step cannot be repeated."""
    try:
        run.optimizer.step(learning_rate)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"step {run.step + 1}: memory ran out in the update of the parameters, which is half done: "
            f"{str(error).partition(chr(10))[0]} {_last_checkpoint(run)} Free memory and resume from there, or start "
            "again with a smaller rank or smaller micro-batches."
        ) from error


def _accumulate(run: Run, rows: list[int], documents: list[Document], num_labels: int) -> float:
    """Adds up the gradient of a step, micro-batch by micro-batch; returns its loss."""
    loss = 0.0
    with run.gates.experts.watched():
        for pack in run.causal.cut(documents, run.micro_batch_tokens):
            batch = run.causal.batch([documents[i] for i in pack], keys=[rows[i] for i in pack])
            run.attached.shared.noise = batch.noise(run.config.seed, run.step)
            total, _ = run.causal.losses(batch)
            (total / num_labels).backward()
            loss += float(total.detach()) / num_labels
    return loss


def within_memory(run: Run, documents: Sequence[Document], work: Callable[[], _Result]) -> _Result:
    """Does work over documents; each time memory runs out, again from its beginning with micro-batches of half the
    tokens: the same rows in the same order and the same dropout masks, so the same gradient but for rounding."""
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        _halve(run, documents, reason)  # out of the handler: the error holds what filled the memory


def _halve(run: Run, documents: Sequence[Document], reason: str) -> None:
    run.optimizer.clear()
    gc.collect()
    if run.causal.device.type == "cuda":
        torch.cuda.empty_cache()
    lengths = [document.num_tokens for document in documents]
    before = run.micro_batch_tokens
    if run.causal.cut(documents, before) == run.causal.cut(documents, 1):  # it cannot be cut further
        raise TrainingError(
            f"step {run.step + 1}: memory ran out on single rows (the longest has {max(lengths):,} tokens): {reason} "
            f"{_last_checkpoint(run)} Leave out or split the longest rows, or use a smaller model or rank."
        )
    run.micro_batch_tokens = min(before, sum(lengths)) // 2
    now = {"was": before, "micro_batch_tokens": run.micro_batch_tokens}
    run.tell({"event": "memory", "step": run.step, "reason": reason, **now})


def _not_finite(run: Run, rows: list[int], loss: float, norm: float) -> TrainingError:
    names = ", ".join(run.train.sources[row] for row in rows[:8]) + (" ..." if len(rows) > 8 else "")
    return TrainingError(
        f"step {run.step + 1}: loss {loss} with gradient norm {norm} is not finite; stopped before the update. "
        f"Rows of this step: {names}. {_last_checkpoint(run)} Try a smaller learning rate, or look at these rows."
    )


def _last_checkpoint(run: Run) -> str:
    saved = checkpoint.folders(run.output)
    return f"Last checkpoint: {saved[-1] if saved else 'none'}."


def train(run: Run) -> str:
    """Trains to the end or until a signal asks to stop; returns "done" or "stopped". What was reached is saved.

    A stop waits for a step that is saved, so that a run that says it can be resumed can be: before the first
    checkpoint, that is the first step.
    """
    run.attached.train_mode(True)
    try:
        with stop_on_signals() as stop:
            with saying_what_is_saved(run):
                run.log = files.JsonLines(run.output / METRICS, keep=run.num_metrics)
            if run.log.count < run.num_metrics:
                message = f"{METRICS} was cut: {run.log.count:,} of {run.num_metrics:,} lines up to here are left"
                run.tell({"event": "notice", "step": run.step, "message": message})
            if run.continued and run.continued[-1]["step"] == run.step:
                run.log.write({"event": NOT_IDENTICAL, **run.continued[-1]})
            if run.step == 0:
                _evaluate(run)
            clock, saved = Clock(), run.step
            while not run.is_over and not (stop.requested and saved == run.step > 0):
                if run.guide is not None and run.guide.is_due(run):
                    saved = save(run)
                    run.guide.turn(run, stop)
                    continue
                line = clock.timed(run)
                run.tell({"event": "step", **line}, num_steps=run.num_steps)
                judge(run, line)
                if _is_due(run, run.config.eval_every, at_epochs=True):
                    _evaluate(run)
                    saved = save(run)
                elif stop.requested or _is_due(run, run.config.save_every, at_epochs=False):
                    saved = save(run)
    finally:
        run.attached.shared.noise = None
        run.attached.train_mode(False)
        if run.log is not None:
            with suppress(OSError):  # what a checkpoint needs of it was flushed before the checkpoint was written
                run.log.close()
    return "done" if run.is_over else "stopped"


def judge(run: Run, line: dict[str, Any]) -> None:
    """Looks at a step's loss beside the untuned model's; stops a run that has blown up."""
    try:
        remark = run.course.see(run.step, line["loss"])
    except TrainingError as error:
        best = f"Best checkpoint: {checkpoint.step_folder(run.output, run.best['step'])}." if run.best else ""
        raise TrainingError(
            f"{error} {best or _last_checkpoint(run)} Start again with a smaller learning rate, such as "
            f"{schedule.peak_rate(run.config, run.num_parameters) / 5:.0e}."
        ) from None
    if remark is not None:
        run.tell({"event": "notice", "step": run.step, "message": remark})


def _is_due(run: Run, every: int | None, *, at_epochs: bool) -> bool:
    if run.step >= run.num_steps:
        return True
    if every is not None:
        return run.step % every == 0
    return at_epochs and run.step % run.steps_per_epoch == 0


def measure(run: Run, rows: Dataset) -> Evaluation:
    """Evaluates the model as it stands on held-out rows; raises TrainingError for a loss that is not finite."""
    run.attached.shared.noise = None
    run.attached.train_mode(False)
    documents = rows.documents
    result = within_memory(run, documents, lambda: run.evaluate(run.causal, documents, run.micro_batch_tokens))
    run.attached.train_mode(True)
    if not math.isfinite(result.loss):
        raise _not_finite_held_out(run, rows, result)
    return result


def _evaluate(run: Run) -> None:
    note(run, measure(run, run.validation))


def note(run: Run, result: Evaluation) -> None:
    """Notes the evaluation of the present step, and whether it is the best."""
    run.evaluations[run.step] = result
    run.tell({"event": "evaluation", "step": run.step, **result.to_json()})
    if run.step == 0:
        run.course.start(result, run.config.batch_size)
    elif run.best is None or result.loss < run.best["loss"]:
        run.best, run.stale = {"step": run.step, "loss": result.loss}, 0
    else:
        run.stale += 1
    if run.is_over:
        for remark in _at_the_end(run):
            run.tell({"event": "notice", "step": run.step, "message": remark})


def _at_the_end(run: Run) -> Iterator[str]:
    if run.step < run.num_steps:
        yield f"stopped early: the held-out loss has not fallen for {run.stale} evaluations"
    if run.best is not None and run.course.untuned is not None and run.best["loss"] >= run.course.untuned:
        yield (
            f"nothing was learnt: the best held-out loss, {run.best['loss']:.4f}, is no lower than the untuned model's "
            f"{run.course.untuned:.4f}. Try another learning rate, more steps, or look at the rows."
        )


def _not_finite_held_out(run: Run, rows: Dataset, result: Evaluation) -> TrainingError:
    losses = zip(rows.sources, result.document_losses, strict=True)
    bad = [source for source, loss in losses if not math.isfinite(loss)]
    cause = "the weights of the base model may hold NaN" if run.step == 0 else "try a smaller learning rate"
    return TrainingError(
        f"step {run.step}: the held-out loss of {len(bad)} of {len(rows)} rows is not finite "
        f"(first: {bad[0]}); {cause}."
    )


def save(run: Run, keep: int | None = None) -> int:
    """Writes a checkpoint of the run as it stands; of all, the last `keep` (the configuration's) and the best stay."""
    assert run.log is not None
    adapter = run.attached.adapter
    config, tensors = peft_format.encode(adapter, run.causal.model)
    state = {name: getattr(run, name) for name in _STATE}
    state |= {"identity": run.identity, "num_metrics": run.log.count, "course": asdict(run.course)}
    state |= {"guide": run.guide.state()} if run.guide else {}
    with saying_what_is_saved(run):
        run.log.sync()
        check_space(run.output, checkpoint_bytes(adapter))
        path = checkpoint.write(
            run.output,
            run.step,
            lambda folder: peft_format.write_into(folder, config, tensors, adapter.base),  # pyright: ignore
            {**parameters(run), **run.optimizer.state(), **(run.guide.tensors() if run.guide else {})},
            state,
        )
    checkpoint.retain(run.output, keep or run.config.keep)
    run.on_event({"event": "checkpoint", "step": run.step, "path": str(path)})
    return run.step


@contextmanager
def saying_what_is_saved(run: Run) -> Generator[None]:
    """Turns what goes wrong in writing a run's files into a TrainingError that says what there is to go on from."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointError, ConfigError) as error:
        whole = bool(checkpoint.folders(run.output))
        next_step = f"make room, then: loratune train --resume {run.output}" if whole else "make room and start again"
        raise TrainingError(
            f"step {run.step} could not be saved: {error} {_last_checkpoint(run)} Next: {next_step}."
        ) from error


class Clock:
    """Times the steps of this process: seconds, tokens per second, time left, peak memory."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0

    def timed(self, run: Run) -> dict[str, Any]:
        start = time.perf_counter()
        line = train_step(run)
        seconds = time.perf_counter() - start
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        return {
            **line,
            "seconds": self.seconds,
            "step_seconds": seconds,
            "tokens_per_second": line["num_tokens"] / seconds,
            "seconds_left": self.seconds / self.steps * (run.num_steps - run.step),
            "memory_bytes": peak_memory_bytes(run.causal.device),
        }


def restore(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Puts a run back to where a checkpoint was taken: parameters, moments, position."""
    missing = [name for name in (*_STATE, "num_metrics", "course") if name not in saved.state]
    if missing:
        raise CheckpointError(f"{saved.path / checkpoint.STATE} lacks {', '.join(missing)}: another version wrote it.")
    tensors = saved.training_state()
    if run.guide is not None:
        run.guide.restore(run, saved.state.get("guide"), tensors)
    run.optimizer.load(take_parameters(run, str(saved.path), tensors))
    for name in (*_STATE, "num_metrics"):
        setattr(run, name, saved.state[name])
    run.course = watch.Course(**saved.state["course"])


def label_changed(run: Run, changed: list[str]) -> None:
    """Notes that a restored run goes on with something changed: nothing it held itself to before binds it now."""
    run.continued = [*run.continued, {"step": run.step, "changed": changed}]
    run.micro_batch_tokens = run.config.micro_batch_tokens
    if any(each.startswith(("data.validation", "base_model")) for each in changed):
        run.best, run.stale = None, 0  # measured on something else


def use_best(run: Run) -> None:
    """Puts the parameters of the best checkpoint into the attached adapter; without an evaluation the last stay."""
    if run.best is not None and run.best["step"] != run.step:
        best = checkpoint.read(checkpoint.step_folder(run.output, run.best["step"]))
        take_parameters(run, str(best.path), best.training_state())


def parameters(run: Run) -> dict[str, Tensor]:
    """Returns what is trained, bit for bit: the adapter's own file holds what others can read (PiSSA's as rank 2 r)."""
    return {_PARAMETER + name: parameter.detach() for name, parameter in run.optimizer.parameters.items()}


@torch.no_grad()
def take_parameters(run: Run, where: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts in place the parameters among what a checkpoint holds; returns the rest, the moments."""
    for name, parameter in run.optimizer.parameters.items():
        stored = tensors.pop(_PARAMETER + name, None)
        if stored is None or stored.shape != parameter.shape:
            found = "is not there" if stored is None else f"has shape {tuple(stored.shape)}"
            raise CheckpointError(f"{where}: {name} {found}; expected {tuple(parameter.shape)}: another adapter.")
        parameter.copy_(stored)
    return tensors
