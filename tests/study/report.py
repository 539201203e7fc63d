"""Tables of the study from results.jsonl, as Markdown: every row against another, clip by clip.

    python tests/study/report.py                            # all rows against "full"
    python tests/study/report.py --against "x only"
    python tests/study/report.py --page                     # puts these tables into tests/study/README.md
    python tests/study/report.py --figures tests/assets     # sweep_*.png, one a knob that was swept
    python tests/study/report.py --curves out/stage2/log.jsonl      # does my run of the default world look as it should?
    python tests/study/report.py --make-curves              # curves/, from the five runs that run.py left in out/study

A difference is a mean over seeds and clips; its 95 % interval is a paired bootstrap that draws seeds, and clips within
a seed, with replacement (10,000 draws). A row is called better or worse only when the interval excludes zero; "beside
the paper" compares that, after stage 3, with the sign of the paper's difference. Rows of another setting (one narrated
pair in ten, 720 steps) are compared with the full row of that setting, the values of a sweep with and without F.
"""
import argparse
import json
import re
from pathlib import Path

import numpy as np
from run import CPU, DEFAULT, REPO, ROWS, SEEDS, SWEEPS, finished, places, recorded

SETTINGS = (", one in ten narrated", ", 720 steps")
CURVES = Path(__file__).with_name("curves")
PAGE = Path(__file__).with_name("README.md")
EVERY = 5                                                   # steps between points; a point is the mean of the steps since the last

KNOBS = {"ego": "narrated ego clips in Init (seen by both)", "pairs": "synchronized, narrated pairs",
         "noise": "motion and light of the head camera (1: the study's)", "views": "exo cameras of a pair"}

PAPER = {   # averages of its Tables 3 and 5 (x only: the same data without Exo2Ego), percent
    "full": 55.6, "forward cycle only": 54.9, "MLP instead of ResNet blocks": 54.7, "no G, no cycle": 54.4, "no KL": 51.4,
    "no LoRA": 53.2, "x only": 49.7}


def unpack(outcomes: str) -> np.ndarray:
    """One 0 or 1 a test clip, of what run.pack wrote."""
    return np.array([int(bit) for bit in f"{int(outcomes, 16):b}"[1:]])


def outcomes(cell: dict, stage: str) -> np.ndarray:
    """One 0 or 1 a test clip."""
    return unpack(cell["outcomes"][stage])


