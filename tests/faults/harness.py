"""What the fault tests share: a toy run made once, and forked children in which something happens to it.

A child begins with everything imported and the run made, so that a case takes a fraction of a second. In its process
the functions of `os` that change files are replaced by ones that count, and end the process or fail at a given call.
"""

import errno
import json
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from loratune.adapter import peft_format
from loratune.errors import CheckpointError, TrainingError
from loratune.train import checkpoint, loop
from loratune.train.loop import Run
from tiny_run import lines_of, make_run, tree

FULL = os.environ.get("LORATUNE_FAULTS") == "full"
DONE, STOPPED, REFUSED, UNEXPECTED, CRASHED = 0, 75, 3, 1, 9  # how a child ends
_TIMES = {"seconds", "step_seconds", "tokens_per_second", "seconds_left", "memory_bytes"}
_CALLS = ("open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "chmod")
_TAKES_SPACE = {"open", "write", "fsync", "rename", "replace", "mkdir", "save_file"}


class Point(NamedTuple):
    """A moment of a run: before, amid or after a file operation, by the operation's number."""

    number: int
    when: str


def toy_run(folder: Path, **settings: Any) -> Run:
    """Six steps, each saved: two epochs, two to three packed micro-batches a step, dropout, an evaluation an epoch."""
    torch.set_num_threads(1)
    settings = {
        "epochs": 2, "batch_size": 8, "micro_batch_tokens": 48, "learning_rate": 0.01, "save_every": 1, **settings
    }  # fmt: skip
    return make_run(folder, adapter={"lora_dropout": 0.1, "r": 2, "target_modules": ["q_proj", "v_proj"]}, **settings)


def finish(run: Run) -> int:
    """Trains to the end and writes the adapter that is kept, as `loratune train` does."""
    if loop.train(run) == "stopped":
        return STOPPED
    loop.use_best(run)
    with loop.saying_what_is_saved(run):
        peft_format.write(run.attached.adapter, run.causal.model, run.output / "adapter", replace=True)
    return DONE


def go_on(run: Run) -> int:
    """What a person does after a crash: takes the run up where it stands, or begins again where nothing is saved."""
    if checkpoint.folders(run.output):
        loop.restore(run, checkpoint.newest(run.output)[0])
    return finish(run)


def result_of(output: Path) -> dict[str, Any]:
    """What must be the same: every byte of the adapter and the last checkpoint, and the metrics without the times."""
    lines = [{name: value for name, value in line.items() if name not in _TIMES} for line in metrics(output)]
    return {"adapter": tree(output / "adapter"), "last": tree(checkpoint.folders(output)[-1]), "metrics": lines}


def metrics(output: Path) -> list[dict[str, Any]]:
    return lines_of(output / loop.METRICS)


@dataclass
class Child:
    """A forked process at work on a run in `output`; `saved` is the step it last said was saved."""

    pid: int
    _shared: mmap.mmap

    def wait(self) -> int:
        """Returns its exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def saved(self) -> int:
        return int.from_bytes(self._shared[:4], "little")


def start(
    run: Run, output: Path, work: Callable[[Run], int] = go_on, before: Callable[[], None] | None = None
) -> Child:
    """Forks a child that works on a run in `output`; `before` prepares the process."""
    shared = mmap.mmap(-1, 4)

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            shared[:4] = event["step"].to_bytes(4, "little")

    pid = os.fork()
    if pid:
        return Child(pid, shared)
    run.output, run.on_event, code = output, note, UNEXPECTED
    try:
        if before is not None:
            before()
        code = work(run)
    except (TrainingError, CheckpointError) as error:
        said = str(error)
        told = "could not be saved" in said or "cannot be removed" in said
        code = REFUSED if told and ("--resume" in said) == bool(checkpoint.folders(output)) else UNEXPECTED
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


Action = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], str, str], Any]


class Calls:
    """Replaces the file operations of this process; at a point an action is done. `names` lists what was called."""

    def __init__(self, point: Point | None = None, action: Action | None = None) -> None:
        self.names: list[str] = []
        self._point, self._action, self._lasting = point, action, False

    def install(self) -> None:
        for name in _CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        checkpoint.save_file = self._counted("save_file", checkpoint.save_file)

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            number = len(self.names)
            self.names.append(name)
            if self._action is not None and self._point is not None and self._point.number == number:
                return self._action(call, args, kwargs, name, self._point.when)
            return call(*args, **kwargs)

        return counted


def _half(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    """Does the first half of a write."""
    if name == "write":
        call(args[0], args[1][: len(args[1]) // 2])
    else:
        call(*args, **kwargs)
        os.truncate(args[1], os.stat(args[1]).st_size // 2)


def crash(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, when: str) -> Any:
    """Ends the process, as SIGKILL does, before, amid or after a call."""
    try:
        if when == "amid":
            _half(call, args, kwargs, name)
        elif when == "after":
            call(*args, **kwargs)
    finally:  # a folder that exists already is no error to the caller
        os._exit(CRASHED)


def full(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, when: str) -> Any:
    """The disk is full at this call; amid a write, after its first half."""
    if when == "amid":
        _half(call, args, kwargs, name)
    if name == "save_file":  # safetensors writes without Python: this is how it says so
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))


def full_from_now_on(call: Callable[..., Any], args: Any, kwargs: Any, name: str, when: str) -> Any:
    """From this call on nothing that needs space can be done; removing can."""

    def fail_again(other: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*more: Any, **named: Any) -> Any:
            reading = other == "open" and not more[1] & os.O_CREAT
            return function(*more, **named) if reading else full(function, more, named, other, "before")

        return failing

    originals = {other: getattr(os, other) for other in _CALLS}
    for other in _TAKES_SPACE & originals.keys():
        setattr(os, other, fail_again(other, originals[other]))
    checkpoint.save_file = fail_again("save_file", checkpoint.save_file)
    return full(call, args, kwargs, name, when) if name in _TAKES_SPACE else call(*args, **kwargs)


def calls_of(run: Run, output: Path) -> list[str]:
    """The file operations of a run that nothing happens to, in their order."""
    calls, listing = Calls(), output.with_suffix(".calls")

    def work(run: Run) -> int:
        code = go_on(run)
        listing.write_text(json.dumps(calls.names))
        return code

    assert start(run, output, work, calls.install).wait() == DONE
    return json.loads(listing.read_text())


def points(names: list[str], whens: tuple[str, ...]) -> list[Point]:
    """Every moment of the operations named; the middle of those that write content."""
    return [
        Point(number, when)
        for number, name in enumerate(names)
        for when in whens
        if when != "amid" or name in ("write", "save_file")
    ]


def complete(output: Path, whole: dict[int, dict[str, bytes | None]]) -> int:
    """The newest step whose folder is, byte for byte, what an undisturbed run wrote; 0 for none. `whole`: step -> that.

    It does not ask the code under test.
    """
    root = output / checkpoint.FOLDER
    found = [step for step, files in whole.items() if tree(checkpoint.step_folder(output, step)) == files]
    return max(found, default=0) if root.is_dir() else 0


def newest_step(output: Path) -> int:
    """The step that a resumed run would go on from; 0 if it says that there is none."""
    try:
        return checkpoint.newest(output)[0].step
    except CheckpointError as error:
        assert "no complete checkpoint" in str(error)
        return 0


def kill(child: Child, number: signal.Signals) -> None:
    os.kill(child.pid, number)


_FIGURES = os.environ.get("LORATUNE_FAULTS_FIGURES")


def figure(name: str, passed: int, total: int, broken: object = "") -> None:
    """Notes a figure for docs/reliability.md, and fails unless all have passed."""
    if _FIGURES:
        with open(_FIGURES, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "passed": passed, "total": total}) + "\n")
    assert passed == total > 0, f"{name}: {passed} of {total} {broken}"
