"""Fidelity against scipy, against values by hand, and its baselines against every permutation."""

import json
import math
from dataclasses import asdict
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.stats import entropy as scipy_entropy
from scipy.stats import spearmanr

from vitkd.errors import ConfigError
from vitkd.explain.measures.distances import (
    COMPARISONS,
    compare,
    entropy,
    locality,
    mean_distance,
    patch_distances,
    uniform_distance,
)
from vitkd.explain.measures.fidelity import FidelitySums, other_heads

PLACE = {"grid": (2, 3), "patch_size": 4}


def maps(*shape, tokens=7, spread=1.5):
    return (spread * torch.randn(*shape, tokens, tokens, dtype=torch.float64)).softmax(-1)


def model(blocks=2, images=5, heads=3, **kwargs):
    """Weights of every block."""
    return [maps(images, heads, **kwargs) for _ in range(blocks)]


def fidelity_table(student, teacher, pairs, alone=None, **place):
    """The table of maps that are all in memory."""
    sums = FidelitySums(pairs, **place)
    sums.add(student, teacher, alone)
    return sums.table()


def patch_rows(weights, prefix=1):
    """CLS rows over patches, summing to 1, as numpy."""
    row = weights[..., 0, prefix:].numpy()
    return row / row.sum(-1, keepdims=True)


def everywhere(function, *arrays):
    """`function` of each pair of rows along the last axis."""
    shape = arrays[0].shape[:-1]
    flat = [array.reshape(-1, array.shape[-1]) for array in arrays]
    return np.array([function(*rows) for rows in zip(*flat, strict=True)]).reshape(shape)


