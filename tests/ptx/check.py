"""`python -m tests.ptx.check`: kernels of all families, as PTX for each architecture, emulated and compared.

For a machine without a GPU, in the environment that `make aot` makes.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from specjax.aot import compile as aot


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="h200,a100", help="names of specjax.aot.topology")
    parser.add_argument("--output", type=Path, default=Path(".cache/ptx"), help="folder of logs")
    parser.add_argument("--only", default="", help="part of the names of cases")
    flags = parser.parse_args()
    targets, begin = flags.target.split(","), time.perf_counter()

    def run(target: str) -> list[dict]:
        given = {"only": flags.only}
        folder = flags.output / target
        return aot.in_process("tests.ptx.cases:run", target, folder, given, dump_kernels=True)

    with ThreadPoolExecutor(len(targets)) as pool:
        rows = [row for found in pool.map(run, targets) for row in found]
    bad = [row for row in rows if "error" in row]
    for row in rows:
        print(f"{row['target']}: {row['case']}: {row.get('error', 'equal')} ({row['seconds']} s)")
    launches = sum(len(row["launches"]) for row in rows)
    seconds = sum(launch["emulate"] for row in rows for launch in row["launches"])
    print(
        f"{len(rows)} cases, {launches} launches, each under 4 conditions: {len(bad)} wrong; "
        f"{seconds:.0f} s of emulation, {time.perf_counter() - begin:.0f} s in all"
    )
    return bool(bad) or not rows


if __name__ == "__main__":
    sys.exit(main())
