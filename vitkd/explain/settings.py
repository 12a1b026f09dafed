"""The settings of `python -m vitkd.explain`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitkd.data.decoding import is_image
from vitkd.errors import ConfigError, check_choice, from_extra, naming, suggest
from vitkd.explain.maps.methods import EXTRAS, METHODS
from vitkd.runs.checkpoints import model_file
from vitkd.runs.folder import RunFolder


@dataclass
class Settings:
    """What the command line says; conf/explain.yaml describes each."""

    run: Any
    model: str | None
    by_data_size: str | None
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
        if sum(each is not None for each in (self.run, self.model, self.by_data_size)) != 1:
            ways = "run=FOLDER (or run=[A,B]) or model=timm:NAME or by_data_size=FOLDER"
            raise ConfigError(f"give either {ways}")
        if self.by_data_size is not None and self.image is not None:
            raise ConfigError(f"image={self.image}: by_data_size looks at test images; leave out image")
        if self.model is not None and self.image is None:
            raise ConfigError(f"model={self.model}: has no test split; name pictures by image=PATH")
        if not 1 <= len(self.runs) <= 2 and self.run is not None:
            raise ConfigError(f"run={self.run}: name one run, or two to compare as run=[A,B]")
        check_choice(self, "epoch", ("best", "last"))
        for name, least in (("images", 1), ("faithfulness_images", 0), ("regions", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.methods:
            raise ConfigError(f"methods=[]: name at least one of {', '.join(METHODS)}")
        for method in self.methods:
            if method not in METHODS:
                raise ConfigError(f"methods={method}: {suggest(method, METHODS)}")
            if method in EXTRAS:
                from_extra(EXTRAS[method], "explain")
        if self.image is not None and self.of_class is not None:
            raise ConfigError(f"of_class={self.of_class}: chooses from the test split; leave out image")

    def check_files(self) -> None:
        """ConfigError for a setting that names a file or folder which is not there; none is read."""
        for path in self.runs:
            RunFolder.existing(path)
        if self.by_data_size is not None and not Path(self.by_data_size).is_dir():
            raise ConfigError(f"by_data_size={self.by_data_size}: there is no such folder")
        if self.model is not None and not self.model.startswith("timm:"):
            with naming("model="):
                model_file(Path(self.model))
        if (checkpoint := self.teacher.get("checkpoint")) is not None:
            with naming("teacher.checkpoint="):
                model_file(Path(str(checkpoint)))
        if self.image is not None:
            self.find_pictures()

    @property
    def runs(self) -> list[Path]:
        return _paths(self.run)

    @property
    def folder(self) -> Path:
        """Where to write: `out`, or a folder in the first run's, which is named after the second."""
        if self.out:
            return Path(self.out)
        if self.by_data_size is not None:
            return Path(self.by_data_size, "explain_by_data_size")
        name = "explain" if self.image is None else "explain_pictures"
        for other in self.runs[1:]:
            beside = os.path.relpath(other.resolve(), self.runs[0].resolve().parent)
            name += "_with_" + re.sub(r"[^\w.+-]+", "_", beside).strip("._")
        return Path(*self.runs[:1], name)

    def find_pictures(self) -> list[Path]:
        """The files that `image` names, and the pictures in its folders."""
        pictures: list[Path] = []
        for place in _paths(self.image):
            if not (place.is_file() or place.is_dir()):
                raise ConfigError(f"image={place}: there is no such file or folder")
            files = sorted(place.iterdir()) if place.is_dir() else []
            found = [file for file in files if is_image(file)]
            if place.is_dir() and not found:
                raise ConfigError(f"image={place}: no picture in it (.jpg, .png or what Pillow reads)")
            pictures += found or [place]
        if not pictures:
            raise ConfigError(
                f"image={self.image}: names no picture; give a file, a folder or a list of them"
            )
        return pictures


def _paths(value: Any) -> list[Path]:
    """Those that a setting names: none, one or a list."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [Path(str(each)) for each in values]
