"""Memory that runs out halves the micro-batch and repeats the step; a disk that is full leaves what was saved."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune import files
from loratune.errors import ConfigError, TrainingError
from loratune.train import checkpoint, loop, rehearsal
from loratune.train.loop import Run
from loratune.train.measure import checkpoint_bytes, is_out_of_memory
from loratune.train.rehearsal import rehearse
from oracles import worst
from tiny_run import lines_of, make_run

ERRORS: dict[str, Callable[[], BaseException]] = {
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes"),
    "python": lambda: MemoryError("unable to allocate"),
}


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def limit(run: Run, max_positions: int, error: Callable[[], BaseException], *, backward: bool = False) -> list[int]:
    """A machine that holds so many positions at a time; returns what was asked of it."""
    losses, asked = run.causal.losses, list[int]()

    def fail(_: Any) -> None:
        raise error()

    def limited(batch: Any) -> Any:
        asked.append(batch.num_positions)
        if batch.num_positions <= max_positions:
            return losses(batch)
        if not backward or not torch.is_grad_enabled():
            raise error()
        total, each = losses(batch)
        total.register_hook(fail)
        return total, each

    run.causal.losses = limited
    return asked


def make(folder: Path, **settings: Any) -> Run:
    adapter = {"lora_dropout": 0.3}
    return make_run(folder, adapter=adapter, dtype=torch.float64, epochs=1, max_grad_norm=1e9, **settings)


def tensors(run: Run) -> dict[str, Tensor]:
    return {**loop.parameters(run), **run.optimizer.state()}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_step_is_repeated_in_smaller_parts_with_the_same_result(tmp_path: Path, kind: str, backward: bool) -> None:
    """In float64 the adapter and its moments differ by rounding only: the same rows, the same dropout masks."""
    whole, short = make(tmp_path / "whole", learning_rate=1e-3), make(tmp_path / "short", learning_rate=1e-3)
    loop.train(whole)
    limit(short, 40, ERRORS[kind], backward=backward)
    events: list[dict[str, Any]] = []
    short.on_event = events.append
    assert loop.train(short) == "done"
    assert worst(tensors(short), tensors(whole)) < 1e-9
    assert short.micro_batch_tokens < 80
    told = lines_of(short.output / loop.METRICS, "memory")
    assert told and [event for event in events if event["event"] == "memory"] == told
    assert told[-1]["micro_batch_tokens"] == short.micro_batch_tokens and told[0]["was"] == 2048
    assert told[0]["reason"] in str(ERRORS[kind]())
    steps = lines_of(short.output / loop.METRICS, "step")
    assert [line["step"] for line in steps] == list(range(1, short.num_steps + 1))


def test_what_a_step_had_added_up_before_is_forgotten(tmp_path: Path) -> None:
    """The first of a step's micro-batches fits, a later one does not: its gradient must not count twice."""
    whole, short = (make(tmp_path / name, learning_rate=1e-3, micro_batch_tokens=48) for name in ("whole", "short"))
    loop.train(whole)
    losses, failed = short.causal.losses, list[int]()

    def second_fails(batch: Any) -> Any:
        if short.step == 1 and torch.is_grad_enabled() and not failed and any_gradient(short):
            failed.append(batch.num_positions)
            raise ERRORS["device"]()
        return losses(batch)

    short.causal.losses = second_fails
    loop.train(short)
    assert failed and worst(tensors(short), tensors(whole)) < 1e-9


def any_gradient(run: Run) -> bool:
    return any(p.grad is not None for p in run.optimizer.parameters.values())


def test_the_smaller_size_is_kept_and_resumed_with(tmp_path: Path) -> None:
    run = make(tmp_path)
    limit(run, 40, ERRORS["device"])
    loop.train(run)
    told = lines_of(run.output / loop.METRICS, "memory")
    assert len(told) < 8  # not once a step
    saved, _ = checkpoint.newest(run.output)
    again = make(tmp_path)
    loop.restore(again, saved)
    assert again.micro_batch_tokens == run.micro_batch_tokens == told[-1]["micro_batch_tokens"]


