"""A model of timm's: its settings, and the network that answers taps.

timm takes seconds to import and most runs have no use for it, so it is imported when one of its models is
looked at.

Shapes: B images, C channels, H × W pixels, T tokens, D embed_dim, K classes.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError, from_extra
from vitkd.models.base import Model, Trace
from vitkd.models.initialisation import MIMETIC, InitialisedConfig
from vitkd.models.layers import AttentionOutput
from vitkd.models.output import (
    INNER,
    LOGITS,
    NO_BLOCK_TAPS,
    OUTER,
    AttentionLayout,
    BlockTaps,
    Output,
    Taps,
    shown,
)
from vitkd.models.timm.images import Inputs

if TYPE_CHECKING:
    from vitkd.models.timm.encoders import Encoder, State
    from vitkd.models.timm.facts import Facts


@dataclass(repr=False)
class TimmConfig(InitialisedConfig):
    """A model of `timm.create_model`, beginning with random weights, pretrained ones or those of a file.

    It is given every image in the size and normalisation that timm's own configuration of it says. Its head
    is a new one unless the weights are of as many classes.
    """

    REST: ClassVar[str] = "options"

    mean: list[float]
    """of the images that come, in 0..1, a value for each channel"""
    std: list[float]
    name: str
    """as in timm; NAME.TAG chooses among its pretrained weights"""
    pretrained: bool = False
    weights: str | None = field(default=None, repr=False)
    """a file to begin with: .safetensors, .pth, .pt or .bin"""
    options: dict[str, Any] = field(default_factory=dict)
    """arguments of `timm.create_model`; those that are None are left to timm"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options = {name: value for name, value in self.options.items() if value is not None}
        wants_token = self.options.pop(
            "distillation_token", False
        )  # as method=token has it for every student
        if self.pretrained and self.weights is not None:
            raise ConfigError(f"pretrained=true: weights={self.weights} is given too; set one of the two")
        if wants_token and not self.has_distillation_token:
            raise ConfigError(
                f"distillation_token=true: {self.name} has none; choose a distilled model of timm's, such as "
                "deit_tiny_distilled_patch16_224, or method=logit"
            )
        assert self.facts
        self._check_init()

    def _check_init(self) -> None:
        if self.init is not None and (self.pretrained or self.weights is not None):
            given = f"weights={self.weights}" if self.weights else "pretrained=true"
            raise ConfigError(f"init={self.init}: {given} is what it begins with; set one of the two")
        kind = self.facts.architecture
        if self.init == MIMETIC and not (kind == "VisionTransformer" and self.attention_layouts()):
            raise ConfigError(f"init=mimetic: {self.name} is a {kind} of timm's; choose a VisionTransformer")

    def __str__(self) -> str:
        facts, layouts = self.facts, self.attention_layouts()
        origin = f" from {self.weights}" if self.weights else ", pretrained" if self.pretrained else ""
        pixels = f"{shown(facts.size)} pixels"
        if facts.size != (self.image_size, self.image_size):
            pixels += f" made of {self.image_size}×{self.image_size}"
        if not layouts:
            return f"{self.name} ({facts.architecture}){origin}, {pixels}"
        heads, grid, prefix = layouts[0].heads, layouts[0].grid, layouts[0].prefix
        patches = f"{shown(grid)} patches"
        if (window := layouts[0].window) is not None:
            attends = f"{patches} at first in windows of {shown(window)}"
            return f"{self.name}{origin}, {len(layouts)} blocks, {pixels}, {attends}"
        if inner := self.attention_layouts(INNER):
            assert inner[0].window is not None
            patches += f" of {shown(inner[0].window)} words"
        return (
            f"{self.name}{origin}, {len(layouts)}×{heads} blocks×heads, {pixels}, {patches} + "
            f"{prefix} other token{'' if prefix == 1 else 's'}"
        )

    @property
    def facts(self) -> "Facts":
        """What timm says of this model; ConfigError where it is absent or cannot build the model."""
        from_extra("timm", "timm")
        from vitkd.models.timm.facts import facts_of

        return facts_of(self.name, self.num_classes, json.dumps(self.options, sort_keys=True))

    @property
    def least_bytes(self) -> int:
        # A parameter's value, gradient and AdamW's two moments.
        return 16 * self.facts.parameters

    @property
    def min_batch_size(self) -> int:
        return 2 if self.facts.normalises_batches else 1

    @property
    def drops(self) -> bool:
        return self.facts.drops

    @property
    def has_distillation_token(self) -> bool:
        return self.facts.has_distillation_token

    def attention_layouts(self, part: str = OUTER) -> tuple[AttentionLayout, ...]:
        return self.facts.layouts.get(part, ())

    def prepare(self) -> None:
        if self.pretrained or self.weights:
            self.first_network()

    def check_files(self) -> None:
        super().check_files()
        if self.weights is not None:
            from vitkd.models.timm.weights import check_file

            check_file(Path(self.weights))

    def untrained(self) -> str:
        from vitkd.models.timm.weights import classes_of

        if not (self.weights or self.pretrained):
            return super().untrained()
        classes = classes_of(self.name, self.weights)
        if classes != self.num_classes:
            raise ConfigError(
                f"trained=false: the weights of {self.name} are of {classes} classes, not "
                f"{self.num_classes}; its new head has to be trained: set trained=true"
            )
        return f"weights {f'of {self.weights}' if self.weights else 'as published'}"

    @property
    def weights_file(self) -> str | None:
        return self.weights or super().weights_file

    def architecture(self) -> "TimmModel":
        from vitkd.models.timm.create import created

        return TimmModel(self, created(self.name, self.num_classes, self.options))

    def build(self) -> "TimmModel":
        from vitkd.models.timm.create import begin_mimetic
        from vitkd.models.timm.weights import classes_of, say_new_head

        if self.pretrained or self.weights:
            say_new_head(self.name, classes_of(self.name, self.weights), self.num_classes)
        model = TimmModel(self, self.first_network())
        if self.init == MIMETIC:
            begin_mimetic(self.name, model.network, self.attention_layouts()[0])
        return model

    def first_network(self) -> nn.Module:
        """timm's network as training begins with it; ConfigError if its weights are missing or do not fit."""
        from vitkd.models.timm.create import created
        from vitkd.models.timm.weights import from_file, pretrained

        if self.weights:
            return from_file(self.name, self.num_classes, self.options, self.weights)
        create = pretrained if self.pretrained else created
        return create(self.name, self.num_classes, self.options)


