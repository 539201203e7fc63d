"""Tables of the study from results.jsonl, as Markdown: the rows of each question beside their rival.

    python tests/study/report.py                            # all tables
    python tests/study/report.py --page                     # puts them into tests/study/README.md
    python tests/study/report.py --curves out/stage2/log.jsonl      # does my run look as it should?
    python tests/study/report.py --make-curves              # curves/, from the runs of `full` that are in out/study

compare.py says what an interval means; run.py has the questions, and what trains. Only cells that hold for the code as
it is enter a table.
"""
import argparse
import json
import re
from pathlib import Path

import numpy as np
from compare import FEWEST_SEEDS, t_quantile, table
from run import (
    ALL_TOLD,
    CPU,
    FEW_TOLD,
    QUESTIONS,
    REPO,
    ROWS,
    SEARCH_SEED,
    SEEDS,
    SHORT_LIST,
    Cell,
    finished,
    places,
    recorded,
    valid_code,
)
from target import records, target_table

CURVES = Path(__file__).with_name("curves")
PAGE = Path(__file__).with_name("README.md")
# Steps between points; a point is the mean of the steps since the last.
EVERY = 5


# --------------------------------------------------------------------------------------------------------- the tables
def filled_or_not(lines: list[str], empty="No row has a seed in common with its rival yet.") -> str:
    """A table, or a sentence where it has a head and no row yet."""
    return "\n".join(lines) if len(lines) > 2 else empty


def unpack(outcomes: str) -> np.ndarray:
    """One 0 or 1 per test clip, of what run.pack wrote."""
    return np.array([int(bit) for bit in f"{int(outcomes, 16):b}"[1:]])


def figures_of(cells: dict, row: str, setting: str, stage: str) -> list[dict]:
    """The figures of a row after a stage, seed by seed."""
    return [line["figures"][stage] for cell, line in sorted(cells.items()) if cell[:2] == (row, setting)]


def question_table(cells: dict, key: str) -> str:
    """Markdown: the answer to a question, one table per setting, and which revisions made it."""
    question, parts = QUESTIONS[key], []
    for setting in question.settings:
        named = (question.rival, *question.rows)
        made = [line for cell, line in cells.items() if cell.setting == setting and cell.row in named]
        text = "No cell yet."
        if made:
            lines = table(cells, question.rival, question.rows, setting).splitlines()
            text = f"{makers(made)}\n\n{filled_or_not(lines)}"
        parts.append(f"**{setting.capitalize()}.** {text}")
    return "\n\n".join(parts)


def makers(lines: list[dict]) -> str:
    """Which revisions made these cells, on which kinds of CPU."""
    revisions = ", ".join(sorted({line["git"] for line in lines}))
    kinds = ", ".join(sorted({line["cpu"] for line in lines}))
    return f"{len(lines)} cells of revision {revisions} on {kinds}."


def default_table(cells: dict) -> str:
    """Markdown: the scores of README's own commands, mean and range over seeds, chance, clips."""
    lines = ["| % | mean | lowest to highest seed | seeds | chance | clips |", "|---|---|---|---|---|---|"]
    for row, stage, key, label in (
            ("full", "stage1", "exo_em", "demonstrator, exo narration exact, after stage 1"),
            ("full", "stage2", "ego_em_init", "learner, ego narration exact, after Init"),
            ("full", "stage2", "ego_em", "... after stage 2"),
            ("full", "stage2", "ego_em_mean_F", "... with the mean of F(x) in the place of F(x)"),
            ("full", "stage3", "ego_em", "... after stage 3"),
            ("x only", "stage3", "ego_em", "... after stage 3, trained without F"),
            ("full", "stage3", "ego_verb", "the verb alone, after stage 3"),
            ("full", "stage3", "mcq_inter", "text to one of five clips, other scenes"),
            ("full", "stage3", "mcq_intra", "text to one of five clips, same scene"),
            ("full", "stage3", "qa", "questions"),
            ("full", "stage2", "transfer_top1", "own exo clip nearest to F(x), of 200 scenes"),
            ("full", "stage2", "transfer_x_top1", "... nearest to x as it is"),
            ("full", "stage2", "transfer_scene_top1", "own exo clip nearest to F(x), of a scene's five"),
            ("full", "stage2", "transfer_scene_x_top1", "... nearest to x as it is")):
        found = figures_of(cells, row, ALL_TOLD, stage)
        values = [100 * figures[key] for figures in found]
        if values:
            spread = f"{min(values):.1f} to {max(values):.1f}"
            lines.append(f"| {label} | {np.mean(values):.1f} | {spread} | {len(values)} | "
                         f"{100 * found[0][key + '_chance']:.1f} | {found[0][key + '_n']:,} |")
    return filled_or_not(lines)