def paired_bootstrap(a: list[np.ndarray], b: list[np.ndarray], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of a - b over seeds (lists) and clips, and its 95 % interval: seeds drawn anew, then clips of each."""
    rng, differences = np.random.default_rng(0), [x - y for x, y in zip(a, b)]
    means = np.array([d.mean() for d in differences])
    # the mean of n clips drawn with replacement, exactly: counts of -1, 0, 1 are multinomial
    shares = np.array([[(d == value).mean() for value in (-1, 0, 1)] for d in differences])
    sizes = np.array([len(d) for d in differences])
    total = np.zeros(draws)
    for _ in differences:
        seed = rng.integers(len(differences), size=draws)
        counts = rng.multinomial(sizes[seed], shares[seed])
        total += (counts[:, 2] - counts[:, 0]) / sizes[seed]
    low, high = np.percentile(total / len(differences), (2.5, 97.5))
    return float(means.mean()), float(low), float(high)


def setting_of(name: str) -> str:
    """What a row has in common with those it is compared with."""
    if name.startswith(DEFAULT):
        return DEFAULT
    return next((setting for setting in SETTINGS if name.endswith(setting)), "")


def rival_of(name: str, against: str) -> str:
    """The row `against`, in the setting of the row `name`."""
    setting = setting_of(name)
    if setting == DEFAULT:
        return DEFAULT if against == "full" else f"{DEFAULT}, {against}"
    return against + setting


def table(cells: dict, against: str, names: list[str]) -> str:
    """Markdown: exact match after stages 2 and 3 (mean of seeds), difference of `against` and the row, verdict."""
    lines = [f"| row | paper | seeds | after stage 2 | {against} - row | after stage 3 | {against} - row | beside the paper |",
             "|---|---|---|---|---|---|---|---|"]
    for name in names:
        rival = rival_of(name, against)
        seeds = sorted(seed for row, seed in cells if row == name and (rival, seed) in cells)
        if not seeds:
            continue
        columns, verdict = [], ""
        for stage in ("stage2", "stage3"):
            own, other = ([outcomes(cells[row, seed], stage) for seed in seeds] for row in (name, rival))
            columns.append(f"{100 * np.mean([o.mean() for o in own]):.1f}")
            mean, low, high = (100 * value for value in paired_bootstrap(other, own))
            verdict = "worse" if low > 0 else "better" if high < 0 else "no difference seen"
            columns.append("" if name == rival else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {verdict}")
        stands = {"worse": "agrees", "better": "disagrees"}.get(verdict, "no effect seen")
        known = name in PAPER and name != against == "full"
        lines.append(f"| {name} | {PAPER.get(name, '')} | {len(seeds)} | " + " | ".join(columns) +
                     f" | {stands if known else ''} |")
    return "\n".join(lines)


def sweep_rows(sweep: str) -> list[tuple[float, str, str]]:
    """(value of the knob, its row with F, its row without), in order; the default's rows are `full` and `x only`."""
    default, *values = SWEEPS[sweep]
    return sorted([(default, "full", "x only")] + [(v, f"{sweep} {v}", f"{sweep} {v}, x only") for v in values])


def sweep_table(cells: dict) -> str:
    """Markdown: what F adds at each value of each knob; seeds that have all of a knob's cells."""
    lines = ["| knob | value | seeds | full, after stage 3 | x only | difference |", "|---|---|---|---|---|---|"]
    for sweep in SWEEPS:
        for value, *names in sweep_rows(sweep):
            seeds = sweep_seeds(cells, sweep)
            if seeds and all((name, seed) in cells for name in names for seed in seeds):
                full, alone = ([outcomes(cells[name, seed], "stage3") for seed in seeds] for name in names)
                mean, low, high = (100 * v for v in paired_bootstrap(full, alone))
                share = [100 * np.mean([o.mean() for o in side]) for side in (full, alone)]
                lines.append(f"| {KNOBS[sweep]} | {value} | {len(seeds)} | {share[0]:.1f} | {share[1]:.1f} | {mean:+.1f} [{low:+.1f}, {high:+.1f}] |")
    return "\n".join(lines)


def sweep_seeds(cells: dict, sweep: str) -> list[int]:
    """Seeds at which the first value that is not the default has both its cells."""
    value = SWEEPS[sweep][1]
    return sorted(seed for row, seed in cells if row == f"{sweep} {value}" and (f"{row}, x only", seed) in cells)


def figures(cells: dict, folder: Path) -> list[Path]:
    """One picture a sweep: exact match after stage 3 over the knob's values, with F and without, seeds as points."""
    from matplotlib import pyplot
    made = []
    for sweep in SWEEPS:
        figure, axes = pyplot.subplots(figsize=(4.2, 3), layout="constrained")
        for side, ink, label in ((1, "tab:blue", "full"), (2, "tab:gray", "x only")):
            points = [(row[0], 100 * outcomes(cells[row[side], seed], "stage3").mean()) for row in sweep_rows(sweep)
                      for seed in sweep_seeds(cells, sweep) if (row[side], seed) in cells]
            if points:
                xs = sorted({x for x, _ in points})
                axes.plot(*zip(*points), "o", color=ink, alpha=0.5)
                axes.plot(xs, [np.mean([y for x, y in points if x == at]) for at in xs], color=ink, label=label)
        if axes.lines:
            axes.set(xlabel=KNOBS[sweep], ylabel="exact match after stage 3, %", ylim=(0, None),
                     title=f"{len(sweep_seeds(cells, sweep))} seed(s), 2,000 clips")
            if sweep in ("ego", "pairs"):
                axes.set_xscale("log")
            axes.legend()
            made.append(folder / f"sweep_{sweep}.png")
            figure.savefig(made[-1], dpi=110)
        pyplot.close(figure)
    return made


def read_curves(log: Path) -> dict[str, list[float]]:
    """Each loss term of a log.jsonl, as means over EVERY steps. Stage 0 has its four rows one after another."""
    terms = {}
    for row in map(json.loads, log.read_text().splitlines()):
        for term in ("vtg", "kl", "ccl", "clip"):
            if term in row:
                # A term that a row of stage 0 lacks is not a number there, and neither is the point.
                values = terms.setdefault(term, [])
                values += [np.nan] * (row["step"] - 1 - len(values)) + [row[term]]
    return {term: [float(np.mean(values[i:i + EVERY])) for i in range(0, len(values) - EVERY + 1, EVERY)]
            for term, values in terms.items()}


def make_curves(out: Path):
    """curves/curves.json and curves.png of the default world: the five seeds' mean and spread, and seed 0 itself."""
    stages = {}
    for stage in range(4):
        runs = [read_curves(places(ROWS[DEFAULT], seed, out)[1][stage] / "log.jsonl") for seed in SEEDS]
        stages[f"stage{stage}"] = {
            term: {key: [float(f"{value:.4g}") for value in values] for key, values in (
                ("seed 0", runs[0][term]),
                ("mean", np.mean([run[term] for run in runs], axis=0)),
                ("sd", np.std([run[term] for run in runs], axis=0, ddof=1)))}
            for term in runs[0]}
    # A point that is not a number (stage 0) is null.
    text = json.dumps(dict(cpu=CPU, threads=1, every=EVERY, seeds=len(SEEDS), stages=stages)).replace("NaN", "null")
    CURVES.mkdir(exist_ok=True)
    (CURVES / "curves.json").write_text(text.replace('"stage', '\n"stage') + "\n")
    draw_curves(CURVES / "curves.png", {})


def reference_curves() -> dict:
    """What is in curves.json, numbers as arrays. `low` and `high` hold a new seed 95 times in 100: the mean of n seeds -+
    t(n - 1) sd sqrt(1 + 1/n)."""
    found = json.loads((CURVES / "curves.json").read_text())
    factor = 2.776 * (1 + 1 / found["seeds"]) ** 0.5        # t of 4 degrees of freedom
    for terms in found["stages"].values():
        for term, values in terms.items():
            arrays = {key: np.array(value, dtype=float) for key, value in values.items()}
            half = factor * arrays["sd"]
            terms[term] = arrays | dict(low=arrays["mean"] - half, high=arrays["mean"] + half)
    return found


def draw_curves(path: Path, own: dict[str, dict]):
    """Every term of every stage, band and seed 0; over them the curves of `own`: stage -> term -> values."""
    from matplotlib import pyplot
    found = reference_curves()
    panels = [(stage, term) for stage, terms in found["stages"].items() for term in terms if not own or stage in own]
    columns = min(4, len(panels))
    figure, grid = pyplot.subplots(-(-len(panels) // columns), columns, figsize=(3.6 * columns, 2.8 * -(-len(panels) // columns)),
                                   layout="constrained", squeeze=False)
    for axes, (stage, term) in zip(grid.flat, panels):
        band = found["stages"][stage][term]
        steps = EVERY * (1 + np.arange(len(band["mean"])))
        axes.fill_between(steps, np.maximum(band["low"], 1e-3), band["high"], alpha=0.25, label="95 % of new seeds")
        axes.plot(steps, band["seed 0"], lw=1, label="seed 0")
        if values := own.get(stage, {}).get(term):
            axes.plot(EVERY * (1 + np.arange(len(values))), values, lw=1.5, color="tab:red", label="yours")
        axes.set(title=f"{stage}: {term}", xlabel="step", yscale="log")
    grid.flat[0].legend()
    for axes in grid.flat[len(panels):]:
        axes.set_visible(False)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def compare_curves(log: Path) -> str:
    """One line: which share of the points of each term lies in the band. Points that follow one another go together, so a
    good run may well have fewer than 95 of 100; under 70 it is said to leave the band."""
    stage = log.resolve().parent.name
    found = reference_curves()
    if stage not in found["stages"]:
        raise SystemExit(f"{log}: its folder is not named as one of {', '.join(found['stages'])}, so there is nothing to compare with")
    own, shares = read_curves(log), {}
    for term, band in found["stages"][stage].items():
        values = np.array(own.get(term, [])[:len(band["mean"])])
        known = np.isfinite(values) & np.isfinite(band["mean"][:len(values)])
        inside = (values >= band["low"][:len(values)]) & (values <= band["high"][:len(values)])
        if known.any():
            shares[term] = inside[known].mean(), known.sum()
    if not shares:
        raise SystemExit(f"{log} has none of the losses {', '.join(found['stages'][stage])} over {EVERY} steps")
    picture = log.with_name("curves.png")
    draw_curves(picture, {stage: own})
    verdict = "lies in the band" if min(share for share, _ in shares.values()) >= 0.7 else "LEAVES THE BAND"
    points = ", ".join(f"{term} {100 * share:.0f} % of {count} points" for term, (share, count) in shares.items())
    return f"{log} {verdict} of {found['seeds']} seeds ({points}; made on {found['cpu']}): {picture}"


def default_table(cells: dict) -> str:
    """Markdown: the scores of README's own commands, mean and range over seeds, chance, clips."""
    lines = ["| % | mean | lowest to highest seed | chance | clips |", "|---|---|---|---|---|"]
    for row, stage, key, label in (
            (DEFAULT, "stage1", "exo_em", "demonstrator, exo narration exact, after stage 1"),
            (DEFAULT, "stage2", "ego_em_init", "learner, ego narration exact, after Init"),
            (DEFAULT, "stage2", "ego_em", "... after stage 2"),
            (DEFAULT, "stage2", "ego_em_mean_F", "... with the mean of F(x) in the place of F(x)"),
            (DEFAULT, "stage3", "ego_em", "... after stage 3"),
            (f"{DEFAULT}, x only", "stage3", "ego_em", "... after stage 3, trained without F"),
            (DEFAULT, "stage3", "ego_verb", "the verb alone, after stage 3"),
            (DEFAULT, "stage3", "mcq_inter", "text to one of five clips, other scenes"),
            (DEFAULT, "stage3", "mcq_intra", "text to one of five clips, same scene"),
            (DEFAULT, "stage3", "qa", "questions"),
            (DEFAULT, "stage2", "transfer_top1", "own exo clip nearest to F(x), of 200 scenes"),
            (DEFAULT, "stage2", "transfer_x_top1", "... nearest to x as it is"),
            (DEFAULT, "stage2", "transfer_scene_top1", "own exo clip nearest to F(x), of a scene's five"),
            (DEFAULT, "stage2", "transfer_scene_x_top1", "... nearest to x as it is")):
        found = [cell["figures"][stage] for (name, _), cell in sorted(cells.items()) if name == row]
        values = [100 * figures[key] for figures in found]
        if values:
            lines.append(f"| {label} | {np.mean(values):.1f} | {min(values):.1f} to {max(values):.1f} | "
                         f"{100 * found[0][key + '_chance']:.1f} | {found[0][key + '_n']:,} |")
    return "\n".join(lines)


def transfer_table(cells: dict) -> str:
    """Markdown: what F(x) is nearest to, by row of the default world."""
    lines = ["| row | seeds | own clip first of 200 (chance 0.5) | median rank (chance 100.5) | first of a scene's five (chance 20) |", "|---|---|---|---|---|"]
    for name in (row for row in ROWS if row.startswith(DEFAULT)):
        found = [cell["figures"]["stage2"] for (row, _), cell in sorted(cells.items()) if row == name]
        found = [figures for figures in found if "transfer_top1" in figures]
        if found:
            columns = []
            for key in ("transfer_top1", "transfer_median_rank", "transfer_scene_top1"):
                values = [figures[key] * (1 if "rank" in key else 100) for figures in found]
                columns.append(f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else
                               f"{values[0]:.1f}" + (f" [{100 * found[0][key + '_lo']:.1f}, {100 * found[0][key + '_hi']:.1f}]" if "top1" in key else ""))
            lines.append(f"| {name} | {len(found)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def stages_table(cells: dict) -> str:
    """Markdown: the learner's ego narrations from Init on, and Table 5's logic: what each kind of data adds to x alone."""
    probes = {line["seed"]: line["narrations"] for line in recorded() if line.get("probe") == "full"}
    seeds = sorted(seed for seed in probes if ("full", seed) in cells and ("x only", seed) in cells)
    if not seeds:
        return "stage by stage: run.py --probes has not been run"

    def row(label, paper, of):
        values = [100 * unpack(of(seed)).mean() for seed in seeds]
        return f"| {label} | {paper} | {np.mean(values):.1f} | {', '.join(f'{v:.1f}' for v in values)} |"
    return "\n".join([
        f"| seeds {', '.join(map(str, seeds))} | paper | mean | each seed |", "|---|---|---|---|",
        row("no ego data: the exo encoder reads ego clips, after Init", 38.9, lambda s: probes[s]["exo encoder, after Init"]["outcomes"]),
        row("the same, exo encoder after stage 1", "", lambda s: probes[s]["exo encoder, after stage 1"]["outcomes"]),
        row("+ narrated ego clips: the learner after Init", 45.2, lambda s: probes[s]["learner, after Init"]["outcomes"]),
        row("+ pairs, x only: after stage 2", 47.8, lambda s: cells["x only", s]["outcomes"]["stage2"]),
        row("+ instruction data, x only: after stage 3", 49.7, lambda s: cells["x only", s]["outcomes"]["stage3"]),
        row("full, after stage 2", "", lambda s: cells["full", s]["outcomes"]["stage2"]),
        row("full, after stage 3", 55.6, lambda s: cells["full", s]["outcomes"]["stage3"]),
        row("full, a grey clip in the place of each", "", lambda s: probes[s]["blind, after stage 3"]["outcomes"])])


def inside(cells: dict) -> str:
    """What run.py --probes measured, mean over seeds."""
    lines = []
    for name in ("full", "no KL", "shuffled pairs"):
        found = [line for line in recorded() if line.get("probe") == name]
        if found:
            mean = {key: np.mean([line["features"][key] for line in found]) for key in found[0]["features"] if key != "KL"}
            mean |= {f"KL, {key}": np.mean([line["features"]["KL"][key] for line in found]) for key in found[0]["features"]["KL"]}
            lines.append(f"{name}, {len(found)} seeds: " + ", ".join(f"{key} {value:.3f}" for key, value in mean.items()))
        if found and name == "full":
            for at in ("start", "end"):
                norms = {key: np.mean([line["gradients"][at][key] for line in found]) for key in found[0]["gradients"][at]}
                lines.append(f"gradient norms, {at} of stage 2: " + ", ".join(f"{key} {value:.3f}" for key, value in norms.items()))
            qa = [100 * line["narrations"]["blind, after stage 3"]["qa"] for line in found]
            lines.append(f"questions answered about a grey clip: {np.mean(qa):.1f} %")
    return "\n".join(f"- {line}" for line in lines)


def sections(cells: dict, against: str = "full", names=ROWS) -> dict[str, str]:
    """Every table, by the name of its place in the page."""
    names = [name for name in names if name.split(" ")[0] not in SWEEPS]
    tables = {key: table(cells, against, [name for name in names if setting_of(name) == setting])
              for key, setting in (("core", ""), ("few narrations", SETTINGS[0]), ("more steps", SETTINGS[1]), ("default world", DEFAULT))}
    return tables | {
        "default scores": default_table(cells),
        "transfer": transfer_table(cells),
        "scores": scores_table(cells),
        "stages": stages_table(cells),
        "sweeps": sweep_table(cells),
        "inside": inside(cells),
        "cells": f"{len(cells)} cells, made by revisions {', '.join(sorted({cell['git'] for cell in cells.values()}))}."}


def scores_table(cells: dict) -> str:
    """Markdown: the other scores of `full`, and the two KLs of some rows."""
    lines = ["| what | mean | lowest to highest seed |", "|---|---|---|"]

    def add(label, values, form):
        if values:
            lines.append(f"| {label} | {np.mean(values):{form}} | {min(values):{form}} to {max(values):{form}} |")
    for stage, key, label in (("stage1", "exo_em", "the demonstrator itself, exo clips, after stage 1, %"),
                              ("stage3", "mcq_inter", "full: text to one of five clips, other scenes, %"),
                              ("stage3", "mcq_intra", "full: text to one of five clips, same scene, %"),
                              ("stage3", "qa", "full: questions, %")):
        add(label, [100 * cell["figures"][stage][key] for (row, _), cell in cells.items() if row == "full"], ".1f")
    for row in ("full", "no KL", "shuffled pairs", "full, 720 steps", "full, one in ten narrated", "shuffled pairs, one in ten narrated"):
        for key, words in (("kl_true", "true partners"), ("kl_shuffled", "shuffled partners")):
            add(f"{row}: KL of {words}, 600 validation clips", [c["figures"]["stage2"][key] for (r, _), c in cells.items() if r == row], ".3f")
    return "\n".join(lines)


def filled(page: str, found: dict[str, str]) -> str:
    """The page with each table between its two marks, <!-- table: NAME --> and <!-- end -->, made anew."""
    def place(match):
        return f"<!-- table: {match[1]} -->\n\n{found[match[1]]}\n\n<!-- end -->"
    return re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", place, page, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--against", choices=ROWS, default="full")
    parser.add_argument("--rows", nargs="*", choices=ROWS)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--figures", type=Path, metavar="DIR")
    parser.add_argument("--curves", type=Path, metavar="LOG")
    parser.add_argument("--make-curves", action="store_true")
    parser.add_argument("--out", type=Path, default=REPO / "out/study", help="of --make-curves: where run.py worked")
    args = parser.parse_args()
    if args.curves:
        print(compare_curves(args.curves))
        return
    if args.make_curves:
        make_curves(args.out.resolve())
        return
    cells = finished()
    if args.figures:
        print(*figures(cells, args.figures))
        return
    found = sections(cells, args.against, args.rows or list(ROWS))
    if args.page:
        PAGE.write_text(filled(PAGE.read_text(), found))
    else:
        print(*(f"## {name}\n{text}\n" for name, text in found.items()), sep="\n")


if __name__ == "__main__":
    main()
