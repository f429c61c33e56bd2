"""A run ended at any moment goes on to the bytes of one that was not: at every file operation, and at random times."""

import os
import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from faults import harness
from faults.harness import CRASHED, DONE, FULL, STOPPED, Point, newest_step, result_of, start, toy_run
from loratune.train import checkpoint
from loratune.train.loop import Run
from tiny_run import tree

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
WHENS = ("before", "amid", "after")


class Toy:
    """The run, its undisturbed result, every checkpoint of it, its file operations, and how long it takes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, toy_run(folder)
        began = time.monotonic()
        assert start(self.run, folder / "whole").wait() == DONE
        self.seconds = time.monotonic() - began
        self.result = result_of(folder / "whole")
        self.calls = harness.calls_of(self.run, folder / "counted")
        assert result_of(folder / "counted") == self.result
        self.saves = self._every_checkpoint()

    def _every_checkpoint(self) -> dict[int, dict[str, bytes | None]]:
        run = toy_run(self.folder, keep=10)
        assert start(run, self.folder / "all").wait() == DONE
        folders = checkpoint.folders(self.folder / "all")
        assert [folder.name for folder in folders] == [f"step-00000{step}" for step in range(1, 7)]
        return {step: tree(folder) for step, folder in enumerate(folders, 1)}

    def ends_the_same(self, output: Path) -> bool:
        """Takes up what is left in `output`, in a new process, and compares the end."""
        return start(self.run, output).wait() == DONE and result_of(output) == self.result

    def is_safe(self, output: Path, saved: int) -> bool:
        """Whether the newest complete checkpoint would be loaded, and none that was said to be saved is lost."""
        newest = newest_step(output)
        return newest == harness.complete(output, self.saves) >= saved


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


def sample(points: list[Point], size: int) -> list[Point]:
    """All of them in the full form, else so many, the same ones each time."""
    return points if FULL else sorted(random.Random(0).sample(points, size))


def failing(toy: Toy, points: Iterable[Point], action: harness.Action, ends: set[int]) -> list[tuple[Any, ...]]:
    """Does something at each point in a child of its own; returns the points where the promise was not kept."""
    broken: list[tuple[Any, ...]] = []
    for point in points:
        output = toy.folder / f"{action.__name__}-{point.number}-{point.when}"
        child = start(toy.run, output, before=harness.Calls(point, action).install)
        code = child.wait()
        if not (code in ends and toy.is_safe(output, child.saved) and toy.ends_the_same(output)):
            broken.append((point, toy.calls[point.number], code))
    return broken


def test_a_process_ended_at_any_file_operation(toy: Toy) -> None:
    everything = harness.points(toy.calls, WHENS)
    assert len(everything) > 800 and toy.calls.count("save_file") == 6
    chosen = sample(everything, 16)
    broken = failing(toy, chosen, harness.crash, {CRASHED})
    harness.figure("crash points", len(chosen) - len(broken), len(chosen), broken)


def test_a_process_ended_again_while_it_is_taken_up(toy: Toy) -> None:
    """Ended at one operation, and the run that is resumed at another; the third goes through."""
    chosen = sample(harness.points(toy.calls, ("before",)), 6)[:: 1 if not FULL else 10]
    good = 0
    for point in chosen:
        output = toy.folder / f"twice-{point.number}"
        for again in (point, Point(point.number // 2, "after")):
            start(toy.run, output, before=harness.Calls(again, harness.crash).install).wait()
        good += toy.is_safe(output, 0) and toy.ends_the_same(output)
    harness.figure("crash points, twice in one run", good, len(chosen))


@pytest.mark.parametrize(
    ("action", "name"), [(harness.full, "at one operation"), (harness.full_from_now_on, "from an operation on")]
)
def test_a_disk_full_at_any_file_operation(toy: Toy, action: harness.Action, name: str) -> None:
    """The run stops and says what is saved, or does not need what failed; what was saved before is whole."""
    chosen = sample(harness.points(toy.calls, ("before", "amid")), 8)
    broken = failing(toy, chosen, action, {harness.REFUSED, DONE})
    harness.figure(f"disk full {name}", len(chosen) - len(broken), len(chosen), broken)


def limit_at(save: int, num_bytes: int) -> None:
    """From that save on no file may grow beyond a size, which the system says by EFBIG."""
    import resource

    write, count = checkpoint.write, 0

    def limited(*args: Any, **kwargs: Any) -> Path:
        nonlocal count
        count += 1
        if count == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        return write(*args, **kwargs)

    checkpoint.write = limited


def test_a_limit_on_the_size_of_files(toy: Toy) -> None:
    """Swept over every save: the limit stands in for a disk that fills up amid any write of any file."""
    largest = max(len(content or b"") for content in toy.saves[6].values())
    step = 256 if FULL else largest // 4
    cases = [(save, size) for save in range(1, 7) for size in range(0, largest, step)]
    good = 0
    for save, size in cases if FULL else cases[::4]:
        output = toy.folder / f"limit-{save}-{size}"
        child = start(toy.run, output, before=lambda save=save, size=size: limit_at(save, size))
        assert child.wait() == harness.REFUSED
        whole = child.saved == save - 1 and toy.is_safe(output, save - 1)
        good += whole and toy.ends_the_same(output)
    harness.figure("size limits", good, len(cases if FULL else cases[::4]))


def test_sigkill_at_random_times(toy: Toy) -> None:
    """Each run is killed again and again until it has come to its end."""
    generator, trials, good, kills = random.Random(0), 200 if FULL else 20, 0, 0
    for trial in range(trials):
        output, code = toy.folder / f"killed-{trial}", None
        while code != DONE:
            child = start(toy.run, output)
            time.sleep(generator.uniform(0, 0.6 * toy.seconds))  # a busy machine may be faster than it was measured
            harness.kill(child, signal.SIGKILL)
            code = child.wait()
            assert code in (DONE, -signal.SIGKILL)
            kills += code != DONE
        good += result_of(output) == toy.result
    assert kills >= trials // 4
    harness.figure(f"runs killed at random times ({kills} kills)", good, trials)


def steps_of(output: Path) -> list[int]:
    return [line["step"] for line in harness.metrics(output) if line["event"] == "step"]


def test_sigterm_at_random_times(toy: Toy) -> None:
    """The step that is under way is finished and saved: nothing is lost."""
    generator, trials, good, stopped = random.Random(1), 50 if FULL else 6, 0, 0
    for trial in range(trials):
        output = toy.folder / f"asked-{trial}"
        child = start(toy.run, output, work=_training_only)
        while not (output / "metrics.jsonl").exists():  # signals are caught from then on
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.7 * toy.seconds))
        harness.kill(child, signal.SIGTERM)
        code = child.wait()
        assert code in (STOPPED, DONE) or newest_step(output) == 6  # over, and signals are no longer caught
        stopped += code == STOPPED
        good += newest_step(output) == steps_of(output)[-1] == child.saved and toy.ends_the_same(output)
    assert stopped
    harness.figure("SIGTERM: saved within the step", good, trials)


def _training_only(run: Run) -> int:
    from loratune.train import loop

    return DONE if loop.train(run) == "done" else STOPPED


def test_a_process_that_is_held_and_let_go(toy: Toy) -> None:
    generator, trials, good = random.Random(2), 20 if FULL else 3, 0
    for trial in range(trials):
        output = toy.folder / f"held-{trial}"
        child = start(toy.run, output)
        for _ in range(3):
            time.sleep(generator.uniform(0, toy.seconds / 4))
            harness.kill(child, signal.SIGSTOP)
            time.sleep(0.03)
            harness.kill(child, signal.SIGCONT)
        good += child.wait() == DONE and result_of(output) == toy.result
    harness.figure("SIGSTOP, then SIGCONT", good, trials)


def test_what_is_saved_is_on_disk_before_it_counts(toy: Toy) -> None:
    """Power loss cannot be tried here; the order that survives it is asserted for a save of the run.

    Every file is flushed, then the folder, then it gets its name, and then the folder that holds the name is flushed.
    """
    end = [number for number, name in enumerate(toy.calls) if name == "save_file"][2]
    save = toy.calls[end : toy.calls.index("rename", end) + 3]
    assert save[:3] == ["save_file", "open", "fsync"]  # of optimizer.safetensors, before the manifest
    assert save.count("replace") == 2  # state.json, MANIFEST.json
    last_replace = len(save) - 1 - save[::-1].index("replace")
    assert save[last_replace:] == ["replace", *["open", "fsync"], *["chmod", "open", "fsync"] * 5, "open", "fsync",
                                   "rename", "open", "fsync"]  # fmt: skip
