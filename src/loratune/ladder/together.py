"""Many configurations trained at the same time on one copy of the base model; the losers are dropped on the way.

Every configuration sees the same rows in the same order, with the same dropout masks, as it would alone, and has an
optimizer and a schedule of its own: it ends where it would have ended alone, to rounding. At a few looks, on held-out
rows, the better half goes on (successive halving: Jamieson and Talwalkar 2016, arXiv 1502.07943).

Each configuration is a run with a directory of its own; what they have in common stands beside them in together.json.
"""

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loratune import files
from loratune.adapter.attach import Attachments
from loratune.data.dataset import Dataset
from loratune.errors import ConfigError, TrainingError
from loratune.evaluate.loss import Evaluation
from loratune.ladder.joint import JointModel
from loratune.ladder.lanes import Lane, step
from loratune.ladder.trial import difference
from loratune.train import checkpoint, identity, loop
from loratune.train.loop import OnEvent, Run
from loratune.train.measure import peak_memory_bytes
from loratune.train.rehearsal import LOOKED_AT
from loratune.train.signals import StopRequest

STATE, EACH = "together.json", "configurations"
_STATE = ("seconds", "steps", "decisions")  # of a Together, kept as they are


@dataclass(eq=False)
class Together:
    """All that is trained at the same time. lanes: what is left; cuts: step of a look -> how many may go on after it.

    test: rows that no decision sees; configurations: the figures of every one, dropped or not; steps: of all of them
    together, in `seconds`.
    """

    output: Path
    model: JointModel
    lanes: list[Lane]
    test: Dataset
    cuts: Mapping[int, int]
    on_event: OnEvent
    seconds: float = 0.0
    steps: int = 0
    decisions: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def __post_init__(self) -> None:
        self.configurations = {lane.name: lane.figures for lane in self.lanes}

    @property
    def lead(self) -> Run:
        """The run that tells which rows come next: they are the same for all."""
        return self.lanes[0].run

    @property
    def is_over(self) -> bool:
        return self.lead.step >= self.lead.num_steps

    @property
    def best(self) -> Lane:
        """The one whose held-out loss was lowest so far; before the first look, any."""
        return min(self.lanes, key=lambda lane: math.inf if lane.kept is None else lane.kept.loss)

    def train(self, stop: StopRequest) -> str:
        """Trains to the end, or until it is asked to stop; returns "done" or "stopped". What was reached is saved."""
        try:
            self._open()
            if self.lead.step == 0:
                self._evaluate_base()
            while not self.is_over and not stop.requested:
                self._train_step()
                if self.is_over or self.lead.step in self.cuts:
                    self._look()
                    self._save()
            if not self.is_over:
                self._save()
        finally:
            self._activate()
            for lane in self.lanes:
                _close(lane)
        return "done" if self.is_over else "stopped"

    def _open(self) -> None:
        for lane in self.lanes:
            lane.run.log = files.JsonLines(lane.run.output / loop.METRICS, keep=lane.run.num_metrics)

    def rehearse(self) -> None:
        """Does all of a step but the update on the two shortest of some rows; raises AdapterError for a layer that
        cannot serve each row its own adapter."""
        self._activate()
        some = sorted(self.lead.train.documents[:LOOKED_AT], key=lambda document: document.num_tokens)[:2]
        servers = [lane.server for lane in self.lanes]
        self.model.add_gradients(servers, some, range(len(some)), self.lead.micro_batch_tokens, 0, 0)
        for lane in self.lanes:
            lane.run.optimizer.clear()

    def _activate(self, lane: Lane | None = None) -> None:
        """Leaves one adapter active, or none, as where all are trained."""
        everything = Attachments.of(self.model.model)
        assert everything is not None
        everything.activate(self.model.model, () if lane is None else (lane.name,))

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        self._activate()
        for lane in self.lanes:
            lane.run.attached.train_mode(True)
        start, before = time.perf_counter(), list(self.lanes)
        found = step(self.model, before)
        seconds = time.perf_counter() - start
        self.seconds, self.steps = self.seconds + seconds, self.steps + len(before)
        for lane in before:
            line = found[lane.name]
            failure = line if isinstance(line, str) else self._note_step(lane, line, seconds / len(before))
            if failure is not None:
                self._drop(lane, failure=failure)
        shown = found[self.best.name]
        assert isinstance(shown, dict)
        speed = {"tokens_per_second": len(before) * shown["num_tokens"] / seconds, "seconds": self.seconds}
        left = {"num_steps": self.lead.num_steps, "seconds_left": self.seconds / self.steps * self._steps_left()}
        memory = {"memory_bytes": peak_memory_bytes(self.model.device)}
        self.on_event({"event": "step", **shown, "step_seconds": seconds, **speed, **memory, **left})

    def _note_step(self, lane: Lane, line: dict[str, Any], seconds: float) -> str | None:
        """Notes a step among the lane's own metrics, its seconds being its share; returns how it has failed, if so."""
        lane.figures["steps"] = lane.run.step
        timed = {"step_seconds": seconds, "tokens_per_second": line["num_tokens"] / seconds}
        lane.run.tell({"event": "step", **line, **timed, "memory_bytes": peak_memory_bytes(self.model.device)})
        try:
            remark = lane.run.course.see(lane.run.step, line["loss"])
        except TrainingError as error:
            return str(error)
        if remark is not None:
            lane.run.tell({"event": "notice", "step": lane.run.step, "message": remark})
        return None

    def _steps_left(self) -> int:
        return num_steps_of_all(self.cuts, len(self.lanes), self.lead.num_steps, self.lead.step)

    # ---- a look ------------------------------------------------------------------------------------------------------

    def _evaluate_base(self) -> None:
        self._activate()
        base = loop.measure(self.lead, self.lead.validation)
        for lane in self.lanes:
            loop.note(lane.run, base)
        self.on_event({"event": "evaluation", "step": 0, **base.to_json()})

    def measure(self, lane: Lane, rows: Dataset) -> Evaluation:
        """Evaluates one configuration alone; raises TrainingError for a loss that is not finite."""
        self._activate(lane)
        return loop.measure(lane.run, rows)

    def _look(self) -> None:
        """Evaluates what is left; the best of it, as many as the cut allows, go on."""
        for lane in list(self.lanes):
            self._evaluate(lane)
        best, now = self.best, self.lead.step
        assert best.kept is not None
        ranked = sorted(self.lanes, key=lambda lane: lane.figures["loss"])
        for lane in ranked:
            assert lane.kept is not None
            more = difference(best.kept.document_losses, lane.kept.document_losses, best.kept.document_labels)
            lane.figures["difference"] = None if lane is best else more._asdict()
        count = self.cuts.get(now, len(ranked))
        losers = [dict(lane.figures) for lane in ranked[count:]]
        self.on_event({"event": "evaluation", "step": now, **best.kept.to_json()})
        if losers:
            self._decide("halving", now, [lane.name for lane in ranked[:count]], losers)
        for lane in ranked[count:]:
            loop.save(lane.run)  # from where it can be trained to its end alone
            self._drop(lane)

    def _evaluate(self, lane: Lane) -> None:
        try:
            evaluation = self.measure(lane, lane.run.validation)
        except TrainingError as error:
            return self._drop(lane, failure=str(error))
        loop.note(lane.run, evaluation)
        if lane.kept is None or evaluation.loss < lane.kept.loss:
            lane.kept = evaluation
            lane.figures |= {name: getattr(evaluation, name) for name in ("loss", "low", "high")}

    def _decide(self, kind: str, step: int, kept: list[str], dropped: list[dict[str, Any]]) -> None:
        decision = {"kind": kind, "step": step, "kept": kept, "dropped": dropped}
        self.decisions.append(decision)
        self.on_event({"event": "decision", **decision})

    def _drop(self, lane: Lane, failure: str | None = None) -> None:
        """Takes a configuration out: its memory is free again, its directory stays."""
        lane.figures |= {"dropped": lane.run.step, "failure": failure}
        self.lanes.remove(lane)
        if not self.lanes:
            raise TrainingError(f"every configuration has failed; the last, {lane.name}: {failure}. Try lower rates.")
        if failure is not None:
            self._decide("failed", self.lead.step, [each.name for each in self.lanes], [dict(lane.figures)])
        _close(lane)
        lane.run.attached.detach()

    # ---- saved and taken up again ------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Saves every lane, then what they have in common: a run that dies between goes on from the save before."""
        for lane in self.lanes:
            loop.save(lane.run, keep=max(2, lane.run.config.keep))
        self.write_state(self.output)

    def write_state(self, folder: Path) -> None:
        """Writes together.json, which names the step that all lanes were saved at."""
        state = {"step": self.lead.step, **{name: getattr(self, name) for name in _STATE}}
        kept = {lane.name: lane.kept and asdict(lane.kept) for lane in self.lanes}
        figures = list(self.configurations.values())  # in their order, on which the cut of a step depends
        files.write_json(folder / STATE, {**state, "cuts": list(self.cuts.items()), "all": figures, "lanes": kept})

    def restore(self) -> None:
        """Goes back to the last save; raises CheckpointError for one that is damaged or of something else."""
        state = json.loads((self.output / STATE).read_bytes())
        self.cuts = dict(state["cuts"])
        if state["step"] == 0:
            return
        for name in _STATE:
            setattr(self, name, state[name])
        self.configurations = {each["name"]: each for each in state["all"]}
        for lane in list(self.lanes):
            lane.figures = self.configurations[lane.name]
            if lane.name not in state["lanes"]:
                self.lanes.remove(lane)
                lane.run.attached.detach()
                continue
            saved = checkpoint.read(checkpoint.step_folder(lane.run.output, state["step"]))
            identity.check(saved, lane.run.identity)
            loop.restore(lane.run, saved)
            kept = state["lanes"][lane.name]
            lane.kept = kept and Evaluation(**kept)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Puts the best parameters of what is left in place; returns the record: figures, decisions, the final test."""
        for lane in self.lanes:
            loop.use_best(lane.run)
        self._activate()
        base = loop.measure(self.lead, self.test)
        tested = {lane.name: self.measure(lane, self.test) for lane in self.lanes}
        self._activate()
        for lane in self.lanes:
            lane.run.attached.train_mode(False)
        final = tested[self.best.name]
        gained = difference(base.document_losses, final.document_losses, final.document_labels)
        return {
            "kind": "together",
            "configurations": list(self.configurations.values()),
            "chosen": self.best.name,
            "survivors": [lane.name for lane in self.lanes],
            "decisions": self.decisions,
            "test": {"base": base.to_json(), "final": final.to_json(), "difference": gained._asdict()},
            "tested": {name: each.to_json() for name, each in tested.items()},
            "validation_rows": len(self.lead.validation),
            "test_rows": len(self.test),
            "num_steps": self.lead.num_steps,
            "steps": self.steps,
            "seconds": self.seconds,
            "memory_bytes": peak_memory_bytes(self.model.device),
        }


def _close(lane: Lane) -> None:
    lane.run.attached.shared.noise = None
    lane.run.attached.train_mode(False)
    if lane.run.log is not None:
        with suppress(OSError):  # what a checkpoint needs of it was flushed before the checkpoint was written
            lane.run.log.close()
        lane.run.log = None


def plan_cuts(num: int, finalists: int, num_steps: int) -> dict[int, int]:
    """Returns step -> how many go on: each look leaves the better half, down to so many that train to the end.

    The last look is in the middle of the run, the one before at a quarter, and so on: a configuration that goes on is
    trained for twice as long before the next one. Raises ConfigError for too few steps.
    """
    counts: list[int] = []
    while num > finalists:
        num = max(finalists, math.ceil(num / 2))
        counts.append(num)
    if num_steps < 2 ** len(counts):
        raise ConfigError(
            f"{num_steps} steps are too few for {len(counts)} looks: expected {2 ** len(counts)} or more. Train longer "
            "(--epochs), or let more train to the end (--finalists)."
        )
    return {num_steps // 2 ** (len(counts) - index): count for index, count in enumerate(counts)}


def num_steps_of_all(cuts: Mapping[int, int], num: int, num_steps: int, step: int = 0) -> int:
    """Returns the optimizer steps that so many configurations do together from a step on."""
    total = 0
    for look, count in [*sorted(cuts.items()), (num_steps, 0)]:
        if look > step:
            total, step, num = total + num * (look - step), look, min(num, count)
    return total


def num_looked_at(cuts: Mapping[int, int], num: int) -> int:
    """Returns how many evaluations of half the held-out rows so many configurations take: at each look those that are
    left, at the end the finalists and their tests, and the base model on either half."""
    left = [num, *(count for _, count in sorted(cuts.items()))]
    return sum(left) + left[-1] + 2
