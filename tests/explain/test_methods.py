"""Every method under its one signature: shapes, class by class, in any mode of autograd."""

import pytest
import timm
import torch

from vitkd.errors import ConfigError
from vitkd.explain.maps.attention import fuse, token_map
from vitkd.explain.maps.flow import attention_gradients, relevance, rollout
from vitkd.explain.maps.methods import CLASS_SPECIFIC, METHODS, explain_by
from vitkd.explain.maps.recording import record

PACKAGES = {"pytorch_grad_cam": "pytorch_grad_cam", "integrated_gradients": "captum"}
TARGET = torch.tensor([1, 4])
TIMM_SHAPE = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.fixture(params=sorted(METHODS))
def method(request):
    if request.param in PACKAGES:
        pytest.importorskip(PACKAGES[request.param])
    return request.param


def sharpened(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def timm_vit(**changes):
    shape = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return sharpened(timm.models.VisionTransformer(num_classes=5, **(shape | changes)))


@pytest.fixture
def model(tiny):
    return sharpened(tiny().build())


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8)


def test_maps_are_one_number_a_patch(method, model, images):
    maps = explain_by(method, model, images, TARGET)

    assert maps.shape == (2, 2, 2)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert not maps.requires_grad
    assert not torch.equal(maps[0], maps[1])


@pytest.mark.parametrize(
    "changes",
    [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}],
    ids=["plain", "registers", "pooled"],
)
def test_timms_maps_have_the_layout_of_its_patches(method, changes):
    maps = explain_by(method, timm_vit(**changes), torch.randn(2, 3, 16, 24), TARGET)

    assert maps.shape == (2, 2, 3)
    assert maps.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [{"distillation_token": True}, {"attention": "lsa"}, {"tokenizer": "spt", "distillation_token": True}],
    ids=["distilled", "lsa", "spt"],
)
def test_every_method_takes_every_switch_of_the_model(method, tiny, changes, images):
    maps = explain_by(method, sharpened(tiny(**changes).build()), images, TARGET)

    assert maps.shape == (2, 2, 2)
    assert maps.isfinite().all()
    assert not torch.equal(maps[0], maps[1])


def test_of_two_tokens_that_are_classified_rows_are_averaged(tiny, images):
    model = sharpened(tiny(distillation_token=True).build())
    recording = record(model, images)
    gradients = attention_gradients(recording, TARGET)
    matrices = {
        "attention": recording.weights[-1].mean(1),
        "rollout": rollout(recording.weights),
        "relevance": relevance(recording.weights, gradients),
    }

    for name, matrix in matrices.items():
        by_hand = (matrix[:, 0, 2:] + matrix[:, 1, 2:]).detach().unflatten(-1, (2, 2)) / 2
        torch.testing.assert_close(explain_by(name, model, images, TARGET), by_hand)
    # Timm's distilled models alike, but none of its registers.
    distilled = sharpened(timm.models.deit.VisionTransformerDistilled(**TIMM_SHAPE))
    registers = sharpened(timm.models.VisionTransformer(**TIMM_SHAPE, reg_tokens=1))
    for other, rows in ((distilled, (0, 1)), (registers, (0,))):
        weights = record(other, images).weights[-1].detach().mean(1)
        by_hand = sum(weights[:, row, 2:] for row in rows).unflatten(-1, (2, 2)) / len(rows)
        torch.testing.assert_close(explain_by("attention", other, images, TARGET), by_hand)


def test_only_class_specific_maps_depend_on_the_class(method, model, images):
    of_one, of_other = (explain_by(method, model, images, TARGET - shift) for shift in (0, 1))

    assert torch.equal(of_one, of_other) == (method not in CLASS_SPECIFIC)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_methods_work_where_gradients_are_off(method, model, images, mode):
    expected = explain_by(method, model, images, TARGET)
    with mode():
        found = explain_by(method, model, images.clone(), TARGET)

    torch.testing.assert_close(found.clone(), expected)


def test_the_model_keeps_its_gradients_its_mode_and_its_freedom(method, model, images):
    model.train()
    model(images).logits.sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]

    explain_by(method, model, images, TARGET)

    assert all(torch.equal(p.grad, then) for p, then in zip(model.parameters(), before, strict=True))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_frozen_model_is_explained_the_same(method, model, images):
    expected = explain_by(method, model, images, TARGET)

    torch.testing.assert_close(explain_by(method, model.requires_grad_(False), images, TARGET), expected)


def test_names_stand_for_what_they_say(model, images):
    recording = record(model, images)
    gradients = attention_gradients(recording, TARGET)
    grid = (2, 2)

    expected = {
        "attention": token_map(fuse(recording.weights[-1]), grid),
        "rollout": token_map(rollout(recording.weights), grid),
        "relevance": token_map(relevance(recording.weights, gradients), grid),
    }

    for name, maps in expected.items():
        torch.testing.assert_close(explain_by(name, model, images, TARGET), maps)


def test_a_model_that_pools_its_patches_is_read_off_their_rows():
    model, images = timm_vit(class_token=False, global_pool="avg"), torch.randn(2, 3, 16, 24)

    maps = explain_by("attention", model, images, TARGET)

    expected = record(model, images).weights[-1].mean(1).mean(1).unflatten(-1, (2, 3))
    torch.testing.assert_close(maps, expected)


def test_noise_is_the_same_at_every_call_and_for_every_batch_size(model, images):
    once = explain_by("random", model, images, TARGET)

    assert torch.equal(once, explain_by("random", model, images, TARGET))
    assert torch.equal(once[:1], explain_by("random", model, images[:1], TARGET[:1]))
    assert once.unique().numel() == once.numel()


def test_unknown_names_and_classes_are_reported(model, images):
    with pytest.raises(ConfigError, match="method=rolout: did you mean rollout"):
        explain_by("rolout", model, images, TARGET)
    for method in CLASS_SPECIFIC - {*PACKAGES}:
        with pytest.raises(ConfigError, match="class 5: the model has classes 0 to 4"):
            explain_by(method, model, images, TARGET + 1)