class TestCompare:
    def test_divergences_are_scipys(self):
        ours, theirs = maps(4, 3), maps(4, 3)
        got = compare(ours, theirs)
        q, p = ours.numpy(), theirs.numpy()
        np.testing.assert_allclose(got["kl"], rel_entr(p, q).sum(-1).mean(-1), rtol=1e-12)
        squared = jensenshannon(p, q, axis=-1) ** 2
        np.testing.assert_allclose(got["js"], squared.mean(-1), rtol=1e-12)

    def test_the_divergence_is_of_the_student_from_the_teacher(self):
        # By hand: the teacher looks at token 0 alone, the student gives it a quarter.
        theirs = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        ours = torch.tensor([[[0.25, 0.75], [0.25, 0.75]]])
        assert compare(ours, theirs)["kl"].item() == pytest.approx(math.log(4))

    def test_spearman_is_scipys(self):
        ours, theirs = maps(4, 3, tokens=17), maps(4, 3, tokens=17)
        expected = everywhere(lambda a, b: spearmanr(a, b).statistic, patch_rows(ours), patch_rows(theirs))
        np.testing.assert_allclose(compare(ours, theirs)["spearman"], expected, atol=1e-12)

    def test_spearman_ranks_ties_as_scipy_does(self):
        ours, theirs = torch.zeros(50, 10, 10), torch.zeros(50, 10, 10)
        ours[:, 0, 1:], theirs[:, 0, 1:] = torch.randint(1, 4, (2, 50, 9)).float()
        expected = everywhere(
            lambda a, b: spearmanr(a, b).statistic, ours[:, 0, 1:].numpy(), theirs[:, 0, 1:].numpy()
        )
        np.testing.assert_allclose(compare(ours, theirs)["spearman"], expected, atol=1e-6)

    def test_spearman_of_equal_weights_is_undefined(self):
        uniform = torch.full((2, 7, 7), 1 / 7)
        assert compare(uniform, uniform)["spearman"].isnan().all()
        assert compare(maps(2).float(), uniform)["spearman"].isnan().all()

    def test_top_patches_and_overlap_by_hand(self):
        # CLS rows 0.5 0.3 0.1 0.1 and 0.1 0.5 0.2 0.2 of what the patches get, which is half of the row.
        ours, theirs = (
            torch.tensor([0.5, *(weight / 2 for weight in row)]).expand(1, 5, 5)
            for row in ((0.5, 0.3, 0.1, 0.1), (0.1, 0.5, 0.2, 0.2))
        )
        assert compare(ours, theirs)["cls_overlap"].item() == pytest.approx(0.1 + 0.3 + 0.1 + 0.1)
        # {0} and {1}; {0, 1} and {1, 2}; {0, 1, 2} and {1, 2, 3}, of equal weights the first being taken.
        assert compare(ours, theirs, k=1)["top_k_iou"].item() == 0
        assert compare(ours, theirs, k=2)["top_k_iou"].item() == pytest.approx(1 / 3)
        assert compare(ours, theirs, k=3)["top_k_iou"].item() == pytest.approx(1 / 2)
        assert compare(ours, theirs)["top_k_iou"].item() == 0, "a quarter of four patches is one"

    def test_top_patches_are_those_of_sets(self):
        ours, theirs = maps(6, 2, tokens=17), maps(6, 2, tokens=17)

        def iou(a, b):
            a, b = ({*np.argsort(-row)[:5].tolist()} for row in (a, b))
            return len(a & b) / len(a | b)

        expected = everywhere(iou, patch_rows(ours), patch_rows(theirs))
        np.testing.assert_allclose(compare(ours, theirs, k=5)["top_k_iou"], expected)

    def test_a_quarter_of_the_patches_are_the_top(self):
        ours, theirs = maps(6, 2, tokens=17), maps(6, 2, tokens=17)
        torch.testing.assert_close(
            compare(ours, theirs)["top_k_iou"], compare(ours, theirs, k=4)["top_k_iou"]
        )
        assert not torch.equal(compare(ours, theirs)["top_k_iou"], compare(ours, theirs, k=5)["top_k_iou"])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_equal_maps(self, dtype):
        weights = maps(5, 4, tokens=17, spread=6).to(dtype)
        got = {name: values.double() for name, values in compare(weights, weights).items()}
        assert {name: values.shape for name, values in got.items()} == dict.fromkeys(COMPARISONS, (5, 4))
        assert not got["kl"].any()
        assert not got["js"].any()
        for name in ("spearman", "top_k_iou", "cls_overlap"):
            torch.testing.assert_close(got[name], torch.ones(5, 4).double(), atol=1e-6, rtol=0)

    def test_reversed_ranks(self):
        weights = maps(5)
        opposite = (1 - weights) / 6
        expected = torch.full((5,), -1.0, dtype=torch.float64)
        torch.testing.assert_close(compare(weights, opposite)["spearman"], expected)

    def test_weights_that_underflowed_leave_metrics_finite(self):
        eye = torch.eye(7)[None]
        got = compare(eye, eye.roll(1, -1))
        assert got["js"].item() == pytest.approx(math.log(2))
        assert 80 < got["kl"].item() < 90
        assert got["kl"].isfinite()

    def test_one_map_an_image_needs_no_heads(self):
        ours, theirs = maps(4, 3), maps(4, 3)
        with_heads, without = compare(ours, theirs), compare(ours[:, 1], theirs[:, 1])
        for name in COMPARISONS:
            torch.testing.assert_close(without[name], with_heads[name][:, 1])

    def test_tokens_before_the_patches_do_not_rank(self):
        ours, theirs = maps(4, tokens=9), maps(4, tokens=9)
        expected = everywhere(
            lambda a, b: spearmanr(a, b).statistic, patch_rows(ours, prefix=3), patch_rows(theirs, prefix=3)
        )
        np.testing.assert_allclose(compare(ours, theirs, prefix=3)["spearman"], expected, atol=1e-12)

    def test_a_classifier_that_averages_patches_reads_their_mean_row(self):
        ours, theirs = maps(4, tokens=6), maps(4, tokens=6)
        with_cls = [torch.cat([each.mean(1, keepdim=True), each], 1) for each in (ours, theirs)]
        # Made square by a column that nothing reads.
        square = [torch.cat([torch.zeros(4, 7, 1).double(), each], 2) for each in with_cls]
        expected, got = compare(*square), compare(ours, theirs, prefix=0, readers=range(6))
        for name in ("spearman", "top_k_iou", "cls_overlap"):
            torch.testing.assert_close(got[name], expected[name])

    def test_nothing_to_compare_with(self):
        with pytest.raises(ValueError, match=r"\[2, 7, 7\] and \[2, 5, 5\] cannot"):
            compare(maps(2), maps(2, tokens=5))
        with pytest.raises(ConfigError, match="k=7: there are 6 patches, so choose 1 to 6"):
            compare(maps(2), maps(2), k=7)
        with pytest.raises(ConfigError, match="k=0"):
            compare(maps(2), maps(2), k=0)


