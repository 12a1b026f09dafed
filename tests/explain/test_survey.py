"""One pass in batches against everything computed at once, and against formulas spelt out here."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import rel_entr

from tests.explain.test_fidelity import fidelity_table
from vitkd.explain.maps.recording import Recording, record
from vitkd.explain.measures.distances import compare
from vitkd.explain.measures.fidelity import MapPair
from vitkd.explain.measures.survey import Comparison, comparable, survey
from vitkd.explain.sources import comparisons
from vitkd.methods.maps.granularity import BlockPair
from vitkd.models import ResNetConfig, Taps
from vitkd.runs.load import Run

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


def comparison(*distilled, alone=None):
    return Comparison("teacher", PAIRS, distilled, PATCH, alone)


def weights(model, images):
    """Block → attention weights, by the other way to have them."""
    scores = model(images, Taps(scores=tuple(range(model.config.depth)))).scores
    return {block: each.softmax(-1) for block, each in scores.items()}


def metrics(row):
    """A row's numbers, for approximate comparison."""
    parts = {name: getattr(row, name) for name in ("metrics", "teacher", "alone", "permuted")}
    return {f"{part}/{name}": v for part, each in parts.items() for name, v in (each or {}).items()}


@torch.no_grad()
def test_answers_are_those_of_a_plain_forward_pass(models, images):
    seen = survey(models, batches(images, 4, 1, 4), {})

    assert torch.equal(seen.labels, LABELS)
    assert torch.equal(seen.numbers, NUMBERS)
    for name, model in models.items():
        probabilities = model(images).logits.softmax(-1)
        assert torch.equal(seen.predicted[name], probabilities.argmax(-1))
    assert not seen.fidelity


@torch.no_grad()
@pytest.mark.parametrize("alone", [None, "alone"])
def test_rows_over_unequal_batches_are_those_of_all_images_at_once(alone, models, images):
    comparisons = {"student": comparison(True, False, True, alone=alone)}

    (found,) = survey(models, batches(images, 2, 6, 1), comparisons).fidelity.values()

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
        assert metrics(ours) == pytest.approx(metrics(theirs), rel=1e-9, abs=1e-12)
        assert (ours.alone is None) == (alone is None)
    assert found.distilled == (True, False, True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("distilled", "counted"),
    [((True, False, False), [0]), ((True, False, True), [0, 2]), ((False, False, False), [0, 1, 2])],
)
def test_divergence_counts_distilled_maps_or_all_where_none_is(distilled, counted, models, images):
    comparisons = {"student": comparison(*distilled)}

    found = survey(models, batches(images, 5, 4), comparisons).fidelity["student"].divergence

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
@pytest.mark.parametrize("alone", [None, "alone"])
def test_cka_of_tokens_is_that_by_gram_matrices(alone, models, images):
    comparisons = {"student": comparison(True, True, True, alone=alone)}

    found = survey(models, batches(images, 3, 1, 5), comparisons).fidelity["student"].cka

    tokens = {name: model.trace(images).tokens for name, model in models.items()}
    # Each image beside the one before it; the first has none, so the last of its batch stands in.
    another = [2, *range(8)]

    def expected(name, block, of_teacher, order=slice(None)):
        theirs = tokens["teacher"][of_teacher][order]
        return cka(tokens[name][block].flatten(0, 1).numpy(), theirs.flatten(0, 1).numpy())

    assert found.keys() == {(0, 1), (2, 3)}
    for (ours, theirs), alignment in found.items():
        assert alignment.value == pytest.approx(expected("student", ours, theirs), rel=1e-9)
        assert alignment.other_images == pytest.approx(expected("student", ours, theirs, another), rel=1e-9)
        assert alignment.other_images < alignment.value
        if alone is None:
            assert alignment.alone is None
        else:
            assert alignment.alone == pytest.approx(expected("alone", ours, theirs), rel=1e-9)


@torch.no_grad()
def test_one_image_has_no_other(models, images):
    comparisons = {"student": comparison(True, True, True)}

    one = survey(models, [(images[:1], LABELS[:1], NUMBERS[:1])], comparisons).fidelity["student"].cka

    assert all(np.isnan(each.other_images) and each.value > 0 for each in one.values())


