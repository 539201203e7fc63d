"""The study: which part of Exo2Ego matters, in a micro-world whose truth is known.

    python tests/study/run.py --quick                       # one seed of the rows that decide
    python tests/study/run.py --core --minutes 90           # all rows, five seeds; stops in time, goes on when called again
    python tests/study/run.py --sweep pairs --minutes 60    # ego | pairs | noise | views
    python tests/study/run.py --verify                      # after a change of code: are the numbers still the same?

It only calls data.py and train.py as a user would. A cell is (row, seed): its world, stages 0 to 3 and both
benchmarks; stages that cells share are trained once. Every finished cell is one line of results.jsonl, with the
outcome of every test clip, so that report.py can compare rows clip by clip. A cell that is there is not run again
while the code is the same, or was shown by --verify to give the same numbers.
"""
import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPO = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.jsonl")
SEEDS = range(5)


@dataclass(frozen=True)
class Row:
    """Flags that a row adds to data.py toy and to the stages."""
    world: str = ""
    stage1: str = ""
    stage2: str = ""
    stage3: str = ""


ROWS = {
    "full": Row(),
    # the paper's Table 3
    "no LoRA": Row(stage3="--no-lora"),
    "forward cycle only": Row(stage2="--forward-cycle-only"),
    "no G, no cycle": Row(stage2="--no-cycle"),
    "no KL": Row(stage2="--no-kl"),
    "MLP instead of ResNet blocks": Row(stage2="--mapping mlp"),
    # our controls
    "x only": Row(stage2="--no-mapping"),
    "shuffled pairs": Row(stage2="--shuffle-pairs"),
    "capacity: F without KL and cycle": Row(stage2="--no-kl --no-cycle"),
    "without stage 1": Row(stage1="--steps 1 --lr 1e-9"),
    # open points
    "contrastive": Row(stage2="--contrastive 0.1"),
    "KL on the patch grid": Row(stage2="--kl-space vit"),
    "temperature 0.5": Row(stage2="--kl-temperature 0.5"),
    "temperature 2": Row(stage2="--kl-temperature 2"),
}
QUICK = ("full", "x only", "shuffled pairs", "no KL")
FEW = "--pairs 3000 --narrated 0.1"                     # much synchronized video, of which one moment in ten is told
for name in QUICK:
    ROWS[f"{name}, one in ten narrated"] = Row(world=FEW, stage2=ROWS[name].stage2)
SWEEPS = {                      # knob of the world: its values; each with F and without
    "ego": [("--ego", v) for v in (250, 1000, 4000)], "pairs": [("--pairs", v) for v in (300, 1200, 4800)],
    "noise": [("--noise", v) for v in (0, 1, 2)], "views": [("--exo-cams", v) for v in (1, 2, 4)]}
for sweep, knobs in SWEEPS.items():
    for flag, value in knobs:
        ROWS[f"{sweep} {value}"] = Row(world=f"{flag} {value}")
        ROWS[f"{sweep} {value}, x only"] = Row(world=f"{flag} {value}", stage2="--no-mapping")

locks, guard = {}, threading.Lock()


@cache
def code_hash() -> str:
    """Of the four files as the machine sees them, when this process began: comments and docstrings do not count."""
    digest = hashlib.sha256()
    for name in ("model.py", "data.py", "train.py", "eval.py"):
        tree = ast.parse((REPO / name).read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                body[0].value.value = ""
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def command(folder: Path, *words) -> Path:
    """Run one command, its output in folder.log; a second caller of the same folder waits for the first."""
    with guard:
        lock = locks.setdefault(folder, threading.Lock())
    with lock:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "a") as log:
            done = subprocess.run([sys.executable, *map(str, words)], cwd=REPO, stdout=log, stderr=log,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, words))} failed: see {folder}.log")
    return folder


