"""Files made to do harm: pickles, code beside a model, names that lead elsewhere, headers that lie about sizes."""

import itertools
import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratune import api, files
from loratune.adapter import peft_format
from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.compat import peft as compat
from loratune.errors import AdapterError, CheckpointError, ConfigError, LoratuneError
from loratune.export.convert import convert
from loratune.model.load import load_model
from loratune.train import checkpoint
from tiny_run import save_model, tiny_llama, tree


class Harm:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What exists if code from a file was run."""
    return tmp_path / "was-run"


def pickled(path: Path, mark: Path, *, as_torch: bool) -> None:
    torch.save({"w": Harm(mark)}, path) if as_torch else path.write_bytes(pickle.dumps(Harm(mark)))


def test_the_pickle_is_harmful(tmp_path: Path, mark: Path) -> None:
    pickled(tmp_path / "x", mark, as_torch=False)
    pickle.loads((tmp_path / "x").read_bytes())
    assert mark.exists()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    attach(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), seed=0).save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("as_torch", [True, False])
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors"])
def test_a_pickle_for_an_adapter_is_refused_unread(adapter: Path, mark: Path, name: str, as_torch: bool) -> None:
    (adapter / peft_format.WEIGHTS).unlink()
    pickled(adapter / name, mark, as_torch=as_torch)
    with pytest.raises(AdapterError, match=r"pickle|not a safetensors file"):
        peft_format.read(adapter)
    with pytest.raises(LoratuneError):
        api.adapter_info(adapter)
    with pytest.raises(LoratuneError):
        convert(adapter, adapter.with_name("copy"), "peft")
    assert not mark.exists()


def test_a_pickle_beside_a_good_adapter_is_not_read(adapter: Path, mark: Path) -> None:
    for name in ("adapter_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        pickled(adapter / name, mark, as_torch=True)
    assert peft_format.read(adapter).factors and not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "state.pkl"])
def test_a_pickle_in_a_checkpoint_is_refused_unread(tmp_path: Path, mark: Path, name: str) -> None:
    folder = checkpoint.write(tmp_path, 1, lambda folder: None, {}, {"step": 1})
    pickled(folder / name, mark, as_torch=True)
    with pytest.raises(CheckpointError, match=f"files missing or added: {name}"):
        checkpoint.read(folder)
    assert not mark.exists()


@pytest.mark.parametrize("as_torch", [True, False])
def test_a_pickle_for_a_base_model_runs_nothing(tmp_path: Path, mark: Path, as_torch: bool) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    pickled(folder / "pytorch_model.bin", mark, as_torch=as_torch)
    with pytest.raises(ConfigError, match=r"in a pickle, pytorch_model\.bin, which can run code and is not read"):
        load_model(folder)
    assert not mark.exists()


def code_beside(folder: Path, mark: Path, file: str, **values: Any) -> None:
    """Adds a module that leaves a mark, and values to a JSON file that name it."""
    for name in ("evil.py", "modeling_llama.py", "tokenization_evil.py", "configuration_evil.py"):
        (folder / name).write_text(
            f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\nclass Config: pass\n", encoding="utf-8"
        )
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


CODE: dict[str, tuple[str, dict[str, Any]]] = {
    "of a model": ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}}),
    "of an unknown kind": ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}),
    "of a tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}),
    "of a tokenizer's class": ("tokenizer_config.json", {"tokenizer_class": "evil.Evil"}),
    "of a kernel": ("config.json", {"_attn_implementation": "someone/evil-kernel"}),
    "of a kernel, inside": ("config.json", {"_attn_implementation_internal": "someone/evil-kernel"}),
    "of a kernel, by its public name": ("config.json", {"attn_implementation": "someone/evil-kernel"}),
}  # fmt: skip


@pytest.mark.parametrize(("file", "values"), CODE.values(), ids=CODE)
def test_code_beside_a_model_is_never_imported(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, file: str, values: dict[str, Any]
) -> None:
    """The model is read with the library's own code, or refused; nobody is asked, and nothing is fetched."""
    folder = save_model(tmp_path / "model")
    code_beside(folder, mark, file, **values)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        model, _ = load_model(folder)
        assert type(model).__module__ == "transformers.models.llama.modeling_llama"
        assert "evil" not in model.config._attn_implementation
    except ConfigError:
        pass
    assert not mark.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
        {"megatron_core": "evil.core"},
        {"auto_map": {"AutoModel": "evil.Evil"}},
        {"base_model_name_or_path": "../evil"},
        {"revision": "../../evil"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_an_adapters_configuration_cannot_name_code(adapter: Path, mark: Path, values: dict[str, Any]) -> None:
    code_beside(adapter, mark, peft_format.CONFIG, **values)
    try:
        peft_format.read(adapter)
        api.adapter_info(adapter)
    except LoratuneError:
        pass
    assert not mark.exists()


PIECES = ("..", ".", "/", "\\", "a/b", "/etc/passwd", "C:\\x", "\\\\host\\x", "~", "a\0b", "a\nb", "con:", " ", "", "é",
          "%2e%2e", "a" * 65, "-rf", ".hidden", "$(x)", "`x`", "a b")  # fmt: skip
TRAVERSALS = sorted({*PIECES, *("/".join(pair) for pair in itertools.product(PIECES[:10], repeat=2))})


@pytest.mark.parametrize("name", TRAVERSALS, ids=ascii)
def test_a_name_that_leads_elsewhere_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used as a name"):
        files.safe_name(name, "the adapter name")


@pytest.mark.parametrize("name", ["../outside", "{tmp}/outside", "a/../../outside"])
def test_an_adapters_name_cannot_lead_out_of_the_folder_it_is_saved_to(tmp_path: Path, name: str) -> None:
    """PEFT 0.21.2 wrote to an adapter's name as to a path."""
    name = name.format(tmp=tmp_path)
    (tmp_path / "inside").mkdir()
    before = tree(tmp_path)
    with pytest.raises((LoratuneError, KeyError)):
        model = compat.get_peft_model(tiny_llama(), compat.LoraConfig(target_modules=["q_proj"]), adapter_name=name)
        model.save_pretrained(tmp_path / "inside")
    assert tree(tmp_path) == before


def header(content: Any, length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(shape: list[Any], begin: int = 0, end: int = 16, kind: str = "F32") -> dict[str, Any]:
    return {"a": {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}}


LIES = {
    "a length beyond the file": header({}, 2**63),
    "a length of nearly 2^64": header({}, 2**64 - 1),
    "a header of 2^40 bytes": header({}, 2**40),
    "a shape that overflows": header(entry([2**32, 2**32])) + bytes(16),
    "a shape that is larger than the data": header(entry([1 << 40])) + bytes(16),
    "offsets beyond the file": header(entry([4], 0, 1 << 60)) + bytes(16),
    "offsets that go back": header(entry([4], 16, 0)) + bytes(16),
    "a hole": header(entry([4], 16, 32)) + bytes(32),
    "data behind the last tensor": header(entry([4])) + bytes(64),
    "a negative size": header(entry([-4])) + bytes(16),
    "a type of its own": header(entry([4], kind="PYOBJ")) + bytes(16),
    "two names for one place": header(entry([4]) | {"b": entry([4])["a"]}) + bytes(16),
    "nested ten thousand deep": header(b"[" * 10_000),
    "no JSON": header(b"\xff" * 64),
    "nothing": b"",
    "seven bytes": b"1234567",
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused_in_little_memory(adapter: Path, content: bytes) -> None:
    (adapter / peft_format.WEIGHTS).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match="damaged or not a safetensors file"):
            peft_format.read(adapter)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


DAMAGED = settings(
    max_examples=20_000 if os.environ.get("LORATUNE_FAULTS") == "full" else 100, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
@DAMAGED
def test_a_header_with_any_bytes_is_read_or_refused(adapter: Path, changes: list[tuple[float, int]]) -> None:
    """What is read is finite, and no other error comes out than the one that names the file."""
    file = adapter / peft_format.WEIGHTS
    whole = file.read_bytes()
    end, data = 8 + int.from_bytes(whole[:8], "little"), bytearray(whole)
    for place, byte in changes:
        data[int(place * end)] = byte
    file.write_bytes(data)
    try:
        found = peft_format.read(adapter)
        assert all(factor.A.isfinite().all() for factor in found.factors.values())
    except AdapterError as error:
        assert str(adapter) in str(error)
    finally:
        file.write_bytes(whole)


def test_a_link_in_a_checkpoint_is_held_to_the_digest(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, 1, lambda folder: None, {}, {"step": 1})
    (folder / "state.json").unlink()
    (tmp_path / "elsewhere").write_text('{"step": 1, "best": null}')
    (folder / "state.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        checkpoint.read(folder)


def test_nothing_is_written_through_a_link_that_stands_where_a_file_is_to_be(tmp_path: Path) -> None:
    """A file gets its name by a rename, which replaces the link and leaves what it led to."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run.yaml").symlink_to(tmp_path / "precious")
    files.atomic_write(tmp_path / "run.yaml", "x")
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "run.yaml").is_symlink()
