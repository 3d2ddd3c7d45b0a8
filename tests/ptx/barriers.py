"""`bar`, `mbarrier` and fences."""

import numpy as np

from tests.ptx.faults import Fault
from tests.ptx.memory import SHARED_BASE


class Mbarrier:
    """Attributes:
    count: arrivals of a phase; pending: those that are missing; bytes: of copies that are missing.
    phases: completed ones.
    arrived: what those know that have arrived; done: at the end of the last phase.
    visible: to copies, by a fence.
    """

    def __init__(self, count: int, agent: int, maker: int, clock: int, components: int):
        self.count, self.pending, self.bytes, self.phases = count, count, 0, 0
        self.agent, self.maker, self.clock, self.visible = agent, maker, clock, False
        self.arrived = np.zeros(components, np.int32)
        self.done = self.arrived.copy()

    def settle(self) -> None:
        """Ends the phase if nothing is missing."""
        if self.pending < 0:
            raise Fault("mbarrier: more arrivals than it was made for")
        if self.pending == 0 and self.bytes == 0:
            self.phases, self.pending = self.phases + 1, self.count
            self.arrived[self.agent] = self.phases
            self.done = self.arrived.copy()


class Barriers:
    """Those of a block.

    Attributes:
        standing: [T] threads at a `bar`.
    """

    def __init__(self, block):
        self.block = block
        self.standing = np.zeros(len(block.threads), bool)
        self._bars: dict[int, tuple[int, list[np.ndarray]]] = {}
        self._mbarriers: dict[int, Mbarrier] = {}

    def sync(self, number: int, count: int, threads: np.ndarray, index: int) -> None:
        """`bar.sync number, count` of whole warps."""
        if not 0 <= number < 16 or count % 32 or not 0 < count <= len(self.standing):
            raise Fault(f"bar.sync {number}, {count}: no such barrier")
        expected, here = self._bars.setdefault(number, (count, []))
        here.append(threads)
        arrived = sum(map(len, here))
        if expected != count or arrived > count:
            raise Fault(
                f"bar.sync {number}: {arrived} threads and counts of {expected} and {count}"
            )
        block = self.block
        block.wait(threads, index + 1)
        self.standing[threads] = True
        if arrived == count:
            everyone = np.concatenate(here)
            warps = np.unique(block.warps[everyone])
            block.order.acquire(warps, block.order.release(warps))
            self.standing[everyone] = False
            block.state[everyone] = 0
            del self._bars[number]

    def make(self, address: int, count: int, thread: int) -> None:
        if address % 8 or not SHARED_BASE <= address <= SHARED_BASE + self.block.shared.size - 8:
            raise Fault(f"mbarrier.init: {address} is no place for a barrier")
        if count < 1 or address in self._mbarriers:
            raise Fault(f"mbarrier.init: count {count}, or a barrier that exists")
        order, warp = self.block.order, thread // 32
        agent, components = order.agent(("mbarrier", len(self._mbarriers))), order.known.shape[1]
        clock = int(order.known[warp, warp])
        self._mbarriers[address] = Mbarrier(count, agent, warp, clock, components)

    def at(self, address: int, warps: np.ndarray) -> Mbarrier:
        """The barrier that threads of `warps` use."""
        found = self._mbarriers.get(address)
        if found is None:
            raise Fault(f"there is no mbarrier at {address}")
        if (self.block.order.known[warps, found.maker] < found.clock).any():
            raise Fault("race: the mbarrier is used by a warp that cannot know that it was made")
        return found

    def publish(self, warps: np.ndarray) -> None:
        """A fence of these warps: copies see the barriers that they made."""
        for barrier in self._mbarriers.values():
            barrier.visible |= barrier.maker in warps


def bar_sync(ins):
    number = ins.number(0, "u32")
    count = ins.number(1, "u32") if len(ins.operands) > 1 else None

    def run(block, where, index):
        threads = block.threads[where]
        numbers = np.broadcast_to(number(block, where), threads.shape)
        total = len(block.threads) if count is None else int(count(block, where)[0])
        for each in np.unique(numbers):
            block.barriers.sync(int(each), total, threads[numbers == each], index)
        return True

    return run


def bar_warp_sync(ins):
    ins.number(0, "u32")
    return lambda block, where, index: None


def fence_proxy(ins):
    def run(block, where, index):
        warps = np.unique(block.warps[where])
        block.shared.fence(warps)
        block.barriers.publish(warps)

    return run


def fence_mbarrier_init(ins):
    return lambda block, where, index: block.barriers.publish(np.unique(block.warps[where]))


def mbarrier_init(ins):
    address, count = ins.address(0), ins.number(1, "u32")

    def run(block, where, index):
        threads = block.threads[where]
        places, counts = np.broadcast_arrays(address(block, where), count(block, where))
        if len(threads) != 1:
            raise Fault(f"mbarrier.init by {len(threads)} threads")
        block.barriers.make(int(places[0]), int(counts[0]), int(threads[0]))

    return run


def mbarrier_arrive(ins, kind: str = ""):
    """`kind`: "" is an arrival of so many, "noComplete" one that must not be the last, "expect_tx" of bytes."""
    address = ins.address(1)
    amount = ins.number(2, "u32") if len(ins.operands) > 2 else None

    def run(block, where, index):
        threads = block.threads[where]
        places = np.broadcast_to(address(block, where), threads.shape)
        amounts = np.broadcast_to(amount(block, where) if amount else np.array([1]), threads.shape)
        for place in np.unique(places):
            mine = places == place
            warps, total = (
                np.unique(block.warps[threads[mine]]),
                int(amounts[mine].sum(dtype=np.int64)),
            )
            barrier = block.barriers.at(int(place), warps)
            if kind == "expect_tx":
                barrier.bytes += total
            barrier.pending -= len(threads[mine]) if kind == "expect_tx" else total
            if kind == "noComplete" and barrier.pending <= 0:
                raise Fault("mbarrier.arrive.noComplete completes a phase")
            told = block.order.release(warps)
            barrier.arrived = np.maximum(barrier.arrived, told)
            barrier.settle()
        block.wake()

    return run


def mbarrier_try_wait(ins):
    """Waits as long as it takes, which is one of the answers that a GPU may give."""
    done, address, parity = ins.put(0, "pred"), ins.address(1), ins.number(2, "u32")
    if len(ins.operands) > 3:
        ins.number(3, "u32")  # nanoseconds

    def run(block, where, index):
        threads = block.threads[where]
        places = np.broadcast_to(address(block, where), threads.shape)
        parities = np.broadcast_to(parity(block, where), threads.shape)
        passed = np.zeros(len(threads), bool)
        for place in np.unique(places):
            mine = places == place
            warps = np.unique(block.warps[threads[mine]])
            barrier = block.barriers.at(int(place), warps)
            passed[mine] = (barrier.phases & 1) != parities[mine]
            through = np.unique(block.warps[threads[mine & passed]])
            block.order.acquire(through, barrier.done)
        done(block, threads[passed], np.array([True]))
        block.at[threads[passed]] = index + 1
        block.wait(threads[~passed], index)
        return True

    return run
