"""Attaching adapters to a model: the named layers are wrapped in place, the base weights are never written.

attached = attach(model, LoraConfig(r=8))     # wraps, freezes the base, makes the new adapter the active one
with attached.disabled(): ...                 # the base model
attached.detach()                             # the plain model again, bit for bit
"""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratune.adapter import making, peft_format, sites
from loratune.adapter.adapter import Adapter
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank, Tied
from loratune.adapter.fingerprint import Fingerprint, fingerprint
from loratune.adapter.modules import put_parameter
from loratune.adapter.sites import Site
from loratune.adapter.summary import summarize
from loratune.adapter.wrapper import Adapted, AdaptedWeights, Shared, Slot, parent_of
from loratune.errors import AdapterError, ConfigError

_ATTRIBUTE = "_loratune"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


class Attachments:
    """Everything attached to one model: adapters by name, wrappers by path, and what the base had before."""

    def __init__(self, model: nn.Module) -> None:
        self.shared = Shared()
        self.adapters: dict[str, Adapter] = {}
        self.wrappers: dict[str, Adapted | AdaptedWeights] = {}  # by the path of the module they stand around
        self.slots: dict[str, Slot] = {}  # by the path of the site
        self.active: tuple[str, ...] = ()
        self.base: Fingerprint = fingerprint(model)
        # Each name of a tied weight, for merging may give them weights of their own.
        self.required_grad = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        # path -> the base's bias or module, while a trained copy stands in its place
        self.originals: dict[str, Any] = {}
        self.lists: dict[tuple[str, ...], list[tuple[Slot, nn.ModuleList]]] = {}  # active names -> what stands where
        model.requires_grad_(False)

    @staticmethod
    def of(model: nn.Module) -> "Attachments | None":
        return model.__dict__.get(_ATTRIBUTE)

    def place(self, model: nn.Module, site: Site, name: str, factor: LowRank) -> None:
        """Wraps the site's module if it is not wrapped yet, and puts an adapter's factor at the site."""
        if site.owner not in self.wrappers:
            wrapper = (
                Adapted(site.module, site.host, self.shared)
                if site.parameter is None
                else AdaptedWeights(site.module, self.shared)
            )
            _set_module(model, site.owner, wrapper)
            self.wrappers[site.owner] = wrapper
        wrapper = self.wrappers[site.owner]
        slot = wrapper if isinstance(wrapper, Adapted) else wrapper.slot(site.parameter or "", site.host)
        self.slots[site.path] = slot
        slot.placed.setdefault(name, []).append(factor.to(site.weight.device))

    def activate(self, model: nn.Module, names: tuple[str, ...]) -> None:
        """Makes these adapters, and no others, the active ones: their updates add up."""
        if len([name for name in names if self.adapters[name].biases or self.adapters[name].saved]) > 1:
            raise AdapterError(
                "only one active adapter can train biases or whole modules; their copies cannot be added."
            )
        self._refuse_clash(names)
        after = self._lists(names)
        for slot, _ in self._lists(self.active):
            slot._modules["active"] = _NOTHING
        for slot, factors in after:
            slot._modules["active"] = factors
        self._restore_originals(model)
        for name in names:
            self._swap_in(model, self.adapters[name])
        self.active = names

    def _refuse_clash(self, names: tuple[str, ...]) -> None:
        """A layer that stands in a module trained whole has no place for a factor of another adapter."""
        for saved in (path for name in names for path in self.adapters[name].saved):
            for name in names:
                hit = next((p for p in self.adapters[name].factors if p == saved or p.startswith(saved + ".")), None)
                if hit is not None:
                    raise AdapterError(
                        f"{saved} is trained whole by one adapter and {hit} adapted by {name!r}: "
                        "they cannot be active together."
                    )

    def _lists(self, names: tuple[str, ...]) -> list[tuple[Slot, nn.ModuleList]]:
        """Returns the factors of these adapters slot by slot, made once so that switching is a few assignments."""
        if names not in self.lists:
            slots = {id(slot): slot for slot in (self.slots[p] for name in names for p in self.adapters[name].factors)}
            self.lists[names] = [
                (slot, nn.ModuleList(factor for name in names for factor in slot.placed.get(name, ())))
                for slot in slots.values()
            ]
        return self.lists[names]

    def _swap_in(self, model: nn.Module, adapter: Adapter) -> None:
        for path, module in adapter.saved.items():
            parent, last = parent_of(model, path)
            self.originals[path] = parent._modules[last]  # with its wrapper, if it has one
            _set_module(model, path, module)
        for path, bias in adapter.biases.items():
            self.originals[path] = put_parameter(model, path, bias)

    def _restore_originals(self, model: nn.Module) -> None:
        for path, original in self.originals.items():
            if isinstance(original, nn.Parameter):
                put_parameter(model, path, original)
            else:
                _set_module(model, path, original)
        self.originals.clear()

    def forget(self, name: str) -> None:
        del self.adapters[name]
        self.lists = {names: value for names, value in self.lists.items() if name not in names}
        for slot in self.slots.values():
            slot.placed.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        self.adapters = {new if name == old else name: adapter for name, adapter in self.adapters.items()}
        self.active = tuple(new if name == old else name for name in self.active)
        self.lists.clear()
        for slot in self.slots.values():
            if old in slot.placed:
                slot.placed[new] = slot.placed.pop(old)

    def unwrap(self, model: nn.Module) -> None:
        """Takes every wrapper off a model without active adapters: the plain model, trainable where it was."""
        for path, wrapper in self.wrappers.items():
            parent, last = parent_of(model, path)
            if parent._modules[last] is wrapper:  # not where merging left a module that was trained whole
                _set_module(model, path, wrapper.base)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.required_grad)
        del model.__dict__[_ATTRIBUTE]


