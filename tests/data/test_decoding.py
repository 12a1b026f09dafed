"""What the values in an image file mean: the pixels that are written, by arithmetic, are the pixels read."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from vitkd.data.decoding import decode, image_suffixes
from vitkd.errors import ConfigError
from vitkd.explain.sources import read_picture

SIDE = 16
WHITE = 255
RNG = np.random.default_rng(0)
GREY_16 = RNG.integers(0, 2**16, (SIDE, SIDE), dtype=np.uint16)
GREY_16[0, :3] = 0, 2**16 - 1, 2**15
GREY_8 = GREY_16.astype(float) / 257
COLOURS = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
ALPHA = np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))


def read(file: Path, channels: int) -> np.ndarray:
    """[SIDE, SIDE, channels] as training sees them; `explain image=` has to see the same."""
    pixels = decode(file, SIDE, channels)
    assert np.array_equal(read_picture(file, SIDE, channels) * 255, pixels.float())
    return pixels.permute(1, 2, 0).numpy()


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + WHITE * (1 - share)


def save_16_bit(file: Path) -> None:
    Image.fromarray(GREY_16).save(file)


def save_big_endian(file: Path) -> None:
    file.write_bytes(tiff(GREY_16.astype(">u2").tobytes(), order="big"))


def save_white_is_zero(file: Path) -> None:
    file.write_bytes(tiff((2**16 - 1 - GREY_16).astype("<u2").tobytes(), white_is_zero=True))


def tiff(pixels: bytes, bits: int = 16, white_is_zero: bool = False, order: str = "little") -> bytes:
    """A grey TIFF file of SIDE × SIDE pixels."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)

    # (tag, whether its value has 32 bits instead of 16, value), as in the TIFF 6.0 specification.
    tags = [(256, 0, SIDE), (257, 0, SIDE), (258, 0, bits), (259, 0, 1), (262, 0, int(not white_is_zero))]
    tags += [(273, 1, 8 + 2 + 9 * 12 + 4), (277, 0, 1), (278, 0, SIDE), (279, 1, len(pixels))]
    entries = b"".join(
        number(tag, 2) + number(3 + long, 2) + number(1, 4) + number(value, 2 + 2 * long).ljust(4, b"\0")
        for tag, long, value in tags
    )
    magic = b"II*\0" if order == "little" else b"MM\0*"
    return magic + number(8, 4) + number(len(tags), 2) + entries + number(0, 4) + pixels


GREY: dict[str, tuple[str, Callable[[Path], None]]] = {
    "PNG": ("png", save_16_bit),
    "TIFF": ("tif", save_16_bit),
    "TIFF, big-endian": ("tif", save_big_endian),
    "TIFF, white is zero": ("tif", save_white_is_zero),
    "PGM": ("pgm", save_16_bit),
    "JPEG 2000": ("jp2", save_16_bit),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", GREY)
def test_16_bit_grey_is_scaled(form: str, channels: int, tmp_path: Path) -> None:
    suffix, save = GREY[form]
    save(tmp_path / f"grey.{suffix}")
    pixels = read(tmp_path / f"grey.{suffix}", channels)
    assert np.array_equal(pixels, np.broadcast_to(np.round(GREY_8)[..., None], pixels.shape))


def test_12_bit_grey_is_scaled(tmp_path: Path) -> None:
    values = GREY_16 >> 4
    pairs = values.reshape(-1, 2).astype(int)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    file = tmp_path / "grey.tif"
    file.write_bytes(tiff(packed.astype(np.uint8).tobytes(), bits=12))
    assert np.array_equal(read(file, 1)[..., 0], np.round(values * (255 / 4095)))


def test_16_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    Image.fromarray(GREY_16).save(tmp_path / "grey.png", transparency=int(GREY_16[3, 4]))
    expected = np.where(GREY_16[3, 4] == GREY_16, WHITE, np.round(GREY_8))
    assert np.array_equal(read(tmp_path / "grey.png", 1)[..., 0], expected)


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        (np.full((4, 4), 0.5, np.float32), "tif"),
        (np.full((4, 4), 0.5, np.float32), "pfm"),
        (np.full((4, 4), 70_000, np.int32), "tif"),
    ],
    ids=["float TIFF", "PFM", "32-bit TIFF"],
)
def test_values_of_an_unknown_range_are_refused(values: np.ndarray, suffix: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    for opened in (decode, read_picture):
        with pytest.raises(ConfigError, match=r"unknown range; save it with 8 or 16 bits") as error:
            opened(tmp_path / f"deep.{suffix}", 4, 3)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_colours_are_mixed_with_white_and_hidden_ones_are_gone(suffix: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.dstack([COLOURS, ALPHA]))
    image.save(
        tmp_path / f"clear.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {})
    )
    expected = on_white(COLOURS.astype(float), ALPHA)
    pixels = read(tmp_path / f"clear.{suffix}", 3)
    np.testing.assert_allclose(pixels, expected, atol=1)
    assert (pixels[:, 0] == WHITE).all(), "alpha is 0 there"
    assert np.array_equal(pixels[:, -1], COLOURS[:, -1]), "alpha is 255 there"
    grey = expected @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(read(tmp_path / f"clear.{suffix}", 1)[..., 0], grey, atol=2)


def test_grey_with_alpha_lies_on_white(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([COLOURS[..., 0], ALPHA])).save(tmp_path / "grey.png")
    expected = on_white(COLOURS[..., :1].astype(float), ALPHA)
    np.testing.assert_allclose(read(tmp_path / "grey.png", 1), expected, atol=1)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palettes_with_a_transparent_colour(suffix: str, tmp_path: Path) -> None:
    numbers = RNG.integers(0, 4, (SIDE, SIDE), dtype=np.uint8)
    palette = COLOURS[0, :4]
    image = Image.fromarray(numbers).convert("P")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / f"few.{suffix}", transparency=2)
    expected = np.where((numbers == 2)[..., None], WHITE, palette[numbers])
    assert np.array_equal(read(tmp_path / f"few.{suffix}", 3), expected)


