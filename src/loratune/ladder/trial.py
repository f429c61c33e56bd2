"""A paired trial: arms that start from one state, train the same steps on the same rows, and are judged row by row."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.evaluate.interval import Interval, bootstrap_ratio
from loratune.evaluate.loss import Evaluation
from loratune.ladder.standing import Standing
from loratune.train import loop
from loratune.train.loop import Run


@dataclass(frozen=True)
class Arm:
    """One side of a trial. lines: the metrics of its steps; in place of evaluation and standing, a failure's reason."""

    rung: int
    name: str
    parameters: int
    lines: Sequence[dict[str, Any]]
    evaluation: Evaluation | None = None
    standing: Standing | None = None
    failure: str | None = None

    @property
    def step_seconds(self) -> float:
        """The median time of a step."""
        return statistics.median([line["step_seconds"] for line in self.lines] or [0.0])

    @property
    def memory_bytes(self) -> int:
        """The peak of the process so far."""
        return max([line["memory_bytes"] for line in self.lines] or [0])


def train_arm(run: Run, name: str, num_steps: int, is_asked_to_stop: Callable[[], bool]) -> list[dict[str, Any]] | None:
    """Does the steps of an arm and returns their metrics; None where it was asked to stop. Raises as a step does."""
    clock = loop.Clock()
    lines: list[dict[str, Any]] = []
    for _ in range(num_steps):
        if is_asked_to_stop():
            return None
        lines.append(clock.timed(run))
        run.tell({"event": "arm", "rung": name, **lines[-1]}, num_steps=run.num_steps)
        loop.judge(run, lines[-1])
    return lines


def difference(lower: Sequence[float], upper: Sequence[float], labels: Sequence[int]) -> Interval:
    """Returns how much lower (below 0) the upper arm's loss per label token is, with its 95% interval over rows."""
    return bootstrap_ratio([b - a for a, b in zip(lower, upper, strict=True)], labels)


def judged(lower: Arm, arm: Arm, price: Mapping[str, float]) -> dict[str, Any]:
    """Returns an arm's figures and whether it pays: its loss is lower by more than chance, and by its price. If not, it
    may pay where a gain above its price is within the interval."""
    figures: dict[str, Any] = {
        "rung": arm.name,
        "parameters": arm.parameters,
        "step_seconds": arm.step_seconds,
        "memory_bytes": arm.memory_bytes,
        "seconds": sum(line["step_seconds"] for line in arm.lines),
        "pays": False,
    }
    if arm.evaluation is None:
        return {**figures, "failure": arm.failure}
    figures |= arm.evaluation.to_json()
    if arm is lower:
        return figures
    assert lower.evaluation is not None
    gained = difference(
        lower.evaluation.document_losses, arm.evaluation.document_losses, arm.evaluation.document_labels
    )
    costs = priced(lower, arm, price)
    pays = gained.high < 0 and -gained.value >= costs
    may_pay = not pays and -gained.low > costs
    return {**figures, "difference": gained._asdict(), "price": costs, "pays": pays, "may_pay": may_pay}


def priced(lower: Arm, arm: Arm, price: Mapping[str, float]) -> float:
    """Returns what an arm must gain for what it costs more than the lower one, in nats per label token."""
    more = {
        "doubling": math.log2(arm.parameters / lower.parameters),
        "second": arm.step_seconds - lower.step_seconds,
        "gb": (arm.memory_bytes - lower.memory_bytes) / 1e9,
    }
    return sum((each * max(0.0, more[name]) for name, each in price.items()), 0.0)
