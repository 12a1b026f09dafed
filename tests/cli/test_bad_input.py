"""A mistake is one clear line on stderr with the fix, and leaves nothing behind: no traceback, no folder."""

import os
import pickle
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from tests.photos import noise_photos
from vitkd.models import ResNetConfig, ViTConfig, describe, save_model
from vitkd.runs.checkpoints import load_any

# Should a command not be refused after all, it soon ends.
BRIEFLY = [
    "trainer.max_epochs=1",
    "teacher.max_epochs=1",
    "trainer.limit_train_batches=1",
    "teacher.trainer.limit_train_batches=1",
    "log_every_n_steps=1",
]

# A command, and what its line says; FILES is the folder that `files` fills.
TRAIN = [
    # names
    ("loss=kll", "loss=kll", "did you mean kl?", "choose one of ce, "),
    ("granularity=banana", "granularity=banana", "block, encoder, head"),
    ("experiment=block_kl", "experiment=block_kl", "did you mean report/block_kl?"),
    ("dataset=cifar1000", "did you mean cifar100?"),
    ("sweep=gird", "sweep=gird", "grid"),
    ("alhpa=0.5", "alhpa", "did you mean alpha?"),
    ("+alhpa=0.5", "alhpa", "did you mean alpha?"),
    ("student.depht=3", "student.depht", "did you mean student.depth?"),
    ("teacher.optimizer=sgd", "teacher.optimizer=sgd", "write optimizer@teacher.optimizer=sgd"),
    ("dataset.repeats=65", "dataset.repeats=65", "at most batch_size=64"),
    ("teacher.optimizer.rl=1", "teacher.optimizer.rl", "did you mean teacher.optimizer.lr?"),
    ("grnularity=block", "grnularity", "did you mean granularity?"),
    ("+nonsense=1", "nonsense", "alpha"),
    ("+alpha=0.3", "alpha", "already"),
    ("loss=mse loss.temperature=2", "loss.temperature", "loss=kl"),
    ("granularity=encoder granularity.blocks=[0]", "granularity.blocks", "granularity=block"),
    ("student=resnet student.tokenizer=spt", "student.tokenizer", "student=report or", "student=small"),
    ("teacher=resnet teacher.tokenizer=spt", "teacher.tokenizer", "teacher=small"),
    ("dataset.root=photos", "dataset.root", "dataset=image_folder"),
    ("alpha=[", "alpha=[", "KEY=VALUE"),
    ("alpha", "alpha", "KEY=VALUE"),
    ("--alpha=0.5", "--alpha=0.5", "without dashes"),
    ("lr=0.1", "lr", "did you mean optimizer.lr?"),
    ("=0.5", "=0.5", "KEY=VALUE"),
    ("alpha=0.1,0.2", "alpha=0.1,0.2", "-m"),
    ("alpha=${nowhere}", "alpha", "nowhere"),
    ("~loss", "loss"),
    # types
    ("alpha=high", "alpha", "high"),
    ("seed=1.5", "seed", "1.5"),
    ("student.embed_dim=wide", "student.embed_dim", "wide"),
    ("granularity.blocks=1", "granularity.blocks", "list"),
    ("granularity=head granularity.heads=[0,1]", "granularity.heads=[0, 1]", "list[list["),
    ("dataset.augment=strong", "dataset.augment", "strong"),
    ("augment=rand_augment", "augment", "dataset.augment.then=[NAME"),
    ("dataset.augment.then=rand_augment", "dataset.augment.then=rand_augment", "list[text]"),
    # ranges
    ("alpha=1.5", "alpha=1.5", "[0, 1]", "class loss"),
    ("alpha=nan", "alpha=nan", "[0, 1]"),
    ("seed=-1", "seed=-1", "0 to 4294967295"),
    ("name=a/b", "name=a/b", "without slashes"),
    ("name=..", "name=.."),
    ("student.dropout=1.5", "student.dropout=1.5", "[0, 1)"),
    ("student.drop_path_rate=1", "student.drop_path_rate=1", "[0, 1)"),
    ("student.drop_path_rate=0.1 student.depth=1", "drop_path_rate=0.1", "depth=1", "drop_path_rate=0"),
    ("method.share_drop_path=true", "method.share_drop_path=true", "student.drop_path_rate=0.1"),
    (
        "method=together method.attention.share_drop_path=true student.drop_path_rate=0.1",
        *("method.attention.share_drop_path=true", "student.depth=4"),
    ),
    ("teacher.mlp_dim=0", "teacher.mlp_dim=0", "at least 1"),
    ("student.patch_size=3", "patch_size=3", "image_size=8", "1, 2, 4, 8"),
    ("loss.temperature=0", "loss.temperature=0", "above 0"),
    ("loss.reduction=batchmean", "loss.reduction=batchmean", "mean, sum or sum_blocks"),
    ("optimizer.lr=-1", "optimizer.lr=-1", "above 0"),
    ("teacher.optimizer.lr=-1", "teacher.optimizer.lr=-1", "above 0"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]", "two numbers"),
    ("optimizer.layer_decay=0", "optimizer.layer_decay=0", "above 0 and at most 1"),
    ("optimizer=sgd optimizer.momentum=0", "optimizer.nesterov=true", "nesterov=false"),
    ("optimizer=muon", "optimizer=muon", "adamw, lion, sgd"),
    ("schedule.warmup=2", "schedule.warmup=2", "[0, 1]"),
    ("dataset.augment.then=[mixup]", "dataset.augment.then=[mixup]", "there are auto_augment, color_jitter"),
    ("dataset.augment.then=[rand_augmen]", "augment.then=[rand_augmen]", "did you mean rand_augment?"),
    ("dataset.augment.rand_augment.magnitude=31", "augment.rand_augment.magnitude=31", "from 0 to 30"),
    ("dataset.augment.random_erasing.pp=1", "did you mean dataset.augment.random_erasing.p?"),
    (
        "dataset.augment.then=[random_erasing] dataset.augment.random_erasing.mean=[0.1,0.2]",
        *("dataset.augment.random_erasing.mean=[0.1, 0.2]", "1 of them"),
    ),
    ("dataset.val_fraction=1", "dataset.val_fraction=1", "[0, 1)"),
    ("dataset.train_fraction=0", "dataset.train_fraction=0", "above 0"),
    ("dataset.train_fraction=10%", "dataset.train_fraction=10%", "a number"),
    ("dataset.train_fraction=0.02", "dataset.train_fraction=0.02", "29 of 1,295", "a batch of 64"),
    ("teacher.train_fraction=1.5", "teacher.train_fraction=1.5", "at most 1"),
    ("teacher.train_fraction=0.02", "teacher.train_fraction=0.02", "29 of 1,295", "a batch of 64"),
    ("dataset.num_classes=12", "dataset.num_classes=12", "10"),
    ("method.resize=bicubic", "method.resize=bicubic", "bilinear"),
    ("method.control=shufled", "method.control=shufled", "shuffled, uniform or null"),
    ("method=logit method.temperature=0", "method.temperature=0", "above 0"),
    ("method=together method.logit.temperature=0", "method.logit.temperature=0", "above 0"),
    ("method=together method.parts=[attention,logits]", "method.parts=[attention,logits]", "mean logit?"),
    ("method=together method.weights=[1]", "method.weights=[1.0]", "parts=[attention,logit]"),
    ("teacher.trained=false teacher.checkpoint=x", "trained=false", "x is trained"),
    # what Lightning's Trainer takes
    ("trainer.max_epochs=0", "trainer.max_epochs=0", "at least 1"),
    ("trainer.precision=12", "trainer", "12", "32-true"),
    ("trainer.strategy=dddp", "trainer", "dddp", "ddp"),
    ("trainer.accelerator=tpuu", "trainer", "tpuu", "auto"),
    ("trainer.limit_train_batches=0", "trainer.limit_train_batches=0"),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0"),
    ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch=0"),
    ("trainer.gradient_clip_val=nan", "trainer.gradient_clip_val=nan"),
    ("+trainer.fast_dev_run=true", "trainer.fast_dev_run"),
    ("+trainer.enable_checkpointing=true", "trainer.enable_checkpointing", "set by vitkd"),
    ("trainer.devices=2 trainer.strategy=ddp_spawn trainer.accelerator=cpu", "ddp_spawn", "use ddp"),
    ("trainer.devices=1 trainer.num_nodes=2 trainer.accelerator=cpu", "num_nodes=2", "torchrun"),
    ("checkpoint_minutes=-1", "checkpoint_minutes", "0 (every step)"),
    ("resume=always", "resume=always", "auto or null"),
    ("ema_decay=1", "ema_decay", "between 0 and 1"),
    ("kernels=on", "kernels=on", "auto or off"),
    ("matmul_precision=low", "matmul_precision=low", "highest, high or medium"),
    ("compile=maybe", "compile=maybe"),
    ("teacher.cache=ram", "teacher.cache=ram", "auto or off"),
    ("teacher.cache_gib=0", "teacher.cache_gib", "above 0"),
    ("teacher.cache_gib=nan", "teacher.cache_gib", "above 0"),
    ("sweep.rerun=failed", "sweep.rerun=failed", "missing or all"),
    ("+trainer.val_check_interval=0.5", "trainer.val_check_interval", "set by vitkd"),
    ("+trainer.nonsense=1", "trainer.nonsense", "max_epochs"),
    ("+trainer.logger=true", "trainer.logger", "set by vitkd"),
    ("+trainer.limit_test_batches=1", "trainer.limit_test_batches", "no effect"),
    ("+trainer.inference_mode=false", "trainer.inference_mode", "no effect"),
    ("+trainer.gradient_clip_algorithm=value", "gradient_clip_algorithm=value", "trainer.gradient_clip_val"),
    ("trainer.precision=16-true", "trainer.precision=16-true", "bf16-true"),
    ("+teacher.trainer.limit_test_batches=1", "teacher.trainer.limit_test_batches", "no effect"),
    ("teacher.trainer.precision=16-true", "teacher.trainer.precision=16-true", "bf16-true"),
    ("+teacher.trainer.logger=true", "teacher.trainer.logger", "set by vitkd"),
    ("+teacher.trainer.nonsense=1", "teacher.trainer.nonsense", "max_epochs"),
    ("teacher.trainer.precision=12", "teacher.trainer", "12", "32-true"),
    ("teacher.trainer.gradient_clip_val=-1", "teacher.trainer.gradient_clip_val=-1", "above 0"),
    ("+teacher.trainer.max_epochs=3", "teacher.trainer.max_epochs", "teacher.max_epochs is that setting"),
    ("+teacher.trainer.devices=2", "teacher.trainer.devices", "trainer.devices is the teacher's as well"),
    # which attention maps
    ("student.num_heads=8", "student.num_heads=8", "teacher.num_heads=4", "at most 4"),
    ("granularity=head granularity.heads=[[0,9]]", "heads", "teacher has no head 9", "0 to 3"),
    ("granularity=head granularity.heads=[[0,1,2]]", "[[0, 1, 2]]", "for example [[0,2]]"),
    ("granularity=head granularity.heads=[[0,1],[0,2]]", "granularity.heads", "one teacher head only"),
    ("granularity.blocks=[7]", "granularity.blocks", "student has no block 7", "0 to 1"),
    ("granularity.blocks=[1,-1]", "granularity.blocks=[1, -1]", "only once"),
    ("granularity.head_map=group_mean student.num_heads=3", "num_heads=3", "num_heads=4", "head_map=index"),
    ("teacher.patch_size=4", "4×4", "2×2", "method.resize=bilinear"),
    # models that do not go together
    ("teacher=resnet", "teacher=resnet18", "no attention maps", "method=logit", "method=token"),
    ("student=resnet student.stem=small", "student=resnet18, stem for small images", "no attention maps"),
    ("student=swin student.num_heads=[3,3,3] granularity.blocks=[0]", "16×16 patches", "equal patches"),
    (
        "student=tnt granularity.part=inner",
        "granularity.part=inner",
        "teacher=small (4×4",
        "one attention",
        "part=outer",
    ),
    ("granularity.part=inner", "granularity.part=inner: student=small (2×4 blocks×heads", "part=outer"),
    ("dataset=mnist granularity.part=inner student=report", "student=report (5×4 blocks×heads"),
    ("method=locality student.depth=3", "teacher=small (4×4", "no stages of feature maps"),
    ("granularity.part=iner", "granularity.part=iner", "outer or inner"),
    ("student=tnt student.first_stride=3", "first_stride=3", "patch_size=8", "1, 2, 4 or 8"),
    ("student=swin student.window_size=5", "window_size=5", "16 patches", "one of 1, 2, 4, 8, 16"),
    ("method=token student.distillation_token=false", "student.distillation_token=false", "method=logit"),
    ("method=token teacher=resnet method.attention_weight=1", "teacher=resnet18", "no attention maps"),
    ("method=token method.targets=firm", "method.targets=firm", "hard or soft"),
    ("student.attention=local", "student.attention=local", "msa or lsa"),
    ("student.init=mimesis", "student.init=mimesis", "null, mimetic or weight_selection"),
    ("student.init=mimetic student.embed_dim=30", "student.init=mimetic", "embed_dim=30"),
    ("student.init=weight_selection method=none", "student.init=weight_selection", "by init_from"),
    ("student.init=weight_selection student.depth=5", "student.init=weight_selection", "blocks.4", "larger"),
    ("student.init=weight_selection teacher=swin", "student.init=weight_selection", "another architecture"),
    ("student.init_from=FILES", "student.init_from=", "init=weight_selection alone"),
    ("student.init=weight_selection student.init_from=nowhere", "student.init_from=", "no trained model"),
    ("teacher.init=weight_selection", "teacher.init=weight_selection", "by init_from"),
    ("student=timm student.pretrained=true student.init=mimetic", "student.init=mimetic", "one of the two"),
    ("student=swin student.init=mimetic", "student.init=mimetic", "SwinTransformer"),
    ("method=logit teacher=resnet teacher.depth=4", "teacher.depth"),
    (
        "method=logit teacher=resnet teacher.pretrained=true",
        "pretrained=true",
        "channels=3",
        "pretrained=false",
    ),
    ("method=none student=resnet dataset.batch_size=1", "dataset.batch_size=1", "at least 2 images a step"),
    # classes that are not vitkd's, or not whole
    ("loss._target_=os.system", "loss._target_=os.system", "vitkd's own AttentionLoss"),
    ("student._target_=torch.load", "student._target_=torch.load", "vitkd's own ModelConfig"),
    ("dataset._target_=builtins.open", "dataset._target_=builtins.open", "vitkd's own Dataset"),
    ("method._target_=subprocess.Popen", "method._target_=subprocess.Popen", "vitkd's own Method"),
    ("method._target_=vitkd.cli.os", "method._target_=vitkd.cli.os", "vitkd's own Method"),
    ("optimizer._target_=vitkd.methods.maps.losses.KL", "optimizer._target_=", "vitkd's own Optimizer"),
    ("loss._target_=vitkd.methods.maps.losses.DistributionLoss", "loss._target_="),
    ("dataset._target_=vitkd.data.Dataset", "dataset._target_="),
    # data
    ("dataset=image_folder", "dataset.root=null", "dataset.root=DIR"),
    ("dataset=image_folder dataset.root=nowhere", "nowhere", "dataset.root"),
    ("dataset=tf_flowers dataset.download=false paths.data=nowhere", "nowhere", "by hand", "paths.data=DIR"),
    (
        "dataset=tiny_imagenet dataset.download=false paths.data=nowhere",
        "nowhere",
        "by hand",
        "paths.data=DIR",
    ),
    ("dataset=cifar100 dataset.download=false paths.data=nowhere", "nowhere", "by hand", "paths.data=DIR"),
    # a teacher of one's own
    ("teacher.checkpoint=nowhere.ckpt", "nowhere.ckpt", "no such file", "run folder"),
    ("teacher.checkpoint=FILES", "FILES", "no such file", "run folder"),
    ("teacher.checkpoint=FILES/noise.ckpt", "noise.ckpt", "damaged"),
    ("teacher.checkpoint=FILES/noise.safetensors", "noise.safetensors", "cannot be read"),
    ("teacher.checkpoint=FILES/truncated.safetensors", "truncated.safetensors", "cannot be read"),
    ("teacher.checkpoint=FILES/bomb.ckpt", "bomb.ckpt", "code"),
    ("teacher.checkpoint=FILES/bomb.pickle", "bomb.pickle", "code"),
    ("teacher.checkpoint=FILES/stranger.ckpt", "stranger.ckpt", "not a checkpoint of vitkd's"),
    ("teacher.checkpoint=FILES/headless.ckpt", "headless.ckpt", "does not describe a vitkd model"),
    ("teacher.checkpoint=FILES/seven_classes.safetensors", "num_classes=7", "digits has 10"),
    ("teacher.checkpoint=FILES/large.safetensors", "image_size=16", "digits has 8"),
    ("teacher.checkpoint=FILES/coarse.safetensors", "4×4", "2×2", "method.resize=bilinear"),
    # where to write
    ("paths.outputs=FILES/noise.ckpt", "noise.ckpt"),
    # what is Hydra's own
    ("hydra.job.chdir=true", "hydra.job.chdir=true", "leave it out"),
    ("-m seed=0,1 hydra.job.chdir=true", "hydra.job.chdir=true", "leave it out"),
    ("-m seed=0,1 ~hydra.callbacks.sweep", "hydra.callbacks.sweep"),
    ("hydra.run.dir=/proc/nowhere", "/proc/nowhere", "hydra.run.dir"),
    ("-m seed=0,1 hydra.sweep.dir=/proc/nowhere", "/proc/nowhere", "hydra.sweep.dir"),
    ("hydra.mode=walk", "hydra.mode", "'walk'"),
]
EVALUATE = [
    ("run=nowhere", "run=nowhere", "not a run folder"),
    ("run=FILES", "run=", "not a run folder"),
    ("run=5", "run=5", "not a run folder"),
    ("", "run: "),
    ("rnu=x", "rnu", "did you mean run?"),
    ("run=RUN accelerator=tpuu", "tpuu"),
    ("run=RUN root=nowhere", "root=nowhere", "no such folder"),
]
# Besides settings by which the images would be missing too.
WITHOUT_IMAGES = "dataset=cifar100 dataset.download=false paths.data=nowhere"
TEACHER, STUDENT = "teacher=timm teacher.name=test_vit", "student=timm student.name=test_vit"
MISSING_FILES = [
    (f"{TEACHER} teacher.weights=nowhere.pth", "teacher.weights=", "nowhere.pth: there is no such file"),
    (f"{TEACHER} teacher.weights=nowhere.txt", "teacher.weights=", "nowhere.txt: must be a .safetensors"),
    (f"{TEACHER} teacher.weights=nowhere.pth teacher.trained=false", "teacher.weights=", "no such file"),
    (f"{STUDENT} student.weights=nowhere.pth", "student.weights=", "nowhere.pth: there is no such file"),
    (f"{STUDENT} student.weights=nowhere.pth method=none", "student.weights=", "no such file"),
    ("teacher.checkpoint=nowhere.ckpt", "teacher.checkpoint=", "nowhere.ckpt: there is no such file"),
    ("student=merged student.runs=[nowhere] method=logit", "student.runs=", "no trained student"),
]
# A file of a finished run, what becomes of it, and what the line says beside its name.
DAMAGE = [
    ("checkpoints/last.ckpt", "missing", "no such file"),
    ("checkpoints/last.ckpt", "noise", "damaged"),
    ("checkpoints/last.ckpt", "half", "damaged"),
    ("checkpoints/last.ckpt", "bomb", "sha256"),
    ("student.safetensors", "empty", "cannot be read"),
    ("metrics.json", "missing", "has the run finished?"),
    ("metrics.json", "half", "has the run finished?"),
    ("metrics.json", "a list", "cannot be read"),
    ("config.yaml", "noise", "cannot be read"),
    ("config.yaml", "empty", "cannot be read"),
    ("config.yaml", "half", "cannot be read"),
    ("config.yaml", "a list", "cannot be read"),
    ("config.yaml", "yaml bomb", "cannot be read"),
    ("test_predictions.npz", "missing", "has the run finished?"),
    ("test_predictions.npz", "empty", "cannot be read"),
    ("test_predictions.npz", "half", "cannot be read"),
    ("test_predictions.npz", "noise", "cannot be read"),
]

