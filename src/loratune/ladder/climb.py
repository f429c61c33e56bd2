"""The climb: a run whose adapter grows, rung by rung, where a paired trial on held-out rows shows that it pays.

At a look, arms start from one and the same state and train the same few steps on the same rows: one stays on its rung,
the other grows. If the larger one's held-out loss is lower, by more than chance and by its price, training goes on
from there; else one rung further is tried; else the run ends on the rung it is on, and its learning rate falls, unless
chance leaves open which is better and there are arms left to look again later. The steps of the arm that wins are steps
of the run. At the next look a climb must still pay, or it is taken back.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loratune import files
from loratune.adapter.summary import coverage
from loratune.data.dataset import Dataset
from loratune.errors import CheckpointError, ConfigError, TrainingError
from loratune.ladder import plan, standing
from loratune.ladder.plan import Lengths, Rung
from loratune.ladder.standing import Standing
from loratune.ladder.trial import Arm, difference, judged, train_arm
from loratune.model import heads
from loratune.train import checkpoint, loop, schedule, watch
from loratune.train.config import LadderConfig
from loratune.train.loop import Run
from loratune.train.signals import StopRequest

_KEPT = "kept."
_STATE = ("rung", "began", "settled", "look", "again", "first", "overhead_steps", "overhead_seconds")
# What the events of steps are called that a step back has made undone.
_ABANDONED = {"step": "abandoned_step", "evaluation": "abandoned_evaluation"}


@dataclass(frozen=True)
class Kept:
    """The arm that a climb has left behind, kept until it is confirmed. losses: of the validation rows; num_metrics:
    the lines of metrics.jsonl before the trial."""

    standing: Standing
    losses: Sequence[float]
    num_metrics: int


@dataclass
class Climb:
    """The guide of a run that climbs. rung: the one it stands on; began: the step at which it got there.

    settled: the step from which the rate falls, None while it may climb on. look: the step of the next look, None
    after the last; again: whether a look was taken again, with the arm that a step back would cost. test: the rows that
    no decision sees; first: what the first rung scored on them after its trial. overhead: what was trained and is not
    on the path of the run.
    """

    rungs: tuple[Rung, ...]
    lengths: Lengths
    price: Mapping[str, float]
    test: Dataset
    rung: int = 0
    began: int = 0
    settled: int | None = None
    look: int | None = None
    again: bool = False
    first: dict[str, Any] | None = None
    overhead_steps: int = 0
    overhead_seconds: float = 0.0
    kept: Kept | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.look = self.lengths.rung

    # ---- what the loop asks ------------------------------------------------------------------------------------------

    def learning_rate(self, run: Run) -> float:
        """Rises in the run's warm-up, and stays at its peak until the rung is known to be the last.

        What a climb adds has a warm-up of its own: see `Optimizer.warmup`.
        """
        warmup, peak = (
            schedule.warmup_steps(run.config, run.num_steps),
            schedule.peak_rate(run.config, run.num_parameters),
        )
        return schedule.rate(run.step, run.num_steps, warmup, peak, self.settled)

    def is_due(self, run: Run) -> bool:
        return run.step == self.look

    def turn(self, run: Run, stop: StopRequest) -> None:
        """Confirms the last climb or takes it back; then tries the next rung, if there is one."""
        kept, self.kept = self.kept, None
        if kept is not None and not self._is_confirmed(run, kept):
            self._step_back(run, kept)
        elif self.settled is None:
            self._trial(run, stop)
        else:
            self.look = None

    def state(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in _STATE}
        if self.kept is None:
            return {**state, "kept": None}
        kept = {"standing": self.kept.standing.to_json(), "losses": list(self.kept.losses)}
        return {**state, "kept": {**kept, "num_metrics": self.kept.num_metrics}}

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.kept is None else {_KEPT + name: each for name, each in self.kept.standing.tensors.items()}

    def restore(self, run: Run, state: dict[str, Any] | None, tensors: dict[str, Tensor]) -> None:
        if state is None:
            raise CheckpointError(f"{run.output}: the checkpoint is of a run without a ladder. Resume it without one.")
        for name in _STATE:
            setattr(self, name, state[name])
        own = {name.removeprefix(_KEPT): tensors.pop(name) for name in list(tensors) if name.startswith(_KEPT)}
        kept = state["kept"]
        self.kept = kept and Kept(Standing(**kept["standing"], tensors=own), kept["losses"], kept["num_metrics"])
        standing.place(run, self.rungs[self.rung].config)

    # ---- a trial -----------------------------------------------------------------------------------------------------

    def _trial(self, run: Run, stop: StopRequest) -> None:
        assert run.log is not None
        start, num_metrics = standing.take(run, self.rung, self.began), run.log.count
        arms: list[Arm] = []
        verdicts: list[dict[str, Any]] = []
        left = len(self.rungs) - self.overhead_steps // self.lengths.trial  # arms that may lose: see `plan.lengths`
        for rung in range(start.rung, min(start.rung + min(left, 2) + 1, len(self.rungs))):
            arm = self._arm(run, rung, start, stop)
            if arm is None:
                return self._go_to(run, start)
            arms.append(arm)
            verdicts.append(judged(arms[0], arm, self.price))
            if verdicts[-1]["pays"]:
                break
        left -= len(arms) - 1
        winner = arms[-1] if verdicts[-1]["pays"] else arms[0]
        climbed, next_look = winner is not arms[0], start.step + self.lengths.rung
        is_open = not climbed and left > 0 and any(each.get("may_pay") for each in verdicts)
        decision = {
            "step": start.step,
            "steps": self.lengths.trial,
            "rung": arms[0].name,
            "to": winner.name,
            "arms": verdicts,
            **({"again": next_look} if is_open else {}),
        }
        kind = "climb" if climbed else "open" if is_open else "stay"
        run.tell({"event": "decision", "kind": kind, **decision})
        if winner is not arms[-1]:
            assert winner.standing is not None
            self._go_to(run, winner.standing)
        self.again = self.again or is_open
        goes_on = is_open or (climbed and left > 0 and winner.rung < len(self.rungs) - 1)
        self.settled = None if goes_on else run.step
        self.look = next_look if is_open or climbed else None
        self._go_on(run, winner, start)
        if climbed and not self.again:
            assert arms[0].evaluation is not None and arms[0].standing is not None
            self.kept = Kept(arms[0].standing, arms[0].evaluation.document_losses, num_metrics)
        for arm in arms:
            if arm is not winner:
                self._count(arm.lines, 1)
        loop.save(run)

    def _arm(self, run: Run, rung: int, start: Standing, stop: StopRequest) -> Arm | None:
        """Trains one arm from the common start; None if it was asked to stop. A larger arm may fail: it is refused."""
        self._go_to(run, start)
        if rung > start.rung:
            standing.grow_to(run, self.rungs[rung].config, self.lengths.warmup)
            self.rung, self.began = rung, start.step
        known = rung, self.rungs[rung].name, run.attached.adapter.num_parameters()
        try:
            lines = train_arm(run, known[1], self.lengths.trial, lambda: stop.requested)
            if lines is None:
                return None
            evaluation = loop.measure(run, run.validation)
        except TrainingError as error:
            if rung == start.rung:
                raise
            return Arm(*known, [], failure=str(error))
        if rung == 0:
            self.first = {"step": run.step, **loop.measure(run, self.test).to_json()}
        return Arm(*known, lines, evaluation, standing.take(run, rung, self.began))

    def _count(self, lines: Sequence[dict[str, Any]], sign: int) -> None:
        self.overhead_steps += sign * len(lines)
        self.overhead_seconds += sign * sum(line["step_seconds"] for line in lines)

    def _go_to(self, run: Run, where: Standing) -> None:
        standing.put(run, where, self.rungs[where.rung].config)
        self.rung, self.began = where.rung, where.began

    def _go_on(self, run: Run, winner: Arm, start: Standing) -> None:
        """Makes the steps of the winner those of the run."""
        assert run.log is not None and winner.evaluation is not None
        if winner.rung > start.rung:
            run.best, run.stale = None, 0  # of another adapter
            run.tell(self._rung_event(run, start.step))
        for line in winner.lines:
            run.log.write({"event": "step", **line})
        loop.note(run, winner.evaluation)

    def _rung_event(self, run: Run, step: int) -> dict[str, Any]:
        rung = self.rungs[self.rung]
        parameters = run.attached.adapter.num_parameters()
        return {"event": "rung", "step": step, "rung": rung.name, "r": rung.config.r, "parameters": parameters}

    # ---- the look after a climb --------------------------------------------------------------------------------------

    def _is_confirmed(self, run: Run, kept: Kept) -> bool:
        now = loop.measure(run, run.validation)
        gained = difference(kept.losses, now.document_losses, now.document_labels)
        names = {"rung": self.rungs[self.rung].name, "to": self.rungs[kept.standing.rung].name}
        kind = "confirmed" if gained.high < 0 else "back"
        steps = run.step - kept.standing.step
        run.tell({"event": "decision", "kind": kind, "step": run.step, "steps": steps, **names,
                  "difference": gained._asdict(), **now.to_json()})  # fmt: skip
        return kind == "confirmed"

    def _step_back(self, run: Run, kept: Kept) -> None:
        """Goes back to the arm that was left behind; what was done since is no part of the run any more."""
        self._go_to(run, kept.standing)
        self.settled, self.look = run.step, None
        run.best, run.stale = None, 0
        run.evaluations = {step: each for step, each in run.evaluations.items() if step < run.step}
        self._rewrite_metrics(run, kept.num_metrics)
        loop.note(run, loop.measure(run, run.validation))
        later = [path for path in checkpoint.folders(run.output) if int(path.name.removeprefix("step-")) > run.step]
        loop.save(run, keep=run.config.keep + len(later))
        for path in later:  # last: a run that dies before this steps back again
            files.remove_directory(path)

    def _rewrite_metrics(self, run: Run, num_metrics: int) -> None:
        """Renames the events of the steps that are undone, and adds those of the arm that the run goes back to."""
        assert run.log is not None
        path, rung = run.output / loop.METRICS, self._rung_event(run, self.began)
        run.log.close()
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        undone = [{**line, "event": _ABANDONED.get(line["event"], line["event"])} for line in lines[num_metrics:]]
        arm = [line for line in lines[num_metrics:] if line["event"] == "arm" and line["rung"] == rung["rung"]]
        steps = [{**{name: value for name, value in line.items() if name != "rung"}, "event": "step"} for line in arm]
        self._count([line for line in undone if line["event"] == "abandoned_step"], 1)
        self._count(steps, -1)  # counted when the other arm won
        kept = [*lines[:num_metrics], *undone, rung, *steps]
        files.atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        run.log = files.JsonLines(path, keep=len(kept))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def tested(self, run: Run) -> dict[str, Any]:
        """Returns the losses on the test rows: of the base model, of the first rung where it was left, and of the
        adapter as it is, with the paired difference to the base."""
        final = loop.measure(run, self.test)
        with run.attached.disabled():
            base = loop.measure(run, self.test)
        run.attached.train_mode(False)
        gained = difference(base.document_losses, final.document_losses, final.document_labels)
        first = self.first if self.rung else None
        return {
            "base": base.to_json(), "first": first, "final": final.to_json(), "difference": gained._asdict(),
        }  # fmt: skip


def begin(run: Run, config: LadderConfig) -> Climb:
    """Makes a run climb: checks every rung on its model, sets rows apart for the final test, and settles all lengths.

    Raises ConfigError, DataError or TrainingError, with nothing written: rungs that do not grow, too few rows or steps,
    a layer of the top rung that does not reach the loss.
    """
    if run.config.patience is not None:
        raise ConfigError(
            "patience ends a run where its loss stands still, where a ladder tries the next rung: drop it."
        )
    with run.attached.disabled():
        rungs = plan.rungs_of(run.attached.model, run.attached.config, config.rungs)
    cost = plan.row_cost(run.validation, run.train, run.config.batch_size)
    validation, test = plan.split_held_out(run.validation, plan.most_rows(run.num_steps, len(rungs), cost))
    warmup = schedule.warmup_steps(run.config, run.num_steps)
    lengths = plan.lengths(run.num_steps, len(rungs), cost * max(len(validation), len(test)), warmup)
    run.validation = validation
    run.guide = climb = Climb(rungs, lengths, {str(name): each for name, each in config.price.items()}, test)
    _check_top(run, rungs)
    message = (
        f"ladder {', '.join(rung.name for rung in rungs)}: a look every {lengths.rung} steps, with trials of "
        f"{lengths.trial} steps; {len(validation)} held-out rows decide, {len(test)} others test the result"
    )
    run.on_event({"event": "notice", "message": message})
    return climb


def _check_top(run: Run, rungs: Sequence[Rung]) -> None:
    """Proves now, not after hours, that every layer of the top rung reaches the loss; leaves the first attached."""
    first = standing.take(run, 0, 0)
    standing.place(run, rungs[-1].config)
    heads.begin(run.attached.model, run.attached.adapter.saved, run.config.seed)  # a head of zeros lets nothing through
    uneven = coverage(run.attached.model, run.attached.adapter).uneven
    if uneven and not run.config.allow_uneven and not run.attached.config.layers_to_transform:
        raise ConfigError(
            f"rung {rungs[-1].name} adapts {', '.join(uneven)} in some layers only:\n{run.attached.summary()}\n"
            "If that is meant, set allow_uneven: true (--allow-uneven)."
        )
    longest = max(run.rows_of_step(), key=lambda row: run.train.lengths[row])
    documents = [run.train.documents[longest]]
    loop.within_memory(run, documents, lambda: watch.check_reached(run.causal, run.attached, documents))
    standing.put(run, first, rungs[0].config)
    run.attached.train_mode(False)
