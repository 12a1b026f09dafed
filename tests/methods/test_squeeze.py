"""`head_map=squeeze` against its definition in numpy's float64, and for what it is: few maps telling most."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.test_methods import facts, plan
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.attention import AttentionDistillation
from vitkd.methods.maps.alignment import AS_THEY_ARE, Alignment, token_interpolation
from vitkd.methods.maps.granularity import Block, BlockPair, Encoder, map_heads
from vitkd.methods.maps.losses import KL, MSE
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.methods.maps.squeeze import group_means, head_weights, second_moments, squeeze_heads, with_weights
from vitkd.models import Taps

IMAGES, TOKENS = 6, 5
# Student heads, teacher heads; in one case these cannot be shared evenly.
SIZES = pytest.mark.parametrize(("students", "teachers"), [(1, 4), (2, 6), (3, 5), (4, 6)])


def scores(heads: int) -> Tensor:
    """Heads that differ in size, and rows with a constant that the softmax ignores."""
    of_heads = torch.linspace(0.5, 2, heads, dtype=torch.float64)[:, None, None]
    constants = torch.randn(IMAGES, heads, TOKENS, 1, dtype=torch.float64)
    return of_heads * torch.randn(IMAGES, heads, TOKENS, TOKENS, dtype=torch.float64) + 5 * constants


def squeezed(of: Tensor, students: int) -> Tensor:
    return head_weights(second_moments(of, AS_THEY_ARE), students)


def entries(of: Tensor) -> np.ndarray:
    """X [n, L]: every head's scores, each row less its mean."""
    centred = of.numpy() - of.numpy().mean(-1, keepdims=True)
    return centred.transpose(1, 0, 2, 3).reshape(of.shape[1], -1)


def residual(x: np.ndarray, weights: np.ndarray) -> float:
    """What of X [n, L] cannot be told from the maps W X, by least squares."""
    maps = (weights @ x).T
    solution, *_ = np.linalg.lstsq(maps, x.T, rcond=None)
    return float(((x.T - maps @ solution) ** 2).sum())


@SIZES
def test_the_weights_are_those_of_the_formula(students, teachers):
    teacher = scores(teachers)

    weights = squeezed(teacher, students).numpy()

    x = entries(teacher)
    # The left singular vectors of X itself, rather than the eigenvectors of its second moments.
    vectors, _, _ = np.linalg.svd(x, full_matrices=False)
    basis = vectors[:, :students]
    fine = np.arange(students * teachers) // students  # the teacher head of each piece
    means = np.array(
        [[(part == head).mean() for head in range(teachers)] for part in fine.reshape(students, -1)]
    )
    left, _, right = np.linalg.svd(means @ basis)
    expected = left @ right @ basis.T
    expected *= np.sqrt((x**2).sum() / teachers / ((expected @ x) ** 2).sum() * students)
    np.testing.assert_allclose(weights, expected, atol=1e-10)


@SIZES
def test_no_other_maps_tell_as_much_and_they_are_as_large_as_the_teachers(students, teachers):
    teacher = scores(teachers)
    x, weights = entries(teacher), squeezed(teacher, students).numpy()

    least = residual(x, weights)

    assert least == pytest.approx((np.linalg.svd(x, compute_uv=False)[students:] ** 2).sum())
    others = [group_means(students, teachers).numpy(), np.eye(teachers)[:students]]
    others += [np.random.default_rng(seed).normal(size=weights.shape) for seed in range(5)]
    assert all(least < residual(x, other) for other in others)
    np.testing.assert_allclose(((weights @ x) ** 2).mean(), (x**2).mean())


def test_as_many_heads_are_themselves():
    torch.testing.assert_close(squeezed(scores(4), 4), torch.eye(4).double(), atol=1e-12, rtol=0)
    assert map_heads("squeeze", 4, 4) == map_heads("index", 4, 4)


def test_equal_heads_of_a_group_are_their_mean():
    weights = squeezed(scores(3).repeat_interleave(2, dim=1), 3)

    torch.testing.assert_close(weights @ torch.eye(3).double().repeat_interleave(2, 0), torch.eye(3).double())
    torch.testing.assert_close(weights, group_means(3, 6))


