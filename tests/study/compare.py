"""Rows beside a rival, and what a difference over a few training seeds can say: Student's t, Holm over a table.

The unit is the training seed. Every seed has its own world, its own weights and its own order of samples, and two rows
of one seed share all three. So the difference of two rows is one number per seed, and the spread of these numbers is
what another seed would bring. Test clips are no unit: there are two thousand of them, and they say little about the
next seed.
"""
from dataclasses import dataclass
from functools import cache

import numpy as np

LEVEL = 0.95
# A spread of two numbers is hardly known: below three seeds there is a mean and no verdict.
FEWEST_SEEDS = 3


@cache
def _t_table(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles and the share of |t| below sqrt(freedom) * tan(angle).

    With t = sqrt(freedom) * tan(angle), Student's density becomes cos(angle) ** (freedom - 1), on [0, pi / 2].
    """
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    share = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angles, share / share[-1]


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t below which |t| lies with probability `level`: at 95 % 12.706, 4.303, 3.182, 2.776 for 1 to 4 degrees of
    freedom."""
    angles, share = _t_table(freedom)
    return float(np.sqrt(freedom) * np.tan(np.interp(level, share, angles)))


def t_probability(freedom: int, t: float) -> float:
    """The two-sided p of a t: how often chance alone gives a larger |t|."""
    angles, share = _t_table(freedom)
    return 1 - float(np.interp(np.arctan(abs(t) / np.sqrt(freedom)), angles, share))


@dataclass(frozen=True)
class Comparison:
    """The difference of two rows over seeds. `low` and `high` are None where seeds are too few for an interval."""
    mean: float
    seeds: int
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """What the interval says of the first row: more, less, or nothing seen."""
        if self.low is None:
            return "too few seeds"
        if self.low > 0:
            return "more"
        return "less" if self.high < 0 else "no difference seen"


def t_interval(differences, level: float = LEVEL) -> Comparison:
    """The mean of per-seed differences and its t-interval at `level`."""
    d = np.asarray(differences, dtype=float)
    mean = float(d.mean())
    if len(d) < FEWEST_SEEDS:
        return Comparison(mean, len(d))
    half = t_quantile(len(d) - 1, level) * float(d.std(ddof=1)) / len(d) ** 0.5
    return Comparison(mean, len(d), mean - half, mean + half)


def p_value(differences) -> float:
    """The two-sided p of no difference. Seeds that all agree to the digit leave no doubt: 0, or 1 for no difference."""
    d = np.asarray(differences, dtype=float)
    error = float(d.std(ddof=1)) / len(d) ** 0.5
    if error == 0:
        return float(d.mean() == 0)
    return t_probability(len(d) - 1, float(d.mean()) / error)


def compare_table(differences: list) -> list[Comparison]:
    """One table: per-seed differences of each comparison -> the comparisons, with Holm's adjusted intervals.

    Holm: of m comparisons the smallest p is held against alpha / m, the next against alpha / (m - 1), and so on; the
    first that fails ends it, and all larger ones fail with it. Each interval is made at the level that its p was held
    against (those after the first failure at the level of the first), so it excludes zero exactly where Holm sees a
    difference. That is the decision, drawn; where several are rejected, the intervals of a family do not all hold
    together 95 times in 100. A comparison of too few seeds takes no part.
    """
    p = {i: p_value(d) for i, d in enumerate(differences) if len(d) >= FEWEST_SEEDS}
    found = [t_interval(d) for d in differences]
    left = len(p)                                               # comparisons that no smaller p has decided
    for i in sorted(p, key=p.get):
        alpha = (1 - LEVEL) / left
        found[i] = t_interval(differences[i], 1 - alpha)
        # After the first failure the level stays, and larger p fail with it.
        if p[i] <= alpha:
            left -= 1
    return found


# ------------------------------------------------------------------------------------------------- rows beside a rival
# Averages of the paper's Table 3, per cent.
PAPER = {
    "full": 55.6, "forward cycle only": 54.9, "FC blocks": 54.7, "no G, no cycle": 54.4, "no LoRA": 53.2, "no KL": 51.4}


def score(line: dict, stage: str) -> float:
    """The share of exact ego narrations after a stage, per cent."""
    return 100 * line["figures"][stage]["ego_em"]


def seeds_of(cells: dict, row: str, rival: str, setting: str) -> list[int]:
    """Seeds at which both rows are there, made on one kind of CPU: another kind rounds otherwise."""
    lines = {(row_, seed): line for (row_, setting_, seed), line in cells.items() if setting_ == setting}
    return sorted(seed for name, seed in lines if name == row and (rival, seed) in lines
                  and lines[row, seed]["cpu"] == lines[rival, seed]["cpu"])


def same_run(one: dict, other: dict, stage: str) -> bool:
    """Whether two cells share their run of a stage: then there is nothing to compare."""
    keys = ["variant", *(f"stage{i}" for i in range(1, int(stage[-1]) + 1))]
    return all(one["flags"][key] == other["flags"][key] for key in keys)


def comparisons(cells: dict, rival: str, rows, setting: str) -> dict[tuple[str, str], Comparison]:
    """row - rival of each row and stage that both have, in points: (row, stage) -> the comparison. All of one call are
    one table to Holm."""
    differences = {}
    for row in rows:
        seeds = seeds_of(cells, row, rival, setting)
        pairs = [(cells[row, setting, seed], cells[rival, setting, seed]) for seed in seeds]
        for stage in ("stage2", "stage3"):
            both_have_it = pairs and all(stage in line["figures"] for pair in pairs for line in pair)
            if both_have_it and not same_run(*pairs[0], stage):
                differences[row, stage] = [score(own, stage) - score(other, stage) for own, other in pairs]
    return dict(zip(differences, compare_table(list(differences.values()))))


def said(comparison: Comparison | None) -> str:
    """A comparison as a cell of a table."""
    if comparison is None:
        return ""
    if comparison.low is None:
        return f"{comparison.mean:+.1f}, too few seeds"
    return f"{comparison.mean:+.1f} [{comparison.low:+.1f}, {comparison.high:+.1f}] {comparison.verdict}"


def table(cells: dict, rival: str, rows, setting: str) -> str:
    """Markdown: exact ego narrations after stages 2 and 3 in per cent (mean over the seeds that a row shares with its
    rival), each row's difference from the rival, and how often the own exo clip of 200 is nearest to F(x). `cells` is
    what run.finished gives."""
    compared = comparisons(cells, rival, rows, setting)
    head = f"| row | paper | seeds | own clip nearest | after stage 2 | row - {rival} | after stage 3 | row - {rival} |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in (rival, *rows):
        seeds = seeds_of(cells, row, rival, setting)
        if not seeds:
            continue
        own = [cells[row, setting, seed] for seed in seeds]
        # A row without F has no nearest clip, the oracle no stage 3.
        figures = [line["figures"]["stage2"] for line in own]
        nearest = [found["transfer_top1"] for found in figures if "transfer_top1" in found]
        columns = [row, PAPER.get(row, ""), len(seeds), f"{100 * np.mean(nearest):.1f}" if nearest else ""]
        for stage in ("stage2", "stage3"):
            if stage not in own[0]["figures"]:
                columns += ["", ""]
                continue
            mean = np.mean([score(line, stage) for line in own])
            columns += [f"{mean:.1f}", said(compared.get((row, stage)))]
        lines.append("| " + " | ".join(map(str, columns)) + " |")
    family = sum(comparison.low is not None for comparison in compared.values())
    if family:
        lines += ["", f"A family of {family} differences."]
    return "\n".join(lines)
