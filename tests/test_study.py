"""The study's arithmetic: intervals that mean something, cells that hold only for the code that made them."""
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import REPO, flags, run
from safetensors.torch import load_file

from model import load_checkpoint, newest_checkpoint

sys.path.insert(0, str(REPO / "tests/study"))
import compare
import report
import run as study
import target
import variants
from run import ALL_TOLD, FEW_TOLD, Cell


# ------------------------------------------------------------------------------------------------------- intervals
def test_student_t_is_that_of_the_tables():
    """Two-sided 95 % and 99 %, as every textbook prints them."""
    table = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 9: (2.262, 3.250), 30: (2.042, 2.750)}
    for freedom, (ninety_five, ninety_nine) in table.items():
        assert compare.t_quantile(freedom) == pytest.approx(ninety_five, abs=6e-4)
        assert compare.t_quantile(freedom, 0.99) == pytest.approx(ninety_nine, abs=6e-4)
        assert compare.t_probability(freedom, -ninety_five) == pytest.approx(0.05, abs=4e-5)     # three digits of t


@pytest.mark.parametrize("seeds", (3, 4, 5))
def test_an_interval_covers_what_it_says(seeds):
    """Two rows whose seeds spread by 3 points, 2,000 clips each, 4 points apart: 95 % of the intervals hold the 4 points."""
    rng = np.random.default_rng(seeds)
    covered, runs = 0, 6000
    for _ in range(runs):
        rate = 0.6 + rng.normal(0, 0.03, (2, seeds)) + np.array([[0.04], [0]])
        row, rival = 100 * rng.binomial(2000, rate.clip(0, 1)) / 2000
        found = compare.t_interval(row - rival)
        covered += found.low <= 4 <= found.high
    assert 0.93 < covered / runs < 0.97


@pytest.mark.parametrize("seeds", (3, 5))
def test_a_table_of_no_differences_says_so(seeds):
    """Eight rows that equal their rival: one table in twenty has a verdict, not one in three (two points for the simulation)."""
    rng = np.random.default_rng(seeds)
    wrong, runs = 0, 600
    for _ in range(runs):
        found = compare.compare_table(list(rng.normal(0, 3, (8, seeds))))
        wrong += any(one.verdict != "no difference seen" for one in found)
    assert 0.03 < wrong / runs < 0.07


def test_holm_holds_each_difference_against_its_own_level():
    """Interval and Holm's decision agree, row by row, also where a plain t would see more."""
    small = [1.0, 4.0, 5.0]                                     # p = 0.11
    clear = [9.0, 10.0, 11.0]                                   # p = 0.003
    middle = [2.5, 3.5, 4.5]                                    # p = 0.026: below 0.05, above 0.05 / 2
    one, two, three = compare.compare_table([small, clear, middle])
    assert two.verdict == "more" and one.verdict == three.verdict == "no difference seen"
    assert two.high - two.mean == pytest.approx(compare.t_quantile(2, 1 - 0.05 / 3) / 3 ** 0.5)
    assert three.high - three.mean == pytest.approx(compare.t_quantile(2, 1 - 0.05 / 2) / 3 ** 0.5)
    # Where the smallest p fails, all others are held against its level.
    one, two = compare.compare_table([small, [3.0, 4.0, 9.0]])
    for found, d in ((one, small), (two, [3.0, 4.0, 9.0])):
        assert found.high - found.mean == pytest.approx(compare.t_interval(d, 1 - 0.05 / 2).high - found.mean)
    alone = compare.compare_table([[-d for d in middle]])[0]
    assert alone.verdict == "less" and alone.low < alone.mean == -3.5 < alone.high < 0


@pytest.mark.parametrize("differences", ([5.0], [5.0, 5.2]))
def test_no_verdict_below_three_seeds(differences):
    found, other = compare.compare_table([differences, [1.0, 2.0, 3.0]])
    assert found.low is None and found.verdict == "too few seeds" and found.mean == pytest.approx(np.mean(differences))
    # What cannot be judged makes the others no stricter.
    assert other == compare.t_interval([1.0, 2.0, 3.0])