class TimmModel(Model):
    """timm's network, its inputs and, where its attention can be read, its taps.

    Its modules are timm's own, and so are the names of their parameters, after "network.".
    """

    config: TimmConfig

    def __init__(self, config: TimmConfig, network: nn.Module) -> None:
        super().__init__()
        self.config, self.network = config, network
        from vitkd.models.timm.architectures import encoder_of

        facts = config.facts
        self.inputs = Inputs(
            (config.mean, config.std), (facts.mean, facts.std), facts.size, facts.interpolation
        )
        self.encoder = encoder_of(network)
        self.register_load_state_dict_post_hook(fill_unsaved_buffers)

    @property
    def classifier(self) -> nn.Linear | None:
        layer = self.network.get_classifier()  # type: ignore[operator]
        return layer if isinstance(layer, nn.Linear) and layer.bias is not None else None

    def layers_above(self) -> dict[str, int]:
        from vitkd.models.timm.facts import layers_of

        layers = layers_of(self.network)
        return {f"network.{name}": max(layers.values()) - number for name, number in layers.items()}

    def undecayed(self) -> set[str]:
        network: Any = self.network
        own = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
        return super().undecayed() | {f"network.{name}" for name in own}

    def forward(self, images: Tensor, taps: Taps = LOGITS) -> Output:
        """Classify images [B, C, H, W], and return what `taps` asks for.

        The features are "embed" and "block0", … [B, T, D], and "pre_logits" [B, D]; of a network whose
        attention cannot be read only the last.
        """
        images = self.inputs(images)
        if self.encoder is None:
            return self._answer_whole(images, taps)
        return self._answer(self.encoder, images, taps)

    def _answer(self, encoder: "Encoder", images: Tensor, taps: Taps) -> Output:
        depth = len(encoder)
        taps.assert_exist(depth, ("embed", *(f"block{i}" for i in range(depth)), "pre_logits"), encoder.parts)
        encoder, last = encoder.parts[taps.part], taps.last_whole_block(depth)
        state = encoder.embed(images)
        features, attention = {"embed": state.tokens}, {}
        for i in range(last + 1):
            state, attention[i] = run_block(encoder, i, state, taps.of_block(i))
            features[f"block{i}"] = state.tokens
        for i in (block for block in taps.blocks if block > last):
            tokens, rope = encoder.before_attention(i, state)
            attention[i] = encoder.attention(i).tapped(tokens, taps.of_block(i), rope)
        answer = Output()
        if taps.needs_all_blocks:
            features["pre_logits"], classify = encoder.read(state)
            answer = classify() if taps.logits else answer
        answered = {i: output for i, output in attention.items() if output is not None}
        return answer._replace(
            scores={i: output.scores for i, output in answered.items() if output.scores is not None},
            qkv={i: output.qkv for i, output in answered.items() if output.qkv is not None},
            features={name: features[name] for name in taps.features},
        )

    def _answer_whole(self, images: Tensor, taps: Taps) -> Output:
        taps.assert_exist(0, ("pre_logits",))
        if not taps.features:
            return Output(self.network(images) if taps.logits else None)
        network: Any = self.network
        tokens = network.forward_features(images)
        pre_logits = network.forward_head(tokens, pre_logits=True)
        return Output(
            network.forward_head(tokens) if taps.logits else None, features={"pre_logits": pre_logits}
        )

    def trace(self, images: Tensor) -> Trace:
        """As `Model.trace`: nothing is fused, and every block's T×T matrix stays in memory."""
        encoder = self.encoder
        if encoder is None:
            return super().trace(images)
        state, weights, tokens = encoder.embed(self.inputs(images)), [], []
        for i in range(len(encoder)):
            state, attention = run_block(encoder, i, state, BlockTaps(weights=True))
            assert attention is not None
            assert attention.weights is not None
            weights.append(attention.weights)
            tokens.append(state.tokens)
        _, classify = encoder.read(state)
        return Trace(classify().answer, tuple(weights), tuple(tokens))


def run_block(
    encoder: "Encoder", index: int, state: "State", taps: BlockTaps
) -> tuple["State", AttentionOutput | None]:
    """The state after a block, and what `taps` asks of its attention, if anything."""
    if taps == NO_BLOCK_TAPS:
        return encoder.block(index, state), None
    attention = encoder.attention(index)
    attention.taps = taps
    try:
        return encoder.block(index, state), attention.output
    finally:
        attention.taps, attention.output = NO_BLOCK_TAPS, None


@torch.no_grad()
def fill_unsaved_buffers(model: TimmModel, _: Any) -> None:
    """Give the buffers that no file holds their values, if `model` was built without memory and then loaded.

    They follow from the configuration alone: rotary embeddings, for example.
    """
    empty = [name for name, buffer in model.network.named_buffers() if buffer.is_meta]
    if not empty:
        return
    from vitkd.models.timm.create import created

    config = model.config
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        full = created(config.name, config.num_classes, config.options)
    for name in empty:
        owner, _, own_name = name.rpartition(".")
        setattr(model.network.get_submodule(owner), own_name, full.get_buffer(name))
