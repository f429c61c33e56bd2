"""What merging an adapter into the files of its base will do, from names and shapes alone: no weight is read.

A model built on the meta device says which modules there are and which weights are tied.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from loratune.adapter import making, sites
from loratune.adapter.adapter import Adapter
from loratune.adapter.fingerprint import Fingerprint
from loratune.adapter.variants import merged
from loratune.adapter.wrapper import lookup
from loratune.errors import AdapterError, ExportError
from loratune.export.names import Names
from loratune.export.tensors import FLOAT_NAMES, FLOATS, Stored, read_headers
from loratune.model.load import TASKS, Source

_PACKED = frozenset({"U8", "I8", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"})  # how quantised weights are stored


@dataclass
class Change:
    """What an adapter does to one parameter.

    trained: the tensor that stands in its place; factors: the sites whose updates are added; lora_biases: the sites
    whose factors' trained biases are added.
    """

    shape: tuple[int, ...]
    trained: Tensor | None = None
    factors: list[sites.Site] = field(default_factory=list)
    lora_biases: list[sites.Site] = field(default_factory=list)

    @property
    def is_replacement(self) -> bool:
        return self.trained is not None and not self.factors and not self.lora_biases

    def delta(self, adapter: Adapter, source: Stored | None) -> Tensor:
        """Returns what is added to the parameter, in float32 or wider, from an adapter whose factors have their places.

        The stored weight is read only where the update depends on it: DoRA, or a trained copy with updates on it.
        """
        factors = [(site.host, adapter.factors[site.path]) for site in self.factors]
        biases = [adapter.factors[site.path] for site in self.lora_biases]
        added = [factor.bias.detach() * factor.scale for factor in biases if factor.bias is not None]
        if self.trained is None and all(factor.magnitude is None for _, factor in factors):
            return sum([host.oriented(factor.delta()) for host, factor in factors] + added, torch.zeros(()))
        assert source is not None
        base = source.whole().to(torch.promote_types(FLOATS[source.dtype], torch.float32))
        total = base if self.trained is None else self.trained.to(base.dtype)
        with torch.no_grad():
            for host, factor in factors:
                total = merged(host, total, factor)
        return sum(added, total) - base


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters that transformers makes from the same stored tensors, and the changes to them."""

    names: Names
    parameters: tuple[str, ...]
    changes: Mapping[str, Change]

    def deltas(self, adapter: Adapter) -> dict[str, Tensor]:
        """Returns what is added to each of the stored tensors."""
        zero = torch.zeros(())
        whole = {
            name: self.changes[name].delta(adapter, None)
            if name in self.changes
            else zero.expand(self.names.meta[name].shape)
            for name in self.parameters
        }
        return self.names.reverted(whole)


