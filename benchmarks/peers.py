"""The same training step by other libraries: how many times longer theirs takes than vitkd's.

Every arm trains the report's student (dropout as configured) beside its frozen teacher on one batch of 64, by
the same fused AdamW. All start from the same weights, copied; parameter counts, map shapes and, with dropout
off, loss values are asserted to be equal before anything is timed. The ratio is the peer's time by vitkd's.

Maps are compared, by KL on attention weights and with the class loss at alpha 0.5, in
  `last block`: the student's last block learns from the teacher's last;
  `encoder`: every student block learns;
  `middle`: the student's last block learns from the middle of the teacher, above which vitkd runs nothing.
by
  torchdistill's DistillationBox on vit-pytorch's ViT: its forward hooks keep the softmax's input of the
      blocks asked for, its loss box weighs class loss and our KL. It runs the whole teacher, and the model
      computes every block's attention matrix, for hooks cannot look into fused attention.
  vit-pytorch's Recorder around the teacher, which keeps, clones and detaches the weights of all blocks of a
      whole teacher. Detached, it could train no student, so the student's blocks have a plain forward hook.

Rows marked `no dropout` train without it: vitkd draws its masks faster on a CPU, which is a part of the other
rows' ratios. On a GPU, ratios are to vitkd's step by CUDA graph, as runs take it.

`logits` has no maps: the tasks that come with these libraries learn from the teacher's logits or features,
which takes its whole forward; they are set beside vitkd's `last block`.
  timm.task.LogitDistillationTask and FeatureDistillationTask around vitkd's own, faster models (timm's ViT
      ties head_dim to embed_dim / num_heads, so it cannot have the report's shape).
  vit-pytorch's DistillWrapper with its DistillableViT: a distillation token more, which learns from logits
      (18 tokens; 64 + 64·100 + 100 parameters more).

`timm` is `teacher=timm student=timm`, two vision transformers on 65 tokens, beside the same step `by hand`:
timm's networks, whose last blocks give up fused attention for a hook on what their softmax gives.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.task import FeatureDistillationTask, LogitDistillationTask
from torch import Tensor, nn
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses.registry import register_low_level_loss
from vit_pytorch.distill import DistillableViT, DistillWrapper
from vit_pytorch.recorder import Recorder
from vit_pytorch.vit import ViT as VitPytorch

from benchmarks import subject
from benchmarks.harness import Bar, Row, Settings, divided, interleave, row
from benchmarks.harness import main as run
from benchmarks.step import DRY
from vitkd.config.run import Config
from vitkd.data import Batch
from vitkd.methods.maps.granularity import Block, Encoder, Granularity
from vitkd.methods.maps.losses import KL, AttentionLoss
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.models import ViT, ViTConfig, count_parameters
from vitkd.train.cuda_graph import WARM_UP

NO_SLOWER, TRUNCATED = Bar(1, at_least=True), Bar(1.5, at_least=True)
# timm's own step may take 1/1.05 of ours.
AS_FAST = Bar(round(1 / 1.05, 3), at_least=True)
ON_GPU = Bar(10, at_least=True)
GRAPHED = "vitkd, CUDA graph"

TIMM = [
    *(
        "teacher=timm",
        "teacher.img_size=32",
        "teacher.patch_size=4",
        "teacher.embed_dim=192",
        "teacher.depth=12",
    ),
    *("teacher.num_heads=3", "student=timm", "student.img_size=32", "student.patch_size=4"),
    *("student.embed_dim=96", "student.depth=6", "student.num_heads=3"),
]
"""ViT-Tiny, and a student of half its width and depth"""
TINY_TIMM = [
    *(
        f"{model}.{size}"
        for model in ("teacher", "student")
        for size in ("embed_dim=12", "depth=2", "num_heads=3")
    ),
    *("teacher=timm", "teacher.img_size=32", "teacher.patch_size=8", "dataset.batch_size=4"),
    *("student=timm", "student.img_size=32", "student.patch_size=8"),
]

Loss = Callable[[], Tensor]


@dataclass
class Arm:
    """One library's way to train a student."""

    student: nn.Module
    loss: Loss
    """The batch's loss."""
    besides: Sequence[nn.Parameter] = ()
    """What is trained besides the student."""


