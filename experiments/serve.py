"""Serves a model over HTTP as OpenAI's API does, speculation included.

    python -m experiments.serve --model=smollm2-135m --drafter=ngram
    python -m experiments.serve --model=DIR --drafter=head --draft_checkpoint=HEAD --max_num_seqs=16
    python -m experiments.serve --model=DIR --speculative-config='{"method": "eagle3", "model": "HEAD"}'

Point any OpenAI client at http://127.0.0.1:8000/v1, or a browser at http://127.0.0.1:8000. Flags may be written with
dashes, as vLLM's are. SIGTERM lets running requests finish. What is honoured, ignored and refused: docs/serving.md.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments.shared import common, flag_groups, flags_drafter, flags_model
from specjax.engine.slot_engine import ACCEPTANCES, SlotEngine, SlotOptions
from specjax.errors import ConfigError
from specjax.serving import speculative_config
from specjax.serving.runner import EngineRunner

_log = logging.getLogger(__name__)
_DEFAULT_LENGTH = 2048


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    flags_model.define(values)
    flags_drafter.define(values)
    integer = lambda *a, **k: flags.DEFINE_integer(*a, flag_values=values, **k)
    string = lambda *a: flags.DEFINE_string(*a, flag_values=values)
    with flag_groups.heading(values, "Drafter"):
        string("speculative_config", None, "In place of --drafter: vLLM's JSON for it.")
    with flag_groups.heading(values, "Serving"):
        string("host", "127.0.0.1", "Address to listen at.")
        integer("port", 8000, "Port; 0: one that is free.", lower_bound=0, upper_bound=65535)
        integer("max_num_seqs", 4, "Requests that run together.", lower_bound=1)
        integer(
            "max_model_len",
            None,
            f"Most tokens of a text, prompt and answer. Default: the model's, at most {_DEFAULT_LENGTH}.",
            lower_bound=2,
        )
        flags.DEFINE_list(
            "served_model_name",
            None,
            "Names that clients may use. Default: --model.",
            flag_values=values,
        )
        integer("max_queue", 32, "Requests that may wait; more get 429.", lower_bound=0)
        integer(
            "max_logprobs", 5, "Log-probabilities per token on offer; -1: none.", lower_bound=-1
        )
        flags.DEFINE_enum(
            "acceptance", "lossless", ACCEPTANCES, "How drafts are accepted.", flag_values=values
        )
    with flag_groups.heading(values, "Safety"):
        flags.DEFINE_multi_string(
            "api_key", [], "Key to let in; may be repeated.", flag_values=values
        )
        string("api_key_file", None, "File with one such key per line.")
        flags.DEFINE_boolean(
            "isolate_keys", False, "Keys share no prefixes of texts.", flag_values=values
        )
        integer("max_body_bytes", 1 << 20, "Size of a request.", lower_bound=1)
        flags.DEFINE_float(
            "request_timeout_s", None, "A request ends then, finished or not.", flag_values=values
        )
        flags.DEFINE_float(
            "drain_s", 60.0, "Time for running requests at the end.", flag_values=values
        )


def main(values: flags.FlagValues) -> None:
    """Loads, warms up, serves."""
    try:
        from specjax.serving.http import process
        from specjax.serving.http.settings import Settings
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'specjax[serve]'") from error
    names = values.served_model_name or [values.model]
    settings = Settings(
        model_name=names[0],
        aliases=tuple(names[1:]),
        api_keys=_keys(values),
        isolate_keys=values.isolate_keys,
        max_queue=values.max_queue,
        max_body_bytes=values.max_body_bytes,
        request_timeout_s=values.request_timeout_s,
        drain_s=values.drain_s,
    )
    if settings.isolate_keys and not settings.api_keys:
        raise ConfigError(
            "--isolate_keys keeps keys apart, and there are none: give --api_key_file"
        )
    spec = drafter_spec(values)
    place = process.bind(values.host, values.port)
    model = flags_model.load_model(values, [spec])
    runner = EngineRunner(
        engine(values, model, spec, capacity(values, model)), vocab_size=model.config.vocab_size
    )
    print(f"{values.model}: loaded; compiling what it will need", file=sys.stderr)
    runner.start()
    runner.wait_ready()
    host = f"[{values.host}]" if ":" in values.host else values.host
    print(f"serving {names[0]} at http://{host}:{place.getsockname()[1]}", file=sys.stderr)
    failure = process.serve(process.service(model, runner, settings), place)
    if failure is not None:
        raise SystemExit(f"the engine failed: {type(failure).__name__}: {failure}")


def capacity(values: flags.FlagValues, model) -> int:
    """Most tokens of a text."""
    return values.max_model_len or min(model.config.max_position_embeddings, _DEFAULT_LENGTH)


def engine(values: flags.FlagValues, model, spec, longest: int) -> SlotEngine:
    """Slots of `longest` tokens, as the flags say."""
    options = SlotOptions(
        num_slots=values.max_num_seqs,
        max_model_len=longest,
        widths=tuple(sorted({min(width, longest) for width in (32, 64, 256)})),
        acceptance=values.acceptance,
        max_logprobs=None if values.max_logprobs < 0 else values.max_logprobs,
        prompt_logprobs=values.max_logprobs >= 0,
    )
    return SlotEngine(model.module, model.drafter(spec), options, values.command_buffers)


def drafter_spec(values: flags.FlagValues) -> dict:
    """The drafter of either flag."""
    if values.speculative_config is None:
        return flags_drafter.spec(values)
    if values["drafter"].present:
        raise ConfigError("--speculative_config and --drafter exclude each other")
    return speculative_config.spec(values.speculative_config)


def _keys(values: flags.FlagValues) -> tuple[str, ...]:
    keys = list(values.api_key)
    if values.api_key_file is not None:
        lines = Path(values.api_key_file).read_text(encoding="utf-8").splitlines()
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise ConfigError(f"--api_key_file={values.api_key_file}: there is no key in it")
    return tuple(keys)


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """A command line whose flags have underscores: --max-model-len=8 is --max_model_len=8."""
    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        found.append(name + equals + value)
    return found


if __name__ == "__main__":
    sys.argv[1:] = with_underscores(sys.argv[1:])
    common.run(define_flags, main)
