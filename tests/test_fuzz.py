"""Sixty of the fuzz's mutated checkpoints; `python -m tests.fuzz_checkpoints` tries more and prints a table."""

from tests import fuzz_checkpoints


def test_mutated_checkpoints_load_right_or_say_what_is_wrong(tmp_path):
    fuzz = fuzz_checkpoints.Fuzz(tmp_path)
    rows = [fuzz.run(seed) for seed in range(60)]
    assert len({row[0] for row in rows}) == len(fuzz.bases)
    assert len({row[2] for row in rows}) >= 3
    faults = [row for row in rows if row[2] in fuzz_checkpoints.FAULTS]
    assert not faults, "\n".join(" | ".join(row) for row in faults)
