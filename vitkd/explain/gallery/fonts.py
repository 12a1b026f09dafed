"""Which installed fonts can draw a text: classes may be named in any script."""

import logging
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

log = logging.getLogger("vitkd")

BOX = "□"
UPRIGHT = {("normal", weight) for weight in (400, "normal", "regular")}


def drawable(text: str) -> tuple[str, list[str]]:
    """The text as figures can show it, and the font families to draw it with, matplotlib's own first.

    A character that no installed font has becomes a box; a warning says so once.
    """
    default = FontProperties()
    absent = sorted({*text} - {"\n"} - characters(findfont(default)))
    boxes = {ord(character): BOX for character in absent if family_with(character) is None}
    if boxes:
        warn_of_boxes()
    others = dict.fromkeys(family for each in absent if (family := family_with(each)))
    return text.translate(boxes), [*default.get_family(), *others]


@cache
def characters(path: str) -> frozenset[str]:
    """Those that a font can draw; none of one that cannot be read or, as colour emoji may be, be scaled."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


@cache
def family_with(character: str) -> str | None:
    """The first installed font family, by name, that has a character in upright letters of normal weight."""
    # Of a family without such, matplotlib takes another weight, and says so at every draw.
    upright = [font for font in fontManager.ttflist if (font.style, font.weight) in UPRIGHT]
    for font in sorted(upright, key=lambda font: font.name):
        # The last resort draws a box for every character.
        if not font.name.startswith("Last Resort") and character in characters(font.fname):
            return font.name
    return None


@cache
def warn_of_boxes() -> None:
    """Log once that figures show boxes."""
    log.warning("warning: figures show %s for characters that no installed font has; Noto has most", BOX)
