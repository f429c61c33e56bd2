"""A factor that the model passes by is found before the first step."""

import numpy as np
import pytest

import loratune
from families import CAUSAL, FAMILIES
from loratune import LoraConfig
from loratune.data.dataset import Dataset
from loratune.data.encode import Document
from loratune.errors import TrainingError
from loratune.model.causal import CausalModel
from loratune.train.watch import check_reached


def rows() -> Dataset:
    ids = np.random.RandomState(0).randint(0, 100, 12).astype(np.int32)
    return Dataset([Document(ids, np.arange(12) > 4)], ["rows:1"], "", "text")


@pytest.mark.parametrize("family", CAUSAL)
def test_every_factor_of_every_family_is_reached(family):
    model = FAMILIES[family]()
    attached = loratune.attach(model, LoraConfig.preset("deep", r=2), seed=0)
    check_reached(CausalModel(model), attached, rows())
    assert all(p.grad is None for _, p in attached.adapter.named_parameters())


def test_a_layer_that_is_read_past_its_wrapper_is_named():
    model = FAMILIES["llama"]()
    attached = loratune.attach(model, LoraConfig(r=2), seed=0)
    wrapper = model.model.layers[1].self_attn.v_proj
    wrapper.forward = wrapper.base.forward
    with pytest.raises(TrainingError, match=r"1 of 4 factors do not reach the loss; first: model\.layers\.1.*v_proj"):
        check_reached(CausalModel(model), attached, rows())
