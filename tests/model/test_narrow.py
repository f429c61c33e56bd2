"""Weights held in two bytes, against the same weights loaded as float32: the same bits, in half the memory."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny_run
from families import FAMILIES, inputs_for
from loratune import api
from loratune.adapter.attach import Attached, attach
from loratune.adapter.config import LoraConfig
from loratune.adapter.fingerprint import fingerprint
from loratune.data.encode import Document
from loratune.errors import ConfigError
from loratune.evaluate.generate import generate
from loratune.model import narrow
from loratune.model.causal import CausalModel
from loratune.model.load import load_model
from loratune.model.narrow import Narrow, held_bytes
from loratune.train.config import load_run_config

# Known blocks and the plain path; Conv1D, convolutions, stacked experts, tied heads, soft caps, biases, layer norms.
PATHS = ("llama", "gemma3_text", "qwen2", "gemma2", "gpt2", "falcon", "mixtral", "bert", "t5", "bart", "segformer")
TARGETS = {"gpt2": ["c_attn", "c_proj"], "segformer": ["q_proj", "v_proj", "proj"], "bert": ["query", "dense"]}


def pair(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same stored weights, loaded as float32 and as stored."""
    kind = type(FAMILIES[family]())
    FAMILIES[family]().to(dtype).save_pretrained(folder)  # pyright: ignore
    wide = kind.from_pretrained(folder, dtype=torch.float32)
    with narrow.as_stored():
        held = kind.from_pretrained(folder, dtype=torch.float32)
    return tuple(narrow.narrow(each.eval().requires_grad_(False)) for each in (wide, held))  # type: ignore[return-value]


def adapted(model: PreTrainedModel, family: str) -> Attached:
    attached = attach(
        model, LoraConfig(r=4, target_modules=TARGETS.get(family, "all-linear"), lora_dropout=0.0), seed=0
    )
    with torch.no_grad():
        for number, factor in enumerate(attached.adapter.factors.values()):
            factor.B.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    return attached


def gradients(attached: Attached, loss: Tensor) -> list[Tensor]:
    loss.backward()
    each = [grad for factor in attached.adapter.factors.values() for grad in (factor.A.grad, factor.B.grad)]
    return [grad for grad in each if grad is not None]  # of what the inputs reach


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) > 0 and all(torch.equal(*each) for each in zip(some, others, strict=True))


@pytest.mark.parametrize("family", PATHS)
def test_the_families_own_forward_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    wide, held = pair(family, tmp_path)
    assert fingerprint(held) == fingerprint(wide)
    assert held.dtype == torch.float32 and all(isinstance(each, Narrow) for each in held.parameters())
    assert 2 * held_bytes(held) == held_bytes(wide)
    results = []
    for model in (wide, held):
        logits = model(**inputs_for(family)).logits
        attached = adapted(model, family)
        tuned = model(**inputs_for(family)).logits
        results.append((logits, tuned, gradients(attached, tuned.square().mean())))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[0][1])
    assert equal(results[0][2], results[1][2])


