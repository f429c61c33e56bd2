"""The rows of the real tasks, made of what ships; train, validation and test never share a writer, a text or a source.

UA-GEC (package ua_gec, CC-BY-4.0; Syvokon and Nahorna 2021, arXiv 2103.16997), annotator 1, Ukrainian:
    acceptability   a sentence -> whether its annotator left it as it was
    error_spans     the words of a sentence -> where its errors are, and of which of four kinds
    correction      a sentence that was changed -> the corrected one
    origin          the beginning of a text -> whether it is a translation
Debian's package list (`apt-cache dumpavail`), English:
    section         a package's description -> the section of the archive that it stands in
    size            a package's description -> log10 of (its installed size / 300 KB)
"""

import csv
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import log10
from pathlib import Path
from typing import Any, NamedTuple

SPLITS = ("train", "validation", "test")
CHARACTERS = 20, 90  # of a sentence: about 25 of Gemma's tokens, so that a laptop gets through some hundred
PASSAGE_CHARACTERS = 140
PROMPT = "Виправ помилки: {}\nБез помилок:"
# Documents that share so many words, each in 2 to 8 documents of the corpus, tell one story: several people translated
# the same ones. With those of one writer they stand on one side. 6 leaves one group of three in five documents, which
# is trained on, and some 480 small ones.
SHARED_WORDS, RARE = 6, range(2, 9)
SECTIONS = ("admin", "games", "graphics", "mail", "math", "net", "science", "sound", "text", "web")
USUAL_KILOBYTES = 300
KINDS = {"Punctuation": "Punctuation", "Spelling": "Spelling", "G": "Grammar", "F": "Fluency"}


class Found(NamedTuple):
    """A row, the side it belongs on, and what it is the same row by."""

    split: str
    key: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Text:
    """A document of UA-GEC; sentences are (as written, as corrected)."""

    split: str
    origin: str
    source: str
    sentences: list[tuple[str, str]]
    errors: list[tuple[int, int, str]]  # start, end in `source`, kind


def draw(text: str, seed: int = 0) -> float:
    """Returns a number in [0, 1) that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{text}".encode()).digest()[:6]) / 2**48


# ---- UA-GEC ----------------------------------------------------------------------------------------------------------


def corpus() -> Path:
    """Returns the folder of the package's data."""
    found = importlib.util.find_spec("ua_gec")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install ua-gec")
    return Path(found.submodule_search_locations[0]) / "data"


@cache
def texts() -> list[Text]:
    """Returns the documents that are not marked as sensitive (profanity), each on its side."""
    with (corpus() / "metadata.csv").open(encoding="utf-8") as file:
        about = [row for row in csv.DictReader(file) if row["is_sensitive"] == "0"]
    annotated = [_annotated(row) for row in about]
    sides = split_groups(group([row["author_id"] for row in about], [source for source, _ in annotated]))
    return [
        Text(side, row["submission_type"], source, _sentences(row), errors)
        for side, row, (source, errors) in zip(sides, about, annotated, strict=True)
    ]


def _annotated(about: dict[str, str]) -> tuple[str, list[tuple[int, int, str]]]:
    from ua_gec.annotated_text import AnnotatedText

    folder = corpus() / "gec-fluency" / about["partition"] / "annotated"
    text = AnnotatedText((folder / f"{about['id']}.a1.ann").read_text("utf-8"))
    errors = [
        (each.start, each.end, KINDS[each.meta["error_type"].split("/")[0]])
        for each in text.get_annotations()
        if "error_type" in each.meta
    ]
    return text.get_original_text(), errors


def _sentences(about: dict[str, str]) -> list[tuple[str, str]]:
    folder = corpus() / "gec-fluency" / about["partition"]
    sides = ("source-sentences", "src"), ("target-sentences", "a1")
    source, target = (
        (folder / name / f"{about['id']}.{end}.txt").read_text("utf-8").split("\n") for name, end in sides
    )
    return list(zip(source, target, strict=True))