def cycle_table(cells: dict) -> str:
    """Markdown: where the cycle's loss begins and ends, beside what the best constant gets. It has learned where it
    ends well below the constant: a row whose mean over seeds is above three quarters of it "did not learn". That mark is
    for both directions together: one alone is not judged by it."""
    lines = ["| row | setting | seeds | best constant | first step | last 20 steps | share of the constant | |",
             "|---|---|---|---|---|---|---|---|"]
    for setting in (ALL_TOLD, FEW_TOLD):
        for row in ROWS:
            found = [line["cycle"] for cell, line in sorted(cells.items()) if cell[:2] == (row, setting)]
            found = [cycle for cycle in found if cycle.get("constant")]
            if found:
                mean = {key: np.mean([cycle[key] for cycle in found]) for key in ("constant", "first", "last")}
                share = mean["last"] / mean["constant"]
                verdict = "learned" if share < 0.75 else "did not learn"
                if "--forward-cycle-only" in ROWS[row].stage2:
                    verdict = "one direction"
                values = " | ".join(f"{value:.3f}" for value in mean.values())
                lines.append(f"| {row} | {setting} | {len(found)} | {values} | {share:.2f} | {verdict} |")
    return filled_or_not(lines)


def search_table(cells: dict) -> str:
    """Markdown: exact ego narrations after stage 2 of each candidate of the search, %."""
    changes = list(dict.fromkeys(change for _, changes in SHORT_LIST.values() for change in changes))
    lines = [f"| {FEW_TOLD}, seed {SEARCH_SEED} | {' | '.join(changes)} |", "|---" * (1 + len(changes)) + "|"]
    for row in SHORT_LIST:
        found = [cells.get(Cell(f"{row}, {change}", FEW_TOLD, SEARCH_SEED)) for change in changes]
        scores = [f"{100 * line['figures']['stage2']['ego_em']:.1f}" if line else "" for line in found]
        if any(scores):
            lines.append(f"| {row} | {' | '.join(scores)} |")
    return filled_or_not(lines, "No candidate has run yet.")


def scores_table(cells: dict) -> str:
    """Markdown: the other scores of `full`, and the two KLs of some rows."""
    lines = ["| what | setting | mean | lowest to highest seed |", "|---|---|---|---|"]

    def add(label, setting, values, form):
        if values:
            spread = f"{min(values):{form}} to {max(values):{form}}"
            lines.append(f"| {label} | {setting} | {np.mean(values):{form}} | {spread} |")
    for setting in (ALL_TOLD, FEW_TOLD):
        for stage, key, label in (("stage1", "exo_em", "the demonstrator itself, exo clips, after stage 1, %"),
                                  ("stage3", "mcq_inter", "full: text to one of five clips, other scenes, %"),
                                  ("stage3", "mcq_intra", "full: text to one of five clips, same scene, %"),
                                  ("stage3", "qa", "full: questions, %")):
            add(label, setting, [100 * figures[key] for figures in figures_of(cells, "full", setting, stage)], ".1f")
        for row in ("full", "no KL, no cycle", "no KL", "shuffled pairs"):
            for key, words in (("kl_true", "true partners"), ("kl_shuffled", "shuffled partners")):
                found = [figures[key] for figures in figures_of(cells, row, setting, "stage2")]
                add(f"{row}: KL of {words}, 600 validation clips", setting, found, ".3f")
    return filled_or_not(lines)


