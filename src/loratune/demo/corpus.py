"""The demo's data: sentences of UA-GEC whose marks and capitals the model learns to put back.

UA-GEC (Syvokon and Nahorna 2021, arXiv 2103.16997) holds Ukrainian documents with every error corrected by hand. The
corrected side is well punctuated text, so stripping it gives pairs with an exact answer at no cost.
"""

import csv
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from loratune.errors import ConfigError
from loratune.files import atomic_write

ATTRIBUTION = (
    "Sentences from UA-GEC 2 (https://github.com/grammarly/ua-gec) by Oleksiy Syvokon, Olena Nahorna and Grammarly, "
    "arXiv 2103.16997, licence CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/). Changed here: sentences were "
    "selected from the corrected texts, their spaces, dashes and apostrophes made uniform, and punctuation marks and "
    "capital letters removed for the prompts."
)
PARTITIONS = ("train", "test")
MIN_CHARS, MAX_CHARS = 20, 160  # 13% of the corpus is shorter (greetings, headings), 9% longer (slow)
VALIDATION_DOCUMENTS = 0.1  # share of the training documents set apart for validation
PROMPT = "Без розділових знаків: {stripped}\nЗ розділовими знаками:"  # no space at the end: it starts the completion

_SPELLINGS = {"’": "'", "ʼ": "'", "‘": "'", "`": "'", "–": "—", "―": "—", "…": "..."}
_SPELLING = re.compile(f"[{''.join(_SPELLINGS)}]")
# Ukrainian letters only (no ы, э, ё), or digits; an apostrophe or a hyphen inside a word is its spelling.
_LETTERS = "А-ЩЬЮЯЄІЇҐа-щьюяєіїґ"
_WORD = rf"(?:[{_LETTERS}]+|[0-9]+)(?:['-][{_LETTERS}]+)*"
_SENTENCE = re.compile(rf"(?=[А-ЩЬЮЯЄІЇҐ]){_WORD}(?:(?:[,;:]|,? —)? {_WORD})*[.?!]{{1,3}}")
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


class Sentence(NamedTuple):
    """One sentence and the document it stands in; documents are what is split and resampled."""

    doc_id: str
    text: str


class _Pair(NamedTuple):
    doc_id: str
    source: str
    target: str


def one_spelling(text: str) -> str:
    """Returns the text with one character for each dash and apostrophe, "..." for its one character, single spaces."""
    return " ".join(_SPELLING.sub(lambda match: _SPELLINGS[match.group()], text).split())


def strip_marks(text: str) -> str:
    """Returns the words alone, in lower case, one space between; apostrophes and hyphens inside words stay."""
    return " ".join(WORD.findall(one_spelling(text).lower()))


def is_sensible(text: str) -> bool:
    """Says whether the marks of a sentence can be told from its words alone.

    Kept: 20 to 160 characters; Ukrainian words or whole numbers; a capital first; inside only a comma, semicolon, colon
    or dash; one to three of ". ? !" at the end. Left out: quotes and brackets (the corpus cuts sentences inside
    them), speech that opens with a dash, list items, headings, links, Latin script, emoji, decimals and times of day.
    """
    return MIN_CHARS <= len(text) <= MAX_CHARS and _SENTENCE.fullmatch(text) is not None


def sentences(partition: str) -> list[Sentence]:
    """Returns the sensible sentences of "train" (15,344) or "test" (1,298), each sequence of words once.

    Annotator 1 only: the second's sentences have the same words in 53 of 100 cases and are near copies in the others.
    Documents marked as sensitive (profanity) are left out, because the demo prints samples. A test sentence is left out
    if the words of its source or its correction also stand in a training document, on either side. Different people
    translated the same stories, so similar sentences remain. Raises ConfigError for another partition or without
    `ua_gec`.
    """
    if partition not in PARTITIONS:
        raise ConfigError(f"partition {partition!r} of UA-GEC does not exist: expected 'train' or 'test'.")
    seen = _words_of_training() if partition == "test" else set[str]()
    kept: list[Sentence] = []
    for doc_id, source, target in _pairs(partition):
        words = strip_marks(target)
        if not is_sensible(target) or words in seen or (partition == "test" and strip_marks(source) in seen):
            continue
        seen.add(words)
        kept.append(Sentence(doc_id, target))
    return kept


