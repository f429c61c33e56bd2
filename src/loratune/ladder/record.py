"""The record of a climb, ladder.json: what each rung took and gave, each decision with its figures, the final test."""

import json
from collections.abc import Sequence
from typing import Any

from loratune.ladder.climb import Climb
from loratune.train import loop
from loratune.train.loop import Run

LADDER = "ladder.json"
_Events = Sequence[dict[str, Any]]


def record(run: Run, climb: Climb) -> dict[str, Any]:
    """Returns the whole record of a climb that has ended, from its metrics and a last evaluation on the test rows."""
    events = [json.loads(line) for line in (run.output / loop.METRICS).read_text("utf-8").splitlines()]
    decisions = [event for event in events if event["event"] == "decision"]
    rungs = _rungs(climb, events, decisions)
    return {
        "rungs": rungs,
        "chosen": climb.rungs[climb.rung].name,
        "decisions": [{name: value for name, value in each.items() if name != "event"} for each in decisions],
        "test": climb.tested(run),
        "validation_rows": len(run.validation),
        "test_rows": len(climb.test),
        "trial_steps": climb.lengths.trial,
        "price": dict(climb.price),
        "steps": sum(rung["steps"] for rung in rungs),
        "seconds": sum(rung["seconds"] for rung in rungs),
        "overhead_steps": climb.overhead_steps,
        "overhead_seconds": climb.overhead_seconds,
    }


def _rungs(climb: Climb, events: _Events, decisions: _Events) -> list[dict[str, Any]]:
    """What each rung cost: its steps and seconds on the final path, and the figures of its last arm."""
    names = [rung.name for rung in climb.rungs]
    own: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    current = names[0]
    for event in events:
        if event["event"] == "rung":
            current = event["rung"]
        elif event["event"] == "step":
            own[current].append(event)
    tried: dict[str, dict[str, Any]] = {name: {} for name in names}
    for arm in (arm for decision in decisions for arm in decision.get("arms", ())):
        tried[arm["rung"]] |= arm  # the difference is that of its climb, the rest of its last trial
    wanted = ("parameters", "step_seconds", "memory_bytes", "loss", "low", "high", "difference", "price", "failure")
    return [
        {
            "name": rung.name,
            "r": rung.config.r,
            "steps": len(own[rung.name]),
            "seconds": sum(step["step_seconds"] for step in own[rung.name]),
            **{name: tried[rung.name].get(name) for name in wanted},
        }
        for rung in climb.rungs
    ]
