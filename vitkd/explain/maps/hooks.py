"""The attention weights of models from timm, recorded by forward hooks.

Shapes: B images, C channels, H heads, T tokens (prefix + h·w), h × w patches, D embed_dim, K classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from vitkd.errors import ConfigError, one_line


def timm_model(name: str, pretrained: bool = False) -> nn.Module:
    """The timm model `name` in eval mode, randomly initialised unless `pretrained`, which needs a network.

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
    return model.eval()


def from_extra(module: str, extra: str) -> ModuleType:
    """Import `module`, which the optional `extra` installs, or raise ConfigError saying how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{package} cannot be imported ({one_line(error)}): pip install 'vitkd[{extra}]'"
        ) from error


def check_size(given: Sequence[int], taken: Sequence[int]) -> None:
    """Raise ConfigError unless images of `given` shape are what the model takes."""
    if tuple(given) != tuple(taken):
        shown, allowed = ("×".join(map(str, shape)) for shape in (given, taken))
        raise ConfigError(f"images of {shown}: the model takes {allowed}; resize them first")


def layout_of_timm(model: nn.Module, images: Tensor) -> tuple[int, tuple[int, int], Sequence[int]]:
    """The prefix, grid and readers of a model given images [B, C, H, W], as in `recording.Layout`.

    Raises ConfigError if it has no patches that could be laid out, or takes images of another size.
    """
    _blocks(model)
    embed: Any = model.patch_embed
    if getattr(embed, "strict_img_size", False) and embed.img_size is not None:
        check_size(images.shape[-2:], embed.img_size)
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:
        raise _no_maps(model, "does not say how many tokens precede its patches (num_prefix_tokens)")
    if hasattr(embed, "dynamic_feat_size"):
        grid = embed.dynamic_feat_size(images.shape[-2:])
    elif (grid := getattr(embed, "grid_size", None)) is None:
        raise _no_maps(model, "does not say how its patches are laid out (patch_embed.grid_size)")
    rows, columns = grid
    return prefix, (rows, columns), _readers(model, prefix, rows * columns)


def trace_by_hooks(
    model: nn.Module, images: Tensor, prefix: int, grid: tuple[int, int]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Logits [B, K], and per block the weights [B, H, T, T] and the tokens [B, T, D] after it.

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
        if cause := _unusable(block, its_weights, len(images), prefix, grid):
            raise _no_maps(model, f"{cause} (block {i})")
    return logits, tuple(w for (w,) in weights), tuple(t for (t,) in tokens)


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
        raise _no_maps(model, "attends within windows, so no map spans the image")
    raise _no_maps(model, "has no softmax attention that was found (no `blocks` behind a `patch_embed`)")


def _keep(seen: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    """A forward hook that adds its module's output to `seen`."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)

    return hook


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


def _unusable(
    block: nn.Module, seen: Sequence[Tensor], images: int, prefix: int, grid: tuple[int, int]
) -> str | None:
    """Why what passed through a block's `attn_drop` is not its attention weights [B, H, T, T]."""
    if not seen:
        return "has no softmax attention that was found (nothing passed through an `attn_drop`)"
    if len(seen) > 1:
        return f"has {len(seen)} attentions in one block"
    shape, (rows, columns) = seen[0].shape, grid
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