@dataclass(frozen=True)
class Operation:
    """One tensor of the merged model: `kind` (copy, untie, merge, replace), from which stored one, as which type.

    untie is a copy under a name that the base, whose weight is tied, does not store. `group`: the change is part of
    that of parameters that are stored otherwise than they are in memory.
    """

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    source: Stored | None
    change: Change | None = None
    group: Group | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether the tensor is not the stored one bit for bit."""
        return self.kind in ("merge", "replace") or self.source is None or self.dtype != self.source.dtype

    def to_json(self) -> dict[str, Any]:
        origin = self.source.name if self.source else None
        return {"operation": self.kind, "tensor": self.name, "from": origin, "dtype": self.dtype, "shape": self.shape}


@dataclass(frozen=True)
class Plan:
    """All tensors of the merged model; `untied`: the parameters that share one tensor in the base and do not here."""

    operations: tuple[Operation, ...]
    untied: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(operation.num_bytes for operation in self.operations)

    def counts(self) -> dict[str, int]:
        """Returns the number of operations of each kind."""
        kinds = [operation.kind for operation in self.operations]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def make_plan(source: Source, adapter: Adapter, dtype: str | None) -> Plan:
    """Returns the operations that merge an adapter into a base's files; `dtype`, a torch name, converts all floats.

    Raises AdapterError if adapter and model do not fit, ExportError for files that cannot be merged into: quantised
    ones, and those that have no place for a changed parameter.
    """
    stored = read_headers(source.path)
    config = AutoConfig.from_pretrained(source.path, local_files_only=True)
    _refuse_quantised(source, config, stored)
    task = adapter.config.task_type or "CAUSAL_LM"
    model = _skeleton(config, task)
    names = Names(model, stored)
    changes = _changes(model, adapter)
    tied = _tied(model)
    if not any(len(tied.get(name, ())) > 1 for name in changes):
        tied = {}
    else:
        _set_untied(config)
        model = _skeleton(config, task)
        _refuse_still_tied(model, changes)
    written = None if dtype is None else FLOAT_NAMES[getattr(torch, dtype)]
    operations = _Operations(source.path, names, changes, written)
    operations.add_stored()
    operations.add_lacking(model, tied)
    return Plan(tuple(operations.done), tuple(name for name, group in tied.items() if len(group) > 1))


def _refuse_quantised(source: Source, config: Any, stored: Mapping[str, Stored]) -> None:
    packed = [name for name, tensor in stored.items() if tensor.dtype in _PACKED]
    if packed and getattr(config, "quantization_config", None) is not None:
        raise ExportError(
            f"{source.path} holds quantised weights ({len(packed)} tensors; first: {packed[0]}, "
            f"{stored[packed[0]].dtype}). Give the model it was made from with --model."
        )


def _skeleton(config: Any, task: str) -> PreTrainedModel:
    """Returns the model of a configuration without storage."""
    if task not in TASKS:
        raise ExportError(f"task_type {task} cannot be merged from files yet; expected one of {', '.join(TASKS)}.")
    with torch.device("meta"):
        return TASKS[task].from_config(config)


def _set_untied(config: Any) -> None:
    for part in (config, getattr(config, "text_config", None)):
        if part is not None:
            part.tie_word_embeddings = False


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Returns, for each parameter's name, all names of the same parameter, itself included."""
    names: dict[int, tuple[str, ...]] = {}
    everything = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in everything:
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return {name: names[id(parameter)] for name, parameter in everything}


def _refuse_still_tied(model: nn.Module, changes: Mapping[str, Change]) -> None:
    for name, others in _tied(model).items():
        if name in changes and len(others) > 1:
            raise ExportError(
                f"{type(model).__name__} shares {name} with {', '.join(set(others) - {name})} whatever its "
                "configuration says, so one cannot be merged without the others. Keep the adapter beside the model."
            )


# ---- what the adapter changes ---------------------------------------------------------------------------------------


def _changes(model: PreTrainedModel, adapter: Adapter) -> dict[str, Change]:
    """Returns parameter name -> change; proves that factors and sites map one to one, and that all shapes fit.

    Rows of `trainable_token_indices` are only found here: their values get their place when the probe attaches them.
    """
    found = sites.find_for(model, adapter)
    with_factors = [site for site in found if not site.path.endswith(sites.TOKENS)]
    fitted = making.fitted_to(adapter, with_factors)
    sites.match(type(model).__name__, with_factors, fitted, Fingerprint("", b""), allow_base=True)
    changes: dict[str, Change] = {}
    for name, like in _replaced(model, adapter, found).items():
        value = adapter.loose.get(name)
        if value is None or value.shape != like.shape:
            shape = "nothing" if value is None else tuple(value.shape)
            raise AdapterError(f"the adapter's trained {name}: found {shape}, expected {tuple(like.shape)}.")
        changes[name] = Change(tuple(value.shape), trained=value)
    _refuse_strays(adapter, found, changes)
    for site in found:
        name = f"{site.owner}.{site.parameter or 'weight'}"
        changes.setdefault(name, Change(tuple(site.weight.shape))).factors.append(site)
        if adapter.config.lora_bias:
            changes.setdefault(f"{site.owner}.bias", Change((site.sizes[1],))).lora_biases.append(site)
    return changes


