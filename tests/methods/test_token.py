"""Distillation through a token, against timm's task on timm's own DeiT, and by hand."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.task.token_distillation import TokenDistillationTask
from torch import Tensor, nn
from torch.nn import functional as F

from tests.methods.test_methods import facts, images, plan
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.maps.alignment import align
from vitkd.methods.maps.granularity import Block, BlockPair, Encoder
from vitkd.methods.maps.losses import KL, MSE
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.methods.token import TokenDistillation, TokenObjective
from vitkd.models import Model, Output, ResNetConfig, Taps, ViT
from vitkd.optim import AdamW, Constant
from vitkd.train.build import build_module
from vitkd.train.losses import Losses
from vitkd.train.module import DistillModule

EXACT = {"atol": 1e-12, "rtol": 1e-10}
BY_THEMSELVES = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def answered(class_token: Tensor, distillation_token: Tensor) -> Output:
    """What a student with two heads answers."""
    heads = {"class_token": class_token, "distillation_token": distillation_token}
    return Output((class_token + distillation_token) / 2, heads)


def losses_of(objective: TokenObjective, distillation_token: Tensor, teacher: Tensor) -> Tensor:
    """The loss of each image [*S, B], from the token's logits and the teacher's."""
    count = teacher.shape[-2]
    batch = Batch(torch.empty(count, 3, 8, 8), torch.zeros(count).long(), torch.arange(count))
    student = answered(torch.full_like(distillation_token, 9.0), distillation_token)
    return objective.transfer(objective(batch, student, Output(teacher)))


def module_of(method: TokenDistillation, student: Model, teacher: Model, **changes: object) -> DistillModule:
    return build_module(plan(method=method, **changes), student, teacher, facts())


def logits(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def deit(tiny) -> Callable[..., ViT]:
    """Makes a student with a distillation token, in float64, none of its weights at a telling 0 or 1."""

    def build(**changes: object) -> ViT:
        model = tiny(distillation_token=True, **changes).build().double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    return build


@pytest.fixture
def batch() -> Batch:
    return Batch(images().double(), torch.tensor([3, 0, 4, 1]), torch.arange(4))


def timms_name(name: str) -> str:
    """Where timm's DeiT keeps what `name` is here."""
    inner = {
        "attention.norm": "norm1", "attention.qkv": "attn.qkv", "attention.out": "attn.proj",
        "mlp.norm": "norm2", "mlp.expand": "mlp.fc1", "mlp.contract": "mlp.fc2",
    }  # fmt: skip
    outer = {
        "positions": "pos_embed", "distillation_token": "dist_token", "distillation_head": "head_dist",
        "tokenizer.projection": "patch_embed.proj",
    }  # fmt: skip
    if name.startswith("blocks."):
        _, block, *middle, kind = name.split(".")
        return f"blocks.{block}.{inner['.'.join(middle)]}.{kind}"
    stem, dot, kind = name.rpartition(".")
    return f"{outer.get(stem, stem)}{dot}{kind}" if dot else outer.get(name, name)


def timm_counterpart(ours: ViT) -> VisionTransformerDistilled:
    c = ours.config
    theirs = VisionTransformerDistilled(
        img_size=c.image_size, patch_size=c.patch_size, in_chans=c.channels, num_classes=c.num_classes,
        embed_dim=c.embed_dim, depth=c.depth, num_heads=c.num_heads, mlp_ratio=c.mlp_dim / c.embed_dim,
        qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-5),
    ).double()  # fmt: skip
    state = {timms_name(name): tensor for name, tensor in ours.state_dict().items()}
    projection = "patch_embed.proj.weight"
    state[projection] = state[projection].unflatten(1, (c.channels, c.patch_size, c.patch_size))
    theirs.load_state_dict(state)
    theirs.pretrained_cfg = BY_THEMSELVES
    return theirs


class Logits(nn.Module):
    """A model of ours as timm's task asks a teacher."""

    pretrained_cfg = BY_THEMSELVES

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


