"""The decoding program of a whole model, compiled for a target from shapes alone: memory, launches, an executable."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from specjax import verify
from specjax.aot import executable, shapes, thunks
from specjax.aot.compile import Compiled, Compiler
from specjax.decoding import sampling as sample
from specjax.engine import decode as decoding
from specjax.engine.program import gpu_options
from specjax.errors import ConfigError
from specjax.models.prepare import weight_bytes

# What a kernel in a CUDA graph costs beside its bytes; an assumption, no measurement.
ASSUMED_LAUNCH_US = 1.5
_FEW_LAYERS = 2
_LARGE = 1 << 20


def run(
    compiler: Compiler,
    model_shape: str,
    scheme: str | None,
    group_size: int,
    drafter: dict[str, Any],
    dtype: str,
    backend: str,
    capacity: int,
    context: int,
    batch: int,
    num_layers: int | None = None,
) -> dict[str, Any]:
    """Entry for `compile.in_process`: compiles the decoding loop and says what came of it.

    Args:
        capacity: cache slots per sequence.
        context: tokens in the cache, for the estimate of a step's bytes.
        num_layers: layers to compile instead of the model's; the report is about the shallower model.
    """
    config = shapes.lookup(model_shape)
    if num_layers is not None:
        if num_layers <= _FEW_LAYERS:
            raise ConfigError(f"{num_layers=}: more than {_FEW_LAYERS} are needed for a comparison")
        config = replace(config, num_layers=num_layers)
    settings = dict(
        scheme=scheme, group_size=group_size, drafter=drafter, dtype=dtype, backend=backend
    )
    settings |= dict(capacity=capacity, batch=batch)
    compiled, arguments = compile_decode(compiler, config, "decode", **settings)
    few = replace(config, num_layers=_FEW_LAYERS)
    small, _ = compile_decode(compiler, few, "decode_few_layers", **settings)
    report = {"model_shape": model_shape, "num_layers": config.num_layers, **settings}
    report["context"] = context
    report |= {"target": compiler.target.kind, "seconds": round(compiled.seconds, 1)}
    report |= _memory(compiled, compiler.target)
    report |= _launches(compiled, small, config.num_layers - _FEW_LAYERS)
    report |= {"large_moves": thunks.large_moves(compiled.executable.as_text(), _LARGE)}
    report |= _estimate(report, arguments, compiler.target, context)
    path = compiler.output / "decode.executable"
    report |= executable.save(compiled.executable, path, target=compiler.target.kind)
    return report


def decode_arguments(
    config, *, scheme, group_size, drafter, dtype, backend, capacity, batch
) -> dict[str, Any]:
    """Abstract arguments of `specjax.engine.decode.decode`."""
    target = shapes.model(config, scheme, group_size, dtype, backend)
    proposer = shapes.abstract_drafter(drafter, config, target)
    state = jax.eval_shape(
        lambda target, proposer: decoding.init_state(target, proposer, batch, capacity, 256),
        target,
        proposer,
    )
    return dict(
        target=target,
        drafter=proposer,
        state=state,
        stop_ids=jnp.asarray(config.eos_token_ids, jnp.int32),
        max_steps=jnp.int32(1),
        sampling=sample.sampling(),
    )


def compile_decode(
    compiler: Compiler, config, name: str, options: dict[str, Any] | None = None, **settings
) -> tuple[Compiled, dict[str, Any]]:
    """Compiles the decoding loop for a model of this configuration; see `decode_arguments` for the settings."""
    with compiler.targeted():
        arguments = decode_arguments(config, **settings)
    compiled = compiler.compile(
        decoding.decode,
        arguments,
        name=name,
        donate=("state",),
        static={"acceptor": verify.Greedy()},
        options=gpu_options() if options is None else options,
    )
    return compiled, arguments


def _memory(compiled: Compiled, target) -> dict[str, Any]:
    stats = compiled.executable.memory_analysis()
    sizes = {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "aliased_bytes": stats.alias_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
    }
    total = sizes["argument_bytes"] + sizes["output_bytes"] + sizes["temp_bytes"]
    total -= sizes["aliased_bytes"]
    return sizes | {
        "device_bytes": total,
        "device_memory": int(target.memory),
        "fits": total <= target.memory,
    }


def _launches(compiled: Compiled, small: Compiled, more_layers: int) -> dict[str, Any]:
    """Launches of a step, and of a layer: the difference that more layers make."""
    found = thunks.summary(thunks.read(compiled.dump))
    few = thunks.summary(thunks.read(small.dump))
    layer = (found["launches_per_step"] - few["launches_per_step"]) / more_layers
    found["launches_per_layer"] = round(layer, 2)
    found["layer"] = {
        name: round((count - few["step"].get(name, 0)) / more_layers, 2)
        for name, count in found["step"].items()
        if count - few["step"].get(name, 0) >= more_layers
    }
    return found


def _estimate(report: dict[str, Any], arguments, target, context: int) -> dict[str, Any]:
    """Bytes that a step reads, and how long they and the launches take at least."""
    model, proposer, state = (arguments[name] for name in ("target", "drafter", "state"))
    tied = model.lm_head is None
    read = weight_bytes(model) - (0 if tied else weight_bytes(model.model.embed_tokens))
    share = context / state.cache.capacity
    read += weight_bytes(state.cache) * share
    if proposer.needs is not None:
        own = weight_bytes(proposer.head)
        if proposer.head.lm_head is None:
            own += weight_bytes(model.model.embed_tokens if tied else model.lm_head)
        read += proposer.draft_depth * (own + weight_bytes(state.draft.cache) * share)
    bytes_ms = read / target.bandwidth * 1e3
    launch_ms = report["launches_per_step"] * ASSUMED_LAUNCH_US / 1e3
    return {
        "step_bytes": round(read),
        "bytes_ms": round(bytes_ms, 4),
        "launch_ms": round(launch_ms, 4),
        "estimated_step_ms": round(bytes_ms + launch_ms, 4),
    }
