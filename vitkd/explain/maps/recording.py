"""One forward pass of a model, with all that explanations read of it; of timm's models by forward hooks.

Shapes: B images, C channels, H heads, T tokens (prefix + h·w), h × w patches, D embed_dim, K classes; of
attention within windows W windows of N tokens each, T of them in a block.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError, from_extra, one_line
from vitkd.explain.maps.windows import Windows, windows_of
from vitkd.models import Model, TimmConfig
from vitkd.models.base import Trace
from vitkd.models.timm.model import TimmModel


class Layout(NamedTuple):
    """Where the patches stand among a model's tokens."""

    prefix: int
    """tokens before the patches: class token, distillation token, registers"""
    grid: tuple[int, int]
    """h rows of w patches"""
    readers: Sequence[int] = (0,)
    """the tokens that the classifier reads: the class token; that and the distillation token, where the
    prediction is the mean of two heads; or the patches, where it pools these"""
    sees_itself: bool = True
    """whether a token may attend to itself; in locality attention it may not"""
    windows: Sequence[Windows] = ()
    """per block: which of its tokens attend among themselves; nothing where all do. `grid` and `readers` are
    those of the first block then, whose tokens are the patches"""


class Recording(NamedTuple):
    """What a forward pass computed; in the autograd graph unless recorded under `torch.no_grad`."""

    logits: Tensor
    """[B, K]"""
    weights: tuple[Tensor, ...]
    """per block: the softmax's [B, H, T, T], within windows [B, H, W·N, N], that multiplied the values"""
    tokens: tuple[Tensor, ...]
    """per block: [B, T, D] after it"""
    prefix: int
    grid: tuple[int, int]
    readers: Sequence[int] = (0,)
    sees_itself: bool = True
    windows: Sequence[Windows] = ()


def record(model: nn.Module, images: Tensor) -> Recording:
    """Classify normalised images [B, C, H, W] in eval mode and keep every block's weights and tokens.

    Takes vitkd's models with attention maps and timm's VisionTransformer with its relatives. The model is
    left as it was: its mode, its hooks and its fused attention, after an error too.

    Raises ConfigError if the attention maps cannot be recorded, naming the cause.
    """
    place = layout(model, images)
    if torch.is_grad_enabled() and not images.requires_grad:
        # Else nothing of a frozen teacher would be in the graph.
        images = images.detach().requires_grad_()
    with evaluating(model):
        trace = model.trace(images) if isinstance(model, Model) else _trace_by_hooks(model, images, place)
    return Recording(*trace, **place._asdict())


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """[B, K] in eval mode, whether the model returns the logits alone or among its outputs."""
    with evaluating(model):
        output = model(images)
    return getattr(output, "logits", output)


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """In eval mode; afterwards every module is back in its own mode."""
    return _switched_off(model.modules(), "training")


@contextmanager
def _switched_off(modules: Iterable[nn.Module], switch: str) -> Iterator[None]:
    """With the attribute `switch` False in all modules where it was true."""
    switched = [module for module in modules if getattr(module, switch, False)]
    for module in switched:
        setattr(module, switch, False)
    try:
        yield
    finally:
        for module in switched:
            setattr(module, switch, True)


def has_maps(model: nn.Module) -> bool:
    """Whether attention maps can be asked for; a model that is not vitkd's is tried."""
    return not isinstance(model, Model) or why_no_maps(model) is None


def why_no_maps(model: Model) -> str | None:
    """Why there are no attention maps, as the rest of a sentence; None if there are."""
    return None if model.attention else "has no attention maps"


def layout(model: nn.Module, images: Tensor) -> Layout:
    """Where `model` puts the patches of images [B, C, H, W].

    Raises ConfigError if it has none that could be laid out, or takes images of another size.
    """
    if isinstance(model, Model) and model.attention:
        c = model.config
        _check_size(images.shape[-3:], (c.channels, c.image_size, c.image_size))
        return own_layout(model)
    _blocks(model)
    embed: Any = model.patch_embed
    if getattr(embed, "strict_img_size", False) and embed.img_size is not None:
        _check_size(images.shape[-2:], embed.img_size)
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:
        raise _no_maps(model, "does not say how many tokens precede its patches (num_prefix_tokens)")
    if hasattr(embed, "dynamic_feat_size"):
        grid = embed.dynamic_feat_size(images.shape[-2:])
    elif (grid := getattr(embed, "grid_size", None)) is None:
        raise _no_maps(model, "does not say how its patches are laid out (patch_embed.grid_size)")
    rows, columns = grid
    return Layout(prefix, (rows, columns), _readers(model, prefix, rows * columns))


def own_layout(model: Model) -> Layout:
    """The layout of a vitkd model that has attention maps."""
    first = model.attention[0]
    if first.window is not None:
        windows = tuple(map(windows_of, model.attention))
        return Layout(first.prefix, first.grid, first.readers, windows=windows)
    sees_itself = first.mask is None or bool(first.mask.diagonal().all())
    return Layout(first.prefix, first.grid, first.readers, sees_itself)


def who_reads(place: Layout | Recording) -> str:
    """The tokens that the classifier reads, in words for a caption."""
    if place.readers[0] >= place.prefix:
        return "patches"
    return "class token" if len(place.readers) == 1 else "class and distillation tokens"


