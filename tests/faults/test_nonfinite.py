"""What is not finite never reaches a weight: loss, gradient, evaluation row, data, base model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune import api
from loratune.errors import DataError, TrainingError
from loratune.train import checkpoint, loop
from loratune.train.config import load_run_config
from loratune.train.loop import Run
from tiny_run import copy_rows, make_run, save_model, write_rows

VALUES = (math.nan, math.inf, -math.inf)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in {**loop.parameters(run), **run.optimizer.state()}.items()}


def poison(run: Run, where: str, value: float, after: int) -> None:
    """Puts a value into every training loss, or into a gradient on its way to the factors, after so many steps."""
    losses = run.causal.losses

    def poisoned(batch: Any) -> Any:
        total, each = losses(batch)
        if run.step < after or not torch.is_grad_enabled():
            return total, each
        if where == "gradient":
            total.register_hook(lambda gradient: gradient * value)
            return total, each
        return total * value, each

    run.causal.losses = poisoned


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("after", [0, 4])
def test_no_weight_or_moment_changes(tmp_path: Path, where: str, value: float, after: int) -> None:
    run = make_run(tmp_path, epochs=2, save_every=1)
    poison(run, where, value, after)
    events: list[Any] = []
    kept: dict[str, torch.Tensor] = {}
    run.on_event = lambda event: kept.update(weights(run)) if event["event"] in ("step", "evaluation") else None
    with pytest.raises(TrainingError, match=rf"step {after + 1}: loss .* stopped before the update. Rows of this step"):
        loop.train(run)
    now = weights(run)
    assert now.keys() == kept.keys() and all(torch.equal(now[name], kept[name]) for name in now)
    assert all(tensor.isfinite().all() for tensor in now.values())
    assert events == [] and run.step == after
    if after:
        assert checkpoint.newest(run.output)[0].step == after


def test_a_gradient_of_one_factor_is_enough(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    name, parameter = list(run.optimizer.parameters.items())[5]
    before = weights(run)
    parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), math.nan))
    with pytest.raises(TrainingError, match="gradient norm nan is not finite"):
        loop.train(run)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(run).items()), name


@pytest.mark.parametrize("after", [0, 3])
def test_an_evaluation_row(tmp_path: Path, after: int) -> None:
    run = make_run(tmp_path, epochs=2, eval_every=1)
    losses = run.causal.losses

    def poisoned(batch: Any) -> Any:
        total, each = losses(batch)
        return total, torch.where(batch.owners == 2, math.nan, each) if run.step == after else each

    run.causal.losses = poisoned
    source = run.validation.sources[2].replace("\\", "\\\\")
    with pytest.raises(TrainingError, match=rf"step {after}: the held-out loss of 1 of 8 rows .*first: {source}\)"):
        loop.train(run)
    assert run.step == after and (run.best is None or math.isfinite(run.best["loss"]))
    if after:
        assert checkpoint.newest(run.output)[0].step == after - 1


def start(folder: Path, rows: Path, **model: Any) -> None:
    overrides = {
        "model": str(save_model(folder / "model")), "data.train": str(rows), "output": str(folder / "run"),
    }  # fmt: skip
    api.run(load_run_config(None, overrides))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_the_data(tmp_path: Path, literal: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows(20))
    lines = rows.read_text().splitlines()
    lines[6] = f'{{"prompt": "1 2 =", "completion": {literal}}}'
    rows.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:7: "):
        start(tmp_path, rows)
    assert not (tmp_path / "run").exists()


def test_the_base_model(tmp_path: Path) -> None:
    """One weight of the base is NaN: nothing is trained, and the run says where to look."""
    run = make_run(tmp_path)
    run.causal.model.model.norm.weight.data[3] = math.nan  # type: ignore[union-attr]
    before = weights(run)
    with pytest.raises(TrainingError, match=r"step 0: the held-out loss of 8 of 8 rows .* base model may hold NaN"):
        loop.train(run)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(run).items())


def test_metrics_hold_no_value_that_is_not_finite(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    poison(run, "loss", math.nan, 2)
    with pytest.raises(TrainingError):
        loop.train(run)
    for line in (run.output / loop.METRICS).read_text().splitlines():
        assert all(math.isfinite(v) for v in json.loads(line).values() if isinstance(v, float))
