"""Every file in conf/ composes, fits its class and says what it is; experiments are what their names say."""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from importlib import import_module
from inspect import signature
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from timm.models.swin_transformer import SwinTransformer
from timm.models.tnt import TNT
from timm.models.vision_transformer import VisionTransformer

from vitkd.config.roles import Separates, first_difference, relevant
from vitkd.config.run import CONF_DIR, Config, name_in_job, parse, teacher_run
from vitkd.data import ImageFolder, Mix, TfFlowers, Torchvision
from vitkd.errors import ConfigError
from vitkd.methods.attention import AttentionDistillation
from vitkd.methods.base import Method
from vitkd.methods.copy import CopyDistillation
from vitkd.methods.crd import CRDDistillation
from vitkd.methods.dearkd import DearkdDistillation
from vitkd.methods.dkd import DKD
from vitkd.methods.locality import LocalityDistillation
from vitkd.methods.logit import LogitDistillation
from vitkd.methods.maps.granularity import Block, Encoder, Head
from vitkd.methods.maps.losses import CE, KL, MSE
from vitkd.methods.none import NoDistillation
from vitkd.methods.regions import Regions
from vitkd.methods.relation import RelationDistillation
from vitkd.methods.together import Together
from vitkd.methods.token import TokenDistillation
from vitkd.methods.weighting import Constant as EqualWeights
from vitkd.methods.weighting import Step
from vitkd.models import MergedConfig, ResNetConfig, TimmConfig, count_parameters
from vitkd.optim import AdamW, Constant, WarmupCosine
from vitkd.runs.teacher_store import fingerprint
from vitkd.train.plan import check_trainer

NOT_BESIDE_SMALL = ("swin", "timm", "tnt", "sl_vit", "sl_vit_narrow")
"""Students whose maps the default teacher cannot teach."""
OPTIONS = sorted(path for path in CONF_DIR.rglob("*.yaml") if path.parent != CONF_DIR)
# Their keys are not fields of one class: settings of the root, of Hydra and of Lightning's Trainer.
PATCHES = {"experiment", "debug", "sweep", "hydra/help", "hydra/launcher"}
CLASSLESS = PATCHES | {"trainer"}


def group_of(path: Path) -> str:
    """`loss` for loss/kl.yaml; an experiment may lie deeper."""
    parts = path.relative_to(CONF_DIR).parts
    return parts[0] if parts[0] != "hydra" else "/".join(parts[:-1])


def choice(path: Path) -> str:
    """The option as typed: `experiment=report/teacher`."""
    group = group_of(path)
    return f"{group}={path.relative_to(CONF_DIR / group).with_suffix('').as_posix()}"


