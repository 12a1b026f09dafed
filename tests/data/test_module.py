"""Loaders: the same batches resident or decoded, alone or shared, straight through or resumed."""

import multiprocessing
import re
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from vitkd.data import Augment, Batch, Dataset, ImageDataModule, Loader, join
from vitkd.data.split import FileSplit
from vitkd.errors import ConfigError

from .conftest import OTHERS

Make = Callable[..., Dataset]


def epoch_of(loader: Loader, epoch: int = 0) -> list[Batch]:
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def images_of(batches: Iterable[Batch]) -> list[tuple[int, torch.Tensor]]:
    """Each image with its index."""
    return [(int(i), image) for batch in batches for image, i in zip(batch.image, batch.index, strict=True)]


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def digits(make: Make, tmp_path: Path) -> ImageDataModule:
    return ImageDataModule(make("digits", augment=Augment(crop_padding=1, flip=True)), tmp_path, seed=3)


def test_a_batch(digits: ImageDataModule) -> None:
    batch = epoch_of(digits.loader("train"))[0]
    assert batch.image.shape == (64, 1, 8, 8)
    assert (batch.image.dtype, batch.label.dtype, batch.index.dtype) == (
        torch.float32,
        torch.int64,
        torch.int64,
    )
    assert torch.equal(batch.label, digits._splits["train"].labels[batch.index])


def test_splits_share_no_image(digits: ImageDataModule) -> None:
    train, val = (torch.cat([batch.index for batch in digits.loader(split)]) for split in ("train", "val"))
    assert not set(train.tolist()) & set(val.tolist())
    assert len(val) == 143


def test_evaluation_is_plain_and_the_same_each_epoch(digits: ImageDataModule) -> None:
    loader = digits.loader("test")
    first = epoch_of(loader)
    assert_same(first, epoch_of(loader, 7))
    pixels = torch.cat([batch.image for batch in first]) * digits.dataset.std[0] + digits.dataset.mean[0]
    torch.testing.assert_close(pixels, digits._splits["test"].read_all() / 255)


def test_epochs_differ_and_come_again(digits: ImageDataModule) -> None:
    loader = digits.loader("train")
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert not torch.equal(first[0].index, second[0].index)
    assert_same(first, epoch_of(digits.loader("train"), 0))


