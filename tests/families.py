"""A zoo of tiny random float32 models, one per family: 2 or 3 layers, hidden 32, vocabulary 128, seeded, eval mode."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 128
_STD = 0.2  # large enough that logits differ clearly, small enough that float32 stays well conditioned
_NUM_LABELS = 3

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD_DIM: dict[str, Any] = {"head_dim": 8}
_MIXED_ATTENTION: dict[str, Any] = {
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MULTIHEAD: dict[str, Any] = {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}
_ENCODER: dict[str, Any] = _MULTIHEAD | {"num_labels": _NUM_LABELS}
_FALCON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
}
_MPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "expansion_ratio": 2,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": _NUM_LABELS,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": _NUM_LABELS,
}
_SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [2, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 32,
    "num_labels": _NUM_LABELS,
}

# name -> (model class, config class, config values)
_CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER | {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER | _HEAD_DIM),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _DECODER | _HEAD_DIM),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _DECODER
        | _HEAD_DIM
        | _MIXED_ATTENTION
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _DECODER | _HEAD_DIM | _MIXED_ATTENTION | {"query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER | {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _MULTIHEAD),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 4}),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        _FALCON | {"alibi": False, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
    ),
    "falcon_alibi": (
        "FalconForCausalLM",
        "FalconConfig",
        _FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "new_decoder_architecture": False},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        _MULTIHEAD | {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptForCausalLM", "MptConfig", _MPT),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _DECODER | _HEAD_DIM | _MOE | {"num_experts": 4, "decoder_sparse_step": 2},
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", _DECODER | {"logit_scale": 0.25}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _DECODER | {"logits_scaling": 4.0}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _DECODER),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _DECODER),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _DECODER),
}
_ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _ENCODER),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", _MULTIHEAD),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _ENCODER | {"pad_token_id": 1, "bos_token_id": 0}),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", _DISTILBERT),
    "deberta": (
        "DebertaForSequenceClassification",
        "DebertaConfig",
        _ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    ),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        _ENCODER
        | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": False, "type_vocab_size": 0},
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        _ENCODER | {"num_hidden_layers": 3, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", _ENCODER | {"embedding_size": 16}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", _ENCODER | {"embedding_size": 16}),
}
_SEQ2SEQ: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5 | {"feed_forward_proj": "relu"}),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5 | {"feed_forward_proj": "gated-gelu"},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
}
_VISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", _SEGFORMER),
}

CAUSAL = tuple(_CAUSAL)
ENCODER = tuple(_ENCODERS)
SEQ2SEQ = tuple(_SEQ2SEQ)
VISION = tuple(_VISION)


def _randomise(model: PreTrainedModel) -> None:
    """Draws every weight anew: matrices N(0, _STD), biases N(0, 0.1), norm weights near what they were."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(_STD * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.add_(0.1 * noise)


def _build(model_class: str, config_class: str, values: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**values)
    model = getattr(transformers, model_class)(config).float()
    _randomise(model)
    return model.eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    name: partial(_build, *row) for name, row in (_CAUSAL | _ENCODERS | _SEQ2SEQ | _VISION).items()
}


def inputs_for(name: str, batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Returns seeded sample inputs that `model(**inputs)` of the named family accepts."""
    generator = torch.Generator().manual_seed(2)
    if name in _VISION:
        size = 16 if name == "vit" else 32
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in _SEQ2SEQ:
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, length - 3), generator=generator)
    return inputs
