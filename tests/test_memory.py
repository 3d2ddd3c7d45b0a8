"""The compiled decoding loop moves no cache: donation, temporaries and copies, at the shape of SmolLM2.

Programs are compiled for abstract arguments, so nothing of this size is allocated.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from specjax import verify
from specjax.decoding import sampling as sample
from specjax.drafters.eagle import eagle
from specjax.drafters.hierarchical import Hierarchical
from specjax.drafters.lm import LM
from specjax.drafters.ngram import Ngram
from specjax.drafters.none import NoDraft
from specjax.drafters.self_draft import SelfDraft
from specjax.engine import decode as decoding
from specjax.engine.engine import Programs
from specjax.models import eagle as eagle_model
from specjax.models import llama
from specjax.models.prepare import prepare
from specjax.quantize import quantize, recipe
from tests import tiny

CAPACITY = 4096
# SmolLM2-135M but for the number of layers: copies would appear in each of them.
CONFIG = tiny.config(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=4,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
)
LAYERS_OF_TEMPORARIES = 0.25

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_MOVES = re.compile(r"= \(?\w+\[([\d,]*)\]\S* (copy|transpose|copy-start)\(")


def computations(hlo: str) -> dict[str, list[str]]:
    """The instructions of each computation of an HLO module's text."""
    result: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header:
            lines = result[header[1]] = []
        elif line.startswith("  "):
            lines.append(line.strip())
    return result


def inside_loops(hlo: str) -> list[str]:
    """All instructions that run within a while loop, those of called computations included."""
    bodies = computations(hlo)
    waiting = [name for name in re.findall(r"body=%?([\w.\-]+)", hlo)]
    assert waiting, "no while loop"
    seen: dict[str, list[str]] = {}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen[name] = bodies[name]
        text = "\n".join(bodies[name])
        waiting += _CALLED.findall(text)
        waiting += [
            part.strip(" %") for group in _BRANCHES.findall(text) for part in group.split(",")
        ]
    found = [line for lines in seen.values() for line in lines]
    assert found, "the loops' computations were not found"
    return found


def cache_moves(hlo: str, shape: tuple[int, ...]) -> list[str]:
    """Copies and transposes of something of the cache's dimensions, in any order, within loops."""
    wanted = sorted(size for size in shape if size > 1)
    found = []
    for line in inside_loops(hlo):
        move = _MOVES.search(line)
        sizes = [int(size) for size in move[1].split(",") if size] if move else []
        if sorted(size for size in sizes if size > 1) == wanted:
            found.append(line)
    return found


def num_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def drafter(name: str, target):
    """Abstract drafters; the large tree is EAGLE-2's default."""
    if name.startswith("eagle"):
        head = jax.eval_shape(lambda: eagle_model.build(tiny.ZeroCheckpoint(CONFIG), jnp.float32))
        return eagle(head, 6, 10, 60) if name == "eagle-60" else eagle(head, 4, 4, 12)
    return {
        "none": NoDraft(),
        "ngram": Ngram(),
        "self": SelfDraft(),
        "lm": LM(model=target),
    }[name]


FAST = [("none", 1), ("eagle-60", 1), ("none", 4)]
PRODUCT = [
    (name, b) for name in ("none", "ngram", "self", "lm", "eagle-12", "eagle-60") for b in (1, 4)
]


@pytest.mark.parametrize(
    ("name", "batch"),
    FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in PRODUCT if case not in FAST],
)
def test_decoding_keeps_its_caches_in_place(name, batch):
    target = jax.eval_shape(lambda: prepare(llama.build(tiny.ZeroCheckpoint(CONFIG), jnp.float32)))
    proposer = drafter(name, target)
    state, compiled = abstract(proposer, target, batch)
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    cache = num_bytes(state.cache)
    layer = cache // CONFIG.num_layers
    # Twice: as W x^T yields them on CPUs, and by rows.
    logits = 2 * 4 * batch * proposer.num_nodes * CONFIG.vocab_size
    beside = memory.temp_size_in_bytes - logits
    print(
        f"{name}, batch {batch}: cache {cache}, draft state {num_bytes(state.draft)}, aliased "
        f"{memory.alias_size_in_bytes}, temporaries {memory.temp_size_in_bytes} of which logits {logits}: "
        f"{beside / layer:.2f} layers beside them"
    )
    assert memory.alias_size_in_bytes >= cache + num_bytes(state.draft)
    assert beside <= LAYERS_OF_TEMPORARIES * layer
    moves = cache_moves(hlo, state.cache.keys[0].shape)
    assert not moves, f"{len(moves)} in the loop, the first: {moves[0]}"


