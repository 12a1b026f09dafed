"""Where the weights of timm's models come from, and what is refused; no network is needed."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.bombs import Bomb
from vitkd.errors import ConfigError, MissingPackageError
from vitkd.models import Taps, TimmConfig, build_from_header, describe

NAME = "vit_tiny_patch16_224"
OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
HALF = [0.5, 0.5, 0.5]


def config_of(weights: Path | None = None, classes: int = 5, **changes: Any) -> TimmConfig:
    settings = {"name": NAME, "mean": HALF, "std": HALF, "options": OPTIONS} | changes
    return TimmConfig(32, len(settings["mean"]), classes, weights=weights and str(weights), **settings)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """What timm's users have trained: 5 classes, at 32 pixels."""
    torch.manual_seed(1)
    return timm.create_model(NAME, num_classes=5, **OPTIONS).eval()


@pytest.fixture
def file(network, tmp_path) -> Path:
    save_file(network.state_dict(), tmp_path / "photos.safetensors")
    return tmp_path / "photos.safetensors"


def images(channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


class TestAFile:
    def test_of_as_many_classes_is_the_whole_model(self, network, file):
        model = config_of(file).build().eval()

        assert torch.equal(model(images()).logits, network(images()))

    @pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_ema"])
    def test_of_pytorchs_is_read_as_training_scripts_write_it(self, network, wrapper, tmp_path):
        place, state = tmp_path / "checkpoint.pth", network.state_dict()
        kept = {wrapper: {f"module.{name}": value for name, value in state.items()}}
        torch.save({"args": argparse.Namespace(lr=0.1), "epoch": 3} | kept if wrapper else state, place)

        assert torch.equal(config_of(place).build().eval()(images()).logits, network(images()))

    def test_of_other_classes_gets_a_new_head_and_a_line_says_so(self, network, file, caplog):
        with caplog.at_level("INFO", "vitkd"):
            model = config_of(file, classes=7).build().eval()

        assert model(images()).logits.shape == (2, 7)
        features = model(images(), Taps(features=("pre_logits",))).features["pre_logits"]
        expected = network.forward_head(network.forward_features(images()), pre_logits=True)
        assert torch.equal(features, expected)
        assert "5 classes" in caplog.text
        assert "7" in caplog.text

    def test_without_a_head_gets_one(self, network, tmp_path):
        state = {name: value for name, value in network.state_dict().items() if not name.startswith("head")}
        save_file(state, tmp_path / "backbone.safetensors")

        model = config_of(tmp_path / "backbone.safetensors").build()

        assert torch.equal(model.network.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)

    def test_at_another_size_has_its_positions_interpolated_as_timm_does(self, network, file):
        resized = timm.create_model(NAME, num_classes=5, **OPTIONS).eval()
        resized.load_state_dict(network.state_dict())
        resized.set_input_size((64, 64))

        model = config_of(file, options=OPTIONS | {"img_size": 64}).build().eval()

        torch.testing.assert_close(model(images(size=64)).logits, resized(images(size=64)), atol=1e-6, rtol=0)

    def test_without_training_is_the_teacher_only_with_its_own_head(self, file):
        assert str(file) in config_of(file).untrained()
        with pytest.raises(ConfigError, match=r"trained=false: .* 5 classes, not 7"):
            config_of(file, classes=7).untrained()

    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
    def test_that_is_a_pickle_bomb_is_one_line(self, suffix, tmp_path):
        place = tmp_path / f"weights{suffix}"
        torch.save({"state_dict": Bomb(tmp_path / "burst")}, place)

        with pytest.raises(ConfigError, match=r"weights=.*refused"):
            config_of(place).prepare()

        assert not (tmp_path / "burst").exists()

    @pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1], {"state_dict": {"epoch": 3}}])
    def test_without_weights_is_one_line(self, content, tmp_path):
        torch.save(content, tmp_path / "weights.pth")

        with pytest.raises(ConfigError, match=r"weights=.*holds no weights"):
            config_of(tmp_path / "weights.pth").prepare()

    @pytest.mark.parametrize(
        "changes", [{"embed_dim": 48}, {"depth": 2}, {"qk_norm": True}, {"class_token": False}]
    )
    def test_of_another_architecture_is_one_line(self, file, changes):
        options = OPTIONS | changes | ({"global_pool": "avg"} if "class_token" in changes else {})
        with pytest.raises(ConfigError, match=f"weights=.*are not those of {NAME}") as error:
            config_of(file, options=options).prepare()

        assert "\n" not in str(error.value)

    def test_that_is_not_there_or_of_no_known_kind_is_one_line(self, tmp_path):
        with pytest.raises(ConfigError, match="no such file"):
            config_of(tmp_path / "none.pth").prepare()
        with pytest.raises(ConfigError, match="must be a"):
            config_of(tmp_path / "weights.npz").prepare()

    def test_does_not_decide_the_seeds(self, file):
        """A file that has moved is the same file."""
        assert repr(config_of(file)) == repr(config_of())


