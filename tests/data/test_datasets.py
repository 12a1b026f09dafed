"""Each data set: its option file is complete, its facts hold, its splits never move."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from vitkd.data import Augment, Dataset, ImageDataModule
from vitkd.data.library_sets import FOLDERS
from vitkd.data.staging import has_files
from vitkd.errors import ConfigError

from .conftest import CONF, option_file

OPTIONS = sorted(file.stem for file in CONF.glob("*.yaml"))
Make = Callable[..., Dataset]


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def test_there_are_nine() -> None:
    assert OPTIONS == [
        "cifar10",
        "cifar100",
        "cifar100_report_protocol",
        "digits",
        "fashion_mnist",
        "image_folder",
        "mnist",
        "tf_flowers",
        "tiny_imagenet",
    ]


@pytest.mark.parametrize("option", OPTIONS)
def test_option_file_fits_its_schema(option: str, make: Make) -> None:
    cls, settings = option_file(option)
    assert (CONF / f"{option}.yaml").read_text().startswith("# ")
    assert set(settings) == {field.name for field in dataclasses.fields(cls)}
    own = {field.name for field in dataclasses.fields(Augment)} - {Augment.REST}
    assert set(settings["augment"]) == own
    parsed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), settings))
    assert parsed == make(option)
    assert parsed.name == option
    assert parsed.image_size % parsed.patch_size == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"channels": 2}, "channels=2"),
        ({"image_size": 0}, "image_size=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"eval_batch_size": -1}, "eval_batch_size=-1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"val_fraction": float("nan")}, "val_fraction=nan"),
        ({"train_fraction": 0.0}, "train_fraction=0.0: must be above 0 and at most 1"),
        ({"train_fraction": 1.01}, "train_fraction=1.01: must be above 0 and at most 1"),
        ({"train_fraction": float("nan")}, "train_fraction=nan"),
        ({"split_seed": -1}, "split_seed=-1"),
        ({"name": "../../esc"}, "name=../../esc: must be one folder name"),
        ({"name": "a/b"}, "name=a/b: must be one folder name"),
        ({"name": ""}, "name=: must be one folder name"),
        ({"name": "."}, r"name=\.: must be one folder name"),
        ({"name": ".."}, r"name=\.\.: must be one folder name"),
        ({"mean": [0.5, 0.5]}, "one value a channel, 1 and not 2"),
        ({"std": [0.0]}, "above 0"),
        ({"augment": Augment(crop_padding=8)}, "crop_padding below image_size=8"),
    ],
)
def test_bad_settings(changes: dict, named: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        make("digits", **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"), [({"num_classes": 11}, "has 10 classes"), ({"image_size": 16}, "8×8 pixels")]
)
def test_settings_that_the_data_contradicts(changes: dict, named: str, make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        make("digits", **changes).inspect(tmp_path)


def test_digits(make: Make, tmp_path: Path) -> None:
    dataset = make("digits")
    assert dataset.inspect(tmp_path) == 10
    module = ImageDataModule(dataset, tmp_path, seed=0)
    module.setup()
    train, test = module._splits["train"], module._splits["test"]
    assert (len(train), len(test)) == (1438, 359)
    assert train.class_names == list("0123456789")
    # Published accuracies compare only while these stay.
    assert digest(train.labels, train.read_all(), test.labels, test.read_all()) == "60953cff7d0bbc0b"
    assert digest(module._indices["train"], module._indices["val"]) == "79eaf3615bb83753"
    both = torch.cat([train.read_all(), test.read_all()])
    assert len(both.flatten(1).unique(dim=0)) == 1797
    shades = train.read_all().double() / 255
    assert shades.mean().item() == pytest.approx(dataset.mean[0], abs=5e-5)
    assert shades.std().item() == pytest.approx(dataset.std[0], abs=5e-5)
    assert dataset.contents(tmp_path) is None
    assert not any(tmp_path.iterdir())


def test_unknown_source(make: Make) -> None:
    with pytest.raises(ConfigError, match="source=SVHN: choose MNIST, FashionMNIST, CIFAR10 or CIFAR100"):
        make("mnist", source="SVHN")


@pytest.mark.parametrize("option", ["mnist", "cifar100"])
def test_absent_and_not_to_be_downloaded(option: str, make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"dataset {option}: .*absent.*by hand.*paths.data=DIR") as error:
        make(option, download=False).inspect(tmp_path / "data")
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "files"),
    [
        ("mnist", "amazonaws.com/mnist/t10k-images-idx3-ubyte.gz (md5 9fb629c4189551a2d022fa330f9573f3)"),
        ("fashion_mnist", "/train-labels-idx1-ubyte.gz (md5 25c81989df183df01b3e8a0aad5dffbe)"),
        ("cifar10", "kriz/cifar-10-python.tar.gz (md5 c58f30108f718f92721af3b95e74349a) in "),
        ("cifar100", "kriz/cifar-100-python.tar.gz (md5 eb9058c3a382ffc7106e4002c42a8d85) in "),
        (
            "tiny_imagenet",
            "edu/tiny-imagenet-200.zip (sha256 6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462",
        ),
        ("tf_flowers", "example_images/flower_photos.tgz (sha256 4c54ace7911aaffe13a365c34f650e71dd5bf1be"),
    ],
)
def test_absent_while_offline(
    option: str,
    files: str,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("socket.getaddrinfo", _no_network)
    with pytest.raises(ConfigError, match=r"could not be downloaded .*no network here.*by hand") as error:
        make(option).inspect(tmp_path / "deep" / "data")
    assert "\n" not in str(error.value)
    assert files in str(error.value)
    assert not any(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network here")


def test_damaged_files_are_left_for_the_user(make: Make, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{split}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x09" * 3 + b"too short")
    with pytest.raises(ConfigError, match=r"MNIST/raw is damaged or incomplete \(.*\); remove it"):
        make("mnist").inspect(tmp_path)
    assert len(list(raw.iterdir())) == 4


@pytest.mark.parametrize("option", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_official_files(option: str, make: Make, real_data: Path) -> None:
    dataset = make(option)
    if not has_files(real_data / FOLDERS[dataset.source]):  # type: ignore[attr-defined]
        pytest.skip(f"{option} is not in {real_data}")
    splits = dataset.load(real_data)
    train, test = splits["train"], splits["test"]
    assert len(train) == (50_000 if "cifar" in option else 60_000)
    assert len(test) == 10_000
    assert len(train.class_names) == len(train.labels.unique()) == dataset.num_classes
    pixels = train.read_all()
    for channel, (mean, std) in enumerate(zip(dataset.mean, dataset.std, strict=True)):
        shades = pixels[:, channel].float() / 255
        assert shades.mean().item() == pytest.approx(mean, abs=1e-4)
        assert shades.std().item() == pytest.approx(std, abs=2e-4)