def test_hidden_maps_are_found_again():
    """Six heads that are mixtures of two maps: two squeezed maps span them, and so the hidden ones."""
    hidden, mixture = scores(2), torch.randn(6, 2, dtype=torch.float64)
    teacher = torch.einsum("nm,bmqk->bnqk", mixture, hidden)

    weights = squeezed(teacher, 2).numpy()

    assert residual(entries(teacher), weights) == pytest.approx(0, abs=1e-18 * teacher.numel())
    assert np.linalg.matrix_rank(weights @ mixture.numpy()) == 2


def test_constants_of_rows_and_the_order_of_images_do_not_count():
    teacher = scores(5)
    others = teacher[torch.randperm(IMAGES)] + torch.randn(IMAGES, 5, TOKENS, 1, dtype=torch.float64)

    torch.testing.assert_close(squeezed(others, 3), squeezed(teacher, 3), atol=1e-12, rtol=0)


def test_each_map_resembles_the_mean_in_whose_place_it_stands():
    teacher = scores(6)
    alike = group_means(3, 6) @ squeezed(teacher, 3).T

    torch.testing.assert_close(alike, alike.T)
    assert (torch.linalg.eigvalsh(alike) > 0).all()


def test_what_is_not_compared_does_not_count():
    """Neither what is masked nor a distillation token, whose rows and columns are left out."""
    allowed = ~torch.eye(4, dtype=torch.bool)
    teacher, changed = scores(3), scores(3)
    kept = [0, 2, 3, 4]
    off_diagonal = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    off_diagonal[np.ix_(kept, kept)] = allowed
    changed[..., off_diagonal] = teacher[..., off_diagonal]
    alignment = Alignment(allowed=allowed, dropped_from_teacher=1)

    moments, of_changed = (second_moments(each, alignment) for each in (teacher, changed))

    torch.testing.assert_close(moments, of_changed)
    by_hand = teacher[..., off_diagonal].unflatten(-1, (4, 3))
    torch.testing.assert_close(moments, second_moments(by_hand, AS_THEY_ARE))


def test_a_teacher_that_attends_uniformly_has_groups_means():
    assert torch.equal(squeezed(torch.ones(IMAGES, 4, TOKENS, TOKENS), 2), group_means(2, 4))


def test_a_teacher_whose_scores_are_not_finite_is_refused():
    pair = BlockPair(0, 3, (0, 1), map_heads("squeeze", 2, 4))

    with pytest.raises(ConfigError, match=r"^granularity\.head_map=squeeze: [^\n]*block 3[^\n]*$"):
        with_weights(pair, torch.full((4, 4), torch.nan, dtype=torch.float64))


PAIR = BlockPair(
    0, 1, (0, 1), map_heads("squeeze", 2, 4), weights=((0.5, 0.25, -0.5, 1.0), (0.0, 2.0, 0.5, 0.0))
)


@pytest.mark.parametrize("loss", [MSE(), KL(temperature=2.0)], ids=repr)
@pytest.mark.parametrize("axes", [(), (2,)], ids=["one data order", "two"])
def test_weighted_scores_are_the_target(loss, axes):
    student = {0: torch.randn(3, IMAGES, 2, TOKENS, TOKENS, dtype=torch.float64)}
    teacher = {1: torch.randn(*axes, IMAGES, 4, TOKENS, TOKENS, dtype=torch.float64)}
    student = student if not axes else {0: student[0][:2]}

    values = AttentionObjective([PAIR], loss).compare(student, teacher)

    mixed = np.moveaxis(np.tensordot(np.array(PAIR.weights), teacher[1].numpy(), axes=(1, -3)), 0, -3)
    torch.testing.assert_close(values, loss(student[0], loss.target(torch.tensor(mixed))))


def test_scores_are_weighted_before_a_mask_and_before_they_are_resized():
    student, teacher = torch.randn(IMAGES, 2, TOKENS, TOKENS), torch.randn(IMAGES, 4, TOKENS, TOKENS)
    small = torch.randn(IMAGES, 2, 2, 2)
    matrix = token_interpolation((2, 2), (1, 1))
    mixed = torch.einsum("ph,bhqk->bpqk", torch.tensor(PAIR.weights), teacher)
    alone = replace(PAIR, teacher_heads=((0,), (1,)), weights=())

    for alignment, ours in (
        (Alignment(allowed=~torch.eye(TOKENS, dtype=torch.bool)), student),
        (Alignment(matrix), small),
    ):
        weighted, expected = (
            AttentionObjective([pair], KL(), [alignment]).compare({0: ours}, {1: maps})
            for pair, maps in ((PAIR, teacher), (alone, mixed))
        )
        torch.testing.assert_close(weighted, expected)


