"""Adapters of tiny models with random tensors, saved: what the tests of reports, checks and conversions read."""

from pathlib import Path
from typing import Any

from families import FAMILIES
from loratune.adapter.attach import Attached, attach
from loratune.adapter.config import LoraConfig
from oracles import randomise


def saved(folder: Path, family: str = "llama", *, seed: int = 11, **settings: Any) -> Attached:
    """Attaches an adapter to a tiny model, fills it as training would, saves it, and returns its handle."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0} | settings)
    attached = attach(FAMILIES[family](), config, seed=seed)
    randomise((parameter for _, parameter in attached.adapter.named_parameters()), seed)
    attached.save(folder)
    return attached
