"""`method=together`: several methods at once, each with a weight.

    L_transfer = Σ_i weight_i·L_i

where L_i is the transfer loss of one method, the same as if it were chosen alone. MiniViT adds up losses of
logits, relations and hidden states in this way (Zhang et al. 2022, arXiv 2204.07154). The weights need not
sum to 1, and alpha weighs the class loss against it all:

    L = alpha·L_class + (1 − alpha)·Σ_i weight_i·L_i

Shapes: S stacked students (absent for one), B batch, C classes, P values of all parts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vitkd.data import Batch
from vitkd.errors import ConfigError, check, suggest
from vitkd.methods.base import DataFacts, MapSettings, Method, Objective, Terms
from vitkd.models import Model, ModelConfig, Output, Taps


class WeightedSum(Objective):
    """Compares by several objectives and adds up what they find.

    Args:
        parts: by name; the first says which of the student's logits learn the labels.
        weights: of each.
    """

    def __init__(self, parts: Mapping[str, Objective], weights: Sequence[float]) -> None:
        super().__init__()
        assert len(parts) == len(weights)
        self._parts, self.weights = nn.ModuleDict(parts), tuple(weights)
        objectives = [*parts.values()]
        self.pairs = tuple(chain.from_iterable(part.pairs for part in objectives))
        self.student_taps = Taps.union(part.student_taps for part in objectives)
        self.teacher_taps = Taps.union(part.teacher_taps for part in objectives)
        self.shares_drop_path = any(part.shares_drop_path for part in objectives)
        self.min_images = max(part.min_images for part in objectives)
        of_parts = chain.from_iterable(part.curves for part in objectives)
        self.curves = (*(f"part_loss/{name}" for name in parts), *of_parts)

    @property
    def parts(self) -> dict[str, Objective]:
        """The objectives by name."""
        return cast(dict[str, Objective], dict(self._parts.items()))

    @property
    def stack_key(self) -> Any:
        return type(self), self.weights, *((name, part.stack_key) for name, part in self.parts.items())

    def shared_by(self, objectives: Sequence[Objective]) -> Objective:
        sums = [each for each in objectives if isinstance(each, WeightedSum)]
        parts = {
            name: part.shared_by([each.parts[name] for each in sums]) for name, part in self.parts.items()
        }
        return WeightedSum(parts, self.weights)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        for part in self.parts.values():
            part.start_epoch(epoch, epochs)
        self.stage = ", ".join(part.stage for part in self.parts.values())

    def can_validate(self, batch: Batch) -> bool:
        return all(part.can_validate(batch) for part in self.parts.values())

    def class_logits(self, student: Output) -> Tensor:
        return next(iter(self.parts.values())).class_logits(student)

    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        return {
            f"{name}/{term}": values
            for name, part in self.parts.items()
            for term, values in part(batch, student, teacher).items()
        }

    def transfer(self, terms: Terms) -> Tensor:
        losses = [part.transfer(own) for part, own in self.with_terms(terms)]
        return torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum(0)

    def curve_values(self, terms: Terms) -> Tensor:
        parts = [*self.with_terms(terms)]
        losses = [part.transfer(own).detach().mean(-1) for part, own in parts]
        values = [part.curve_values(own) for part, own in parts if part.curves]
        return torch.cat([torch.stack(losses, dim=-1), *values], dim=-1)

    def with_terms(self, terms: Terms) -> Iterator[tuple[Objective, Terms]]:
        """Each part with the terms that are its own."""
        for name, part in self.parts.items():
            start = f"{name}/"
            yield part, {term.removeprefix(start): terms[term] for term in terms if term.startswith(start)}


@dataclass
class Together(Method):
    """The student learns labels and, with a weight each, by several methods from its teacher."""

    REST: ClassVar[str] = "methods"

    parts: list[str] = field(default_factory=lambda: ["attention", "logit"])
    """some of `methods`"""
    weights: list[float] | None = None
    """of each part's transfer loss; null counts each once"""
    methods: dict[str, Method] = field(default_factory=dict)
    """those that may be parts, by name"""

    def __post_init__(self) -> None:
        listed = f"parts=[{','.join(self.parts)}]"
        for name in self.parts:
            if name not in self.methods:
                raise ConfigError(f"{listed}: there is no part {name}; {suggest(name, self.methods)}")
        if not 2 <= len({*self.parts}) == len(self.parts):
            raise ConfigError(f"{listed}: name two or more of {', '.join(self.methods)}, each once")
        weights = self.weights or []
        is_one_each = self.weights is None or len(weights) == len(self.parts)
        check(self, "weights", is_one_each, f"must be one number for each of {listed}, or null")
        are_weights = all(0 <= weight < math.inf for weight in weights)
        check(self, "weights", are_weights, "must be finite numbers, 0 or more")

    @property
    def chosen(self) -> dict[str, Method]:
        """The parts' methods by name."""
        return {name: self.methods[name] for name in self.parts}

    @property
    def trains_parameters(self) -> bool:
        return any(method.trains_parameters for method in self.chosen.values())

    @property
    def why_alone(self) -> str | None:
        return self._first_reason("why_alone")

    @property
    def why_unmixed(self) -> str | None:
        return self._first_reason("why_unmixed")

    @property
    def why_unrepeated(self) -> str | None:
        return self._first_reason("why_unrepeated")

    def _first_reason(self, name: str) -> str | None:
        """That of the first part that has one."""
        return next(filter(None, (getattr(method, name) for method in self.chosen.values())), None)

    @property
    def min_batch_size(self) -> int:
        return max(method.min_batch_size for method in self.chosen.values())

    @property
    def ignores(self) -> tuple[str, ...]:
        """What none of the parts reads, and the settings of those that are no parts."""
        all_ignored = [method.ignores for method in self.chosen.values()]
        by_all = {name for name in chain(*all_ignored) if all(covers(each, name) for each in all_ignored)}
        others = self.methods.keys() - self.chosen.keys()
        return (*sorted(by_all), *sorted(f"method.{name}" for name in others))

    def check_data(self, data: DataFacts) -> None:
        for method in self.chosen.values():
            method.check_data(data)

    def check(self, student: ModelConfig, teacher: ModelConfig, settings: MapSettings) -> None:
        for name, method in self.chosen.items():
            try:
                method.check(student, teacher, settings)
            except ConfigError as error:
                raise ConfigError(str(error).replace("method.", f"method.{name}.")) from error

    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> WeightedSum:
        parts = {}
        for name, method in self.chosen.items():
            objective = method.objective(student, teacher, settings, data)
            assert objective is not None, f"{name} learns nothing from a teacher"
            parts[name] = objective
        return WeightedSum(parts, self.weights or [1.0] * len(parts))


def covers(settings: Sequence[str], setting: str) -> bool:
    """Whether a setting is one of `settings`, or in a group that is."""
    return any(f"{setting}.".startswith(f"{each}.") for each in settings)
