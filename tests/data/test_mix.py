"""Mixed batches against timm's and torchvision's, and what is drawn against its distributions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torchvision.transforms import v2

from vitkd.data import Augment, Batch, Dataset, ImageDataModule, Mix, join
from vitkd.data.hashing import key_of, random_bits
from vitkd.data.mix import Draws, Mixer, cut_edges, partners, symmetric_beta
from vitkd.errors import ConfigError

Make = Callable[..., Dataset]
BOTH = Mix(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.8, switch_prob=0.3)
KEY = key_of(3, 1, 4)
SIZE, CLASSES = 12, 5
ROUNDING = {"atol": 1e-6, "rtol": 1e-5}


def images_and_labels(count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, SIZE, SIZE), torch.arange(count) % CLASSES


def bits(streams: int, count: int) -> Tensor:
    return random_bits(KEY, torch.arange(count), streams)


def mixed_as(share: float, edges: list[int], images: Tensor, labels: Tensor) -> Batch:
    """Our own mixing with this λ, where there is no box, or with this box."""
    top, bottom, left, right = edges
    is_cut = top < bottom and left < right
    outside = torch.tensor([1.0 if is_cut else share])
    draws = Draws(outside, torch.tensor([edges]), torch.tensor([share]))
    batch = Batch(images, labels, torch.arange(len(labels)))
    return Mixer(Mix(), SIZE, CLASSES).mixed(draws, batch, 0)


def box_of(images: Tensor, mixed: Tensor) -> list[int]:
    """The first row of the box in which images differ from mixed ones, the row after it, and columns."""
    rows, columns = ((images != mixed).any(0).any(0).any(axis).nonzero() for axis in (1, 0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(end) for part in (rows, columns) for end in (part.min(), part.max() + 1)]


def in_pairs(place: Tensor) -> Tensor:
    """[B]: an order in which those that timm pairs, first and last and so on, are neighbours."""
    half = len(place) // 2
    return torch.stack([place[:half], place.flip(0)[:half]], dim=1).flatten()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixed_batch_is_timms(kind: str, seed: int) -> None:
    np.random.seed(seed)
    images, labels = images_and_labels()
    alphas = {f"{name}_alpha": float(name == kind) for name in ("mixup", "cutmix")}

    theirs, target = Mixup(**alphas, label_smoothing=0.0, num_classes=CLASSES)(images.clone(), labels)

    edges = box_of(images, theirs) if kind == "cutmix" else [0, 0, 0, 0]
    order = in_pairs(torch.arange(len(labels)))
    ours = mixed_as(target[0, labels[0]].item(), edges, images[order], labels[order])
    torch.testing.assert_close(ours.image, theirs[order], **ROUNDING)
    torch.testing.assert_close(ours.target, target[order], **ROUNDING)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixed_pair_is_torchvisions(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    images, labels = images_and_labels(2)

    theirs, target = (v2.MixUp if kind == "mixup" else v2.CutMix)(num_classes=CLASSES)(images, labels)

    edges = box_of(images, theirs) if kind == "cutmix" else [0, 0, 0, 0]
    ours = mixed_as(target[0, labels[0]].item(), edges, images, labels)
    torch.testing.assert_close(ours.image, theirs, **ROUNDING)
    torch.testing.assert_close(ours.target, target, **ROUNDING)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_labels_smoothed_and_then_mixed(smoothing: float) -> None:
    np.random.seed(0)
    images, labels = images_and_labels()
    logits, order = torch.randn(len(labels), CLASSES), in_pairs(torch.arange(len(labels)))
    mixed = Mixup(1.0, label_smoothing=smoothing, num_classes=CLASSES)(images.clone(), labels)[1]
    share = (mixed[0, labels[0]] - mixed[0, labels[-1]]).item() / (1 - smoothing) / 2 + 0.5

    ours = mixed_as(share, [0, 0, 0, 0], images[order], labels[order])

    loss = F.cross_entropy(logits[order], ours.truth, label_smoothing=smoothing)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, mixed), **ROUNDING)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_the_label_is_the_class_of_the_larger_share(share: float) -> None:
    images, labels = images_and_labels(4)

    mixed = mixed_as(share, [0, 0, 0, 0], images, labels)

    assert mixed.label.tolist() == ([1, 0, 3, 2] if share < 0.5 else [0, 1, 2, 3])
    assert mixed.index.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(mixed.target.sum(1), torch.ones(4))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_shares_are_of_a_beta_distribution(alpha: float) -> None:
    expected, drawn = stats.beta(alpha, alpha), symmetric_beta(bits(2, 40_000), alpha).double().numpy()

    # Fewer for Kolmogorov and Smirnov: the float32 next to 1 stands for all shares between it and 1.
    assert stats.kstest(drawn[:4000], expected.cdf).pvalue > 0.01
    quantiles = [0, *expected.ppf(np.arange(1, 20) / 20), 1]
    assert stats.chisquare(np.histogram(drawn, quantiles)[0]).pvalue > 0.01


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1e6, 1e300])
def test_extreme_alphas_give_shares(alpha: float) -> None:
    drawn = symmetric_beta(bits(2, 1000), alpha)

    assert ((drawn >= 0) & (drawn <= 1)).all()
    edge = drawn.minimum(1 - drawn)
    assert (edge < 1e-3 if alpha < 1 else edge > 0.49).double().mean() > 0.97


@pytest.mark.parametrize("switch_prob", [0.0, 0.3, 1.0])
def test_as_many_batches_are_mixed_and_cut_as_the_probabilities_say(switch_prob: float) -> None:
    steps, mix = 20_000, Mix(1.0, 1.0, prob=0.8, switch_prob=switch_prob)

    drawn = Mixer(mix, 10_000, CLASSES).draw(KEY, steps)

    top, bottom, left, right = drawn.edges.unbind(1)
    is_cut = (top < bottom) & (left < right)
    is_mixup = drawn.outside < 1
    found = torch.stack([is_cut, is_mixup, ~(is_cut | is_mixup)]).sum(1)
    shares = torch.tensor([0.8 * switch_prob, 0.8 * (1 - switch_prob), 0.2])
    possible = shares > 0
    assert not found[~possible].any()
    assert stats.chisquare(found[possible], steps * shares[possible]).pvalue > 0.01
    assert not (is_cut & is_mixup).any()


def test_one_alpha_alone_leaves_nothing_to_switch() -> None:
    for mix, is_cut in ((Mix(mixup_alpha=0.5), False), (Mix(cutmix_alpha=0.5), True)):
        drawn = Mixer(mix, 10_000, CLASSES).draw(KEY, 1000)

        assert ((drawn.outside == 1) == is_cut).all()
        assert stats.kstest(drawn.share[drawn.edges.amin(1) > 0].numpy(), "uniform").pvalue < 1e-3


def test_a_box_has_its_share_of_the_area_and_any_pixel_as_its_centre() -> None:
    share, size = torch.rand(20_000), 9

    edges = cut_edges(share, bits(2, len(share)), size)

    start, end = edges[:, 0::2], edges[:, 1::2]
    side = (size * (1 - share).sqrt()).floor()
    is_whole = ((start > 0) & (end < size)).all(1)
    assert torch.equal((end - start)[is_whole].float(), side[is_whole][:, None].expand(-1, 2))
    assert ((start >= 0) & (end <= size) & (end - start <= side[:, None])).all()
    of_one = start[side == 1]
    found = torch.bincount(of_one[:, 0] * size + of_one[:, 1], minlength=size**2)
    assert stats.chisquare(found).pvalue > 0.01


def test_the_target_is_the_share_of_pixels() -> None:
    """Of black and white images, one of each in a pair, the mixed one's mean is λ."""
    images = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 1, SIZE, SIZE)
    mix = Mixer(BOTH, SIZE, 2).epoch(KEY, 60)

    for step in range(60):
        mixed = mix(Batch(images, torch.tensor([0, 1]), torch.arange(2)), step)
        torch.testing.assert_close(mixed.image.mean((1, 2, 3)), mixed.target[:, 0], **ROUNDING)