SHAPE = ViTConfig(
    image_size=8,
    channels=1,
    num_classes=10,
    patch_size=2,
    embed_dim=8,
    depth=1,
    num_heads=4,
    head_dim=4,
    mlp_dim=8,
)


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.file}'",)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Files that somebody might take for a teacher."""
    folder = tmp_path_factory.mktemp("files")
    good = SHAPE.build()
    save_model(good, folder / "good.safetensors")
    changes = {
        "seven_classes": {"num_classes": 7},
        "large": {"image_size": 16},
        "coarse": {"patch_size": 4},
    }
    for name, change in changes.items():
        save_model(replace(SHAPE, **change).build(), folder / f"{name}.safetensors")

    weights = {f"model.{name}": tensor for name, tensor in good.state_dict().items()}
    checkpoint = {"model": describe(good), "state_dict": weights, "epoch": 0}
    torch.save(checkpoint, folder / "good.ckpt")
    torch.save({"weights": weights}, folder / "stranger.ckpt")
    torch.save({**checkpoint, "model": {"config": "ViTConfig", "model": [1]}}, folder / "headless.ckpt")
    bomb = Bomb(folder / "went off")
    torch.save({**checkpoint, "state_dict": bomb}, folder / "bomb.ckpt")
    (folder / "bomb.pickle").write_bytes(pickle.dumps(bomb))

    for suffix in ("ckpt", "safetensors"):
        whole = (folder / f"good.{suffix}").read_bytes()
        (folder / f"truncated.{suffix}").write_bytes(whole[: len(whole) // 2])
        # torch's unpickler stumbles over such bytes in many ways; this one by an index.
        (folder / f"noise.{suffix}").write_bytes(b"0" + bytes(range(256)) * 8)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def is_one_line(ended, *fragments) -> None:
    """The command was refused with one line that holds all `fragments`."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err + ended.out
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize(
    ("line", "fragments"), [(row[0], row[1:]) for row in TRAIN], ids=[r[0] for r in TRAIN]
)
def test_train_refuses(line, fragments, command, files, folder):
    arguments = shlex.split(line.replace("FILES", str(files)))
    outputs = folder / "outputs"

    ended = command("train", *BRIEFLY, f"paths.outputs={outputs}", *arguments)

    is_one_line(ended, *(fragment.replace("FILES", str(files)) for fragment in fragments))
    assert [*folder.iterdir()] == []
    assert not (files / "went off").exists()


@pytest.mark.parametrize(
    ("line", "fragments"), [(r[0], r[1:]) for r in MISSING_FILES], ids=[r[0] for r in MISSING_FILES]
)
def test_a_missing_file_is_named_before_the_images_are_looked_for(line, fragments, command, folder):
    ended = command("train", *BRIEFLY, *shlex.split(f"{WITHOUT_IMAGES} {line}"))

    is_one_line(ended, *fragments)
    assert [*folder.iterdir()] == []


def test_a_missing_folder_of_images_is_named_though_the_classes_are_known(command, folder):
    settings = ("dataset=image_folder", "dataset.root=nowhere", "dataset.num_classes=3", "method=none")

    is_one_line(command("train", *BRIEFLY, *settings), "dataset.root=", "nowhere: there is no such folder")
    assert [*folder.iterdir()] == []


def test_a_file_that_nothing_reads_may_be_missing(command, folder):
    """A student alone has no teacher, whose settings stay where they are."""
    for teacher in (f"{TEACHER} teacher.weights=nowhere.pth", "teacher.checkpoint=nowhere.ckpt"):
        line = f"{WITHOUT_IMAGES} {teacher} method=none"

        is_one_line(command("train", *BRIEFLY, *shlex.split(line)), "cifar100", "by hand")


@pytest.mark.parametrize(
    ("line", "fragments"), [(r[0], r[1:]) for r in EVALUATE], ids=[r[0] for r in EVALUATE]
)
def test_evaluate_refuses(line, fragments, command, files, finished, folder):
    arguments = shlex.split(line.replace("FILES", str(files)).replace("RUN", str(finished)))

    is_one_line(command("evaluate", *arguments), *fragments)
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize(("name", "damage", "says"), DAMAGE, ids=[f"{n} {d}" for n, d, _ in DAMAGE])
def test_evaluate_refuses_a_damaged_run(name, damage, says, command, files, finished, folder, tmp_path):
    shutil.copytree(finished, tmp_path / "damaged")
    file = tmp_path / "damaged" / name
    whole = file.read_bytes()
    file.unlink()
    contents = {
        "noise": bytes(range(256)) * 8,
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "a list": b"[1, 2]\n",
        "bomb": (files / "bomb.ckpt").read_bytes(),
        "yaml bomb": f"!!python/object/apply:os.system ['touch \"{files}/went off\"']".encode(),
    }
    if damage != "missing":
        file.write_bytes(contents[damage])

    is_one_line(command("evaluate", f"run={tmp_path / 'damaged'}"), name, says)
    assert not (files / "went off").exists()
    assert [*folder.iterdir()] == []


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return noise_photos(tmp_path_factory.mktemp("photos"), of_each_class=8, size=32)


@pytest.fixture
def imagenet(tmp_path, monkeypatch) -> Path:
    """Where ImageNet's weights of a ResNet-18 belong, on a machine without a network."""

    def no_network(*_: object, **__: object) -> None:
        raise URLError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    place = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    place.parent.mkdir(parents=True)
    return place


def of_photos(photos: Path) -> list[str]:
    sizes = ["dataset.image_size=32", "dataset.patch_size=8", "dataset.batch_size=4", "student=small"]
    return ["dataset=image_folder", f"dataset.root={photos}", "paths.outputs=outputs", *sizes]


PRETRAINED = [
    "method=token teacher=resnet teacher.pretrained=true",
    "method=logit teacher=resnet teacher.pretrained=true teacher.trained=false",
    "method=none student=resnet student.pretrained=true",
]


@pytest.mark.parametrize("line", PRETRAINED)
def test_weights_of_imagenet_need_a_network(line, command, photos, imagenet, folder):
    ended = command("train", *BRIEFLY, *of_photos(photos), *line.split())

    ways_out = ["connect to a network", "pretrained=false", str(imagenet)]
    is_one_line(ended, "pretrained=true", "resnet18", "name resolution", *ways_out)
    assert [*folder.iterdir()] == []


@pytest.mark.slow
def test_weights_of_imagenet_put_there_by_hand_need_none(command, photos, imagenet, folder):
    torch.save(ResNetConfig(32, 3, 1000).build().network.state_dict(), imagenet)

    ended = command("train", *BRIEFLY, *of_photos(photos), *PRETRAINED[1].split())

    assert ended.code == 0, ended.err
    assert "teacher: resnet18, from ImageNet\n" in ended.out


@pytest.mark.parametrize(
    "damage",
    [
        "bomb",
        *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("half", "noise", "empty")),
        *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("a list", "other weights")),
    ],
)
def test_damaged_weights_of_imagenet_are_one_line(damage, command, files, photos, imagenet, folder, tmp_path):
    weights = ResNetConfig(32, 3, 1000).build().network.state_dict()
    contents = {
        "a list": [1, 2],
        "other weights": {"elsewhere": torch.ones(2)},
        "bomb": Bomb(tmp_path / "went off"),
    }
    torch.save(contents.get(damage, weights), imagenet)
    whole = imagenet.read_bytes()
    raw = {"noise": b"0" + bytes(range(256)) * 8, "empty": b"", "half": whole[: len(whole) // 2]}
    imagenet.write_bytes(raw.get(damage, whole))

    ended = command("train", *BRIEFLY, *of_photos(photos), *PRETRAINED[0].split())

    is_one_line(ended, "pretrained=true", imagenet.name)
    assert not (tmp_path / "went off").exists()
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize("seed", range(3))
def test_no_noise_passes_for_a_checkpoint(seed, command, folder, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (2000,), dtype=torch.uint8, generator=generator)
    (tmp_path / "noise.ckpt").write_bytes(noise.numpy().tobytes())

    ended = command("train", *BRIEFLY, f"teacher.checkpoint={tmp_path / 'noise.ckpt'}")

    is_one_line(ended, "noise.ckpt", "damaged")
    assert [*folder.iterdir()] == []


def test_one_bad_job_of_many_is_named_and_the_others_run(command, folder):
    ended = command("train", "-m", *BRIEFLY, "method=none", "seed=-1,3", "name=run")

    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith("error: job 0 failed: seed=-1: ")
    assert [path.name for path in (folder / "outputs" / "digits").iterdir()] == ["run"]
    assert "job 0 failed: seed=-1: " in ended.out.splitlines()[-1]


@pytest.mark.parametrize("launcher", ["basic", "stacked"])
def test_what_all_jobs_fail_by_is_said_once(launcher, command, folder):
    missing = ["dataset=mnist", "dataset.download=false", f"paths.data={folder / 'nowhere'}"]

    ended = command("train", "-m", f"hydra/launcher={launcher}", *missing, "method=none", "seed=0,1,2")

    first, *others = ended.err.splitlines()
    assert first.startswith("error: job 0 failed: dataset mnist: ")
    assert others == [f"error: job {number} failed: as job 0" for number in (1, 2)]
    assert ended.out.splitlines()[-1].startswith("jobs 0-2 failed: dataset mnist: ")
    assert ended.out.count("failed: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line", "fragments"),
    [
        ("train", "alhpa=0.5", ["alhpa", "did you mean alpha?"]),
        ("train", "alpha=1.5", ["alpha=1.5", "[0, 1]"]),
        ("train", "teacher.checkpoint=FILES/bomb.pickle", ["bomb.pickle", "code"]),
        ("train", "dataset=cifar100 dataset.download=false paths.data=nowhere", ["nowhere", "by hand"]),
        ("evaluate", "run=nowhere", ["run=nowhere", "not a run folder"]),
    ],
)
def test_a_real_process_says_the_same(name, line, fragments, process, files, folder):
    is_one_line(process(name, *shlex.split(line.replace("FILES", str(files))), cwd=folder), *fragments)
    assert [*folder.iterdir()] == []
    assert not (files / "went off").exists()


def test_the_files_are_a_teacher_but_for_their_flaw(files):
    """Else the rows above would be refused for another reason."""
    assert asdict(load_any(files / "good.ckpt").config) == asdict(SHAPE)
    assert asdict(load_any(files / "good.safetensors").config) == asdict(SHAPE)
