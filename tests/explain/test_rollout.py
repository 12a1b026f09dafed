"""Rollout by hand on three tokens, and against a loop that reads like the paper."""

import numpy as np
import pytest
import torch

from vitkd.errors import ConfigError
from vitkd.explain.maps.flow import gradient_rollout, rollout

FUSE = {"mean": np.mean, "max": np.max, "min": np.min}


def random_weights(blocks=4, images=3, heads=2, tokens=6):
    return [torch.rand(images, heads, tokens, tokens, dtype=torch.float64).softmax(-1) for _ in range(blocks)]


def literal(fused, discard=0.0):
    """The product of (Ā + I)/row sum over one image's fused matrices, the lowest block first; by loops."""
    tokens = len(fused[0])
    flow = np.eye(tokens)
    for a in fused:
        a = a.copy()
        order = sorted((a[i, j], i, j) for i in range(tokens) for j in range(tokens))
        for _, i, j in order[: int(discard * tokens**2)]:
            if i != 0 and j != 0:
                a[i, j] = 0
        hat = np.zeros_like(a)
        for i in range(tokens):
            row = a[i] + np.eye(tokens)[i]
            hat[i] = row / row.sum()
        flow = hat @ flow
    return flow


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-12, rtol=0)


def test_three_tokens_and_two_blocks_by_hand():
    first = [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    second = [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]
    # Â1 = [[½, ½, 0], [0, ½, ½], [½, 0, ½]] and Â2 = [[1, 0, 0], [¼, ¾, 0], [0, 0, 1]]; this is Â2 Â1.
    expected = [[0.5, 0.5, 0], [0.125, 0.5, 0.375], [0.5, 0, 0.5]]
    weights = [torch.tensor(a, dtype=torch.float64)[None, None] for a in (first, second)]

    assert_close(rollout(weights), [expected])


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("start_block", [0, 2, 3])
def test_every_image_equals_the_literal_loop(fusion, discard, start_block):
    weights = random_weights()

    ours = rollout(weights, fusion=fusion, discard=discard, start_block=start_block)

    for image in range(3):
        fused = [FUSE[fusion](w[image].numpy(), axis=0) for w in weights[start_block:]]
        assert_close(ours[image], literal(fused, discard))


def test_rows_sum_to_one_whatever_is_discarded():
    for discard in (0.0, 0.5, 0.99):
        flow = rollout(random_weights(), fusion="max", discard=discard)
        torch.testing.assert_close(flow.sum(-1), torch.ones_like(flow[..., 0]))


def test_the_class_tokens_entries_outlast_any_discarding():
    weights = random_weights(blocks=1, images=2, heads=1)
    # The class token's are the lowest of all.
    weights[0][:, :, 0, 1:] /= 1000
    weights[0][:, :, 1:, 0] /= 1000

    flow = rollout(weights, discard=0.99)

    assert (flow[:, 0, :] > 0).all()
    assert (flow[:, :, 0] > 0).all()
    kept = torch.eye(5, dtype=torch.bool)
    assert (flow[:, 1:, 1:][:, ~kept] == 0).sum() >= 2 * (25 - 5 - 1)


@pytest.mark.parametrize("keep", [(0,), (0, 1)])
def test_of_two_tokens_that_are_classified_both_may_be_kept(keep):
    weights = random_weights(blocks=1, images=2, heads=1)
    weights[0][:, :, :2] /= 1000

    flow = rollout(weights, discard=0.99, keep=keep)

    assert (flow[:, 0] > 0).all()
    assert (flow[:, 1, 2:] > 0).all() == (keep == (0, 1))


def test_images_do_not_share_what_is_discarded():
    weights = random_weights()

    together = rollout(weights, discard=0.6)

    for image in range(3):
        alone = rollout([w[image : image + 1] for w in weights], discard=0.6)
        assert_close(together[image], alone[0].numpy())


def test_the_weights_are_left_alone():
    weights = random_weights(heads=1)
    before = [w.clone() for w in weights]

    rollout(weights, discard=0.9)
    gradient_rollout(weights, weights, discard=0.9)

    assert all(torch.equal(now, then) for now, then in zip(weights, before, strict=True))


@pytest.mark.parametrize("discard", [0.0, 0.4])
@pytest.mark.parametrize("start_block", [0, 1])
def test_gradient_rollout_equals_the_literal_loop(discard, start_block):
    weights = random_weights()
    gradients = [torch.randn_like(w) * (i + 1) for i, w in enumerate(weights)]

    ours = gradient_rollout(weights, gradients, discard=discard, start_block=start_block)

    for image in range(3):
        fused = []
        for a, g in [*zip(weights, gradients, strict=True)][start_block:]:
            product = (a[image] * g[image]).numpy()
            fused.append(np.where(product > 0, product, 0).mean(0))
        # Many entries are exactly zero, so which of them are "lowest" does not matter.
        assert_close(ours[image], literal(fused, discard))


def test_each_blocks_gradient_is_its_own():
    weights = random_weights(blocks=2)
    one, none = torch.ones_like(weights[0]), torch.zeros_like(weights[0])

    flow = gradient_rollout(weights, [none, one])

    # A block without gradient passes everything on as it came.
    torch.testing.assert_close(flow, rollout(weights[1:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discard": 1.0}, "discard=1.0: must lie in"),
        ({"discard": -0.1}, "discard=-0.1"),
        ({"start_block": 4}, "start_block=4: must be 0 to 3"),
        ({"start_block": -1}, "start_block=-1"),
    ],
)
def test_options_out_of_range_are_reported(options, message):
    weights = random_weights()

    with pytest.raises(ConfigError, match=message):
        rollout(weights, **options)
    with pytest.raises(ConfigError, match=message):
        gradient_rollout(weights, weights, **options)
