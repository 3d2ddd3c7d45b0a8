"""Tiny random models and heads, the fixture models, and how tests run them."""

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from specjax import checkpoints, verify
from specjax.checkpoints import heads
from specjax.config import ModelConfig, RopeConfig
from specjax.decoding import sampling as sample
from specjax.drafters import eagle as eagle_drafter
from specjax.drafters import medusa as medusa_drafter
from specjax.drafters import merge
from specjax.drafters.arrangements import BestFirst, Chain, Widths
from specjax.drafters.base import Drafter
from specjax.drafters.feature_chain import FeatureChain
from specjax.drafters.hierarchical import Hierarchical
from specjax.drafters.lm import LM
from specjax.drafters.ngram import Ngram
from specjax.drafters.none import NoDraft
from specjax.drafters.one_pass import OnePass
from specjax.drafters.self_draft import SelfDraft
from specjax.drafters.suffix import Suffix
from specjax.engine.engine import Completion, Engine, Programs, Request
from specjax.models import block, eagle, eagle3, llama, markov, medusa, pard, peagle
from specjax.models import layers as nn
from specjax.models.prepare import prepare
from specjax.quant.dense_linear import Linear
from specjax.quantize import quantize, recipe, shrink
from tests import paths


def config(**changes) -> ModelConfig:
    """A model of 16 tokens, two layers and 32 channels."""
    fields = dict(
        architecture="LlamaForCausalLM",
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_ids=(),
        dtype="float32",
    )
    return ModelConfig(**{**fields, **changes})


class RandomCheckpoint:
    """Parameters drawn when they are asked for; the name seeds each, so the order does not matter.

    Attributes:
        params: what has been drawn so far, by Hugging Face name.
    """

    format = "random"

    def __init__(self, model_config: ModelConfig, seed: int = 0, present: Sequence[str] = ()):
        self.config, self.seed, self.present = model_config, seed, set(present)
        self.params: dict[str, np.ndarray] = {}

    @property
    def source(self):
        return self

    def has(self, name: str) -> bool:
        return name in self.present

    def read(self, name: str) -> np.ndarray:
        raise KeyError(name)

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([self.seed, *name.encode()])
        values = rng.standard_normal(shape)
        if "norm" in name:
            values = 1 + 0.1 * values
        elif len(shape) == 2 and "embed" not in name:
            # Wide enough that the tiny models have opinions: attention and logits are not flat.
            values *= 1.6 / np.sqrt(shape[1])
        self.params[name] = values.astype(np.float32)
        return self.params[name]

    def linear(self, prefix, out_features, in_features, bias):
        weight = self.tensor(f"{prefix}.weight", (out_features, in_features))
        bias_values = self.tensor(f"{prefix}.bias", (out_features,)) if bias else None
        return Linear(
            jnp.asarray(weight), None if bias_values is None else jnp.asarray(bias_values)
        )


def model(model_config: ModelConfig | None = None, seed: int = 0) -> llama.Llama:
    """A random float32 model in canonical form."""
    return llama.build(RandomCheckpoint(model_config or config(), seed), jnp.float32)


def head(model_config: ModelConfig | None = None, seed: int = 1, bias: bool = False):
    """A random EAGLE-1/2 head, with or without a bias of fc."""
    present = ("fc.bias",) if bias else ()
    source = RandomCheckpoint(model_config or config(), seed, present)
    return eagle.build(source, jnp.float32)


class ZeroCheckpoint(RandomCheckpoint):
    """All zeros, as JAX arrays: under `jax.eval_shape` nothing is allocated."""

    def tensor(self, name, shape):
        return jnp.zeros(shape, jnp.float32)


@functools.cache
def fixture_model(
    name: str = "tiny-fp16", dequantize: str = "auto", dtype: str = "float32"
) -> llama.Llama:
    """A fixture checkpoint in run-time form."""
    checkpoint = checkpoints.open_checkpoint(paths.fixture(name))
    return prepare(llama.build(checkpoint, jnp.dtype(dtype)), dequantize=dequantize)


