"""A teacher is asked once for what it would say again in every epoch, and nothing else changes."""

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.train.objectives import compare_maps
from vitkd.data import Augment, Batch, Digits, ImageDataModule
from vitkd.data.augment.policies import RandAugment
from vitkd.methods.token import TokenObjective
from vitkd.models import Output, ResNetConfig, Taps, ViT
from vitkd.optim import AdamW, Constant
from vitkd.train.callbacks import TeacherCaching
from vitkd.train.module import DistillModule
from vitkd.train.teacher_cache import TeacherCache

pytestmark = [
    # Lightning 2.6 asks for a tree's leaves in a way that newer PyTorch deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]

EPOCHS, TRAIN, VAL = 3, 1295, 143
# How much an answer takes is found by asking for one image of each split.
PROBES = 2
ENOUGH = 1.0


class Watch(L.Callback):
    """Notes the student's weights after every step, and what the module holds before the last."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.cached: dict[str, TeacherCache] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.weights.append(torch.nn.utils.parameters_to_vector(module.model.parameters()).detach().clone())
        self.cached = dict(module.cached)


class Asked:
    """Counts the images that pass through a teacher."""

    def __init__(self, teacher: ViT) -> None:
        self.images = 0
        teacher.tokenizer.register_forward_hook(self._count)

    def _count(self, module: Any, inputs: tuple[torch.Tensor], output: Any) -> None:
        self.images += len(inputs[0])


@pytest.fixture
def digits(tmp_path):
    """Makes the embedded data set's module; keyword arguments change the data set."""

    def digits(**changes: Any) -> ImageDataModule:
        facts = {"name": "digits", "num_classes": 10, "channels": 1, "image_size": 8, "patch_size": 4}
        facts |= {"mean": [0.3], "std": [0.4], "batch_size": 400, "eval_batch_size": 100}
        return ImageDataModule(Digits(**(facts | changes)), tmp_path, seed=3)

    return digits


@pytest.fixture
def distill(tiny):
    """Makes the same module each time."""

    def distill(alpha: float = 0.5) -> DistillModule:
        torch.manual_seed(5)
        facts = {"channels": 1, "num_classes": 10}
        student, teacher = tiny(**facts, dropout=0.1).build(), tiny(**facts, depth=4, dropout=0.1).build()
        objective = compare_maps(student, teacher)
        return DistillModule(
            student, AdamW(lr=1e-2), Constant(), teacher=teacher, objective=objective, alpha=alpha
        )

    return distill


@pytest.fixture
def fit(tmp_path):
    """Fits a module on the CPU, from the same random state each time, and returns the Trainer."""

    def fit(
        module: DistillModule, data: ImageDataModule, *callbacks: L.Callback, start: Path | None = None,
        **settings: Any,
    ) -> L.Trainer:  # fmt: skip
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        defaults = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0} | dict.fromkeys(quiet, False)
        trainer = L.Trainer(
            accelerator="cpu", default_root_dir=tmp_path, callbacks=[*callbacks], **(defaults | settings)
        )
        torch.manual_seed(7)
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
        return trainer

    return fit


def batch_of(*index: int) -> Batch:
    """Images that show their number."""
    numbers = torch.tensor(index)
    image = numbers.float().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return Batch(image, torch.zeros(len(index), dtype=torch.long), numbers)


def tell_number(images: torch.Tensor) -> Output:
    """Scores [B, 1, 2, 2] of two blocks and logits whose class is the image's number."""
    classes = images[:, 0, 0, 0].long()
    logits = torch.nn.functional.one_hot(classes, 9).float()
    return Output(logits, scores={1: images, 4: -images})


@pytest.fixture
def numbers() -> TeacherCache:
    """Images 2, 5, 7 of a split of nine."""
    return TeacherCache(tell_number, [batch_of(7, 2), batch_of(5)], torch.tensor([2, 5, 7]), size=9)


class TestCache:
    @pytest.mark.parametrize("index", [[5, 2, 5], [[7, 2], [2, 5], [5, 5]], []])
    def test_each_image_finds_its_own_answer(self, numbers, index):
        index = torch.tensor(index, dtype=torch.long)

        answer = numbers.answer(index)
        scores = answer.scores

        assert scores.keys() == {1, 4}
        assert scores[1].shape == (*index.shape, 1, 2, 2)
        expected = index.float()[..., None, None, None].expand(scores[1].shape)
        assert torch.equal(scores[1], expected)
        assert torch.equal(scores[4], -expected)
        assert torch.equal(answer.predicted, index)

    @pytest.mark.parametrize("image", [0, 8, 9])
    def test_an_image_that_is_not_held_is_an_error(self, numbers, image):
        """Not another image's answer."""
        with pytest.raises(IndexError):
            numbers.answer(torch.tensor([2, image]))

    def test_batches_have_to_hold_all_images(self):
        with pytest.raises(AssertionError, match="2 images for 3 rows"):
            TeacherCache(tell_number, [batch_of(7, 2)], torch.tensor([2, 5, 7]), size=9)

    def test_answers_need_no_gradient(self, tiny):
        teacher, batch = tiny(depth=1).build(), Batch(torch.randn(2, 3, 8, 8), *2 * [torch.arange(2)])

        taps = Taps(scores=(0,), logits=False)
        cache = TeacherCache(lambda x: teacher(x, taps), [batch], torch.arange(2), size=2)

        answer = cache.answer(torch.arange(2))
        assert not answer.scores[0].requires_grad
        assert answer.logits is None

    def test_copies_share_it(self, numbers):
        assert deepcopy({"train": numbers})["train"] is numbers


