"""QuaRot-style rotations: what they consist of, their files, and the part that runs online.

Ashkboos et al., arXiv 2404.00456; `specjax.quantize.rotate` applies them to a model. For 4-bit
activations the inputs of o_proj and down_proj are mixed across heads and features, which takes a
small product at run time: `RotatedInput`.
"""

import dataclasses
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from specjax import errors
from specjax.config import ModelConfig
from specjax.files import safetensors_file
from specjax.quant import hadamard
from specjax.quant.linear import QuantizedLinear

_log = logging.getLogger(__name__)

FILE_NAME = "rotation.safetensors"
# Other tools' names for a bare Q beside the model: QQQ as patched by SpecMQuant, and
# DeepCompressor.
FOREIGN_NAMES = ("rotation.pth", "rotation.pt")
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """Orthonormal factors of a rotation; all float64.

    Attributes:
        residual: Q of the residual stream.
        head: rotation of each value head, or None (values not rotated).
        heads: mixes query heads in front of o_proj at run time, or None (offline only).
        ffn: (left, right), whose Kronecker product mixes down_proj's inputs at run time, or None
            (offline only).
        norm_gain: the final norm's gain before it was folded, or None where it is not known.
    """

    residual: Float[np.ndarray, "D D"]
    head: Float[np.ndarray, "C C"] | None = None
    heads: Float[np.ndarray, "H H"] | None = None
    ffn: tuple[Float[np.ndarray, "a a"], Float[np.ndarray, "b b"]] | None = None
    norm_gain: Float[np.ndarray, "D"] | None = None

    @property
    def id(self) -> str:
        """Digest of Q: what a draft head must agree on with its target."""
        values = np.ascontiguousarray(self.residual, np.dtype("<f8"))
        return hashlib.sha256(values.tobytes()).hexdigest()[:16]

    @property
    def online(self) -> bool:
        """Whether the rotated model needs products at run time."""
        return self.heads is not None or self.ffn is not None


def random_hadamard(config: ModelConfig, seed: int, online: bool = False) -> Rotation:
    """A random-sign Hadamard rotation for models of this shape.

    Where no Hadamard matrix of an order is known (9 heads), its odd part is a random orthogonal
    matrix.

    Args:
        config: shapes.
        seed: of signs and of random orthogonal parts.
        online: also mix the inputs of o_proj and down_proj at run time, for 4-bit activations.
    """
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1.0, 1.0], config.hidden_size)
    residual = signs[:, None] * np.kron(*_factors("hidden_size", config.hidden_size, generator))
    head = np.kron(*_factors("head_dim", config.head_dim, generator))
    if not online:
        return Rotation(residual=residual, head=head)
    return Rotation(
        residual=residual,
        head=head,
        heads=np.kron(*_factors("num_heads", config.num_heads, generator)),
        ffn=_factors("intermediate_size", config.intermediate_size, generator),
    )


def _factors(field: str, order: int, generator: np.random.Generator):
    if hadamard.factors(order) is None:
        odd = order // (order & -order)
        _log.info("%s=%d: no Hadamard matrix known, random orthogonal factor %d", field, order, odd)
    return hadamard.orthogonal_factors(order, generator)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RotatedInput:
    """A linear whose weight expects its input multiplied by left x right (Kronecker), done at run
    time.

    Attributes:
        linear: the linear over rotated inputs, quantized or dense.
        left: over blocks of features (heads), or None for the identity.
        right: within blocks, or None for the identity.
    """

    linear: Any
    left: Float[Array, "a a"] | None = None
    right: Float[Array, "b b"] | None = None

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    def rotate(self, x: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """The input in the basis of the weight; float32 products, in the dtype of x."""
        width = x.shape[-1] // len(self.left) if self.right is None else len(self.right)
        y = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, width)
        if self.left is not None:
            left = self.left.astype(jnp.float32)
            y = jnp.einsum("...ab,ai->...ib", y, left, precision=_HIGHEST)
        if self.right is not None:
            right = self.right.astype(jnp.float32)
            y = jnp.einsum("...b,bj->...j", y, right, precision=_HIGHEST)
        return y.reshape(x.shape).astype(x.dtype)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        return self.linear(self.rotate(x))

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "N K"]:
        """The dense weight over inputs that are not rotated."""
        if isinstance(self.linear, QuantizedLinear):
            weight = self.linear.dequantize(jnp.float32)
        else:
            weight = self.linear.weight[...].astype(jnp.float32)
        # W_rotated = W M, so W = W_rotated M^T: the same product with transposed factors.
        inverse = dataclasses.replace(
            self,
            left=None if self.left is None else self.left.T,
            right=None if self.right is None else self.right.T,
        )
        return inverse.rotate(weight).astype(dtype)

    def with_linear(self, linear: Any) -> "RotatedInput":
        """The same rotation in front of another linear."""
        return dataclasses.replace(self, linear=linear)


nnx.register_data_type(RotatedInput)


def save(rotation: Rotation, folder: Path) -> Path:
    """Writes `rotation.safetensors` into a folder; the file appears complete or not at all."""
    from safetensors import numpy as safetensors

    tensors = {"Q": rotation.residual}
    for name in ("head", "heads", "norm_gain"):
        if getattr(rotation, name) is not None:
            tensors[name] = getattr(rotation, name)
    if rotation.ffn is not None:
        tensors["ffn_left"], tensors["ffn_right"] = rotation.ffn
    tensors = {name: np.ascontiguousarray(a, np.float64) for name, a in tensors.items()}
    path = folder / FILE_NAME
    temporary = folder / f".{FILE_NAME}.tmp"
    with temporary.open("wb") as stream:
        stream.write(safetensors.save(tensors, metadata={"format": "pt", "id": rotation.id}))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    return path


def find(path: Path) -> Path | None:
    """The rotation file of a model folder, or None."""
    names = (FILE_NAME, *FOREIGN_NAMES)
    return next((path / name for name in names if (path / name).is_file()), None)


def load(path: Path) -> Rotation:
    """Reads a rotation: a file of `save`, or a bare Q in a .pth / .pt file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file holds no square orthogonal Q.
    """
    from specjax.files import pickle

    if not path.is_file():
        raise FileNotFoundError(f"rotation={path}: no such file")
    file = (
        safetensors_file.SafetensorsFile(path)
        if path.suffix == ".safetensors"
        else pickle.TorchFile(path)
    )
    names = file.names()
    key = "Q" if "Q" in names else names[0] if len(names) == 1 else None
    if key is None:
        raise errors.CheckpointError(
            f"{path} has no tensor Q; found {', '.join(names) or 'nothing'}"
        )
    values = {name: np.asarray(file.read(name), np.float64) for name in names}
    q = values[key]
    square = q.ndim == 2 and q.shape[0] == q.shape[1]
    if not square or not np.allclose(q @ q.T, np.eye(len(q)), atol=1e-3):
        raise errors.CheckpointError(f"{key} {list(q.shape)} in {path} is not an orthogonal matrix")
    both = "ffn_left" in values and "ffn_right" in values
    return Rotation(
        residual=q,
        head=values.get("head"),
        heads=values.get("heads"),
        ffn=(values["ffn_left"], values["ffn_right"]) if both else None,
        norm_gain=values.get("norm_gain"),
    )
