"""What happens before what in a block: vector clocks.

Warps and asynchronous agents (a barrier that copies complete on, the copies and stores of a warp, the products of a
warpgroup) are components of the clocks. Threads of a warp count as ordered among themselves. Two accesses of which
neither happens before the other are a race, whatever the schedule under which they were seen.
"""

import numpy as np

_COMPONENTS = 96


class Order:
    """Attributes:
    known: [warps, components]; how far of each component a warp has been told about.
    """

    def __init__(self, warps: int):
        self.known = np.zeros((warps, _COMPONENTS), np.int32)
        self.known[np.arange(warps), np.arange(warps)] = 1
        self._agents: dict = {}
        self._warps = warps

    def agent(self, key) -> int:
        """The component of an asynchronous agent."""
        return self._agents.setdefault(key, self._warps + len(self._agents))

    def name(self, component: int) -> str:
        names = {number: " ".join(map(str, key)) for key, number in self._agents.items()}
        return names.get(component, f"warp {component}")

    def release(self, warps: np.ndarray) -> np.ndarray:
        """What these warps know, for others to acquire; their own later actions are not part of it."""
        told = self.known[warps].max(axis=0)
        self.known[warps, warps] += 1
        return told

    def acquire(self, warps: np.ndarray, told: np.ndarray) -> None:
        self.known[warps] = np.maximum(self.known[warps], told)

    def learn(self, warps, component: int, clock: int) -> None:
        """The warps have waited for `clock` of an agent."""
        self.known[warps, component] = np.maximum(self.known[warps, component], clock)
