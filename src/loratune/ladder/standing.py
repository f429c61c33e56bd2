"""Where a run stands, as a value: taken at one point of a climb, and gone back to, from another rung too."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.adapter.grow import grow
from loratune.train import loop, watch
from loratune.train.loop import Run
from loratune.train.optim import Optimizer


@dataclass(frozen=True)
class Standing:
    """All that training goes on from, copied. rung: its number; began: the step at which the run got there."""

    rung: int
    began: int
    step: int
    best: dict[str, Any] | None
    stale: int
    course: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Returns all but the tensors."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tensors"}


def take(run: Run, rung: int, began: int) -> Standing:
    """Copies where a run stands: no later step changes it."""
    tensors = {name: each.clone() for name, each in {**loop.parameters(run), **run.optimizer.state()}.items()}
    return Standing(rung, began, run.step, run.best, run.stale, asdict(run.course), tensors)


def put(run: Run, standing: Standing, config: LoraConfig) -> None:
    """Goes back to a standing, whose adapter has this configuration; ready to train on."""
    place(run, config)
    moments = loop.take_parameters(run, f"step {standing.step}", dict(standing.tensors))
    if moments:  # none before the first step
        run.optimizer.load(moments)
    run.step, run.best, run.stale = standing.step, standing.best, standing.stale
    run.course = watch.Course(**standing.course)
    run.attached.train_mode(True)


def place(run: Run, config: LoraConfig) -> None:
    """Puts a new adapter of a configuration in the place of the run's, with an optimizer of its own.

    Its sites are numbered as in a run that begins with it, so its dropout masks are the same.
    """
    if run.attached.config != config:
        model, name = run.attached.model, run.attached.name
        run.attached.detach()
        run.attached = attach(model, config, name, seed=run.config.seed)
    run.optimizer = Optimizer(run.attached.adapter, run.config)
    run.gates = watch.Gates(run.attached)


def grow_to(run: Run, config: LoraConfig, warmup: int) -> None:
    """Lets the run's adapter grow, with its moments and the steps that each block has done; ready to train on.

    What is new has a warm-up of so many steps.
    """
    state = run.optimizer.state()
    run.attached = grow(run.attached, config, seed=run.config.seed)
    place(run, config)
    run.optimizer.load(state, grown=True)
    run.optimizer.warmup = warmup
    run.attached.train_mode(True)
