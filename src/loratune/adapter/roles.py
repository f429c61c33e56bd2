"""Roles: what each linear layer does in a transformer, whatever its family calls it; and the presets made of them.

A preset names roles, so that it means the same thing on every family. The table below maps module paths to roles;
the names were read off the models of transformers 5.23.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratune.errors import ConfigError

if TYPE_CHECKING:  # nothing here computes, and the configuration that reads the presets must load without torch
    from torch import nn

ROLES: tuple[str, ...] = ("query", "key", "value", "output", "gate", "up", "down", "head")

PRESETS: dict[str, tuple[str, ...]] = {
    "fast": ("query", "value"),
    "quality": ("query", "key", "value", "output"),
    "deep": ROLES,
    "expert": ROLES,
}

PRESET_SETTINGS: dict[str, dict[str, int | float]] = {
    "fast": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
    "quality": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    "deep": {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05},
    "expert": {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05},
}

_SENTENCES: dict[str, str] = {
    "query": "The query projection decides what each position looks for in attention.",
    "key": "The key projection makes what each position offers to be matched with.",
    "value": "The value projection makes what is read out when attention hits.",
    "output": "The output projection maps the attention result back to the residual stream.",
    "gate": "The gate projection gates the activation of the MLP.",
    "up": "The up projection widens the hidden size inside the MLP.",
    "down": "The down projection narrows the MLP back to the hidden size.",
    "head": "The head turns the hidden state into a token.",
}

_Q, _K, _V, _QKV = ("query",), ("key",), ("value",), ("query", "key", "value")
_OUTPUT, _GATE, _UP, _DOWN = ("output",), ("gate",), ("up",), ("down",)
_NONE: tuple[str, ...] = ()
# A component that holds an attention: self_attn, attention, SelfAttention, EncDecAttention, encoder_attn.
# What lies in it may be one component deeper (BERT: attention.self.query; GPT-Neo: attn.attention.out_proj).
_ATTENTION = r"\w*[aA]tt(?:n|ention)\w*\."
_WITHIN = _ATTENTION + r"(?:self\.|attn\.|attention\.)?"
_MLP = r"(?:mlp|ffn|feed_forward|experts\.\d+)\."
# Poolers and task heads reuse the names of the layers (classifier.out_proj, pooler.dense) and have no role.
_TASK_HEAD = r"(?:pooler|\w*classifier|score|heads?|\w+_heads?|cls|qa_outputs|summary|seq_relationship)(?:\.[\w.]+)?"

# Path pattern -> roles. A pattern ends where the path ends and begins at a dot or the start; the first match wins.
# Names that serve two roles (c_proj, Wo, dense, output.dense) are told apart by what stands before them. Projections of
# relative positions and routers (pos_proj, pos_key_proj, mlp.gate) match nothing, and that is meant.
_TABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_TASK_HEAD, _NONE),
    # One projection per role: Llama and its many kin, GPT-J, OPT, BART, ViT; BERT; DistilBERT; DeBERTa-v2; T5, MPNet
    (r"q_proj|q_lin|query_proj", _Q),
    (r"k_proj|k_lin|key_proj", _K),
    (r"v_proj|v_lin|value_proj", _V),
    (_WITHIN + r"(?:query|q|Wq)", _Q),
    (_WITHIN + r"(?:key|k|Wk)", _K),
    (_WITHIN + r"(?:value|v|Wv)", _V),
    # Multi-head latent attention (DeepSeek-V2 and later): both halves of each low-rank pair
    (r"q_a_proj|q_b_proj", _Q),
    (r"kv_a_proj_with_mqa|kv_b_proj", ("key", "value")),
    # Fused: Phi-3 and CodeGen; GPT-NeoX, Bloom, Falcon; MPT and ModernBERT; vision; Qwen3-Next; GPT-2; DeBERTa
    (r"qkv_proj|query_key_value|Wqkv|qkv|in_proj_qkvz?", _QKV),
    (r"crossattention\.c_attn", ("key", "value")),
    (r"crossattention\.q_attn", _Q),
    (r"c_attn", _QKV),
    (_ATTENTION + r"self\.in_proj", _QKV),
    # Back to the residual stream
    (r"o_proj|out_lin", _OUTPUT),
    (_WITHIN + r"(?:out_proj|c_proj|Wo|wo|o|dense|proj|output)", _OUTPUT),
    (_ATTENTION + r"output\.dense", _OUTPUT),
    # The MLP
    (r"gate_proj|DenseReluDense\.wi_0", _GATE),
    (r"gate_up_proj|mlp\.Wi", ("gate", "up")),
    (r"up_proj|DenseReluDense\.wi(?:_1)?|c_fc|fc1|fc_in|lin1|dense_h_to_4h|intermediate\.dense", _UP),
    (r"down_proj|DenseReluDense\.wo|mlp\.c_proj|mlp\.Wo|fc2|fc_out|lin2|dense_4h_to_h|output\.dense", _DOWN),
    (r"albert_layers\.\d+\.ffn", _UP),
    (r"albert_layers\.\d+\.ffn_output", _DOWN),
    (r"shared_mlp\.input_linear", ("gate", "up")),
    (r"shared_mlp\.output_linear", _DOWN),
    (r"feed_forward\.intermediate(?:_dense)?", _UP),
    (r"feed_forward\.output(?:_dense)?", _DOWN),
    (r"experts\.expert_\d+\.wi|mlp\.dense1|mlp\.linear_fc1", _UP),
    (r"experts\.expert_\d+\.wo|mlp\.dense2|mlp\.linear_fc2", _DOWN),
    (_MLP + r"w1", _GATE),
    (_MLP + r"w3", _UP),
    (_MLP + r"w2", _DOWN),
)
_PATTERNS = tuple((re.compile(rf"(?:^|.*\.)(?:{pattern})"), roles) for pattern, roles in _TABLE)

_EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# A layer is a path up to its first number, and a stage's block where there are stages (SegFormer: stages.0.blocks.1).
_LAYER = re.compile(r"(?:.*?\.)??\d+(?:\.blocks\.\d+)?(?=\.)")


def describe(role: str) -> str:
    """Returns one plain sentence saying what a role does; raises ConfigError for an unknown role."""
    if role not in _SENTENCES:
        raise ConfigError(f"unknown role {role!r}: expected one of {', '.join(ROLES)}.")
    return _SENTENCES[role]


def roles_of(path: str) -> tuple[str, ...]:
    """Returns the roles that a linear layer's dotted path tells: several if fused, none if it has no role.

    The head is known by the model, not by its name: see `module_roles`.
    """
    return next((roles for pattern, roles in _PATTERNS if pattern.fullmatch(path)), _NONE)


def module_roles(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Returns path -> roles of every linear layer, in module order; a wrapped layer counts under its wrapper's path.

    The head is the module that `model.get_output_embeddings()` returns, where the model has that method.
    """
    find_head: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    return {path: ("head",) if module is head else roles_of(path) for path, module in _linear_modules(model)}