def test_palettes_with_an_alpha_for_each_colour(tmp_path: Path) -> None:
    numbers = RNG.integers(0, 4, (SIDE, SIDE), dtype=np.uint8)
    image = Image.fromarray(numbers).convert("P")
    image.putpalette(COLOURS[0, :4].tobytes())
    image.save(tmp_path / "few.png", transparency=bytes([0, 100, 200, 255]))
    alpha = np.array([0, 100, 200, 255])[numbers]
    expected = on_white(COLOURS[0, :4][numbers].astype(float), alpha)
    np.testing.assert_allclose(read(tmp_path / "few.png", 3), expected, atol=1)


@pytest.mark.parametrize("suffix", ["png", "tif", "pbm", "bmp"])
def test_black_and_white(suffix: str, tmp_path: Path) -> None:
    bits = RNG.integers(0, 2, (SIDE, SIDE)).astype(bool)
    Image.fromarray(bits).save(tmp_path / f"bits.{suffix}")
    assert np.array_equal(read(tmp_path / f"bits.{suffix}", 1)[..., 0], bits * 255)


def test_cmyk(tmp_path: Path) -> None:
    inks = np.dstack([COLOURS, np.zeros((SIDE, SIDE), np.uint8)])
    Image.frombytes("CMYK", (SIDE, SIDE), inks.tobytes()).save(tmp_path / "inks.tif")
    assert np.array_equal(read(tmp_path / "inks.tif", 3), 255 - COLOURS)


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_of_several_pages_the_first(suffix: str, tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue"))
    red.save(tmp_path / f"pages.{suffix}", save_all=True, append_images=[blue], lossless=True)
    assert read(tmp_path / f"pages.{suffix}", 3)[4, 4].tolist() == pytest.approx([255, 0, 0], abs=1)


def test_what_a_turned_16_bit_image_shows(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # its left side is the top
    Image.fromarray(GREY_16).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read(tmp_path / "turned.png", 1)[..., 0], np.rot90(np.round(GREY_8), -1))


def test_every_photo_format_that_pillow_reads_counts() -> None:
    expected = {".jpg", ".jfif", ".jpe", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".pnm", ".tga"}
    # Older ones do not know the feature.
    expected |= {".avif"} if "avif" in features.modules and features.check("avif") else set()
    expected |= {".jp2", ".j2k"} if features.check("jpg_2000") else set()
    assert expected <= image_suffixes()
    assert not image_suffixes() & {".pdf", ".eps", ".ps", ".mpg", ".h5", ".txt", ".npy", ""}


def test_a_file_that_would_start_a_program_is_no_image(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "drawing.eps")
    (tmp_path / "drawing.eps").rename(tmp_path / "drawing.jpg")
    with pytest.raises(ConfigError, match=r"drawing.jpg cannot be read as an image"):
        decode(tmp_path / "drawing.jpg", 4, 3)


def test_a_name_that_is_no_text_is_read(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    Image.fromarray(COLOURS).save(file)
    assert np.array_equal(read(file, 3), COLOURS)