class TestOneMap:
    def test_entropy_is_scipys(self):
        weights = maps(4, 3)
        np.testing.assert_allclose(entropy(weights), scipy_entropy(weights.numpy(), axis=-1).mean(-1))

    def test_entropy_lies_between_one_token_and_all(self):
        assert entropy(torch.eye(7)[None]).item() == 0
        assert entropy(torch.full((1, 7, 7), 1 / 7)).item() == pytest.approx(math.log(7))

    def test_distance_by_hand(self):
        # 2 × 2 patches of 10 pixels: neighbours are 10 apart, the diagonal 10·√2. CLS keeps 0.5 of each row.
        weights = torch.full((1, 5, 5), 0.0)
        weights[0, :, 0] = 0.5
        weights[0, 1, 1] = 0.5  # itself: 0
        weights[0, 2, 1] = 0.5  # its neighbour: 10
        weights[0, 3, 2] = 0.5  # the diagonal: 14.14
        weights[0, 4, 1:] = 0.125  # uniform: (0 + 10 + 10 + 14.14)/4
        expected = (0 + 10 + 10 * math.sqrt(2) + (20 + 10 * math.sqrt(2)) / 4) / 4
        assert mean_distance(weights, (2, 2), 10).item() == pytest.approx(expected)

    @pytest.mark.parametrize(("grid", "size"), [((4, 4), 8), ((2, 5), 16), ((3, 2), (4, 6))])
    def test_uniform_distance_by_brute_force(self, grid, size):
        height, width = size if isinstance(size, tuple) else (size, size)
        centres = [((r + 0.5) * height, (c + 0.5) * width) for r in range(grid[0]) for c in range(grid[1])]
        pairs = [math.dist(a, b) for a in centres for b in centres]
        expected = sum(pairs) / len(pairs)
        tokens = 1 + grid[0] * grid[1]
        uniform = torch.full((2, 3, tokens, tokens), 1 / tokens, dtype=torch.float64)
        assert uniform_distance(grid, size) == pytest.approx(expected)
        torch.testing.assert_close(
            mean_distance(uniform, grid, size), torch.full((2, 3), expected, dtype=torch.float64)
        )

    def test_distance_by_brute_force(self):
        weights = maps(3, 2, tokens=8)
        distances = patch_distances((2, 3), 4).tolist()
        for image in range(3):
            for head in range(2):
                rows = weights[image, head, 2:, 2:].tolist()
                of_rows = [
                    sum(w * d for w, d in zip(row, far, strict=True)) / sum(row)
                    for row, far in zip(rows, distances, strict=True)
                ]
                got = mean_distance(weights, (2, 3), 4, prefix=2)[image, head].item()
                assert got == pytest.approx(sum(of_rows) / 6)

    def test_a_query_that_gives_the_patches_nothing_does_not_count(self):
        weights = torch.zeros(1, 5, 5)
        weights[0, :, 0] = 1
        assert mean_distance(weights, (2, 2), 10).isnan().all()
        weights[0, 1] = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
        assert mean_distance(weights, (2, 2), 10).item() == 10

    def test_another_grid_is_refused(self):
        with pytest.raises(ValueError, match="7 tokens are not 1 and 3×3 patches"):
            mean_distance(maps(2), (3, 3), 4)

    def test_locality_goes_from_itself_to_everywhere(self):
        uniform = torch.full((2, 3, 7, 7), 1 / 7)
        itself = torch.eye(7).expand(2, 3, 7, 7)
        got = locality([itself, uniform, (uniform + itself) / 2], (2, 3))
        assert got.shape == (2, 3, 3)
        # A row of the third gives patches 6/14 evenly and 1/2 to itself.
        expected = torch.tensor([0.0, 1.0, (6 / 14) / (6 / 14 + 1 / 2)])
        torch.testing.assert_close(got, expected[None, :, None].expand(2, 3, 3))
        torch.testing.assert_close(locality([uniform], (2, 3)), torch.ones(2, 1, 3))

    def test_a_single_patch_has_no_locality(self):
        assert locality([torch.full((1, 1, 2, 2), 0.5)], (1, 1)).isnan().all()


PAIRS = [(0, 0, 0, [0]), (0, 2, 0, [1]), (1, 1, 1, [0, 2])]


