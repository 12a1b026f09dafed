"""Curves of models whose logits are sums over pixels, so that every point is known by hand."""

import math
from functools import partial

import pytest
import torch
from sklearn.metrics import auc
from torch import nn
from torchvision.transforms.v2.functional import normalize

from vitkd.errors import ConfigError
from vitkd.explain.measures.faithfulness import MapsOfClasses, faithfulness, perturbation_curves


class Additive(nn.Module):
    """Logits (Σ weight·value over pixels, 0): the class's probability is the sum's sigmoid."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.as_tensor(weight, dtype=torch.float64)

    def forward(self, images):
        total = (images * self.weight).sum((1, 2, 3))
        return torch.stack([total, torch.zeros_like(total)], 1)


WEIGHT = [[[0.4, -0.2], [1.0, 0.1]]]
MODEL = Additive(WEIGHT)
WHITE = torch.ones(1, 1, 2, 2, dtype=torch.float64)
FIRST = torch.tensor([0])
NORMALISE = partial(normalize, mean=[0.5], std=[0.5])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def perturbation_curve(*arguments, **options):
    (curve,) = perturbation_curves(*arguments, **options)
    return curve


def curve_of(order, maps=WEIGHT, model=MODEL, pixels=WHITE, normalise=lambda pixels: pixels, **options):
    maps = torch.as_tensor(maps, dtype=torch.float64)
    return perturbation_curve(model, pixels, normalise, maps, FIRST, order=order, steps=4, **options)


@pytest.mark.parametrize(
    ("order", "sums"),
    [("positive", [1.3, 0.3, -0.1, -0.2, 0.0]), ("negative", [1.3, 1.5, 1.4, 1.0, 0.0])],
)
def test_a_curve_by_hand(order, sums):
    curve = curve_of(order)

    probability = [sigmoid(total) for total in sums]
    assert curve.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.probability[0].tolist() == pytest.approx(probability, abs=1e-12)
    assert curve.correct[0].tolist() == [total >= 0 for total in sums]
    assert curve.auc.item() == pytest.approx(auc([0, 0.25, 0.5, 0.75, 1], probability), abs=1e-12)


def test_pixels_turn_black_before_normalisation():
    """White is +1 for this model and black is −1; removed after normalising it would be 0, which is grey."""
    curve = curve_of("positive", normalise=NORMALISE)

    sums = [1.3, 1.3 - 2 * 1.0, 1.3 - 2 * 1.4, 1.3 - 2 * 1.5, -1.3]
    assert curve.probability[0].tolist() == pytest.approx([sigmoid(total) for total in sums], abs=1e-12)


def test_a_cell_stands_for_its_patch_of_pixels():
    """4 × 6 pixels under a map of 2 × 3: each removal takes 2 × 2 pixels, in all channels."""
    seen = []

    def spy(pixels):
        seen.append(pixels)
        return pixels

    maps = torch.tensor([[[0.1, 0.9, 0.2], [0.3, 0.0, 0.4]]])
    pixels = torch.rand(1, 3, 4, 6, dtype=torch.float64) + 0.1
    model = Additive(torch.zeros(3, 4, 6))
    perturbation_curve(model, pixels, spy, maps, FIRST, order="positive", steps=6)

    order = [(0, 1), (1, 2), (1, 0), (0, 2), (0, 0), (1, 1)]
    expected = pixels.clone()
    assert torch.equal(seen[0], expected)
    for after, (row, column) in zip(seen[1:], order, strict=True):
        expected[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 0
        assert torch.equal(after, expected)
    assert seen[-1].abs().max() == 0


def test_more_steps_than_cells_are_as_many_as_cells_and_fewer_skip():
    maps = torch.rand(1, 2, 2)
    count = partial(perturbation_curve, MODEL, WHITE, lambda p: p, maps, FIRST, order="positive")

    assert count(steps=10).fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert count(steps=2).fractions.tolist() == [0, 0.5, 1]
    assert count(steps=1).fractions.tolist() == [0, 1]


def test_images_are_followed_each_by_its_own_map_and_class():
    pixels = torch.rand(5, 1, 2, 2, dtype=torch.float64)
    maps, target = torch.rand(5, 2, 2), torch.tensor([0, 1, 1, 0, 1])
    follow = partial(perturbation_curve, MODEL, order="negative", steps=4)

    together = follow(pixels, NORMALISE, maps, target, batch_size=2)

    for i in range(5):
        alone = follow(pixels[i : i + 1], NORMALISE, maps[i : i + 1], target[i : i + 1])
        torch.testing.assert_close(together.probability[i], alone.probability[0])
        assert torch.equal(together.correct[i], alone.correct[0])
        torch.testing.assert_close(together.auc[i], alone.auc[0])


def test_equal_values_do_not_go_from_the_upper_left_on():
    seen = []

    def spy(pixels):
        seen.append(pixels)
        return pixels

    pixels, maps = torch.ones(1, 1, 8, 8, dtype=torch.float64), torch.zeros(1, 8, 8)
    perturbation_curve(Additive(torch.zeros(1, 8, 8)), pixels, spy, maps, FIRST, order="positive", steps=2)

    left = seen[1][0, 0]
    assert left.sum() == 32
    assert 8 < left[:4].sum() < 24


def test_no_gradient_is_kept_and_dropout_is_off(tiny):
    model = tiny(dropout=0.5).build().train()
    arguments = torch.rand(2, 3, 8, 8), lambda p: p, torch.rand(2, 2, 2), torch.tensor([0, 4])

    in_training = perturbation_curve(model, *arguments, order="negative")

    assert model.training
    assert not in_training.probability.requires_grad
    in_evaluation = perturbation_curve(model.eval(), *arguments, order="negative")
    assert torch.equal(in_training.probability, in_evaluation.probability)


def contributions(pixels):
    return (pixels * MODEL.weight)[:, 0]


@pytest.fixture
def found():
    """An additive model explained by its own terms, by their opposite, and by either class's own terms."""
    torch.manual_seed(1)
    pixels = torch.rand(64, 1, 2, 2, dtype=torch.float64)
    terms = contributions(pixels)
    predicted = MODEL(pixels).argmax(1)
    labels = torch.randint(2, (64,))
    signs = [(1 - 2 * classes)[:, None, None] for classes in (predicted, labels)]
    maps = {
        "exact": MapsOfClasses(*(sign * terms for sign in signs)),
        "opposite": MapsOfClasses(*(-sign * terms for sign in signs)),
        "first": terms,
    }
    return faithfulness(MODEL, pixels, lambda p: p, maps, predicted, labels, steps=4), pixels, maps, labels


