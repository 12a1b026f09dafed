"""A model's maps in batches against those of all images at once, and against its own scores."""

import numpy as np
import pytest
import timm
import torch

from vitkd.explain.maps import subjects
from vitkd.explain.maps.attention import attention_features, region_map
from vitkd.explain.maps.methods import METHODS, class_rows, explain_by
from vitkd.explain.maps.recording import record
from vitkd.explain.maps.subjects import (
    head_mean,
    subject_of,
    with_regions,
    without_maps,
)
from vitkd.models import ResNetConfig, Taps

# Noise is drawn a call, and the others need packages that are slow to import.
DETERMINISTIC = ["attention", "rollout", "gradient_rollout", "relevance", "grad_cam"]

METHODS_WITHOUT_PACKAGES = [*DETERMINISTIC, "random"]


@pytest.fixture
def model(tiny):
    made = tiny(image_size=12, patch_size=4).build().eval()
    # Else the class token's start outweighs the image, and all are of one class.
    with torch.no_grad():
        made.cls_token.zero_()
        made.positions.mul_(0.1)
    return made


@pytest.fixture
def images():
    return torch.randn(7, 3, 12, 12)


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(subjects, "BATCH_SIZE", 3)


def subject(model, images, methods=("attention",), **more):
    return subject_of("it", model, images, methods, **more)[0]


@torch.no_grad()
def expected_rows(model, images):
    """[N, L, A, h, w] from the scores."""
    scores = model(images, Taps(scores=tuple(range(model.config.depth)))).scores
    rows = [scores[block].softmax(-1)[..., 0, 1:] for block in sorted(scores)]
    return torch.stack(rows, 1).unflatten(-1, (model.config.grid,) * 2)


def test_attention_is_the_class_tokens_row_of_every_block_and_head(model, images, in_parts):
    maps = subject(model, images).maps["attention"]

    assert maps.shape == (7, 3, 2, 3, 3)
    np.testing.assert_allclose(maps, expected_rows(model, images), rtol=1e-5)


