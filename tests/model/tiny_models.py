"""Tiny random models and their GGUF files, written the way llama.cpp's converter does, independently of src."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Names that the families' tokenizers have: transformers' builders add those that are missing, past the embedding.
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<s>", "</s>", "<|endoftext|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", *"abcdefghijklmnop", "ab", "abc", "▁a", "▁ab", *"приветсо", "пр", "при"]
SENTENCEPIECE = SPECIAL + BYTES + PIECES
VOCAB = 320
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
# GGUF architecture -> (model class, config class, settings)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7},
    ),
}
KINDS = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


def tiny(architecture: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random float32 model of a GGUF architecture, norms included, in eval mode."""
    model_class, config_class, own = FAMILIES[architecture]
    config = getattr(transformers, config_class)(**(SHAPE | own | settings))
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer as large as the tiny models' embedding."""
    words = {token: index for index, token in enumerate(SPECIAL + [f"w{n}" for n in range(VOCAB - len(SPECIAL))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def save_folder(folder: Path, architecture: str = "llama", **settings: Any) -> PreTrainedModel:
    """Saves a tiny model with its tokenizer, and returns it."""
    model = tiny(architecture, **settings)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
) -> Path:
    """Writes `model` as a GGUF file, matrices stored as `kind`; `keys` and `tensors` add or (None) leave out."""
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, model.config, architecture)
    for key, value in (keys or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    for name, values in (_stored(model, architecture) | (tensors or {})).items():
        if values is not None:
            matrix = values.ndim == 2
            stored = gguf.quantize(values, kind) if matrix else values
            writer.add_tensor(name, stored, raw_dtype=kind if matrix else gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if "head_dim" in FAMILIES[architecture][2]:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    _WRITE_TOKENIZER[architecture](writer)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)


def _write_sentencepiece(writer: gguf.GGUFWriter) -> None:
    tokens = SENTENCEPIECE + [f"<unused{number}>" for number in range(VOCAB - len(SENTENCEPIECE))]
    types = [3] * len(SPECIAL) + [6] * len(BYTES) + [1] * (VOCAB - len(SPECIAL) - len(BYTES))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(VOCAB)])
    writer.add_token_types(types)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)


def _write_byte_level(writer: gguf.GGUFWriter) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, "ab", "abc"]
    tokens += [f"<unused{number}>" for number in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (VOCAB - len(SPECIAL)))
    writer.add_token_merges(["a b", "ab c"])


_WRITE_TOKENIZER = {
    "llama": _write_sentencepiece,
    "gemma3": _write_sentencepiece,
    "qwen2": _write_byte_level,
    "qwen3": _write_byte_level,
}


def _stored(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray | None]:
    config = model.config
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    stored: dict[str, np.ndarray | None] = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if architecture == "gemma3" and key.endswith("norm.weight"):
            values = values + 1
        if architecture == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            values = _permute(values, config.num_attention_heads if "q_proj" in key else config.num_key_value_heads)
        stored[names.get_name(key, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(values)
    return stored


def _permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py, as it is there."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )
