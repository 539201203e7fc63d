"""tests/WALK.md says what the code does: its links, its shapes, its snippets; its scores are in the study's band."""
import json
import re
import sys

import pytest
from conftest import REPO, flags, run

sys.path.insert(0, str(REPO / "tests/study"))
import walk

from run import cell_of, recorded

PAGE = walk.PAGE.read_text()


@pytest.mark.upstream
def test_links_lead_to_the_lines_of_the_code():
    assert walk.with_lines(PAGE) == PAGE, "python tests/walk.py --links brings them up to date"
    assert len(re.findall(r"\.py#L", PAGE)) >= 20 and len(PAGE.splitlines()) <= 200


@pytest.mark.upstream
def test_shapes_and_losses_are_those_of_the_code():
    assert walk.with_lines(walk.shape_table()) in PAGE
    assert walk.source(walk.vtg, walk.kl, walk.ccl) in PAGE


def test_scores_lie_in_the_band_of_the_study():
    """The demonstrator's, the learner's after stages 2 and 3, and how often the own exo clip is nearest."""
    cells = [line for line in recorded() if "row" in line and cell_of(line)[:2] == ("full", "all told")]
    head = PAGE.split("\n## ")[0]
    said = [float(number) for number in re.findall(r"([\d.]+) %", head)]
    for number, (stage, key) in zip(said, (("stage1", "exo_em"), ("stage2", "ego_em"), ("stage3", "ego_em"), ("stage2", "transfer_top1")), strict=True):
        band = [100 * cell["figures"][stage][key] for cell in cells]
        assert min(band) - 0.05 <= number <= max(band) + 0.05, key


def test_a_run_gives_such_a_page(toy, tmp_path):
    """By hand and by train.py the losses are equal: walk.py itself refuses others."""
    run("train.py", *flags(toy, 2, "x/stage2"), "--no-mapping", "--steps", 3)
    run("tests/walk.py", "--out", toy, "--page", tmp_path / "WALK.md")
    page = (tmp_path / "WALK.md").read_text()
    headings = lambda text: [line for line in text.splitlines() if line.startswith("## ")]
    assert headings(page) == headings(PAGE) and walk.with_lines(page) == page
    assert all((tmp_path / "assets" / name).stat().st_size > 10_000 for name in ("walk.png", "walk-f.png"))
    # CCL moves F and G alone; what is frozen has no gradient.
    assert re.search(r"\| ego_vit \| [\d.]+ \| [\d.]+ \| - \|", page) and "| exo_connector | frozen | frozen | frozen |" in page
    row = json.loads(re.search("```json\n(.*?)```", page, re.S)[1])
    assert {"id", "ego", "exo", "text", "turns"} == row.keys() and row["ego"]["video"].startswith("test/ego/")


def test_without_runs_it_says_what_makes_them(tmp_path):
    code, _, said = run("tests/walk.py", "--out", tmp_path, check=False)
    assert code == 1 and said.startswith(f"walk.py: {tmp_path}/stage1 holds no finished run") and "--no-mapping" in said
