"""What a user gets wrong, through the command line: one clear message each, exit code 2, and nothing written."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune import api
from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.cli.main import run
from loratune.errors import AdapterError, TrainingError
from tiny_run import copy_rows, save_model, tiny_llama, tokenizer, tree, write_rows


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's working directory: a model in `model`, rows in `rows.jsonl`; the hub is not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", copy_rows(24))
    return tmp_path


def train(*changes: str) -> int:
    """`loratune train` with good settings, and what is changed in them."""
    settings = {"--model": "model", "--data": "rows.jsonl", "--output": "run", "--max-steps": "1"}
    given = dict(zip(changes[::2], changes[1::2], strict=True))
    return run(["train", *(word for pair in (settings | given).items() for word in pair)])


def refused(capsys: pytest.CaptureFixture[str], *changes: str) -> str:
    """Checks that a command is refused and leaves no trace; returns its message."""
    capsys.readouterr()
    before = tree(Path())
    assert train(*changes) == 2
    assert tree(Path()) == before
    out, err = capsys.readouterr()
    assert "Traceback" not in err + out
    messages = re.findall(r"^error: ", err, re.MULTILINE)
    assert len(messages) == 1, err
    return err[err.index("error: ") + 7 :].strip()


def test_the_settings_without_a_change_are_good(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "error" not in capsys.readouterr().err


SETTINGS = {
    "an unknown model": (
        ("--model", "modle"),
        "cannot find the model 'modle': there is no such folder or file",
        "the hub was not asked (HF_HUB_OFFLINE is set)",
        "Nearest: model.",
    ),
    "a missing data file": (
        ("--data", "rowz.jsonl"),
        "cannot read the data file rowz.jsonl: No such file or directory",
        "Check the path.",
    ),
    "a wrong target": (("--target-modules", "q_prj,v_proj"), "q_prj", "q_proj"),
    "no rank": (("--r", "0"), "--r: adapter.r is 0; expected a whole number, at least 1."),
    "a negative dropout": (
        ("--lora-dropout", "-0.1"),
        "--lora-dropout: adapter.lora_dropout is -0.1; expected a number from 0 up to, not including, 1.",
    ),
    "no alpha": (("--lora-alpha", "0"), "--lora-alpha: adapter.lora_alpha is 0.0; expected a number above 0."),
    "an unknown preset": (("--preset", "quick"), "--preset: adapter.preset is 'quick'; expected one of fast, quality"),
    "an output directory that exists": (
        ("--output", "model"),
        "the output directory model exists already. Choose another name, or continue it: loratune train --resume model",
    ),
    "no number": (("--r", "eight"), "Invalid value for '--r'", "See 'loratune train --help'."),
    "an unknown option": (("--rank", "8"), "No such option: --rank", "See 'loratune train --help'."),
}


@pytest.mark.parametrize(("changes", "expected"), [(c, e) for c, *e in SETTINGS.values()], ids=list(SETTINGS))
def test_a_wrong_setting(
    folder: Path, capsys: pytest.CaptureFixture[str], changes: tuple[str, ...], expected: list[str]
) -> None:
    message = refused(capsys, *changes)
    assert all(part in message for part in expected), message


def row(**values: str) -> bytes:
    return json.dumps(values).encode()


GOOD = row(prompt="1 =", completion=" 1")
DATA = {
    "an empty file": (b"", "bad.jsonl: the file has no rows; expected one JSON object a line."),
    "blank lines": (b"\n \n", "bad.jsonl: the file has no rows"),
    "nothing to learn": (GOOD + b"\n" + row(prompt="2 =", completion=""), "bad.jsonl:2: completion is empty"),
    "white space to learn": (GOOD + b"\n" + row(prompt="2 =", completion="  \n"), "bad.jsonl:2: completion is empty"),
    "a row longer than the model": (
        GOOD + b"\n\n" + row(prompt="1 2 3 " * 40, completion=" 1"),
        "bad.jsonl:3: the row is",
        "tokens long, the limit is 96. Rows are never cut: shorten or split it.",
    ),
    "Latin-1": (GOOD + b"\n" + row(prompt="caf_", completion="1").replace(b"_", b"\xe9"), "bad.jsonl:2: byte 16"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "bad.jsonl:1: byte 1 of the line, 0xff, is not UTF-8"),
    "half a row": (GOOD + b"\n" + GOOD[:20], "bad.jsonl:2: not valid JSON at column"),
    "a wrong key": (row(promt="1 =", completion=" 1"), "bad.jsonl:1: ", "Did you mean 'prompt' by 'promt'?"),
    "a control token": (row(prompt="1 </s>", completion=" 1"), "bad.jsonl:1: the text spells out the special token"),
    "one row": (GOOD, "bad.jsonl:1: ", "held out for evaluation; add rows"),
    "two rows": (GOOD + b"\n" + row(prompt="2 =", completion=" 2"), "bad.jsonl:1: 2 rows are too few to hold out two"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), [(c, e) for c, *e in DATA.values()], ids=list(DATA))
def test_bad_data(folder: Path, capsys: pytest.CaptureFixture[str], content: bytes, expected: list[str]) -> None:
    (folder / "bad.jsonl").write_bytes(content)
    message = refused(capsys, "--data", "bad.jsonl")
    assert all(part in message for part in expected), message


def test_a_validation_file_of_one_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.jsonl").write_bytes(GOOD)
    message = refused(capsys, "--validation", "bad.jsonl")
    assert message == "bad.jsonl holds one row; an evaluation with an interval needs two. Add rows."


def nan_in_the_base(model: Path) -> None:
    tensors = load_file(str(model / "model.safetensors"))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, str(model / "model.safetensors"), {"format": "pt"})


def larger_tokenizer(model: Path) -> None:
    larger = tokenizer()
    larger.add_tokens(["<new>", "<newer>"])
    larger.save_pretrained(model)


def half_the_weights(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            nan_in_the_base,
            "the base weight model.layers.1.mlp.up_proj.weight holds 1 values of 1,536 that are NaN or infinite.",
        ),
        (larger_tokenizer, "without a row: '<new>', '<newer>'."),
        (half_the_weights, "cannot load the model in model"),
        (no_tokenizer, "model holds no tokenizer"),
    ],
)
def test_a_bad_model(
    folder: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], expected: str
) -> None:
    spoil(folder / "model")
    message = refused(capsys)
    assert expected in message, message


def test_a_task_that_the_rows_do_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text(
        "model: model\ndata: {train: rows.jsonl}\noutput: run\nadapter: {task_type: SEQ_CLS}\n"
    )
    before = tree(folder)
    assert run(["train", "run.yaml"]) == 2
    message = "rows.jsonl:1: a prompt_completion row does not fit SEQ_CLS, which takes classification or pair rows."
    assert message in capsys.readouterr().err
    assert tree(folder) == before


def test_a_wrong_key_in_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text("model: model\ndata:\n  train: rows.jsonl\noutput: run\nadapter:\n  rank: 8\n")
    assert run(["train", "run.yaml"]) == 2
    assert "run.yaml:6: unknown key 'rank' in adapter" in capsys.readouterr().err


def test_a_run_that_is_none_cannot_be_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--resume", "nowhere"]) == 2
    assert run(["train", "--resume", "model"]) == 2
    first, second = re.findall("error: (.*)", capsys.readouterr().err)
    assert "nowhere is not a run directory" in first and "model is not a run: run.yaml is missing" in second


def test_the_library_without_an_adapter(folder: Path) -> None:
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM has no active adapter.*attached = loratune\.attach"):
        api.train(tiny_llama(), tokenizer(), data="rows.jsonl", output="run")
    assert not (folder / "run").exists()


def test_a_base_with_nan_given_to_the_library(folder: Path) -> None:
    """`load_model` would have refused it; here the first evaluation stops, before any step."""
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    attached = attach(model, LoraConfig())
    before = {name: parameter.detach().clone() for name, parameter in attached.adapter.named_parameters()}
    with pytest.raises(TrainingError, match=r"step 0: the held-out loss of . of . rows.*rows\.jsonl:.*may hold NaN"):
        api.train(model, tokenizer(), data="rows.jsonl", output="run")
    assert all(torch.equal(parameter, before[name]) for name, parameter in attached.adapter.named_parameters())
