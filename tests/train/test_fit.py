"""Real fits of tiny models: what trains, what stays, what is logged and what is kept."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

from tests.train.objectives import compare_maps
from vitkd.data import Batch
from vitkd.methods.token import TokenObjective
from vitkd.models import Model, ResNetConfig, Taps, ViT, build_from_header
from vitkd.optim import AdamW, Constant, WarmupCosine
from vitkd.train.averaging import WarmAverage
from vitkd.train.module import DistillModule

pytestmark = [
    # Lightning 2.6 asks for a tree's leaves in a way that newer PyTorch deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]
# Lightning remarks on a missing validation loader; a run may go without.
without_validation = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class Batches:
    """A loader of the same random batches in every epoch."""

    def __init__(self, *sizes: int) -> None:
        self.batches = [
            Batch(torch.randn(n, 3, 8, 8), torch.randint(5, (n,)), torch.arange(n)) for n in sizes
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class Curves(CSVLogger):
    """Keeps what was logged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, metrics))

    def of(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.logged if name in metrics}


class Watch(L.Callback):
    """Notes the student's weights after every step, and the learning rate that step was taken with."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.weights.append(torch.nn.utils.parameters_to_vector(module.model.parameters()).detach().clone())


@pytest.fixture
def teacher(tiny) -> ViT:
    return tiny(depth=6, num_heads=2, dropout=0.3, emb_dropout=0.3).build()


@pytest.fixture
def student(tiny) -> ViT:
    return tiny(dropout=0.1, emb_dropout=0.1).build()


@pytest.fixture
def run(tmp_path):
    """Fits a module on the CPU, from the same random state each time, and returns the Trainer."""

    def run(module: DistillModule, train: Batches, val: Batches | None = None, **settings: Any) -> L.Trainer:
        quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones")
        defaults = {"max_epochs": 2, "log_every_n_steps": 1, "logger": False, "num_sanity_val_steps": 1}
        trainer = L.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            **dict.fromkeys(quiet, False),
            **(defaults | settings),
        )
        torch.manual_seed(7)
        trainer.fit(module, train, val)
        return trainer

    return run


def distill(student: ViT, teacher: ViT, alpha: float, schedule=None) -> DistillModule:
    return DistillModule(
        student,
        AdamW(lr=1e-2),
        schedule or Constant(),
        teacher=teacher,
        objective=compare_maps(student, teacher),
        alpha=alpha,
    )


def test_the_student_learns_and_the_teacher_is_left_as_it_was(student, teacher, run):
    before, start = deepcopy(teacher.state_dict()), deepcopy(student.state_dict())

    run(distill(student, teacher, alpha=0.5), Batches(6, 6, 4), Batches(5))

    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(torch.equal(tensor, start[name]) for name, tensor in student.state_dict().items())


def test_the_teacher_is_in_eval_mode_during_training(student, teacher, run):
    seen = []
    teacher.blocks[0].register_forward_hook(lambda module, *_: seen.append(module.training))

    run(distill(student, teacher, alpha=0.5), Batches(6, 6), Batches(5))

    assert (
        len(seen) == 1 + 2 * 3
    )  # the sanity check, then two epochs of two training and one validation batch
    assert not any(seen)


def test_train_mode_is_the_students_alone(student, teacher):
    module = distill(student, teacher, alpha=0.5).eval()

    module.train()

    assert all(m.training for m in student.modules())
    assert not any(m.training for m in teacher.modules())


def test_alpha_1_is_the_student_alone_bit_for_bit(student, teacher, run):
    """With dropout, so that one random number more or less would show."""
    train, val = Batches(6, 6, 4), Batches(5)
    alone, beside = Watch(), Watch()

    run(DistillModule(deepcopy(student), AdamW(lr=1e-2), Constant()), train, val, callbacks=[alone])
    run(distill(deepcopy(student), teacher, alpha=1.0), train, val, callbacks=[beside])

    assert len(alone.weights) == 6
    for step, (a, b) in enumerate(zip(alone.weights, beside.weights, strict=True)):
        assert torch.equal(a, b), f"step {step}"


def through_a_token(student: ViT, teacher: Model, alpha: float) -> DistillModule:
    """The token's loss, and that of all attention maps."""
    objective = TokenObjective("hard", 1.0, compare_maps(student, teacher), weight=0.5)
    return DistillModule(
        student, AdamW(lr=1e-2), Constant(), teacher=teacher, objective=objective, alpha=alpha
    )