def timm_model(name: str, pretrained: bool = False) -> nn.Module:
    """The timm model `name` in eval mode, randomly initialised unless `pretrained`, which needs a network.

    A Swin or a TNT is a `TimmModel`, any other timm's own network.

    Raises ConfigError if timm is absent, has no such model, or cannot download its weights.
    """
    timm = from_extra("timm", "timm")
    name = name.removeprefix("timm:")
    if not timm.is_model(name):
        known = timm.list_models()
        near = get_close_matches(name, known, n=3) or [each for each in known if each.startswith("vit_tiny")]
        raise ConfigError(f"model=timm:{name}: timm has no such model, it has {', '.join(near[:3])}, …")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"model=timm:{name}: cannot be built ({one_line(error)}); pretrained weights need a network, "
            "random ones do not"
        ) from error
    return _with_encoder(name, model).eval()


def _with_encoder(name: str, network: Any) -> nn.Module:
    """timm's network, as a `TimmModel` if it is a Swin or TNT, of whose attention hooks tell too little."""
    from vitkd.models.timm.architectures import ENCODERS
    from vitkd.models.timm.swin import SwinEncoder
    from vitkd.models.timm.tnt import TNTEncoder

    if not issubclass(ENCODERS.get(type(network), object), SwinEncoder | TNTEncoder):
        return network
    stated = network.pretrained_cfg
    (channels, _, size), mean, std = stated["input_size"], [*stated["mean"]], [*stated["std"]]
    return TimmModel(TimmConfig(size, channels, network.num_classes, mean, std, name), network)


def _check_size(given: Sequence[int], taken: Sequence[int]) -> None:
    """Raise ConfigError unless images of `given` shape are what the model takes."""
    if tuple(given) != tuple(taken):
        shown, allowed = ("×".join(map(str, shape)) for shape in (given, taken))
        raise ConfigError(f"images of {shown}: the model takes {allowed}; resize them first")


def _trace_by_hooks(model: nn.Module, images: Tensor, place: Layout) -> Trace:
    """What passes through the blocks of something like timm's VisionTransformer.

    Raises ConfigError if what passed through a block's `attn_drop` is not the attention of these patches.
    """
    blocks = _blocks(model)
    weights: list[list[Tensor]] = [[] for _ in blocks]
    tokens: list[list[Tensor]] = [[] for _ in blocks]
    with ExitStack() as stack:
        # A checkpointed block would run again in the backward pass, with fused attention.
        stack.enter_context(_switched_off([model], "grad_checkpointing"))
        for block, its_weights, its_tokens in zip(blocks, weights, tokens, strict=True):
            stack.enter_context(_switched_off(block.modules(), "fused_attn"))
            stack.enter_context(block.register_forward_hook(_keep(its_tokens)))
            for name, module in block.named_modules():
                if name.rpartition(".")[2] == "attn_drop":
                    stack.enter_context(module.register_forward_hook(_keep(its_weights)))
        logits = model(images)
    for i, (block, its_weights) in enumerate(zip(blocks, weights, strict=True)):
        if cause := _unusable(block, its_weights, len(images), place):
            raise _no_maps(model, f"{cause} (block {i})")
    return Trace(logits, tuple(w for (w,) in weights), tuple(t for (t,) in tokens))


def _readers(model: nn.Module, prefix: int, patches: int) -> Sequence[int]:
    """The tokens that the classifier of something like timm's VisionTransformer reads."""
    if getattr(model, "global_pool", "token") != "token":
        return range(prefix, prefix + patches)
    # timm's distilled models predict by the mean of two heads; registers are read by none.
    return range(2) if hasattr(model, "head_dist") else range(1)


def _no_maps(model: nn.Module, cause: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} {cause}: its attention maps cannot be had; "
        "give a vitkd run or a VisionTransformer of timm"
    )


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The blocks of something like timm's VisionTransformer."""
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks) and hasattr(model, "patch_embed"):
        return [*blocks]
    if any(hasattr(module, "window_size") for module in model.modules()):
        raise _no_maps(
            model, "attends within windows, which only vitkd's TimmModel of Swin and Swin V2 records"
        )
    if hasattr(model, "pixel_embed"):
        raise _no_maps(model, "attends within patches too, which only vitkd's TimmModel of TNT records")
    raise _no_maps(model, "has no softmax attention that was found (no `blocks` behind a `patch_embed`)")


def _keep(seen: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    """A forward hook that adds its module's output to `seen`."""
    return lambda _module, _inputs, output: seen.append(output)


def _unusable(block: nn.Module, seen: Sequence[Tensor], images: int, place: Layout) -> str | None:
    """Why what passed through a block's `attn_drop` is not its attention weights [B, H, T, T]."""
    if not seen:
        return "has no softmax attention that was found (nothing passed through an `attn_drop`)"
    if len(seen) > 1:
        return f"has {len(seen)} attentions in one block"
    shape, prefix, (rows, columns) = seen[0].shape, place.prefix, place.grid
    if len(shape) != 4 or shape[-1] != shape[-2]:
        return f"has no token-by-token attention, but one of shape {[*shape]}"
    if shape[0] != images:
        return f"attends within {shape[0] // images} windows an image, so no map spans it"
    if shape[-1] != prefix + rows * columns:
        return f"attends over {shape[-1]} tokens, which are not {prefix} and {rows}×{columns} patches"
    heads = next((module.num_heads for module in block.modules() if hasattr(module, "num_heads")), shape[1])
    if heads != shape[1]:
        return f"mixes {shape[1]} maps into {heads} heads after the softmax (differential attention)"
    # bf16 sums of some hundred weights are off by a hundredth.
    if ((seen[0].detach().float().sum(-1) - 1).abs() > 0.05).any():
        return "has attention weights that do not sum to 1, so they are not a softmax's"
    return None
