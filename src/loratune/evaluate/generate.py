"""Greedy decoding of many prompts at once, with the result of decoding each alone."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from loratune.errors import ConfigError, DataError
from loratune.model.decode import decoding

_PADDING_AWARE = ("eager", "sdpa")  # attention of transformers itself that always builds a mask from the padding


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop_ids: Iterable[int] | None = None,
    stop_at_newline: bool = False,
    batch_size: int = 8,
) -> list[list[int]]:
    """Returns each prompt's most likely continuation, token by token, at most `max_new_tokens`, in the prompts' order.

    It ends before the first of `stop_ids`; without them, before the model's or the tokenizer's end token. With
    `stop_at_newline` it also ends at the first token that holds a newline, which stays only if text stands before it
    (".\\n" is one token in some vocabularies). The model's own generation settings (penalties, sampling) have no part,
    and its mode and attention are afterwards as before. Raises DataError for an empty prompt, and ConfigError for a
    length beyond the model's positions or a model that is not a decoder.
    """
    _check(model, prompts, max_new_tokens)
    stops = _end_tokens(model, tokenizer) if stop_ids is None else frozenset(stop_ids)
    newline = _Newline(tokenizer) if stop_at_newline else None
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=_padding_token(tokenizer, stops),
    )
    continuations: list[list[int]] = [[] for _ in prompts]
    with _plain_decoder(model):
        for rows in _batches(prompts, batch_size):
            new = _decode(model, [prompts[row] for row in rows], settings, newline)
            for row, ids in zip(rows, new, strict=True):
                continuations[row] = _cut(ids, stops, newline)
    return continuations


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Returns the text of generated tokens, without special tokens and otherwise as the tokenizer has it."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class _Newline(StoppingCriteria):
    """Stops a row whose newest token holds a newline; looks each token up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        done = [self.is_in(token) for token in input_ids[:, -1].tolist()]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)  # pyright: ignore[reportReturnType]

    def is_in(self, token: int) -> bool:
        return "\n" in self._text(token)

    def has_text_before(self, token: int) -> bool:
        return bool(self._text(token).partition("\n")[0].strip())

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = text_of(self._tokenizer, [token])
        return self._texts[token]


def _check(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if model.config.is_encoder_decoder:
        raise ConfigError(f"{type(model).__name__} has an encoder: only decoder models continue a prompt.")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: expected 1 or more.")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(
                f"prompt {i} of {len(prompts)} holds no token: expected at least one, such as the start token."
            )
    longest = max(map(len, prompts), default=0) + max_new_tokens
    num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if num_positions is not None and longest > num_positions:
        raise ConfigError(
            f"the longest prompt and {max_new_tokens} new tokens make {longest}, {type(model).__name__} has "
            f"{num_positions} positions. Shorten the prompt or lower max_new_tokens."
        )


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the model's end tokens (an instruction-tuned model has several) and the tokenizer's."""
    generation = model.generation_config
    of_model: Any = generation.eos_token_id if generation is not None else None
    found = list(of_model) if isinstance(of_model, list | tuple) else [of_model]
    return frozenset(token for token in [*found, tokenizer.eos_token_id] if isinstance(token, int))


def _padding_token(tokenizer: PreTrainedTokenizerBase, stops: frozenset[int]) -> int:
    """Returns any token the model knows: padding is masked before a prompt and cut off after an end."""
    choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, min(stops, default=None), 0)
    return next(token for token in choices if isinstance(token, int))


def _batches(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yields row numbers, prompts of like length together, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _decode(
    model: PreTrainedModel, prompts: list[Sequence[int]], settings: GenerationConfig, newline: _Newline | None
) -> list[list[int]]:
    """Returns the new tokens of one batch: prompts padded on the left, so that all end at the same column."""
    width = max(map(len, prompts))
    pad = settings.pad_token_id
    padded = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    generated: Any = model.generate(  # pyright: ignore[reportCallIssue]
        inputs=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=settings,
        stopping_criteria=[newline] if newline else None,
    )
    return generated[:, width:].tolist()


def _cut(ids: list[int], stops: frozenset[int], newline: _Newline | None) -> list[int]:
    for i, token in enumerate(ids):
        if token in stops:
            return ids[:i]
        if newline and newline.is_in(token):
            return ids[: i + newline.has_text_before(token)]
    return ids


@contextmanager
def _plain_decoder(model: PreTrainedModel) -> Generator[None]:
    """Sets evaluation mode, blank generation settings and an attention that heeds padding; restores all three.

    `generate` fills what the given settings leave open from the model's own (repetition_penalty and the like), and
    transformers builds no padding mask for attention it does not know; both would change the result unseen.
    """
    modes = [(module, module.training) for module in model.modules()]
    settings = model.generation_config
    attention = model.config._attn_implementation or "eager"  # None: a model older than the choice
    try:
        model.eval()
        model.generation_config = GenerationConfig()
        if attention not in _PADDING_AWARE:
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        with decoding(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        model.generation_config = settings
        if attention not in _PADDING_AWARE:
            model.set_attn_implementation(attention)
