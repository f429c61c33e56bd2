"""What stands beside the weights of a model: configuration, tokenizer, generation settings, terms and notices."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loratune import files
from loratune.model import embedded
from loratune.model.load import Source

CONFIG = "config.json"
_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json",
    "sentencepiece.bpe.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_VOCABULARIES = _TOKENIZER[:8]
_SETTINGS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_TERMS = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY", "TERMS")
_MODIFIED = "These weights are a modified copy: a LoRA adapter was merged into them with loratune."


def write(folder: Path, source: Source, adapter: Path, *, untied: bool, dtype: str | None) -> None:
    """Writes config.json, then copies the base's settings and terms and the adapter's tokenizer (else the base's)."""
    config = json.loads((source.path / CONFIG).read_bytes())
    files.write_json(folder / CONFIG, _merged_config(config, untied, dtype))
    tokenizer = adapter if any((adapter / name).is_file() for name in _VOCABULARIES) else source.path
    _copy(folder, (tokenizer / name for name in _TOKENIZER))
    _copy(folder, (source.path / name for name in _SETTINGS))
    write_terms(folder, source, adapter)


def write_terms(folder: Path, source: Source, adapter: Path) -> None:
    """Copies the terms of base and adapter, and says in NOTICE, where there is one, that the weights were modified."""
    _copy(folder, [*_terms_in(source.path), *_terms_in(adapter)])
    if not _terms_in(folder):
        _copy(folder, embedded.terms_files(source.name))
    _write_notice(folder, source)


def _merged_config(config: dict[str, Any], untied: bool, dtype: str | None) -> dict[str, Any]:
    """Returns config.json's content with what merging changes: ties, the stored type, no quantisation."""
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = _merged_config(text, untied, dtype)
    if untied:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config.pop("torch_dtype", None)  # its name before transformers 5
        config["dtype"] = dtype
    return config


def _terms_in(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(word in path.stem.upper() for word in _TERMS) and path.suffix != ".py"
    ]


def _copy(folder: Path, paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_file():
            files.atomic_write(folder / path.name, path.read_bytes())


def _write_notice(folder: Path, source: Source) -> None:
    """Says in NOTICE that the weights were modified, where the base has one or its terms ask for one."""
    path = folder / embedded.NOTICE
    text = path.read_text(encoding="utf-8") if path.is_file() else embedded.notice(source.name)
    if text is not None:
        files.atomic_write(path, f"{text.rstrip()}\n\n{_MODIFIED}\n")
