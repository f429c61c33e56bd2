"""A factor that the model passes by is found before the first step."""

import numpy as np
import pytest
from torch import nn

import loratune
from families import CAUSAL, FAMILIES
from loratune import LoraConfig
from loratune.data.encode import Document
from loratune.errors import TrainingError
from loratune.evaluate.loss import Evaluation
from loratune.model.causal import CausalModel
from loratune.train.watch import Course, check_loss, check_reached


def rows() -> list[Document]:
    draw = np.random.RandomState(0)
    return [Document(draw.randint(0, 100, n).astype(np.int32), np.arange(n) > 4) for n in (12, 7, 9)]


@pytest.mark.parametrize("family", CAUSAL)
def test_every_factor_of_every_family_is_reached(family):
    model = FAMILIES[family]()
    attached = loratune.attach(model, LoraConfig.preset("deep", r=2), seed=0)
    check_reached(CausalModel(model), attached, rows())
    assert all(p.grad is None for _, p in attached.adapter.named_parameters())


@pytest.mark.parametrize("family", CAUSAL)
def test_the_loss_of_every_family_is_its_own(family):
    assert check_loss(CausalModel(FAMILIES[family]()), rows()) is None


def test_a_model_without_a_loss_of_its_own_is_not_compared(monkeypatch):
    model = FAMILIES["llama"]()
    causal, plain = CausalModel(model), model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, use_cache: plain(input_ids=input_ids))
    assert (
        check_loss(causal, rows()) == "LlamaForCausalLM has no loss of its own to compare with (it takes no `labels`)."
    )


def evaluation(*losses: float) -> Evaluation:
    mean = sum(losses) / len(losses)
    return Evaluation(mean, mean, mean, len(losses), len(losses), losses, (1,) * len(losses))


def test_the_ceiling_leaves_room_for_rows_that_differ():
    course = Course()
    course.start(evaluation(2.0, 2.0, 2.0), batch_size=4)
    assert (course.untuned, course.ceiling) == (2.0, 3.0)
    course.start(evaluation(1.0, 2.0, 3.0), batch_size=4)
    assert course.ceiling == 2.0 + 4 * 1.0 / 2


def test_seven_high_losses_are_no_blow_up_and_eight_are():
    course = Course(untuned=2.0, ceiling=3.0)
    for step, loss in enumerate([2.0, *[9.0] * 7, 2.9, *[9.0] * 7], start=1):
        assert course.see(step, loss) is None
    with pytest.raises(TrainingError, match=r"step 17: the loss was above 3.00 for 8 steps \(now 3.10; untuned 2.00\)"):
        course.see(17, 3.1)


def test_a_first_loss_that_is_too_high_is_reported_and_becomes_the_measure():
    course = Course(untuned=2.0, ceiling=3.0)
    remark = course.see(1, 6.0)
    assert remark is not None and "loss is 6.00, far above the untuned model's 2.00 on the held-out rows" in remark
    assert course.ceiling == 7.0 and course.above == 0
    assert all(course.see(step, 6.5) is None for step in range(2, 30))


def test_a_layer_that_is_read_past_its_wrapper_is_named():
    model = FAMILIES["llama"]()
    attached = loratune.attach(model, LoraConfig(r=2), seed=0)
    model.model.layers[1].self_attn.v_proj._modules["active"] = nn.ModuleList()
    with pytest.raises(TrainingError, match=r"1 of 4 factors do not reach the loss; first: model\.layers\.1.*v_proj"):
        check_reached(CausalModel(model), attached, rows())