def probed(row: str) -> dict[int, dict]:
    """What run.py --probes found in a row, by seed: the last line of each."""
    valid = valid_code()
    return {line["seed"]: line for line in recorded() if line.get("probe") == row and line["code"] in valid}


def stages_table(cells: dict) -> str:
    """Markdown: the learner's ego narrations from Init on: what each kind of data adds to x alone."""
    probes = {seed: line["narrations"] for seed, line in probed("full").items()}
    seeds = sorted(seed for seed in probes if all(Cell(row, ALL_TOLD, seed) in cells for row in ("full", "x only")))
    if not seeds:
        return "Stage by stage: run.py --probes has not been run."

    def row(label, of):
        values = [100 * unpack(of(seed)).mean() for seed in seeds]
        return f"| {label} | {np.mean(values):.1f} | {', '.join(f'{v:.1f}' for v in values)} |"

    def outcomes(name, stage):
        return lambda seed: cells[name, ALL_TOLD, seed]["outcomes"][stage]

    def looked(name):
        return lambda seed: probes[seed][name]["outcomes"]
    return "\n".join([
        f"| seeds {', '.join(map(str, seeds))} | mean | each seed |", "|---|---|---|",
        row("no ego data: the exo encoder reads ego clips, after Init", looked("exo encoder, after Init")),
        row("the same, exo encoder after stage 1", looked("exo encoder, after stage 1")),
        row("+ narrated ego clips: the learner after Init", looked("learner, after Init")),
        row("+ pairs, x only: after stage 2", outcomes("x only", "stage2")),
        row("+ instruction data, x only: after stage 3", outcomes("x only", "stage3")),
        row("full, after stage 2", outcomes("full", "stage2")),
        row("full, after stage 3", outcomes("full", "stage3")),
        row("full, a grey clip in the place of each", looked("blind, after stage 3"))])


def mean_of(figures: list[dict]) -> dict:
    """The mean of each number over several dicts of the same keys; what is no number is left out."""
    numbers = [key for key, value in figures[0].items() if isinstance(value, float)]
    return {key: np.mean([one[key] for one in figures]) for key in numbers}


def listed(figures: dict) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in figures.items())


def inside() -> str:
    """What run.py --probes measured, mean over seeds."""
    lines = []
    for name in ("full", "no KL", "shuffled pairs"):
        found = list(probed(name).values())
        if found:
            mean = mean_of([line["features"] for line in found])
            mean |= {f"KL, {key}": value for key, value in mean_of([line["features"]["KL"] for line in found]).items()}
            lines.append(f"{name}, {len(found)} seeds: {listed(mean)}")
        if found and name == "full":
            for at in ("start", "end"):
                norms = mean_of([line["gradients"][at] for line in found])
                lines.append(f"gradient norms, {at} of stage 2: {listed(norms)}")
            qa = [100 * line["narrations"]["blind, after stage 3"]["qa"] for line in found]
            lines.append(f"questions answered about a grey clip: {np.mean(qa):.1f} %")
    return "\n".join(f"- {line}" for line in lines) or "Not looked at yet: run.py --probes has not been run."


def sections(cells: dict) -> dict[str, str]:
    """Every table, by the name of its place in the page."""
    tables = {f"question {key}": question_table(cells, key) for key in QUESTIONS}
    return tables | {
        "default scores": default_table(cells),
        "cycle": cycle_table(cells),
        "search": search_table(cells),
        "target": filled_or_not(target_table(records()).splitlines(), "No row yet."),
        "scores": scores_table(cells),
        "stages": stages_table(cells),
        "inside": inside(),
        "cells": makers(list(cells.values())) if cells else "No cell yet."}


def filled(page: str, found: dict[str, str]) -> str:
    """The page with each table between its two marks, <!-- table: NAME --> and <!-- end -->, made anew."""
    def place(match):
        return f"<!-- table: {match[1]} -->\n\n{found[match[1]]}\n\n<!-- end -->"
    return re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", place, page, flags=re.S)


