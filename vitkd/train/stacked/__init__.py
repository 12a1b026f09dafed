"""Many students as one: their parameters carry a leading axis S, and one pass trains them all.

The students of a grid are small and alike. Stacked, their layers are one batched matrix product each, they
share every teacher forward, and what each learns from is data: see `StackedModule`.
"""

from vitkd.train.stacked.batches import StackedImages
from vitkd.train.stacked.module import StackedModule, unstack

__all__ = ["StackedImages", "StackedModule", "unstack"]
