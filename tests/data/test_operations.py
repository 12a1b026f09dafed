"""Every operation gives torchvision's result, image by image, whatever else is in the batch."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vitkd.data.augment.color_jitter import turn_hue
from vitkd.data.augment.operations import Operation, enhance, operate, remap, warp

GEOMETRY = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
TORCHVISION = {
    Operation.IDENTITY: lambda image, _: image,
    Operation.SHEAR_X: lambda image, m: tv.affine(
        image, **GEOMETRY | {"shear": [math.degrees(math.atan(m)), 0.0]}, center=[0, 0]
    ),
    Operation.SHEAR_Y: lambda image, m: tv.affine(
        image, **GEOMETRY | {"shear": [0.0, math.degrees(math.atan(m))]}, center=[0, 0]
    ),
    Operation.TRANSLATE_X: lambda image, m: tv.affine(image, **GEOMETRY | {"translate": [int(m), 0]}),
    Operation.TRANSLATE_Y: lambda image, m: tv.affine(image, **GEOMETRY | {"translate": [0, int(m)]}),
    Operation.ROTATE: tv.rotate,
    Operation.BRIGHTNESS: lambda image, m: tv.adjust_brightness(image, 1 + m),
    Operation.CONTRAST: lambda image, m: tv.adjust_contrast(image, 1 + m),
    Operation.COLOR: lambda image, m: tv.adjust_saturation(image, 1 + m),
    Operation.SHARPNESS: lambda image, m: tv.adjust_sharpness(image, 1 + m),
    Operation.POSTERIZE: lambda image, m: tv.posterize(image, int(m)),
    Operation.SOLARIZE: lambda image, m: tv.solarize(image, 255.0 * m),
    Operation.AUTOCONTRAST: lambda image, _: tv.autocontrast(image),
    Operation.EQUALIZE: lambda image, _: tv.equalize(image),
    Operation.INVERT: lambda image, _: tv.invert(image),
}
"""What each image becomes at a magnitude."""
NEAREST = (Operation.SHEAR_X, Operation.SHEAR_Y, Operation.ROTATE)
BLENDED = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR, Operation.SHARPNESS)


def magnitudes_of(operation: Operation) -> list[float]:
    if operation is Operation.POSTERIZE:
        return [0, 1, 4, 7, 8]
    if operation is Operation.SOLARIZE:
        return [0, 0.3, 0.5, 0.777, 1]
    if operation in (Operation.TRANSLATE_X, Operation.TRANSLATE_Y):
        return [0, 1, -1, 7, -13, 23, 40]
    strongest = 135 if operation is Operation.ROTATE else 0.99
    return [sign * each for each in torch.linspace(0, strongest, 7).tolist() for sign in (1, -1)]


def images(channels: int) -> Tensor:
    """[24, C, 32, 20] uint8: noise, gradients of few levels, a single level."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (24, channels, 32, 20), generator=generator).float()
    noise[12:] = noise[12:] / 4 + 60 + torch.linspace(0, 80, 20)
    noise[20:] = (noise[20:] / 40).round() * 30
    noise[23] = 7
    noise[22, 0] = 9
    return noise.to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", Operation, ids=lambda operation: operation.name)
def test_it_is_torchvisions(operation: Operation, channels: int) -> None:
    pixels = images(channels)
    for magnitude in magnitudes_of(operation):
        ours = operate(pixels, *of_all(pixels, operation, magnitude))
        theirs = torch.stack([TORCHVISION[operation](image, magnitude) for image in pixels])

        off = (ours.int() - theirs.int()).abs()
        if operation in BLENDED:
            assert off.max() <= 1, magnitude
            # All of an image with a single level, of which rounding makes the next lower one.
            assert (off[:23] > 0).double().mean() < 0.03, magnitude
        elif operation in NEAREST:
            # Where two pixels are equally near, rounding chooses.
            assert (off > 0).any(1).double().mean() < 0.002, magnitude
        else:
            assert not off.any(), magnitude


def of_all(pixels: Tensor, operation: Operation, magnitude: float) -> tuple[Tensor, Tensor]:
    """The operation and the magnitude, once for each image."""
    return torch.full((len(pixels),), operation), torch.full((len(pixels),), float(magnitude))


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_has_its_own(channels: int) -> None:
    """In a batch of all operations each image is as if it were alone."""
    pixels = images(channels)[:15]
    operation = torch.tensor([*Operation])
    magnitude = torch.tensor([magnitudes_of(each)[-1] for each in Operation])
    together = operate(pixels, operation, magnitude)
    for i in range(15):
        alone = operate(pixels[i : i + 1], operation[i : i + 1], magnitude[i : i + 1])
        assert torch.equal(alone[0], together[i]), Operation(i).name


@pytest.mark.parametrize("channels", [1, 3])
def test_passes_over_all_images_are_those_over_the_images_that_need_them(channels: int) -> None:
    """The former are a GPU's, the latter a CPU's."""
    pixels = images(channels).repeat(10, 1, 1, 1)
    generator = torch.Generator().manual_seed(2)
    operation = torch.randint(0, len(Operation), (240,), generator=generator)
    magnitude = torch.rand(240, generator=generator) * 2 - 1
    needed = operate(pixels, operation, magnitude)
    every = remap(enhance(warp(pixels, operation, magnitude), operation, magnitude), operation, magnitude)
    assert torch.equal(every, needed)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2), (3, 3)])
def test_small_images_have_no_inside_to_sharpen(size: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (4, 3, *size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    ours = operate(pixels, *of_all(pixels, Operation.SHARPNESS, 0.9))
    theirs = tv.adjust_sharpness(pixels, 1.9)
    assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("turn", [-0.5, -0.31, -0.1, 0.0, 0.04, 0.25, 0.5])
def test_the_hue_is_torchvisions(turn: float) -> None:
    pixels = images(3)
    ours = turn_hue(pixels, torch.full((24,), turn))
    theirs = torch.stack([tv.adjust_hue(image, turn) for image in pixels])
    assert (ours.int() - theirs.int()).abs().max() <= 1
    if turn == 0:
        assert torch.equal(ours, pixels)
    grey = images(1)
    assert torch.equal(turn_hue(grey, torch.full((24,), turn)), tv.adjust_hue(grey, turn))
