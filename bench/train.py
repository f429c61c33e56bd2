"""One side of the training benchmark, in a process of its own. Prints one JSON object.

    python bench/train.py {ours,peft,trl} [--model gemma|llama] [--shape short|long|prefix40|prefix70|full|tiny]
                          [--micro N] [--grouped] [--packing] [--preset linear|fast] [--dropout P] [--recompute] ...

Every side: the same float32 weights, the same ids and labels, the same A, AdamW, 8 documents an optimizer step. Timed
is the training loop alone, after one step that is not counted; the rate of the machine's own products is taken before
and after, on our side between the steps too. Peak memory is the process's resident maximum from the loaded model on;
the baseline is what is resident then.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import work as shared


def status(name: str) -> int:
    """Returns a figure of /proc/self/status (VmHWM: peak resident, VmRSS: resident) in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def start_of_peak() -> int:
    """Forgets the peak of loading the model; returns what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def sgemm_rate(model) -> float:
    """Returns GFLOP/s of float32 products of this model's own shapes at T = 958: up, down, query, output."""
    layer = model.base_model.layers[0]
    total = flops = 0.0
    for linear in (layer.mlp.up_proj, layer.mlp.down_proj, layer.self_attn.q_proj, layer.self_attn.o_proj):
        x, w = torch.randn(958, linear.in_features), torch.randn(linear.out_features, linear.in_features)
        x @ w.T
        start = time.perf_counter()
        for _ in range(10):
            x @ w.T
        total += time.perf_counter() - start
        flops += 10 * 2 * 958 * linear.in_features * linear.out_features
    return flops / total / 1e9


def floor_flops(model, work, targets) -> float:
    """4 P a token, 4 V h a label, 6 R a token: forward and input gradients of what is frozen; R of the factors."""
    layers = model.base_model.layers
    linears = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    P = sum(m.weight.numel() for m in linears)
    R = sum(
        shared.RANK * (m.in_features + m.out_features)
        for name, m in layers.named_modules()
        if isinstance(m, torch.nn.Linear) and name.split(".")[-1] in targets
    )
    head = model.get_output_embeddings()
    return (4 * P + 6 * R) * work.num_tokens + 4 * head.in_features * head.out_features * work.num_labels


def sharing_ceiling(model, work) -> float:
    """(4 P + 4 V h l) / (4 P u + 4 V h l): how much faster a step can be where its documents begin alike; u is the
    share of tokens that are left when the common beginning of a step's documents is counted once, l that of labels."""
    unique = 0
    for start in range(0, len(work.documents), shared.BATCH):
        rows = [ids for ids, _ in work.documents[start : start + shared.BATCH]]
        common = next((i for i, ids in enumerate(zip(*rows)) if len(set(ids)) > 1), min(map(len, rows)))
        unique += sum(map(len, rows)) - common * (len(rows) - 1)
    head = model.get_output_embeddings()
    trunk = 4 * sum(m.weight.numel() for m in model.base_model.layers.modules() if isinstance(m, torch.nn.Linear))
    labels = 4 * head.in_features * head.out_features * work.num_labels
    return (trunk * work.num_tokens + labels) / (trunk * unique + labels)


def targets(options) -> list[str]:
    return ["q_proj", "v_proj"] if options.preset == "fast" else shared.TARGETS


def settings(options) -> dict:
    return {
        "r": shared.RANK, "lora_alpha": shared.ALPHA, "target_modules": targets(options),
        "lora_dropout": options.dropout,
    }  # fmt: skip


def made(options, model, work):
    """Returns our run on the documents of the work, in their order, and an adapter in training mode."""
    import numpy as np

    import loratune
    from loratune.data.dataset import Dataset
    from loratune.data.encode import Document
    from loratune.model.causal import CausalModel
    from loratune.train import loop
    from loratune.train.config import TrainConfig
    from loratune.train.optim import Optimizer

    attached = loratune.attach(model, loratune.LoraConfig(**settings(options)), seed=0)
    documents = [Document(np.array(ids, np.int32), np.array(trained)) for ids, trained in work.documents]
    dataset = Dataset(documents, [str(index) for index in range(len(documents))], "", "prompt_completion")
    longest = max(len(ids) for ids, _ in work.documents)
    config = TrainConfig(
        batch_size=options.batch, learning_rate=shared.LEARNING_RATE, warmup_steps=0, max_grad_norm=1e9,
        micro_batch_tokens=longest * options.micro,
    )  # fmt: skip
    run = loop.Run(
        output=None, config=config, causal=CausalModel(model, recompute=options.recompute), attached=attached,
        optimizer=Optimizer(attached.adapter, config), train=dataset, validation=dataset, identity={},
        on_event=print, num_parameters=0,
    )  # fmt: skip
    for name in options.off.split(",") if options.off else []:
        OFF[name](run)
    firsts = range(0, len(documents), options.batch)
    run.rows_of_step = lambda: list(range(len(documents)))[firsts[run.step % len(firsts)] :][: options.batch]
    run.learning_rate = lambda: shared.LEARNING_RATE
    attached.train_mode(True)
    return run


