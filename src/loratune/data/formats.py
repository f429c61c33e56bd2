"""The formats of rows: the columns by which each is known, and how its rows become one of the canonical kinds.

Canonical kinds: messages, prompt_completion, text; for tasks classification, tagging, question, pair,
source_target, segmentation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loratune.data import conversations as talk
from loratune.data.values import as_dict, as_label, as_list, as_number, as_text
from loratune.errors import DataError

# As ms-swift maps them (its names of columns are the longest list in use).
_PROMPTS = ("prompt", "query", "input", "instruction", "question", "problem")
_COMPLETIONS = ("completion", "response", "answer", "output", "target", "targets", "solution")

_ABSENT = (None, "")  # tables have no other way to leave a cell out
KINDS = (
    "messages", "prompt_completion", "text", "classification", "tagging", "question", "pair", "source_target",
    "segmentation",
)  # fmt: skip

Value = tuple[str, dict[str, Any]]  # the canonical kind, and its value


@dataclass(frozen=True)
class Format:
    """A row format: its columns, each with the names it may have in a file (its own first), and its conversion.

    `convert` takes {column: value} and returns (canonical kind, checked value); DataError for a value that is not fit.
    """

    convert: Callable[[dict[str, Any]], Value]
    required: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        return self.required | self.optional


def _text(row: dict[str, Any]) -> Value:
    return "text", {"text": as_text(row["text"], "text")}


def _classification(row: dict[str, Any]) -> Value:
    value: dict[str, Any] = {"text": as_text(row["text"], "text")}
    if row.get("text_pair") not in _ABSENT:
        value["text_pair"] = as_text(row["text_pair"], "text_pair")
    return "classification", value | {"label": _labels(row["label"])}


def _labels(value: Any) -> Any:
    """One label, or a list of those that apply, which may be empty."""
    if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[")):
        return [as_label(each, f"label {n}") for n, each in enumerate(as_list(value, "label", "a list of labels"), 1)]
    return as_label(value, "label")


def _tagging(row: dict[str, Any]) -> Value:
    tokens, tags = (as_list(row[key], key, "a list, one entry a token") for key in ("tokens", "tags"))
    if not tokens or len(tokens) != len(tags):
        raise DataError(f"the row has {len(tokens)} tokens and {len(tags)} tags; expected as many, and at least one.")
    for number, token in enumerate(tokens, 1):
        as_text(token, f"token {number}")
    return "tagging", {"tokens": tokens, "tags": [as_label(tag, f"tag {n}") for n, tag in enumerate(tags, 1)]}


def _question(row: dict[str, Any]) -> Value:
    """SQuAD's answers, {text: [...], answer_start: [...]}; a text, or a list of them, is looked up in the context."""
    question, context = as_text(row["question"], "question"), as_text(row["context"], "context")
    texts, starts = _answers(row["answers"], context)
    for text, start in zip(texts, starts, strict=True):
        if context[start : start + len(text)] != text:
            raise DataError(f"the answer {text[:40]!r} does not stand at character {start} of the context.")
    return "question", {
        "question": question,
        "context": context,
        "answers": {"text": texts, "answer_start": starts},
    }


def _answers(value: Any, context: str) -> tuple[list[str], list[int]]:
    if isinstance(value, dict) or (isinstance(value, str) and value.lstrip().startswith("{")):
        answers = as_dict(value, "answers", "an object")
        texts = as_list(answers.get("text"), "answers: text", "a list of strings")
        starts = as_list(answers.get("answer_start"), "answers: answer_start", "a list of numbers")
        if len(starts) != len(texts) or not all(type(start) is int and start >= 0 for start in starts):
            raise DataError("answers: answer_start must hold one position in the context for each text.")
        return [as_text(text, "answers: text") for text in texts], starts
    listed = [value] if isinstance(value, str) and not value.lstrip().startswith("[") else value
    texts = [as_text(text, "answers") for text in as_list(listed, "answers", "{text, answer_start}, or strings")]
    if missing := [text for text in texts if text not in context]:
        raise DataError(f"the answer {missing[0][:40]!r} does not stand in the context.")
    return texts, [context.index(text) for text in texts]


def _pair(row: dict[str, Any]) -> Value:
    value: dict[str, Any] = {key: as_text(row[key], key) for key in ("sentence1", "sentence2")}
    if row.get("score") not in _ABSENT:
        value["score"] = as_number(row["score"], "score")
    if row.get("label") not in _ABSENT:
        value["label"] = as_label(row["label"], "label")
    return "pair", value


def _source_target(row: dict[str, Any]) -> Value:
    return "source_target", {key: as_text(row[key], key) for key in ("source", "target")}


def _segmentation(row: dict[str, Any]) -> Value:
    """Files, relative to that of the rows."""
    return "segmentation", {key: as_text(row[key], key) for key in ("image", "mask")}


FORMATS: dict[str, Format] = {
    "prompt_completion": Format(talk.prompt_completion, {"prompt": _PROMPTS, "completion": _COMPLETIONS}),
    "messages": Format(talk.messages, {"messages": ("messages",)}, {"tools": ("tools",)}),
    "sharegpt": Format(
        talk.sharegpt,
        {"conversations": ("conversations", "conversation")},
        {"system": ("system",), "tools": ("tools",)},
    ),
    "alpaca": Format(
        talk.alpaca,
        {"instruction": ("instruction",), "output": ("output",)},
        {"input": ("input",), "system": ("system",), "history": ("history",)},
    ),
    "text": Format(_text, {"text": ("text",)}),
    "classification": Format(
        _classification,
        {"text": ("text", "sentence"), "label": ("label", "labels")},
        {"text_pair": ("text_pair",)},
    ),
    "tagging": Format(
        _tagging, {"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels")}
    ),
    "question": Format(
        _question, {"question": ("question",), "context": ("context",), "answers": ("answers", "answer")}
    ),
    "pair": Format(
        _pair,
        {
            "sentence1": ("sentence1", "premise", "text1", "question1", "anchor"),
            "sentence2": ("sentence2", "hypothesis", "text2", "question2", "positive"),
        },
        {"score": ("score", "similarity"), "label": ("label",)},
    ),
    "source_target": Format(_source_target, {"source": ("source", "src"), "target": ("target", "tgt")}),
    "segmentation": Format(
        _segmentation, {"image": ("image",), "mask": ("mask", "annotation", "label", "segmentation_map")}
    ),
}
