"""The heads of tasks: which class brings one, and one that the base model lacks, made anew and named as such.

In the base a new head is zero, so that the base is the same for every seed; the trained copy begins at random.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSemanticSegmentation,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

CLASSES: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoModel,
    "SEGMENTATION": AutoModelForSemanticSegmentation,
}
IMAGES = ("SEGMENTATION",)  # tasks of models that read images
_NEW = "_loratune_new"  # on a model: the paths of its new modules


def settings(folder: Path, task_type: str, labels: Sequence[str], problem: str | None) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that give a head its size and names; none for a task without head.

    Where the stored head knows the same names, their order is kept.
    """
    if task_type not in CLASSES:
        return {}
    names = _stored_names(folder) if set(_stored_names(folder)) == set(labels) else list(labels)
    if not names:
        return {"ignore_mismatched_sizes": True}
    return {
        "ignore_mismatched_sizes": True,
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": problem,
    }


def _stored_names(folder: Path) -> list[str]:
    stored = json.loads((folder / "config.json").read_text("utf-8")).get("id2label") or {}
    return [str(stored[key]) for key in sorted(stored, key=int)]


@torch.no_grad()
def emptied(model: PreTrainedModel, report: dict[str, Any], settings: dict[str, Any], folder: Path) -> list[str]:
    """Sets a head that the weights lack, or hold in another size or for other labels, to zero.

    Returns the names of the other tensors that they lack.
    """
    mismatched = {each[0] if isinstance(each, tuple) else each for each in report.get("mismatched_keys", ())}
    missing = {*report["missing_keys"], *mismatched}
    if not settings:
        return sorted(missing)
    tensors = dict(model.named_parameters())
    if "id2label" in settings and list(settings["id2label"].values()) != _stored_names(folder):
        missing |= {name for name in tensors if _is_head(model, name) and "pooler" not in name.split(".")}
    new = [name for name in sorted(missing) if _is_head(model, name)]
    for name in new:
        if name in tensors:
            tensors[name].zero_()
    model.__dict__[_NEW] = tuple(sorted({_module_of(model, name) for name in new}))
    return sorted(missing.difference(new))


def _is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor stands outside the trunk, or in its pooler, which many checkpoints leave out."""
    parts = name.split(".")
    return "pooler" in parts or (model.base_model is not model and parts[0] != model.base_model_prefix)


def _module_of(model: PreTrainedModel, name: str) -> str:
    """Returns what is trained whole for a tensor's sake: the head's module at the top, or the trunk's pooler."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("pooler") + 1]) if "pooler" in parts else parts[0]


def new_modules(model: nn.Module) -> tuple[str, ...]:
    """Returns the paths of the modules that a loaded model lacked."""
    return model.__dict__.get(_NEW, ())


def to_save(model: nn.Module) -> tuple[str, ...]:
    """Returns the modules at the top beside the trunk that hold parameters, and what is new: all are trained whole."""
    trunk: Any = model
    if trunk.base_model is model:
        return ()
    heads = [
        name
        for name, module in model.named_children()
        if name != trunk.base_model_prefix and next(module.parameters(), None) is not None
    ]
    return tuple(dict.fromkeys([*heads, *new_modules(model)]))


@torch.no_grad()
def begin(model: nn.Module, saved: dict[str, nn.Module], seed: int) -> None:
    """Begins the trained copies of new modules (path -> copy) as the model's family begins a head, from a seed."""
    device_free: Any = model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path in new_modules(model):
            for module in saved[path].modules() if path in saved else ():
                for parameter in module.parameters(recurse=False):
                    parameter._is_hf_initialized = False  # pyright: ignore[reportAttributeAccessIssue]
                device_free._init_weights(module)


def complete(model: PreTrainedModel, tokenizer: Any, task_type: str) -> None:
    """Gives a classifier on a decoder, which reads the last token that is no padding, a padding token to know it by."""
    if task_type not in CLASSES:
        return
    config: Any = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        config.pad_token_id = padding
