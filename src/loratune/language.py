"""The reader's language, for everything that is written in English and Ukrainian."""

import os
from collections.abc import Mapping


def language(environment: Mapping[str, str] = os.environ) -> str:
    """Returns "uk" where the locale's messages are Ukrainian, else "en": the first of LC_ALL, LC_MESSAGES, LANG."""
    wish = next((environment[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environment.get(name)), "")
    return "uk" if wish.lower().startswith("uk") else "en"