@functools.cache
def fixture_head(name: str = "eagle2-tiny", target: str = "tiny-fp16", dtype: str = "float32"):
    """An EAGLE head of the fixtures, in its target's dtype."""
    return heads.load_eagle(paths.fixture(name), fixture_model(target, dtype=dtype), target)


@functools.cache
def quantized_model(scheme: str, name: str = "tiny-fp16", dequantize: str = "never") -> llama.Llama:
    """A dense fixture checkpoint rounded to nearest, in run-time form; by default it runs on its codes."""
    dense = llama.build(checkpoints.open_checkpoint(paths.fixture(name)), jnp.float32)
    rounded = quantize.quantize(dense, recipe.make(scheme, "rtn"))
    return prepare(rounded, dequantize=dequantize)


def shortened(target: llama.Llama) -> llama.Llama:
    """The first layer of a model between its embedding and its norm: the same schemes, half the compilation."""
    inner = target.model
    kept = llama.LlamaModel(inner.embed_tokens, inner.layers[:1], inner.norm)
    return llama.Llama(replace(target.config, num_layers=1), kept, target.lm_head)


def noisy(target: llama.Llama, scale: float, seed: int = 0) -> llama.Llama:
    """A model that often agrees with `target`: its weights with noise of `scale` standard deviations."""
    leaves, structure = jax.tree.flatten(target)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def stir(key, leaf):
        return leaf + scale * jnp.std(leaf) * jax.random.normal(key, leaf.shape, leaf.dtype)

    return structure.unflatten([stir(*pair) for pair in zip(keys, leaves, strict=True)])


class Parts:
    """What drafters are made of: a draft model and heads, trained ones for the fixture targets and random ones else."""

    def __init__(self, target: llama.Llama, fixture: str | None = None, noise: float = 0.25):
        self.target, self.fixture, self.noise = target, fixture, noise
        self.config = target.config

    @functools.cached_property
    def model(self) -> llama.Llama:
        return noisy(self.target, self.noise)

    @functools.cached_property
    def eagle31(self) -> eagle3.Eagle3Head:
        """A random head of two layers, the second of a window, with all norms, that drafts every other token."""
        shape = replace(self.config, num_layers=2, windows=(None, 6))
        ids = jnp.arange(0, self.config.vocab_size, 2, dtype=jnp.int32)
        return eagle3.build(
            RandomCheckpoint(shape, 5),
            jnp.float32,
            layer_ids=(0, self.config.num_layers),
            target_width=self.config.hidden_size,
            num_drafts=len(ids),
            d2t=ids - jnp.arange(len(ids)),
            variant=eagle3.Variant(norm_before_residual=True, fc_norm=True, norm_output=True),
        )

    @functools.cached_property
    def peagle(self) -> peagle.PEagleHead:
        """That head with random rows for its mask token."""
        shape = (2 * self.config.hidden_size,)
        mask = RandomCheckpoint(self.config, 7).tensor("mask_hidden", shape)
        return peagle.PEagleHead(self.eagle31, jnp.asarray(mask), mask_token=2, num_drafts=3)

    @functools.cached_property
    def block(self) -> block.BlockHead:
        """A random block head: a causal layer with a window, one that sees all of the block, and a carried term."""
        shape = replace(self.config, num_layers=2)
        hidden, vocab, found = shape.hidden_size, shape.vocab_size, RandomCheckpoint(shape, 6)
        layout = block.Layout(
            size=5, mask_token=2, fill_in=True, causal=(True, False), windows=(6, None)
        )

        def linear(name: str, out: int, inp: int) -> Linear:
            return llama.build_linear(found, name, out, inp, False, jnp.float32)

        table = jnp.asarray(found.tensor("w1", (vocab, 8)))
        term = markov.Markov(
            "rnn", nn.Embedding(table), linear("w2", vocab, 8), linear("mix", 24, 16 + hidden)
        )
        return block.BlockHead(
            shape,
            layout,
            (1, self.config.num_layers),
            linear("fc", hidden, 2 * hidden),
            llama.build_norm(found, "hidden_norm", jnp.float32),
            [llama.build_layer(found, i, jnp.float32, f"layers.{i}") for i in range(2)],
            llama.build_norm(found, "norm", jnp.float32),
            markov=term,
        )

    @functools.cached_property
    def eagle(self) -> eagle.EagleHead:
        return fixture_head() if self.fixture == "tiny-fp16" else head(self.config)

    @functools.cached_property
    def eagle3(self) -> eagle3.Eagle3Head:
        if self.fixture == "tiny8-fp16":
            return fixture_head("eagle3-tiny", self.fixture)
        return eagle3.build(
            RandomCheckpoint(self.config, 5),
            jnp.float32,
            layer_ids=(0,),
            target_width=self.config.hidden_size,
            num_drafts=self.config.vocab_size,
        )

    @functools.cached_property
    def medusa(self) -> medusa.MedusaHeads:
        if self.fixture == "tiny-fp16":
            return heads.load_medusa(paths.fixture("medusa-tiny"), self.target)[0]
        return medusa.build(RandomCheckpoint(self.config, 6), self.config, 3, jnp.float32)


