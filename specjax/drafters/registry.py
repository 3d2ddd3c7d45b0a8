"""Drafters by name: a spec is a name or a nestable dict (JSON on command lines), the same for Python and binaries.

To add a drafter: write its file next to this one, add a builder here. Nothing else changes.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from specjax import loading
from specjax.checkpoints import heads
from specjax.decoding import sampling as sample
from specjax.drafters import common_vocabulary, draft_vocabulary
from specjax.drafters.base import Drafter
from specjax.drafters.eagle import eagle
from specjax.drafters.hierarchical import Hierarchical
from specjax.drafters.lm import LM
from specjax.drafters.medusa import default_choices, medusa
from specjax.drafters.ngram import Ngram
from specjax.drafters.none import NoDraft
from specjax.drafters.self_draft import SelfDraft
from specjax.errors import ConfigError
from specjax.files import hub
from specjax.loading import LoadOptions
from specjax.quantize import heads as rotated
from specjax.quantize import shrink

_LONGEST_DEFAULT = 64  # so that no default is refused on a model of few positions

Spec = str | dict[str, Any] | Drafter


def _none(target) -> Drafter:
    return NoDraft()


def _ngram(target, draft_depth: int = 7, ngram_max: int = 4, ngram_min: int = 2) -> Drafter:
    _positive(target, draft_depth=draft_depth, ngram_min=ngram_min, ngram_max=ngram_max)
    if ngram_max < ngram_min:
        raise ConfigError(f"{ngram_max=} is below {ngram_min=}")
    return Ngram(draft_depth=draft_depth, ngram_max=ngram_max, ngram_min=ngram_min)


def _lm(
    target,
    model: str,
    draft_depth: int = 4,
    scheme: str | None = None,
    quantize: str | None = None,
) -> Drafter:
    _positive(target, draft_depth=draft_depth)
    draft = _draft_model(target, model, scheme, quantize)
    drafter = LM(model=draft.module, draft_depth=draft_depth)
    return common_vocabulary.fitted(drafter, target.config.vocab_size)


def _hierarchical(
    target,
    model: str,
    inner: Any,
    min_draft_depth: int = 6,
    scheme: str | None = None,
    quantize: str | None = None,
) -> Drafter:
    _positive(target, min_draft_depth=min_draft_depth)
    draft = _draft_model(target, model, scheme, quantize, needs_codes(inner))
    drafter = Hierarchical(
        model=draft.module, inner=build(inner, draft), min_draft_depth=min_draft_depth
    )
    return common_vocabulary.fitted(drafter, target.config.vocab_size)


def _self(target, scheme: str | None = None, draft_depth: int = 3) -> Drafter:
    _positive(target, draft_depth=draft_depth)
    if scheme is not None:
        target.module.with_scheme(
            scheme
        )  # refuses a target without such codes before anything is compiled
    return SelfDraft(draft_depth=draft_depth, scheme=scheme)


def _eagle(
    target,
    model: str | None = None,
    draft_depth: int = 6,
    topk: int = 10,
    num_nodes: int = 60,
    vocabulary: str | None = None,
    vocabulary_size: int | None = None,
    scheme: str | None = None,
) -> Drafter:
    _positive(target, draft_depth=draft_depth)
    sample.whole("num_nodes", num_nodes)
    if sample.whole("topk", topk) > target.config.vocab_size:
        raise ConfigError(f"{topk=} exceeds the vocabulary of {target.config.vocab_size} tokens")
    path = model or target.default_head
    if path is None:
        raise ConfigError(
            f"drafter 'eagle': no head ships for {target.name!r}; pass its directory "
            "(--draft_checkpoint=DIR, or 'model' in the drafter's JSON)"
        )
    folder = hub.shipped_head(str(path)) or hub.resolve(str(path))
    head = heads.load_eagle(folder, target.module, target.name)
    rotated.check_pair(hub.resolve(target.name), folder)
    if vocabulary is not None or vocabulary_size is not None:
        ids = _draft_vocabulary(target, folder, vocabulary, vocabulary_size)
        if topk > len(ids):
            raise ConfigError(f"{topk=} exceeds the draft vocabulary of {len(ids)} tokens")
        head = shrink.with_vocabulary(head, target.module, ids)
    if scheme is not None:
        head = shrink.quantized(head, target.module, scheme)
    return eagle(head, draft_depth=draft_depth, topk=topk, num_nodes=num_nodes)


def _draft_vocabulary(target, head: Path, path: str | None, size: int | None):
    """Tokens to draft from a list, from the one beside the head, or from the tokenizer's merges; stop tokens too."""
    beside = head / draft_vocabulary.FILE_NAME
    if path is not None or beside.is_file():
        ranking = draft_vocabulary.read(Path(path or beside), target)
    else:
        ranking = draft_vocabulary.from_merges(target)
    return jnp.asarray(ranking.first(size, target.stop_ids))