class TestOracle:
    @pytest.mark.parametrize(("targets", "temperature"), [("hard", 3.0), ("soft", 1.0), ("soft", 3.0)])
    @pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_losses_and_all_gradients_are_timms(
        self, targets, temperature, alpha, smoothing, deit, tiny, batch
    ):
        student = deit(embed_dim=12, num_heads=3, head_dim=4, qkv_bias=True, patch_norm=False)
        teacher = tiny(depth=2).build().double()
        theirs = TokenDistillationTask(
            timm_counterpart(student), Logits(teacher), nn.CrossEntropyLoss(label_smoothing=smoothing),
            distill_type=targets, temperature=temperature, task_loss_weight=alpha, dtype=torch.float64,
            verbose=False,
        ).train()  # fmt: skip
        method = TokenDistillation(targets, temperature)
        module = module_of(method, student, teacher, alpha=alpha, label_smoothing=smoothing)
        expected = theirs(batch.image, batch.label)
        expected["loss"].backward()

        losses = module.train().losses(batch)
        losses.total.backward()

        torch.testing.assert_close(losses.total, expected["loss"], **EXACT)
        torch.testing.assert_close(losses.class_loss, expected["task_loss"], **EXACT)
        torch.testing.assert_close(losses.transfer.loss, expected["distill_loss"], **EXACT)
        for name, parameter in student.named_parameters():
            gradient = theirs.trainable_module.get_parameter(timms_name(name)).grad
            if gradient is None:
                assert parameter.grad is None, name
            else:
                torch.testing.assert_close(parameter.grad, gradient.view_as(parameter), **EXACT)

    def test_at_test_both_heads_are_averaged_as_timms(self, deit, batch):
        student = deit(embed_dim=12, num_heads=3, head_dim=4, qkv_bias=True, patch_norm=False).eval()

        output = student(batch.image)

        torch.testing.assert_close(output.logits, timm_counterpart(student).eval()(batch.image), **EXACT)


class TestByHand:
    TEACHER = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]], dtype=torch.float64)
    STUDENT = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.5, -1.0]], dtype=torch.float64)

    def values(self, targets: str, temperature: float = 1.0) -> list[float]:
        """Of both images."""
        losses = losses_of(TokenObjective(targets, temperature), self.STUDENT, self.TEACHER)
        assert losses.shape == (2,)
        return losses.tolist()

    def test_hard_targets_are_the_teachers_classes(self):
        q = self.STUDENT.exp() / self.STUDENT.exp().sum(1, keepdim=True)

        by_hand = [-q[0, 1].log().item(), -q[1, 0].log().item()]
        assert self.values("hard") == pytest.approx(by_hand, abs=1e-12)
        assert self.values("hard", 7.0) == self.values("hard"), "they know no temperature"

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_soft_targets_are_its_probabilities_both_softened(self, temperature):
        p, q = (
            (z / temperature).exp() / (z / temperature).exp().sum(1, keepdim=True)
            for z in (self.TEACHER, self.STUDENT)
        )
        kl = (p * (p / q).log()).sum(1)

        by_hand = (temperature**2 * kl).tolist()
        assert self.values("soft", temperature) == pytest.approx(by_hand, abs=1e-12)

    def test_softened_beyond_measure_the_gradient_is_that_of_matched_logits(self):
        """Hinton et al. 2015, equation 4, for logits of any mean; T² keeps it from vanishing."""
        student = self.STUDENT.clone().requires_grad_()

        losses_of(TokenObjective("soft", 1e4), student, self.TEACHER).mean().backward()

        difference = student - self.TEACHER
        expected = (difference - difference.mean(1, keepdim=True)) / 3 / 2
        torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("targets", ["hard", "soft"])
    def test_stacked_students_have_a_loss_each(self, targets):
        student, teacher = logits(3, 4, 5), logits(4, 5)
        objective = TokenObjective(targets, 2.0)

        together = losses_of(objective, student, teacher)

        assert together.shape == (3, 4)
        for own, alone in zip(together, student, strict=True):
            torch.testing.assert_close(own, losses_of(objective, alone, teacher), **EXACT)
            for i in range(4):
                lone = losses_of(objective, alone[i : i + 1], teacher[i : i + 1])
                torch.testing.assert_close(own[i : i + 1], lone, **EXACT)

    @pytest.mark.parametrize("targets", ["hard", "soft"])
    def test_bf16_logits_are_compared_in_float32(self, targets):
        student, teacher = logits(4, 5).bfloat16(), logits(4, 5).bfloat16()
        objective = TokenObjective(targets, 2.0)

        value, expected = (
            losses_of(objective, s, t) for s, t in ((student, teacher), (student.float(), teacher.float()))
        )

        assert value.dtype == torch.float32
        assert torch.equal(value, expected)


