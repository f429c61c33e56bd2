"""The preview shows what a run trains: its pieces are the tokenised text, its numbers those of the dataset."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from toy_tokenizer import FAMILIES, tokenizer_of
from transformers import PreTrainedTokenizerFast

from loratune.data import preview as module
from loratune.data.dataset import load_dataset
from loratune.data.encode import Document, Encoder
from loratune.data.preview import pieces, preview, read_ledger, spans, visible
from loratune.data.rows import Row
from loratune.errors import ConfigError, DataError

TEXTS = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=40).filter(str.strip)


def encoder(name: str = "plain_bos", **options: Any) -> Encoder:
    return Encoder(tokenizer_of(name), options.pop("max_tokens", 200), **options)


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def like_llama() -> PreTrainedTokenizerFast:
    """Spaces as ▁, one put before the text, unknown characters as bytes: how Llama 2 and Mistral encode and decode."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["the answer is a short one ▁ a the"] * 4, trainer)
    value = json.loads(backend.to_str())
    value["added_tokens"] = value["added_tokens"][:2]  # the bytes are pieces, not special tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(value)), eos_token="</s>", unk_token="<unk>"
    )


@given(prompt=TEXTS, completion=TEXTS)
@settings(max_examples=150, deadline=None)
def test_pieces_are_the_text_that_was_tokenised(prompt: str, completion: str) -> None:
    document = encoder().encode(Row("f", 1, "prompt_completion", {"prompt": prompt, "completion": completion}))[0]
    shown = pieces(document, tokenizer_of("plain_bos"))
    assert "".join(piece.text for piece in shown) == f"<s>{prompt}{completion}</s>"
    assert [piece.id for piece in shown] == document.input_ids.tolist()
    assert [piece.trained for piece in shown] == document.trained.tolist()
    assert [piece.text for piece in shown if piece.special] == ["<s>", "</s>"]


@given(text=st.text(st.sampled_from("ab the answerЖ日😀 \n"), min_size=1, max_size=30).filter(str.strip))
@settings(max_examples=100, deadline=None)
def test_pieces_of_a_sentencepiece_tokenizer(text: str) -> None:
    """Its decoder drops a text's first space and joins bytes to characters: neither may lose or move anything."""
    tokenizer = like_llama()
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
    shown = pieces(Document(ids, np.ones(len(ids), dtype=np.bool_)), tokenizer)
    assert "".join(piece.text for piece in shown) == text


def test_a_character_of_several_tokens_stands_at_the_last() -> None:
    tokenizer = tokenizer_of("plain_bos")
    ids = np.array(tokenizer.encode("a😀b", add_special_tokens=False), dtype=np.int32)
    texts = [piece.text for piece in pieces(Document(ids, np.ones(len(ids), dtype=np.bool_)), tokenizer)]
    assert texts == ["a", "", "", "", "😀", "b"]
    cut = pieces(Document(ids[:3], np.ones(3, dtype=np.bool_)), tokenizer)  # ends inside the character
    assert [piece.text for piece in cut] == ["a", "", "\ufffd"]


def test_bytes_that_make_no_character_change_nothing_before_them() -> None:
    """Such a decoder makes of a run of bytes that is not UTF-8 nothing but replacement characters."""
    tokenizer = like_llama()
    ids = np.array(tokenizer.convert_tokens_to_ids(["a", "<0xE2>", "<0x82>", "<0xAC>", "<0x80>"]), dtype=np.int32)
    texts = [piece.text for piece in pieces(Document(ids, np.ones(5, dtype=np.bool_)), tokenizer)]
    assert texts == ["a", "", "", "€", "\ufffd"]


