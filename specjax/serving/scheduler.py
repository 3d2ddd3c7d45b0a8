"""Who gets a slot, whose prompt is taken in, and how long a piece is: decided once per look, without JAX or clocks.

First come, first served. Between two pieces at most a budget of prompt tokens is taken in, by the slots that are being
filled in turn, and a piece follows: so no prompt, however long, stops those that run.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specjax.serving.types import FinishReason, Request

_MIN_SHARED = 8  # computing fewer tokens anew costs no more than the copy


@dataclass(frozen=True, kw_only=True)
class Admission:
    """A request gets a slot.

    Attributes:
        donor: slot whose text begins as the prompt does, to be copied; None: nothing is, or it is the slot itself.
        cached: tokens of the prompt that need not be computed.
    """

    request: Request
    slot: int
    donor: int | None
    cached: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Prompt tokens begin .. begin + width - 1 go into a slot."""

    request: Request
    slot: int
    begin: int
    width: int
    first: bool


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A request ends before its text does; `slot` is None where it had none."""

    request: Request
    slot: int | None
    reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do until the next look, in this order.

    Attributes:
        ended: requests that end here; their slots are to be released.
        admissions: slots that are handed over.
        chunks: prompts to take in.
        owners: request in each slot that decodes in the piece; empty: no piece.
        steps: of the piece.
        greedy: no request in it samples.
    """

    ended: tuple[Ended, ...] = ()
    admissions: tuple[Admission, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    owners: Mapping[int, Request] = field(default_factory=dict)
    steps: int = 0
    greedy: bool = True


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Attributes:
    widths: chunk sizes that there are, ascending.
    prefill_budget: prompt tokens between two pieces, padding included; at least one chunk is taken in.
    max_steps: steps of a piece at most.
    steps_while_waiting, steps_while_filling: at most, while a request waits for a slot or a prompt is taken in.
    reuse_prefixes: look for prompts' beginnings in other texts.
    """

    widths: tuple[int, ...] = (32, 256)
    prefill_budget: int = 256
    max_steps: int = 16
    steps_while_waiting: int = 4
    steps_while_filling: int = 2
    reuse_prefixes: bool = True


@dataclass(kw_only=True)
class _Slot:
    """What a slot holds.

    Attributes:
        text: tokens that its caches hold; a running request's last token is not among them.
        last: that last token, where there is one.
        taken: tokens of the owner's prompt taken in; all of them: it decodes.
        begun: whether a chunk of the owner was taken in.
        used: when it was last handed over, in admissions.
    """

    owner: Request | None = None
    namespace: str = ""
    text: list[int] = field(default_factory=list)
    last: int | None = None
    taken: int = 0
    new: int = 0
    begun: bool = False
    used: int = 0

    @property
    def filling(self) -> bool:
        return self.owner is not None and self.taken < len(self.owner.prompt_ids)

    @property
    def decoding(self) -> bool:
        return self.owner is not None and not self.filling


class Scheduler:
    """Keeps account of slots and queue; `plan` decides, `advance` is told what came of it.

    Args:
        num_slots: slots there are.
        policy: see `Policy`.
    """

    def __init__(self, num_slots: int, policy: Policy = Policy()):
        self.policy = policy
        self._slots = [_Slot() for _ in range(num_slots)]
        self._waiting: deque[Request] = deque()
        self._cancelled: set[str] = set()
        self._turn = self._clock = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(slot.owner is not None for slot in self._slots)

    @property
    def num_positions(self) -> int:
        """Positions that hold text of running requests."""
        return sum(len(slot.text) for slot in self._slots if slot.owner is not None)

    def submit(self, request: Request) -> None:
        """Queues a request; its id must not be among those that wait or run."""
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next plan; ids that neither wait nor run are ignored."""
        slots = (slot.owner for slot in self._slots)
        known = (*self._waiting, *(owner for owner in slots if owner is not None))
        if any(request.request_id == request_id for request in known):
            self._cancelled.add(request_id)

    def next_deadline(self) -> float | None:
        """The earliest deadline of all requests."""
        owners = [slot.owner for slot in self._slots if slot.owner is not None]
        times = [r.deadline for r in (*self._waiting, *owners) if r.deadline is not None]
        return min(times, default=None)

    def advance(self, slot: int, request: Request, tokens: Sequence[int], done: bool) -> None:
        """Tells what a piece added to a request, if that still has its slot, and whether it ended there."""
        held = self._slots[slot]
        if held.owner is not request:
            return
        if tokens:
            held.text += ([] if held.last is None else [held.last]) + list(tokens[:-1])
            held.last = tokens[-1]
            held.new += len(tokens)
        if done:
            held.owner = None

    def plan(self, now: float, steps: int) -> Plan:
        """What to do next.

        Args:
            now: the time that deadlines are compared with.
            steps: as many as fit the time that a piece may take.
        """
        ended = self._end(now)
        admissions = self._admit()
        chunks = self._fill()
        owners = {index: slot.owner for index, slot in enumerate(self._slots) if slot.decoding}
        return Plan(
            ended=ended,
            admissions=admissions,
            chunks=chunks,
            owners=owners,
            steps=self._steps(steps, owners),
            greedy=all(request.sampling.temperature == 0 for request in owners.values()),
        )

    def _end(self, now: float) -> tuple[Ended, ...]:
        def reason(request: Request) -> FinishReason | None:
            if request.request_id in self._cancelled:
                return "cancelled"
            late = request.deadline is not None and request.deadline <= now
            return "deadline" if late else None

        ended = [
            Ended(request=request, slot=None, reason=why)
            for request in self._waiting
            if (why := reason(request))
        ]
        if ended:
            gone = {e.request.request_id for e in ended}
            self._waiting = deque(r for r in self._waiting if r.request_id not in gone)
        for index, slot in enumerate(self._slots):
            if slot.owner is not None and (why := reason(slot.owner)):
                ended.append(Ended(request=slot.owner, slot=index, reason=why))
                slot.owner = None
        self._cancelled.clear()
        return tuple(ended)

    def _admit(self) -> tuple[Admission, ...]:
        found = []
        while self._waiting and any(slot.owner is None for slot in self._slots):
            found.append(self._place(self._waiting.popleft()))
        return tuple(found)

    def _place(self, request: Request) -> Admission:
        """Hands a free slot over: the donor itself if it is free, else the one that was handed over longest ago."""
        donor, shared = self._donor(request)
        free = [index for index, slot in enumerate(self._slots) if slot.owner is None]
        index = donor
        if donor not in free:
            index = min(free, key=lambda i: (self._slots[i].used, i))
        # The last shared token is computed again: what a drafter keeps of the one before the next chunk comes from it.
        cached = max(shared - 1, 0)
        self._clock += 1
        self._slots[index] = _Slot(
            owner=request,
            namespace=request.namespace,
            text=list(request.prompt_ids[:cached]),
            taken=cached,
            used=self._clock,
        )
        copied = donor if donor != index else None
        return Admission(request=request, slot=index, donor=copied, cached=cached)

    def _donor(self, request: Request) -> tuple[int | None, int]:
        """The slot whose text shares the longest beginning with a prompt, free ones first, and how long it is."""
        whole = request.prompt_logprobs is not None or request.sampling.repetition_penalty != 1
        if not (self.policy.reuse_prefixes and request.reuse_prefix) or whole:
            return None, 0
        best, most = None, _MIN_SHARED
        for index, slot in enumerate(self._slots):
            if slot.namespace != request.namespace:
                continue
            length = _shared(slot.text, request.prompt_ids)
            if length > most or (length == most and best is not None and slot.owner is None):
                best, most = index, length
        return (None, 0) if best is None else (best, most)

    def _fill(self) -> tuple[Chunk, ...]:
        """Chunks within the budget, slot after slot in turn, beginning behind the one served last."""
        chunks, left = [], self.policy.prefill_budget
        while filling := [i for i, slot in enumerate(self._slots) if slot.filling]:
            index = next((i for i in filling if i >= self._turn), filling[0])
            slot = self._slots[index]
            missing = len(slot.owner.prompt_ids) - slot.taken
            widths = self.policy.widths
            width = next((w for w in widths if w >= missing), widths[-1])
            if chunks and width > left:
                break
            count = min(width, missing)
            chunks.append(
                Chunk(
                    request=slot.owner,
                    slot=index,
                    begin=slot.taken,
                    width=width,
                    first=not slot.begun,
                )
            )
            slot.begun = True
            slot.text += slot.owner.prompt_ids[slot.taken : slot.taken + count]
            slot.taken += count
            left -= width
            self._turn = (index + 1) % len(self._slots)
        return tuple(chunks)

    def _steps(self, steps: int, owners: Mapping[int, Request]) -> int:
        if not owners:
            return 0
        most = min(steps, self.policy.max_steps)
        if self._waiting:
            most = min(most, self.policy.steps_while_waiting)
        if any(slot.filling for slot in self._slots):
            most = min(most, self.policy.steps_while_filling)
        missing = max(r.max_tokens - self._slots[index].new for index, r in owners.items())
        return max(1, min(most, missing))


def _shared(text: Sequence[int], prompt: Sequence[int]) -> int:
    """Length of the common beginning."""
    most = min(len(text), len(prompt))
    if list(text[:most]) == list(prompt[:most]):
        return most
    low, high = 0, most  # the beginning of length `low` is shared, that of length `high` is not
    while high - low > 1:
        middle = (low + high) // 2
        same = list(text[low:middle]) == list(prompt[low:middle])
        low, high = (middle, high) if same else (low, middle)
    return low
