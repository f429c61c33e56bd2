"""Whether a step costs the same however much data there is, and how soon the first one begins. Prints one JSON object.

    python bench/growth.py rows N     16 steps on N stored documents: tokens a second, memory, the optimizer's share
    python bench/growth.py start      from the end of the imports to the first evaluation, tokens stored before

Documents: those of the training benchmark, over and over, in memory-mapped chunks as tokenising leaves them.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import work as shared

import train as benchmark

STEPS, CHUNK = 16, 50_000


def stored(folder, documents, number):
    """Returns a data set of so many documents, mapped from files."""
    from loratune.data.dataset import Dataset
    from loratune.data.store import Chunk, Documents, write_chunk

    chunks = []
    for first in range(0, number, CHUNK):
        size = min(CHUNK, number - first)
        rows = [[documents[(first + i) % len(documents)]] for i in range(size)]
        chunks.append(write_chunk(folder, len(chunks), Chunk.of(rows, first)))
    return Dataset(Documents(chunks), [""] * number, "", "prompt_completion")


def rows(options) -> dict:
    import loratune
    from loratune.data.encode import Document
    from loratune.model.causal import CausalModel
    from loratune.train import loop
    from loratune.train.config import TrainConfig
    from loratune.train.optim import Optimizer

    torch.set_num_threads(2)
    model, tokenizer = shared.load("gemma")
    work = shared.work(tokenizer, "short", 32, len(tokenizer) - 1)
    documents = [Document(np.array(ids, np.int32), np.array(trained)) for ids, trained in work.documents]
    config = loratune.LoraConfig(r=shared.RANK, lora_alpha=shared.ALPHA, target_modules=shared.TARGETS)
    attached = loratune.attach(model, config, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        data = stored(Path(folder), documents, options.number)
        settings = TrainConfig(batch_size=shared.BATCH, learning_rate=shared.LEARNING_RATE)
        optimizer = Optimizer(attached.adapter, settings)
        run = loop.Run(
            output=None, config=settings, causal=CausalModel(model), attached=attached, optimizer=optimizer,
            train=data, validation=data, identity={}, on_event=print, num_parameters=0,
        )  # fmt: skip
        attached.train_mode(True)
        baseline, mapped = benchmark.start_of_peak(), benchmark.status("RssFile")
        loop.train_step(run)
        spent, plain = [], optimizer.step

        def step(rate: float) -> None:
            begin = time.perf_counter()
            plain(rate)
            spent.append(time.perf_counter() - begin)

        optimizer.step = step
        begin = time.perf_counter()
        tokens = sum(loop.train_step(run)["num_tokens"] for _ in range(STEPS))
        seconds = time.perf_counter() - begin
        peak, mapped = benchmark.status("VmHWM"), benchmark.status("RssFile") - mapped
    return {
        "tokens_per_second": tokens / seconds,
        "peak_above_model_bytes": peak - baseline,
        "of_it_mapped_pages_of_the_rows": mapped,  # which the system takes back when it needs them
        "optimizer_share": sum(spent) / seconds,
    }


class _Started(Exception):
    pass


def start(options) -> dict:
    """The second of two starts on the same rows, a process each: the first stores the tokens."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        pairs = shared.changed_pairs(160)
        lines = [json.dumps({"prompt": a + "\n", "completion": b}, ensure_ascii=False) for a, b in pairs[:6000]]
        file.write_text("\n".join(lines) + "\n")
        command = [sys.executable, __file__, "once", "--rows", str(file)]
        for _ in range(2):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"num_rows": len(lines)}


def once(options) -> dict:
    """One start: from the end of the imports to where the first evaluation would begin."""
    from transformers import Gemma3ForCausalLM  # noqa: F401

    from loratune import api
    from loratune.train.config import load_run_config

    def begin(event) -> None:
        moments[event["event"]] = time.perf_counter() - began
        if event["event"] == "start":
            raise _Started

    moments, began = {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Started):
        given = {"model": shared.MODELS["gemma"], "data.train": options.rows, "output": f"{folder}/run"}
        api.run(load_run_config(None, given), begin)
    return {"model_seconds": moments["summary"], "start_seconds": moments["start"]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["rows", "start", "once"])
    parser.add_argument("number", type=int, nargs="?", default=1000)
    parser.add_argument("--rows", help="once: the file of rows")
    given = parser.parse_args()
    print(json.dumps({"rows": rows, "start": start, "once": once}[given.side](given)))