def _eagle_reduced(parts: Parts) -> Drafter:
    """Drafts from half of the vocabulary, with an int8 head."""
    ids = jnp.arange(0, parts.config.vocab_size, 2, dtype=jnp.int32)
    small = shrink.with_vocabulary(parts.eagle, parts.target, ids)
    small = shrink.quantized(small, parts.target, "w8a16")
    return eagle_drafter.eagle(small, draft_depth=3, topk=2, num_nodes=8)


def _medusa(parts: Parts) -> Drafter:
    return medusa_drafter.medusa(
        parts.medusa, medusa_drafter.default_choices(3, num_nodes=8, topk=3)
    )


def _hierarchical(parts: Parts) -> Drafter:
    inner = DRAFTERS["eagle"](parts)
    return Hierarchical(model=parts.model, inner=inner, min_draft_depth=3)


def _nested(parts: Parts) -> Drafter:
    inner = Hierarchical(
        model=noisy(parts.target, 2 * parts.noise), inner=Ngram(draft_depth=2), min_draft_depth=2
    )
    return Hierarchical(model=parts.model, inner=inner, min_draft_depth=3)


# Every drafter, small: the contract, losslessness and distribution tests all run this table.
DRAFTERS: dict[str, Callable[[Parts], Drafter]] = {
    "none": lambda parts: NoDraft(),
    "ngram": lambda parts: Ngram(draft_depth=4, ngram_max=3, ngram_min=1),
    "lm": lambda parts: LM(model=parts.model, draft_depth=3),
    "self": lambda parts: SelfDraft(draft_depth=3),
    "eagle": lambda parts: eagle_drafter.eagle(parts.eagle, draft_depth=3, topk=2, num_nodes=8),
    "eagle-reduced": _eagle_reduced,
    "eagle3": lambda parts: eagle_drafter.eagle(parts.eagle3, draft_depth=3, topk=2, num_nodes=8),
    "medusa": _medusa,
    "head": lambda parts: FeatureChain(head=parts.eagle31, draft_depth=3),
    "one-pass": lambda parts: OnePass(head=parts.peagle, arrangement=Chain(draft_depth=3)),
    "block": lambda parts: OnePass(
        head=parts.block, arrangement=BestFirst(num_nodes=9, draft_depth=3)
    ),
    "pard": lambda parts: OnePass(
        head=pard.PardHead(parts.model, mask_token=2, num_drafts=4),
        arrangement=Widths(num_nodes=8, draft_depth=3, topk=3),
    ),
    "suffix": lambda parts: Suffix(
        texts=jnp.asarray([*prompts()[0], -1], jnp.int32), draft_depth=5, num_tree_nodes=9
    ),
    "merge": lambda parts: merge.merge(
        [
            eagle_drafter.eagle(parts.eagle, draft_depth=2, topk=2, num_nodes=5),
            Ngram(draft_depth=4),
            SelfDraft(draft_depth=2),
        ],
        num_nodes=9,
    ),
    "hierarchical": _hierarchical,
    "nested": _nested,
}


