"""The errors a user can meet. Each message says what, where, found, expected, and what to do.

Each class is also the standard exception it refines, so `except ValueError` keeps working.
"""

import re

_SECRET = re.compile(
    r"\b(hf_|api_org_|sk-|gh[opsu]_|github_pat_|glpat-)[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b"  # keys of hubs and services
    r"|(?<=://)[^/\s@]+(?=@)"  # user and password in an address
)


class LoratuneError(Exception):
    """Base of all errors that loratune raises on purpose; a key given by mistake is not shown again."""

    exit_code = 1

    def __str__(self) -> str:
        return _SECRET.sub("***", super().__str__())


class ConfigError(LoratuneError, ValueError):
    """A setting, name or path that cannot be used as given; nothing was written."""

    exit_code = 2


class DataError(LoratuneError, ValueError):
    """A row, file or template that cannot be trained on; names file, line and reason."""

    exit_code = 2


class AdapterError(LoratuneError, ValueError):
    """An adapter and a model that do not fit each other; the model was not touched."""

    exit_code = 2


class CheckpointError(LoratuneError, ValueError):
    """A checkpoint that is incomplete, damaged, or belongs to another run."""

    exit_code = 2


class TrainingError(LoratuneError, RuntimeError):
    """A run that cannot go on: a loss that is not finite, a factor that does not learn."""


class ExportError(LoratuneError, RuntimeError):
    """An export that would not be the model that was trained."""
