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


def test_rows_are_flags_that_exist():
    import train
    for row in study.ROWS.values():
        for stage in (1, 2, 3):
            train.parse(["--stage", str(stage), *getattr(row, f"stage{stage}").split()])
