"""specjax models in EleutherAI's evaluation harness.

    python -m experiments.lm_eval_adapter run --model specjax --tasks TASK --include_path DIR \\
        --model_args pretrained=smollm2-135m,drafter=ngram

The arguments are those of `lm_eval`, which learns the model "specjax" here; it comes with `pip install specjax[eval]`.
In Python, importing this module registers the model.

Generated text is what the drafter and the target decode together; likelihoods come from the target alone (for
self-speculation: from its verifying scheme).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

import specjax
from specjax import scoring
from specjax.drafters import registry
from specjax.errors import ConfigError

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f"{error}; the evaluation harness is missing: pip install specjax[eval]"
    ) from error

_DRAFTER_ARGUMENTS = {
    "draft_checkpoint": "model",
    "draft_scheme": "scheme",
    "draft_depth": "draft_depth",
    "draft_topk": "topk",
    "num_nodes": "num_nodes",
    "ngram_max": "ngram_max",
    "ngram_min": "ngram_min",
}
# Generation arguments of tasks and how `specjax.Options` calls them; others are refused.
_SAMPLING = ("temperature", "top_p", "top_k")


@register_model("specjax")
class SpecjaxLM(TemplateLM):
    """A model of specjax for the harness."""

    def __init__(
        self,
        pretrained: str,
        drafter: str | dict[str, Any] = "none",
        dtype: str | None = None,
        scheme: str | None = None,
        backend: str = "auto",
        dequantize: str = "auto",
        chat_template: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        prefix_token_id: int | None = None,
        **drafter_arguments: Any,
    ):
        """Loads the model and builds the drafter.

        Args:
            pretrained: what `specjax.load` takes; dtype, scheme, backend and dequantize likewise.
            drafter: name, or a dict with options (from Python; on the command line options are arguments of their own:
                draft_checkpoint, draft_scheme, draft_depth, draft_topk, num_nodes, ngram_max, ngram_min).
            chat_template: file with a Jinja template.
            max_length: bound on prompt + new tokens; default: the model's positions.
            max_gen_toks: most new tokens where a task says nothing.
            batch_size: sequences that are generated together.
            seed: of tasks that sample.
            prefix_token_id: what stands before a text without context; default: BOS, else what ends a text.
            device, max_batch_size: not used; the harness always passes them. JAX_PLATFORMS chooses the device.
        Raises:
            ConfigError, CheckpointError, FileNotFoundError: before anything is computed.
        """
        super().__init__()
        self._batch_size = _whole("batch_size", batch_size)
        spec = _spec(drafter, drafter_arguments)
        options = {"dtype": dtype, "scheme": scheme, "backend": backend, "dequantize": dequantize}
        self.model = _load(pretrained, spec, chat_template, options)
        if self.model.tokenizer is None:
            raise ConfigError(f"pretrained={pretrained!r} has no tokenizer files")
        self.model.tokenizer.encode("")  # raises where it cannot be read
        if self.model.dtype_name == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")
        self.drafter = self.model.drafter(spec)
        self.tokenizer = self.model.tokenizer
        positions = self.model.config.max_position_embeddings
        self.max_length = min(_whole("max_length", max_length or positions), positions)
        self.max_gen_toks = _whole("max_gen_toks", max_gen_toks)
        self.seed = seed
        self._prefix = None if prefix_token_id is None else _token(self.model, prefix_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Tells request caches apart."""
        return self.tokenizer.digest()

    @property
    def eot_token_id(self) -> int | None:
        """The first token that ends a text; None if neither configuration nor tokenizer name one."""
        return next(iter(self.model.stop_ids), None)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS where there is one.

        Raises:
            ConfigError: there are neither BOS nor EOS, nor is one given.
        """
        candidates = (self._prefix, self.model.bos_token_id, self.eot_token_id)
        found = next((i for i in candidates if i is not None), None)
        if found is None:
            raise ConfigError(
                f"{self.model.name}: neither configuration nor tokenizer name a BOS or EOS token, which a text without "
                "context needs before it: pass prefix_token_id=ID"
            )
        return found

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; by default with the tokenizer's BOS, unless the text has it written out already."""
        if add_special_tokens is not None:
            return self.tokenizer.encode(string, add_special_tokens)
        plain = self.tokenizer.encode(string, add_special_tokens=False)
        starts = bool(plain) and plain[0] == self.model.bos_token_id
        return plain if starts else self.tokenizer.encode(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Text of a conversation; without `add_generation_prompt` its last message is an answer to be continued."""
        if add_generation_prompt or chat_history[-1]["role"] != "assistant":
            return self.tokenizer.render_chat(chat_history)
        return self.tokenizer.render_chat(chat_history, continue_final_message=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of continuations; contexts lose their beginning where there is no room."""
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        found: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), desc="likelihoods", disable=disable_tqdm)
        with bar:
            for index, result in scoring.likelihoods(self.model, pairs):
                found[index] = (result.logprob, result.is_greedy)
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
                bar.update()
        return found

    def _fitted(self, context: list[int], continuation: list[int]):
        """A pair whose context is cut from the left to the model's length."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ConfigError(
                f"a continuation of {len(continuation)} tokens exceeds max_length={self.max_length}"
            )
        return context[-room:], continuation

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` tokens without overlap, each after one token."""
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolled):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, a stop token or the limit."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        found: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="generation", disable=disable_tqdm) as bar:
            for members in groups.values():
                options = self._options(requests[members[0]].args[1])
                prompts = [self._prompt(requests[i].args[0], options) for i in members]
                results = self.model.generate_iter(
                    prompts, self.drafter, request_ids=members, **options
                )
                for place, result in results:
                    request = requests[members[place]]
                    found[members[place]] = result.text
                    self.cache_hook.add_partial("generate_until", request.args, result.text)
                    bar.update()
        return found

    def _options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Generation options from a task's `generation_kwargs`."""
        given = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        until = given.pop("until", None) or []
        options = {
            "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
            "max_new_tokens": given.pop("max_gen_toks"),
            "max_length": self.max_length,
            "batch_size": self._batch_size,
            "seed": self.seed,
        }
        sampled = given.pop("do_sample", False)
        chosen = {name: given.pop(name) for name in _SAMPLING if given.get(name) is not None}
        if sampled:
            options |= {"temperature": 1.0, **chosen}
        if given:
            raise ConfigError(
                f"generation_kwargs {sorted(given)} of the task are not supported; there are: until, max_gen_toks, "
                f"do_sample, {', '.join(_SAMPLING)}"
            )
        return options

    def _prompt(self, text: str, options: dict[str, Any]) -> list[int]:
        """Token ids of a context, cut from the left so that the new tokens have room."""
        room = self.max_length - options["max_new_tokens"]
        if room < 1:
            raise ConfigError(
                f"max_gen_toks={options['max_new_tokens']} leaves no room in max_length={self.max_length}"
            )
        return (self.tok_encode(text) or [self.prefix_token_id])[-room:]


