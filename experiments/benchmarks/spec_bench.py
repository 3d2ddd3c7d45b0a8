"""Spec-Bench: MT-bench and five one-turn tasks of 80 questions each, asked as MT-bench is."""

from experiments.benchmarks import mt_bench

SUBTASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
BENCHMARK = mt_bench.ChatBenchmark(name="spec_bench", one_subtask=mt_bench.CATEGORIES)