@torch.no_grad()
def test_how_many_images_are_added_at_once_changes_nothing(models, images, monkeypatch):
    comparisons = {"student": comparison(True, True, True, alone="alone")}
    at_once = survey(models, batches(images, 9), comparisons).fidelity["student"].cka
    monkeypatch.setattr("vitkd.explain.measures.survey.CHUNK", 2)

    in_parts = survey(models, batches(images, 9), comparisons).fidelity["student"].cka

    for blocks, alignment in at_once.items():
        assert in_parts[blocks] == pytest.approx(alignment, rel=1e-9)


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

    found = survey(models, batches(images), comparisons).fidelity

    assert [row.metrics["js"] for row in found["alone"].rows] == pytest.approx([0] * 3, abs=1e-12)
    assert [row.metrics["top_k_iou"] for row in found["alone"].rows] == [1, 1, 1]
    assert [each.value for each in found["alone"].cka.values()] == pytest.approx([1] * 3)
    assert min(row.metrics["js"] for row in found["student"].rows) > 1e-6


def test_nothing_is_kept_for_a_backward_pass(models, images):
    seen = survey(models, batches(images), {"student": comparison(True, True, True)})

    assert not seen.fidelity["student"].divergence.requires_grad
    assert not any(each.requires_grad for each in seen.reach.values())


def recording_of(rows, prefix, *, sees_itself=True, readers=(0,)):
    """A recording of one image, block and head: given weights, and tokens that are their numbers."""
    weights = torch.tensor(rows, dtype=torch.float64)
    tokens = torch.arange(len(weights), dtype=torch.float64)[None, :, None]
    side = (1, len(weights) - prefix)
    return Recording(torch.zeros(1, 2), (weights[None, None],), (tokens,), prefix, side, readers, sees_itself)


def test_a_token_that_the_other_lacks_is_left_out_and_rows_are_whole_again():
    # CLS, distillation token and two patches, beside CLS and two patches.
    rows = [[0.1, 0.5, 0.1, 0.3], [0.25] * 4, [0.2, 0.2, 0.2, 0.4], [0.0, 0.9, 0.1, 0.0]]
    other = recording_of([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]], prefix=1)

    mine, its = comparable(recording_of(rows, prefix=2, readers=(0, 1)), other)

    assert its is other
    expected = [[0.2, 0.2, 0.6], [0.25, 0.25, 0.5], [0.0, 1.0, 0.0]]
    torch.testing.assert_close(mine.weights[0][0, 0], torch.tensor(expected, dtype=torch.float64))
    assert mine.tokens[0].flatten().tolist() == [0, 2, 3]
    assert (mine.prefix, [*mine.readers]) == (1, [0])


