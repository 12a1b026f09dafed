"""What takes the place of the teacher's maps in a control arm."""

import math

import pytest
import torch

from vitkd.errors import ConfigError
from vitkd.methods.attention import AttentionDistillation
from vitkd.methods.maps.granularity import BlockPair
from vitkd.methods.maps.losses import KL, MSE
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.models.output import QKV

PAIRS = [BlockPair(0, 1, (0, 1), ((0,), (2,)))]


def test_shuffled_maps_are_those_of_another_image():
    scores = torch.randn(4, 3, 5, 5)
    objective = AttentionObjective(PAIRS, MSE(), control="shuffled")
    of_others = scores[[3, 0, 1, 2]]

    assert objective.compare({0: of_others[:, [0, 2]]}, {1: scores}).sum() == 0
    of_same = objective.compare({0: scores[:, [0, 2]]}, {1: scores})
    assert of_same.shape == (4, 2)
    assert (of_same > 0).all()


@pytest.mark.parametrize(("control", "fewest"), [("shuffled", 2), ("uniform", 1), (None, 1)])
def test_a_lone_image_has_no_neighbour_to_be_compared_with(control, fewest):
    assert AttentionObjective(PAIRS, MSE(), control=control).min_images == fewest
    assert AttentionDistillation(control=control).min_batch_size == fewest


def test_uniform_maps_look_everywhere_alike():
    """Of a student that looks at one of 5 tokens alone, KL(uniform ‖ student) is known by hand."""
    student = torch.zeros(2, 2, 5, 5)
    student[..., 0] = 3.0
    teacher = torch.randn(2, 3, 5, 5) * 10
    log_total = math.log(math.exp(3.0) + 4)
    expected = -math.log(5) - (3.0 - 5 * log_total) / 5

    values = AttentionObjective(PAIRS, KL(), control="uniform").compare({0: student}, {1: teacher})

    torch.testing.assert_close(values, torch.full((2, 2), expected))


@pytest.mark.parametrize("control", ["shuffled", "uniform"])
def test_streamed_and_at_once_it_is_the_same(control):
    ours = QKV(torch.randn(4, 2, 5, 3, requires_grad=True), torch.randn(4, 2, 5, 3))
    theirs = QKV(torch.randn(4, 3, 5, 3), torch.randn(4, 3, 5, 3))
    objective = AttentionObjective(PAIRS, KL(), control=control)

    at_once = objective.compare({0: ours.scores()}, {1: theirs.scores()})
    streamed = objective.compare({0: ours}, {1: theirs})

    torch.testing.assert_close(streamed, at_once)


def test_students_of_several_orders_keep_to_their_own_batch():
    """[U, B, H, T, T]: a neighbour is one of the same order."""
    scores = torch.randn(2, 4, 3, 5, 5)
    objective = AttentionObjective(PAIRS, MSE(), control="shuffled")

    values = objective.compare({0: scores[:, [3, 0, 1, 2]][:, :, [0, 2]]}, {1: scores})

    assert values.sum() == 0


def test_an_unknown_control_is_refused():
    with pytest.raises(ConfigError, match=r"control=shufled: choose shuffled, uniform or null"):
        AttentionDistillation(control="shufled")