def abstract(drafter, target, batch: int = 1):
    """A batch's state and the compiled decoding loop, without allocating anything."""
    state = jax.eval_shape(
        lambda model, drafter: decoding.init_state(model, drafter, batch, CAPACITY, 64),
        target,
        drafter,
    )
    compiled = Programs().decode.compiled(
        target=target,
        drafter=drafter,
        state=state,
        stop_ids=jnp.asarray([-1], jnp.int32),
        max_steps=jnp.int32(1),
        sampling=sample.sampling(),
        acceptor=verify.Greedy(),
    )
    return state, compiled


@pytest.mark.slow
def test_self_speculation_takes_no_memory():
    """Drafting under another scheme reads the same codes and the same cache: at most 1 % more arguments."""

    def quantized():
        dense = llama.build(tiny.ZeroCheckpoint(CONFIG), jnp.float32)
        rounded = quantize.quantize(dense, recipe.make("w4a16", "rtn", group_size=64))
        return prepare(rounded, dequantize="never")

    target = jax.eval_shape(quantized)
    sizes = {}
    with tiny.hurried_compiler():
        for name, proposer in {"none": NoDraft(), "self": SelfDraft(scheme="w4a8")}.items():
            state, compiled = abstract(proposer, target)
            assert not jax.tree.leaves(proposer) and not jax.tree.leaves(state.draft)
            sizes[name] = compiled.memory_analysis().argument_size_in_bytes
    print(f"argument bytes: {sizes}, {sizes['self'] / sizes['none'] - 1:.2e} more")
    assert sizes["none"] > num_bytes(state.cache), "the weights are arguments too"
    assert sizes["self"] <= 1.01 * sizes["none"]


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eagle", "ngram"])
def test_hierarchical_holds_one_cache_per_model(inner):
    """Those of the target, the intermediate model and, if it has one, the inner head; nothing else of that shape."""
    target = jax.eval_shape(lambda: prepare(llama.build(tiny.ZeroCheckpoint(CONFIG), jnp.float32)))
    small = dataclasses.replace(CONFIG, num_layers=2)
    middle = jax.eval_shape(lambda: prepare(llama.build(tiny.ZeroCheckpoint(small), jnp.float32)))
    proposer = Hierarchical(
        model=middle, inner=drafter("eagle-12" if inner == "eagle" else "ngram", middle)
    )
    with tiny.hurried_compiler():
        state, compiled = abstract(proposer, target)
    shape = state.cache.keys[0].shape
    rows = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == shape]
    heads = 1 if inner == "eagle" else 0
    assert len(rows) == 2 * (CONFIG.num_layers + small.num_layers + heads)
    others = num_bytes(state) - num_bytes(rows)
    features = 4 * CAPACITY * CONFIG.hidden_size if heads else 0
    history = 0 if heads else 4 * CAPACITY
    # Beside them: D's features by position for the head (or the n-gram's text), and a page of counters and tokens.
    assert others <= features + history + 2**16
    memory = compiled.memory_analysis()
    expected = num_bytes(state) + num_bytes(target) + num_bytes(proposer)
    print(f"{inner}: {len(rows)} cache arrays; argument bytes {memory.argument_size_in_bytes}")
    assert abs(memory.argument_size_in_bytes - expected) <= 2**12
    assert memory.alias_size_in_bytes >= num_bytes(state)


def test_the_search_finds_copies_in_called_computations_of_loops():
    hlo = """
%copied (p: f32[3,64,8]) -> f32[64,3,8] {
  ROOT %copy.1 = f32[64,3,8]{2,1,0} copy(%p)
}
%body (p: f32[3,64,8]) -> f32[64,3,8] {
  %f = f32[64,3,8]{2,1,0} fusion(%p), kind=kLoop, calls=%copied
}
ENTRY %main (p: f32[3,64,8]) -> f32[3,64,8] {
  %outside = f32[3,64,8]{2,1,0} copy(%p)
  %w = f32[3,64,8]{2,1,0} while(%outside), condition=%body, body=%body
}
"""
    assert cache_moves(hlo, (1, 3, 64, 8)) == ["ROOT %copy.1 = f32[64,3,8]{2,1,0} copy(%p)"]
    assert not cache_moves(hlo, (1, 3, 64, 4))
    assert not cache_moves(hlo.replace("} copy(", "} negate("), (1, 3, 64, 8))
