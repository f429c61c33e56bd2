"""A run has one writer, whatever the writer's end; what was cut from its log is said; the end is written whole."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune import api, files, outputs
from loratune.errors import ConfigError, TrainingError
from loratune.train import loop
from loratune.train.config import load_run_config
from loratune.train.optim import Optimizer
from tiny_run import copy_rows, lines_of, make_run, save_model, write_rows

_HOLD = """
import sys, time
from pathlib import Path
from loratune import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def settings(folder: Path) -> dict[str, Any]:
    return {
        "model": str(save_model(folder / "model")), "output": str(folder / "run"),
        "data.train": str(write_rows(folder / "train.jsonl", copy_rows(24))),
        "data.validation": str(write_rows(folder / "held.jsonl", copy_rows(8, seed=1))),
        "train.batch_size": 8, "train.epochs": 1.0, "train.save_every": 1,
    }  # fmt: skip


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run of three steps, stopped after the second."""

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert api.run(load_run_config(None, settings(tmp_path)), stop).status == "stopped"
    return tmp_path / "run"


@pytest.fixture
def other(stopped: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that writes the run."""
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(stopped)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_run_that_is_written_is_not_resumed_by_another(stopped: Path, other: "subprocess.Popen[str]") -> None:
    with pytest.raises(ConfigError, match=f"{stopped} is in use: another process"):
        api.resume(stopped)
    other.kill()  # no time to clean up
    other.wait()
    assert api.resume(stopped).status == "done"


def test_two_runs_do_not_begin_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second finds the folder free when it starts, and taken when it is about to write."""
    monkeypatch.setattr(api, "check_output", lambda output: None)
    resolved = load_run_config(None, settings(tmp_path))
    assert api.run(resolved).status == "done"
    with pytest.raises(ConfigError, match="exists already"):
        api.run(resolved)


def test_lines_cut_from_the_log_are_named(stopped: Path) -> None:
    log = stopped / loop.METRICS
    whole = lines_of(log)
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:2])[:-5])
    told: list[str] = []
    api.resume(stopped, lambda event: told.append(event.get("message", "")))
    assert f"{loop.METRICS} was cut: 1 of {len(whole)} lines up to here are left" in told
    assert [line["step"] for line in lines_of(log) if line["event"] == "step"] == [3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_end_is_written_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    write = outputs.write_adapter

    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), number)
        write(*args)

    monkeypatch.setattr(outputs, "write_adapter", interrupted)
    before = signal.getsignal(number)
    assert api.run(load_run_config(None, settings(tmp_path))).status == "done"
    assert {each.name for each in (tmp_path / "run").iterdir()} >= {"adapter", "report.html", "samples.jsonl"}
    assert signal.getsignal(number) is before


def test_memory_that_runs_out_in_the_update_says_what_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, rows=16, batch_size=8, save_every=1)
    update, calls = Optimizer.step, 0

    def out_of_memory(self: Optimizer, rate: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        update(self, rate)

    monkeypatch.setattr(Optimizer, "step", out_of_memory)
    with pytest.raises(TrainingError, match=r"step 2: memory ran out in the update .*step-000001\. Free memory"):
        loop.train(run)


def test_the_lock_is_free_again_and_leaves_nothing(tmp_path: Path) -> None:
    with files.locked(tmp_path):
        with pytest.raises(ConfigError, match="in use"), files.locked(tmp_path):
            pass
        assert (tmp_path / files.LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_of_many_that_lock_again_and_again_one_holds_at_a_time(tmp_path: Path) -> None:
    """Also where the one before has just removed the file that the next has opened."""
    folder, inside = tmp_path / "run", tmp_path / "inside"
    folder.mkdir()
    stop = threading.Event()

    def hold() -> int:
        held = 0
        while not stop.is_set():
            with suppress(ConfigError), files.locked(folder):
                inside.mkdir()  # FileExistsError where two hold it
                inside.rmdir()
                held += 1
        return held

    with ThreadPoolExecutor(4) as pool:
        holders = [pool.submit(hold) for _ in range(4)]
        stop.wait(0.5)
        stop.set()
    assert sum(holder.result() for holder in holders) > 50
