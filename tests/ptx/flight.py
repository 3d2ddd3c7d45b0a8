"""Asynchronous copies, stores and products of a block, and the registers that they use meanwhile."""

from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np

from tests.ptx.faults import Fault


class Groups:
    """Actions of one agent in the order of their groups, which are numbered from 1."""

    def __init__(self):
        self.open: list[Callable[[], None]] = []
        self.committed: list[list[Callable[[], None]]] = []
        self.finished = 0

    @property
    def clock(self) -> int:
        """Of the group that is open."""
        return self.finished + len(self.committed) + 1

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = []

    def wait(self, keep: int) -> int:
        """Completes all groups but the last `keep`; returns how many are finished."""
        while len(self.committed) > keep:
            for action in self.committed.pop(0):
                action()
            self.finished += 1
        return self.finished

    @property
    def idle(self) -> bool:
        return not self.open and not any(self.committed)


class Flight:
    """Attributes:
    groups: per agent: ("copies", warp), ("stores", warp), ("products", warpgroup).
    """

    def __init__(self, block):
        self.block = block
        self.groups: dict[tuple[str, int], Groups] = defaultdict(Groups)
        # Per warpgroup: registers of products under way, and those touched since the last wgmma.fence.
        self._accumulators: dict[int, dict[str, tuple]] = defaultdict(dict)
        self._operands: dict[int, Counter] = defaultdict(Counter)
        self._counts: dict[int, Counter] = defaultdict(Counter)
        self._touched: dict[int, set[str]] = defaultdict(set)

    def begin(self, key: tuple[str, int], action: Callable[[], None], release=None) -> None:
        """An action of the open group: done at once or when its group is waited for, as `release` always is."""
        actions = self.groups[key].open
        if self.block.late:
            actions.append(action)
        else:
            action()
        actions.append(release or (lambda: None))

    def wait(self, key: tuple[str, int], keep: int, warps) -> None:
        finished = self.groups[key].wait(keep)
        self.block.order.learn(warps, self.block.order.agent(key), finished)

    def fence(self, warpgroups) -> None:
        """`wgmma.fence`: registers touched before are ordered before the products that follow."""
        for group in warpgroups:
            self._touched[group].clear()

    def take(
        self, group: int, accumulators: tuple[str, ...], operands: tuple[str, ...]
    ) -> Callable:
        """A product uses these registers until the returned function is called."""
        late = self._touched[group].intersection((*accumulators, *operands))
        if late:
            raise Fault(f"{min(late)} was touched after the last wgmma.fence")
        mine, used = self._accumulators[group], self._operands[group]
        if any(mine.get(name, accumulators) != accumulators for name in accumulators):
            raise Fault("two products under way share accumulators in other shapes")
        if any(used[name] for name in accumulators) or any(name in mine for name in operands):
            raise Fault("an operand is the accumulator of a product under way")
        for name in accumulators:
            mine[name] = accumulators
        uses, counts = Counter(operands), self._counts[group]
        used.update(uses)
        counts.update(accumulators)

        def release():
            used.subtract(uses)
            counts.subtract(accumulators)
            for name in accumulators:
                if not counts[name]:
                    mine.pop(name, None)

        return release

    def touch(self, threads: np.ndarray, reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
        """An ordinary instruction uses registers that products use, too."""
        for group in range(int(threads[0]) // 128, int(threads[-1]) // 128 + 1):
            busy = [name for name in (*reads, *writes) if name in self._accumulators[group]]
            busy += [name for name in writes if self._operands[group][name]]
            if busy:
                raise Fault(f"{busy[0]} is touched while a wgmma that uses it is under way")
            self._touched[group].update(writes)

    def check_end(self) -> None:
        """A block must not leave while something is under way."""
        if self.block.under_way:
            raise Fault("the block ends before its copies have arrived")
        for (what, number), groups in self.groups.items():
            if not groups.idle:
                raise Fault(f"the block ends while {what} of {number} are under way")