def test_alpha_1_with_two_heads_is_the_student_alone_bit_for_bit(tiny, teacher, run):
    student = tiny(distillation_token=True, attention="lsa", dropout=0.1, emb_dropout=0.1).build()
    train, val = Batches(6, 6, 4), Batches(5)
    alone, beside = Watch(), Watch()

    run(DistillModule(deepcopy(student), AdamW(lr=1e-2), Constant()), train, val, callbacks=[alone])
    run(through_a_token(deepcopy(student), teacher, alpha=1.0), train, val, callbacks=[beside])

    assert len(alone.weights) == 6
    for step, (a, b) in enumerate(zip(alone.weights, beside.weights, strict=True)):
        assert torch.equal(a, b), f"step {step}"


def test_each_head_has_a_curve_of_its_own(tiny, teacher, run, tmp_path):
    student, val, curves = tiny(distillation_token=True).build(), Batches(7, 7, 2), Curves(tmp_path)

    logged = run(
        through_a_token(student, teacher, alpha=0.5), Batches(6), val, logger=curves
    ).callback_metrics

    images, labels = (torch.cat(parts) for parts in list(zip(*val, strict=True))[:2])
    ours, answers = student.eval()(images), teacher(images).logits.argmax(-1)
    class_token, distillation_token = ours.heads["class_token"], ours.heads["distillation_token"]
    expected = {
        "val/acc": (ours.logits.argmax(-1) == labels).float().mean(),
        "val/acc_class_token": (class_token.argmax(-1) == labels).float().mean(),
        "val/acc_distillation_token": (distillation_token.argmax(-1) == labels).float().mean(),
        "val/teacher_agreement": (ours.logits.argmax(-1) == answers).float().mean(),
        "val/class_loss": F.cross_entropy(class_token, labels),
        "val/token_loss": F.cross_entropy(distillation_token, answers),
    }
    for name, value in expected.items():
        assert logged[name].item() == pytest.approx(value.item(), rel=1e-5), name
    maps = [logged[f"val/map_loss/{block}.{head}"].item() for block in range(3) for head in range(2)]
    transfer = logged["val/token_loss"].item() + 0.5 * sum(maps) / 6
    assert logged["val/transfer_loss"].item() == pytest.approx(transfer, rel=1e-5)
    for name in ("acc_class_token", "acc_distillation_token", "token_loss", "map_loss/0.1"):
        assert list(curves.of(f"train/{name}")) == [1, 2], name


def test_a_student_alone_has_its_heads_curves_too(tiny, run):
    student = tiny(distillation_token=True).build()

    logged = run(DistillModule(student, AdamW(), Constant()), Batches(6), Batches(5)).callback_metrics

    assert {"val/acc_class_token", "val/acc_distillation_token", "train/acc_class_token"} <= logged.keys()


def test_a_convolutional_teacher_is_left_as_it_was(tiny, run):
    """Its running statistics, too."""
    student, teacher = tiny(distillation_token=True).build(), ResNetConfig(8, 3, 5).build()
    before = deepcopy(teacher.state_dict())
    objective = TokenObjective("soft", 2.0)
    module = DistillModule(student, AdamW(), Constant(), teacher=teacher, objective=objective, alpha=0.5)

    run(module, Batches(6, 6), Batches(5))

    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("attention", ["msa", "lsa"])
