"""The run's configuration: exact messages with file and line, precedence, origins, and a dump that reads back."""

import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loratune.adapter.config import BIASES, TASK_TYPES, LoraConfig
from loratune.adapter.roles import PRESETS
from loratune.data.encode import LONG, TRAIN_ON
from loratune.data.formats import FORMATS
from loratune.errors import ConfigError
from loratune.train.config import (
    SECTIONS,
    AdapterConfig,
    Bias,
    Format,
    Long,
    Preset,
    RunConfig,
    TaskType,
    TrainOn,
    adapter_overrides,
    dump,
    load_run_config,
)

MINIMAL = {"model": "m", "data.train": "rows.jsonl", "output": "runs/x"}
BASE = "model: m\ndata: {train: rows.jsonl}\noutput: runs/x\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write_file(content: str | bytes) -> Path:
        path = Path("run.yaml")
        path.write_bytes(content if isinstance(content, bytes) else textwrap.dedent(content).encode())
        return path

    return write_file


def refusal(path: Path | None, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides or {})
    return str(caught.value)


def test_defaults_are_the_basic_settings() -> None:
    config = load_run_config(None, MINIMAL).config
    assert config.adapter.to_lora_config() == LoraConfig.preset("fast", task_type="CAUSAL_LM")
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.lora_dropout) == (8, 16, 0.05)
    assert (config.train.batch_size, config.train.epochs, config.train.keep) == (8, 1.0, 2)


def test_flags_win_over_the_file_and_the_file_over_defaults(write: Any) -> None:
    path = write(BASE + "train:\n  epochs: 3\n  seed: 4\n")
    resolved = load_run_config(path, {"train.seed": 5, "train.keep": None})
    assert (resolved.config.train.epochs, resolved.config.train.seed, resolved.config.train.keep) == (3.0, 5, 2)
    expected = {"train.epochs": "run.yaml:5", "train.seed": "--seed", "train.keep": "default", "model": "run.yaml:1"}
    assert {key: resolved.origins[key] for key in expected} == expected
    assert resolved.origins["data.train"] == "run.yaml:2"


def test_every_leaf_has_an_origin() -> None:
    origins = load_run_config(None, MINIMAL).origins
    leaves = {f"{name}.{key}" for name, model in SECTIONS.items() for key in model.model_fields}
    assert set(origins) == leaves | (set(RunConfig.model_fields) - set(SECTIONS))


def test_a_rank_of_ones_own_doubles_into_alpha_and_says_so() -> None:
    resolved = load_run_config(None, {**MINIMAL, "adapter.preset": "quality", "adapter.r": 4})
    assert (resolved.config.adapter.r, resolved.config.adapter.lora_alpha) == (4, 8)
    assert resolved.origins["adapter.r"] == "--r"
    assert resolved.origins["adapter.lora_alpha"] == "2 r"
    assert resolved.origins["adapter.target_modules"] == "preset quality"


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(),
        LoraConfig(r=3, lora_alpha=5, target_modules=["a", "b"], rank_pattern={"a": 2}, layers_to_transform=[1]),
        LoraConfig.preset("deep", use_rslora=True, init_lora_weights="gaussian", modules_to_save=["lm_head"]),
        LoraConfig(target_modules=r".*\.q", exclude_modules="x", bias="all", task_type="SEQ_CLS", lora_dropout=0.0),
    ],
)
def test_an_attached_adapter_is_written_down_whole(lora: LoraConfig) -> None:
    resolved = load_run_config(None, {**MINIMAL, **adapter_overrides(lora)}, caller="loratune.train")
    written = resolved.config.adapter.to_lora_config()
    assert written == lora.with_(task_type=lora.task_type or "CAUSAL_LM")
    assert resolved.origins["adapter.r"] == "loratune.train"


def test_arguments_of_a_function_are_not_called_flags() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(None, {**MINIMAL, "train.epoch": 2}, caller="loratune.train")
    assert str(caught.value) == "loratune.train: unknown key 'epoch' in train; did you mean 'epochs'?"