@functools.cache
def fixture_texts() -> list[dict]:
    """`input_ids` and 64 `greedy_ids` of tiny-fp16 for 12 prompts."""
    with open(paths.golden("tiny-fp16_greedy.jsonl")) as file:
        return [json.loads(line) for line in file]


# Prompt lengths of the first requests: a mixed batch of four, then two whose chunk has the size of the batch's.
PROMPT_LENGTHS = (9, 18, 30, 22, 26, 31)
NEW_TOKENS = (20, 9, 14, 24, 16, 24)


def prompts() -> list[list[int]]:
    """Six prompts for the fixture models, of `PROMPT_LENGTHS` tokens."""
    rows = fixture_texts()
    return [row["input_ids"][:size] for row, size in zip(rows, PROMPT_LENGTHS, strict=False)]


@functools.partial(jax.jit, static_argnames="count")
def _continue(target, tokens, lengths, count):
    def extend(index, tokens):
        logits = llama.full_logits(target, tokens)
        slot = lengths + index
        rows = jnp.arange(len(tokens))
        return tokens.at[rows, slot].set(jnp.argmax(logits[rows, slot - 1], -1).astype(jnp.int32))

    return jax.lax.fori_loop(0, count, extend, tokens)


def greedy(target, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Texts with `count` greedy tokens more, by whole passes over them: no cache, no loop of ours."""
    lengths = np.asarray([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), -(-(max(lengths) + count) // 16) * 16), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    rows = np.asarray(_continue(target, jnp.asarray(tokens), jnp.asarray(lengths), count))
    return [row[: size + count].tolist() for row, size in zip(rows, lengths, strict=True)]


@functools.cache
def greedy_texts(name: str = "tiny-fp16", dequantize: str = "auto") -> list[list[int]]:
    """The prompts with their greedy continuations, some tokens longer than any test asks for."""
    return greedy(fixture_model(name, dequantize), prompts(), max(NEW_TOKENS) + 6)


@contextlib.contextmanager
def hurried_compiler():
    """Code that runs slower and compiles faster, for tests of logic rather than of numbers or memory."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def engine(target, drafter, programs: Programs | None = None, **settings) -> Engine:
    """An engine with the acceptor that fits; `settings` are those of `sampling`, stop_ids and seed."""
    names = ("temperature", "top_k", "top_p")
    sampling = sample.sampling(**{k: settings.pop(k) for k in names if k in settings})
    acceptor = settings.pop("acceptor", None) or verify.acceptor("lossless", sampling.greedy)
    sampling = replace(sampling, with_q=acceptor.reads_q)
    return Engine(target, drafter, acceptor, sampling, programs=programs, **settings)


def requests(texts: Sequence[Sequence[int]], new_tokens: int | Sequence[int]) -> list[Request]:
    """Requests numbered in order; one limit for all, or one each."""
    limits = [new_tokens] * len(texts) if isinstance(new_tokens, int) else new_tokens
    return [
        Request(request_id=index, input_ids=text, max_new_tokens=limit)
        for index, (text, limit) in enumerate(zip(texts, limits, strict=True))
    ]


def run(
    runner: Engine, jobs: Sequence[Request], batch_size: int = 1, **options
) -> list[Completion]:
    """Completions in the order of the requests."""
    done = [e for e in runner.run(jobs, batch_size, **options) if isinstance(e, Completion)]
    order = [job.request_id for job in jobs]
    assert sorted(c.request.request_id for c in done) == sorted(order)
    return sorted(done, key=lambda c: order.index(c.request.request_id))


def outputs(completions: Sequence[Completion]) -> list[list[int]]:
    """Only the tokens."""
    return [completion.output_ids for completion in completions]


def histogram(completions: Sequence[Completion]) -> np.ndarray:
    """Steps by accepted drafts, summed over requests."""
    return np.sum([c.metrics.acceptance_histogram for c in completions], axis=0)


_full_logits = jax.jit(llama.full_logits)


def full_logits(target: llama.Llama, tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of one text; padded to whole blocks of 64, so that few lengths are compiled."""
    padded = -(-len(tokens) // 64) * 64
    row = np.zeros((1, padded), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(_full_logits(target, jnp.asarray(row)))[0, : len(tokens)]