@without_validation
def test_weights_can_be_averaged_beside_a_mask(attention, tiny, teacher, run):
    student = tiny(attention=attention).build()
    objective = compare_maps(student, teacher)
    module = DistillModule(student, AdamW(), Constant(), teacher=teacher, objective=objective, alpha=0.5)

    run(module, Batches(6, 6), callbacks=[WarmAverage(0.9)])

    if attention == "lsa":
        for alignment in objective.alignments:
            assert torch.equal(alignment.allowed, ~torch.eye(5, dtype=torch.bool))


@without_validation
def test_alpha_below_1_is_something_else(student, teacher, run):
    train = Batches(6)
    alone, beside = Watch(), Watch()

    run(DistillModule(deepcopy(student), AdamW(lr=1e-2), Constant()), train, callbacks=[alone])
    run(distill(deepcopy(student), teacher, alpha=0.9), train, callbacks=[beside])

    assert not torch.equal(alone.weights[0], beside.weights[0])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5])
def test_alpha_weighs_the_class_loss(student, teacher, alpha):
    (batch,) = Batches(6)

    losses = distill(student, teacher, alpha).eval().losses(batch)

    logits = student(batch.image).logits
    class_loss, transfer_loss = losses.class_loss.item(), losses.transfer.loss.item()
    assert class_loss == pytest.approx(F.cross_entropy(logits, batch.label).item())
    assert transfer_loss == pytest.approx(losses.transfer.values.mean().item())
    assert losses.total.item() == pytest.approx(alpha * class_loss + (1 - alpha) * transfer_loss)
    if alpha == 0:
        assert torch.equal(losses.total, losses.transfer.loss)


@without_validation
def test_attention_alone_draws_near_to_the_teacher(student, teacher, run, tmp_path):
    curves = Curves(tmp_path)

    run(distill(student, teacher, alpha=0.0), Batches(8), max_epochs=40, logger=curves)

    transfer = curves.of("train/transfer_loss")
    assert transfer[40] < transfer[1] / 2
    assert curves.of("train/total_loss") == transfer


