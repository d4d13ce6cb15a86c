"""Several processes that train one network, as `torchrun` starts them; alone, one process of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

PATIENCE = timedelta(hours=1)  # the others wait for the first one to make the world and to save


@dataclass(frozen=True)
class Processes:
    """This process among its kind."""

    rank: int  # 0 writes the files
    count: int
    device: torch.device  # this process' own

    @property
    def first(self) -> bool:
        return self.rank == 0

    def lanes(self, batch: int) -> range:
        """This process' share of the lanes. ValueError where they cannot be shared equally."""
        if batch % self.count:
            raise ValueError(f"batch: {batch} lanes cannot be shared by {self.count} processes")
        each = batch // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def agree(self, number: int) -> int:
        """The first process' number, on all."""
        if self.count == 1:
            return number
        numbers = torch.tensor([number], device=self.device)
        distributed.broadcast(numbers, 0)
        return int(numbers)

    def mean(self, values: list[float]) -> list[float]:
        """Numbers, averaged over all processes."""
        if self.count == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return (total / self.count).tolist()


@contextmanager
def joined(device: str | None = None) -> Iterator[Processes]:
    """The processes that torchrun started (RANK, LOCAL_RANK and WORLD_SIZE in the environment), connected.

    device: "cpu", "cuda" or one GPU's name; None: a GPU for each process if there is any.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    place, count = torch.device(kind), int(os.environ.get("WORLD_SIZE", 1))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if count == 1:
        yield Processes(0, 1, place)
        return
    # torchrun's store outlives the processes that it starts again: without a name for each life they may find the
    # addresses of the dead, and wait for them (PyTorch 2.13 `_create_c10d_store`; earlier ones prefixed it themselves)
    store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
    store = distributed.PrefixStore(f"life-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if place.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), count, place)
    finally:
        distributed.destroy_process_group()
