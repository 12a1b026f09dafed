"""Three students stacked along a leading axis of every parameter compute what they compute one by one."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from vitkd.models import Taps, ViT

EXACT = {"atol": 1e-12, "rtol": 1e-12}
SCORES = Taps(scores=(0, 2), logits=False)


def stack(models: list[ViT]) -> ViT:
    stacked = deepcopy(models[0])
    for name, _ in models[0].named_parameters():
        owner, _, leaf = name.rpartition(".")
        values = torch.stack([model.get_parameter(name).detach() for model in models])
        setattr(stacked.get_submodule(owner), leaf, nn.Parameter(values))
    return stacked


VARIANTS = {
    "bare": {},
    "qkv-bias": {"qkv_bias": True},
    "no-patch-norm": {"patch_norm": False},
    "one-head": {"num_heads": 1, "head_dim": 12},
    "spt": {"tokenizer": "spt"},
    "lsa": {"attention": "lsa"},
    "distillation-token": {"distillation_token": True},
    "spt-lsa-distillation-token": {"tokenizer": "spt", "attention": "lsa", "distillation_token": True},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def models(tiny, request) -> list[ViT]:
    models = [tiny(**request.param).build().double() for _ in range(3)]
    for model in models:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return models


@pytest.mark.parametrize("separate", [False, True], ids=["shared-images", "separate-images"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_stacked_students_equal_separate_ones(models, separate, train):
    stacked = stack(models).train(train)
    images = torch.randn(*([3] if separate else []), 4, 3, 8, 8, dtype=torch.float64)
    logit_weights = torch.randn(3, 4, 5, dtype=torch.float64)
    H, T = models[0].config.num_heads, models[0].config.tokens
    score_weights = torch.randn(3, 4, H, T, T, dtype=torch.float64)

    together = stacked(images, Taps(scores=(1,)))
    ((together.logits * logit_weights).sum() + (together.scores[1] * score_weights).sum()).backward()

    assert together.logits.shape == (3, 4, 5)
    for s, model in enumerate(models):
        alone = model.train(train)(images[s] if separate else images, Taps(scores=(1,)))
        ((alone.logits * logit_weights[s]).sum() + (alone.scores[1] * score_weights[s]).sum()).backward()
        torch.testing.assert_close(together.logits[s], alone.logits, **EXACT)
        torch.testing.assert_close(together.scores[1][s], alone.scores[1], **EXACT)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(stacked.get_parameter(name).grad[s], parameter.grad, **EXACT)


@pytest.mark.parametrize("separate", [False, True], ids=["shared-images", "separate-images"])
def test_stacked_scores_alone_equal_separate_ones(models, separate):
    images = torch.randn(*([3] if separate else []), 4, 3, 8, 8, dtype=torch.float64)

    together = stack(models)(images, SCORES).scores

    for s, model in enumerate(models):
        alone = model(images[s] if separate else images, SCORES).scores
        assert alone.keys() == together.keys()
        for i, scores in alone.items():
            torch.testing.assert_close(together[i][s], scores, **EXACT)


@torch.no_grad()
def test_stacked_traces_and_fused_passes_equal_separate_ones(models):
    stacked = stack(models).eval()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    trace, fused = stacked.trace(images), stacked(images)

    for s, model in enumerate(models):
        alone = model.eval().trace(images)
        torch.testing.assert_close(trace.logits[s], alone.logits, **EXACT)
        for ours, theirs in zip(trace.weights + trace.tokens, alone.weights + alone.tokens, strict=True):
            torch.testing.assert_close(ours[s], theirs, **EXACT)
        output = model(images)
        torch.testing.assert_close(fused.logits[s], output.logits, **EXACT)
        assert fused.heads.keys() == output.heads.keys()
        for token, theirs in output.heads.items():
            torch.testing.assert_close(fused.heads[token][s], theirs, **EXACT)


def test_one_stacked_student_keeps_its_axis(tiny):
    model = tiny().build().double()
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)

    output = stack([model])(images, Taps(scores=(0,)))

    assert output.logits.shape == (1, 1, 5)
    assert output.scores[0].shape == (1, 1, 2, 5, 5)
    torch.testing.assert_close(output.logits[0], model(images).logits, **EXACT)