class TestHeads:
    @pytest.mark.parametrize("targets", ["hard", "soft"])
    @pytest.mark.parametrize(
        ("alpha", "idle"), [(0.0, "head"), (0.5, None)], ids=["teacher alone", "labels and teacher"]
    )
    def test_each_learns_from_its_own_target(self, targets, alpha, idle, deit, tiny, batch):
        student = deit()
        module = module_of(TokenDistillation(targets), student, tiny().build().double(), alpha=alpha)

        losses = module.losses(batch)
        of_class_loss = torch.autograd.grad(
            losses.class_loss, [student.head.weight, student.distillation_head.weight], allow_unused=True,
            retain_graph=True,
        )  # fmt: skip
        losses.total.backward()

        assert of_class_loss[0].any()
        assert of_class_loss[1] is None
        for name in ("head", "distillation_head"):
            gradient = student.get_parameter(f"{name}.weight").grad
            assert (gradient is None or not gradient.any()) == (name == idle), name

    def test_the_answer_is_of_both(self, deit, tiny, batch):
        student = deit()
        module = module_of(TokenDistillation(), student, tiny().build().double())

        losses = module.eval().losses(batch)

        class_token, distillation_token = losses.output.heads.values()
        assert torch.equal(losses.output.logits, (class_token + distillation_token) / 2)
        assert losses.class_loss.item() == pytest.approx(F.cross_entropy(class_token, batch.label).item())