def _medusa(target, model: str, tree: str | list | None = None) -> Drafter:
    loaded, named = heads.load_medusa(hub.resolve(model), target.module)
    if isinstance(tree, str) and tree not in named:
        raise ConfigError(
            f"medusa tree={tree!r}: medusa_choices.json of {model} has {', '.join(named) or 'none'}"
        )
    choices = named[tree] if isinstance(tree, str) else tree
    return medusa(loaded, choices or default_choices(len(loaded.heads)))


_BUILDERS: dict[str, Callable[..., Drafter]] = {
    "none": _none,
    "ngram": _ngram,
    "lm": _lm,
    "self": _self,
    "eagle": _eagle,
    "medusa": _medusa,
    "hierarchical": _hierarchical,
}


def kinds() -> tuple[str, ...]:
    """Names of all drafters."""
    return tuple(_BUILDERS)


def options(kind: str) -> dict[str, Any]:
    """Options of a kind with their defaults; required ones have `inspect.Parameter.empty`.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in _BUILDERS:
        raise ConfigError(f"drafter={kind!r}: supported are {', '.join(_BUILDERS)}")
    parameters = inspect.signature(_BUILDERS[kind]).parameters
    return {name: p.default for name, p in parameters.items() if name != "target"}


def parse(text: str) -> dict[str, Any]:
    """A spec from a command line: a name, or a JSON object with `kind` and options.

    Raises:
        ConfigError: malformed JSON, unknown kind or option.
    """
    if not text.lstrip().startswith("{"):
        spec = {"kind": text.strip()}
    else:
        try:
            spec = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"drafter={text!r} is not valid JSON: {error}") from None
    check(spec)
    return spec


def check(spec: dict[str, Any]) -> None:
    """Checks a dict spec, nested ones included, without loading anything.

    Raises:
        ConfigError: no or unknown kind, unknown or missing option.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("kind"), str):
        raise ConfigError(f"drafter={spec!r}: expected an object with a 'kind'")
    known = options(spec["kind"])
    for name, value in spec.items():
        if name == "kind":
            continue
        if name not in known:
            raise ConfigError(
                f"drafter {spec['kind']!r} has no option {name!r}; it has: {', '.join(known) or 'none'}"
            )
        if name == "inner":
            check(value)
    for name, default in known.items():
        if default is inspect.Parameter.empty and name not in spec:
            raise ConfigError(f"drafter {spec['kind']!r} needs the option {name!r}")


def build(spec: Spec, target) -> Drafter:
    """The drafter that a spec describes, for a loaded target (`specjax.loading.LoadedModel`).

    Raises:
        ConfigError: the spec is malformed or does not fit the target.
        CheckpointError: a draft checkpoint cannot be read or does not fit.
    """
    if not isinstance(spec, str | dict):
        return spec
    spec = parse(spec) if isinstance(spec, str) else dict(spec)
    check(spec)
    arguments = {name: value for name, value in spec.items() if name != "kind"}
    return _BUILDERS[spec["kind"]](target, **arguments)


def _positive(target, **values: Any) -> None:
    """Checks lengths of drafts: whole numbers from 1 to the target's positions."""
    most = max(target.config.max_position_embeddings, _LONGEST_DEFAULT)
    for name, value in values.items():
        if sample.whole(name, value) < 1:
            raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1")
        if value > most:
            raise ConfigError(f"{name}={value}: the target has {most} positions; at most so many")


def needs_codes(spec: Spec) -> bool:
    """Whether a drafter reads its target's codes, which must then be loaded with dequantize="never"."""
    if isinstance(spec, str):
        spec = parse(spec)
    return isinstance(spec, dict) and spec["kind"] == "self" and spec.get("scheme") is not None


def _draft_model(
    target, model: str, scheme: str | None, quantize: str | None, keep_codes: bool = False
):
    """Loads a draft model in the target's compute dtype; `quantize` rounds a dense one to a scheme."""
    options = LoadOptions(
        dtype=target.dtype_name,
        scheme=scheme,
        quantize=quantize,
        dequantize="never" if keep_codes else "auto",
    )
    draft = loading.load_model(model, options)
    common_vocabulary.check(target, draft)
    if draft.config.vocab_size < target.config.vocab_size:
        common_vocabulary.clip(draft.module)
    return draft