def _replaced(model: PreTrainedModel, adapter: Adapter, found: list[sites.Site]) -> dict[str, Tensor]:
    """Returns the base's tensors that trained copies replace: biases, and all of the modules trained whole."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    replaced: dict[str, Tensor] = {path: parameters[path] for path in sites.bias_paths(model, adapter.config, found)}
    for path in sites.saved_paths(model, adapter.config):
        state = lookup(model, path).state_dict()
        replaced.update({f"{path}.{name}": tensor for name, tensor in state.items()})
    return replaced


def _refuse_strays(adapter: Adapter, found: list[sites.Site], changes: Mapping[str, Change]) -> None:
    """PEFT also writes adapted embeddings and heads in full: attaching proves that those are the base's own."""
    known = {site.owner for site in found} | {site.path for site in found}
    strays = [name for name in adapter.loose if name not in changes and name.rpartition(".")[0] not in known]
    if strays:
        raise AdapterError(f"{len(strays)} tensors of the adapter have no place in the model; first: {strays[0]}.")


# ---- operations -----------------------------------------------------------------------------------------------------


class _Operations:
    """Collects the operations: every stored tensor in its order, then those that the files lack."""

    def __init__(self, folder: Path, names: Names, changes: Mapping[str, Change], dtype: str | None) -> None:
        self.folder, self.names, self.changes, self.dtype = folder, names, changes, dtype
        self.done: list[Operation] = []
        self.grouped: dict[str, Group] = {}  # stored name -> the group whose change reaches it
        for parameter in changes:
            if parameter in names.meta and parameter not in names.stored_of:
                self._find_group(parameter)

    def _find_group(self, parameter: str) -> None:
        parameters = self.names.stored_together(parameter)
        if not parameters:
            return
        if any(self.changes[name].trained is not None for name in parameters if name in self.changes):
            raise self.names.missing(parameter, self.folder)
        group = Group(self.names, parameters, self.changes)
        self.grouped.update(dict.fromkeys(self.names.pieces(parameters, self.folder), group))

    def add_stored(self) -> None:
        for name, tensor in self.names.stored.items():
            change = self.changes.get(self.names.parameter_of.get(name, ""))
            group = self.grouped.get(name)
            if change is not None and change.shape != tensor.shape:
                raise self._does_not_fit(tensor, change.shape)
            self._add(name, tensor, change, group)

    def add_lacking(self, model: PreTrainedModel, tied: Mapping[str, tuple[str, ...]]) -> None:
        """Adds what the files lack: parameters that were tied and are not any more, and what only the adapter has."""
        reached = {name for group in self.grouped.values() for name in group.parameters}
        lacking = [name for name in {**model.state_dict(), **self.changes} if name not in self.names.stored_of]
        for parameter in lacking:
            change = self.changes.get(parameter)
            sibling = next((other for other in tied.get(parameter, ()) if other in self.names.stored_of), None)
            if sibling is not None:
                new, tensor = self.names.new_name(parameter, sibling), self.names.stored_of[sibling]
                self._add(new, tensor, change, None, unchanged="untie")
            elif change is not None and parameter not in reached:
                self._add_new(parameter, change)

    def _add(
        self, name: str, tensor: Stored, change: Change | None, group: Group | None, unchanged: str = "copy"
    ) -> None:
        written = self.dtype if self.dtype is not None and tensor.dtype in FLOATS else tensor.dtype
        size = math.prod(tensor.shape) * FLOATS[written].itemsize if written in FLOATS else tensor.num_bytes
        kind = unchanged
        if change is not None or group is not None:
            kind = "replace" if change is not None and change.is_replacement else "merge"
            if tensor.dtype not in FLOATS:
                raise self._does_not_fit(tensor, tensor.shape)
        self.done.append(Operation(kind, name, written, tensor.shape, size, tensor, change, group))

    def _does_not_fit(self, tensor: Stored, shape: tuple[int, ...]) -> ExportError:
        return ExportError(
            f"{tensor.name} in {tensor.file}: found {tensor.dtype} {tensor.shape}, expected {shape} in one of "
            f"{', '.join(FLOATS)}. Give the base model the adapter was trained on with --model."
        )

    def _add_new(self, parameter: str, change: Change) -> None:
        """A tensor that is only the adapter's: a new head."""
        if change.trained is None or not change.is_replacement or not change.trained.is_floating_point():
            raise self.names.missing(parameter, self.folder)
        written = self.dtype or FLOAT_NAMES[change.trained.dtype]
        size = change.trained.numel() * FLOATS[written].itemsize
        self.done.append(Operation("replace", parameter, written, change.shape, size, None, change))
