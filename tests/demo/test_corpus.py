"""The demo's rows against UA-GEC itself: no leak between splits, the same rows for the same seed, marks gone."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.demo import corpus
from loratune.errors import ConfigError

UKRAINIAN = st.text(alphabet="АБвгґдеєжзиіїйь'’-—–…,.!?:;«»\"() \n12Xy", max_size=60)


@pytest.fixture(scope="module")
def train() -> list[corpus.Sentence]:
    return corpus.sentences("train")


@pytest.fixture(scope="module")
def held_out() -> list[corpus.Sentence]:
    return corpus.sentences("test")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[corpus.Sentence]]:
    return corpus.restoration_sentences(2000, 300, 300, seed=7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Він сказав: «Так, п’ять!» — і пішов…", "він сказав так п'ять і пішов"),
        ("Будь-які  ювелірні\tприкраси -- зніміть.", "будь-які ювелірні прикраси зніміть"),
        ("'Лапки' - не апостроф-", "лапки не апостроф"),
        ("?!", ""),
    ],
)
def test_strip_marks_leaves_words(text: str, words: str) -> None:
    assert corpus.strip_marks(text) == words


@given(UKRAINIAN)
def test_stripped_text_holds_words_and_spaces_only(text: str) -> None:
    stripped = corpus.strip_marks(text)
    assert re.fullmatch(r"(?:[\w'-]+(?: [\w'-]+)*)?", stripped)
    assert stripped == stripped.lower() == corpus.strip_marks(stripped)
    assert [c for c in stripped if c.isalnum()] == [c for c in text.lower() if c.isalnum()]


@pytest.mark.parametrize(
    "text",
    [
        "— Я не знав, що у вас є таке місце.",  # speech: the dash belongs to the text before
        '"Будьте впевнені, друже мій!',  # a quote cut open
        "Замовники (1909) жили жахливо далеко.",
        "Парламентські вибори Британії",  # no mark at the end
        "Раніше YouTube примусово зменшив якість відео.",
        "Нам 12:30 теж не дуже то й підходить.",
        "Этот текст написан по-русски, да.",
        "Привіт, друже.",  # below 20 characters
        "Довго " * 30 + "йшли.",
        "крім того, все починається з малої літери.",
    ],
)
def test_a_sentence_that_cannot_be_restored_is_left_out(text: str) -> None:
    assert not corpus.is_sensible(text)


@pytest.mark.parametrize(
    "text", ["Ба більше, я — твій п'ятий, 21 друг: будь-хто; ні?", "Те ми вже бачили кілька разів..."]
)
def test_a_plain_sentence_is_kept(text: str) -> None:
    assert corpus.is_sensible(text)


def test_counts_are_those_of_the_pinned_release(train: list[corpus.Sentence], held_out: list[corpus.Sentence]) -> None:
    assert (len(train), len(held_out)) == (15_344, 1_298)


def test_no_sequence_of_words_stands_twice(train: list[corpus.Sentence], held_out: list[corpus.Sentence]) -> None:
    words = [corpus.strip_marks(sentence.text) for sentence in (*train, *held_out)]
    assert len(words) == len(set(words))
    assert all(corpus.is_sensible(sentence.text) for sentence in (*train, *held_out))


def test_test_sentences_stand_in_no_training_document_on_either_side(held_out: list[corpus.Sentence]) -> None:
    """Read through the package's own class, independently of our reader, with both annotators."""
    from ua_gec import Corpus  # pyright: ignore[reportMissingTypeStubs]

    seen: set[str] = set()
    for document in Corpus("train"):
        seen.update(map(corpus.strip_marks, [*document.source_sentences, *document.target_sentences]))
    sources: dict[tuple[str, str], str] = {}
    for document in Corpus("test"):
        if document.meta.annotator_id == 1:
            for source, target in zip(document.source_sentences, document.target_sentences, strict=True):
                sources.setdefault((document.doc_id, corpus.one_spelling(target)), source)
    assert not [s for s in held_out if corpus.strip_marks(s.text) in seen or corpus.strip_marks(sources[s]) in seen]