def _named_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    return model.named_modules()  # Any: torch leaves the types of its named_modules open


def _linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    wrapper = None
    for path, module in _named_modules(model):
        if wrapper is not None and path.startswith(wrapper + "."):
            continue
        wrapped = _is_linear(getattr(module, "base", None))
        if wrapped or _is_linear(module):
            wrapper = path if wrapped else None
            yield path, module


def _is_linear(module: object) -> bool:
    names = {kind.__name__ for kind in type(module).__mro__}
    # nn.MultiheadAttention reads this one's weight and never calls it: an adapter on it would do nothing.
    return not names.isdisjoint({"Linear", "Conv1D"}) and "NonDynamicallyQuantizableLinear" not in names


def preset_roles(preset: str) -> tuple[str, ...]:
    """Returns the roles of a preset; raises ConfigError, with the nearest name, for an unknown one."""
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"unknown preset {preset!r}: expected one of {', '.join(PRESETS)}{hint}")
    return PRESETS[preset]


def select(model: nn.Module, preset: str) -> list[str]:
    """Returns the paths of a preset's layers, in module order; a fused layer is taken whole.

    Raises ConfigError if the preset is unknown or the model has none of its roles.
    """
    wanted = set(preset_roles(preset))
    roles = module_roles(model)
    selected = [path for path, own in roles.items() if not wanted.isdisjoint(own)]
    if not selected:
        seen = Counter(path.rpartition(".")[2] for path in roles)
        listed = ", ".join(f"{name} ({count})" for name, count in seen.most_common(20)) or "none"
        raise ConfigError(
            f"preset {preset!r} finds none of its roles ({', '.join(PRESETS[preset])}) in {type(model).__name__}; "
            f"linear layers seen: {listed}. Give target_modules by name."
        )
    return selected