def group(authors: list[str], sources: list[str]) -> list[int]:
    """Returns for each document the first of its group: those of one author, those that share SHARED_WORDS rare words,
    and what these connect."""
    words = [set(re.findall(r"[^\W\d_]{4,}", source.lower())) for source in sources]
    number = Counter(word for each in words for word in each)
    holders: dict[str, list[int]] = defaultdict(list)
    for index, each in enumerate(words):
        for word in each:
            if number[word] in RARE:
                holders[word].append(index)
    shared = Counter((a, b) for each in holders.values() for i, a in enumerate(each) for b in each[i + 1 :])
    first = list(range(len(sources)))

    def root(index: int) -> int:
        while first[index] != index:
            index = first[index]
        return index

    by_author: dict[str, int] = {}
    alike = [(a, b) for (a, b), count in shared.items() if count >= SHARED_WORDS]
    for a, b in [*((by_author.setdefault(name, i), i) for i, name in enumerate(authors)), *alike]:
        low, high = sorted((root(a), root(b)))
        first[high] = low
    return [root(index) for index in range(len(sources))]


def split_groups(groups: list[int]) -> list[str]:
    """Returns the side of each document: the largest group is trained on, of the others a sixth, by a hash."""
    largest = Counter(groups).most_common(1)[0][0]

    def side(number: int) -> str:
        place = draw(f"group {number}")
        return "train" if number == largest or place < 1 / 6 else "validation" if place < 1 / 3 else "test"

    return [side(number) for number in groups]


def _fits(sentence: str) -> bool:
    return CHARACTERS[0] <= len(sentence) <= CHARACTERS[1]


def words_of(text: str) -> str:
    """Returns what makes two texts the same text: their words, without marks and capitals."""
    return " ".join(re.findall(r"\w+", text.lower()))


def acceptability() -> Iterator[Found]:
    for text in texts():
        for source, target in text.sentences:
            if _fits(source):
                label = "left" if source == target else "changed"
                yield Found(text.split, words_of(source), {"text": source, "label": label})


def correction() -> Iterator[Found]:
    for text in texts():
        for source, target in text.sentences:
            if source != target and _fits(source) and _fits(target):
                row = {"prompt": PROMPT.format(source), "completion": f" {target}"}
                yield Found(text.split, words_of(source), row)


def source_of(row: dict[str, str]) -> str:
    """Returns the sentence that a row of `correction` asks to correct."""
    before, after = PROMPT.split("{}")
    return row["prompt"].removeprefix(before).removesuffix(after)


def error_spans() -> Iterator[Found]:
    for text in texts():
        place = 0
        for sentence, _ in text.sentences:
            start = text.source.find(sentence, place)
            if start < 0:  # the corpus cut it otherwise
                continue
            place = start + len(sentence)
            if _fits(sentence):
                words = [(m.start() + start, m.end() + start, m.group()) for m in re.finditer(r"\S+", sentence)]
                tags = tag([(a, b) for a, b, _ in words], text.errors)
                yield Found(text.split, words_of(sentence), {"tokens": [word for *_, word in words], "tags": tags})


def tag(words: list[tuple[int, int]], errors: list[tuple[int, int, str]]) -> list[str]:
    """Returns the tag of each word (start, end): an error is on the words that it touches, one between words (a missing
    mark, a space) on the word before it; the first error of a word counts."""
    tags = ["O"] * len(words)
    for start, end, kind in errors:
        touched = [n for n, (a, b) in enumerate(words) if a < end and start < b]
        before = [n for n, (a, b) in enumerate(words) if b <= start and start <= (words[n + 1 :] or [(b + 1, 0)])[0][0]]
        touched = touched or before[-1:]
        for place, n in enumerate(touched):
            if tags[n] == "O":
                tags[n] = f"{'I' if place and tags[n - 1].endswith(kind) else 'B'}-{kind}"
    return tags


