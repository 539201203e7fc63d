"""The study's arithmetic: intervals that mean something, cells that hold only for the code that made them."""
import json
import sys

import numpy as np
import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "tests/study"))
import report
import run as study


def test_bootstrap_sees_a_difference_and_no_difference():
    rng = np.random.default_rng(1)
    base = [rng.random(1000) < 0.4 for _ in range(4)]
    same = [b.astype(int) for b in base]
    assert report.paired_bootstrap(same, same) == (0, 0, 0)
    better = [np.where(rng.random(1000) < 0.2, 1, b) for b in same]
    mean, low, high = report.paired_bootstrap(better, same)
    assert low < mean < high and mean == pytest.approx(np.mean([a.mean() - b.mean() for a, b in zip(better, same)]))
    assert 0.08 < low and high < 0.16                           # 0.2 * 0.6 = 0.12
    one_seed = [same[0], np.ones(1000, int)]                    # all of the difference in one of two seeds
    _, low, high = report.paired_bootstrap(one_seed, [same[0], np.zeros(1000, int)])
    assert low < 0.05 and high > 0.95, "seeds are drawn too, not only clips"


def test_bootstrap_of_one_seed_is_the_clips_interval():
    a, b = np.repeat([1, 0, 1, 0], 250), np.repeat([1, 0, 0, 0], 250)
    mean, low, high = report.paired_bootstrap([a], [b])
    assert mean == 0.25 and abs((high - low) / 2 - 1.96 * (0.25 * 0.75 / 1000) ** 0.5) < 2e-3


def test_outcomes_survive_writing():
    bits = [0, 0, 1, 0, 1, 1]
    cell = {"outcomes": {"stage2": f"{int('1' + ''.join(map(str, bits)), 2):x}"}}
    assert report.outcomes(cell, "stage2").tolist() == bits


def test_cells_hold_for_their_code_or_what_was_verified(tmp_path, monkeypatch):
    file = tmp_path / "results.jsonl"
    monkeypatch.setattr(study, "RESULTS", file)
    monkeypatch.setattr(study, "code_hash", lambda: "new")
    lines = [dict(row="full", seed=0, code="old"), dict(row="full", seed=1, code="other"), dict(row="x only", seed=0, code="new")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert set(study.finished()) == {("x only", 0)}
    study.append(dict(verified="middle", same_as="old"))
    study.append(dict(verified="new", same_as="middle"))
    assert set(study.finished()) == {("x only", 0), ("full", 0)}
    file.write_text(file.read_text() + json.dumps(dict(row="no KL", seed=2, code="between")) + "\n")
    assert ("no KL", 2) not in study.finished()
    study.append(dict(verified="between", same_as="old"))       # on another kind of CPU, say
    assert set(study.finished()) == {("x only", 0), ("full", 0), ("no KL", 2)}


def test_rows_are_flags_that_exist():
    import train
    for row in study.ROWS.values():
        for stage in (1, 2, 3):
            train.parse(["--stage", str(stage), *getattr(row, f"stage{stage}").split()])


def write_logs(folder, shift):
    """A run of four stages whose loss falls, moved up by `shift`."""
    for stage in range(4):
        log = folder / f"stage{stage}" / "log.jsonl"
        log.parent.mkdir(parents=True)
        noise = np.random.default_rng([stage, int(1e6 * shift)]).normal(0, 0.02, 60)
        rows = [dict(step=step, vtg=float(np.exp(-step / 20) + 0.2 + shift + noise[step - 1])) for step in range(1, 61)]
        if stage == 0:                                          # a row of stage 0 has another loss
            rows[30:] = [dict(step=row["step"], clip=row["vtg"]) for row in rows[30:]]
        rows.insert(10, dict(step=10, val_loss=1.0))
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_laid_over_the_band_of_five_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "CURVES", tmp_path / "curves")
    monkeypatch.setattr(report, "places", lambda row, seed, out: (None, {stage: out / f"seed{seed}/stage{stage}" for stage in range(4)}))
    for seed in range(5):
        write_logs(tmp_path / f"seed{seed}", shift=0.01 * seed)
    report.make_curves(tmp_path)
    assert (tmp_path / "curves/curves.png").stat().st_size > 5000 and (tmp_path / "curves/curves.json").stat().st_size < 20_000
    band = report.reference_curves()["stages"]["stage1"]["vtg"]
    first = np.mean([np.exp(-step / 20) + 0.22 for step in range(1, 6)])
    assert len(band["mean"]) == 12 and abs(band["mean"][0] - first) < 0.02 and (band["low"] < band["mean"]).all()
    assert len(report.reference_curves()["stages"]["stage0"]["clip"]) > 0
    for shift, said in ((0.015, " lies in the band of 5 seeds (vtg "), (1.0, " LEAVES THE BAND of 5 seeds (vtg 0 % of 12 points")):
        write_logs(tmp_path / f"own{shift}", shift)
        assert said in report.compare_curves(tmp_path / f"own{shift}/stage1/log.jsonl")
        assert (tmp_path / f"own{shift}/stage1/curves.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="its folder is not named as one of stage0, stage1, stage2, stage3"):
        report.compare_curves(tmp_path / "log.jsonl")


def test_the_page_is_made_of_the_recorded_cells():
    """Whoever changes results.jsonl makes the page anew: report.py --page. It holds the cells whichever code is checked out."""
    cells = {(line["row"], line["seed"]): line for line in report.recorded() if "row" in line}
    page = report.PAGE.read_text()
    found = report.sections(cells)
    assert set(found) == set(report.re.findall(r"<!-- table: (.*?) -->", page)), "every table has a place"
    assert report.filled(page, found) == page
