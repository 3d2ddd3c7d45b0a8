"""`python -m tests.ptx.check`: kernels of all families, as PTX for each architecture, emulated and compared.

For a machine without a GPU, in the environment that `make aot` makes.
"""

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from specjax.aot import compile as aot
from tests.ptx import mutate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="h200,a100", help="names of specjax.aot.topology")
    parser.add_argument("--output", type=Path, default=Path(".cache/ptx"), help="folder of logs")
    parser.add_argument("--only", default="", help="part of the names of cases")
    parser.add_argument("--mutations", type=int, default=12, help="faults of each kind per kernel")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    flags = parser.parse_args()
    targets, begin = flags.target.split(","), time.perf_counter()

    def run(target: str) -> list[dict]:
        given = {"only": flags.only, "mutations": flags.mutations, "seed": flags.seed}
        folder = flags.output / target
        return aot.in_process("tests.ptx.cases:run", target, folder, given, dump_kernels=True)

    with ThreadPoolExecutor(len(targets)) as pool:
        rows = [row for found in pool.map(run, targets) for row in found]
    bad = [row for row in rows if "error" in row]
    for row in rows:
        print(f"{row['target']}: {row['case']}: {row.get('error', 'equal')} ({row['seconds']} s)")
    outcomes = sum((Counter(row.get("mutations", {})) for row in rows), Counter())
    for outcome, count in sorted(outcomes.items()):
        rule = mutate.RULES.get(outcome.partition(": ")[2])
        print(f"mutations: {count} x {outcome}" + (f" ({rule})" if rule else ""))
    matrix = sum(row.get("matrix", 0) for row in rows)
    print(f"{matrix} matrix instructions in PTX, and as many in machine code")
    launches = sum(len(row["launches"]) for row in rows)
    seconds = sum(launch["emulate"] for row in rows for launch in row["launches"])
    print(
        f"{len(rows)} cases, {launches} launches, each under 4 conditions: {len(bad)} wrong; "
        f"{seconds:.0f} s of emulation, {time.perf_counter() - begin:.0f} s in all"
    )
    return bool(bad) or not rows


if __name__ == "__main__":
    sys.exit(main())
