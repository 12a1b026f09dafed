"""By training images: distances of hand-made maps, and CKA against its formula in NumPy."""

import json
import shutil
from itertools import permutations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vitkd.explain.gallery.data_size import data_size_figure
from vitkd.explain.maps.recording import Recording, record
from vitkd.explain.measures import data_size
from vitkd.explain.measures.data_size import OfSize, Trained, cka, measure_sizes
from vitkd.models import load_model

SIZES = [(30, 0), (100, 0), (30, 1), (100, 1), (100, 2)]
"""training images and seed of each model"""


@pytest.fixture
def trained(tiny) -> list[Trained]:
    return [Trained(tiny().build().double().eval(), *each) for each in SIZES]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(70, 3, 8, 8, dtype=torch.float64)


def gram(images: int, features: int) -> np.ndarray:
    x = np.random.default_rng(images + features).standard_normal((images, features))
    return x @ x.T


def hsic_by_hand(k: np.ndarray, m: np.ndarray) -> float:
    """The U-statistic itself: the mean over all ordered fours of different images."""
    terms = [
        k[i, j] * m[i, j] + k[i, j] * m[p, q] - 2 * k[i, j] * m[i, p]
        for i, j, p, q in permutations(range(len(k)), 4)
    ]
    return float(np.mean(terms))


def cka_by_hand(k: np.ndarray, m: np.ndarray) -> float:
    return hsic_by_hand(k, m) / np.sqrt(hsic_by_hand(k, k) * hsic_by_hand(m, m))


def test_cka_is_the_unbiased_statistic():
    ours, theirs = [gram(7, 3), gram(7, 40)], [gram(7, 5), gram(7, 9), gram(7, 40)]

    got = cka(*(torch.from_numpy(np.stack(each)) for each in (ours, theirs)))

    np.testing.assert_allclose(got.numpy(), [[cka_by_hand(k, m) for m in theirs] for k in ours], rtol=1e-10)


def test_cka_of_what_is_unrelated_is_none_however_many_features():
    features = [torch.randn(200, 5000, dtype=torch.float64) for _ in range(2)]

    grams = [(each @ each.T)[None] for each in features]

    assert cka(*grams).abs().item() < 0.05
    assert cka(grams[0], 3 * grams[0] + 7).item() == pytest.approx(1)


def cka_of_features(x: Tensor, y: Tensor) -> float:
    """Of features [B, D], by the statistic's closed form (Song et al. 2012, equation 5)."""
    grams = [(each @ each.T).fill_diagonal_(0).numpy() for each in (x, y)]
    count, ones = len(x), np.ones(len(x))

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        sums = ones @ k @ ones * (ones @ m @ ones) / ((count - 1) * (count - 2))
        return np.trace(k @ m) + sums - 2 / (count - 2) * (ones @ k @ m @ ones)

    return hsic(*grams) / np.sqrt(hsic(grams[0], grams[0]) * hsic(grams[1], grams[1]))


def test_blocks_are_compared_with_those_of_most_images_and_other_seeds(trained, images):
    smaller, larger = measure_sizes(trained, images)

    with torch.no_grad():
        tokens = [[block.flatten(1) for block in record(each.model, images).tokens] for each in trained]
    others = {0: [3, 4], 2: [1, 4], 1: [3, 4], 3: [1, 4], 4: [1, 3]}
    for size, places in ((smaller, [0, 2]), (larger, [1, 3, 4])):
        for got, place in zip(size.cka.numpy(), places, strict=True):
            expected = [
                [[cka_of_features(own, other) for other in tokens[reference]] for own in tokens[place]]
                for reference in others[place]
            ]
            np.testing.assert_allclose(got, np.mean(expected, 0), rtol=1e-6)
    assert [smaller.images, larger.images] == [30, 100]


def test_a_single_model_of_most_images_is_compared_with_itself(trained, images):
    smaller, larger = measure_sizes([trained[0], trained[1]], images)

    np.testing.assert_allclose(larger.cka[0].diagonal().numpy(), 1, rtol=1e-6)
    assert smaller.cka.shape == (1, 3, 3)
    assert (smaller.cka < 1).all()


def looking(weights: Tensor, images: Tensor) -> Recording:
    """A recording of one block and head of 2×2 patches and a class token."""
    count = len(images)
    tokens = torch.randn(count, 5, 4, dtype=torch.float64)
    return Recording(torch.zeros(count, 2), (weights.expand(count, 1, 5, 5),), (tokens,), 1, (2, 2))


def test_distances_are_those_of_the_maps(trained, images, monkeypatch):
    own, uniform = torch.eye(5, dtype=torch.float64), torch.full((5, 5), 0.2, dtype=torch.float64)
    diagonal = own[[0, 4, 3, 2, 1]]  # each patch looks at the opposite one, √2 patches away
    maps = {trained[0].model: own, trained[1].model: uniform, trained[3].model: diagonal}
    monkeypatch.setattr(data_size, "record", lambda model, some: looking(maps[model], some))
    # As the layouts say, of three blocks; the recordings have one.
    monkeypatch.setattr(type(trained[0].model), "attention", [None])

    smaller, larger = measure_sizes([trained[0], trained[1], trained[3]], images)

    mean_of_uniform = (0 + 1 + 1 + 2**0.5) / 4
    np.testing.assert_allclose(smaller.distance.numpy(), [[[0]]], atol=1e-12)
    np.testing.assert_allclose(larger.distance.numpy(), [[[1]], [[2**0.5 / mean_of_uniform]]], atol=1e-12)


