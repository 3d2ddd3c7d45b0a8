"""How fast plain decoding could be: the memory's streaming rate, the bytes of a step, and a bare jitted step.

At batch 1 a decode step reads every weight once and computes little, so bytes / bandwidth is its floor. The bare step
shows what the same network reaches without the engine around it.
"""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import specjax
from specjax import verify
from specjax.decoding import sampling
from specjax.drafters.none import NoDraft
from specjax.engine import engine
from specjax.models import cache as kv
from specjax.models import layers, prepare

_COLUMNS = 4096
# The rate depends a little on how the reading is written, so the bound is the fastest of these.
_READERS = {
    "sum": lambda x, v: jnp.sum(x, axis=1),
    "max": lambda x, v: jnp.max(x, axis=1),
    "matvec": lambda x, v: x @ v,
}


class StreamingRead:
    """Reads a large float32 array with all cores.

    Args:
        megabytes: its size; several times the last-level cache.
    """

    def __init__(self, megabytes: int):
        rows = megabytes * 2**20 // 4 // _COLUMNS
        self._array = jnp.ones((rows, _COLUMNS), jnp.float32)
        self._vector = jnp.ones((_COLUMNS,), jnp.float32)
        self._readers = {name: jax.jit(reader) for name, reader in _READERS.items()}
        self.num_bytes = self._array.nbytes
        self()

    def __call__(self) -> dict[str, float]:
        """Bytes per second of one pass, by way of reading."""
        return {
            name: self.num_bytes / _seconds(lambda f=reader: f(self._array, self._vector))
            for name, reader in self._readers.items()
        }


def _seconds(work: Callable) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - begin


def step_bytes(model: specjax.LanguageModel, capacity: int) -> int:
    """Bytes that a decode step of one sequence must read: all weights and a cache of `capacity` slots.

    Of an embedding table that is not the output head too, one row is read.
    """
    module = model.module
    total = prepare.weight_bytes(module)
    if module.lm_head is not None:
        table = module.model.embed_tokens.weight[...]
        total -= table.nbytes - table.nbytes // table.shape[0]
    config = model.config
    row = config.num_kv_heads * config.head_dim * module.dtype.itemsize
    return total + 2 * config.num_layers * capacity * row


class BareDecoding:
    """Greedy decoding by a Python loop over one jitted step, as one would write it by hand.

    Args:
        model: loaded model.
        input_ids: the prompt.
        capacity: cache slots, the engine's, so that both do the same work.
    """

    def __init__(self, model: specjax.LanguageModel, input_ids: Sequence[int], capacity: int):
        self._module, self._input_ids, self._capacity = model.module, input_ids, capacity
        # Flat arguments: the fastest way through jit's dispatch.
        self._leaves, structure = jax.tree.flatten(model.module)

        def step(leaves, token, position, cache):
            module = jax.tree.unflatten(structure, leaves)
            out = module(layers.causal_block(token[:, None], position), cache)
            token = sampling.most_likely(module.logits(out.hidden[:, 0]))
            return token, position + 1, out.cache

        def prefill(leaves, tokens, cache):
            module = jax.tree.unflatten(structure, leaves)
            out = module(layers.causal_block(tokens, jnp.zeros((1,), jnp.int32)), cache)
            last = lax.index_in_dim(out.hidden, -1, axis=1, keepdims=False)
            return sampling.most_likely(module.logits(last)), out.cache

        self._step = jax.jit(step, donate_argnames="cache")
        self._prefill = jax.jit(prefill, donate_argnames="cache")

    def __call__(self, new_tokens: int) -> tuple[list[int], float]:
        """The first `new_tokens` tokens and the steps' tokens per second (the first token is prefill's)."""
        cache = kv.init(self._module.config, 1, self._capacity, self._module.dtype)
        prompt = jnp.asarray([self._input_ids], jnp.int32)
        token, cache = self._prefill(self._leaves, prompt, cache)
        position = jnp.full((1,), len(self._input_ids), jnp.int32)
        tokens = [jax.block_until_ready(token)]
        begin = time.perf_counter()
        for _ in range(new_tokens - 1):
            token, position, cache = self._step(self._leaves, token, position, cache)
            tokens.append(token)
        jax.block_until_ready(cache)
        rate = (new_tokens - 1) / (time.perf_counter() - begin)
        return np.concatenate(tokens).tolist(), rate


def measure(
    model: specjax.LanguageModel,
    input_ids: Sequence[int],
    new_tokens: int,
    repeats: int,
    megabytes: int = 1024,
) -> dict:
    """Measures bandwidth, the engine's plain decoding and the bare step in turn, `repeats` times after a warm-up.

    Returns:
        JSON-ready record: medians and single values of each, bytes per step, and the fractions of the bounds.
    """
    request = engine.Request(request_id=0, input_ids=input_ids, max_new_tokens=new_tokens)
    greedy = sampling.sampling()
    planner = engine.Engine(model.module, NoDraft(), verify.acceptor("lossless", True), greedy)
    capacity, _ = planner.plan([request])
    stream, bare = StreamingRead(megabytes), BareDecoding(model, input_ids, capacity)

    def plain():
        options = {"max_new_tokens": new_tokens, "ignore_eos": True}
        return model.generate(input_ids, "none", **options)[0]

    equal = plain().output_ids == bare(new_tokens)[0]
    reads, engines, bares = [], [], []
    for _ in range(repeats):
        reads.append(stream())
        engines.append(plain().metrics.tokens_per_s)
        bares.append(bare(new_tokens)[1])
    rates = {name: float(np.median([read[name] for read in reads])) for name in _READERS}
    num_bytes = step_bytes(model, capacity)
    bound = max(rates.values()) / num_bytes
    engine_rate, bare_rate = float(np.median(engines)), float(np.median(bares))
    return {
        "bandwidth_bytes_per_s": rates,
        "stream_bytes": stream.num_bytes,
        "step_bytes": num_bytes,
        "capacity": capacity,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "bound_tokens_per_s": bound,
        "engine_tokens_per_s": engine_rate,
        "bare_tokens_per_s": bare_rate,
        "engine_runs": engines,
        "bare_runs": bares,
        "engine_over_bound": engine_rate / bound,
        "engine_over_bare": engine_rate / bare_rate,
        "same_tokens": equal,
    }


def describe(record: dict) -> str:
    """A measured record in three lines."""
    bandwidth = max(record["bandwidth_bytes_per_s"].values())
    return "\n".join(
        [
            f"streaming read {bandwidth / 1e9:.2f} GB/s, a step reads {record['step_bytes'] / 1e6:.1f} MB: "
            f"bound {record['bound_tokens_per_s']:.2f} tokens/s",
            f"plain decoding {record['engine_tokens_per_s']:.2f} tokens/s = "
            f"{record['engine_over_bound']:.3f} of the bound",
            f"bare jitted step {record['bare_tokens_per_s']:.2f} tokens/s; plain decoding / bare step = "
            f"{record['engine_over_bare']:.3f}; same tokens: {'yes' if record['same_tokens'] else 'NO'}",
        ]
    )
