"""A data set's images as a model of timm was trained to see them.

Shapes: B images, C channels, H × W pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd.models.output import at_least_float32

INTERPOLATIONS = ("bicubic", "bilinear")


class Inputs(nn.Module):
    """From a data set's normalisation and size to a model's own.

    Both normalisations are affine in the pixels, so one follows from the other. A grey image becomes one of
    three equal channels, as a model of colour images would have seen it.

    Args:
        given: mean and std of the images that come, a value for each of their channels.
        wanted: mean and std that the model was trained with, of pixels in 0..1.
        size: [height, width] that it was trained with.
        interpolation: by which images were resized for it.
    """

    def __init__(
        self,
        given: tuple[Sequence[float], Sequence[float]],
        wanted: tuple[Sequence[float], Sequence[float]],
        size: tuple[int, int],
        interpolation: str,
    ) -> None:
        super().__init__()
        self.size = size
        self.interpolation = interpolation if interpolation in INTERPOLATIONS else "bicubic"
        is_own = [[*values] for values in given] == [[*values] for values in wanted]
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(values) for values in each] for each in (given, wanted)
        )
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.register_buffer("scale", None if is_own else (std / own_std)[:, None, None])
        self.register_buffer("shift", None if is_own else ((mean - own_mean) / own_std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] as the model wants them: [B, its channels, its height, its width]."""
        if self.scale is not None and self.shift is not None:
            images = torch.addcmul(self.shift, images, self.scale)
        if images.shape[-2:] == self.size:
            return images
        # Not every precision has a kernel of its own.
        resized = F.interpolate(at_least_float32(images), self.size, mode=self.interpolation, antialias=True)
        return resized.to(images.dtype)