def test_rows_too_long_for_the_memory_stop_the_run_and_keep_the_checkpoint(tmp_path: Path) -> None:
    run = make(tmp_path, save_every=1)
    limited = False

    def on_event(event: dict[str, Any]) -> None:
        nonlocal limited
        if event["event"] == "checkpoint" and not limited:
            limited = True
            limit(run, 3, ERRORS["device"])

    run.on_event = on_event
    with pytest.raises(TrainingError, match=r"step 2: memory ran out on single rows \(the longest has \d+ tokens\).*"):
        loop.train(run)
    assert run.step == 1 == checkpoint.newest(run.output)[0].step
    assert all(p.grad is None for p in run.optimizer.parameters.values())


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    run = make(tmp_path)
    asked = limit(run, 0, lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        loop.train(run)
    assert len(asked) == 1


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with so little memory free that the largest micro-batch has to be tried."""
    monkeypatch.setattr(rehearsal, "memory_bytes", lambda: (1, 2))


@pytest.mark.usefixtures("scarce")
def test_the_longest_rows_run_before_the_first_step(tmp_path: Path) -> None:
    """800 steps of 2 rows: one micro-batch of the two longest is less than 1 % of the run."""
    run = make(tmp_path, rows=1600, batch_size=2)
    positions = sorted(document.num_tokens - 1 for document in run.train.documents)[-2:]
    asked = limit(run, 10_000, ERRORS["device"])
    rehearse(run)
    assert asked[-1] == sum(positions)
    asked = limit(run, sum(positions) - 1, ERRORS["device"])
    rehearse(run)
    assert run.micro_batch_tokens <= sum(positions) and run.step == 0
    with pytest.raises(TrainingError, match="step 1: memory ran out on single rows"):
        limit(run, max(positions) - 1, ERRORS["device"])
        rehearse(run)


def test_what_cannot_run_out_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the inputs and outputs of all linear layers in float32 is where trying begins."""
    run = make_run(tmp_path, rows=1600, batch_size=2)
    linears = [each for each in run.causal.model.model.modules() if isinstance(each, torch.nn.Linear)]
    floats = sum(each.in_features + each.out_features for each in linears)
    assert len(linears) == 7 * run.causal.model.config.num_hidden_layers
    tokens = sum(sorted(document.num_tokens for document in run.train.documents)[-2:])
    tried = {}
    for free in (8 * 4 * floats * tokens, 8 * 4 * floats * tokens + 1):
        monkeypatch.setattr(rehearsal, "memory_bytes", lambda free=free: (free, free))
        asked = limit(run, 10_000, ERRORS["device"])
        rehearse(run)
        tried[free] = len(asked)
    assert list(tried.values()) == [3, 2]
    run.causal.blocks = None  # the layers' own code keeps what it likes
    asked = limit(run, 10_000, ERRORS["device"])
    rehearse(run)
    assert len(asked) == 3


@pytest.mark.usefixtures("scarce")
def test_the_probe_has_the_dropout_of_training(tmp_path: Path) -> None:
    """Masks take memory too; afterwards nothing is left of it."""
    run = make(tmp_path, rows=1600, batch_size=2)
    losses, noises = run.causal.losses, list[Any]()

    def looked_at(batch: Any) -> Any:
        training = any(module.training for module in run.causal.model.modules())
        noises.append(run.attached.shared.noise if training else None)
        return losses(batch)

    run.causal.losses = looked_at
    rehearse(run)
    assert [noise is not None for noise in noises] == [False, False, True]
    assert run.attached.shared.noise is None and all(p.grad is None for p in run.optimizer.parameters.values())


@pytest.mark.usefixtures("scarce")
def test_a_short_run_is_not_made_longer_by_a_probe(tmp_path: Path) -> None:
    run = make(tmp_path, rows=24, micro_batch_tokens=2048)
    asked = limit(run, 10_000, ERRORS["device"])
    rehearse(run)
    assert len(asked) == 2  # what reaches the loss, and whether the loss is the model's own


def test_a_checkpoint_is_about_as_large_as_was_estimated(tmp_path: Path) -> None:
    for adapter in ({"r": 64}, {"r": 16, "init_lora_weights": "pissa"}):
        run = make_run(tmp_path / str(adapter["r"]), adapter=adapter, max_steps=1)
        loop.train(run)
        (folder,) = checkpoint.folders(run.output)
        written = sum(path.stat().st_size for path in folder.iterdir())
        assert written <= checkpoint_bytes(run.attached.adapter) <= written + (1 << 20)


def test_space_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    needed = 4 * checkpoint_bytes(run.attached.adapter)
    monkeypatch.setattr(files, "free_bytes", lambda path: needed - 1)
    with pytest.raises(ConfigError, match=r"too full for the checkpoints: 5 MB are free, 5 MB are needed"):
        rehearse(run)
    assert not run.output.exists()
    monkeypatch.setattr(files, "free_bytes", lambda path: needed)
    rehearse(run)


def fill_at_save(run: Run, monkeypatch: pytest.MonkeyPatch, number: int, error: Exception | None) -> None:
    """From the save of that number on the disk is full: seen beforehand, or as the error of a write."""
    saves = 0
    write = checkpoint.write

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves == number - 1 and error is None:
            monkeypatch.setattr(files, "free_bytes", lambda path: 100)
        if saves == number and error is not None:
            raise error
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", counted)


@pytest.mark.parametrize("error", [None, OSError(errno.ENOSPC, "No space left on device")], ids=["seen", "met"])
def test_a_save_that_fails_says_so_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    run = make_run(tmp_path, save_every=1)
    fill_at_save(run, monkeypatch, 3, error)
    with pytest.raises(TrainingError) as caught:
        loop.train(run)
    message = str(caught.value)
    assert message.startswith("step 3 could not be saved: ") and f"--resume {run.output}" in message
    assert "step-000002" in message and ("No space left" in message or "too full" in message)
    assert checkpoint.newest(run.output)[0].step == 2
