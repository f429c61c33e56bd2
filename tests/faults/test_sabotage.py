"""A run that cannot learn is stopped by its second step, with the reason; one that can is not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from loratune.adapter import experts, variants
from loratune.adapter.attach import Attachments, attach
from loratune.adapter.config import LoraConfig
from loratune.data.dataset import load_dataset
from loratune.data.encode import Encoder
from loratune.errors import TrainingError
from loratune.model.causal import CausalModel
from loratune.train import loop, schedule
from loratune.train.loop import Run
from loratune.train.optim import Optimizer
from loratune.train.rehearsal import rehearse
from loratune.train.watch import Experts
from tiny_run import CONTEXT, lines_of, make_run, tokenizer, write_rows

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def go(run: Run) -> None:
    rehearse(run)
    loop.train(run)


def mixture(run: Run, num_experts: int = 4) -> Run:
    """The same run over a model with experts, two for each token, whose stacked weights are adapted."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer()), "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": num_experts, "sliding_window": None,
        "max_position_embeddings": 96,
    }  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**shape)).eval()
    run.attached = attach(
        model, LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj"], target_parameters=STACKS), seed=0
    )
    run.causal, run.optimizer = CausalModel(model), Optimizer(run.attached.adapter, run.config)
    run.__post_init__()
    return run


def no_gradient_at_its_input(run: Run, _: Any) -> None:
    """As reentrant checkpointing does where the embedding is frozen."""
    layer: Any = run.causal.model.model.layers[0]  # type: ignore[union-attr]
    plain = layer.forward
    layer.forward = torch.no_grad()(plain)


def detached(run: Run, _: Any) -> None:
    norm: Any = run.causal.model.model.norm  # type: ignore[union-attr]
    norm.register_forward_hook(lambda module, inputs, output: output.detach())


def half_precision(run: Run, _: Any) -> None:
    for parameter in run.optimizer.parameters.values():
        parameter.data = parameter.data.bfloat16()


def frozen(run: Run, _: Any) -> None:
    next(iter(run.optimizer.parameters.values())).requires_grad_(False)


def no_rate(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "rate", lambda *_: 0.0)


def bypassed(run: Run, _: Any) -> None:
    everything = Attachments.of(run.causal.model)
    assert everything is not None
    everything.slots["model.layers.1.self_attn.v_proj"]._modules["active"] = nn.ModuleList()


def left_out_of_the_optimizer(run: Run, _: Any) -> None:
    run.optimizer._ratios.popitem()


def in_the_wrong_group(run: Run, _: Any) -> None:
    run.optimizer = Optimizer(run.attached.adapter, run.config.model_copy(update={"lr_ratio": 1.0}))


def magnitude_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = variants.magnitude_scale
    monkeypatch.setattr(variants, "magnitude_scale", lambda *args: plain(*args).detach())
    fresh = make_run(run.output.parent, lr_ratio=16.0, adapter={"use_dora": True, "target_modules": ["v_proj"]})
    run.__dict__.update(fresh.__dict__)


