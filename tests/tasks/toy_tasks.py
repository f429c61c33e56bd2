"""What the tests of tasks share: tiny models of several families with a word tokenizer, and rows of toy tasks."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>"]
GOOD, BAD = ["good", "fine", "great", "sunny"], ["bad", "poor", "awful", "rainy"]
NAMES, PLACES = ["anna", "boris", "clara"], ["paris", "kyiv", "lviv"]
FILL = [
    *("the", "a", "cat", "dog", "house", "tree", "was", "is", "and", "very", "day", "film", "food"),
    *("lives", "in", "went", "to", "who", "where", "?", "."),
]
WORDS = [*SPECIAL, *GOOD, *BAD, *NAMES, *PLACES, *FILL, *(f"w{number}" for number in range(40))]
_SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS) + 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# family -> (config class, what differs from the shape, model class of the base checkpoint)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertConfig", {}, "BertModel"),
    "roberta": ("RobertaConfig", {"type_vocab_size": 1, "pad_token_id": 0}, "RobertaModel"),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        "DistilBertModel",
    ),
    "llama": (
        "LlamaConfig",
        {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 5, "pad_token_id": None},
        "LlamaForCausalLM",
    ),
    "t5": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
         "eos_token_id": 5},
        "T5ForConditionalGeneration",
    ),
    "bart": (
        "BartConfig",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 5,
         "eos_token_id": 5, "bos_token_id": 2, "forced_eos_token_id": None},
        "BartForConditionalGeneration",
    ),
}  # fmt: skip


def tokenizer(family: str = "bert") -> PreTrainedTokenizerFast:
    """A word tokenizer; of encoders with [CLS] a [SEP] b [SEP] and token types, of others with </s> or nothing."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special: dict[str, Any] = {"unk_token": "[UNK]", "eos_token": "</s>"}
    inputs = ["input_ids", "attention_mask"]
    if family in ("t5", "bart"):
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 5)])
        special |= {"pad_token": "[PAD]"}
    elif family != "llama":
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        inputs += ["token_type_ids"] if family == "bert" else []
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **special)


def save_model(folder: Path, family: str = "bert", seed: int = 0) -> Path:
    """Writes a random base model without a task's head, and its tokenizer; returns the folder."""
    config_class, own, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**(_SHAPE | own)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentiment(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of words, labelled by the one good or bad word in them."""
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        words = [generator.choice(FILL[:13]) for _ in range(generator.randrange(2, 9))]
        good = number % 2 == 0
        words.insert(generator.randrange(len(words) + 1), generator.choice(GOOD if good else BAD))
        rows.append({"text": " ".join(words), "label": "positive" if good else "negative"})
    return rows


def people(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of words with the names of persons and places tagged."""
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        person, place = generator.choice(NAMES), [generator.choice(PLACES) for _ in range(generator.randrange(1, 3))]
        tokens = [person, generator.choice(["lives", "went"]), generator.choice(["in", "to"]), *place]
        rows.append({"tokens": tokens, "tags": ["B-PER", "O", "O", "B-LOC", *["I-LOC"] * (len(place) - 1)]})
    return rows


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows that ask who stands in a context; of some contexts longer than a window."""
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        words = [generator.choice(FILL[:15]) for _ in range(4 if number % 4 else 70)]
        words.insert(generator.randrange(len(words)), name := generator.choice(NAMES))
        rows.append({"question": "who ?", "context": " ".join(words), "answers": name})
    return rows


def mirrored(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows that ask for their words again."""
    generator = random.Random(seed)
    texts = [" ".join(generator.choice(FILL[:6]) for _ in range(generator.randrange(2, 6))) for _ in range(count)]
    return [{"source": text, "target": text} for text in texts]


def alike(count: int, seed: int = 0, *, scored: bool = False) -> list[dict[str, Any]]:
    """Pairs of texts that share their rare word; with scores, some do not."""
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        first, second = (f"w{number % 40}", f"w{number % 40 if not scored or number % 2 else (number + 7) % 40}")
        pair = {
            "sentence1": f"{generator.choice(FILL[:8])} {first} {generator.choice(FILL[:8])}",
            "sentence2": f"{generator.choice(FILL[:8])} {second}",
        }
        rows.append({**pair, "score": float(first == second)} if scored else pair)
    return rows


CLASSES = ("ground", "square", "disc")
_COLOURS = np.array([[60, 120, 60], [200, 40, 40], [40, 60, 220]])
_PREPROCESSOR = {
    "do_resize": True, "size": {"height": 64, "width": 64}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225], "do_reduce_labels": False,
}  # fmt: skip


def save_segformer(folder: Path, seed: int = 0) -> Path:
    """Writes a random SegFormer as MiT is stored, with a classifier and no decoding head; returns the folder."""
    torch.manual_seed(seed)
    shape = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
    config = transformers.SegformerConfig(**shape, decoder_hidden_size=32, drop_path_rate=0.1, mlp_ratios=[2] * 4)
    model = transformers.SegformerForImageClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR), encoding="utf-8")
    return folder


def shapes(folder: Path, count: int, seed: int = 0, name: str = "rows.jsonl") -> Path:
    """Writes images (arrays) of a square and a disc on the ground, their masks, and the rows that name them."""
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "id2label.json").write_text(json.dumps(dict(enumerate(CLASSES))), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for number in range(count):
        height, width = generator.integers(48, 97, 2).tolist()
        mask = np.zeros((height, width), np.uint8)
        y, x = np.indices(mask.shape)
        a, b, c, d = (generator.uniform(0.2, 0.8, 4) * [height, width, height, width]).tolist()
        mask[(abs(y - a) < height / 6) & (abs(x - b) < width / 6)] = 1
        mask[(y - c) ** 2 + (x - d) ** 2 < (min(height, width) / 5) ** 2] = 2
        mask[:2] = 255  # an edge that nobody labelled
        image = _COLOURS[np.where(mask == 255, 0, mask)] + generator.integers(-30, 31, (height, width, 3))
        stem = f"{seed}-{number}"
        np.save(folder / "images" / f"{stem}.npy", image.clip(0, 255).astype(np.uint8))
        np.save(folder / "images" / f"{stem}-mask.npy", mask)
        rows.append({"image": f"images/{stem}.npy", "mask": f"images/{stem}-mask.npy"})
    return write(folder / name, rows)
