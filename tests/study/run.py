"""The study: which part of Exo2Ego matters, in a micro-world whose truth is known.

    python tests/study/run.py --rows "no KL" "x only" --seeds 0 1 2     # rows beside their rival, with intervals
    python tests/study/run.py --question b --minutes 90     # all that a question of the argument needs
    python tests/study/run.py --minutes 90                  # all of it, in the order of importance
    python tests/study/run.py --search                      # the rate and the KL's weight of full and of its controls
    python tests/study/run.py --probes                      # what is inside the models that are still cached
    python tests/study/run.py --verify full                 # after a change of code: are the numbers still the same?

It only calls data.py, train.py and variants.py as a user would. A cell is (row, setting, seed): its world, stages 0
to 3 and their benchmarks; stages that cells share are trained once. Every finished cell is one line of results.jsonl,
with the outcome of every test clip. A cell that is there is not run again while the code is the same, or was shown by
--verify to give the same numbers (on one kind of CPU: others round otherwise). A call that ran out of minutes goes on
when called again.
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from compare import table

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))
from data import usable_cores  # noqa: E402

RESULTS = Path(__file__).with_name("results.jsonl")
SEEDS = range(5)
# Kernels for AVX2 and AVX512 round differently, so numbers equal to the digit need the same.
CPU = torch.backends.cpu.get_cpu_capability()
TORCH = torch.__version__.partition("+")[0]


# ----------------------------------------------------------------------------------------------- what is asked
@dataclass(frozen=True)
class Row:
    """One way to train: the flags that it adds to the stages, and the variant of variants.py that runs stages 2 and
    3."""
    stage1: str = ""
    stage2: str = ""
    stage3: str = ""
    variant: str = ""
    stages: tuple = (1, 2, 3)                               # those that it has


ROWS = {
    "full": Row(),
    # (a) does a second path help? Without a loss on pairs all read the same told ego clips, at three times the rates: the
    # best of trials for x only and for F from text alone.
    "x only": Row(stage2="--no-mapping --lr 9e-3"),
    "F, text alone": Row(stage2="--no-kl --no-cycle --lr 3e-2", variant="TextAlone"),
    "F = identity": Row(stage2="--no-kl --no-cycle --lr 3e-2", variant="Identity"),
    "F random, frozen": Row(stage2="--no-kl --no-cycle --lr 3e-2", variant="FrozenF"),
    "x only, half the moments": Row(stage2="--no-mapping --lr 9e-3 --batch 16"),
    # (b) do partners help? These draw pairs as full does.
    "no KL, no cycle": Row(stage2="--no-kl --no-cycle"),
    "no KL": Row(stage2="--no-kl"),
    "shuffled pairs": Row(stage2="--shuffle-pairs"),
    # (c) is it the mapping? The weight of the KL is each row's best of the search.
    "KL without F": Row(stage2="--no-cycle --kl-weight 0.05", variant="Distillation"),
    "F = identity, with KL": Row(stage2="--no-cycle --kl-weight 0.5", variant="IdentityWithKL"),
    # (d) how far from the oracle?
    "oracle [x ; y]": Row(stage2="--no-kl --no-cycle", variant="Oracle", stages=(1, 2)),
    # (e) the paper's ablations
    "no LoRA": Row(stage3="--no-lora"),
    "forward cycle only": Row(stage2="--forward-cycle-only"),
    "no G, no cycle": Row(stage2="--no-cycle"),
    "FC blocks": Row(stage2="--mapping mlp"),
    # (f) where few are told: which pairs are drawn?
    "full, told pairs alone": Row(variant="ToldAlone"),
    "full, all pairs alike": Row(variant="AllAlike"),
    # our own
    "without stage 1": Row(stage1="--steps 1 --lr 1e-9"),
    "contrastive": Row(stage2="--contrastive 0.1"),
}

# The search, on a world that no table has: rates beside train.py's for five rows, weights of the KL for three; a row of
# ROWS has what was best. --lr is the rate of the fastest part, with which the others go: F's, or the ego encoder's where
# there is no F.
PLAIN = {"train.py's": ""}
RATES = {"a third of its rates": "--lr 3.3e-3", "three times": "--lr 3e-2"}
RATES_OF_X = {"a third of its rates": "--lr 1e-3", "three times": "--lr 9e-3", "nine times": "--lr 2.7e-2"}
WEIGHTS = {"KL at 0.5": "--kl-weight 0.5", "KL at 0.05": "--kl-weight 0.05"}
# row -> its flags of stage 2 without what is searched, the short list
SHORT_LIST = {
    "x only": ("--no-mapping", PLAIN | RATES_OF_X),
    "F, text alone": ("--no-kl --no-cycle", PLAIN | RATES),
    "full": ("", PLAIN | RATES | WEIGHTS),
    "no KL, no cycle": ("--no-kl --no-cycle", PLAIN | RATES),
    "oracle [x ; y]": ("--no-kl --no-cycle", PLAIN | RATES),
    "KL without F": ("--no-cycle", PLAIN | WEIGHTS),
    "F = identity, with KL": ("--no-cycle", PLAIN | WEIGHTS),
}
CANDIDATES = {
    f"{row}, {change}": replace(ROWS[row], stage2=f"{flags} {more}".strip(), stages=(1, 2))
    for row, (flags, changes) in SHORT_LIST.items() for change, more in changes.items()}
SEARCH_SEED = 100

# What data.py toy is told. README's commands and the study share the default world: every pair has a narration.
ALL_TOLD = "all told"
FEW_TOLD = "few told"
SETTINGS = {
    ALL_TOLD: "",
    # Much synchronized video, of which one moment in five is told: stage 2 draws those as often as all others.
    FEW_TOLD: "--pairs 3000 --narrated 0.2",
    # the ends of the world's knobs
    "steady head": "--noise 0",
    "wild head": "--noise 1",
    "300 pairs": "--pairs 300",
    "one exo camera": "--exo-cams 1",
    "four exo cameras": "--exo-cams 4",
}
BOTH = (ALL_TOLD, FEW_TOLD)


def variant_of(row: Row, setting: str) -> str:
    """The variant that runs stages 2 and 3 of a row in a setting; "" for train.py itself."""
    return row.variant or ("HalfTold" if setting == FEW_TOLD else "")


@dataclass(frozen=True)
class Question:
    """A step of the argument: a rival, the rows that are held against it, in which settings. One table answers it."""
    asks: str
    rival: str
    rows: tuple[str, ...]
    settings: tuple[str, ...] = BOTH
    seeds: int = 5


QUESTIONS = {
    "a": Question(
        asks="Does a second path help?",
        rival="x only",
        rows=("full", "F, text alone", "F = identity", "F random, frozen", "x only, half the moments")),
    "b": Question(
        asks="Do partners help?",
        rival="full",
        rows=("F, text alone", "no KL", "no KL, no cycle", "shuffled pairs")),
    "c": Question(
        asks="Is it the mapping?",
        rival="full",
        rows=("KL without F", "F = identity, with KL")),
    "d": Question(
        asks="How far is the oracle?",
        rival="full",
        rows=("oracle [x ; y]",)),
    "e": Question(
        asks="What do the paper's ablations do?",
        rival="full",
        rows=("no LoRA", "forward cycle only", "no G, no cycle", "no KL", "FC blocks"),
        settings=(ALL_TOLD,)),
    "f": Question(
        asks="Where few are told: which pairs are drawn?",
        rival="full",
        rows=("full, all pairs alike", "full, told pairs alone"),
        settings=(FEW_TOLD,)),
    "g": Question(
        asks="Does the cycle add to the KL?",
        rival="full",
        rows=("no G, no cycle",)),
    "own": Question(
        asks="What do stage 1 and InfoNCE do?",
        rival="full",
        rows=("without stage 1", "contrastive"),
        settings=(ALL_TOLD,), seeds=3),
    "knobs": Question(
        asks="What do the knobs of the world do?",
        rival="x only",
        rows=("full",),
        settings=tuple(SETTINGS)[2:], seeds=2),
}
# What is not reached is what matters least.
ORDER = ("b", "f", "a", "d", "c", "e", "g", "own", "knobs")


class Cell(NamedTuple):
    """A row, trained in a setting from one seed."""
    row: str
    setting: str
    seed: int


def cells_of(questions, seeds=None) -> list[Cell]:
    """The cells that questions need, once each: the first three seeds of all questions before the others."""
    cells = []
    for late in (False, True):
        for key in questions:
            question = QUESTIONS[key]
            wanted = range(question.seeds) if seeds is None else seeds
            # Neighbours differ in their seed: cells that run at once then share no stage, and none waits for another.
            cells += [Cell(row, setting, seed) for setting in question.settings
                      for row in (question.rival, *question.rows) for seed in wanted if (seed >= 3) == late]
    return list(dict.fromkeys(cells))


# ------------------------------------------------------------------------------------------- which code, which cells
def reachable(files, todo, without=()) -> dict[str, ast.AST]:
    """The top-level definitions (functions, classes, constants, tables) of `files` that `todo`, pairs of a file and a
    name, can reach by name, each under "file: name"; the names in `without` are passed over."""
    # name -> [(file, node)]: a name may be in several files
    defined = {}
    for file in files:
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
    found, todo = {}, list(todo)
    while todo:
        home, name = todo.pop()
        for file, node in defined.get(name, ()):
            if name in without or name == "main" and file != home or f"{file}: {name}" in found:
                continue
            found[f"{file}: {name}"] = node
            for leaf in ast.walk(node):
                if isinstance(leaf, (ast.Name, ast.Attribute)):
                    word = leaf.id if isinstance(leaf, ast.Name) else leaf.attr
                    if word != "main":
                        todo.append((file, word))
    return found


def hash_of(definitions: dict[str, ast.AST]) -> str:
    """A hash of definitions as the machine sees them: comments and docstrings do not count."""
    digest = hashlib.sha256()
    for name, tree in sorted(definitions.items()):
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value.value = ""
        digest.update(f"{name} {ast.dump(tree)}".encode())
    return digest.hexdigest()[:12]


@cache
def code_hash() -> str:
    """Of what a toy run can reach when this process began: a benchmark's reader does not count."""
    files = ("model.py", "data.py", "eval.py", "train.py")
    return hash_of(reachable(files, [("train.py", "main"), ("data.py", "command_toy")]))


