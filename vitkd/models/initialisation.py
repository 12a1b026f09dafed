"""The settings by which a model begins with other than the usual random weights.

`build` begins with mimetic ones; what weights are selected from is not known before a run is.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from vitkd.errors import ConfigError, check_choice
from vitkd.models.base import ModelConfig, file_of
from vitkd.models.selection import LAYERS, sources_of

MIMETIC, SELECTION = "mimetic", "weight_selection"


@dataclass(repr=False, kw_only=True)
class InitialisedConfig(ModelConfig):
    """A configuration that may say how its model is initialised."""

    # None of these is in `repr`: all else of a run draws the same random numbers, however a model begins.
    init: str | None = field(default=None, repr=False)
    """mimetic: see `vitkd.models.mimetic` | weight_selection: see `vitkd.models.selection`"""
    init_layers: str = field(default="first", repr=False)
    """which blocks of the larger model weights are selected from: first | uniform, evenly spaced"""
    init_from: str | None = field(default=None, repr=False)
    """the run folder or file of the larger model; None for the student's teacher"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "init", (None, MIMETIC, SELECTION))
        check_choice(self, "init_layers", LAYERS)
        if self.init_from is not None and self.init != SELECTION:
            raise ConfigError(
                f"init_from={self.init_from}: has an effect with init={SELECTION} alone; set both"
            )

    @property
    def selects_from_teacher(self) -> bool:
        """Whether its first weights are selected from those of the run's teacher."""
        return self.init == SELECTION and self.init_from is None

    @property
    def source_file(self) -> Path | None:
        """The file with the larger model, if one is named."""
        return None if self.init_from is None else file_of(Path(self.init_from))

    @property
    def weights_file(self) -> str | None:
        return None if self.source_file is None else str(self.source_file)

    def check_files(self) -> None:
        if self.source_file is not None and not self.source_file.is_file():
            raise ConfigError(
                f"init_from={self.init_from}: there is no trained model; give a run folder or file"
            )

    def check_source(self, teacher: ModelConfig | None) -> None:
        if not self.selects_from_teacher:
            return
        if teacher is None:
            raise ConfigError(
                f"init={SELECTION}: there is no teacher to select from; name a run by init_from"
            )
        with torch.device("meta"):
            sources_of(self.architecture(), teacher.architecture(), self.init_layers)
