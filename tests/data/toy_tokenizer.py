"""Tiny byte-level tokenizers with the special tokens and chat templates of four families, written out by hand."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the answer is a short one, and the question was a longer one: what is the answer?",
    "Столиця України - Київ. Яка столиця України? Правильна відповідь: Київ.",
    "user assistant system model\n\n\nuser assistant\n\n\n\nsystem\n\n\nmodel\n\n",
    "1 2 3 4 5 6 7 8 9 10 11 12 = + - ### User ### Assistant ### System\n",
] * 4

CHATML = """{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
{%- set first = messages[0]['content'] | trim + '\n\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set first = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}
{{- message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

LLAMA3 = """{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""

MISTRAL = """{{- bos_token -}}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set state.system = message['content'] + '\n\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + state.system + message['content'] + ' [/INST]' -}}{%- set state.system = '' -%}
{%- elif message['role'] == 'assistant' -%}{{- ' ' + message['content'] + eos_token -}}
{%- else -%}{{- raise_exception('unknown role ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}"""


@dataclass(frozen=True)
class Family:
    """`turn` is what the model writes for one answer, the words {0} included; `prepends` says who writes the BOS."""

    template: str | None
    bos: str | None
    eos: str
    special: tuple[str, ...]
    turn: str
    prepends: bool

    @property
    def end(self) -> str:
        return self.turn.split("{0}")[1]


FAMILIES = {
    "chatml": Family(CHATML, None, "<|im_end|>", ("<|im_start|>",), "{0}<|im_end|>", False),
    "gemma": Family(GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "{0}<end_of_turn>", True),
    "llama3": Family(
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        "{0}<|eot_id|>",
        True,
    ),
    "mistral": Family(MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]"), " {0}</s>", True),
    "plain_bos": Family(None, "<s>", "</s>", (), "{0}</s>", True),
    "plain": Family(None, None, "<|endoftext|>", (), "{0}<|endoftext|>", False),
}


# How Llama 3 and Qwen cut text before merging: a run of line breaks is one piece. GPT-2 cuts its last one off.
LLAMA3_PIECES = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def _trained(special: tuple[str, ...], like_llama3: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    pieces = [pre_tokenizers.Split(LLAMA3_PIECES, "isolated")] if like_llama3 else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not like_llama3)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return build(FAMILIES[name])


def build(family: Family, **kwargs: Any) -> PreTrainedTokenizerFast:
    names = [name for name in (family.bos, family.eos, *family.special) if name]
    backend = Tokenizer.from_str(_trained(tuple(names), like_llama3=family.template is not None))
    if family.bos and family.prepends:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, backend.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, **kwargs)
    tokenizer.chat_template = family.template
    return tokenizer
