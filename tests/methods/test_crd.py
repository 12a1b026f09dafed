"""`method=crd` is its paper's loss, by its authors' formula and by torchdistill's code, step by step."""

import logging
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.banks import BothSides, MemoryBank, Queue
from vitkd.methods.base import DataFacts
from vitkd.methods.crd import ContrastiveObjective, CRDDistillation
from vitkd.models import Output

# 40 training images of 5 classes, of a split of 60.
SPLIT, IMAGES, CLASSES, WIDTH, NEGATIVES, TEMPERATURE = 60, 40, 5, 6, 24, 0.07
POSITIONS = torch.randperm(SPLIT, generator=torch.Generator().manual_seed(1))[:IMAGES].sort().values
LABELS = (POSITIONS * 7) % CLASSES
FACTS = DataFacts(SPLIT, CLASSES, lambda: torch.empty(0), lambda: (POSITIONS, LABELS), seed=3)
EPSILON = 1e-7


def objective_of(bank: str = "memory") -> ContrastiveObjective:
    method = CRDDistillation(bank=bank, negatives=NEGATIVES, width=WIDTH)
    return ContrastiveObjective((7, 9), method.make_bank(FACTS), TEMPERATURE, IMAGES).double().train()


def batch_of(places: Tensor) -> Batch:
    """The images at `places` among the training images."""
    return Batch(torch.empty(0), LABELS[places], POSITIONS[places])


def some_images(count: int = 8) -> Tensor:
    return torch.randperm(IMAGES)[:count]


def embedded(objective: ContrastiveObjective, student: Tensor, teacher: Tensor) -> list[Tensor]:
    projected = objective.project_student(student), objective.project_teacher(teacher)
    return [each / each.pow(2).sum(-1, keepdim=True).sqrt() for each in projected]


class AuthorsFormula:
    """RepDistiller's loss, by loops over images, with banks of its own."""

    def __init__(self, bank: MemoryBank) -> None:
        self.of_student, self.of_teacher = bank.student.clone(), bank.teacher.clone()
        self.z: list[Tensor] = []

    def __call__(self, student: Tensor, teacher: Tensor, row: Tensor, compared: Tensor) -> Tensor:
        """Of embeddings [B, D] of images with a `row` each, `compared` with rows [B, 1 + K], own first."""
        sides = (student, self.of_teacher), (teacher, self.of_student)
        exponentials = [
            torch.stack(
                [(bank[rows] @ own / TEMPERATURE).exp() for own, rows in zip(anchor, compared, strict=True)]
            )
            for anchor, bank in sides
        ]
        self.z = self.z or [each.mean().detach() * IMAGES for each in exponentials]
        loss = torch.zeros((), dtype=torch.float64)
        for each, z in zip(exponentials, self.z, strict=True):
            k = each.shape[1] - 1
            for p in each / z:
                loss = loss - (p[0] / (p[0] + k / IMAGES + EPSILON)).log()
                loss = loss - sum(((k / IMAGES) / (q + k / IMAGES + EPSILON)).log() for q in p[1:])
        for anchor, bank in ((student, self.of_student), (teacher, self.of_teacher)):
            for own, place in zip(anchor.detach(), row, strict=True):
                moved = 0.5 * bank[place] + 0.5 * own
                bank[place] = moved / moved.pow(2).sum().sqrt()
        return loss / len(student)


class Torchdistills:
    """torchdistill's CRDLoss on the same banks."""

    def __init__(self, bank: MemoryBank) -> None:
        from torchdistill.losses.mid_level import CRDLoss

        self.loss = CRDLoss("norm", "empty", "norm", WIDTH, 1, NEGATIVES, IMAGES)
        self.loss.memory_v1, self.loss.memory_v2 = bank.student.clone(), bank.teacher.clone()
        # Z and τ in float64.
        self.loss.params = torch.tensor([NEGATIVES, TEMPERATURE, -1, -1, 0.5], dtype=torch.float64)
        self.of_student, self.of_teacher = self.loss.memory_v1, self.loss.memory_v2

    def __call__(self, student: Tensor, teacher: Tensor, row: Tensor, compared: Tensor) -> Tensor:
        chosen = {"pos_idx": row, "contrast_idx": compared}
        of_student = {"norm": {"output": student}, "empty": {"input": chosen}}
        return self.loss(of_student, {"norm": {"output": teacher}}).squeeze()