class TestAttentionBesides:
    @pytest.mark.parametrize("loss", [MSE(), KL()], ids=repr)
    def test_so_much_of_its_loss_is_added(self, loss, deit, tiny, batch):
        student, teacher = deit(), tiny(depth=6).build().double()

        def losses(weight: float) -> Losses:
            method = TokenDistillation("soft", attention_weight=weight)
            module = module_of(method, student, teacher, granularity=Encoder(), loss=loss)
            return module.eval().losses(batch)

        without, beside = losses(0.0), losses(0.7)

        pairs = Encoder().pairs(student.attention, teacher.attention)
        alignment = align(student.attention[0], teacher.attention[0])
        alone = AttentionObjective(pairs, loss, [alignment] * 3)
        asked = (student, alone.student_taps), (teacher, alone.teacher_taps)
        maps = alone.compare(*(model(batch.image, taps).scores for model, taps in asked))
        of_maps = alone.transfer({"map_loss": maps}).mean()
        of_token = without.transfer.loss
        torch.testing.assert_close(beside.transfer.loss, of_token + 0.7 * of_maps, **EXACT)
        per_curve = torch.cat([of_token.reshape(1), maps.mean(0)])
        torch.testing.assert_close(beside.transfer.values, per_curve, **EXACT)
        torch.testing.assert_close(beside.class_loss, without.class_loss, **EXACT)

    def test_has_a_curve_for_the_token_and_for_every_map(self, deit, tiny):
        settings = plan(granularity=Block(blocks=[0, 2]))
        method = TokenDistillation(attention_weight=1.0)

        objective = method.objective(deit(), tiny(depth=6).build(), settings, facts())

        names = [f"map_loss/{block}.{head}" for block in (0, 2) for head in (0, 1)]
        assert objective.curves == ("token_loss", *names)
        assert objective.student_taps == Taps(scores=(0, 2))
        assert objective.teacher_taps == Taps(scores=(1, 5))

    def test_has_the_curves_that_name_its_values(self, deit, tiny):
        module = module_of(TokenDistillation(attention_weight=1.0), deit(), tiny().build().double())

        (curves,) = module.curves({"transfer_values": [3.0, 1.0, 2.0], "transfer_loss": [4.5]})

        assert curves == {"token_loss": 3.0, "map_loss/2.0": 1.0, "map_loss/2.1": 2.0, "transfer_loss": 4.5}

    def test_without_it_no_map_is_recorded_and_there_is_but_one_value(self, deit, tiny):
        objective = TokenDistillation().objective(deit(), tiny().build(), plan(), facts())

        assert (objective.pairs, objective.curves, objective.attention) == ((), (), None)
        assert objective.student_taps == objective.teacher_taps == Taps()

    def test_of_many_tokens_the_factors_alone_are_recorded(self, tiny, batch):
        """A student of 12×12 patches."""
        shape = {"image_size": 24, "patch_size": 2, "distillation_token": True, "attention": "lsa"}
        student, teacher = tiny(**shape).build(), tiny(image_size=24, patch_size=2).build()
        module = module_of(TokenDistillation(attention_weight=1.0), student, teacher)
        pixels = torch.randn(2, 3, 24, 24)

        losses = module.double().eval().losses(Batch(pixels.double(), batch.label[:2], batch.index[:2]))

        objective = module.objective
        assert objective.student_taps == Taps(factors=(2,))
        assert objective.teacher_taps == Taps(factors=(2,), logits=True)
        assert objective.attention.streams
        assert objective.attention.alignments[0].allowed.shape == (145, 145)
        assert losses.output.qkv.keys() == {2}
        assert not losses.output.scores
        assert losses.total.isfinite()

    def test_heads_are_matched_on_the_calibration_images(self, tiny):
        """The teacher is the student, but for the token, with two heads swapped."""
        student, teacher = tiny(num_heads=3, distillation_token=True).build(), tiny(num_heads=3).build()
        with torch.no_grad():
            # What the other tokens see of it would be in the maps of every block but the first.
            for model in (student, teacher):
                model.blocks[0].attention.qkv.weight.copy_(student.blocks[0].attention.qkv.weight)
            for name in ("cls_token", "tokenizer.projection.weight", "tokenizer.projection.bias"):
                teacher.get_parameter(name).copy_(student.get_parameter(name))
            teacher.positions.copy_(student.positions[:, [0, 2, 3, 4, 5]])
            qkv = teacher.blocks[0].attention.qkv.weight.unflatten(0, (3, 3, 4))
            qkv.copy_(qkv[:, [0, 2, 1]].clone())
        settings = plan(granularity=Block(head_map="hungarian", blocks=[0]))

        method = TokenDistillation(attention_weight=1.0)
        objective = method.objective(student, teacher, settings, facts(images))

        assert objective.pairs == (BlockPair(0, 0, (0, 1, 2), ((0,), (2,), (1,))),)


class TestTeachers:
    @pytest.mark.parametrize("targets", ["hard", "soft"])
    def test_may_be_convolutional(self, targets, deit, batch):
        teacher = ResNetConfig(8, 3, 5).build().double()
        settings = plan(alpha=0.5)
        TokenDistillation(targets).check(deit().config, teacher.config, settings)
        module = module_of(TokenDistillation(targets), deit(), teacher, alpha=0.5).train()
        running = teacher.network.bn1.running_mean.clone()

        losses = module.losses(batch)
        losses.total.backward()

        answer = teacher(batch.image).logits
        learned = losses.output.heads["distillation_token"].detach()
        expected = (
            F.cross_entropy(learned, answer.argmax(1))
            if targets == "hard"
            else 9 * F.kl_div((learned / 3).log_softmax(1), (answer / 3).softmax(1), reduction="batchmean")
        )
        torch.testing.assert_close(losses.transfer.loss.detach(), expected, **EXACT)
        assert torch.equal(teacher.network.bn1.running_mean, running), "its statistics stand still"
        assert all(p.grad is None for p in teacher.parameters())

    def test_with_two_heads_teaches_by_their_mean(self, deit, batch):
        teacher = deit(depth=1)
        module = module_of(TokenDistillation(), deit(), teacher).eval()

        losses = module.losses(batch)

        answer = teacher.eval()(batch.image).logits.argmax(1)
        expected = F.cross_entropy(losses.output.heads["distillation_token"], answer)
        torch.testing.assert_close(losses.transfer.loss, expected, **EXACT)