class TestPublishedWeights:
    def test_that_cannot_be_fetched_are_one_line_with_the_ways_out(self, monkeypatch):
        def offline(*_: Any, **__: Any) -> None:
            raise ConnectionError("Name or service not known.\nMax retries exceeded")

        monkeypatch.setattr(timm, "create_model", offline)
        with pytest.raises(ConfigError, match="unavailable") as error:
            config_of(pretrained=True).first_network()

        for way in ("network", "HF_HOME", "weights=FILE", "pretrained=false"):
            assert way in str(error.value)
        assert "\n" not in str(error.value)

    def test_that_nobody_published_are_one_line(self):
        with pytest.raises(ConfigError, match=r"timm knows no weights of .*weights=FILE"):
            config_of(pretrained=True, name="vit_small_patch16_18x2_224", options={}).prepare()

    def test_and_a_file_exclude_each_other(self, file):
        with pytest.raises(ConfigError, match="set one of the two"):
            config_of(file, pretrained=True)


class TestInputs:
    """Images as a data set gives them, and as timm's own configuration of a model says."""

    def test_are_normalised_as_the_model_wants_them(self, network, file):
        mean, std = [0.1, 0.2, 0.3], [0.4, 0.3, 0.2]
        given = (images() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

        model = config_of(file, mean=mean, std=std).build().eval()

        expected = network((images() - 0.5) / 0.5)
        torch.testing.assert_close(model(given).logits, expected, atol=1e-6, rtol=0)

    def test_grey_ones_are_colour_images_of_equal_channels(self, network, file):
        given = (images(channels=1) - 0.1) / 0.3

        model = config_of(file, mean=[0.1], std=[0.3]).build().eval()

        expected = network(((images(channels=1) - 0.5) / 0.5).expand(-1, 3, -1, -1))
        torch.testing.assert_close(model(given).logits, expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("size", [16, 48])
    def test_of_another_size_are_resized_as_timm_would(self, network, file, size):
        from torchvision.transforms.v2.functional import InterpolationMode, resize

        model = config_of(file).build().eval()

        resized = resize(images(size=size), [32, 32], InterpolationMode.BICUBIC, antialias=True)
        torch.testing.assert_close(model(images(size=size)).logits, network(resized), atol=1e-6, rtol=0)

    def test_as_they_should_be_are_left_alone(self, file):
        pixels = images()

        assert config_of(file).build().inputs(pixels) is pixels


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "line"),
        [
            ({"name": "vit_tinny_patch16_224"}, "no such model, it has vit_tiny_patch16_224"),
            ({"name": "hf-hub:someone/model"}, "no such model"),
            ({"name": "local-dir:/tmp"}, "no such model"),
            ({"name": "resnet18"}, "depth: is no setting of timm's resnet18"),
            ({"options": {"embed_dmi": 24}}, "did you mean embed_dim"),
            ({"options": {"checkpoint_path": "x.pth"}}, "is no setting"),
            ({"options": {"pretrained_cfg": {"file": "x.pth"}}}, "is no setting"),
            ({"options": {"in_chans": 1}}, "is set by vitkd"),
            ({"options": {"distillation_token": True}}, "deit_tiny_distilled_patch16_224"),
            ({"options": {"img_size": 30}}, "patch_size=16 does not divide it; choose 16 or 32"),
            ({"options": {"depth": 10**9}}, "at most 1,000"),
            ({"options": {"drop_path_rate": 1.5}}, r"must be a number in \[0, 1\)"),
            ({"options": {"embed_dim": 31}}, "timm cannot build that"),
            ({"options": {"global_pool": ""}}, "one logit a class"),
            ({"options": {"weight_init": "skip"}}, "weights without values"),
        ],
    )
    def test_in_one_line(self, changes, line):
        with pytest.raises(ConfigError, match=line) as error:
            config_of(**changes)

        assert "\n" not in str(error.value)

    def test_without_timm(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(MissingPackageError, match=r"pip install 'vitkd\[timm\]'"):
            config_of()

    @pytest.mark.parametrize(
        "name", ["cait_xxs24_224", "xcit_nano_12_p16_224", "vit_dwee_patch16_reg1_gap_256", "resnet18"]
    )
    def test_what_has_no_readable_attention_has_no_maps_but_logits(self, name):
        config = config_of(name=name, options={})

        assert config.attention_layouts() == ()
        assert name in str(config)


class TestAHeader:
    """Of a student.safetensors that anybody may have made."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"name": "hf-hub:someone/model"},
            {"options": {"depth": 10**9}},
            {"options": {"checkpoint_path": "x.pth"}},
            {"options": [1]},
        ],
    )
    def test_that_asks_for_what_is_refused_is_one_line(self, changes):
        header = describe(config_of().build())
        header["model"] |= changes

        with pytest.raises(ConfigError, match="does not describe a vitkd model"):
            build_from_header(header, Path("student.safetensors"))

    def test_without_timm_says_what_to_install(self, monkeypatch):
        header = describe(config_of().build())
        monkeypatch.setitem(sys.modules, "timm", None)

        with pytest.raises(MissingPackageError, match=r"student.safetensors: .*pip install 'vitkd\[timm\]'"):
            build_from_header(header, Path("student.safetensors"))
