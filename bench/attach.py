"""Attach time and switch time as adapters accumulate on one model, beside PEFT. Prints one JSON object.

    python bench/attach.py {ours,peft} COUNT
    python bench/attach.py peft-extrapolated COUNT     PEFT's cost of a line fitted to its first 100 adapters

PEFT's attach takes longer with every adapter there is (2.6 s for the 100th), so that 1,000 would take hours: the last
form times 100 and extrapolates, and says so in its name. The model is a Llama of 32 layers with narrow weights: what is
measured is the bookkeeping, not arithmetic.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FITTED = (1, 10, 100)  # how many adapters there are when a switch is timed


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=4, vocab_size=128
    )
    return LlamaForCausalLM(config).eval()


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def figures(attach: Sequence[float], first: float, switch: float) -> dict[str, float]:
    return {
        "first_attach": attach[0],
        "last_attach": attach[-1],
        "all_attaches": sum(attach),
        "first_switch": first,
        "switch": switch,
    }


def ours(count: int) -> dict[str, float]:
    import loratune
    from loratune import LoraConfig

    base = model()
    config = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS)
    handles = []
    attach = [timed(lambda n=n: handles.append(loratune.attach(base, config, name=f"a{n}"))) for n in range(count)]
    first = timed(handles[0].activate)
    return figures(attach, first, median([timed(handles[n].activate) for n in [0, count - 1] * 10]))


class Peft:
    """A model of PEFT's that grows one adapter at a time."""

    def __init__(self) -> None:
        import peft as library

        self.config = library.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)
        base = model()
        self.attach: list[float] = []
        start = time.perf_counter()
        self.wrapped = library.get_peft_model(base, self.config, adapter_name="a0")
        self.attach.append(time.perf_counter() - start)

    def grow(self, count: int) -> None:
        for n in range(len(self.attach), count):
            self.attach.append(timed(lambda n=n: self.wrapped.add_adapter(f"a{n}", self.config)))

    def switches(self) -> list[float]:
        return [timed(lambda n=n: self.wrapped.set_adapter(f"a{n}")) for n in [0, len(self.attach) - 1] * 3]


def peft(count: int) -> dict[str, float]:
    grown = Peft()
    grown.grow(count)
    switch = grown.switches()
    return figures(grown.attach, switch[0], median(switch))


def peft_extrapolated(count: int) -> dict[str, float]:
    """Fits seconds = a + b n by least squares to the attaches of the 1st to 100th adapter and to the switches among 1,
    10 and 100, and reads the lines off up to `count`; `fit_error` is the worst relative distance of a measured attach
    from its line, the first 10 adapters left out, whose times are small."""
    grown, switch = Peft(), []
    for stage in FITTED:
        grown.grow(stage)
        switch.append(median(grown.switches()))
    numbers = [n + 1 for n in range(len(grown.attach))]
    attach, switching = line(numbers, grown.attach), line(FITTED, switch)
    error = max(abs(attach(n) / seconds - 1) for n, seconds in zip(numbers[10:], grown.attach[10:], strict=True))
    beyond = [attach(n) for n in range(len(numbers) + 1, count + 1)]
    return {**figures([*grown.attach, *beyond], switching(count), switching(count)), "fit_error": error}


def line(x: Sequence[float], y: Sequence[float]) -> Callable[[float], float]:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return lambda value: mean_y + slope * (value - mean_x)


SIDES = {"ours": ours, "peft": peft, "peft-extrapolated": peft_extrapolated}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    side, count = sys.argv[1], int(sys.argv[2])
    print(json.dumps({"side": side, "adapters": count, **SIDES[side](count)}))