def origin() -> Iterator[Found]:
    for text in texts():
        passage = ""
        for sentence, _ in text.sentences:
            if len(passage) + len(sentence) > PASSAGE_CHARACTERS:
                break
            passage = f"{passage} {sentence}".strip()
        if len(passage) >= CHARACTERS[0]:
            label = "translation" if text.origin == "translation" else "own"
            yield Found(text.split, words_of(passage), {"text": passage, "label": label})


# ---- Debian ----------------------------------------------------------------------------------------------------------


@cache
def packages() -> list[dict[str, str]]:
    """Returns the packages of SECTIONS, one of each source, by the fields of their one-line headers."""
    if shutil.which("apt-cache") is None:
        raise SystemExit("the English tasks are made of Debian's package list: apt-cache is missing.")
    done = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True, encoding="utf-8")
    found: dict[str, dict[str, str]] = {}
    for block in done.stdout.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and line[0] != " ")
        if fields.get("Section") in SECTIONS and {"Description", "Installed-Size"} <= fields.keys():
            found.setdefault(fields.get("Source", fields["Package"]).split()[0], fields)
    if len(found) < 4000:
        raise SystemExit(f"apt knows {len(found)} packages of the sections asked for: run apt-get update.")
    return [{"name": name, **fields} for name, fields in found.items()]


def _side(name: str) -> str:
    place = draw(f"source {name}")
    return "train" if place < 0.6 else "validation" if place < 0.7 else "test"


def section() -> Iterator[Found]:
    for each in packages():
        row = {"text": each["Description"], "label": each["Section"]}
        yield Found(_side(each["name"]), words_of(each["Description"]), row)


def size() -> Iterator[Found]:
    for each in packages():
        amount = round(log10(max(1, int(each["Installed-Size"])) / USUAL_KILOBYTES), 3)
        row = {"text": each["Description"], "label": amount}
        yield Found(_side(each["name"]), words_of(each["Description"]), row)


# ---- files -----------------------------------------------------------------------------------------------------------


def choose(found: Iterator[Found], counts: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Returns as many rows of each side as asked for, each key once, in an order by a hash, so that fewer are a prefix;
    a held-out row with a label or a tag that no training row has is left out."""
    pools: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in SPLITS}
    seen: set[str] = set()
    for split, key, row in found:
        if key not in seen:
            seen.add(key)
            pools[split][key] = row
    train = _first(pools["train"], counts["train"])
    known = {name for row in train for name in names(row)}
    sides = {name: {k: r for k, r in pools[name].items() if known.issuperset(names(r))} for name in SPLITS[1:]}
    return {"train": train, **{name: _first(pool, counts[name]) for name, pool in sides.items()}}


def _first(pool: dict[str, dict[str, Any]], count: int) -> list[dict[str, Any]]:
    if len(pool) < count:
        raise SystemExit(f"{count} rows are asked for, {len(pool)} are there.")
    return [pool[key] for key in sorted(pool, key=draw)[:count]]


def write(folder: Path, build: Callable[[], Iterator[Found]], counts: dict[str, int]) -> None:
    """Writes train.jsonl, validation.jsonl, test.jsonl, and about.json: how many, what is commonest, their digest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, digest = choose(build(), counts), hashlib.sha256()
    for name, each in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in each)
        digest.update(text.encode())
        (folder / f"{name}.jsonl").write_text(text, "utf-8")
    about = {"rows": counts, "sha256": digest.hexdigest(), **commonest(rows["test"])}
    (folder / "about.json").write_text(json.dumps(about), "utf-8")


def names(row: dict[str, Any]) -> list[str]:
    """Returns the names of a row's label or tags; none where labels are texts or numbers."""
    return [each for each in row.get("tags", [row.get("label")]) if isinstance(each, str)]


def commonest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the commonest label or tag of rows with its share of all; nothing where there are no names."""
    labels = Counter(name for row in rows for name in names(row))
    if not labels:
        return {}
    (name, count) = labels.most_common(1)[0]
    return {"commonest": name, "share": count / labels.total(), "classes": len(labels)}
