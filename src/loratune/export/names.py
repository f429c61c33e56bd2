"""Names on disk and names in memory: which parameter each stored tensor becomes, by transformers' conversion table.

Most tensors become one parameter as they are, some under another name. A converter makes parameters from stored
tensors otherwise: experts are stacked, fused projections split. Converters only stack, split, permute and transpose,
so an update of the parameters, converted back, is the update of the stored tensors.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    rename_source_key,
    revert_weight_conversion,
)

from loratune.errors import ExportError
from loratune.export.tensors import Stored

_CANNOT_REVERT = (NotImplementedError, ValueError, TypeError, KeyError, RuntimeError, AttributeError)


class Names:
    """The tensors of a model's files and the parameters of the model, `model` being on the meta device.

    parameter_of: stored name -> the parameter it becomes as it is; stored_of: the way back. Raises ExportError for two
    tensors that become the same parameter.
    """

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._model, self._prefix = model, model.base_model_prefix
        self.meta: dict[str, Tensor] = model.state_dict()
        self.stored = stored
        self.parameter_of: dict[str, str] = {}
        self.stored_of: dict[str, Stored] = {}
        for name, tensor in stored.items():
            parameter, is_plain = self._parameter(name)
            if is_plain and parameter in self.stored_of:
                raise ExportError(f"{name} and {self.stored_of[parameter].name} are both stored for {parameter}.")
            if is_plain:
                self.parameter_of[name] = parameter
                self.stored_of[parameter] = tensor
        self._used = [each for each in transforms if each.was_used()]

    def _parameter(self, name: str) -> tuple[str, bool]:
        """The first step of core_model_loading.convert_and_load_state_dict_in_model."""
        renamed, converter = rename_source_key(name, self._renamings, self._converters, self._prefix, self.meta)
        if renamed not in self.meta and name in self.meta:
            renamed, converter = rename_source_key(name, [], [], self._prefix, self.meta)
        return renamed, converter is None

    def new_name(self, parameter: str, sibling: str) -> str:
        """Returns a name for a parameter that the files lack, in the manner of the tied parameter that they hold."""
        known = self.stored_of[sibling].name
        manner = known.removesuffix(sibling) if known.endswith(sibling) else ""
        for name in (manner + parameter, parameter):
            if name not in self.stored and self._parameter(name) == (parameter, True):
                return name
        raise ExportError(
            f"{parameter} needs a tensor of its own, and transformers' conversion table has no name for it beside "
            f"{known}. Keep the adapter beside the model."
        )

    def stored_together(self, parameter: str) -> tuple[str, ...]:
        """Returns the parameters that one converter makes from the same stored tensors, this one included, or none."""
        try:
            reversed_ = [each.reverse_transform() for each in reversed(self._used)]
        except _CANNOT_REVERT:
            return ()
        converters = [each for each in reversed_ if isinstance(each, WeightConverter)]
        key, pattern = apply_converters(parameter, converters)
        if pattern is None:
            return ()
        return tuple(name for name in self.meta if apply_converters(name, converters)[0] == key)

    def reverted(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the stored tensors of parameters that are stored together, as save_pretrained would write them."""
        self._model.__dict__["_weight_conversions"] = self._used  # what the loader leaves there
        return revert_weight_conversion(self._model, dict(values))

    def pieces(self, parameters: tuple[str, ...], folder: Path) -> dict[str, Stored]:
        """Returns the stored tensors that parameters are made from; raises ExportError where the table cannot say."""
        try:
            found = self.reverted({name: torch.empty_like(self.meta[name]) for name in parameters})
        except _CANNOT_REVERT as error:
            raise self.missing(parameters[0], folder) from error
        for name, piece in found.items():
            if name not in self.stored or self.stored[name].shape != tuple(piece.shape):
                raise self.missing(parameters[0], folder)
        return {name: self.stored[name] for name in found}

    def missing(self, parameter: str, folder: Path) -> ExportError:
        """The error for a changed parameter that has no place in the files."""
        near = difflib.get_close_matches(parameter, self.parameter_of.values(), n=3)
        return ExportError(
            f"{parameter} has no tensor in {folder} (nearest: {', '.join(near) or 'none'}), so the adapter cannot be "
            "added on disk. Merge in memory: load_adapter(model, adapter).merge().save_pretrained(folder)."
        )
