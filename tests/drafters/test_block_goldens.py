"""Heads that draft a block in one pass against recorded rounds of upstream code: logits, chains, trees, acceptance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.decoding import slot_trees
from specjax.decoding import tree as trees
from specjax.drafters import head as heads
from specjax.engine.engine import Programs
from specjax.models.one_pass import Rows
from tests import head_fixtures, paths, tiny

NAMES = (
    *("dflash-spec-llama", "dflash-swa-qwen3", "dflash-zlab-qwen3", "dspark-gated-llama"),
    *("dspark-rnn-qwen3", "dspark-deepspec-vanilla-qwen3"),
)
# Other layouts and settings of the same networks: where the shared folder is.
MORE = (
    *("dflash-full-qwen3", "dflash-causal-qwen3", "dspark-vanilla-qwen3"),
    *("dspark-vanillafull-qwen3", "dspark-deepspec-gated-llama", "dspark-deepspec-rnn-qwen3"),
)
CAPACITY, ROWS = 128, 24
PROGRAMS = Programs()


@pytest.fixture(autouse=True)
def hurry(hurried):
    """Numbers are compared within tolerances that hold with fewer optimizations too."""


@functools.cache
def golden(name: str, whole: bool = False) -> head_fixtures.Golden:
    return head_fixtures.Golden(name, whole)


@functools.cache
def drafter(name: str, target: str, **options):
    options = {"tree": "chain"} | options
    return heads.build(head_fixtures.target(target), str(head_fixtures.folder(name)), **options)


@jax.jit
def passed(drafter, target, rows: Rows, root, own, drafts):
    """(what slots came to, logits by themselves, logits and confidence behind the recorded drafts, the cache)."""
    head = drafter.head
    hidden, own = head.draft(rows, root, own, target)
    base = head.logits(hidden, target)
    carry = head.begin(hidden, root) if head.stepwise else ()
    logits, sure, previous = [], [], root
    for slot in range(drafts.shape[1]):
        row = base[:, slot]
        if head.stepwise:
            carry, row = head.step(carry, hidden[:, slot], row, previous)
        if head.knows_confidence:
            sure.append(head.confidence(hidden[:, slot], previous))
        logits.append(row)
        previous = drafts[:, slot]
    return hidden, base, jnp.stack(logits, axis=1), sure, own


def replayed(made, target, record: dict, own):
    features = jnp.asarray(record["context_features"])
    count, start = len(features), int(record["start"][0])
    fused = made.head.fuse(features)
    rows = Rows(
        features=jnp.zeros((1, ROWS, fused.shape[-1])).at[0, :count].set(fused),
        tokens=jnp.zeros((1, ROWS), jnp.int32),
        start=jnp.asarray([start - count], jnp.int32),
        count=jnp.asarray([count], jnp.int32),
    )
    root = jnp.asarray(record["in_tokens"][:1].astype(np.int32))
    drafts = jnp.asarray(record["draft_tokens"].astype(np.int32))[None]
    return passed(made, target, rows, root, own, drafts)


def check_rounds(name: str, whole: bool) -> None:
    recorded = golden(name, whole)
    made = drafter(name, recorded.facts["target"])
    target = head_fixtures.target(recorded.facts["target"]).module
    assert made.max_depth == recorded.facts["draft_length"], "the head's own length"
    for rounds in recorded.rounds():
        own = made.init(target, 1, CAPACITY).cache
        for record in rounds:
            hidden, base, logits, sure, own = replayed(made, target, record, own)
            head_fixtures.check_logits(logits[0], record, made.head.target_ids)
            drafting = slice(-hidden.shape[1], None)
            width = record["hidden"].shape[-1]
            np.testing.assert_allclose(hidden[0, :, :width], record["hidden"][drafting], atol=2e-4)
            if "base_logits" in record:
                np.testing.assert_allclose(base[0], record["base_logits"][drafting], atol=2e-4)
            if "confidence_logits" in record:
                expected = record["confidence_logits"][drafting]
                np.testing.assert_allclose(np.concatenate(sure), expected, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_passes_of_recorded_rounds(name):
    check_rounds(name, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*NAMES, *MORE))
def test_passes_of_all_recorded_rounds(name):
    if paths.find("architectures_and_heads") is None:
        pytest.skip("the whole goldens are not here")
    check_rounds(name, True)


def run(made, recorded: head_fixtures.Golden, batch: int):
    """Completions of all recorded prompts."""
    target = head_fixtures.target(recorded.facts["target"]).module
    texts = recorded
    if "p0.input_ids" not in texts.arrays:
        texts = golden("dspark-rnn-qwen3")
    prompts = [texts.text(prompt)[0] for prompt in recorded.prompts]
    count = max(len(texts.text(p)[1]) for p in recorded.prompts)
    jobs = tiny.requests(prompts, count + made.max_depth)
    return tiny.run(tiny.engine(target, made, PROGRAMS, trace=True), jobs, batch)


@pytest.mark.parametrize(
    "name",
    [n if n == "dspark-rnn-qwen3" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_accepted_drafts_of_every_round(name):
    recorded = golden(name)
    done = run(drafter(name, recorded.facts["target"]), recorded, 6)
    head_fixtures.check_accepted(recorded, recorded.prompts, done)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", (*NAMES, *MORE))
def test_accepted_drafts_alone_and_with_refilled_slots(name, batch):
    recorded = golden(name)
    done = run(drafter(name, recorded.facts["target"]), recorded, batch)
    head_fixtures.check_accepted(recorded, recorded.prompts, done)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.5, 0.8])
@pytest.mark.parametrize("name", ["dspark-deepspec-vanilla-qwen3", "dspark-deepspec-gated-llama"])
def test_chains_end_before_drafts_that_are_not_sure(name, threshold):
    recorded = golden(name)
    made = drafter(name, recorded.facts["target"], confidence=threshold)
    done = run(made, recorded, 6)
    for prompt, completion in zip(recorded.prompts, done, strict=True):
        wanted = prompt[f"accepted_per_round_threshold{threshold}"]
        found = [len(step.accepted) for step in completion.metrics.trace]
        assert found[: len(wanted)] == wanted


TREES = {"ddtree-dflash-qwen3": "dflash-zlab-qwen3", "jetspec-causal-qwen3": "jetspec-causal-qwen3"}


def recorded_trees(name: str, whole: bool):
    """(setting such as "b16" or "w4b16", record) of every recorded tree."""
    found: dict[tuple[str, ...], dict] = {}
    for key, array in golden(name, whole).arrays.items():
        place, field = key.rsplit(".", 1)
        if place.count(".") == 2:
            found.setdefault(tuple(place.split(".")), {})[field] = array
    for (_, setting, _), record in sorted(found.items()):
        yield setting, record


@functools.partial(jax.jit, static_argnames=("width", "budget"))
def arranged(logits, width: int | None, budget: int):
    root = jnp.zeros(len(logits), jnp.int32)
    ranks = min(width or budget, logits.shape[-1])
    scores, tokens = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), ranks)
    if width is None:
        return slot_trees.best_first(tokens, scores, root, budget + 1)

    def children(carry, level, token):
        at = jnp.broadcast_to(level[..., None], (*level.shape, ranks))
        return carry, *(jnp.take_along_axis(x, at, axis=1) for x in (tokens, scores))

    return slot_trees.widths(children, (), logits.shape[1], root, budget, width)


def check_trees(name: str, whole: bool) -> None:
    settings: dict[str, list] = {}
    for setting, record in recorded_trees(name, whole):
        settings.setdefault(setting, []).append(record)
    assert settings
    for setting, records in settings.items():
        width, budget = setting[1:].split("b") if setting[0] == "w" else (None, setting[1:])
        logits = jnp.asarray(np.stack([record["logits"] for record in records]))
        tree = arranged(logits, width and int(width), int(budget))
        mask = trees.ancestor_mask(tree)
        for index, record in enumerate(records):
            tokens, depths = record["node_tokens"], record["node_depths"]
            count = budget_of(record)
            np.testing.assert_array_equal(tree.tokens[index, 1:], tokens[-count:])
            np.testing.assert_array_equal(tree.parents[index], record["parents"])
            np.testing.assert_array_equal(trees.depths(mask)[index, -len(depths) :], depths)
            if "visibility" in record:
                np.testing.assert_array_equal(mask[index], record["visibility"])


def budget_of(record: dict) -> int:
    """Nodes without the root."""
    return len(record["parents"]) - 1


@pytest.mark.parametrize("name", TREES)
def test_recorded_trees(name):
    check_trees(name, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_all_recorded_trees(name):
    if paths.find("architectures_and_heads") is None:
        pytest.skip("the whole goldens are not here")
    check_trees(name, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, setting",
    [
        *((n, s) for n in ("ddtree-dflash-qwen3",) for s in ("b4", "b16", "b64")),
        *(("jetspec-causal-qwen3", s) for s in ("w1b8", "w4b16", "w8b64")),
    ],
)
def test_accepted_nodes_of_every_tree(name, setting):
    recorded = golden(name)
    if setting[0] == "w":
        width, budget = map(int, setting[1:].split("b"))
        options = {"tree": "topk", "topk": width, "num_nodes": budget}
        key = "settings"
    else:
        options, key = {"tree": "best-first", "num_nodes": int(setting[1:]) + 1}, "budgets"
        setting = setting[1:]
    made = drafter(TREES[name], recorded.facts["target"], **options)
    done = run(made, recorded, 6)
    for prompt, completion in zip(recorded.prompts, done, strict=True):
        wanted = prompt[key][setting]
        found = [len(step.accepted) for step in completion.metrics.trace]
        # DDTree's loop cuts the last round at the length of the text.
        assert found[: len(wanted) - 1] == wanted[:-1]
        assert found[len(wanted) - 1] >= wanted[-1]


@jax.jit
def pard_logits(made, target, rows, root, own):
    hidden, own = made.head.draft(rows, root, own, target)
    return made.head.logits(hidden, target), own


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_passes_of_a_pard_model(whole):
    name = "pard-llama-draft"
    recorded = golden(name, whole)
    depth, target = recorded.facts["draft_length"], recorded.facts["target"]
    made, module = drafter(name, target, draft_depth=depth), head_fixtures.target(target).module
    for rounds in recorded.rounds():
        own = made.init(module, 1, CAPACITY).cache
        for record in rounds:
            count = len(record["in_tokens"]) - depth + 1
            tokens = np.zeros((1, ROWS), np.int32)
            tokens[0, :count] = record["in_tokens"][:count]
            rows = Rows(
                features=jnp.zeros((1, ROWS, 0)),
                tokens=jnp.asarray(tokens),
                start=jnp.asarray(record["in_positions"][:1] - 1, jnp.int32),
                count=jnp.asarray([count], jnp.int32),
            )
            logits, own = pard_logits(made, module, rows, rows.tokens[:, count - 1], own)
            head_fixtures.check_logits(logits[0], record, lambda ids: ids)
