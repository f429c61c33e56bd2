"""Keyed dropout: the mask depends on what it is for, not on how documents are cut or in which order they come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.adapter.dropout import Mask, Noise, Span, zero_
from oracles import IDS, Toy, brute_force, gradients, logits_of, objective, relative, worst

_CPU = torch.device("cpu")


def keep(noise: Noise, site: int, width: int, p: float) -> Tensor:
    """What stays, as a mask (T, width)."""
    ones = torch.ones(noise.num_tokens, width)
    return zero_(ones, noise.dropped(site, width, p, _CPU)).bool()


def alone(document: int, length: int, seed: int = 1, step: int = 2, site: int = 3) -> Tensor:
    return keep(Noise(seed, step, (Span(document, 0, length),), length), site, 8, 0.3)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_document_meets_the_same_mask_wherever_it_stands(rows: list[tuple[int, int, int]]) -> None:
    """Rows of (document, tokens, padding after them)."""
    spans, start = [], 0
    for document, length, padding in rows:
        spans.append(Span(document, start, length))
        start += length + padding
    mask = keep(Noise(1, 2, tuple(spans), start), 3, 8, 0.3)
    for span in spans:
        assert torch.equal(mask[span.start : span.start + span.length], alone(span.document, span.length))
    covered = sum(span.length for span in spans)
    assert start == covered or bool(mask.sum() >= (start - covered) * 8)  # padding is kept, it trains nothing


def test_a_shorter_cut_of_a_document_meets_the_first_rows_of_its_mask() -> None:
    assert torch.equal(alone(5, 9)[:4], alone(5, 4))


@pytest.mark.parametrize("other", [{"document": 6}, {"seed": 2}, {"step": 3}, {"site": 4}])
def test_every_part_of_the_key_matters(other: dict[str, int]) -> None:
    differing = (alone(5, 500) != alone(**({"document": 5, "length": 500} | other))).float().mean()
    assert 0.37 < float(differing) < 0.47  # two independent masks differ in 2 p (1 - p) = 0.42 of the places


def key(seed: int, step: int, document: int, site: int) -> int:
    return Noise(seed, step, (), 0)._key(document, site)


def test_keys_do_not_collide_where_sums_would() -> None:
    keys = {key(a, b, c, d) for a in range(6) for b in range(6) for c in range(6) for d in range(6)}
    assert len(keys) == 6**4 and all(0 <= key < 2**63 for key in keys)


def test_the_key_is_the_same_for_ever() -> None:
    """A resumed run must draw the masks of the run it goes on with, whatever the versions."""
    assert key(1, 2, 3, 4) == 2268768721060518439


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_rate_is_what_was_asked(p: float) -> None:
    mask = keep(Noise(0, 0, (Span(0, 0, 2000),), 2000), 0, 100, p)
    assert abs(float(mask.float().mean()) - (1 - p)) < 5 * (p * (1 - p) / 200_000) ** 0.5


def noise_for(model_ids: Tensor, step: int = 0) -> Noise:
    length = model_ids.shape[1]
    spans = tuple(Span(row, row * length, length) for row in range(len(model_ids)))
    return Noise(7, step, spans, model_ids.numel())


def test_forward_and_backward_use_one_mask_as_written_out() -> None:
    """Against autograd on W x + s B A (m x / (1 - p)), the masks taken from the noise, one per site."""
    model = Toy()
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.4, init_lora_weights=False)
    attached = attach(model, config, seed=1)
    attached.train_mode()
    attached.shared.noise = noise_for(IDS)
    found = model(IDS)
    objective(found).backward()

    leaves = {name: p.detach().clone().requires_grad_() for name, p in attached.adapter.named_parameters()}
    plain = Toy()
    x = plain.embed(IDS).detach()
    for i, block in enumerate(plain.layers):
        path = f"layers.{i}.q_proj"
        site = model.get_submodule(path).site
        kept = keep(attached.shared.noise, site, 6, 0.4).view(3, 4, 6)
        factor = attached.adapter.factors[path]
        q = block.q_proj(x) + factor.scale * (x * kept / 0.6) @ leaves[f"{path}.A"].T @ leaves[f"{path}.B"].T
        x = x + block.c_fc(torch.tanh(q) * block.v_proj(x))
    expected = plain.head(x)
    objective(expected).backward()
    assert relative(found, expected) < 1e-12
    theirs = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert worst(gradients(attached.adapter), theirs) < 1e-12


def test_dropped_inputs_are_independent_of_each_other() -> None:
    """Neighbours, rows, columns and other sites: gaps must not leave a pattern that single draws would not have."""
    noise = Noise(3, 4, (Span(5, 0, 4000),), 4000)
    mask, other = (~keep(noise, site, 64, 0.05) for site in (0, 1))
    pairs = {"column": (mask[:, 1:], mask[:, :-1]), "row": (mask[1:], mask[:-1]), "site": (mask, other)}
    for name, (a, b) in pairs.items():
        together = float((a & b).double().mean())
        assert abs(together - 0.05**2) < 5 * (0.05**2 / a.numel()) ** 0.5, name
    assert float(mask.double().mean(0).std()) < 1.5 * (0.05 * 0.95 / 4000) ** 0.5


def test_other_devices_draw_a_mask_of_the_same_rate_per_document() -> None:
    noise = Noise(3, 4, (Span(5, 1, 2000),), 2002)
    mask = noise._mask(0, 50, 0.05, torch.Generator())
    assert not mask[0].any() and not mask[-1].any() and abs(float(mask[1:-1].double().mean()) - 0.05) < 0.004


def test_the_expectation_over_masks_is_the_layer_without_dropout() -> None:
    model = Toy()
    attached = attach(
        model, LoraConfig(r=2, target_modules=["head"], lora_dropout=0.3, init_lora_weights=False), seed=1
    )
    with torch.no_grad():
        expected = model(IDS)
        attached.train_mode()
        total = torch.zeros_like(expected)
        for step in range(3000):
            attached.shared.noise = noise_for(IDS, step)
            total += model(IDS)
    with attached.disabled():
        base = model(IDS)
    assert relative(total / 3000 - base, expected - base) < 0.05


def test_dropout_is_off_outside_training_and_leaves_the_base_alone() -> None:
    model = Toy()
    config = LoraConfig(r=2, target_modules=["q_proj", "embed", "c_fc"], lora_dropout=0.5, init_lora_weights=False)
    attached = attach(model, config, seed=1)
    expected, _ = brute_force_of(model, attached)
    attached.train_mode()
    assert relative(model(IDS), expected) > 1e-2
    attached.train_mode(False)
    assert relative(model(IDS), expected) < 1e-12


def brute_force_of(model: Toy, attached: object) -> tuple[Tensor, dict[str, Tensor]]:
    class Output(Toy):
        def forward(self, ids: Tensor) -> object:  # type: ignore[override]
            return type("Logits", (), {"logits": super().forward(ids)})()

    return brute_force(Output(), attached.adapter, {"ids": IDS})  # type: ignore[attr-defined]


def test_noise_of_another_batch_is_not_used() -> None:
    """Evaluation of a batch of another size in between draws from torch's generator, never from stale spans."""
    model = Toy()
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    attached = attach(model, config, seed=1)
    attached.train_mode()
    attached.shared.noise = noise_for(IDS)
    with torch.no_grad():
        assert torch.equal(model(IDS), model(IDS))
        assert not torch.equal(model(IDS[:2]), model(IDS[:2]))


def test_the_zoo_takes_noise_through_the_model() -> None:
    from families import FAMILIES, inputs_for

    model, inputs = FAMILIES["gpt2"](), inputs_for("gpt2")
    attached = attach(model, LoraConfig.preset("deep", lora_dropout=0.5, init_lora_weights=False), seed=1)
    attached.train_mode()
    attached.shared.noise = noise_for(inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(logits_of(model, inputs), logits_of(model, inputs))


def test_a_mask_applied_is_the_input_without_what_was_dropped() -> None:
    mask = Mask(Noise(1, 2, (Span(0, 0, 5),), 5), 3, 8, 0.25, _CPU)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    expected = x.clone()
    expected.view(-1)[mask.draw()] = 0
    assert 0 < len(mask.draw()) < 40
    assert torch.allclose(mask.apply(x), expected / 0.75, rtol=1e-14)