@pytest.mark.parametrize("oracle", [AuthorsFormula, Torchdistills])
def test_twenty_steps_are_those_of_the_oracle(oracle):
    ours = objective_of()
    bank, reference = ours.bank, oracle(ours.bank)
    theirs = deepcopy(ours)
    features = [nn.Parameter(torch.randn(SPLIT, width, dtype=torch.float64)) for width in (7, 9)]
    copies = deepcopy(features)
    optimizers = [
        torch.optim.SGD(
            [*module.project_student.parameters(), *module.project_teacher.parameters(), own[0]], 0.1
        )
        for module, own in ((ours, features), (theirs, copies))
    ]

    for step in range(20):
        if step % 5 == 0:
            ours.start_epoch(step // 5, 4)
        batch = batch_of(some_images())
        row, counts = bank.row_of[batch.index], bank.counts(batch)
        drawn = [torch.arange(IMAGES).repeat_interleave(each.long()) for each in counts]
        compared = torch.stack([torch.cat([own[None], rows]) for own, rows in zip(row, drawn, strict=True)])
        student, teacher = (Output(features={"pre_logits": each[batch.index]}) for each in features)
        terms = ours(batch, student, teacher)
        loss = ours.transfer(terms).mean()
        expected = reference(*embedded(theirs, *(each[batch.index] for each in copies)), row, compared)
        for optimizer, own in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            own.backward()
            optimizer.step()

        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)

    for mine, other in zip([*ours.parameters(), *features], [*theirs.parameters(), *copies], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(bank.student, reference.of_student, atol=1e-5, rtol=0)
    torch.testing.assert_close(bank.teacher, reference.of_teacher, atol=1e-5, rtol=0)


class TestNegatives:
    def test_are_of_other_classes(self):
        bank, places = objective_of().bank, torch.arange(IMAGES)
        counts = bank.counts(batch_of(places))

        assert (counts.sum(-1) == NEGATIVES).all()
        label_of_row = torch.empty(IMAGES, dtype=torch.int64)
        label_of_row[bank.row_of[POSITIONS]] = LABELS
        assert (counts[LABELS[:, None] == label_of_row] == 0).all()
        # Of 40 × 24 draws from 32 each: every other row somewhere.
        assert (counts.sum(0) > 0).all()

    def test_depend_on_seed_epoch_and_image_alone(self):
        bank, batch = objective_of().bank, batch_of(torch.arange(IMAGES))
        whole = bank.counts(batch)

        torch.rand(3)
        backwards = bank.counts(batch_of(torch.arange(IMAGES - 1, IMAGES - 5, -1)))
        assert torch.equal(backwards, whole[-4:].flip(0))
        bank.start_epoch(1)
        assert not torch.equal(bank.counts(batch), whole)
        bank.start_epoch(0)
        assert torch.equal(bank.counts(batch), whole)
        other = MemoryBank(FACTS._replace(seed=4), WIDTH, NEGATIVES, 0.5).double()
        assert not torch.equal(other.counts(batch), whole)

    def test_are_drawn_evenly(self):
        bank = MemoryBank(FACTS, WIDTH, 3200, 0.5).double()
        (counts,) = bank.counts(batch_of(torch.tensor([0])))
        drawn = counts[counts > 0]

        others = int((LABELS[0] != LABELS).sum())
        assert len(drawn) == others
        # A χ² of as many degrees of freedom exceeds this once in a million.
        expected = 3200 / others
        assert ((drawn - expected) ** 2 / expected).sum() < 100


@pytest.mark.parametrize("bank", ["memory", "queue"])
def test_only_training_writes(bank):
    objective = objective_of(bank).eval()
    before = {name: values.clone() for name, values in objective.bank.state_dict().items()}
    batch = batch_of(some_images())
    outputs = [
        Output(features={"pre_logits": torch.randn(8, width, dtype=torch.float64)}) for width in (7, 9)
    ]

    objective(batch, *outputs)
    assert all(torch.equal(values, before[name]) for name, values in objective.bank.state_dict().items())
    objective.train()(batch, *outputs)
    assert all(not torch.equal(values, before[name]) for name, values in objective.bank.state_dict().items())


class TestQueue:
    def test_holds_the_last_images(self):
        queue = Queue(5, 2)
        first, second = torch.randn(2, 3, 2)
        queue.write(Batch(first, torch.tensor([0, 1, 2]), torch.arange(3)), BothSides(first, -first))
        queue.write(Batch(second, torch.tensor([3, 4, 5]), torch.arange(3)), BothSides(second, -second))

        assert queue.label.tolist() == [5, 1, 2, 3, 4]
        expected = torch.stack([second[2], first[1], first[2], second[0], second[1]])
        assert torch.equal(queue.student, expected)
        assert torch.equal(queue.teacher, -expected)

    def test_of_a_larger_batch_the_end(self):
        queue, images = Queue(5, 2), torch.randn(7, 2)
        queue.write(Batch(images, torch.arange(7), torch.arange(7)), BothSides(images, images))

        assert sorted(queue.label.tolist()) == [2, 3, 4, 5, 6]

    def test_the_loss_is_the_formula_with_the_queues_other_classes(self):
        """The positive is the batch's own; each side learns by its own embedding alone."""
        objective = objective_of("queue")
        for _ in range(4):
            objective(batch_of(some_images()), *features())
        rows = {name: values.clone() for name, values in objective.bank.state_dict().items()}
        batch, (student, teacher) = batch_of(some_images()), features()
        terms = objective(batch, student, teacher)["crd_loss"]

        mine = embedded(objective, student.features["pre_logits"], teacher.features["pre_logits"])
        z = rows["normalizers"]
        for image, label in enumerate(batch.label):
            others = rows["label"] != label
            k = others.sum().item()
            for side, name in enumerate(("teacher", "student")):
                anchor, positive = mine[side][image], mine[1 - side][image]
                p = torch.exp(anchor @ positive / TEMPERATURE) / z[side]
                q = torch.exp(rows[name][others] @ anchor / TEMPERATURE) / z[side]
                noise = k / IMAGES
                expected = -(p / (p + noise + EPSILON)).log() - (noise / (q + noise + EPSILON)).log().sum()
                torch.testing.assert_close(terms[image, side], expected)


def features(count: int = 8) -> list[Output]:
    widths = 7, 9
    return [Output(features={"pre_logits": torch.randn(count, w, dtype=torch.float64)}) for w in widths]


def test_the_first_batch_fixes_z():
    objective = objective_of()
    bank = objective.bank
    assert not bank.normalizers.any()
    batch, both = batch_of(some_images()), features()
    anchor = embedded(objective, *(each.features["pre_logits"] for each in both))[0]
    counts = bank.counts(batch).clone()
    rows = (anchor @ bank.teacher.mT / TEMPERATURE).exp()
    own = rows.gather(1, bank.row_of[batch.index][:, None]).squeeze(1)
    mean = ((counts * rows).sum() + own.sum()) / (8 * (NEGATIVES + 1))

    objective(batch, *both)
    first = bank.normalizers.clone()
    torch.testing.assert_close(first[0], mean * IMAGES)
    objective(batch_of(some_images()), *features())
    assert torch.equal(bank.normalizers, first)


def test_of_several_views_in_a_batch_a_row_takes_in_the_last():
    bank, other = (MemoryBank(FACTS, WIDTH, NEGATIVES, 0.5) for _ in range(2))
    other.load_state_dict(bank.state_dict())
    places, new = torch.tensor([3, 8, 3, 3, 8]), BothSides(torch.randn(5, WIDTH), torch.randn(5, WIDTH))

    bank.write(batch_of(places), new)
    other.write(batch_of(places[3:]), BothSides(*(side[3:] for side in new)))

    assert torch.equal(bank.student, other.student)
    assert torch.equal(bank.teacher, other.teacher)


def test_what_the_banks_take_is_said_or_refused(caplog):
    facts = FACTS._replace(labels=lambda: (torch.arange(10**6), torch.zeros(10**6, dtype=torch.int64)))
    with caplog.at_level(logging.INFO, "vitkd"):
        CRDDistillation().check_data(facts)
    assert "1,000,000" in caplog.text
    assert "976.6 MiB" in caplog.text  # 2 · 10⁶ · 128 · 4 bytes
    with pytest.raises(ConfigError, match=r"bank_gib=0.5: .* 1.0 GiB.*bank=queue"):
        CRDDistillation(bank_gib=0.5).check_data(facts)
    CRDDistillation(bank_gib=0.5, bank="queue").check_data(facts)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bank", "disk"),
        ("negatives", 0),
        ("width", 0),
        ("temperature", 0.0),
        ("momentum", 1.0),
        ("bank_gib", 0),
    ],
)
def test_what_cannot_be_is_one_line(setting, value):
    with pytest.raises(ConfigError, match=f"{setting}={value}"):
        CRDDistillation(**{setting: value})


