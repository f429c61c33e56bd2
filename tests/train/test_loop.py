"""The training loop: one step's gradient, what a run writes, and when it stops by itself."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loratune.data.pack import epoch_order
from loratune.errors import TrainingError
from loratune.train import checkpoint, loop, schedule
from loratune.train.loop import Run
from oracles import randomise, worst
from tiny_run import lines_of, make_run

ONE_STEP: dict[str, Any] = {"batch_size": 24, "epochs": 1.0, "adam_beta1": 0.0, "max_grad_norm": 1e9}


def gradient_of_a_step(run: Run) -> dict[str, Tensor]:
    """With beta1 = 0 the first moment after one step is the gradient itself."""
    run.attached.train_mode(True)
    loop.train_step(run)
    moments = run.optimizer.state()
    return {name: moments[f"exp_avg.{name}"] for name in run.optimizer.parameters}


def run64(folder: Path, *, dropout: float, packs: bool = True, **settings: Any) -> Run:
    """24 documents a step in float64, with an adapter that has learnt something: B is not zero."""
    adapter = {"lora_dropout": dropout, "target_modules": ("q_proj", "v_proj", "down_proj", "lm_head")}
    run = make_run(folder, adapter=adapter, dtype=torch.float64, packs=packs, **(ONE_STEP | settings))
    randomise((p for _, p in run.attached.adapter.named_parameters()), std=0.1)
    return run


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradient_does_not_depend_on_the_micro_batches(tmp_path: Path, packs: bool, dropout: float) -> None:
    """One document at a time, a few, all at once; packed or one document a row; dropout masks go with documents."""
    expected = gradient_of_a_step(run64(tmp_path, dropout=dropout, micro_batch_tokens=1))
    for max_tokens in (1, 17, 40, 100_000):
        run = run64(tmp_path, dropout=dropout, packs=packs, micro_batch_tokens=max_tokens)
        assert worst(gradient_of_a_step(run), expected) < 1e-12, max_tokens
    if dropout:
        undropped = gradient_of_a_step(run64(tmp_path, dropout=0.0))
        assert worst(undropped, expected) > 1e-2


def test_the_gradient_is_that_of_a_loop_over_the_documents(tmp_path: Path) -> None:
    """The mean over all label tokens of -log p(label), from the model's own logits and torch's cross entropy."""
    found = gradient_of_a_step(run64(tmp_path, dropout=0.0))
    run = run64(tmp_path, dropout=0.0)
    run.causal.close()
    total = torch.zeros((), dtype=torch.float64)
    for document in run.train.documents:
        ids = torch.from_numpy(document.input_ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(document.trained), ids, -100)
        logits = run.causal.model(input_ids=ids[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
    (total / run.train.num_labels).backward()
    expected = {name: p.grad for name, p in run.optimizer.parameters.items() if p.grad is not None}
    assert worst(found, expected) < 1e-12


@pytest.mark.parametrize(("rows", "batch_size"), [(20, 8), (9, 3), (5, 8), (7, 1)])
def test_an_epoch_meets_every_row_once(tmp_path: Path, rows: int, batch_size: int) -> None:
    run = make_run(tmp_path, rows=rows, batch_size=batch_size, epochs=3, seed=5)
    for epoch in range(3):
        met: list[int] = []
        for position in range(run.steps_per_epoch):
            run.step = epoch * run.steps_per_epoch + position
            met += run.rows_of_step()
        assert met == epoch_order(rows, 5, epoch).tolist() and sorted(met) == list(range(rows))
    assert run.step + 1 == run.num_steps


def test_training_lowers_the_loss_a_lot(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=160, epochs=2, learning_rate=0.02)
    assert loop.train(run) == "done"
    before, *_, after = lines_of(run.output / loop.METRICS, "evaluation")
    assert before["loss"] > 5.5  # ln 385: the random model knows nothing
    assert after["loss"] < 2.8  # about ln 10: a digit, and when to stop


def test_metrics_hold_each_step_once_with_its_learning_rate(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=20, epochs=2, batch_size=8, learning_rate=0.01, warmup_steps=2)
    loop.train(run)
    steps = lines_of(run.output / loop.METRICS, "step")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate"] for line in steps] == [schedule.rate(step, 6, 2, 0.01) for step in range(6)]
    assert [line["epoch"] for line in steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    lengths = np.array(run.train.lengths)
    rows = [epoch_order(20, 0, epoch) for epoch in (0, 1)]
    tokens = [int(lengths[order[start : start + 8]].sum()) for order in rows for start in (0, 8, 16)]
    assert [line["num_tokens"] for line in steps] == tokens  # the last step of an epoch has 4 rows
    evaluated = lines_of(run.output / loop.METRICS, "evaluation")
    assert [line["step"] for line in evaluated] == [0, 3, 6]
    assert all(line["low"] <= line["loss"] <= line["high"] for line in evaluated)


def test_the_first_loss_is_that_of_the_base_model(tmp_path: Path) -> None:
    """B is zero at the start, so the adapter with its dropout changes nothing yet."""
    run = make_run(tmp_path, adapter={"lora_dropout": 0.5}, **ONE_STEP)
    run.attached.train_mode(True)
    loss = loop.train_step(run)["loss"]
    with run.attached.disabled(), torch.no_grad():
        batch = run.causal.batch(run.train.documents, range(24))
        assert loss == pytest.approx(float(run.causal.losses(batch)[0]) / run.train.num_labels, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"epochs": 1.0}, 3),  # 20 rows in steps of 8, 8 and 4
        ({"epochs": 1.5}, 5),  # half an epoch more is a step and a half: rounded up
        ({"epochs": 0.01}, 1),
        ({"epochs": 3.0, "max_steps": 4}, 4),
        ({"epochs": 1.0, "max_steps": 99}, 3),
    ],
)
def test_the_number_of_steps(tmp_path: Path, settings: dict[str, Any], steps: int) -> None:
    run = make_run(tmp_path, rows=20, **settings)
    assert run.num_steps == steps
    loop.train(run)
    assert run.step == steps == lines_of(run.output / loop.METRICS, "step")[-1]["step"]
    assert [folder.name for folder in checkpoint.folders(run.output)][-1] == f"step-{steps:06d}"


def test_the_best_checkpoint_is_kept_and_used(tmp_path: Path) -> None:
    """Eight rows learnt by heart: the held-out loss rises again, and what remains are the factors of its lowest."""
    run = make_run(tmp_path, rows=8, epochs=80, learning_rate=0.03, eval_every=5, keep=1)
    loop.train(run)
    evaluated = lines_of(run.output / loop.METRICS, "evaluation")[1:]
    best = min(evaluated, key=lambda line: line["loss"])
    assert run.best == {"step": best["step"], "loss": best["loss"]}
    assert best["step"] != run.num_steps, "the run must get worse for this test"
    assert [folder.name for folder in checkpoint.folders(run.output)] == [
        f"step-{best['step']:06d}", f"step-{run.num_steps:06d}",
    ]  # fmt: skip
    loop.use_best(run)
    found = loop.evaluate(run.causal, run.validation.documents, run.config.micro_batch_tokens)
    assert found.loss == best["loss"]


def test_a_run_that_learnt_nothing_says_so(tmp_path: Path) -> None:
    """The untuned model is made out to be better than it is."""
    run = make_run(tmp_path, rows=8, epochs=2, learning_rate=0.05)
    run.course.start = lambda before, batch_size: None  # pyright: ignore
    run.course.untuned = 1.0
    loop.train(run)
    notices = lines_of(run.output / loop.METRICS, "notice")
    assert all(isinstance(each["message"], str) for each in notices)  # and none where there is nothing to say
    message = notices[-1]["message"]
    assert message.startswith("nothing was learnt: the best held-out loss") and "the untuned model's 1.0000" in message


def test_a_run_that_gets_no_better_is_ended_with_patience(tmp_path: Path) -> None:
    """It ends where it says, keeps what it had at its best, and stays ended when it is taken up again."""
    settings: dict[str, Any] = {"rows": 8, "epochs": 80, "learning_rate": 0.03, "eval_every": 5, "keep": 1}
    run = make_run(tmp_path, patience=3, **settings)
    assert loop.train(run) == "done"
    evaluated = lines_of(run.output / loop.METRICS, "evaluation")[1:]
    best = min(evaluated, key=lambda line: line["loss"])
    assert evaluated[-4] == best and evaluated[-1]["step"] == run.step == best["step"] + 15 < run.num_steps
    assert lines_of(run.output / loop.METRICS, "notice")[-1]["message"] == (
        "stopped early: the held-out loss has not fallen for 3 evaluations"
    )
    again = make_run(tmp_path, patience=3, **settings)
    loop.restore(again, checkpoint.newest(run.output)[0])
    assert loop.train(again) == "done" and again.step == run.step
    loop.use_best(again)
    assert loop.evaluate(again.causal, again.validation.documents, 2048).loss == best["loss"]


@pytest.mark.parametrize(("keep", "kept"), [(1, [6]), (3, [3, 4, 5, 6]), (10, [1, 2, 3, 4, 5, 6])])
def test_as_many_checkpoints_stay_as_asked_for(tmp_path: Path, keep: int, kept: list[int]) -> None:
    """Evaluated after steps 3 and 6: step 3 is the best so far of 4 and 5, which may be fallen back to."""
    run = make_run(tmp_path, epochs=2, save_every=1, keep=keep, learning_rate=1e-3)
    loop.train(run)
    steps = [int(folder.name.removeprefix("step-")) for folder in checkpoint.folders(run.output)]
    assert run.best is not None and run.best["step"] == 6
    assert steps == kept


def poison(run: Run, row: int, where: str) -> None:
    """Makes one row's loss, or one parameter's gradient, NaN from step 3 on."""
    losses = run.causal.losses

    def poisoned(batch: Any) -> Any:
        total, each = losses(batch)
        if run.step < 2 or row not in {span.document for span in batch.spans}:
            return total, each
        if where == "loss":
            return total * math.nan, each
        total.register_hook(lambda gradient: gradient * math.inf)
        return total, each

    run.causal.losses = poisoned


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_update(tmp_path: Path, where: str) -> None:
    run = make_run(tmp_path, epochs=2, save_every=1, batch_size=8, micro_batch_tokens=16)
    rows = epoch_order(24, 0, 0)[16:24].tolist()
    poison(run, rows[5], where)
    with pytest.raises(TrainingError) as caught:
        loop.train(run)
    message = str(caught.value)
    assert "step 3: loss" in message and "stopped before the update" in message
    assert all(run.train.sources[row] in message for row in rows)
    assert str(tmp_path / "run" / "checkpoints" / "step-000002") in message
    assert run.step == 2 and [line["step"] for line in lines_of(run.output / loop.METRICS, "step")] == [1, 2]
    saved, _ = checkpoint.newest(run.output)
    now = {name: p.detach().clone() for name, p in run.optimizer.parameters.items()}
    state = run.optimizer.state()
    loop.restore(run, saved)
    assert all(torch.equal(p, now[name]) for name, p in run.optimizer.parameters.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in run.optimizer.state().items())
    assert all(p.grad is None for p in run.optimizer.parameters.values())


def test_a_held_out_loss_that_is_not_finite_stops_the_run_and_names_the_row(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    losses = run.causal.losses

    def poisoned(batch: Any) -> Any:
        total, each = losses(batch)
        return total, torch.where(batch.owners == 1, math.nan, each) if not torch.is_grad_enabled() else each

    run.causal.losses = poisoned
    with pytest.raises(TrainingError, match=r"step 0: the held-out loss of 1 of 8 rows is not finite \(first: .*:\d\)"):
        loop.train(run)
