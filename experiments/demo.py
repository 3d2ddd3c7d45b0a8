"""Shows what speculation buys: the same answers with every drafter, streamed, and a table of their speed.

    python -m experiments.demo

Runs the model that ships, greedily in float32, so that all drafters must give the same text; exits with 1 if they do
not.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

import specjax
from experiments.shared import common, flag_groups, flags_model, prompt_files

_PROMPTS = Path(__file__).parent / "presets" / "demo.jsonl"
# A tree for processors, which are compute-bound from a few nodes on.
_EAGLE = {
    "kind": "eagle",
    "draft_depth": 3,
    "topk": 4,
    "num_nodes": 8,
    "vocabulary_size": 8192,
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One prompt answered with one drafter."""

    prompt: str
    drafter: str
    result: specjax.GenerationResult


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    flags_model.define(values, model="smollm2-135m")
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_string("prompts_file", str(_PROMPTS), "JSON lines.", flag_values=values)
    with flag_groups.heading(values, "Sampling"):
        flags.DEFINE_integer(
            "max_new_tokens", 80, "Most new tokens per answer.", lower_bound=1, flag_values=values
        )


def main(values: flags.FlagValues) -> None:
    """Streams all answers, prints the table."""
    console = Console()
    if not console.is_terminal:
        console.width = 100
    prompts = prompt_files.read_prompts(values.prompts_file)
    console.print(f"loading {values.model}; each prompt size compiles once ...", highlight=False)
    if values.dtype is None:
        values.dtype = "float32"
    model = flags_model.load_model(values)
    encoded = prompt_files.encode(model, prompts, values.prompts_file)
    drafters = {"none": "none", "ngram": "ngram"}
    if model.default_head is not None:
        drafters["eagle"] = _EAGLE
    built = {name: model.drafter(spec) for name, spec in drafters.items()}
    answers = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        text = prompt["row"].get("prompt", "")
        console.rule(f"{prompt['id']}")
        console.print(text, style="dim", markup=False, highlight=False)
        for name, drafter in built.items():
            console.print(f"\n[bold]drafter: {name}[/bold]", highlight=False)
            result = _stream(model, ids, drafter, values.max_new_tokens)
            answers.append(Answer(prompt=str(prompt["id"]), drafter=name, result=result))
    console.print(table(answers))
    _check_equal(answers)


def _stream(model: specjax.LanguageModel, ids: list[int], drafter, max_new_tokens: int):
    """Prints the text as it comes; returns the result."""
    result = None
    for event in model.stream(ids, drafter, max_new_tokens=max_new_tokens):
        print(event.text, end="", flush=True)
        result = event.result
    print()
    return result


def table(answers: Sequence[Answer]) -> Table:
    """Speed and acceptance of every answer, beside plain decoding of the same prompt."""
    out = Table(title="greedy, no compilation or prefill in the speeds")
    out.add_column("prompt")
    out.add_column("drafter")
    for header in ("tokens/s", "speed-up", "acceptance length", "steps", "tokens", "same text"):
        out.add_column(header, justify="right")
    plain = {a.prompt: a.result for a in answers if a.drafter == "none"}
    for index, answer in enumerate(answers):
        base, metrics = plain[answer.prompt], answer.result.metrics
        rate, base_rate = metrics.tokens_per_s, base.metrics.tokens_per_s
        known = rate is not None and base_rate is not None
        last = index + 1 == len(answers) or answers[index + 1].prompt != answer.prompt
        out.add_row(
            answer.prompt,
            answer.drafter,
            f"{rate:.1f}" if known else "-",
            f"{rate / base_rate:.2f}" if known else "-",
            f"{metrics.mean_acceptance_length or 1:.2f}",
            str(metrics.num_spec_steps),
            str(metrics.new_tokens),
            "yes" if answer.result.output_ids == base.output_ids else "NO",
            end_section=last,
        )
    return out


def _check_equal(answers: Sequence[Answer]) -> None:
    """Exits with 1 where a drafter changed what the model says."""
    plain = {a.prompt: a.result.output_ids for a in answers if a.drafter == "none"}
    wrong = [a for a in answers if a.result.output_ids != plain[a.prompt]]
    if wrong:
        names = ", ".join(f"{a.drafter} on {a.prompt}" for a in wrong)
        print(f"error: the text differs from plain decoding: {names}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    common.run(define_flags, main)
