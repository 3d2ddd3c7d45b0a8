"""Serving requests with the decode loop: buckets, prefill, batches whose finished slots are refilled.

Shapes come in buckets, so that prompts of similar length share executables; everything data-dependent happens on the
device, in one dispatch per generation unless the caller wants to look in between.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from specjax.decoding import sampling as sample
from specjax.decoding import target as target_pass
from specjax.decoding.sampling import Sampling
from specjax.drafters.base import Chunk, Drafter, TwoLevel
from specjax.engine import decode as decoding
from specjax.engine import trace as tracing
from specjax.engine.decode import DecodeState
from specjax.engine.metrics import Metrics
from specjax.engine.program import CommandBuffers, Program
from specjax.errors import CapacityError
from specjax.models.llama import Llama
from specjax.pallas import device, dispatch
from specjax.verify.base import Acceptor

MAX_CHUNK = 256  # prompt tokens per prefill pass; bounds the activations of long prompts
_MIN_BUCKET = 16
_BLOCK = 64  # slots that attention on Hopper reads at once
STEPS_PER_LOOK = (
    16  # decode steps between two looks at the outputs, where something has to be watched
)
_ALL_STEPS = np.iinfo(np.int32).max


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation to do.

    Attributes:
        request_id: names the request's random stream together with the seed.
        input_ids: prompt tokens, at least one.
        max_new_tokens: most tokens to return, at least one.
    """

    request_id: int
    input_ids: Sequence[int]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a running request has produced so far.

    Attributes:
        output_ids: all its new tokens.
    """

    request: Request
    output_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Outcome of a request.

    Attributes:
        output_ids: new tokens, the stop token included if one was produced.
        stopped: whether a stop token (or the caller's `should_stop`) ended it, rather than the limit.
        metrics: acceptance and speed.
    """

    request: Request
    output_ids: list[int]
    stopped: bool
    metrics: Metrics


def bucket(size: int) -> int:
    """Smallest of 16, 24, 32, 48, 64, 96, ... that holds `size`."""
    power = _MIN_BUCKET
    while power < size:
        if power * 3 // 2 >= size:
            return power * 3 // 2
        power *= 2
    return power