@dataclass(frozen=True, slots=True)
class RoleCoverage:
    """One role: numbered layer -> (projections adapted, projections there); name -> the roles that the name serves."""

    role: str
    layers: dict[str, tuple[int, int]]
    names: dict[str, tuple[str, ...]]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_adapted(self) -> int:
        return sum(adapted > 0 for adapted, _ in self.layers.values())

    @property
    def num_in_part(self) -> int:
        return sum(0 < adapted < total for adapted, total in self.layers.values())

    def render(self) -> str:
        """Returns one line: `query   18/18  q_proj`, or `gate    -` where the family lacks the role."""
        if not self.layers:
            return f"{self.role:<8}-"
        names = ", ".join(
            name + (f" (fused: {', '.join(roles)})" if len(roles) > 1 else "") for name, roles in self.names.items()
        )
        part = f" ({self.num_in_part} in part)" if self.num_in_part else ""
        return f"{self.role:<8}{self.num_adapted}/{self.num_layers}  {names}{part}"


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which layers are adapted, by role; `layers` maps each numbered layer to whether anything in it is adapted.

    `other` holds the adapted paths that have no role (a pooler, an embedding, a convolution), and `stacked` the expert
    layers whose weights are three-dimensional parameters: no linear layer, so no preset reaches them.
    """

    roles: dict[str, RoleCoverage]
    layers: dict[str, bool]
    other: tuple[str, ...]
    stacked: tuple[str, ...]

    @property
    def uneven(self) -> list[str]:
        """The roles that are adapted in some of their layers only."""
        return [row.role for row in self.roles.values() if 0 < row.num_adapted < row.num_layers]

    @property
    def bare_layers(self) -> list[str]:
        """The layers that hold a linear layer and no adapter, as in hybrids whose other layers are named otherwise."""
        return [layer for layer, adapted in self.layers.items() if not adapted]

    def render(self) -> str:
        """Returns the map as plain text, one line per role, then the layers reached and what is uneven."""
        lines = [row.render() for row in self.roles.values()]
        lines.append(f"{'layers':<8}{sum(self.layers.values())}/{len(self.layers)}")
        if self.other:
            lines.append(f"{'other':<8}{_first_of(self.other)}")
        if self.stacked:
            lines.append(f"{'experts':<8}{_first_of(self.stacked)} (stacked weights; presets do not reach them)")
        if self.uneven:
            lines.append(f"uneven: {', '.join(self.uneven)} (adapted in some layers only)")
        return "\n".join(lines)


def _first_of(paths: tuple[str, ...]) -> str:
    return f"{len(paths)}  {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}"


def coverage(model: nn.Module, paths: Iterable[str]) -> Coverage:
    """Returns the role x layer map of the adapted `paths`; raises ConfigError if one is not a module of the model."""
    adapted, modules = set(paths), [path for path, _ in _named_modules(model)]
    _require_modules(adapted, modules)
    roles = module_roles(model)
    layers: dict[str, bool] = {}
    for path in modules:
        layer = _layer(path)
        if layer and (path in adapted or (path in roles and not _is_task_head(path))):
            layers[layer] = layers.get(layer, False) or path in adapted
    return Coverage(
        roles={role: _role_coverage(role, roles, adapted) for role in ROLES},
        layers=layers,
        other=tuple(path for path in modules if path in adapted and not roles.get(path)),
        stacked=tuple(path for path, module in _named_modules(model) if _is_stacked(path, module)),
    )


def _is_stacked(path: str, module: nn.Module) -> bool:
    weights = module.parameters(recurse=False)
    return path.rpartition(".")[2] == "experts" and any(weight.dim() == 3 for weight in weights)


def _role_coverage(role: str, roles: dict[str, tuple[str, ...]], adapted: set[str]) -> RoleCoverage:
    layers: dict[str, tuple[int, int]] = {}
    names: dict[str, tuple[str, ...]] = {}
    short_names = _short_names(roles)
    for path in (path for path, own in roles.items() if role in own):
        num_adapted, num_there = layers.get(_layer(path), (0, 0))
        layers[_layer(path)] = (num_adapted + (path in adapted), num_there + 1)
        names[short_names[path]] = roles[path]
    return RoleCoverage(role, layers, names)


def _is_task_head(path: str) -> bool:
    task_head, _ = _PATTERNS[0]
    return task_head.fullmatch(path) is not None


def _layer(path: str) -> str:
    match = _LAYER.match(path)
    return match.group() if match else ""


def _short_names(roles: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Path -> the shortest suffix that means the same roles wherever it stands, cut before any number: attn.c_proj."""
    meanings: dict[str, set[tuple[str, ...]]] = {}
    for path, own in roles.items():
        for suffix in _suffixes(path):
            meanings.setdefault(suffix, set()).add(own)
    return {path: _short_name(path, meanings) for path in roles}