@given(st.text(st.characters(), max_size=20))
@settings(max_examples=300, deadline=None)
def test_visible_text_is_harmless(text: str) -> None:
    shown = visible(text)
    assert not any(unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp") for c in shown)
    assert len(shown) >= len(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain <b>[red] text", "plain <b>[red] text"),
        ("\x1b[31m\r\n\t\x00\x7f", "␛[31m␍↵⇥␀␡"),
        ("\x9b2J\u202eabc\u200b\ufeff\u2028", "⟨U+009B⟩2J⟨U+202E⟩abc⟨U+200B⟩⟨U+FEFF⟩⟨U+2028⟩"),
        ("\ud800\ue000\U000e0041", "⟨U+D800⟩⟨U+E000⟩⟨U+E0041⟩"),
        ("\u0301a\u0301", "◌\u0301a\u0301"),
        ("Київ ї 日本 שלום", "Київ ї 日本 שלום"),
    ],
)
def test_each_kind_of_hostile_character_has_its_symbol(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_numbers_are_those_of_the_dataset_that_trains(tmp_path: Path) -> None:
    texts = ["a" * 300, *("the answer " * n for n in range(1, 9))]
    path = write(tmp_path / "rows.jsonl", *({"prompt": t, "completion": t} for t in texts), "no json")
    found = preview(path, encoder(max_tokens=60))
    trained = load_dataset(path, encoder(max_tokens=60), reject=True)
    assert found.ledger.to_json_lines() == trained.ledger.to_json_lines()
    assert (found.num_documents, found.num_tokens) == (len(trained), trained.num_tokens)
    assert found.num_trained == trained.num_labels
    assert found.ledger.rows_in == 10 and len(found.ledger.rejects) > 1
    for row, document, where in zip(found.rows, trained.documents, trained.sources):
        assert row.where == where
        assert [piece.id for piece in row.documents[0]] == document.input_ids.tolist()
        assert [piece.trained for piece in row.documents[0]] == document.trained.tolist()
    assert found.lengths is not None and sum(found.lengths.counts) == len(trained)
    assert found.lengths.median == np.median(trained.lengths)
    assert found.shares is not None and sum(found.shares.counts) == len(trained)


def test_a_split_text_is_shown_in_all_its_parts(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "the answer is a short one, " * 20})
    (row,) = preview(path, encoder(max_tokens=32, long="split")).rows
    assert len(row.documents) > 2
    parts = ["".join(piece.text for piece in document) for document in row.documents]
    assert "".join(part.removeprefix("<s>") for part in parts) == "the answer is a short one, " * 20 + "</s>"


@pytest.mark.parametrize(
    ("only", "shown"),
    [
        (["3"], ["train.jsonl:3"]),
        (["train.jsonl:4", "1"], ["train.jsonl:4", "train.jsonl:1"]),
        (["2"], ["train.jsonl:2"]),
    ],
)
def test_rows_by_name(tmp_path: Path, monkeypatch: Any, only: list[str], shown: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(Path("train.jsonl"), {"text": "one"}, '{"text": ""}', {"text": "three"}, {"text": "four"})
    found = preview(path, encoder(), only=only)
    assert [row.where for row in found.rows] == shown
    assert [row.reason is not None for row in found.rows] == [where.endswith(":2") for where in shown]
    assert [row.where for row in preview(path.resolve(), encoder(), only=["train.jsonl:3"]).rows] == [
        f"{path.resolve()}:3"
    ]


@pytest.mark.parametrize("name", ["5", "0", "other.jsonl:1", "one", ""])
def test_a_row_that_is_not_there(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "one"}, {"text": "two"})
    with pytest.raises(ConfigError, match=rf"has no row '{name}'; expected a line number"):
        preview(path, encoder(), only=[name])


def test_rows_that_cannot_be_trained_leave_nothing_to_show(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "fine", "label": "a"}, {"text": "fine too", "label": "b"})
    found = preview(path, encoder())
    assert (found.format, found.rows, found.lengths, found.num_tokens) == ("classification", [], None, 0)
    assert len(found.ledger.rejects) == 2


