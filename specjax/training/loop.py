"""The training loop: AdamW with warm-up and cosine decay, Orbax checkpoints, resumable at any step."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from specjax.errors import ConfigError
from specjax.models.llama import Llama
from specjax.training import batches
from specjax.training.vocabulary import Vocabulary

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
        total_steps: steps in all, resumed ones included.
        learning_rate: peak of AdamW's.
        warmup_steps: linear warm-up before the cosine decay.
        weight_decay: AdamW's.
        clip_norm: bound of the gradient's global norm.
        feature_noise: width of the uniform noise on the input features (EAGLE's augmentation), times 512 / length.
        seed: of noise and order.
        save_every: steps between checkpoints.
        final_rate: what the learning rate decays to, relative to its peak.
    """

    total_steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    feature_noise: float
    seed: int
    save_every: int
    final_rate: float = 0.05


class Trainer:
    """A head in training.

    The state on disk is the parameters, the optimizer's moments and the step; order of batches and noise follow from
    seed and step, so a resumed run computes what an uninterrupted one would have.

    Here it is a draft head; `specjax.training.depth.training` trains something else by overriding `load` and
    `objective`.
    """

    def __init__(self, head, loss: Loss, weights: Any, settings: Settings, folder: Path):
        self._graph, parameters, self._rest = nnx.split(head, nnx.Param, ...)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0,
            settings.learning_rate,
            min(settings.warmup_steps, max(settings.total_steps - 1, 1)),
            settings.total_steps,
            settings.final_rate * settings.learning_rate,
        )
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(settings.clip_norm),
            optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=settings.weight_decay),
        )
        self._loss, self.weights, self.settings = loss, weights, settings
        self.state = (parameters, self._optimizer.init(parameters))
        self.step = 0
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )
        self._resume()

    def _resume(self) -> None:
        latest = self._manager.latest_step()
        if latest is None:
            return
        if latest > self.settings.total_steps:
            raise ConfigError(
                f"the checkpoint is at step {latest}, beyond total_steps={self.settings.total_steps}"
            )
        leaves, tree = jax.tree.flatten(self.state)
        restored = self._manager.restore(latest, args=ocp.args.StandardRestore(leaves))
        self.state, self.step = jax.tree.unflatten(tree, restored), latest

    def head(self):
        """The head with its present parameters."""
        return nnx.merge(self._graph, self.state[0], self._rest)

    def load(self, examples, store, width: int, rows) -> Any:
        """The batch of some examples."""
        return batches.load(examples, store, width, rows)

    def objective(self, head, target: Llama, vocab, batch, key: jax.Array, step: jax.Array):
        """Loss and measurements of a training step: the loss with noise, if there is any."""
        noise = self.settings.feature_noise * 512 / batch.tokens.shape[1]
        noisy = batch.inputs + noise * (jax.random.uniform(key, batch.inputs.shape) - 0.5)
        batch = dataclasses.replace(batch, inputs=noisy)
        return self._loss(head, target, vocab, batch, self.weights)

    def run(
        self,
        target: Llama,
        vocab: Vocabulary | None,
        examples,
        store,
        plan,
        report: Callable[[int, int, dict[str, Any]], None],
        on_save: Callable[[], None],
    ) -> None:
        """Trains up to `total_steps`.

        Args:
            report: called after each step with step, epoch and measurements.
            on_save: called after each checkpoint.
        """
        settings = self.settings
        order = batches.shuffled(plan, settings.seed, self.step)
        while self.step < settings.total_steps:
            epoch, (width, rows) = next(order)
            batch = self.load(examples, store, width, rows)
            key = jax.random.fold_in(jax.random.key(settings.seed), self.step)
            draw = key, jnp.int32(self.step)
            self.state, measured = self._update(self.state, self._rest, target, vocab, batch, *draw)
            self.step += 1
            report(self.step, epoch, measured)
            if self.step % settings.save_every == 0 or self.step == settings.total_steps:
                self.save()
                on_save()
        self._manager.wait_until_finished()

    def save(self) -> None:
        """Writes a checkpoint of this step; an unfinished one is never taken for a checkpoint."""
        leaves = jax.tree.leaves(self.state)
        self._manager.save(self.step, args=ocp.args.StandardSave(leaves))
        self._manager.wait_until_finished()

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _update(self, state, rest, target, vocab, batch, key, step):
        parameters, moments = state

        def loss(parameters):
            head = nnx.merge(self._graph, parameters, rest)
            return self.objective(head, target, vocab, batch, key, step)

        (value, measured), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes counters and floats
            updates, moments = self._optimizer.update(gradients, moments, parameters)
            parameters = optax.apply_updates(parameters, updates)
        return (parameters, moments), measured | {"loss": value}

    @functools.partial(jax.jit, static_argnums=0)
    def _measure(self, parameters, rest, target, vocab, batch):
        head = nnx.merge(self._graph, parameters, rest)
        return self._loss(head, target, vocab, batch, self.weights)[1]

    def evaluate(self, target: Llama, vocab: Vocabulary | None, examples, store, plan) -> dict:
        """Sums of the measurements over held-out examples."""
        total = None
        for width, rows in plan:
            batch = self.load(examples, store, width, rows)
            measured = self._measure(self.state[0], self._rest, target, vocab, batch)
            measured = jax.tree.map(np.asarray, measured)
            total = measured if total is None else jax.tree.map(np.add, total, measured)
        return total


def summary(measured: dict[str, Any]) -> dict[str, list[float]]:
    """Means per step (or Medusa head) of summed measurements."""
    counted = np.maximum(np.asarray(measured["counted"], np.float64), 1)
    known = np.maximum(np.asarray(measured["known"], np.float64), 1)
    return {
        "agreement": [round(float(x), 4) for x in np.asarray(measured["agreed"]) / counted],
        "cross_entropy": [
            round(float(x), 4) for x in np.asarray(measured["cross_entropy"]) / known
        ],
        "regression": [round(float(x), 5) for x in np.asarray(measured["regression"]) / counted],
    }
