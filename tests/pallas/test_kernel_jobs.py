"""What `experiments.bench_kernel` would time, traced: every op's kernel and reference take the same arguments."""

import jax
import pytest

from experiments import bench_kernel
from experiments.shared import common
from specjax.errors import ConfigError
from specjax.pallas import device
from specjax.pallas.matmul import tiles


@pytest.mark.parametrize("op", bench_kernel.OPS)
def test_kernel_and_reference_agree_on_shapes(op):
    arguments = [f"--ops={op}", "--shapes=smollm2-135m", "--m=3", "--contexts=61"]
    values = common.parse(bench_kernel.define_flags, arguments)
    gpu = tiles.typical((9, 0))
    with device.targeting(gpu):
        job = next(iter(bench_kernel.jobs(values, gpu)))
        kernel, reference = (
            jax.eval_shape(run, job.x, *job.weights) for run in (job.kernel, job.reference)
        )
    assert (kernel.shape, kernel.dtype) == (reference.shape, reference.dtype)


def test_unknown_ops_are_refused():
    values = common.parse(bench_kernel.define_flags, ["--ops=matmul"])
    with pytest.raises(ConfigError, match="op='matmul' is unknown"):
        list(bench_kernel.jobs(values, tiles.typical((9, 0))))
