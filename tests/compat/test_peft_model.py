"""What a PeftModel does with several adapters: live views, switching, merging, batches of rows, files, failures."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compat_toys import SETTINGS, config_of, ids, toy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from loratune.adapter.attach import Attachments, attached_to
from loratune.compat.peft import (
    LoraConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    set_peft_model_state_dict,
)
from loratune.errors import AdapterError, ConfigError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore")


def model_of(**more: Any) -> Any:
    more = {"target_modules": ["lin0", "c1d"], "r": 4, "init_lora_weights": False, **more}
    return get_peft_model(toy(), LoraConfig(**more)).eval()


def two(**more: Any) -> Any:
    model = model_of()
    model.add_adapter("other", LoraConfig(target_modules=["lin0"], r=2, init_lora_weights=False, **more))
    return model.eval()


def test_layers_show_the_factor_itself() -> None:
    model = model_of()
    layer = model.base_model.model.lin0
    factor = Attachments.of(model.get_base_model()).adapters["default"].factors["lin0"]  # type: ignore[union-attr]
    assert layer.lora_A["default"].weight is factor.A
    assert layer.lora_B["default"].weight is factor.B
    before = model(ids())
    layer.scaling["default"] *= 2
    assert factor.scale == 2 * 8 / 4
    assert not torch.allclose(model(ids()), before)
    layer.lora_A["default"].weight = nn.Parameter(torch.zeros(4, 12))  # another parameter in its place
    assert float(factor.A.abs().sum()) == 0


def test_a_copy_of_a_model_is_its_own() -> None:
    model = two()
    copied = copy.deepcopy(model)
    copied.base_model.model.lin0.lora_A["default"].weight.data.zero_()
    copied.set_adapter("other")
    assert model.active_adapters == ["default"]
    assert float(model.base_model.model.lin0.lora_A["default"].weight.abs().sum()) > 0
    assert torch.equal(copied.merge_and_unload()(ids()), copied(ids()))


def test_unmerging_gives_back_the_base_weights_themselves() -> None:
    model = two()
    base = {name: p for name, p in model.named_parameters() if "base_layer" in name}
    values = {name: p.clone() for name, p in base.items()}
    expected = model(ids())
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert model.base_model.model.lin0.merged_adapters == ["default", "other"]
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if name in base:
            assert parameter is base[name]
            assert torch.equal(parameter, values[name])
    assert torch.equal(model(ids()), expected)


def test_a_merged_model_can_be_disabled_and_is_the_base_then() -> None:
    model = model_of(modules_to_save=["head"], bias="all")
    with torch.no_grad():
        for _, parameter in model.layers_.adapters["default"].named_parameters():
            parameter.add_(0.1)
    expected = model(ids())
    model.merge_adapter()
    assert torch.allclose(model(ids()), expected, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(ids()), toy()(ids()))
    assert torch.allclose(model(ids()), expected, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_disabled_model_is_the_base_and_the_same_again_afterwards(name: str) -> None:
    model = get_peft_model(toy(), config_of(LoraConfig, name)).eval()
    with torch.no_grad():
        for _, parameter in model.layers_.adapters["default"].named_parameters():
            parameter.add_(0.1)
        expected = model(ids())
        with model.disable_adapter():
            assert torch.equal(model(ids()), toy()(ids()))
        assert torch.equal(model(ids()), expected)
        assert not torch.allclose(expected, toy()(ids()), atol=1e-3)


def test_a_layer_can_be_switched_alone() -> None:
    model = two()
    layer = model.base_model.model.lin0
    layer.set_adapter("other")
    assert layer.active_adapters == ["other"]
    assert layer.lora_A["other"].weight.requires_grad
    assert not layer.lora_A["default"].weight.requires_grad
    assert model.base_model.model.c1d.active_adapters == ["default"]


def test_a_truncated_sum_has_the_rank_asked_for() -> None:
    model = two()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", svd_rank=3)
    layer = model.base_model.model.lin0
    U, S, Vh = torch.linalg.svd(layer.get_delta_weight("default") + layer.get_delta_weight("other"))
    assert layer.r["sum"] == 3
    assert torch.allclose(layer.get_delta_weight("sum"), U[:, :3] * S[:3] @ Vh[:3], atol=1e-5)


def test_two_active_adapters_add_up_and_a_weighted_sum_says_the_same() -> None:
    model = two(lora_alpha=6)
    model.base_model.set_adapter(["default", "other"])
    both = model(ids())
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert torch.allclose(model(ids()), both, atol=1e-5)
    assert model.peft_config["sum"].lora_alpha == model.peft_config["sum"].r


def test_the_scale_of_rslora_counts_once_in_a_weighted_adapter() -> None:
    model = model_of(use_rslora=True)  # PEFT 0.21 makes the result sqrt(r) too large
    model.add_weighted_adapter(["default"], [0.5], "halved")
    layer = model.base_model.model.lin0
    assert torch.allclose(layer.get_delta_weight("halved"), 0.5 * layer.get_delta_weight("default"), atol=1e-6)


def test_rows_of_a_batch_take_their_own_adapters() -> None:
    model = two()
    with model.disable_adapter():
        expected = [model(ids())]
    for name in ("default", "other"):
        model.set_adapter(name)
        expected.append(model(ids()))
    mixed = model(ids(), adapter_names=["__base__", "default", "other"])
    for row in range(3):
        assert torch.allclose(mixed[row], expected[row][row], atol=1e-5)
    with pytest.raises(AdapterError, match="non-existing adapter"):
        model(ids(), adapter_names=["default", "nobody", "other"])
    with pytest.raises(AdapterError, match="Length"):
        model(ids(), adapter_names=["default"])


def test_only_the_active_adapter_trains_and_disabling_does_not_change_that() -> None:
    model = two()

    def training() -> set[str]:
        return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}

    assert training() == {"default"}
    model.set_adapter("other", inference_mode=True)
    assert training() == set()
    with model.disable_adapter():
        assert training() == set()
    assert training() == set()  # PEFT makes it trainable here
    model.set_adapter("other")
    assert training() == {"other"}


def test_deleting_the_last_adapter_leaves_the_base() -> None:
    model = two()
    model.merge_adapter(["other"])
    with pytest.raises(AdapterError, match="while they are merged"):
        model.delete_adapter("other")
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    model.delete_adapter("other")
    assert torch.equal(model.base_model(ids()), toy()(ids()))


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    wrong = toy()
    wrong.c1d = nn.Linear(16, 13)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(wrong, tmp_path)
    assert isinstance(wrong.lin0, nn.Linear)
    assert all(parameter.requires_grad for parameter in wrong.parameters())
    assert PeftModel.from_pretrained(wrong, tmp_path, ignore_mismatched_sizes=True).active_adapters == ["default"]


def test_a_failed_wish_leaves_earlier_adapters_alone() -> None:
    model = model_of(bias="lora_only")
    before = model(ids())
    for config, message in ((LoraConfig(target_modules=["lin9"]), "lin9"), (LoraConfig(bias="all"), "bias")):
        with pytest.raises((AdapterError, ConfigError), match=message):
            model.add_adapter("new", config)
    for name in ("a.b", "half"):  # torch's own: PEFT stops half-way with a KeyError
        with pytest.raises(ConfigError, match="cannot be a module's"):
            model.add_adapter(name, LoraConfig(target_modules=["lin0"]))
    with pytest.raises(AdapterError, match="already exists"):
        model.add_adapter("default", LoraConfig(target_modules=["lin0"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(ids()), before)


def test_missing_and_unexpected_tensors_are_named() -> None:
    model = model_of()
    tensors = get_peft_model_state_dict(model)
    gone = "base_model.model.lin0.lora_A.weight"
    del tensors[gone]
    tensors["base_model.model.lin7.lora_A.weight"] = torch.zeros(1)
    result = set_peft_model_state_dict(model, tensors)
    assert result.missing_keys == [gone]
    assert result.unexpected_keys == ["base_model.model.lin7.lora_A.weight"]


def test_a_layer_without_a_bias_cannot_take_a_merged_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.warns(PeftWarning, match="has no bias"):
        wrapped = get_peft_model(model, LoraConfig(target_modules=["0"], lora_bias=True))
    with pytest.raises(ExportError, match="no bias"):
        wrapped.merge_adapter()
    assert isinstance(wrapped.unload()[0], nn.Linear)


def test_safe_merging_refuses_numbers_that_are_not_finite() -> None:
    model = model_of()
    weight = model.base_model.model.lin0.base_layer.weight
    model.base_model.model.lin0.lora_B["default"].weight.data.fill_(torch.nan)
    with pytest.raises(AdapterError, match="NaNs"):
        model.merge_adapter(safe_merge=True)
    assert model.base_model.model.lin0.base_layer.weight is weight


@settings(max_examples=15, deadline=None)
@given(ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)), alpha=st.integers(1, 20), rslora=st.booleans())
def test_hot_swapping_equals_loading(ranks: tuple[int, int], alpha: int, rslora: bool) -> None:
    import tempfile

    one, other = (model_of(r=rank, lora_alpha=alpha, use_rslora=rslora) for rank in ranks)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        layer = one.base_model.model.lin0
        hotswap_adapter(one, folder)
    assert one.base_model.model.lin0 is layer
    assert torch.allclose(one(ids()), other(ids()), atol=1e-5)


def test_pickles_are_neither_written_nor_read(tmp_path: Path) -> None:
    model, base = model_of(), toy()
    with pytest.raises(ConfigError, match="safe_serialization=False asks for a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    expected = base(ids())
    with pytest.raises(AdapterError, match=r"adapter_model\.bin, a pickle, .* Load it once in PEFT"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(base(ids()), expected)


def test_a_card_that_exists_keeps_its_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    model_of().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "license: mit" in card
    assert "library_name: peft" in card
    assert card.endswith("Mine.\n")


def test_embeddings_that_are_targets_are_saved_and_read(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(7, 3)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed_tokens

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, x: Tensor) -> Tensor:
            return self.embed_tokens(x)

    model = get_peft_model(Named(), LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(Named(), tmp_path)  # another random embedding before
    assert torch.equal(read(torch.arange(7)), model(torch.arange(7)))


def test_sharing_a_weight_is_said() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(7, 3)
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.emb.weight

    with pytest.warns(PeftWarning, match="emb shares its weight with head"):
        get_peft_model(Tied(), LoraConfig(target_modules=["emb"]))


def test_loratune_s_own_handle_works_on_the_same_values(tmp_path: Path) -> None:
    model = model_of()
    handle = attached_to(model.get_base_model())
    assert "r=4" in handle.summary()
    handle.save(tmp_path / "saved")
    assert torch.allclose(PeftModel.from_pretrained(toy(), tmp_path / "saved")(ids()), model(ids()), atol=1e-5)
    handle.detach()
    assert isinstance(model.base_model.model.lin0, nn.Linear)
    assert torch.equal(model.base_model(ids()), toy()(ids()))
