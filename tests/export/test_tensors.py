"""The block-wise reader and writer of safetensors files, against the format's own library."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loratune.errors import ExportError
from loratune.export import tensors
from loratune.export.tensors import FLOAT_NAMES, Entry, read_headers, write_file

_SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
_CONTENT = st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(st.sampled_from([*FLOAT_NAMES]), _SHAPES))
_quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _random(content: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (dtype, shape) in content.items()}


@_quick
@given(_CONTENT, st.integers(1, 40))
def test_what_is_written_is_read_by_the_library_and_by_us(tmp_path: Path, content: dict, block: int) -> None:
    values = {name: value for name, value in _random(content).items() if name != "__metadata__"}
    path = tmp_path / tensors.WEIGHTS
    path.unlink(missing_ok=True)
    entries = [Entry(name, FLOAT_NAMES[v.dtype], tuple(v.shape), v.nbytes) for name, v in values.items()]
    write_file(path, entries, ([v.reshape(-1).view(torch.uint8).numpy()] for v in values.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_BLOCK_BYTES", block)
        headers = read_headers(tmp_path)
        assert list(headers) == list(values)
        for name, value in values.items():
            rows = [part for _, part in headers[name].rows()]
            found = torch.cat(rows).reshape(value.shape) if rows else torch.empty(value.shape, dtype=value.dtype)
            assert torch.equal(found, value)
            assert b"".join(headers[name].blocks()) == value.reshape(-1).view(torch.uint8).numpy().tobytes()
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], value) for name, value in values.items())


def test_a_file_cut_or_changed_anywhere_in_its_header_is_refused_or_read_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / tensors.WEIGHTS
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ExportError):
            read_headers(tmp_path)
    for position in range(len(data) - 32):
        path.write_bytes(data[:position] + b"\xff" + data[position + 1 :])
        try:
            found = read_headers(tmp_path)
        except ExportError:
            continue
        assert all(tensor.offset + tensor.num_bytes <= len(data) for tensor in found.values())


@pytest.mark.parametrize("shard", ["../model.safetensors", "missing.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, shard: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / tensors.INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ExportError, match="which is not in"):
        read_headers(folder)


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / tensors.INDEX).write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    with pytest.raises(ExportError, match="is in two files"):
        read_headers(tmp_path)
