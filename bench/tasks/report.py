"""The tables of the real tasks: medians over seeds, and what each says about the claims of the LoRA paper."""

import statistics
from typing import Any

import numpy as np
from specs import FULL, SPECS, Spec

from loratune.evaluate import metrics

Runs = dict[str, list[dict[str, Any]]]
ADAPTERS = ("LoRA fast", "LoRA deep")
STATISTICS = {
    "accuracy": metrics.ratio, "pearson": metrics.pearson, "span_f1": metrics.micro_f1, "f0_5": metrics.f_beta(0.5),
}  # fmt: skip


def report(tasks: dict[str, Any], machine: dict[str, Any]) -> str:
    """Returns the page; `tasks` holds each task's rows ("about") and runs with their counts."""
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    parts = [
        "# LoRA, full fine-tuning and floors on real tasks", "",
        "Same rows, order, batches and steps for all that train; AdamW; the state of the best validation loss is what "
        "is tested, on rows of other writers or sources. Full fine-tuning has the better of two learning rates by "
        "validation loss, a head alone 5e-3, adapters the default of loratune, 5e-4. In brackets: 95% by resampling "
        "test rows; where several seeds ran, every figure is the median one's, with the smallest and largest value "
        "behind it. Seconds: of the training steps (of the probe: all). Memory: the process's peak from the loaded "
        f"model on. {about}.", "",
    ]  # fmt: skip
    for name, task in tasks.items():
        parts += [*section(name, SPECS[name], task["about"], task["runs"]), ""]
    return "\n".join(parts)


def section(name: str, spec: Spec, about: dict[str, Any], runs: Runs) -> list[str]:
    runs = with_best_full(runs)
    sizes = " / ".join(f"{count:,}" for count in about["rows"].values())
    common = f"; commonest of {about['classes']}: {about['share']:.1%}" if "share" in about else ""
    title = {"gemma": "Gemma 3 270M", "minilm": "MiniLM-L6 (22M)"}[spec.model]
    steps = max(run["steps"] for each in runs.values() for run in each)
    return [
        f"## {name}: {title}, {spec.task_type}", "",
        f"{spec.about}. Rows (train / validation / test): {sizes}{common}. {steps} steps of {spec.batch} rows, "
        f"{_count(max(map(len, runs.values())), 'seed')}.", "",
        "| method | trained | " + " | ".join(each.replace("_", " ") for each in spec.metrics) + " | seconds | memory |",
        "|---" * (len(spec.metrics) + 4) + "|",
        *(_line(spec, method, each) for method, each in runs.items()), "", said(spec, runs),
    ]  # fmt: skip


def with_best_full(runs: Runs) -> Runs:
    """Returns the runs with full fine-tuning at that of its rates whose median validation loss is the lower."""
    losses = {name: statistics.median(run["validation_loss"] for run in runs[name]) for name in FULL}
    best = min(FULL, key=losses.__getitem__)
    kept = {name: each for name, each in runs.items() if name not in FULL or name == best}
    return {f"full fine-tuning, {each[0]['rate']:g}" if name == best else name: each for name, each in kept.items()}


def median_run(runs: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Returns the run of the median value; of an even number, the lower of the two in the middle."""
    ordered = sorted(runs, key=lambda run: run["figures"][metric]["value"] or 0.0)
    return ordered[(len(ordered) - 1) // 2]


def _line(spec: Spec, method: str, runs: list[dict[str, Any]]) -> str:
    middle = median_run(runs, spec.metrics[0])
    cells = [method, f"{middle['trainable']:,}"]
    cells += [_figure(middle["figures"][each]) for each in spec.metrics]
    if len(runs) > 1:
        values = sorted(run["figures"][spec.metrics[0]]["value"] or 0.0 for run in runs)
        cells[2] += f"; {values[0]:.3f} to {values[-1]:.3f}"
    cells += [f"{_median(runs, 'seconds'):.1f}", f"{_median(runs, 'peak_bytes') / 1e9:.2f} GB"]
    return f"| {' | '.join(cells)} |"


def _figure(figure: dict[str, float | None]) -> str:
    if figure["value"] is None:
        return "not defined"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")


def said(spec: Spec, runs: Runs) -> str:
    """Returns what a task says: the adapters against full fine-tuning, row by row, and against what is cheaper."""
    metric = spec.metrics[0]
    middle = {name: median_run(each, metric) for name, each in runs.items()}
    full = next(name for name in runs if name.startswith("full"))
    sentences = [_against(name, middle[name], middle[full], metric) for name in ADAPTERS]
    sentences.append(_cost(runs["LoRA fast"], runs[full]))
    floors = [name for name in runs if name not in (*ADAPTERS, full)]
    floor = max(floors, key=lambda name: middle[name]["figures"][metric]["value"] or 0.0)
    best = max(ADAPTERS, key=lambda name: middle[name]["figures"][metric]["value"] or 0.0)
    sentences.append(_against(best, middle[best], middle[floor], metric, floor))
    return " ".join(sentences)


def _against(
    name: str, one: dict[str, Any], other: dict[str, Any], metric: str, rival: str = "full fine-tuning"
) -> str:
    difference = metrics.paired(np.array(other["counts"]), np.array(one["counts"]), STATISTICS[metric])
    verdict = "beats" if difference.low > 0 else "loses to" if difference.high < 0 else "shows no clear difference from"
    if not np.isfinite(difference.value):
        return f"{name} cannot be compared with {rival}: a side is constant."
    figure = f"{difference.value:+.3f}, {difference.low:+.3f} to {difference.high:+.3f}"
    return f"{name} {verdict} {rival} ({metric.replace('_', ' ')} {figure})."


def _cost(adapter: list[dict[str, Any]], full: list[dict[str, Any]]) -> str:
    shares = {key: _median(adapter, key) / _median(full, key) for key in ("trainable", "seconds", "peak_bytes")}
    return (
        f"LoRA fast trained {shares['trainable']:.2%} of the weights, in {shares['seconds']:.2f} times the seconds and "
        f"{shares['peak_bytes']:.2f} times the memory of full fine-tuning."
    )
