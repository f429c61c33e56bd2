"""What the tests of the ladder share: tiny models, a task that the basic rung learns and one that it does not."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loratune import api
from loratune.data.dataset import load_dataset
from loratune.data.encode import Encoder
from loratune.ladder import climb
from loratune.model.causal import CausalModel
from loratune.train.config import LadderConfig, load_run_config
from loratune.train.loop import Run
from tiny_run import CONTEXT, copy_rows, dataset, lines_of, make_run, save_model, tiny_llama, tokenizer, write_rows

TIMES = {"seconds", "step_seconds", "tokens_per_second", "seconds_left", "memory_bytes", "overhead_seconds"}
OnEvent = Callable[[dict[str, Any]], None]


def make_climb(
    folder: Path, on_event: OnEvent = lambda event: None, price: Any = None, dropout: float = 0.05,
    rungs: tuple[str, ...] = ("fast", "quality", "expert"), **settings: Any,
) -> Run:  # fmt: skip
    """A run in memory over the copy task that stands before its first step on the first of its rungs."""
    defaults = {"epochs": 100.0, "max_steps": 64, "batch_size": 16, "learning_rate": 0.01}
    run = make_run(
        folder, rows=400, adapter={"r": 8, "target_modules": "fast", "lora_dropout": dropout}, **defaults | settings
    )
    run.validation = dataset(folder, 48, seed=1)
    run.on_event = on_event
    climb.begin(run, LadderConfig(rungs=list(rungs), price=price or {}))
    return run


def switch_rows(num_rows: int, seed: int, marks: str) -> list[dict[str, str]]:
    """Four random digits after a mark and two numbers: below 5 after x, from 5 on after y and z.

    Nothing tells which, so no model has less than 4 ln 5 nats a row, over the digits and the end.
    """
    generator = random.Random(seed)
    rows: list[dict[str, str]] = []
    for _ in range(num_rows):
        mark, first = generator.choice(marks), 0
        first = 0 if mark == "x" else 5
        asked = " ".join(str(generator.randrange(10)) for _ in range(2))
        answer = " ".join(str(first + generator.randrange(5)) for _ in range(4))
        rows.append({"prompt": f"{mark} {asked} =", "completion": f" {answer}"})
    return rows


def save_pretrained(folder: Path, rows: list[dict[str, str]], num_steps: int) -> Path:
    """Writes a tiny model all of whose weights have learnt some rows; returns its folder."""
    model = tiny_llama().requires_grad_(True)
    documents = load_dataset(write_rows(folder / "rows.jsonl", rows), Encoder(tokenizer(), CONTEXT)).documents
    causal, adamw = CausalModel(model), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(num_steps):
        batch = causal.batch([documents[(16 * step + i) % len(documents)] for i in range(16)], range(16))
        (causal.losses(batch)[0] / batch.num_labels).backward()
        adamw.step()
        adamw.zero_grad()
    causal.close()
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return folder / "model"


class Project:
    """A folder with a model and rows, and ladders run on them through the library's front door."""

    def __init__(self, folder: Path, model: Path, train: list[dict[str, str]], held_out: list[dict[str, str]]) -> None:
        self.settings: dict[str, Any] = {
            "model": str(model),
            "data.train": str(write_rows(folder / "train.jsonl", train)),
            "data.validation": str(write_rows(folder / "held.jsonl", held_out)),
            "train.epochs": 100.0,
        }

    def run(self, output: Path, on_event: OnEvent = lambda event: None, **changes: Any) -> dict[str, Any]:
        """Runs a ladder; returns its record, empty where it was stopped."""
        given = {**self.settings, "output": str(output), **{f"train.{key}": value for key, value in changes.items()}}
        api.run(load_run_config(None, given, ladder=True), on_event)
        return record(output)


def copying(folder: Path) -> Project:
    """The copy task on a model of random weights, which attention alone cannot learn: what is read must reach the
    head through layers that were never trained."""
    return Project(folder, save_model(folder / "model", num_hidden_layers=1), copy_rows(768), copy_rows(96, seed=1))


def record(run: Path) -> dict[str, Any]:
    file = run / "ladder.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def untimed(value: Any) -> Any:
    """A record or the lines of metrics without what depends on the clock."""
    if isinstance(value, dict):
        return {name: untimed(each) for name, each in value.items() if name not in TIMES}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def metrics(run: Path) -> Any:
    return untimed(lines_of(run / "metrics.jsonl"))
