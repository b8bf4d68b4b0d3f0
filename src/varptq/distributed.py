"""Several processes on one job, as torchrun starts them.

Work is dealt so that what a piece of it computes never depends on who computes it; pieces travel as
files in a shared folder, and processes meet at barriers in torchrun's store, so no tensor leaves
its device. A process that dies takes the others down; torchrun starts all of them again, and
finished pieces are found on the disk. What the pieces are is not decided here.
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
# Processes of one attempt start together, but may load a model's worth of libraries over a network.
MEETING_SECONDS, POLL_SECONDS = 600, 0.05


class Meeting:
    """Barriers of `size` processes, as counters in the store of torchrun.

    There is no time limit, since the longest share may take days: torchrun notices a process that
    died. That is all of a process group that is needed here.
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
    """This process is number `rank` of `size`, which meet in `meeting`."""

    rank: int = 0
    size: int = 1
    meeting: Meeting | None = None

    @classmethod
    def from_environment(cls) -> Ranks:
        """Join the processes torchrun started with this one; alone without torchrun. To be called
        once."""
        if not dist.is_torchelastic_launched():
            return cls()
        store, rank, size = next(rendezvous("env://"))
        return cls(rank, size, Meeting(PrefixStore(_agree(store, rank, size), store), size))

    @property
    def first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Go on when all processes are here."""
        if self.meeting is not None:
            self.meeting.wait()

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every size-th of items that cost the same."""
        return list(items[self.rank :: self.size])

    def share_by_cost(self, costs: Mapping[str, float]) -> list[str]:
        """The names dealt to this process, in the order of `costs`.

        The dearest goes first, each to the process with least so far (Graham 1969): the longest
        share is at most 4/3 of the best there is.
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
    """A name for this attempt of the job that all its processes know and no earlier one used.

    torchrun may hand every attempt the same store, where the counts of processes that are gone
    would be found; and machines of one job count its attempts differently. So every process shows a
    word of its own, the first proposes all words it sees, and a process agrees to a proposal that
    has its present word, which a process that is gone cannot do.
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
