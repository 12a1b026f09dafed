"""`method=regions` divides the image by where the teacher looks, among ViTs that are one student together."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.test_methods import facts, plan
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.maps.activity import patch_activity, patches_of_clusters
from vitkd.methods.regions import Regions
from vitkd.models import Merged, ResNetConfig, Taps, count_parameters, load_model, save_model, small_vits
from vitkd.train.build import build_module
from vitkd.train.module import DistillModule

CORNER = [0, 1, 4, 5]
OTHERS = [patch for patch in range(16) if patch not in CORNER]


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Looking:
    """A teacher of 4×4 patches whose every token attends by `row` [17] in each of 2 blocks and 3 heads."""

    def __init__(self, row: Tensor) -> None:
        self.row, self.attention = row, [SimpleNamespace(prefix=1, grid=(4, 4))]

    def eval(self) -> "Looking":
        return self

    def trace(self, pictures: Tensor) -> SimpleNamespace:
        return SimpleNamespace(weights=[self.row.expand(len(pictures), 3, 17, 17)] * 2)


def at_the_corner() -> Looking:
    row = torch.ones(17)
    row[[1 + patch for patch in CORNER]] = 5.0
    return Looking(row / row.sum())


def module_of(tiny, alpha: float = 0.5) -> DistillModule:
    student = tiny(patch_size=2, embed_dim=24, mlp_dim=48)
    settings = plan(method=Regions(), alpha=alpha)
    return build_module(settings, student.build(), tiny(patch_size=2).build(), facts(images))


def test_activity_is_the_mean_weight_that_a_patch_receives(tiny):
    teacher, pictures = (
        tiny(patch_size=2, depth=2, distillation_token=True).build().double(),
        images().double(),
    )
    scores = teacher(pictures, Taps(scores=(0, 1))).scores

    got = patch_activity(teacher.train(), pictures)

    exponents = np.exp(np.stack([scores[block].detach().numpy() for block in (0, 1)]))
    weights = exponents / exponents.sum(-1, keepdims=True)
    received = weights.mean((1, 3))[..., 2:].reshape(4, 16)
    expected = received / received.mean(1, keepdims=True)
    np.testing.assert_allclose(got.reshape(4, 16).numpy(), expected, atol=1e-12)
    assert got.shape == (4, 4, 4)


def test_where_the_teacher_looks_is_a_cluster_of_its_own():
    assert Regions().divide(at_the_corner(), facts(images)) == [OTHERS, CORNER]


def test_patches_are_those_of_their_regions():
    clusters = np.array([[1, 0], [2, 1]])

    assert patches_of_clusters(clusters, 1) == [[1], [0, 3], [2]]
    assert patches_of_clusters(clusters, 2) == [[2, 3, 6, 7], [0, 1, 4, 5, 10, 11, 14, 15], [8, 9, 12, 13]]


@pytest.mark.parametrize("divided", [[CORNER, OTHERS], [[0], [5], [6, 7], [9, 15]]])
def test_all_together_have_at_most_the_students_parameters(tiny, divided):
    student = tiny(patch_size=2, embed_dim=32, mlp_dim=64)

    small = small_vits(student, divided)

    assert [each.patches for each in small] == divided
    assert len({(each.embed_dim, each.mlp_dim, each.depth, each.num_heads) for each in small}) == 1
    own = count_parameters(student.build())
    assert sum(count_parameters(each.build()) for each in small) <= own
    wider = {"embed_dim": small[0].embed_dim + 1, "mlp_dim": 2 * small[0].embed_dim + 2}
    assert sum(count_parameters(replace(each, **wider).build()) for each in small) > own


def test_together_they_are_a_linear_layer_on_representations_side_by_side(tiny):
    model = module_of(tiny).model

    output = model(images(), Taps(features=("pre_logits",)))

    assert isinstance(model, Merged)
    weight = torch.cat([each.head.weight for each in model.students], 1)
    bias = sum(each.head.bias for each in model.students)
    torch.testing.assert_close(output.logits, output.features["pre_logits"] @ weight.T + bias)
    assert sorted(patch for each in model.students for patch in each.config.patches) == [*range(16)]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_learns_by_the_class_loss_alone_whatever_alpha(tiny, alpha):
    module = module_of(tiny, alpha)

    losses = module.losses(Batch(images(), torch.arange(6) % 5, torch.arange(6)))

    assert module.alpha == 1
    assert losses.transfer is None
    assert torch.equal(losses.total, losses.class_loss)


def test_the_same_seed_builds_the_same(tiny):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(module_of(tiny).model)

    first, second = (model.state_dict() for model in models)
    assert models[0].config == models[1].config
    assert all(torch.equal(first[name], second[name]) for name in first)
    cls_tokens = [each.cls_token for each in models[0].students]
    assert not torch.equal(*cls_tokens)


def test_its_file_needs_neither_teacher_nor_runs(tiny, tmp_path):
    model = module_of(tiny).model.eval()

    save_model(model, tmp_path / "student.safetensors")
    loaded = load_model(tmp_path)

    assert torch.equal(loaded(images()).logits, model(images()).logits)
    assert str(loaded.config) == "2 students merged, all trained"


@pytest.mark.parametrize(
    ("method", "student", "teacher", "named"),
    [
        ({"region_size": 3}, {}, {}, ["method.region_size=3", "1, 2"]),
        ({"clusters": 5}, {}, {}, ["method.clusters=5", "has 4 regions"]),
        ({}, {}, {"patch_size": 4}, ["4×4", "2×2", "equal patch sizes"]),
        ({}, {"init": "weight_selection"}, {}, ["student.init=weight_selection", "init=null"]),
        ({}, {"init": "mimetic"}, {}, ["student.init=mimetic", "init=null"]),
        ({"clusters": 4}, {"embed_dim": 1, "mlp_dim": 1, "depth": 1}, {}, ["student=", "too few parameters"]),
    ],
)
def test_what_cannot_be_divided_is_one_line(tiny, method, student, teacher, named):
    configs = [tiny(**{"patch_size": 2, **changes}) for changes in (student, teacher)]

    with pytest.raises(ConfigError) as error:
        Regions(**method).check(*configs, plan())

    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in named)


def test_a_teacher_that_looks_everywhere_alike_is_one_line():
    with pytest.raises(ConfigError, match=r"method\.clusters=2: .* tells 1 apart"):
        Regions().divide(Looking(torch.full((17,), 1 / 17)), facts(images))


def test_needs_maps_and_a_vit(tiny):
    with pytest.raises(ConfigError, match="no attention maps"):
        Regions().check(tiny(), ResNetConfig(8, 3, 5), plan())


@pytest.mark.parametrize("settings", [{"clusters": 1}, {"region_size": 0}])
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Regions(**settings)
