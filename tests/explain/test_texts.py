"""The texts: two languages with one structure and the same figures, no English left in Ukrainian, no logic in data."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loratune.adapter.config import LoraConfig
from loratune.adapter.roles import PRESET_SETTINGS
from loratune.errors import ConfigError
from loratune.explain import en, texts, uk
from loratune.language import language

# Latin words that stand in a Ukrainian text without marks: names of things, people, models and mathematics.
NAMES = set(
    re.findall(
        r"\S+",
        """AdamW Ainslie Ben BERT BitFit Biderman DeBERTa Dettmers FLOPs Gemma Geva GLU GLUE GPT GQA Hayou Hu Kaiming
        Kalajdzievski Llama LoRA MetaMathQA MLP MultiNLI PEFT Press QLoRA RoBERTa Schulman Shazeer Srivastava Tinker
        Vaswani WikiSQL Wolf Zaken arXiv rsLoRA vLLM llama cpp A B I O W x y r s W' float32
        lora_alpha target_modules lora_dropout bias modules_to_save task_type
        q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head fast quality deep expert""",
    )
)
TITLES = ("LoRA Without Regret", "Journal of Machine Learning Research")  # of papers, which are not translated
FIELDS = {"title", "short", "what", "doubled", "usual", "evidence"}


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, str(index)))
    else:
        yield path, value


ENGLISH, UKRAINIAN = dict(leaves(en.TEXTS)), dict(leaves(uk.TEXTS))
PATHS = [path for path in ENGLISH if path[0] != "number"]


def test_both_languages_have_every_text() -> None:
    assert ENGLISH.keys() == UKRAINIAN.keys()
    assert all(text.strip() for text in (*ENGLISH.values(), *UKRAINIAN.values()) if text != "\u00a0")
    for text in texts.LANGUAGES.values():
        assert set(text["topics"]) == set(texts.TOPICS)
        assert all(set(topic) == FIELDS for topic in text["topics"].values())


def figures(text: str) -> Counter[str]:
    return Counter(number.replace(",", ".") for number in re.findall(r"\d+(?:[.,]\d+)?", text))


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_translations_agree_on_figures_and_commands(path: tuple[str, ...]) -> None:
    english, ukrainian = ENGLISH[path], UKRAINIAN[path]
    assert figures(english) == figures(ukrainian)
    assert Counter(re.findall(r"`([^`]+)`", english)) == Counter(re.findall(r"`([^`]+)`", ukrainian))
    assert english.count("`") % 2 == ukrainian.count("`") % 2 == 0


def test_no_english_is_left_in_ukrainian() -> None:
    for path, text in UKRAINIAN.items():
        for known in TITLES:
            text = text.replace(known, "")
        words = set(re.findall(r"[A-Za-z][\w']*", re.sub(r"`[^`]*`", "", text)))
        assert words <= NAMES, (path, words - NAMES)


def test_each_language_is_written_in_its_own_letters() -> None:
    assert not re.search(r"[а-яіїєґ]", " ".join(ENGLISH.values()), re.IGNORECASE)
    assert not re.search(r"[ыэёъ]", " ".join(UKRAINIAN.values()), re.IGNORECASE)
    mixed = re.compile(r"[A-Za-z][а-яіїєґА-ЯІЇЄҐ]|[а-яіїєґА-ЯІЇЄҐ][A-Za-z]")  # an i of the wrong alphabet
    assert [path for path, text in UKRAINIAN.items() if mixed.search(text)] == []


def test_the_drawings_have_the_same_lines() -> None:
    """Boxes and arrows stand in the same columns; words inside them have the same length."""
    drawings = [text["intro"]["drawing"] for text in texts.LANGUAGES.values()]
    for one, other in zip(*drawings, strict=True):
        signs = [[(i, sign) for i, sign in enumerate(line) if sign in "│┌┐└┘─┬┴▼►◄+"] for line in (one, other)]
        assert signs[0] == signs[1]
        assert max(len(one), len(other)) <= 76


@pytest.mark.parametrize("name", texts.PRESET_NAMES)
def test_the_texts_state_the_presets_that_the_code_has(name: str) -> None:
    settings = PRESET_SETTINGS[name]
    for text in texts.LANGUAGES.values():
        what = texts.one_line(text["topics"][name]["what"])
        assert f"r = {settings['r']}, lora_alpha = {settings['lora_alpha']}" in what


def test_what_is_not_named_is_as_the_texts_say() -> None:
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 2 * config.r, "fast")
    for text in texts.LANGUAGES.values():
        assert "`fast`" in text["notes"]["rest"] and "r = 8, lora_alpha = 2 r" in text["notes"]["rest"]


@pytest.mark.parametrize("module", [en, uk])
def test_the_texts_are_data(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    assert [type(statement) for statement in tree.body] == [ast.Expr, ast.Assign]
    assert ast.literal_eval(tree.body[1].value) == module.TEXTS  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"LANG": "uk_UA.UTF-8"}, "uk"),
        ({"LANG": "uk_UA.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "de_DE.UTF-8", "LC_MESSAGES": "uk_UA.UTF-8"}, "uk"),
        ({"LANG": "uk_UA.UTF-8", "LC_MESSAGES": ""}, "uk"),
        ({"LC_ALL": "ru_UA.UTF-8"}, "en"),
    ],
)
def test_the_language_is_the_locales(environment: dict[str, str], expected: str) -> None:
    assert language(environment) == expected


@pytest.mark.parametrize(
    ("name", "topic"),
    [("r", "r"), ("Rank", "r"), ("q_proj", "query"), ("LM_HEAD", "head"), ("expert", "deep"), ("a", "A"), ("B", "B")],
)
def test_topics_are_found_under_their_other_names(name: str, topic: str) -> None:
    assert texts.find_topic(name) == topic


def test_every_topic_is_found_and_an_unknown_one_gets_the_nearest() -> None:
    assert [texts.find_topic(topic) for topic in texts.TOPICS] == list(texts.TOPICS)
    with pytest.raises(ConfigError, match="nothing is explained under 'alhpa'; did you mean alpha"):
        texts.find_topic("alhpa")
    with pytest.raises(ConfigError, match="expected one of r, lora_alpha,"):
        texts.find_topic("zzzz")


def test_numbers_are_written_as_each_language_writes_them() -> None:
    english, ukrainian = texts.Numbers(en.TEXTS), texts.Numbers(uk.TEXTS)
    assert (english.count(1234567), ukrainian.count(1234567)) == ("1,234,567", "1\u00a0234\u00a0567")
    assert (english.size(1_474_560), ukrainian.size(1_474_560)) == ("1.47\u00a0MB", "1,47\u00a0МБ")
    assert [english.size(n) for n in (0, 999, 141e9)] == ["0\u00a0B", "999\u00a0B", "141\u00a0GB"]
    assert [english.share(n) for n in (0, 0.00137, 0.5, 2)] == ["0%", "0.137%", "50.0%", "200%"]
    assert (english.plain(0.05), ukrainian.plain(0.05), english.plain(16)) == ("0.05", "0,05", "16")
