"""The linear whose weight is stored as it is computed with."""

from flax import nnx
from jaxtyping import Array, Float

from specjax.pallas import matmul_dense


class Linear(nnx.Module):
    """y = x W^T + b with a dense weight [N, K] in the compute dtype; products accumulate in float32."""

    def __init__(self, weight: Float[Array, "N K"], bias: Float[Array, "N"] | None = None):
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        y = matmul_dense.matmul(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
