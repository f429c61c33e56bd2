"""Checkpoints of the Hugging Face Trainer that hold adapters alone, whether PEFT is installed or not.

    class AdapterTrainer(AdapterCheckpoints, Trainer): ...

With PEFT installed the plain Trainer does the same, since it takes the model for PEFT's; without it, it would write the
whole state dict, base included.
"""

from pathlib import Path
from typing import Any

from torch import nn


class AdapterCheckpoints:
    """Mixed into a Trainer, before it: its model, a PeftModel of `loratune.compat.peft`, is saved and loaded as
    adapters."""

    model: Any
    args: Any
    state: Any
    processing_class: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:  # gathered from shards: the Trainer's own way
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.model.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapters(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_adapters(self.model, Path(self.state.best_model_checkpoint))


def load_adapters(model: Any, folder: Path) -> None:
    """Loads each adapter of a PeftModel from where `save_pretrained` wrote it; raises AdapterError if it is missing."""
    for name in model.peft_config:
        model.load_adapter(folder if name == "default" else folder / name, name, is_trainable=True)
