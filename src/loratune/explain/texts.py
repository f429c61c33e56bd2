"""The texts of `explain` in both languages: finding a topic, writing numbers as people do."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from loratune.adapter.roles import PRESETS, ROLES
from loratune.errors import ConfigError
from loratune.explain import en, uk

LANGUAGES: dict[str, dict[str, Any]] = {"en": en.TEXTS, "uk": uk.TEXTS}

PARAMETERS = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "modules_to_save", "task_type")
PRESET_NAMES = tuple(name for name in PRESETS if name != "expert")  # which is another name of deep
IDEAS = ("scale", "merge", "A", "B")
TOPICS = (*PARAMETERS, *ROLES, *PRESET_NAMES, *IDEAS)
# The usual name of each role's layer: Llama's, which most recent families share.
USUAL_NAMES = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "head": "lm_head",
}
_ALIASES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules", "s": "scale"}
_ALIASES |= {"expert": "deep", **{usual: role for role, usual in USUAL_NAMES.items()}}
_NAMES = {name.lower(): name for name in TOPICS} | _ALIASES
# What a topic's text on a richer setting is called: doubling a number, a step up a list, or an adapter at a role.
HEADINGS = dict.fromkeys(TOPICS, "step_up")
HEADINGS |= dict.fromkeys(("r", "lora_alpha", "lora_dropout", "scale", "merge", "A", "B"), "doubled")
HEADINGS |= dict.fromkeys(ROLES, "adapted")
_BREAK = re.compile(r"[ \n]+")


def find_topic(name: str) -> str:
    """Returns the topic that a name means; raises ConfigError with the nearest names for an unknown one."""
    if (topic := _NAMES.get(name.lower())) is not None:
        return topic
    near = difflib.get_close_matches(name.lower(), _NAMES, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(TOPICS)}."
    raise ConfigError(f"nothing is explained under {name!r}; {hint}")


def one_line(text: str) -> str:
    """Returns a text with its line breaks and indentation as single spaces; a no-break space stays."""
    return _BREAK.sub(" ", text)


def cleaned(value: Any) -> Any:
    """Returns texts with single spaces all through; a list called "drawing" stays as it is drawn."""
    if isinstance(value, Mapping):
        return {name: item if name == "drawing" else cleaned(item) for name, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list) else one_line(value)


class Numbers:
    """Writes numbers as a language does: 1,234.5 MB in English, 1 234,5 МБ in Ukrainian."""

    def __init__(self, texts: Mapping[str, Any]) -> None:
        self._signs = texts["number"]

    def count(self, value: float, decimals: int = 0) -> str:
        """Returns a number with separators: 1,234 or 1 234."""
        plain = f"{value:,.{decimals}f}"
        return plain.translate(str.maketrans({",": self._signs["thousands"], ".": self._signs["decimal"]}))

    def plain(self, value: float) -> str:
        """Returns a setting as it is written: 16, 0.05 or 0,05."""
        return f"{value:g}".replace(".", self._signs["decimal"])

    def size(self, num_bytes: float) -> str:
        """Returns bytes in decimal units with about three digits: 737 kB, 1.47 MB."""
        units = list(self._signs["units"])
        power = min(len(units) - 1, max(0, len(str(round(num_bytes))) - 1) // 3)
        value = num_bytes / 1000**power
        return f"{self.count(value, _decimals(value) if power else 0)}\u00a0{units[power]}"

    def share(self, value: float) -> str:
        """Returns a share as a percentage: 0.14%, 12.3%."""
        percent = 100 * value
        return f"{self.count(percent, 0 if percent == 0 else _decimals(percent))}{self._signs['percent']}"


def _decimals(value: float) -> int:
    """How many decimals show three digits of a number, four at most."""
    return next((decimals for decimals, low in enumerate((100, 10, 1, 0.1)) if value >= low), 4)
