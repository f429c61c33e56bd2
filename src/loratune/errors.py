"""The errors a user can meet. Each message says what, where, found, expected, and what to do.

Each class is also the standard exception it refines, so `except ValueError` keeps working.
"""


class LoratuneError(Exception):
    """Base of all errors that loratune raises on purpose."""

    exit_code = 1


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
