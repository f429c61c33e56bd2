"""The ladder against each of its rungs from scratch, for as many steps: loss on the same test rows, seconds, memory.

    python bench/ladder.py                 UA-GEC (a Ukrainian sentence, then its correction) with Gemma 3 270M
    python bench/ladder.py --on section    a Debian package's description -> its section of the archive, with MiniLM
    python bench/ladder.py --model FOLDER --name tiny --folder DIR --steps 160 --now       to try it

Each side runs in a process of its own on the same rows, with the defaults of `loratune`. All are compared, row by row,
on the half of the held-out rows that no decision of the ladder saw. Rows and finished sides that are in DIR are kept:
a benchmark that was interrupted goes on where it stopped. Writes bench/ladder/NAME.json, NAME.md and the ladder's page,
NAME.html.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from run import machine, run_sides
from work import MODELS

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "tasks"))
RUNGS = ("fast", "quality", "expert")
SIDES = ("ladder", *RUNGS)
MAX_COST = 1.3  # of the top rung's run, in seconds
LONGEST = 100  # characters of a sentence: short ones, so that a laptop gets through some hundred steps


def sentence_rows(num_train: int, num_held_out: int) -> dict[str, list[dict[str, Any]]]:
    """Returns sentences of UA-GEC that its annotator changed, in an order of documents drawn with a seed, so that next
    to none of the held-out ones is from a text that is trained on."""
    from ua_gec import Corpus

    documents = list(Corpus("train", "gec-fluency"))
    pairs = [
        pair
        for index in np.random.default_rng(0).permutation(len(documents))
        for pair in zip(documents[index].source_sentences, documents[index].target_sentences)
        if pair[0] != pair[1] and all(20 <= len(each) <= LONGEST for each in pair)
    ]
    pairs = list(dict.fromkeys(pairs))[: num_held_out + num_train]
    rows = [{"prompt": f"{source}\n", "completion": target} for source, target in pairs]
    return {"held": rows[:num_held_out], "train": rows[num_held_out:]}


def section_rows(num_train: int, num_held_out: int) -> dict[str, list[dict[str, Any]]]:
    """Returns descriptions of Debian's packages with their sections; no source package is on both sides."""
    from rows import choose, section

    found = choose(section(), {"train": num_train, "validation": 0, "test": num_held_out})
    return {"held": found["test"], "train": found["train"]}


def minilm() -> str:
    """Returns the folder of the package's model, as seen from here: the page shows it."""
    from encoder import model_folder

    return os.path.relpath(model_folder())


@dataclass(frozen=True)
class Setting:
    """What is trained on which model, and how much of it."""

    task_type: str
    model: Callable[[], str]
    rows: Callable[[int, int], dict[str, list[dict[str, Any]]]]
    num_rows: int
    held_out: int
    steps: int


SETTINGS = {
    "ua_gec": Setting("CAUSAL_LM", lambda: MODELS["gemma"], sentence_rows, 2400, 400, 300),
    "section": Setting("SEQ_CLS", minilm, section_rows, 3600, 1600, 900),
}


