"""Renders chat templates in a process of its own, so that a hostile or endless template costs one row, not the run.

A template is a program from elsewhere. It runs in jinja2's immutable sandbox (no attribute that leads to Python, no
change to its arguments), in a process with 1 GiB of address space and no right to open a file, which the kernel ends
after CPU_SECONDS of processor time in one rendering. The next row gets a new process.
"""

import json
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from loratune.errors import DataError

CPU_SECONDS = 0.7  # of one rendering; a long conversation takes a few milliseconds
_WALL_SECONDS = 30.0  # without an answer, where the system has no clock of processor time
_MAX_STOPS = 3  # after so many rows that had to be stopped, a template is not run again
_GROUP_ROWS, _GROUP_BYTES = 256, 2**22  # what is sent before the answers are read
_PIPE_BYTES = 2**16  # what a pipe holds: with less, a reader among busy threads waits for its turn at every few rows

Job = tuple[int, bool, bool]  # the first so many messages, with the generation prompt, with the tools


@dataclass(frozen=True)
class Template:
    """A template's text, the variables it gets besides the messages, the time `strftime_now` tells, and its name."""

    source: str
    variables: dict[str, Any]
    now: datetime
    name: str


@dataclass(frozen=True)
class Request:
    """One row's renderings."""

    messages: Sequence[dict[str, Any]]
    tools: list[Any] | None
    jobs: list[Job]


@dataclass(eq=False)
class Sandbox:
    """A rendering process, started at its first use and after each stop; closed with this object."""

    _process: "subprocess.Popen[bytes] | None" = None
    _stops: Counter[str] = field(default_factory=Counter[str])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def render(self, template: Template, requests: Sequence[Request]) -> list[list[str] | DataError]:
        """Returns each request's renderings in the order of its jobs, or why the template gave none."""
        results: list[list[str] | DataError] = []
        with self._lock:
            while len(results) < len(requests):
                if self._stops[template.source] >= _MAX_STOPS:
                    error = DataError(
                        f"the {template.name} was stopped on {_MAX_STOPS} rows before; it is not run again."
                    )
                    return results + [error] * (len(requests) - len(results))
                results += self._exchange(template, _group(requests, len(results)))
        return results

    def _exchange(self, template: Template, lines: list[bytes]) -> list[list[str] | DataError]:
        """Returns the answers, up to and with the row at which the process ended."""
        process, self._process = self._running(), None  # an interrupted exchange leaves half an answer: not used again
        assert process.stdin is not None and process.stdout is not None
        results: list[list[str] | DataError] = []
        watchdog = threading.Timer(_WALL_SECONDS + len(lines), process.kill)
        watchdog.start()
        try:
            process.stdin.write(b"".join([_head(template, len(lines)), *lines]))
            process.stdin.flush()
            while len(results) < len(lines) and (answer := process.stdout.readline()).endswith(b"\n"):
                results.append(_texts(json.loads(answer), template))
        except BrokenPipeError:
            pass  # it ended: told below
        finally:
            watchdog.cancel()
        if len(results) < len(lines):
            return [*results, self._stopped(template, process)]
        self._process = process
        return results

    def _running(self) -> "subprocess.Popen[bytes]":
        # Not alive, too, is what a forked child finds: the process is its parent's, and so are the pipes.
        if self._process is None or self._process.poll() is not None:
            worker = Path(__file__).with_name("sandbox_worker.py")
            # -P: the folder of the script is no place to import from. A session of its own: Ctrl-C is for the run.
            process = subprocess.Popen(
                [sys.executable, "-P", str(worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=_PIPE_BYTES,
                start_new_session=True,
            )
            weakref.finalize(self, _close, process)
            self._process = process
        return self._process

    def _stopped(self, template: Template, process: "subprocess.Popen[bytes]") -> DataError:
        _close(process)
        self._stops[template.source] += 1
        return DataError(
            f"the {template.name} was stopped: it ran longer than {CPU_SECONDS} s or ended its process (exit status "
            f"{process.returncode}). Use the template that the model was published with."
        )


@cache
def shared() -> Sandbox:
    """Returns the one sandbox of this Python process."""
    return Sandbox()


def _close(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):  # what was still to be sent, to a process that ended
            pipe.close()
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _group(requests: Sequence[Request], start: int) -> list[bytes]:
    lines: list[bytes] = []
    size = 0
    for request in requests[start : start + _GROUP_ROWS]:
        if size > _GROUP_BYTES:
            break
        value = {"messages": request.messages, "tools": request.tools, "jobs": request.jobs}
        lines.append(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        size += len(lines[-1])
    return lines


def _head(template: Template, num_rows: int) -> bytes:
    head = {
        "template": template.source,
        "variables": template.variables,
        "now": template.now.isoformat(),
        "cpu_seconds": CPU_SECONDS,
        "rows": num_rows,
    }
    return json.dumps(head).encode() + b"\n"


def _texts(answer: Any, template: Template) -> list[str] | DataError:
    if isinstance(answer, dict):
        return DataError(f"the {template.name} refuses the messages: {answer['error']}.")
    return [answer[0][:item] if isinstance(item, int) else item for item in answer]
