"""Models: images and `Taps` in, `Output` out."""

from vitkd.models.base import Model as Model
from vitkd.models.base import ModelConfig as ModelConfig
from vitkd.models.base import count_parameters as count_parameters
from vitkd.models.merged import Merged as Merged
from vitkd.models.merged import MergedConfig as MergedConfig
from vitkd.models.merged import merge as merge
from vitkd.models.output import AttentionLayout as AttentionLayout
from vitkd.models.output import Output as Output
from vitkd.models.output import Taps as Taps
from vitkd.models.partial import PartialViTConfig as PartialViTConfig
from vitkd.models.partial import small_vits as small_vits
from vitkd.models.resnet import ResNet as ResNet
from vitkd.models.resnet import ResNetConfig as ResNetConfig
from vitkd.models.timm.model import TimmConfig as TimmConfig
from vitkd.models.vit import ViT as ViT
from vitkd.models.vit import ViTConfig as ViTConfig
from vitkd.models.weights import build_from_header as build_from_header
from vitkd.models.weights import describe as describe
from vitkd.models.weights import digest as digest
from vitkd.models.weights import load_model as load_model
from vitkd.models.weights import read_header as read_header
from vitkd.models.weights import save_model as save_model
