"""What a run directory says of its run, read from its files alone."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from loratune.adapter.config import ABOUT
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
        """Returns what was written beside the adapter when the run ended or was stopped."""
        return _json(self.folder / "adapter" / ABOUT)

    @property
    def has_ended(self) -> bool:
        """Whether all steps are done; a run that was stopped has an adapter too, and can be taken up again."""
        return self.about.get("ended") is True

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
        """The evaluation of the weights that were kept: as the run says, else the best after the first step."""
        later = [event for event in self.evaluations if event["step"] > 0]
        if best := self.about.get("best"):
            return next((event for event in later if event["step"] == best["step"]), None)
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
    """Returns the object of a file, empty where it is not written yet; raises ConfigError for a damaged one."""
    return _parsed(path, path.read_bytes(), path.name) if path.is_file() else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file's whole lines; what follows the last line feed was cut where a run was killed."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [_parsed(path, line, f"{path.name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parsed(path: Path, text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path.parent / where} is damaged: {error}. It is no record of a run any more.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.parent / where} is damaged: expected a JSON object.")
    return cast(dict[str, Any], value)
