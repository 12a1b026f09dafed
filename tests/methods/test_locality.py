"""`method=locality` is the sum of its paper for tokens and stages of any sizes, and refuses what has none."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.base import DataFacts
from vitkd.methods.locality import LocalityDistillation, LocalityObjective, Pair, interpolation, spread
from vitkd.models import Model, ResNetConfig

FACTS = DataFacts(8, 5, lambda: torch.empty(0))


def small_resnet(image_size: int = 8, **changes: object) -> ResNetConfig:
    settings = {"variant": "resnet20", "stem": "small"} | changes
    return ResNetConfig(image_size, 3, 5, **settings)


def objective_of(method: LocalityDistillation, student: Model, teacher: Model) -> LocalityObjective:
    """In float64, with projections whose bias counts."""
    objective = method.objective(student, teacher, None, FACTS).double()
    for guide in objective.guides:
        torch.nn.init.normal_(guide.projection.bias)
    return objective


def reference(weight: Tensor, bias: Tensor, tokens: Tensor, features: Tensor, prefix: int) -> Tensor:
    """The guidance of one pair, by a loop over images and PyTorch's own interpolation."""
    side = round((tokens.shape[1] - prefix) ** 0.5)
    values = []
    for image in range(len(tokens)):
        patches = tokens[image, prefix:].reshape(side, side, -1)
        projected = torch.einsum("hwd,cd->chw", patches, weight[:, :, 0, 0]) + bias[:, None, None]
        larger = max(side, features.shape[-1])
        ours, theirs = (
            F.interpolate(maps.unsqueeze(0), (larger, larger), mode="bilinear", align_corners=False)
            for maps in (projected, features[image])
        )
        values.append(((theirs - ours) ** 2).mean())
    return torch.stack(values)


@pytest.mark.parametrize("distillation_token", [False, True])
@pytest.mark.parametrize("image_size", [8, 12])  # the grid of 4×4 or 6×6 lies between the stages' sides
@pytest.mark.parametrize(
    ("method", "pairs"),
    [
        (LocalityDistillation(), [(0, 1), (1, 2), (2, 3)]),
        (LocalityDistillation(blocks=[-1, 0], stages=[1, 3]), [(2, 1), (0, 3)]),
        (LocalityDistillation(blocks=[1, 1], stages=[2, 2]), [(1, 2), (1, 2)]),
    ],
)
def test_is_the_papers_sum(tiny, distillation_token, image_size, method, pairs):
    config = tiny(image_size=image_size, patch_size=2, distillation_token=distillation_token)
    student = config.build().double()
    teacher = small_resnet(image_size).build().double().eval()
    images = torch.randn(3, 3, image_size, image_size, dtype=torch.float64)
    objective = objective_of(method, student, teacher)
    with torch.no_grad():
        answer = teacher(images, objective.teacher_taps)
    of_student = student(images, objective.student_taps)

    terms = objective(Batch(images, torch.zeros(3), torch.arange(3)), of_student, answer)

    values = [
        reference(
            *guide.projection.parameters(),
            of_student.features[f"block{block}"],
            answer.features[f"stage{stage}"],
            config.prefix,
        )
        for guide, (block, stage) in zip(objective.guides, pairs, strict=True)
    ]
    expected = torch.stack(values, dim=-1)
    torch.testing.assert_close(terms["guidance_loss"], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(objective.transfer(terms), expected.sum(-1), atol=1e-12, rtol=0)
    assert objective.curves == tuple(f"guidance_loss/block{block}.stage{stage}" for block, stage in pairs)


def test_is_zero_where_the_projection_gives_the_features(tiny):
    student, teacher = tiny().build().double(), small_resnet().build().double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    objective = objective_of(LocalityDistillation(stages=[2]), student, teacher)
    (guide,) = objective.guides
    torch.nn.init.zeros_(guide.projection.weight)
    answer = teacher(images, objective.teacher_taps)
    answer.features["stage2"][:] = guide.projection.bias[:, None, None].detach()

    terms = objective(
        Batch(images, torch.zeros(2), torch.arange(2)), student(images, objective.student_taps), answer
    )

    assert terms["guidance_loss"].abs().max() < 1e-24


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 2), (3, 7), (4, 32)])
def test_interpolation_is_pytorchs(before, after):
    row = torch.randn(2, 3, before, dtype=torch.float64)

    expected = F.interpolate(row, size=after, mode="linear", align_corners=False)

    torch.testing.assert_close(row @ interpolation(before, after).mT, expected, atol=1e-13, rtol=0)


def test_blocks_are_the_authors_for_their_depths():
    assert spread(3, 12) == [0, 6, 11]
    assert spread(3, 14) == [0, 7, 13]
    assert spread(3, 7) == [0, 3, 6]
    assert spread(1, 12) == [11]
    assert spread(3, 1) == [0, 0, 0]


def test_a_resnet18_guides_by_its_four_stages(tiny):
    config = small_resnet(variant="resnet18")

    assert LocalityDistillation().pairs(depth=6, num_stages=config.num_stages) == [
        Pair(0, 1),
        Pair(2, 2),
        Pair(4, 3),
        Pair(5, 4),
    ]


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (LocalityDistillation(stages=[4]), ["method.stages=[4]", "1 to 3"]),
        (LocalityDistillation(stages=[0]), ["method.stages=[0]", "1 to 3"]),
        (LocalityDistillation(stages=[]), ["method.stages=[]", "at least one"]),
        (LocalityDistillation(blocks=[0, 1, 3]), ["method.blocks=[0, 1, 3]", "-3 to 2"]),
        (LocalityDistillation(blocks=[0]), ["method.blocks=[0]", "3 stages"]),
    ],
)
def test_blocks_and_stages_that_do_not_exist_are_one_line(tiny, method, named):
    with pytest.raises(ConfigError) as error:
        method.check(tiny(), small_resnet(), None)

    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in named)


def test_models_without_tokens_or_stages_are_one_line(tiny):
    with pytest.raises(ConfigError, match=r"student=.*choose a ViT"):
        LocalityDistillation().check(small_resnet(), small_resnet(), None)
    with pytest.raises(ConfigError, match=r"teacher=.*teacher=resnet56"):
        LocalityDistillation().check(tiny(), tiny(), None)
