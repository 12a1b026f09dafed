"""Stochastic depth leaves out the branches that its numbers say, as often as timm's, and only in training."""

from copy import deepcopy

import pytest
import timm
import torch
from timm.layers import DropPath as TimmDropPath

from vitkd.models import Taps
from vitkd.models.dropout import DropPath

P = 0.4
TOKENS = Taps(features=("embed", "block0", "block1", "block2"))


def images(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, dtype=dtype)


def test_rates_are_timms(tiny):
    theirs = timm.create_model(
        *("vit_tiny_patch16_224",), img_size=32, depth=5, embed_dim=12, num_heads=2, drop_path_rate=0.3
    )

    ours = tiny(depth=5, drop_path_rate=0.3)

    expected = [getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks]
    assert ours.drop_path_rates == pytest.approx(expected)
    assert [block.drop_path.p for block in ours.build().blocks] == pytest.approx(expected)


def test_a_uniform_rate_is_that_of_every_block(tiny):
    config = tiny(depth=3, drop_path_rate=P, drop_path_uniform=True)

    assert config.drop_path_rates == (P,) * 3
    kept = config.build().draw_kept(torch.ones(100_000))
    shares = [float((branch == 0).float().mean()) for block in kept for branch in block]
    assert shares == pytest.approx([P] * 6, abs=0.01)
    assert tiny(depth=1, drop_path_rate=P, drop_path_uniform=True).drop_path_rates == (P,)


def test_numbers_are_distributed_as_timms():
    count = 100_000
    theirs = TimmDropPath(P).train()(torch.ones(count, 1, 1))

    drawn = DropPath(P).train().draw(torch.ones(count))

    assert drawn.shape == (2, count, 1, 1)
    for branch in drawn:
        torch.testing.assert_close(branch.unique(), theirs.unique(), rtol=1e-4, atol=0)
        # Five standard deviations of the difference of two shares.
        deviation = (2 * P * (1 - P) / count) ** 0.5
        ours, others = ((numbers == 0).float().mean().item() for numbers in (branch, theirs))
        assert ours == pytest.approx(others, abs=5 * deviation)


def test_both_branches_of_all_images_and_blocks_are_left_out_independently(tiny):
    model = tiny(depth=3, drop_path_rate=P).build()

    first, *others = model.draw_kept(torch.ones(200_000))

    assert first is None, "the first block's rate is 0"
    branches = torch.cat(others)[..., 0, 0]
    of_neighbours = branches.view(4, -1, 2).permute(0, 2, 1).flatten(0, 1)
    torch.testing.assert_close(torch.corrcoef(of_neighbours), torch.eye(8), atol=2e-2, rtol=0)


@pytest.mark.parametrize("attention", ["msa", "lsa"])
def test_a_block_adds_up_what_is_kept(tiny, attention):
    model = tiny(attention=attention).build().double()
    kept = [torch.rand(2, 6, 1, 1, dtype=torch.float64).round() * 3 for _ in range(3)]

    tokens = model(images(6), TOKENS, kept=kept).features

    x = tokens["embed"]
    for i, (block, (of_attention, of_mlp)) in enumerate(zip(model.blocks, kept, strict=True)):
        x = x + of_attention * block.attention(x)[0]
        x = x + of_mlp * block.mlp(x)
        torch.testing.assert_close(tokens[f"block{i}"], x, rtol=1e-12, atol=1e-12)


def test_training_keeps_what_it_draws(tiny):
    model = tiny(drop_path_rate=0.8).build().double()
    pixels = images(40)
    torch.manual_seed(1)
    kept = model.draw_kept(pixels[:, 0, 0, 0])
    torch.manual_seed(1)

    tokens = model(pixels, TOKENS).features

    assert torch.equal(tokens["block2"], model(pixels, TOKENS, kept=kept).features["block2"])
    is_left_out = (kept[2] == 0).all(0)[:, 0, 0]
    assert 0 < is_left_out.sum() < 40
    unchanged = (tokens["block2"] == tokens["block1"]).flatten(1).all(1)
    assert torch.equal(unchanged, is_left_out)


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_the_mean_over_many_draws_is_the_whole_network(tiny, branch):
    """Of a network that is linear in its last block's only branch."""
    model = tiny(depth=2, drop_path_rate=P).build().double()
    other = model.blocks[1].mlp.contract if branch == "attention" else model.blocks[1].attention.out
    torch.nn.init.zeros_(other.weight)
    torch.nn.init.zeros_(other.bias)
    image, taps = images(1), Taps(features=("block1",))
    whole = model.eval()(image, taps).features["block1"]

    drawn = model.train()(image.expand(20_000, -1, -1, -1), taps).features["block1"]

    errors = drawn.std(0) / 20_000**0.5
    assert ((drawn.mean(0) - whole[0]).abs() <= 5 * errors + 1e-4).all()
    assert errors.max() > 1e-4


@pytest.mark.parametrize("rate", [0.0, P])
def test_without_training_or_rate_nothing_changes_and_nothing_is_drawn(tiny, rate):
    plain = tiny(dropout=0.1).build()
    model = tiny(dropout=0.1, drop_path_rate=rate).build()
    model.load_state_dict(deepcopy(plain.state_dict()))
    is_training = rate == 0
    pixels, taps = images(4, torch.float32), Taps(scores=(0, 2), features=("block2",))

    def outcome(own: torch.nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(3)
        output = own.train(is_training)(pixels, taps)
        return [*output.tensors(), torch.get_rng_state()]

    for ours, theirs in zip(outcome(model), outcome(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_are_those_of_the_kept_branches(tiny):
    model = tiny(depth=2).build().double()
    kept = [torch.zeros(2, 3, 1, 1, dtype=torch.float64), torch.ones(2, 3, 1, 1, dtype=torch.float64)]

    model(images(3), kept=kept).answer.sum().backward()

    of_blocks = [[p.grad.abs().sum().item() for p in block.parameters()] for block in model.blocks]
    assert not any(of_blocks[0])
    assert all(of_blocks[1])


def test_an_architecture_of_no_such_setting_keeps_its_seeds(tiny):
    assert "drop_path" not in repr(tiny())
    assert "drop_path_rate=0.1" in repr(tiny(drop_path_rate=0.1))
    assert "drop_path_uniform" in repr(tiny(drop_path_rate=0.1, drop_path_uniform=True))
    assert tiny(drop_path_rate=0.1).drops
