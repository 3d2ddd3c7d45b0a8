"""Tables of what was compiled."""

import re
from collections.abc import Sequence
from typing import Any

_ROWS = re.compile(r"/(\d+) (?:rows|nodes)")


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def kernel_table(rows: Sequence[dict[str, Any]]) -> str:
    """Registers, spills, shared memory and instructions of kernels, as `kernels.run` returns them."""
    headers = ["target", "op", "case", "registers", "spills", "shared memory", "matrix"]
    headers += ["loop: all / ALU per weight", "problems"]
    lines = []
    for row in rows:
        lead = [row["target"], row["op"], row["case"]]
        if "error" in row:
            lines.append([*lead, *["-"] * 5, row["error"][:120].replace("|", "/")])
            continue
        share = row.get("per_weight")
        lines.append(
            [
                *lead,
                row["registers"],
                row["spill_bytes"],
                f"{row['shared_memory']} of {row['shared_memory_limit']}",
                ", ".join(f"{count} {name}" for name, count in row["matrix"].items()),
                f"{share['all']:.2f} / {share['alu']:.2f}" if share else "-",
                "; ".join(row["problems"]) or "none",
            ]
        )
    return table(headers, lines)


def kernel_summary(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each weight or cache: the most that any number of rows takes, and instructions per weight by rows."""
    counts = sorted({_num_rows(row) for row in rows})
    headers = ["target", "op", "case", "registers", "spills", "shared memory", "matrix", "problems"]
    headers += [f"per weight, M={count}" for count in counts]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["op"], _ROWS.sub("", row["case"])), []).append(row)
    lines = []
    for lead, alike in groups.items():
        done = [row for row in alike if "error" not in row]
        names = sorted({name for row in done for name in row["matrix"]})
        share = {_num_rows(row): row["per_weight"]["all"] for row in done if row.get("per_weight")}
        most = [
            max((row[key] for row in done), default="-")
            for key in ("registers", "spill_bytes", "shared_memory")
        ]
        problems = sum(bool(row.get("error") or row["problems"]) for row in alike)
        shares = [f"{share[count]:.2f}" if count in share else "-" for count in counts]
        lines.append([*lead, *most, ", ".join(names), problems, *shares])
    return table(headers, lines)


def _num_rows(row: dict[str, Any]) -> int:
    found = _ROWS.search(row["case"])
    return int(found[1]) if found else 0


def program_table(rows: Sequence[dict[str, Any]]) -> str:
    """Memory, launches and graphs of programs, as `programs.run` returns them: a column each."""
    facts = [
        ("target", lambda row: row["target"]),
        ("model, scheme", lambda row: f"{row['model_shape']}, {row['scheme']}"),
        ("layers", lambda row: row.get("num_layers", "all")),
        ("drafter", lambda row: ", ".join(f"{v}" for v in row["drafter"].values())),
        ("backend", lambda row: row["backend"]),
        ("arguments, GB", lambda row: f"{row['argument_bytes'] / 1e9:.2f}"),
        ("temporaries, MB", lambda row: f"{row['temp_bytes'] / 1e6:.1f}"),
        ("on the device, GB", lambda row: f"{row['device_bytes'] / 1e9:.2f}"),
        ("fits", lambda row: "yes" if row["fits"] else "no"),
        ("launches per layer", lambda row: f"{row['launches_per_layer']:.1f}"),
        ("launches per step", lambda row: row["launches_per_step"]),
        ("whole loop in one CUDA graph", lambda row: "yes" if row["loop_in_one_graph"] else "no"),
        ("launches outside graphs", lambda row: sum(row["not_captured"].values())),
        ("copy thunks in the loop", lambda row: row["copies_in_loop"]),
        ("moves of 1 MiB or more in the loop", lambda row: len(row["large_moves"])),
        ("bytes of a step, GB", lambda row: f"{row['step_bytes'] / 1e9:.3f}"),
        ("at data-sheet bandwidth, ms", lambda row: f"{row['bytes_ms']:.3f}"),
        ("launches at 1.5 us (assumed), ms", lambda row: f"{row['launch_ms']:.3f}"),
        ("executable, MB", lambda row: f"{row['executable_bytes'] / 1e6:.1f}"),
        ("compiling, s", lambda row: f"{row['seconds']:.0f}"),
        ("a layer launches", lambda row: _counts(row["layer"])),
    ]
    lines = [[name, *(fact(row) for row in rows)] for name, fact in facts]
    return table(lines[0], lines[1:])


def _counts(counts: dict[str, float]) -> str:
    return ", ".join(f"{count:g} {name}" for name, count in counts.items())
