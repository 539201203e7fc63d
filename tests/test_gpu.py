"""The script for a GPU's few minutes runs from end to end; only the card is missing."""
import json
import sys

import pytest
from conftest import REPO, run


@pytest.mark.skipif(sys.platform != "linux", reason="triton runs on Linux only")
def test_every_part_runs_dry_and_its_findings_make_a_table(tmp_path):
    run(REPO / "tests/gpu.py", "--out", tmp_path, "--dry", timeout=1200)
    found = tmp_path / "gpu.jsonl"
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert {row["part"] for row in rows} == {"correct", "speed", "tiles", "step", "compile", "stages", "data", "run", "answer"}
    assert all(row["ok"] and row["torch"] and row["triton"] for row in rows)
    cases = [row for row in rows if row["part"] == "correct" and "case" in row]
    assert len(cases) == 5 and {row["form"] for row in cases} == {"pointers", "descriptors"} and all(error < 1.5e-3 for row in cases for error in row["errors"].values())
    assert {(row["form"], row["kernel"]) for row in rows if "kernel" in row} == {
        ("pointers", "forward"), ("pointers", "dkdv"), ("descriptors", "forward"), ("descriptors", "dq"), ("descriptors", "dkdv")}
    assert {row["recompute"] for row in rows if row.get("side") == "ours"} == {"none", "cheap", "blocks"}
    same = [row for row in rows if "equal to the bit" in row.get("what", "")]
    assert [row["differing"] for row in same] == [0, 0]
    _, table, _ = run(REPO / "tests/gpu.py", "--table", found)
    assert "5 of 5 cases" in table and "| forward 32 |" in table and "composition of transformers" in table and "share waited" in table


def test_without_a_gpu_one_sentence_and_exit_code_2(tmp_path):
    code, _, err = run(REPO / "tests/gpu.py", "--out", tmp_path, check=False)
    assert code == 2 and err.strip() == "gpu.py: no GPU is visible here: --dry tries the script itself on a CPU"


def test_a_part_that_hangs_costs_its_own_time_only(tmp_path, monkeypatch):
    """Its limit is written down as a finding, and all that it had started is gone."""
    script = tmp_path / "limits.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(REPO / 'tests')!r})\nimport gpu\ngpu.SECONDS = dict.fromkeys(gpu.SECONDS, 0.5)\n"
                      f"from pathlib import Path\ngpu.run_part('step', Path({str(tmp_path)!r}))\n")
    run(script, "--dry")
    row = json.loads((tmp_path / "gpu.jsonl").read_text())
    assert not row["ok"] and row["wrong"] == "ended at its limit of 0.5 s" and row["seconds"] < 11


def test_what_no_time_is_left_for_is_said(tmp_path):
    code, _, _ = run(REPO / "tests/gpu.py", "--out", tmp_path, "--dry", "--seconds", 20, "--parts", "step,run", check=False)
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert code == 1 and [row["wrong"] for row in rows] == ["not begun: --seconds left no time for it"] * 2
