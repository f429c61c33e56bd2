"""What may steer a run from outside its loop: a ladder does."""

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from loratune.train.signals import StopRequest

if TYPE_CHECKING:
    from loratune.train.loop import Run


class Guide(Protocol):
    """Gives a run its learning rate, and takes turns between two of its steps.

    A turn begins at a state that was just saved, and leaves it there if it is asked to stop. `state` and `tensors` are
    saved with the run; `restore` takes them back, its tensors out of those saved, before the parameters are taken.
    """

    def learning_rate(self, run: "Run") -> float: ...
    def is_due(self, run: "Run") -> bool: ...
    def turn(self, run: "Run", stop: StopRequest) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def restore(self, run: "Run", state: dict[str, Any] | None, tensors: dict[str, Tensor]) -> None: ...
