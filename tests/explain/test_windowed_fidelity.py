"""Fidelity of maps within windows against that of T×T matrices, of Swins written over all pairs of tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor

from tests.explain.test_survey import cka
from tests.explain.test_windows import SINGLE, Dense, densely, images, swin
from vitkd.explain.maps.recording import record
from vitkd.explain.measures.distances import compare, entropy, mean_distance
from vitkd.explain.measures.fidelity import FidelityRow, MapPair
from vitkd.explain.measures.survey import Comparison, FidelityResult, survey
from vitkd.explain.sources import comparable_pairs
from vitkd.models import ViTConfig

TEACHER = {"num_heads": [4, 6], "embed_dim": 24}
PATCH = 2
PAIRS = [
    *(MapPair(0, 0, 0, (0,)), MapPair(1, 1, 1, (2,)), MapPair(1, 0, 1, (0, 3))),
    *(MapPair(2, 2, 2, (5,)), MapPair(3, 0, 3, (1, 2, 4))),
]
DISTILLED = (True, False, True, False, True)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"teacher": swin(**TEACHER), "student": swin(), "alone": swin()}


@pytest.fixture(scope="module")
def dense(models: dict[str, Any]) -> dict[str, Dense]:
    with torch.no_grad():
        return {name: densely(model, images()) for name, model in models.items()}


@pytest.fixture(scope="module")
def found(models: dict[str, Any]) -> FidelityResult:
    """In two batches of an image each."""
    comparison = Comparison("teacher", PAIRS, DISTILLED, PATCH, "alone")
    batches = ((image[None], torch.zeros(1), torch.zeros(1)) for image in images())
    return survey(models, batches, {"student": comparison}).fidelity["student"]


def expected_of(student: Tensor, teacher: Tensor, grid: tuple[int, int]) -> dict[str, float]:
    """Every metric of dense maps [B, T, T], all of whose tokens are read."""
    tokens = student.shape[-1]
    metrics = compare(student, teacher, prefix=0, readers=range(tokens))
    pixels = PATCH * 8 / grid[0]
    metrics |= {"entropy": entropy(student), "mean_distance": mean_distance(student, grid, pixels, prefix=0)}
    return {name: values.mean().item() for name, values in metrics.items()}


def maps_of(row: FidelityRow, dense: dict[str, Dense], name: str) -> Tensor:
    """[B, T, T] of this row's student map, or of the mean teacher map."""
    if name == "teacher":
        return dense[name].weights[row.teacher_block][:, row.teacher_heads].mean(1)
    return dense[name].weights[row.student_block][:, row.student_head]


def test_every_metric_is_that_of_dense_matrices(found, dense):
    assert [MapPair(*row_pair(row)) for row in found.rows] == PAIRS
    for row in found.rows:
        teacher, grid = maps_of(row, dense, "teacher"), dense["teacher"].grids[row.teacher_block]
        for name, metrics in (("student", row.metrics), ("alone", row.alone)):
            expected = expected_of(maps_of(row, dense, name), teacher, grid)
            assert metrics == pytest.approx(expected, rel=1e-8)
        # Not by vitkd's own comparison of matrices: rows of other windows' zeros add nothing.
        kl = rel_entr(teacher.numpy(), maps_of(row, dense, "student").numpy()).sum(-1).mean()
        assert row.metrics["kl"] == pytest.approx(kl, rel=1e-8)
        assert row.teacher["entropy"] == pytest.approx(entropy(teacher).mean().item(), rel=1e-8)


def row_pair(row: FidelityRow) -> tuple[Any, ...]:
    return row.student_block, row.student_head, row.teacher_block, row.teacher_heads


def test_permuted_heads_are_all_others_of_that_block(found, dense):
    row, weights = found.rows[0], dense["teacher"].weights[0]
    student = maps_of(row, dense, "student")

    others = [
        compare(student, weights[:, head], prefix=0, readers=range(64))["js"].mean() for head in (1, 2, 3)
    ]

    assert row.permuted["js"] == pytest.approx(torch.stack(others).mean().item(), rel=1e-8)


def test_divergence_is_the_mean_of_the_distilled_maps(found, dense):
    each = [
        compare(maps_of(row, dense, "student"), maps_of(row, dense, "teacher"), prefix=0)["js"]
        for row, counts in zip(found.rows, DISTILLED, strict=True)
        if counts
    ]

    torch.testing.assert_close(found.divergence, torch.stack(each).mean(0), rtol=1e-8, atol=0)


