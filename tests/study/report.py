"""Tables of the study from results.jsonl, as Markdown: every row against another, clip by clip.

    python tests/study/report.py                            # all rows against "full"
    python tests/study/report.py --against "x only"

A difference is a mean over seeds and clips; its 95 % interval is a paired bootstrap that draws seeds, and clips within
a seed, with replacement (10,000 draws). A row is called better or worse only when the interval excludes zero.
"""
import argparse

import numpy as np
from run import ROWS, finished

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
    lines = [f"| row | paper | seeds | after stage 2 | {against} - row | after stage 3 | {against} - row |",
             "|---|---|---|---|---|---|---|"]
    for name in names:
        seeds = sorted(seed for row, seed in cells if row == name and (against, seed) in cells)
        if not seeds:
            continue
        columns = []
        for stage in ("stage2", "stage3"):
            own, other = ([outcomes(cells[row, seed], stage) for seed in seeds] for row in (name, against))
            columns.append(f"{100 * np.mean([o.mean() for o in own]):.1f}")
            mean, low, high = (100 * value for value in paired_bootstrap(other, own))
            verdict = "worse" if low > 0 else "better" if high < 0 else "no difference seen"
            columns.append("" if name == against else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {verdict}")
        lines.append(f"| {name} | {PAPER.get(name, '')} | {len(seeds)} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--against", choices=ROWS, default="full")
    parser.add_argument("--rows", nargs="*", choices=ROWS)
    args = parser.parse_args()
    cells = finished()
    print(table(cells, args.against, args.rows or list(ROWS)))
    print(f"\n{len(cells)} cells, revisions {sorted({cell['git'] for cell in cells.values()})}")


if __name__ == "__main__":
    main()