def unused_expert(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture(run)
    plain = experts._Stack.__getitem__
    monkeypatch.setattr(
        experts._Stack, "__getitem__", lambda stack, at: stack.weight[at] if int(at) == 1 else plain(stack, at)
    )


def shifted_labels(run: Run, _: Any) -> None:
    plain = run.causal.batch

    def batch(*args: Any, **kwargs: Any) -> Any:
        made = plain(*args, **kwargs)
        return replace(made, labels=made.labels.roll(1))

    run.causal.batch = batch


SABOTAGES: dict[str, tuple[Callable[[Run, Any], None], str]] = {
    "frozen inputs": (no_gradient_at_its_input, r"7 of 15 factors do not reach the loss; first: model\.layers\.0"),
    "detached output": (detached, r"14 of 15 factors do not reach the loss; first: model\.layers\.0"),
    "bfloat16 master weights": (half_precision, r"q_proj\.A is torch\.bfloat16, whose rounding swallows small updates"),
    "frozen factor": (frozen, r"q_proj\.A is frozen"),
    "learning rate 0": (no_rate, r"step 1: 15 of 15 matrices did not move.* The learning rate is 0"),
    "bypassed layer": (bypassed, r"1 of 15 factors do not reach the loss; first: model\.layers\.1\.self_attn\.v_proj"),
    "magnitude left out": (magnitude_left_out, r"2 of 2 factors do not reach the loss; first: model\.layers\.0"),
    "in no group": (left_out_of_the_optimizer, r"wrong parameter group: lm_head\.B is in none, .* expected 16 x"),
    "wrong group": (in_the_wrong_group, r"wrong parameter group: \S+q_proj\.B is updated with 1 x .* expected 16 x"),
    "unused expert": (unused_expert, r"mlp\.experts: expert 1 of 4 served tokens that .* got no gradient"),
    "shifted labels": (shifted_labels, r"LlamaForCausalLM itself gives .* labels stand at other tokens"),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_sabotaged_run_is_stopped_with_the_reason(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage, reason = SABOTAGES[name]
    run = make_run(tmp_path, epochs=2, lr_ratio=16.0)
    sabotage(run, monkeypatch)
    with pytest.raises(TrainingError, match=reason):
        go(run)
    assert run.step < 2
    assert all(p.grad is None for p in run.optimizer.parameters.values())


DURING_TRAINING = {
    "bypassed layer": (bypassed, r"step 1: 1 of 15 matrices got no gradient; first: model\.layers\.1\S+v_proj\.B"),
    "in no group": (
        left_out_of_the_optimizer,
        r"step 1: 1 of 15 matrices did not move; first: lm_head\.B.*not hold it",
    ),
    "unused expert": (unused_expert, r"mlp\.experts: expert 1 of 4 served tokens"),
}


@pytest.mark.parametrize("name", DURING_TRAINING)
def test_the_first_steps_see_it_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens only once the run trains is not seen by the pass before it."""
    sabotage, reason = DURING_TRAINING[name]
    run = make_run(tmp_path, epochs=2)
    rehearse(run)
    sabotage(run, monkeypatch)
    with pytest.raises(TrainingError, match=reason):
        loop.train(run)
    assert run.step == 0


def test_an_a_that_does_not_move_is_seen_at_step_2(tmp_path: Path) -> None:
    run = make_run(tmp_path, epochs=2)
    rehearse(run)
    del run.optimizer._ratios["lm_head.A"]
    with pytest.raises(TrainingError, match=r"step 2: 1 of 30 matrices did not move; first: lm_head\.A"):
        loop.train(run)


def test_an_expert_that_is_never_used_is_not_judged(tmp_path: Path) -> None:
    """Router logits 2 t, t, 0, -t and -2 t: the third of five experts is never among the two highest."""
    run = mixture(make_run(tmp_path, epochs=2, learning_rate=0.01), num_experts=5)
    model: Any = run.causal.model
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.copy_(torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])[:, None] * torch.randn(32))
    go(run)
    factor = run.attached.adapter.factors["model.layers.1.mlp.experts.down_proj"]
    moved = factor.B.detach().flatten(1).ne(0).any(1)
    assert moved.tolist() == [True, True, False, True, True]
    assert {path: pending.tolist() for path, pending in run.gates.experts.pending.items()} == {
        f"model.layers.{layer}.mlp.experts": [False, False, True, False, False] for layer in (0, 1)
    }


def test_an_expert_of_tokens_that_do_not_matter_is_not_judged(tmp_path: Path) -> None:
    """A prompt's tokens reach the loss through later ones only: behind the last attention their gradient is zero."""
    found = Experts(mixture(make_run(tmp_path)).attached)
    path = "model.layers.1.mlp.experts"
    gradient = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, -1.0]])
    found._note(path, gradient, torch.tensor([[0, 1], [2, 3], [0, 1]]))
    assert found.used[path].tolist() == [True, True, False, False]
    found._note(path, gradient[:1], torch.tensor([[3, 9]]))  # the next micro-batch; 9: an expert that is elsewhere
    assert found.used[path].tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    "adapter",
    [
        {"use_dora": True, "target_modules": "quality"},
        {"lora_bias": True, "target_modules": "quality"},
        {"init_lora_weights": "pissa", "target_modules": "quality"},
        {"init_lora_weights": False},
        {"modules_to_save": ["norm"], "target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["k_proj"], "trainable_token_indices": [380]},
        {"lora_dropout": 0.5},
    ],
    ids=str,
)
def test_a_run_that_can_learn_passes(tmp_path: Path, adapter: dict[str, Any]) -> None:
    """Token 380 stands in no row: its trained row of the embedding cannot get a gradient."""
    run = make_run(tmp_path, adapter=adapter, max_steps=3)
    go(run)
    assert run.step == 3


def test_the_gates_change_nothing(tmp_path: Path) -> None:
    """A run that was rehearsed is bit for bit the run that was not."""
    plain, rehearsed = (make_run(tmp_path / name, adapter={"lora_dropout": 0.1}) for name in ("plain", "rehearsed"))
    rehearse(rehearsed)
    for run in (plain, rehearsed):
        loop.train(run)
    tensors = [loop.parameters(run) for run in (plain, rehearsed)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_a_rate_that_is_far_too_high_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten good steps, then a hundred times their rate."""
    plain = schedule.rate
    monkeypatch.setattr(schedule, "rate", lambda step, *rest: plain(step, *rest) * (1 if step < 10 else 100))
    run = make_run(tmp_path, rows=320, learning_rate=0.01, eval_every=5)
    with pytest.raises(TrainingError, match=r"blown up, .* Best checkpoint: \S+step-000010\. .* such as 2e-03"):
        loop.train(run)
    losses = [line["loss"] for line in lines_of(run.output / loop.METRICS, "step")]
    assert run.course.ceiling is not None and run.course.above == 8 == sum(x > run.course.ceiling for x in losses[-8:])
    assert losses[-9] <= run.course.ceiling


def test_rows_of_another_kind_than_the_held_out_ones_are_reported(tmp_path: Path) -> None:
    """Learnt on one kind of rows; then trained on others."""
    run = make_run(tmp_path / "first", rows=160, learning_rate=0.02)
    loop.train(run)
    again = make_run(tmp_path / "second", max_steps=2)
    for name, parameter in again.optimizer.parameters.items():
        parameter.data = run.optimizer.parameters[name].detach().clone()
    words = [{"prompt": "letter by letter:", "completion": f" quick{i} brown fox"} for i in range(24)]
    again.train = load_dataset(write_rows(tmp_path / "words.jsonl", words), Encoder(tokenizer(), CONTEXT))
    events: list[dict[str, Any]] = []
    again.on_event = events.append
    loop.train(again)
    notice, *_ = lines_of(again.output / loop.METRICS, "notice")
    assert "far above the untuned model's" in notice["message"] and notice in events
