"""Residual networks are torchvision's, with a stem for small images, and ImageNet's weights where available.

No test downloads anything: PyTorch's download either is refused or must not happen.
"""

import io
import math
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from scipy import stats
from torch import nn

from vitkd.errors import ConfigError
from vitkd.models import ResNet, ResNetConfig, Taps, count_parameters, digest, load_model, save_model
from vitkd.models.resnet import IMAGENET_VARIANTS, VARIANTS

URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


def config(**changes: object) -> ResNetConfig:
    return ResNetConfig(**({"image_size": 32, "channels": 3, "num_classes": 7} | changes))


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """PyTorch's folder for downloaded weights; nothing gets there by itself."""

    def refuse(url: str, *_: object, **__: object) -> None:
        pytest.fail(f"downloads {url}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def imagenet() -> dict[str, torch.Tensor]:
    """Weights such as a download brings: of a thousand classes, with batch statistics of their own."""
    network = torchvision.models.resnet18()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer)
    return network.state_dict()


@torch.no_grad()
def test_logits_equal_torchvisions():
    theirs = torchvision.models.resnet18(num_classes=7)
    theirs(torch.randn(4, 3, 64, 64))  # leaves batch statistics of its own
    ours = config().build()
    ours.network.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)

    output = ours.eval()(images)

    assert output.logits.shape == (2, 7)
    assert torch.equal(output.logits, theirs.eval()(images))
    assert output.scores == {}
    assert output.heads == {}


@pytest.mark.parametrize("variant", IMAGENET_VARIANTS)
def test_every_variant_has_torchvisions_tensors(variant):
    with torch.device("meta"):
        ours = config(variant=variant).architecture().network.state_dict()
        theirs = getattr(torchvision.models, variant)(num_classes=7).state_dict()

    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


def small(variant: str = "resnet20", **changes: object) -> ResNetConfig:
    return config(variant=variant, stem="small", **changes)


# He et al. 2015, table 6, in millions; ours has 0.003 more in its shortcuts.
@pytest.mark.parametrize(
    ("variant", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)],
)
def test_those_for_small_images_have_the_papers_parameters(variant, millions):
    with torch.device("meta"):
        network = small(variant, num_classes=10).architecture()

    assert count_parameters(network) / 1e6 == pytest.approx(millions, abs=0.01 if millions < 1 else 0.04)


def test_resnet56_has_as_many_parameters_as_repdistillers():
    with torch.device("meta"):
        assert count_parameters(small("resnet56", num_classes=100).architecture()) == 861_620


