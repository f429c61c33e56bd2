"""A run's curves for TensorBoard: its metrics.jsonl as an event file, once or as it grows."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loratune import files
from loratune.errors import ConfigError
from loratune.report.run_files import METRICS, RUN_FILE, RunFiles

FOLDER = "tensorboard"
INSTALL = "pip install 'loratune[tensorboard]'"
_POLL_SECONDS = 5.0
_OF_A_STEP = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_bytes")
_OF_AN_EVALUATION = ("loss", "perplexity")


def export(run: Path, *, follow: bool = False, wait: Callable[[float], None] = time.sleep) -> Path:
    """Writes RUN/tensorboard anew: train/* by step, held_out/* by evaluation (loss, perplexity, a task's figures).

    With `follow` it goes on with what is added until the run has ended. Raises ConfigError for a directory that is no
    run, or without TensorBoard.
    """
    RunFiles.open(run)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"writing for TensorBoard needs its library: {INSTALL}.") from error
    folder = run / FOLDER
    files.remove_directory(folder)
    began = (run / RUN_FILE).stat().st_mtime
    with SummaryWriter(str(folder)) as writer:
        for event in _events(run, follow, lambda: (writer.flush(), wait(_POLL_SECONDS))):
            for name, value in scalars(event):
                writer.add_scalar(name, value, event["step"], walltime=began + event.get("seconds", 0.0))
    return folder


def _events(run: Path, follow: bool, pause: Callable[[], object]) -> Iterator[dict[str, Any]]:
    """Yields the whole lines of metrics.jsonl, and, with `follow`, those that are added before the run ends.

    A run that is resumed is cut back to its checkpoint and repeats its steps with the same values.
    """
    path, seen = run / METRICS, 0
    while True:
        has_ended = RunFiles(run).has_ended  # looked at first: what it wrote before is there
        data = path.read_bytes() if path.is_file() else b""
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        yield from map(json.loads, lines[seen:])
        seen = len(lines)
        if has_ended or not follow:
            return
        pause()


def scalars(event: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the names and finite values that an event of a run has for TensorBoard."""
    if event["event"] == "step":
        found = {f"train/{name}": event.get(name) for name in _OF_A_STEP}
    elif event["event"] == "evaluation":
        figures = {name: figure["value"] for name, figure in event.get("figures", {}).items()}
        found = {f"held_out/{name}": event.get(name) for name in _OF_AN_EVALUATION}
        found |= {f"held_out/{name}": value for name, value in figures.items()}
    else:
        return
    yield from ((name, value) for name, value in found.items() if value is not None and math.isfinite(value))
