"""What the tests of training share: a tiny Llama with a real tokenizer, rows of a copy task, and runs over them."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.toy_tokenizer import FAMILIES, build
from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.data.dataset import Dataset, load_dataset
from loratune.data.encode import Encoder
from loratune.model.causal import CausalModel
from loratune.train.config import TrainConfig
from loratune.train.loop import Run
from loratune.train.optim import Optimizer

CONTEXT = 96


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte level, with a begin and an end token, and no chat template."""
    return build(FAMILIES["plain_bos"])


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    """Two layers, hidden 32, random, frozen, as large a vocabulary as the tokenizer's."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer().bos_token_id,
        "eos_token_id": tokenizer().eos_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**(shape | settings)))
    return model.eval().requires_grad_(False)


def save_model(folder: Path, **settings: Any) -> Path:
    """Writes a base model as `save_pretrained` does; returns its folder."""
    tiny_llama(**settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def copy_row(generator: random.Random) -> dict[str, str]:
    """A row that asks for its two to five digits again."""
    digits = " ".join(str(generator.randrange(10)) for _ in range(generator.randrange(2, 6)))
    return {"prompt": f"{digits} =", "completion": f" {digits}"}


def copy_rows(num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    generator = random.Random(seed)
    return [copy_row(generator) for _ in range(num_rows)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dataset(folder: Path, num_rows: int, seed: int = 0) -> Dataset:
    """The documents of rows written to `folder`."""
    path = write_rows(folder / f"rows-{num_rows}-{seed}.jsonl", copy_rows(num_rows, seed))
    return load_dataset(path, Encoder(tokenizer(), CONTEXT))


def make_run(
    folder: Path,
    *,
    rows: int = 24,
    adapter: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    packs: bool = True,
    **settings: Any,
) -> Run:
    """A run in memory, made by hand as `api` makes it: a new adapter on a new tiny Llama, and rows of the copy task."""
    model = tiny_llama().to(dtype)  # pyright: ignore[reportArgumentType]  # transformers decorates `to`
    config = TrainConfig(**settings)
    attached = attach(model, LoraConfig.preset("deep", **{"r": 4, **(adapter or {})}), seed=config.seed)
    for _, parameter in attached.adapter.named_parameters():
        parameter.data = parameter.data.to(dtype)
    causal = CausalModel(model)
    if not packs:
        causal.close()
        causal.packs = False
    return Run(
        output=folder / "run",
        config=config,
        causal=causal,
        attached=attached,
        optimizer=Optimizer(attached.adapter, config),
        train=dataset(folder, rows),
        validation=dataset(folder, 8, seed=1),
        identity={},
        on_event=lambda event: None,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def lines_of(path: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, or those of one event."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in found if event in (None, line["event"])]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder: the content of each file, None for a directory."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }
