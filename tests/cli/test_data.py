"""`loratune data` as a user meets it: what it prints, at any width and without colours, its files and exit codes."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from data.toy_tokenizer import tokenizer_of
from loratune.cli import data_view, main
from loratune.data.encode import Encoder
from loratune.data.preview import Piece, preview, visible
from tiny_run import CONTEXT, save_model

HOSTILE = "\x1b]0;x\x07\x1b[2J \x9b31m \u202eevil [bold red]x[/] 日本語 👩\u200d👧 <script>"
CHAT = {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"ok\n{HOSTILE}"}]}
WIDE = {"messages": [{"role": "user", "content": "日本" * 60}, {"role": "assistant", "content": "語" * 90}]}
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> Path:
    """A base model whose weights are gone: only its tokenizer and its configuration may be read."""
    path = save_model(folder / "model")
    (path / "model.safetensors").unlink()
    return path


def write(name: str, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def drawn(*rows: Any, width: int, colour: bool, **options: Any) -> list[str]:
    """The lines of a preview in a terminal of this width, colours taken off."""
    found = preview(write("rows.jsonl", *rows), Encoder(tokenizer_of("chatml"), 4000), **options)
    file = io.StringIO()
    system = "256" if colour else None
    data_view.show_preview(Console(file=file, width=width, color_system=system, force_terminal=colour), found)
    assert colour == ("\x1b[" in file.getvalue())
    return COLOURS.sub("", file.getvalue()).splitlines()


# ---- show -----------------------------------------------------------------------------------------------------------


def test_trained_tokens_are_marked_where_there_are_no_colours(model: Path, capsys: Any) -> None:
    rows = write("rows.jsonl", {"prompt": "1 2 =", "completion": " 1 2"}, {"prompt": "?", "completion": ""})
    assert main.run(["data", "show", rows, "--model", "model"]) == 0
    out = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert out[:13] == [
        "file    rows.jsonl",
        "format  prompt_completion",
        "model   model",
        f"limit   {CONTEXT} tokens a row",
        "rows    2 in = 1 trained + 1 rejected",
        "tokens  7, 3 trained (43%, completion)",
        "",
        "rejected: 1 row",
        "  ✗ rows.jsonl:2: completion is empty, so nothing could be learnt from it;",
        "    remove the row or fill it in.",
        "",
        "below the text: ^ and = trained tokens by turns, # trained special, - special",
        "",
    ]
    assert out[13:16] == ["rows.jsonl:1  7 tokens, 3 trained", "<s>1 2 = 1 2</s>", "---     ^^==####"]


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_hostile_rows_are_harmless_and_fit_the_terminal(folder: Path, width: int, colour: bool) -> None:
    bad = {"messages": [{"role": HOSTILE, "content": "x"}]}
    bad_rows = [bad, f"{{{HOSTILE}", {**CHAT, HOSTILE: 1}, {"messages": HOSTILE}]
    lines = drawn(CHAT, WIDE, *bad_rows, width=width, colour=colour)
    text = "".join(lines)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f]", text)
    assert max(map(cell_len, lines)) <= width
    assert "[boldred]x[/]" in text.replace(" ", "")
    assert sum("95% up to" in line for line in lines) == (2 if width < 80 else 1)  # narrow: one below the other


@pytest.mark.parametrize("row", [CHAT, WIDE], ids=["hostile", "wide"])
@pytest.mark.parametrize("width", [41, 80, 200])
def test_every_token_is_drawn_once_and_in_order(folder: Path, width: int, row: Any) -> None:
    found = preview(write("rows.jsonl", row), Encoder(tokenizer_of("chatml"), 4000))
    lines = drawn(row, width=width, colour=True)
    inside = found.rows[0].documents[0]
    assert "".join(tokens_of(lines)) == "".join(visible(piece.text) or "∙" for piece in inside)


@pytest.mark.parametrize("width", range(38, 46))
def test_no_line_is_wider_than_the_terminal(folder: Path, width: int) -> None:
    found = preview(write("rows.jsonl", WIDE), Encoder(tokenizer_of("chatml"), 4000))
    lines = list(data_view._lines(found.rows[0].documents[0], width))
    assert width - 1 <= max(sum(cell_len(text) for text, _, _ in line) for line in lines) <= width


def tokens_of(lines: list[str]) -> list[str]:
    """The lines of the first row."""
    first = next(i for i, line in enumerate(lines) if line.startswith("rows.jsonl:1")) + 1
    return lines[first : lines.index("", first)]


def test_of_a_long_document_the_middle_is_told_and_not_drawn(folder: Path) -> None:
    row = {"prompt": "a " * 2000, "completion": "b " * 10}
    lines = drawn(row, width=80, colour=True)
    (told,) = [line for line in lines if line.startswith("...")]
    pieces = preview("rows.jsonl", Encoder(tokenizer_of("chatml"), 8000)).rows[0].documents[0]
    hidden = pieces[400:-400]
    assert len(hidden) > 1000 and sum(piece.trained for piece in hidden) == 0
    assert told == f"... {len(hidden):,} tokens, 0 of them trained (--html shows them)"
    shown = "".join(tokens_of(lines)).split(told)
    assert shown == ["".join(visible(piece.text) for piece in part) for part in (pieces[:400], pieces[-400:])]


def test_a_log_without_colours_and_a_screen_tell_the_same(folder: Path) -> None:
    row = {"prompt": "the question", "completion": "the answer"}
    (plain, screen) = (drawn(row, width=80, colour=colour) for colour in (False, True))
    without = [line for line in plain if not re.fullmatch(r"[-^=# ]+", line) and not line.startswith("below")]
    assert without == [line for line in screen if not line.startswith(" trained ")]


def test_as_json(model: Path, capsys: Any) -> None:
    rows = write("rows.jsonl", {"prompt": HOSTILE, "completion": "b"}, "{", {"prompt": "c", "completion": "d"})
    assert main.run(["data", "show", rows, "--model", str(model), "--json", "--rows", "1", "--max-tokens", "90"]) == 0
    out = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e]", out)
    value = json.loads(out)
    (document,) = value["rows"][0]["documents"]
    assert "".join(Piece(**piece).text for piece in document) == f"<s>{HOSTILE}b</s>"
    assert (value["rows_in"], value["rows_trained"], value["max_tokens"]) == (3, 2, 90)
    assert [each["line"] for each in value["rejected"]] == [2]


def test_the_page_and_rows_by_name(model: Path, capsys: Any) -> None:
    rows = write("rows.jsonl", {"text": "one"}, {"text": "two"}, {"text": "three"})
    assert main.run(["data", "show", rows, "--model", str(model), "--row", "3", "--html", "page.html"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nwrote page.html\n") and "rows.jsonl:3" in out and "rows.jsonl:1" not in out
    page = Path("page.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and "rows.jsonl:3" in page


def test_a_folder_with_a_tokenizer_alone_will_do(model: Path, capsys: Any) -> None:
    (model / "config.json").unlink()
    rows = write("rows.jsonl", {"text": "one " * 200})
    assert main.run(["data", "show", rows, "--model", str(model)]) == 0
    assert "limit   none known (--max-tokens N)" in capsys.readouterr().out
    assert main.run(["data", "check", rows, "--model", str(model), "--max-tokens", "50"]) == 2
    assert "tokens long, the limit is 50" in " ".join(capsys.readouterr().out.split())
    assert main.run(["data", "check", rows, "--model", str(model), "--max-tokens", "50", "--long", "split"]) == 0
    assert main.run(["data", "check", rows, "--model", str(model), "--max-tokens", "50", "--long", "drop"]) == 0


def test_a_damaged_configuration_is_named(model: Path, capsys: Any) -> None:
    (model / "config.json").write_text("{")
    rows = write("rows.jsonl", {"text": "one"})
    assert main.run(["data", "show", rows, "--model", str(model)]) == 2
    assert "config.json" in capsys.readouterr().err


# ---- check, convert, split ------------------------------------------------------------------------------------------


def test_check_lists_what_is_rejected_and_exits_with_2(folder: Path, capsys: Any) -> None:
    rows = write("rows.jsonl", {"text": "one"}, {"text": "one"}, *['{"text": ""}'] * 22)
    assert main.run(["data", "check", rows]) == 2
    out = capsys.readouterr().out
    assert "rows  24 in = 2 sound + 22 rejected" in out and "duplicates (1): rows.jsonl:2: the same as" in out
    assert out.count("✗") == 20 and "... and 2 more; --json lists all" in out
    assert main.run(["data", "check", rows, "--json"]) == 2
    value = json.loads(capsys.readouterr().out)
    assert value["rows_in"] == value["rows_trained"] + len(value["rejected"]) == 24
    assert main.run(["data", "check", write("fine.jsonl", {"text": "one"})]) == 0


def test_convert_and_split_say_what_they_wrote(folder: Path, capsys: Any) -> None:
    rows = write("rows.jsonl", *({"q": f"question {n}", "answer": f"answer {n}", "by": n % 9} for n in range(90)))
    mapped = ["--column", "prompt=q", "--column", "completion=answer"]
    assert main.run(["data", "convert", rows, "chat.jsonl", "--format", "messages", *mapped]) == 0
    assert "wrote  chat.jsonl, 90 rows" in capsys.readouterr().out
    assert main.run(["data", "split", rows, "--to", "train=0.7, test=0.3", "--group", "by", *mapped, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert list(written) == ["rows/train.jsonl", "rows/test.jsonl"] and sum(written.values()) == 90
    assert main.run(["data", "check", "rows", *mapped]) == 0
    assert main.run(["data", "split", rows, "--to", "train=0.7,test=0.3", *mapped]) == 2  # never over what is there
    assert "rows exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["split", "x.jsonl", "--to", "train"], "--to: 'train' is not one NAME=VALUE for each name"),
        (["split", "x.jsonl", "--to", "a=0.5,a=0.5"], "--to: 'a=0.5' is not one NAME=VALUE for each name"),
        (["split", "x.jsonl", "--to", "a=half,b=0.5"], "--to: the share 'half' is not a number"),
        (["split", "hub:x", "--to", "a=1"], "hub:x is not a file to name the splits after"),
        (["check", "x.jsonl", "--column", "prompt"], "--column: 'prompt' is not one NAME=VALUE"),
        (["check", "x.jsonl", "--column", "promt=q"], "every format lacks a column 'promt'. Did you mean 'prompt'?"),
        (["check", "x.jsonl"], "cannot read the data file x.jsonl"),
        (["check", "x.jsonl", "--format", "chat"], "unknown data format 'chat'; expected one of"),
        (["show", "x.jsonl"], "Missing option '--model'. See 'loratune data show --help'."),
    ],
)
def test_wrong_usage(folder: Path, args: list[str], message: str, capsys: Any) -> None:
    assert main.run(["data", *args]) == 2
    assert message in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_an_error_that_quotes_a_row_is_harmless(folder: Path, capsys: Any) -> None:
    rows = write("rows.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": [HOSTILE], "completion": "b"})
    assert main.run(["data", "convert", rows, "out.jsonl", "--format", "messages"]) == 2
    err = capsys.readouterr().err
    assert "rows.jsonl:2: " in err and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e]", err)


def test_help_lists_every_verb(capsys: Any) -> None:
    assert main.run(["--help"]) == 0
    out = capsys.readouterr().out
    names = {command.name for command in main.app.registered_commands}
    names |= {group.name for group in main.app.registered_groups}
    assert "data" in names and all(re.search(rf"│ {name} ", out) for name in names)
    assert main.run(["data"]) == 0
    out = capsys.readouterr().out
    assert all(f"│ {verb} " in out for verb in ("show", "check", "convert", "split"))


def test_what_the_model_has_no_embedding_for_is_rejected_before_training(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer knows a token more than the model; several files are checked as one."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    files = [write("one.jsonl", {"text": "a"}), write("other.jsonl", {"text": "a"}, {"text": "the answer is"})]
    code = main.run(["data", "check", *files, "--model", str(model), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["source"], found["rows_in"]) == (2, "one.jsonl, other.jsonl", 3)
    assert all("is not in the model, which has 100 tokens" in each["reason"] for each in found["rejected"])
    assert found["rejected"]