@cache
def variant_hash(name: str) -> str:
    """Of what a variant of variants.py adds to that, its neighbours aside; "" for a row that is flags alone."""
    if not name:
        return ""
    file = "tests/study/variants.py"
    every = reachable([file], [(file, "VARIANTS")])[f"{file}: VARIANTS"].value
    entry = next(value for key, value in zip(every.keys, every.values) if key.value == name)
    words = [leaf.id for leaf in ast.walk(entry) if isinstance(leaf, ast.Name)]
    found = reachable([file], [(file, word) for word in ("main", *words)], without={"VARIANTS"})
    return hash_of(found | {name: entry})


def recorded() -> list[dict]:
    """All lines of results.jsonl: cells, probes, and what --verify found."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def cell_of(line: dict) -> Cell:
    """The cell of a line of results.jsonl."""
    return Cell(line["row"], line["setting"], line["seed"])


def valid_code() -> set[str]:
    """The hashes of this code, and of code that --verify found equal to it."""
    valid, known = {code_hash()}, 0
    # What equals code that equals this code holds, too, whichever of the two was verified by the other.
    while len(valid) > known:
        known = len(valid)
        for line in recorded():
            pair = {line.get("verified"), line.get("same_as")}
            if "verified" in line and pair & valid:
                valid |= pair
    return valid


def finished(cpu=None) -> dict[Cell, dict]:
    """Cells of results.jsonl that hold for this code: made by it, or by code that --verify found equal; on this kind of
    CPU, or (None) on the one that made most of them."""
    valid = valid_code()
    lines = [line for line in recorded() if "row" in line and line["code"] in valid and holds(line)]
    kinds = Counter(line["cpu"] for line in lines).most_common(1)
    kind = cpu or (kinds[0][0] if kinds else CPU)
    return {cell_of(line): line for line in lines if line["cpu"] == kind}


def holds(line: dict) -> bool:
    """Whether a cell was made with the flags and the variant that its row has now."""
    row = (ROWS | CANDIDATES).get(line["row"])
    if row is None or line["setting"] not in SETTINGS:
        return False
    # As a file gives it back: a tuple is a list there.
    flags = json.loads(json.dumps(asdict(row)))
    variant = variant_of(row, line["setting"])
    now = dict(flags=flags, world=SETTINGS[line["setting"]], variant_code=variant_hash(variant), torch=TORCH)
    # The first cells do not say with which torch they were made.
    return all((dict(torch="2.13.0") | line)[key] == value for key, value in now.items())


def append(line: dict):
    """One object, whole, at the end of results.jsonl."""
    with guard, open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


# --------------------------------------------------------------------------------------------------- running a cell
locks, guard = {}, threading.Lock()


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
    """The outcome of every clip as one hexadecimal number: a leading 1, then a bit per clip. report.unpack reads it."""
    return f"{int('1' + ''.join(str(int(r)) for r in right), 2):x}"


def places(row: Row, setting: str, seed: int, out: Path) -> tuple[Path, dict[int, Path]]:
    """Where the world of a cell is, and its stages; cells that begin alike share them. Stage 0 is the default world's,
    unless it would see another one."""
    words = SETTINGS[setting].split()
    root = out / code_hash() / f"seed{seed}" / setting.replace(" ", "-")
    sees_another = {*words} & {"--corpus", "--ego", "--noise", "--fov", "--scale"}
    stages = {0: (root if sees_another else root.with_name(ALL_TOLD.replace(" ", "-"))) / "stage0"}
    # A folder is named after all that it and the stages before it were told.
    told, variant = "", variant_of(row, setting)
    for stage in row.stages:
        told += getattr(row, f"stage{stage}") + "|"
        if variant and stage > 1:
            told += f"{variant} {variant_hash(variant)}|"
        stages[stage] = root / f"stage{stage}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    return root / "toy", stages


def run_cell(cell: Cell, out: Path) -> dict:
    """World, stages and scores of one cell; whatever is there already is not made again."""
    row, began = (ROWS | CANDIDATES)[cell.row], time.time()
    variant = variant_of(row, cell.setting)
    world, stages = places(row, cell.setting, cell.seed, out)
    # The world that stage 0 sees, and the cell's own; they may be one.
    plain = stages[0].with_name("toy")
    for folder, setting in {plain: ALL_TOLD, world: cell.setting}.items():
        command(folder, "data.py", "toy", "--out", folder, "--seed", cell.seed, *SETTINGS[setting].split())
    command(stages[0], "train.py", "--stage", 0, "--data", plain, "--out", stages[0], "--seed", cell.seed)

    figures, outcomes = {}, {}
    for stage in row.stages:
        script = ["tests/study/variants.py", variant] if variant and stage > 1 else ["train.py"]
        words = ["--stage", stage, "--data", world, "--base", stages[0], "--init", stages[stage - 1]]
        words += ["--out", stages[stage], "--seed", cell.seed, *getattr(row, f"stage{stage}").split()]
        folder = command(stages[stage], *script, *words)
        figures[f"stage{stage}"] = json.loads((folder / "eval.json").read_text())
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        outcomes[f"stage{stage}"] = pack(r["said"] == r["text"] for r in rows)
    # The newest checkpoint knows the revision that trained it; names order by step.
    newest = max(stages[row.stages[-1]].glob("step_*"))
    state = json.loads((newest / "state.json").read_text())
    # The commands above read the files as they are.
    if (code_hash(), variant_hash(variant)) != (code_hash.__wrapped__(), variant_hash.__wrapped__(variant)):
        raise SystemExit(f"the code has changed while {cell} was trained: remove {stages[1].parent}, and call again")
    return cell._asdict() | dict(
        flags=asdict(row),
        world=SETTINGS[cell.setting],
        code=code_hash(),
        variant_code=variant_hash(variant),
        git=state["git"],
        cpu=CPU,
        torch=TORCH,
        seconds=round(time.time() - began),
        cycle=cycle_of(stages[2]),
        figures=figures,
        outcomes=outcomes)


def cycle_of(stage2: Path) -> dict:
    """What log.jsonl says of the cycle: its best constant, its first value, and the mean of its last twenty steps."""
    lines = [json.loads(line) for line in (stage2 / "log.jsonl").read_text().splitlines()]
    values = [line["ccl"] for line in lines if "ccl" in line]
    if not values:
        return {}
    constant = next((line["ccl_constant"] for line in lines if "ccl_constant" in line), None)
    return dict(constant=constant, first=values[0], last=sum(values[-20:]) / len(values[-20:]))


def probe(out: Path):
    """Look inside the trained models of `full` and of two controls, at every seed whose stages are still cached."""
    there = {(line["probe"], line["seed"]) for line in recorded() if "probe" in line and line["code"] == code_hash()}
    cells = finished(CPU)
    if not cells:
        raise SystemExit("no cell holds for this code on this kind of CPU: run.py --rows trains some")
    for cell in cells:
        wanted = cell.setting == ALL_TOLD and cell.row in ("full", "no KL", "shuffled pairs")
        if not wanted or (cell.row, cell.seed) in there:
            continue
        world, stages = places(ROWS[cell.row], cell.setting, cell.seed, out)
        if (stages[3] / "eval.json").is_file():
            words = [word for stage, folder in stages.items() for word in (f"--stage{stage}", folder)]
            words += ["--seed", str(cell.seed)]
            words += ["--only-features"] if cell.row != "full" else []
            done = subprocess.run([sys.executable, "tests/study/probe.py", "--world", world, *words],
                                  cwd=REPO, stdout=subprocess.PIPE, text=True, check=True)
            append(dict(probe=cell.row, seed=cell.seed, code=code_hash(), **json.loads(done.stdout.splitlines()[-1])))
            print(f"looked inside {cell.row}, seed {cell.seed}", flush=True)


def verify(out: Path, row: str):
    """Run the latest cell of `row` that this kind of CPU made afresh with the code as it is: what the old cell recorded
    must be equal to the digit, and then all older cells hold. Figures that are new void nothing."""
    lines = [line for line in recorded() if line.get("row") == row and line["cpu"] == CPU
             and line.get("torch", "2.13.0") == TORCH]
    if not lines:
        raise SystemExit(f"no cell of {row} in {RESULTS} was made on a CPU with {CPU} by torch {TORCH}: "
                         f"run one before the change, then --verify after it")
    old = lines[-1]
    cell, out = cell_of(old), out / "verify"
    shutil.rmtree(out, ignore_errors=True)
    new = run_cell(cell, out)
    apart = []
    for stage, figures in old["figures"].items():
        found = new["figures"][stage]
        for key, value in figures.items():
            if found.get(key) != value:
                apart.append(f"{stage} {key}: {found.get(key)} was {value}")
        if new["outcomes"][stage] != old["outcomes"][stage]:
            apart.append(f"{stage}: other clips are right")
    words = f"{row}, {cell.setting}, seed {cell.seed}"
    if apart:
        head = f"{words}: the numbers changed, the cells of code {old['code']} are void:"
        raise SystemExit("\n".join([head, *apart]))
    if old["code"] not in valid_code():
        append(dict(verified=new["code"], same_as=old["code"], by=list(cell)))
    print(f"{words}: equal to the digit")


def run_cells(cells: list[Cell], minutes: float, out: Path):
    """Run what is not there, as many cells at once as there are cores, and record each; none is started that would end
    later."""
    there = finished(CPU)
    left = [cell for cell in cells if cell not in there]
    print(f"code {code_hash()}: {len(cells) - len(left)} cells are there, {len(left)} to run", flush=True)
    began, taken = time.time(), []                          # seconds of each finished cell

    def work(cell):
        # As long as the last one took: the first ones also made what later ones share.
        if time.time() - began + (taken[-1] if taken else 0) > minutes * 60:
            return
        line = run_cell(cell, out)
        append(line)
        taken.append(line["seconds"])
        scores = ", ".join(f"{stage} {100 * figures['ego_em']:.1f} %" for stage, figures in line["figures"].items()
                           if "ego_em" in figures)
        minutes_left = (len(left) - len(taken)) * (time.time() - began) / len(taken) / 60
        print(f"{len(taken)}/{len(left)} {cell.row}, {cell.setting}, seed {cell.seed}: {scores} "
              f"({line['seconds']} s; all done in {minutes_left:.0f} min)", flush=True)
    with ThreadPoolExecutor(usable_cores()) as pool:        # one thread per process, a process per core
        list(pool.map(work, left))
    if len(taken) < len(left):
        print(f"{len(left) - len(taken)} cells are left, for which {minutes:g} minutes were too few: the same call goes on",
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rows", nargs="+", choices=ROWS, help="these rows and their rival")
    what.add_argument("--question", choices=QUESTIONS, help="the rows of one question")
    what.add_argument("--verify", choices=ROWS, metavar="ROW", help="make its latest cell again: equal to the digit?")
    what.add_argument("--search", action="store_true", help=f"rates and weights, where few are told, seed {SEARCH_SEED}")
    what.add_argument("--probes", action="store_true", help="look inside models that are still cached")
    parser.add_argument("--rival", choices=ROWS, default="full", help="of --rows (full)")
    parser.add_argument("--setting", choices=SETTINGS, default=ALL_TOLD, help=f"of --rows ({ALL_TOLD})")
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds (0 1 2 for --rows, else the question's)")
    parser.add_argument("--minutes", type=float, default=90, help="no cell is started that would end later (90)")
    parser.add_argument("--out", type=Path, default=REPO / "out/study")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.verify:
        return verify(out, args.verify)
    if args.probes:
        return probe(out)
    if args.search:
        return run_cells([Cell(row, FEW_TOLD, SEARCH_SEED) for row in CANDIDATES], args.minutes, out)
    if not args.rows:
        return run_cells(cells_of([args.question] if args.question else ORDER, args.seeds), args.minutes, out)
    # A table of one's own: the rival, and the rows beside it.
    rows = [row for row in args.rows if row != args.rival]
    seeds = args.seeds or [0, 1, 2]
    run_cells([Cell(row, args.setting, seed) for row in (args.rival, *rows) for seed in seeds], args.minutes, out)
    print(table(finished(CPU), args.rival, rows, args.setting))


if __name__ == "__main__":
    main()
