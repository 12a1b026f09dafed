"""A partial ViT is a ViT whose other tokens are not there."""

import pytest
import torch

from vitkd.errors import ConfigError
from vitkd.models import PartialViTConfig, ViT, ViTConfig, load_model, save_model

SEEN = [1, 4, 6, 15]


def partial(tiny, patches=SEEN, **changes) -> PartialViTConfig:
    return PartialViTConfig(**vars(tiny(patch_size=2, **changes)), patches=patches)


def whole_of(model: ViT) -> ViT:
    """A ViT of all patches with the same weights; the positions of patches that are not seen are random."""
    config = {name: value for name, value in vars(model.config).items() if name != "patches"}
    whole = ViTConfig(**config).build().double()
    weights = {name.replace("tokenizer.0.", "tokenizer."): each for name, each in model.state_dict().items()}
    positions = whole.positions.detach().clone()
    positions[:, tokens_of(model)] = weights["positions"]
    whole.load_state_dict(weights | {"positions": positions})
    return whole


def tokens_of(model: ViT) -> list[int]:
    prefix = model.config.prefix
    return [*range(prefix), *(prefix + patch for patch in SEEN)]


@pytest.mark.parametrize(
    "changes", [{}, {"tokenizer": "spt"}, {"attention": "lsa", "representation_size": 3}]
)
def test_is_a_vit_without_the_other_tokens(tiny, changes):
    model = partial(tiny, **changes).build().double()
    whole, images = whole_of(model), torch.randn(3, 3, 8, 8, dtype=torch.float64)

    x = whole.embed(images)[:, tokens_of(model)]
    # Locality attention has a mask for as many tokens as it is built for, so its blocks are the model's own.
    for block in model.blocks:
        x, _ = block(x)
    expected = whole.head(whole.representation(whole.norm(x[:, 0])))

    torch.testing.assert_close(model(images).logits, expected, atol=1e-12, rtol=0)


def test_sees_nothing_else(tiny):
    model, images = partial(tiny).build(), torch.randn(2, 3, 8, 8, requires_grad=True)

    model(images).logits.sum().backward()

    patches = images.grad.unfold(2, 2, 2).unfold(3, 2, 2).abs().sum((0, 1, 4, 5)).flatten()
    assert patches.nonzero().flatten().tolist() == SEEN


def test_its_file_knows_what_it_sees(tiny, tmp_path):
    model, images = partial(tiny).build().eval(), torch.randn(2, 3, 8, 8)

    save_model(model, tmp_path / "student.safetensors")
    loaded = load_model(tmp_path)

    assert loaded.config == model.config
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert not loaded.attention


@pytest.mark.parametrize("patches", [[], [3, 1], [1, 1], [16], [-1], ["a"]])
def test_what_are_no_patches_is_refused(tiny, patches):
    with pytest.raises(ConfigError, match="patches"):
        partial(tiny, patches)
