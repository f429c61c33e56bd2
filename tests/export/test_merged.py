"""Merging from files: equal to PEFT's and to the merge in memory, streamed, proved, and whole or not at all."""

import json
import resource
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter

from families import CAUSAL, FAMILIES, VOCAB, inputs_for
from loratune import files
from loratune.adapter.attach import attach, load_adapter
from loratune.adapter.config import LoraConfig
from loratune.errors import AdapterError, ConfigError, ExportError, LoratuneError
from loratune.export import merged, probe
from loratune.export.merged import export_merged
from loratune.export.tensors import FLOAT_NAMES, Entry, read_headers, write_file
from oracles import logits_of, relative

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<s>", "</s>", "<|endoftext|>"]


@pytest.fixture(autouse=True)
def _quiet_peft() -> None:
    warnings.filterwarnings("ignore", module="peft")


def save_tokenizer(folder: Path) -> None:
    words = {token: index for index, token in enumerate(SPECIAL + [f"w{n}" for n in range(VOCAB - len(SPECIAL))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def save_base(folder: Path, family: str, dtype: torch.dtype = torch.float32, **saving: Any) -> PreTrainedModel:
    """Saves a tiny model with a tokenizer and returns a plain float32 model of what was saved."""
    FAMILIES[family]().to(dtype).save_pretrained(folder, **saving)
    save_tokenizer(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_adapter(
    folder: Path, base: Path, config: LoraConfig | None = None, seed: int = 5, size: float = 1.0, noise: float = 0.0
) -> None:
    """Saves an adapter with random factors, biases and modules; `size` scales its update, `noise` is added to all."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    attached = attach(model, config or LoraConfig.preset("deep", r=4, init_lora_weights=False), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in attached.adapter.factors.values():
            factor.B.mul_(size)
        for tensor in (*attached.adapter.biases.values(), *_of(attached.adapter.saved.values())):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        for _, tensor in attached.adapter.named_parameters():
            tensor.add_(noise * torch.randn(tensor.shape, generator=generator))
    attached.save(folder)


def _of(modules: Any) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from module.parameters()


def attached_logits(base: Path, adapter: Path, family: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    load_adapter(model, adapter)
    with torch.no_grad():
        return logits_of(model, inputs_for(family))


def plain_logits(folder: Path, family: str) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return logits_of(model.eval(), inputs_for(family))


def left_behind(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()} - {"base", "adapter"}


def _experts(*parameters: str, target_modules: Sequence[str] = ()) -> LoraConfig:
    return LoraConfig(r=2, target_modules=target_modules, target_parameters=parameters, lora_dropout=0.0)


# ---- the same numbers -----------------------------------------------------------------------------------------------


_QUICK = ("llama", "gpt2", "gemma3_text", "mixtral", "phi3")


@pytest.mark.parametrize(
    "family", [family if family in _QUICK else pytest.param(family, marks=pytest.mark.slow) for family in CAUSAL]
)
def test_the_files_hold_what_merging_in_memory_gives_bit_for_bit(family: str, tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = save_base(base, family)
    save_adapter(adapter, base)
    report = export_merged(adapter, output, model=str(base))
    expected = attached_logits(base, adapter, family)
    assert relative(plain_logits(output, family), expected) < 1e-5
    assert report["probe"]["difference"] < 1e-5 < report["probe"]["adapter_effect"]
    in_memory = load_adapter(model, adapter).merge().state_dict()
    written = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()
    assert written.keys() == in_memory.keys()
    assert [name for name in written if not torch.equal(written[name], in_memory[name])] == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "phi3", "falcon"])
def test_the_merged_model_computes_what_pefts_does(family: str, tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, family)
    save_adapter(adapter, base, LoraConfig.preset("quality", r=4, init_lora_weights=False))
    export_merged(adapter, output, model=str(base))
    oracle: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with torch.no_grad():
        expected = logits_of(oracle.merge_and_unload().eval(), inputs_for(family))
    assert relative(plain_logits(output, family), expected) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False),
    ],
    ids=["head", "embedding", "both", "saved head", "saved embedding"],
)
@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_weight_becomes_two(config: LoraConfig, stored: str, tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, "gemma3_text")
    weights = load_file(base / "model.safetensors")
    weights[stored] = weights.pop("model.embed_tokens.weight")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    save_adapter(adapter, base, config)
    report = export_merged(adapter, output, model=str(base))
    assert relative(plain_logits(output, "gemma3_text"), attached_logits(base, adapter, "gemma3_text")) < 1e-5
    assert report["untied"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert json.loads((output / "config.json").read_bytes())["tie_word_embeddings"] is False
    changed = {path.rpartition(".")[2] for path in (*config.target_modules, *(config.modules_to_save or ()))}
    written = load_file(output / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        module = name.split(".")[-2]
        assert torch.equal(written[name], weights[stored]) == (module not in changed)
        if name != stored:
            assert report["operations"].get("untie", 0) == (module not in changed)


def test_a_tied_weight_that_is_not_changed_stays_one(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, "gemma3_text")
    save_adapter(adapter, base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    report = export_merged(adapter, output, model=str(base))
    assert report["untied"] == [] and report["operations"]["merge"] == 3
    assert read_headers(output).keys() == read_headers(base).keys()
    assert AutoConfig.from_pretrained(output).tie_word_embeddings is True


def test_trained_biases_and_modules_replace_the_bases(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, "gpt_neox")
    config = LoraConfig(r=4, target_modules=["query_key_value"], bias="all", modules_to_save=["lm_head"])
    save_adapter(adapter, base, config)
    report = export_merged(adapter, output, model=str(base))
    assert relative(plain_logits(output, "gpt_neox"), attached_logits(base, adapter, "gpt_neox")) < 1e-5
    trained = load_file(adapter / "adapter_model.safetensors")
    written = load_file(output / "model.safetensors")
    assert torch.equal(written["embed_out.weight"], trained["base_model.model.lm_head.weight"])  # renamed on disk
    assert report["operations"]["replace"] == len([name for name in trained if ".lora_" not in name])


def test_experts_that_are_stacked_in_memory_keep_their_files_bit_for_bit(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = save_base(base, "mixtral")
    assert model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").ndim == 3
    save_adapter(adapter, base, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    report = export_merged(adapter, output, model=str(base))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, output))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.{name}_proj.weight" for i in (0, 1) for name in "qo"}
    assert sum(".experts." in name for name in before) == 2 * 4 * 3
    assert report["operations"] == {"merge": 4, "copy": len(before) - 4}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        (
            "mixtral",
            LoraConfig(
                r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"], lora_dropout=0.0
            ),
        ),
        ("mixtral", LoraConfig(r=2, target_modules=[], target_parameters=["gate_up_proj"], lora_dropout=0.0)),
        ("qwen3_moe", LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], lora_dropout=0.0)),
        ("llama", LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True)),
        ("gpt2", LoraConfig(r=4, target_modules=["c_attn"], use_dora=True)),
        ("gpt2", LoraConfig(r=4, target_modules=["c_attn", "c_fc"], lora_bias=True)),
        ("llama", LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 70])),
        ("gemma3_text", LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 70])),
        ("gemma3_text", LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)),
        ("gemma3_text", LoraConfig(r=4, target_modules=["embed_tokens"], trainable_token_indices=[5])),
    ],
)
def test_every_kind_of_factor(family: str, config: LoraConfig, tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, family)
    save_adapter(adapter, base, config, noise=0.2)
    report = export_merged(adapter, output, model=str(base))
    assert relative(plain_logits(output, family), attached_logits(base, adapter, family)) < 1e-5
    assert report["probe"]["difference"] < 1e-5
    assert relative(attached_logits(base, adapter, family), plain_logits(base, family)) > 1e-4
    assert set(read_headers(output)) - set(read_headers(base)) <= {"lm_head.weight"}


def test_names_on_disk_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    """GPT-2's own files say h.0.attn..., the model transformer.h.0.attn...; the prefix comes from transformers."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, "gpt2")
    weights = {
        name.removeprefix("transformer."): value for name, value in load_file(base / "model.safetensors").items()
    }
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = LoraConfig(r=4, target_modules=["c_attn", "lm_head"], init_lora_weights=False)
    save_adapter(adapter, base, config)
    export_merged(adapter, output, model=str(base))
    assert relative(plain_logits(output, "gpt2"), attached_logits(base, adapter, "gpt2")) < 1e-5
    assert set(read_headers(output)) == {*weights, "lm_head.weight"}


# ---- types and rounding ---------------------------------------------------------------------------------------------


def test_a_merge_that_rounding_would_undo_is_refused_unless_accepted(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_base(base, "llama", torch.bfloat16)
    save_adapter(adapter, base, size=0.01)
    with pytest.raises(ExportError, match=r"lose \d+\.\d% of the update .*--dtype float32, or --accept-loss"):
        export_merged(adapter, tmp_path / "out", model=str(base))
    assert left_behind(tmp_path) == set()

    lossy = export_merged(adapter, tmp_path / "lossy", model=str(base), accept_loss=True)
    assert lossy["loss_share"] > merged.MAX_LOSS
    assert {tensor.dtype for tensor in load_file(tmp_path / "lossy" / "model.safetensors").values()} == {torch.bfloat16}

    exact = export_merged(adapter, tmp_path / "exact", model=str(base), dtype="float32")
    assert exact["loss_share"] < 1e-4
    assert relative(plain_logits(tmp_path / "exact", "llama"), attached_logits(base, adapter, "llama")) < 1e-5
    assert json.loads((tmp_path / "exact" / "config.json").read_bytes())["dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_conversion_rounds_the_float32_sum_once_and_reports_what_was_lost(dtype: str, tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, "llama")
    save_adapter(adapter, base)
    report = export_merged(adapter, output, model=str(base), dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact = load_adapter(model, adapter).merge().state_dict()
    written = load_file(output / "model.safetensors")
    half = getattr(torch, dtype)
    assert all(torch.equal(written[name], value.to(half)) for name, value in exact.items())
    changed = [name for name in exact if not torch.equal(exact[name], before[name])]
    error = sum(float((written[name].double() - exact[name].double()).square().sum()) for name in changed)
    update = sum(float((exact[name].double() - before[name].double()).square().sum()) for name in changed)
    assert report["loss_share"] == pytest.approx((error / update) ** 0.5, rel=1e-3)
    shares = json.loads((output / merged.REPORT).read_bytes())["loss_shares"]
    assert set(shares) == set(changed)


def test_values_that_the_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_base(base, "llama")
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][5, 3] = 1e6
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    save_adapter(adapter, base)
    with pytest.raises(ExportError, match=r"model.embed_tokens.weight holds values that F16 cannot hold"):
        export_merged(adapter, tmp_path / "out", model=str(base), dtype="float16")
    assert left_behind(tmp_path) == set()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_shards_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, "llama", max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    save_adapter(adapter, base)
    monkeypatch.setattr(merged, "SHARD_BYTES", 40_000)
    report = export_merged(adapter, output, model=str(base))
    shards = sorted(output.glob("*.safetensors"))
    assert report["files"] == len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in shards]
    assert max(sizes) <= 40_000 and sum(sizes) == report["bytes"]
    index = json.loads((output / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    assert relative(plain_logits(output, "llama"), attached_logits(base, adapter, "llama")) < 1e-5


def test_tensors_that_no_model_reads_are_kept_and_all_are_aligned(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, "llama", torch.bfloat16)
    extra = {"a.mask": torch.tensor([True, False, True]), "b.count": torch.arange(3), "c.scale": torch.rand(3).double()}
    tensors = extra | load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = FLOAT_NAMES | {torch.bool: "BOOL", torch.int64: "I64"}
    entries = [Entry(name, names[each.dtype], tuple(each.shape), each.nbytes) for name, each in tensors.items()]
    contents = ([each.reshape(-1).view(torch.uint8).numpy()] for each in tensors.values())
    write_file(base / "model.safetensors", entries, contents)  # three bytes first; the library would put them last
    save_adapter(adapter, base)
    export_merged(adapter, output, model=str(base), dtype="float32")
    written, headers = load_file(output / "model.safetensors"), read_headers(output)
    assert torch.equal(written["a.mask"], extra["a.mask"]) and torch.equal(written["b.count"], extra["b.count"])
    assert torch.equal(written["c.scale"], extra["c.scale"].float())
    assert all(headers[name].offset % tensor.element_size() == 0 for name, tensor in written.items())


def test_what_belongs_beside_the_weights_comes_along(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, "llama", torch.float32)
    config = json.loads((base / "config.json").read_bytes())
    files.write_json(base / "config.json", config | {"quantization_config": None, "kept": {"as": "it is"}})
    (base / "LICENSE.txt").write_text("the licence")
    (base / "NOTICE").write_text("the notice\n")
    (base / "README.md").write_text("about the base")
    save_adapter(adapter, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([])
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(adapter)
    export_merged(adapter, output, model=str(base))
    assert AutoTokenizer.from_pretrained(output).chat_template == "{{ messages }}"
    assert (output / "LICENSE.txt").read_text() == "the licence"
    assert (output / "NOTICE").read_text().startswith("the notice\n") and "modified" in (output / "NOTICE").read_text()
    assert (output / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert not (output / "README.md").exists() and not (output / "adapter_model.safetensors").exists()
    written = json.loads((output / "config.json").read_bytes())
    assert written == config | {"kept": {"as": "it is"}}


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, "gemma3_text")
    save_adapter(adapter, base)
    (base / "tokenizer.json").unlink()  # the plan loads neither weights nor tokenizer
    planned = export_merged(adapter, output, model=str(base), dry_run=True)
    assert left_behind(tmp_path) == set()
    assert planned["operations"]["merge"] == 3 * 7 + 1  # seven roles in three layers, and the head
    head = next(row for row in planned["changes"] if row["tensor"] == "lm_head.weight")
    assert head == {
        "operation": "merge", "tensor": "lm_head.weight", "from": "model.embed_tokens.weight", "dtype": "F32",
        "shape": (VOCAB, 32),
    }  # fmt: skip
    save_tokenizer(base)
    done = export_merged(adapter, output, model=str(base))
    assert all(done[name] == planned[name] for name in planned if name != "changes")
    assert done["bytes"] == sum(t.nbytes for t in load_file(output / "model.safetensors").values())


def test_the_base_is_found_by_the_name_in_the_adapter(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_base(base, "llama")
    save_adapter(adapter, base)
    assert export_merged(adapter, tmp_path / "out")["model"] == str(base)
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    files.write_json(adapter / "adapter_config.json", config | {"base_model_name_or_path": None})
    with pytest.raises(ConfigError, match="names no base model"):
        export_merged(adapter, tmp_path / "other")


_STREAMING = """
import resource, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from loratune.adapter import peft_format
from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.export import merged, probe
from loratune.export.plan import make_plan
from loratune.model.load import resolve

folder = Path(sys.argv[1])
if sys.argv[2] == "make":
    config = LlamaConfig(vocab_size=8192, hidden_size=1024, intermediate_size=2048, num_hidden_layers=5,
                         num_attention_heads=8, num_key_value_heads=8)
    model = LlamaForCausalLM(config)
    attached = attach(model, LoraConfig.preset("deep", r=8, init_lora_weights=False), seed=1)
    attached.save(folder / "adapter")
    attached.detach()
    model.save_pretrained(folder / "base")
else:
    adapter = peft_format.read(folder / "adapter")
    source = resolve(str(folder / "base"))
    plan = make_plan(source, adapter, None)
    (folder / "out").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    merged._write_weights(plan, adapter, folder / "out", print)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_is_a_few_tensors_whatever_the_model(tmp_path: Path) -> None:
    """A model of 236 MB whose largest tensor has 34 MB: writing takes a delta of that size and some blocks of 4 MB."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(_STREAMING))
    outputs = [
        subprocess.run([sys.executable, script, tmp_path, what], check=True, capture_output=True, text=True).stdout
        for what in ("make", "merge")
    ]
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    grown = int(outputs[1].splitlines()[-1])
    assert written > 230e6
    assert grown < 100e6


# ---- whole or not at all --------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_base(base, "llama")
    save_adapter(adapter, base)
    monkeypatch.setattr(merged, "SHARD_BYTES", 40_000)
    seen: list[str] = []

    def interrupt(message: str) -> None:
        seen.append(message)
        if "00003-of" in message:
            assert len(list(tmp_path.glob(".out.*/*.safetensors"))) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_merged(adapter, tmp_path / "out", model=str(base), notify=interrupt)
    assert seen and left_behind(tmp_path) == set()


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_base(base, "llama")
    save_adapter(adapter, base)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(ExportError, match="full"):
            export_merged(adapter, tmp_path / "out", model=str(base))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert left_behind(tmp_path) == set()


_SMALL = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)


@pytest.mark.parametrize(
    ("stored", "dtype", "config", "size"),
    [
        (torch.float32, None, None, 1.0),
        (torch.float32, "bfloat16", None, 1.0),
        (torch.bfloat16, None, _SMALL, 0.07),  # its whole effect is less than rounding all weights could do
    ],
)
def test_the_probe_stops_a_merge_that_lost_the_update(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
    dtype: str | None,
    config: LoraConfig | None,
    size: float,
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_base(base, "llama", stored)
    save_adapter(adapter, base, config, size=size)
    right = export_merged(adapter, adapter / "right", model=str(base), dtype=dtype)
    assert config is None or right["probe"]["adapter_effect"] < probe.LIMITS[torch.bfloat16].difference
    monkeypatch.setattr(merged._Contents, "_merged", merged._Contents._copied)
    with pytest.raises(ExportError, match="does not compute what the adapter does"):
        export_merged(adapter, tmp_path / "out", model=str(base), dtype=dtype)
    assert left_behind(tmp_path) == set()


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(base, "llama")
    save_adapter(adapter, base)
    output.mkdir()
    (output / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_merged(adapter, output, model=str(base))
    assert [path.name for path in output.iterdir()] == ["mine"]


# ---- what is refused ------------------------------------------------------------------------------------------------


def _other_base(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})


def _pickled_base(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def _without_a_tensor(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def _quantised(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 16, dtype=torch.uint8)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_bytes())
    files.write_json(base / "config.json", config | {"quantization_config": {"quant_method": "bitsandbytes"}})


def _fewer_layers(base: Path) -> None:
    config = json.loads((base / "config.json").read_bytes())
    files.write_json(base / "config.json", config | {"num_hidden_layers": 1})


def _other_shape(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 32)
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def _cut(base: Path) -> None:
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-1])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_other_base, AdapterError, "another base model"),
        (_pickled_base, ExportError, "holds no model.safetensors.*save_pretrained"),
        (_without_a_tensor, ExportError, r"layers.1.self_attn.q_proj.weight has no tensor in .*nearest: model.layers"),
        (_quantised, ExportError, "quantised weights .*up_proj.*--model"),
        (_fewer_layers, AdapterError, "have no site"),
        (_other_shape, ExportError, r"q_proj.weight in .*: found F32 \(64, 32\), expected \(32, 32\)"),
        (_cut, ExportError, "damaged: .* does not fit"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_base_that_cannot_be_merged_into_is_refused(
    damage: Any, error: type[LoratuneError], message: str, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_base(base, "llama")
    save_adapter(adapter, base)
    damage(base)
    with pytest.raises(error, match=message):
        export_merged(adapter, tmp_path / "out", model=str(base))
    assert left_behind(tmp_path) == set()


def test_projections_that_are_stored_as_one_are_merged_there(tmp_path: Path) -> None:
    """Molmo2 and others store one projection for three modules; transformers splits it when it loads."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = save_base(base, "mixtral")
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    save_adapter(adapter, base, config)
    expected = attached_logits(base, adapter, "mixtral")
    weights = load_file(base / "model.safetensors")
    for layer in (0, 1):
        parts = [weights.pop(f"model.layers.{layer}.self_attn.{name}_proj.weight") for name in "kv"]
        weights[f"model.layers.{layer}.self_attn.kv.weight"] = torch.cat(parts)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    before = get_checkpoint_conversion_mapping("mixtral")
    split = WeightConverter("self_attn.kv.weight", ["self_attn.k_proj.weight", "self_attn.v_proj.weight"], [Chunk(0)])
    register_checkpoint_conversion_mapping("mixtral", [split, *before], overwrite=True)
    try:
        report = export_merged(adapter, output, model=str(base))
        assert relative(plain_logits(output, "mixtral"), expected) < 1e-5
    finally:
        register_checkpoint_conversion_mapping("mixtral", before, overwrite=True)
    written = load_file(output / "model.safetensors")
    assert written.keys() == weights.keys() and report["operations"]["merge"] == 4
    for layer in (0, 1):
        value = written[f"model.layers.{layer}.self_attn.kv.weight"].chunk(2)[1]
        assert torch.equal(value, model.get_parameter(f"model.layers.{layer}.self_attn.v_proj.weight"))


class _OneWay(Chunk):
    """A conversion that transformers cannot undo."""

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError


def test_a_conversion_that_cannot_be_undone_is_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_base(base, "llama")
    save_adapter(adapter, base, LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False))
    weights = load_file(base / "model.safetensors")
    for layer in (0, 1):
        parts = [weights.pop(f"model.layers.{layer}.self_attn.{name}_proj.weight") for name in "kv"]
        weights[f"model.layers.{layer}.self_attn.kv.weight"] = torch.cat(parts)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    split = WeightConverter("self_attn.kv.weight", ["self_attn.k_proj.weight", "self_attn.v_proj.weight"], [_OneWay(0)])
    register_checkpoint_conversion_mapping("llama", [split], overwrite=True)
    try:
        with pytest.raises(ExportError, match=r"k_proj.weight has no tensor .*Merge in memory"):
            export_merged(adapter, tmp_path / "out", model=str(base))
    finally:
        register_checkpoint_conversion_mapping("llama", [], overwrite=True)
    assert left_behind(tmp_path) == set()