def test_seeds_that_agree_to_the_digit():
    same, better = compare.compare_table([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    assert same.verdict == "no difference seen" and better.verdict == "more"


# ------------------------------------------------------------------------------------------------- cells and tables
def line_of(row, seed, code="new", setting=ALL_TOLD, cpu="AVX2", em=(50.0, 60.0)):
    """A line of results.jsonl as run.run_cell makes it, with what tables read."""
    figures = {f"stage{stage}": dict(ego_em=value / 100) for stage, value in zip((2, 3), em)}
    trained = (study.ROWS | study.CANDIDATES)[row]
    flags = json.loads(json.dumps(study.asdict(trained)))
    return dict(row=row, setting=setting, seed=seed, flags=flags, world=study.SETTINGS[setting], code=code, git="abc", cpu=cpu,
                variant_code=study.variant_hash(study.variant_of(trained, setting)), cycle={}, figures=figures)


def write_results(monkeypatch, tmp_path, lines):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(study, "code_hash", lambda: "new")
    monkeypatch.setattr(study, "CPU", "AVX2")
    study.RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_cells_hold_for_their_code_or_what_was_verified(tmp_path, monkeypatch):
    write_results(monkeypatch, tmp_path, [line_of("full", 0, "old"), line_of("full", 1, "other"), line_of("x only", 0)])
    x_only, full = Cell("x only", ALL_TOLD, 0), Cell("full", ALL_TOLD, 0)
    assert set(study.finished()) == {x_only}
    study.append(dict(verified="middle", same_as="old"))
    study.append(dict(verified="new", same_as="middle"))
    assert set(study.finished()) == {x_only, full}
    study.append(line_of("no KL", 2, "between"))
    assert Cell("no KL", ALL_TOLD, 2) not in study.finished()
    study.append(dict(verified="between", same_as="old"))       # on another kind of CPU, say
    assert set(study.finished()) == {x_only, full, Cell("no KL", ALL_TOLD, 2)}


def test_another_kind_of_cpu_has_cells_of_its_own(tmp_path, monkeypatch):
    """A fork's row on an AVX512 machine was trained, and stood beside no rival: that one was there, of AVX2."""
    write_results(monkeypatch, tmp_path, [line_of("full", 0), line_of("full", 1), line_of("full", 0, cpu="AVX512"), line_of("no KL", 0, cpu="AVX512")])
    assert {cell.seed for cell in study.finished()} == {0, 1} and all(line["cpu"] == "AVX2" for line in study.finished().values())
    assert set(study.finished("AVX512")) == {Cell("full", ALL_TOLD, 0), Cell("no KL", ALL_TOLD, 0)}


@pytest.mark.parametrize("change", (
    dict(torch="9.9.9"), dict(world="--noise 1"), dict(setting="a setting that is gone"), dict(row="a row that is gone"), dict(variant_code="another class"),
    dict(flags=dict(stage1="", stage2="--no-kl", stage3="", variant="", stages=[1, 2, 3]))))
def test_a_cell_is_void_when_its_row_changes(tmp_path, monkeypatch, change):
    write_results(monkeypatch, tmp_path, [line_of("KL without F", 0), line_of("KL without F", 1) | change])
    assert set(study.finished()) == {Cell("KL without F", ALL_TOLD, 0)}


def cells_of(*lines):
    return {study.cell_of(line): line for line in lines}


def test_a_table_compares_the_seeds_that_both_rows_have():
    lines = [line_of("full", seed, em=(70 + seed, 75)) for seed in range(4)]
    lines += [line_of("no KL", seed, em=(60 + seed, 70)) for seed in range(3)]
    lines += [line_of("x only", 0, em=(50, 55)), line_of("no KL", 3, cpu="AVX512", em=(0, 0))]
    rows = {line.split(" | ")[0][2:]: line for line in compare.table(cells_of(*lines), "full", ["no KL", "x only"], ALL_TOLD).splitlines()}
    assert "| 3 |" in rows["no KL"], "another kind of CPU rounds otherwise: that seed is not compared"
    assert "| 61.0 | -10.0 [-10.0, -10.0] less | 70.0 | -5.0 [-5.0, -5.0] less |" in rows["no KL"]
    assert "-20.0, too few seeds" in rows["x only"] and "| 4 |" in rows["full"]


def test_a_run_is_not_compared_with_itself():
    """Without LoRA stage 2 is that of `full`: the table has its score and no difference."""
    lines = [line_of(row, seed, em=(70, 75 - 5 * (row == "no LoRA") + seed)) for seed in range(3) for row in ("full", "no LoRA")]
    found = compare.comparisons(cells_of(*lines), "full", ["no LoRA"], ALL_TOLD)
    assert set(found) == {("no LoRA", "stage3")} and found["no LoRA", "stage3"].verdict == "less"


def test_settings_are_not_mixed():
    lines = [line_of("full", seed) for seed in range(3)] + [line_of("no KL", seed, setting=FEW_TOLD) for seed in range(3)]
    assert compare.comparisons(cells_of(*lines), "full", ["no KL"], ALL_TOLD) == {}


def test_what_matters_most_is_made_first():
    cells = study.cells_of(study.ORDER)
    assert len(cells) == len(set(cells)) and {cell.row for cell in cells} == set(study.ROWS)
    assert {cell.row for cell in cells[:30]} == {"full", *study.QUESTIONS["b"].rows} and cells[0] == Cell("full", ALL_TOLD, 0)
    first_late = next(i for i, cell in enumerate(cells) if cell.seed >= 3)
    assert all(cell.seed >= 3 for cell in cells[first_late:]), "seeds 0 to 2 of all questions come before the others"


def test_the_search_shows_each_candidate_in_its_row_and_column():
    changes = study.SHORT_LIST["full"][1]
    lines = [line_of(f"full, {change}", 100, setting=FEW_TOLD, em=(60 + i, 0)) for i, change in enumerate(changes)]
    lines += [line_of("x only, nine times", 100, setting=FEW_TOLD, em=(55, 0)), line_of("full", 0, setting=FEW_TOLD, em=(10, 0))]
    head, _, *rows = report.search_table(cells_of(*lines)).splitlines()
    assert head == "| few told, seed 100 | train.py's | a third of its rates | three times | nine times | KL at 0.5 | KL at 0.05 |"
    assert rows == ["| x only |  |  |  | 55.0 |  |  |", "| full | 60.0 | 61.0 | 62.0 |  | 63.0 | 64.0 |"]


def test_outcomes_survive_writing():
    bits = [0, 0, 1, 0, 1, 1]
    assert report.unpack(study.pack(bits)).tolist() == bits


def test_rows_are_flags_that_exist_and_settings_too():
    import data
    import train
    for row in [*study.ROWS.values(), *study.CANDIDATES.values()]:
        for stage in (1, 2, 3):
            train.parse(["--stage", str(stage), *getattr(row, f"stage{stage}").split()])
        assert row.variant == "" or row.variant in variants.VARIANTS
    knobs = {"--" + name.replace("_", "-") for name in data.World.__dataclass_fields__}
    for words in study.SETTINGS.values():
        assert set(words.split()[::2]) <= knobs
    used = {study.variant_of(row, setting) for row in study.ROWS.values() for setting in study.BOTH}
    assert used - {""} == set(variants.VARIANTS), "no variant that no row uses"


def test_the_newest_checkpoint_of_a_run_is_taken(tmp_path, monkeypatch):
    """With saves during a run there are several step_* folders: the last one knows the revision that ended the run."""
    def made(folder, *words):
        if folder.name.startswith("stage"):
            (folder / "eval.json").parent.mkdir(parents=True, exist_ok=True)
            (folder / "eval.json").write_text('{"ego_em": 0.5, "exo_em": 0.5}')
            (folder / "predictions.jsonl").write_text('{"said": "a", "text": "a"}\n')
            (folder / "log.jsonl").write_text('{"step": 1, "ccl_constant": 1.0}\n{"step": 1, "ccl": 2.0}\n{"step": 2, "ccl": 0.5}\n')
            for step in (40, 150, 100):
                (folder / f"step_{step:06d}").mkdir(exist_ok=True)
                (folder / f"step_{step:06d}/state.json").write_text(json.dumps(dict(git=f"step {step}")))
        return folder
    monkeypatch.setattr(study, "command", made)
    line = study.run_cell(Cell("full", ALL_TOLD, 0), tmp_path)
    assert line["git"] == "step 150" and line["cycle"] == dict(constant=1.0, first=2.0, last=1.25)
    assert report.unpack(line["outcomes"]["stage2"]).tolist() == [1]


def test_minutes_that_are_too_few_are_said(tmp_path, monkeypatch, capsys):
    """No cell is started that would end later, judged by the last one: the first may have taken an hour. What is left is named."""
    clock, seconds = [0.0], iter((6000, 60, 60, 60))

    def run_cell(cell, out):
        took = next(seconds)
        clock[0] += took
        return cell._asdict() | dict(seconds=took, figures={})
    monkeypatch.setattr(study.time, "time", lambda: clock[0])
    for name, new in dict(run_cell=run_cell, append=lambda line: None, finished=lambda cpu: {}, ThreadPoolExecutor=lambda cores: ThreadPoolExecutor(1)).items():
        monkeypatch.setattr(study, name, new)
    cells = [Cell("full", ALL_TOLD, seed) for seed in range(5)]
    study.run_cells(cells[:4], minutes=240, out=tmp_path)
    assert "are left" not in capsys.readouterr().out
    clock[0], seconds = 0.0, iter((60, 60, 60))
    study.run_cells(cells, minutes=3.5, out=tmp_path)
    assert "2 cells are left, for which 3.5 minutes were too few: the same call goes on" in capsys.readouterr().out


def test_a_probe_is_told_the_seed_of_its_cell(tmp_path, monkeypatch):
    write_results(monkeypatch, tmp_path, [line_of("full", 2)])
    stages = study.places(study.ROWS["full"], ALL_TOLD, 2, tmp_path)[1]
    stages[3].mkdir(parents=True)
    (stages[3] / "eval.json").write_text("{}")
    asked = []

    def answer(words, **_):
        asked.append(list(map(os.fspath, words)))               # as the system wants them
        return subprocess.CompletedProcess(words, 0, stdout='{"features": {}}')
    monkeypatch.setattr(study.subprocess, "run", answer)
    study.probe(tmp_path)
    assert asked[0][-2:] == ["--seed", "2"] and study.recorded()[-1]["probe"] == "full"


def test_cells_that_begin_alike_share_their_stages(tmp_path):
    def stages(row, setting=ALL_TOLD):
        return study.places(study.ROWS[row], setting, 0, tmp_path)[1]
    full, no_kl, no_lora = stages("full"), stages("no KL"), stages("no LoRA")
    assert full[1] == no_kl[1] and full[2] != no_kl[2]
    assert full[2] == no_lora[2] and full[3] != no_lora[3]
    assert stages("F = identity")[2] != stages("KL without F")[2] != full[2]
    assert stages("full", FEW_TOLD)[0] == full[0] and stages("full", "wild head")[0] != full[0]


# --------------------------------------------------------------------------------------------------------- variants
@pytest.fixture(scope="module")
def variant_runs(toy):
    """Two steps of stage 2 of each variant, with the flags of its row, on the tiny world: name -> run folder."""
    made = {}
    for row in study.ROWS.values():
        if row.variant and row.variant not in made:
            out = toy / f"variant-{row.variant}"
            run("tests/study/variants.py", row.variant, *flags(toy, 2, out.name), *row.stage2.split(), "--steps", 2)
            made[row.variant] = out
    return made


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tensors_of(folder):
    return load_file(newest_checkpoint(folder) / "model.safetensors")


def test_F_can_be_the_identity(toy, variant_runs):
    """The exo connector reads x as it is, so F(x) ranks the exo clips as x does."""
    figures = json.loads((variant_runs["Identity"] / "eval.json").read_text())
    for key in ("top1", "median_rank"):
        assert figures[f"transfer_{key}"] == figures[f"transfer_x_{key}"]
    model, _ = load_checkpoint(toy / "stage2")
    variants.identity(model)
    x = torch.randn(2, 4, 4, 4, 96)
    assert torch.equal(model.F(x), x)


def test_without_a_loss_on_pairs_no_exo_clip_is_read(toy, tmp_path):
    """F from the text loss alone draws what x only draws: with the exo clips gone it trains as well."""
    shutil.copytree(toy / "toy", tmp_path / "toy")
    cameras = list((tmp_path / "toy/pairs").glob("cam*"))
    assert cameras
    for folder in cameras:
        shutil.rmtree(folder)
    for name in ("TextAlone", "HalfTold"):
        code, out, said = run("tests/study/variants.py", name, *flags(toy, 2, f"no-exo-{name}"), "--data", tmp_path / "toy",
                              "--no-kl", "--no-cycle", "--steps", 1, "--no-eval", check=False)
        assert (code == 0) == (name == "TextAlone"), out + said


def test_told_pairs_are_drawn_alone_or_every_second_time():
    rows = [dict(id=i) | (dict(text="told") if i % 5 == 0 else {}) for i in range(100)]
    assert [row["id"] for row in variants.told_alone(rows)] == list(range(0, 100, 5))
    half = variants.half_told(rows)
    assert len(half) == 160 and sum("text" in row for row in half) == 80 and {row["id"] for row in half} == set(range(100))
    assert variants.half_told(rows[::5]) == rows[::5], "where all are told, each is drawn once"
    assert study.variant_of(study.ROWS["full"], FEW_TOLD) == "HalfTold" and study.variant_of(study.ROWS["full"], ALL_TOLD) == ""


def test_told_pairs_are_drawn_more_often_in_stage_2_alone(tmp_path, monkeypatch):
    """What train.py reads where one pair in five is told, through the command that the study gives."""
    rows = [dict(id=i) | (dict(text="told") if i % 5 == 0 else {}) for i in range(100)]
    read = []
    for stage, name in ((2, "HalfTold"), (2, "ToldAlone"), (2, "AllAlike"), (3, "HalfTold")):
        monkeypatch.setattr(variants.train, "read_manifests", lambda *given: rows)
        monkeypatch.setitem(variants.train.TOY, 2, variants.train.TOY[2])
        monkeypatch.setattr(variants.train, "main", lambda *given, **more: read.append(variants.train.read_manifests()))
        variants.main([name, "--stage", str(stage), "--out", str(tmp_path)])
    assert [(len(found), sum("text" in row for row in found)) for found in read] == [(160, 80), (20, 20), (100, 20), (100, 20)]


def test_a_variant_does_not_void_its_neighbours(tmp_path, monkeypatch):
    """Another entry of VARIANTS changes no hash but its own; what a variant reaches changes its own."""
    source = (REPO / "tests/study/variants.py").read_text()
    names = list(variants.VARIANTS)

    def hashes(text):
        (tmp_path / "tests/study").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests/study/variants.py").write_text(text)
        study.variant_hash.cache_clear()
        return {name: study.variant_hash(name) for name in names}
    monkeypatch.setattr(study, "REPO", tmp_path)
    before = hashes(source)
    assert len(set(before.values())) == len(names)
    assert hashes(source.replace('VARIANTS = {', 'VARIANTS = {\n    "Mine": Variant(change=no_mapping),')) == before
    after = hashes(source.replace('model.F = model.G = None', 'model.F = None'))
    assert {name for name in names if after[name] != before[name]} == {"Distillation"}
    after = hashes(source.replace("train.main(flags", "train.main(flags * 1"))
    assert all(after[name] != before[name] for name in names)
    monkeypatch.undo()
    study.variant_hash.cache_clear()


def test_a_frozen_F_stays_as_it_began(toy, variant_runs):
    """It equals the F of another run of that seed before its first step, and the ego encoder has learned behind it."""
    begun, frozen = tensors_of(variant_runs["Identity"]), tensors_of(variant_runs["FrozenF"])
    assert all(torch.equal(begun[name], frozen[name]) for name in begun if name.startswith("F."))
    before = tensors_of(toy / "stage0")
    assert not any(torch.equal(frozen[name], before[name]) for name in frozen if name.startswith("ego_vit.blocks") and "weight" in name)


def test_distillation_has_a_KL_and_no_F(toy, variant_runs):
    folder = variant_runs["Distillation"]
    assert all(step["kl"] > 0 and "ccl" not in step for step in log_of(folder) if "vtg" in step)
    assert not any(name.startswith(("F.", "G.")) for name in tensors_of(folder))
    # What it has trained goes on as any other run.
    run("train.py", *flags(toy, 3, "variant-3"), "--init", folder, "--steps", 1, "--no-eval")


def test_the_oracle_is_asked_with_the_true_exo_clip(toy, variant_runs):
    folder = variant_runs["Oracle"]
    figures = json.loads((folder / "eval.json").read_text())
    said = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert figures["ego_em"] == np.mean([row["said"] == row["text"] for row in said]) and len(said) == figures["ego_em_n"] == 20
    model, _ = load_checkpoint(folder)
    x, y = torch.randn(2, 4, 4, 4, 96), torch.randn(2, 4, 4, 4, 96)
    with torch.no_grad():
        tokens = variants.oracle_tokens(model, x, y)
        assert torch.equal(tokens, torch.cat([model.ego_connector(x), model.exo_connector(y)], dim=1))


def test_an_unknown_variant_is_named():
    with pytest.raises(SystemExit, match="variant 'Distilation': choose one of TextAlone, Identity, FrozenF, "):
        variants.main(["Distilation", "--stage", "2"])


# ------------------------------------------------------------------------------------------------- curves and the page
def write_logs(folder, shift):
    """A run of four stages whose loss falls, moved up by `shift`."""
    for stage in range(4):
        log = folder / f"stage{stage}" / "log.jsonl"
        log.parent.mkdir(parents=True)
        noise = np.random.default_rng([stage, int(1e6 * shift)]).normal(0, 0.02, 60)
        rows = [dict(step=step, vtg=float(np.exp(-step / 20) + 0.2 + shift + noise[step - 1])) for step in range(1, 61)]
        if stage == 0:                                          # a row of stage 0 has another loss
            rows[30:] = [dict(step=row["step"], image_text=row["vtg"]) for row in rows[30:]]
        rows.insert(10, dict(step=10, val_loss=1.0))
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_laid_over_the_band_of_five_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "CURVES", tmp_path / "curves")
    monkeypatch.setattr(report, "places", lambda row, setting, seed, out: (None, {stage: out / f"seed{seed}/stage{stage}" for stage in range(4)}))
    for seed in range(5):
        write_logs(tmp_path / f"seed{seed}", shift=0.01 * seed)
        (tmp_path / f"seed{seed}/stage3/eval.json").write_text("{}")
    report.make_curves(tmp_path)
    assert (tmp_path / "curves/curves.png").stat().st_size > 5000 and (tmp_path / "curves/curves.json").stat().st_size < 20_000
    band = report.reference_curves()["stages"]["stage1"]["vtg"]
    first = np.mean([np.exp(-step / 20) + 0.22 for step in range(1, 6)])
    assert len(band["mean"]) == 12 and abs(band["mean"][0] - first) < 0.02 and (band["low"] < band["mean"]).all()
    assert len(report.reference_curves()["stages"]["stage0"]["image_text"]) > 0
    for shift, said in ((0.015, " lies in the band of 5 seeds (vtg "), (1.0, " LEAVES THE BAND of 5 seeds (vtg 0 % of 12 points")):
        write_logs(tmp_path / f"own{shift}", shift)
        assert said in report.compare_curves(tmp_path / f"own{shift}/stage1/log.jsonl")
        assert (tmp_path / f"own{shift}/stage1/curves.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="its folder is not named as one of stage0, stage1, stage2, stage3"):
        report.compare_curves(tmp_path / "log.jsonl")


def test_a_target_is_a_mean_of_all_five_seeds(tmp_path, monkeypatch, capsys):
    """Four good seeds are no record, and a mean below the target leaves the table as it is."""
    monkeypatch.setattr(target, "TARGETS", tmp_path / "targets.jsonl")
    monkeypatch.setattr(sys, "argv", ["target.py", "--machine", "a laptop", "--out", str(tmp_path)])

    def play(*exact):
        left = iter(exact)
        monkeypatch.setattr(target, "run_seed", lambda seed, out: dict(seed=seed, seconds=100.0 + seed, steps=540, exact=next(left), git="abc"))
        target.main()
    with pytest.raises(SystemExit, match="not reached, so targets.jsonl stays as it is"):
        play(*[target.TARGET - 0.1] * 4, target.TARGET)
    assert target.records() == []
    play(*[target.TARGET - 1] * 2, *[target.TARGET + 1] * 3)
    assert f"| {target.TARGET + 0.2:.1f} |" in target.target_table(target.records()) and "| 540 | 102 | a laptop | abc |" in capsys.readouterr().out
    assert not target.reached([dict(seed=seed, exact=100) for seed in range(4)])
    monkeypatch.undo()
    for stage in (0, 1):
        (tmp_path / f"seed{stage}/stage{stage}").mkdir(parents=True)
        with pytest.raises(SystemExit, match=f"stage{stage} is there already, and what is there takes no time: choose another --out"):
            target.run_seed(0, tmp_path / f"seed{stage}")


def test_the_page_is_made_of_the_recorded_cells():
    """Whoever changes results.jsonl makes the page anew: report.py --page. It holds the cells whichever code is checked out."""
    cells = {study.cell_of(line): line for line in study.recorded() if "row" in line}
    page = report.PAGE.read_text()
    found = report.sections(cells)
    assert set(found) == set(report.re.findall(r"<!-- table: (.*?) -->", page)), "every table has a place"
    assert report.filled(page, found) == page
