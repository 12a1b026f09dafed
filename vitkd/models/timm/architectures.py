"""Which of timm's architectures have attention that can be read, and how."""

from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.tnt import TNT
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitkd.models.timm.attention import TAPPED
from vitkd.models.timm.encoders import DistilledEncoder, Encoder, EvaEncoder, VisionTransformerEncoder
from vitkd.models.timm.swin import SwinEncoder, SwinV2Encoder
from vitkd.models.timm.tnt import TNTEncoder

READABLE = {*TAPPED, *TAPPED.values()}
ENCODERS: dict[type[nn.Module], type[Encoder]] = {
    VisionTransformer: VisionTransformerEncoder,
    VisionTransformerDistilled: DistilledEncoder,
    Eva: EvaEncoder,
    SwinTransformer: SwinEncoder,
    SwinTransformerV2: SwinV2Encoder,
    TNT: TNTEncoder,
}
"""by class: a subclass may compute something else"""


def encoder_of(network: nn.Module) -> Encoder | None:
    """How `network` is computed block by block; None if its attention is no known softmax over tokens."""
    encoder = ENCODERS.get(type(network))
    if encoder is None:
        return None
    attentions = [getattr(block, encoder.ATTENTION, None) for block in encoder.blocks_of(network)]
    return encoder(network) if all(type(each) in READABLE for each in attentions) else None
