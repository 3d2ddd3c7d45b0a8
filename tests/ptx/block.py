"""A thread block that runs: registers, program counters, barriers, and what is under way."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx import values
from tests.ptx.barriers import Barriers
from tests.ptx.faults import Fault
from tests.ptx.flight import Flight
from tests.ptx.memory import Global, Shared
from tests.ptx.order import Order
from tests.ptx.schedule import Conditions

READY, WAITING, PARKED, DONE = range(4)


@dataclass(frozen=True)
class Step:
    """One decoded statement.

    Attributes:
        run: (block, threads, index) -> None to go on behind it, True if it has placed the threads itself.
        unit: threads that execute it together: 1, a warp of 32 or a warpgroup of 128.
        text: the statement.
        registers: that it names.
        guard, negated: predicate of the threads that execute it; None: all do.
    """

    run: Callable
    unit: int
    text: str
    registers: tuple[str, ...] = ()
    guard: str | None = None
    negated: bool = False


@dataclass(frozen=True)
class Launch:
    """Attributes:
    grid: blocks along x, y, z.
    threads: per block.
    shared_bytes: of dynamic shared memory.
    arguments: one per parameter: an address, or a list of tensor maps.
    registers: per thread, as the assembler reports them.
    """

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: list
    registers: int = 255


class Block:
    """One block of a launch.

    Attributes:
        at: [T] index of each thread's next statement.
        state: [T] READY, WAITING, PARKED or DONE.
        registers: name -> [T].
        under_way: completions that nobody has waited for yet, in late conditions.
    """

    def __init__(self, program, launch: Launch, place, memory: Global, conditions: Conditions):
        threads = launch.threads
        self.launch, self.place, self.memory, self.conditions = launch, place, memory, conditions
        self.parameters = dict(zip(program.parameters, launch.arguments, strict=False))
        self.threads = np.arange(threads)
        self.warps = self.threads // 32
        self.at, self.state = np.zeros(threads, np.int32), np.zeros(threads, np.int8)
        self.registers = {
            name: np.zeros(threads, values.storage(kind))
            for name, kind in program.registers.items()
        }
        fixed = sum(size for _, size in program.shared.values())
        self.order = Order(-(-threads // 32))
        self.shared = Shared(max(fixed, launch.shared_bytes, 1), self.order)
        self.barriers, self.flight = Barriers(self), Flight(self)
        self.rng = np.random.default_rng([conditions.seed, *place])
        self.under_way: list[Callable[[], None]] = []
        self.leader, self.late = conditions.schedule.leader, conditions.late
        self.quota = np.full(max(1, threads // 128), -(-launch.registers // 8) * 8)
        self.spare, self.steps, self.limit = 0, 0, 0
        self.trace: dict[int, list] | None = None

    def run(self, code: list[Step]) -> None:
        """Runs to the end.

        Raises:
            Fault: what a GPU would not forgive; the message names the statement.
        """
        while not (self.state == DONE).all():
            ready = self.state == READY
            if ready.any():
                threads = self.conditions.schedule.choose(ready, self.at, self.rng)
                self._advance(code, threads)
            elif self.under_way:
                self.under_way.pop(int(self.rng.integers(len(self.under_way))))()
                self.wake()
            else:
                waiting = np.unique(self.at[self.state != DONE])
                raise Fault("deadlock at " + "; ".join(code[index].text for index in waiting))
        self.flight.check_end()

    def _advance(self, code: list[Step], threads: np.ndarray) -> None:
        index = int(self.at[threads[0]])
        while True:
            step = code[index]
            if step.unit > 1:
                threads = self._whole(threads, step.unit, index)
                if not len(threads):
                    return
            self.steps += 1
            if self.steps > self.limit:
                raise Fault(f"does not end: {self.limit} steps")
            first, last = int(threads[0]), int(threads[-1]) + 1
            where = slice(first, last) if last - first == len(threads) else threads
            try:
                placed = step.run(self, where, index)
            except Fault as fault:
                raise Fault(f"{fault} [{step.text}]") from None
            if self.trace is not None:
                seen = self.threads[where]
                if step.guard:
                    seen = seen[self.registers[step.guard][where] != step.negated]
                left = [self.registers[name][seen].tobytes() for name in step.registers]
                self.trace.setdefault(index, []).append(hash(tuple(left)))
            if placed:
                return
            index += 1

    def _whole(self, threads: np.ndarray, unit: int, index: int) -> np.ndarray:
        """The threads whose whole warp (warpgroup) stands here; the others are parked until it does."""
        aligned = len(threads) % unit == 0 and threads[0] % unit == 0
        if aligned and threads[-1] - threads[0] + 1 == len(threads):
            return threads
        self.at[threads], self.state[threads] = index, PARKED
        here = (self.state == PARKED) & (self.at == index)
        together = here.reshape(-1, unit).all(axis=1).repeat(unit)
        self.state[together] = READY
        return np.flatnonzero(together)

    def wait(self, threads, index: int) -> None:
        """These threads stand at a statement until something has happened."""
        self.at[threads], self.state[threads] = index, WAITING

    def wake(self) -> None:
        """Something has happened: who waited looks again; who stands at `bar` is woken by the last to arrive."""
        self.state[(self.state == WAITING) & ~self.barriers.standing] = READY

    def finish(self, completion: Callable[[], None]) -> None:
        """Does now, or when nothing else can run, what an asynchronous copy does."""
        if self.late:
            self.under_way.append(completion)
        else:
            completion()
