"""The benchmarks by name; each file says how one asks and how it is scored."""

from experiments.benchmarks import gsm8k, human_eval, mt_bench, qspec_gsm8k, spec_bench
from experiments.benchmarks.base import Benchmark, Question
from specjax.errors import ConfigError

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        mt_bench.BENCHMARK,
        spec_bench.BENCHMARK,
        gsm8k.BENCHMARK,
        human_eval.BENCHMARK,
        qspec_gsm8k.BENCHMARK,
    )
}


def lookup(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark={name!r}: supported are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


__all__ = ["BENCHMARKS", "Benchmark", "Question", "lookup"]
