"""Features, queries, keys and values by name: what was asked for, nothing else, and no step beyond it."""

from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vitkd.models import Output, ResNet, ResNetConfig, Taps, ViT
from vitkd.models.output import QKV, BlockTaps, select

DEPTH, HEADS, HEAD_DIM, DIM = 4, 2, 4, 12
EXACT = {"atol": 1e-12, "rtol": 0}
VARIANTS = {
    "bare": {},
    "qkv-bias": {"qkv_bias": True, "patch_norm": False},
    "spt-lsa": {"tokenizer": "spt", "attention": "lsa", "qkv_bias": True},
    "distillation-token": {"distillation_token": True},
}
ALL_BLOCKS = tuple(range(DEPTH))
VIT_FEATURES = ("embed", *(f"block{i}" for i in ALL_BLOCKS), "pre_logits")
RESNET_FEATURES = ("stage1", "stage2", "stage3", "stage4", "pre_logits")


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(tiny, request) -> ViT:
    """In eval mode; none of its weights is at a telling 0 or 1."""
    model = tiny(depth=DEPTH, **request.param).build().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def sound_resnet() -> ResNet:
    return ResNetConfig(8, 3, 5, stem="small").build().eval()


@pytest.fixture
def resnet(sound_resnet) -> ResNet:
    """A copy of its own: tests poison its weights and hook its layers."""
    return deepcopy(sound_resnet)


@pytest.fixture
def photos() -> Tensor:
    """What a residual network sees, [2, 3, 8, 8]; 8, 4, 2 and 1 pixels a side after its stages."""
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


