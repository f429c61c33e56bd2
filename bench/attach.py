"""Attach time and switch time as adapters accumulate on one model, beside PEFT. Prints one JSON object.

    python bench/attach.py {ours,peft} COUNT

The model is a Llama of 32 layers with narrow weights: what is measured is the bookkeeping, not arithmetic.
"""

import json
import sys
import time
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=4, vocab_size=128
    )
    return LlamaForCausalLM(config).eval()


def timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def ours(count: int) -> dict[str, float]:
    import loratune
    from loratune import LoraConfig

    base = model()
    config = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS)
    handles = []
    attach = [timed(lambda n=n: handles.append(loratune.attach(base, config, name=f"a{n}"))) for n in range(count)]
    first = timed(handles[0].activate)
    switch = [timed(handles[n].activate) for n in [0, count - 1] * 10]
    return {"first_attach": attach[0], "last_attach": attach[-1], "first_switch": first, "switch": median(switch)}


def peft(count: int) -> dict[str, float]:
    import peft as library

    config = library.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)
    attach = []
    start = time.perf_counter()
    wrapped = library.get_peft_model(model(), config, adapter_name="a0")
    attach.append(time.perf_counter() - start)
    attach += [timed(lambda n=n: wrapped.add_adapter(f"a{n}", config)) for n in range(1, count)]
    first = timed(lambda: wrapped.set_adapter("a0"))
    switch = [timed(lambda n=n: wrapped.set_adapter(f"a{n}")) for n in [0, count - 1] * 3]
    return {"first_attach": attach[0], "last_attach": attach[-1], "first_switch": first, "switch": median(switch)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    side, count = sys.argv[1], int(sys.argv[2])
    print(json.dumps({"side": side, "adapters": count, **{"ours": ours, "peft": peft}[side](count)}))