def _spec(drafter: str | dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The drafter's spec from its name and the arguments for its options."""
    spec = dict(drafter) if isinstance(drafter, dict) else {"kind": drafter}
    unknown = sorted(arguments.keys() - _DRAFTER_ARGUMENTS.keys())
    if unknown:
        raise ConfigError(
            f"model_args {', '.join(unknown)}: unknown; for drafters there are {', '.join(_DRAFTER_ARGUMENTS)}"
        )
    spec |= {_DRAFTER_ARGUMENTS[name]: value for name, value in arguments.items()}
    registry.check(spec)
    return spec


def _load(
    pretrained: str, spec: dict[str, Any], chat_template: str | None, options: dict[str, Any]
):
    """The model, with its codes where the drafter reads them and a chat template from a file."""
    if options["dequantize"] == "auto" and registry.needs_codes(spec):
        options["dequantize"] = "never"
    template = chat_template and Path(chat_template).read_text(encoding="utf-8")
    return specjax.load(pretrained, chat_template=template, **options)


def _token(model: specjax.LanguageModel, value: Any) -> int:
    """The id of `prefix_token_id`, which a command line gives as text or number."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < model.config.vocab_size:
        raise ConfigError(
            f"prefix_token_id: {value!r} is no token id of the vocabulary of {model.config.vocab_size}"
        )
    return number


def _whole(name: str, value: Any) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"{name}={value!r}: a whole number of at least 1 is needed")
    return number


def main() -> None:
    """The harness's command line, with this model."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (specjax.errors.SpecjaxError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
