"""One optimizer step of many configurations on the same rows: one pass over the base model, an update of each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loratune.data.encode import Document
from loratune.errors import TrainingError
from loratune.evaluate.loss import Evaluation
from loratune.ladder.joint import JointModel, Server
from loratune.train import loop
from loratune.train.loop import Run


@dataclass(eq=False)
class Lane:
    """One configuration that is trained beside others. kept: its best evaluation so far.

    figures: {name, r, targets, learning_rate, parameters, steps, loss, low, high, dropped, failure, difference}: its
    best held-out loss, the step at which it was dropped, and by how much more than the best one's its loss was there.
    """

    name: str
    run: Run
    figures: dict[str, Any]
    kept: Evaluation | None = None

    @cached_property
    def server(self) -> Server:
        return Server(self.run.attached)


def step(model: JointModel, lanes: Sequence[Lane]) -> dict[str, dict[str, Any] | str]:
    """Does one optimizer step of every lane, all being at the same one; returns its metrics, or why it failed, by name.

    A lane fails, with no parameter changed, by a loss or a gradient that is not finite. Raises TrainingError as
    `loop.train_step` for a factor without a gradient, or that did not move.
    """
    lead = lanes[0].run
    rows = lead.rows_of_step()
    documents = [lead.train.documents[row] for row in rows]
    losses = loop.within_memory(lead, documents * len(lanes), lambda: _add_gradients(model, lanes, documents, rows))
    found: dict[str, dict[str, Any] | str] = {}
    for lane, loss in zip(lanes, losses, strict=True):
        lane.run.micro_batch_tokens = lead.micro_batch_tokens
        try:
            found[lane.name] = _update(lane.run, documents, loss)
        except TrainingError as error:
            raise TrainingError(f"configuration {lane.name}: {error}") from error
    return found


def _add_gradients(
    model: JointModel, lanes: Sequence[Lane], documents: Sequence[Document], rows: Sequence[int]
) -> list[float]:
    for lane in lanes:
        lane.run.optimizer.clear()  # of what a pass that ran out of memory has left
    lead, servers = lanes[0].run, [lane.server for lane in lanes]
    return model.add_gradients(servers, documents, rows, lead.micro_batch_tokens, lead.config.seed, lead.step)


def _update(run: Run, documents: Sequence[Document], loss: float) -> dict[str, Any] | str:
    """Ends a step as `loop.train_step` does, but a loss that is not finite is this lane's own matter."""
    norm = float(run.optimizer.clip())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        run.optimizer.clear()
        return f"step {run.step + 1}: loss {loss} with gradient norm {norm} is not finite"
    return loop.update(run, documents, loss, norm)
