"""The only code that opens a path for writing: whole files or nothing, on disk before they count.

A file or directory appears under its name complete or not at all: it is written beside its target,
flushed to disk (fsync), renamed, and the directory that holds it is flushed too.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from loratune.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_LEFTOVER = re.compile(r"\..+\.(tmp|old|removed)")  # the names that writers here use before and after the real one
_BLOCK_BYTES = 1 << 20


def safe_name(name: str, what: str) -> str:
    """Returns `name` if it can be a file name everywhere: letters, digits, '.', '_', '-', at most 64.

    Raises ConfigError for path parts, leading dots and anything else.
    """
    if not SAFE_NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name!r} cannot be used as a name: expected 1 to 64 letters, digits, '.', '_' or '-', "
            "not starting with '.' or '-'."
        )
    return name


def digest(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hexadecimal."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def sync_directory(path: Path) -> None:
    """Flushes a directory's entries to disk, so that a rename in it survives a power loss."""
    if os.name == "nt":  # Windows cannot open a directory; its rename is already durable enough
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flushes a file that somebody else (safetensors, tokenizers) wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: temporary file beside it, fsync, rename, fsync of the directory."""
    data = content.encode() if isinstance(content, str) else content
    make_directory(path.parent)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        try:
            _write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # the system may take less than it is given
        rest = rest[os.write(descriptor, rest) :]


def open_new(path: Path) -> BinaryIO:
    """Opens a file that must not exist yet, for content too large to hold; a staged directory flushes and names it."""
    return path.open("xb")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted keys and a final newline; NaN and infinity are refused."""
    atomic_write(path, json_text(value))


def json_text(value: Any) -> str:
    """Returns what `write_json` writes: the same bytes for the same value."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def make_directory(path: Path) -> None:
    """Creates a directory and its parents, on disk; a path that cannot be created is a ConfigError."""
    try:
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in missing:
            sync_directory(each.parent)
    except OSError as error:
        raise ConfigError(f"cannot create the directory {path}: {error.strerror}. Choose another place.") from error


@contextmanager
def staged_directory(target: Path, *, replace: bool = False) -> Generator[Path]:
    """Yields an empty directory that becomes `target` when the block ends without an error.

    Every file in it is flushed before the rename. With `replace`, an existing target is moved aside first
    and removed afterwards; without it an existing target is a ConfigError. On an error nothing is left behind.
    """
    if target.exists() and not replace:
        raise ConfigError(f"{target} exists already. Choose another name, or remove it first.")
    make_directory(target.parent)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        os.chmod(staging, 0o777 & ~_umask())
        yield staging
        for folder, _, names in os.walk(staging):
            for name in names:
                os.chmod(Path(folder, name), 0o666 & ~_umask())  # safetensors writes files only their owner can read
                sync_file(Path(folder, name))
            sync_directory(Path(folder))
        aside = _swap_in(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_directory(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _swap_in(staging: Path, target: Path) -> Path | None:
    """Renames a directory to its name; returns where the one that had that name now is, with nothing of it lost."""
    if not target.exists():
        os.rename(staging, target)
        return None
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        os.rename(target, aside / target.name)
        os.rename(staging, target)
    except BaseException:
        if not target.exists():
            os.rename(aside / target.name, target)
        with suppress(OSError):
            aside.rmdir()
        raise
    return aside


def remove_directory(path: Path) -> None:
    """Removes a directory so that no half of it can be taken for the whole: renamed aside first."""
    aside = path.with_name(f".{path.name}.removed")
    with suppress(FileNotFoundError):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        shutil.rmtree(aside)


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that died have left in a folder that nobody else writes into now."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Holds a directory for this process alone; ConfigError where another holds it.

    The lock is the system's, on an empty file, `.lock`; it ends with the process, however that ends. Windows has none.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK
    descriptor = _lock(path)
    while not _is_at(path, descriptor):  # who held it before has just removed it
        os.close(descriptor)
        descriptor = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"cannot write into {path.parent}: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # pyright: ignore[reportOptionalMemberAccess]
    except OSError as error:
        os.close(descriptor)
        held = isinstance(error, BlockingIOError)
        raise ConfigError(
            f"{path.parent} is in use: another process is writing this run. Wait until it ends, or stop it first."
            if held
            else f"{path} cannot be locked: {error.strerror}. Choose a file system that has locks."
        ) from error
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


class JsonLines:
    """An append-only file of one JSON object a line, each line with the system as soon as it is written.

    `keep` cuts the file back to its first lines, so that a resumed run holds each step exactly once; `count` is less
    where the file has fewer whole lines.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        make_directory(path.parent)
        self.path = path
        if keep is not None and path.exists():
            lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            atomic_write(path, b"".join(lines[:keep]))
            self.count = min(keep, len(lines))
        else:
            self.count = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        sync_directory(path.parent)

    def write(self, value: dict[str, Any]) -> None:
        """Appends one object; a value that is not finite is a bug of the caller and raises ValueError."""
        _write(self._descriptor, (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode())
        self.count += 1

    def sync(self) -> None:
        """Flushes what was written to disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self._descriptor)


def free_bytes(path: Path) -> int:
    """Returns the free space, in bytes, of the file system that holds `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
