"""The configurations of `loratune ladder --together`: the user's own, from a file, or a grid around the usual ones."""

from collections.abc import Mapping
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from loratune.adapter.attach import check_name
from loratune.errors import ConfigError
from loratune.ladder.together import EACH
from loratune.train.config import AdapterConfig, ResolvedConfig, load_run_config
from loratune.train.yaml_lines import kind, read_mapping

# Of a grid: 2 ranks x 2 sets of targets x 2 rates, half and twice the usual one of small models (5e-4).
RANKS, TARGETS, RATES = (8, 32), ("fast", "all-linear"), (2.5e-4, 1e-3)
_TRAIN = ("learning_rate", "warmup_steps", "max_grad_norm", "weight_decay", "lr_ratio",
          "adam_beta1", "adam_beta2", "adam_epsilon")  # fmt: skip
_KEYS = {name: f"adapter.{name}" for name in AdapterConfig.model_fields if name != "task_type"} | {
    name: f"train.{name}" for name in _TRAIN
}
# What all have in common, or what means nothing where all are looked at together.
_NOT_HERE = {"train.eval_every": "--eval-every", "train.save_every": "--save-every", "train.patience": "--patience"}


def resolve(
    path: Path | None, given: Mapping[str, Any], configurations: Path | None
) -> tuple[ResolvedConfig, dict[str, ResolvedConfig]]:
    """Returns (the run's configuration, that of each by name): the run's own with what each sets over it.

    `configurations` is a YAML file of names and settings; None: the grid. Raises ConfigError as `load_run_config`, and
    for settings that cannot differ.
    """
    base = load_run_config(path, given)
    for key, flag in _NOT_HERE.items():
        if getattr(base.config.train, key.partition(".")[2]) is not None:
            raise ConfigError(f"{key.partition('.')[2]} ({flag}) has no meaning with --together: leave it out.")
    if base.config.train.keep_frozen_mb:
        raise ConfigError("keep_frozen_mb is of one adapter's frozen layers and has no meaning with --together.")
    if base.config.adapter.task_type != "CAUSAL_LM":
        raise ConfigError(f"--together trains CAUSAL_LM only, not {base.config.adapter.task_type}.")
    entries = _grid(base.config.train.learning_rate) if configurations is None else _read(configurations)
    if len(entries) < 2:
        raise ConfigError(f"{configurations}: found {len(entries)} configurations; expected two or more.")
    found: dict[str, ResolvedConfig] = {}
    for name, (where, own) in entries.items():
        check_name(None, name)
        output = str(Path(base.config.output, EACH, name))
        each = load_run_config(path, {**given, **own, "output": output}, caller=where)
        origins = {key: base.origins[key] if key in given else origin for key, origin in each.origins.items()}
        found[name] = ResolvedConfig(each.config, origins | dict.fromkeys(own, where))
    return base, found


def _grid(rate: float | None) -> dict[str, tuple[str, dict[str, Any]]]:
    rates = RATES if rate is None else (rate / 2, 2 * rate)
    return {
        f"{target}-r{r}-{each:g}": (
            "grid",
            {"adapter.target_modules": target, "adapter.r": r, "train.learning_rate": each},
        )
        for target, r, each in product(TARGETS, RANKS, rates)
    }


def _read(file: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns name -> (where it stands, its settings by the run's keys)."""
    located = read_mapping(file)
    entries: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, own in located.values.items():
        where = f"{file}:{located.lines[name,]}"
        if not isinstance(own, dict):
            raise ConfigError(
                f"{where}: {name} is {kind(own)}; expected settings, such as {name}: {{r: 8, learning_rate: 5e-4}}."
            )
        for key in own:
            if key not in _KEYS:
                raise ConfigError(f"{file}:{located.lines[name, key]}: {name}: {_unknown(key)}")
        entries[name] = where, {_KEYS[key]: value for key, value in own.items()}
    return entries


def _unknown(key: str) -> str:
    near = get_close_matches(key, _KEYS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"what may differ: {', '.join(_KEYS)}."
    return f"{key!r} cannot differ between configurations; {hint}"