UNKNOWN_TRAIN_KEYS = (
    "epochs, max_steps, batch_size, micro_batch_tokens, recompute, dtype, keep_frozen_mb, learning_rate, "
    "warmup_steps, max_grad_norm, weight_decay, lr_ratio, adam_beta1, adam_beta2, adam_epsilon, seed, eval_every, "
    "save_every, keep, patience, allow_uneven"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "train:\n  seed: 1\n  seeds: 2\n  epochs: 1\n  learnig_rate: 1\n",
            "run.yaml:6: unknown key 'seeds' in train; did you mean 'seed'?\n"
            "run.yaml:8: unknown key 'learnig_rate' in train; did you mean 'learning_rate'?",
        ),
        ("train: {lr: 1}\n", f"run.yaml:4: unknown key 'lr' in train; known keys: {UNKNOWN_TRAIN_KEYS}."),
        ("epochs: 2\n", "run.yaml:4: unknown key 'epochs' at the top level; it belongs under 'train'."),
        ("adaptor: {r: 8}\n", "run.yaml:4: unknown key 'adaptor' at the top level; did you mean 'adapter'?"),
        ("train.seed: 2\n", "run.yaml:4: unknown key 'train.seed' at the top level; did you mean 'train'?"),
        ("train: 3\n", f"run.yaml:4: train is 3; expected a mapping of settings ({UNKNOWN_TRAIN_KEYS})."),
        ("train: {epochs: 0}\n", "run.yaml:4: train.epochs is 0; expected a number above 0."),
        ("train: {epochs: 1e999}\n", "run.yaml:4: train.epochs is inf; expected a number above 0."),
        ("train: {epochs: .nan}\n", "run.yaml:4: train.epochs is '.nan'; expected a number above 0."),
        ("train: {epochs: true}\n", "run.yaml:4: train.epochs is true; expected a number above 0."),
        ("train: {epochs: null}\n", "run.yaml:4: train.epochs is nothing (null); expected a number above 0."),
        (
            'train:\n  batch_size: "8"\n',
            "run.yaml:5: train.batch_size is '8'; expected a whole number, at least 1.",
        ),
        ("train: {batch_size: 1.5}\n", "run.yaml:4: train.batch_size is 1.5; expected a whole number, at least 1."),
        ("train: {seed: -1}\n", "run.yaml:4: train.seed is -1; expected a whole number from 0 to 4294967295."),
        (
            "train: {learning_rate: 2}\n",
            "run.yaml:4: train.learning_rate is 2; expected a number above 0 and at most 1, such as 5e-4.",
        ),
        ("adapter: {bias: both}\n", "run.yaml:4: adapter.bias is 'both'; expected one of none, all, lora_only."),
        ("adapter: {r: 0}\n", "run.yaml:4: adapter.r is 0; expected a whole number, at least 1."),
        (
            "adapter: {lora_dropout: 1}\n",
            "run.yaml:4: adapter.lora_dropout is 1; expected a number from 0 up to, not including, 1.",
        ),
        (
            "adapter: {preset: fasst}\n",
            "run.yaml:4: adapter.preset is 'fasst'; expected one of fast, quality, deep, expert.",
        ),
        (
            "adapter: {target_modules: [q_proj, 3]}\n",
            "run.yaml:4: adapter.target_modules is the list ['q_proj', 3]; expected a list of names, a regular "
            'expression, "all-linear" or a preset.',
        ),
        ("model: other\n", "run.yaml:4: key 'model' is given twice, first on line 1."),
        ("train: {seed: *a}\n", "run.yaml:4: not valid YAML: alias *a is not allowed here; write the value out."),
        (
            "train: !!python/object:os.system {}\n",
            "run.yaml:4: not valid YAML: tag 'tag:yaml.org,2002:python/object:os.system' is not allowed here; "
            "write the value alone.",
        ),
        ("? [a, b]\n: 3\n", "run.yaml:4: found a list or mapping as a key, expected a name."),
        ("train: {seed: 1\n", "run.yaml:5: not valid YAML: expected ',' or '}', but got '<stream end>'."),
        ("x: y: z\n", "run.yaml:4: not valid YAML: mapping values are not allowed here."),
        ("x: \x07\n", "run.yaml:4: not valid YAML: character '\\x07' is not allowed."),
    ],
)
def test_refused_with_file_and_line(write: Any, content: str, message: str) -> None:
    assert refusal(write(BASE + content)) == message


