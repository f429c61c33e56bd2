"""Training: configuration, loop, optimizer, schedule, checkpoints. Called, this package is `loratune.train(...)`."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """Once this package is imported, Python sets it as `loratune.train`, where users look for the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Trains the one active adapter of a model on a file of rows: `loratune.api.train`."""
        return import_module("loratune.api").train(*args, **kwargs)  # by name: `train` stands below `api`


sys.modules[__name__].__class__ = _Callable