def test_tokens_are_aligned_block_by_block(models, found):
    with torch.no_grad():
        tokens = {name: record(model, images()).tokens for name, model in models.items()}

    assert [*found.cka] == [(block, block) for block in range(4)]
    for (block, _), aligned in found.cka.items():
        of_student, of_alone, of_teacher = (
            tokens[name][block].flatten(0, 1).numpy() for name in ("student", "alone", "teacher")
        )
        assert aligned.value == pytest.approx(cka(of_student, of_teacher), rel=1e-6)
        assert aligned.alone == pytest.approx(cka(of_alone, of_teacher), rel=1e-6)


@pytest.mark.parametrize("is_student", [True, False])
def test_a_single_window_is_compared_with_a_vit_of_as_many_patches(is_student):
    """Without the class token, as training does; the rest of each of the ViT's rows is scaled to sum 1."""
    shape = {"patch_size": 2, "embed_dim": 12, "depth": 3, "num_heads": 2, "head_dim": 4, "mlp_dim": 16}
    windowed, vit = swin(**SINGLE), ViTConfig(16, 3, 5, **shape).build().double().eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    models = {"student": windowed, "teacher": vit} if is_student else {"student": vit, "teacher": windowed}
    pair = MapPair(2, 1, 1, (0,))
    batch = (images(), torch.zeros(2), torch.zeros(2))

    pairs, notes = comparable_pairs("student", models["student"], models["teacher"], {pair: True})
    seen = survey(models, [batch], {"student": Comparison("teacher", [*pairs], [True], PATCH)})

    vits, swins = ("teacher", "student") if is_student else ("student", "teacher")
    assert notes == [
        f"Compared without the class token of {vits}, which {swins} has not; "
        "the rest of each row is scaled to sum 1."
    ]
    with torch.no_grad():
        maps = {
            "student": record(models["student"], images()).weights[2][:, 1],
            "teacher": record(models["teacher"], images()).weights[1][:, 0],
        }
    patches = maps[vits][:, 1:, 1:]
    maps[vits] = patches / patches.sum(-1, keepdim=True)
    student, teacher = maps["student"].numpy(), maps["teacher"].numpy()
    (row,) = seen.fidelity["student"].rows
    assert row.metrics["kl"] == pytest.approx(rel_entr(teacher, student).sum(-1).mean(), rel=1e-8)
    overlap = np.minimum(student.mean(1), teacher.mean(1)).sum(-1).mean()
    assert row.metrics["cls_overlap"] == pytest.approx(overlap, rel=1e-8)


NOT_COMPARED = "Blocks {} of student and teacher are shown, not compared: {}."
ALL = {MapPair(block, 0, block, (0,)): block == 1 for block in range(4)}


@pytest.mark.parametrize(
    ("teacher", "kept", "remarks"),
    [
        (TEACHER, [0, 1, 2, 3], []),
        (
            {"window_size": [2, 4]},
            [],
            [("0 and 0, 1 and 1, 2 and 2, 3 and 3", "windows of 4×2 patches are not those of 2×4")],
        ),
        (
            {"depths": [1, 3]},
            [0],
            [
                ("1 and 1", "8×8 patches are not 4×4"),
                ("2 and 2, 3 and 3", "only one of the two shifts its windows"),
            ],
        ),
    ],
    ids=["alike", "other windows", "other stages"],
)
def test_blocks_that_cannot_be_aligned_are_left_out_with_the_reason(teacher, kept, remarks):
    pairs, notes = comparable_pairs("student", swin(), swin(**teacher), ALL)

    assert {pair.student_block: learned for pair, learned in pairs.items()} == {
        block: block == 1 for block in kept
    }
    assert notes == [NOT_COMPARED.format(*each) for each in remarks]


def test_of_models_without_equal_windows_nothing_is_compared(tiny):
    vit, windowed = tiny().build(), swin()
    for student, teacher in ((vit, windowed), (windowed, vit)):
        pairs, (said,) = comparable_pairs("student", student, teacher, {MapPair(0, 0, 0, (0,)): True})

        assert not pairs
        assert said.startswith("Blocks 0 and 0 of student and teacher are shown, not compared: ")
        assert "8×8" in said