# ---------------------------------------------------------------------------------- does my run look as it should?
def read_curves(log: Path) -> dict[str, list[float]]:
    """Each loss term of a log.jsonl, as means over EVERY steps. Stage 0 has its four rows one after another."""
    terms = {}
    for row in map(json.loads, log.read_text().splitlines()):
        for term in ("vtg", "kl", "ccl", "image_text"):
            if term in row:
                # A term that a row of stage 0 lacks is not a number there, and neither is the point.
                values = terms.setdefault(term, [])
                values += [np.nan] * (row["step"] - 1 - len(values)) + [row[term]]
    return {term: [float(np.mean(values[i:i + EVERY])) for i in range(0, len(values) - EVERY + 1, EVERY)]
            for term, values in terms.items()}


def make_curves(out: Path):
    """curves/curves.json and curves.png of the default world: mean and spread of the seeds that are there, and the
    first of them itself."""
    folders = [places(ROWS["full"], ALL_TOLD, seed, out)[1] for seed in SEEDS]
    folders = [stages for stages in folders if (stages[3] / "eval.json").is_file()]
    if len(folders) < FEWEST_SEEDS:
        raise SystemExit(f"{out} has {len(folders)} finished runs of full, a band needs {FEWEST_SEEDS} seeds")
    stages = {}
    for stage in range(4):
        runs = [read_curves(folder[stage] / "log.jsonl") for folder in folders]
        stages[f"stage{stage}"] = {
            term: {key: [float(f"{value:.4g}") for value in values] for key, values in (
                ("seed 0", runs[0][term]),
                ("mean", np.mean([run[term] for run in runs], axis=0)),
                ("sd", np.std([run[term] for run in runs], axis=0, ddof=1)))}
            for term in runs[0]}
    # A point that is not a number (stage 0) is null.
    text = json.dumps(dict(cpu=CPU, threads=1, every=EVERY, seeds=len(folders), stages=stages)).replace("NaN", "null")
    CURVES.mkdir(exist_ok=True)
    (CURVES / "curves.json").write_text(text.replace('"stage', '\n"stage') + "\n")
    draw_curves(CURVES / "curves.png", {})


def reference_curves() -> dict:
    """What is in curves.json, numbers as arrays. `low` and `high` hold a new seed's point 95 times in 100: the mean of n
    seeds -+ t(n - 1) sd sqrt(1 + 1/n)."""
    if not (CURVES / "curves.json").is_file():
        raise SystemExit(f"{CURVES} is not made yet: report.py --make-curves, from three seeds of full")
    found = json.loads((CURVES / "curves.json").read_text())
    factor = t_quantile(found["seeds"] - 1) * (1 + 1 / found["seeds"]) ** 0.5
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
    lines = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(3.6 * columns, 2.8 * lines), layout="constrained",
                                   squeeze=False)
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
    """One line: which share of the points of each term lies in the band. Points that follow one another go together, so
    a good run may well have fewer than 95 of 100; under 70 it is said to leave the band."""
    stage = log.resolve().parent.name
    found = reference_curves()
    if stage not in found["stages"]:
        raise SystemExit(f"{log}: its folder is not named as one of {', '.join(found['stages'])}, "
                         f"so there is nothing to compare with")
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--curves", type=Path, metavar="LOG")
    parser.add_argument("--make-curves", action="store_true")
    parser.add_argument("--out", type=Path, default=REPO / "out/study", help="of --make-curves: where run.py worked")
    args = parser.parse_args()
    if args.curves:
        return print(compare_curves(args.curves))
    if args.make_curves:
        return make_curves(args.out.resolve())
    cells = finished()
    found = sections(cells)
    if args.page:
        if not cells:
            raise SystemExit("no cell holds for this code, and the page's tables would be emptied: run.py --verify full")
        PAGE.write_text(filled(PAGE.read_text(), found))
    else:
        print(*(f"## {name}\n{text}\n" for name, text in found.items()), sep="\n")


if __name__ == "__main__":
    main()
