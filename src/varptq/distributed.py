"""Several processes on one job, as torchrun starts them.

Work is divided so that the result of a piece never depends on the process that computes it. Pieces
travel as files in a shared folder, and processes meet at barriers in torchrun's store, so no tensor
leaves its device. If a process dies, torchrun ends and restarts all of them, and they find finished
pieces on the disk. The callers define the pieces.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

Item = TypeVar("Item")
# Processes of one attempt start together, but may load large libraries over a network first.
MEETING_SECONDS, POLL_SECONDS = 600, 0.05


class Meeting:
    """Barriers of `size` processes, as counters in the store of torchrun.

    There is no time limit, since the longest share may take days; torchrun notices if a process
    dies. Nothing else of a process group is needed.
    """

    def __init__(self, store: Store, size: int) -> None:
        self._store, self._size, self._count = store, size, 0

    def wait(self) -> None:
        self._count += 1
        here, all_here = f"here-{self._count}", f"all-{self._count}"
        if self._store.add(here, 1) == self._size:
            self._store.set(all_here, "yes")
        while not self._store.check([all_here]):
            time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `size` processes, which meet in `meeting`."""

    rank: int = 0
    size: int = 1
    meeting: Meeting | None = None

    @classmethod
    def from_environment(cls) -> Ranks:
        """Join the processes that torchrun started with this one; without torchrun, this process is
        alone. Call it once."""
        if not dist.is_torchelastic_launched():
            return cls()
        store, rank, size = next(rendezvous("env://"))
        return cls(rank, size, Meeting(PrefixStore(_agree(store, rank, size), store), size))

    @property
    def first(self) -> bool:
        """Whether this process does the work that is done only once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.meeting is not None:
            self.meeting.wait()

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of items of equal cost: every size-th."""
        return list(items[self.rank :: self.size])

    def share_by_cost(self, costs: Mapping[str, float]) -> list[str]:
        """The names assigned to this process, in the order of `costs`.

        The most expensive go first, each to the process with the least so far (Graham 1969): the
        longest share is at most 4/3 of the optimum.
        """
        loads = [0.0] * self.size
        mine: set[str] = set()
        for name in sorted(costs, key=lambda name: -costs[name]):
            least = loads.index(min(loads))
            loads[least] += costs[name]
            if least == self.rank:
                mine.add(name)
        return [name for name in costs if name in mine]


def _agree(store: Store, rank: int, size: int) -> str:
    """A name for this attempt of the job that all its processes know and no earlier attempt used.

    torchrun may give every attempt the same store, with the counts of earlier processes still in
    it, and machines of one job count its attempts differently. So every process publishes a random
    word, the first proposes the set of all words it sees, and a process agrees to a proposal that
    contains its present word, which an ended process cannot do.
    """
    mine, deadline = secrets.token_hex(8), time.monotonic() + MEETING_SECONDS
    store.set(f"varptq-here-{rank}", mine)
    words = [f"varptq-here-{other}" for other in range(size)]
    while time.monotonic() < deadline:
        if rank == 0 and store.check(words):
            store.set("varptq-proposal", "-".join(store.get(word).decode() for word in words))
        if store.check(["varptq-proposal"]):
            proposal = store.get("varptq-proposal").decode()
            name = f"varptq-{hashlib.sha256(proposal.encode()).hexdigest()}"
            if proposal.split("-")[rank] == mine:
                store.set(f"{name}-{rank}", "agreed")
                if store.check([f"{name}-{other}" for other in range(size)]):
                    return name
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"process {rank} of {size} waited {MEETING_SECONDS} s for the others")


def local_device(device: str) -> str:
    """ "cuda" as the GPU of this process among those on its machine; others as they are."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device
