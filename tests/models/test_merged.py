"""A merged model adds up its students' logits, trains what it is asked to, and outlives their run folders."""

import json
import shutil

import pytest
import torch

from vitkd.errors import ConfigError
from vitkd.models import MergedConfig, ResNetConfig, Taps, load_model, save_model


@pytest.fixture
def runs(tiny, tmp_path) -> list[str]:
    """The run folders of three students that differ in width and depth."""
    shapes = [{}, {"embed_dim": 8, "dropout": 0.5}, {"depth": 1, "representation_size": 3}]
    folders = [tmp_path / f"run-{index}_seed-4" for index in range(len(shapes))]
    for shape, folder in zip(shapes, folders, strict=True):
        folder.mkdir()
        save_model(tiny(**shape).build(), folder / "student.safetensors")
    return [str(folder) for folder in folders]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def merged(runs, **settings) -> MergedConfig:
    return MergedConfig(8, 3, 5, runs=runs, **settings)


def test_logits_are_the_sum_and_representations_side_by_side(runs, images):
    taps = Taps(features=("pre_logits",))

    output = merged(runs).build().eval()(images, taps)

    answers = [load_model(run)(images, taps) for run in runs]
    torch.testing.assert_close(output.logits, sum(each.logits for each in answers))
    assert output.features["pre_logits"].shape == (2, 12 + 8 + 3)
    assert torch.equal(output.features["pre_logits"][:, 12:20], answers[1].features["pre_logits"])


def test_a_seed_in_a_path_is_its_own(runs):
    pattern = [run.replace("seed-4", "seed-{seed}") for run in runs]

    assert [str(place) for place in merged(pattern, seed=4).places] == runs


def test_its_file_needs_no_run(runs, images, tmp_path):
    model = merged(runs).build().eval()
    save_model(model, tmp_path / "merged.safetensors")
    for run in runs:
        shutil.rmtree(run)

    again = load_model(tmp_path / "merged.safetensors")

    assert torch.equal(again(images).logits, model(images).logits)
    json.dumps(again.config.parts)


def test_heads_alone_are_trained_without_dropout(runs, images):
    model = merged(runs, trains="head").build().train()

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained == {f"students.{i}.head.{which}" for i in range(3) for which in ("weight", "bias")}
    assert torch.equal(model(images).logits, model(images).logits)


def test_random_numbers_depend_on_no_path(runs):
    assert repr(merged(runs, trains="head")) == repr(merged(["/elsewhere"], seed=1))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"image_size": 16}, "runs=.*other images, as image_size=16 channels=3 num_classes=5"),
        ({"num_classes": 6}, "runs=.*other images.*num_classes=6"),
        ({"distillation_token": True}, "runs=.*its last layer is not a single linear one"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(wrong, line, runs, tiny, tmp_path):
    save_model(tiny(**wrong).build(), tmp_path / "other.safetensors")

    with pytest.raises(ConfigError, match=line):
        merged([*runs, str(tmp_path / "other.safetensors")]).prepare()


def test_no_run_a_missing_one_and_one_named_twice_are_refused(runs):
    with pytest.raises(ConfigError, match=r"runs=\[\]: name the runs"):
        merged([]).prepare()
    with pytest.raises(ConfigError, match=r"runs=.*nowhere"):
        merged([*runs, "nowhere"]).prepare()
    with pytest.raises(ConfigError, match="names a run twice"):
        merged([*runs, runs[0]])


def test_a_header_of_more_blocks_than_weights_is_refused(runs, tmp_path):
    file = tmp_path / "bomb.safetensors"
    model = merged(runs).build()
    model.config.parts[0]["model"]["depth"] = 10**9
    save_model(model, file)

    with pytest.raises(ConfigError, match="does not describe a vitkd model"):
        load_model(file)


@pytest.mark.parametrize("model", ["vit", "representation", "resnet"])
def test_the_classifier_makes_logits_of_the_representation(model, tiny, images):
    configs = {"vit": tiny(), "representation": tiny(representation_size=7)}
    model = configs.get(model, ResNetConfig(8, 3, 5, stem="small")).build().eval()

    output = model(images, Taps(features=("pre_logits",)))

    torch.testing.assert_close(model.classifier(output.features["pre_logits"]), output.logits)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "resnet10t"]
)
def test_so_does_that_of_timm(name):
    pytest.importorskip("timm")
    from vitkd.models import TimmConfig

    config = TimmConfig(
        32, 3, 5, [0.5] * 3, [0.5] * 3, name, options={"depths": [1, 1, 1, 1]} if "swin" in name else {}
    )
    model = config.build().eval()

    output = model(torch.randn(1, 3, 32, 32), Taps(features=("pre_logits",)))

    torch.testing.assert_close(model.classifier(output.features["pre_logits"]), output.logits)
