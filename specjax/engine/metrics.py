"""Acceptance and speed of generations, under the names that vLLM gave them."""

from dataclasses import dataclass

import numpy as np

from specjax.engine.trace import Step


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Measurements of one request.

    Attributes:
        num_spec_steps: verification passes after prefill.
        num_draft_tokens: drafted tokens sent to verification, roots excluded.
        num_accepted_draft_tokens: those that were accepted, bonus tokens excluded.
        acceptance_histogram: steps by number of accepted drafts, index 0 .. deepest draft.
        prefill_ms: time of the prompt's passes (target and drafter), of the whole group that was prefilled together.
        decode_ms: time of the steps that this request took part in, of the whole batch; no prefill, no compilation.
        compile_ms: time spent compiling for the call that served this request.
        batch_size: sequences that shared the steps.
        new_tokens: tokens returned, a stop token included.
        lossless: whether the acceptance rule, and where depth is routed the tree selection, keep the target's output.
        layer_runs: by layer, in how many of the steps it ran; None where all layers run always.
        inner_acceptance_histogram: rounds of a hierarchical drafter's own loop by number of accepted drafts; else None.
        quarantine: families of kernels that were refused, and why (see `specjax.doctor`).
        trace: every step (see `specjax.engine.trace.Step`), where a record was asked for.
    """

    num_spec_steps: int
    num_draft_tokens: int
    acceptance_histogram: tuple[int, ...]
    prefill_ms: float
    decode_ms: float
    compile_ms: float
    batch_size: int
    new_tokens: int
    lossless: bool = True
    layer_runs: tuple[int, ...] | None = None
    inner_acceptance_histogram: tuple[int, ...] | None = None
    quarantine: tuple[str, ...] = ()
    trace: tuple[Step, ...] | None = None

    @property
    def num_accepted_draft_tokens(self) -> int:
        return int(np.dot(self.acceptance_histogram, np.arange(len(self.acceptance_histogram))))

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens per step, the bonus token included; None without steps. Measured before cutting at a stop token."""
        if not self.num_spec_steps:
            return None
        return 1 + self.num_accepted_draft_tokens / self.num_spec_steps

    @property
    def draft_acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens; None where nothing was drafted."""
        if not self.num_draft_tokens:
            return None
        return self.num_accepted_draft_tokens / self.num_draft_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """This request's tokens after the first (which prefill yields) over its decode time."""
        if self.decode_ms <= 0 or self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / self.decode_ms * 1e3

    @property
    def executed_fraction(self) -> float | None:
        """Share of the layers that ran in a step; None where all run always, and without steps."""
        if self.layer_runs is None or not self.num_spec_steps:
            return None
        return sum(self.layer_runs) / (len(self.layer_runs) * self.num_spec_steps)

    def to_dict(self) -> dict:
        """JSON-ready fields, the derived ones included."""
        fields = {
            "new_tokens": self.new_tokens,
            "num_spec_steps": self.num_spec_steps,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_draft_tokens": self.num_accepted_draft_tokens,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_histogram": list(self.acceptance_histogram),
            "draft_acceptance_rate": self.draft_acceptance_rate,
            "prefill_ms": self.prefill_ms,
            "decode_ms": self.decode_ms,
            "compile_ms": self.compile_ms,
            "tokens_per_s": self.tokens_per_s,
            "batch_size": self.batch_size,
            "lossless": self.lossless,
        }
        if self.layer_runs is not None:
            fields["layer_runs"] = list(self.layer_runs)
            fields["executed_fraction"] = self.executed_fraction
        if self.inner_acceptance_histogram is not None:
            fields["inner_acceptance_histogram"] = list(self.inner_acceptance_histogram)
        if self.quarantine:
            fields["quarantine"] = list(self.quarantine)
        if self.trace is not None:
            fields["trace"] = [step.to_dict() for step in self.trace]
        return fields
