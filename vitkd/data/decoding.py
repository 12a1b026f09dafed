"""The one place where image files become pixels: what counts as an image file, and what its values mean."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vitkd.errors import ConfigError, one_line

# Pillow knows these, but they hold no pixels that it reads by itself: it starts Ghostscript for EPS.
_NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Values of more than 8 bits span 0..65535 in these, as Pillow reads them; TIFF says how many bits are used.
_16_BIT = {"JPEG2000", "PNG", "PPM"}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


@cache
def image_formats() -> list[str]:
    """The formats of the files that are read as images, in the order in which Pillow tries them."""
    Image.preinit()
    Image.init()
    return [name for name in Image.ID if name not in _NO_PIXELS]


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the files that are read as images, in small letters with the dot."""
    suffixes = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in suffixes if name in image_formats())


def is_image(file: Path) -> bool:
    """Whether a path is read as an image: it is a file, not hidden, and its suffix is an image's."""
    return file.suffix.lower() in image_suffixes() and not file.name.startswith(".") and file.is_file()


def decode(file: Path, size: int, channels: int) -> Tensor:
    """The middle square of an image file, upright and resized: [channels, size, size] uint8.

    Of an animation or several pages it is the first. Grey values of 16 bits are scaled by 255/65535, and
    transparent pixels lie on white, whatever colour they hide.

    Raises:
        ConfigError: the file cannot be read as an image, or does not say which of its values is white.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(file, formats=image_formats()) as image:
            image.draft(mode, (size, size))  # JPEG: decode at a lower resolution if that is enough
            plain = _opaque_8_bit(image).convert(mode)
            fitted = ImageOps.fit(plain, (size, size), Image.Resampling.BILINEAR)
    # Damaged files make Pillow's readers raise almost anything.
    except Exception as error:
        reason = f"cannot be read as an image ({one_line(error)})"
        raise ConfigError(f"{file} {reason}; replace or remove the file") from error
    return torch.from_numpy(np.array(fitted).reshape(size, size, channels)).permute(2, 0, 1)


def _opaque_8_bit(image: Image.Image) -> Image.Image:
    """The image upright, with 8 bits a channel, and on white where it is transparent."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F" or upright.mode.startswith("I"):
        black, white = _grey_range(image)
        values = np.asarray(upright, np.float32)
        values = np.where(values == upright.info.get("transparency"), white, values)
        return Image.fromarray(np.round((values - black) * (255 / (white - black))).astype(np.uint8))
    if not upright.has_transparency_data:
        return upright
    colours = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)


def _grey_range(image: Image.Image) -> tuple[int, int]:
    """Black and white in a grey image of more than 8 bits; ValueError if its format does not say."""
    if image.format in _16_BIT and image.mode != "F":
        return 0, 2**16 - 1
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        tags = image.tag_v2  # type: ignore[attr-defined]
        white = 2 ** tags[_TIFF_BITS][0] - 1
        return (white, 0) if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO else (0, white)
    raise ValueError(f"values of mode {image.mode} have an unknown range; save it with 8 or 16 bits")