@torch.no_grad()
def test_those_for_small_images_are_the_papers_equations():
    """Section 4.2: three stages of n blocks x + F(x), where F is two normalised 3×3 convolutions."""
    model = small().build().double().eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    weights = {name.removeprefix("network."): value for name, value in model.state_dict().items()}

    def convolved(x, name, norm, stride=1):
        kernel = weights[f"{name}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var, gain, bias = (
            weights[f"{norm}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x, expected = convolved(images, "conv1", "bn1").relu(), {}
    for stage in (1, 2, 3):
        for block in range(3):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inner = convolved(x, f"{at}.conv1", f"{at}.bn1", stride).relu()
            inner = convolved(inner, f"{at}.conv2", f"{at}.bn2")
            shortcut = convolved(x, f"{at}.downsample.0", f"{at}.downsample.1", 2) if stride == 2 else x
            x = (inner + shortcut).relu()
        expected[f"stage{stage}"] = x
    logits = x.mean((2, 3)) @ weights["fc.weight"].mT + weights["fc.bias"]

    output = model(images, Taps(features=("stage1", "stage2", "stage3")))

    assert [maps.shape[1:] for maps in expected.values()] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    torch.testing.assert_close(output.logits, logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(dict(output.features), expected, atol=1e-10, rtol=0)


def test_those_for_small_images_start_as_torchvisions_and_take_any_channels():
    model = small(channels=1).build()

    weight = model.network.layer3[1].conv2.weight.detach().flatten().numpy()
    start = stats.norm(scale=math.sqrt(2 / (64 * 9)))
    assert stats.kstest(weight, start.cdf).pvalue > 0.01
    assert model(torch.randn(2, 1, 8, 8)).logits.shape == (2, 7)


def sides(network: ResNet, image_size: int) -> list[int]:
    """Of the feature maps after the stem and after each stage."""
    found: list[int] = []
    inner = network.network
    for layer in (inner.maxpool, inner.layer1, inner.layer2, inner.layer3, inner.layer4):
        layer.register_forward_hook(lambda _module, _inputs, output: found.append(output.shape[-1]))
    with torch.no_grad():
        network.eval()(torch.randn(1, network.config.channels, image_size, image_size))
    return found


def test_the_imagenet_stem_leaves_a_quarter_of_each_side():
    assert sides(config(image_size=64).build(), 64) == [16, 16, 8, 4, 2]


def test_the_small_stem_leaves_the_image_whole():
    model = config(stem="small").build()

    assert sides(model, 32) == [32, 32, 16, 8, 4]
    first = model.network.conv1
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
    assert first.bias is None


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 7), ("small", 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_first_convolution_fits_the_channels_and_starts_as_torchvisions(stem, side, channels):
    model = config(stem=stem, channels=channels).build()

    weight = model.network.conv1.weight
    assert weight.shape == (64, channels, side, side)
    start = stats.norm(scale=math.sqrt(2 / (64 * side**2)))
    assert stats.kstest(weight.detach().flatten().numpy(), start.cdf).pvalue > 0.01
    assert model(torch.randn(2, channels, 32, 32)).logits.shape == (2, 7)


def test_all_weights_learn_with_either_stem():
    for stem in ("imagenet", "small"):
        model = config(stem=stem, channels=1).build()
        model(torch.randn(2, 1, 33, 33)).logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_there_is_no_attention_to_record():
    model = config().build().eval()

    with pytest.raises(AssertionError, match="no attention"):
        model(torch.randn(1, 3, 32, 32), Taps(scores=(0,)))
    with pytest.raises(AssertionError, match="no attention"):
        model(torch.randn(1, 3, 32, 32), Taps(factors=(0,)))
    output = model(torch.randn(1, 3, 32, 32))
    assert not output.scores
    assert not output.qkv
    assert model.attention == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": "resnet56"}, ["stem=imagenet", "resnet56", "stem=small"]),
        ({"variant": "resnet56", "stem": "small", "pretrained": True}, ["pretrained=true", "stem=small"]),
        ({"variant": "resnet19"}, ["variant=resnet19", *VARIANTS]),
        ({"stem": "tiny"}, ["stem=tiny", "imagenet or small"]),
        ({"pretrained": True, "stem": "small"}, ["pretrained=true", "stem=small", "pretrained=false"]),
        ({"pretrained": True, "channels": 1}, ["pretrained=true", "channels=3", "pretrained=false"]),
        *(({name: 0}, [f"{name}=0", "at least 1"]) for name in ("image_size", "channels", "num_classes")),
    ],
)
def test_impossible_networks_are_refused_in_one_line(changes, words):
    with pytest.raises(ConfigError) as caught:
        config(**changes)

    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_its_shape_in_words_and_its_settings():
    assert str(config()) == "resnet18"
    assert str(config(variant="resnet50", stem="small")) == "resnet50, stem for small images"
    assert str(config(pretrained=True)) == "resnet18, from ImageNet"
    # Seeds hang on it.
    assert repr(config(stem="small")) == (
        "ResNetConfig(image_size=32, channels=3, num_classes=7, variant='resnet18', stem='small', "
        "pretrained=False)"
    )


@pytest.mark.parametrize("changes", [{}, {"stem": "small", "channels": 1}], ids=["imagenet", "small"])
def test_a_file_holds_the_batch_statistics_too(changes, tmp_path):
    model = config(**changes).build()
    images = torch.randn(2, model.config.channels, 33, 33)
    model(images), model(images + 1)
    save_model(model, tmp_path / "student.safetensors")

    loaded = load_model(tmp_path)

    assert loaded.config == model.config
    assert loaded.network.bn1.num_batches_tracked.item() == 2
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model.eval()(images).logits)


