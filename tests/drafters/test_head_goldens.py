"""Draft heads against recorded rounds of upstream code: logits, chains, and what the target accepted of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.drafters import head as heads
from specjax.drafters import pending
from specjax.drafters.one_pass import OnePass
from specjax.engine.engine import Programs
from specjax.models import layers
from specjax.models.one_pass import Rows
from tests import head_fixtures, paths, tiny

NAMES = (
    *("eagle3-nbr-qwen3", "eagle3-normfc-llama", "eagle31-llama", "eagle3-classic-qwen3"),
    *("peagle-qwen3", "mtp-qwen3"),
)
ALL = (*NAMES, "eagle3-deepspec-qwen3")
CAPACITY, ROWS = 128, 24
PROGRAMS = Programs()


@pytest.fixture(autouse=True)
def hurry(hurried):
    """Numbers are compared within tolerances that hold with fewer optimizations too."""


@functools.cache
def golden(name: str, whole: bool = False) -> head_fixtures.Golden:
    return head_fixtures.Golden(name, whole)


@functools.cache
def drafter(name: str):
    facts = golden(name).facts
    target = head_fixtures.target(facts["target"])
    model = str(head_fixtures.folder(name))
    return heads.build(target, model, tree="chain", draft_depth=facts["draft_length"])


@jax.jit
def one_pass_logits(drafter, target, rows: Rows, root, own):
    hidden, own = drafter.head.draft(rows, root, own, target)
    return drafter.head.logits(hidden, target), own


@jax.jit
def chain_logits(drafter, target, rows: Rows, root, own, drafts):
    """As upstream's loop: the rows with true features, then one draft after the other with the head's own."""
    state = pending.HeadState(cache=own, pending=rows, in_cache=jnp.zeros(1, bool))
    state, feature = pending.flush(drafter.head, target, state, root)
    logits = [drafter.head.logits(feature, target)]
    own = state.cache
    for index in range(drafter.draft_depth - 1):
        block = layers.causal_block(drafts[:, index : index + 1], rows.start + rows.count + index)
        feature, own = drafter.head(feature[:, None], block, own, target)
        feature = feature[:, 0]
        logits.append(drafter.head.logits(feature, target))
    return jnp.stack(logits, axis=1), own


def replayed(drafter, target, record: dict, own):
    """Draft logits of a recorded round, and the head's cache after it."""
    features = jnp.asarray(record["context_features"])
    count, start = len(features), int(record["start"][0])
    fused = drafter.head.fuse(features)
    tokens = np.zeros((1, ROWS), np.int32)
    tokens[0, :count] = record["in_tokens"][:count]
    rows = Rows(
        features=jnp.zeros((1, ROWS, fused.shape[-1])).at[0, :count].set(fused),
        tokens=jnp.asarray(tokens),
        start=jnp.asarray([start - count], jnp.int32),
        count=jnp.asarray([count], jnp.int32),
    )
    root = rows.tokens[:, count - 1]
    if isinstance(drafter, OnePass):
        return one_pass_logits(drafter, target, rows, root, own)
    return chain_logits(drafter, target, rows, root, own, jnp.asarray(record["draft_tokens"])[None])


@pytest.mark.parametrize("name", NAMES)
def test_draft_logits_of_recorded_rounds(name):
    made, target = drafter(name), head_fixtures.target(golden(name).facts["target"]).module
    for rounds in golden(name).rounds():
        own = made.init(target, 1, CAPACITY).cache
        for record in rounds:
            logits, own = replayed(made, target, record, own)
            head_fixtures.check_logits(logits[0], record, made.head.target_ids)


def accepted(name: str, whole: bool, batch: int) -> None:
    recorded = golden(name, whole)
    target = head_fixtures.target(recorded.facts["target"]).module
    prompts = [recorded.text(prompt)[0] for prompt in recorded.prompts]
    count = max(len(recorded.text(p)[1]) for p in recorded.prompts)
    # The recorders went on until the text was long enough, whatever they had drafted beyond it.
    jobs = tiny.requests(prompts, count + recorded.facts["draft_length"])
    runner = tiny.engine(target, drafter(name), PROGRAMS, trace=True)
    done = tiny.run(runner, jobs, batch)
    head_fixtures.check_accepted(recorded, recorded.prompts, done)


# The others' logits above are the networks, and the rounds are the same code; those of one pass are in the tests of
# block heads.
FAST = ("mtp-qwen3",)


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_accepted_drafts_of_every_round(name):
    accepted(name, False, 6)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ALL)
def test_accepted_drafts_alone_and_with_refilled_slots(name, batch):
    accepted(name, False, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_draft_logits_of_all_recorded_rounds(name):
    if paths.find("architectures_and_heads") is None:
        pytest.skip("the whole goldens are not here")
    made, target = drafter(name), head_fixtures.target(golden(name).facts["target"]).module
    for rounds in golden(name, True).rounds():
        own = made.init(target, 1, CAPACITY).cache
        for record in rounds:
            logits, own = replayed(made, target, record, own)
            head_fixtures.check_logits(logits[0], record, made.head.target_ids)
