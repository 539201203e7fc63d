"""Tables of the study from results.jsonl, as Markdown: every row against another, clip by clip.

    python tests/study/report.py                            # all rows against "full"
    python tests/study/report.py --against "x only"
    python tests/study/report.py --figures tests/assets     # sweep_*.png, one a knob that was swept

A difference is a mean over seeds and clips; its 95 % interval is a paired bootstrap that draws seeds, and clips within
a seed, with replacement (10,000 draws). A row is called better or worse only when the interval excludes zero; "beside
the paper" compares that, after stage 3, with the sign of the paper's difference. Rows of another setting (one narrated
pair in ten, 720 steps) are compared with the full row of that setting, the values of a sweep with and without F.
"""
import argparse
from pathlib import Path

import numpy as np
from run import ROWS, SWEEPS, finished, recorded

SETTINGS = (", one in ten narrated", ", 720 steps")

KNOBS = {"ego": "narrated ego clips in Init (seen by both)", "pairs": "synchronized, narrated pairs",
         "noise": "motion and light of the head camera (1: default)", "views": "exo cameras of a pair"}

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


def table(cells: dict, against: str, names: list[str]) -> str:
    """Markdown: exact match after stages 2 and 3 (mean of seeds), difference of `against` and the row, verdict."""
    lines = [f"| row | paper | seeds | after stage 2 | {against} - row | after stage 3 | {against} - row | beside the paper |",
             "|---|---|---|---|---|---|---|---|"]
    for name in names:
        rival = against + next((setting for setting in SETTINGS if name.endswith(setting)), "")
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
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--against", choices=ROWS, default="full")
    parser.add_argument("--rows", nargs="*", choices=ROWS)
    parser.add_argument("--figures", type=Path, metavar="DIR")
    args = parser.parse_args()
    cells = finished()
    if args.figures:
        print(*figures(cells, args.figures))
        return
    rows = args.rows or [name for name in ROWS if name.split(" ")[0] not in SWEEPS]
    for setting in ("", *SETTINGS):
        ours = [name for name in rows if next((s for s in SETTINGS if name.endswith(s)), "") == setting]
        print(f"{table(cells, args.against, ours)}\n")
    print(f"{stages_table(cells)}\n\n{sweep_table(cells)}\n\n{inside(cells)}\n")
    for stage, key, what in (("stage1", "exo_em", "the demonstrator itself, on exo clips, after stage 1"),
                             ("stage3", "mcq_inter", "full, text to clip, inter"), ("stage3", "mcq_intra", "full, text to clip, intra"),
                             ("stage3", "qa", "full, questions")):
        values = [100 * cell["figures"][stage][key] for (row, _), cell in cells.items() if row == "full"]
        if values:
            print(f"{what}: {np.mean(values):.1f} (seeds {', '.join(f'{v:.1f}' for v in sorted(values))})")
    for row in ("full", "no KL", "shuffled pairs", "full, 720 steps", "full, one in ten narrated", "shuffled pairs, one in ten narrated"):
        kl = [(c["figures"]["stage2"]["kl_true"], c["figures"]["stage2"]["kl_shuffled"]) for (r, _), c in cells.items() if r == row]
        if kl:
            print(f"{row}: KL of true partners {np.mean([a for a, _ in kl]):.3f}, of shuffled ones {np.mean([b for _, b in kl]):.3f}")
    print(f"\n{len(cells)} cells, revisions {sorted({cell['git'] for cell in cells.values()})}")


if __name__ == "__main__":
    main()
