"""Convolutional teachers: torchvision's residual networks (He et al. 2015, arXiv 1512.03385).

Shapes: B batch, C channels, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError, check_choice, one_line
from vitkd.models.base import Model, ModelConfig
from vitkd.models.output import LOGITS, Output, Taps

VARIANTS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
STEMS = ("imagenet", "small")
IMAGENET_CLASSES = 1000
FEATURES = ("stage1", "stage2", "stage3", "stage4", "pre_logits")


@dataclass(repr=False)
class ResNetConfig(ModelConfig):
    """Everything that determines a residual network."""

    why_alone = "its batch normalisation would mix the students of a stack"

    variant: str = "resnet18"
    """resnet18 | resnet34 | resnet50 | resnet101 | resnet152"""
    stem: str = "imagenet"
    """imagenet, a 7×7 convolution and a pooling that leave a quarter of each side | small, for images of some
    32 pixels: a 3×3 convolution that leaves all of them, as in the paper's section 4.2"""
    pretrained: bool = False
    """Begin with ImageNet's weights, but for the last layer; needs a network, once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "variant", VARIANTS)
        check_choice(self, "stem", STEMS)
        if self.pretrained and (self.stem, self.channels) != ("imagenet", 3):
            raise ConfigError(
                "pretrained=true: ImageNet's weights are of stem=imagenet and channels=3, not "
                f"stem={self.stem} and channels={self.channels}; set pretrained=false"
            )

    def __str__(self) -> str:
        stem = ", stem for small images" if self.stem == "small" else ""
        return f"{self.variant}{stem}{', from ImageNet' if self.pretrained else ''}"

    @property
    def min_batch_size(self) -> int:
        return 2  # batch normalisation compares images

    def prepare(self) -> None:
        if self.pretrained:
            self._imagenet()

    def build(self) -> "ResNet":
        model = self.architecture()
        if self.pretrained:
            # The last layer is for ImageNet's classes.
            own = {k: v for k, v in model.network.state_dict().items() if k.startswith("fc.")}
            model.network.load_state_dict(self._imagenet() | own)
        return model

    def architecture(self) -> "ResNet":
        return ResNet(self)

    def _imagenet(self) -> dict[str, Tensor]:
        """ImageNet's weights, downloaded at need; ConfigError where they are unavailable."""
        from torchvision.models import get_model_weights  # takes a while, and not every run needs it

        weights = get_model_weights(self.variant)["IMAGENET1K_V1"]  # those of the usual recipe
        file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(weights.url).path).name)
        try:
            # What lies there need not have been downloaded, so nothing in it is run.
            state: Any = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (EOFError, UnpicklingError) as error:
            raise self._damaged(file) from error
        except (OSError, RuntimeError) as error:
            if file.exists():
                raise self._damaged(file) from error
            raise ConfigError(
                f"pretrained=true: {self.variant}'s ImageNet weights are unavailable ({one_line(error)}); "
                f"connect to a network, put {weights.url} at {file}, or set pretrained=false to train from "
                "random weights"
            ) from error
        with torch.device("meta"):
            expected = replace(self, num_classes=IMAGENET_CLASSES, pretrained=False).architecture().network
        # Only what torch.hub downloads has its digest checked, not what a user puts there.
        if not isinstance(state, dict) or shapes_of(state) != shapes_of(expected.state_dict()):
            raise self._damaged(file)
        return state

    def _damaged(self, file: Path) -> ConfigError:
        return ConfigError(
            f"pretrained=true: {file} is not the ImageNet weights of {self.variant}; remove it, to have "
            "them downloaded again"
        )


class ResNet(Model):
    """torchvision's network; it has no attention."""

    config: ResNetConfig

    def __init__(self, config: ResNetConfig) -> None:
        from torchvision.models import get_model  # takes a while, and not every run has one

        super().__init__()
        self.config = config
        self.network = get_model(config.variant, weights=None, num_classes=config.num_classes)
        if config.stem == "small":
            self.network.conv1 = first_convolution(config.channels, kernel_size=3, stride=1)
            self.network.maxpool = nn.Identity()
        elif config.channels != 3:
            self.network.conv1 = first_convolution(config.channels, kernel_size=7, stride=2)

    @property
    def classifier(self) -> nn.Linear:
        return cast(nn.Linear, self.network.fc)

    def forward(self, images: Tensor, taps: Taps = LOGITS) -> Output:
        """Classify images [B, C, H, W]; the features are "stage1" to "stage4" and "pre_logits"."""
        taps.assert_exist(0, FEATURES)
        network = self.network
        features: dict[str, Tensor] = {}
        x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        for stage, name in enumerate(FEATURES[:-1], start=1):
            x = features[name] = network.get_submodule(f"layer{stage}")(x)
            if not taps.logits and features.keys() >= {*taps.features}:
                break
        else:
            features["pre_logits"] = network.avgpool(x).flatten(1)
        logits = network.fc(features["pre_logits"]) if taps.logits else None
        return Output(logits, features={name: features[name] for name in taps.features})


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Each tensor's shape, but for counters, which older files lack."""
    tensors = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
    return {k: v.shape for k, v in tensors.items() if not k.endswith("num_batches_tracked")}


def first_convolution(channels: int, kernel_size: int, stride: int) -> nn.Conv2d:
    """To 64 channels, initialised as torchvision does."""
    convolution = nn.Conv2d(channels, 64, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
