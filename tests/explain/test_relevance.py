"""Gradients against finite differences, relevance against the paper's formula over the test's own hooks."""

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import gelu

from vitkd.errors import ConfigError
from vitkd.explain.maps.flow import attention_grad_cam, attention_gradients, relevance
from vitkd.explain.maps.recording import record


def sharpened(model):
    """Random weights make every map uniform; with larger ones heads, images and classes differ."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


@pytest.fixture
def model(tiny):
    return sharpened(tiny().build())


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def logits_with(model, images, block, shift):
    """The ViT's logits by hand, with `shift` added to the attention weights of `block`."""
    x = model.embed(images)
    for i, layer in enumerate(model.blocks):
        a, m = layer.attention, layer.mlp
        q, k, v = a.qkv(a.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 2).softmax(-1) + (shift if i == block else 0)
        x = x + a.out((weights @ v).transpose(1, 2).flatten(2))
        x = x + m.contract(gelu(m.expand(m.norm(x))))
    return model.head(model.norm(x[:, 0]))


@torch.no_grad()
def difference(model, images, target, block, entry, step=1e-5):
    """The central difference [B] of each image's logit by one entry of its weights."""
    shift = torch.zeros(2, 5, 5, dtype=torch.float64)
    shift[entry] = step
    up, down = (logits_with(model, images, block, sign * shift) for sign in (1, -1))
    return ((up - down) / (2 * step)).gather(1, target[:, None])[:, 0]


def test_the_hand_written_forward_is_the_models(model, images):
    found = logits_with(model, images, 0, 0)

    torch.testing.assert_close(found, model(images).logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_gradients_equal_finite_differences(model, images, block):
    target = torch.tensor([3, 1])

    gradient = attention_gradients(record(model, images), target)[block]

    assert gradient.abs().max() > 1e-3
    for entry in np.ndindex(2, 5, 5):
        expected = difference(model, images, target, block, entry)
        torch.testing.assert_close(gradient[:, *entry], expected, atol=1e-8, rtol=1e-6)


def test_a_batchs_gradients_are_those_of_each_image_alone(model, images):
    together = attention_gradients(record(model, images), torch.tensor([4, 0]))

    for image, target in enumerate([4, 0]):
        alone = attention_gradients(record(model, images[image : image + 1]), torch.tensor([target]))
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[image], theirs[0], atol=1e-12, rtol=0)


def test_one_recording_serves_many_classes(model, images):
    recording = record(model, images)

    maps = [
        relevance(recording.weights, attention_gradients(recording, torch.full((2,), target)))
        for target in range(5)
    ]

    for i in range(5):
        for j in range(i):
            assert (maps[i][:, 0, 1:] - maps[j][:, 0, 1:]).abs().amax(-1).min() > 1e-6


def by_the_paper(model, image, target):
    """R of one image, from hooks on a timm ViT: R = I, R ← R + E_h((∇A ⊙ A)⁺) · R."""
    seen, handles = [], []

    def keep(_module, _inputs, output):
        output.retain_grad()
        seen.append(output)

    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(keep))
    one_hot = torch.zeros(1, 5, dtype=torch.float64)
    one_hot[0, target] = 1
    model.zero_grad()
    (model(image[None]) * one_hot).sum().backward()
    for handle in handles:
        handle.remove()

    tokens = seen[0].shape[-1]
    r = np.eye(tokens)
    for a in seen:
        values, gradients = a.detach().numpy()[0], a.grad.numpy()[0]
        mean = np.zeros((tokens, tokens))
        for head in range(len(values)):
            for i in range(tokens):
                for j in range(tokens):
                    mean[i, j] += max(0.0, gradients[head, i, j] * values[head, i, j]) / len(values)
        r = r + mean @ r
    return r


def test_relevance_equals_the_papers_formula_on_a_timm_vit():
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=3, num_heads=3, num_classes=5
    )
    sharpened(model)
    images, target = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([2, 4, 2])

    recording = record(model, images)
    found = relevance(recording.weights, attention_gradients(recording, target))

    for image in range(3):
        expected = by_the_paper(model, images[image], target[image])
        assert np.abs(expected[0, 1:]).max() > 1e-3
        np.testing.assert_allclose(found[image].detach().numpy(), expected, atol=1e-10, rtol=0)


def test_attention_that_speaks_against_the_class_is_no_relevance():
    a = torch.full((1, 2, 2, 2), 0.5, dtype=torch.float64)
    gradient = torch.tensor([[[[0.0, 4.0], [-8.0, 0.0]], [[0.0, -4.0], [-8.0, 0.0]]]], dtype=torch.float64)

    # Of entry (0, 1) head 0 gives +2, head 1 −2, which counts as 0: the mean is 1.
    assert relevance([a], [gradient]).tolist() == [[[1, 1], [0, 1]]]
    # And again on top: R + Ā R.
    assert relevance([a, a], [gradient, gradient]).tolist() == [[[1, 2], [0, 1]]]


def test_attention_grad_cam_by_hand():
    first = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    second = torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    weights = torch.stack([first, second])[None]
    gradient = torch.stack([torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[-2.0, 0.0], [0.0, 0.0]])])

    cam = attention_grad_cam([torch.full_like(weights, 9.0), weights], [weights, gradient[None]])

    # The heads weigh 1 and −½: ½·(first − ½·second), its positive part.
    torch.testing.assert_close(cam, torch.tensor([[[0.4, 0.0], [0.1, 0.15]]]))


def test_the_last_blocks_gradient_is_the_class_tokens_alone(model, images):
    """What the classifier does not read has no gradient: a check on which block is the last."""
    gradients = attention_gradients(record(model, images), torch.tensor([0, 1]))

    assert gradients[-1][:, :, 1:].abs().max() == 0
    assert gradients[-2][:, :, 1:].abs().max() > 0


def test_classes_and_graphs_that_do_not_exist_are_reported(model, images):
    recording = record(model, images)
    for wrong in (5, -1):
        with pytest.raises(ConfigError, match=f"class {wrong}: the model has classes 0 to 4"):
            attention_gradients(recording, torch.tensor([0, wrong]))
    with torch.no_grad():
        without = record(model, images)
    with pytest.raises(ConfigError, match="no gradients"):
        attention_gradients(without, torch.tensor([0, 1]))
