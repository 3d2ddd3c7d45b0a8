"""Flags under headings, and the help that shows them so.

A heading is kept where absl keeps the key flags of a module, in the `FlagValues` themselves, so that `--helpfull` and
`--helpxml` are what they are without headings.
"""

import contextlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType

from absl import flags

HEADINGS = (
    *("Preset", "Model", "Input", "Drafter", "Sampling", "Quantization", "Training", "Measuring"),
    *("Output", "Depth", "Serving", "Safety", "Execution"),
)
"""In the order of help: what most command lines name comes first."""

WIDTH, _INDENT = 100, 28
_OTHER = "Other"
_KINDS = {"int": "INTEGER", "float": "NUMBER", "comma separated list of strings": "A,B,..."}


@contextlib.contextmanager
def heading(values: flags.FlagValues, name: str) -> Iterator[None]:
    """Flags that the block defines are listed under a heading, in the order of their definition.

    Args:
        name: one of `HEADINGS`. An inner block's flags stay under the inner heading.
    """
    if name not in HEADINGS:
        raise ValueError(f"heading {name!r}: expected one of {', '.join(HEADINGS)}")
    before = set(values)
    yield
    headed = {flag.name for found in grouped(values).values() for flag in found}
    for flag_name in values:
        if flag_name not in before and flag_name not in headed:
            values.register_key_flag_for_module(name, values[flag_name])


def grouped(values: flags.FlagValues) -> dict[str, list[flags.Flag]]:
    """Flags by heading, in the order of `HEADINGS`; headings without flags are left out."""
    kept = values.key_flags_by_module_dict()
    return {name: kept[name] for name in HEADINGS if kept.get(name)}


def help_text(values: flags.FlagValues, own: set[str], binary: ModuleType) -> str:
    """What `--help` prints: summary, one example, flags by heading, the rest of the docstring.

    Args:
        own: names of the binary's flags; those without a heading come last, absl's own are left to --helpfull.
        binary: the module whose docstring says the rest: a summary, and blocks of commands indented by four.
    """
    summary, *details = inspect.cleandoc(binary.__doc__).split("\n\n")
    blocks = [part for part in details if part.startswith("    ")]
    commands = [command for block in blocks for command in _commands(block)]
    mine = [command for command in commands if f" -m {binary.__spec__.name} " in f"{command} "]
    groups = grouped(values)
    headed = {flag.name for found in groups.values() for flag in found}
    others = [values[name] for name in values if name in own - headed]
    groups |= {_OTHER: others} if others else {}
    parts = [_filled(summary), mine[:1]]
    for name, found in groups.items():
        parts.append([f"{name}:", *(line for flag in found for line in _described(flag))])
    for part in details:
        parts.append(_commands(part) if part in blocks else _filled(part))
    parts.append(["--helpfull lists the flags of absl, too."])
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _described(flag: flags.Flag) -> list[str]:
    """The lines of one flag."""
    name = f"  {_signature(flag)}"
    text = textwrap.wrap(
        " ".join(filter(None, (_own_words(flag), _default(flag)))),
        WIDTH,
        initial_indent=" " * _INDENT,
        subsequent_indent=" " * _INDENT,
        break_on_hyphens=False,
    )
    if len(name) < _INDENT and text:
        return [name + text[0][len(name) :], *text[1:]]
    return [name, *text]


def _own_words(flag: flags.Flag) -> str:
    """The help of a flag without what absl adds to it, which the signature says."""
    if isinstance(flag, flags.MultiFlag):
        return flag.help.split(";\n")[0]
    return re.sub(r"^<[^>]*>: ", "", flag.help) if _choices(flag) else flag.help


def _choices(flag: flags.Flag) -> list[str]:
    return getattr(flag.parser, "enum_values", [])


def _signature(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"--[no]{flag.name}"
    if _choices(flag):
        joined = f"--{flag.name}={'|'.join(_choices(flag))}"
        return joined if len(joined) < WIDTH - 2 else f"--{flag.name}=NAME"
    return f"--{flag.name}={_KINDS.get(flag.parser.flag_type(), 'TEXT')}"


def _default(flag: flags.Flag) -> str:
    """The default in brackets; nothing where unset is the default."""
    if any("must have a value" in validator.message for validator in flag.validators):
        return "(required)"
    if flag.default is None or flag.default in ("", []):
        return ""
    if flag.boolean:
        return f"(default: {'on' if flag.default else 'off'})"
    if isinstance(flag.default, list):
        return f"(default: {','.join(map(str, flag.default))})"
    return f"(default: {flag.default})"


def _filled(paragraph: str) -> list[str]:
    """A paragraph at the width of help; one with indented lines (a list) as it stands."""
    lines = paragraph.split("\n")
    if any(line.startswith(" ") for line in lines):
        return [
            cut for line in lines for cut in textwrap.wrap(line, WIDTH, subsequent_indent="    ")
        ]
    return textwrap.wrap(paragraph, WIDTH, break_on_hyphens=False)


def _commands(block: str) -> list[str]:
    """The commands of an indented block, one string each, wrapped before flags where they are long."""
    joined = re.sub(r"\s*\\\n\s*", " ", block)
    return ["\n".join(_wrapped(line.strip())) for line in joined.split("\n") if line.strip()]


def _wrapped(command: str) -> list[str]:
    lines = ["   "]
    for word in re.split(r" (?=--)", command):
        if len(lines[-1]) + len(word) + 3 > WIDTH and lines[-1].strip():
            lines[-1] += " \\"
            lines.append(" " * 7)
        lines[-1] += f" {word}"
    return lines