def test_answers_are_those_of_a_plain_forward_pass(model, images, in_parts):
    found = subject(model, images)

    probabilities = model(images).logits.softmax(-1)
    assert found.predicted == probabilities.argmax(-1).tolist()
    assert found.confidence == pytest.approx(probabilities.amax(-1).tolist(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["msa", "lsa"])
def test_with_a_distillation_token_attention_is_the_mean_of_both_tokens_rows(attention, tiny):
    model = tiny(image_size=12, distillation_token=True, attention=attention).build().eval()
    images = torch.randn(4, 3, 12, 12)

    found, features = subject_of("it", model, images, METHODS_WITHOUT_PACKAGES)

    weights = torch.stack(model.trace(images).weights, 1)
    by_hand = (weights[..., 0, 2:] + weights[..., 1, 2:]) / 2
    assert found.readers == "class and distillation tokens"
    np.testing.assert_allclose(found.maps["attention"], by_hand.unflatten(-1, (3, 3)), rtol=1e-5)
    assert all(maps.shape[-2:] == (3, 3) for maps in found.maps.values())
    drawn = by_hand.mean(2)
    torch.testing.assert_close(features[..., 3:].mT, 9 * drawn / drawn.sum(-1, keepdim=True))


@torch.no_grad()
def test_a_model_without_maps_still_answers(in_parts):
    network = ResNetConfig(image_size=12, channels=3, num_classes=5, stem="small").build()
    images = torch.randn(7, 3, 12, 12)

    found = without_maps("teacher", network.train(), images)

    assert network.training
    probabilities = network.eval()(images).logits.softmax(-1)
    assert found.maps == {}
    assert found.predicted == probabilities.argmax(-1).tolist()
    assert found.confidence == pytest.approx(probabilities.amax(-1).tolist(), rel=1e-4)


@pytest.mark.parametrize("method", DETERMINISTIC[1:])
def test_maps_in_batches_are_those_of_the_predicted_classes_at_once(method, model, images, in_parts):
    maps = subject(model, images, [method]).maps

    target = model(images).logits.argmax(-1)
    expected = explain_by(method, model, images, target)
    assert len({*target.tolist()}) > 1
    assert [*maps] == ["attention", method]
    np.testing.assert_allclose(maps[method], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_every_method_stands_in_the_order_asked_for(model, images):
    names = ["random", *reversed(DETERMINISTIC)]

    found = subject(model, images, names)

    assert {*names} < {*METHODS}
    assert [*found.maps] == ["attention", *(name for name in names if name != "attention")]
    assert all(maps.shape == (7, 3, 3) for name, maps in found.maps.items() if name != "attention")


def test_beyond_so_many_numbers_heads_are_averaged(model, images, monkeypatch):
    whole = subject(model, images).maps["attention"]
    monkeypatch.setattr(subjects, "MAX_ATTENTION_VALUES", whole.size)
    assert subject(model, images).maps["attention"].shape == whole.shape
    monkeypatch.setattr(subjects, "MAX_ATTENTION_VALUES", whole.size - 1)

    averaged = subject(model, images)

    assert averaged.maps["attention"].shape == (7, 3, 1, 3, 3)
    np.testing.assert_allclose(averaged.maps["attention"][:, :, 0], whole.mean(2), rtol=1e-5)
    # So their mean is the same.
    torch.testing.assert_close(head_mean(averaged), head_mean(subject(model, images, ["attention"])))


@torch.no_grad()
def test_what_patches_attend_to_is_kept_by_head_by_mean_or_not_at_all(model, images, in_parts, monkeypatch):
    scores = model(images, Taps(scores=(0, 1, 2))).scores
    weights = torch.stack([scores[block].softmax(-1) for block in range(3)], 1)
    by_head = weights[..., 1:, 1:].unflatten(-1, (3, 3))
    whole = by_head.numel()

    for of_heads, of_patches, expected in [
        (whole, whole, by_head),
        (whole - 1, whole, by_head.mean(2, keepdim=True)),
        (whole - 1, whole // 2, by_head.mean(2, keepdim=True)),
        (whole - 1, whole // 2 - 1, None),
    ]:
        monkeypatch.setattr(subjects, "MAX_VALUES_BY_HEAD", of_heads)
        monkeypatch.setattr(subjects, "MAX_PATCH_VALUES", of_patches)
        found = subject(model, images).patches
        if expected is None:
            assert found is None
        else:
            assert found.shape == expected.shape == (7, 3, expected.shape[2], 9, 3, 3)
            np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("asked", "block"), [(-1, 2), (0, 0), (1, 1), (-3, 0)])
def test_the_block_shown_first_counts_from_either_end(asked, block, model, images):
    found = subject(model, images, first_block=asked)

    assert found.first_block == block
    torch.testing.assert_close(head_mean(found), head_mean(found, block))


@pytest.mark.parametrize("block", [None, 0, 1])
def test_the_mean_over_heads_sums_to_one(block, model, images):
    mean = head_mean(subject(model, images), block)

    rows = expected_rows(model, images)[:, 2 if block is None else block].sum(1)
    torch.testing.assert_close(mean.sum((-2, -1)), torch.ones(7))
    torch.testing.assert_close(mean, rows / rows.sum((-2, -1), keepdim=True))


def test_regions_are_those_of_all_images_features(model, images, in_parts):
    found, features = subject_of("it", model, images, ["attention"])
    regions = with_regions(found, features, 3).maps["regions"]

    with torch.no_grad():
        seen = record(model, images)
        expected = attention_features(seen.weights, seen.grid, seen.prefix, seen.readers)
    torch.testing.assert_close(features, expected)
    assert regions.shape == (7, 3, 3)
    assert {*regions.flat} == {0, 1, 2}
    assert np.array_equal(regions, region_map(features, 3, grid=(3, 3)))


def test_where_the_classifier_averages_patches_so_do_the_rows():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, depth=2, global_pool="avg", num_classes=5
    ).eval()
    images = torch.randn(2, 3, 48, 48)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        recording = record(model, images)

    rows = class_rows(torch.stack(recording.weights, 1), recording)
    assert [*recording.readers] == [*range(prefix, prefix + 9)]
    assert rows.shape == (2, 2, 3, 3, 3)
    for block, weights in enumerate(recording.weights):
        by_hand = sum(weights[:, :, query, prefix:] for query in range(prefix, prefix + 9)) / 9
        torch.testing.assert_close(rows[:, block].flatten(-2), by_hand)


def test_the_model_and_the_images_are_left_as_they_were(model, images):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pixels = images.clone()

    subject(model, images, DETERMINISTIC)

    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(images, pixels)
    assert not images.requires_grad