def test_embeddings_are_of_any_models(tiny):
    """Of a student and a teacher whose features differ in width; their modes stay."""
    student, teacher = tiny(embed_dim=12).build().train(), tiny(embed_dim=20).build().eval()
    objective = CRDDistillation(negatives=4, width=3).objective(student, teacher, None, FACTS)

    assert student.training
    assert not teacher.training
    assert (objective.project_student.in_features, objective.project_teacher.in_features) == (12, 20)
    images = torch.randn(4, 3, 8, 8)
    batch = batch_of(torch.arange(4))._replace(image=images)
    both = (model(images, objective.student_taps) for model in (student, teacher))
    terms = objective(batch, *both)["crd_loss"]
    assert terms.shape == (4, 2)
    assert terms.isfinite().all()


# PyTorch's compiler looks at tensors in ways that PyTorch warns of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("bank", ["memory", "queue"])
def test_compiled_steps_are_eager_ones(bank):
    """Where the backward pass recomputed what it needs of the bank, it would find it written."""

    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        objective = objective_of(bank)
        loss: Any = lambda batch, *both: objective.transfer(objective(batch, *both)).mean()  # noqa: E731
        step = torch.compile(loss, backend="aot_eager_decomp_partition") if compiled else loss
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
        seen = []
        for _ in range(4):
            optimizer.zero_grad()
            value = step(batch_of(some_images()), *features())
            value.backward()
            optimizer.step()
            seen.append(value.item())
        return seen

    assert losses(compiled=True) == pytest.approx(losses(compiled=False), abs=1e-9)
