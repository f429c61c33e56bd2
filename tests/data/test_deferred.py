"""A tokenizer whose reading waits: the same as the one that is read, and never another one in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from data.toy_tokenizer import FAMILIES, build
from loratune import api
from loratune.data import dataset
from loratune.data.deferred import Deferred, deferred, note, tokenizer_digest
from loratune.data.encode import Encoder
from loratune.data.rows import Row
from loratune.errors import ConfigError
from loratune.model.load import load_tokenizer
from loratune.prepare import load
from loratune.train.config import load_run_config
from tiny_run import copy_rows, save_model, write_rows


class Place:
    """A folder with a model, a cache, and how often the tokenizer was read."""

    def __init__(self, root: Path) -> None:
        self.folder, self.cache, self.num_read = save_model(root / "model"), root / "cache", 0

    def read(self) -> PreTrainedTokenizerBase:
        self.num_read += 1
        return load_tokenizer(self.folder)

    def found(self) -> Deferred | None:
        return deferred(self.folder, self.cache, self.read)

    def noted(self) -> Deferred:
        note(self.folder, self.cache, self.read())
        self.num_read = 0
        found = self.found()
        assert found is not None
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_was_never_read_is_not_deferred(place: Place) -> None:
    assert place.found() is None and place.num_read == 0


def test_it_knows_itself_without_being_read_and_is_read_once(place: Place) -> None:
    waiting, real = place.noted(), load_tokenizer(place.folder)
    assert tokenizer_digest(waiting) == tokenizer_digest(real)
    assert waiting.special_tokens_map == {name: str(token) for name, token in real.special_tokens_map.items()}
    assert waiting and place.num_read == 0
    assert len(waiting) == len(real) and waiting("a b")["input_ids"] == real("a b")["input_ids"]
    assert waiting.encode("1 2 =") == real.encode("1 2 =") and place.num_read == 1


def test_an_encoder_reads_it_with_the_first_row(place: Place) -> None:
    encoder = Encoder(place.noted(), 96)  # pyright: ignore[reportArgumentType]
    assert place.num_read == 0
    row = Row("rows.jsonl", 1, "prompt_completion", {"prompt": "1 2 =", "completion": " 1 2"})
    [found], [expected] = encoder.encode(row), Encoder(load_tokenizer(place.folder), 96).encode(row)
    assert found.input_ids.tolist() == expected.input_ids.tolist() and place.num_read == 1


def _template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def _vocabulary(folder: Path) -> None:
    build(FAMILIES["chatml"]).save_pretrained(folder)


def _settings(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "="}))


@pytest.mark.parametrize("change", [_template, _vocabulary, _settings])
def test_other_files_are_another_tokenizer(place: Place, change: Callable[[Path], None]) -> None:
    place.noted()
    change(place.folder)
    assert place.found() is None


def test_files_that_change_while_it_waits_are_told(place: Place) -> None:
    waiting = place.noted()
    _template(place.folder)
    with pytest.raises(ConfigError, match=r"model is another than the one this run began with .* Put them back"):
        waiting.encode("a")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"digest": "x"}'])
def test_a_note_that_cannot_be_read_is_no_note(place: Place, content: str) -> None:
    place.noted()
    [path] = (place.cache / "tokenizers").iterdir()
    path.write_text(content)
    assert place.found() is None


def test_a_cache_that_cannot_be_written_costs_time_only(place: Place) -> None:
    place.cache.write_text("a file where the folder should be")
    note(place.folder, place.cache, place.read())
    assert place.found() is None


def test_a_run_begins_without_it_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run reads and notes it; the second has it read after its first step, and writes the same bytes."""
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    folder, rows = save_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", copy_rows(12))
    given = {"model": str(folder), "data.train": str(rows), "train.max_steps": 2, "train.batch_size": 4}
    configs = [load_run_config(None, {**given, "output": str(tmp_path / name)}) for name in ("one", "two")]
    kinds: list[type] = []

    def run(config: Any) -> api.RunResult:
        kinds.append(type(load(config.config, print)[1]))
        return api.run(config)

    one, two = map(run, configs)
    assert kinds[0] is not Deferred and kinds[1] is Deferred
    assert one.samples_after == two.samples_after and one.after == two.after
    for name in ("adapter/adapter_model.safetensors", "adapter/tokenizer.json"):
        first, second = (tmp_path / each / name for each in ("one", "two"))
        assert first.exists() == second.exists() and (not first.exists() or first.read_bytes() == second.read_bytes())


def test_a_tokenizer_that_is_changed_after_the_start_stops_the_run_after_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset, "MIN_STORED_BYTES", 0)
    folder, rows = save_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", copy_rows(24))
    given = {"model": str(folder), "data.train": str(rows), "train.max_steps": 3, "train.batch_size": 4}
    api.run(load_run_config(None, {**given, "output": str(tmp_path / "first")}))
    steps: list[int] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            _template(folder)
        if event["event"] == "step":
            steps.append(event["step"])

    with pytest.raises(ConfigError, match="its files were changed meanwhile"):
        api.run(load_run_config(None, {**given, "output": str(tmp_path / "second")}), on_event)
    assert steps == [1]
