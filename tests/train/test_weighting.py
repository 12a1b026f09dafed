"""What a weighting makes of training: the total, the curves, which teacher is asked, alone and in a stack."""

import pytest
import torch

from tests.test_contract import (
    CLOSE,
    REMARKS,
    Keep,
    asks_of,
    assert_equal,
    composed,
    curves_of,
    module_of,
    teacher_of,
    train,
    weights_of,
)
from vitkd.config.run import Config
from vitkd.data import Batch
from vitkd.methods.weighting import WSLD, Confidence, GradientBalance, Linear, StudentCorrect
from vitkd.train.job import load_data
from vitkd.train.stacked import StackedModule

pytestmark = REMARKS


@pytest.fixture
def config() -> Config:
    return composed("weighting", "wsld")


def double(batch: Batch) -> Batch:
    return batch._replace(image=batch.image.double())


def test_the_total_is_the_weighted_sum_of_both_terms(config):
    data = load_data(config)
    module, batch = module_of(config, data).double().eval(), double(data.first("train", 16))
    losses = module.losses(batch)

    with torch.no_grad():
        answer = module.teacher(batch.image, module.teacher_taps("train"))
        student = module.model(batch.image, module.objective.student_taps)
        each = module.objective.transfer(module.objective(batch, student, answer))
        ce = {
            who: torch.nn.functional.cross_entropy(output.logits, batch.label, reduction="none")
            for who, output in (("student", student), ("teacher", answer))
        }
    weight = 1 - (-ce["student"] / ce["teacher"]).exp()

    assert losses.transfer.loss.item() == pytest.approx(each.mean().item())
    assert losses.transfer.image_weight.item() == pytest.approx(weight.mean().item())
    expected = 0.5 * ce["student"].mean() + 0.5 * (weight * each).mean()
    assert losses.total.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("option", "asked"), [("constant", False), ("student_correct", False), ("wsld", True), ("linear", False)]
)
def test_the_teacher_is_asked_for_logits_only_where_they_count(option, asked):
    config = composed("weighting", option)
    module = module_of(config, load_data(config))

    assert module.teacher_taps("train").logits is asked
    assert module.teacher_taps("val").logits


def test_where_only_labels_count_the_teacher_is_not_asked():
    """`linear` ends with the labels alone: of two epochs the second asks the teacher in validation only."""
    config = composed("weighting", "linear")
    data, kept = load_data(config), Keep()
    module = module_of(config, data)
    asked = asks_of(module)

    train(module, config, data, kept)

    assert asked == ["train"] * 4 + ["val"] * 2
    assert [step["term class_loss"] for step in kept.steps] == [0.5] * 4 + [1.0] * 4


@pytest.mark.parametrize("option", ["wsld", "student_correct", "gradient_balance", "linear", "constant"])
def test_mean_weights_are_curves(option):
    config = composed("weighting", option)
    data = load_data(config)
    (curves,) = curves_of(config, module_of(config, data), data)

    of_class = [*curves.of("train/class_weight"), *curves.of("val/class_weight")]
    of_transfer = [*curves.of("train/transfer_weight"), *curves.of("val/transfer_weight")]

    if option == "constant":
        assert of_class == of_transfer == []
        return
    assert len(of_class) == len(of_transfer) > 2
    assert all(0 <= weight <= 1 for weight in [*of_class, *of_transfer])
    if option in ("wsld", "student_correct"):
        assert set(of_class) == {0.5}
        assert all(0 < weight < 0.5 for weight in of_transfer)
    else:
        assert len(set(of_class)) > 1


def test_gradients_reach_their_ratio_at_once():
    """The ratio of the weighted gradients is logged with the weights that were set by the same gradients."""
    config = composed("weighting", "gradient_balance")
    data = load_data(config)
    module = module_of(config, data)
    module.weighting = GradientBalance(ratio=0.3)

    (curves,) = curves_of(config, module, data)

    assert curves.of("train/gradient_ratio") == pytest.approx([0.3] * len(curves.of("train/gradient_ratio")))
    assert len(curves.of("train/gradient_ratio")) >= 4


def test_a_stack_draws_each_students_own_weights(config):
    """By the image, by the epoch, by gradients; the last student learns from labels alone."""
    data, modules = load_data(config), []
    weightings = [WSLD(), Linear(), GradientBalance(), StudentCorrect(factor=0.2), Confidence()]
    for weighting in weightings:
        module = module_of(config, data)
        module.weighting = weighting
        modules.append(module)
    alone = module_of(composed("method", "none"), data)
    teacher = teacher_of(config).double()
    for module in modules:
        module._teachers = (teacher,)
    expected = [curves_of(config, module, load_data(config))[0] for module in modules]
    for module in modules:
        module.model.load_state_dict(module_of(config, data).model.state_dict())
    stacked = StackedModule([*modules, alone], [0] * 6, [0] * 6)

    curves = curves_of(config, stacked, load_data(config), count=6)

    names = [f"{split}/{term}_weight" for split in ("train", "val") for term in ("class", "transfer")]
    for own in curves[:5]:
        assert all(own.of(name) for name in names[:2])
    assert not any(curves[5].of(name) for name in names)
    # Dropout draws other masks here, so the first window alone is near; weights by the epoch are exact.
    assert curves[1].of("train/class_weight") == expected[1].of("train/class_weight")


def test_a_token_that_rests_in_an_epoch_moves_as_in_a_stack():
    """In its last epoch `linear` compares nothing; the token's head then gets a gradient of 0."""
    config = composed("method", "token")
    data, expected, modules = load_data(config), [], []
    for weighting in (Linear(), WSLD()):
        for kept in (expected, modules):
            module = module_of(config, data)
            module.weighting = weighting
            kept.append(module)
    for module in expected:
        torch.manual_seed(10)
        train(module, config, load_data(config))

    stacked = StackedModule(modules, [0, 0], [10, 10])
    train(stacked, config, load_data(config))

    for student, alone in enumerate(expected):
        own = [weights[student] for weights in weights_of(stacked.model)]
        assert_equal(own, weights_of(alone.model), **CLOSE)


def test_every_parameter_has_a_gradient_where_nothing_is_compared():
    """As DistributedDataParallel asks of every step."""
    config = composed("method", "token")
    data = load_data(config)
    module = module_of(config, data)
    module.weighting = Linear()
    module.start_epoch(1, 2)

    module.losses(data.first("train", 4)).total.backward()

    assert not module.compared
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert not module.model.distillation_head.weight.grad.any()
