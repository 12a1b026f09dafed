"""What settings of several groups have to agree on."""

from vitkd.data import Dataset
from vitkd.data.spec import differences
from vitkd.errors import ConfigError
from vitkd.methods.base import Method
from vitkd.models import ModelConfig


def check_images(group: str, model: ModelConfig, dataset: Dataset) -> None:
    """ConfigError unless the model in `group` takes the data set's images and tells its classes apart."""
    for name, own, expected in differences(dataset, model):
        raise ConfigError(
            f"{group}.{name}={own}: dataset={dataset.name} has {expected}; leave it out, it follows "
            f"dataset.{name}"
        )


def check_batch_size(batch_size: int, student: ModelConfig, method: Method) -> None:
    """ConfigError if a step has fewer images than the student or the method can train on."""
    if batch_size < student.min_batch_size:
        raise ConfigError(
            f"dataset.batch_size={batch_size}: {student} trains on at least {student.min_batch_size} "
            "images a step, for its batch normalisation"
        )
    if batch_size < method.min_batch_size:
        raise ConfigError(
            f"dataset.batch_size={batch_size}: method.control=shuffled teaches the maps of another image of "
            f"the batch; use at least {method.min_batch_size} images a step"
        )


def check_views(dataset: Dataset, method: Method) -> None:
    """ConfigError if the method cannot learn from mixed images, or from several views of one in a batch."""
    mix, repeats = dataset.mix, dataset.repeats
    if repeats > 1 and (reason := method.why_unrepeated):
        raise ConfigError(f"dataset.repeats={repeats}: {reason}; set it to 1, or use dataset.passes")
    if mix.is_on and (reason := method.why_unmixed):
        name = "mixup_alpha" if mix.mixup_alpha else "cutmix_alpha"
        setting = f"dataset.mix.{name}={getattr(mix, name)}"
        raise ConfigError(f"{setting}: {reason}; set it to 0, or choose another method")
