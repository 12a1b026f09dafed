"""Weight selection, beside a numpy version that knows the rule and nothing of the code."""

from typing import Any

import numpy as np
import pytest
import torch

from vitkd.errors import ConfigError
from vitkd.models import Model, TimmConfig, save_model
from vitkd.models.selection import evenly_spaced, select_weights
from vitkd.runs.seeding import first_weights

HALF = [0.5, 0.5, 0.5]
LARGE = {"embed_dim": 24, "depth": 6, "num_heads": 4, "head_dim": 8, "mlp_dim": 32}
SMALL = {"embed_dim": 12, "depth": 3, "num_heads": 2, "head_dim": 8, "mlp_dim": 16}


def numpy_of(model: Model) -> dict[str, np.ndarray]:
    return {name: values.detach().numpy() for name, values in model.named_parameters()}


def every(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every n-th entry along each axis: the authors' rule where sizes divide one another."""
    return values[tuple(slice(None, None, a // b) for a, b in zip(values.shape, shape, strict=True))]


@pytest.mark.parametrize(("layers", "blocks"), [("first", [0, 1, 2]), ("uniform", [0, 2, 4])])
def test_each_tensor_is_every_nth_entry_of_its_blocks(layers, blocks, tiny):
    source, student = tiny(**LARGE).build(), tiny(**SMALL).build()
    theirs, before = numpy_of(source), {name: v.copy() for name, v in numpy_of(student).items()}

    select_weights(student, source, layers)

    for name, found in numpy_of(student).items():
        if name.startswith("head."):
            np.testing.assert_array_equal(found, before[name])
            continue
        _, place, *rest = name.split(".") if name.startswith("blocks.") else ("", "", name)
        origin = ".".join(["blocks", str(blocks[int(place)]), *rest]) if place else name
        np.testing.assert_array_equal(found, every(theirs[origin], found.shape), name)


def test_the_same_model_gives_itself(tiny):
    source, student = (tiny(distillation_token=True, attention="lsa").build() for _ in range(2))

    select_weights(student, source, "first")

    heads = ("head", "distillation_head")
    for name, values in source.named_parameters():
        assert torch.equal(values, student.get_parameter(name)) == (not name.startswith(heads)), name


def test_sizes_that_do_not_divide_keep_queries_keys_and_values_apart(tiny):
    source = tiny(**LARGE | {"num_heads": 5, "head_dim": 2}).build()
    student = tiny(**SMALL | {"num_heads": 3, "head_dim": 1}).build()

    select_weights(student, source, "first")

    rows = np.split(numpy_of(source)["blocks.0.attention.qkv.weight"], 3)
    expected = np.concatenate([part[[0, 3, 6]][:, ::2] for part in rows])
    np.testing.assert_array_equal(numpy_of(student)["blocks.0.attention.qkv.weight"], expected)


def test_indices_are_evenly_spaced():
    assert evenly_spaced(12, 4) == [0, 3, 6, 9]
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(5, 5) == [0, 1, 2, 3, 4]


def timm_model(**options: Any) -> Model:
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "num_heads": 3, "embed_dim": 24} | options
    return TimmConfig(32, 3, 5, HALF, HALF, "vit_tiny_patch16_224", options=options).build()


def test_timms_vits_are_selected_from_alike():
    """As the authors have it for a ViT-T from a ViT-S, all but the head."""
    source, student = timm_model(embed_dim=48, num_heads=6, depth=3), timm_model()
    theirs = numpy_of(source)

    select_weights(student, source, "first")

    for name, found in numpy_of(student).items():
        if "head" not in name:
            np.testing.assert_array_equal(found, every(theirs[name], found.shape), name)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"embed_dim": 48}, "has cls_token [1, 1, 24], where [1, 1, 48] are to be selected"),
        ({"depth": 7}, "has no blocks.6.attention.norm.weight, where [12] are to be selected"),
        ({"attention": "lsa"}, "has no blocks.0.attention.log_temperature, where [2] are to be selected"),
        ({"patch_size": 2}, "has other patches or tokens than"),
        ({"distillation_token": True}, "has other patches or tokens than"),
    ],
)
@pytest.mark.parametrize("layers", ["first", "uniform"])
def test_what_does_not_fit_is_refused_in_one_line(changes, problem, layers, tiny):
    student = tiny(**SMALL | changes, init="weight_selection", init_layers=layers)

    with pytest.raises(ConfigError) as caught:
        student.check_source(tiny(**LARGE))

    assert str(caught.value).startswith("init=weight_selection: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_teacher_a_run_has_to_be_named(tiny):
    with pytest.raises(ConfigError, match=r"^init=weight_selection: there is no teacher .* init_from$"):
        tiny(init="weight_selection").check_source(None)
    with pytest.raises(ConfigError, match=r"^init_from=run: has an effect with init=weight_selection alone"):
        tiny(init_from="run")
    with pytest.raises(ConfigError, match=r"^init_from=no/such: there is no trained model"):
        tiny(init="weight_selection", init_from="no/such").check_files()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_named_run_is_selected_from_at_the_beginning(what, tiny, tmp_path):
    source = tiny(**LARGE).build()
    save_model(source, tmp_path / "student.safetensors")
    place = tmp_path / "student.safetensors" if what == "file" else tmp_path
    config = tiny(**SMALL, init="weight_selection", init_from=str(place))

    config.check_files()
    config.check_source(None)
    student = first_weights(0, config)

    expected = every(numpy_of(source)["blocks.2.mlp.expand.weight"], (16, 12))
    np.testing.assert_array_equal(numpy_of(student)["blocks.2.mlp.expand.weight"], expected)
    assert config.weights_file == str(tmp_path / "student.safetensors")
