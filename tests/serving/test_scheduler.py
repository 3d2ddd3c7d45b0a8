"""Plans by themselves: order, budget, fairness, ends, and prefixes, over random arrivals against a simulated engine."""

import hypothesis.strategies as st
from hypothesis import Phase, given, settings

from specjax.serving.scheduler import Policy, Scheduler
from specjax.serving.types import Request, SamplingParams

POLICY = Policy(widths=(8, 32), prefill_budget=40, max_steps=6)


def request(name, size=5, limit=4, first=0, **fields):
    ids = [first, *range(1, size)]
    return Request(request_id=name, prompt_ids=ids, max_tokens=limit, **fields)


class Simulated:
    """An engine that adds 1000, 1001, ... to every request, and checks that what it is told to do makes sense."""

    def __init__(self, num_slots: int, policy: Policy = POLICY):
        self.scheduler = Scheduler(num_slots, policy)
        self.texts: list[list[int]] = [[] for _ in range(num_slots)]
        self.owner: list[Request | None] = [None] * num_slots
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.made: dict[str, int] = {}
        self.unread: list = []
        self.admitted: list[str] = []
        self.plans: list = []

    def look(self, now: float = 0.0):
        plan = self.scheduler.plan(now, 100)
        self.plans.append(plan)
        for ended in plan.ended:
            self.reasons[ended.request.request_id] = ended.reason
            if ended.slot is not None:
                assert self.owner[ended.slot] is ended.request
                self.owner[ended.slot] = None
        for admission in plan.admissions:
            assert self.owner[admission.slot] is None
            donor = admission.slot if admission.donor is None else admission.donor
            prompt = admission.request.prompt_ids
            assert admission.cached < len(prompt)
            assert self.texts[donor][: admission.cached] == list(prompt[: admission.cached])
            self.texts[admission.slot] = list(prompt[: admission.cached])
            self.owner[admission.slot] = admission.request
            self.admitted.append(admission.request.request_id)
            self.outputs[admission.request.request_id] = []
        for chunk in plan.chunks:
            assert self.owner[chunk.slot] is chunk.request
            assert chunk.begin == len(self.texts[chunk.slot]) and chunk.width in POLICY.widths
            piece = chunk.request.prompt_ids[chunk.begin : chunk.begin + chunk.width]
            assert piece
            self.texts[chunk.slot] += piece
        widths = [chunk.width for chunk in plan.chunks]
        assert len(widths) <= 1 or sum(widths) <= POLICY.prefill_budget
        piece = []
        for slot, running in plan.owners.items():
            assert self.owner[slot] is running
            ids = list(running.prompt_ids)
            assert self.texts[slot][: len(ids)] == ids
            piece.append((slot, running, self._step(slot, running, plan.steps)))
        assert bool(piece) == bool(plan.steps)
        if piece:
            self.unread.append(piece)
        while len(self.unread) > bool(piece):  # one piece behind, as the runner is
            self._read()
        return plan

    def _step(self, slot, running, steps):
        """What the device does: adds tokens, of which the last is in no cache yet."""
        made = self.made.get(running.request_id, 0)
        new = [1000 + i for i in range(made, min(made + steps, running.max_tokens))]
        made = self.made[running.request_id] = made + len(new)
        self.texts[slot] = [*running.prompt_ids, *(1000 + i for i in range(made - 1))]
        return new, made >= running.max_tokens

    def _read(self):
        for slot, running, (new, done) in self.unread.pop(0):
            if self.owner[slot] is not running:
                continue
            self.scheduler.advance(slot, running, new, done)
            self.outputs[running.request_id] += new
            if done:
                self.owner[slot] = None
                self.reasons[running.request_id] = "length"

    def finish(self, looks: int = 2000):
        for _ in range(looks):
            if not (self.scheduler.num_waiting or self.scheduler.num_running or self.unread):
                return
            self.look()
        raise AssertionError("requests are stuck")


arrivals = st.lists(
    st.builds(
        dict,
        size=st.integers(1, 120),
        limit=st.integers(1, 30),
        first=st.integers(0, 2),
        look=st.integers(0, 12),
        cancel=st.none() | st.integers(0, 25),
        deadline=st.none() | st.floats(0, 25),
        namespace=st.sampled_from(["", "other"]),
    ),
    min_size=1,
    max_size=14,
)