@pytest.mark.parametrize("apart", [1, 3])
@pytest.mark.parametrize("count", [1, 6, 12, 64])
def test_images_are_mixed_with_others_in_pairs(count: int, apart: int) -> None:
    partner = partners(count, apart, torch.device("cpu"))
    place = torch.arange(count)

    assert torch.equal(partner[partner], place)
    has_one = partner != place
    assert ((partner - place).abs()[has_one] == apart).all()
    assert (~has_one).sum() <= min(count, 2 * apart - 1)
    assert has_one.all() or count % (2 * apart)


def epoch_of(data: ImageDataModule, epoch: int = 0, **settings: int) -> list[Batch]:
    loader = data.loader("train", **settings)
    loader.sampler.set_epoch(epoch)
    return [*loader]


@pytest.fixture
def mixing(make: Make, tmp_path: Path) -> ImageDataModule:
    return ImageDataModule(make("digits", mix=BOTH, augment=Augment(flip=True)), tmp_path, seed=3)


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_epochs_and_seeds_differ_and_come_again(mixing: ImageDataModule) -> None:
    first, second, other = epoch_of(mixing), epoch_of(mixing, 1), epoch_of(mixing, seed=4)

    assert_same(first, epoch_of(mixing))
    shares = [torch.stack([batch.target.amax(1).amin() for batch in each]) for each in (first, second, other)]
    assert not torch.equal(shares[0], shares[1])
    assert not torch.equal(shares[0], shares[2])
    assert len(shares[0].unique()) > len(first) / 2