@pytest.mark.parametrize("world_size", [1, 3])
def test_fixed_views_are_what_the_loaders_give(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    module = ImageDataModule(make("digits", augment=Augment(), eval_batch_size=50), tmp_path, seed=3)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device="cpu"), global_rank=0, world_size=world_size
    )
    monkeypatch.setattr(module, "trainer", trainer)
    for split, count in (("train", 1295), ("val", -(-143 // world_size))):
        views = module.fixed_views(split)
        assert views is not None
        seen = images_of(views)
        fixed = dict(seen)
        assert len(seen) == len(fixed) == count
        met = dict(images_of(module.loader(split)))
        assert met.keys() <= fixed.keys()
        assert all(torch.equal(image, fixed[i]) for i, image in met.items())


def test_views_are_not_fixed_where_they_vary_or_there_are_none(digits: ImageDataModule, make: Make) -> None:
    assert digits.fixed_views("train") is None
    assert digits.fixed_views("val") is not None
    whole = ImageDataModule(make("digits", val_fraction=0, augment=Augment()), digits.root, seed=3)
    assert whole.fixed_views("train") is not None
    assert whole.fixed_views("val") is None


def test_images_decoded_for_every_batch_have_no_fixed_views(make: Make, photos: Path) -> None:
    settings = {"root": str(photos), "image_size": 16, "augment": Augment(), "workers": 0}
    resident = ImageDataModule(make("image_folder", **settings), photos, seed=1)
    decoded = ImageDataModule(make("image_folder", resident_limit_gib=0.0, **settings), photos, seed=1)

    for split in ("train", "val"):
        assert resident.fixed_views(split) is not None
        assert decoded.fixed_views(split) is None


def test_an_image_looks_the_same_in_any_batch(make: Make, tmp_path: Path) -> None:
    views = []
    for batch_size, world_size in ((7, 1), (64, 1), (16, 3)):
        dataset = make("digits", augment=Augment(crop_padding=2, flip=True), batch_size=batch_size)
        module = ImageDataModule(dataset, tmp_path, seed=3)
        ranks = [module.loader("train", rank=rank, world_size=world_size) for rank in range(world_size)]
        views.append(dict(pair for loader in ranks for pair in images_of(loader)))
    common = views[0].keys() & views[1].keys() & views[2].keys()
    assert len(common) > 1200
    assert all(torch.equal(views[0][i], other[i]) for other in views[1:] for i in common)


@pytest.mark.parametrize(
    "augment",
    [
        {"crop_padding": 2, "flip": True},
        {"resized_crop": [0.5, 1.0]},
        {"flip": False},
        {"then": ["rand_augment", "random_erasing"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("at_once", [2, 5, 1000])
def test_views_of_many_batches_at_once_are_those_of_each(
    augment: dict[str, Any], at_once: int, make: Make, tmp_path: Path
) -> None:
    """As a GPU computes them."""
    data = ImageDataModule(make("digits", augment=augment), tmp_path, seed=0)
    loader, together = data.loader("train"), data.loader("train")
    loader.batches_at_once, together.batches_at_once = 1, at_once

    assert_same(epoch_of(together, 1), epoch_of(loader, 1))
    whole = epoch_of(loader, 2)
    together.load_state_dict({"epoch": 2, "position": 3})
    together.sampler.set_epoch(2)
    assert_same(list(together), whole[3:])


def test_two_processes_see_the_batches_of_one(make: Make, tmp_path: Path) -> None:
    alone = epoch_of(ImageDataModule(make("digits", batch_size=32), tmp_path, 0).loader("train"), 2)
    shared = ImageDataModule(make("digits", batch_size=16), tmp_path, 0)
    ranks = [epoch_of(shared.loader("train", rank=rank, world_size=2), 2) for rank in range(2)]
    joined = [join(parts, torch.cat) for parts in zip(*ranks, strict=True)]
    assert_same(joined, alone)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop_padding=2, flip=True),
        Augment(resized_crop=[0.5, 1.0]),
        Augment(flip=True, then=["rand_augment"], augmentations=OTHERS),
    ],
)
def test_decoded_batches_equal_resident_ones(
    workers: int, augment: Augment, make: Make, photos: Path
) -> None:
    settings = {
        "root": str(photos),
        "image_size": 16,
        "batch_size": 8,
        "augment": augment,
        "workers": workers,
    }
    resident = ImageDataModule(make("image_folder", **settings), photos, seed=1)
    decoded = ImageDataModule(make("image_folder", resident_limit_gib=0.0, **settings), photos, seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train, val = decoded.loader("train"), decoded.loader("val")
    for epoch in (0, 1):
        assert_same(epoch_of(train, epoch), epoch_of(resident.loader("train"), epoch))
    next(iter(train))  # an epoch that is left early does not spoil the next one
    assert_same(epoch_of(train, 1), epoch_of(resident.loader("train"), 1))
    assert_same(epoch_of(val), epoch_of(resident.loader("val")))
    assert torch.equal(before, torch.get_rng_state())
    decoded.teardown("fit")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_names_the_unreadable_image(workers: int, make: Make, photos: Path) -> None:
    settings = {"root": str(photos), "image_size": 16, "resident_limit_gib": 0.0, "workers": workers}
    module = ImageDataModule(make("image_folder", **settings), photos, seed=0)
    loader = module.loader("train")
    for file in photos.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be read as an image") as error:
        next(iter(loader))
    assert "\n" not in str(error.value)
    module.teardown("fit")


def test_closing_ends_all_workers(make: Make, photos: Path) -> None:
    dataset = make("image_folder", root=str(photos), image_size=16, resident_limit_gib=0.0, workers=2)
    with closing(ImageDataModule(dataset, photos, seed=0)) as module:
        val, test = module.loader("val"), module.loader("test")
        assert_same(epoch_of(val), epoch_of(val, 1))
        module.teardown("fit")
        epoch_of(val)  # starts new ones
        next(iter(test))
        assert len(multiprocessing.active_children()) == 4
    assert not multiprocessing.active_children()
    module.close()


def test_a_corrupt_image_is_found_by_setup(make: Make, photos: Path) -> None:
    settings = {"root": str(photos), "image_size": 16}
    (photos / "b" / "1.jpg").write_bytes(b"no image")
    module = ImageDataModule(make("image_folder", **settings), photos, seed=0)
    for _ in range(2):  # nor does a second try find it in order
        with pytest.raises(ConfigError, match=r"b/1.jpg cannot be read as an image"):
            module.setup()
    ImageDataModule(make("image_folder", resident_limit_gib=0.0, **settings), photos, seed=0).setup()


def test_images_are_decoded_once_for_all_devices(
    make: Make, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ImageDataModule(make("image_folder", root=str(photos), image_size=16), photos, seed=0)
    module.setup()
    monkeypatch.setattr("vitkd.data.split.FileSplit._decode", None)
    cpu, meta = (module.loader("test", device).pixels.images for device in ("cpu", "meta"))
    assert cpu is module.loader("test", "cpu").pixels.images is module._images["test"]
    assert meta.shape == cpu.shape


@pytest.mark.parametrize("limit", [8.0, 0.0])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_first_images(
    split: str, limit: float, make: Make, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"root": str(photos), "image_size": 16, "batch_size": 4, "eval_batch_size": 4}
    settings |= {"augment": Augment(crop_padding=2, flip=True), "workers": 2, "resident_limit_gib": limit}
    module = ImageDataModule(make("image_folder", **settings), photos, seed=1)
    whole = join(epoch_of(module.loader(split)), torch.cat)
    module.close()
    read: list[int] = []
    unspied = FileSplit.read
    monkeypatch.setattr(FileSplit, "read", lambda split, at: read.extend(at) or unspied(split, at))
    first = module.first(split, 5)
    assert_same([first], [whole.map(lambda part: part[:5])])
    assert read == ([] if limit else first.index.tolist())
    assert not multiprocessing.active_children()
    assert len(module.first(split, 1000).label) == len(module._indices[split])


def test_no_validation(make: Make, tmp_path: Path) -> None:
    module = ImageDataModule(make("digits", val_fraction=0.0), tmp_path, 0)
    assert module.val_dataloader() == []
    assert sum(len(batch.label) for batch in module.train_dataloader()) == 1438 // 64 * 64


def test_setup_loads_once(digits: ImageDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    digits.setup("fit")
    monkeypatch.setattr(type(digits.dataset), "load", None)
    monkeypatch.setattr(type(digits.dataset), "inspect", None)
    digits.prepare_data()
    digits.setup("test")
    assert digits.loader("train").pixels is digits.loader("val").pixels


def test_going_on_from_any_batch(digits: ImageDataModule) -> None:
    whole = epoch_of(digits.loader("train"), 4)
    first, later = digits.loader("train"), digits.loader("train")
    first.sampler.set_epoch(4)
    stopped = iter(first)
    for _ in range(5):
        next(stopped)
    later.load_state_dict(first.state_dict())
    later.sampler.set_epoch(4)
    assert_same(list(later), whole[5:])
    assert len(list(later)) == len(whole)


def test_a_finished_epoch_leaves_nothing_to_skip(digits: ImageDataModule) -> None:
    first, later = digits.loader("train"), digits.loader("train")
    next(iter(first))
    later.load_state_dict(first.state_dict())
    later.sampler.set_epoch(1)
    assert_same(list(later), epoch_of(digits.loader("train"), 1))


class Diary(L.LightningModule):
    """Learns one number, notes what it saw and, given a folder, keeps a checkpoint of every step."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.folder = folder
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, list[int]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.seen.append((self.current_epoch, batch_idx, batch.index.tolist()))
        return (self.weight - batch.image.mean()) ** 2

    def on_train_batch_end(self, *_: object) -> None:
        if self.folder:
            self.trainer.save_checkpoint(self.folder / f"{self.global_step}.ckpt")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(make: Make, folder: Path, resume: Path | None = None) -> Diary:
    module = ImageDataModule(make("digits", batch_size=400), folder, seed=9)  # 3 batches an epoch
    diary = Diary(None if resume else folder)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(diary, module, ckpt_path=resume, weights_only=True)
    return diary


# Lightning 2.6 calls a part of torch's pytree that torch 2.15 deprecates.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
# Lightning's advice to use more workers and a logger is for other loaders.
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_lightning_sets_the_epoch_and_resumes_at_every_step(make: Make, tmp_path: Path) -> None:
    whole = fit(make, tmp_path)
    loader = ImageDataModule(make("digits", batch_size=400), tmp_path, seed=9).loader("train")
    expected = [
        (epoch, place, batch.index.tolist())
        for epoch in range(4)
        for place, batch in enumerate(epoch_of(loader, epoch))
    ]
    assert whole.seen == expected
    for step in range(1, 12):
        resumed = fit(make, tmp_path, tmp_path / f"{step}.ckpt")
        assert resumed.seen == expected[step:]
        assert torch.equal(resumed.weight, whole.weight)


def test_validated_on_the_test_images_all_others_train(make: Make, tmp_path: Path) -> None:
    data = ImageDataModule(make("digits", val_fraction=0, validate_on="test"), tmp_path, seed=0)

    assert_same(epoch_of(data.loader("val")), epoch_of(data.loader("test")))
    assert len(data.loader("train").sampler.index) == 1438


def test_nothing_is_held_out_where_the_test_images_validate(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"val_fraction=0\.1: must be 0 with validate_on=test"):
        make("digits", validate_on="test")


def positions(module: ImageDataModule) -> dict[str, set[int]]:
    module.setup()
    return {name: {*indices.tolist()} for name, indices in module._indices.items()}


@pytest.mark.parametrize("seed", [0, 7])
def test_a_share_of_the_training_images_is_nested_and_leaves_the_others_as_they_are(
    make: Make, tmp_path: Path, seed: int
) -> None:
    whole = ImageDataModule(make("digits"), tmp_path, seed=0)
    everything, before = positions(whole), set()
    for fraction, count in ((0.05, 65), (0.1, 130), (0.5, 648), (1.0, 1295)):
        module = ImageDataModule(make("digits", train_fraction=fraction), tmp_path, seed=seed)
        divided = positions(module)
        assert {name: divided[name] for name in ("val", "test")} == {
            name: everything[name] for name in ("val", "test")
        }
        assert before <= divided["train"] <= everything["train"]
        assert len(divided["train"]) == pytest.approx(count, abs=5)
        labels = whole._splits["train"].labels
        sizes, kept = (labels[[*each]].bincount() for each in (everything["train"], divided["train"]))
        assert (kept - fraction * sizes).abs().max() <= 0.5
        assert torch.equal(whole.training_images(fraction), module._indices["train"])
        before = divided["train"]


def test_an_epoch_has_only_its_share(make: Make, tmp_path: Path) -> None:
    module = ImageDataModule(make("digits", train_fraction=0.1), tmp_path, seed=3)
    seen = torch.cat([batch.index for epoch in range(4) for batch in epoch_of(module.loader("train"), epoch)])
    assert {*seen.tolist()} <= {*module._indices["train"].tolist()}
    assert module.num_images == 1438, "an index counts in the official split"
    assert [len(part) for part in epoch_of(module.loader("train"))[0][:3]] == [64] * 3


def test_another_split_seed_chooses_another_share(make: Make, tmp_path: Path) -> None:
    shares = [
        positions(ImageDataModule(make("digits", train_fraction=0.1, split_seed=seed), tmp_path, seed=0))
        for seed in (0, 1)
    ]
    assert shares[0]["train"] != shares[1]["train"]


def test_a_line_says_how_many_images_are_trained_on(make: Make, photos: Path, tmp_path: Path) -> None:
    (line,) = ImageDataModule(make("digits", train_fraction=0.5), tmp_path, seed=0).notes()
    assert re.fullmatch(
        r"train_fraction=0\.5: 6\d\d of 1,295 training images, the same share of each class", line
    )
    dataset = make("image_folder", root=str(photos), train_fraction=0.5)
    first, second = ImageDataModule(dataset, photos, seed=0).notes()
    assert "skipped" not in first, "what is left out belongs to the training images"
    assert "24 of 48" in second


@pytest.mark.parametrize("limit", [8.0, 0.0])
def test_views_of_one_image_differ_and_come_again(limit: float, make: Make, photos: Path) -> None:
    settings = {"root": str(photos), "image_size": 16, "workers": 0, "resident_limit_gib": limit}
    settings |= {"batch_size": 8, "augment": Augment(resized_crop=[0.3, 1.0]), "passes": 4, "repeats": 2}
    module = ImageDataModule(make("image_folder", **settings), photos, seed=1)

    batches = epoch_of(module.loader("train"))

    assert_same(batches, epoch_of(module.loader("train")))
    seen = images_of(batches)
    assert len(seen) == 4 * module.counts["train"] // 8 * 8
    for index in {index for index, _ in seen[:20]}:
        views = torch.stack([image for other, image in seen if other == index])
        assert len(views.flatten(1).unique(dim=0)) == len(views) >= 3
    first = module.first("train", 8)
    assert len(first.index.unique()) == 8
    assert torch.equal(first.image[0], batches[0].image[0])


def test_what_is_shown_several_times_without_augmentation_has_fixed_views(make: Make, tmp_path: Path) -> None:
    data = ImageDataModule(make("digits", augment=Augment(), passes=3, repeats=2), tmp_path, seed=0)
    views = data.fixed_views("train")
    assert views is not None

    fixed = dict(images_of(views))

    assert len(fixed) == sum(len(batch.label) for batch in views) == 1295
    met = images_of(epoch_of(data.loader("train"))[:2])
    assert all(torch.equal(image, fixed[index]) for index, image in met)
