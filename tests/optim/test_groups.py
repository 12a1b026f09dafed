"""Which rate and weight decay each parameter gets, beside timm's groups and plain optimisers' steps."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from vitkd.models import Model, TimmConfig
from vitkd.models.resnet import ResNetConfig
from vitkd.optim import SGD, AdamW, Lion, Optimizer, grouped, places

HALF = [0.5, 0.5, 0.5]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
SWIN = {
    "img_size": 8,
    "patch_size": 2,
    "window_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
}
TNT = {
    **{"img_size": 8, "patch_size": 4, "first_stride": 2, "embed_dim": 8, "inner_dim": 4, "depth": 2},
    **{"num_heads_outer": 2, "num_heads_inner": 2},
}
NETWORKS = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "vit_small_patch14_reg4_dinov2": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "tnt_s_patch16_224": TNT,
    "resnet10t": {},
}


def timm_model(name: str) -> Model:
    return TimmConfig(32, 3, 5, HALF, HALF, name, options=NETWORKS[name]).build()


def found(model: Model, **settings: float) -> dict[str, tuple[float, float]]:
    """name → learning rate and weight decay."""
    optimizer = AdamW(lr=1.0, weight_decay=0.05, **settings)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = grouped(optimizer, model.parameters(), places(optimizer, model))
    return {names[id(p)]: (round(g["lr"], 12), g["weight_decay"]) for g in groups for p in g["params"]}


def timms(model: Any, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (round(g.get("lr_scale", 1.0), 12), g["weight_decay"])
        for g in groups
        for p in g["params"]
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_of_timms_networks_are_timms(name):
    model = timm_model(name)
    own = model.network.no_weight_decay() if hasattr(model.network, "no_weight_decay") else ()

    by_layer = param_groups_layer_decay(model.network, 0.05, own, layer_decay=0.6)
    together = param_groups_weight_decay(model.network, 0.05, no_weight_decay_list=own)

    expected = {f"network.{name}": values for name, values in timms(model.network, by_layer).items()}
    assert found(model, decay_all=False, layer_decay=0.6) == expected
    expected = {f"network.{name}": values for name, values in timms(model.network, together).items()}
    assert found(model, decay_all=False) == expected


# vitkd's names → timm's.
NAMES = {
    "cls_token": "cls_token",
    "positions": "pos_embed",
    "tokenizer.projection": "patch_embed.proj",
    "attention.norm": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp.norm": "norm2",
    "mlp.expand": "mlp.fc1",
    "mlp.contract": "mlp.fc2",
}


def test_groups_of_vitkds_vit_are_those_of_timms_twin(tiny):
    model = tiny(patch_norm=False, qkv_bias=True).build()
    twin = timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": 5},
    )
    groups = param_groups_layer_decay(twin, 0.05, twin.no_weight_decay(), layer_decay=0.6)
    expected = timms(twin, groups)

    def renamed(name: str) -> str:
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        return name

    ours = {renamed(name): values for name, values in found(model, decay_all=False, layer_decay=0.6).items()}

    assert ours == expected


def test_by_default_all_parameters_are_one_group_in_the_models_order(tiny):
    model, optimizer = tiny(distillation_token=True).build(), AdamW(lr=0.3, weight_decay=0.2)

    (group,) = grouped(optimizer, model.parameters(), places(optimizer, model))

    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.2)


def test_everything_of_small_data_and_tokens_is_spared(tiny):
    model = tiny(distillation_token=True, tokenizer="spt", attention="lsa", representation_size=4).build()

    rates = found(model, decay_all=False, layer_decay=0.5)

    decaying = {name for name, (_, decay) in rates.items() if decay}
    linear = {f"{name}.weight" for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    assert decaying == linear
    embedding = {"cls_token", "positions", "distillation_token"}
    assert {name for name, (rate, _) in rates.items() if rate == 0.5**4} == embedding | {
        name for name in rates if name.startswith("tokenizer")
    }
    heads = ("head", "distillation_head", "representation")
    assert {name for name, (rate, _) in rates.items() if rate == 1} == {
        name for name in rates if name.startswith(heads)
    }


def test_a_resnets_layers_are_its_blocks():
    model = ResNetConfig(32, 3, 5, variant="resnet20", stem="small").build()

    rates = found(model, layer_decay=0.5)

    assert rates["network.fc.weight"][0] == 1
    assert rates["network.layer3.2.conv1.weight"][0] == 0.5
    assert rates["network.layer2.2.bn1.bias"][0] == 0.5**4
    assert rates["network.layer1.0.conv2.weight"][0] == 0.5**9
    assert rates["network.conv1.weight"][0] == 0.5**10


class Perceptron(Model):
    """Of a package that knows nothing of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, images, taps=None):
        raise NotImplementedError


