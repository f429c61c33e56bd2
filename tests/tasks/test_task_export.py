"""A merged task model, loaded by transformers and by sentence-transformers alone, gives what base and adapter give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from loratune import api
from loratune.adapter.attach import load_adapter
from loratune.cli.main import run as command
from loratune.model.load import load_model
from loratune.tasks.labels import SINGLE
from loratune.train.config import load_run_config
from tasks.toy_tasks import alike, save_model, sentiment, write


def trained(folder: Path, task_type: str, family: str, rows: Any, rate: float = 1e-2) -> Path:
    overrides = {
        "model": str(save_model(folder / "base", family)),
        "data.train": str(write(folder / "rows.jsonl", rows(60))),
        "output": str(folder / "run"),
        "adapter.task_type": task_type,
        "train.max_steps": 3,
        "train.learning_rate": rate,
    }
    api.run(load_run_config(None, overrides))
    return folder / "run"


def test_a_merged_classifier_says_what_the_adapter_says(tmp_path: Path) -> None:
    run = trained(tmp_path, "SEQ_CLS", "bert", sentiment)
    api.export_merged(run / "adapter", tmp_path / "merged")
    model, words = load_model(tmp_path / "base", task_type="SEQ_CLS", labels=["negative", "positive"], problem=SINGLE)
    load_adapter(model, run / "adapter")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    inputs = words(["the good film", "a bad day"], padding=True, return_tensors="pt")
    torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_sentence_transformers_loads_merged_vectors(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    run = trained(tmp_path, "FEATURE_EXTRACTION", "bert", alike)
    assert command(f"export {run} --to merged --output {tmp_path / 'merged'}".split()) == 0
    texts = ["the cat w3", "a dog"]
    found = library.SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(texts)
    model, words = load_model(tmp_path / "base", task_type="FEATURE_EXTRACTION")
    load_adapter(model, run / "adapter")
    inputs = words(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    states = model(**inputs).last_hidden_state
    expected = ((states * mask).sum(1) / mask.sum(1)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rounding_terms_and_the_wish_to_accept_are_heeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "FEATURE_EXTRACTION", "bert", alike, rate=1e-4)  # an update that bfloat16 cannot hold
    (tmp_path / "base" / "LICENSE").write_text("terms of the base")
    words = f"export {run} --to merged --output {tmp_path / 'merged'} --dtype bfloat16"
    assert command(words.split()) == 1
    assert "of the update" in capsys.readouterr().err and not (tmp_path / "merged").exists()
    assert command([*words.split(), "--accept-loss"]) == 0
    assert (tmp_path / "merged" / "LICENSE").read_text() == "terms of the base"
    report = api.export_merged(run / "adapter", tmp_path / "exact")
    assert report["loss_share"] == 0.0 and report["bytes"] > 0
