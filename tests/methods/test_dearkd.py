"""`method=dearkd`: its loss by hand, and its two stages, the second of which is the labels' alone."""

import hydra
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.test_contract import (
    REMARKS,
    Keep,
    asks_of,
    assert_resumed_is_uninterrupted,
    composed,
    module_of,
    train,
)
from vitkd.config.run import CONF_DIR, Config
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.base import DataFacts
from vitkd.methods.dearkd import DearkdDistillation
from vitkd.methods.weighting import Constant, Step
from vitkd.models import ResNetConfig
from vitkd.report.settings import option
from vitkd.train.job import load_data

pytestmark = REMARKS
EXACT = {"atol": 1e-12, "rtol": 1e-10}


@pytest.fixture
def config() -> Config:
    return composed("method", "dearkd")


def answered_otherwise(targets: str, student: Tensor, teacher: Tensor) -> Tensor:
    """DeiT's equations 3 and 2, image by image."""
    if targets == "hard":
        return -student.softmax(-1)[torch.arange(len(student)), teacher.argmax(-1)].log()
    p, q = (teacher / 2.5).softmax(-1), (student / 2.5).softmax(-1)
    return 2.5**2 * (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_is_the_logits_and_the_early_features_loss(tiny, targets):
    student, teacher = tiny(patch_size=2).build().double(), ResNetConfig(8, 3, 5, "resnet20", "small").build()
    teacher = teacher.double().eval()
    method = DearkdDistillation([0, 2], [2, 1], targets, temperature=2.5, feature_weight=0.7)
    objective = method.objective(student, teacher, None, DataFacts(8, 5, lambda: torch.empty(0))).double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    batch = Batch(images, torch.zeros(3).long(), torch.arange(3))
    ours, theirs = student(images, objective.student_taps), teacher(images, objective.teacher_taps)

    expected = answered_otherwise(targets, ours.logits, theirs.logits)
    aligners = [guide.projection for guide in objective.features.guides]
    for (block, stage), aligner in zip([(0, 2), (2, 1)], aligners, strict=True):
        tokens, features = ours.features[f"block{block}"][:, 1:], theirs.features[f"stage{stage}"]
        aligned = tokens @ aligner.weight[:, :, 0, 0].mT + aligner.bias
        maps = aligned.mT.unflatten(-1, (4, 4))
        if stage == 1:  # 8×8; the other has the grid of the tokens
            maps = F.interpolate(maps, (8, 8), mode="bilinear")
        expected = expected + 0.7 * ((features - maps) ** 2).mean((1, 2, 3))

    terms = objective(batch, ours, theirs)

    torch.testing.assert_close(objective.transfer(terms), expected, **EXACT)
    assert objective.curves == ("logit_loss", "guidance_loss/block0.stage2", "guidance_loss/block2.stage1")
    assert objective.curve_values(terms).shape == (3,)


def test_its_file_chooses_two_stages_unless_a_weighting_is_chosen(config):
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        one_stage = hydra.compose("train", ["method=dearkd", "weighting=constant"])
        others = hydra.compose("train", ["method=logit"])

    assert config.weighting == Step(end=1.0, at=0.5)
    assert {f"{one_stage.weighting._target_}", f"{others.weighting._target_}"} == {
        f"{Constant.__module__}.{Constant.__name__}"
    }


def test_the_second_stage_asks_no_teacher_and_weighs_labels_alone(config):
    data, kept = load_data(config), Keep()
    module = module_of(config, data)
    asked = asks_of(module)

    train(module, config, data, kept)

    assert asked == ["train"] * 4 + ["val"] * 2
    assert [step["term class_loss"] for step in kept.steps] == [0.5] * 4 + [1.0] * 4


def test_in_the_second_stage_the_gradient_is_that_of_labels_and_no_aligner_moves(config):
    data = load_data(config)
    module = module_of(config, data).double()
    batch = data.first("train", 16)
    batch = batch._replace(image=batch.image.double())

    for epoch in (0, 1):
        module.start_epoch(epoch, 2)
        module.zero_grad()
        torch.manual_seed(0)  # of dropout
        module.losses(batch).total.backward()
        found = [parameter.grad.clone() for parameter in module.model.parameters()]
        module.model.zero_grad()
        torch.manual_seed(0)
        logits = module.model(batch.image).answer
        F.cross_entropy(logits, batch.label, label_smoothing=config.label_smoothing).backward()
        of_labels = [parameter.grad for parameter in module.model.parameters()]

        is_alone = all(torch.allclose(a, b, **EXACT) for a, b in zip(found, of_labels, strict=True))
        assert is_alone is (epoch == 1)
        assert all(p.grad.any() == (epoch == 0) for p in module.objective.parameters())


@pytest.mark.parametrize("stopped_after", [2, 4])
def test_resumed_across_the_stages_is_uninterrupted(config, tmp_path, stopped_after):
    """The stages change after step 4; the contract's own test stops well within the second."""
    assert_resumed_is_uninterrupted(config, tmp_path, stopped_after)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"targets": "none"}, ["targets=none", "hard or soft"]),
        ({"temperature": 0.0}, ["temperature=0.0"]),
        ({"feature_weight": 0.0}, ["feature_weight=0.0", "above 0"]),
        ({"stages": [1, 4]}, ["method.stages=[1, 4]", "1 to 3"]),
        ({"blocks": [0]}, ["method.blocks=[0]", "2 stages"]),
    ],
)
def test_impossible_settings_are_one_line(tiny, settings, named):
    with pytest.raises(ConfigError) as error:
        DearkdDistillation(**settings).check(tiny(), ResNetConfig(8, 3, 5, "resnet20", "small"), None)

    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in named)


def test_the_temperature_counts_for_soft_targets_alone():
    assert "method.temperature" in DearkdDistillation().ignores
    assert "method.temperature" not in DearkdDistillation(targets="soft").ignores


def test_the_report_calls_it_as_it_is_typed(config):
    assert option({"method._target_": config.resolved["method"]["_target_"]}, "method") == "dearkd"
