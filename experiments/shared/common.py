"""What the binaries share: flags, drafter specs from flags, loading, error reporting.

A binary has `define_flags(values)` and `main(values)` and ends with `common.run(define_flags, main)` under its
`__main__` guard. Flags come into being there only; importing a binary defines none, so tests and other code can call
`main(parse(define_flags, [...]))` in their own process.
"""

import contextlib
import functools
import inspect
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
from absl import app, flags
from absl import logging as absl_logging

import specjax
from specjax import verify
from specjax.config import DTYPES
from specjax.depth import build as routing
from specjax.depth import selection
from specjax.drafters import registry, tuning
from specjax.errors import ConfigError, SpecjaxError
from specjax.models.prepare import Dequantize
from specjax.pallas import dispatch

_log = logging.getLogger(__name__)

# So that `--help` of a binary lists the flags defined here as its own.
flags.disclaim_key_flags()

# Flag -> option of the drafter's spec.
_DRAFTER_FLAGS = {
    "draft_checkpoint": "model",
    "draft_depth": "draft_depth",
    "draft_topk": "topk",
    "num_nodes": "num_nodes",
    "draft_vocabulary_size": "vocabulary_size",
    "ngram_max": "ngram_max",
    "ngram_min": "ngram_min",
    "draft_scheme": "scheme",
    "min_draft_depth": "min_draft_depth",
}
_OPTIONS = (
    *("max_new_tokens", "max_length", "temperature", "top_k", "top_p", "stop", "seed"),
    *("batch_size", "acceptance", "ignore_eos", "stop_token_ids"),
)
# Flags that describe --drafter; a preset's are dropped where another drafter is given.
DRAFTER_FLAGS = (*_DRAFTER_FLAGS, "inner_drafter", "inner_checkpoint")
_BAD_INPUT, _INTERRUPTED = 2, 130