@without_validation
def test_a_checkpoint_holds_the_student_alone_and_loads_without_code(student, teacher, run, tmp_path):
    trainer = run(distill(student, teacher, alpha=0.5), Batches(6, 6))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)

    weights = {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}
    rebuilt = build_from_header(checkpoint["model"], tmp_path / "last.ckpt")
    rebuilt.load_state_dict(weights, assign=True)
    (optimised,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert len(optimised["params"]) == len(list(student.parameters()))
    for name, tensor in student.state_dict().items():
        assert torch.equal(weights[name], tensor), name


@without_validation
def test_training_resumes_from_a_checkpoint_without_teacher_weights(student, teacher, run, tmp_path):
    whole, train = Watch(), Batches(6, 6)
    first = deepcopy(student)
    trainer = run(distill(first, teacher, alpha=0.5), train, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = distill(deepcopy(student), teacher, alpha=0.5)
    before = deepcopy(teacher.state_dict())

    def resume() -> torch.Tensor:
        trainer = L.Trainer(
            accelerator="cpu", default_root_dir=tmp_path, max_epochs=2, logger=False, callbacks=[whole],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(fresh, train, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
        return whole.weights[0]

    resumed_step = resume()

    assert len(whole.weights) == 2
    start, old = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in (student, first))
    assert (resumed_step - old).norm() < (resumed_step - start).norm()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@without_validation
def test_gradient_norms_equal_separate_backward_passes(tiny, teacher, run, tmp_path):
    student, train, alpha = tiny().build(), Batches(6), 0.25
    expected = {}
    for term in ("class", "transfer"):
        copy = deepcopy(student)
        losses = distill(copy, deepcopy(teacher), alpha).losses(train.batches[0])
        (losses.class_loss if term == "class" else losses.transfer.loss).backward()
        squares = [p.grad.square().sum().item() for p in copy.parameters() if p.grad is not None]
        expected[term] = sum(squares) ** 0.5
    curves = Curves(tmp_path)

    run(distill(student, teacher, alpha), train, max_epochs=1, logger=curves)

    ((_, logged),) = curves.logged
    assert logged["train/gradient_norm_class"] == pytest.approx(expected["class"], rel=1e-5)
    assert logged["train/gradient_norm_transfer"] == pytest.approx(expected["transfer"], rel=1e-5)
    ratio = (1 - alpha) * expected["transfer"] / (alpha * expected["class"])
    assert logged["train/gradient_ratio"] == pytest.approx(ratio, rel=1e-5)


@without_validation
def test_measuring_gradients_changes_nothing(student, teacher, run):
    train = Batches(6, 6, 6)
    often, rarely = Watch(), Watch()

    run(distill(deepcopy(student), teacher, alpha=0.5), train, callbacks=[often], log_every_n_steps=1)
    run(distill(deepcopy(student), teacher, alpha=0.5), train, callbacks=[rarely], log_every_n_steps=100)

    assert all(torch.equal(a, b) for a, b in zip(often.weights, rarely.weights, strict=True))


def test_validation_means_are_exact_over_uneven_batches(student, teacher, run):
    val = Batches(7, 7, 2)

    logged = run(distill(student, teacher, alpha=0.5), Batches(6), val).callback_metrics

    images, labels = (torch.cat(parts) for parts in list(zip(*val, strict=True))[:2])
    ours, theirs = (
        student.eval()(images, Taps(scores=(0, 1, 2))),
        teacher(images, Taps(scores=tuple(range(6)))),
    )
    rows = [
        F.kl_div(ours.scores[i].log_softmax(-1), theirs.scores[2 * i + 1].softmax(-1), reduction="none")
        for i in range(3)
    ]
    per_map = torch.stack([row.sum(-1).mean((0, 2)) for row in rows])  # [block, head]
    expected = {
        "val/class_loss": F.cross_entropy(ours.logits, labels),
        "val/acc": (ours.logits.argmax(-1) == labels).float().mean(),
        "val/teacher_agreement": (ours.logits.argmax(-1) == theirs.logits.argmax(-1)).float().mean(),
        "val/transfer_loss": per_map.mean(),
        **{f"val/map_loss/{i}.{h}": per_map[i, h] for i in range(3) for h in range(2)},
    }
    for name, value in expected.items():
        assert logged[name].item() == pytest.approx(value.item(), rel=1e-5), name


@without_validation
def test_training_curves_are_means_over_the_window_since_the_last(tiny, teacher, run, tmp_path):
    """Two steps a window and an uneven last one; a learning rate so small that the model stands still."""
    student, train, curves = tiny().build(), Batches(6, 4, 5), Curves(tmp_path)
    module = distill(student, teacher, alpha=0.5)
    module.optimizer = AdamW(lr=1e-12)

    run(module, train, max_epochs=1, logger=curves, log_every_n_steps=2)

    def loss(*batches: Batch) -> float:
        images, labels = torch.cat([b.image for b in batches]), torch.cat([b.label for b in batches])
        return F.cross_entropy(student(images).logits, labels).item()

    expected = {2: loss(*train.batches[:2]), 3: loss(train.batches[2])}
    assert curves.of("train/class_loss") == pytest.approx(expected, rel=1e-5)


@without_validation
def test_accumulated_batches_are_one_step_and_one_window(tiny, run, tmp_path):
    curves = Curves(tmp_path)
    module = DistillModule(tiny().build(), AdamW(), Constant())

    run(module, Batches(4, 4, 4, 4), max_epochs=1, accumulate_grad_batches=2, logger=curves)

    assert [step for step, _ in curves.logged] == [1, 2]


@without_validation
def test_the_schedule_decides_the_rate_of_every_step(student, teacher, run):
    watch, schedule = Watch(), WarmupCosine(warmup=0.5, final=0.1)

    run(distill(student, teacher, alpha=0.5, schedule=schedule), Batches(6, 6, 6), callbacks=[watch])

    assert watch.rates == pytest.approx([1e-2 * schedule.factor(step, 6) for step in range(6)])


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("teacher_patch", [4, 2], ids=["equal-grids", "resized"])
def test_other_precisions_train_and_count_right(student, tiny, run, precision, teacher_patch):
    teacher = tiny(patch_size=teacher_patch).build()
    objective = compare_maps(student, teacher)
    module = DistillModule(student, AdamW(), Constant(), teacher=teacher, objective=objective, alpha=0.5)
    val = Batches(*[7] * 40)

    logged = run(module, Batches(6), val, precision=precision, max_epochs=1).callback_metrics

    with torch.no_grad():
        each = [F.cross_entropy(student.float().eval()(b.image).logits, b.label).item() for b in val]
    assert logged["val/class_loss"].item() == pytest.approx(sum(each) / len(each), rel=0.02)
    assert 0 < logged["val/transfer_loss"].item() < 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_class_loss_is_computed_in_float32(student, dtype):
    logits, label = torch.randn(7, 5).to(dtype), torch.arange(7) % 5

    loss = DistillModule(student, AdamW(), Constant()).class_loss(logits, label)

    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(logits.float(), label))


@without_validation
def test_a_run_without_validation_data(student, run):
    logged = run(DistillModule(student, AdamW(), Constant()), Batches(6)).callback_metrics

    assert "train/class_loss" in logged
    assert not any(name.startswith("val/") for name in logged)


def names_of(module: torch.nn.Module) -> set[str]:
    return {*dict(module.named_parameters()), *dict(module.named_buffers()), *module.state_dict()}


def test_the_teacher_is_no_part_of_what_is_trained_or_saved(student, teacher):
    module = distill(student, teacher, alpha=0.5)
    alone = DistillModule(student, AdamW(), Constant())

    assert names_of(module) == names_of(alone)
    assert not {id(p) for p in module.parameters()} & {id(p) for p in teacher.parameters()}
    assert teacher not in [*module.modules()]
    module.zero_grad()
    module.requires_grad_(True)
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    "move",
    [lambda m: m.to(torch.float64), lambda m: m.bfloat16(), lambda m: m.to("meta")],
    ids=["to", "cast", "device"],
)
def test_the_teacher_goes_where_the_student_goes(move, student, teacher):
    module = distill(student, teacher, alpha=0.5)

    assert move(module) is module

    (kind,) = {(p.dtype, p.device) for p in [*module.parameters(), *module.teacher.parameters()]}
    assert kind != (torch.float32, torch.device("cpu"))
    assert module.teacher is teacher


def test_a_copy_has_a_teacher_of_its_own_that_knows_as_much(student, teacher):
    module = distill(student, teacher, alpha=0.5)
    (batch,) = Batches(6)

    copy = deepcopy(module).eval()

    assert copy.teacher is not teacher
    assert not any(p.requires_grad for p in copy.teacher.parameters())
    assert torch.equal(copy.losses(batch).total, module.eval().losses(batch).total)
    copy.double()
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_an_average_is_of_the_students_weights_alone(student, teacher, run, alpha):
    """Validated and kept; worked out step by step."""
    train, watch, decay = Batches(6, 6, 6), Watch(), 0.75
    average = EMAWeightAveraging(decay=decay)
    module, before = distill(student, teacher, alpha), deepcopy(teacher.state_dict())

    run(module, train, Batches(5), callbacks=[watch, average])

    expected, *later = watch.weights
    for weights in later:
        expected = decay * expected + (1 - decay) * weights
    kept = torch.nn.utils.parameters_to_vector(module.model.parameters())
    torch.testing.assert_close(kept, expected)
    assert not torch.equal(kept, watch.weights[-1])
    assert {*dict(average._average_model.module.named_parameters())} == {*dict(module.named_parameters())}
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(p.requires_grad for p in module.teacher.parameters())
