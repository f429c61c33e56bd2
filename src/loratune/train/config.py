"""The configuration of a run: one typed model, read from YAML and flags, with the origin of every value.

Every key is listed here with its default, range and unit; a key that is not here is refused with the nearest one.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loratune.errors import ConfigError
from loratune.train.rungs import on_rung
from loratune.train.yaml_lines import KeyPath, kind, read_mapping

if TYPE_CHECKING:
    from loratune.adapter.config import LoraConfig

Preset = Literal["fast", "quality", "deep", "expert"]
Format = Literal[
    "prompt_completion", "messages", "text", "sharegpt", "alpaca",
    "classification", "tagging", "question", "pair", "source_target", "segmentation",
]  # fmt: skip
TrainOn = Literal["completion", "all", "last"]
Long = Literal["stop", "drop", "split"]
Bias = Literal["none", "all", "lora_only"]
Dtype = Literal["float32", "stored"]
TaskType = Literal[
    "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEGMENTATION",
]  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What a message says was expected; stands beside the constraint it puts into words."""

    text: str


Count = Annotated[int, Field(ge=1), Expected("a whole number, at least 1")]
CountOrZero = Annotated[int, Field(ge=0), Expected("a whole number, at least 0")]
Seed = Annotated[int, Field(ge=0, lt=2**32), Expected("a whole number from 0 to 4294967295")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Expected("a number above 0")]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False), Expected("a number, at least 0")]
LearningRate = Annotated[float, Field(gt=0, le=1), Expected("a number above 0 and at most 1, such as 5e-4")]
BelowOne = Annotated[float, Field(ge=0, lt=1), Expected("a number from 0 up to, not including, 1")]
Weight = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1), Expected("text (in quotes if it looks like a number)")]
Switch = Annotated[bool, Expected("true or false")]
Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), Expected("a list of names")]
NamesOrText = Annotated[
    Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]],
    Expected('a list of names, a regular expression, "all-linear" or a preset'),
]

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Rung = Annotated[str, Field(pattern=r"^(fast|quality|deep|expert)(:[1-9]\d*)?$")]
Rungs = Annotated[
    list[Rung],
    Field(min_length=2),
    Expected("two or more presets, each with a rank if not its own, such as fast, fast:16, expert"),
]
Prices = Annotated[
    dict[Literal["doubling", "second", "gb"], Annotated[float, Field(ge=0, allow_inf_nan=False)]],
    Expected("a mapping of doubling, second or gb to numbers, at least 0"),
]
_DATA_EXPECTED = Expected("text (in quotes if it looks like a number), or a mapping of files to weights of at least 1")
_TOKENS_EXPECTED = Expected("a list of token ids, or a mapping of embeddings to such lists")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataConfig(_Section):
    """Where the rows are, and what of them is trained.

    `train` is a file, FILE#500 (a sample), a folder, hub:NAME, or a mapping of such to weights: how often an epoch
    meets each row. Without `validation` (or a folder's validation files), 5% (at most 500 rows) are held out. `format`
    None means: look; `columns` says which key of a row is which column. With `reject`, rows that cannot be used are
    left out and listed in ledger.jsonl; without, they stop the run. `train_on`: completions and assistant turns, all
    tokens, or the last turn. `long`: rows beyond the model's limit stop the run, are dropped, or, texts, are split.
    `cache` keeps the tokens of data over 1 MB for the next start.
    """

    train: Annotated[Text | Annotated[dict[Text, Weight], Field(min_length=1)], _DATA_EXPECTED]
    validation: Text | None = None
    format: Annotated[Format, Expected(f"one of {', '.join(get_args(Format))}")] | None = None
    columns: Annotated[dict[Text, Text], Expected("a mapping of columns to keys, such as {prompt: q}")] | None = None
    reject: Switch = False
    train_on: Annotated[TrainOn, Expected(f"one of {', '.join(get_args(TrainOn))}")] = "completion"
    long: Annotated[Long, Expected(f"one of {', '.join(get_args(Long))}")] = "stop"
    cache: Switch = True

    @property
    def specs(self) -> list[str]:
        """What `train` names."""
        return [self.train] if isinstance(self.train, str) else list(self.train)