class TestTable:
    def test_rows_are_means_over_images(self):
        student, teacher, alone = model(), model(), model()
        rows = fidelity_table(student, teacher, PAIRS, alone=alone, **PLACE)
        assert [(r.student_block, r.student_head, r.teacher_block, [*r.teacher_heads]) for r in rows] == PAIRS
        for row in rows:
            target = teacher[row.teacher_block][:, [*row.teacher_heads]].mean(1)
            for metrics, of in ((row.metrics, student), (row.alone, alone)):
                ours = of[row.student_block][:, row.student_head]
                expected = {name: values.mean().item() for name, values in compare(ours, target).items()}
                expected["entropy"] = entropy(ours).mean().item()
                expected["mean_distance"] = mean_distance(ours, (2, 3), 4).mean().item()
                assert metrics == pytest.approx(expected)
            assert row.teacher["entropy"] == pytest.approx(entropy(target).mean().item())
            assert row.teacher["mean_distance"] == pytest.approx(
                mean_distance(target, (2, 3), 4).mean().item()
            )
            assert row.images == 5

    def test_permuted_heads_are_the_mean_over_permutations_that_move_the_head(self):
        student, teacher = model(1), model(1)
        rows = fidelity_table(student, teacher, [(0, h, 0, [h]) for h in range(3)], **PLACE)
        for head, row in enumerate(rows):
            moved = [order for order in permutations(range(3)) if order[head] != head]
            each = [compare(student[0], teacher[0][:, [*order]]) for order in moved]
            expected = {
                name: np.mean([metrics[name][:, head].mean().item() for metrics in each])
                for name in COMPARISONS
            }
            assert row.permuted == pytest.approx(expected)

    def test_permuted_groups_of_heads(self):
        student, teacher = model(1, heads=4), model(1, heads=4)
        (row,) = fidelity_table(student, teacher, [(0, 0, 0, [0, 1])], **PLACE)
        moved = [order[:2] for order in permutations(range(4)) if not {*order[:2]} & {0, 1}]
        each = [compare(student[0][:, 0], teacher[0][:, [*heads]].mean(1))["js"] for heads in moved]
        assert row.permuted["js"] == pytest.approx(torch.stack(each).mean().item())

    def test_a_student_like_its_teacher_head_by_head_beats_both_baselines(self):
        teacher = model()
        student = [(0.8 * own + 0.2 * other) for own, other in zip(teacher, model(), strict=True)]
        for row in fidelity_table(student, teacher, PAIRS[:1], alone=model(), **PLACE):
            for name in ("kl", "js"):
                assert row.metrics[name] < 0.3 * min(row.alone[name], row.permuted[name])
            for name in ("spearman", "cls_overlap"):
                assert row.metrics[name] > max(row.alone[name], row.permuted[name])

    def test_streaming_is_the_same_table(self):
        student, teacher, alone = (model(images=600) for _ in range(3))
        sums = FidelitySums(PAIRS, **PLACE)
        of_images = []
        for start, end in ((0, 1), (1, 300), (300, 600)):
            batch = ([block[start:end] for block in weights] for weights in (student, teacher, alone))
            of_images.append(sums.add(*batch))
        for streamed, whole in zip(
            sums.table(), fidelity_table(student, teacher, PAIRS, alone=alone, **PLACE), strict=True
        ):
            for part in ("metrics", "teacher", "alone", "permuted"):
                assert getattr(streamed, part) == pytest.approx(getattr(whole, part))
        # What add() returns is each image's own.
        js = torch.cat([metrics["js"] for metrics in of_images])
        torch.testing.assert_close(js[:, 0], compare(student[0][:, 0], teacher[0][:, 0])["js"])
        assert js.shape == (600, 3)

    def test_metrics_are_of_recorded_blocks_by_number(self):
        student, teacher = model(), model()
        rows = fidelity_table({1: student[1]}, {1: teacher[1]}, [PAIRS[2]], **PLACE)
        assert rows == fidelity_table(student, teacher, [PAIRS[2]], **PLACE)

    def test_undefined_metrics_are_null_in_json(self):
        uniform = [torch.full((4, 3, 7, 7), 1 / 7)]
        (row,) = fidelity_table([maps(4, 3).float()], uniform, PAIRS[:1], **PLACE)
        assert row.metrics["spearman"] is None
        assert row.metrics["js"] > 0
        plain = json.loads(json.dumps(asdict(row), allow_nan=False))
        assert plain["metrics"]["spearman"] is None
        assert plain["alone"] is None

    def test_images_without_a_value_are_left_out_of_its_mean(self):
        student, teacher = maps(4, 1), maps(4, 1)
        teacher[0] = 1 / 7
        (row,) = fidelity_table([student], [teacher], PAIRS[:1], **PLACE)
        expected = compare(student[1:, 0], teacher[1:, 0])["spearman"].mean().item()
        assert row.metrics["spearman"] == pytest.approx(expected)

    def test_a_single_head_has_no_other_to_be_exchanged_with(self):
        student, teacher = [maps(4, 1), maps(4, 2)], [maps(4, 1), maps(4, 2)]
        alone, both, free = fidelity_table(
            student, teacher, [(0, 0, 0, [0]), (1, 0, 1, [0, 1]), (1, 0, 1, [0])], **PLACE
        )
        assert alone.permuted is None
        assert both.permuted is None
        assert free.permuted["js"] > 0

    def test_weighted_heads_are_the_softmax_of_their_weighted_scores(self):
        """By scores, of which the table sees only the attention weights; some of these are masked."""
        mask = torch.eye(7, dtype=torch.bool)
        student, scores = maps(4, 2), torch.randn(4, 3, 7, 7, dtype=torch.float64)
        weights = torch.tensor([[0.5, -0.25, 1.5], [0.0, 1.0, 0.5]], dtype=torch.float64)
        mixed = torch.einsum("ph,bhqk->bpqk", weights, scores).masked_fill(mask, -math.inf).softmax(-1)
        pairs = [(0, head, 1, [0, 1, 2], (*weights[head].tolist(),)) for head in range(2)]

        teacher = {1: scores.masked_fill(mask, -math.inf).softmax(-1)}
        rows = fidelity_table([student], teacher, pairs, **PLACE)

        expected = fidelity_table([student], [mixed], [(0, head, 0, [head]) for head in range(2)], **PLACE)
        for row, other in zip(rows, expected, strict=True):
            # The other head's target is what it is compared with by chance.
            for part in ("metrics", "teacher", "permuted"):
                assert getattr(row, part) == pytest.approx(getattr(other, part))

    def test_many_sets_of_heads_are_drawn_by_seed(self):
        some = other_heads(range(4), 12, draws=12, seed=3)
        assert some == other_heads([3, 2, 1, 0], 12, draws=12, seed=3)
        assert some != other_heads(range(4), 12, draws=12, seed=4)
        assert len({*some}) == 12
        # None of the drawn shares a head with those asked about.
        assert all(len({*heads}) == 4 and {*heads} <= {*range(4, 12)} for heads in some)
        # Where too few others are left sets may share some, but are never the one asked about.
        assert other_heads([1, 0], 3, draws=12, seed=0) == [(0, 2), (1, 2)]
        assert other_heads([1], 4, draws=12, seed=0) == [(0,), (2,), (3,)]

    def test_what_does_not_exist_is_named(self):
        student, teacher = model(), model()
        for pairs, words in (
            ([(0, 3, 0, [0])], "head 3: block 0 of the student has 3, so choose 0 to 2"),
            ([(0, 0, 1, [5])], "head 5: block 1 of the teacher has 3, so choose 0 to 2"),
            ([(2, 0, 0, [0])], "block 2: the student has 2, so choose 0 to 1"),
            ([(0, 0, 0, [])], r"teacher heads \[\]: name at least one"),
            ([(0, 0, 0, [1, 1])], r"teacher heads \[1, 1\]: name at least one, each only once"),
            ([], "no student map is paired"),
        ):
            with pytest.raises(ConfigError, match=words):
                fidelity_table(student, teacher, pairs, **PLACE)
        with pytest.raises(ConfigError, match="block 0: of the student there are 1"):
            FidelitySums(PAIRS[:1], **PLACE).add({1: student[1]}, teacher)
        with pytest.raises(ValueError, match="7 and 5 tokens"):
            FidelitySums(PAIRS[:1], **PLACE).add(student, model(tokens=5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_table():
    student, teacher = ([block.float() for block in model(images=300)] for _ in range(2))
    on_gpu = [[block.cuda() for block in weights] for weights in (student, teacher)]
    for here, there in zip(
        fidelity_table(student, teacher, PAIRS, **PLACE),
        fidelity_table(*on_gpu, PAIRS, **PLACE),
        strict=True,
    ):
        for part in ("metrics", "teacher", "permuted"):
            assert getattr(there, part) == pytest.approx(getattr(here, part), rel=1e-4)
