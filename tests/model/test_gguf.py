"""GGUF files: the converted folder computes what the original model does, and nothing is converted by guess."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf as ggml
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, KINDS, tiny, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.errors import ConfigError
from loratune.model import gguf
from loratune.model.gguf_file import read
from loratune.model.load import load_model

Q8 = ggml.GGMLQuantizationType.Q8_0
IDS = torch.tensor([[2, 5, 261, 40, 299, 7, 7, 301, 12, 261, 17, 200, 33]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LORATUNE_CACHE", str(folder))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "llama.gguf", tiny("llama"), "llama")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_converted_model_is_the_original(architecture: str, tmp_path: Path) -> None:
    original = tiny(architecture)
    path = write_gguf(tmp_path / "m.gguf", original, architecture)
    model, _ = load_model(path, device="cpu")
    with torch.no_grad():
        # Gemma's norms went through float32 w + 1 - 1, so there the last bits differ.
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings == original.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        original.config.tie_word_embeddings
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_quantised_weights_equal_transformers_own_path_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny(architecture), architecture, kind=Q8)
    ours = load_model(path, device="cpu")[0].state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_keeps_its_type_and_values(dtype: torch.dtype, tmp_path: Path) -> None:
    original = tiny("gemma3").to(dtype)
    folder = gguf.converted(write_gguf(tmp_path / "m.gguf", original, "gemma3", kind=KINDS[dtype]))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == dtype
    # Norms are 1 + w in float32 in the file: exact for bfloat16's w, to a float32 rounding for float16's.
    for name, weight in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-7, msg=name)


def test_llama_3_rotary_scaling_is_recovered_from_the_factors(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    original = tiny("llama", rope_parameters=rope, head_dim=16)
    plain = 500_000.0 ** (-np.arange(0, 16, 2) / 16)
    factors = (plain / original.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() > 7
    path = write_gguf(tmp_path / "m.gguf", original, "llama", tensors={"rope_freqs.weight": factors})
    model = load_model(path, device="cpu")[0]
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)

    factors[-2] *= 1.1
    path = write_gguf(tmp_path / "other.gguf", original, "llama", tensors={"rope_freqs.weight": factors})
    with pytest.raises(ConfigError, match=r"not Llama 3's"):
        gguf.converted(path)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2"])
def test_the_tokenizer_survives_saving(architecture: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny(architecture), architecture)
    built = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    _, ours = load_model(path, device="cpu")
    for text in ("abc abp", "привет  при", "ёж 😀\n", "<eos>a"):
        ids = ours(text)["input_ids"]
        assert ids == built(text)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=True).strip() == text.removeprefix("<eos>").strip()
    assert (ours("a")["input_ids"][0] == ours.bos_token_id) == (architecture != "qwen2")
    ours.save_pretrained(tmp_path / "saved")
    for folder in (gguf.converted(path), tmp_path / "saved"):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert not {"is_local", "local_files_only"} & set(config)


BROKEN = {
    "an unknown key": ({"keys": {"llama.expert_count": 8}}, r"expert_count.*does not know"),
    "yarn": ({"keys": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}}, r"rope\.scaling\.factor"),
    "partial rotation": ({"keys": {"llama.rope.dimension_count": 8}}, r"rope\.dimension_count = 8; only 16"),
    "a missing tensor": ({"tensors": {"blk.1.ffn_up.weight": None}}, r"lacks 1 tensors; first: blk\.1\.ffn_up\.weight"),
    "no embedding": ({"tensors": {"token_embd.weight": None}}, r"no tensor token_embd"),
    "an extra tensor": ({"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, r"cannot place.*attn_q\.bias"),
    "a wrong shape": ({"tensors": {"blk.0.attn_k.weight": np.ones((64, 64), np.float32)}}, r"attn_k.*\(32, 64\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_carried_over_is_refused(case: str, tmp_path: Path, cache: Path) -> None:
    changes, message = BROKEN[case]
    with pytest.raises(ConfigError, match=message):
        gguf.converted(write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", **changes))
    assert [entry.suffix for entry in (cache / "gguf").iterdir()] in ([], [".lock"])


def test_linear_rotary_scaling_is_carried_over(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", keys=keys)
    config = json.loads((gguf.converted(path) / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0}
    assert config["rms_norm_eps"] == 1e-6  # float32 in the file


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = ggml.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"'rwkv7'.*llama, qwen2, qwen3, gemma3"):
        gguf.converted(tmp_path / "m.gguf")


def test_the_reader_agrees_with_the_official_one(llama: Path) -> None:
    ours, theirs = read(llama), ggml.GGUFReader(llama)
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        values = ggml.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.tensors[tensor.name].values(), values)
    stated = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata.keys() == stated.keys()
    for key, value in ours.metadata.items():
        assert (np.float32(value) if isinstance(value, float) else value) == stated[key], key


def test_a_file_cut_anywhere_is_refused(llama: Path, tmp_path: Path) -> None:
    whole = llama.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 600), *range(600, len(whole), 4999), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ConfigError):
            read(cut)


def test_rows_that_are_no_whole_blocks_are_refused(llama: Path) -> None:
    whole, name = bytearray(llama.read_bytes()), b"blk.0.attn_norm.weight"
    place = whole.index(name) + len(name) + 4 + 8  # past the number of dimensions and the one dimension, 64
    whole[place : place + 4] = struct.pack("<I", ggml.GGMLQuantizationType.Q4_K)  # blocks of 256
    llama.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"attn_norm\.weight of shape \(64,\) in blocks of 256"):
        read(llama)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused(data: st.DataObject, llama: Path, tmp_path: Path) -> None:
    whole = bytearray(llama.read_bytes())
    place = data.draw(st.integers(0, 12_000))
    damage = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(struct.pack("<Q", 2**62))))
    whole[place : place + len(damage)] = damage
    path = tmp_path / "damaged.gguf"
    path.write_bytes(whole)
    try:
        file = read(path)
    except ConfigError:
        return
    assert sum(tensor.data.nbytes for tensor in file.tensors.values()) <= len(whole)


def test_a_conversion_is_used_again(llama: Path) -> None:
    lines: list[str] = []
    folder = gguf.converted(llama, lines.append)
    weights = (folder / "model.safetensors").stat()
    assert gguf.converted(llama, lines.append) == folder
    assert (folder / "model.safetensors").stat() == weights
    assert len(lines) == 1
    assert lines[0].startswith("converting llama.gguf once")


def _truncate(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def _remove_manifest(folder: Path) -> None:
    (folder / gguf.MANIFEST).unlink()


def _spoil_manifest(folder: Path) -> None:
    (folder / gguf.MANIFEST).write_text("{")


def _age(folder: Path) -> None:
    manifest = json.loads((folder / gguf.MANIFEST).read_text())
    (folder / gguf.MANIFEST).write_text(json.dumps(manifest | {"format": 0}))


@pytest.mark.parametrize("damage", [_truncate, _remove_manifest, _spoil_manifest, _age])
def test_a_conversion_that_is_not_whole_is_made_again(damage, llama: Path, cache: Path) -> None:
    folder = gguf.converted(llama)
    size = (folder / "model.safetensors").stat().st_size
    damage(folder)
    (cache / "gguf" / f".{folder.name}.abandoned.tmp").mkdir()  # what a killed process leaves
    lines: list[str] = []
    assert gguf.converted(llama, lines.append) == folder
    assert len(lines) == 1
    assert (folder / "model.safetensors").stat().st_size == size
    assert {entry.name for entry in (cache / "gguf").iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_an_unwritable_cache_names_the_variable(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(llama / "below-a-file"))
    with pytest.raises(ConfigError, match=r"cannot write the model cache .*below-a-file.*Set LORATUNE_CACHE"):
        gguf.converted(llama)


def test_a_small_disk_is_told_before_anything_is_written(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(llama)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(ConfigError, match=r"needs \d+,\d+,\d+ bytes.*1,000,000 are free.*LORATUNE_CACHE"):
        gguf.converted(llama)


@pytest.fixture
def small_files() -> Iterator[None]:
    """As a full disk: writing past 30 kB of a file fails (Python ignores SIGXFSZ, so it is an OSError)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_nothing(llama: Path, cache: Path, small_files: None) -> None:
    with pytest.raises(ConfigError, match="Set LORATUNE_CACHE"):
        gguf.converted(llama)
    assert [entry.suffix for entry in (cache / "gguf").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("variables", "root"),
    [
        ({"LORATUNE_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HF_HOME": "/c"}, "/a"),
        ({"LORATUNE_CACHE": "", "XDG_CACHE_HOME": "/b", "HF_HOME": "/c"}, "/b/loratune"),
        ({"HF_HOME": "/c"}, "/c/loratune"),
        ({}, "/home/me/.cache/loratune"),
    ],
)
def test_the_cache_follows_the_environment(variables, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORATUNE_CACHE", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": "/home/me"}).items():
        monkeypatch.setenv(name, value)
    assert gguf.cache_root() == Path(root)


@pytest.mark.slow
def test_two_processes_convert_at_once(llama: Path) -> None:
    program = "import sys, pathlib; from loratune.model import gguf; print(gguf.converted(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", program, str(llama)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    folders = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert folders == {str(gguf.converted(llama))}