def test_the_exact_terms_beat_random_order_and_their_opposite_loses(found):
    for order in ("positive", "negative"):
        for of in ("predicted", "target"):
            exact, opposite = (found[0][method][order][of] for method in ("exact", "opposite"))
            assert exact.gap > 3 * exact.gap_error > 0
            assert opposite.gap < 0
            assert found[0]["random"][order][of].gap == 0


def test_the_summary_is_the_mean_of_the_curves(found):
    scores, pixels, maps, labels = found

    curve = perturbation_curve(
        MODEL, pixels, lambda p: p, maps["exact"].target, labels, order="negative", steps=4
    )

    row = scores["exact"]["negative"]["target"]
    assert row.auc == pytest.approx(curve.auc.mean().item(), abs=1e-12)
    assert row.gap == pytest.approx(row.auc - scores["random"]["negative"]["target"].auc, abs=1e-12)
    assert row.probability == pytest.approx(curve.probability.mean(0).tolist())
    assert row.accuracy == pytest.approx(curve.correct.double().mean(0).tolist())
    assert row.fractions == [0, 0.25, 0.5, 0.75, 1]


def test_one_map_for_both_classes_is_as_the_same_map_twice(found):
    scores, pixels, maps, labels = found
    twice = {"first": MapsOfClasses(maps["first"], maps["first"])}
    predicted = MODEL(pixels).argmax(1)

    again = faithfulness(MODEL, pixels, lambda p: p, twice, predicted, labels, steps=4)

    assert again["first"] == scores["first"]
    assert again["random"] == scores["random"]


def test_a_given_random_order_is_the_one_compared_to(found):
    _, pixels, maps, labels = found
    given = {"first": maps["first"], "random": maps["first"]}

    scores = faithfulness(MODEL, pixels, lambda p: p, given, labels, labels)

    assert scores["first"]["positive"]["target"].gap == 0


def test_one_image_has_no_error_bar():
    scores = faithfulness(MODEL, WHITE, NORMALISE, {"terms": torch.tensor(WEIGHT)}, FIRST, FIRST)

    assert scores["terms"]["positive"]["predicted"].gap_error is None


def test_wrong_orders_steps_and_classes_are_reported():
    with pytest.raises(ConfigError, match="order=positiv: did you mean positive"):
        curve_of("positiv")
    with pytest.raises(ConfigError, match="steps=0: must be at least 1"):
        perturbation_curve(MODEL, WHITE, lambda p: p, torch.tensor(WEIGHT), FIRST, order="positive", steps=0)
    with pytest.raises(ConfigError, match="class 2: the model has classes 0 to 1"):
        perturbation_curve(MODEL, WHITE, lambda p: p, torch.tensor(WEIGHT), FIRST + 2, order="positive")
