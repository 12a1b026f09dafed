"""Each loss against arithmetic by hand, SciPy and PyTorch's own functions, in float64."""

from itertools import product
from math import log

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from torch import Tensor
from torch.nn import functional as F

from vitkd.errors import ConfigError
from vitkd.methods.maps.losses import CE, JS, KL, MSE, AttentionLoss, ReverseKL

# Row by row, softmax gives p = (1/4, 3/4), (1/2, 1/2) and q = (1/2, 1/2), (3/4, 1/4).
TEACHER = [[0, log(3)], [0, 0]]
STUDENT = [[0, 0], [log(3), 0]]

BY_HAND = {
    "mse": (MSE(), (log(3) ** 2 + log(3) ** 2) / 4),
    # Each row's differences are (0, ∓log 3); less their mean, ±log 3 / 2.
    "mse centred": (MSE(center="row"), 4 * (log(3) / 2) ** 2 / 4),
    "ce": (CE(), (log(2) + (1 / 2 * log(4 / 3) + 1 / 2 * log(4))) / 2),
    "kl": (
        KL(),
        ((1 / 4 * log((1 / 4) / (1 / 2)) + 3 / 4 * log((3 / 4) / (1 / 2)))
         + (1 / 2 * log((1 / 2) / (3 / 4)) + 1 / 2 * log((1 / 2) / (1 / 4)))) / 2,
    ),
    "reverse kl": (
        ReverseKL(),
        ((1 / 2 * log((1 / 2) / (1 / 4)) + 1 / 2 * log((1 / 2) / (3 / 4)))
         + (3 / 4 * log((3 / 4) / (1 / 2)) + 1 / 4 * log((1 / 4) / (1 / 2)))) / 2,
    ),
    # The rows mix to m = (3/8, 5/8) and (5/8, 3/8), and give the same value.
    "js": (
        JS(),
        (1 / 4 * log((1 / 4) / (3 / 8)) + 3 / 4 * log((3 / 4) / (5 / 8))) / 2
        + (1 / 2 * log((1 / 2) / (3 / 8)) + 1 / 2 * log((1 / 2) / (5 / 8))) / 2,
    ),
}  # fmt: skip
HAND = pytest.mark.parametrize(("loss", "expected"), BY_HAND.values(), ids=BY_HAND.keys())


def one_map(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def compare(loss: AttentionLoss, student: Tensor, teacher: Tensor) -> Tensor:
    return loss(student, loss.target(teacher))


@HAND
def test_by_hand(loss, expected):
    value = compare(loss, one_map(STUDENT), one_map(TEACHER))

    assert value.shape == (1, 1)
    assert value.item() == pytest.approx(expected, abs=1e-14)


@HAND
def test_each_image_has_the_mean_over_its_rows_and_never_batchmean(loss, expected):
    """Half of the images as above, half with student = teacher; two student maps, the second learnt."""
    student = one_map(STUDENT).repeat(6, 2, 1, 1)
    teacher = one_map(TEACHER).repeat(6, 2, 1, 1)
    student[3:, 0] = teacher[3:, 0]
    student[:, 1] = teacher[:, 1]
    learnt = compare(loss, one_map(TEACHER), one_map(TEACHER)).item()

    value = compare(loss, student, teacher)

    by_hand = torch.tensor([[expected, learnt]] * 3 + [[learnt, learnt]] * 3, dtype=torch.float64)
    torch.testing.assert_close(value, by_hand, atol=1e-14, rtol=0)
    assert value.mean(0).tolist() == pytest.approx([(expected + learnt) / 2, learnt], abs=1e-14)


@pytest.mark.parametrize("kind", [CE, KL, ReverseKL, JS])
def test_temperature_divides_both_scores_and_scales_nothing(kind):
    value = compare(kind(temperature=2.0), 2 * one_map(STUDENT), 2 * one_map(TEACHER))

    assert value.item() == pytest.approx(
        compare(kind(), one_map(STUDENT), one_map(TEACHER)).item(), abs=1e-14
    )


def random_scores() -> tuple[Tensor, Tensor]:
    """[B 4, P 3, N 5, N 5] of the student and of the teacher."""
    return 3 * torch.randn(4, 3, 5, 5, dtype=torch.float64), 3 * torch.randn(4, 3, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_scipys_divergences(temperature):
    student, teacher = random_scores()
    q, p = ((scores / temperature).softmax(-1).numpy() for scores in (student, teacher))
    oracles = {
        KL: entropy(p, q, axis=-1),
        ReverseKL: entropy(q, p, axis=-1),
        CE: entropy(p, q, axis=-1) + entropy(p, axis=-1),
        JS: jensenshannon(p, q, axis=-1) ** 2,
    }
    for kind, rows in oracles.items():
        value = compare(kind(temperature=temperature), student, teacher)
        assert value.numpy() == pytest.approx(rows.mean(-1), abs=1e-12), kind.__name__
        assert value.mean(0).tolist() == pytest.approx(rows.mean((0, 2)).tolist(), abs=1e-12), kind.__name__


def test_pytorchs_own_functions():
    student, teacher = random_scores()
    values = {kind: compare(kind(), student, teacher) for kind in (MSE, CE, KL)}
    # Image by image, and all images at once.
    for m, images in product(range(3), [*(slice(i, i + 1) for i in range(4)), slice(4)]):
        s, t = student[images, m].flatten(0, 1), teacher[images, m].flatten(0, 1)  # [rows, keys]
        ours = {kind: value[images, m].mean().item() for kind, value in values.items()}
        kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)
        assert ours[KL] == pytest.approx(kl.item(), abs=1e-12)
        assert ours[CE] == pytest.approx(F.cross_entropy(s, t.softmax(-1)).item(), abs=1e-12)
        assert ours[MSE] == pytest.approx(F.mse_loss(s, t).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        *((KL, "temperature", t) for t in (0.0, -1.0, float("inf"), float("nan"))),
        (MSE, "center", "column"),
        (JS, "reduction", "batchmean"),
        (MSE, "reduction", "batchmean"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(kind, setting, value):
    with pytest.raises(ConfigError, match=rf"^{setting}={value}: [^\n]+$"):
        kind(**{setting: value})
