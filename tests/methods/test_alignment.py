"""Maps of models with other tokens, or masks, are compared where both have an entry; the rest stays out."""

from itertools import product

import pytest
import torch
from torch import Tensor

from tests.methods.test_methods import plan
from tests.methods.test_transfer import pool_queries_and_keys
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.attention import AttentionDistillation, match_heads
from vitkd.methods.maps.alignment import Alignment, align, token_interpolation, without_prefix
from vitkd.methods.maps.granularity import BlockPair, Encoder
from vitkd.methods.maps.losses import CE, JS, KL, MSE, AttentionLoss, ReverseKL
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.methods.maps.streaming import STREAM_ABOVE
from vitkd.models import AttentionLayout, ViTConfig
from vitkd.models.output import QKV

LOSSES = [MSE(), MSE(center="row"), CE(), KL(), KL(temperature=0.7), ReverseKL(), JS()]
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=repr)
# Whether student and teacher have a distillation token, and their attention.
EVERY_TWO = pytest.mark.parametrize(
    ("tokens", "attentions"), [*product(product((False, True), repeat=2), product(("msa", "lsa"), repeat=2))]
)
# The mean is taken of softmaxes that still hold the masked entries.
EXACT = {"atol": 1e-12, "rtol": 1e-12}
PAIR = BlockPair(0, 0, (0, 1), ((1,), (0,)))
GROUPED = BlockPair(0, 0, (0, 1), ((0, 1), (2, 3)))


def scores(heads: int, tokens: int) -> Tensor:
    return 2 * torch.randn(3, heads, tokens, tokens, dtype=torch.float64)


def two(tiny, tokens: tuple[bool, bool], attentions: tuple[str, str]) -> tuple[ViTConfig, ViTConfig]:
    """The configurations of a student and a teacher."""
    student, teacher = (
        tiny(distillation_token=token, attention=attention)
        for token, attention in zip(tokens, attentions, strict=True)
    )
    return student, teacher


def aligned(student: ViTConfig, teacher: ViTConfig) -> Alignment:
    """Of the first blocks of both."""
    return align(student.attention_layouts()[0], teacher.attention_layouts()[0])


def comparison(pair: BlockPair, loss: AttentionLoss, alignment: Alignment):
    """From student scores and teacher scores to one value per image and map [B, P]."""
    return AttentionObjective([pair], loss, [alignment]).compare


def kept(x: Tensor, is_dropped: bool) -> Tensor:
    """[..., T, T] without row and column 1, where the distillation token stands."""
    if not is_dropped:
        return x
    stay = [token for token in range(x.shape[-1]) if token != 1]
    return x[..., stay, :][..., stay]


