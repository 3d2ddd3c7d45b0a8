"""Every architecture against logits and greedy continuations by transformers, and through every drafter.

The checkpoints are random and tiny; windows, softcaps and rotary kinds are set so that each changes the logits.
"""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import checkpoints
from specjax.config import ModelConfig
from specjax.drafters.eagle import eagle
from specjax.drafters.hierarchical import Hierarchical
from specjax.drafters.lm import LM
from specjax.drafters.ngram import Ngram
from specjax.drafters.none import NoDraft
from specjax.drafters.self_draft import SelfDraft
from specjax.engine.engine import Programs
from specjax.models import llama
from specjax.models.prepare import prepare
from tests import paths, tiny

NAMES = (
    *("qwen3-tied", "mistral-swa", "phi3-longrope", "granite", "smollm3", "gemma2", "gemma3-text"),
    *("gpt2", "glm4"),
)
# Every golden of these has a margin above it.
MARGIN = 1e-3
PROGRAMS = Programs()


def folder(name: str):
    return paths.require(f"architectures/{name}")


@functools.cache
def golden(name: str):
    return dict(np.load(folder(name) / "golden.npz"))


@functools.cache
def rows(name: str) -> list[dict]:
    with open(folder(name) / "greedy.jsonl") as file:
        return [json.loads(line) for line in file]


@functools.cache
def model(name: str) -> llama.Llama:
    checkpoint = checkpoints.open_checkpoint(folder(name))
    return prepare(llama.build(checkpoint, jnp.float32))


def relative(found, expected) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


_full_logits = jax.jit(llama.full_logits)


def logits(module: llama.Llama, ids) -> np.ndarray:
    return np.asarray(_full_logits(module, jnp.asarray(ids)))


def config_of(name: str, file: str = "config.json", **changes) -> ModelConfig:
    return ModelConfig.from_hf({**json.loads((folder(name) / file).read_text()), **changes})


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    """Texts that are longer than every window and than the switch of longrope; a short one where that matters."""
    given = golden(name)
    assert (
        relative(logits(model(name), given["long_input_ids"])[..., ::8], given["long_logits"])
        < 1e-4
    )
    if name == "phi3-longrope":
        assert relative(logits(model(name), given["input_ids"])[..., ::8], given["logits"]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_are_one_configuration_which_survives_writing(name):
    found = config_of(name)
    assert found == config_of(name, "config.v4.json")
    written = found.to_hf()
    assert ModelConfig.from_hf(written) == found
    kept = json.loads((folder(name) / "config.json").read_text())
    assert {k: written[k] for k in kept if k not in ("rope_parameters", "dtype")} == {
        k: v for k, v in kept.items() if k not in ("rope_parameters", "dtype")
    }


DRAFTERS = {
    "none": lambda target: NoDraft(),
    "ngram": lambda target: Ngram(draft_depth=4, ngram_max=2, ngram_min=1),
    "lm": lambda target: LM(model=tiny.noisy(target, 0.1), draft_depth=3),
    "self": lambda target: SelfDraft(draft_depth=3),
    "eagle": lambda target: eagle(head(target), draft_depth=3, topk=2, num_nodes=8),
    "hierarchical": lambda target: Hierarchical(
        model=tiny.noisy(target, 0.1), inner=Ngram(draft_depth=2), min_draft_depth=2
    ),
}


def head(target: llama.Llama):
    """A random head of a target's width."""
    return tiny.head(
        tiny.config(
            vocab_size=target.config.vocab_size,
            hidden_size=target.config.hidden_size,
            max_position_embeddings=256,
        )
    )


def decoded(name: str, drafter: str, batch: int, count: int = 24) -> list[list[int]]:
    target = model(name)
    with tiny.hurried_compiler():
        runner = tiny.engine(target, DRAFTERS[drafter](target), PROGRAMS)
        texts = [row["prompt_ids"] for row in rows(name)]
        return tiny.outputs(tiny.run(runner, tiny.requests(texts, count), batch))


def check_greedy(name: str, outputs: list[list[int]]) -> None:
    """Equal to the goldens as far as every margin is clear; keys keep the angles that they were cached with."""
    for row, output in zip(rows(name), outputs, strict=True):
        clear = list(itertools.takewhile(lambda m: m > MARGIN, row["top2_margin"]))
        expected = row.get("greedy_ids_cached", row["greedy_ids"])
        assert output[: len(clear)] == expected[: len(clear)]


# Some of the pairs; the product is in the slow tests.
PAIRS = (
    *(("qwen3-tied", "self", 4), ("mistral-swa", "ngram", 4), ("phi3-longrope", "none", 1)),
    *(("gemma2", "hierarchical", 1), ("gemma3-text", "eagle", 4), ("gpt2", "lm", 4)),
)


@pytest.mark.parametrize(("name", "drafter", "batch"), PAIRS)
def test_greedy_decoding_is_that_of_transformers(name, drafter, batch):
    check_greedy(name, decoded(name, drafter, batch))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_drafter_over_every_architecture(name, drafter, batch):
    check_greedy(name, decoded(name, drafter, batch))


LONG_PROMPTS = ("qwen3-tied", "mistral-swa", "gemma3-text", "gpt2")


def check_long_prompts(name: str, drafter: str, batch: int) -> None:
    """Prompts longer than every window, generation up to the last position of GPT-2: equal to whole passes."""
    target = model(name)
    ids = np.random.default_rng(7).integers(3, 256, (4, 44)).tolist()
    texts = [row[: 44 - 5 * index] for index, row in enumerate(ids)]
    with tiny.hurried_compiler():
        expected = tiny.greedy(target, texts, 20)
        runner = tiny.engine(target, DRAFTERS[drafter](target), PROGRAMS)
        outputs = tiny.outputs(tiny.run(runner, tiny.requests(texts, 20), batch))
    assert outputs == [full[len(text) :] for full, text in zip(expected, texts, strict=True)]


def test_a_prompt_longer_than_the_window_and_drafts_beyond_the_last_position():
    check_long_prompts("gpt2", "eagle", 4)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", LONG_PROMPTS)
def test_prompts_longer_than_the_window(name, drafter, batch):
    check_long_prompts(name, drafter, batch)
