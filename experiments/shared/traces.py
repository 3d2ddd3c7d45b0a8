"""What every step drafted, accepted and added, as coloured lines."""

from typing import Any

from rich.console import Console
from rich.text import Text

import specjax
from specjax.engine.trace import Step


def print_trace(
    model: specjax.LanguageModel, drafter, prompt: list[int], options: dict[str, Any]
) -> None:
    """One line per step of a prompt's answer; then the counts."""
    [result] = model.generate([prompt], drafter, **options | {"batch_size": 1, "trace": True})
    console = Console(highlight=False, soft_wrap=True)
    for number, step in enumerate(result.metrics.trace):
        console.print(describe_step(number, step))
    counts = count_steps(result)
    console.print(", ".join(f"{name} {value}" for name, value in counts.items()))


def describe_step(number: int, step: Step) -> Text:
    """A step as a line: accepted drafts green, rejected ones struck out, the target's token red or blue."""
    drafted = step.drafted_text or tuple(map(str, step.drafted))
    accepted = accepted_drafts(step)
    line = Text(f"{number:4d} ")
    for index, piece in enumerate(drafted):
        line.append(repr(piece)[1:-1] + " ", style="green" if index in accepted else "strike dim")
    token = step.token_text if step.token_text is not None else str(step.token)
    style = "blue" if step.kind == "bonus" else "red"
    return line.append(f"[{step.kind}: {repr(token)[1:-1]}]", style=style)


def accepted_drafts(step: Step) -> list[int]:
    """Which of the drafted tokens were accepted, from the root down (siblings are distinct tokens)."""
    found, parent = [], -1
    for token in step.accepted:
        children = (i for i, above in enumerate(step.parents) if above == parent)
        parent = next(i for i in children if step.drafted[i] == token)
        found.append(parent)
    return found


def count_steps(result: specjax.GenerationResult) -> dict[str, int]:
    """Drafted, accepted, resampled and bonus tokens of a traced generation."""
    trace = result.metrics.trace
    return {
        "steps": len(trace),
        "drafted": sum(len(step.drafted) for step in trace),
        "accepted": sum(len(step.accepted) for step in trace),
        "resampled": sum(step.kind == "resampled" for step in trace),
        "bonus": sum(step.kind == "bonus" for step in trace),
    }
