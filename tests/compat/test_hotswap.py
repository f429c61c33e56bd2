"""Hot-swapping: other values, ranks and scales in place, nothing compiled again; what is saved afterwards is true."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from compat_toys import ids, toy
from torch._dynamo.testing import CompileCounter

from loratune.compat.peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from loratune.errors import AdapterError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = ["lin0", "c1d", "conv1d", "conv2d"]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def model_of(r: int, alpha: float, seed: int, **more: Any) -> Any:
    torch.manual_seed(seed)
    more = {"target_modules": LAYERS, "init_lora_weights": False, **more}
    return get_peft_model(toy(), LoraConfig(r=r, lora_alpha=alpha, **more)).eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_a_prepared_model_takes_adapters_of_other_ranks_and_scales_without_compiling_again(tmp_path: Path) -> None:
    others = [model_of(2, 3, seed=1), model_of(6, 1, seed=2, target_modules=LAYERS[:2], use_rslora=False)]
    folders = [saved(other, tmp_path / str(n)) for n, other in enumerate(others)]
    model = model_of(4, 8, seed=0)
    before = model(ids())
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert torch.allclose(model(ids()), before, atol=1e-6)
    counter = CompileCounter()
    layer = model.base_model.model.lin0  # one layer: attention and Python around it are not what is compiled here
    compiled, x = torch.compile(layer, backend=counter), torch.randn(3, 12)
    with torch.no_grad():
        compiled(x)
        compilations = counter.frame_count
        for other, folder in zip(others, folders, strict=True):
            hotswap_adapter(model, folder)
            assert torch.allclose(model(ids()), other(ids()), atol=1e-5)
            assert torch.allclose(compiled(x), other.base_model.model.lin0(x), atol=1e-5)
    assert counter.frame_count == compilations > 0


def test_without_preparing_the_same_swap_compiles_again(tmp_path: Path) -> None:
    folder = saved(model_of(2, 3, seed=1), tmp_path / "a")
    model, counter = model_of(4, 8, seed=0), CompileCounter()
    compiled, x = torch.compile(model.base_model.model.lin0, backend=counter), torch.randn(3, 12)
    with torch.no_grad():
        compiled(x)
        compilations = counter.frame_count
        hotswap_adapter(model, folder)
        compiled(x)
    assert counter.frame_count > compilations


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_after_a_swap_is_what_is_computed_and_peft_reads_it(
    prepared: bool, rslora: bool, tmp_path: Path
) -> None:
    """PEFT saves the first adapter's rank and alpha with the second one's tensors."""
    other = model_of(2, 3, 1, use_rslora=rslora, rank_pattern={"c1d": 1}, alpha_pattern={"conv1d": 5})
    folder = saved(other, tmp_path / "a")
    model = model_of(4, 8, 0, use_rslora=rslora)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    hotswap_adapter(model, folder)
    expected = model(ids())
    assert torch.allclose(expected, other(ids()), atol=1e-5)
    again = saved(model, tmp_path / "b")
    assert torch.allclose(PeftModel.from_pretrained(toy(), again)(ids()), expected, atol=1e-5)
    assert torch.allclose(peft.PeftModel.from_pretrained(toy(), str(again))(ids()), expected, atol=1e-5)


def test_a_scaled_layer_stays_scaled_relative_to_the_adapter_in_it() -> None:
    model = model_of(4, 8, seed=0)
    layer = model.base_model.model.lin0
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert isinstance(layer.scaling["default"], torch.Tensor) and float(layer.scaling["default"]) == 2
    assert not layer.placed["default"][0].is_plain  # the fused path would read it back to the host
    layer.set_scale("default", 3)
    assert float(layer.scaling["default"]) == 6


@pytest.mark.parametrize(
    ("rank", "more", "message"),
    [
        (3, {}, "original rank is larger"),
        (5, {"target_modules": ["grouped"]}, "divisible by 2"),
    ],
)
def test_a_rank_that_cannot_be_is_refused_with_nothing_changed(rank: int, more: Any, message: str) -> None:
    base = toy()
    base.grouped = torch.nn.Conv2d(4, 4, 3, groups=2)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": LAYERS, **more}))
    shapes = [parameter.shape for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=message):
        prepare_model_for_compiled_hotswap(model, target_rank=rank)
    assert shapes == [parameter.shape for parameter in model.parameters()]
    assert all(isinstance(scale, float) for layer in model.layers_.slots.values() for scale in layer.scaling.values())


def test_what_hotswap_leaves_out_is_refused(tmp_path: Path) -> None:
    folder = saved(model_of(4, 8, 1, modules_to_save=["head"]), tmp_path / "a")
    model = model_of(4, 8, 0, modules_to_save=["head"])
    before = model(ids())
    with pytest.raises(AdapterError, match="also trains head"):
        hotswap_adapter(model, folder)
    assert torch.equal(model(ids()), before)