def measure(settings: Settings) -> list[Row]:
    """Time every library's step on every kind of maps, and on logits."""
    rows = []
    for suffix, overrides in {"": (), DRY: ("student.dropout=0", "student.emb_dropout=0")}.items():
        config = subject.configure(settings, *overrides)
        batch = subject.random_batch(config, settings.device)
        teacher = subject.build_teacher(config, settings.device)
        middle = Block(teacher_blocks=[len(teacher.blocks) // 2 - 1])
        for name, granularity in {"last block": Block(), "encoder": Encoder(), "middle": middle}.items():
            bar = TRUNCATED if name == "middle" else NO_SLOWER
            arms = on_maps(config, teacher, batch, granularity)
            assert_equal_losses({library: arm for library, arm in arms.items() if library != GRAPHED})
            rows += compare(name, suffix, arms, config, settings, bar)
        arms = {**vitkd_arms(config, teacher, batch, Block()), **on_logits(config, teacher, batch)}
        rows += compare("logits", suffix, arms, config, settings, NO_SLOWER)
    config = subject.configure(replace(settings, quick=False), *(TINY_TIMM if settings.quick else TIMM))
    arms = on_timm(config, settings.device)
    assert_equal_losses({library: arm for library, arm in arms.items() if library != GRAPHED})
    return rows + compare("timm", "", arms, config, settings, AS_FAST)


def compare(
    name: str, suffix: str, arms: Mapping[str, Arm], config: Config, settings: Settings, bar: Bar
) -> list[Row]:
    """Each arm's milliseconds a step, and its ratio to vitkd's, as a run takes it on this device."""
    steps = {}
    for library, arm in arms.items():
        arm.student.train()
        parameters = [*arm.student.parameters(), *arm.besides]
        steps[library] = subject.training_step(
            parameters, config.optimizer, arm.loss, graphed=library == GRAPHED
        )
    samples = interleave(steps, settings, repeat=1 if settings.on_cpu else 10, warmup=WARM_UP + 1)
    ours = "vitkd" if settings.on_cpu else GRAPHED
    return [
        row(
            f"{name}: {library}{suffix}",
            times,
            ratio=divided(times, samples[ours]),
            bar=None if library.startswith("vitkd") else bar if settings.on_cpu else ON_GPU,
        )
        for library, times in samples.items()
    ]


def on_maps(config: Config, teacher: ViT, batch: Batch, granularity: Granularity) -> dict[str, Arm]:
    """The libraries that compare maps, vitkd first."""
    return {
        **vitkd_arms(config, teacher, batch, granularity),
        "torchdistill": torchdistill_box(config, teacher, batch, granularity),
        "vit-pytorch Recorder": vit_pytorch_recorder(config, teacher, batch, granularity),
    }


def on_logits(config: Config, teacher: ViT, batch: Batch) -> dict[str, Arm]:
    """The libraries' own tasks, which learn from logits or features."""
    return {
        "timm logits": timm_task(LogitDistillationTask, config, teacher, batch),
        "timm features": timm_task(FeatureDistillationTask, config, teacher, batch),
        "vit-pytorch DistillWrapper": vit_pytorch_wrapper(config, teacher, batch),
    }


def vitkd_arms(config: Config, teacher: ViT, batch: Batch, granularity: Granularity) -> dict[str, Arm]:
    """vitkd's step, on a GPU both step by step and, as runs take it, by CUDA graph."""
    names = ["vitkd"] if batch.image.device.type == "cpu" else ["vitkd", GRAPHED]
    return {name: ours(config, teacher, batch, granularity) for name in names}


def ours(config: Config, teacher: ViT, batch: Batch, granularity: Granularity) -> Arm:
    """vitkd's own step."""
    student = subject.build_student(config, batch.image.device)
    objective = subject.objective_of(student, teacher, granularity, KL())
    scores = partial(subject.recorded, teacher, objective.teacher_taps.scores)
    return Arm(student, partial(subject.distilled_loss, student, objective, scores, batch, config.alpha))


def on_timm(config: Config, device: torch.device) -> dict[str, Arm]:
    """Two of timm's transformers, by vitkd and by hand."""
    batch, teacher = subject.random_batch(config, device), subject.build_teacher(config, device)
    return {**vitkd_arms(config, teacher, batch, Block()), "by hand": timm_by_hand(config, teacher, batch)}


def timm_by_hand(config: Config, teacher: Any, batch: Batch) -> Arm:
    """The step that one writes with timm alone: its networks, and a hook on each last block's softmax."""
    kept: dict[int, Tensor] = {}
    networks = []
    for number, model in enumerate((subject.build_student(config, batch.image.device), teacher)):
        c: Any = model.config
        network = timm.create_model(c.name, num_classes=c.num_classes, **c.options).to(batch.image.device)
        network.load_state_dict(model.network.state_dict())
        attention = network.blocks[-1].attn
        attention.fused_attn = False
        attention.attn_drop.register_forward_hook(partial(keep, kept, number))
        networks.append(network)
    student, their_teacher = networks
    their_teacher.requires_grad_(False).eval()
    # The same affine change of the images: here CIFAR's normalisation becomes that of timm's configuration.
    inputs = teacher.inputs

    def loss() -> Tensor:
        images = inputs(batch.image)
        logits = student(images)
        with torch.no_grad():
            their_teacher(images)
        attention = divergence(kept[1], kept[0])
        return config.alpha * F.cross_entropy(logits, batch.label) + (1 - config.alpha) * attention

    return Arm(student, loss)


def torchdistill_box(config: Config, teacher: ViT, batch: Batch, granularity: Granularity) -> Arm:
    """Hooks on the softmax's input, as torchdistill's configuration files set them; its own loss box."""
    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    student = subject.build_student(config, batch.image.device)
    objective = subject.objective_of(student, teacher, granularity, KL())
    their_teacher, their_student = counterpart(teacher), counterpart(student)
    box = DistillationBox(
        their_teacher.requires_grad_(False).eval(),
        their_student,
        dataset_dict={},
        train_config={
            "num_epochs": 1,
            "teacher": {"requires_grad": False, **hooked(objective.teacher_taps.scores)},
            "student": hooked(objective.student_taps.scores),
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": loss_terms(objective, config.alpha)},
            },
        },
        device=batch.image.device,
        device_ids=None,
        distributed=False,
        lr_factor=1,
    )
    return Arm(their_student, lambda: box.forward_process(batch.image, batch.label))


def hooked(blocks: Sequence[int]) -> dict[str, Any]:
    """torchdistill's configuration of a model whose scores of `blocks` are kept."""
    return {
        "forward_proc": "forward_batch_only",
        "forward_hook": {"input": [softmax_of(block) for block in blocks]},
    }


def loss_terms(objective: AttentionObjective, alpha: float) -> dict[str, Any]:
    """torchdistill's configuration of alpha·L_class + (1 − alpha)·L_att."""
    labels = {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
        "criterion_wrapper": compared(".", "output", {"uses_label": True}),
        "weight": alpha,
    }
    terms = {"labels": labels}
    for pair in objective.pairs:
        scores = {"is_from_teacher": True, "module_path": softmax_of(pair.teacher_block), "io": "input"}
        terms[f"maps of block {pair.student_block}"] = {
            "criterion": {"key": "FirstHeads", "kwargs": {"loss": objective.loss}},
            "criterion_wrapper": compared(softmax_of(pair.student_block), "input", scores),
            "weight": (1 - alpha) / len(objective.pairs),
        }
    return terms


def compared(module: str, io: str, target: Mapping[str, Any]) -> dict[str, Any]:
    """torchdistill's way to say that a student module's input or output goes into a loss with `target`."""
    source = {"is_from_teacher": False, "module_path": module, "io": io}
    return {"key": "SimpleLossWrapper", "kwargs": {"input": source, "target": dict(target)}}


@register_low_level_loss
class FirstHeads(nn.Module):
    """vitkd's loss between a student block's scores and as many heads of a teacher block's."""

    def __init__(self, loss: AttentionLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(student, self.loss.target(teacher[:, : student.shape[1]])).mean()


def softmax_of(block: int) -> str:
    """The module of vit-pytorch's ViT whose input are a block's scores, its output the weights."""
    return f"transformer.layers.{block}.0.attend"


def vit_pytorch_recorder(config: Config, teacher: ViT, batch: Batch, granularity: Granularity) -> Arm:
    """The teacher in a Recorder, the student's maps by plain hooks."""
    student = subject.build_student(config, batch.image.device)
    objective = subject.objective_of(student, teacher, granularity, KL())
    recorder = Recorder(counterpart(teacher).requires_grad_(False).eval())
    their_student = counterpart(student)
    kept: dict[int, Tensor] = {}
    for block in objective.student_taps.scores:
        hook = partial(keep, kept, block)
        their_student.get_submodule(softmax_of(block)).register_forward_hook(hook)

    def loss() -> Tensor:
        logits = their_student(batch.image)
        with torch.no_grad():
            _, weights = recorder(batch.image)
        divergences = [
            divergence(weights[:, pair.teacher_block, : len(pair.student_heads)], kept[pair.student_block])
            for pair in objective.pairs
        ]
        attention = torch.stack(divergences).mean()
        return config.alpha * F.cross_entropy(logits, batch.label) + (1 - config.alpha) * attention

    return Arm(their_student, loss)


def keep(kept: dict[int, Tensor], block: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
    """Forward hook that keeps the output, with its graph."""
    kept[block] = output


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) of attention weights [B, H, T, T], the mean over images, heads and queries."""
    return F.kl_div(q.log(), p, reduction="sum") / p[..., 0].numel()


class Timm(nn.Module):
    """vitkd's ViT with what timm's tasks ask a model for."""

    def __init__(self, model: ViT) -> None:
        super().__init__()
        self.model = model
        c = model.config
        self.num_classes, self.in_chans, self.num_features = c.num_classes, c.channels, c.embed_dim
        self.head_hidden_size = c.embed_dim
        self.pretrained_cfg = {"mean": (0.5,) * c.channels, "std": (0.5,) * c.channels}

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).logits
        return logits

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens [B, T, D] after the last norm."""
        x = self.model.embed(images)
        for block in self.model.blocks:
            x, _ = block(x)
        normed: Tensor = self.model.norm(x)
        return normed

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token [B, D], or its logits."""
        features = tokens[:, 0]
        return features if pre_logits else self.model.head(features)


def timm_task(
    kind: type[LogitDistillationTask] | type[FeatureDistillationTask],
    config: Config,
    teacher: ViT,
    batch: Batch,
) -> Arm:
    """One of timm's tasks around vitkd's models."""
    student = Timm(subject.build_student(config, batch.image.device))
    task = kind(
        student_model=student,
        teacher_model=Timm(teacher),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=config.alpha,
        device=batch.image.device,
        verbose=False,
    )
    assert sum(parameter.requires_grad for parameter in task.parameters()) == len([*student.parameters()])
    return Arm(student, lambda: task(batch.image, batch.label)["loss"])


def vit_pytorch_wrapper(config: Config, teacher: ViT, batch: Batch) -> Arm:
    """DistillWrapper: the student's distillation token learns from the teacher's logits."""
    device = batch.image.device
    student = counterpart(subject.build_student(config, device), DistillableViT)
    their_teacher = counterpart(teacher).requires_grad_(False).eval()
    wrapper = DistillWrapper(teacher=their_teacher, student=student, alpha=1 - config.alpha).to(device)
    own = [wrapper.distillation_token, *wrapper.distill_mlp.parameters()]
    return Arm(student, lambda: wrapper(batch.image, batch.label), own)


def counterpart(ours: ViT, kind: type[nn.Module] = VitPytorch) -> nn.Module:
    """vit-pytorch's ViT with the same sizes, dropout and weights."""
    c = ours.config
    theirs = kind(
        image_size=c.image_size,
        patch_size=c.patch_size,
        channels=c.channels,
        num_classes=c.num_classes,
        dim=c.embed_dim,
        depth=c.depth,
        heads=c.num_heads,
        dim_head=c.head_dim,
        mlp_dim=c.mlp_dim,
        dropout=c.dropout,
        emb_dropout=c.emb_dropout,
    )
    theirs.load_state_dict(renamed(ours))
    assert count_parameters(theirs) == count_parameters(ours)
    return theirs.to(ours.head.weight.device)


def renamed(ours: ViT) -> dict[str, Tensor]:
    """vitkd's weights under vit-pytorch's names."""
    own, c = ours.state_dict(), ours.config
    names = {
        "norm": "transformer.norm",
        "head": "mlp_head",
        "tokenizer.projection_norm": "to_patch_embedding.3",
    }
    for i in range(c.depth):
        block, layer = f"blocks.{i}", f"transformer.layers.{i}"
        names |= {f"{block}.attention.norm": f"{layer}.0.norm", f"{block}.attention.qkv": f"{layer}.0.to_qkv"}
        names |= {f"{block}.attention.out": f"{layer}.0.to_out.0", f"{block}.mlp.norm": f"{layer}.1.net.0"}
        names |= {f"{block}.mlp.expand": f"{layer}.1.net.1", f"{block}.mlp.contract": f"{layer}.1.net.4"}
    theirs = {"cls_token": own["cls_token"][0], "pos_embedding": own["positions"][0]}
    for name, tensor in own.items():
        module, _, kind = name.rpartition(".")
        if module in names:
            theirs[f"{names[module]}.{kind}"] = tensor
    patches = {"patch_norm.weight": "1.weight", "patch_norm.bias": "1.bias", "projection.weight": "2.weight"}
    for name, their_name in patches.items():
        theirs[f"to_patch_embedding.{their_name}"] = channels_last(own[f"tokenizer.{name}"], c)
    return theirs | {"to_patch_embedding.2.bias": own["tokenizer.projection.bias"]}


def channels_last(pixels: Tensor, config: ViTConfig) -> Tensor:
    """A patch's pixels on the last axis, from vitkd's (channel, row, column) to (row, column, channel)."""
    shape = (config.channels, config.patch_size, config.patch_size)
    return pixels.unflatten(-1, shape).movedim(-3, -1).flatten(-3)


def assert_equal_losses(arms: Mapping[str, Arm]) -> None:
    """The libraries compute the same loss on the same batch, dropout aside."""
    values = []
    for arm in arms.values():
        arm.student.eval()
        values.append(arm.loss().detach())
    torch.testing.assert_close(values, [values[0]] * len(values), rtol=1e-4, atol=1e-5)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return run("peers", __doc__, measure, argv, rounds=20)


if __name__ == "__main__":
    main()