def cache_slots(size: int) -> int:
    """Slots of a cache that holds `size`: a bucket, on GPUs of whole blocks, since kernels read no other caches."""
    block = 1 if device.current() is None else _BLOCK
    return -(-bucket(size) // block) * block


@dataclass(kw_only=True)
class _Slot:
    """Host-side account of a running request."""

    request: Request
    prefill_ms: float
    decode_ms: float = 0.0


class Programs:
    """The compiled programs that engines share, so that a second generation of the same shapes compiles nothing.

    Args:
        command_buffers: what CUDA graphs hold, see `engine.program.gpu_options`.
    """

    def __init__(self, command_buffers: CommandBuffers = "loop"):
        program = functools.partial(Program, command_buffers=command_buffers)
        self.prefill = program(decoding.prefill_chunk, donate=("state",))
        self.decode = program(decoding.decode, donate=("state",), static=("acceptor",))
        self.insert = program(decoding.insert, donate=("batch",))
        sizes = ("batch", "capacity", "max_new_tokens", "trace")
        self.init = program(decoding.init_state, static=sizes)

    def _all(self) -> tuple[Program, ...]:
        return self.prefill, self.decode, self.insert, self.init

    @property
    def compile_ms(self) -> float:
        """Time spent compiling so far."""
        return sum(program.compile_ms for program in self._all())

    @property
    def num_compilations(self) -> int:
        """Executables made so far."""
        return sum(program.num_compilations for program in self._all())


class Engine:
    """Runs requests on one target with one drafter.

    Args:
        target: the model in its run-time form.
        drafter: see `specjax.drafters.base.Drafter`.
        acceptor: acceptance rule.
        sampling: how tokens are chosen.
        stop_ids: token ids that end a request.
        seed: seed of all random streams.
        programs: executables to reuse.
        trace: record every step (see `specjax.engine.trace`) in the metrics.
    """

    def __init__(
        self,
        target: Llama,
        drafter: Drafter,
        acceptor: Acceptor,
        sampling: Sampling,
        stop_ids: Sequence[int] = (),
        seed: int = 0,
        programs: Programs | None = None,
        trace: bool = False,
    ):
        self.target, self.drafter, self.acceptor = target, drafter, acceptor
        self.sampling, self.seed = sampling, seed
        self.stop_ids = jax.device_put(np.asarray(list(stop_ids) or [-1], np.int32))
        self.programs, self.trace = programs or Programs(), trace

    def plan(self, requests: Sequence[Request]) -> tuple[int, int]:
        """Cache capacity and output buffer that hold all `requests`, in buckets.

        Raises:
            CapacityError: a prompt is empty or the model has too few positions for a request.
        """
        positions = self.target.config.max_position_embeddings
        for request in requests:
            length = len(request.input_ids)
            if length == 0:
                raise CapacityError(f"request {request.request_id}: the prompt is empty")
            if request.max_new_tokens < 1:
                raise CapacityError(
                    f"request {request.request_id}: max_new_tokens={request.max_new_tokens}; "
                    "at least 1 is needed"
                )
            if length + request.max_new_tokens > positions:
                raise CapacityError(
                    f"request {request.request_id}: {length} prompt tokens + {request.max_new_tokens} "
                    f"new tokens exceed the model's max_position_embeddings={positions}; "
                    "shorten the prompt or lower max_new_tokens"
                )
        new_tokens = bucket(max(request.max_new_tokens for request in requests))
        room = self.drafter.max_depth + 1 + target_pass.padded_nodes(self.drafter.scratch)
        # Of the buckets, not of the lengths themselves: prompts of one bucket must find the same shapes.
        longest = max(_padded(len(r.input_ids)) for r in requests) + new_tokens + room
        return cache_slots(longest), new_tokens

    def run(
        self,
        requests: Sequence[Request],
        batch_size: int = 1,
        *,
        steps_per_look: int | None = None,
        should_stop: Callable[[Request, list[int]], int | None] | None = None,
    ) -> Iterator[Progress | Completion]:
        """Serves `requests`, up to `batch_size` at a time; yields a completion for each as it ends.

        Args:
            steps_per_look: look at the outputs after every so many steps and yield the progress of what is running;
                None = one dispatch per generation where nothing else asks for a look.
            should_stop: given a request and its tokens so far, how many of them to keep if it shall end, else None.
        """
        if not requests:
            return
        capacity, new_tokens = self.plan(requests)
        self._compiled_before = self.programs.compile_ms
        waiting = deque(requests)
        first = [waiting.popleft() for _ in range(min(batch_size, len(requests)))]
        state, elapsed = self._start(first, capacity, new_tokens)
        slots: list[_Slot | None] = [_Slot(request=r, prefill_ms=elapsed) for r in first]
        while True:
            state, events = self._look(state, slots, should_stop)
            for index, event in events.items():
                if isinstance(event, Completion):
                    yield event
                    slots[index] = None
                    if waiting:
                        state = self._refill(state, slots, index, waiting.popleft(), new_tokens)
                elif steps_per_look is not None:
                    yield event
            if not any(slots):
                return
            looks = waiting or should_stop or steps_per_look is not None
            count = (steps_per_look or STEPS_PER_LOOK) if looks else _ALL_STEPS
            state = self._advance(state, slots, count)

    def _refill(self, state, slots, index: int, request: Request, new_tokens: int) -> DecodeState:
        """Prefills a request by itself and puts it into a finished slot."""
        single, elapsed = self._start([request], state.cache.capacity, new_tokens)
        slots[index] = _Slot(request=request, prefill_ms=elapsed)
        return self.programs.insert(batch=state, slot=jnp.int32(index), single=single)

    def _start(
        self, requests: Sequence[Request], capacity: int, new_tokens: int
    ) -> tuple[DecodeState, float]:
        """Prefills a group of requests; returns its state and the milliseconds it took."""
        size = len(requests)
        state = self.programs.init(
            target=self.target,
            drafter=self.drafter,
            batch=size,
            capacity=capacity,
            max_new_tokens=new_tokens,
            trace=self.trace,
        )
        state = replace(
            state,
            limit=jnp.asarray([r.max_new_tokens for r in requests], jnp.int32),
            keys=sample.request_keys(self.seed, [r.request_id for r in requests]),
        )
        prompt_len = np.asarray([len(r.input_ids) for r in requests], np.int32)
        width = min(bucket(int(prompt_len.max())), MAX_CHUNK)
        padded = -(-int(prompt_len.max()) // width) * width
        tokens = np.zeros((size, padded + 1), np.int32)
        for row, request in zip(tokens, requests, strict=True):
            row[: len(request.input_ids)] = request.input_ids
        elapsed = 0.0
        for begin in range(0, padded, width):
            arguments = {
                "target": self.target,
                "drafter": self.drafter,
                "state": state,
                "chunk": Chunk(
                    tokens=jnp.asarray(tokens[:, begin : begin + width]),
                    next_tokens=jnp.asarray(tokens[:, begin + 1 : begin + width + 1]),
                    start=jnp.full((size,), begin, jnp.int32),
                    valid=jnp.asarray(np.clip(prompt_len - begin, 0, width)),
                    features=None,
                ),
                "prompt_len": jnp.asarray(prompt_len),
                "stop_ids": self.stop_ids,
                "sampling": self.sampling,
            }
            self.programs.prefill.compiled(**arguments)
            clock = time.perf_counter()
            with self.programs.prefill.explained("running"):
                state = jax.block_until_ready(self.programs.prefill(**arguments))
            elapsed += (time.perf_counter() - clock) * 1e3
        return state, elapsed

    def _advance(self, state: DecodeState, slots: list, count: int) -> DecodeState:
        """Runs up to `count` steps and charges the time to the requests that are running."""
        arguments = {
            "target": self.target,
            "drafter": self.drafter,
            "state": state,
            "stop_ids": self.stop_ids,
            "max_steps": jnp.int32(count),
            "sampling": self.sampling,
            "acceptor": self.acceptor,
        }
        self.programs.decode.compiled(**arguments)
        clock = time.perf_counter()
        with self.programs.decode.explained("running"):
            state = jax.block_until_ready(self.programs.decode(**arguments))
        elapsed = (time.perf_counter() - clock) * 1e3
        for slot in slots:
            if slot is not None:
                slot.decode_ms += elapsed
        return state

    def _look(self, state: DecodeState, slots: list, should_stop):
        """Reads the outputs.

        Returns the state, in which requests that `should_stop` ends are done, and Progress or Completion by slot.
        """
        seen = jax.device_get(
            {name: getattr(state, name) for name in ("tokens", "num_tokens", "done", "stopped")}
        )
        events, ended = {}, []
        for index, slot in enumerate(slots):
            if slot is None:
                continue
            output = seen["tokens"][index, : seen["num_tokens"][index]].tolist()
            keep = should_stop(slot.request, output) if should_stop else None
            if keep is not None:
                ended.append(index)
            if keep is None and not seen["done"][index]:
                events[index] = Progress(request=slot.request, output_ids=output)
            else:
                stopped = keep is not None or bool(seen["stopped"][index])
                events[index] = self._complete(
                    state, index, slot, output[:keep], stopped, len(slots)
                )
        if ended:
            state = replace(state, done=state.done.at[jnp.asarray(ended)].set(True))
        return state, events

    def _complete(self, state, index, slot, output, stopped, batch_size) -> Completion:
        """Reads the counters of one finished request."""
        num_steps = int(state.num_spec_steps[index])
        kept = None if state.trace is None else tracing.steps(state.trace, index, num_steps)
        depth = self.target.depth
        inner = None
        if isinstance(self.drafter, TwoLevel):
            inner = _row(self.drafter.inner_acceptance(state.draft), index)
        metrics = Metrics(
            num_spec_steps=num_steps,
            num_draft_tokens=int(state.num_draft_tokens[index]),
            acceptance_histogram=_row(state.acceptance_histogram, index),
            prefill_ms=slot.prefill_ms,
            decode_ms=slot.decode_ms,
            compile_ms=self.programs.compile_ms - self._compiled_before,
            batch_size=batch_size,
            new_tokens=len(output),
            lossless=self.acceptor.lossless
            and (depth is None or depth.lossless(self.drafter.num_nodes)),
            layer_runs=None if depth is None else _row(state.cache.depth.runs, index),
            inner_acceptance_histogram=inner,
            quarantine=tuple(map(str, dispatch.policy(self.target.backend).quarantine)),
            trace=kept,
        )
        return Completion(request=slot.request, output_ids=output, stopped=stopped, metrics=metrics)


def _row(counters: Int[Array, "B n"], index: int) -> tuple[int, ...]:
    return tuple(np.asarray(counters[index]).tolist())


def _padded(length: int) -> int:
    """Prompt length rounded up to whole prefill chunks, whatever bucket its group may choose."""
    return -(-length // MAX_CHUNK) * MAX_CHUNK if length > MAX_CHUNK else bucket(length)
