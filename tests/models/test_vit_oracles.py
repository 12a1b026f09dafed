"""Under copied weights the ViT computes what vit-pytorch's, timm's, torchvision's and PyTorch's own do."""

from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn
from vit_pytorch.vit import ViT as VitPytorch

from vitkd.models import Taps, ViT, ViTConfig
from vitkd.models.output import BlockTaps

LAYER_NORM = partial(nn.LayerNorm, eps=1e-5)  # timm and torchvision take 1e-6 by themselves


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


def randomised(config: ViTConfig, dtype: torch.dtype) -> ViT:
    """A model none of whose parameters is at a telling 0 or 1."""
    model = config.build().to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def plain(tiny, **changes: object) -> ViTConfig:
    """The shape that timm and torchvision can have: inner width = embed_dim, with QKV bias, bare patches."""
    return tiny(embed_dim=12, num_heads=3, head_dim=4, qkv_bias=True, patch_norm=False, **changes)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def convolution(ours: ViT) -> torch.Tensor:
    """The patch projection as timm and torchvision have it."""
    c = ours.config
    return ours.tokenizer.projection.weight.unflatten(1, (c.channels, c.patch_size, c.patch_size))


def timm_counterpart(ours: ViT) -> nn.Module:
    c = ours.config
    theirs = timm.models.VisionTransformer(
        img_size=c.image_size, patch_size=c.patch_size, in_chans=c.channels, num_classes=c.num_classes,
        embed_dim=c.embed_dim, depth=c.depth, num_heads=c.num_heads, mlp_ratio=c.mlp_dim / c.embed_dim,
        qkv_bias=True, norm_layer=LAYER_NORM,
    )  # fmt: skip
    renamed = {
        "cls_token": ours.cls_token,
        "pos_embed": ours.positions,
        "patch_embed.proj.weight": convolution(ours),
        "patch_embed.proj.bias": ours.tokenizer.projection.bias,
    }
    inner = {
        "attention.norm": "norm1", "attention.qkv": "attn.qkv", "attention.out": "attn.proj",
        "mlp.norm": "norm2", "mlp.expand": "mlp.fc1", "mlp.contract": "mlp.fc2",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        for name in ("norm", "head"):
            renamed[f"{name}.{kind}"] = ours.get_parameter(f"{name}.{kind}")
        for i in range(c.depth):
            for mine, their in inner.items():
                renamed[f"blocks.{i}.{their}.{kind}"] = ours.get_parameter(f"blocks.{i}.{mine}.{kind}")
    theirs.load_state_dict(renamed)
    return theirs.to(ours.head.weight.dtype).eval()


def torchvision_counterpart(ours: ViT) -> nn.Module:
    c = ours.config
    theirs = torchvision.models.VisionTransformer(
        image_size=c.image_size, patch_size=c.patch_size, num_layers=c.depth, num_heads=c.num_heads,
        hidden_dim=c.embed_dim, mlp_dim=c.mlp_dim, num_classes=c.num_classes, norm_layer=LAYER_NORM,
    )  # fmt: skip
    renamed = {
        "class_token": ours.cls_token,
        "encoder.pos_embedding": ours.positions,
        "conv_proj.weight": convolution(ours),
        "conv_proj.bias": ours.tokenizer.projection.bias,
    }
    inner = {
        "attention.norm.": "ln_1.", "attention.qkv.": "self_attention.in_proj_",
        "attention.out.": "self_attention.out_proj.", "mlp.norm.": "ln_2.", "mlp.expand.": "mlp.0.",
        "mlp.contract.": "mlp.3.",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        renamed[f"encoder.ln.{kind}"] = ours.get_parameter(f"norm.{kind}")
        renamed[f"heads.head.{kind}"] = ours.get_parameter(f"head.{kind}")
        for i in range(c.depth):
            for mine, their in inner.items():
                name = f"encoder.layers.encoder_layer_{i}.{their}{kind}"
                renamed[name] = ours.get_parameter(f"blocks.{i}.{mine}{kind}")
    theirs.load_state_dict(renamed)
    return theirs.to(ours.head.weight.dtype).eval()


def vit_pytorch_counterpart(ours: ViT) -> nn.Module:
    c = ours.config
    theirs = VitPytorch(
        image_size=c.image_size, patch_size=c.patch_size, channels=c.channels, num_classes=c.num_classes,
        dim=c.embed_dim, depth=c.depth, heads=c.num_heads, mlp_dim=c.mlp_dim, dim_head=c.head_dim,
    )  # fmt: skip

    def channels_last(pixels: torch.Tensor) -> torch.Tensor:
        """The last axis from (c p1 p2) to vit-pytorch's (p1 p2 c)."""
        return pixels.unflatten(-1, (c.channels, c.patch_size, c.patch_size)).movedim(-3, -1).flatten(-3)

    renamed = {
        "cls_token": ours.cls_token[0],
        "pos_embedding": ours.positions[0],
        "to_patch_embedding.2.weight": channels_last(ours.tokenizer.projection.weight),
        "to_patch_embedding.2.bias": ours.tokenizer.projection.bias,
    }
    inner = {
        "attention.norm": "0.norm", "attention.out": "0.to_out.0",
        "mlp.norm": "1.net.0", "mlp.expand": "1.net.1", "mlp.contract": "1.net.4",
    }  # fmt: skip
    for i in range(c.depth):
        renamed[f"transformer.layers.{i}.0.to_qkv.weight"] = ours.blocks[i].attention.qkv.weight
    for kind in ("weight", "bias"):
        renamed[f"to_patch_embedding.1.{kind}"] = channels_last(
            ours.get_parameter(f"tokenizer.patch_norm.{kind}")
        )
        renamed[f"to_patch_embedding.3.{kind}"] = ours.get_parameter(f"tokenizer.projection_norm.{kind}")
        renamed[f"transformer.norm.{kind}"] = ours.get_parameter(f"norm.{kind}")
        renamed[f"mlp_head.{kind}"] = ours.get_parameter(f"head.{kind}")
        for i in range(c.depth):
            for mine, their in inner.items():
                name = f"transformer.layers.{i}.{their}.{kind}"
                renamed[name] = ours.get_parameter(f"blocks.{i}.{mine}.{kind}")
    theirs.load_state_dict(renamed)
    return theirs.to(ours.head.weight.dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, {"image_size": 9, "patch_size": 3, "channels": 2, "num_heads": 3}])
def test_logits_equal_vit_pytorchs(tiny, dtype, shape):
    ours = randomised(tiny(**shape), dtype)
    images = torch.randn(4, ours.config.channels, ours.config.image_size, ours.config.image_size, dtype=dtype)

    assert_equal(ours(images).logits, vit_pytorch_counterpart(ours)(images))


@torch.no_grad()
def test_logits_equal_timms(tiny, dtype):
    ours = randomised(plain(tiny, mlp_dim=24), dtype)
    images = torch.randn(4, 3, 8, 8, dtype=dtype)

    assert_equal(ours(images).logits, timm_counterpart(ours)(images))


@torch.no_grad()
def test_logits_equal_torchvisions(tiny, dtype):
    ours = randomised(plain(tiny), dtype)
    images = torch.randn(4, 3, 8, 8, dtype=dtype)

    assert_equal(ours(images).logits, torchvision_counterpart(ours)(images))


@torch.no_grad()
def test_attention_weights_of_every_block_equal_timms(tiny, dtype):
    ours = randomised(plain(tiny, mlp_dim=24), dtype)
    theirs = timm_counterpart(ours)
    images = torch.randn(4, 3, 8, 8, dtype=dtype)
    seen = []
    for block in theirs.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))

    theirs(images)

    recorded = ours(images, Taps(scores=(0, 1, 2), logits=False)).scores
    assert len(seen) == 3
    for i, weights in enumerate(seen):
        assert_equal(recorded[i].softmax(-1), weights)


@torch.no_grad()
def test_attention_weights_and_tokens_equal_pytorchs_multihead_attention(tiny, dtype):
    attention = randomised(plain(tiny), dtype).blocks[1].attention
    theirs = nn.MultiheadAttention(embed_dim=12, num_heads=3, batch_first=True, dtype=dtype).eval()
    theirs.in_proj_weight.copy_(attention.qkv.weight)
    theirs.in_proj_bias.copy_(attention.qkv.bias)
    theirs.out_proj.load_state_dict(attention.out.state_dict())
    x = torch.randn(4, 7, 12, dtype=dtype)

    tokens, (scores, *_) = attention(x, BlockTaps(scores=True))

    normed = attention.norm(x)
    their_tokens, weights = theirs(normed, normed, normed, need_weights=True, average_attn_weights=False)
    assert_equal(scores.softmax(-1), weights)
    assert_equal(tokens, their_tokens)
