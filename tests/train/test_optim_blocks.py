"""AdamW against torch's, bit for bit; and blocks that were added later, each with the steps it has done."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loratune.adapter.adapter import Adapter
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank
from loratune.train.config import TrainConfig
from loratune.train.optim import Optimizer

CONFIGS = [
    TrainConfig(),
    TrainConfig(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, lr_ratio=4.0),
    TrainConfig(adam_beta1=0.0, adam_beta2=0.0),
]
INPUTS, OUTPUTS = 5, 7


def adapter(rank: int, paths: str = "ab", dtype: torch.dtype = torch.float32, experts: int = 0) -> Adapter:
    """An adapter of small random factors, stacked if there are experts; the same for the same shape."""
    generator = torch.Generator().manual_seed(3)
    stack = (experts,) if experts else ()
    draw = lambda *shape: torch.randn(*stack, *shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    factors = {path: LowRank(draw(rank, INPUTS), draw(OUTPUTS, rank), 2.0) for path in paths}
    return Adapter(LoraConfig(r=rank, target_modules=tuple(paths)), factors)


def give_gradients(parameters: dict[str, nn.Parameter], seed: int, leave_out: str = "") -> None:
    for index, (name, parameter) in enumerate(parameters.items()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 10.0 ** (index - 2)
        parameter.grad = None if name == leave_out else draw.to(parameter.dtype)


def torchs(parameters: dict[str, nn.Parameter], config: TrainConfig, **kind: bool) -> torch.optim.AdamW:
    groups = [
        {"params": [p for name, p in parameters.items() if name.endswith(".B") is up], "ratio": ratio}
        for up, ratio in ((False, 1.0), (True, config.lr_ratio))
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(
        groups, lr=0.0, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay, **kind
    )


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "everything", "no memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [1, 4])
def test_every_bit_is_that_of_torch(config: TrainConfig, dtype: torch.dtype, at_once: int) -> None:
    """Parameters and moments after each of 20 steps, one parameter without a gradient in every third."""
    ours = Optimizer(mine := adapter(3, dtype=dtype), config)
    ours._at_once = at_once
    theirs = dict(adapter(3, dtype=dtype).named_parameters())
    oracle = torchs(theirs, config, foreach=False)
    for step in range(20):
        rate, idle = 1e-3 * (step + 1), "b.A" if step % 3 == 0 else ""
        for parameters in (ours.parameters, theirs):
            give_gradients(parameters, step, idle)
        for group in oracle.param_groups:
            group["lr"] = rate * group["ratio"]
        oracle.step()
        ours.step(rate)
        state = ours.state()
        for name, parameter in mine.named_parameters():
            assert torch.equal(parameter, theirs[name])
            found = oracle.state[theirs[name]]
            for moment in ("exp_avg", "exp_avg_sq") if found else ():
                assert torch.equal(state[f"{moment}.{name}"], found[moment])


def test_a_parameter_that_was_left_out_of_steps_has_its_own_count_and_goes_on_with_it() -> None:
    one, other = Optimizer(adapter(3), TrainConfig()), Optimizer(adapter(3), TrainConfig())
    for step in range(4):
        give_gradients(one.parameters, step, "a.B" if step < 3 else "")
        one.step(0.1)
    assert {name: float(each) for name, each in one.state().items() if name.startswith("step")} == {
        "step": 4, "step.a.B": 1,
    }  # fmt: skip
    resume(other, one)
    for each in (one, other):
        give_gradients(each.parameters, 9)
        each.step(0.1)
    assert all(torch.equal(one.parameters[name], other.parameters[name]) for name in one.parameters)


def resume(new: Optimizer, old: Optimizer) -> None:
    for name, parameter in new.parameters.items():
        parameter.data.copy_(old.parameters[name])
    new.load({name: tensor.clone() for name, tensor in old.state().items()})


def block(tensor: Tensor, like: Tensor, *, old: bool) -> Tensor:
    """The part of a grown tensor that is old, or the part that is new."""
    axis = next(i for i, size in enumerate(like.shape) if size != tensor.shape[i])
    size = like.shape[axis]
    return tensor.narrow(axis, 0, size) if old else tensor.narrow(axis, size, tensor.shape[axis] - size)


def grown_after(
    steps: int, small: int, large: int, dtype: torch.dtype, experts: int, config: TrainConfig
) -> tuple[Optimizer, Optimizer]:
    """The optimizer of an adapter after some steps, and that of a larger one which has taken everything over."""
    old = Optimizer(adapter(small, "ab", dtype, experts), config)
    for step in range(steps):
        give_gradients(old.parameters, step)
        old.step(0.01)
    new = Optimizer(adapter(large, "abc", dtype, experts), config)
    for name, parameter in old.parameters.items():
        block(new.parameters[name].data, parameter, old=True).copy_(parameter)
    new.load({name: tensor.clone() for name, tensor in old.state().items()}, grown=True)
    return old, new


TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}


@settings(max_examples=40, deadline=None)
@given(
    steps=st.sampled_from([1, 2, 7, 500]), small=st.integers(1, 4), more=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]), experts=st.sampled_from([0, 2]),
    config=st.sampled_from(CONFIGS),
)  # fmt: skip
def test_each_block_is_updated_as_if_it_stood_alone(
    steps: int, small: int, more: int, dtype: torch.dtype, experts: int, config: TrainConfig
) -> None:
    """The old block's next two updates are the un-grown run's; a new block's and a new site's, steps 1 and 2."""
    old, new = grown_after(steps, small, small + more, dtype, experts, config)
    alone = Optimizer(adapter(small + more, "abc", dtype, experts), config)
    for name, parameter in alone.parameters.items():
        parameter.data.copy_(new.parameters[name])
    for step in (1, 2):
        before = {name: parameter.detach().clone() for name, parameter in new.parameters.items()}
        for each in (new, alone):
            give_gradients(each.parameters, 77 + step)
        for name, parameter in old.parameters.items():
            gradient = new.parameters[name].grad
            assert gradient is not None
            parameter.grad = block(gradient, parameter, old=True).clone()
        for each in (old, new, alone):
            each.step(0.01)
        close: dict[str, Any] = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
        for name, parameter in new.parameters.items():
            if name.startswith("c"):
                assert torch.equal(parameter, alone.parameters[name])
                continue
            like = old.parameters[name]
            torch.testing.assert_close(block(parameter, like, old=True), like, **close)
            torch.testing.assert_close(
                block(parameter, like, old=False), block(alone.parameters[name], like, old=False), **close
            )
            assert not torch.equal(parameter, before[name])


def test_the_first_update_of_a_new_block_is_one_rate_long() -> None:
    """Adam's first step is lr g / |g|; with the old block's count it would be 3.2 lr long, unnoticed."""
    old, new = grown_after(500, 2, 4, torch.float32, 0, TrainConfig())
    before = {name: parameter.detach().clone() for name, parameter in new.parameters.items()}
    give_gradients(new.parameters, 5)
    new.step(0.01)
    for name, like in old.parameters.items():
        moved = block(new.parameters[name] - before[name], like, old=False).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=0)


def test_an_adapter_that_grows_twice_keeps_three_counts_and_its_state_goes_on_bit_for_bit() -> None:
    _, middle = grown_after(5, 2, 4, torch.float32, 0, TrainConfig())
    for step in range(3):
        give_gradients(middle.parameters, step)
        middle.step(0.01)
    large = Optimizer(adapter(8, "abc"), TrainConfig())
    large.load({name: tensor.clone() for name, tensor in middle.state().items()}, grown=True)
    counts = large.state()
    assert counts["step.a.A"].flatten().tolist() == [8, 8, 3, 3, 0, 0, 0, 0]
    assert counts["step.a.B"].shape == (1, 8) and counts["step.c.A"].flatten().tolist() == [3] * 4 + [0] * 4
    again = Optimizer(adapter(8, "abc"), TrainConfig())
    again.load({name: tensor.clone() for name, tensor in counts.items()})
    for each in (large, again):
        give_gradients(each.parameters, 4)
        each.step(0.01)
    assert all(torch.equal(parameter, again.parameters[name]) for name, parameter in large.parameters.items())


def test_a_state_that_was_taken_does_not_change_with_later_steps() -> None:
    """The counts; the moments are the live ones, as parameters are, and whoever keeps them copies them."""
    _, new = grown_after(2, 2, 4, torch.float32, 0, TrainConfig())
    counts = {name: each for name, each in new.state().items() if name.startswith("step")}
    before = {name: each.clone() for name, each in counts.items()}
    give_gradients(new.parameters, 0)
    new.step(0.01)
    assert all(torch.equal(each, before[name]) for name, each in counts.items())


def test_what_was_added_warms_up_and_what_was_there_does_not() -> None:
    """With a warm-up of 4, the first updates of new blocks and new sites are 1/4, 2/4, 3/4, 4/4 and 4/4 as long."""
    _, plain = grown_after(20, 2, 4, torch.float64, 0, TrainConfig(adam_beta1=0.0, adam_beta2=0.0))
    _, warm = grown_after(20, 2, 4, torch.float64, 0, TrainConfig(adam_beta1=0.0, adam_beta2=0.0))
    warm.warmup = 4
    for step in range(1, 6):
        before = [{name: p.detach().clone() for name, p in each.parameters.items()} for each in (plain, warm)]
        for each in (plain, warm):
            give_gradients(each.parameters, step)
            each.step(0.01)
        for name, parameter in warm.parameters.items():
            moved, full = parameter.detach() - before[1][name], plain.parameters[name].detach() - before[0][name]
            share = torch.full_like(moved, min(1, step / 4))
            if not name.startswith("c"):
                (share[:2] if name.endswith("A") else share[:, :2]).fill_(1)
            torch.testing.assert_close(moved, full * share, rtol=1e-9, atol=1e-12)
