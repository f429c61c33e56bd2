"""The page of a preview, read as a browser reads it: one file, hostile text as text, nothing from elsewhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data.toy_tokenizer import tokenizer_of
from loratune.data.encode import Encoder
from loratune.data.preview import Preview, preview, visible
from loratune.report.data_page import data_page

HOSTILE = (
    '<script>alert(1)</script> "><img src=x onerror=alert(1)> &lt; \x1b[31m \u202eevil\u2069 \x00 [bold]x[/] <!-- '
)
TAGS = {"html", "head", "meta", "title", "style", "body", "main", "section", "header", "div", "ul", "li"} | {
    *("h1", "h2", "h3", "p", "b", "i", "br", "code", "span", "mark")
}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "style", "title", "dir"}
_LONE = {"meta", "br"}


class Reader(HTMLParser):
    """Collects the elements, their attributes and the text of the tokens; elements must close in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, bool, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if "title" in dict(attrs) and tag in ("mark", "span"):
            self.tokens.append(("", tag == "mark", dict(attrs)["title"]))
        if tag not in _LONE:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("mark", "span") and "title" in self.elements[-1][1]:
            text, trained, title = self.tokens[-1]
            self.tokens[-1] = (text + data, trained, title)


def found(folder: Path, *rows: Any) -> Preview:
    path = folder / "rows <b>&.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return preview(path, Encoder(tokenizer_of("plain_bos"), 400))


def page_of(value: Preview) -> tuple[str, Reader]:
    page = data_page(value)
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return page, reader


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    value = found(
        tmp_path,
        {"prompt": HOSTILE, "completion": f"{HOSTILE}\nЖ"},
        {"prompt": "a", "completion": "b", HOSTILE: "c"},
        f"{{{HOSTILE}",
    )
    page, reader = page_of(value)
    assert {tag for tag, _ in reader.elements} <= TAGS
    assert {name for _, attributes in reader.elements for name in attributes} <= ATTRIBUTES
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f]", page)
    shown = "".join(text for text, _, _ in reader.tokens)
    inside = value.rows[0].documents[0]
    whole = "".join(visible(piece.text) or "∙" for piece in inside)
    assert shown == whole and "<script>alert(1)</script>" in shown and "⟨U+202E⟩evil" in shown
    assert [(trained, title) for _, trained, title in reader.tokens] == [
        (piece.trained, f"token {piece.id}") for piece in inside
    ]
    assert len(value.ledger.rejects) == 2
    assert all(visible(f"{each.where} {each.reason}") in reader.text for each in value.ledger.rejects)


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    page, reader = page_of(found(tmp_path, {"text": "one"}, {"text": "one"}, {"text": "two " * 30}))
    assert not re.search(r"https?:|url\(|@import|src=|href=|<script|<link|javascript:", page)
    policies = [each["content"] for _, each in reader.elements if each.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_the_counts_of_the_ledger_and_its_notes(tmp_path: Path) -> None:
    value = found(tmp_path, {"text": "one"}, {"text": "one"}, {"text": "two " * 30}, {"text": ""})
    _, reader = page_of(value)
    assert "4 rows in" in reader.text and "= 3 trained + 1 rejected" in reader.text
    assert f"{value.num_tokens} tokens in 3 documents" in reader.text
    assert "Rejected: 1 row" in reader.text and "duplicates (1)" in reader.text
    assert value.lengths is not None
    titles = [each["title"] for tag, each in reader.elements if tag == "i" and "title" in each]
    assert sum(int(str(title).rpartition(": ")[2]) for title in titles) == 6  # each document in two histograms


def test_without_anything_to_train_there_are_no_rows_and_no_histograms(tmp_path: Path) -> None:
    _, reader = page_of(found(tmp_path, "{", {"text": ""}))
    assert "= 0 trained + 2 rejected" in reader.text and reader.tokens == []
    assert "Length in tokens" not in reader.text and "token by token" not in reader.text


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(dark: bool, tmp_path: Path) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 for text, in both schemes."""
    page, _ = page_of(found(tmp_path, {"text": "one"}))
    light, _, rest = page.partition("prefers-color-scheme: dark")
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", light))
    colours |= dict(re.findall(r"--([\w-]+): (#\w+)", rest)) if dark else {}
    pairs = {
        "card": ["ink", "soft", "red", "special", "green-ink"],
        "paper": ["ink", "soft", "red"],
        "lit": ["lit-ink"],
        "lit2": ["lit-ink"],
        "mark": ["mark-ink"],
        "mark2": ["mark-ink"],
    }
    for ground, inks in pairs.items():
        for ink in inks:
            assert contrast(colours[ground], colours[ink]) >= 4.5, (ground, ink)


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(digit * 2 for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