def test_flags_are_refused_under_their_own_name() -> None:
    overrides = {**MINIMAL, "train.batch_size": -2, "data.train": ""}
    assert refusal(None, overrides) == (
        "--data: data.train is ''; expected text (in quotes if it looks like a number), or a mapping of files to "
        "weights of at least 1.\n"
        "--batch-size: train.batch_size is -2; expected a whole number, at least 1."
    )


def test_missing_values_say_what_to_give(write: Any) -> None:
    assert refusal(write("data:\n")) == (
        "no base model is set: give 'model: FOLDER, HUB ID or GGUF FILE' in run.yaml, or --model.\n"
        "no training data is set: give 'train: ROWS.jsonl' under data in run.yaml, or --data.\n"
        "no output directory is set: give 'output: runs/NAME' in run.yaml, or --output."
    )
    assert refusal(None, {"model": "m", "data.train": "d"}).endswith("in a YAML file, or --output.")


def test_what_only_the_adapter_can_judge_names_file_and_section(write: Any) -> None:
    path = write(BASE + "adapter: {rank_pattern: {'(': 4}}\n")
    assert refusal(path).startswith("run.yaml: adapter: pattern '(' is not a regular expression")


def test_files_that_cannot_be_read(write: Any, tmp_path: Path) -> None:
    assert refusal(Path("nowhere.yaml")) == (
        "cannot read nowhere.yaml: No such file or directory. Give the path of a run's YAML file."
    )
    assert refusal(tmp_path).startswith(f"cannot read {tmp_path}: Is a directory.")
    assert refusal(write(b"model: m\n# \xff\n")) == "run.yaml:2: byte 0xff is not UTF-8. Save the file as UTF-8."
    assert refusal(write("- a\n")) == (
        "run.yaml:1: found the list ['a'], expected settings such as 'model: google/gemma-3-270m'."
    )
    assert refusal(write("[" * 5000)) == (
        "run.yaml: nested too deeply; expected sections of settings, two levels deep."
    )


def test_values_are_read_as_people_mean_them(write: Any) -> None:
    path = write(b"\xef\xbb\xbf" + BASE.encode() + b"train: {learning_rate: 5e-4, seed: 010}\nadapter: {bias: none}\n")
    config = load_run_config(path, {"output": "no"}).config
    assert (config.train.learning_rate, config.train.seed, config.adapter.bias) == (5e-4, 10, "none")
    path = write("model: 2024-01-01\noutput: no\ndata: {train: on}\n")
    config = load_run_config(path, {}).config
    assert (config.model, config.output, config.data.train) == ("2024-01-01", "no", "on")


def test_an_empty_section_is_its_defaults(write: Any) -> None:
    config = load_run_config(write(BASE + "train:\n  # epochs: 3\nadapter: {}\n"), {}).config
    assert config.train.epochs == 1.0


GOLDEN_DUMP = """\
model: google/gemma-3-270m  # run.yaml:1
data:
  train: "Мої дані.jsonl"  # --data
  validation: null  # default
  format: null  # default
  columns: null  # default
  reject: false  # default
  train_on: completion  # default
  long: stop  # default
  cache: true  # default
adapter:
  preset: quality  # run.yaml:2
  r: 16  # preset quality
  lora_alpha: 32  # preset quality
  target_modules: [q_proj, v_proj]  # --target-modules
  exclude_modules: null  # default
  lora_dropout: 0.05  # preset quality
  bias: none  # default
  modules_to_save: null  # default
  task_type: CAUSAL_LM  # default
  use_rslora: false  # default
  init_lora_weights: true  # default
  rank_pattern: {q_proj: 4, "layers.[01]": 2}  # run.yaml:2
  alpha_pattern: null  # default
  layers_to_transform: [0, 1]  # run.yaml:2
  layers_pattern: null  # default
  use_dora: false  # default
  lora_bias: false  # default
  target_parameters: null  # default
  trainable_token_indices: null  # default
  ensure_weight_tying: false  # default
train:
  epochs: 1.0  # default
  max_steps: null  # default
  batch_size: 8  # default
  micro_batch_tokens: 2048  # default
  recompute: false  # default
  dtype: null  # default
  keep_frozen_mb: 0  # default
  learning_rate: 0.0005  # run.yaml:3
  warmup_steps: null  # default
  max_grad_norm: 1.0  # default
  weight_decay: 0.0  # default
  lr_ratio: 1.0  # default
  adam_beta1: 0.9  # default
  adam_beta2: 0.999  # default
  adam_epsilon: 1.0e-08  # default
  seed: 0  # default
  eval_every: null  # default
  save_every: null  # default
  keep: 2  # default
  patience: null  # default
  allow_uneven: false  # default
output: "yes"  # run.yaml:4
"""