@torch.no_grad()
def poison(*parts: nn.Module | nn.Parameter | None) -> None:
    """NaN in every parameter and buffer of `parts`: what is computed from one of them is NaN, too."""
    for part in parts:
        tensors = [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else [part]
        for tensor in tensors:
            if tensor is not None and tensor.is_floating_point():
                tensor.fill_(torch.nan)


class Touched(TorchFunctionMode):
    """Remembers which tensors any function was given meanwhile; to look at a shape does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ != "__get__":
            self.tensors |= {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


def touched(model: ViT | ResNet, images: Tensor, taps: Taps) -> set[str]:
    """The parameters that a forward pass uses, by name."""
    with Touched() as mode:
        model(images, taps)
    return {name for name, parameter in model.named_parameters() if id(parameter) in mode.tensors}


def assert_same(ours: Output, theirs: Output) -> None:
    """The same names, and under them the same numbers."""
    assert (ours.logits is None) == (theirs.logits is None)
    for mine, their in zip(ours[1:], theirs[1:], strict=True):
        assert mine.keys() == their.keys()
    for mine, their in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert torch.equal(mine, their)


class TestViTFeatures:
    @torch.no_grad()
    def test_are_the_activations_of_those_names(self, model, images):
        features = model(images, Taps(features=VIT_FEATURES)).features

        trace, embedded = model.trace(images), model.embed(images)
        torch.testing.assert_close(features["embed"], embedded, **EXACT)
        for i in ALL_BLOCKS:
            torch.testing.assert_close(features[f"block{i}"], trace.tokens[i], **EXACT)
        pre_logits = features["pre_logits"]
        torch.testing.assert_close(pre_logits, model.norm(trace.tokens[-1])[:, 0], **EXACT)
        output = model(images)
        of_class_token = output.heads.get("class_token", output.logits)
        torch.testing.assert_close(model.head(pre_logits), of_class_token, **EXACT)

    @pytest.mark.parametrize(
        "names", [("embed",), ("block2",), ("block3", "embed"), ("pre_logits",)], ids=str
    )
    @pytest.mark.parametrize("logits", [True, False])
    def test_are_returned_as_asked_for_and_in_the_graph(self, model, images, names, logits):
        output = model(images, Taps(features=names, logits=logits))

        assert tuple(output.features) == names
        assert not output.scores
        assert not output.qkv
        assert (output.logits is not None) == logits
        assert bool(output.heads) == (logits and model.config.distillation_token)
        assert all(feature.requires_grad for feature in output.features.values())

    def test_leave_the_logits_and_their_gradients_alone(self, model, images):
        results = []
        for taps in (Taps(), Taps(features=VIT_FEATURES)):
            logits = model(images, taps).answer
            gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
            results.append([logits, *gradients])

        assert all(torch.equal(*both) for both in zip(*results, strict=True))

    def test_are_of_each_stacked_student(self, tiny):
        model = tiny(depth=DEPTH).build().double()
        for parameter in model.parameters():
            parameter.data = torch.stack([parameter.data, 2 * parameter.data])
        taps = Taps(features=VIT_FEATURES, qkv=(1,))

        output = model(torch.randn(3, 3, 8, 8, dtype=torch.float64), taps)

        assert output.features["embed"].shape == (2, 3, 5, DIM)
        assert output.features["block3"].shape == (2, 3, 5, DIM)
        assert output.features["pre_logits"].shape == (2, 3, DIM)
        assert all(x.shape == (2, 3, HEADS, 5, HEAD_DIM) for x in output.qkv[1])


class TestQKV:
    @torch.no_grad()
    @pytest.mark.parametrize("logits", [True, False])
    def test_are_the_projections_head_by_head(self, model, images, logits):
        """By loops, from the tokens that enter each block; LSA's temperature is part of the queries."""
        output = model(images, Taps(qkv=(0, 2), features=("embed", "block1"), logits=logits))

        assert output.qkv.keys() == {0, 2}
        inner = HEADS * HEAD_DIM
        for i, before in ((0, "embed"), (2, "block1")):
            attention = model.blocks[i].attention
            projected = attention.qkv(attention.norm(output.features[before]))
            for kind, ours in enumerate(output.qkv[i]):
                for head in range(HEADS):
                    start = kind * inner + head * HEAD_DIM
                    expected = projected[..., start : start + HEAD_DIM]
                    if kind == 0 and model.config.attention == "lsa":
                        expected = expected / attention.log_temperature[head].exp()
                    torch.testing.assert_close(ours[:, head], expected, **EXACT)

    @torch.no_grad()
    def test_make_the_scores_and_with_the_values_the_blocks_output(self, model, images):
        output = model(images, Taps(scores=(1,), qkv=(1,), features=("block0",)))
        qkv, trace, attention = output.qkv[1], model.trace(images), model.blocks[1].attention

        torch.testing.assert_close(qkv.scores(), output.scores[1], **EXACT)
        values = (trace.weights[1] @ qkv.v).transpose(1, 2).flatten(-2)
        x = output.features["block0"] + attention.out(values)
        torch.testing.assert_close(x + model.blocks[1].mlp(x), trace.tokens[1], **EXACT)

    def test_factors_are_without_values_where_these_were_not_asked_for(self, model, images):
        output = model(images, Taps(factors=(0, 1), qkv=(1, 3)))

        assert {block: qkv.v is not None for block, qkv in output.qkv.items()} == {0: False, 1: True, 3: True}
        whole = model(images, Taps(qkv=ALL_BLOCKS)).qkv
        assert torch.equal(output.qkv[0].q, whole[0].q)
        assert torch.equal(output.qkv[0].k, whole[0].k)

    def test_of_other_precision_scores_are_at_least_float32(self):
        q, k = torch.randn(2, 3, 2, 5, 4)

        for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            with torch.autocast("cpu", torch.bfloat16):
                scores = QKV(q.to(dtype), k.to(dtype)).scores()
            assert scores.dtype == expected
            by_hand = q.to(dtype).double() @ k.to(dtype).double().mT / 2
            torch.testing.assert_close(scores.double(), by_hand, atol=1e-5, rtol=0)


class TestStopping:
    """Parameters behind the last thing asked for are not touched, and as NaN they spoil nothing."""

    # What is asked for; the first block of which nothing is computed; whether the one before is whole.
    CASES = (
        (Taps(features=("embed",), logits=False), 0, True),
        (Taps(features=("block1",), logits=False), 2, True),
        (Taps(features=("embed", "block0"), scores=(0,), logits=False), 1, True),
        (Taps(features=("block0",), scores=(2,), logits=False), 3, False),
        (Taps(factors=(0, 2), logits=False), 3, False),
        (Taps(qkv=(1,), logits=False), 2, False),
        (Taps(scores=(0,), qkv=(3,), logits=False), 4, False),
        (Taps(features=("block3",), qkv=(3,), logits=False), 4, True),
    )

    @torch.no_grad()
    @pytest.mark.parametrize(("taps", "stop", "is_whole"), CASES, ids=lambda case: str(case)[:60])
    def test_a_vit_computes_no_further(self, model, images, taps, stop, is_whole):
        expected = model(images, taps)
        poison(*model.blocks[stop:], model.norm, model.head)
        if model.config.distillation_token:
            poison(model.distillation_head)
        if not is_whole:
            last = model.blocks[stop - 1]
            poison(last.mlp, last.attention.out)

        assert model(images).answer.isnan().all()
        assert_same(model(images, taps), expected)
        assert not any(tensor.isnan().any() for tensor in expected.tensors())
        sound = {name for name, parameter in model.named_parameters() if not parameter.isnan().any()}
        assert touched(model, images, taps) == sound

    @torch.no_grad()
    @pytest.mark.parametrize("taps", [Taps(scores=(2,)), Taps(factors=(2,)), Taps(qkv=(2,))], ids=str)
    def test_values_are_projected_only_where_they_are_asked_for(self, model, images, taps):
        taps = taps._replace(logits=False)
        before = model(images, taps)
        for parameter in model.blocks[2].attention.qkv.parameters():
            parameter[2 * HEADS * HEAD_DIM :] = torch.nan

        after = model(images, taps)

        if taps.qkv:
            assert after.qkv[2].v.isnan().all()
        else:
            assert_same(after, before)

    @torch.no_grad()
    def test_pre_logits_need_no_head(self, model, images):
        taps = Taps(features=("pre_logits",), logits=False)
        expected = model(images, taps)
        poison(model.head)
        if model.config.distillation_token:
            poison(model.distillation_head)

        assert model(images).answer.isnan().all()
        assert_same(model(images, taps), expected)
        assert not any("head" in name for name in touched(model, images, taps))

    def test_gradients_end_there(self, model, images):
        taps = Taps(features=("block0",), scores=(2,), logits=False)

        sum(tensor.sum() for tensor in model(images, taps).tensors()).backward()

        beyond = [model.blocks[3], model.blocks[2].mlp, model.blocks[2].attention.out, model.norm, model.head]
        assert all(parameter.grad is None for part in beyond for parameter in part.parameters())
        assert model.blocks[1].mlp.contract.weight.grad.any()

    @torch.no_grad()
    @pytest.mark.parametrize(("stage", "name"), [*enumerate(RESNET_FEATURES, start=1)])
    def test_a_resnet_computes_no_further(self, resnet, photos, stage, name):
        network, taps = resnet.network, Taps(features=(name,), logits=False)
        expected = resnet(photos, taps)
        poison(*(network.get_submodule(f"layer{later}") for later in range(stage + 1, 5)), network.fc)

        assert resnet(photos).answer.isnan().all()
        assert_same(resnet(photos, taps), expected)
        sound = {name for name, parameter in resnet.named_parameters() if not parameter.isnan().any()}
        assert touched(resnet, photos, taps) == sound
        assert not any(tensor.isnan().any() for tensor in expected.tensors())


class TestResNetFeatures:
    @torch.no_grad()
    def test_are_the_outputs_of_torchvisions_layers(self, resnet, photos):
        seen = {}
        for name in ("layer1", "layer2", "layer3", "layer4", "avgpool"):
            module = resnet.network.get_submodule(name)
            module.register_forward_hook(lambda _module, _inputs, out, name=name: seen.update({name: out}))
        resnet.network(photos)

        output = resnet(photos, Taps(features=RESNET_FEATURES))

        assert tuple(output.features) == RESNET_FEATURES
        for stage in range(1, 5):
            assert torch.equal(output.features[f"stage{stage}"], seen[f"layer{stage}"])
        assert output.features["stage1"].shape == (2, 64, 8, 8)
        assert output.features["stage4"].shape == (2, 512, 1, 1)
        assert torch.equal(output.features["pre_logits"], seen["avgpool"].flatten(1))
        assert torch.equal(resnet.network.fc(output.features["pre_logits"]), output.answer)

    @torch.no_grad()
    @pytest.mark.parametrize("names", [("stage2",), ("pre_logits", "stage1"), ()], ids=str)
    def test_are_returned_as_asked_for(self, resnet, photos, names):
        output = resnet(photos, Taps(features=names))

        assert tuple(output.features) == names
        assert torch.equal(output.answer, resnet(photos).answer)


class TestUnknownNames:
    @pytest.mark.parametrize("logits", [True, False])
    @pytest.mark.parametrize("name", ["block4", "blocks", "stage1", ""])
    def test_a_vit_says_what_it_has(self, tiny, images, name, logits):
        model = tiny(depth=DEPTH).build().double()

        with pytest.raises(AssertionError, match=rf"\['{name}'\].*{', '.join(VIT_FEATURES)}"):
            model(images, Taps(features=("embed", name), logits=logits))

    @pytest.mark.parametrize("logits", [True, False])
    @pytest.mark.parametrize("name", ["stage0", "stage5", "block0"])
    def test_a_resnet_says_what_it_has(self, resnet, photos, name, logits):
        with pytest.raises(AssertionError, match=rf"\['{name}'\].*{', '.join(RESNET_FEATURES)}"):
            resnet(photos, Taps(features=(name, "stage1"), logits=logits))

    @pytest.mark.parametrize("taps", [Taps(scores=(4,)), Taps(factors=(0, -1)), Taps(qkv=(9,))], ids=str)
    def test_a_vit_has_no_such_block(self, tiny, images, taps):
        model = tiny(depth=DEPTH).build().double()

        with pytest.raises(AssertionError, match=r"no attention block \[(4|-1|9)\].* 4"):
            model(images, taps)


class TestUnion:
    def test_asks_for_whatever_any_asks_for(self):
        union = Taps.union(
            [
                Taps(scores=(3, 1), features=("embed",), logits=False),
                Taps(scores=(1,), factors=(2,), qkv=(0,), logits=False),
                Taps(factors=(0, 2), features=("block1", "embed")),
            ]
        )

        assert union == Taps((1, 3), (0, 2), (0,), ("block1", "embed"), logits=True)
        assert union.blocks == {0, 1, 2, 3}
        assert union.of_block(0) == BlockTaps(scores=False, factors=True, qkv=True, weights=False)
        assert union.of_block(3) == BlockTaps(scores=True, factors=False, qkv=False, weights=False)
        assert union.of_block(4) == BlockTaps(scores=False, factors=False, qkv=False, weights=False)

    def test_without_anything_asks_for_nothing(self):
        assert Taps.union([]) == Taps(logits=False)
        assert Taps.union([Taps(logits=False), Taps(logits=False)]) == Taps(logits=False)
        assert not Taps(features=("embed",)).blocks

    @torch.no_grad()
    def test_what_one_asked_for_is_the_same_in_the_union(self, model, images):
        both = [
            Taps(scores=(2,), features=("block0",), logits=False),
            Taps(factors=(2, 3), qkv=(1,), features=("pre_logits",)),
        ]

        together = model(images, Taps.union(both))

        for taps in both:
            alone = model(images, taps)
            for field in ("heads", "scores", "features"):
                for name, expected in getattr(alone, field).items():
                    torch.testing.assert_close(getattr(together, field)[name], expected, **EXACT)
            for block, qkv in alone.qkv.items():
                for ours, expected in zip(together.qkv[block], qkv, strict=True):
                    assert (ours is None) == (expected is None)
                    if expected is not None:
                        torch.testing.assert_close(ours, expected, **EXACT)
        torch.testing.assert_close(together.logits, model(images).logits, **EXACT)


class TestOutput:
    def whole(self) -> Output:
        return Output(
            torch.tensor([[1.0, 2.0], [4.0, 3.0]]),
            {"class_token": torch.tensor([3.0]), "distillation_token": torch.tensor([4.0])},
            {2: torch.tensor([5.0]), 0: torch.tensor([6.0])},
            {
                1: QKV(torch.tensor([7.0]), torch.tensor([8.0])),
                3: QKV(*(torch.tensor([x]) for x in (9.0, 10.0, 11.0))),
            },
            {"embed": torch.tensor([12.0])},
        )

    def test_map_changes_every_tensor_in_its_place(self):
        before = self.whole()

        after = before.map(lambda tensor: -tensor)

        assert torch.equal(after.logits, -before.logits)
        assert [tensor.tolist() for tensor in after.tensors()] == [
            (-tensor).tolist() for tensor in before.tensors()
        ]
        assert after.heads == {"class_token": -3.0, "distillation_token": -4.0}
        assert after.scores == {2: -5.0, 0: -6.0}
        assert after.qkv == {1: (-7.0, -8.0, None), 3: (-9.0, -10.0, -11.0)}
        assert after.features == {"embed": -12.0}
        assert isinstance(after, Output)
        assert isinstance(after.qkv[1], QKV)

    def test_map_leaves_out_what_is_not_there(self):
        assert Output().map(lambda tensor: tensor + 1) == Output()
        assert Output().tensors() == []

    def test_tensors_are_all_of_them_once_as_they_are(self):
        output = self.whole()
        expected = [
            output.logits,
            *output.heads.values(),
            *output.scores.values(),
            *output.qkv[1][:2],
            *output.qkv[3],
            *output.features.values(),
        ]

        tensors = output.tensors()

        assert len(tensors) == len(expected) == 11
        assert all(mine is their for mine, their in zip(tensors, expected, strict=True))

    def test_the_predicted_classes_are_the_most_probable(self):
        assert self.whole().predicted.tolist() == [1, 0]
        with pytest.raises(AssertionError, match="logits"):
            _ = Output().predicted


class TestLayouts:
    """`model.attention` says what the rows and columns of the scores are."""

    def test_every_block_has_one_that_fits_its_scores(self, model, images):
        scores = model(images, Taps(scores=ALL_BLOCKS)).scores
        qkv = model(images, Taps(qkv=ALL_BLOCKS)).qkv

        assert len(model.attention) == len(model.config.attention_layouts()) == DEPTH
        for i, layout in enumerate(model.attention):
            assert scores[i].shape == (3, layout.heads, layout.tokens, layout.tokens)
            assert qkv[i].q.shape == (3, layout.heads, layout.tokens, layout.head_dim)
            assert layout.grid == (2, 2)
            assert layout.tokens == layout.prefix + 4
            assert layout.windows == 1

    def test_the_readers_are_the_tokens_whose_last_state_the_logits_read(self, model, images):
        """By the gradient of the logits."""
        output = model(images, Taps(features=("block3",)))

        (gradient,) = torch.autograd.grad(output.answer.sum(), output.features["block3"])

        read = gradient.abs().amax((0, 2)).nonzero().flatten().tolist()
        assert all(list(layout.readers) == read for layout in model.attention)
        assert read == ([0, 1] if model.config.distillation_token else [0])

    @torch.no_grad()
    def test_patches_stand_behind_the_prefix_row_by_row(self, model, images):
        """Each corner of the image lies in a patch of its own, even of shifted ones."""
        before, layout = model.embed(images), model.attention[0]

        for row, column in product(range(2), repeat=2):
            changed = images.clone()
            changed[..., 7 * row, 7 * column] += 1
            moved = (model.embed(changed) != before).any(-1).any(0)
            assert moved.nonzero().flatten().tolist() == [layout.prefix + 2 * row + column]

    def test_the_mask_says_which_weights_are_0(self, model, images):
        weights = model.trace(images).weights

        for layout, of_block in zip(model.attention, weights, strict=True):
            mask = torch.ones(layout.tokens, layout.tokens).bool() if layout.mask is None else layout.mask
            assert torch.equal((of_block != 0).all(0).all(0), mask)
            assert (layout.mask is None) == (model.config.attention != "lsa")

    def test_a_resnet_has_none(self, resnet):
        assert resnet.attention == ()
        assert resnet.config.attention_layouts() == ()


@pytest.mark.parametrize("indices", [[0, 1, 2], [1, 2], [2, 0]])
def test_what_is_selected_has_the_gradient_of_an_indexing(indices):
    x = torch.randn(2, 3, 4, requires_grad=True)
    upstream = torch.randn(2, len(indices), 4)

    selected, indexed = select(x, indices, dim=1), x[:, indices]

    assert torch.equal(selected, indexed)
    assert torch.equal(*(torch.autograd.grad(y, x, upstream)[0] for y in (selected, indexed)))