def settings_of(path: Path) -> dict[str, Any]:
    """What an option file sets in its own group, without the choices it makes of others."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    settings = settings.get(path.parent.name, settings)
    settings = settings.get(path.stem, settings)  # of a group from which several may be chosen
    for base in settings.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            name, _, place = base.partition("@")
            file = CONF_DIR / name[1:] if name.startswith("/") else path.parent / name
            inherited = settings_of(file.with_suffix(".yaml"))
            settings = ({place: inherited} if place and not name.startswith("/") else inherited) | settings
    return settings


def class_named(target: str) -> type:
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)


SETTINGS = [path for path in OPTIONS if group_of(path) not in CLASSLESS]
EXPERIMENTS = [path for path in OPTIONS if group_of(path) == "experiment"]
every_option = pytest.mark.parametrize("path", OPTIONS, ids=choice)
every_setting = pytest.mark.parametrize("path", SETTINGS, ids=choice)
every_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=choice)


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose("train", [*overrides], return_hydra_config=True)


@pytest.fixture
def read(monkeypatch) -> Callable[..., Config]:
    """read("alpha=0.3"): the checked configuration; no data set has to be there."""
    for kind in (Torchvision, ImageFolder, TfFlowers):
        monkeypatch.setattr(kind, "inspect", lambda self, root: self.num_classes or 7)

    def read(*overrides: str) -> Config:
        composed = compose(*overrides)
        del composed.__dict__["_content"]["hydra"]
        return parse(composed)

    return read


@every_option
def test_every_option_composes_and_fits(path, read):
    group, _, option = choice(path).partition("=")
    if group == "trainer" and option == "gpu" and not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="gpu"):
            check_trainer(read(choice(path)).trainer)
    elif group == "augment":
        assert [*read(f"dataset.augment.then=[{option}]").dataset.augment.augmentations] == [option]
    elif group == "student" and option in (*NOT_BESIDE_SMALL, "merged", "report_teacher", "resnet"):
        read(choice(path), "method=none")
    elif option in ("locality", "dearkd"):
        config = read(choice(path), "teacher=resnet56")
        config.method.check(config.student, config.teacher.model, config)
    elif option in ("resnet", "resnet56", "swin", "timm", "tnt"):
        config = read(choice(path), "method=logit")
        config.method.check(config.student, config.teacher.model, config)
    else:
        config = read(choice(path), *(["dataset.root=photos"] if option == "image_folder" else []))
        config.method.check(config.student, config.teacher.model, config)


@every_option
def test_every_option_opens_with_what_it_is(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines[0].startswith("# @package"):
        lines.pop(0)

    assert re.fullmatch(r"# \S.{5,}", lines[0]), "open with a comment that says what it is"


@every_option
def test_every_option_belongs_to_a_choice(path):
    """A folder that train.yaml does not list would be of no effect."""
    assert group_of(path) in {*compose().hydra.runtime.choices, "logger", "augment"}


@every_setting
def test_an_option_sets_exactly_what_its_class_takes(path):
    settings = settings_of(path)
    cls = class_named(settings.pop("_target_"))

    # The whole encoder is every block, so it offers no choice of them.
    inherited = {"blocks"} if cls is Encoder else set()
    # What its file says of the students in it.
    inherited |= {"parts"} if cls is MergedConfig else set()

    expected = {field.name for field in fields(cls)} - inherited
    if cls is Together:
        assert {*settings} >= {*settings["parts"]}
        expected = expected - {cls.REST} | {key for key, value in settings.items() if isinstance(value, dict)}
    if cls is TimmConfig:
        # The others are arguments of most of timm's models.
        others = {*settings} - expected
        architectures = VisionTransformer, SwinTransformer, TNT
        assert others < {name for each in architectures for name in signature(each).parameters}
        expected = expected - {cls.REST} | others
    assert {*settings} == expected


def test_trainers_set_the_same_and_what_lightning_takes():
    trainers = {path.stem: settings_of(path) for path in OPTIONS if group_of(path) == "trainer"}

    own = {name: dict(settings.items() - trainers["auto"].items()) for name, settings in trainers.items()}

    assert all(settings.keys() == trainers["auto"].keys() for settings in trainers.values())
    assert own == {
        "auto": {},
        "cpu": {"accelerator": "cpu"},
        "gpu": {"accelerator": "gpu"},
        "ddp": {"strategy": "ddp", "devices": 2},
        "fsdp": {"strategy": "fsdp", "devices": 2, "accelerator": "gpu"},
    }
    check_trainer(trainers["cpu"] | {"max_epochs": 1})


@every_setting
def test_every_class_is_vitkds_own_and_says_what_it_is(path):
    cls = class_named(settings_of(path)["_target_"])

    assert cls.__module__.startswith("vitkd.")
    assert cls.__doc__


# The report's protocol; every experiment follows it, each cell changes what is listed under its name.
REPORT = {
    "dataset": "cifar100",
    "method": AttentionDistillation,
    "epochs": 100,
    "student": (5, 4, 512),
    "teacher": (10, 8, 1024),
    "tokenizer": "patch",
}
EXPERIMENT = {
    "report/teacher": {"method": NoDistillation, "student": (10, 8, 1024)},
    "report/student_alone": {"method": NoDistillation},
    "report/encoder_mse": {"granularity": Encoder, "loss": MSE, "alpha": 0.00015},
    "report/block_mse": {"granularity": Block, "loss": MSE, "alpha": 0.015},
    "report/block_kl": {"granularity": Block, "loss": KL, "alpha": 0.5},
    "report/spt_teacher": {"method": NoDistillation, "student": (10, 8, 1024), "tokenizer": "spt"},
    "report/spt_student_alone": {"method": NoDistillation, "tokenizer": "spt"},
    "report/spt_block_kl": {"granularity": Block, "loss": KL, "alpha": 0.5, "tokenizer": "spt"},
    "report_cifar10": {"dataset": "cifar10"},
    "report_mnist": {"dataset": "mnist", "epochs": 10, "student": (2, 4, 64), "teacher": (6, 4, 256)},
}


# Each arm changes one thing of the distilled run that the command line describes.
CONTROL = {
    "control/attention": {},
    "control/student_alone": {"method": NoDistillation()},
    "control/untrained_teacher": {"trained": False},
    "control/shuffled_maps": {"method": AttentionDistillation(control="shuffled")},
    "control/uniform_maps": {"method": AttentionDistillation(control="uniform")},
    "control/logits": {"method": LogitDistillation()},
}


# On the report's models, with the settings of the method's paper.
PARTS: dict[str, Method] = {
    "attention": AttentionDistillation(),
    "relation": RelationDistillation(),
    "logit": LogitDistillation(),
    "dkd": DKD(),
    "crd": CRDDistillation(),
}
METHOD = {
    "method/together": (Together(["attention", "logit"], None, PARTS), 0.5),
    "method/crd": (CRDDistillation(negatives=16384, width=128, temperature=0.07, momentum=0.5), 0.5556),
    "method/dkd": (DKD(temperature=4, target_weight=1, non_target_weight=8), 0.5),
    "method/logit_standardized": (LogitDistillation(temperature=2, standardize=True), 0.011),
    "method/locality": (LocalityDistillation(), 0.2857),
    "method/dearkd": (DearkdDistillation(), 0.5),
    "method/attention_copy": (CopyDistillation(), 0.5),
    "method/regions": (Regions(clusters=4), 0.5),
    "method/attention_transfer": (AttentionDistillation(), 0.25),
    "method/attention_transfer_drop_path": (AttentionDistillation(share_drop_path=True), 0.25),
}


MODERN = {
    f"modern/{images}/{what}": (patch, policy, method)
    for images, patch, policy in [
        ("cifar100", 4, "cifar10"),
        ("cifar10", 4, "cifar10"),
        ("tiny_imagenet", 8, "imagenet"),
        ("flowers", 8, "imagenet"),
    ]
    for what, method in {
        **dict.fromkeys(("teacher", "student_alone"), NoDistillation()),
        **dict.fromkeys(("block_kl", "encoder_kl"), AttentionDistillation()),
        "logit": LogitDistillation(),
    }.items()
}


@pytest.mark.parametrize("name", MODERN)
def test_a_modern_experiment_follows_the_recipe_of_its_paper(name, read):
    config, (patch, policy, method) = read(f"experiment={name}"), MODERN[name]

    assert (config.dataset.patch_size, config.method) == (patch, method)
    assert (config.student.grid, config.student.attention, config.student.tokenizer) == (8, "lsa", "spt")
    assert config.student.drop_path_rates == (0.1,) * 9
    assert config.student.embed_dim == (192 if name.endswith("/teacher") else 96)
    assert (config.dataset.batch_size, config.dataset.passes, config.label_smoothing) == (128, 3, 0.1)
    assert config.dataset.mix == Mix(1.0, 1.0, prob=0.5, switch_prob=0.5)
    augment = config.dataset.augment
    assert (augment.then, augment.crop_padding, augment.flip) == (["auto_augment", "random_erasing"], 4, True)
    assert augment.augmentations["auto_augment"].policy == policy
    erasing = augment.augmentations["random_erasing"]
    assert (erasing.p, erasing.scale, erasing.ratio) == (0.25, [0.02, 0.4], [0.3, 3.3333])
    for optimizer, schedule in (
        (config.optimizer, config.schedule),
        (config.teacher.optimizer, config.teacher.schedule),
    ):
        assert (optimizer.lr, optimizer.weight_decay) == (1e-3, 0.05)
        assert (schedule.warmup, schedule.final) == (0.1, 1e-3)


def test_sl_vit_has_its_papers_size(read):
    assert count_parameters(read("experiment=modern/cifar100/teacher").student.build()) == 2_747_248


def test_every_experiment_is_listed():
    described = {*EXPERIMENT, *CONTROL, *METHOD, "report/deit_flowers"}
    described |= {"method/subspace", "method/subspace_merged", *MODERN, "modern/spt_lsa"}
    assert {choice(path).partition("=")[2] for path in EXPERIMENTS} == described


@pytest.mark.parametrize("name", CONTROL)
def test_a_control_changes_one_thing(name, read):
    settings = ["granularity=head", "loss=mse", "alpha=0.25", "teacher.max_epochs=7"]
    expected = {"method": AttentionDistillation(), "trained": True} | CONTROL[name]

    plain, config = read(*settings), read(f"experiment={name}", *settings)

    assert config.method == expected["method"]
    assert config.teacher.trained == expected["trained"]
    same = replace(config.teacher, trained=True)
    assert (config.student, same, config.alpha) == (plain.student, plain.teacher, 0.25)
    assert (config.granularity, config.loss) == (plain.granularity, plain.loss)


@pytest.mark.parametrize("name", EXPERIMENT)
def test_an_experiment_is_what_its_name_says(name, read):
    expected = REPORT | EXPERIMENT[name]

    config = read(f"experiment={name}")

    assert config.dataset.name == expected["dataset"]
    assert type(config.method) is expected["method"]
    for model, shape in ((config.student, expected["student"]), (config.teacher.model, expected["teacher"])):
        assert (model.depth, model.num_heads, model.mlp_dim) == shape
        assert model.embed_dim == 64
        assert model.grid in (4, 7)
    assert config.trainer["max_epochs"] == config.teacher.max_epochs == expected["epochs"]
    assert config.dataset.batch_size == 64
    assert config.optimizer == AdamW(lr=1e-3)
    assert config.schedule == Constant()
    if "loss" in expected:
        assert type(config.granularity) is expected["granularity"]
        assert type(config.loss) is expected["loss"]
        assert config.loss.reduction == "mean"
        assert config.alpha == expected["alpha"]
    assert config.student.tokenizer == expected["tokenizer"]
    if config.method.needs_teacher:
        assert config.teacher.model.tokenizer == expected["tokenizer"]
        assert config.teacher.optimizer == AdamW(lr=1e-3)
        assert config.teacher.schedule == Constant()
    config.method.check(config.student, config.teacher.model, config)


@pytest.mark.parametrize("name", METHOD)
def test_a_methods_experiment_has_its_papers_settings(name, read):
    config = read(f"experiment={name}")

    assert (config.method, config.alpha) == METHOD[name]
    assert config.dataset.name == "cifar100"
    config.method.check(config.student, config.teacher.model, config)


def test_deit_on_flowers_is_what_its_name_says(read):
    config = read("experiment=report/deit_flowers")

    assert config.dataset.name == "tf_flowers"
    assert config.method == TokenDistillation(targets="hard")
    assert config.teacher.model == ResNetConfig(64, 3, 5, variant="resnet18", pretrained=False)
    assert config.student.distillation_token
    assert config.alpha == 0.5
    config.method.check(config.student, config.teacher.model, config)


def test_students_of_slices_are_those_that_are_merged(read):
    slices = [read("experiment=method/subspace", f"method.slice={k}", "seed=3") for k in range(4)]
    merged = read("experiment=method/subspace_merged", "seed=3")

    runs = [Path(config.paths.outputs, "method/subspace", config.name).resolve() for config in slices]
    assert merged.student.places == runs
    assert not merged.method.needs_teacher
    for config in slices:
        assert (config.alpha, config.optimizer.weight_decay) == (0, 0)
        config.method.check(config.student, config.teacher.model, config)


@pytest.mark.parametrize(
    ("settings", "method", "weighting"),
    [
        ([], DearkdDistillation, Step(end=1.0, at=0.5)),
        (["weighting=constant"], DearkdDistillation, EqualWeights()),
        (["method=none"], NoDistillation, EqualWeights()),
    ],
)
def test_dearkd_is_two_stages_beside_a_convolutional_teacher(settings, method, weighting, read):
    config = read("experiment=method/dearkd", *settings)

    assert (type(config.method), config.weighting) == (method, weighting)
    assert config.dataset.name == "cifar100"
    assert config.teacher.model == ResNetConfig(32, 3, 100, variant="resnet56", stem="small")
    assert config.student.grid == 8
    config.method.check(config.student, config.teacher.model, config)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("report/teacher", 2_656_164), ("report/student_alone", 680_484)],
)
def test_the_reports_models_have_their_sizes(name, parameters, read):
    assert count_parameters(read(f"experiment={name}").student.build()) == parameters


@every_experiment
def test_an_experiment_states_its_command_and_the_reports_result(path):
    header = path.read_text(encoding="utf-8").partition("defaults:")[0]

    assert re.search(rf"^# python -m vitkd\.train .*{re.escape(choice(path))}\b", header, re.MULTILINE)
    assert re.search(r"\d ?%|no numbers", header)


@pytest.mark.parametrize(
    ("dataset", "teacher_depth", "student_depth", "epochs"),
    [
        ("digits", 4, 2, 20),
        ("mnist", 6, 2, 10),
        ("fashion_mnist", 6, 2, 20),
        ("cifar10", 10, 5, 100),
        ("cifar100", 10, 5, 100),
        ("tf_flowers", 10, 5, 50),
        ("tiny_imagenet", 9, 6, 100),
    ],
)
def test_models_and_epochs_follow_the_data_set(dataset, teacher_depth, student_depth, epochs, read):
    config = read(f"dataset={dataset}")

    assert (config.teacher.model.depth, config.student.depth) == (teacher_depth, student_depth)
    assert config.trainer["max_epochs"] == config.teacher.max_epochs == epochs
    for model in (config.student, config.teacher.model):
        assert (model.image_size, model.channels) == (config.dataset.image_size, config.dataset.channels)
        assert (model.num_classes, model.patch_size) == (
            config.dataset.num_classes,
            config.dataset.patch_size,
        )


@pytest.mark.parametrize("order", [1, -1])
def test_the_data_sets_choice_of_models_can_be_overridden(order, read):
    config = read(*["dataset=cifar100", "teacher=small", "student=mnist"][::order])

    assert (config.teacher.model.depth, config.teacher.model.mlp_dim) == (4, 128)
    assert (config.student.depth, config.student.mlp_dim) == (2, 64)
    assert config.student.num_classes == 100


def test_an_experiment_can_be_overridden(read):
    config = read("experiment=report/block_kl", "alpha=0.1", "loss=ce", "dataset=cifar10", "schedule=cosine")

    assert config.alpha == 0.1
    assert type(config.loss) is CE
    assert config.dataset.name == "cifar10"
    assert type(config.schedule) is WarmupCosine


def test_nested_settings_from_the_command_line(read):
    config = read(
        "granularity=head",
        "granularity.blocks=[1]",
        "granularity.heads=[[0,2],[3,1]]",
        "optimizer.betas=[0.8,0.95]",
        "teacher.optimizer.lr=2e-3",
        "teacher.max_epochs=3",
        "dataset.augment.flip=true",
        "trainer.max_epochs=2",
    )

    assert config.granularity == Head(blocks=[1], heads=[[0, 2], [3, 1]])
    (pair,) = config.granularity.pairs(
        config.student.attention_layouts(), config.teacher.model.attention_layouts()
    )
    assert (pair.student_heads, pair.teacher_heads) == ((0, 3), ((2,), (1,)))
    assert config.optimizer.betas == [0.8, 0.95]
    assert (config.optimizer.lr, config.teacher.optimizer.lr) == (1e-3, 2e-3)
    assert (config.trainer["max_epochs"], config.teacher.max_epochs) == (2, 3)
    assert config.dataset.augment.flip


def test_augmentations_are_a_list_of_those_that_have_settings(read):
    plain = read("dataset=cifar10")
    config = read(
        "dataset=cifar10",
        "dataset.augment.then=[random_erasing,auto_augment]",
        "dataset.augment.random_erasing.p=0.1",
    )

    augment = config.dataset.augment
    assert [*augment.augmentations] == ["random_erasing", "auto_augment"]
    assert augment.augmentations["random_erasing"].p == 0.1
    assert augment.augmentations["random_erasing"].mean == config.dataset.mean
    recorded = config.resolved["dataset"]["augment"]
    assert recorded.keys() - {"random_erasing", "auto_augment"} == plain.resolved["dataset"]["augment"].keys()
    assert plain.resolved["dataset"]["augment"] == {
        **{"crop_padding": 4, "flip": True, "resized_crop": None, "then": []},
    }
    assert parse(OmegaConf.create(config.resolved)).dataset == config.dataset


def test_the_order_of_augmentations_makes_another_run_and_teacher(read):
    orders = [
        read("dataset=cifar10", f"dataset.augment.then=[{names}]")
        for names in ("auto_augment,random_erasing", "random_erasing,auto_augment", "")
    ]

    for one, other in combinations(orders, 2):
        assert first_difference(one.resolved, other.resolved).startswith("dataset.augment.")
        of_teachers = [relevant(teacher_run(each).resolved, Separates.TEACHERS) for each in (one, other)]
        assert of_teachers[0] != of_teachers[1]


def test_a_configuration_without_a_list_of_augmentations_is_what_it_was(read):
    now = read("dataset=cifar10")
    before = deepcopy(now.resolved)
    del before["dataset"]["augment"]["then"]
    read_again = parse(OmegaConf.create(before))

    assert read_again.dataset == now.dataset
    assert "then" not in read_again.resolved["dataset"]["augment"]
    assert first_difference(read_again.resolved, now.resolved) is None
    assert fingerprint(teacher_run(read_again), None) == fingerprint(teacher_run(now), None)


def test_the_teachers_run_is_the_teacher_without_distillation(read):
    config = read("teacher.seed=5", "teacher.max_epochs=3", "teacher.optimizer.lr=0.1", "seed=1")

    own = teacher_run(config)

    assert own.student == config.teacher.model
    assert type(own.method) is NoDistillation
    assert (own.seed, own.optimizer.lr, own.trainer["max_epochs"]) == (5, 0.1, 3)
    assert own.resolved["seed"] == 5
    assert own.resolved["student"]["depth"] == config.teacher.model.depth


def test_the_teacher_trains_on_its_own_share_of_the_images(read):
    config = read("dataset.train_fraction=0.1")

    assert config.dataset.train_fraction == 0.1
    assert teacher_run(config).dataset.train_fraction == 1
    assert teacher_run(read("teacher.train_fraction=0.3")).dataset.train_fraction == 0.3
    assert read("teacher.train_fraction=0.3").dataset.train_fraction == 1


def test_the_teacher_trains_on_images_mixed_and_shown_as_its_students_are(read):
    own = teacher_run(read("dataset.mix.cutmix_alpha=1", "dataset.passes=3", "label_smoothing=0.1"))

    assert own.dataset.mix.is_on
    assert own.dataset.passes == 3
    assert own.label_smoothing == 0


@pytest.mark.parametrize("method", ["dkd", "crd", "together method.parts=[attention,dkd]"])
def test_what_needs_an_images_one_class_refuses_mixed_images(method, read):
    settings = f"method={method}".split(" ")

    with pytest.raises(ConfigError, match=r"^dataset.mix.cutmix_alpha=0.5: method=(dkd|crd) .*; set it to 0"):
        read(*settings, "dataset.mix.cutmix_alpha=0.5")
    read(*settings, "dataset.mix.cutmix_alpha=0.5", "dataset.mix.prob=0")
    read(*settings, "dataset.passes=3", "dataset.repeats=2")


@pytest.mark.parametrize("control", ["control", "attention.control"])
def test_maps_of_other_images_are_taught_where_neighbours_are_others(control, read):
    settings = [f"method={'together' if '.' in control else 'attention'}", f"method.{control}=shuffled"]

    for setting in ("dataset.mix.mixup_alpha=1.0", "dataset.repeats=2"):
        with pytest.raises(ConfigError, match=f"^{setting}: .*=shuffled.*; set it to [01]"):
            read(*settings, setting)
    read(*settings, "dataset.passes=2")


def test_the_teacher_has_its_own_trainer_on_the_students_machine(read):
    students = [
        "trainer.precision=bf16-mixed",
        "trainer.gradient_clip_val=1",
        "trainer.limit_train_batches=3",
    ]
    machine = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "deterministic": True}

    own = teacher_run(
        read(
            *students,
            *(f"trainer.{name}={value}" for name, value in machine.items()),
            "teacher.trainer.gradient_clip_val=0.5",
            "+teacher.trainer.gradient_clip_algorithm=value",
        )
    )

    assert own.trainer.items() >= machine.items()
    assert own.trainer["precision"] == "32-true"
    assert own.trainer["limit_train_batches"] is None
    assert (own.trainer["gradient_clip_val"], own.trainer["gradient_clip_algorithm"]) == (0.5, "value")


@pytest.mark.parametrize(
    ("setting", "in_job"),
    [
        ("student.depth", "teacher.depth"),
        ("optimizer.lr", "teacher.optimizer.lr"),
        ("schedule.warmup", "teacher.schedule.warmup"),
        ("seed", "teacher.seed"),
        ("trainer.max_epochs", "teacher.max_epochs"),
        ("dataset.train_fraction", "teacher.train_fraction"),
        ("trainer.precision", "teacher.trainer.precision"),
        ("trainer.devices", "trainer.devices"),
        ("dataset.batch_size", "dataset.batch_size"),
        ("matmul_precision", "matmul_precision"),
    ],
)
def test_a_setting_of_the_teachers_run_is_named_as_a_job_sets_it(setting, in_job, read):
    """What the job sets there is what the teacher's run has here."""
    values = {"trainer.devices": 2, "matmul_precision": "high", "trainer.precision": "bf16-mixed"}
    values |= {"dataset.train_fraction": 0.5}
    value = values.get(setting, 7 if "warmup" not in setting else 0.7)

    own = OmegaConf.create(teacher_run(read(f"{in_job}={value}")).resolved)

    assert name_in_job(setting) == in_job
    assert OmegaConf.select(own, setting) == value


