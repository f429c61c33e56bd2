"""The Hugging Face Trainer trains a wrapped model, whose save_pretrained writes the adapter alone; FSDP computes it."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from compat_toys import config_of, ids, toy
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from loratune.compat.peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

pytestmark = pytest.mark.filterwarnings("ignore")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def test_the_hugging_face_trainer_trains_and_evaluates_it(tmp_path: Path) -> None:
    base = {name: value.clone() for name, value in llama().state_dict().items()}
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32))
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(16)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=8, learning_rate=3e-2, report_to=[], use_cpu=True, save_strategy="no",
        logging_steps=1000, disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.05
    assert all(torch.equal(value, base[name]) for name, value in model.unload().state_dict().items())


def test_checkpoints_hold_the_adapter_alone_where_trainers_know_peft_and_training_resumes(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4))
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, PeftModel)
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, peft.tuners.lora.LoraLayer)
    rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(8)]

    def trainer(model: PeftModel, epochs: int) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path), num_train_epochs=epochs, learning_rate=1e-2, report_to=[], use_cpu=True,
            save_strategy="epoch", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=rows)

    trainer(model, 2).train()
    files = {file.name for file in (tmp_path / "checkpoint-1").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= files
    assert not files & {"model.safetensors", "config.json"}
    again = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4))
    trainer(again, 2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    expected, found = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)


def test_what_is_saved_after_training_is_the_adapter_alone(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert all("lora_" in name for name in tensors)
    with torch.no_grad():
        expected = model(input_ids=ids()).logits
        found = PeftModel.from_pretrained(llama(), tmp_path)(input_ids=ids()).logits
        assert torch.allclose(found, expected, atol=1e-6)
        assert model.generate(ids(), max_new_tokens=2, do_sample=False).shape == (3, 6)


WITHOUT_PEFT = """
import sys
from importlib.machinery import PathFinder
class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "peft" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import is_peft_available
from loratune.compat.peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from loratune.compat.trainer import AdapterCheckpoints
assert not is_peft_available()

class AdapterTrainer(AdapterCheckpoints, Trainer):
    pass

def model(seed):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights="orthogonal"))

def train(model, **more):
    arguments = TrainingArguments(
        sys.argv[1], num_train_epochs=2, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="epoch",
        eval_strategy="epoch", load_best_model_at_end=True, disable_tqdm=True, lr_scheduler_type="constant",
    )
    rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(8)]
    trainer = AdapterTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train(**more)
    return trainer

one, other = model(1), model(2)
first = train(one)
assert first.state.best_model_checkpoint
train(other, resume_from_checkpoint=sys.argv[1] + "/checkpoint-1")
expected, found = get_peft_model_state_dict(one), get_peft_model_state_dict(other)
assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected), "resumed otherwise"
"""


def test_without_peft_installed_the_trainer_s_checkpoints_hold_the_adapter_alone_and_resume(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_PEFT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = {file.name for file in (tmp_path / "checkpoint-1").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= files
    assert not files & {"model.safetensors", "config.json", "pytorch_model.bin"}


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["plain", "tokens", "dora"])
def test_fsdp_computes_with_the_adapters(name: str) -> None:
    model = get_peft_model(toy(), config_of(LoraConfig, name)).eval()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(0.05)
    expected, tensors = model(ids()), get_peft_model_state_dict(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with torch.no_grad():
            assert torch.allclose(sharded(ids()), expected, atol=1e-6)
    found = get_peft_model_state_dict(sharded)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
