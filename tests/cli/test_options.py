"""Where an adapter is found, which base model it names, and how reports read."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from loratune.cli.options import adapter_folder, base_model_of, show_report
from loratune.cli.train import KEYS, targets_of
from loratune.errors import AdapterError, ConfigError
from loratune.train.config import flag_of


def adapter(folder: Path, content: str = '{"base_model_name_or_path": "google/gemma-3-270m"}') -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(content)
    return folder


def test_a_run_stands_for_its_adapter(tmp_path: Path) -> None:
    inner = adapter(tmp_path / "run" / "adapter")
    assert adapter_folder(tmp_path / "run") == adapter_folder(inner) == inner
    assert base_model_of(inner, None) == "google/gemma-3-270m"
    assert base_model_of(inner, "other") == "other"


def test_what_is_no_adapter_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no adapter: found neither adapter/adapter_config.json nor adapter_c"):
        adapter_folder(tmp_path)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has checkpoints but no adapter yet"):
        adapter_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_damaged_record_is_one_clean_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        base_model_of(adapter(tmp_path / "a", content), None)


def test_an_adapter_without_base_model_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names no base model. Give it with --model"):
        base_model_of(adapter(tmp_path / "a", "{}"), None)


GOLDEN_REPORT = """\
an adapter

 parameters   368,640
 bytes        -
 norm         0.01235
 targets      q_proj, v_proj
 [odd]        yes


config

 r   8


sites

 path      rank
 ──────────────
 a.[b].q      8
 a.v         16

"""


def test_a_report_reads_well_and_is_never_markup() -> None:
    report = {
        "parameters": 368640,
        "config": {"r": 8},
        "bytes": None,
        "norm": 0.0123456,
        "targets": ["q_proj", "v_proj"],
        "[odd]": True,
        "sites": [{"path": "a.[b].q", "rank": 8}, {"path": "a.v", "rank": 16}],
    }
    console = Console(file=io.StringIO(), width=60, color_system=None)
    show_report(console, "an adapter", report)
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines == GOLDEN_REPORT.splitlines()


def test_every_option_of_train_names_its_own_flag() -> None:
    assert {flag_of(key) for key in KEYS.values()} == {"--" + name.replace("_", "-") for name in KEYS}


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        ("deep", "deep"),
        ("all-linear", "all-linear"),
    ],
)
def test_targets_on_the_command_line(text: str, targets: str | list[str]) -> None:
    assert targets_of(text) == targets
