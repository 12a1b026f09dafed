"""Data sets as their option files describe them, and real data where VITKD_DATA says it is."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import vitkd.data
from vitkd.data import Augment, Dataset, Mix
from vitkd.data.augment.policies import RandAugment
from vitkd.data.augment.random_erasing import RandomErasing

from .server import Server, serving

# What a data set's augment may list.
OTHERS = {"rand_augment": RandAugment(), "random_erasing": RandomErasing(mean=[0.5], std=[0.2], p=0.5)}
CONF = Path(__file__).parents[2] / "conf" / "dataset"


def option_file(option: str) -> tuple[type[Dataset], dict[str, Any]]:
    """The class and the fields of conf/dataset/OPTION.yaml; its choice of models is no field."""
    settings = read_option(option)
    return getattr(vitkd.data, settings.pop("_target_").removeprefix("vitkd.data.")), settings


def read_option(option: str) -> dict[str, Any]:
    """The settings of an option file, on top of those of the option that it builds on."""
    settings = yaml.safe_load((CONF / f"{option}.yaml").read_text())
    bases = [base for base in settings.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    return {key: value for base in bases for key, value in read_option(base).items()} | settings


@pytest.fixture
def make() -> Callable[..., Dataset]:
    """make("digits", batch_size=8): the option file's data set, with changes."""

    def make(option: str, **changes: Any) -> Dataset:
        cls, settings = option_file(option)
        settings |= changes
        if isinstance(settings["augment"], dict):
            listed = {"augmentations": OTHERS} if "then" in settings["augment"] else {}
            settings["augment"] = Augment(**settings["augment"] | listed)
        if isinstance(settings["mix"], dict):
            settings["mix"] = Mix(**settings["mix"])
        return cls(**settings)

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets."""
    if "VITKD_DATA" not in os.environ:
        pytest.skip("VITKD_DATA does not say where real data is")
    return Path(os.environ["VITKD_DATA"])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 3 × 20 random PNGs and JPEGs of several sizes and modes, in classes a, b and c."""
    rng = np.random.default_rng(0)
    for number in range(60):
        shape = (20 + number % 7, 18 + number % 5, 3)
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        place = tmp_path / "photos" / "abc"[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        image.convert("L" if number % 4 == 0 else "RGB").save(
            place / f"{number}.{'jpg' if number % 2 else 'png'}"
        )
    return tmp_path / "photos"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A web server on this machine, and nothing between it and the test."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        yield server


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """A folder in which nobody may write, root included."""
    if os.geteuid():
        (tmp_path / "read only").mkdir(mode=0o555)
        return tmp_path / "read only"
    if not Path("/sys/kernel").is_dir():
        pytest.skip("root may write everywhere here")
    return Path("/sys/kernel")