def define_model_flags(
    values: flags.FlagValues, model: str | None = None, required: bool = True
) -> None:
    """Flags that say which model runs and how; `model` is the default (None: required, if `required`)."""
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
    flags.DEFINE_enum("backend", "auto", dispatch.BACKENDS, "Kernels.", flag_values=values)
    flags.DEFINE_enum(
        "dequantize",
        "auto",
        get_args(Dequantize),
        "When weight-only codes become dense: at load, never, or as suits the backend; fold: never, and the two levels "
        "of QQQ's group scales become one.",
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
    define_depth_flags(values)
    flags.DEFINE_string(
        "compile_cache_dir", None, "Directory that keeps compiled programs.", flag_values=values
    )
    flags.DEFINE_string(
        "profile_dir", None, "Directory for a trace of the run (xprof).", flag_values=values
    )


def define_depth_flags(values: flags.FlagValues) -> None:
    """Which layers tokens run through."""
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


def define_drafter_flags(values: flags.FlagValues, default: str = "none") -> None:
    """--drafter and the flags that set single options of it; --tuned takes a drafter from a file instead."""
    flags.DEFINE_string(
        "tuned", None, "Drafter that experiments.tune chose (its --output).", flag_values=values
    )
    flags.DEFINE_string(
        "drafter",
        default,
        f"One of {', '.join(registry.kinds())}, or a JSON object with 'kind' and options.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "draft_checkpoint", None, "Draft head or draft model (option 'model').", flag_values=values
    )
    described = {
        "draft_depth": "Levels of the draft tree (upstream EAGLE's depth + 1), or length of the chain.",
        "draft_topk": "Children per node of the draft tree (option 'topk').",
        "num_nodes": "Nodes of the draft tree, the root included.",
        "draft_vocabulary_size": "An EAGLE-1/2 head scores only so many frequent tokens (option 'vocabulary_size').",
        "ngram_max": "Longest n-gram that is looked up.",
        "ngram_min": "Shortest n-gram that is looked up.",
    }
    described["min_draft_depth"] = "Shortest chain that 'hierarchical' hands to the target."
    for name, text in described.items():
        flags.DEFINE_integer(name, None, text, lower_bound=1, flag_values=values)
    flags.DEFINE_string(
        "draft_scheme", None, "Scheme of the draft (option 'scheme').", flag_values=values
    )
    flags.DEFINE_string(
        "inner_drafter",
        None,
        "Drafter of the draft model: a name or JSON (option 'inner' of 'hierarchical').",
        flag_values=values,
    )
    flags.DEFINE_string(
        "inner_checkpoint", None, "Option 'model' of the inner drafter.", flag_values=values
    )


def define_sampling_flags(values: flags.FlagValues, max_new_tokens: int | None = 128) -> None:
    """How tokens are chosen and when a generation ends: the fields of `specjax.Options`."""
    define_integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    define_float = functools.partial(flags.DEFINE_float, flag_values=values)
    define_integer("max_new_tokens", max_new_tokens, "Most new tokens per request.", lower_bound=1)
    define_integer("max_length", None, "Most tokens, prompt included.", lower_bound=1)
    define_float("temperature", 0.0, "0 is greedy decoding.", lower_bound=0.0)
    define_integer("top_k", 0, "Sample from the k most likely tokens; 0 is off.", lower_bound=0)
    define_float("top_p", 1.0, "Sample from this probability mass; 1 is off.", upper_bound=1.0)
    define_integer("seed", 0, "Seed of all random choices.")
    define_integer("batch_size", 1, "Requests that run together.", lower_bound=1)
    flags.DEFINE_multi_string(
        "stop",
        [],
        "String that ends a text and is cut off, special tokens too; may be repeated.",
        flag_values=values,
    )
    flags.DEFINE_multi_integer(
        "stop_token_ids",
        None,
        "Token id that ends a generation besides the model's own; may be repeated.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "acceptance",
        "lossless",
        verify.ACCEPTANCES,
        "Acceptance rule; typical and relaxed do not keep the target's output.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "ignore_eos", False, "Go on after the model's stop tokens.", flag_values=values
    )


def options(values: flags.FlagValues) -> dict[str, Any]:
    """Keyword arguments of `LanguageModel.generate` from the sampling flags."""
    return {name: values[name].value for name in _OPTIONS} | {"stop": tuple(values.stop)}


def drafter_spec(values: flags.FlagValues) -> dict[str, Any]:
    """The drafter's spec from --drafter and its option flags, checked; nothing is loaded.

    Raises:
        ConfigError: malformed JSON, unknown kind or option, a flag that the kind has no option for or that
            repeats an option of the JSON.
    """
    if values.tuned is not None:
        return _tuned_spec(values)
    spec = _unchecked_spec("drafter", values.drafter)
    for flag, option in _DRAFTER_FLAGS.items():
        if values[flag].value is not None:
            _set_option(spec, option, values[flag].value, flag, "drafter")
    if values.inner_drafter is not None:
        inner = _unchecked_spec("inner_drafter", values.inner_drafter)
        if values.inner_checkpoint is not None:
            _set_option(
                inner, "model", values.inner_checkpoint, "inner_checkpoint", "inner_drafter"
            )
        _set_option(spec, "inner", inner, "inner_drafter", "drafter")
    elif values.inner_checkpoint is not None:
        raise ConfigError("--inner_checkpoint needs --inner_drafter")
    registry.check(spec)
    return spec


def _tuned_spec(values: flags.FlagValues) -> dict[str, Any]:
    """The drafter of --tuned; a warning says where it was tuned for something else."""
    others = [name for name in ("drafter", *_DRAFTER_FLAGS) if values[name].present]
    if others:
        raise ConfigError(f"--tuned says which drafter runs; drop --{', --'.join(others)}")
    content = tuning.read(Path(values.tuned))
    here = {"model": values.model, "scheme": values.scheme, "device_kind": _device_kind()}
    there = content | {"device_kind": content["environment"]["device_kind"]}
    for name, value in here.items():
        if there.get(name) != value:
            _log.warning(
                "--tuned=%s was made with %s=%r, not %r: another tree may be faster here",
                *(values.tuned, name, there.get(name), value),
            )
    registry.check(content["drafter"])
    return content["drafter"]


def _device_kind() -> str:
    return jax.devices()[0].device_kind


def _unchecked_spec(flag: str, text: str) -> dict[str, Any]:
    """A spec of a known kind; options may be missing that other flags still set."""
    try:
        spec = json.loads(text) if text.lstrip().startswith("{") else {"kind": text.strip()}
    except json.JSONDecodeError as error:
        raise ConfigError(f"--{flag}={text!r} is not valid JSON: {error}") from None
    if not isinstance(spec.get("kind"), str):
        registry.check(spec)
    registry.options(spec["kind"])
    return spec


def _set_option(spec: dict[str, Any], option: str, value: Any, flag: str, source: str) -> None:
    """Puts a flag's value into a spec."""
    known = registry.options(spec["kind"])
    if option not in known:
        raise ConfigError(
            f"--{flag}: drafter {spec['kind']!r} has no option {option!r}; "
            f"it has: {', '.join(known) or 'none'}"
        )
    if option in spec:
        raise ConfigError(f"--{flag}: the JSON of --{source} sets {option!r} too; drop one of them")
    spec[option] = value


def full_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """A checked spec with the defaults of every option written out, for records."""
    defaults = {
        name: value
        for name, value in registry.options(spec["kind"]).items()
        if value is not inspect.Parameter.empty
    }
    filled = {"kind": spec["kind"], **defaults, **spec}
    return {k: full_spec(v) if _is_spec(v) else v for k, v in filled.items()}


def label(spec: dict[str, Any]) -> str:
    """Short name of a spec for tables, e.g. "ngram(draft_depth=5)"; nested specs in full."""
    given = [
        f"{name}={label(value) if _is_spec(value) else value}"
        for name, value in spec.items()
        if name != "kind"
    ]
    return spec["kind"] + (f"({', '.join(given)})" if given else "")


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and "kind" in value


def load_model(
    values: flags.FlagValues,
    specs: Sequence[dict[str, Any]] = (),
    quantize: str | None = None,
    dtype: str | None = None,
) -> specjax.LanguageModel:
    """Loads --model for the drafters `specs`, rounded to the scheme `quantize` if one is given.

    `dtype` goes before --dtype. With float32, matrix products run at full precision too (GPUs would round their inputs
    to TF32).
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
        quantize=quantize,
        backend=values.backend,
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
    names = ("model", "dtype", "scheme", "qserve_layernorm")
    return {name: values[name].value for name in names} | {"depth": depth_config(values)}


@contextlib.contextmanager
def profiled(values: flags.FlagValues):
    """Traces the block into --profile_dir, if that was given."""
    with contextlib.ExitStack() as stack:
        if values.profile_dir is not None:
            stack.enter_context(jax.profiler.trace(values.profile_dir))
        yield


def parse(
    define_flags: Callable[[flags.FlagValues], None], arguments: Sequence[str]
) -> flags.FlagValues:
    """Flag values of a binary for a list of arguments, apart from the process's own flags."""
    values = flags.FlagValues()
    define_flags(values)
    rest = values(["binary", *arguments])[1:]
    if rest:
        raise flags.Error(f"unexpected argument {rest[0]!r}")
    return values


def guarded(main: Callable[[flags.FlagValues], None], values: flags.FlagValues) -> int:
    """Runs `main`; bad input becomes one line on stderr. Returns the exit code."""
    try:
        main(values)
    except (SpecjaxError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def run(
    define_flags: Callable[[flags.FlagValues], None], main: Callable[[flags.FlagValues], None]
) -> None:
    """Runs a binary with the process's command line; does not return."""
    define_flags(flags.FLAGS)
    # absl would raise the default to INFO; --verbosity=0 still does.
    absl_logging.set_verbosity(absl_logging.WARNING)

    def start(argv: list[str]) -> int:
        if len(argv) > 1:
            print(
                f"error: unexpected argument {argv[1]!r}; flags are --name=value", file=sys.stderr
            )
            return _BAD_INPUT
        return guarded(main, flags.FLAGS)

    app.run(start)
