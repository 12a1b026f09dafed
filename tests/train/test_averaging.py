"""The average of the weights that a run validates and keeps."""

from copy import deepcopy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from tests.train.test_fit import Batches, without_validation
from vitkd.models import ResNetConfig
from vitkd.optim import AdamW, Constant
from vitkd.train.averaging import WarmAverage
from vitkd.train.module import DistillModule


class Tracked(L.LightningModule):
    """One weight that is set to what it is to be after each step."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([start]))


@pytest.mark.parametrize(
    ("count", "kept"), [(0, 0.0), (1, 2 / 11), (10, 11 / 20), (990, 991 / 1000), (10**6, 0.999)]
)
def test_an_average_forgets_the_first_weights_soon_and_the_late_ones_slowly(count, kept):
    average, module = WarmAverage(0.999), Tracked(1.0)
    average.setup(L.Trainer(logger=False, accelerator="cpu"), module, "fit")
    average._average_model.n_averaged.fill_(count)
    module.weight.data.zero_()

    average.update(module)

    assert average._average_model.module.weight.item() == pytest.approx(kept)
    assert average._average_model.n_averaged == count + 1


@without_validation
@pytest.mark.parametrize(
    ("name", "accumulated", "precision"),
    [("vit", 1, "32-true"), ("vit", 2, "bf16-true"), ("resnet", 2, "32-true"), ("vit", 1, "64-true")],
)
def test_averaging_within_the_step_is_lightnings_after_it(name, accumulated, precision, tiny, tmp_path):
    """Bit for bit, batch normalisation's counts of batches included."""

    def by_formula(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
        if not averaged.is_floating_point():
            return current
        kept = ((1 + count) / (10 + count)).clamp(max=0.5).to(averaged)
        return kept * averaged + (1 - kept) * current

    network = ResNetConfig(num_classes=10, image_size=8, channels=3, stem="small")
    model = (tiny() if name == "vit" else network).build()
    batches, kept = Batches(*[6] * 8), []
    for average in (WarmAverage(0.5), WeightAveraging(avg_fn=by_formula)):
        module = DistillModule(deepcopy(model), AdamW(lr=1e-2), Constant())
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=2,
            accumulate_grad_batches=accumulated,
            precision=precision,
            callbacks=[average],
            default_root_dir=tmp_path,
            **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False),
            enable_checkpointing=False,
        )
        trainer.fit(module, batches)
        kept.append(module.model.state_dict())

    for (weight, mine), theirs in zip(kept[0].items(), kept[1].values(), strict=True):
        if precision == "32-true":
            assert torch.equal(mine, theirs), weight
        torch.testing.assert_close(mine, theirs)
