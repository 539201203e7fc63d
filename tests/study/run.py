"""The study: which part of Exo2Ego matters, in a micro-world whose truth is known.

    python tests/study/run.py --quick                       # one seed of the rows that decide
    python tests/study/run.py --core --minutes 90           # all rows, five seeds; stops in time, goes on when called again
    python tests/study/run.py --sweep pairs --minutes 60    # ego | pairs | noise | views
    python tests/study/run.py --probes                      # what is inside the models that are still cached
    python tests/study/run.py --verify --row full           # after a change of code: are the numbers still the same?

It only calls data.py and train.py as a user would. A cell is (row, seed): its world, stages 0 to 3 and both
benchmarks; stages that cells share are trained once. Every finished cell is one line of results.jsonl, with the
outcome of every test clip, so that report.py can compare rows clip by clip. A cell that is there is not run again
while the code is the same, or was shown by --verify to give the same numbers (on one kind of CPU: others round otherwise).
"""
import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

REPO = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.jsonl")
SEEDS = range(5)
CPU = torch.backends.cpu.get_cpu_capability()           # AVX2, AVX512: kernels round differently, so numbers equal to the digit need the same


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
    ROWS[f"{name}, 720 steps"] = Row(stage2=f"{ROWS[name].stage2} --steps 720".strip())
for weight in (1, 10):                                  # 0.1 is "full", 0 is "no G, no cycle": what would the cycle need?
    ROWS[f"cycle weight {weight}"] = Row(stage2=f"--ccl-weight {weight}")
    ROWS[f"cycle weight {weight}, one in ten narrated"] = Row(world=FEW, stage2=f"--ccl-weight {weight}")
ROWS["no G, no cycle, one in ten narrated"] = Row(world=FEW, stage2="--no-cycle")
# The micro-world that data.py toy makes when nothing is said, in which the head moves 0.4 times as much as in the study's.
DEFAULT = "default world"
for name in QUICK:
    ROWS[DEFAULT if name == "full" else f"{DEFAULT}, {name}"] = Row(world="--noise 0.4", stage2=ROWS[name].stage2)
SWEEPS = {                      # knob of the world: its default ("full", "x only") and other values, each with F and without
    "ego": (1000, 250, 4000, 10_000), "pairs": (1200, 300, 4800), "noise": (1, 0, 2), "views": (2, 1, 4)}
for sweep, (default, *values) in SWEEPS.items():
    flag = {"views": "--exo-cams"}.get(sweep, f"--{sweep}")
    for value in values:
        ROWS[f"{sweep} {value}"] = Row(world=f"{flag} {value}")
        ROWS[f"{sweep} {value}, x only"] = Row(world=f"{flag} {value}", stage2="--no-mapping")

locks, guard = {}, threading.Lock()


