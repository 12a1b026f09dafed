"""Which images make up each batch of an epoch."""

from torch import Tensor

from vitkd.data.hashing import fold, key_of
from vitkd.errors import ConfigError

# Order and views depend on the same (seed, epoch); these give them different keys.
ORDER, VIEW = 0, 1


class EpochOrder:
    """The batches of one process, as image indices; Lightning finds it as `loader.sampler`.

    With `shuffle` (training), a global batch (`batch_size` × `world_size` images) is a slice of the epoch's
    permutation, which depends on (seed, epoch) alone, and each process takes its part of it: two processes
    together see exactly what one process with twice the batch size sees. An incomplete last batch is
    dropped, so that all batches have one shape, unless it is the only one. Without `shuffle` (evaluation),
    every image appears once over all processes, and batch sizes differ by at most one.

    Args:
        index: [N] int64, the image indices, on the device where the order is computed.
        batch_size: images a batch, in this process.
        seed: of the permutation.
        shuffle: whether to permute the images in each epoch.
        rank, world_size: this process's number, and the number of processes.

    Raises:
        ConfigError: fewer images than processes.
    """

    def __init__(
        self,
        index: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(index) < world_size:
            raise ConfigError(
                f"a split of {len(index)} images cannot serve {world_size} process(es); add images or use"
                " fewer devices"
            )
        self.index, self.batch_size, self.seed, self.shuffle = index, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        global_batch = self.batch_size * self.world_size
        full, rest = divmod(len(self.index), global_batch)
        return max(full, 1) if self.shuffle else full + bool(rest)

    def batches(self) -> tuple[Tensor, ...]:
        """This process's batches of the current epoch, each [B] int64."""
        index = self.epoch_index()
        kept = len(self) * self.world_size * self.batch_size
        index = index[:kept] if self.shuffle else index
        return index.tensor_split(len(self) * self.world_size)[self.rank :: self.world_size]

    def epoch_index(self) -> Tensor:
        """All image indices in the order of the current epoch, over all processes: [N] int64."""
        if not self.shuffle:
            return self.index
        key = key_of(self.seed, self.epoch, ORDER, device=self.index.device)
        return self.index[fold(key, self.index).argsort(stable=True)]
