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
    H, W = pixels.shape[-2:]
    row = torch.arange(H, device=pixels.device) + down[:, None]
    column = torch.arange(W, device=pixels.device).expand(len(pixels), W)
    column = torch.where(flipped[:, None], W - 1 - column, column) + right[:, None]
    return pixels_at(pixels, row[:, :, None], column[:, None, :])


def pixels_at(pixels: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Images made of other places' pixels, in one gather; what lies outside is black.

    Args:
        pixels: [B, C, H, W].
        row, column: whole numbers, of any dtype, that broadcast to [B, H, W].

    Returns:
        [B, C, H, W], of the dtype of `pixels`.
    """
    B, C, H, W = pixels.shape
    framed = F.pad(pixels, (1, 1, 1, 1)).flatten(2)
    place = (row.clamp(-1, H) + 1) * (W + 2) + column.clamp(-1, W) + 1
    return framed.gather(2, place.long().view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)


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
