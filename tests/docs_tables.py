"""The tables of README.md and docs/ that follow from registries.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `python -m tests.docs_tables` says which are out of
date, with --write it renews them.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from experiments.shared import flags_drafter
from specjax import verify
from specjax.checkpoints import export, formats, gguf, hf
from specjax.config import ARCHITECTURES
from specjax.depth import selection
from specjax.drafters import head, registry
from specjax.errors import ConfigError
from specjax.pallas import dispatch
from specjax.quant.scheme import SCHEMES, Scheme
from specjax.serving.http import protocol
from tests import paths

_MARKED = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", re.S)


def pages(root: Path = paths.REPOSITORY) -> list[Path]:
    """The texts that may hold tables and commands: README.md first, then docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def renewed(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        KeyError: a marker names no table.
    """
    return _MARKED.sub(
        lambda found: f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", text
    )


def axes() -> str:
    """What varies, and the names of its values."""
    rows = {
        "scheme": ("dense", *SCHEMES),
        "drafter": registry.kinds(),
        "acceptance": verify.ACCEPTANCES,
        "depth": ("full", "routed"),
        "selection over trees": selection.MODES,
        "backend": dispatch.BACKENDS,
    }
    return _table(
        ("axis", "values"), [(k, ", ".join(f"`{v}`" for v in values)) for k, values in rows.items()]
    )


def architectures() -> str:
    """Classes of config.json, and what each declaration notes."""
    rows = [
        (", ".join(f"`{name}`" for name in (found.name, *found.also)), found.note or "-")
        for found in ARCHITECTURES.values()
    ]
    return _table(("`architectures` (or `model_type`) of config.json", "note"), rows)


def served_fields() -> str:
    """Every field of a request that the server knows: honoured with its range, ignored, or refused by name."""
    chat, completion = (m.model_fields for m in (protocol.Chat, protocol.Completion))
    rows = []
    for name in dict.fromkeys([*chat, *completion]):
        where = [k for k, v in (("chat", chat), ("completions", completion)) if name in v]
        found = chat.get(name) or completion[name]
        schema = (protocol.Chat if name in chat else protocol.Completion).model_json_schema()
        range_ = _range(schema["properties"][name])
        default = "needed" if found.is_required() else found.default
        default = "-" if default is None else default if found.is_required() else f"`{default}`"
        rows.append((f"`{name}`", ", ".join(where), f"honoured{range_}", default))
    both = "chat, completions"
    rows += [(f"`{name}`", both, "ignored", "-") for name in protocol.IGNORED]
    for name, neutral in protocol.NEUTRAL.items():
        values = [f"`{json.dumps(value)}`" for value in neutral if value is not None]
        but = f", {', '.join(values)} apart" if values else ""
        rows.append((f"`{name}`", both, f"refused{but}", "-"))
    return _table(("field", "endpoint", "what happens", "default"), rows)


def _range(schema: dict) -> str:
    """The bounds of a field, as the schema of its body states them."""
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    parts = [schema, *schema.get("anyOf", ())]
    found = [
        f"{sign} {part[key]:g}" for part in parts for key, sign in signs.items() if key in part
    ]
    found += [" or ".join(f"`{v}`" for v in part["enum"]) for part in parts if "enum" in part]
    return f": {', '.join(found)}" if found else ""


def checkpoint_formats() -> str:
    """What is read, and which of it `convert` writes."""
    rows = [
        ("`dense`", _summary(hf), "yes" if export.DENSE in export.FORMATS else "no"),
        ("`gguf`", _summary(gguf), "yes" if "gguf" in export.FORMATS else "no"),
    ]
    for found in formats.FORMATS:
        text = _summary(inspect.getmodule(found))
        rows.append((f"`{found.name}`", text, "yes" if found.name in export.FORMATS else "no"))
    return _table(("format", "what is read", "written"), rows)


def schemes() -> str:
    """Names of schemes: how weights are coded, how inputs are rounded."""
    rows = [(f"`{name}`", _weights(found), _inputs(found)) for name, found in SCHEMES.items()]
    return _table(("scheme", "weights", "inputs of matmuls"), rows)


def drafters() -> str:
    """Kinds with their options."""
    rows = []
    for kind in registry.kinds():
        told = [f"`{name}`" + _shown(default) for name, default in registry.options(kind).items()]
        rows.append((f"`{kind}`", ", ".join(told) or "-"))
    return _table(("kind", "options and their defaults"), rows)


def heads() -> str:
    """Kinds of draft heads, in the order in which a folder is compared with them."""
    rows = [(f"`{kind}`", _summary(head.module_of(kind))) for kind in head.KINDS]
    return _table(("kind", "what it is"), rows)


def _shown(default: object) -> str:
    """An option's default behind its name; nothing where unset is the default."""
    if default is inspect.Parameter.empty:
        return " (required)"
    return "" if default is None else f" {default}"


def drafter_flags() -> str:
    """The flags that set options of drafters."""
    values = flags.FlagValues()
    flags_drafter.define(values)
    rows = [
        (f"`--{flag}`", f"`{option}`", values[flag].help)
        for flag, option in flags_drafter.OPTION_FLAGS.items()
    ]
    return _table(("flag", "option", "meaning"), rows)


def acceptances() -> str:
    """Rules by name, and whether they keep the target's output."""
    rows = []
    for name in verify.ACCEPTANCES:
        rules = [rule for greedy in (True, False) for rule in _rule(name, greedy)]
        kept = "yes" if all(rule.lossless for rule in rules) else "no, and labelled so"
        temperatures = [t for greedy, t in ((True, "0"), (False, "above 0")) if _rule(name, greedy)]
        text = " or ".join(dict.fromkeys(f"`{type(rule).__name__}`" for rule in rules))
        rows.append((f"`{name}`", text, " and ".join(temperatures), kept))
    return _table(("acceptance", "rule", "temperature", "keeps the target's output"), rows)


def _rule(name: str, greedy: bool) -> list[verify.Acceptor]:
    """The rule of a name at a temperature; empty where it has no meaning there."""
    try:
        return [verify.acceptor(name, greedy)]
    except ConfigError:
        return []


def _summary(module) -> str:
    """The first sentence of a module's docstring."""
    first = " ".join(inspect.cleandoc(module.__doc__).split("\n\n")[0].split())
    return re.sub(r"\. [A-Z].*", "", first).rstrip("., ")


def _weights(scheme: Scheme) -> str:
    spec = scheme.weights
    if spec.kind == "float":
        return {8: "e4m3", 4: "e2m1"}[spec.bits]
    kind = f"{'' if spec.symmetric else 'u'}int{spec.bits}"
    return (
        kind + {"single": "", "qqq": ", two levels (QQQ)", "qoq": ", two levels (QoQ)"}[spec.levels]
    )


def _inputs(scheme: Scheme) -> str:
    spec = scheme.activations
    if spec is None:
        return "as computed"
    return {("int", 8): "int8", ("int", 4): "int4", ("float", 8): "e4m3", ("float", 4): "e2m1"}[
        spec.kind, spec.bits
    ] + " per token"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(' '.join(str(c).split()) for c in row)} |" for row in lines)


TABLES: dict[str, Callable[[], str]] = {
    "axes": axes,
    "architectures": architectures,
    "checkpoint_formats": checkpoint_formats,
    "schemes": schemes,
    "served_fields": served_fields,
    "drafters": drafters,
    "heads": heads,
    "drafter_flags": drafter_flags,
    "acceptances": acceptances,
}


def main(arguments: Sequence[str]) -> int:
    """Prints what is out of date, or writes it; 1 where something is and was not asked to be written."""
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = renewed(text)
        if new != text:
            stale.append(page.relative_to(paths.REPOSITORY).as_posix())
            if "--write" in arguments:
                page.write_text(new, encoding="utf-8")
    done = "renewed" if "--write" in arguments else "out of date (--write renews them)"
    print(f"{done}: {', '.join(stale)}" if stale else "all tables are up to date")
    return int(bool(stale) and "--write" not in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
