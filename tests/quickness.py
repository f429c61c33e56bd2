"""How long a command takes, in a way that means the same on a slow machine as on a fast one."""

import os
import subprocess
import sys

# What any command with our libraries pays: on the machine of the promises this takes 0.12 s.
REFERENCE = "import typer, rich.console, rich.table, rich.panel, rich.markdown"
REFERENCE_SECONDS = 0.12


def processor_seconds(code: str) -> float:
    """Returns the processor time of Python code in a process of its own, the best of five."""
    used: list[float] = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        after = os.times()
        used.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(used)


def is_quick(code: str, seconds: float) -> bool:
    """Whether code takes no more processor time than promised; on a slower machine, or a busy one whose cores slow each
    other down, in proportion, with a third for chance (two runs of one code have differed by a fifth)."""
    allowed = max(seconds, processor_seconds(REFERENCE) / REFERENCE_SECONDS * seconds * 4 / 3)
    return processor_seconds(code) < allowed
