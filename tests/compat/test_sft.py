"""TRL's SFTTrainer trains a wrapped model; its checkpoints and save_pretrained hold the adapter, not the base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loratune.compat.peft import LoraConfig, PeftModel, get_peft_model

trl = pytest.importorskip("trl", reason="TRL is not installed: it brings datasets and an own range of transformers")
datasets = pytest.importorskip("datasets", reason="TRL reads its rows through datasets")
pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [f"w{n}" for n in range(30)]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def test_sft_trainer_trains_the_adapter_and_saves_it_alone(tmp_path: Path) -> None:
    base = {name: value.clone() for name, value in llama().state_dict().items()}
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32))
    rows = datasets.Dataset.from_dict({"text": [" ".join(WORDS[n : n + 8]) for n in range(16)]})
    settings = trl.SFTConfig(
        str(tmp_path / "run"), num_train_epochs=6, learning_rate=3e-2, report_to=[], use_cpu=True, bf16=False,
        logging_steps=2, save_strategy="epoch", save_total_limit=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05

    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    files = {file.name for file in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not files & {"model.safetensors", "pytorch_model.bin"}
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2 and all("lora_" in name for name in tensors)
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    ids = torch.arange(2, 14).view(2, 6)
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-6)
    assert all(torch.equal(value, base[name]) for name, value in model.unload().state_dict().items())
