"""The training loop: a function over values. One optimizer step is `train_step`; it reads on one screen.

The gradient of a step is that of the sum of its label losses over their number, so it does not depend on how the
documents are cut into micro-batches, packed or padded.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune import files
from loratune.adapter import peft_format
from loratune.adapter.attach import Attached
from loratune.data.dataset import Dataset
from loratune.data.pack import step_batches
from loratune.errors import TrainingError
from loratune.evaluate.loss import Evaluation, evaluate
from loratune.model.causal import CausalModel
from loratune.train import checkpoint, schedule
from loratune.train.config import TrainConfig
from loratune.train.measure import peak_memory_bytes
from loratune.train.optim import Optimizer
from loratune.train.signals import stop_on_signals

OnEvent = Callable[[dict[str, Any]], None]
METRICS = "metrics.jsonl"
_PARAMETER = "parameter."


@dataclass
class Run:
    """Everything a run is made of. `step` steps are done; `best` is the best evaluation so far as {step, loss}."""

    output: Path
    config: TrainConfig
    causal: CausalModel
    attached: Attached
    optimizer: Optimizer
    train: Dataset
    validation: Dataset
    identity: dict[str, Any]
    on_event: OnEvent
    num_parameters: int
    step: int = 0
    best: dict[str, Any] | None = None
    num_metrics: int = 0
    evaluations: dict[int, Evaluation] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train) / self.config.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run: the epochs', at least 1, or `max_steps` if that is fewer."""
        steps = max(1, math.ceil(self.config.epochs * self.steps_per_epoch - 1e-9))
        return min(steps, self.config.max_steps or steps)

    def learning_rate(self) -> float:
        """Returns the learning rate of the step about to be done."""
        warmup = schedule.warmup_steps(self.config, self.num_steps)
        peak = schedule.peak_rate(self.config, self.num_parameters)
        return schedule.rate(self.step, self.num_steps, warmup, peak)

    def rows_of_step(self) -> list[int]:
        """Returns the training rows of the step about to be done: a pure function of (seed, step)."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        return step_batches(len(self.train), self.config.batch_size, self.config.seed, epoch)[position].tolist()


def train_step(run: Run) -> dict[str, Any]:
    """Does one optimizer step; returns its metrics. Raises TrainingError, with no parameter changed, for a loss or a
    gradient that is not finite."""
    rows = run.rows_of_step()
    documents = [run.train.documents[row] for row in rows]
    num_labels = sum(document.num_labels for document in documents)
    loss = 0.0
    for pack in run.causal.cut(documents, run.config.micro_batch_tokens):
        batch = run.causal.batch([documents[i] for i in pack], keys=[rows[i] for i in pack])
        run.attached.shared.noise = batch.noise(run.config.seed, run.step)
        total, _ = run.causal.losses(batch)
        (total / num_labels).backward()
        loss += float(total.detach()) / num_labels
    norm = float(run.optimizer.clip())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        run.optimizer.clear()
        raise _not_finite(run, rows, loss, norm)
    learning_rate = run.learning_rate()
    run.optimizer.step(learning_rate)
    run.step += 1
    return {
        "step": run.step,
        "epoch": run.step / run.steps_per_epoch,
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "num_tokens": sum(document.num_tokens for document in documents),
        "num_label_tokens": num_labels,
    }


def _not_finite(run: Run, rows: list[int], loss: float, norm: float) -> TrainingError:
    names = ", ".join(run.train.sources[row] for row in rows[:8]) + (" ..." if len(rows) > 8 else "")
    saved = checkpoint.folders(run.output)
    return TrainingError(
        f"step {run.step + 1}: loss {loss} with gradient norm {norm} is not finite; stopped before the update. "
        f"Rows of this step: {names}. Last checkpoint: {saved[-1] if saved else 'none'}. "
        "Try a smaller learning rate, or look at these rows."
    )


def train(run: Run) -> str:
    """Trains to the end or until a signal asks to stop; returns "done" or "stopped". What was reached is saved.

    A stop waits for a step that is saved, so that a run that says it can be resumed can be: before the first
    checkpoint, that is the first step.
    """
    metrics = files.JsonLines(run.output / METRICS, keep=run.num_metrics)
    run.attached.train_mode(True)
    try:
        with stop_on_signals() as stop:
            if run.step == 0:
                _evaluate(run, metrics)
            clock, saved = _Clock(), run.step
            while run.step < run.num_steps and not (stop.requested and saved == run.step > 0):
                line = clock.timed(run)
                metrics.write({"event": "step", **line})
                run.on_event({"event": "step", "num_steps": run.num_steps, **line})
                if _is_due(run, run.config.eval_every, at_epochs=True):
                    _evaluate(run, metrics)
                    saved = save(run, metrics)
                elif stop.requested or _is_due(run, run.config.save_every, at_epochs=False):
                    saved = save(run, metrics)
    finally:
        run.attached.shared.noise = None
        run.attached.train_mode(False)
        metrics.close()
    return "done" if run.step == run.num_steps else "stopped"


def _is_due(run: Run, every: int | None, *, at_epochs: bool) -> bool:
    if run.step == run.num_steps:
        return True
    if every is not None:
        return run.step % every == 0
    return at_epochs and run.step % run.steps_per_epoch == 0


def _evaluate(run: Run, metrics: files.JsonLines) -> None:
    """Evaluates on the held-out rows, notes the result, and whether it is the best."""
    run.attached.shared.noise = None
    run.attached.train_mode(False)
    result = evaluate(run.causal, run.validation.documents, run.config.micro_batch_tokens)
    run.attached.train_mode(True)
    if not math.isfinite(result.loss):
        raise _not_finite_held_out(run, result)
    run.evaluations[run.step] = result
    if run.step > 0 and (run.best is None or result.loss < run.best["loss"]):
        run.best = {"step": run.step, "loss": result.loss}
    event = {"event": "evaluation", "step": run.step, **result.to_json()}
    metrics.write(event)
    run.on_event(event)


def _not_finite_held_out(run: Run, result: Evaluation) -> TrainingError:
    bad = [
        source
        for source, loss in zip(run.validation.sources, result.document_losses, strict=True)
        if not math.isfinite(loss)
    ]
    cause = "the weights of the base model may hold NaN" if run.step == 0 else "try a smaller learning rate"
    return TrainingError(
        f"step {run.step}: the held-out loss of {len(bad)} of {len(run.validation)} rows is not finite "
        f"(first: {bad[0]}); {cause}."
    )


def save(run: Run, metrics: files.JsonLines) -> int:
    """Writes a checkpoint of the run as it stands and removes those that need not be kept; returns its step."""
    metrics.sync()
    adapter = run.attached.adapter
    config, tensors = peft_format.encode(adapter, run.causal.model)
    state = {"step": run.step, "best": run.best, "num_metrics": metrics.count, "identity": run.identity}
    path = checkpoint.write(
        run.output,
        run.step,
        lambda folder: peft_format.write_into(folder, config, tensors, adapter.base),  # pyright: ignore
        {**_parameters(run), **run.optimizer.state()},
        state,
    )
    checkpoint.retain(run.output, run.config.keep)
    run.on_event({"event": "checkpoint", "step": run.step, "path": str(path)})
    return run.step


class _Clock:
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
    run.optimizer.load(_copy_parameters(run, saved))
    run.step, run.best = saved.state["step"], saved.state["best"]
    run.num_metrics = saved.state["num_metrics"]


def use_best(run: Run) -> None:
    """Puts the parameters of the best checkpoint into the attached adapter; without an evaluation the last stay."""
    if run.best is not None and run.best["step"] != run.step:
        _copy_parameters(run, checkpoint.read(checkpoint.step_folder(run.output, run.best["step"])))


def _parameters(run: Run) -> dict[str, Tensor]:
    """Returns what is trained, bit for bit: the adapter's own file holds what others can read (PiSSA's as rank 2 r)."""
    return {_PARAMETER + name: parameter.detach() for name, parameter in run.optimizer.parameters.items()}


@torch.no_grad()
def _copy_parameters(run: Run, saved: checkpoint.Checkpoint) -> dict[str, Tensor]:
    """Takes the parameters of a checkpoint; returns the moments that are stored with them."""
    tensors = saved.training_state()
    for name, parameter in run.optimizer.parameters.items():
        parameter.copy_(tensors.pop(_PARAMETER + name))
    return tensors