class Attached:
    """The handle of one adapter on one model: what `attach` returns."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name

    @property
    def _all(self) -> Attachments:
        found = Attachments.of(self.model)
        if found is None or self.name not in found.adapters:
            raise AdapterError(f"adapter {self.name!r} is not attached to this {type(self.model).__name__} any more.")
        return found

    @property
    def adapter(self) -> Adapter:
        return self._all.adapters[self.name]

    @property
    def config(self) -> LoraConfig:
        return self.adapter.config

    @property
    def shared(self) -> Shared:
        return self._all.shared

    def activate(self, *others: "Attached") -> None:
        """Makes this adapter the active one, together with `others` if given: their updates add up."""
        self._all.activate(self.model, (self.name, *(other.name for other in others)))

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Within the block the model is the base model: no factor, no trained bias, no trained module."""
        everything = self._all
        names, rows = everything.active, everything.shared.rows
        everything.activate(self.model, ())
        everything.shared.rows = None
        try:
            yield
        finally:
            everything.shared.rows = rows
            everything.activate(self.model, names)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Generator[None]:
        """Within the block row i of every batch goes through the adapter called names[i], or through none.

        Raises AdapterError for an unknown name, and for an adapter that trains biases or whole modules.
        """
        everything = self._all
        for name in {name for name in names if name is not None}:
            if name not in everything.adapters:
                raise AdapterError(
                    f"rows: no adapter {name!r} is attached; attached are {', '.join(everything.adapters)}."
                )
            if everything.adapters[name].biases or everything.adapters[name].saved:
                raise AdapterError(
                    f"rows: adapter {name!r} trains biases or whole modules, which all rows would share."
                )
        device = next(self.model.parameters()).device
        index = {
            name: torch.tensor([i for i, each in enumerate(names) if each == name], device=device)
            for name in dict.fromkeys(names)
            if name is not None
        }
        shared = everything.shared
        before = shared.rows, shared.num_rows
        shared.rows, shared.num_rows = index, len(names)
        try:
            yield
        finally:
            shared.rows, shared.num_rows = before

    def train_mode(self, on: bool = True) -> None:
        """Puts the adapter, and only it, into training mode: its dropout is on, the frozen base stays as it is."""
        for path in self.adapter.factors:
            self._all.slots[path].training = on
        for module in self.adapter.saved.values():
            module.train(on)

    def save(self, path: str | Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors as PEFT reads them; whole or not at all."""
        with _plain(self.model, self._all):
            peft_format.write(self.adapter, self.model, Path(path), replace=False)

    def rename(self, name: str) -> None:
        """Gives this adapter another name on its model; raises ConfigError or AdapterError for one that cannot be."""
        everything = self._all
        check_name(everything, name)
        everything.rename(self.name, name)
        self.name = name

    @torch.no_grad()
    def swap(self, adapter: Adapter) -> None:
        """Copies another adapter's values into this one's tensors: nothing is wrapped, moved or compiled again.

        Raises AdapterError, with nothing changed, unless sites, shapes and base are the same.
        """
        with _plain(self.model, self._all):
            found = sites.find(self.model, self.config)
            fitted = making.fitted_to(adapter, found)
            sites.match(type(self.model).__name__, found, fitted, self._all.base)
            making.place_loose(self.model, fitted, found)
        own, values = dict(self.adapter.named_parameters()), fitted.flat()
        odd = sorted(set(own) ^ set(values)) or sorted(name for name in own if own[name].shape != values[name].shape)
        if odd:
            raise AdapterError(
                f"swap: {len(odd)} tensors differ in name or shape; first: {odd[0]}. Nothing was changed."
            )
        for name, parameter in own.items():
            parameter.copy_(values[name])
        for path, factor in self.adapter.factors.items():
            if not isinstance(factor, Tied):
                factor.scale, factor.dropout = fitted.factors[path].scale, fitted.factors[path].dropout
        self._all.adapters[self.name].config = fitted.config

    def detach(self) -> None:
        """Takes this adapter off the model; with the last one the model is the plain model again, bit for bit."""
        everything = self._all
        everything.activate(self.model, tuple(name for name in everything.active if name != self.name))
        everything.forget(self.name)
        if not everything.adapters:
            everything.unwrap(self.model)

    def merge(self) -> nn.Module:
        """Returns the model with the update in its weights, W' = W + s B A: plain layers, no adapter left.

        Base tensors are replaced, not written to; a tied head gets a weight of its own (see `summary`).
        """
        from loratune.adapter.merge import merge_in_memory

        return merge_in_memory(self)

    def summary(self) -> str:
        """Returns what is trained and what is not: sites, parameters, coverage of roles and layers, notes."""
        with _plain(self.model, self._all):
            return summarize(self.model, self.adapter)


def attach(
    model: nn.Module,
    what: LoraConfig | Adapter,
    name: str = "default",
    *,
    seed: int | None = None,
    allow_base: bool = False,
) -> Attached:
    """Attaches a new adapter (from a configuration) or an existing one to a model and makes it the active one.

    `seed` fixes how A begins, each site by its own path; None draws a seed from torch's generator. Raises ConfigError
    or AdapterError, with the model untouched: a name in use, targets that match nothing, an adapter that does not fit.
    """
    existing = Attachments.of(model)
    check_name(existing, name)
    with _plain(model, existing):
        base = existing.base if existing else fingerprint(model)
        if isinstance(what, LoraConfig):
            found = sites.find(model, what)
            adapter = making.new_adapter(model, what, found, base, seed)
        else:
            found = sites.find_for(model, what)
            adapter = making.fitted_to(what, found)
            sites.match(type(model).__name__, found, adapter, base, allow_base=allow_base)
            making.place_loose(model, adapter, found)
    everything = existing or Attachments(model)
    model.__dict__[_ATTRIBUTE] = everything
    everything.activate(model, ())  # wrappers go around the base's modules, not around another adapter's copies
    for site in found:
        everything.place(model, site, name, adapter.factors[site.path])
    everything.adapters[name] = adapter
    attached = Attached(model, name)
    attached.activate()
    return attached


def check_name(everything: Attachments | None, name: str) -> None:
    """Raises ConfigError for a name that cannot be used, AdapterError for one that is attached already."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"adapter name {name!r}: expected 1 to 64 letters, digits, '.', '_' or '-'.")
    if everything is not None and name in everything.adapters:
        raise AdapterError(f"an adapter named {name!r} is attached already. Give another name, or detach it first.")


def load_adapter(
    model: nn.Module, path: str | Path, name: str = "default", *, allow_base: bool = False, trainable: bool = False
) -> Attached:
    """Reads an adapter in PEFT's format, proves that it fits, and attaches it. Nothing is touched before every check.

    Raises AdapterError. `allow_base` accepts other base weights than the adapter was trained on.
    """
    attached = attach(model, peft_format.read(Path(path)), name, allow_base=allow_base)
    for _, parameter in attached.adapter.named_parameters():
        parameter.requires_grad_(trainable)
    return attached


def attached_to(model: nn.Module) -> Attached:
    """Returns the handle of a model's one active adapter; raises AdapterError if there is none or more than one."""
    everything = Attachments.of(model)
    if everything is None or len(everything.active) != 1:
        number = len(everything.active) if everything else 0
        raise AdapterError(
            f"{type(model).__name__} has {number or 'no'} active adapters; expected one. Attach one first "
            "(attached = loratune.attach(model, config)) or activate just the one to use."
        )
    return Attached(model, everything.active[0])


@contextmanager
def _plain(model: nn.Module, everything: Attachments | None) -> Generator[None]:
    """Within the block no trained copy stands in for a base tensor, so that paths and weights are the base's."""
    if everything is None:
        yield
        return
    names = everything.active
    everything.activate(model, ())
    try:
        yield
    finally:
        everything.activate(model, names)


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, name = parent_of(model, path)
    parent._modules[name] = module


_NOTHING = nn.ModuleList()