def restoration_sentences(num_train: int, num_validation: int, num_test: int, seed: int) -> dict[str, list[Sentence]]:
    """Returns the sentences behind `restoration_rows`, in the same order: the documents are what a bootstrap resamples.

    A tenth of the training documents, by a hash of seed and name, is set apart for validation; within each split the
    sentences come in the order of a hash, so fewer sentences are a prefix of more. Raises ConfigError when a split
    holds fewer sentences than asked for.
    """
    pool: dict[str, list[Sentence]] = {"train": [], "validation": [], "test": sentences("test")}
    for sentence in sentences("train"):
        held_out = _hash(seed, sentence.doc_id) < VALIDATION_DOCUMENTS
        pool["validation" if held_out else "train"].append(sentence)
    wanted = {"train": num_train, "validation": num_validation, "test": num_test}
    return {split: _draw(split, pool[split], count, seed) for split, count in wanted.items()}


def restoration_rows(num_train: int, num_validation: int, num_test: int, seed: int) -> dict[str, list[dict[str, str]]]:
    """Returns the splits "train", "validation" and "test" as rows {"prompt", "completion"}, the same for the same seed.

    Raises ConfigError when a split holds fewer sentences than asked for, or without `ua_gec`.
    """
    chosen = restoration_sentences(num_train, num_validation, num_test, seed)
    return {split: [restoration_row(sentence.text) for sentence in chosen[split]] for split in chosen}


def restoration_row(text: str) -> dict[str, str]:
    """Returns the row that asks for `text` from its bare words.

    The completion starts with the space: tokenizers keep a word and the space before it in one token, so prompt and
    completion have the same tokens apart as together (Gemma 3's, on 300 of 300 rows; 63 tokens a row on average).
    """
    return {"prompt": PROMPT.format(stripped=strip_marks(text)), "completion": f" {text}"}


def write_rows(folder: Path, num_train: int, num_validation: int, num_test: int, seed: int) -> dict[str, Path]:
    """Writes train.jsonl, validation.jsonl, test.jsonl and ATTRIBUTION.txt; returns the path of each split.

    Raises ConfigError as `restoration_rows` does, before anything is written.
    """
    rows = restoration_rows(num_train, num_validation, num_test, seed)
    paths = {split: folder / f"{split}.jsonl" for split in rows}
    atomic_write(folder / "ATTRIBUTION.txt", ATTRIBUTION + "\n")
    for split, path in paths.items():
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split]))
    return paths


def _draw(split: str, found: list[Sentence], count: int, seed: int) -> list[Sentence]:
    if not 0 <= count <= len(found):
        raise ConfigError(
            f"{count} {split} sentences asked for; UA-GEC has {len(found)} that fit. Ask for 0 to that many."
        )
    return sorted(found, key=lambda sentence: _hash(seed, sentence.text))[:count]


def _hash(seed: int, text: str) -> float:
    """Returns a number in [0, 1) that is the same on every machine and in every version of Python."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{text}".encode()).digest()[:6]) / 2**48


def _words_of_training() -> set[str]:
    return {strip_marks(text) for pair in _pairs("train") for text in (pair.source, pair.target)}


def _pairs(partition: str) -> Iterator[_Pair]:
    """Yields the aligned sentences of annotator 1.

    Read from the package's files: its Corpus class parses the annotation of every document, which nothing here needs.
    """
    data = _data_folder()
    folder = data / "gec-fluency" / partition
    for doc_id in _documents(data, partition):
        sources = _lines(folder / "source-sentences" / f"{doc_id}.src.txt")
        targets = _lines(folder / "target-sentences" / f"{doc_id}.a1.txt")
        if len(sources) != len(targets):
            raise ConfigError(
                f"UA-GEC document {doc_id}: {len(sources)} source and {len(targets)} corrected sentences, expected as "
                "many of each. The installed ua_gec is damaged: pip install --force-reinstall ua-gec==2.1.3"
            )
        yield from (_Pair(doc_id, source, target) for source, target in zip(sources, targets, strict=True))


def _documents(data: Path, partition: str) -> list[str]:
    with (data / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["partition"] == partition]
    return sorted(row["id"] for row in rows if row["is_sensitive"] == "0" and "1" in row["annotator_id"].split())


def _lines(path: Path) -> list[str]:
    return [one_spelling(line) for line in path.read_text(encoding="utf-8").split("\n")]


def _data_folder() -> Path:
    found = importlib.util.find_spec("ua_gec")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "the demo's corpus UA-GEC (package ua_gec) is not installed. Install it: pip install 'loratune[demo]'"
        )
    return Path(found.submodule_search_locations[0]) / "data"