def test_networks_that_differ_in_their_statistics_alone_are_distinguished():
    model = config().build()
    before = digest(model)

    model.network.bn1.running_var[5] += 1e-3

    assert digest(model) != before


def test_pretrained_is_imagenets_body_under_a_new_head(offline, imagenet):
    """From where the message for those without a network says to put the file."""
    offline.mkdir(parents=True)
    torch.save(imagenet, offline / Path(URL).name)
    pretrained = config(pretrained=True)

    pretrained.prepare()
    model = pretrained.build()

    for name, tensor in model.network.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(tensor, imagenet[name]), name
    assert model.network.fc.weight.shape == (7, 512)
    start = stats.uniform(-(512**-0.5), 2 * 512**-0.5)
    assert stats.kstest(model.network.fc.weight.detach().flatten().numpy(), start.cdf).pvalue > 0.01
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 7)


def test_a_head_of_as_many_classes_as_imagenet_is_new_too(offline, imagenet):
    offline.mkdir(parents=True)
    torch.save(imagenet, offline / Path(URL).name)

    model = config(pretrained=True, num_classes=1000).build()

    assert not torch.equal(model.network.fc.weight, imagenet["fc.weight"])


def test_the_seed_decides_the_head_of_a_pretrained_network(offline, imagenet):
    offline.mkdir(parents=True)
    torch.save(imagenet, offline / Path(URL).name)

    def head(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return config(pretrained=True).build().network.fc.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_a_trained_networks_file_needs_no_download(offline, tmp_path):
    """`offline` fails the test if there is one."""
    model = config(pretrained=True).architecture()
    save_model(model, tmp_path / "student.safetensors")

    loaded = load_model(tmp_path)

    assert loaded.config.pretrained
    assert digest(loaded) == digest(model)


@pytest.mark.parametrize("step", ["prepare", "build"])
@pytest.mark.parametrize("content", ["nothing", "a page", "cut", "another network", "a part"])
def test_another_file_in_the_weights_place_is_reported_and_named(offline, imagenet, step, content):
    offline.mkdir(parents=True)
    place = offline / Path(URL).name
    whole = io.BytesIO()
    torch.save(imagenet, whole)
    if content == "another network":
        torch.save(config(variant="resnet34", num_classes=1000).architecture().network.state_dict(), place)
    elif content == "a part":
        torch.save({name: tensor for name, tensor in imagenet.items() if "layer4" not in name}, place)
    else:
        place.write_bytes({"nothing": b"", "a page": b"<html>", "cut": whole.getvalue()[:5000]}[content])

    with pytest.raises(ConfigError) as caught:
        getattr(config(pretrained=True), step)()

    assert f"{place} is not the ImageNet weights of resnet18; remove it" in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_nothing_is_downloaded_for_a_network_that_is_not_pretrained():
    config().prepare()
    config().build()


@pytest.mark.parametrize("step", ["prepare", "build"])
@pytest.mark.parametrize(
    "error",
    [
        URLError("[Errno -3] Temporary failure in name resolution"),
        HTTPError(URL, 403, "Forbidden", None, None),
        TimeoutError("timed out"),
        OSError(28, "No space left on device"),
        RuntimeError('invalid hash value\n(expected "f37072fd", got "0000")'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_weights_that_cannot_be_had_are_one_line_with_the_ways_out(offline, monkeypatch, step, error):
    asked = []

    def fail(url: str, to: str, *_: object, **__: object) -> None:
        asked.append((url, to))
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)

    with pytest.raises(ConfigError) as caught:
        getattr(config(pretrained=True), step)()

    ((url, place),) = asked
    assert (url, place) == (URL, str(offline / Path(URL).name))
    message = str(caught.value)
    assert "\n" not in message
    for words in ("resnet18", URL, place, "pretrained=false", " ".join(str(error).split())):
        assert words in message
