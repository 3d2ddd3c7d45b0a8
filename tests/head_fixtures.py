"""Draft heads with recorded rounds of upstream code: `tests/fixtures/heads`, or the shared folder with all of them."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from specjax import loading
from tests import paths

_SHARED = Path("architectures_and_heads")


def folder(name: str) -> Path:
    """A head's or target's folder."""
    copied = Path("heads", name)
    found = paths.find(copied)
    return found or paths.require(_SHARED / "checkpoints" / name)


@functools.cache
def target(name: str) -> loading.LoadedModel:
    """A loaded target in float32."""
    return loading.load_model(folder(name), loading.LoadOptions(dtype="float32"))


class Golden:
    """What was recorded of a head.

    Attributes:
        facts: settings, and of each prompt the accepted drafts of every round.
        arrays: by name; see `crop_heads` for what the copies in tests/fixtures leave out.
    """

    def __init__(self, name: str, whole: bool = False):
        copied = paths.find(Path("heads", name))
        if whole or copied is None or not (copied / "golden.json").is_file():
            shared = _SHARED / "goldens"
            files = [
                paths.require(shared / f"{name}.{suffix}") for suffix in ("json", "safetensors")
            ]
        else:
            files = [copied / "golden.json", copied / "golden.safetensors"]
        self.facts = json.loads(files[0].read_text())
        self.arrays = safetensors.numpy.load_file(files[1])

    @property
    def prompts(self) -> list[dict]:
        """Facts of the prompts."""
        return self.facts["prompts"]

    def text(self, prompt: dict) -> tuple[list[int], list[int]]:
        """A prompt and its greedy continuation."""
        key = f"p{prompt['prompt']}"
        ids = (self.arrays[f"{key}.{name}"].tolist() for name in ("input_ids", "greedy_ids"))
        return tuple(ids)

    def rounds(self) -> Iterator[list[dict[str, np.ndarray]]]:
        """Of each prompt that is recorded, its rounds: arrays by field."""
        found: dict[str, dict[int, dict]] = {}
        for key, array in self.arrays.items():
            prompt, *middle, field = key.split(".")
            if len(middle) == 1 and middle[0][:1] == "r":
                found.setdefault(prompt, {}).setdefault(int(middle[0][1:]), {})[field] = array
        for rounds in found.values():
            yield [rounds[index] for index in sorted(rounds)]


def check_logits(found, recorded: dict[str, np.ndarray], target_ids) -> None:
    """Draft logits within 2e-4, and the best tokens where they are 1e-4 apart.

    Args:
        target_ids: from draft to target ids.
    """
    logits = np.asarray(found, np.float32)
    assert np.abs(logits - recorded["logits"]).max() < 2e-4
    best = np.argsort(-logits, axis=-1, kind="stable")[:, : recorded["topk_ids"].shape[1]]
    ids = np.asarray(target_ids(jnp.asarray(best)))
    chances = recorded["topk_logprobs"]
    gaps = chances[:, :-1] - chances[:, 1:]
    clear = np.concatenate([gaps, np.full_like(gaps[:, :1], np.inf)], axis=1) > 1e-4
    clear[:, 1:] &= gaps > 1e-4
    assert (ids == recorded["topk_ids"])[clear].all()
    margins = chances[:, 0] - chances[:, 1]
    assert (ids[:, 0] == recorded["draft_tokens"])[margins > 1e-4].all()


def check_accepted(golden: Golden, prompts, completions) -> None:
    """Greedy text and accepted drafts of every recorded round, as far as the completions go.

    Args:
        completions: with traces, one per prompt.
    """
    for prompt, completion in zip(prompts, completions, strict=True):
        text = golden.text(prompt)[1]
        assert completion.output_ids[: len(text)] == text
        found = [len(step.accepted) for step in completion.metrics.trace]
        wanted = prompt["accepted_per_round"]
        assert found[: len(wanted)] == wanted