@pytest.mark.parametrize(("blocks", "runs"), [(1, 1), (3, 2), (8, 3)])
def test_the_figure_has_a_line_a_block_and_a_matrix_a_size(blocks, runs):
    sizes = [
        OfSize(count, torch.rand(runs, blocks, 2), torch.rand(runs, blocks, blocks)) for count in (30, 1000)
    ]

    figure = data_size_figure(sizes, "any_model")

    lines, *panels = [axes for axes in axes_of(figure) if axes.get_label() != "<colorbar>"]
    assert len(lines.containers) == blocks
    for container, middle in zip(
        lines.containers, np.stack([s.distance.mean((0, 2)) for s in sizes], 1), strict=True
    ):
        np.testing.assert_allclose(container.lines[0].get_ydata(orig=False), middle, rtol=1e-6)
    assert [label.get_text() for label in lines.get_xticklabels()] == ["30", "1,000"]
    for panel, size in zip(panels, sizes, strict=True):
        np.testing.assert_allclose(panel.images[0].get_array(), size.cka.mean(0), rtol=1e-6)
        assert len(panel.texts) == (blocks**2 if blocks <= 6 else 0)


def axes_of(figure: Figure) -> list:
    return [axes for part in figure.subfigs for axes in part.axes]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, command):
    """Two students of a tenth of the digits and one of all, hardly trained."""
    path = tmp_path_factory.mktemp("sizes") / "outputs"
    briefly = [
        "method=none",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=1",
        "dataset.batch_size=32",
    ]
    for fraction, seed in ((0.1, 0), (0.1, 1), (1, 0)):
        own = [f"dataset.train_fraction={fraction}", f"seed={seed}", f"paths.outputs={path}"]
        ended = command("train", *briefly, *own, f"name={fraction}-{seed}", "pictures_every_n_epochs=0")
        assert ended.code == 0, ended.err
    return path


def test_the_command_measures_all_runs_below_a_folder(outputs, command):
    for _ in range(2):  # it replaces its own files
        ended = command("explain", f"by_data_size={outputs}")

    assert ended.code == 0, ended.err
    folder = outputs / "explain_by_data_size"
    assert {each.name for each in folder.iterdir()} == {"data_size.json", "data_size.png"}
    smaller, larger = json.loads((folder / "data_size.json").read_text())
    assert [size["training_images"] for size in (smaller, larger)] == [129, 1295]
    assert [len(size["runs"]) for size in (smaller, larger)] == [2, 1]
    assert np.shape(smaller["distance"]) == (2, 2, 4)
    assert np.shape(larger["cka"]) == (1, 2, 2)
    model = load_model(larger["runs"][0])
    assert len(model.attention) == 2


def one_line(ended) -> str:
    assert ended.code == 2
    (line,) = ended.err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("setting", "was", "now"),
    [
        ("student.mlp_dim", "mlp_dim: 32", "mlp_dim: 31"),
        ("optimizer.lr", "lr: 0.001", "lr: 0.002"),
        ("dataset.mix.mixup_alpha", "mixup_alpha: 0.0", "mixup_alpha: 1.0"),
        ("label_smoothing", "label_smoothing: 0.0", "label_smoothing: 0.1"),
    ],
)
def test_runs_that_differ_otherwise_are_not_compared(setting, was, now, outputs, command, tmp_path):
    shutil.copytree(outputs / "digits", tmp_path / "copied")
    config = tmp_path / "copied" / "1-0" / "config.yaml"
    config.write_text(config.read_text().replace(was, now))

    said = one_line(command("explain", f"by_data_size={tmp_path / 'copied'}"))

    assert f"differ in {setting};" in said


def test_runs_may_differ_in_how_long_they_trained(outputs, command, tmp_path):
    shutil.copytree(outputs / "digits", tmp_path / "copied")
    config = tmp_path / "copied" / "1-0" / "config.yaml"
    config.write_text(config.read_text().replace("passes: 1", "passes: 3"))

    assert command("explain", f"by_data_size={tmp_path / 'copied'}").code == 0


def test_what_cannot_be_compared_is_one_line(outputs, command, tmp_path):
    copied = outputs / "digits"

    (tmp_path / "empty").mkdir()
    assert "no finished run" in one_line(command("explain", f"by_data_size={tmp_path / 'empty'}"))
    assert "no such folder" in one_line(command("explain", f"by_data_size={tmp_path / 'none'}"))
    assert "leave out image" in one_line(command("explain", f"by_data_size={copied}", "image=a.png"))
    assert "give either" in one_line(command("explain", f"by_data_size={copied}", "run=a"))