class TestRun:
    @pytest.mark.parametrize(
        ("precision", "tolerance"),
        [("32-true", 1e-4), ("64-true", 1e-9), ("bf16-mixed", 0.1), ("bf16-true", 0.1)],
    )
    def test_takes_the_same_steps(self, distill, digits, fit, precision, tolerance):
        """But for what a matrix product's last bit owes to the size of the batch; mostly that is nothing."""
        with_cache, without = Watch(), Watch()
        start = torch.nn.utils.parameters_to_vector(distill().model.parameters())

        ours = fit(distill(), digits(), TeacherCaching(digits(), ENOUGH), with_cache, precision=precision)
        theirs = fit(distill(), digits(), without, precision=precision)

        assert with_cache.cached.keys() == {"train", "val"}
        assert not without.cached
        for step, (a, b) in enumerate(zip(with_cache.weights, without.weights, strict=True)):
            assert (a - b).norm() <= tolerance * (b - start).norm(), f"step {step}"
        for name in ("val/teacher_agreement", "val/transfer_loss", "val/total_loss"):
            found, expected = ours.callback_metrics[name], theirs.callback_metrics[name]
            assert found.item() == pytest.approx(expected.item(), rel=tolerance), name

    @pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
    def test_asks_in_the_precision_of_the_steps(self, distill, digits, fit, precision):
        seen = []

        def look(module: Any, inputs: tuple[torch.Tensor], output: Any) -> None:
            seen.append((inputs[0].dtype, output.dtype, torch.is_autocast_enabled("cpu")))

        for callbacks in ([], [TeacherCaching(digits(), ENOUGH)]):
            module = distill()
            module.teacher.tokenizer.register_forward_hook(look)
            fit(module, digits(), *callbacks, precision=precision)

        assert len(seen) == EPOCHS * (3 + 2) + 13 + 2 + PROBES
        assert len(set(seen)) == 1

    def test_asks_for_each_image_once(self, distill, digits, fit):
        module, data = distill(), digits()
        asked = Asked(module.teacher)

        fit(module, data, TeacherCaching(data, ENOUGH))

        assert asked.images == TRAIN + VAL + PROBES

    def test_of_a_convolutional_teacher_the_logits_alone_are_kept(self, tiny, digits, fit):
        """And teach what they teach when asked for each time."""
        objective, weights, asked = TokenObjective("soft", 2.0), [], []
        for caching in (True, False):
            torch.manual_seed(5)
            student = tiny(channels=1, num_classes=10, distillation_token=True).build()
            teacher, watch, data = ResNetConfig(8, 1, 10).build(), Watch(), digits()
            module = DistillModule(
                student, AdamW(lr=1e-2), Constant(), teacher=teacher, objective=objective, alpha=0.3
            )
            sizes: list[int] = []
            teacher.network.conv1.register_forward_hook(lambda *given, s=sizes: s.append(len(given[1][0])))
            fit(module, data, *([TeacherCaching(data, ENOUGH)] if caching else []), watch, max_epochs=2)
            weights.append(watch.weights[-1])
            asked.append(sum(sizes))
            if caching:
                kept = {split: cache._answers.tensors() for split, cache in watch.cached.items()}
                assert {split: [tensor.shape for tensor in tensors] for split, tensors in kept.items()} == {
                    "train": [(TRAIN, 10)],
                    "val": [(VAL, 10)],
                }

        assert asked == [TRAIN + VAL + PROBES, 2 * (3 * 400 + VAL)]
        torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)

    def test_without_a_cache_the_teacher_is_asked_in_every_epoch(self, distill, digits, fit):
        module = distill()
        asked = Asked(module.teacher)

        fit(module, digits())

        assert asked.images == EPOCHS * (3 * 400 + VAL)

    @pytest.mark.parametrize(
        "augment",
        [
            Augment(flip=True),
            Augment(crop_padding=1),
            Augment(resized_crop=[0.5, 1.0]),
            Augment(then=["rand_augment"], augmentations={"rand_augment": RandAugment()}),
        ],
    )
    def test_views_that_vary_are_asked_for_each_time(self, distill, digits, fit, augment):
        module, data, watch = distill(), digits(augment=augment), Watch()
        asked = Asked(module.teacher)

        fit(module, data, TeacherCaching(data, ENOUGH), watch)

        assert watch.cached.keys() == {"val"}
        assert asked.images == EPOCHS * 3 * 400 + VAL + 1

    def test_at_alpha_1_only_validation_asks(self, distill, digits, fit):
        module, data = distill(alpha=1.0), digits()
        asked = Asked(module.teacher)

        fit(module, data, TeacherCaching(data, ENOUGH))

        assert asked.images == VAL + 1

    @pytest.mark.parametrize(
        ("settings", "kept"),
        [
            ({"max_epochs": 1}, set()),
            ({"limit_train_batches": 1}, {"val"}),
            ({"limit_train_batches": 2}, {"train", "val"}),
            ({"limit_val_batches": 0}, {"train"}),
            ({"max_epochs": 2, "limit_val_batches": 0.5}, {"train"}),
            ({"limit_val_batches": 2}, {"train", "val"}),
            ({"check_val_every_n_epoch": 3}, {"train"}),
        ],
    )
    def test_keeps_what_is_gone_through_more_than_once(self, distill, digits, fit, settings, kept):
        data, watch = digits(), Watch()

        fit(distill(), data, TeacherCaching(data, ENOUGH), watch, **settings)

        assert watch.cached.keys() == kept

    def test_no_validation_images_are_no_trouble(self, distill, digits, fit):
        data, watch = digits(val_fraction=0), Watch()

        fit(distill(), data, TeacherCaching(data, ENOUGH), watch, limit_val_batches=0)

        assert watch.cached.keys() == {"train"}

    def test_an_average_of_weights_neither_copies_nor_loses_it(self, distill, digits, fit):
        module, data, watch = distill(), digits(), Watch()
        asked, average = Asked(module.teacher), EMAWeightAveraging(decay=0.5)

        fit(module, data, average, TeacherCaching(data, ENOUGH), watch)

        assert asked.images == TRAIN + VAL + PROBES
        assert not average._average_model.module.cached

    @pytest.mark.parametrize("left", [1, 2])
    def test_resumes_from_a_checkpoint_that_holds_none_of_it(self, left, distill, digits, fit, tmp_path):
        resumed, file = Watch(), tmp_path / "last.ckpt"
        first = digits()
        fit(distill(), first, TeacherCaching(first, ENOUGH), max_epochs=2).save_checkpoint(file)
        data, module = digits(), distill()
        asked = Asked(module.teacher)

        saved = torch.load(file, weights_only=True)
        fit(module, data, TeacherCaching(data, ENOUGH), resumed, max_epochs=2 + left, start=file)

        assert asked.images == TRAIN + VAL + PROBES
        assert all(name.startswith("model.") for name in saved["state_dict"])
        assert resumed.cached.keys() == {"train", "val"}
        assert len(resumed.weights) == left * 3

    def test_gives_its_memory_back(self, distill, digits, fit):
        module, data = distill(), digits()

        fit(module, data, TeacherCaching(data, ENOUGH))

        assert not module.cached

    @pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.to("cpu"), lambda m: m.bfloat16()])
    def test_a_module_moved_or_cast_asks_again(self, distill, numbers, change):
        module = distill()
        module.cached["train"] = numbers

        change(module)

        assert not module.cached