def run_cell(name: str, seed: int, out: Path) -> dict:
    """World, stages and scores of one row at one seed; whatever is there already is not made again."""
    row, began = ROWS[name], time.time()
    label = hashlib.sha256(row.world.encode()).hexdigest()[:8] if row.world else "default"
    root = out / code_hash() / f"seed{seed}" / label
    world = command(root / "toy", "data.py", "toy", "--out", root / "toy", "--seed", seed, *row.world.split())
    if {*row.world.split()} & {"--corpus", "--ego", "--noise", "--fov", "--scale"}:     # stage 0 sees these
        base = command(root / "stage0", "train.py", "--stage", 0, "--data", world, "--out", root / "stage0", "--seed", seed)
    else:
        plain = root.with_name("default")
        toy = command(plain / "toy", "data.py", "toy", "--out", plain / "toy", "--seed", seed)
        base = command(plain / "stage0", "train.py", "--stage", 0, "--data", toy, "--out", plain / "stage0", "--seed", seed)
    previous, flags, figures, outcomes = base, "", {}, {}
    for stage in (1, 2, 3):
        flags += getattr(row, f"stage{stage}") + "|"
        folder = root / f"stage{stage}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
        previous = command(folder, "train.py", "--stage", stage, "--data", world, "--base", base, "--init", previous,
                           "--out", folder, "--seed", seed, *getattr(row, f"stage{stage}").split())
        figures[f"stage{stage}"] = json.loads((folder / "eval.json").read_text())
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        right = "".join(str(int(r["said"] == r["text"])) for r in rows)
        outcomes[f"stage{stage}"] = f"{int('1' + right, 2):x}"  # a leading 1, then one bit a clip
    state = json.loads(next(previous.glob("step_*/state.json")).read_text())    # it knows the revision that trained it
    return dict(row=name, seed=seed, flags=vars(row), code=code_hash(), git=state["git"], seconds=round(time.time() - began),
                figures=figures, outcomes=outcomes)


def recorded() -> list[dict]:
    """All lines of results.jsonl: cells, and what --verify found."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def finished() -> dict[tuple[str, int], dict]:
    """Cells of results.jsonl that hold for this code: made by it, or by code that --verify found equal."""
    lines, valid = recorded(), {code_hash()}
    for line in reversed(lines):
        if line.get("verified") in valid:
            valid.add(line["same_as"])
    return {(line["row"], line["seed"]): line for line in lines if "row" in line and line["code"] in valid}


def append(line: dict):
    """One object, whole, at the end of results.jsonl."""
    with guard, open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


def verify(out: Path):
    """Run the latest cell again with the code as it is: equal to the digit, and all older cells hold."""
    old = [line for line in recorded() if "row" in line][-1]
    new = run_cell(old["row"], old["seed"], out)
    if new["figures"] != old["figures"] or new["outcomes"] != old["outcomes"]:
        raise SystemExit(f"{old['row']}, seed {old['seed']}: the numbers changed; the cells of code {old['code']} are void")
    if (old["row"], old["seed"]) not in finished():
        append(dict(verified=new["code"], same_as=old["code"], by=[old["row"], old["seed"]]))
    print(f"{old['row']}, seed {old['seed']}: equal to the digit")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true")
    what.add_argument("--core", action="store_true")
    what.add_argument("--sweep", choices=SWEEPS)
    what.add_argument("--verify", action="store_true")
    parser.add_argument("--minutes", type=float, default=90, help="no cell is started that would end later")
    parser.add_argument("--seeds", type=int, nargs="*", default=None, help="of 0 1 2 3 4")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=None)
    parser.add_argument("--out", type=Path, default=REPO / "out/study")
    args = parser.parse_args()
    if args.verify:
        return verify(args.out.resolve())
    sweeps = [name for name in ROWS if name.split(" ")[0] in SWEEPS]
    names = args.rows or (QUICK if args.quick else [n for n in ROWS if n not in sweeps] if args.core else
                          [n for n in sweeps if n.startswith(f"{args.sweep} ")])
    seeds = args.seeds if args.seeds is not None else [0] if args.quick else SEEDS
    there = finished()
    cells = [(name, seed) for seed in seeds for name in names if (name, seed) not in there]
    print(f"code {code_hash()}: {len(names) * len(seeds) - len(cells)} cells are there, {len(cells)} to run", flush=True)
    began, taken = time.time(), []                          # seconds of each finished cell

    def work(cell):
        if time.time() - began + max(taken, default=0) > args.minutes * 60:
            return
        line = run_cell(*cell, args.out.resolve())
        append(line)
        taken.append(line["seconds"])
        each = (time.time() - began) / len(taken)
        print(f"{len(taken)}/{len(cells)} {line['row']}, seed {line['seed']}: stage 2 {line['figures']['stage2']['ego_em']:.3f}, stage 3 "
              f"{line['figures']['stage3']['ego_em']:.3f} ({line['seconds']} s; all done in {(len(cells) - len(taken)) * each / 60:.0f} min)",
              flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:            # one thread a process, a process a core
        list(pool.map(work, cells))


if __name__ == "__main__":
    main()
