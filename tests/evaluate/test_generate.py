"""Batched greedy decoding against a loop of plain forwards, one prompt at a time, without cache or padding."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AttentionInterface, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from families import CAUSAL, FAMILIES, VOCAB
from loratune.errors import ConfigError, DataError
from loratune.evaluate.generate import generate, text_of

NEWLINE, DOT_NEWLINE, END = 3, 4, 5
PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [20], [21, 22, 23], [9, 8], [30, 31, 32, 33, 34, 35], [7, 7, 7, 7]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    names = {NEWLINE: "\n", DOT_NEWLINE: ".\n", END: "<end>"}
    vocabulary = {names.get(i, f"w{i}"): i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")))


def alone(model: PreTrainedModel, prompt: list[int], num_new: int) -> list[int]:
    """The oracle: the most likely next token of a plain forward, again and again."""
    ids = list(prompt)
    modes = model.training
    model.eval()
    with torch.no_grad():
        for _ in range(num_new):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    model.train(modes)
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", CAUSAL)
def test_many_at_once_equal_one_at_a_time(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES[family]()
    expected = [alone(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in expected}) > len(PROMPTS) // 2  # the oracle tells the prompts apart
    assert generate(model, tokenizer, PROMPTS, 12, stop_ids=[]) == expected
    assert generate(model, tokenizer, PROMPTS, 12, stop_ids=[], batch_size=4) == expected


@pytest.mark.parametrize("stops", [1, 2])
def test_ends_before_the_first_stop_token(stops: int, tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["llama"]()
    whole = [alone(model, prompt, 12) for prompt in PROMPTS]
    stop_ids = whole[0][3 : 3 + stops]
    expected = [ids[: min([i for i, token in enumerate(ids) if token in stop_ids], default=len(ids))] for ids in whole]
    assert len(expected[0]) <= 3
    assert generate(model, tokenizer, PROMPTS, 12, stop_ids=stop_ids) == expected


def test_end_tokens_come_from_the_model_and_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["llama"]()
    whole = alone(model, PROMPTS[0], 12)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [whole[4], VOCAB - 1]
    assert generate(model, tokenizer, PROMPTS[:1], 12) == [whole[: whole.index(whole[4])]]
    assert generate(model, tokenizer, PROMPTS[:1], 12, stop_ids=[]) == [whole]


@pytest.mark.parametrize(("token", "kept"), [(NEWLINE, 0), (DOT_NEWLINE, 1)])
def test_ends_at_a_newline_and_keeps_text_before_it(token: int, kept: int, tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["llama"]()
    whole = alone(model, PROMPTS[0], 12)
    swapped = whole[4]  # exchange two rows of input and output embedding: this token is now the newline
    first = whole.index(swapped)
    order = list(range(VOCAB))
    order[token], order[swapped] = swapped, token
    with torch.no_grad():
        for weights in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weights.copy_(weights[order].clone())
    prompts = [[order[i] for i in prompt] for prompt in PROMPTS]
    (found,) = generate(model, tokenizer, prompts[:1], 12, stop_at_newline=True)
    assert found == [order[i] for i in whole[:first]] + [token] * kept
    batched = generate(model, tokenizer, prompts, 12, stop_at_newline=True)
    assert batched == [generate(model, tokenizer, [prompt], 12, stop_at_newline=True)[0] for prompt in prompts]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_attention_that_ignores_padding_is_set_aside(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """transformers hands attention it does not know no mask at all, so padding would be attended to."""
    name = "loratune_test_unmasked"

    def unmasked(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        raise AssertionError("generation used the registered attention")

    AttentionInterface.register(name, unmasked)
    model = FAMILIES[family]()
    expected = [alone(model, prompt, 8) for prompt in PROMPTS]
    model.set_attn_implementation(name)
    assert generate(model, tokenizer, PROMPTS, 8, stop_ids=[]) == expected
    assert model.config._attn_implementation == name


def test_dropout_and_the_models_own_settings_have_no_part_and_come_back(tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["gpt2"]()  # its dropout is 0.1
    own = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=3.0, min_new_tokens=2)
    model.generation_config = own
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert generate(model, tokenizer, PROMPTS, 8, stop_ids=[]) == [alone(model, prompt, 8) for prompt in PROMPTS]
    model.transformer.h[0].eval()  # the oracle's train() reached it
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own and torch.equal(torch.get_rng_state(), state)


def test_mode_comes_back_after_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["llama"]().train()
    with pytest.raises(IndexError):
        generate(model, tokenizer, [[VOCAB + 1]], 4)
    assert all(module.training for module in model.modules())


def test_wrong_calls_are_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["gpt2"]()
    with pytest.raises(DataError, match="prompt 1 of 2 holds no token"):
        generate(model, tokenizer, [[1], []], 4)
    with pytest.raises(ConfigError, match=r"make 67, GPT2LMHeadModel has 64 positions"):
        generate(model, tokenizer, [[1, 2, 3]], 64)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        generate(model, tokenizer, [[1]], 0)
    with pytest.raises(ConfigError, match="only decoder models"):
        generate(FAMILIES["t5"](), tokenizer, [[1]], 4)
    assert generate(model, tokenizer, [], 4) == []


def test_text_of_leaves_out_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert text_of(tokenizer, [7, 8]) == "w7 w8"
    special = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>")
    assert text_of(special, [7, END]) == "w7"
