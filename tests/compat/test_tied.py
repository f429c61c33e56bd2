"""`ensure_weight_tying` under PEFT's names: the layers show one tensor, train it once, and merge to one weight."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from families import FAMILIES, inputs_for
from loratune.compat.peft import LoraConfig, PeftModel, get_layer_status, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS: dict[str, Any] = {"r": 2, "lora_alpha": 6, "ensure_weight_tying": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "factor": ("gemma3_text", {"target_modules": ["lm_head"]}),
    "factor, other names": ("gpt2", {"target_modules": ["wte"]}),
    "factor, encoder and decoder": ("t5", {"target_modules": ["lm_head"]}),
    "whole": ("gemma3_text", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "rows": ("bart", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
}


def logits(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs_for(family))[0]


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max() / other.abs().max()) < 1e-5


def wrapped(kind: str) -> tuple[Any, str]:
    family, settings = KINDS[kind]
    model = get_peft_model(FAMILIES[family](), LoraConfig(**{**SETTINGS, **settings})).eval()
    torch.manual_seed(3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model, family


@pytest.mark.parametrize("kind", KINDS)
def test_files_agree_with_peft_and_merging_leaves_one_weight(kind: str, tmp_path: Path) -> None:
    model, family = wrapped(kind)
    base = {name: value.clone() for name, value in FAMILIES[family]().state_dict().items()}
    expected = logits(model, family)
    model.save_pretrained(tmp_path / "a")
    assert close(logits(PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "a"), family), expected)
    assert close(logits(peft.PeftModel.from_pretrained(FAMILIES[family](), str(tmp_path / "a")), family), expected)
    with model.disable_adapter():
        assert close(logits(model, family), logits(FAMILIES[family](), family))
    model.merge_adapter()
    assert close(logits(model, family), expected)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert close(logits(merged, family), expected)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    again, _ = wrapped(kind)
    assert all(torch.equal(value, base[name]) for name, value in again.unload().state_dict().items())


def test_the_head_shows_the_embeddings_tensors_and_they_are_counted_and_trained_once() -> None:
    model, family = wrapped("factor")
    inner = model.get_base_model()
    embedding, head = inner.model.embed_tokens, inner.lm_head
    assert head.lora_A["default"].weight.data_ptr() == embedding.lora_embedding_B["default"].data_ptr()
    assert torch.equal(head.lora_B["default"].weight, embedding.lora_embedding_A["default"].T)
    assert model.get_nb_trainable_parameters()[0] == 2 * (inner.config.vocab_size + inner.config.hidden_size)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**inputs_for(family))[0].square().mean().backward()
    optimizer.step()
    assert torch.equal(head.lora_A["default"].weight, embedding.lora_embedding_B["default"].T)
    state = {each.name: each for each in get_layer_status(model)}
    assert state["model.lm_head"].requires_grad == {"default": True}
    assert not any("lm_head.lora" in name for name in model.state_dict())