def test_the_dump_holds_every_value_with_its_origin(write: Any) -> None:
    path = write(
        "model: google/gemma-3-270m\n"
        'adapter: {preset: quality, rank_pattern: {q_proj: 4, "layers.[01]": 2}, layers_to_transform: [0, 1]}\n'
        "train: {learning_rate: 5e-4}\n"
        "output: yes\n"
    )
    overrides = {"data.train": "Мої дані.jsonl", "adapter.target_modules": ["q_proj", "v_proj"]}
    assert dump(load_run_config(path, overrides)) == GOLDEN_DUMP


text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)
number = st.floats(1e-12, 1e6)
OVERRIDES = st.fixed_dictionaries(
    {
        "model": text,
        "data.train": text | st.dictionaries(text, st.floats(1, 1e6), min_size=1, max_size=3),
        "output": text,
    },
    optional={
        "data.columns": st.dictionaries(text, text, max_size=2),
        "data.reject": st.booleans(),
        "adapter.target_modules": st.lists(text, min_size=1, max_size=3),
        "adapter.alpha_pattern": st.dictionaries(st.from_regex(r"[a-z_.]{1,9}", fullmatch=True), number),
        "adapter.r": st.integers(1, 512),
        "train.epochs": number,
        "train.adam_epsilon": number,
        "train.seed": st.integers(0, 2**32 - 1),
        "train.allow_uneven": st.booleans(),
    },
)


@given(OVERRIDES)
def test_the_dump_reads_back_to_the_same_values(tmp_path_factory: pytest.TempPathFactory, overrides: Any) -> None:
    resolved = load_run_config(None, overrides)
    path = tmp_path_factory.mktemp("dump") / "run.yaml"
    path.write_text(dump(resolved), encoding="utf-8", newline="")
    again = load_run_config(path, {})
    assert again.config == resolved.config
    # Other tools read YAML 1.1 and must find the same.
    assert yaml.safe_load(dump(resolved))["train"] == resolved.config.train.model_dump()
    assert yaml.safe_load(dump(resolved))["model"] == resolved.config.model


@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_one_clean_error(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "run.yaml"
    path.write_text(content, encoding="utf-8", errors="replace")
    assert refusal(path)


def test_the_adapter_section_knows_every_setting_of_the_adapter() -> None:
    bookkeeping = {"base_model_name_or_path", "revision"}
    assert set(AdapterConfig.model_fields) == {item.name for item in fields(LoraConfig)} - bookkeeping | {"preset"}
    assert set(get_args(Preset)) == set(PRESETS)
    assert set(get_args(Bias)) == set(BIASES)
    assert set(get_args(TaskType)) == set(TASK_TYPES)


def test_the_data_section_knows_the_formats_and_choices_of_the_data() -> None:
    assert set(get_args(Format)) <= set(FORMATS)
    assert get_args(TrainOn) == TRAIN_ON
    assert get_args(Long) == LONG


def test_several_sources_have_weights(write: Any) -> None:
    sources = "model: m\noutput: o\ndata:\n  train:\n    chats.jsonl: 2\n    replay.jsonl#500: 1.5\n"
    data = load_run_config(write(sources), {}).config.data
    assert data.train == {"chats.jsonl": 2, "replay.jsonl#500": 1.5} and data.specs == list(data.train)
    expected = "text (in quotes if it looks like a number), or a mapping of files to weights of at least 1."
    for bad, found in (("{a.jsonl: 0.5}", "a mapping"), ("{}", "a mapping"), ("[a.jsonl]", "a list")):
        message = refusal(write(f"model: m\noutput: o\ndata:\n  train: {bad}\n"))
        assert message.startswith("run.yaml:4: data.train is ") and message.endswith(f"expected {expected}"), found


def test_the_configuration_cannot_be_changed_afterwards() -> None:
    config = load_run_config(None, MINIMAL).config
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 2.0  # pyright: ignore[reportAttributeAccessIssue]