class AdapterConfig(_Section):
    """What is adapted and how: a preset, and whatever differs from it. None means the preset's value.

    Field names are those of LoraConfig, which see.
    """

    preset: Annotated[Preset, Expected("one of fast, quality, deep, expert")] | None = None
    r: Count | None = None
    lora_alpha: Positive | None = None
    target_modules: NamesOrText | None = None
    exclude_modules: NamesOrText | None = None
    lora_dropout: BelowOne | None = None
    bias: Annotated[Bias, Expected("one of none, all, lora_only")] | None = None
    modules_to_save: Names | None = None
    task_type: Annotated[TaskType, Expected(f"one of {', '.join(get_args(TaskType))}")] = "CAUSAL_LM"
    use_rslora: Switch | None = None
    init_lora_weights: Annotated[bool | str, Expected('true, false or "gaussian"')] | None = None
    rank_pattern: Annotated[dict[str, Count], Expected("a mapping of module names to ranks")] | None = None
    alpha_pattern: Annotated[dict[str, Positive], Expected("a mapping of module names to alphas")] | None = None
    layers_to_transform: Annotated[list[CountOrZero], Expected("a list of layer numbers")] | None = None
    layers_pattern: Names | None = None
    use_dora: Switch | None = None
    lora_bias: Switch | None = None
    target_parameters: Names | None = None
    trainable_token_indices: Annotated[TokenIds | dict[str, TokenIds], _TOKENS_EXPECTED] | None = None
    ensure_weight_tying: Switch | None = None

    def to_lora_config(self) -> "LoraConfig":
        """Returns the adapter's settings: the preset's (without one, `fast`), with every given field over them.

        Raises ConfigError for what only LoraConfig can judge, such as a pattern that is not a regular expression.
        """
        from loratune.adapter.config import LoraConfig

        given = self.model_dump(exclude_none=True, exclude={"preset"})
        if "lora_alpha" in given:
            given["lora_alpha"] = _whole(given["lora_alpha"])
        return LoraConfig.preset(self.preset or "fast", **given)


class TrainConfig(_Section):
    """How long, how fast and how often.

    `batch_size` is documents per optimizer step; `micro_batch_tokens` changes memory only, never the result beyond
    rounding. `recompute` halves what is kept for the backward pass, for about a seventh more time. `dtype`: the base's
    weights are float32 in memory, or "stored", as in its files: half of that for bfloat16, and computed with as float32
    on a CPU, for 0 to 14% more time (None: float32 on a CPU, as stored elsewhere). `keep_frozen_mb`: megabytes
    in which to keep, from the first epoch on, what the layers below the first adapted one (`layers_to_transform`) make
    of each row; 0: it is computed each time. `learning_rate` None: 5e-4 up to 4e9 parameters, 3e-4 above.
    `warmup_steps` None: 5% of the steps, at least 1. `lr_ratio` multiplies the rate of B (LoRA+). `max_steps` ends the
    run early; `keep` is how many checkpoints stay; `patience` ends a run after so many evaluations without a new best
    (None: the whole run is done, and the best is kept all the same); `allow_uneven` lets a target that exists in some
    layers only be trained.
    """

    epochs: Positive = 1.0
    max_steps: Count | None = None
    batch_size: Count = 8
    micro_batch_tokens: Count = 2048
    recompute: Switch = False
    dtype: Annotated[Dtype, Expected("float32 or stored")] | None = None
    keep_frozen_mb: CountOrZero = 0
    learning_rate: LearningRate | None = None
    warmup_steps: CountOrZero | None = None
    max_grad_norm: Positive = 1.0
    weight_decay: PositiveOrZero = 0.0
    lr_ratio: Positive = 1.0
    adam_beta1: BelowOne = 0.9
    adam_beta2: BelowOne = 0.999
    adam_epsilon: Positive = 1e-8
    seed: Seed = 0
    eval_every: Count | None = None
    save_every: Count | None = None
    keep: Count = 2
    patience: Count | None = None
    allow_uneven: Switch = False


class LadderConfig(_Section):
    """Adapters from the basic to the richest, climbed only as far as the held-out rows show that it pays.

    A rung is a preset ("quality"), or a preset with another rank ("quality:32"; lora_alpha = 2 r). `price`: by how many
    nats per label token a climb must lower the held-out loss for each doubling of the trainable parameters, each
    second more per step and each gigabyte (gb) more of memory; without one, any gain that is real will do.
    """

    rungs: Rungs = ["fast", "quality", "expert"]
    price: Prices = {}


class RunConfig(_Section):
    """One run: base model, data, adapter, training and the directory that everything is written to.

    With `ladder`, the adapter begins at the first rung and grows.
    """

    model: Text
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    ladder: LadderConfig | None = None
    output: Text


