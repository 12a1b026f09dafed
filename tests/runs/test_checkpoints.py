"""Models come back from a run's files bit for bit, and nothing else does."""

import pickle
from pathlib import Path

import pytest
import torch

from vitkd.errors import ConfigError
from vitkd.models import ViT, describe, save_model
from vitkd.runs.checkpoints import load_any, load_from_checkpoint, read_checkpoint


@pytest.fixture
def model(tiny) -> ViT:
    return tiny(dropout=0.1).build()


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    """As a fit with a teacher saves it, but for what it is not read for."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": describe(model), "state_dict": weights, "epoch": 4}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_checkpoint_comes_back_bit_for_bit(model, checkpoint):
    loaded, epoch = load_from_checkpoint(checkpoint)

    assert epoch == 5
    assert loaded.config == model.config
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_model_is_found_by_folder_and_by_either_file(model, checkpoint):
    save_model(model, checkpoint.with_name("student.safetensors"))

    for path in (checkpoint.parent, checkpoint, checkpoint.with_name("student.safetensors")):
        assert torch.equal(load_any(path).head.weight, model.head.weight)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.ckpt", "nowhere.safetensors"])
def test_an_absent_one_is_told(name, tmp_path):
    with pytest.raises(ConfigError, match=f"{name}: there is no such file"):
        load_any(tmp_path / name)


def test_code_is_refused(checkpoint):
    torch.save({"model": {}, "state_dict": {}, "epoch": 0, "extra": Path("x")}, checkpoint)

    with pytest.raises(ConfigError, match="refused"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"model": {}}, torch.zeros(3)], ids=str)
def test_anything_else_is_no_checkpoint(content, checkpoint):
    torch.save(content, checkpoint)

    with pytest.raises(ConfigError, match="not a checkpoint of vitkd's"):
        read_checkpoint(checkpoint)


def test_weights_of_another_shape_are_told(checkpoint, tiny):
    content = read_checkpoint(checkpoint)
    torch.save(content | {"model": describe(tiny(depth=1).build())}, checkpoint)

    with pytest.raises(ConfigError, match="weights do not fit"):
        load_from_checkpoint(checkpoint)


def test_a_checkpoint_without_its_epoch_is_told(checkpoint):
    content = read_checkpoint(checkpoint)
    del content["epoch"]
    torch.save(content, checkpoint)

    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        load_from_checkpoint(checkpoint)


@pytest.mark.parametrize("position", [0, 1, 30, -30, -1])
def test_every_cut_is_told(position, checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:position])

    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_told(seed, checkpoint):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (500,), dtype=torch.uint8, generator=generator)
    checkpoint.write_bytes(noise.numpy().tobytes())

    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_plain_pickle_is_refused_without_a_second_line(protocol, checkpoint, recwarn):
    checkpoint.write_bytes(pickle.dumps({"model": print}, protocol=protocol))

    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        read_checkpoint(checkpoint)
    assert not [*recwarn]
