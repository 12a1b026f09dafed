"""Other people's packages are asked the right question: their answers are known by hand."""

import sys

import pytest
import timm
import torch
from torch import nn

from vitkd.errors import ConfigError
from vitkd.explain.maps.methods import integrated_gradients, pytorch_grad_cam

TARGET = torch.tensor([1, 4, 0])


@pytest.fixture
def model(tiny):
    model = tiny().build().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


def grad_cam_by_hand(model, norm, images, target, grid):
    """ReLU(Σ_d mean(∂logit/∂x_d) · x_d) over the patch tokens that leave `norm`, scaled to 0..1."""
    seen = []
    handle = norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    output = model(images)
    handle.remove()
    logits = getattr(output, "logits", output)
    (gradient,) = torch.autograd.grad(logits[range(3), target].sum(), seen)
    patches, of_patches = seen[0][:, 1:], gradient[:, 1:]
    cam = (of_patches.mean(1, keepdim=True) * patches).sum(-1).relu().detach()
    cam = cam - cam.amin(1, keepdim=True)
    return (cam / (1e-7 + cam.amax(1, keepdim=True))).unflatten(-1, grid).float()


def test_grad_cam_is_that_of_the_last_norms_patches(model, images):
    pytest.importorskip("pytorch_grad_cam")

    found = pytorch_grad_cam(model, images, TARGET)

    expected = grad_cam_by_hand(model, model.blocks[-1].attention.norm, images, TARGET, (2, 2))
    assert expected.amax((1, 2)).max() > 0.99
    # The package divides by the maximum plus 1e-7, twice.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_grad_cam_lays_out_a_timm_models_patches():
    pytest.importorskip("pytorch_grad_cam")
    model = timm.models.VisionTransformer(
        img_size=(16, 24), patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=5
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    images = torch.randn(3, 3, 16, 24)

    found = pytorch_grad_cam(model, images, TARGET)

    expected = grad_cam_by_hand(model, model.blocks[-1].norm1, images, TARGET, (2, 3))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_integrated_gradients_sum_to_what_the_logit_gains(model, images):
    pytest.importorskip("captum")

    attributions = integrated_gradients(model, images, TARGET, steps=200)

    assert attributions.shape == (3, 8, 8)
    gain = model(images).logits - model(torch.zeros_like(images)).logits
    torch.testing.assert_close(attributions.sum((1, 2)), gain[range(3), TARGET], atol=1e-3, rtol=1e-3)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, 8, 8, dtype=torch.float64))

    def forward(self, images):
        return torch.einsum("bchw,kchw->bk", images, self.weight)


def test_a_linear_models_attributions_are_its_terms(images):
    pytest.importorskip("captum")
    model = Linear()
    baseline = torch.randn(1, 3, 8, 8, dtype=torch.float64)

    found = integrated_gradients(model, images, TARGET, baseline=baseline.expand_as(images))

    expected = (model.weight[TARGET] * (images - baseline)).sum(1).detach()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reference", [pytorch_grad_cam, integrated_gradients])
def test_a_class_that_does_not_exist_is_reported(model, images, reference):
    pytest.importorskip("pytorch_grad_cam" if reference is pytorch_grad_cam else "captum")

    with pytest.raises(ConfigError, match="class 5: the model has classes 0 to 4") as raised:
        reference(model, images, TARGET + 1)

    assert raised.tb, "as long as the traceback lives, so do the objects that put hooks on the model"
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("reference", "module", "package"),
    [
        (pytorch_grad_cam, "pytorch_grad_cam", "pytorch_grad_cam"),
        (integrated_gradients, "captum.attr", "captum"),
    ],
)
def test_without_the_package_its_extra_is_named(model, images, monkeypatch, reference, module, package):
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(ConfigError, match=rf"{package} cannot be imported .*pip install 'vitkd\[explain\]'"):
        reference(model, images, TARGET)
