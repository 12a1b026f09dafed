"""Crops and flips.

Shapes: B batch, C channels, H and W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkd.data.augment.boxes import Boxes


def padded_crop(pixels: Tensor, down: Tensor, right: Tensor, flipped: Tensor) -> Tensor:
    """Crop a window of the image's size, moved relative to the image, then flip it.

    Args:
        pixels: [B, C, H, W].
        down, right: [B] int64, how far the window moves, in pixels; outside the image everything is 0.
        flipped: [B] bool.

    Returns:
        [B, C, H, W], of the dtype of `pixels`.
    """
    B, _, H, W = pixels.shape
    row = torch.arange(H, device=pixels.device) + down[:, None]
    column = torch.arange(W, device=pixels.device).expand(B, W)
    column = torch.where(flipped[:, None], W - 1 - column, column) + right[:, None]
    inside = ((row >= 0) & (row < H))[:, :, None] & ((column >= 0) & (column < W))[:, None, :]
    return rearranged(pixels, torch.where(inside, row[:, :, None] * W + column[:, None, :], H * W))


def rearranged(pixels: Tensor, source: Tensor) -> Tensor:
    """Images whose pixels are those of other places, in one gather.

    Args:
        pixels: [B, C, H, W].
        source: [B, H, W] int64, the number of a pixel in its plane, row by row; H·W is black.
    """
    B, C, H, W = pixels.shape
    planes = F.pad(pixels.flatten(2), (0, 1))
    return planes.gather(2, source.view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)


def resized_crop(pixels: Tensor, boxes: Boxes, flipped: Tensor) -> Tensor:
    """Crop each image's box, enlarge it bilinearly to the image's size, then flip it.

    Args:
        pixels: [B, C, H, W].
        boxes: one for each image.
        flipped: [B] bool.

    Returns:
        [B, C, H, W] float32.
    """
    H, W = pixels.shape[-2:]
    y = _sampling_points(boxes.top, boxes.height, H)
    x = _sampling_points(boxes.left, boxes.width, W)
    x = torch.where(flipped[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(pixels.to(torch.float32), grid, mode="bilinear", align_corners=True)


def _sampling_points(start: Tensor, length: Tensor, size: int) -> Tensor:
    """[B, size]: `size` points spread evenly over each box, in grid_sample's coordinates, −1..1."""
    start, length = start[:, None], length[:, None]
    step = (torch.arange(size, device=start.device) + 0.5) / size
    # Clamped to the box, so that pixels outside it are not blended in.
    position = torch.clamp(start + step * length - 0.5, start, start + length - 1)
    return position * (2 / max(size - 1, 1)) - 1