def divergence(loss: AttentionLoss, p: Tensor, q: Tensor) -> Tensor:
    """Of the teacher's p and the student's q, in the words of a textbook; 0·log 0 is 0."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(-1)

    if isinstance(loss, CE):
        return -torch.xlogy(p, q).sum(-1)
    if isinstance(loss, KL):
        return kl(p, q)
    if isinstance(loss, ReverseKL):
        return kl(q, p)
    assert isinstance(loss, JS)
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def by_hand(loss: AttentionLoss, student: Tensor, teacher: Tensor, drops: tuple[bool, bool], masked: bool):
    """[B, P]: softmax, leave out what the other has no like of, renormalise, compare."""
    if isinstance(loss, MSE):
        difference = kept(student, drops[0]) - kept(teacher, drops[1])
        tokens = difference.shape[-1]
        counts = ~torch.eye(tokens, dtype=torch.bool) if masked else torch.ones(tokens, tokens).bool()
        rows = [difference[..., i, counts[i]] for i in range(tokens)]
        if loss.center == "row":
            rows = [row - row.mean(-1, keepdim=True) for row in rows]
        return torch.cat(rows, dim=-1).square().mean(-1)
    left = []
    for whole, drop in zip((teacher, student), drops[::-1], strict=True):
        weights = kept((whole / loss.temperature).softmax(-1), drop)
        if masked:
            weights = weights * (1 - torch.eye(weights.shape[-1], dtype=torch.float64))
        left.append(weights / weights.sum(-1, keepdim=True))
    return divergence(loss, *left).mean(-1)


class TestTokens:
    @EVERY_LOSS
    @EVERY_TWO
    def test_the_value_is_that_of_softmax_leaving_out_and_renormalising(self, tokens, attentions, loss, tiny):
        student, teacher = two(tiny, tokens, attentions)
        ours, theirs = scores(2, student.tokens), scores(2, teacher.tokens)

        values = comparison(PAIR, loss, aligned(student, teacher))({0: ours}, {0: theirs})

        drops = (tokens == (True, False), tokens == (False, True))
        expected = by_hand(loss, ours, theirs[:, [1, 0]], drops, masked="lsa" in attentions)
        torch.testing.assert_close(values, expected, **EXACT)

    @EVERY_LOSS
    @pytest.mark.parametrize("of", ["student", "teacher"])
    def test_what_is_dropped_is_of_no_account(self, of, loss, tiny):
        """Neither how the token looks at others nor how they look at it; without softmaxes of the whole."""
        student, teacher = two(tiny, (of == "student", of == "teacher"), ("msa", "msa"))
        maps = {"student": scores(2, student.tokens), "teacher": scores(2, teacher.tokens)}
        compare = comparison(PAIR, loss, aligned(student, teacher))
        before = compare({0: maps["student"]}, {0: maps["teacher"]})

        maps[of][..., 1, :] += 5
        maps[of][..., :, 1] -= 7

        torch.testing.assert_close(compare({0: maps["student"]}, {0: maps["teacher"]}), before, **EXACT)

    @EVERY_LOSS
    def test_where_both_have_the_token_it_counts(self, loss, tiny):
        student, teacher = two(tiny, (True, True), ("msa", "msa"))
        ours, theirs = scores(2, 6), scores(2, 6)
        compare = comparison(PAIR, loss, aligned(student, teacher))
        before = compare({0: ours}, {0: theirs})

        ours[..., 1, 3] += 1

        assert (compare({0: ours}, {0: theirs}) - before).abs().min() > 1e-6

    def test_what_is_taken_out_is_the_token_behind_the_class_token(self):
        numbers = torch.arange(9).reshape(1, 1, 3, 3)

        assert without_prefix(numbers, 1).tolist() == [[[[0, 2], [6, 8]]]]
        factors = without_prefix(QKV(numbers, -numbers), 1)
        assert factors.q.tolist() == [[[[0, 1, 2], [6, 7, 8]]]]
        assert factors.k.tolist() == [[[[0, -1, -2], [-6, -7, -8]]]]

    def test_however_many_they_are_and_whichever_model_has_more(self):
        """Three tokens before the patches of 1×3 beside one: both that follow the class token go."""
        more, fewer = (AttentionLayout(2, 4, (1, 3), prefix, (0,)) for prefix in (3, 1))
        numbers = torch.arange(36).reshape(1, 1, 6, 6)

        assert align(more, fewer) == Alignment(None, None, 2, 0)
        assert align(fewer, more) == Alignment(None, None, 0, 2)
        assert align(more, more) == Alignment()
        assert without_prefix(numbers, 2)[0, 0].tolist() == [
            [0, 3, 4, 5], [18, 21, 22, 23], [24, 27, 28, 29], [30, 33, 34, 35]
        ]  # fmt: skip

    def test_plain_models_are_compared_as_they_are(self, tiny):
        assert aligned(tiny(), tiny(depth=1)) == Alignment(None, None, 0, 0)


class TestMask:
    """Locality attention masks a token's look at itself; its scores there mean nothing."""

    @EVERY_LOSS
    @pytest.mark.parametrize("attentions", [("lsa", "msa"), ("msa", "lsa"), ("lsa", "lsa")])
    @pytest.mark.parametrize("tokens", [(False, False), (True, False), (False, True)])
    def test_the_diagonal_of_either_changes_neither_value_nor_gradient(self, tokens, attentions, loss, tiny):
        student, teacher = two(tiny, tokens, attentions)
        ours, theirs = scores(2, student.tokens), scores(2, teacher.tokens)
        compare = comparison(PAIR, loss, aligned(student, teacher))

        def found(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
            leaf = ours.clone().requires_grad_()
            values = compare({0: leaf}, {0: theirs})
            values.sum().backward()
            return values.detach(), leaf.grad

        def elsewhere(maps: Tensor) -> Tensor:
            return maps + torch.diag_embed(9 * torch.randn(maps.shape[:-1], dtype=maps.dtype))

        value, gradient = found(ours, theirs)
        for changed in ((elsewhere(ours), theirs), (ours, elsewhere(theirs))):
            other_value, other_gradient = found(*changed)
            torch.testing.assert_close(other_value, value, **EXACT)
            torch.testing.assert_close(other_gradient, gradient, **EXACT)
        assert not gradient.diagonal(dim1=-2, dim2=-1).any()
        assert gradient.count_nonzero() > gradient.numel() / 2

    @pytest.mark.parametrize("loss", LOSSES, ids=repr)
    def test_the_diagonal_stays_out_of_the_mean_of_several_teacher_maps(self, loss, tiny):
        """How much each would look at itself must not say how much each counts."""
        alignment = aligned(*two(tiny, (False, False), ("msa", "lsa")))
        ours, theirs = scores(2, 5), scores(4, 5)
        compare = comparison(GROUPED, loss, alignment)
        before = compare({0: ours}, {0: theirs})

        theirs.diagonal(dim1=-2, dim2=-1).add_(9 * torch.randn(3, 4, 5, dtype=torch.float64))

        torch.testing.assert_close(compare({0: ours}, {0: theirs}), before, **EXACT)

    def test_plain_attention_has_none(self, tiny):
        assert aligned(tiny(distillation_token=True), tiny()).allowed is None

    def test_it_is_of_the_tokens_that_are_compared(self, tiny):
        for tokens in product((False, True), repeat=2):
            allowed = aligned(*two(tiny, tokens, ("lsa", "msa"))).allowed
            assert allowed.shape == ((6, 6) if all(tokens) else (5, 5))
            assert torch.equal(allowed, ~torch.eye(len(allowed), dtype=torch.bool))


@EVERY_TWO
@pytest.mark.parametrize("loss", [MSE(), KL()], ids=repr)
def test_factors_give_what_scores_give(tokens, attentions, loss, tiny, monkeypatch):
    """Multiplied out for one image at a time; values, and gradients of all weights."""
    monkeypatch.setattr("vitkd.methods.maps.streaming.CHUNK_BYTES", 1)
    student, teacher = (config.build().double() for config in two(tiny, tokens, attentions))
    for model in (student, teacher):
        # Fresh locality attention has every temperature at 0.
        torch.nn.utils.vector_to_parameters(
            0.4 * torch.randn_like(torch.nn.utils.parameters_to_vector(model.parameters())),
            model.parameters(),
        )
    alignments = [align(*layouts) for layouts in zip(student.attention, teacher.attention, strict=True)]
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    batch = Batch(images, torch.zeros(3).long(), torch.arange(3))

    def found(streams: bool) -> tuple[Tensor, list[Tensor]]:
        student.zero_grad()
        pairs, tokens = Encoder().pairs(student.attention, teacher.attention), STREAM_ABOVE + streams
        objective = AttentionObjective(pairs, loss, alignments, tokens)
        assert objective.streams == streams
        with torch.no_grad():
            theirs = teacher(images, objective.teacher_taps)
        values = objective(batch, student(images, objective.student_taps), theirs)["map_loss"]
        values.sum().backward()
        return values, [p.grad.clone() for p in student.parameters() if p.grad is not None]

    (values, gradients), (streamed, of_streamed) = found(False), found(True)

    torch.testing.assert_close(streamed, values, **EXACT)
    for ours, expected in zip(of_streamed, gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("loss", [MSE(), KL()], ids=repr)
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_heads_are_matched_by_what_is_compared(of, loss, tiny):
    """What the token and the diagonal say would match the heads in another order."""
    student, teacher = two(tiny, (of == "student", of == "teacher"), ("lsa", "msa"))
    base, order = scores(4, 5), [2, 0, 3, 1]
    maps = {"student": base[:, order], "teacher": base}
    maps[of] = with_a_token(maps[of], 20 * torch.randn(4, dtype=torch.float64)[None, :, None, None])
    for each in maps.values():
        # As if each head's like were the one of the same number.
        each.diagonal(dim1=-2, dim2=-1).add_(torch.tensor([0.0, 30.0, 60.0, 90.0])[None, :, None])
    pair = BlockPair(0, 2, (0, 1, 2, 3), ((0,), (1,), (2,), (3,)))

    (matched,) = match_heads(
        [pair], {0: maps["student"]}, {2: maps["teacher"]}, loss, [aligned(student, teacher)]
    )
    assert matched.teacher_heads == ((2,), (0,), (3,), (1,))


def with_a_token(maps: Tensor, value: Tensor) -> Tensor:
    """The scores [B, H, T, T] with a row and a column of `value` behind the first."""
    tokens = maps.shape[-1] + 1
    whole = value.expand(*maps.shape[:2], tokens, tokens).clone()
    rest = [0, *range(2, tokens)]
    whole[..., torch.tensor(rest)[:, None], torch.tensor(rest)] = maps
    return whole


class TestResize:
    """A teacher of 4×4 patches beside a student of 2×2."""

    @pytest.mark.parametrize("tokens", [*product((False, True), repeat=2)])
    @pytest.mark.parametrize("attention", ["msa", "lsa"])
    def test_drops_tokens_resizes_and_leaves_the_students_diagonal_out(self, tokens, attention, tiny):
        student = tiny(distillation_token=tokens[0], attention=attention)
        teacher = tiny(patch_size=2, distillation_token=tokens[1])
        ours, theirs = scores(2, student.tokens), scores(2, teacher.tokens)
        alignment = aligned(student, teacher)

        of_mse, of_kl = (comparison(PAIR, loss, alignment)({0: ours}, {0: theirs}) for loss in (MSE(), KL()))

        assert alignment[2:] == (*(int(has_token) for has_token in tokens), 1, None)
        counts = 1 - torch.eye(5, dtype=torch.float64) if attention == "lsa" else torch.ones(5, 5).double()
        matrix = token_interpolation((4, 4), (2, 2)).double()
        taught = matrix @ kept(theirs[:, [1, 0]], tokens[1]) @ matrix.mT
        squares = (kept(ours, tokens[0]) - taught).square() * counts
        torch.testing.assert_close(of_mse, squares.sum((-2, -1)) / counts.sum(), **EXACT)
        p = kept(theirs[:, [1, 0]].softmax(-1), tokens[1])
        p = pool_queries_and_keys((p / p.sum(-1, keepdim=True)).flatten(0, 1)).unflatten(0, (3, 2)) * counts
        q = kept(ours.softmax(-1), tokens[0]) * counts
        p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
        torch.testing.assert_close(of_kl, divergence(KL(), p, q).mean(-1), **EXACT)

    def test_grids_need_not_be_square(self):
        """With unequal grids no prefix but the class token is kept, even if both have as many."""
        student, teacher = (AttentionLayout(2, 4, grid, 2, (0, 1)) for grid in ((2, 1), (4, 3)))

        alignment = align(student, teacher)

        assert torch.equal(alignment.resize, token_interpolation((4, 3), (2, 1)))
        assert alignment[1:] == (None, 1, 1, 1, None)
        assert align(student, student._replace(grid=(1, 2))).resize.shape == (3, 3)

    def test_of_a_teacher_with_a_mask_is_refused(self, tiny):
        method, teacher = AttentionDistillation(resize="bilinear"), tiny(patch_size=2, attention="lsa")

        with pytest.raises(ConfigError, match=r"^[^\n]*2×2[^\n]*4×4[^\n]*teacher\.attention=lsa[^\n]*$"):
            method.check(tiny(), teacher, plan())
        method.check(tiny(patch_size=2), teacher, plan())
        method.check(tiny(attention="lsa"), tiny(patch_size=2), plan())


class TestClassTokens:
    """Some models have none, but registers perhaps."""

    WITH = AttentionLayout(2, 4, (2, 2), 3, (0,))
    WITHOUT = AttentionLayout(2, 4, (2, 2), 1, (1, 2, 3, 4), has_class_token=False)

    @pytest.mark.parametrize("loss", [MSE(), KL()])
    @pytest.mark.parametrize("layouts", [(WITH, WITHOUT), (WITHOUT, WITH)])
    def test_what_only_one_has_is_left_out(self, layouts, loss):
        student, teacher = (scores(2, layout.tokens) for layout in layouts)
        patches = [
            maps[..., layout.prefix :, layout.prefix :]
            for maps, layout in zip((student, teacher), layouts, strict=True)
        ]

        value = comparison(PAIR, loss, align(*layouts))({0: student}, {0: teacher})

        expected = comparison(PAIR, loss, Alignment())({0: patches[0]}, {0: patches[1]})
        torch.testing.assert_close(value, expected, **EXACT)

    def test_registers_of_both_are_compared(self):
        assert align(self.WITHOUT, self.WITHOUT) == Alignment(kept=0)
        assert align(self.WITH, self.WITH) == Alignment()

    def test_resizing_without_one_is_of_patches_alone(self):
        matrix = token_interpolation((4, 4), (2, 2), prefix=0)

        assert torch.equal(matrix, token_interpolation((4, 4), (2, 2))[1:, 1:])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@EVERY_LOSS
def test_extreme_scores_stay_finite(loss, precision, tiny):
    alignment = aligned(*two(tiny, (True, False), ("lsa", "lsa")))
    student = (1e4 * torch.randint(-1, 2, (3, 2, 6, 6))).to(precision).requires_grad_()
    teacher = (1e4 * torch.randint(-1, 2, (3, 2, 5, 5))).to(precision)

    value = comparison(PAIR, loss, alignment)({0: student}, {0: teacher})
    value.sum().backward()

    assert value.isfinite().all()
    assert value.dtype == torch.float32
    assert student.grad.isfinite().all()