def test_resumed_at_any_step(mixing: ImageDataModule) -> None:
    whole, later = epoch_of(mixing, 2), mixing.loader("train")
    for position in (1, 7, len(whole) - 1):
        later.load_state_dict({"epoch": 2, "position": position})
        later.sampler.set_epoch(2)

        assert_same([*later], whole[position:])


def test_batches_whose_views_are_computed_together(mixing: ImageDataModule) -> None:
    together = mixing.loader("train")
    together.batches_at_once = 5

    assert_same([*together], epoch_of(mixing))


def test_two_processes_mix_as_one(make: Make, tmp_path: Path) -> None:
    alone, shared = (
        ImageDataModule(make("digits", mix=BOTH, repeats=2, batch_size=size), tmp_path, seed=0)
        for size in (32, 16)
    )
    ranks = [epoch_of(shared, rank=rank, world_size=2) for rank in range(2)]

    assert_same([join(parts, torch.cat) for parts in zip(*ranks, strict=True)], epoch_of(alone))


def test_training_alone_is_mixed(mixing: ImageDataModule, make: Make) -> None:
    plain = ImageDataModule(make("digits"), mixing.root, seed=3)

    assert all(batch.target is not None for batch in epoch_of(mixing))
    assert all(batch.target is None for batch in (*mixing.loader("val"), *epoch_of(plain)))
    assert mixing.first("train", 3).target is None
    assert mixing.fixed_views("val") is not None


@pytest.mark.parametrize(
    ("mix", "is_kept"), [(Mix(), True), (Mix(1.0), False), (Mix(0, 1.0), False), (Mix(1.0, prob=0.0), True)]
)
def test_mixed_images_are_no_fixed_views(mix: Mix, is_kept: bool, make: Make, tmp_path: Path) -> None:
    data = ImageDataModule(make("digits", mix=mix, augment=Augment()), tmp_path, seed=0)

    assert (data.fixed_views("train") is not None) == is_kept
    assert mix.is_on == (not is_kept)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("mixup_alpha", value) for value in (-0.1, float("inf"), float("nan"))),
        *(("cutmix_alpha", -1.0), ("prob", 2.0), ("prob", -0.1), ("switch_prob", 1.5)),
    ],
)
def test_what_cannot_be_is_one_line(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}={value}: ") as error:
        Mix(**{setting: value})
    assert "\n" not in str(error.value)
