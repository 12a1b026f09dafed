"""One pass in batches against everything computed at once, and against formulas spelt out here."""

import numpy as np
import pytest
import torch

from vitkd.explain.fidelity import MapPair, compare, fidelity_table
from vitkd.explain.survey import Comparison, survey

PATCH = 4
PAIRS = [MapPair(0, 0, 1, (0, 2)), MapPair(2, 1, 3, (1,)), MapPair(2, 0, 3, (2,))]


@pytest.fixture
def models(tiny):
    """A teacher and two students of its grid, in float64."""
    shapes = {"teacher": tiny(depth=4, num_heads=3), "student": tiny(), "alone": tiny()}
    return {name: shape.build().double().eval() for name, shape in shapes.items()}


@pytest.fixture
def images():
    return torch.randn(9, 3, 8, 8, dtype=torch.float64)


LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])
NUMBERS = torch.tensor([40, 2, 17, 5, 33, 8, 21, 0, 9])


def batches(images, *sizes):
    return zip(*(each.split(sizes or len(images)) for each in (images, LABELS, NUMBERS)), strict=True)


def comparison(*learnt, alone=None):
    return Comparison("teacher", PAIRS, learnt, PATCH, alone)


def weights(model, images):
    """Block → attention weights, by the other way to have them."""
    scores = model.scores(images, range(model.config.depth))
    return {block: each.softmax(-1) for block, each in scores.items()}


def figures(row):
    """A row's numbers, for approximate comparison."""
    parts = {name: getattr(row, name) for name in ("figures", "teacher", "alone", "permuted")}
    return {f"{part}/{name}": v for part, each in parts.items() for name, v in (each or {}).items()}


@torch.no_grad()
def test_answers_are_those_of_a_plain_forward_pass(models, images):
    seen = survey(models, batches(images, 4, 1, 4), {})

    assert torch.equal(seen.labels, LABELS)
    assert torch.equal(seen.numbers, NUMBERS)
    for name, model in models.items():
        probabilities = model(images).logits.softmax(-1)
        assert torch.equal(seen.predicted[name], probabilities.argmax(-1))
        torch.testing.assert_close(
            seen.confidence[name], probabilities.amax(-1), rtol=1e-5, atol=0, check_dtype=False
        )
    assert not seen.alikeness


@torch.no_grad()
@pytest.mark.parametrize("alone", [None, "alone"])
def test_rows_over_unequal_batches_are_those_of_all_images_at_once(alone, models, images):
    comparisons = {"student": comparison(True, False, True, alone=alone)}

    (found,) = survey(models, batches(images, 2, 6, 1), comparisons).alikeness.values()

    expected = fidelity_table(
        weights(models["student"], images),
        weights(models["teacher"], images),
        PAIRS,
        alone=weights(models[alone], images) if alone else None,
        grid=(2, 2),
        patch_size=PATCH,
    )
    for ours, theirs in zip(found.rows, expected, strict=True):
        assert ours.images == len(images)
        assert (ours.student_block, ours.student_head) == (theirs.student_block, theirs.student_head)
        assert (ours.teacher_block, ours.teacher_heads) == (theirs.teacher_block, theirs.teacher_heads)
        assert figures(ours) == pytest.approx(figures(theirs), rel=1e-9, abs=1e-12)
        assert (ours.alone is None) == (alone is None)
    assert found.learnt == (True, False, True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("learnt", "counted"),
    [((True, False, False), [0]), ((True, False, True), [0, 2]), ((False, False, False), [0, 1, 2])],
)
def test_divergence_counts_distilled_maps_or_all_where_none_is(learnt, counted, models, images):
    comparisons = {"student": comparison(*learnt)}

    found = survey(models, batches(images, 5, 4), comparisons).alikeness["student"].divergence

    ours, theirs = weights(models["student"], images), weights(models["teacher"], images)
    each = [
        compare(ours[p.student_block][:, p.student_head], theirs[p.teacher_block][:, p.teacher_heads].mean(1))
        for p in PAIRS
    ]
    expected = sum(each[i]["js"] for i in counted) / len(counted)
    torch.testing.assert_close(found, expected)


def cka(x, y):
    """By Gram matrices, as Kornblith et al. 2019 define it."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = (centre @ z @ z.T @ centre for z in (x, y))
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


@torch.no_grad()
def test_cka_of_tokens_is_that_by_gram_matrices(models, images):
    found = survey(models, batches(images, 3, 6), {"student": comparison(True, True, True)})

    ours, theirs = (models[name].trace(images).tokens for name in ("student", "teacher"))
    expected = {
        (i, j): cka(ours[i].flatten(0, 1).numpy(), theirs[j].flatten(0, 1).numpy())
        for i, j in [(0, 1), (2, 3)]
    }
    assert found.alikeness["student"].cka == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_reach_is_the_mean_distance_over_that_of_uniform_attention(models, images):
    seen = survey(models, batches(images, 1, 8), {})

    # Of 2×2 patches each has itself, two neighbours a side away and one across.
    distance = np.array([[np.hypot(i // 2 - j // 2, i % 2 - j % 2) for j in range(4)] for i in range(4)])
    for name, model in models.items():
        for block, each in weights(model, images).items():
            patches = each[..., 1:, 1:].numpy()
            rows = patches / patches.sum(-1, keepdims=True)
            expected = (rows * distance).sum(-1).mean((0, 2)) / distance.mean()
            np.testing.assert_allclose(seen.reach[name][block], expected, rtol=1e-9)


def test_a_student_that_is_its_teacher_is_fully_faithful(models, images):
    pairs = [MapPair(block, 0, block, (0,)) for block in range(3)]
    comparisons = {
        "student": Comparison("alone", pairs, [False] * 3, PATCH),
        "alone": Comparison("alone", pairs, [True] * 3, PATCH),
    }

    found = survey(models, batches(images), comparisons).alikeness

    assert [row.figures["js"] for row in found["alone"].rows] == pytest.approx([0] * 3, abs=1e-12)
    assert [row.figures["top_k_iou"] for row in found["alone"].rows] == [1, 1, 1]
    assert [*found["alone"].cka.values()] == pytest.approx([1] * 3)
    assert min(row.figures["js"] for row in found["student"].rows) > 1e-6


def test_nothing_is_kept_for_a_backward_pass(models, images):
    seen = survey(models, batches(images), {"student": comparison(True, True, True)})

    assert not seen.alikeness["student"].divergence.requires_grad
    assert not any(each.requires_grad for each in (*seen.confidence.values(), *seen.reach.values()))
