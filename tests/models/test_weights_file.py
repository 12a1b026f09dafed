"""One safetensors file is enough to have a model back, bit for bit; a bad file is one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitkd.errors import ConfigError
from vitkd.models import ViT, build_from_header, describe, load_model, save_model


@pytest.fixture
def model(tiny) -> ViT:
    return tiny(dropout=0.1, emb_dropout=0.2, qkv_bias=True, channels=2, num_classes=7).build()


@pytest.fixture
def file(model, tmp_path) -> Path:
    save_model(model, tmp_path / "model.safetensors", about={"epoch": "3"})
    return tmp_path / "model.safetensors"


def test_round_trip_is_bit_exact(model, file):
    loaded = load_model(file)

    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    images = torch.randn(3, 2, 8, 8)
    assert torch.equal(loaded(images).logits, model.eval()(images).logits)


def test_a_loaded_model_can_learn(file):
    loaded = load_model(file).train()
    loaded(torch.randn(3, 2, 8, 8)).logits.sum().backward()

    assert all(p.grad is not None for p in loaded.parameters())


def test_the_header_holds_what_is_known_about_the_model(file, model):
    header = header_of(file)

    assert header["epoch"] == "3"
    assert header["model"]["dropout"] == 0.1
    assert build_from_header(header, file).config == model.config


def test_every_switch_survives_a_file(tiny, tmp_path):
    model = tiny(tokenizer="spt", attention="lsa", distillation_token=True).build()
    torch.nn.init.normal_(model.blocks[1].attention.log_temperature)
    save_model(model, tmp_path / "student.safetensors")

    loaded = load_model(tmp_path)

    assert loaded.config == model.config
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(loaded(images).logits, model.eval()(images).logits)


SAVE = """
import sys, torch
from pathlib import Path
from vitkd.models import ViTConfig, save_model
model = ViTConfig(8, 3, 5, patch_size=4, embed_dim=8, depth=2, head_dim=4, mlp_dim=8).architecture()
with torch.no_grad():
    for place, parameter in enumerate(model.parameters()):
        parameter.fill_(place)
save_model(model, Path(sys.argv[1]), {"epoch": "3", "run": "a", "why": "b"})
"""


def test_every_process_writes_the_same_bytes(tmp_path):
    files = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, file in enumerate(files, start=1):
        environment = os.environ | {"PYTHONHASHSEED": str(seed)}
        subprocess.run([sys.executable, "-c", SAVE, str(file)], env=environment, check=True)

    assert files[0].read_bytes() == files[1].read_bytes()


def header_of(file: Path) -> dict[str, Any]:
    """All that a file says besides its weights."""
    with safe_open(file, framework="pt") as opened:
        (text,) = opened.metadata().values()
    return json.loads(text)


def rewritten(file: Path, **changes: object) -> None:
    """The same weights under another header."""
    save_file(load_file(file), file, metadata={"vitkd": json.dumps(header_of(file) | changes)})


def shape(model: ViT, **changes: object) -> dict[str, Any]:
    return describe(model)["model"] | changes


DAMAGES = {
    "absent": lambda file, model: file.unlink(),
    "a folder": lambda file, model: (file.unlink(), file.mkdir()),
    "empty": lambda file, model: file.write_bytes(b""),
    "half": lambda file, model: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "a byte short": lambda file, model: file.write_bytes(file.read_bytes()[:-1]),
    "random bytes": lambda file, model: file.write_bytes(bytes(range(256)) * 20),
    "no header": lambda file, model: save_file(load_file(file), file),
    "somebody else's header": lambda file, model: save_file(load_file(file), file, metadata={"format": "pt"}),
    "another model": lambda file, model: rewritten(file, config="SwinConfig"),
    "header is no JSON": lambda file, model: save_file(load_file(file), file, metadata={"vitkd": "{"}),
    "header is a list": lambda file, model: save_file(load_file(file), file, metadata={"vitkd": "[1, 2]"}),
    "config is a list": lambda file, model: rewritten(file, config=["ViTConfig"]),
    "model is a text": lambda file, model: rewritten(file, model="{"),
    "model is a list": lambda file, model: rewritten(file, model=[1, 2]),
    "model is a number": lambda file, model: rewritten(file, model=7),
    "sizes are words": lambda file, model: rewritten(file, model=shape(model, embed_dim="wide")),
    "sizes are fractions": lambda file, model: rewritten(file, model=shape(model, embed_dim=12.5)),
    "impossible shape": lambda file, model: rewritten(file, model=shape(model, patch_size=3)),
    "impossibly wide": lambda file, model: rewritten(file, model=shape(model, mlp_dim=2**50)),
    "deeper": lambda file, model: rewritten(file, model=shape(model, depth=4)),
    "shallower": lambda file, model: rewritten(file, model=shape(model, depth=2)),
    "wider": lambda file, model: rewritten(file, model=shape(model, mlp_dim=17)),
    "a billion blocks": lambda file, model: rewritten(file, model=shape(model, depth=10**9)),
    "a word of blocks": lambda file, model: rewritten(file, model=shape(model, depth="3")),
    "more than PyTorch counts": lambda file, model: rewritten(file, model=shape(model, embed_dim=10**30)),
    "a header without end": lambda file, model: save_file(
        load_file(file), file, metadata={"vitkd": "[" * 100_000}
    ),
    "a pipe": lambda file, model: (file.unlink(), os.mkfifo(file)),
    "a setting of tomorrow": lambda file, model: rewritten(file, model=shape(model, pooling="mean")),
    "no such attention": lambda file, model: rewritten(file, model=shape(model, attention="swin")),
    "attention is a list": lambda file, model: rewritten(file, model=shape(model, attention=["lsa"])),
    "another attention": lambda file, model: rewritten(file, model=shape(model, attention="lsa")),
    "another tokenizer": lambda file, model: rewritten(file, model=shape(model, tokenizer="spt")),
    "a token more": lambda file, model: rewritten(file, model=shape(model, distillation_token=True)),
    "a convolutional network": lambda file, model: rewritten(
        file, config="ResNetConfig", model={"image_size": 8, "channels": 2, "num_classes": 7}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_bad_file_is_one_line_that_names_it(file, model, damage):
    damage(file, model)

    with pytest.raises(ConfigError) as caught:
        load_model(file)

    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
def test_one_flipped_bit_in_the_weights_is_reported(share, file):
    data = bytearray(file.read_bytes())
    data[int(share * len(data))] ^= 1
    file.write_bytes(data)

    with pytest.raises(ConfigError, match=rf"{file.name}.*damaged"):
        load_model(file)