@settings(deadline=None, max_examples=60, phases=(Phase.explicit, Phase.generate))
@given(jobs=arrivals, num_slots=st.integers(1, 4))
def test_every_request_is_served_in_order_or_ended_as_asked(jobs, num_slots):
    world = Simulated(num_slots)
    jobs = sorted(enumerate(jobs), key=lambda pair: pair[1]["look"])
    asked = []
    for look in range(40):
        for index, job in jobs:
            if job["look"] == look:
                made = request(
                    str(index),
                    job["size"],
                    job["limit"],
                    job["first"],
                    deadline=job["deadline"],
                    namespace=job["namespace"],
                )
                world.scheduler.submit(made)
                asked.append(made)
            if job["cancel"] == look:
                world.scheduler.cancel(str(index))
        world.look(now=look)
    world.finish()
    order = [r.request_id for r in asked]
    assert world.admitted == [name for name in order if name in world.admitted]
    for (_, job), made in zip(jobs, asked, strict=True):
        reason, output = world.reasons[made.request_id], world.outputs.get(made.request_id, [])
        assert output == [1000 + i for i in range(len(output))]
        if reason == "length":
            assert len(output) == made.max_tokens
        elif reason == "deadline":
            assert job["deadline"] is not None
        else:
            assert reason == "cancelled" and job["cancel"] is not None


def test_a_long_prompt_neither_stops_those_that_run_nor_a_short_one():
    world = Simulated(3)
    world.scheduler.submit(request("runs", limit=60))
    world.look()
    world.scheduler.submit(request("long", size=1500, limit=3))
    world.scheduler.submit(request("short", size=9, limit=3))
    plans = [world.look() for _ in range(8)]
    assert all(0 in plan.owners for plan in plans)
    assert all(plan.steps <= POLICY.steps_while_filling for plan in plans)
    served = [chunk.request.request_id for plan in plans[:2] for chunk in plan.chunks]
    assert "short" in served and "long" in served
    world.finish()
    assert len(world.outputs["long"]) == len(world.outputs["short"]) == 3


def test_prefixes_are_reused_within_a_namespace_only_and_copied_from_slots_that_run():
    world = Simulated(3)
    world.scheduler.submit(request("a", size=50, limit=40))
    for _ in range(3):
        world.look()
    for name, fields in (
        ("same", {}),
        ("other", {"namespace": "key"}),
        ("refused", {"reuse_prefix": False}),
        ("penalised", {"sampling": SamplingParams(repetition_penalty=1.2)}),
        ("scored", {"prompt_logprobs": 0}),
    ):
        world.scheduler.submit(request(name, size=60, limit=2, **fields))
    world.finish()
    found = {a.request.request_id: a for plan in world.plans for a in plan.admissions}
    assert found["same"].cached == 49 and found["same"].donor == found["a"].slot
    for name in ("a", "other", "refused", "penalised", "scored"):
        assert found[name].cached == 0 and found[name].donor is None


def test_the_next_turn_of_a_talk_takes_the_free_slot_that_has_it():
    world = Simulated(2)
    world.scheduler.submit(request("turn 1", size=30, limit=10))
    world.finish()
    text = [*request("turn 1", size=30).prompt_ids, *(1000 + i for i in range(10))]
    world.scheduler.submit(Request(request_id="2", prompt_ids=[*text, 7, 8], max_tokens=2))
    [admission] = world.look().admissions
    assert admission.slot == 0 and admission.donor is None
    assert admission.cached == 38  # all that is in a cache but one: the text's last token never was
    world.finish()


def test_greedy_is_promised_only_where_all_that_run_are():
    world = Simulated(2)
    greedy = SamplingParams(temperature=0.0)
    world.scheduler.submit(request("a", limit=9, sampling=greedy))
    assert world.look().greedy
    world.scheduler.submit(request("b", limit=9))
    assert not world.look().greedy


def test_pieces_are_no_longer_than_what_is_left():
    world = Simulated(1)
    world.scheduler.submit(request("a", limit=3))
    assert world.look().steps == 3
    world.scheduler.submit(request("b", limit=30))
    world.finish()
    assert max(plan.steps for plan in world.plans) == POLICY.max_steps


def test_a_piece_of_a_request_that_has_gone_adds_nothing_to_its_successor():
    scheduler = Scheduler(1, POLICY)
    first = request("a", limit=9)
    scheduler.submit(first)
    scheduler.plan(0, 1)
    scheduler.cancel("a")
    scheduler.submit(request("b", limit=9))
    [ended] = scheduler.plan(0, 1).ended
    assert ended.reason == "cancelled"
    scheduler.advance(0, first, [5], done=True)
    assert scheduler.num_running == 1
