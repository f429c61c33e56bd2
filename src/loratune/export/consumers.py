"""What programs that load adapters will refuse, or apply wrongly: one table, one small function per consumer.

Read off vLLM's peft_helper.py and lora_model.py, llama.cpp's convert_lora_to_gguf.py and llama-adapter.cpp, and PEFT's
loader; each finding says what stands in the way and what to do.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loratune.adapter import stored
from loratune.adapter.adapter import Adapter
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank
from loratune.errors import ConfigError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
_VLLM_DEFAULT_RANK = 16
_MERGE = "Export a merged model instead.", "loratune export ADAPTER --to merged --output DIR"
_CONVERT = "loratune adapters convert ADAPTER NEW --to peft"
_HEADS, _EMBEDDINGS = ("lm_head", "embed_out"), ("embed_tokens", "wte", "word_embeddings")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a consumer does with an adapter. severity: "refuse" (not loaded, or applied wrongly) or "note".

    command: what to run, with ADAPTER in place of the adapter's folder; empty if there is nothing to run.
    """

    severity: str
    what: str
    advice: str
    command: str = ""


Check = Callable[[LoraConfig, Adapter], Iterator[Finding]]


def check(adapter: Adapter, consumers: Sequence[str] | None = None) -> dict[str, list[Finding]]:
    """Returns the findings of each consumer, of all in CONSUMERS if none is named; raises ConfigError for others."""
    for name in consumers or ():
        if name not in CONSUMERS:
            near = difflib.get_close_matches(name, CONSUMERS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown consumer {name!r}; expected some of {', '.join(CONSUMERS)}.{hint}")
    return {name: list(CONSUMERS[name](adapter.config, adapter)) for name in consumers or CONSUMERS}


def _peft(config: LoraConfig, adapter: Adapter) -> Iterator[Finding]:
    if not _stacked(config, adapter):
        return
    if stored.expert_layout(adapter) == "peft-0.18":
        what = "stacked experts lie as PEFT 0.18 stored them; later versions cannot load them"
        yield Finding("refuse", what, "Convert it.", f"{_CONVERT} --from peft-0.18")
    else:
        yield Finding(
            "note", "stacked experts (target_parameters) changed their layout", "Load with PEFT 0.19 or later."
        )


def _vllm(config: LoraConfig, adapter: Adapter) -> Iterator[Finding]:
    yield from _beyond_factors(config, adapter)
    yield from _stacked_refused(config, adapter)
    yield from _vllm_rank(max([config.r, *(factor.rank for _, factor in _plain(config, adapter))]))
    alone = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    yield from _wrong_scales("vLLM", config, adapter, lambda factor: alone)
    if ends := _ending(adapter, (*_HEADS, *_EMBEDDINGS)):
        yield Finding(
            "note",
            f"{ends[0]} is adapted: loaded only where vLLM's model declares it an embedding module",
            "If vLLM refuses it, leave it out of target_modules, or export a merged model.",
        )


def _vllm_rank(rank: int) -> Iterator[Finding]:
    if rank <= _VLLM_DEFAULT_RANK:
        return
    allowed = next((each for each in VLLM_RANKS if each >= rank), None)
    if allowed is None:
        what = f"rank {rank} is above the largest --max-lora-rank, {VLLM_RANKS[-1]}"
        yield Finding("refuse", what, "Compress it.", f"{_CONVERT} --rank {VLLM_RANKS[-1]}")
    else:
        what = f"rank {rank} is above vLLM's default limit of {_VLLM_DEFAULT_RANK}"
        yield Finding("note", what, f"Serve with --enable-lora --max-lora-rank {allowed}.")


def _llama_cpp(config: LoraConfig, adapter: Adapter) -> Iterator[Finding]:
    yield from _beyond_factors(config, adapter)
    yield from _stacked_refused(config, adapter)
    if convolutions := [path for path, factor in adapter.factors.items() if factor.A.ndim > 2]:
        yield Finding("refuse", f"{convolutions[0]} is a convolution; its factor is no matrix", *_MERGE)
    yield from _wrong_scales("llama.cpp", config, adapter, lambda factor: config.lora_alpha / factor.rank)
    if heads := _ending(adapter, _HEADS):
        tied = config.ensure_weight_tying
        what = "shares its weight with the embedding" if tied else "is adapted: refused if the base ties it"
        advice = _MERGE if tied else ("If the base has tie_word_embeddings, export a merged model instead.", _MERGE[1])
        yield Finding("refuse" if tied else "note", f"{heads[0]} {what}", *advice)


def _beyond_factors(config: LoraConfig, adapter: Adapter) -> Iterator[Finding]:
    """What neither vLLM nor a GGUF adapter can hold: everything that is not a pair of factors."""
    found = {
        "DoRA's magnitudes": config.use_dora or any(f.magnitude is not None for f in adapter.factors.values()),
        f"modules saved in full ({', '.join(config.modules_to_save or ())})": config.modules_to_save,
        f"trained biases (bias={config.bias!r})": config.bias != "none",
        "a bias of B (lora_bias)": config.lora_bias,
        "trained rows of the embedding (trainable_token_indices)": config.trainable_token_indices,
    }
    for what, there in found.items():
        if there:
            yield Finding("refuse", f"{what} cannot be loaded", *_MERGE)


def _stacked_refused(config: LoraConfig, adapter: Adapter) -> Iterator[Finding]:
    if paths := _stacked(config, adapter):
        yield Finding(
            "refuse", f"{paths[0]} holds stacked experts (target_parameters), read in another layout", *_MERGE
        )


def _wrong_scales(
    consumer: str, config: LoraConfig, adapter: Adapter, applied: Callable[[LowRank], float]
) -> Iterator[Finding]:
    """Consumers that know one r and one alpha apply a wrong scale wherever patterns or rsLoRA say otherwise."""
    plain = list(_plain(config, adapter))
    wrong = [(path, each) for path, each in plain if not math.isclose(applied(each), each.scale, rel_tol=1e-6)]
    if wrong:
        path, factor = wrong[0]
        rank = max(each.rank for _, each in plain)
        yield Finding(
            "refuse",
            f"{len(wrong)} of {len(plain)} sites would be scaled wrongly, in silence: {path} by {applied(factor):.4g} "
            f"instead of {factor.scale:.4g}; {consumer} knows one r and lora_alpha",
            "Fold the scales in; nothing else changes.",
            f"{_CONVERT} --rank {rank}",
        )


def _plain(config: LoraConfig, adapter: Adapter) -> Iterator[tuple[str, LowRank]]:
    return ((path, each) for path, each in adapter.factors.items() if not stored.is_stacked(config, path, each))


def _stacked(config: LoraConfig, adapter: Adapter) -> list[str]:
    return [path for path, each in adapter.factors.items() if stored.is_stacked(config, path, each)]


def _ending(adapter: Adapter, names: Sequence[str]) -> list[str]:
    return [path for path in adapter.factors if path.rpartition(".")[2] in names]


CONSUMERS: dict[str, Check] = {"peft": _peft, "vllm": _vllm, "llama.cpp": _llama_cpp}
