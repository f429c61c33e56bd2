"""A task's adapter and head in one plain model, as transformers (vectors: sentence-transformers) loads it by itself."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loratune import files
from loratune.adapter import peft_format
from loratune.adapter.attach import attach
from loratune.adapter.merge import Loss
from loratune.errors import ConfigError, ExportError
from loratune.export import companions
from loratune.export.loss import loss_report
from loratune.model import heads
from loratune.model.load import DTYPES, Notify, load_model, no_progress_bar, resolve
from loratune.tasks.embed import POOLING, pooling_of
from loratune.tasks.judge import labels_beside, task_beside

_LIMITS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}  # of the largest output
_PROBE_IDS = tuple(range(5, 13))
_PROBE_SIZE = 64, 96


def export_task(
    adapter: Path,
    output: Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    accept_loss: bool = False,
    dry_run: bool = False,
    notify: Notify | None = None,
) -> dict[str, Any]:
    """Writes the base with an adapter merged and its head in place; returns what was written and how far it differs.

    Raises ConfigError for an unknown base, AdapterError for an adapter that does not fit,
    ExportError where rounding loses over 5% of the update (unless `accept_loss`) or what is loaded back computes
    something else; nothing is left behind then.
    """
    value = peft_format.read(adapter)
    task_type, name = task_beside(adapter, value.config.task_type) or "", model or value.config.base_model_name_or_path
    if not name:
        raise ConfigError(f"{adapter / peft_format.CONFIG} names no base model. Give it with --model.")
    labels = labels_beside(adapter)
    base, tokenizer = load_model(
        name, task_type=task_type, labels=labels.names, problem=labels.problem, dtype="float32", notify=notify
    )
    plain = dict(base.named_parameters())
    attached = attach(base, value)
    attached.train_mode(False)
    report: dict[str, Any] = {"output": str(output), "task": task_type, "base": name, "labels": list(labels.names)}
    wish = DTYPES[dtype] if dtype is not None else None
    kind = wish if isinstance(wish, torch.dtype) else None  # "auto": as loaded
    report["bytes"] = sum(each.numel() * (kind or each.dtype).itemsize for each in plain.values())
    if dry_run:
        return report
    require_space(output, report["bytes"])
    wanted = _outputs(base)
    merged: Any = attached.merge()
    changed = {path: each.detach() for path, each in merged.named_parameters() if each is not plain.get(path)}
    if kind is not None:
        merged.to(kind)
    losses = {path: _lost(merged.get_parameter(path), exact, plain.get(path)) for path, exact in changed.items()}
    report |= loss_report(losses, accept_loss)
    with files.staged_directory(output) as staging:
        with no_progress_bar():
            merged.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        if task_type == "FEATURE_EXTRACTION":
            write_sentence_files(staging, name, merged.config.hidden_size)
        companions.write_terms(staging, resolve(name), adapter)
        report["difference"] = _verified(staging, task_type, wanted)
    return report


def require_space(output: Path, num_bytes: int) -> None:
    """Raises ConfigError unless there is room for a merged model."""
    free = files.free_bytes(output)
    if free < num_bytes:
        raise ConfigError(
            f"the merged model needs {num_bytes / 1e9:.1f} GB, and there are {free / 1e9:.1f} GB free at {output}."
            " Choose another place, or a smaller --dtype."
        )


@torch.no_grad()
def _lost(rounded: Tensor, exact: Tensor, before: Tensor | None) -> Loss:
    """Returns what rounding lost of the change of one tensor; of one that is new, all of it is the change."""
    return Loss.of(rounded.to(exact.dtype) - exact, exact if before is None else exact - before)


def _verified(folder: Path, task_type: str, wanted: Tensor) -> float:
    """Loads what was written and returns how far its outputs are from those of base and adapter, of the largest one."""
    with no_progress_bar():
        found: Any = heads.CLASSES[task_type].from_pretrained(folder, local_files_only=True, dtype="auto").eval()
    limit = _LIMITS[next(found.parameters()).dtype]
    difference = float((_outputs(found) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not difference <= limit:
        raise ExportError(
            f"the merged model does not compute what the adapter does: its outputs differ by {difference:.2g} of "
            f"the largest (limit {limit:.2g}). Nothing was written. Try --dtype float32, or keep the adapter."
        )
    return difference


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> Tensor:
    """Returns what a model computes of a few tokens, or of a small image, flat and float32."""
    if model.main_input_name == "pixel_values":
        pixels = torch.rand(1, 3, *_PROBE_SIZE, generator=torch.Generator().manual_seed(0))
        return model(pixel_values=pixels.to(model.device, model.dtype)).logits.flatten().float().cpu()
    embedding: Any = model.get_input_embeddings()
    ids = torch.tensor([[each % embedding.num_embeddings for each in _PROBE_IDS]], device=model.device)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    outputs = model(input_ids=ids, **decoder)
    found = [outputs[key] for key in ("logits", "start_logits", "end_logits", "last_hidden_state") if key in outputs]
    return torch.cat([each.flatten().float().cpu() for each in found])


def write_sentence_files(folder: Path, base: str, width: int) -> None:
    """Writes beside a model what sentence-transformers asks for: how tokens become a vector, and what follows."""
    pooling = pooling_of(base)
    modes = {
        f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    }
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    normalised = (resolve(base).path / "2_Normalize").is_dir() or _normalises(resolve(base).path / "modules.json")
    modules += [("2_Normalize", "Normalize")] if normalised else []
    files.make_directory(folder / POOLING.parent)
    files.write_json(folder / POOLING, {"word_embedding_dimension": width, **modes})
    if normalised:
        files.make_directory(folder / "2_Normalize")
    files.write_json(
        folder / "modules.json",
        [
            {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for n, (path, kind) in enumerate(modules)
        ],
    )
    files.write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})


def _normalises(modules: Path) -> bool:
    return modules.is_file() and "Normalize" in modules.read_text("utf-8")