def test_several_specs_are_read_as_one_as_a_run_reads_them(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text('{"text": "a b"}\n' * 2)
    other.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1, "completion": "b"}\n')
    specs = [str(one), f"{other}#2"]
    found = preview(specs, encoder(), rows=9)
    assert (found.format, found.source) == ("text, prompt_completion", ", ".join(specs))
    assert [row.where for row in found.rows] == [f"{one}:1", f"{one}:2", f"{other}:1"]
    assert (found.ledger.rows_in, [each.where for each in found.ledger.rejects]) == (4, [f"{other}:2"])
    trained = load_dataset(dict.fromkeys(specs, 1.0), encoder(), reject=True)
    assert (found.num_tokens, found.num_trained) == (trained.num_tokens, trained.num_labels)
    assert read_ledger(specs).rows_in == 4


@pytest.mark.parametrize("read", [lambda path: preview(path, encoder()), read_ledger])
def test_a_file_without_rows(tmp_path: Path, read: Any) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read(write(tmp_path / "rows.jsonl"))


def test_format_columns_and_template_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"question_text": "a", "answer_text": "b"})
    columns = {"prompt": "question_text", "completion": "answer_text"}
    found = preview(path, encoder(), columns=columns)
    assert (found.format, found.columns, found.template) == ("prompt_completion", columns, None)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "chat.jsonl", {"messages": said})
    assert preview(path, encoder("plain")).template == "the plain chat template (it brings none)"
    assert preview(path, encoder("chatml")).template == "its own chat template"


def test_large_data_goes_through_the_store(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MIN_STORED_BYTES", 1)
    path = write(tmp_path / "rows.jsonl", *({"text": f"the answer is {n}"} for n in range(30)))
    said: list[str] = []
    found = [preview(path, encoder(), cache=tmp_path / "cache", notify=said.append) for _ in range(2)]
    assert found[0].to_json() == found[1].to_json() == preview(path, encoder()).to_json()
    assert len(said) == 1 and len(list((tmp_path / "cache").iterdir())) == 1


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_every_length_is_counted(lengths: list[int]) -> None:
    found = module._length_histogram(np.array(lengths))
    assert sum(found.counts) == len(lengths) and len(found.counts) <= 32
    assert found.edges[0] <= min(lengths) and max(lengths) <= found.edges[-1]
    assert sum(length <= found.most for length in lengths) >= 0.95 * len(lengths) - 1


def test_lengths_that_differ_much_are_counted_on_a_logarithmic_axis() -> None:
    wide, narrow = module._length_histogram(np.array([10, 10_000])), module._length_histogram(np.array([10, 150]))
    assert wide.edges[16] == pytest.approx((10 * 10_001) ** 0.5, abs=1)
    assert narrow.edges[16] == 10 + 16 * 5


@pytest.mark.parametrize("name", FAMILIES)
def test_lines_of_a_chat_are_all_its_tokens(name: str) -> None:
    said = [{"role": "user", "content": "a\nb\n\nc"}, {"role": "assistant", "content": "d\n\ne"}]
    chat = encoder(name)
    shown = pieces(chat.encode(Row("f", 1, "messages", {"messages": said}))[0], chat.tokenizer)
    lines = list(spans(shown))
    assert [piece for line in lines for piece in line] == shown
    assert all("\n" not in piece.text for line in lines for piece in line[:-1])
    trained = "".join(piece.text for piece in shown if piece.trained)
    assert trained == FAMILIES[name].turn.format("d\n\ne")


def test_as_json_it_is_plain(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "one \x1b"}, "{")
    value = json.loads(json.dumps(preview(path, encoder()).to_json()))
    assert value["rows_in"] == value["rows_trained"] + len(value["rejected"]) == 2
    assert value["rejected"][0].keys() == {"source", "line", "reason"}
    assert value["rows"][0]["documents"][0][0] == {"id": 0, "text": "<s>", "trained": False, "special": True}
    assert value["notes"]["unusual characters"]["count"] == 1
