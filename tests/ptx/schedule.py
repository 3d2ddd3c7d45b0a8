"""Who runs next. A schedule and a time of completion are all the freedom that a program is run under."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lockstep:
    """All threads that stand at the first statement."""

    leader = 0  # lane that `elect` elects

    def choose(self, ready: np.ndarray, at: np.ndarray, rng) -> np.ndarray:
        """Numbers of the threads that go on together; `ready` [T] is not empty, `at` [T] are their statements."""
        first = at[ready].min()
        return np.flatnonzero(ready & (at == first))


@dataclass(frozen=True)
class RandomWarps:
    """One warp after the other, each until it branches or waits."""

    leader = 17

    def choose(self, ready: np.ndarray, at: np.ndarray, rng) -> np.ndarray:
        threads = np.flatnonzero(ready)
        warp = rng.choice(np.unique(threads // 32))
        threads = threads[threads // 32 == warp]
        return threads[at[threads] == at[threads].min()]


@dataclass(frozen=True)
class Conditions:
    """Attributes:
    schedule: of threads.
    late: copies and products complete when they are waited for and nothing else can run, not at once.
    seed: of the schedule's and the completions' choices.
    """

    schedule: Lockstep | RandomWarps
    late: bool
    seed: int = 0

    def __str__(self):
        return f"{type(self.schedule).__name__} {'late' if self.late else 'early'}"


ALL = tuple(
    Conditions(schedule, late) for schedule in (Lockstep(), RandomWarps()) for late in (True, False)
)