def ours(options, model, work) -> dict:
    from loratune.train import loop

    run = made(options, model, work)
    baseline = start_of_peak()
    losses, rates, seconds = [loop.train_step(run)["loss"]], [], 0.0
    steps = options.steps or run.steps_per_epoch
    for step in range(steps):
        if step % max(1, steps // 4) == 0:
            rates.append(sgemm_rate(model))
        begin = time.perf_counter()
        losses.append(loop.train_step(run)["loss"])
        seconds += time.perf_counter() - begin
    return {"seconds": seconds, "losses": losses, "baseline_bytes": baseline, "rates": rates}


def dropout(options, model, work) -> dict:
    """What dropout costs: a step with it between two without, on the same documents; the median of twelve ratios."""
    from loratune.train import loop

    run = made(options, model, work)
    run.rows_of_step = lambda: list(range(options.batch))
    factors = run.attached.adapter.factors.values()

    def seconds(p: float) -> float:
        for factor in factors:
            factor.dropout = p
        begin = time.perf_counter()
        loop.train_step(run)
        return time.perf_counter() - begin

    begin = time.perf_counter()
    for p in (options.dropout, 0.0):
        seconds(p)
    ratios = [2 * seconds(options.dropout) / (seconds(0.0) + seconds(0.0)) for _ in range(12)]
    spent = time.perf_counter() - begin
    return {"seconds": spent, "dropout_costs": statistics.median(ratios) - 1}


def _no_blocks(run) -> None:
    run.causal.blocks.close()


def _no_short_attention(run) -> None:
    from loratune.model import attention

    attention.SHORT_TOKENS = 0


def _thin_head_rows(run) -> None:
    from loratune.model import loss

    loss.BLOCK_ROWS = 64


def _no_label_loss(run) -> None:
    run.causal._shape = None


def _no_sharing(run) -> None:
    run.causal.shares = False


def _no_packing(run) -> None:
    run.causal.blocks.close()
    run.causal.packs = run.causal.shares = False


# The ablation ladder: what each technique brings, by leaving it out.
OFF = {
    "blocks": _no_blocks,
    "short-attention": _no_short_attention,
    "wide-head-blocks": _thin_head_rows,
    "label-loss": _no_label_loss,
    "sharing": _no_sharing,
    "packing": _no_packing,
}


def same_start(model, options) -> dict[str, torch.Tensor]:
    """Returns our A of every site, so that every side begins with the same."""
    import loratune

    attached = loratune.attach(model, loratune.LoraConfig(**settings(options)), seed=0)
    start = {path: factor.A.detach().clone() for path, factor in attached.adapter.factors.items()}
    attached.detach()
    return start


class Clock:
    """The end of each step and its loss, as a callback of transformers' Trainer."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def __init__(self):
                self.ends, self.losses = [], []

            def on_step_end(self, args, state, control, **kwargs):
                self.ends.append(time.perf_counter())

            def on_log(self, args, state, control, logs=None, **kwargs):
                if logs and "loss" in logs:
                    self.losses.append(float(logs["loss"]))

        return Callback()


def arguments(options, steps: int) -> dict:
    sampling = {"train_sampling_strategy": "group_by_length"} if options.grouped else {}
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": options.micro,
        "gradient_accumulation_steps": options.batch // options.micro,
        "max_steps": steps + 1,
        "learning_rate": shared.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **sampling,
    }


def in_order(trainer_class, options):
    class InOrder(trainer_class):
        def _get_train_sampler(self, *args, **kwargs):
            if options.grouped:
                return super()._get_train_sampler(*args, **kwargs)
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def take(model, start: dict[str, torch.Tensor]) -> None:
    for path, A in start.items():
        model.get_submodule(f"base_model.model.{path}").lora_A["default"].weight.data.copy_(A)


def trained(trainer, clock, steps: int) -> dict:
    baseline = start_of_peak()
    trainer.train()
    ends = clock.ends[: steps + 1]
    return {"seconds": ends[-1] - ends[0], "losses": clock.losses, "baseline_bytes": baseline}


def peft(options, model, work) -> dict:
    import peft as library
    from transformers import Trainer, TrainingArguments

    start = same_start(model, options)
    model = library.get_peft_model(model, library.LoraConfig(task_type="CAUSAL_LM", **settings(options)))
    take(model, start)
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

    steps = options.steps or len(rows) // options.batch
    given = TrainingArguments(**arguments(options, steps), remove_unused_columns=False)
    clock = Clock()
    trainer = in_order(Trainer, options)(
        model=model, args=given, train_dataset=rows, data_collator=collate, callbacks=[clock]
    )
    return trained(trainer, clock, steps)


def trl(options, model, work) -> dict:
    import peft as library
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    start = same_start(model, options)
    rows = Dataset.from_list(
        [{"input_ids": ids, "completion_mask": [int(t) for t in trained]} for ids, trained in work.documents]
    )
    steps = options.steps or len(rows) // options.batch
    tuned = {} if options.checkpointing else {"gradient_checkpointing": False}
    packing = {"packing": True, "packing_strategy": "bfd", "max_length": 512} if options.packing else {}
    # A packed row holds some eight documents: one is a step.
    given = arguments(options, steps) | ({"gradient_accumulation_steps": 1} if options.packing else {})
    given = SFTConfig(**given, bf16=False, completion_only_loss=True, **tuned, **packing)
    clock, seen = Clock(), []

    class Counting(in_order(SFTTrainer, options)):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs["input_ids"].numel())
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Counting(
        model=model, args=given, train_dataset=rows, callbacks=[clock], processing_class=options.tokenizer,
        peft_config=library.LoraConfig(task_type="CAUSAL_LM", **settings(options)),
    )  # fmt: skip
    take(trainer.model, start)
    found = trained(trainer, clock, steps)
    return found | ({"tokens": sum(seen[1:])} if options.packing else {})


def main(options) -> dict:
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
    model, options.tokenizer = shared.load(options.model)
    vocabulary = min(model.get_input_embeddings().num_embeddings, len(options.tokenizer))
    work = shared.work(options.tokenizer, options.shape, options.documents, vocabulary)
    flops, before = floor_flops(model, work, targets(options)), sgemm_rate(model)
    ceiling = sharing_ceiling(model, work)
    head = {"side": options.side, "tokens": work.num_tokens, "labels": work.num_labels, "documents": options.documents}
    found = {"ours": ours, "dropout": dropout, "peft": peft, "trl": trl}[options.side](options, model, work)
    steps = options.steps or options.documents // options.batch
    share = steps * options.batch / options.documents  # of the documents, counted as often as they were taken
    rates = [before, *found.get("rates", []), sgemm_rate(model)]
    if "dropout_costs" in found:
        return head | {key: found[key] for key in ("seconds", "dropout_costs")} | {"sgemm_gflops": rates}
    return head | {
        "seconds": found["seconds"],
        "tokens_per_second": found.get("tokens", work.num_tokens * share) / found["seconds"],
        "of_floor": flops * share / (sum(rates) / len(rates) * 1e9) / found["seconds"],
        "sharing_ceiling": ceiling,
        "peak_bytes": status("VmHWM"),
        "peak_above_model_bytes": status("VmHWM") - found["baseline_bytes"],
        "losses": found["losses"][:: max(1, len(found["losses"]) // 10)] + found["losses"][-1:],
        "sgemm_gflops": rates,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["ours", "dropout", "peft", "trl"])
    parser.add_argument("--model", default="gemma", choices=list(shared.MODELS))
    parser.add_argument("--shape", default="short")
    parser.add_argument("--micro", type=int, default=8, help="documents a micro-batch (ours: the longest's tokens x N)")
    parser.add_argument("--batch", type=int, default=shared.BATCH, help="documents an optimizer step")
    parser.add_argument("--grouped", action="store_true")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--preset", default="linear", choices=["linear", "fast"])
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--steps", type=int, default=0, help="0: each document once")
    parser.add_argument("--off", default="", help=f"ours, for the ablation ladder: {', '.join(OFF)}")
    print(json.dumps(main(parser.parse_args())), file=sys.stdout)