@pytest.mark.parametrize("dtype", narrow.DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2", "gemma2", "gpt2"])
def test_documents_give_the_same_losses_and_gradients(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    wide, held = pair(family, tmp_path, dtype)
    ids = np.random.RandomState(0).randint(3, 90, (3, 12)).astype(np.int32)
    documents = [Document(row, np.arange(12) > 4) for row in ids]
    results = []
    for model in (wide, held):
        attached = adapted(model, family)
        causal = CausalModel(model)
        loss, each = causal.losses(causal.batch(documents, range(3)))
        results.append((each, gradients(attached, loss), causal.notes, causal.blocks is None))
    assert torch.equal(results[0][0], results[1][0]) and results[0][2:] == results[1][2:]
    assert results[1][3] == (family == "gpt2")  # the others run as blocks
    assert equal(results[0][1], results[1][1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_backward_pass_keeps_no_wide_copy(family: str, tmp_path: Path) -> None:
    """What is kept of a weight is the Narrow itself; nothing plain of the shape of a weight."""
    _, held = pair(family, tmp_path)
    shapes = {tuple(each.shape) for each in held.parameters() if each.ndim > 1}
    shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}
    adapted(held, family)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held(**inputs_for(family, batch=1, length=11)).logits.sum()
    assert any(isinstance(each, Narrow) for each in kept)
    plain = [each for each in kept if not isinstance(each, Narrow) and not each.requires_grad]
    assert not [each for each in plain if tuple(each.shape) in shapes]


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_large_product_goes_stretch_by_stretch(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(16, 50, bias=with_bias).requires_grad_(False), torch.randn(2, 3, 16, requires_grad=True)
    wide = copy.deepcopy(layer.bfloat16()).float()
    held = narrow.narrow(layer)
    widened: list[int] = []

    def watched(value: Any, before: Callable[[Any], Any] = narrow._wide) -> Any:
        widened.append(value.numel() if isinstance(value, Narrow) else 0)
        return before(value)

    monkeypatch.setattr(narrow, "MOST", 64)
    monkeypatch.setattr(narrow, "_wide", watched)
    results = [(y := layer(x), *torch.autograd.grad(y.square().sum(), x)) for layer in (held, wide)]
    torch.testing.assert_close(results[0], results[1])
    assert 48 <= max(widened) <= 64


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    _, held = pair("gemma3_text", tmp_path)
    assert held.get_input_embeddings().weight is held.get_output_embeddings().weight


def test_a_base_weight_is_not_written_to(tmp_path: Path) -> None:
    _, held = pair("llama", tmp_path)
    with pytest.raises(ConfigError, match=r'held as torch.bfloat16, which is frozen. Load .* dtype="float32"'):
        held.get_output_embeddings().weight.data.zero_()


def test_a_copy_that_may_be_trained_is_plain_float32(tmp_path: Path) -> None:
    wide, held = pair("llama", tmp_path)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], lora_dropout=0.0)
    trained = attach(held, config).adapter.saved["lm_head"].weight
    assert type(trained) is nn.Parameter and trained.requires_grad
    assert torch.equal(trained, wide.get_output_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_merged_model_is_plain_where_it_changed_and_saves(family: str, tmp_path: Path) -> None:
    wide, held = pair(family, tmp_path / "base")
    ids = inputs_for(family)
    merged = [adapted(model, family).merge() for model in (wide, held)]
    assert torch.equal(merged[0](**ids).logits, merged[1](**ids).logits)  # type: ignore[operator]
    held.save_pretrained(tmp_path / "merged")
    again = type(held).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert torch.equal(again(**ids).logits, merged[0](**ids).logits)  # type: ignore[operator]


def test_generated_tokens_are_the_same(tmp_path: Path) -> None:
    tiny_run.save_model(tmp_path / "model")
    (model, tokenizer), (held, _) = (
        load_model(tmp_path / "model", dtype=each, device="cpu") for each in ("float32", "stored")
    )
    prompts = [[3, 4, 5], [7], [9, 8, 7, 6]]
    assert generate(held, tokenizer, prompts, 8) == generate(model, tokenizer, prompts, 8)


def test_a_head_is_not_widened_whole_to_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product with the weight on its left would be: only those with it on their right go by stretches."""
    wide_model, held = pair("llama", tmp_path)
    head: Any = held.get_output_embeddings()
    seen, wide = list[int](), narrow._wide

    def looked_at(value: Any) -> Any:
        seen.append(value.numel() if isinstance(value, Narrow) else 0)
        return wide(value)

    monkeypatch.setattr(narrow, "MOST", head.weight.numel() // 4)
    monkeypatch.setattr(narrow, "_wide", looked_at)
    prompts, tokenizer = [[5, 6, 7], [9]], tiny_run.tokenizer()
    found = generate(held, tokenizer, prompts, 6)
    assert isinstance(head.weight, Narrow) and 0 < max(seen) < head.weight.numel()
    assert found == generate(wide_model, tokenizer, prompts, 6)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_loading_as_stored_gives_the_values_of_loading_as_float32(stored: torch.dtype, tmp_path: Path) -> None:
    tiny_run.save_model(tmp_path)
    load_model(tmp_path, device="cpu")[0].to(stored).save_pretrained(tmp_path)  # pyright: ignore
    wide, held = (load_model(tmp_path, dtype=each, device="cpu")[0] for each in ("float32", "stored"))
    assert held_bytes(held) == held_bytes(wide) // (2 if stored in narrow.DTYPES else 1)
    for (name, one), (_, other) in zip(wide.named_parameters(), held.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        assert not other.requires_grad and isinstance(other, Narrow) == (stored in narrow.DTYPES)


def test_a_file_of_several_types_keeps_each(tmp_path: Path) -> None:
    model = FAMILIES["llama"]().bfloat16()
    model.model.norm.float().weight.data.fill_(1 + 2**-20)
    model.save_pretrained(tmp_path)
    with narrow.as_stored():
        held = narrow.narrow(type(model).from_pretrained(tmp_path, dtype=torch.float32).requires_grad_(False))
    assert {name for name, each in held.named_parameters() if not isinstance(each, Narrow)} == {"model.norm.weight"}
    assert float(held.model.norm.weight[0]) == 1 + 2**-20


def test_a_run_learns_the_same_bits(tmp_path: Path) -> None:
    tiny_run.save_model(tmp_path / "model")
    load_model(tmp_path / "model", device="cpu")[0].bfloat16().save_pretrained(tmp_path / "model")  # pyright: ignore
    tiny_run.write_rows(tmp_path / "rows.jsonl", [{"prompt": "say", "completion": f"{n} {n + 1}"} for n in range(24)])
    files = []
    for dtype in ("float32", "stored"):
        settings: dict[str, Any] = {
            "model": str(tmp_path / "model"),
            "data.train": str(tmp_path / "rows.jsonl"),
            "train.dtype": dtype,
        }
        api.run(load_run_config(None, {**settings, "output": str(tmp_path / dtype)}))
        files.append((tmp_path / dtype / "adapter" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
