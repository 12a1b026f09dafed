"""What `python -m vitkd.explain` can be told."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitkd.errors import ConfigError, suggest
from vitkd.explain.maps.methods import METHODS

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass
class Settings:
    """What the command line says; conf/explain.yaml tells of each."""

    run: Any
    model: str | None
    pretrained: bool
    image: Any
    teacher: dict[str, Any]
    epoch: str
    images: int
    of_class: str | None
    seed: int
    methods: list[str]
    faithfulness_images: int
    regions: int
    out: str | None
    root: str | None
    paths: dict[str, Any]
    accelerator: str

    def __post_init__(self) -> None:
        if (self.run is None) == (self.model is None):
            raise ConfigError("give either run=FOLDER (or run=[A,B]) or model=timm:NAME")
        if self.model is not None and self.image is None:
            raise ConfigError(f"model={self.model}: has no test split; name pictures by image=PATH")
        if not 1 <= len(self.runs) <= 2 and self.run is not None:
            raise ConfigError(f"run={self.run}: name one run, or two to compare as run=[A,B]")
        if self.epoch not in ("best", "last"):
            raise ConfigError(f"epoch={self.epoch}: choose best or last")
        for name, least in (("images", 1), ("faithfulness_images", 0), ("regions", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.methods:
            raise ConfigError(f"methods=[]: name at least one of {', '.join(METHODS)}")
        for method in self.methods:
            if method not in METHODS:
                raise ConfigError(f"methods={method}: {suggest(method, METHODS)}")

    @property
    def runs(self) -> list[Path]:
        return [Path(str(each)) for each in _listed(self.run)]

    @property
    def pictures(self) -> list[Path]:
        """The files that `image` names."""
        found: list[Path] = []
        for place in (Path(str(each)) for each in _listed(self.image)):
            if not place.exists():
                raise ConfigError(f"image={place}: there is no such file or folder")
            inside = (
                sorted(p for p in place.iterdir() if p.suffix.lower() in PICTURES)
                if place.is_dir()
                else [place]
            )
            if not inside:
                raise ConfigError(f"image={place}: no picture in it ({', '.join(sorted(PICTURES))})")
            found += inside
        if not found:
            raise ConfigError(
                f"image={self.image}: names no picture; give a file, a folder or a list of them"
            )
        return found


def _listed(value: Any) -> Iterator[Any]:
    if value is None:
        return iter(())
    return iter(value) if isinstance(value, list | tuple) else iter((value,))