class TestChecks:
    @pytest.mark.parametrize("student", ["plain", "resnet"])
    def test_a_student_without_the_token_is_one_line(self, student, tiny):
        config = tiny() if student == "plain" else ResNetConfig(8, 3, 5)

        with pytest.raises(ConfigError, match=r"^student\.distillation_token=false: [^\n]*method=logit$"):
            TokenDistillation().check(config, tiny(), plan())

    def test_maps_need_a_teacher_that_has_them(self, tiny):
        student, teacher = tiny(distillation_token=True), ResNetConfig(8, 3, 5)

        TokenDistillation().check(student, teacher, plan())
        with pytest.raises(ConfigError, match=r"^teacher=resnet18: has no attention maps[^\n]*$"):
            TokenDistillation(attention_weight=0.1).check(student, teacher, plan())

    def test_maps_need_pairs_that_exist(self, tiny):
        student, settings = tiny(distillation_token=True), plan(granularity=Block(blocks=[7]))

        TokenDistillation().check(student, tiny(), settings)
        with pytest.raises(ConfigError, match="the student has no block 7"):
            TokenDistillation(attention_weight=0.1).check(student, tiny(), settings)

    def test_without_maps_token_grids_may_differ(self, tiny):
        student, teacher = tiny(distillation_token=True), tiny(patch_size=2)

        TokenDistillation().check(student, teacher, plan())
        with pytest.raises(ConfigError, match=r"2×2.*4×4.*equal patch sizes"):
            TokenDistillation(attention_weight=0.1).check(student, teacher, plan())

    def test_what_it_advises_can_be_done(self, tiny):
        with pytest.raises(ConfigError) as refused:
            TokenDistillation(attention_weight=0.1).check(
                tiny(distillation_token=True), tiny(patch_size=2), plan()
            )

        assert "method.resize" not in str(refused.value), "method=token has no such setting"

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"targets": "firm"}, "targets=firm: choose hard or soft"),
            ({"temperature": 0.0}, "temperature=0.0: must be a finite number above 0"),
            ({"temperature": float("inf")}, "temperature=inf: must be a finite number above 0"),
            ({"temperature": float("nan")}, "temperature=nan: must be a finite number above 0"),
            ({"attention_weight": -0.1}, "attention_weight=-0.1: must be a finite number, 0 or more"),
            ({"attention_weight": float("inf")}, "attention_weight=inf: must be a finite number, 0 or more"),
        ],
    )
    def test_wrong_settings_are_named(self, settings, words):
        with pytest.raises(ConfigError) as refused:
            TokenDistillation(**settings)

        assert str(refused.value) == words

    def test_what_is_said_to_have_no_effect_has_none(self):
        assert TokenDistillation().ignores == ("granularity", "loss", "method.temperature")
        assert TokenDistillation("soft").ignores == ("granularity", "loss")
        assert TokenDistillation("soft", attention_weight=0.1).ignores == ()


def test_training_pulls_both_heads_to_their_targets(tiny, batch):
    student, teacher = tiny(distillation_token=True).build().double(), tiny().build().double()
    objective = TokenObjective("hard", 1.0)
    module = DistillModule(
        student, AdamW(), Constant(), teacher=teacher, objective=objective, alpha=0.5
    ).train()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)

    for _ in range(60):
        optimizer.zero_grad()
        module.losses(batch).total.backward()
        optimizer.step()

    heads = student.eval()(batch.image).heads
    assert torch.equal(heads["class_token"].argmax(1), batch.label)
    assert torch.equal(heads["distillation_token"].argmax(1), teacher(batch.image).logits.argmax(1))
