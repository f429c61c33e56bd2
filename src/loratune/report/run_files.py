"""What a run directory says of its run, read from its files alone."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from loratune.errors import ConfigError
from loratune.evaluate.interval import Interval, bootstrap_ratio

RUN_FILE, METRICS, SAMPLES, LEDGER, EVALUATIONS = (
    "run.yaml", "metrics.jsonl", "samples.jsonl", "ledger.jsonl", "evaluations.json",
)  # fmt: skip
_SETTING = re.compile(r"^(?P<indent> *)(?P<key>[a-z_0-9]+):(?: (?P<value>.*?))?(?:  # (?P<origin>.*))?$")
_CARD = re.compile(r"```\n(.*?)\n```", re.DOTALL)  # the summary in the adapter's model card


@dataclass(frozen=True)
class Setting:
    """One value of run.yaml and where it came from."""

    name: str
    value: str
    origin: str


@dataclass(frozen=True)
class RunFiles:
    """A run directory; each part is read when it is asked for, and empty where its file is not there."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> "RunFiles":
        """Raises ConfigError for a directory that is no run."""
        if not (folder / RUN_FILE).is_file():
            raise ConfigError(f"{folder} is not a run: {RUN_FILE} is missing. Give a run directory, such as runs/NAME.")
        return cls(folder)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        return _json_lines(self.folder / METRICS)

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("event") == "step"]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("event") == "evaluation"]

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        return _json_lines(self.folder / SAMPLES)

    @cached_property
    def ledger(self) -> list[dict[str, Any]]:
        return _json_lines(self.folder / LEDGER)

    @cached_property
    def settings(self) -> list[Setting]:
        """Returns run.yaml, which our own writer wrote one value a line, with the comment that says its origin."""
        found: list[Setting] = []
        section = ""
        for line in (self.folder / RUN_FILE).read_text("utf-8").splitlines():
            match = _SETTING.match(line)
            if match is None:
                continue
            key = match["key"]
            if match["value"] is None:
                section = key
            else:
                prefix = f"{section}." if match["indent"] else ""
                found.append(Setting(prefix + key, match["value"], match["origin"] or ""))
        return found

    def setting(self, name: str) -> str | None:
        return next((each.value.strip('"') for each in self.settings if each.name == name), None)

    @cached_property
    def about(self) -> dict[str, Any]:
        """Returns what was written beside the adapter when the run ended."""
        return _json(self.folder / "adapter" / "loratune.json")

    @cached_property
    def summary(self) -> str:
        """Returns the table of what was trained, from the adapter's model card."""
        card = self.folder / "adapter" / "README.md"
        match = _CARD.search(card.read_text("utf-8")) if card.is_file() else None
        return match[1] if match else ""

    @property
    def before(self) -> dict[str, Any] | None:
        return next((event for event in self.evaluations if event["step"] == 0), None)

    @property
    def kept(self) -> dict[str, Any] | None:
        """The evaluation of the weights that were kept: the best after the first step."""
        later = [event for event in self.evaluations if event["step"] > 0]
        return min(later, key=lambda event: event["loss"], default=None)

    @cached_property
    def documents(self) -> dict[str, Any]:
        """Returns the loss of every held-out document by step, and which documents they are."""
        return _json(self.folder / EVALUATIONS)

    def losses(self, step: int) -> list[float] | None:
        return self.documents.get("losses", {}).get(str(step))


def paired(one: RunFiles, first: int, other: RunFiles, second: int) -> Interval | None:
    """Returns the difference of two held-out losses per token, second less first, with its 95% interval over documents;
    None where they were not evaluated on the same documents (two at least)."""
    mine, theirs = one.losses(first), other.losses(second)
    same = all(one.documents.get(key) == other.documents.get(key) for key in ("digest", "labels"))
    if mine is None or theirs is None or not same or len(mine) != len(theirs) or len(mine) < 2:
        return None
    return bootstrap_ratio([b - a for a, b in zip(mine, theirs)], one.documents["labels"])


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):  # not written yet, or cut: the page shows the rest
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines; the last may be cut where a run was killed."""
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(cast(dict[str, Any], value))
    return found