def write_rows(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Writes train.jsonl and held.jsonl."""
    for name, each in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in each)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def run_side(options: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    """Trains one side; returns its loss on every test row, and what it took."""
    import torch

    from loratune import api
    from loratune.train.config import load_run_config

    torch.set_num_threads(options.threads)
    shutil.rmtree(folder / name, ignore_errors=True)
    given: dict[str, Any] = {
        "model": options.model, "output": str(folder / name), "data.train": str(folder / "train.jsonl"),
        "data.validation": str(folder / "held.jsonl"), "train.epochs": 1000.0, "train.max_steps": options.steps,
        "train.eval_every": options.steps, "train.seed": options.seed, "train.learning_rate": options.learning_rate,
        "train.batch_size": options.batch_size,
        "adapter.preset": None if name == "ladder" else name, "adapter.task_type": SETTINGS[options.on].task_type,
    }  # fmt: skip
    events: list[dict[str, Any]] = []
    result = api.run(load_run_config(None, given, ladder=name == "ladder"), events.append)
    memory = max(event["memory_bytes"] for event in events if "memory_bytes" in event)
    found = {"seconds": result.seconds, "memory_bytes": memory, **test(options, folder, name)}
    if name == "ladder":
        found["record"] = json.loads((folder / name / "ladder.json").read_text("utf-8"))
    return found


def test(options: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    """Evaluates the adapter that a side has kept, and the base model, on the test rows, of a task its accuracy too."""
    from loratune.adapter.attach import load_adapter
    from loratune.data.dataset import load_dataset
    from loratune.data.encode import Encoder
    from loratune.evaluate.loss import evaluate
    from loratune.ladder.plan import split_held_out
    from loratune.model.causal import CausalModel
    from loratune.model.load import load_model
    from loratune.tasks.evaluation import evaluate_task
    from loratune.tasks.model import TaskModel
    from loratune.tasks.table import find_labels, task_of

    task_type = SETTINGS[options.on].task_type
    labels = find_labels(task_type, [str(folder / "train.jsonl")], None, None)
    model, tokenizer = load_model(options.model, task_type=task_type, labels=labels.names, problem=labels.problem)
    task: Any = task_of(task_type, model, tokenizer, labels)
    held_out = load_dataset(folder / "held.jsonl", task or Encoder(tokenizer, None))
    rows = split_held_out(held_out, len(held_out))[1]
    attached = load_adapter(model, folder / name / "adapter")
    runner: Any = TaskModel(model, task) if task else CausalModel(model)
    judge: Any = evaluate_task if task else evaluate
    tuned = judge(runner, rows.documents, 2048)
    with attached.disabled():
        base = judge(runner, rows.documents, 2048)
    found = {"losses": list(tuned.document_losses), "base": list(base.document_losses),
             "labels": list(tuned.document_labels)}  # fmt: skip
    if task:
        found["figure"] = {"name": "accuracy", **tuned.scores.figures["accuracy"]._asdict()}
    return found


def report(options: argparse.Namespace, sides: dict[str, dict[str, Any]]) -> str:
    """Returns the comparison as Markdown."""
    from loratune.evaluate.interval import bootstrap_ratio

    ours, labels = sides["ladder"], sides["ladder"]["labels"]
    figure = f" {ours['figure']['name']} (95%) |" if "figure" in ours else ""
    rows = [f"| side | test loss (95%) | ladder less it, by row (95%) | seconds | memory |{figure}"]
    rows.append("|---" * (5 + bool(figure)) + "|")
    base = bootstrap_ratio(ours["base"], labels)
    rows.append(f"| base model | {base.value:.4f} ({base.low:.4f} to {base.high:.4f}) | | | |{' |' if figure else ''}")
    for name, found in sides.items():
        own = bootstrap_ratio(found["losses"], labels)
        less = bootstrap_ratio([a - b for a, b in zip(ours["losses"], found["losses"])], labels)
        against = "" if found is ours else f"{less.value:+.4f} ({less.low:+.4f} to {less.high:+.4f})"
        rows.append(
            f"| {name} | {own.value:.4f} ({own.low:.4f} to {own.high:.4f}) | {against} | {found['seconds']:.0f} | "
            f"{found['memory_bytes'] / 1e9:.2f} GB |" + _figure(found)
        )
    record, cost = ours["record"], ours["seconds"] / sides[RUNGS[-1]]["seconds"]
    decisions = [f"- step {each['step']}: {each['why']}" for each in record["decisions"]]
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    kept = "within" if cost <= MAX_COST else "ABOVE"
    return "\n".join(
        [
            f"# The ladder: {options.name}", "",
            f"{options.model}, {options.steps} steps of {options.batch_size} rows, seed {options.seed}, {len(labels)} "
            f"test rows that no decision saw. {about}.", "", *rows, "",
            f"The ladder took {cost:.2f} times the seconds of {RUNGS[-1]} alone, {kept} the {MAX_COST} allowed; beside "
            f"the {record['steps']} steps of its path it trained {record['overhead_steps']}.",
            "", f"Chosen: {record['chosen']}.", "", *decisions, "",
        ]
    )  # fmt: skip


def _figure(found: dict[str, Any]) -> str:
    return " {value:.3f} ({low:.3f} to {high:.3f}) |".format(**found["figure"]) if "figure" in found else ""


def main(options: argparse.Namespace) -> None:
    """Runs what is missing, side by side, and writes the comparison."""
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "held.jsonl").exists():
        write_rows(folder, SETTINGS[options.on].rows(options.rows, options.held_out))
    sides = run_sides(folder, list(SIDES), options.now)
    results = HERE / "ladder"
    results.mkdir(exist_ok=True)
    stored = {"machine": machine(), "options": {**vars(options), "folder": None}, "sides": sides}
    (results / f"{options.name}.json").write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (results / f"{options.name}.md").write_text(report(options, sides), "utf-8")
    shutil.copy(folder / "ladder" / "report.html", results / f"{options.name}.html")
    print((results / f"{options.name}.md").read_text("utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--on", default="ua_gec", choices=list(SETTINGS), help="what is trained; sets the defaults")
    parser.add_argument("--model")
    parser.add_argument("--name", help="of the files that are written")
    parser.add_argument("--folder", type=Path, metavar="DIR")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--held-out", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, help="default: the one of loratune")
    parser.add_argument(
        "--now", action="store_true", help="do not wait until the machine is idle: no timings to report"
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    setting = SETTINGS[chosen.on]
    chosen.model, chosen.name = chosen.model or setting.model(), chosen.name or chosen.on
    chosen.folder = chosen.folder or Path("runs") / f"bench-ladder-{chosen.on}"
    chosen.rows, chosen.held_out = chosen.rows or setting.num_rows, chosen.held_out or setting.held_out
    chosen.steps = chosen.steps or setting.steps
    if chosen.side:
        side = run_side(chosen, chosen.folder, chosen.side)
        (chosen.folder / f"{chosen.side}.json").write_text(json.dumps(side), "utf-8")
    else:
        main(chosen)
