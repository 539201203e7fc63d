"""Plant bugs in the kernels, one at a time, and see whether the interpreter suite notices.

    python tests/kernels/mutants.py             # some minutes; prints one line a bug, exits 1 if one survives
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
    "dkdv: the last, ragged tile of queries forgotten": ("begin, end = whole, hi", "begin, end = whole, whole", 1),
    "dkdv: whole tiles forgotten": ("begin, end = full, whole", "begin, end = full, full", 1),
    "delta of another row": ("tl.store(delta + at_row, delta_i", "tl.store(delta + at_row + 1, delta_i", 1),
    "dq without scale": ("dq_i = dq_i * scale", "dq_i = dq_i", 1),
    "dk without scale": ("dk_j = dk_j * scale", "dk_j = dk_j", 1),
    "dkdv without delta": (" - delta_i[None, :])", ")", 1),
    "a row without keys: no guard": ("finite = tl.where(m_new == float(\"-inf\"), 0.0, m_new)", "finite = m_new", 1),
    "a row without keys: lse of log 0": ("tl.where(l == 0.0, float(\"inf\"), m + tl.log2(some))", "m + tl.log2(some)", 1)}


def caught(code: str, change: str, count: int) -> bool:
    source = (REPO / "model.py").read_text()
    assert source.count(code) == count, f"{code!r} occurs {source.count(code)} times"
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "tests/kernels/interpreter.py"
        suite.parent.mkdir(parents=True)
        shutil.copy(REPO / "tests/kernels/interpreter.py", suite)
        for name in ("data.py", "eval.py", "train.py", "tests/bench.py", "tests/cases.py"):
            shutil.copy(REPO / name, folder)
        (Path(folder) / "model.py").write_text(source.replace(code, change))
        run = subprocess.run([sys.executable, "-m", "pytest", "-qx", suite], capture_output=True, cwd=folder)
        return run.returncode != 0


if __name__ == "__main__":
    survivors = 0
    for bug, change in MUTANTS.items():
        found = caught(*change)
        survivors += not found
        print(f"{'caught' if found else 'MISSED'}  {bug}", flush=True)
    sys.exit(survivors > 0)
