"""Tables of the study from results.jsonl, as Markdown: every row against another, clip by clip.

    python tests/study/report.py                            # all rows against "full"
    python tests/study/report.py --against "x only"
    python tests/study/report.py --figures tests/assets     # sweep_*.png, one a knob that was swept

A difference is a mean over seeds and clips; its 95 % interval is a paired bootstrap that draws seeds, and clips within
a seed, with replacement (10,000 draws). A row is called better or worse only when the interval excludes zero; "beside
the paper" compares that, after stage 3, with the sign of the paper's difference. The rows whose world has one narrated
pair in ten are compared with the full row of that world.
"""
import argparse
from pathlib import Path

import numpy as np
from run import ROWS, SWEEPS, finished

KNOBS = {"ego": "narrated ego clips in Init (seen by both)", "pairs": "synchronized, narrated pairs",
         "noise": "motion and light of the head camera (1: default)", "views": "exo cameras of a pair"}

PAPER = {   # averages of its Tables 3 and 5 (x only: the same data without Exo2Ego), percent
    "full": 55.6, "forward cycle only": 54.9, "MLP instead of ResNet blocks": 54.7, "no G, no cycle": 54.4, "no KL": 51.4,
    "no LoRA": 53.2, "x only": 49.7}


def outcomes(cell: dict, stage: str) -> np.ndarray:
    """One 0 or 1 a test clip."""
    return np.array([int(bit) for bit in f"{int(cell['outcomes'][stage], 16):b}"[1:]])


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
        rival = against + name[name.find(", one in ten"):] * (", one in ten" in name)
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


def figures(cells: dict, folder: Path) -> list[Path]:
    """One picture a sweep: exact match after stage 3 over the knob's values, with F and without, seeds as points."""
    from matplotlib import pyplot
    made = []
    for sweep, knobs in SWEEPS.items():
        figure, axes = pyplot.subplots(figsize=(4.2, 3), layout="constrained")
        for ending, ink, label in (("", "tab:blue", "full"), (", x only", "tab:gray", "x only")):
            points = [(value, 100 * outcomes(cell, "stage3").mean()) for _, value in knobs
                      for (row, _), cell in cells.items() if row == f"{sweep} {value}{ending}"]
            if points:
                xs = sorted({x for x, _ in points})
                axes.plot(*zip(*points), "o", color=ink, alpha=0.5)
                axes.plot(xs, [np.mean([y for x, y in points if x == at]) for at in xs], color=ink, label=label)
        if axes.lines:
            seeds = max(sum(row == f"{sweep} {value}" for row, _ in cells) for _, value in knobs)
            axes.set(xlabel=KNOBS[sweep], ylabel="exact match after stage 3, %", ylim=(0, None), title=f"{seeds} seed(s), 2,000 clips")
            if sweep in ("ego", "pairs"):
                axes.set_xscale("log")
            axes.legend()
            made.append(folder / f"sweep_{sweep}.png")
            figure.savefig(made[-1], dpi=110)
        pyplot.close(figure)
    return made


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
    print(table(cells, args.against, args.rows or list(ROWS)))
    for stage, key, what in (("stage1", "exo_em", "the demonstrator itself, on exo clips, after stage 1"),
                             ("stage3", "mcq_inter", "full, text to clip, inter"), ("stage3", "mcq_intra", "full, text to clip, intra"),
                             ("stage3", "qa", "full, questions")):
        values = [100 * cell["figures"][stage][key] for (row, _), cell in cells.items() if row == "full"]
        if values:
            print(f"{what}: {np.mean(values):.1f} (seeds {', '.join(f'{v:.1f}' for v in sorted(values))})")
    for row in ("full", "no KL", "shuffled pairs", "full, one in ten narrated", "shuffled pairs, one in ten narrated"):
        kl = [(c["figures"]["stage2"]["kl_true"], c["figures"]["stage2"]["kl_shuffled"]) for (r, _), c in cells.items() if r == row]
        if kl:
            print(f"{row}: KL of true partners {np.mean([a for a, _ in kl]):.3f}, of shuffled ones {np.mean([b for _, b in kl]):.3f}")
    print(f"\n{len(cells)} cells, revisions {sorted({cell['git'] for cell in cells.values()})}")


if __name__ == "__main__":
    main()
