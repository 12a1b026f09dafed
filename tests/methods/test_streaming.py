"""Streamed maps give the figures and gradients of materialised ones, and leave no T×T matrix behind."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import LiveBytes, storages
from vitkd.data import Batch
from vitkd.methods.maps import objective as objective_module
from vitkd.methods.maps import streaming
from vitkd.methods.maps.alignment import Alignment, token_interpolation
from vitkd.methods.maps.granularity import Block, BlockPair, Encoder, Granularity, Head
from vitkd.methods.maps.losses import CE, JS, KL, MSE, AttentionLoss, ReverseKL
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.methods.maps.streaming import STREAM_ABOVE, images_at_a_time, streamed
from vitkd.models import Taps, ViT
from vitkd.models.layers import Attention
from vitkd.models.output import QKV, BlockTaps

EXACT = {"atol": 1e-12, "rtol": 0}
LOSSES = [
    MSE(),
    MSE(center="row"),
    CE(),
    KL(),
    ReverseKL(),
    JS(),
    KL(temperature=2.0),
    JS(temperature=0.5),
    MSE(reduction="sum"),
]
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=repr)
PAIRS = {
    "index": [BlockPair(0, 1, (0, 1, 2), ((0,), (1,), (2,)))],
    "chosen heads": [BlockPair(0, 1, (2, 0), ((4,), (1,)))],
    "group mean": [BlockPair(0, 1, (0, 1, 2), ((0, 1), (2, 3), (4, 5)))],
    "weighted": [
        BlockPair(0, 1, (0, 2), ((0, 1, 2, 3, 4, 5),) * 2, weights=((1.0, 0.5, 0, -0.5, 0, 2), (0.25,) * 6))
    ],
    "encoder": [BlockPair(i, i, (0, 1, 2), ((5,), (0,), (3,))) for i in range(2)],
}
EVERY_PAIRING = pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
IMAGES, TOKENS = 5, 7
MASK = ~torch.eye(TOKENS, dtype=torch.bool)


def factors(*shape: int, dtype: torch.dtype = torch.float64) -> QKV:
    return QKV(*(1.5 * torch.randn(*shape, dtype=dtype) for _ in "qk"))


def student_and_teacher(*students: int) -> tuple[dict[int, QKV], dict[int, QKV]]:
    """Two blocks of 3 student heads of width 4 and of 6 teacher heads of width 8."""
    student = {i: factors(*students, IMAGES, 3, TOKENS, 4) for i in range(2)}
    for block in student.values():
        block.q.requires_grad_(), block.k.requires_grad_()
    return student, {i: factors(IMAGES, 6, TOKENS, 8) for i in range(2)}


def multiplied_out(blocks: dict[int, QKV]) -> dict[int, Tensor]:
    return {i: block.scores() for i, block in blocks.items()}


def value_and_gradients(objective: AttentionObjective, student, teacher, leaves) -> list[Tensor]:
    """The values and the gradient of a sum that weighs each differently."""
    values = objective.compare(student, teacher)
    weights = torch.arange(1.0, 1 + values.numel(), dtype=values.dtype).view_as(values)
    gradients = torch.autograd.grad(
        (values * weights).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    return [values, *gradients]


def in_chunks_of(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective_module, "images_at_a_time", lambda maps: images)


def assert_streaming_changes_nothing(objective: AttentionObjective, student, teacher) -> None:
    leaves = [factor for block in student.values() for factor in block[:2]]

    in_pieces = value_and_gradients(objective, student, teacher, leaves)

    whole = value_and_gradients(objective, multiplied_out(student), multiplied_out(teacher), leaves)
    torch.testing.assert_close(in_pieces, whole, **EXACT)
    assert whole[1].any()


@EVERY_LOSS
@EVERY_PAIRING
@pytest.mark.parametrize("allowed", [None, MASK], ids=["full", "masked"])
@pytest.mark.parametrize("students", [(), (3,)], ids=["one", "stacked"])
def test_values_and_gradients_equal_the_materialised_ones(monkeypatch, loss, pairs, allowed, students):
    in_chunks_of(2, monkeypatch)  # 2 + 2 + 1 images

    objective = AttentionObjective(pairs, loss, [Alignment(allowed=allowed)] * len(pairs))

    assert_streaming_changes_nothing(objective, *student_and_teacher(*students))


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 100])
def test_any_chunk_gives_the_same(monkeypatch, chunk):
    in_chunks_of(chunk, monkeypatch)

    assert_streaming_changes_nothing(AttentionObjective(PAIRS["encoder"], KL()), *student_and_teacher())


@EVERY_PAIRING
def test_a_teachers_scores_may_lie_ready_as_tensors(monkeypatch, pairs):
    """As a cache of them has them."""
    in_chunks_of(2, monkeypatch)
    student, teacher = student_and_teacher()
    objective, leaves = AttentionObjective(pairs, KL()), [*student[0][:2]]

    in_pieces = value_and_gradients(objective, student, multiplied_out(teacher), leaves)

    whole = value_and_gradients(objective, multiplied_out(student), multiplied_out(teacher), leaves)
    torch.testing.assert_close(in_pieces, whole, **EXACT)


@EVERY_LOSS
def test_gradients_are_the_values_slopes(loss):
    student, teacher = factors(2, 3, 1, 3, 2), factors(3, 1, 3, 4)
    target = loss.target(teacher.scores())

    def values(q: Tensor, k: Tensor) -> Tensor:
        return streamed(QKV(q, k), lambda scores, images: loss(scores, target[images]), chunk=2)

    assert torch.autograd.gradcheck(values, [x.requires_grad_() for x in student[:2]])


def test_a_gradient_can_be_asked_for_again():
    """As `DistillModule` does to measure what each term contributes."""
    student, teacher = student_and_teacher()
    value = AttentionObjective(PAIRS["index"], KL()).compare(student, teacher).sum()

    first, again = (torch.autograd.grad(value, student[0].q, retain_graph=True) for _ in range(2))

    assert torch.equal(*first, *again)


@EVERY_LOSS
@torch.inference_mode()
def test_validation_computes_values_alone(loss):
    student, teacher = student_and_teacher()[1], student_and_teacher()[1]
    objective = AttentionObjective(PAIRS["group mean"], loss)

    values = objective.compare(student, teacher)

    whole = objective.compare(multiplied_out(student), multiplied_out(teacher))
    torch.testing.assert_close(values, whole, **EXACT)


@EVERY_LOSS
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_compared_in_float32(loss, half):
    student, teacher = factors(4, 3, 7, 4, dtype=half), factors(4, 6, 7, 8, dtype=half)
    leaves = [factor.requires_grad_() for factor in student[:2]]
    objective = AttentionObjective(PAIRS["index"], loss)

    with torch.autocast("cpu", torch.bfloat16):
        values = objective.compare({0: student}, {1: teacher})
        expected = objective.compare({0: student.scores()}, {1: teacher.scores()})
    gradients, slopes = (torch.autograd.grad(v.sum(), leaves) for v in (values, expected))

    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected)
    assert all(gradient.dtype == half for gradient in gradients)
    torch.testing.assert_close(gradients, slopes, atol=1e-6, rtol=2 * torch.finfo(half).eps)


def test_a_gradient_too_small_for_float16_waits_for_the_loss_scale():
    student, teacher = factors(4, 3, 7, 4, dtype=torch.float16), factors(4, 6, 7, 8, dtype=torch.float16)
    q = student.q.requires_grad_()

    values = AttentionObjective(PAIRS["index"], KL()).compare({0: student}, {1: teacher})
    value = 1e-9 * values.mean(0).sum()
    (gradient,) = torch.autograd.grad(value, q, grad_outputs=torch.tensor(2.0**30))

    assert gradient.count_nonzero() > 0.9 * gradient.numel()


@EVERY_LOSS
def test_another_token_grid_is_streamed_too(monkeypatch, loss):
    in_chunks_of(2, monkeypatch)
    student, teacher = {0: factors(IMAGES, 3, 5, 4)}, {1: factors(IMAGES, 6, 17, 8)}
    student[0].q.requires_grad_(), student[0].k.requires_grad_()
    matrix = token_interpolation((4, 4), (2, 2)).double()

    objective = AttentionObjective(PAIRS["group mean"], loss, [Alignment(matrix)])

    assert_streaming_changes_nothing(objective, student, teacher)


def test_chunks_hold_as_many_images_as_the_limit_allows(monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 10_000)

    def fit(*shape: int, dtype: torch.dtype = torch.float32) -> int:
        return images_at_a_time([factors(*shape, dtype=dtype)])

    assert fit(64, 2, 10, 3) == 10_000 // (4 * 2 * 10 * 10)
    assert fit(64, 2, 10, 3, dtype=torch.bfloat16) == fit(64, 2, 10, 3)
    assert fit(64, 2, 10, 3, dtype=torch.float64) == 10_000 // (8 * 2 * 10 * 10)
    assert fit(3, 64, 2, 10, 3) == 10_000 // (4 * 3 * 2 * 10 * 10)
    assert fit(64, 2, 100, 3) == 1
    both = [factors(64, heads, 10, 3, dtype=torch.float32) for heads in (1, 2)]
    assert images_at_a_time(both) == fit(64, 2, 10, 3)


# Whole models, on both sides of the limit.

GRANULARITIES = pytest.mark.parametrize("granularity", [Head(), Block(), Encoder()], ids=repr)


@pytest.fixture
def models(tiny) -> tuple[ViT, ViT]:
    """A student and a teacher with 145 tokens each."""
    grid = {"image_size": 24, "patch_size": 2}
    student = tiny(**grid).build().double()
    return student, tiny(**grid, depth=6, num_heads=4).build().double().requires_grad_(False).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 24, 24, dtype=torch.float64)


def distilled(student: ViT, teacher: ViT, objective: AttentionObjective, images: Tensor) -> Tensor:
    """The sum of both losses of a step."""
    labels = torch.arange(len(images))
    with torch.no_grad():
        theirs = teacher(images, objective.teacher_taps)
    ours = student(images, objective.student_taps)
    terms = objective(Batch(images, labels, labels), ours, theirs)
    return F.cross_entropy(ours.logits, labels) + objective.transfer(terms).mean()


def objective_between(
    student: ViT, teacher: ViT, granularity: Granularity, loss: AttentionLoss, streams: bool = True
) -> AttentionObjective:
    """It streams by itself, as the models have many tokens; else their number is kept from it."""
    pairs = granularity.pairs(student.attention, teacher.attention)
    return AttentionObjective(pairs, loss, tokens=student.attention[0].tokens if streams else 0)


def test_streaming_starts_above_the_limit_by_itself(tiny):
    def streams(image_size: int) -> bool:
        model = tiny(image_size=image_size, patch_size=2).build()
        return objective_between(model, model, Block(), KL()).streams

    assert 11**2 + 1 <= STREAM_ABOVE < 12**2 + 1
    assert not streams(image_size=22)
    assert streams(image_size=24)


@GRANULARITIES
@pytest.mark.parametrize("loss", [MSE(), KL()], ids=repr)
def test_a_streamed_step_is_the_materialised_step(models, images, granularity, loss):
    parameters = list(models[0].parameters())

    steps = []
    for streams in (False, True):
        objective = objective_between(*models, granularity, loss, streams)
        assert objective.streams == streams
        total = distilled(*models, objective, images)
        steps.append(
            [total, *torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)]
        )

    torch.testing.assert_close(*steps, **EXACT)


@pytest.mark.parametrize("blocks", [[0], [2, 0], [0, 1, 2]])
def test_the_models_factors_multiply_to_their_scores(models, images, blocks):
    for model, logits in zip(models, (True, False), strict=True):
        whole = model(images, Taps(scores=tuple(blocks), logits=logits)).scores
        in_factors = model(images, Taps(factors=tuple(blocks), logits=logits)).qkv

        assert in_factors.keys() == set(blocks)
        for i in blocks:
            assert in_factors[i].v is None
            torch.testing.assert_close(in_factors[i].scores(), whole[i], **EXACT)


def test_a_frozen_models_factors_do_not_keep_its_values_in_memory(models, images):
    """Q, K and V come from one projection; a view of a third would keep all of it."""
    with torch.no_grad():
        recorded = models[1](images, Taps(factors=(0, 1, 5), logits=False)).qkv

    for block in (0, 1):
        for factor in recorded[block][:2]:
            assert factor.untyped_storage().nbytes() == factor.numel() * factor.itemsize


class Largest(TorchDispatchMode):
    """Remembers the most numbers that a storage made meanwhile holds."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for storage in storages(output):
            self.numbers = max(self.numbers, storage.nbytes() // 8)
        return output


@pytest.mark.parametrize("loss", [MSE(center="row"), JS()], ids=repr)
def test_a_streamed_step_never_holds_all_images_maps_and_saves_none(monkeypatch, models, images, loss):
    in_chunks_of(1, monkeypatch)
    saved: list[torch.Size] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.shape)
        return x

    def largest(streams: bool) -> int:
        saved.clear()
        objective = objective_between(*models, Encoder(), loss, streams)
        with Largest() as mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            distilled(*models, objective, images).backward()
        return mode.numbers

    one_image = max(model.config.num_heads for model in models) * 145**2
    assert largest(streams=False) >= len(images) * one_image // 2
    assert any(shape[-2:] == (145, 145) for shape in saved)
    assert largest(streams=True) <= one_image
    assert saved
    # Those of a chunk are saved for as long as the chunk lasts.
    maps = [shape for shape in saved if shape[-2:] == (145, 145)]
    assert all(len(shape) < 4 or shape[0] == 1 for shape in maps)


