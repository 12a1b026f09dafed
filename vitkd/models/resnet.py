"""Convolutional teachers: residual networks (He et al. 2015, arXiv 1512.03385).

Those of ImageNet are torchvision's. ResNet-20 to ResNet-110 are the paper's for 32×32 pixels (section 4.2):
a 3×3 convolution, then three stages of n blocks with 16, 32 and 64 channels, 6n + 2 layers in all. Where a
stage changes the shape its shortcut is a 1×1 convolution (the paper's option B) as in pycls, with which the
teachers of locality guidance were trained; the paper's own has no parameters there (option A).

Shapes: B batch, C channels, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError, check_choice, one_line
from vitkd.models.base import Model, ModelConfig
from vitkd.models.output import LOGITS, Output, Taps

IMAGENET_VARIANTS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SMALL_VARIANTS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
VARIANTS = (*IMAGENET_VARIANTS, *SMALL_VARIANTS)
SMALL_WIDTHS = (16, 32, 64)
STEMS = ("imagenet", "small")
IMAGENET_CLASSES = 1000


@dataclass(repr=False)
class ResNetConfig(ModelConfig):
    """Everything that determines a residual network."""

    why_alone = "its batch normalisation would mix the students of a stack"

    variant: str = "resnet18"
    """resnet18 | resnet34 | resnet50 | resnet101 | resnet152, torchvision's, or for images of some 32 pixels
    resnet20 | resnet32 | resnet44 | resnet56 | resnet110, which have stem=small only"""
    stem: str = "imagenet"
    """imagenet, a 7×7 convolution and a pooling that leave a quarter of each side | small, for images of some
    32 pixels: a 3×3 convolution that leaves all of them, as in the paper's section 4.2"""
    pretrained: bool = False
    """Begin with ImageNet's weights, but for the last layer; needs a network, once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "variant", VARIANTS)
        check_choice(self, "stem", STEMS)
        if self.variant in SMALL_VARIANTS and self.stem != "small":
            raise ConfigError(
                f"stem={self.stem}: {self.variant} is made for small images; set stem=small, or choose "
                f"variant={' or '.join(IMAGENET_VARIANTS[:2])}"
            )
        if self.pretrained and (self.stem, self.channels) != ("imagenet", 3):
            raise ConfigError(
                "pretrained=true: ImageNet's weights are of stem=imagenet and channels=3, not "
                f"stem={self.stem} and channels={self.channels}; set pretrained=false"
            )

    def __str__(self) -> str:
        has_other_stem = self.stem == "small" and self.variant in IMAGENET_VARIANTS
        stem = ", stem for small images" if has_other_stem else ""
        return f"{self.variant}{stem}{', from ImageNet' if self.pretrained else ''}"

    @property
    def min_batch_size(self) -> int:
        return 2  # batch normalisation compares images

    @property
    def num_stages(self) -> int:
        return len(SMALL_WIDTHS) if self.variant in SMALL_VARIANTS else 4

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


class SmallNetwork(nn.Module):
    """Three stages of basic blocks (section 4.2); its layers have torchvision's names and first weights."""

    def __init__(self, channels: int, blocks: int, num_classes: int) -> None:
        super().__init__()
        first, *_, last = SMALL_WIDTHS
        self.conv1 = first_convolution(channels, first, kernel_size=3, stride=1)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()
        for stage, (before, width) in enumerate(pairwise((first, *SMALL_WIDTHS)), start=1):
            self.add_module(
                f"layer{stage}", small_stage(before, width, blocks, stride=1 if stage == 1 else 2)
            )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)


def small_stage(before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """So many blocks of two 3×3 convolutions, the first of which changes the shape."""
    from torchvision.models.resnet import BasicBlock  # takes a while, and not every run has one

    shortcut = None
    if (before, stride) != (width, 1):
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    rest = [BasicBlock(width, width) for _ in range(blocks - 1)]
    stage = nn.Sequential(BasicBlock(before, width, stride, shortcut), *rest)
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return stage


class ResNet(Model):
    """One of both kinds of networks; it has no attention."""

    config: ResNetConfig

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = tuple(f"stage{stage}" for stage in range(1, config.num_stages + 1))
        self.network = self._small() if config.variant in SMALL_VARIANTS else self._torchvisions()

    def _small(self) -> nn.Module:
        blocks = (int(self.config.variant.removeprefix("resnet")) - 2) // 6
        return SmallNetwork(self.config.channels, blocks, self.config.num_classes)

    def _torchvisions(self) -> nn.Module:
        from torchvision.models import get_model  # takes a while, and not every run has one

        config = self.config
        network: nn.Module = get_model(config.variant, weights=None, num_classes=config.num_classes)
        if config.stem == "small":
            network.conv1 = first_convolution(config.channels, 64, kernel_size=3, stride=1)
            network.maxpool = nn.Identity()
        elif config.channels != 3:
            network.conv1 = first_convolution(config.channels, 64, kernel_size=7, stride=2)
        return network

    @property
    def classifier(self) -> nn.Linear:
        return cast(nn.Linear, self.network.fc)

    def layers_in_order(self) -> list[nn.Module]:
        stages = [name.replace("stage", "layer") for name in self.stages]
        return [block for stage in stages for block in self.network.get_submodule(stage).children()]

    def forward(self, images: Tensor, taps: Taps = LOGITS) -> Output:
        """Classify images [B, C, H, W]; the features are "stage1", …, one a stage, and "pre_logits"."""
        taps.assert_exist(0, (*self.stages, "pre_logits"))
        network: Any = self.network
        features: dict[str, Tensor] = {}
        x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        for stage, name in enumerate(self.stages, start=1):
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


def first_convolution(channels: int, width: int, kernel_size: int, stride: int) -> nn.Conv2d:
    """To `width` channels, initialised as torchvision does."""
    convolution = nn.Conv2d(channels, width, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