def test_a_model_without_blocks_has_its_children_for_layers():
    rates = found(Perceptron(), layer_decay=0.5, decay_all=False)

    assert rates == {
        "hidden.weight": (0.5, 0.05), "hidden.bias": (0.5, 0.0),
        "head.weight": (1.0, 0.05), "head.bias": (1.0, 0.0),
    }  # fmt: skip


def test_what_is_trained_beside_has_the_full_rate_and_decays_as_weights_do(tiny):
    beside = nn.ModuleDict({"project": nn.Linear(3, 2), "conv": nn.Conv2d(2, 2, 1), "norm": nn.LayerNorm(2)})
    model, optimizer = tiny().build(), AdamW(decay_all=False, layer_decay=0.5)

    theirs = places(optimizer, model, beside)[-6:]

    assert [name for name, _ in beside.named_parameters()][::2] == [
        "project.weight",
        "conv.weight",
        "norm.weight",
    ]
    assert [tuple(place) for place in theirs] == [
        (1.0, True), (1.0, False), (1.0, True), (1.0, False), (1.0, False), (1.0, False),
    ]  # fmt: skip


def test_frozen_parameters_are_in_no_group(tiny):
    model, optimizer = tiny().build(), AdamW()
    model.requires_grad_(False)
    model.head.requires_grad_(True)

    (group,) = grouped(optimizer, model.parameters(), places(optimizer, model))

    assert [id(p) for p in group["params"]] == [id(model.head.weight), id(model.head.bias)]


@pytest.mark.parametrize(
    ("optimizer", "plain"),
    [
        (AdamW(decay_all=False, layer_decay=0.5), lambda p, **k: torch.optim.AdamW([p], **k)),
        (
            SGD(decay_all=False, layer_decay=0.5),
            lambda p, **k: torch.optim.SGD([p], momentum=0.9, nesterov=True, **k),
        ),
        (Lion(decay_all=False, layer_decay=0.5), lambda p, **k: timm.optim.Lion([p], **k)),
    ],
    ids=["adamw", "sgd", "lion"],
)
def test_steps_are_those_of_one_plain_optimizer_a_parameter(optimizer: Optimizer, plain, tiny):
    model = tiny().build().double()
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    above = {
        "positions": 4,
        "tokenizer": 4,
        "cls_token": 4,
        "blocks.0": 3,
        "blocks.1": 2,
        "blocks.2": 1,
        "norm": 1,
    }
    each = []
    for name, twin in twins.items():
        layers = next((n for prefix, n in above.items() if name.startswith(prefix)), 0)
        decay = 0.01 if name.endswith("weight") and twin.ndim == 2 else 0.0
        each.append(plain(twin, lr=1e-3 * 0.5**layers, weight_decay=decay))
    built = optimizer.build(grouped(optimizer, model.parameters(), places(optimizer, model)))

    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            twins[name].grad = parameter.grad.clone()
        for own in (built, *each):
            own.step()

    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twins[name], rtol=1e-12, atol=1e-14)