def test_what_tokens_give_to_themselves_is_left_out_where_the_others_may_not():
    local = recording_of([[0.0, 0.4, 0.6], [0.5, 0.0, 0.5], [0.1, 0.9, 0.0]], prefix=1, sees_itself=False)
    plain = recording_of([[0.5, 0.1, 0.4], [0.2, 0.6, 0.2], [0.0, 0.0, 1.0]], prefix=1)

    mine, its = comparable(local, plain)

    torch.testing.assert_close(mine.weights[0], local.weights[0])
    # The last token looked at itself alone: nothing is left, and nothing is invented.
    expected = [[0.0, 0.2, 0.8], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(its.weights[0][0, 0], torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(its.tokens[0], plain.tokens[0])


@pytest.mark.parametrize("changes", [{}, {"attention": "lsa"}, {"distillation_token": True}])
@torch.no_grad()
def test_recordings_of_alike_models_are_not_touched(changes, tiny, images):
    recordings = [record(tiny(**changes).build().double(), images) for _ in range(3)]

    assert all(mine is own for mine, own in zip(comparable(*recordings), recordings, strict=True))


@pytest.mark.parametrize("student", [{}, {"distillation_token": True}, {"attention": "lsa"}])
@torch.no_grad()
def test_a_teacher_of_other_patches_is_resized(student, tiny, images):
    """From 4×4 patches to 2×2 bilinear means: of four queries the mean, of four keys the sum."""
    of_four = np.zeros((5, 17))
    of_four[0, 0] = 1
    for i in range(16):
        of_four[1 + i // 8 * 2 + i % 4 // 2, 1 + i] = 1
    mean_of_four = of_four / of_four.sum(1, keepdims=True)
    models = {
        "teacher": tiny(depth=4, num_heads=3, patch_size=2).build().double().eval(),
        "student": tiny(**student).build().double().eval(),
    }

    (found,) = survey(
        models, batches(images, 4, 5), {"student": comparison(True, True, True)}
    ).fidelity.values()

    drop, mask = [1] if "distillation_token" in student else [], "attention" in student
    q = numpy_weights(models["student"], images, drop, mask)
    for pair, row in zip(PAIRS, found.rows, strict=True):
        mine = q[pair.student_block][:, pair.student_head]
        theirs = models["teacher"].trace(images).weights[pair.teacher_block][:, [*pair.teacher_heads]]
        target = mean_of_four @ theirs.numpy() @ of_four.T
        if mask:
            target[..., range(5), range(5)] = 0
            target = target / target.sum(-1, keepdims=True)
        kl = rel_entr(target.mean(1), mine).sum(-1).mean()
        assert row.metrics["kl"] == pytest.approx(kl, rel=1e-6)
        rows = [each[:, 0, 1:] / each[:, 0, 1:].sum(-1, keepdims=True) for each in (mine, target.mean(1))]
        assert row.metrics["cls_overlap"] == pytest.approx(np.minimum(*rows).sum(-1).mean(), rel=1e-6)
    kept = [0, 2, 3, 4, 5] if drop else [*range(5)]
    ours = models["student"].trace(images).tokens[2][:, kept].flatten(0, 1).numpy()
    theirs = (mean_of_four @ models["teacher"].trace(images).tokens[3].numpy()).reshape(len(ours), -1)
    assert found.cka[2, 3].value == pytest.approx(cka(ours, theirs), rel=1e-6)


def test_patches_that_are_read_are_found_where_they_stand_afterwards():
    pooled = recording_of([[0.25] * 4] * 4, prefix=2, readers=range(2, 4))

    (mine, _) = comparable(pooled, recording_of([[0.5, 0.25, 0.25]] * 3, prefix=1))

    assert [*mine.readers] == [1, 2]


def numpy_weights(model, images, drop, mask):
    """Block → weights as numpy, without token `drop` and without what tokens give to themselves."""
    found = []
    for each in model.trace(images).weights:
        each = np.delete(np.delete(each.numpy(), drop, -1), drop, -2) if drop else each.numpy().copy()
        if mask:
            each[..., range(each.shape[-1]), range(each.shape[-1])] = 0
        found.append(each / each.sum(-1, keepdims=True))
    return found


UNLIKE = [
    # Student, teacher, whether the student's second token goes, whether the diagonals go.
    ({"distillation_token": True}, {}, True, False),
    ({}, {"attention": "lsa"}, False, True),
    ({"attention": "lsa", "distillation_token": True, "tokenizer": "spt"}, {}, True, True),
]


@torch.no_grad()
@pytest.mark.parametrize(("ours", "theirs", "drop", "mask"), UNLIKE)
def test_fidelity_of_models_that_differ_by_design(ours, theirs, drop, mask, tiny, images):
    models = {
        "teacher": tiny(depth=4, num_heads=3, **theirs).build().double().eval(),
        "student": tiny(**ours).build().double().eval(),
        "alone": tiny(**ours).build().double().eval(),
    }

    (found,) = survey(
        models, batches(images, 4, 5), {"student": comparison(True, True, True, alone="alone")}
    ).fidelity.values()

    q = numpy_weights(models["student"], images, [1] if drop else [], mask)
    b = numpy_weights(models["alone"], images, [1] if drop else [], mask)
    p = numpy_weights(models["teacher"], images, [], mask)
    for pair, row in zip(PAIRS, found.rows, strict=True):
        target = p[pair.teacher_block][:, [*pair.teacher_heads]].mean(1)
        for model, metrics in ((q, row.metrics), (b, row.alone)):
            mine = model[pair.student_block][:, pair.student_head]
            kl = rel_entr(target, mine).sum(-1).mean()
            assert metrics["kl"] == pytest.approx(kl, rel=1e-9)
            rows = [each[:, 0, 1:] / each[:, 0, 1:].sum(-1, keepdims=True) for each in (mine, target)]
            assert metrics["cls_overlap"] == pytest.approx(np.minimum(*rows).sum(-1).mean(), rel=1e-9)
    of_student, of_teacher = (models[name].trace(images).tokens for name in ("student", "teacher"))
    kept = [0, 2, 3, 4, 5] if drop else [*range(5)]
    expected = cka(of_student[2][:, kept].flatten(0, 1).numpy(), of_teacher[3].flatten(0, 1).numpy())
    assert found.cka[2, 3].value == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_where_both_have_a_distillation_token_class_rows_are_the_mean_of_both(tiny, images):
    names = ("teacher", "student")
    models = {name: tiny(distillation_token=True).build().double().eval() for name in names}
    pairs = [MapPair(1, 0, 2, (1,))]

    (found,) = survey(
        models, batches(images), {"student": Comparison("teacher", pairs, [True], PATCH)}
    ).fidelity.values()

    maps = [
        models["student"].trace(images).weights[1][:, 0],
        models["teacher"].trace(images).weights[2][:, 1],
    ]
    rows = [(each[:, 0, 2:] + each[:, 1, 2:]).numpy() for each in maps]
    rows = [each / each.sum(-1, keepdims=True) for each in rows]
    assert found.rows[0].metrics["cls_overlap"] == pytest.approx(np.minimum(*rows).sum(-1).mean(), rel=1e-9)


@torch.no_grad()
def test_a_baseline_of_another_design_is_brought_to_what_all_have(tiny, images):
    models = {
        "teacher": tiny(depth=4, num_heads=3, distillation_token=True).build().double().eval(),
        "student": tiny(distillation_token=True).build().double().eval(),
        "alone": tiny().build().double().eval(),
    }

    (found,) = survey(
        models, batches(images), {"student": comparison(True, True, True, alone="alone")}
    ).fidelity.values()

    theirs = numpy_weights(models["teacher"], images, [1], False)[3][:, 1]
    mine = numpy_weights(models["alone"], images, [], False)[2][:, 1]
    kl = (theirs * np.log(theirs / mine)).sum(-1).mean()
    assert found.rows[1].alone["kl"] == pytest.approx(kl, rel=1e-9)


@torch.no_grad()
def test_a_teacher_without_maps_answers_and_no_more(tiny, images):
    network = ResNetConfig(image_size=8, channels=3, num_classes=5, stem="small").build().double().eval()
    models = {"teacher": network, "student": tiny().build().double().eval()}

    seen = survey(models, batches(images, 4, 5), {})

    assert torch.equal(seen.predicted["teacher"], network(images).logits.argmax(-1))
    assert seen.predicted.keys() == {"teacher", "student"}
    assert seen.reach.keys() == {"student"}


def test_maps_are_compared_with_what_they_learned_from(tiny):
    """Weighted heads by their weights, and others by what they would have learned from."""
    student, teacher = tiny(num_heads=2).build(), tiny(depth=6, num_heads=4).build()
    learned = BlockPair(
        2, 5, (1, 0), ((0, 1, 2, 3),) * 2, weights=((0.5, 0.0, -1.0, 1.0), (1.0, 2.0, 3.0, 4.0))
    )
    pairs = json.loads(json.dumps([asdict(learned), asdict(BlockPair(0, 1, (0,), ((2, 3),)))]))

    found, _ = comparisons({"student": Run(Path(), None, student, teacher, pairs, "last")})

    assert found["student"].pairs == [
        MapPair(0, 0, 1, (2, 3)),
        MapPair(0, 1, 1, (1,)),
        MapPair(1, 0, 3, (0,)),
        MapPair(1, 1, 3, (1,)),
        MapPair(2, 0, 5, (0, 1, 2, 3), (1.0, 2.0, 3.0, 4.0)),
        MapPair(2, 1, 5, (0, 1, 2, 3), (0.5, 0.0, -1.0, 1.0)),
    ]
    assert found["student"].distilled == [True, False, False, False, True, True]
