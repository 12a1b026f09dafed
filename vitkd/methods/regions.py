"""`method=regions`: a small ViT for each cluster of regions, by the attention that the teacher gives them.

**A construction of ours**: the course report only names the idea, to cluster regions of 2×2 patches by their
attention activity and to have a smaller ViT look at each cluster by itself. It leaves open:

- activity: the attention that a region's patches receive from all tokens, in each head of each block of the
  teacher, the mean over queries and over 64 training images (`patch_activity`);
- clusters: k-means over the image's regions, so a cluster is the same places in every image, and the teacher
  is needed before training alone;
- the small ViTs: the student's depth and heads, embed_dim and mlp_dim made smaller by one factor, so that all
  of them together have at most as many parameters as the student would have had alone. Each sees the patches
  of its cluster alone, at their positions, and has a class token of its own;
- merged: one linear layer on their representations side by side, which is the sum of their heads' logits
  (`student=merged`);
- training: all of them at once, by the class loss alone, so alpha has no effect.

`method=none` is the student alone: one ViT of as many parameters, which sees the whole image.

Shapes: F features (a head of a block each), h × w patches, R regions.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch.nn.functional import avg_pool2d

from vitkd.errors import ConfigError, check_at_least
from vitkd.methods.attention import check_equal_grids, check_maps
from vitkd.methods.base import DataFacts, MapSettings, Method
from vitkd.methods.maps.activity import activity_clusters, patch_activity, patches_of_clusters
from vitkd.models import Merged, Model, ModelConfig, count_parameters, merge, small_vits
from vitkd.models.output import shown

log = logging.getLogger("vitkd")


@dataclass
class Regions(Method):
    """Small ViTs in the student's place learn labels, each from the places that the teacher sets apart."""

    clusters: int = 2
    region_size: int = 2
    """patches of a region's side"""

    ignores = "alpha", "weighting", "granularity", "loss"
    why_alone = "it trains several ViTs that differ in the patches they see, which a stack does not"

    def __post_init__(self) -> None:
        check_at_least(2, self, "clusters")
        check_at_least(1, self, "region_size")

    def check(self, student: ModelConfig, teacher: ModelConfig, settings: MapSettings) -> None:
        check_maps(student, teacher, "method=logit, without maps")
        layouts = student.attention_layouts()[0], teacher.attention_layouts()[0]
        if layouts[1].windows > 1:
            raise ConfigError(f"teacher={teacher}: attends within windows; choose a ViT for method=regions")
        check_equal_grids(*layouts, "method=regions needs equal patch sizes")
        self.check_grid(layouts[0].grid)
        patches = [*range(prod(layouts[0].grid))]
        small_vits(student, [patches[i :: self.clusters] for i in range(self.clusters)])

    def check_grid(self, grid: tuple[int, int]) -> None:
        """ConfigError unless so many patches make regions, and enough of them."""
        if any(side % self.region_size for side in grid):
            sizes = [str(size) for size in range(1, min(grid)) if not any(side % size for side in grid)]
            raise ConfigError(
                f"method.region_size={self.region_size}: does not divide {shown(grid)} patches; choose "
                f"one of {', '.join(sizes)}"
            )
        if self.clusters > (regions := prod(grid) // self.region_size**2):
            raise ConfigError(
                f"method.clusters={self.clusters}: the image has {regions} regions; choose at most as many, "
                "or a smaller method.region_size or dataset.patch_size"
            )

    def trained(self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts) -> Merged:
        divided = self.divide(teacher, data)
        model = merge([each.build() for each in small_vits(student.config, divided)])
        log.info(
            "regions: ViTs that see %s patches; %s parameters together, %s of one ViT",
            *(" and ".join(str(len(patches)) for patches in divided),),
            *(f"{count_parameters(each):,}" for each in (model, student)),
        )
        return model

    def divide(self, teacher: Model, data: DataFacts) -> Sequence[list[int]]:
        """By cluster its patches, from the cluster that receives least attention to that which receives most.

        Raises ConfigError if the teacher's attention does not tell so many clusters apart.
        """
        regions = avg_pool2d(patch_activity(teacher, data.calibration()), self.region_size)
        clusters = activity_clusters(regions.flatten(1).T.numpy(), self.clusters)
        if (found := clusters.max() + 1) < self.clusters:
            raise ConfigError(
                f"method.clusters={self.clusters}: the teacher's attention tells {found} apart; choose fewer "
                "or another teacher"
            )
        return patches_of_clusters(clusters.reshape(regions.shape[1:]), self.region_size)

    def objective(self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts) -> None:
        return None
