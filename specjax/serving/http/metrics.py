"""Prometheus metrics under vLLM's names, so that its dashboards work; what is our own begins with `specjax:`."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from specjax.serving.types import RunnerStats, Statistics

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_TIMES = {
    "vllm:time_to_first_token_seconds": "From arrival to the first token.",
    "vllm:inter_token_latency_seconds": "Between pieces of a stream.",
    "vllm:request_time_per_output_token_seconds": "After the first token, per token.",
    "vllm:e2e_request_latency_seconds": "From arrival to the last token.",
    "vllm:request_queue_time_seconds": "From arrival to a slot.",
    "vllm:request_prefill_time_seconds": "From a slot to the first token.",
    "vllm:request_decode_time_seconds": "From the first token to the last.",
}
_COUNTS = {
    "vllm:request_prompt_tokens": "Tokens of a prompt.",
    "vllm:request_generation_tokens": "Tokens of an answer.",
}


class Metrics:
    """Histograms of requests, and what the runner counts.

    Attributes:
        registry: of all of them.

    Args:
        model_name: the label of all.
        stats: asks the runner.
    """

    def __init__(self, model_name: str, stats: Callable[[], RunnerStats]):
        self.registry = CollectorRegistry()
        self._histograms = {}
        for names, buckets in ((_TIMES, _SECONDS), (_COUNTS, _TOKENS)):
            for name, text in names.items():
                histogram = Histogram(
                    name, text, ["model_name"], registry=self.registry, buckets=buckets
                )
                self._histograms[name] = histogram.labels(model_name)
        self.registry.register(_RunnerCollector(model_name, stats))

    def piece(self, seconds: float, first: bool) -> None:
        """A piece of a stream came so long after the one before it, or the first after the request."""
        name = "time_to_first_token_seconds" if first else "inter_token_latency_seconds"
        self._observe(name, seconds)

    def finished(self, statistics: Statistics, seconds: float) -> None:
        """A request has ended, so long after it came."""
        self._observe("e2e_request_latency_seconds", seconds)
        self._observe("request_prompt_tokens", statistics.prompt_tokens)
        self._observe("request_generation_tokens", statistics.new_tokens)
        parts = {
            "request_queue_time_seconds": statistics.queue_s,
            "request_prefill_time_seconds": statistics.prefill_s,
            "request_decode_time_seconds": statistics.decode_s,
        }
        if statistics.decode_s is not None and statistics.new_tokens > 1:
            per_token = statistics.decode_s / (statistics.new_tokens - 1)
            parts["request_time_per_output_token_seconds"] = per_token
        for name, value in parts.items():
            if value is not None:
                self._observe(name, value)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[f"vllm:{name}"].observe(value)


class _RunnerCollector:
    """Reads the runner when somebody asks."""

    def __init__(self, model_name: str, stats: Callable[[], RunnerStats]):
        self._label, self._stats = [model_name], stats

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, value, text in (
            ("vllm:num_requests_running", stats.running, "Requests in slots."),
            ("vllm:num_requests_waiting", stats.waiting, "Requests in the queue."),
            ("vllm:kv_cache_usage_perc", stats.kv_usage, "Share of positions in use, 1 is all."),
        ):
            yield self._filled(GaugeMetricFamily(name, text, labels=["model_name"]), value)
        accepted = [
            sum(stats.acceptance_histogram[position + 1 :])
            for position in range(max(len(stats.acceptance_histogram) - 1, 0))
        ]
        for name, value, text in (
            ("vllm:prompt_tokens", stats.prompt_tokens, "Prompt tokens."),
            ("vllm:generation_tokens", stats.generation_tokens, "Generated tokens."),
            ("vllm:prefix_cache_queries", stats.prompt_tokens, "Prompt tokens looked for."),
            ("vllm:prefix_cache_hits", stats.cached_tokens, "Prompt tokens not computed again."),
            ("vllm:spec_decode_num_drafts", stats.num_drafts, "Verification passes."),
            ("vllm:spec_decode_num_draft_tokens", stats.num_draft_tokens, "Drafted tokens."),
            ("vllm:spec_decode_num_accepted_tokens", sum(accepted), "Accepted drafts."),
            ("specjax:compilations", stats.num_compilations, "Programs compiled."),
            ("specjax:looks", stats.num_looks, "Pieces of decoding."),
            ("specjax:look_seconds", stats.look_s, "Seconds of these."),
            ("specjax:host_seconds", stats.host_s, "Seconds of these in which the host worked."),
        ):
            yield self._filled(CounterMetricFamily(name, text, labels=["model_name"]), value)
        by_place = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted drafts by place.",
            labels=["model_name", "position"],
        )
        for position, value in enumerate(accepted):
            by_place.add_metric([*self._label, str(position)], value)
        yield by_place
        ended = CounterMetricFamily(
            "vllm:request_success", "Requests that ended.", labels=["model_name", "finished_reason"]
        )
        for reason, value in stats.finished.items():
            ended.add_metric([*self._label, reason], value)
        yield ended

    def _filled(self, family, value):
        family.add_metric(self._label, value)
        return family