class TestFromSettings:
    @pytest.fixture
    def models(self, tiny):
        return tiny(num_heads=2).build(), tiny(depth=6, num_heads=4).build()

    def objective(self, models, head_map="squeeze", images=None):
        images = torch.randn(6, 3, 8, 8) if images is None else images
        settings = plan(granularity=Encoder(head_map=head_map), loss=KL())
        return AttentionDistillation().objective(*models, settings, facts(lambda: images))

    def test_each_block_has_the_weights_of_its_teacher_block(self, models):
        images = torch.randn(6, 3, 8, 8)

        objective = self.objective(models, images=images)

        with torch.no_grad():
            teacher = models[1].eval()(images, Taps(scores=(1, 3, 5))).scores
        assert [pair.teacher_block for pair in objective.pairs] == [1, 3, 5]
        for pair in objective.pairs:
            assert pair.teacher_heads == ((0, 1, 2, 3),) * 2
            expected = squeezed(teacher[pair.teacher_block], 2).float()
            torch.testing.assert_close(torch.tensor(pair.weights), expected, atol=1e-5, rtol=1e-4)

    def test_students_of_one_teacher_share_it(self, models, tiny):
        images = torch.randn(6, 3, 8, 8)
        other_student = tiny(num_heads=2).build()

        first, other = (
            self.objective((each, models[1]), images=images) for each in (models[0], other_student)
        )

        assert first.stack_key == other.stack_key != self.objective(models, "group_mean").stack_key
        assert hash(first.pairs) == hash(other.pairs)

    def test_random_numbers_and_modes_stay_as_they_are(self, models):
        images, before = torch.randn(6, 3, 8, 8), torch.get_rng_state()

        self.objective(models, images=images)

        assert torch.equal(torch.get_rng_state(), before)
        assert models[0].training

    def test_as_many_heads_learn_by_index_to_the_bit(self, tiny):
        models = tiny(num_heads=4).build(), tiny(depth=6, num_heads=4).build()
        batch = Batch(torch.randn(6, 3, 8, 8), torch.zeros(6).long(), torch.arange(6))

        values = [
            self.objective(models, head_map)(
                batch,
                models[0](batch.image, Taps(scores=(0, 1, 2))),
                models[1](batch.image, Taps(scores=(1, 3, 5))),
            )["map_loss"]
            for head_map in ("squeeze", "index")
        ]

        assert torch.equal(*values)

    def test_blocks_with_as_many_heads_stay_as_they_are(self, tiny):
        teacher = tiny(num_heads=4).build()
        same = BlockPair(0, 0, (0, 1, 2, 3), map_heads("squeeze", 4, 4))
        fewer = BlockPair(1, 1, (0, 1), map_heads("squeeze", 2, 4))

        first, second = squeeze_heads([same, fewer], [AS_THEY_ARE] * 2, teacher, torch.randn(5, 3, 8, 8))

        assert first == same
        assert replace(second, weights=()) == fewer
        assert np.shape(second.weights) == (2, 4)

    def test_heads_that_cannot_be_shared_evenly_are_squeezed(self, tiny):
        models = tiny(num_heads=3).build(), tiny(num_heads=4).build()
        settings = plan(granularity=Block(head_map="squeeze"), loss=KL())

        AttentionDistillation().check(*(model.config for model in models), settings)

        assert np.shape(self.objective(models).pairs[0].weights) == (3, 4)

    def test_more_student_heads_are_refused(self, tiny):
        settings = plan(granularity=Block(head_map="squeeze"))

        with pytest.raises(
            ConfigError, match=r"^student\.num_heads=3 is more than teacher\.num_heads=2[^\n]*$"
        ):
            AttentionDistillation().check(tiny(num_heads=3), tiny(num_heads=2), settings)