def test_nothing_as_large_as_a_map_outlives_the_forward_pass(models, images):
    streaming, at_once = (objective_between(*models, Encoder(), KL(), streams) for streams in (True, False))

    with LiveBytes() as live:
        total = distilled(*models, streaming, images)
        after_streaming = live.now
    with LiveBytes() as live:
        whole = distilled(*models, at_once, images)
        after_materialising = live.now

    maps = 8 * len(images) * 145**2
    assert total.item() == pytest.approx(whole.item())
    # Per block: 2 heads' scores and their softmax, and what the loss keeps.
    assert after_materialising - after_streaming > 3 * 2 * 2 * maps


def test_fused_attention_drops_weights_where_factors_are_recorded():
    attention = Attention(dim=8, num_heads=2, head_dim=4, dropout=0.25, qkv_bias=True).train()
    nn.init.constant_(attention.qkv.weight, 0.0)
    nn.init.constant_(attention.qkv.bias, 1.0)
    nn.init.constant_(attention.out.weight, 1 / 8)
    nn.init.constant_(attention.out.bias, 0.0)

    tokens, (scores, recorded, _) = attention(torch.randn(40, 6, 8), BlockTaps(factors=True))

    assert scores is None
    assert isinstance(recorded, QKV)
    kept = tokens[tokens != 0]
    assert kept.std() > 0.05
    assert tokens.mean().item() == pytest.approx(1, abs=0.05)


# The memory benchmark's instrument.


def test_live_bytes_by_hand():
    start = torch.zeros(100)
    with LiveBytes() as live:
        double = start + start  # 400 bytes
        view = double[:50]
        wide = double.double()  # 800 more
        assert live.now == 1200
        del double
        assert live.now == 1200, "the view keeps it"
        del view
        assert live.now == 800
        start.add_(1)
        (wide[:25] * 2).sum()  # 200 and a number's 8, gone at once
        assert live.now == 800

    assert live.peak == 1200


def test_live_bytes_of_a_backward_pass_by_hand():
    weight = torch.zeros(1000, requires_grad=True)
    with LiveBytes() as live:
        y = weight.exp().exp()  # both are saved: 8000 bytes
        assert live.now == 8000
        y.sum().backward()  # 4 for the sum, 4 for its slope, two products of 4000, the first freed at the end

    assert live.peak == 8000 + 4 + 4 + 2 * 4000
