"""Plant bugs in the kernels, one at a time, and see whether the interpreter suite notices.

    pytest tests/kernels/mutants.py             # three of them, and none
    python tests/kernels/mutants.py             # all: some minutes; one line per bug, exits 1 if one survives
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
MUTANTS = {     # bug: (code, what it becomes, how often the code occurs)
    "accumulator not rescaled": ("acc * alpha[:, None]", "acc", 1),
    "sum not rescaled": ("l * alpha + tl.sum(p, 1)", "l + tl.sum(p, 1)", 1),
    "causal: own key hidden": ("seen & (j <= i)", "seen & (j < i)", 1),
    "causal: next key seen": ("seen & (j <= i)", "seen & (j <= i + 1)", 1),
    "diagonal tiles unmasked": ("tl.maximum(first + 1, 0), lk)", "tl.maximum(first + BM, 0), lk)", 1),
    "ragged tail not masked": ("seen = j < lk", "seen = j >= 0", 1),
    "last keys never read": ("tl.minimum(lk, first + BM)", "tl.minimum(lk, first + BM - 1)", 1),
    "queries at the start of their keys": ("position = tile * BM + lk - lq", "position = tile * BM", 2),
    "heads share the wrong key": ("head // (heads // kv_heads), kv_heads", "head % kv_heads, kv_heads", 2),
    "window one too wide": ("seen & (j > i - window)", "seen & (j >= i - window)", 1),
    "window skips its first tile": ("tl.maximum(first - window + 1, 0)", "tl.maximum(first - window + BN, 0)", 1),
    "dkdv stops before the window's end": ("first + BN - 1 + window", "first + window", 1),
    "dkdv: diagonal unmasked": ("last = tl.maximum(first + BN - 1, 0)", "last = tl.maximum(first, 0)", 1),
    "dkdv: the last, ragged tile of queries forgotten": ("begin, end = whole_to, stop", "begin, end = stop, stop", 1),
    "dkdv: whole tiles forgotten": ("begin, end = whole_from, whole_to", "begin, end = whole_to, whole_to", 1),
    "delta of another row": ("tl.store(delta + at_row, delta_i", "tl.store(delta + at_row + 1, delta_i", 1),
    "dq without scale": ("dq_i = dq_i * scale", "dq_i = dq_i", 1),
    "dk without scale": ("dk_j = dk_j * scale", "dk_j = dk_j", 1),
    "dkdv without delta": (" - delta_i[None, :])", ")", 1),
    "a row without keys: no guard": ("finite = tl.where(m_new == float(\"-inf\"), 0.0, m_new)", "finite = m_new", 1),
    "a row without keys: lse of log 0": ("tl.where(l == 0.0, float(\"inf\"), m + tl.log2(some))", "m + tl.log2(some)", 1)}


# Of three kinds: a mask, a loop of the backward, a row without keys. pytest plants these (tests/test_kernels.py).
FEW = ("causal: next key seen", "dkdv: whole tiles forgotten", "a row without keys: lse of log 0")
FEW_CASES = "(small and dtype0 and queries) or one_query or edges"


def caught(code: str, change: str, count: int, cases: str = "") -> bool:
    """Whether the interpreter suite, or those of its tests that `cases` chooses (pytest -k), fails on the changed kernels."""
    source = (REPO / "model.py").read_text()
    assert source.count(code) == count, f"{code!r} occurs {source.count(code)} times in model.py, not {count}"
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "tests/kernels/interpreter.py"
        suite.parent.mkdir(parents=True)
        shutil.copy(REPO / "tests/kernels/interpreter.py", suite)
        shutil.copy(REPO / "tests/kernels/descriptors.py", suite.parent)
        for name in ("data.py", "eval.py", "train.py", "tests/bench.py", "tests/cases.py"):
            shutil.copy(REPO / name, folder)
        (Path(folder) / "model.py").write_text(source.replace(code, change))
        words = [sys.executable, "-m", "pytest", "-qx", suite, "-k", cases]
        run = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    # 1: a test failed. Below zero: the bug reached memory that is not the kernel's, and ended the process.
    assert run.returncode in (0, 1) or run.returncode < 0, f"the suite did not run:\n{run.stdout[-3000:]}"
    return run.returncode != 0


@pytest.mark.parametrize("bug", FEW)
def test_a_planted_bug_is_noticed(bug):
    assert caught(*MUTANTS[bug], FEW_CASES)


def test_without_a_bug_the_same_cases_pass():
    assert not caught("acc * alpha[:, None]", "acc * alpha[:, None]", 1, FEW_CASES)


def main():
    survivors = 0
    for bug, change in MUTANTS.items():
        found = caught(*change)
        survivors += not found
        print(f"{'caught' if found else 'MISSED'}  {bug}", flush=True)
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
