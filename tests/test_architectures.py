"""Every architecture against logits and greedy continuations by transformers, and through every drafter.

The checkpoints are random and tiny; windows, softcaps and rotary kinds are set so that each changes the logits.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import checkpoints, conversion
from specjax.config import ARCHITECTURES, ModelConfig
from specjax.drafters.eagle import eagle
from specjax.drafters.hierarchical import Hierarchical
from specjax.drafters.lm import LM
from specjax.drafters.ngram import Ngram
from specjax.drafters.none import NoDraft
from specjax.drafters.self_draft import SelfDraft
from specjax.engine.engine import Programs
from specjax.errors import ConfigError, SpecjaxError
from specjax.models import llama
from specjax.models.prepare import prepare
from specjax.pallas.tree_attention import api, reference
from specjax.quantize import layerwise, rotate, smoothquant
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


@pytest.mark.parametrize("window", [1, 2, 3, 5, 40])
def test_a_window_is_a_lower_bound_per_row_of_a_tree(window):
    """Against counting: a row sees the last tokens of its own path, which begins with the prefix."""
    parents, prefix, capacity = [-1, 0, 0, 1, 2, 3, 3, 5], 6, 20
    count = len(parents)
    tail, paths_ = np.zeros((count, count), bool), []
    for node in range(count):
        path = [node]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        tail[node, path] = True
        paths_.append([*range(prefix), *(prefix + step for step in reversed(path))])
    wanted = np.zeros((count, capacity), bool)
    for node, path in enumerate(paths_):
        wanted[node, path[-window:]] = True
    at = jnp.full((1,), prefix, jnp.int32)
    seen = reference.visible_slots(capacity, count, at, at, jnp.asarray(tail)[None], window)
    np.testing.assert_array_equal(seen[0], wanted)
    chain = reference.visible_slots(capacity, 4, at, at, None, window)[0]
    for row in range(4):
        expected = np.arange(capacity) <= prefix + row
        expected &= np.arange(capacity) > prefix + row - window
        np.testing.assert_array_equal(chain[row], expected)


def test_the_kernel_refuses_what_it_does_not_know_by_name():
    q, keys = jnp.zeros((1, 2, 2, 64)), jnp.zeros((1, 1, 64, 64))
    at = jnp.zeros((1,), jnp.int32)
    for name in ("window", "scale", "softcap"):
        with pytest.raises(SpecjaxError, match=f"mosaic.*the kernel has no {name}"):
            api.tree_attention(
                *(q, keys, keys),
                **dict(start=at, prefix=at, tail=None, backend="mosaic"),
                **{name: 4},
            )


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "glm4"])
def test_rotations_refuse_norms_that_act_on_channels(name):
    with pytest.raises(ConfigError, match=r"cannot be rotated.*norm_placement"):
        rotate.check_architecture(config_of(name))


def test_smoothing_refuses_what_it_cannot_divide():
    after = dataclasses.replace(config_of("glm4"), norm_placement="after")
    with pytest.raises(ConfigError, match="norm_placement = 'after'"):
        smoothquant.check_architecture(after, outputs=False)
    with pytest.raises(ConfigError, match="gated_mlp"):
        smoothquant.check_architecture(config_of("gpt2"), outputs=True)


def test_the_registry_says_what_a_table_needs():
    names = [found.name for found in ARCHITECTURES.values()]
    assert len(set(names)) == len({found.model_type for found in ARCHITECTURES.values()}) == 13
    with pytest.raises(ConfigError, match="MiniCPM3ForCausalLM.*" + ".*".join(names)):
        ModelConfig.from_hf({"architectures": ["MiniCPM3ForCausalLM"]})


@pytest.mark.slow
@pytest.mark.parametrize("format", ["dense", "gptq"])
@pytest.mark.parametrize("name", NAMES)
def test_converted_models_load_again(tmp_path, name, format):
    """Dense: the same logits and names; gptq: those of the decoded codes. The configuration keeps its keys."""
    quantized = {} if format == "dense" else {"scheme": "w4a16", "group_size": 16}
    conversion.convert(folder(name), tmp_path / "out", format=format, **quantized)
    checkpoint = checkpoints.open_checkpoint(tmp_path / "out")
    given, canonical = golden(name), llama.build(checkpoint, jnp.float32)
    found = logits(prepare(canonical), given["long_input_ids"])
    if format == "dense":
        assert relative(found[..., ::8], given["long_logits"]) < 1e-4
        assert set(checkpoint.source.names()) == set(
            checkpoints.open_checkpoint(folder(name)).source.names()
        )
    else:
        decoded_ = logits(layerwise.decoded(canonical), given["long_input_ids"])
        assert relative(found, decoded_) < 1e-4
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.loads((folder(name) / "config.json").read_text()).keys() <= written.keys()
