"""The doctor's binary: its table, what it keeps, and what the other binaries make of it."""

import json

import jax
import pytest

from experiments import doctor as binary
from experiments.shared import common, flags_doctor, flags_model
from specjax import doctor
from specjax.doctor import examination, verdicts
from specjax.errors import ConfigError
from specjax.pallas import device, dispatch, tuned
from specjax.pallas.matmul import tiles

GPU = tiles.typical((9, 0))


@pytest.fixture
def judged(monkeypatch) -> doctor.Verdicts:
    """What a check finds, without processes."""
    known = {
        "glue": dict(state="passes", cases=6, graphs={"loop": "hangs"}),
        "tree_attention": dict(state="fails", reason="dies"),
    }
    families = tuple(
        doctor.Verdict(
            op=f.op, backend=f.backend, **known.get(f.op, dict(state="unavailable", reason="no"))
        )
        for f in doctor.FAMILIES
    )
    found = doctor.Verdicts(identity=verdicts.identity(), families=families)

    def made(families, limits=None, on_verdict=print):
        for verdict in found.families:
            on_verdict(verdict)
        return found

    monkeypatch.setattr(doctor, "check", made)
    monkeypatch.setattr(examination, "check", made)
    return found


def test_table_rows_and_status(judged, tmp_path, capsys):
    output, folder = tmp_path / "rows.jsonl", tmp_path / "verdicts"
    arguments = [f"--output={output}", f"--doctor_dir={folder}"]
    with pytest.raises(SystemExit) as ended:
        binary.main(common.parse(binary.define_flags, arguments))
    assert ended.value.code == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "tree_attention" in printed and "graphs (loop): hangs" in printed
    assert "CUDA graphs may hold: body" in printed
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == len(doctor.FAMILIES) + 1 and rows[1]["state"] == "fails"
    assert verdicts.read(folder, judged.identity).policy() == judged.policy()
    with pytest.raises(ConfigError, match="'matmul' is unknown; known: glue, matmul_w4a16"):
        binary.main(common.parse(binary.define_flags, ["--families=matmul", *arguments]))


def test_binaries_leave_out_what_fails_and_take_measured_tiles(
    judged, monkeypatch, tmp_path, caplog
):
    """Only on a GPU, not for --backend=xla, and not under --nodoctor; a flag of graphs that is given stays."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def choice(*arguments):
        given = ["--model=M", f"--doctor_dir={tmp_path}", *arguments]
        return flags_doctor.choice(common.parse(flags_model.define, given))

    with device.targeting(GPU):
        assert choice("--backend=xla") == ("xla", "loop") and choice("--nodoctor") == (
            "auto",
            "loop",
        )
        verdicts.write(tmp_path, judged)
        table = json.dumps(
            {"1x1g0": {"splits": 1, "rows": {"8": {"tiles_per_step": 1, "num_stages": 2}}}}
        )
        place = tmp_path / "tuned" / tuned.folder_name(GPU.kind) / "matmul_w4a16.json"
        place.parent.mkdir(parents=True)
        place.write_text(table)
        backend, buffers = choice()
        (entry,) = backend.quarantine
        assert entry == dispatch.Quarantined(op="tree_attention", backend="mosaic", reason="dies")
        assert backend.table("matmul_w4a16") == table and buffers == "body"
        assert "--command_buffers=body is implied" in caplog.text
        assert choice("--command_buffers=loop", "--backend=mosaic")[1] == "loop"
        assert choice("--backend=mosaic")[0].backend == "mosaic"
    assert choice()[0] == "auto"  # a GPU of which this package knows nothing