def reachable() -> dict[str, ast.AST]:
    """What a toy run can reach: the top-level definitions (functions, classes, constants, tables) whose names occur in
    train.py's main, in data.py's command for the micro-world, or in what these reach, by "file: name"."""
    defined = {}                                            # name -> [(file, node)]: a name may be in several files
    for file in ("model.py", "data.py", "eval.py", "train.py"):
        for node in ast.parse((REPO / file).read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
            else:
                continue
            for name in names:
                defined.setdefault(name, []).append((file, node))
    found = {}
    todo = [("train.py", "main"), ("data.py", "command_toy")]
    while todo:
        home, name = todo.pop()
        for file, node in defined.get(name, ()):
            if name == "main" and file != home or f"{file}: {name}" in found:
                continue
            found[f"{file}: {name}"] = node
            for leaf in ast.walk(node):
                if isinstance(leaf, (ast.Name, ast.Attribute)):
                    word = leaf.id if isinstance(leaf, ast.Name) else leaf.attr
                    if word != "main":
                        todo.append((file, word))
    return found


@cache
def code_hash() -> str:
    """Of what a toy run can reach, as the machine sees it, when this process began: comments and docstrings do not count,
    nor does a benchmark's reader."""
    digest = hashlib.sha256()
    for name, tree in sorted(reachable().items()):
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                body[0].value.value = ""
        digest.update(f"{name} {ast.dump(tree)}".encode())
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


def pack(right) -> str:
    """The outcome of every clip as one hexadecimal number: a leading 1, then a bit a clip. report.unpack reads it."""
    return f"{int('1' + ''.join(str(int(r)) for r in right), 2):x}"


def places(row: Row, seed: int, out: Path) -> tuple[Path, dict[int, Path]]:
    """Where the world of a row is, and its stages; rows that begin alike share them. Stage 0 is the default world's,
    unless it would see another one."""
    label = hashlib.sha256(row.world.encode()).hexdigest()[:8] if row.world else "default"
    root, flags = out / code_hash() / f"seed{seed}" / label, ""
    seen = {*row.world.split()} & {"--corpus", "--ego", "--noise", "--fov", "--scale"}
    stages = {0: (root if seen else root.with_name("default")) / "stage0"}
    for stage in (1, 2, 3):
        flags += getattr(row, f"stage{stage}") + "|"
        stages[stage] = root / f"stage{stage}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    return root / "toy", stages


def run_cell(name: str, seed: int, out: Path) -> dict:
    """World, stages and scores of one row at one seed; whatever is there already is not made again."""
    row, began, figures, outcomes = ROWS[name], time.time(), {}, {}
    world, stages = places(row, seed, out)
    # The study's world is noisier than the default; a row may say otherwise.
    command(world, "data.py", "toy", "--out", world, "--seed", seed, "--noise", 1, *row.world.split())
    plain = stages[0].with_name("toy")
    command(plain, "data.py", "toy", "--out", plain, "--seed", seed, "--noise", 1, *(row.world.split() if plain == world else ()))
    command(stages[0], "train.py", "--stage", 0, "--data", plain, "--out", stages[0], "--seed", seed)
    for stage in (1, 2, 3):
        folder = command(stages[stage], "train.py", "--stage", stage, "--data", world, "--base", stages[0], "--init", stages[stage - 1],
                         "--out", stages[stage], "--seed", seed, *getattr(row, f"stage{stage}").split())
        figures[f"stage{stage}"] = json.loads((folder / "eval.json").read_text())
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        outcomes[f"stage{stage}"] = pack(r["said"] == r["text"] for r in rows)
    state = json.loads(next(stages[3].glob("step_*/state.json")).read_text())    # it knows the revision that trained it
    return dict(row=name, seed=seed, flags=vars(row), code=code_hash(), git=state["git"], cpu=CPU, seconds=round(time.time() - began),
                figures=figures, outcomes=outcomes)


def probe(out: Path):
    """Look inside the trained models of `full` and of two controls, at every seed whose stages are still cached."""
    there = {(line["probe"], line["seed"]) for line in recorded() if "probe" in line}
    wanted = [cell for cell in finished() if cell[0] in ("full", "no KL", "shuffled pairs") and cell not in there]
    for name, seed in wanted:
        world, stages = places(ROWS[name], seed, out)
        if (stages[3] / "eval.json").is_file():
            words = [word for stage, folder in stages.items() for word in (f"--stage{stage}", folder)]
            done = subprocess.run([sys.executable, "tests/study/probe.py", "--world", world, *words, *["--only-features"] * (name != "full")],
                                  cwd=REPO, stdout=subprocess.PIPE, text=True, check=True)
            append(dict(probe=name, seed=seed, code=code_hash(), **json.loads(done.stdout.splitlines()[-1])))
            print(f"looked inside {name}, seed {seed}", flush=True)


def recorded() -> list[dict]:
    """All lines of results.jsonl: cells, and what --verify found."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def finished() -> dict[tuple[str, int], dict]:
    """Cells of results.jsonl that hold for this code: made by it, or by code that --verify found equal."""
    lines, valid, known = recorded(), {code_hash()}, 0
    # What equals code that equals this code holds, too, whichever of the two was verified by the other.
    while len(valid) > known:
        known = len(valid)
        for line in lines:
            pair = {line.get("verified"), line.get("same_as")}
            if "verified" in line and pair & valid:
                valid |= pair
    return {(line["row"], line["seed"]): line for line in lines if "row" in line and line["code"] in valid}


def append(line: dict):
    """One object, whole, at the end of results.jsonl."""
    with guard, open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


def verify(out: Path, row: str | None):
    """Run a cell that this kind of CPU made (the latest, or the latest of `row`) afresh with the code as it is: what the old
    cell recorded must be equal to the digit, and then all older cells hold. Figures that are new void nothing."""
    cells = [line for line in recorded() if "row" in line and line["cpu"] == CPU and row in (None, line["row"])]
    if not cells:
        raise SystemExit(f"no cell of {row or 'any row'} in {RESULTS} was made on a CPU with {CPU}: run one before the change, then --verify after it")
    old = cells[-1]
    out = out / "verify"
    shutil.rmtree(out, ignore_errors=True)
    new = run_cell(old["row"], old["seed"], out)
    apart = [f"{stage} {key}: {value} was {figures[key]}" for stage, figures in old["figures"].items() for key in figures
             if (value := new["figures"][stage].get(key)) != figures[key]]
    apart += [f"{stage}: other clips are right" for stage in old["outcomes"] if new["outcomes"][stage] != old["outcomes"][stage]]
    if apart:
        raise SystemExit(f"{old['row']}, seed {old['seed']}: the numbers changed, the cells of code {old['code']} are void:\n" + "\n".join(apart))
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
    what.add_argument("--probes", action="store_true")
    parser.add_argument("--row", choices=ROWS, help="of --verify: which row's latest cell (the latest of all)")
    parser.add_argument("--minutes", type=float, default=90, help="no cell is started that would end later")
    parser.add_argument("--seeds", type=int, nargs="*", default=None, help="of 0 1 2 3 4")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=None)
    parser.add_argument("--out", type=Path, default=REPO / "out/study")
    args = parser.parse_args()
    if args.verify or args.probes:
        return verify(args.out.resolve(), args.row) if args.verify else probe(args.out.resolve())
    sweeps = [name for name in ROWS if name.split(" ")[0] in SWEEPS]
    names = args.rows or (QUICK if args.quick else [n for n in ROWS if n not in sweeps] if args.core else
                          [n for n in sweeps if n.startswith(f"{args.sweep} ")])
    seeds = args.seeds if args.seeds is not None else [0] if args.quick else SEEDS
    there = finished()
    cells = [(name, seed) for name in names for seed in seeds if (name, seed) not in there]
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
