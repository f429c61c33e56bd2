"""Adapter: the value that is trained, saved, loaded and merged: a configuration and its tensors."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank
from loratune.adapter.fingerprint import Fingerprint


@dataclass
class Adapter:
    """A LoRA adapter apart from any model.

    factors: module path -> LowRank. biases: parameter path -> trained copy (`bias`). saved: module path -> trained copy
    (`modules_to_save`). loose: tensors of a file that only a model can place (biases and saved modules, before that).
    base: the fingerprint of the model it was made for, None if the file holds none.
    """

    config: LoraConfig
    factors: dict[str, LowRank]
    biases: dict[str, nn.Parameter] = field(default_factory=dict)
    saved: dict[str, nn.Module] = field(default_factory=dict)
    loose: dict[str, Tensor] = field(default_factory=dict)
    base: Fingerprint | None = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields every trained tensor, each once, under its (first) name in the model: "<path>.A", "<path>.bias" ..."""
        for path, factor in self.factors.items():
            for name, parameter in factor.named_parameters():
                yield f"{path}.{name}", parameter
        yield from self.biases.items()
        seen: set[nn.Parameter] = set()  # tied modules share theirs
        for path, module in self.saved.items():
            for name, parameter in module.named_parameters():
                if parameter not in seen:
                    seen.add(parameter)
                    yield f"{path}.{name}", parameter

    def num_parameters(self) -> int:
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    def flat(self) -> dict[str, Tensor]:
        """Returns every tensor by the name it has in the model, those of a file that are not placed yet included."""
        return {**{name: parameter.detach() for name, parameter in self.named_parameters()}, **self.loose}