@dataclass(frozen=True)
class ResolvedConfig:
    """A run's configuration and where each value came from: "default", "preset NAME", "FILE:LINE" or "--flag"."""

    config: RunConfig
    origins: dict[str, str]


SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataConfig, "adapter": AdapterConfig, "train": TrainConfig, "ladder": LadderConfig,
}  # fmt: skip
_PRESET_FIELDS = frozenset(("r", "lora_alpha", "lora_dropout", "target_modules"))
_REQUIRED: dict[KeyPath, str] = {
    ("model",): "no base model is set: give 'model: FOLDER, HUB ID or GGUF FILE' in {file}, or --model.",
    ("data", "train"): "no training data is set: give 'train: ROWS.jsonl' under data in {file}, or --data.",
    ("output",): "no output directory is set: give 'output: runs/NAME' in {file}, or --output.",
}


def load_run_config(
    path: Path | None, overrides: Mapping[str, Any], *, caller: str | None = None, ladder: bool = False
) -> ResolvedConfig:
    """Reads a run's YAML file and puts `overrides`, by dotted key such as "train.epochs", over it; None is no override.

    The overrides are the command line's flags, or the arguments of the function named by `caller`. `ladder` makes it a
    ladder also where the file has no such section.
    Raises ConfigError, one line per problem, each with file and line or flag: unknown key (with the nearest one),
    wrong type or range, missing value, and whatever `yaml_lines.read_mapping` refuses.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    values, origins = _merged(path, given, caller, ladder)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        file = str(path) if path else "a YAML file"
        order = {key: index for index, key in enumerate(origins)}  # as in the file, then the flags
        items = sorted(error.errors(include_url=False), key=lambda item: order.get(_key_path(item), -1))
        problems = (_problem(item, values, origins, file) for item in items)
        raise ConfigError("\n".join(dict.fromkeys(problems))) from error
    return _with_adapter(config, {_dotted(key): origin for key, origin in origins.items()}, path)


def adapter_overrides(lora: "LoraConfig") -> dict[str, Any]:
    """Returns an adapter's settings as overrides, so that a run's file holds what was attached."""
    names = (name for name in AdapterConfig.model_fields if name != "preset")
    return {f"adapter.{name}": _listed(getattr(lora, name)) for name in names}


def _whole(value: float) -> float:
    """Returns 32 for 32.0, as presets and PEFT's files have it: a resumed run writes the bytes of an unbroken one."""
    return int(value) if value == int(value) else value


_FLAGS = {"data.train": "--data", "data.columns": "--column", "adapter.task_type": "--task"}


def flag_of(key: str) -> str:
    """Returns the command-line flag of a dotted key: "train.batch_size" is --batch-size, "data.train" is --data."""
    return _FLAGS.get(key) or "--" + key.rpartition(".")[2].replace("_", "-")


def dump(resolved: ResolvedConfig) -> str:
    """Returns the configuration as YAML that reads back to the same values, each with its origin as a comment."""
    lines: list[str] = []
    for name, value in resolved.config.model_dump().items():
        if name in SECTIONS:
            if value is None:
                continue
            lines.append(f"{name}:")
            lines += [_dump_line(f"  {key}", item, resolved.origins[f"{name}.{key}"]) for key, item in value.items()]
        else:
            lines.append(_dump_line(name, value, resolved.origins[name]))
    return "\n".join(lines) + "\n"


def _merged(
    path: Path | None, overrides: dict[str, Any], caller: str | None, ladder: bool
) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Returns the nested values of file and overrides, and the origin of each key that was given."""
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    if path is not None:
        located = read_mapping(path)
        values = located.values
        origins = {key: f"{path}:{line}" for key, line in located.lines.items() if len(key) <= 2}
    for section in SECTIONS:
        wanted = section != "ladder" or ladder or section in values
        if wanted and values.get(section) is None:  # `train:` with all its lines commented out
            values[section] = {}
    for dotted, value in overrides.items():
        *sections, key = dotted.split(".")
        target = values[sections[0]] if sections else values
        if isinstance(target, dict):  # a section that is not one is reported by the validation
            target[key] = value
            origins[(*sections, key)] = caller or flag_of(dotted)
    return values, origins


def _with_adapter(config: RunConfig, given: dict[str, str], path: Path | None) -> ResolvedConfig:
    """Writes the preset's values out, so that the saved run says what was used, and completes the origins."""
    try:
        adapter = config.adapter if config.ladder is None else on_rung(config.adapter, config.ladder.rungs[0])
        lora = adapter.to_lora_config()
    except ConfigError as error:
        raise ConfigError(f"{path or 'flags'}: adapter: {error}") from error
    preset = adapter.preset or "fast"
    filled = {key.removeprefix("adapter."): value for key, value in adapter_overrides(lora).items()}
    config = config.model_copy(update={"adapter": adapter.model_copy(update={"preset": preset, **filled})})
    from_preset = {f"adapter.{name}": f"preset {preset}" for name in _PRESET_FIELDS}
    if config.ladder is not None:
        from_preset |= {f"adapter.{name}": f"rung {config.ladder.rungs[0]}" for name in ("preset", "r", "lora_alpha")}
    if "adapter.r" in given:
        from_preset["adapter.lora_alpha"] = "2 r"  # LoraConfig.preset: alpha follows a rank that is not the preset's
    return ResolvedConfig(config, {key: given.get(key) or from_preset.get(key, "default") for key in _keys()})