def test_validation_documents_are_not_training_documents(splits: dict[str, list[corpus.Sentence]]) -> None:
    documents = {split: {sentence.doc_id for sentence in splits[split]} for split in splits}
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [2000, 300, 300]
    assert not documents["train"] & documents["validation"]
    assert not documents["test"] & (documents["train"] | documents["validation"])
    assert len(documents["validation"]) > 50  # rows come from many documents, not from the first few


def test_same_seed_same_rows_other_seed_other_rows_and_fewer_is_a_prefix(
    splits: dict[str, list[corpus.Sentence]],
) -> None:
    again = corpus.restoration_sentences(100, 20, 10, seed=7)
    assert {split: splits[split][: len(again[split])] for split in splits} == again
    other = corpus.restoration_sentences(100, 20, 10, seed=8)
    assert not set(other["train"]) >= set(again["train"]) and other["test"] != again["test"]


def test_rows_are_written_as_json_lines(tmp_path: Path, splits: dict[str, list[corpus.Sentence]]) -> None:
    paths = corpus.write_rows(tmp_path / "rows", 20, 5, 5, seed=7)
    num_rows = {"train": 20, "validation": 5, "test": 5}
    rows = {split: [corpus.restoration_row(s.text) for s in splits[split][:num]] for split, num in num_rows.items()}
    read = {split: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for split, path in paths.items()}
    assert read == rows
    assert "CC BY 4.0" in (tmp_path / "rows" / "ATTRIBUTION.txt").read_text("utf-8")
    for row in rows["train"]:
        bare = row["prompt"].split("\n")[0].partition(": ")[2]
        assert bare == corpus.strip_marks(row["completion"]) and row["completion"].startswith(" ")
        assert row["prompt"][-1] == ":" and "\n" not in row["completion"]


def test_more_rows_than_there_are_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"5000 test sentences asked for; UA-GEC has 1298"):
        corpus.write_rows(tmp_path / "rows", 1, 1, 5000, seed=0)
    assert not list(tmp_path.iterdir())


def test_unknown_partition_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'validation'.*expected 'train' or 'test'"):
        corpus.sentences("validation")


def test_missing_package_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'loratune[demo]'")):
        corpus.sentences("train")


def corpus_of(folder: Path, documents: dict[str, tuple[str, str]]) -> Path:
    """Writes a corpus laid out as UA-GEC; "train/0007" -> (source lines, corrected lines)."""
    rows = [f"{name.split('/')[1]},{name.split('/')[0]},0,1" for name in documents]
    (folder / "metadata.csv").write_text("\n".join(["id,partition,is_sensitive,annotator_id", *rows]), "utf-8")
    for name, (source, target) in documents.items():
        partition, doc_id = name.split("/")
        for file, text in (f"source-sentences/{doc_id}.src.txt", source), (f"target-sentences/{doc_id}.a1.txt", target):
            path = folder / "gec-fluency" / partition / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    return folder


def test_damaged_package_is_an_error_that_names_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = corpus_of(tmp_path, {"train/0007": ("одне\nдва", "Одне.")})
    monkeypatch.setattr(corpus, "_data_folder", lambda: folder)
    with pytest.raises(ConfigError, match="document 0007: 2 source and 1 corrected"):
        corpus.sentences("train")


@pytest.mark.parametrize("side_of_train", [0, 1])
@pytest.mark.parametrize("side_of_test", [0, 1])
def test_a_leak_on_any_side_is_left_out(
    side_of_train: int, side_of_test: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leak, other = "Ми були вдома, коли пішов дощ.", "Сьогодні, мабуть, знову буде дощ."
    train = ["Зовсім інше речення, ось таке."] * 2
    held_out = ["Третє речення, яке теж інше."] * 2
    train[side_of_train] = leak.upper()  # marks and capitals make no difference
    held_out[side_of_test] = leak
    documents = {
        "train/0001": (train[0], train[1]),
        "test/0002": (f"{held_out[0]}\n{other}", f"{held_out[1]}\n{other}"),
    }
    folder = corpus_of(tmp_path, documents)
    monkeypatch.setattr(corpus, "_data_folder", lambda: folder)
    assert corpus.sentences("test") == [("0002", other)]
