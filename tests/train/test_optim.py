"""AdamW against its formula, and its state by name."""

import math

import pytest
import torch
from torch import Tensor, nn

from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.errors import CheckpointError
from loratune.train.config import TrainConfig
from loratune.train.optim import Optimizer
from oracles import Toy

CONFIG = TrainConfig(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, max_grad_norm=0.5)


def optimizer(config: TrainConfig = CONFIG) -> Optimizer:
    attached = attach(Toy(), LoraConfig(r=2, target_modules=("q_proj", "v_proj"), init_lora_weights=False), seed=0)
    return Optimizer(attached.adapter, config)


def set_gradients(parameters: dict[str, nn.Parameter], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    return {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


def by_hand(start: Tensor, gradients: list[Tensor], rates: list[float]) -> Tensor:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    theta = start.double()
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    b1, b2 = CONFIG.adam_beta1, CONFIG.adam_beta2
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        g = gradient.double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + CONFIG.adam_epsilon)
        theta = theta - rate * (step + CONFIG.weight_decay * theta)
    return theta


def test_steps_are_those_of_the_formula() -> None:
    adamw, rates = optimizer(), [0.1, 0.05, 0.2]
    start = {name: parameter.detach().clone() for name, parameter in adamw.parameters.items()}
    gradients: list[dict[str, Tensor]] = []
    for step, rate in enumerate(rates):
        gradients.append(set_gradients(adamw.parameters, step))
        adamw.step(rate)
    for name, parameter in adamw.parameters.items():
        expected = by_hand(start[name], [each[name] for each in gradients], rates)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
        assert parameter.grad is None


def test_clip_scales_to_the_largest_norm_and_returns_the_norm_before() -> None:
    adamw = optimizer()
    gradients = set_gradients(adamw.parameters, 3)
    before = {name: parameter.detach().clone() for name, parameter in adamw.parameters.items()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert float(adamw.clip()) == pytest.approx(norm, rel=1e-5)
    for name, parameter in adamw.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name] * (0.5 / norm), rtol=1e-4, atol=1e-7)
        assert torch.equal(parameter, before[name])


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    """Three steps in one optimizer, or two, then its state and values in a new one, and the third there."""
    one, other = optimizer(), optimizer()
    for step in range(2):
        set_gradients(one.parameters, step)
        one.step(0.1)
    for name, parameter in other.parameters.items():
        parameter.data.copy_(one.parameters[name])
    other.load({name: tensor.clone() for name, tensor in one.state().items()})
    for adamw in (one, other):
        set_gradients(adamw.parameters, 2)
        adamw.step(0.05)
    assert all(torch.equal(one.parameters[name], other.parameters[name]) for name in one.parameters)
    assert one.state().keys() == other.state().keys()
    assert all(torch.equal(one.state()[name], other.state()[name]) for name in one.state())


def test_the_state_is_empty_before_the_first_step_and_complete_after_it() -> None:
    adamw = optimizer()
    assert adamw.state() == {}
    set_gradients(adamw.parameters, 0)
    adamw.step(0.1)
    names = {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in adamw.parameters}
    assert adamw.state().keys() == names | {"step"} and float(adamw.state()["step"]) == 1


def test_a_state_of_other_parameters_is_refused() -> None:
    adamw = optimizer()
    set_gradients(adamw.parameters, 0)
    adamw.step(0.1)
    state = adamw.state()
    short = {name: tensor for name, tensor in state.items() if name != "exp_avg.layers.0.q_proj.A"}
    with pytest.raises(CheckpointError, match=r"1 entries differ; first: exp_avg\.layers\.0\.q_proj\.A"):
        optimizer().load(short)
    bent = {**state, "exp_avg.layers.0.q_proj.A": torch.zeros(3, 6)}
    with pytest.raises(CheckpointError, match=r"layers\.0\.q_proj\.A has another shape"):
        optimizer().load(bent)


def test_lora_plus_moves_b_by_its_own_rate() -> None:
    """Two runs from one start and gradient: A moves the same, B `lr_ratio` times as far (weight decay included)."""
    plain, plus = optimizer(), optimizer(CONFIG.model_copy(update={"lr_ratio": 4.0}))
    start = {name: parameter.detach().clone() for name, parameter in plain.parameters.items()}
    for each in (plain, plus):
        set_gradients(each.parameters, seed=3)
        each.step(1e-3)
    for name, parameter in plain.parameters.items():
        moved, ratio = parameter.detach() - start[name], 4.0 if name.endswith(".B") else 1.0
        torch.testing.assert_close(plus.parameters[name].detach() - start[name], ratio * moved, rtol=1e-4, atol=1e-8)
