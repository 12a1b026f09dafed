"""Pictures appear when they should, show the right maps, and change nothing about training."""

import copy
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitkd.data import Batch
from vitkd.explain.gallery.figures import figure_1
from vitkd.explain.maps.attention import cls_attention
from vitkd.explain.maps.recording import evaluating
from vitkd.methods.logit import LogitObjective
from vitkd.methods.maps.alignment import align
from vitkd.methods.maps.granularity import BlockPair
from vitkd.methods.maps.losses import KL
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.methods.token import TokenObjective
from vitkd.models import Taps, ViTConfig
from vitkd.optim import AdamW, Constant
from vitkd.runs.curves import TensorBoardCurves
from vitkd.train.module import DistillModule
from vitkd.train.pictures import AttentionPictures, look, rendered

pytestmark = [
    # Lightning 2.6 asks torch in a way that torch 2.15 has deprecated.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    # The frozen teacher is meant to be.
]

TAG = "attention/block1_from_2"
NAMES = ["ant", "bee", "cat"]


class Loader:
    """To Lightning a list of batches would be so many loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def vit(depth, heads, **settings):
    shape = {"image_size": 8, "channels": 1, "num_classes": 3, "patch_size": 4}
    return ViTConfig(
        **shape, embed_dim=8, depth=depth, num_heads=heads, head_dim=4, mlp_dim=8, **settings
    ).build()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [Batch(torch.randn(6, 1, 8, 8), torch.arange(6) % 3, torch.arange(6)) for _ in range(2)]


FIRST, LAST = BlockPair(0, 0, (0,), ((0,),)), BlockPair(1, 2, (0, 1), ((0, 2), (1, 3)))


def learning(objective, depth=2):
    """A student with two heads a block; its teacher has three blocks of four heads."""
    torch.manual_seed(2)
    student, teacher = vit(depth=depth, heads=2, dropout=0.2), vit(depth=3, heads=4)
    return DistillModule(student, AdamW(), Constant(), teacher=teacher, objective=objective, alpha=0.5)


@pytest.fixture
def module():
    return learning(AttentionObjective([FIRST, LAST], KL()))


@pytest.fixture
def partly():
    """Only the middle one of its blocks is distilled, and there only one head."""
    pair = BlockPair(1, 2, (1,), ((3,),))
    return learning(AttentionObjective([pair], KL()), depth=3)


def scores(model, images, *blocks):
    return model(images, Taps(scores=blocks)).scores


def pictures(batches, every_n_epochs=9, path=None):
    images, labels, *_ = batches[0]
    return AttentionPictures(images, labels, NAMES, [0.5], [0.25], every_n_epochs, path)


def fit(module, batches, folder, callbacks, max_epochs=1):
    torch.manual_seed(3)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=TensorBoardCurves(folder),
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Loader(batches), Loader(batches))


def logged_steps(folder):
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["images"]
    assert set(tags) <= {TAG}
    return [event.step for event in events.Images(TAG)] if tags else []


@pytest.mark.parametrize(
    ("every_n_epochs", "steps"),
    [(1, [2, 4, 6]), (2, [4, 6]), (3, [6]), (9, [6])],
)
def test_pictures_come_every_n_epochs_and_at_the_end(module, batches, tmp_path, every_n_epochs, steps):
    path = tmp_path / "attention.png"
    fit(module, batches, tmp_path, [pictures(batches, every_n_epochs, path)], max_epochs=3)
    assert logged_steps(tmp_path) == steps
    with Image.open(path) as png:
        assert png.size[0] > 500
    assert [file.name for file in tmp_path.glob("*.tmp")] == []


def test_training_is_the_same_with_and_without_pictures(module, batches, tmp_path):
    alone = copy.deepcopy(module)
    fit(alone, batches, tmp_path / "without", [], max_epochs=2)
    fit(module, batches, tmp_path / "with", [pictures(batches, 1)], max_epochs=2)
    for expected, found in zip(alone.parameters(), module.parameters(), strict=True):
        assert torch.equal(expected, found)


def headings(figure):
    return [text.get_text() for text in figure.texts[:-1]]


def caption(figure):
    return figure.texts[-1].get_text().replace("\n", " ")


def test_the_figure_shows_the_first_four_images_and_what_each_model_says(module, batches):
    titles = [axes.get_title() for axes in pictures(batches).draw(module, "epoch 1").axes][:12]
    images = batches[0].image[:4]
    teacher = [NAMES[i] for i in module.teacher(images).logits.argmax(-1)]
    student = [NAMES[i] for i in module.model.eval()(images).logits.argmax(-1)]
    assert titles[::3] == ["ant", "bee", "cat", "ant"]
    assert [title.split()[0] for title in titles[1::3]] == teacher
    assert [title.split()[0] for title in titles[2::3]] == student
    assert all(
        ("✓" in said) == (said.split()[0] == true)
        for said, true in zip(titles[1::3], titles[::3], strict=True)
    )


def shown_by(monkeypatch, callback, module):
    """The maps that `callback` draws: the teacher's, and the student's in its two blocks."""
    given = []

    def draw(images, *maps, **texts):
        given.extend(maps)
        return figure_1(images, *maps, **texts)

    monkeypatch.setattr("vitkd.train.pictures.figure_1", draw)
    callback.draw(module, "epoch 1")
    return given


def test_the_figure_shows_the_last_pair_and_the_last_block_that_is_not_distilled(
    monkeypatch, partly, batches
):
    images = batches[0].image[:4]
    maps = shown_by(monkeypatch, pictures(batches), partly)
    ours, theirs = scores(partly.model.eval(), images, 1, 2), scores(partly.teacher, images, 2)
    with torch.no_grad():
        expected = [
            cls_attention(theirs[2], 2, [3]),
            cls_attention(ours[1], 2, [1]),
            cls_attention(ours[2], 2, [0, 1]),
        ]
    torch.testing.assert_close(maps, expected)


def test_the_figure_says_which_blocks_and_heads(partly, module, batches):
    figure = pictures(batches).draw(partly, "epoch 1")
    assert headings(figure) == ["image", "teacher, block 2", "student, block 1", "block 2, not distilled"]
    assert caption(figure) == "epoch 1 · mean over the distilled heads, in block 2 over all"

    figure = pictures(batches).draw(module, "epoch 1")
    assert headings(figure) == ["image", "teacher, block 2", "student, block 1"]
    assert caption(figure) == "epoch 1 · mean over the distilled heads"


def test_where_no_map_is_distilled_the_last_blocks_are_shown(monkeypatch, batches):
    module = learning(LogitObjective(4.0))
    figure = pictures(batches).draw(module, "epoch 1")
    assert headings(figure) == ["image", "teacher, block 2", "student, block 1"]
    assert caption(figure) == "epoch 1 · mean over the blocks’ heads"

    images = batches[0].image[:4]
    maps = shown_by(monkeypatch, pictures(batches), module)
    with torch.no_grad():
        expected = [
            cls_attention(scores(module.teacher, images, 2)[2], 2),
            cls_attention(scores(module.model.eval(), images, 1)[1], 2),
        ]
    assert maps.pop() is None
    torch.testing.assert_close(maps, expected)


def test_each_model_is_asked_once(partly, batches):
    calls = []
    for name in ("model", "teacher"):
        getattr(partly, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    pictures(batches).draw(partly, "epoch 1")
    assert sorted(calls) == ["model", "teacher"]


def test_everything_lies_inside_the_figure(partly, batches):
    figure = pictures(batches).draw(partly, "epoch 100")
    inner = figure.get_tightbbox()
    assert inner.x0 >= 0
    assert inner.y0 >= 0
    assert inner.x1 <= figure.get_figwidth()
    assert inner.y1 <= figure.get_figheight()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_student_that_has_diverged_is_drawn_all_the_same(partly, batches, value):
    for parameter in partly.model.parameters():
        parameter.data.fill_(value)
    assert rendered(pictures(batches).draw(partly, "epoch 1")).std() > 0


def test_look_averages_the_chosen_heads(module, batches):
    images = batches[0].image
    heads = {0: [3], 2: [0, 2]}
    maps, labels = look(module.teacher, images, heads)
    given = scores(module.teacher, images, 0, 2)
    assert maps.keys() == heads.keys()
    for block in heads:
        weights = given[block][:, heads[block], 0].softmax(-1).mean(1)[:, 1:]
        torch.testing.assert_close(maps[block].flatten(1), weights / weights.sum(1, keepdim=True))
    assert labels == module.teacher(images).logits.argmax(-1).tolist()


SWITCHES = [
    {},
    {"attention": "lsa"},
    {"distillation_token": True},
    {"attention": "lsa", "distillation_token": True, "tokenizer": "spt"},
]


@torch.no_grad()
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: ", ".join(switches) or "none")
def test_look_shows_the_weights_that_the_model_used(switches, batches):
    model = vit(depth=3, heads=4, **switches).eval()
    for block in model.blocks:
        if "attention" in switches:
            block.attention.log_temperature.normal_()
    images = batches[0].image

    maps, labels = look(model, images, {0: [3], 2: [0, 2]})

    trace, prefix = model.trace(images), model.config.prefix
    for block, heads in {0: [3], 2: [0, 2]}.items():
        given = sum(trace.weights[block][:, head, reader] for head in heads for reader in range(prefix))
        to_patches = given[:, prefix:]
        expected = to_patches / to_patches.sum(1, keepdim=True)
        torch.testing.assert_close(maps[block].flatten(1), expected)
    assert labels == trace.logits.argmax(-1).tolist()


@pytest.mark.parametrize("maps_too", [False, True])
def test_a_student_with_a_distillation_token_is_drawn_beside_a_plain_teacher(batches, maps_too):
    student, teacher = vit(depth=2, heads=2, distillation_token=True), vit(depth=3, heads=4)
    alignment = align(student.attention[LAST.student_block], teacher.attention[LAST.teacher_block])
    attention = AttentionObjective([LAST], KL(), [alignment], 6)
    objective = TokenObjective("hard", 1.0, attention, 1.0) if maps_too else TokenObjective("hard", 1.0)
    module = DistillModule(student, AdamW(), Constant(), teacher=teacher, objective=objective, alpha=0.5)

    figure = pictures(batches).draw(module, "epoch 1")

    columns = ["image", "teacher, block 2", "student, block 1"]
    assert headings(figure) == [*columns, *(["block 0, not distilled"] if maps_too else [])]
    assert figure.axes[-1].get_ylabel() == "attention weight\nof the classifying tokens"


def test_drawing_takes_no_random_number_and_leaves_the_model_as_it_was(partly, batches):
    partly.train()
    state = torch.get_rng_state()
    before = copy.deepcopy(partly.state_dict())
    modes = [part.training for part in partly.modules()]
    pictures(batches).draw(partly, "epoch 1")
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in partly.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in partly.state_dict().items())


def test_look_builds_no_graph(module, batches):
    maps, _ = look(module.model, batches[0].image, {0: [0], 1: [0, 1]})
    assert not any(each.requires_grad for each in maps.values())


def test_every_part_gets_its_own_mode_back(module):
    model = module.model.train()
    model.blocks[0].eval()
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert model.training
    assert model.blocks[1].training
    assert not any(part.training for part in model.blocks[0].modules())


def test_only_the_first_process_draws(module, batches, tmp_path):
    trainer = SimpleNamespace(is_global_zero=False, current_epoch=0, global_step=2, loggers=[])
    callback = pictures(batches, 1, tmp_path / "attention.png")
    callback.on_train_epoch_end(trainer, module)
    callback.on_train_end(trainer, module)
    assert list(tmp_path.iterdir()) == []


def test_a_module_without_teacher_is_refused(batches):
    trainer = SimpleNamespace(is_global_zero=True, current_epoch=0)
    module = DistillModule(vit(depth=1, heads=1), AdamW(), Constant())
    with pytest.raises(AssertionError, match="the module has no teacher"):
        pictures(batches, 1).on_train_epoch_end(trainer, module)
