"""torchtune or LitGPT on the rows of the training benchmark, random weights of Llama 3.2 1B's shape. Prints one JSON
object.

    python bench/llama_peers.py {torchtune,litgpt} [--micro N]

Each runs in an environment of its own (`make bench-peers`), where neither loratune nor transformers is: the rows were
written there by `work.py`. The model, its LoRA layers and the loss are the library's own, in float32, called as its
recipe for one device calls them; the loop around them is ours, and takes the documents of a step in the order of their
lengths, which is the best for a side that pads.
"""

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

RANK, ALPHA, LEARNING_RATE, BATCH = 8, 16, 5e-4, 8
HIDDEN, INNER, LAYERS, KEYS, VOCABULARY = 2048, 8192, 16, 512, 128256
SHAPES = [
    (HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN),
    (HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN),
]  # fmt: skip
ROWS = Path(__file__).parent / ".llama_rows.json"

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (ids, labels, -100 where none) -> sum over labels


def torchtune() -> tuple[torch.nn.Module, Loss]:
    from torchtune.models.llama3_2 import lora_llama3_2_1b
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    roles = ["q_proj", "k_proj", "v_proj", "output_proj"]
    model = lora_llama3_2_1b(roles, apply_lora_to_mlp=True, lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=0.0)
    set_trainable_params(model, get_adapter_params(model))
    chunked = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(chunked.num_output_chunks)

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        following = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], 1)
        return chunked(model(tokens=ids), following) * (following != -100).sum()

    return model, loss


def litgpt() -> tuple[torch.nn.Module, Loss]:
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    roles = dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True)
    config = Config.from_name("Llama-3.2-1B", lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, **roles)
    model = GPT(config)
    mark_only_lora_as_trainable(model)

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(ids, lm_head_chunk_size=128)  # its recipe's size
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, labels[..., 1:]) * (labels[:, 1:] != -100).sum()

    return model, loss


def micro_batches(rows: list, micro: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    rows = sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(rows), micro):
        part = rows[start : start + micro]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part])
        labels = [[i if t else -100 for i, t in zip(*row)] + [-100] * (width - len(row[0])) for row in part]
        found.append((ids, torch.tensor(labels)))
    return found


def step(loss: Loss, optimizer: torch.optim.Optimizer, rows: list, micro: int) -> float:
    labels = sum(sum(trained) for _, trained in rows)
    total = 0.0
    for ids, targets in micro_batches(rows, micro):
        part = loss(ids, targets) / labels
        part.backward()
        total += part.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def sgemm_rate() -> float:
    """Returns GFLOP/s of float32 products of the same shapes as in train.py: up, down, query, output; T = 958."""
    seconds = flops = 0.0
    for inner, outer in ((HIDDEN, INNER), (INNER, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, HIDDEN)):
        x, w = torch.randn(958, inner), torch.randn(outer, inner)
        x @ w.T
        start = time.perf_counter()
        for _ in range(10):
            x @ w.T
        seconds += time.perf_counter() - start
        flops += 10 * 2 * 958 * inner * outer
    return flops / seconds / 1e9


def main(options) -> dict:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rows = json.loads(ROWS.read_text())
    model, loss = {"torchtune": torchtune, "litgpt": litgpt}[options.side]()
    with torch.no_grad():  # what the builder left empty
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(std=0.02)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    parts = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    baseline, before = status("VmRSS"), sgemm_rate()
    losses = [step(loss, optimizer, parts[0], options.micro)]
    begin = time.perf_counter()
    losses += [step(loss, optimizer, part, options.micro) for part in parts]
    seconds = time.perf_counter() - begin
    tokens, labels = sum(len(ids) for ids, _ in rows), sum(sum(trained) for _, trained in rows)
    trunk, factors = (LAYERS * sum(f(*shape) for shape in SHAPES) for f in (int.__mul__, lambda a, b: RANK * (a + b)))
    flops = (4 * trunk + 6 * factors) * tokens + 4 * HIDDEN * VOCABULARY * labels
    rates = [before, sgemm_rate()]
    return {
        "side": options.side, "tokens": tokens, "labels": labels, "documents": len(rows), "seconds": seconds,
        "tokens_per_second": tokens / seconds, "of_floor": flops / (sum(rates) / 2 * 1e9) / seconds,
        "sharing_ceiling": 1.0, "peak_bytes": status("VmHWM"), "peak_above_model_bytes": status("VmHWM") - baseline,
        "losses": losses, "sgemm_gflops": rates,
    }  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["torchtune", "litgpt"])
    parser.add_argument("--micro", type=int, default=2)
    print(json.dumps(main(parser.parse_args())), file=sys.stdout)