def _listed(value: Any) -> Any:
    """Turns LoraConfig's frozen containers into those of YAML; an empty mapping is no setting."""
    if isinstance(value, tuple):
        return list(cast(tuple[Any, ...], value))
    if isinstance(value, Mapping):
        return {name: _listed(item) for name, item in cast(Mapping[str, Any], value).items()} or None
    return value


def _keys() -> Iterator[str]:
    for name in RunConfig.model_fields:
        yield from (f"{name}.{key}" for key in SECTIONS[name].model_fields) if name in SECTIONS else (name,)


def _dotted(key: KeyPath) -> str:
    return ".".join(key)


def _key_path(item: Any) -> KeyPath:
    """Returns the setting that one of pydantic's errors is about, without the place inside a list or a union."""
    return tuple(str(part) for part in item["loc"][: 2 if item["loc"][0] in SECTIONS else 1])


def _problem(item: Any, values: dict[str, Any], origins: dict[KeyPath, str], file: str) -> str:
    """Puts one of pydantic's errors into our words: where, what, found, expected."""
    key = _key_path(item)
    if item["type"] == "missing":
        return _REQUIRED[key].format(file=file)
    where = origins.get(key, file)
    if item["type"] == "extra_forbidden":
        return f"{where}: {_unknown_key(key)}"
    found: Any = values
    for part in key:
        found = found[part]
    return f"{where}: {_dotted(key)} is {kind(found)}; expected {_expected(key)}."


def _unknown_key(key: KeyPath) -> str:
    *sections, name = key
    fields = list((SECTIONS[sections[0]] if sections else RunConfig).model_fields)
    place = f"in {sections[0]}" if sections else "at the top level"
    if near := get_close_matches(name, fields, n=1):
        return f"unknown key {name!r} {place}; did you mean {near[0]!r}?"
    homes = [other for other, model in SECTIONS.items() if name in model.model_fields]
    if homes:
        return f"unknown key {name!r} {place}; it belongs under {homes[0]!r}."
    return f"unknown key {name!r} {place}; known keys: {', '.join(fields)}."


def _expected(key: KeyPath) -> str:
    """Returns the text of the `Expected` that stands in a field's type."""
    if key[0] in SECTIONS and len(key) == 1:
        return f"a mapping of settings ({', '.join(SECTIONS[key[0]].model_fields)})"
    field = (SECTIONS[key[0]] if len(key) == 2 else RunConfig).model_fields[key[-1]]
    return next(note.text for note in (*field.metadata, *_notes(field.annotation)) if isinstance(note, Expected))


def _notes(annotation: Any) -> Iterator[Any]:
    yield from getattr(annotation, "__metadata__", ())
    for inner in get_args(annotation):
        yield from _notes(inner)


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_WORDS_YAML_READS = frozenset(("null", "true", "false", "yes", "no", "on", "off"))  # the last four: YAML 1.1 only


def _dump_line(key: str, value: Any, origin: str) -> str:
    return f"{key}: {_dump_value(value)}  # {origin}"


def _dump_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump_value, cast(list[Any], value))) + "]"
    if isinstance(value, dict):
        items = cast(dict[str, Any], value).items()
        return "{" + ", ".join(f"{_dump_value(key)}: {_dump_value(item)}" for key, item in items) + "}"
    if isinstance(value, str):
        return value if _is_plain(value) else _quoted(value)
    text = json.dumps(value)
    return text if "." in text else text.replace("e-", ".0e-")  # YAML 1.1 takes 1e-08 for text, 1.0e-08 for a number


def _is_plain(text: str) -> bool:
    return _PLAIN.fullmatch(text) is not None and text.lower() not in _WORDS_YAML_READS


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")
