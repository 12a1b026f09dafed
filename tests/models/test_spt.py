"""Shifted patches: by hand, by torchvision's translation and, but for the shift, as vit-pytorch has them."""

import math

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import affine
from vit_pytorch.vit_for_small_dataset import SPT

from vitkd.models.small_data import ShiftedPatchTokenization, shifted_diagonally


def randomised(channels: int, patch_size: int, dim: int = 7) -> ShiftedPatchTokenization:
    tokenizer = ShiftedPatchTokenization(channels, patch_size, dim).double()
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter)
    return tokenizer


def vit_pytorch_counterpart(ours: ShiftedPatchTokenization) -> SPT:
    """Its `to_patch_tokens` takes the image beside its shifts; its `forward` shifts by one pixel."""
    p = ours.patch_size
    channels = ours.projection.in_features // (5 * p**2)
    theirs = SPT(dim=ours.projection.out_features, patch_size=p, channels=channels).double()

    def channels_last(pixels: torch.Tensor) -> torch.Tensor:
        """The last axis from (c p1 p2) to vit-pytorch's (p1 p2 c)."""
        return pixels.unflatten(-1, (5 * channels, p, p)).movedim(-3, -1).flatten(-3)

    renamed = {
        "to_patch_tokens.1.weight": channels_last(ours.norm.weight),
        "to_patch_tokens.1.bias": channels_last(ours.norm.bias),
        "to_patch_tokens.2.weight": channels_last(ours.projection.weight),
        "to_patch_tokens.2.bias": ours.projection.bias,
    }
    theirs.load_state_dict(renamed)
    return theirs


def test_the_four_shifts_of_a_small_image_by_hand():
    image = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])

    itself, upper_left, upper_right, lower_left, lower_right = shifted_diagonally(image, 1).tolist()

    assert itself == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert upper_left == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]
    assert upper_right == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
    assert lower_left == [[0, 4, 5], [0, 7, 8], [0, 0, 0]]
    assert lower_right == [[5, 6, 0], [8, 9, 0], [0, 0, 0]]


def test_a_shift_of_two_pixels_by_hand():
    """All of a 3×3 image but one corner leaves it."""
    image = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])

    shifts = shifted_diagonally(image, 2)[1:]

    corners = [(2, 2, 1), (2, 0, 3), (0, 2, 7), (0, 0, 9)]
    for shift, (y, x, value) in zip(shifts, corners, strict=True):
        assert shift[y, x] == value
        assert shift.count_nonzero() == 1


@pytest.mark.parametrize("by", [1, 2, 4])
def test_shifts_equal_torchvisions_translation(by):
    """The image's channels first, then all channels of each shift; any leading axes."""
    images = torch.rand(2, 3, 2, 6, 8)

    shifted = shifted_diagonally(images, by)

    # An image that moves to the lower right shows at each place what was at its upper left.
    moves = [(0, 0), (by, by), (-by, by), (by, -by), (-by, -by)]
    translated = [affine(images.flatten(0, 1), 0.0, [x, y], 1.0, [0.0, 0.0]) for x, y in moves]
    assert torch.equal(shifted.flatten(0, 1), torch.cat(translated, dim=1))


@pytest.mark.parametrize(("patch_size", "channels"), [(2, 1), (4, 3), (3, 2), (5, 1)])
def test_tokens_equal_vit_pytorchs_of_our_shifts(patch_size, channels):
    ours = randomised(channels, patch_size)
    images = torch.rand(4, channels, 2 * patch_size, 3 * patch_size, dtype=torch.float64)

    theirs = vit_pytorch_counterpart(ours).to_patch_tokens(shifted_diagonally(images, patch_size // 2))

    assert theirs.shape == (4, 6, 7)
    torch.testing.assert_close(ours(images), theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_shifts_are_not_vit_pytorchs_by_one_pixel_along_the_axes(patch_size):
    ours = randomised(3, patch_size)
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)

    assert (ours(images) - vit_pytorch_counterpart(ours)(images)).abs().max() > 0.1


@pytest.mark.parametrize(("patch_size", "reach"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_a_token_sees_its_patch_and_half_a_patch_around(patch_size, reach):
    """An odd patch has its half rounded down."""
    tokenizer = randomised(2, patch_size)
    images = torch.rand(1, 2, 3 * patch_size, 3 * patch_size, dtype=torch.float64, requires_grad=True)
    middle = tokenizer(images)[0, 4]

    (gradient,) = torch.autograd.grad(middle.square().sum(), images)

    expected = torch.zeros(3 * patch_size, 3 * patch_size, dtype=torch.bool)
    seen = slice(patch_size - reach, 2 * patch_size + reach)
    expected[seen, seen] = True
    for channel in gradient[0]:
        assert torch.equal(channel != 0, expected)


def test_stacked_students_shift_and_project_each_its_own_images():
    alone = [randomised(2, 4) for _ in range(3)]
    stacked = ShiftedPatchTokenization(2, 4, 7)
    for name, _ in alone[0].named_parameters():
        owner, _, leaf = name.rpartition(".")
        values = torch.stack([tokenizer.get_parameter(name).detach() for tokenizer in alone])
        setattr(stacked.get_submodule(owner), leaf, nn.Parameter(values))
    images = torch.rand(3, 5, 2, 8, 8, dtype=torch.float64)

    together = stacked(images)

    assert together.shape == (3, 5, 4, 7)
    for s, tokenizer in enumerate(alone):
        torch.testing.assert_close(together[s], tokenizer(images[s]), atol=1e-12, rtol=1e-12)


def test_tokens_do_not_depend_on_an_images_brightness_where_nothing_is_padded():
    """The pixels of all five are normalised together, so the middle patch's mean falls out."""
    tokenizer = ShiftedPatchTokenization(1, 4, 7).double()
    images = torch.rand(1, 1, 12, 12, dtype=torch.float64)

    before, after = tokenizer(images)[0], tokenizer(images + 3)[0]

    torch.testing.assert_close(after[4], before[4], atol=1e-9, rtol=0)
    assert (after[0] - before[0]).abs().max() > 1e-3


@pytest.mark.parametrize(("channels", "patch_size", "dim"), [(3, 8, 64), (1, 7, 5)])
def test_parameters_are_those_of_the_norm_and_the_map(channels, patch_size, dim):
    tokenizer = ShiftedPatchTokenization(channels, patch_size, dim)

    pixels = 5 * channels * patch_size**2
    shapes = {name: tuple(p.shape) for name, p in tokenizer.named_parameters()}
    assert shapes == {
        "norm.weight": (pixels,),
        "norm.bias": (pixels,),
        "projection.weight": (dim, pixels),
        "projection.bias": (dim,),
    }
    assert sum(math.prod(shape) for shape in shapes.values()) == 2 * pixels + dim * pixels + dim
