"""One side of the training benchmark, in a process of its own. Prints one JSON object.

    python bench/train.py {ours,peft} [--micro N] [--grouped] [--dropout P] [--preset fast] [--steps N]

Every side: Gemma 3 270M in float32, the same ids and labels, the same A, AdamW, 8 documents per optimizer step. Timed
is the training loop alone, after one step that is not counted. Peak memory is the process's resident maximum.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import warnings

import torch
import work as shared


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sgemm_rate() -> float:
    """Returns GFLOP/s of float32 products of this model's own shapes (T = 958): up, down, query, output."""
    total = flops = 0.0
    for inputs, outputs in ((640, 2048), (2048, 640), (640, 1024), (1024, 640)):
        x, w = torch.randn(958, inputs), torch.randn(outputs, inputs)
        x @ w.T
        start = time.perf_counter()
        for _ in range(20):
            x @ w.T
        total += time.perf_counter() - start
        flops += 20 * 2 * 958 * inputs * outputs
    return flops / total / 1e9


def start(options) -> tuple:
    import loratune

    model, tokenizer = loratune.load_model(shared.MODEL)
    work = shared.work(tokenizer, options.documents)
    return model, tokenizer, work


def settings(options) -> dict:
    targets = ["q_proj", "v_proj"] if options.preset == "fast" else shared.TARGETS
    return {"r": shared.RANK, "lora_alpha": shared.ALPHA, "target_modules": targets, "lora_dropout": options.dropout}


def ours(options) -> dict:
    import numpy as np

    import loratune
    from loratune.data.dataset import Dataset
    from loratune.data.encode import Document
    from loratune.model.causal import CausalModel
    from loratune.train import loop
    from loratune.train.config import TrainConfig
    from loratune.train.optim import Optimizer

    model, _, work = start(options)
    attached = loratune.attach(model, loratune.LoraConfig(**settings(options)), seed=0)
    dataset = Dataset(
        [Document(np.array(ids, np.int32), np.array(trained)) for ids, trained in work.documents],
        [str(index) for index in range(len(work.documents))], "", "prompt_completion",
    )  # fmt: skip
    longest = max(len(ids) for ids, _ in work.documents)
    config = TrainConfig(
        batch_size=shared.BATCH, learning_rate=shared.LEARNING_RATE, warmup_steps=0, max_grad_norm=1e9,
        micro_batch_tokens=options.tokens or longest * options.micro,
    )  # fmt: skip
    run = loop.Run(
        output=None, config=config, causal=CausalModel(model), attached=attached,
        optimizer=Optimizer(attached.adapter, config), train=dataset, validation=dataset, identity={},
        on_event=print, num_parameters=0,
    )  # fmt: skip
    run.rows_of_step = lambda: list(range(run.step % run.steps_per_epoch * 8, run.step % run.steps_per_epoch * 8 + 8))
    run.learning_rate = lambda: shared.LEARNING_RATE
    attached.train_mode(True)
    baseline = resident()
    losses = [loop.train_step(run)["loss"]]
    begin = time.perf_counter()
    losses += [loop.train_step(run)["loss"] for _ in range(run.steps_per_epoch)]
    return result(options, work, time.perf_counter() - begin, losses, baseline)


def peft(options) -> dict:
    import peft as library
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import loratune

    model, _, work = start(options)
    attached = loratune.attach(model, loratune.LoraConfig(**settings(options)), seed=0)
    begin_A = {path: factor.A.detach().clone() for path, factor in attached.adapter.factors.items()}
    attached.detach()
    model = library.get_peft_model(model, library.LoraConfig(task_type="CAUSAL_LM", **settings(options)))
    for path, A in begin_A.items():
        model.get_submodule(f"base_model.model.{path}").lora_A["default"].weight.data.copy_(A)
    rows = [
        {"input_ids": ids, "labels": [i if t else -100 for i, t in zip(ids, trained)], "length": len(ids)}
        for ids, trained in work.documents
    ]

    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        pad = lambda values, fill: values + [fill] * (width - len(values))  # noqa: E731
        return {
            "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in batch]),
            "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in batch]),
            "labels": torch.tensor([pad(row["labels"], -100) for row in batch]),
        }

    clock, losses = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            if options.grouped:
                return super()._get_train_sampler(*args, **kwargs)
            return torch.utils.data.SequentialSampler(self.train_dataset)

    steps = len(rows) // shared.BATCH
    sampling = {"train_sampling_strategy": "group_by_length"} if options.grouped else {}
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=shared.BATCH // options.micro,
        max_steps=steps + 1,
        learning_rate=shared.LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=0,
        **sampling,
    )
    baseline = resident()
    InOrder(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]).train()
    return result(options, work, clock[-1] - clock[0], losses, baseline)


def result(options, work, seconds: float, losses: list[float], baseline: int) -> dict:
    return {
        "side": options.side,
        "micro": options.micro,
        "grouped": options.grouped,
        "preset": options.preset,
        "dropout": options.dropout,
        "tokens": work.num_tokens,
        "labels": work.num_labels,
        "seconds": seconds,
        "tokens_per_second": work.num_tokens / seconds,
        "peak_bytes": peak(),
        "baseline_bytes": baseline,
        "losses": losses[:9],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["ours", "peft"])
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=0, help="ours: micro-batch tokens instead of --micro documents")
    parser.add_argument("--grouped", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--preset", default="linear", choices=["linear", "fast"])
    parser.add_argument("--documents", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
    before = sgemm_rate()
    out = {"ours": ours, "peft": peft}[options.side](options)
    print(json.dumps({**out, "sgemm_gflops": [before, sgemm_rate()]}), file=sys.stdout)
