"""--model and the flags that say how it runs, and the model that they describe."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
from absl import flags

import specjax
from experiments.shared import flag_groups
from specjax.config import DTYPES
from specjax.depth import build as routing
from specjax.depth import selection
from specjax.drafters import registry
from specjax.engine.program import COMMAND_BUFFERS
from specjax.models.prepare import Dequantize
from specjax.pallas import dispatch

_log = logging.getLogger(__name__)


def define(values: flags.FlagValues, model: str | None = None, required: bool = True) -> None:
    """Flags that say which model runs and how; `model` is the default (None: required, if `required`)."""
    with flag_groups.heading(values, "Model"):
        flags.DEFINE_string(
            "model",
            model,
            "Checkpoint directory, .gguf file, name of a model that ships (smollm2-135m), or hub id org/name.",
            flag_values=values,
        )
        if model is None and required:
            flags.mark_flag_as_required("model", flag_values=values)
        flags.DEFINE_enum(
            "dtype",
            None,
            DTYPES,
            "Compute dtype. Default: float32 on CPUs, else what the checkpoint states.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "scheme",
            None,
            "Activation scheme to run the checkpoint's codes under, e.g. w4a8.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "quantize",
            None,
            "Scheme to round the weights to while loading, e.g. w8a8: the fast way on CPUs.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "head_scheme",
            "auto",
            "Scheme to round the output head to while loading, or dense. auto: w8a8 with --quantize of 8-bit integer "
            "inputs, else as stored.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "chat_template",
            None,
            "File with a Jinja chat template, for models without one.",
            flag_values=values,
        )
        flags.DEFINE_boolean(
            "qserve_layernorm",
            False,
            "Mean-centred norms as QServe's kernels compute them, to compare with them.",
            flag_values=values,
        )
    _define_depth_flags(values)
    _define_execution_flags(values)


def _define_execution_flags(values: flags.FlagValues) -> None:
    """Where and how programs run; nothing of it changes what they compute."""
    with flag_groups.heading(values, "Execution"):
        flags.DEFINE_enum("backend", "auto", dispatch.BACKENDS, "Kernels.", flag_values=values)
        flags.DEFINE_enum(
            "dequantize",
            "auto",
            get_args(Dequantize),
            "When weight-only codes become dense: at load, never, or as suits the backend; fold: never, and the two "
            "levels of QQQ's group scales become one.",
            flag_values=values,
        )
        flags.DEFINE_enum(
            "command_buffers",
            "loop",
            COMMAND_BUFFERS,
            "What CUDA graphs hold on a GPU: the whole decoding loop, the body of a step, or there are none (off).",
            flag_values=values,
        )
        flags.DEFINE_string(
            "compile_cache_dir", None, "Directory that keeps compiled programs.", flag_values=values
        )
        flags.DEFINE_string(
            "profile_dir", None, "Directory for a trace of the run (xprof).", flag_values=values
        )


def _define_depth_flags(values: flags.FlagValues) -> None:
    """Which layers tokens run through."""
    with flag_groups.heading(values, "Depth"):
        flags.DEFINE_enum(
            "depth",
            "auto",
            routing.DEPTHS,
            "Whether tokens skip layers: where the model has routers, never, or an error without routers.",
            flag_values=values,
        )
        flags.DEFINE_enum(
            "tree_selection",
            "off",
            selection.MODES,
            "Who decides which layers run over a draft tree; vote and prune do not keep the target's output.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "predictor", None, "Folder of the predictor for --tree_selection.", flag_values=values
        )
        flags.DEFINE_integer(
            "survivors",
            None,
            f"Nodes that --tree_selection=prune keeps. Default: {selection.DEFAULT_SURVIVORS}.",
            lower_bound=1,
            flag_values=values,
        )


def depth_config(values: flags.FlagValues) -> dict[str, Any] | None:
    """The flags of depth for records; None where none is given."""
    usual = {"depth": "auto", "tree_selection": "off", "predictor": None, "survivors": None}
    given = {name: values[name].value for name in usual}
    return None if given == usual else given


def load_model(
    values: flags.FlagValues,
    specs: Sequence[dict[str, Any]] = (),
    quantize: str | None = None,
    dtype: str | None = None,
) -> specjax.LanguageModel:
    """Loads --model for the drafters `specs`.

    `quantize` goes before --quantize, `dtype` before --dtype. With float32, matrix products run at full precision too
    (GPUs would round their inputs to TF32).
    """
    if values.compile_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", values.compile_cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    policy = dequantize(values, specs)
    if policy != values.dequantize:
        _log.warning("drafter 'self' reads the target's codes: --dequantize=%s is implied", policy)
    template = values.chat_template and Path(values.chat_template).read_text(encoding="utf-8")
    model = specjax.load(
        values.model,
        dtype=dtype or values.dtype,
        scheme=values.scheme,
        quantize=quantize or values.quantize,
        head_scheme=values.head_scheme,
        backend=values.backend,
        command_buffers=values.command_buffers,
        dequantize=policy,
        chat_template=template,
        qserve_layernorm=values.qserve_layernorm,
        depth=values.depth,
        tree_selection=values.tree_selection,
        predictor=values.predictor,
        survivors=values.survivors,
    )
    if model.dtype_name == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    return model


def dequantize(values: flags.FlagValues, specs: Sequence[dict[str, Any]]) -> str:
    """The policy of --dequantize; self-speculation under another scheme keeps the codes unless the user decides."""
    reads_codes = any(registry.needs_codes(spec) for spec in specs)
    if values.dequantize == "auto" and reads_codes:
        return "never"
    return values.dequantize


def model_config(values: flags.FlagValues) -> dict[str, Any]:
    """The model flags that decide what is computed, for records; dtype is None until the model is loaded."""
    names = ("model", "dtype", "scheme", "quantize", "head_scheme", "qserve_layernorm")
    return {name: values[name].value for name in names} | {"depth": depth_config(values)}


@contextlib.contextmanager
def profiled(values: flags.FlagValues):
    """Traces the block into --profile_dir, if that was given."""
    with contextlib.ExitStack() as stack:
        if values.profile_dir is not None:
            stack.enter_context(jax.profiler.trace(values.profile_dir))
        yield
