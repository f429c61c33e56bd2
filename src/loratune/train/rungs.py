"""The rungs of a ladder by name: a preset, or a preset with another rank."""

from typing import TYPE_CHECKING, Any

from loratune.errors import ConfigError

if TYPE_CHECKING:
    from loratune.train.config import AdapterConfig


def rung_settings(rung: str) -> dict[str, Any]:
    """Returns what a rung sets of an adapter: the preset's targets, its r or the rung's own, and lora_alpha = 2 r."""
    from loratune.adapter.config import LoraConfig

    preset, _, rank = rung.partition(":")
    lora = LoraConfig.preset(preset, **({"r": int(rank)} if rank else {}))
    return {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": preset}


def on_rung(adapter: "AdapterConfig", rung: str) -> "AdapterConfig":
    """Puts an adapter's settings on a rung; raises ConfigError for one that is given and another than the rung's."""
    settings = {"preset": rung.partition(":")[0], **rung_settings(rung)}
    for name, value in settings.items():
        given = getattr(adapter, name)
        if given not in (None, value):
            raise ConfigError(
                f"{name} is {given!r}, but on a ladder the rungs set it: the first, {rung}, has {value!r}. "
                "Leave it out, or choose other rungs, such as fast:4, fast:16, expert."
            )
    return adapter.model_copy(update=settings)
