"""What takes part in a training beside the module: attention pictures, and what makes steps faster."""

from lightning.pytorch.callbacks import Callback

from vitkd.config import Config
from vitkd.data import ImageDataModule
from vitkd.runs.folder import RunFolder
from vitkd.train.cuda_graph import CudaGraphs
from vitkd.train.pictures import AttentionPictures
from vitkd.train.teacher_cache import TeacherCaching


def attention_pictures(config: Config, data: ImageDataModule, folder: RunFolder) -> AttentionPictures:
    """Shows where teacher and student look."""
    batch = data.first("val" if config.dataset.validates else "test", 4)
    return AttentionPictures(
        batch.image,
        batch.label,
        data.class_names,
        config.dataset.mean,
        config.dataset.std,
        every_n_epochs=config.pictures_every_n_epochs,
        path=folder.pictures,
    )


def faster_steps(config: Config, data: ImageDataModule) -> list[Callback]:
    """Reuses the teacher's outputs, and replays steps from a CUDA graph."""
    callbacks: list[Callback] = []
    if config.method.needs_teacher and config.teacher.cache == "auto":
        callbacks.append(TeacherCaching(data, config.teacher.cache_gib))
    if config.cuda_graph == "auto":
        callbacks.append(CudaGraphs())
    return callbacks
