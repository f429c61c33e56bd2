"""The proof of an export: the logits of one fixed row, from the base with its adapter and from what was written.

Both are loaded as a user would load them and compute in the same type; one model is in memory at a time.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.adapter.adapter import Adapter
from loratune.adapter.attach import attach
from loratune.errors import ExportError
from loratune.model.load import load_model

NUM_TOKENS = 32


@dataclass(frozen=True)
class Limit:
    """What rounding may do to the logits: `difference`, the largest relative to the largest logit; `kl`, in nats."""

    difference: float
    kl: float


# Rounding a weight moves it by up to 2^-9 (bfloat16) or 2^-12 (float16) of itself, and logits by several times that.
# Measured on Gemma 3 270M, all roles and the head merged, all weights rounded: difference 0.025 and KL 0.0017 in
# bfloat16, 0.0025 and 3e-5 in float16; with an adapter that wrecks the model 0.041 and 0.036, 0.0075 and 7e-4.
LIMITS = {
    torch.float64: Limit(1e-4, 1e-6),
    torch.float32: Limit(1e-4, 1e-6),
    torch.float16: Limit(2e-2, 5e-3),
    torch.bfloat16: Limit(1e-1, 5e-2),
}
_SHARE_OF_EFFECT = 0.5  # an update added in the wrong place, or not at all, differs by the whole effect or more


@dataclass(frozen=True)
class Expected:
    """The row, the logits of the attached model on it (T, V), float32, and how far they are from the base's own.

    adapter: the one that was attached, every tensor in its place.
    """

    adapter: Adapter
    ids: list[int]
    logits: Tensor
    effect: float
    dtype: torch.dtype


def expected(model_name: str, adapter: Adapter, task: str) -> Expected:
    """Returns what the merged model must compute; raises AdapterError if the adapter does not belong to the base."""
    model, tokenizer = load_model(model_name, task_type=task)
    ids = _row(model, tokenizer)
    attached = attach(model, adapter)
    logits = _logits(model, ids)
    with attached.disabled():
        effect = _difference(_logits(model, ids), logits)
    result = Expected(attached.adapter, ids, logits, effect, next(model.parameters()).dtype)
    for factor in attached.adapter.factors.values():
        factor.cpu()
    attached.detach()
    del model, attached
    gc.collect()
    return result


def check(folder: Path, wanted: Expected, written: torch.dtype, task: str, *, only_update: bool) -> dict[str, Any]:
    """Loads what was written and compares; returns the figures. Raises ExportError beyond the limit of the type.

    `only_update`: nothing but the update was rounded and most of it was kept, so most of its effect must be there.
    """
    model, _ = load_model(folder, task_type=task, dtype=wanted.dtype)
    found = _logits(model, wanted.ids)
    del model
    gc.collect()
    limit = max((LIMITS[written], LIMITS[wanted.dtype]), key=lambda each: each.difference)
    largest = limit.difference
    if only_update:
        largest = min(largest, max(LIMITS[torch.float32].difference, _SHARE_OF_EFFECT * wanted.effect))
    difference, kl = _difference(found, wanted.logits), _kl(wanted.logits, found)
    if not (difference <= largest and kl <= limit.kl):
        raise ExportError(
            f"the merged model does not compute what the adapter does: on {len(wanted.ids)} probe tokens its logits "
            f"differ by {difference:.2g} of the largest (limit {largest:.2g}), KL {kl:.2g} nats (limit "
            f"{limit.kl:g}). Nothing was written. Try --dtype float32, or keep the adapter beside the model."
        )
    return {
        "tokens": len(wanted.ids),
        "difference": difference,
        "limit": largest,
        "kl": kl,
        "adapter_effect": wanted.effect,
    }


def _row(model: Any, tokenizer: Any) -> list[int]:
    """Evenly spaced ids of ordinary tokens: no text is needed, and special ones (of images, say) can mean more."""
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    rows = model.get_input_embeddings().weight.shape[0]
    ordinary = [index for index in range(min(rows, len(tokenizer))) if index not in special] or list(range(rows))
    return [ordinary[len(ordinary) * i // NUM_TOKENS] for i in range(NUM_TOKENS)]


def _logits(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        row = torch.tensor([ids], device=model.device)
        return model(input_ids=row, use_cache=False).logits[0].float().cpu()


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def _kl(wanted: Tensor, found: Tensor) -> float:
    """The mean over tokens of KL(wanted | found), in float64."""
    p, q = (each.double().log_softmax(-1) for each in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean())