def _short_name(path: str, meanings: dict[str, set[tuple[str, ...]]]) -> str:
    name = ""
    for suffix in _suffixes(path):
        if name and suffix.partition(".")[0].isdigit():
            break
        name = suffix
        if len(meanings[suffix]) == 1:
            break
    return name


def _suffixes(path: str) -> list[str]:
    """The dotted suffixes of a path, shortest first, the path itself last."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def minimal_targets(selected: Iterable[str], all_module_paths: Iterable[str]) -> list[str]:
    """Returns the shortest names, sorted, that select exactly `selected` by PEFT's rule: equal, or a dotted suffix.

    `all_module_paths` holds every module of the model, containers too, since PEFT's rule looks at them all.
    Raises ConfigError if a path is not a module, or if no list of names can tell it from a longer path.
    """
    wanted, everything = set(selected), {path for path in all_module_paths if path}
    _require_modules(wanted, everything)
    unwanted = {suffix for path in everything - wanted for suffix in _suffixes(path)}
    return sorted({_shortest_target(path, unwanted) for path in wanted})


def _shortest_target(path: str, unwanted: set[str]) -> str:
    for suffix in _suffixes(path):
        if suffix not in unwanted:
            return suffix
    raise ConfigError(
        f"target_modules cannot name {path!r} alone: a longer path ends in it. Adapt both, or rename the outer module."
    )


def taken_for_experts(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Returns the targets that PEFT may take for the stacked experts of a mixture, and not for these linear layers.

    PEFT 0.21 rewrites a name that ends in one of an expert's old names (even a full path) to the experts' parameters,
    so that dense and shared MLP layers of such a model cannot be named there: transformers_weight_conversion.py.
    """
    if not any(_is_stacked(path, module) for path, module in _named_modules(model)):
        return []
    return [target for target in targets if target.rpartition(".")[2] in _EXPERT_NAMES]


def _require_modules(paths: set[str], modules: Iterable[str]) -> None:
    if missing := sorted(paths.difference(modules)):
        raise ConfigError(
            f"{len(missing)} of {len(paths)} paths are not modules of the model; first: {missing[0]!r}. "
            "Give full dotted paths, as model.named_modules() lists them."
        )
