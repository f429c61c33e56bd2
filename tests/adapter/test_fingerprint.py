"""The fingerprint tells the same weights, the same weights rounded otherwise, and other weights apart."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from families import FAMILIES
from loratune.adapter.fingerprint import NUM_SAMPLES, Fingerprint, fingerprint
from oracles import randomise, same_state, state_of


def test_the_same_weights_have_the_same_fingerprint_and_nothing_is_changed() -> None:
    model = FAMILIES["llama"]()
    before = state_of(model)
    found = fingerprint(model)
    assert same_state(model, before)
    assert found == fingerprint(FAMILIES["llama"]()) and found.compare(fingerprint(FAMILIES["llama"]())) == "same"
    assert len(found.samples) == 4 * NUM_SAMPLES


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_is_told_from_other_weights(family: str, dtype: torch.dtype) -> None:
    found = fingerprint(FAMILIES[family]()).compare(fingerprint(FAMILIES[family]().to(dtype)))
    assert found == ("same" if dtype == torch.float64 else "precision")


def _trained(model: nn.Module) -> None:
    randomise(model.parameters(), std=0.01)


def _one_more_row(model: nn.Module) -> None:
    model.resize_token_embeddings(129)  # type: ignore[operator]


def _renamed(model: nn.Module) -> None:
    model.extra = model.lm_head  # type: ignore[assignment]
    del model.lm_head


def _not_finite(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("change", [_trained, _one_more_row, _renamed, _not_finite])
def test_other_weights_of_the_same_family_differ(change: Callable[[nn.Module], None]) -> None:
    model = FAMILIES["llama"]()
    change(model)
    assert fingerprint(FAMILIES["llama"]()).compare(fingerprint(model)) == "different"


def test_it_survives_json() -> None:
    found = fingerprint(FAMILIES["llama"]())
    assert Fingerprint.from_json(found.to_json()) == found


def test_models_with_few_or_no_weights() -> None:
    assert fingerprint(nn.Identity()) == fingerprint(nn.ReLU())
    small = fingerprint(nn.Linear(1, 1))
    assert len(small.samples) == 4 * NUM_SAMPLES and small.compare(fingerprint(nn.Identity())) == "different"


def test_the_meta_device_has_a_structure_and_no_samples() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    found = fingerprint(model)
    assert found.structure == fingerprint(nn.Linear(3, 2)).structure and found.samples == b""
    assert found.compare(fingerprint(nn.Linear(3, 2))) == "different"