def test_what_was_resolved_reads_back_as_the_same_run(read):
    """A run folder's config.yaml is a configuration again."""
    config = read("loss=mse", "granularity=encoder", "alpha=0.00015", "teacher.dropout=0.2")

    text = yaml.safe_dump(config.resolved, allow_unicode=True)

    assert parse(DictConfig(yaml.safe_load(text))) == config


@pytest.fixture
def launched(monkeypatch) -> list[list[str]]:
    """The jobs of a multirun, as they would be launched."""
    jobs: list[list[str]] = []
    launcher = SimpleNamespace(launch=lambda overrides, initial_job_idx: jobs.extend(overrides) or [])
    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda self, **_: launcher)
    return jobs


@pytest.mark.parametrize(
    ("line", "count"),
    [
        pytest.param("sweep=grid", 108, marks=pytest.mark.slow),
        ("sweep=grid loss=kl seed=0,1", 24),
        ("sweep=controls", 30),
        ("sweep=methods seed=0", 9),
        ("-m granularity=head,encoder loss=mse,kl alpha=0.015,0.5", 8),
        ("-m experiment=report_mnist student.embed_dim=64,128,256", 3),
    ],
)
def test_a_grid_is_so_many_different_jobs(line, count, command, launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    ended = command("train", *line.split())

    assert ended.code == 0, ended.err
    assert len({tuple(sorted(job)) for job in launched}) == len(launched) == count


@pytest.mark.parametrize("granularity", ["head", "block", "encoder"])
@pytest.mark.parametrize("loss", ["mse", "ce", "kl"])
def test_every_cell_of_the_grid_fits(granularity, loss, read):
    config = read(f"granularity={granularity}", f"loss={loss}", "alpha=0.00015")

    config.method.check(config.student, config.teacher.model, config)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(("name", "file"), [("evaluate", "evaluate"), ("explain", "explain")])
def test_help_without_choices_explains_every_setting(name, file, flag, command):
    settings = yaml.safe_load((CONF_DIR / f"{file}.yaml").read_text(encoding="utf-8"))

    helped = command(name, flag)

    assert (helped.code, helped.err) == (0, "")
    assert f"python -m vitkd.{file} run=" in helped.out
    assert yaml.safe_load(helped.out) == {
        key: value for key, value in settings.items() if key not in ("defaults", "hydra")
    }
    for key in yaml.safe_load(helped.out).keys() - {"seed", "paths", "teacher"}:
        assert re.search(rf"^(# .*\n)+{key}:", helped.out, re.MULTILINE), f"{key} is explained"