class TestLimit:
    # Three blocks of two heads over five tokens, in float32; validation compares ten logits besides.
    TRAIN_BYTES = TRAIN * 4 * 3 * 2 * 5**2
    VAL_BYTES = VAL * 4 * (3 * 2 * 5**2 + 10)

    def test_an_image_takes_what_is_said(self, distill, digits, fit):
        data, watch = digits(), Watch()

        fit(distill(), data, TeacherCaching(data, ENOUGH), watch)

        stored = {
            split: sum(tensor.nbytes for tensor in cache._answers.tensors())
            for split, cache in watch.cached.items()
        }
        assert stored == {"train": self.TRAIN_BYTES, "val": self.VAL_BYTES}

    @pytest.mark.parametrize(
        ("room", "kept"),
        [
            (TRAIN_BYTES + VAL_BYTES, {"train", "val"}),
            (TRAIN_BYTES + VAL_BYTES - 1, {"train"}),
            (VAL_BYTES, {"val"}),
            (VAL_BYTES - 1, set()),
        ],
    )
    def test_is_kept(self, distill, digits, fit, room, kept):
        data, watch = digits(), Watch()

        fit(distill(), data, TeacherCaching(data, room / 2**30), watch)

        assert watch.cached.keys() == kept

    def test_what_is_kept_and_what_is_not_is_reported(self, distill, digits, fit, caplog):
        data = digits()
        gib = self.VAL_BYTES / 2**30

        with caplog.at_level(logging.INFO, "vitkd"):
            fit(distill(), data, TeacherCaching(data, gib))

        refused, kept = (line for line in caplog.messages if line.startswith("teacher: its answers"))
        assert f"1,295 training images would take {self.TRAIN_BYTES / 2**20:.1f} MiB" in refused
        assert f"teacher.cache_gib={gib:g}" in refused
        assert f"143 validation images are computed once and kept ({self.VAL_BYTES / 2**20:.1f} MiB)" in kept
