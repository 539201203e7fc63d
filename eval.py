"""Score a checkpoint, and ask it about a video; what a run leaves on disk: log, checkpoints.

    python eval.py  # the toy benchmark of the newest stage, with pictures
    python eval.py --video my.mp4 --ask "What am I doing?"      # one question; a chat without --ask

Every score comes with its chance level, a 95 % interval and n. Narrations and answers are greedy decoding,
exact match.
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import (COLOURS, NARRATE, PATTERNS, VERBS, Batch, DataError, Loader, contact_sheet, die_with_parent,
                  read_clip, read_manifest, show_prompt, toy_split, toy_world, write_jsonl)
from model import (Exo2Ego, Tokenizer, choose_attention, feature_kl, load_checkpoint, newest_checkpoint,
                   pick_device, read_state)

SLOTS = re.compile(r"Camera-wearer (?P<verb>.+) the (?P<colour>\w+) (?P<pattern>\w+) block "
                   r"with the (?P<hand>\w+) hand\.")
GREEN, RED, GREY = (20, 130, 50), (190, 40, 40), (110, 110, 110)


# ------------------------------------------------------------------------------------------------ arithmetic
def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson's): honest near 0 and 1 too."""
    z = 1.96
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def proportion(name: str, outcomes, chance: float) -> dict[str, float]:
    """Mean of outcomes in [0, 1] as the five figures every score has."""
    outcomes = np.asarray(outcomes, float)
    share = float(outcomes.mean())
    low, high = wilson(share, len(outcomes))
    return {name: share, f"{name}_chance": chance, f"{name}_lo": low, f"{name}_hi": high,
            f"{name}_n": len(outcomes)}


def choice_score(scores: np.ndarray, answer: int) -> float:
    """1 if the answer has the best score, 1/k if k candidates tie for it, else 0: constant scores give
    chance."""
    best = scores == scores.max()
    return float(best[answer]) / best.sum()


# --------------------------------------------------------------------------------------------------- answers
def clips(model: Exo2Ego, tokenizer: Tokenizer, rows: list[dict], view: str,
          batch: int = 100) -> Iterator[Batch]:
    """Every row's clips in order, in batches on the model's device; of several exo cameras the first."""
    rows = [row | {"exo": row["exo"][:1]} if "exo" in row else row for row in rows]
    loader = Loader(rows, model.cfg, tokenizer, view=view, batch=batch, train=False)
    for step in loader.stream(0, -(-len(rows) // batch)):
        for micro in step:
            if micro.skipped:
                raise DataError(f"a benchmark needs every clip: {micro.skipped[0]}")
            yield micro.to(next(model.parameters()).device)


@torch.no_grad()
def see(model: Exo2Ego, tokenizer: Tokenizer, rows: list[dict], view: str) -> Tensor:
    """Visual tokens of every row's clip (n, tokens, W); `view` is ego or exo."""
    encode = model.encode_ego if view == "ego" else model.encode_exo
    return torch.cat([encode(getattr(batch, view)) for batch in clips(model, tokenizer, rows, view)])


def answer(model: Exo2Ego, tokenizer: Tokenizer, visual: Tensor, questions: list[str], batch: int = 125,
           max_new: int = 32) -> list[str]:
    """Greedy answers, one question per row of visual."""
    texts = []
    for i in range(0, len(questions), batch):
        chats = (tokenizer.chat([{"user": q}], visual.shape[1]) for q in questions[i:i + batch])
        prompts = [torch.tensor(ids) for ids, _ in chats]
        ids = model.generate(visual[i:i + batch], prompts, eos=tokenizer.eos, max_new=max_new)
        texts += [tokenizer.decode(reply).strip() for reply in ids]
    return texts


def likelihood(model: Exo2Ego, tokenizer: Tokenizer, visual: Tensor, pairs: list[tuple[int, str]],
               batch: int = 250) -> np.ndarray:
    """log p(narration | clip) in nats, summed over its tokens, for pairs (row of visual, text) -> numpy
    (pairs,)."""
    scores = []
    for i in range(0, len(pairs), batch):
        packs = [tokenizer.chat([{"user": NARRATE, "assistant": text}], visual.shape[1])
                 for _, text in pairs[i:i + batch]]
        ids, labels = (torch.tensor(sum(parts, []), device=visual.device) for parts in zip(*packs))
        shown = visual[[clip for clip, _ in pairs[i:i + batch]]]
        scores.append(model.score(shown, ids, labels, [len(p[0]) for p in packs])[0])
    return torch.cat(scores).cpu().numpy()


# ----------------------------------------------------------------------------------------- the toy benchmark
def toy_benchmark(model: Exo2Ego, tokenizer: Tokenizer, data: str, stage: int, out: Path,
                  init: Path | None = None) -> dict:
    """The figures of a stage on clips of unseen scenes, printed as `key: value` and kept in out/eval.json;
    what the model said of each clip in out/predictions.jsonl.

    Stages 0 and 1: the demonstrator on exo clips. Stage 2: the learner's narrations, KL of true and shuffled
    partners. Stage 3: narrations, text-to-clip choice among 5, questions. A manifest that is not the micro-
    world has none.
    """
    if Path(data).suffix == ".jsonl":
        return {}
    model.eval()
    began, world = time.time(), toy_world(data)
    demonstrator = stage <= 1
    split, view = ("exo_test", "exo") if demonstrator else ("test", "ego")
    rows = read_manifest(toy_split(data, split, world))
    visual = see(model, tokenizer, rows, view)
    figures, narrations = narrate(model, tokenizer, rows, visual, view)
    replies, told = [""] * len(rows), {"said": narrations}
    if stage == 2:
        figures |= partners(model, tokenizer, read_manifest(toy_split(data, "val", world)))
    if stage == 3:
        chosen, told["inter"], told["intra"] = choose_clip(model, tokenizer, rows, visual)
        answers, replies = ask(model, tokenizer, rows, visual)
        figures, told["reply"] = figures | chosen | answers, replies
    write_jsonl(out / "predictions.jsonl", [
        {"id": row["id"], "text": row["text"], "turns": row["turns"]} | dict(zip(told, values))
        for row, *values in itertools.zip_longest(rows, *told.values())])
    show(out / "samples.png", rows, view, narrations, replies)
    earlier = Path(init or "") / "eval.json"
    if stage == 1 and init and earlier.is_file():
        before = json.loads(earlier.read_text())["exo_em"]
        print(f"exo narration exact match: {before:.3f} before, {figures['exo_em']:.3f} after")
    print("".join(f"{key}: {value:.4f}\n" if isinstance(value, float) else f"{key}: {value}\n"
                  for key, value in figures.items()), end="")
    print(f"pictures: {out / 'samples.png'} ({time.time() - began:.0f} s)", flush=True)
    (out / "eval.json").write_text(json.dumps(figures, indent=1))
    return figures


def narrate(model, tokenizer, rows, visual, view):
    """Exact match of whole narrations, and of each of their four facts."""
    said = answer(model, tokenizer, visual, [NARRATE] * len(rows))
    chance = 1 / (len(VERBS) * len(COLOURS) * len(PATTERNS) * 2)
    figures = proportion(f"{view}_em", [a == row["text"] for a, row in zip(said, rows)], chance)
    facts = [(SLOTS.fullmatch(a), SLOTS.fullmatch(row["text"])) for a, row in zip(said, rows)]
    for slot in ("verb", "colour", "pattern", "hand"):
        figures[f"{view}_{slot}"] = float(np.mean([bool(a) and a[slot] == b[slot] for a, b in facts]))
    for a, row in list(zip(said, rows))[::max(1, len(rows) // 5)][:5]:
        print(f"  ok    {a}" if a == row["text"] else f"  wrong {a}   (true: {row['text']})")
    return figures, said


def ask(model, tokenizer, rows, visual):
    """Exact match of answers; chance is a uniform draw from the answers this question has in the test set."""
    asked, truth = zip(*((row["turns"][0]["user"], row["turns"][0]["assistant"]) for row in rows))
    replies = answer(model, tokenizer, visual, list(asked))
    options: dict[str, set] = {}
    for question, reply in zip(asked, truth):
        options.setdefault(question, set()).add(reply)
    chance = float(np.mean([1 / len(options[q]) for q in asked]))
    right = np.array([a == b for a, b in zip(replies, truth)])
    for q, a, t in list(zip(asked, replies, truth))[1::max(1, len(rows) // 5)][:5]:
        print(f"  Q: {q}  A: {a}   (true: {t})")
    return proportion("qa", right, chance), replies


def choose_clip(model, tokenizer, rows, visual, n: int = 1000):
    """EgoMCQ's task: which of five clips does this narration describe? inter: clips of five scenes; intra:
    the five moments of one scene. All five have different narrations. Figures, and each item's outcome."""
    rng, count = np.random.default_rng(0), min(n, len(rows))
    figures, outcomes = {}, []
    for kind in ("inter", "intra"):
        candidates = []
        for i in range(count):
            scene = i // 5 * 5
            if kind == "intra":
                others = [j for j in range(scene, scene + 5) if j != i]
            else:
                others, texts = [], {rows[i]["text"]}
                while len(others) < 4:
                    j = int(rng.integers(len(rows)))
                    if not scene <= j < scene + 5 and rows[j]["text"] not in texts:
                        others.append(j)
                        texts.add(rows[j]["text"])
            candidates.append([i] + others)
        pairs = [(clip, rows[i]["text"]) for i, clips in enumerate(candidates) for clip in clips]
        scores = likelihood(model, tokenizer, visual, pairs)
        outcomes.append([choice_score(s, 0) for s in scores.reshape(count, 5)])
        figures |= proportion(f"mcq_{kind}", outcomes[-1], 0.2)
    return figures, *outcomes


@torch.no_grad()
def partners(model, tokenizer, rows):
    """KL(exo || F(ego)) of true partners and of shuffled ones: transfer has happened when true is well
    below."""
    if model.F is None:
        return {}
    exo, estimate = [], []
    for batch in clips(model, tokenizer, rows, "pair"):
        exo.append(model.encode_exo(batch.exo))
        estimate.append(model.exo_connector(model.F(model.grid(model.ego_vit, batch.ego))))
    exo, estimate = torch.cat(exo), torch.cat(estimate)
    true, shuffled = (float(feature_kl(e, estimate).mean()) for e in (exo, exo.roll(len(exo) // 2, 0)))
    return {"kl_true": true, "kl_shuffled": shuffled, "kl_n": len(exo)}


def show(path: Path, rows, view, narrations, replies, n: int = 8):
    """Contact sheet: frames, what the model said (green when right), the truth when it was wrong."""
    items = []
    for i in range(0, len(rows), max(1, len(rows) // n)):
        clip = rows[i]["ego"] if view == "ego" else rows[i]["exo"][0]
        right = narrations[i] == rows[i]["text"]
        truth = "" if right else f"true: {rows[i]['text']}"
        lines = [(narrations[i], GREEN if right else RED), (truth, GREY)]
        if replies[i]:
            turn = rows[i]["turns"][0]
            lines.append((f"{turn['user']} {replies[i]}", GREEN if replies[i] == turn["assistant"] else RED))
        items.append(([read_clip(clip["video"], clip["start"], clip["end"], 4, 96)], lines))
    contact_sheet(path, items[:n])


# ------------------------------------------------------------------------------------------------- one video
def converse(model: Exo2Ego, tokenizer: Tokenizer, video: str, question: str | None, start=None, end=None):
    """Answer one question about an ego video, or, without one, chat until an empty line. The video is seen
    once."""
    frames = torch.from_numpy(read_clip(video, start, end, model.cfg.frames, model.cfg.image_size))[None]
    with torch.no_grad():
        visual = model.encode_ego(frames.to(next(model.parameters()).device))
    while True:
        asked = question or input("? ").strip()
        if not asked:
            return
        print(answer(model, tokenizer, visual, [asked], max_new=64)[0], flush=True)
        if question:
            return


# --------------------------------------------------------------------- what a run shows and leaves on disk
class Log:
    """log.jsonl, one object a step, cut back to the step that a run resumes from; and the progress line."""

    def __init__(self, path: Path | None, step: int, skipped: int = 0):
        """`path` None: a rank that keeps no log."""
        self.file, self.skipped, kept = None, skipped, []
        if path is None:
            return
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                kept += [line + "\n"] if json.loads(line)["step"] <= step else []
            except ValueError:
                break                                           # the line that a kill cut short
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept))
        self.file = open(path, "a", buffering=1)

    def write(self, row: dict, text: str = ""):
        """One object to the file, one line to the screen."""
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            print(text, end="\n" if text else "", flush=True)

    def skip(self, batches: list[Batch], number: int, seen: int, max_bad: float):
        """Name this rank's unreadable samples, count all ranks' `number`; too many of `seen` end the run."""
        for reason in (reason for batch in batches for reason in batch.skipped):
            print(f"skipped {reason}", flush=True)
        self.skipped += number
        if self.skipped > max_bad * max(seen, 500):
            raise DataError(f"{self.skipped} of {seen} samples could not be read, more than --max-bad "
                            f"{max_bad}; the lines above name them")

    def start(self, done: int):
        """A phase begins, of which `done` steps are over already."""
        self.began = self.clock = time.time()
        self.first = done

    def step(self, done: int, length: int, samples: int, tokens: int, losses: dict, row: dict):
        """The `done`-th step of the phase is over."""
        took, self.clock = time.time() - self.clock, time.time()
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        each, text = (time.time() - self.began) / (done - self.first), ""
        if done % 10 == 0 or done == length:
            text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            text = (f"step {done}/{length} | {text} | {each:.3f} s/step | {samples / each:.0f} clips/s | "
                    f"ETA {(length - done) * each:.0f} s")
        self.write(row | losses | dict(seconds=took, clips_per_second=samples / took,
                                       tokens_per_second=tokens / took, max_memory_bytes=memory), text)


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], optimizers: list, rng: list[Tensor],
                    state: dict, tokenizer: Path, keep: int):
    """Write a checkpoint under a temporary name, sync it, rename it: a killed save never looks finished. The
    newest `keep` of the run stay."""
    part = folder.with_name(f"part_{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, part / "model.safetensors")
    moments = {f"rng.{rank}": s.cpu() for rank, s in enumerate(rng)}
    for i, optimizer in enumerate(optimizers):
        for j, values in optimizer.state_dict()["state"].items():
            moments |= {f"{i}.{j}.{key}": value.detach().contiguous() for key, value in values.items()}
    save_file(moments, part / "optim.safetensors")
    shutil.copyfile(tokenizer, part / "tokenizer.model")
    (part / "state.json").write_text(json.dumps(state, indent=1))
    for file in part.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)
    for old in sorted(folder.parent.glob("step_[0-9]*"))[:-keep]:
        shutil.rmtree(old)


def random_state(device: torch.device) -> Tensor:
    """The generators that a rank draws from, as bytes: the CPU's, then its GPU's."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(states)


def set_random_state(state: Tensor, device: torch.device):
    """The opposite of random_state."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size])
    if device.type == "cuda" and len(state) > size:
        torch.cuda.set_rng_state(state[size:], device)


def load_optimizers(folder: Path, optimizers: list, rank: int, device: torch.device):
    """Moments and this rank's random state, exactly as saved."""
    moments = load_file(folder / "optim.safetensors")
    for i, optimizer in enumerate(optimizers):
        values = {}
        for name in (n for n in moments if n.startswith(f"{i}.")):
            _, j, key = name.split(".")
            values.setdefault(int(j), {})[key] = moments[name]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": values})
    if f"rng.{rank}" in moments:
        set_random_state(moments[f"rng.{rank}"], device)


def resume_point(out: str, config: dict, record: dict) -> Path | None:
    """The newest finished checkpoint of this very run, or None; another run's folder is refused by field."""
    folder = newest_checkpoint(out)
    state = read_state(folder) if folder else {}
    was = state.get("config", {}) | {key: state.get(key) for key in record}
    for key, value in (config | record).items():
        if folder and was.get(key) != value:
            raise ValueError(f"{out} holds a run with {key}={was.get(key)}, this one has {value}: choose "
                             f"another --out or remove the folder")
    return folder


def start_point(init: str, stage: int) -> tuple[Path, dict]:
    """The last checkpoint of the finished run `init` of this stage, and its state; all else is refused."""
    folder = newest_checkpoint(init)
    if folder is None:
        raise DataError(f"--init {init}: no checkpoint there; run torchrun train.py --stage {stage}")
    state = read_state(folder)
    if state["stage"] != stage or state["step"] < state["steps"]:
        raise DataError(f"--init {init} is of stage {state['stage']} at step {state['step']} of "
                        f"{state['steps']}; stage {stage + 1} starts from a finished stage {stage}")
    return folder, state


def git_revision() -> str | None:
    """Commit of this code, with + when files differ from it; None outside a checkout."""
    def git(*args):
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True).stdout.strip()
    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        return revision + "+" * bool(git("status", "--porcelain")) if revision else None
    except OSError:
        return None


def start_process() -> tuple[int, int]:
    """Rank and world size, as torchrun tells. The process takes its share of the cores and its GPU."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    rank, world, local_world = (int(os.environ.get(key, default)) for key, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // local_world))
    if torch.cuda.is_available():
        torch.cuda.set_device(pick_device())
    return rank, world


def agree(check):
    """Call a check that returns a problem or None, first in local rank 0 (it fills the caches of compiled
    kernels), then in the others; returns the first problem of any rank."""
    if not dist.is_initialized():
        return check()
    problems = [None] * dist.get_world_size()
    early = os.environ.get("LOCAL_RANK", "0") == "0"
    own = check() if early else None
    dist.barrier()
    dist.all_gather_object(problems, own if early else check())
    return next(filter(None, problems), None)


def describe(run, phase, objective, loader: Loader, length: int):
    """Before the first step of a phase: the arithmetic, what trains, and what the model is fed."""
    print(f"\n== stage {run.cfg.stage}: {phase.name} == {length} steps x {phase.batch} of {loader.samples} "
          f"samples ({phase.batch // loader.micro} micro batches x {loader.micro} on {run.world} ranks)")
    for name, module in objective.model.named_children():
        on, off = (sum(p.numel() for p in module.parameters() if p.requires_grad == g) for g in (True, False))
        print(f"   {name:14} {on:>10,} trained {off:>10,} frozen")
    print(f"   losses {phase.losses}, rates {phase.trains}, {run.cfg.optimizer}, {run.device}, "
          f"{'bfloat16' if run.bf16 else 'float32'}, {torch.get_num_threads()} threads; {run.attention}")
    print("   " + show_prompt(loader.batch(0)[0], objective.tokenizer), flush=True)


@torch.no_grad()
def validate(run, objective, loader: Loader, step: int, log: Log, batches: int = 8):
    """Narration loss per token on the first validation clips, shared by the ranks."""
    sums = torch.zeros(2, device=run.device)
    objective.eval()
    for batch in (b.to(run.device) for i in range(batches) for b in loader.batch(i)):
        sums += torch.stack([objective.see(batch)["vtg"].sum(), batch.weights.sum()])
    objective.train()
    total, tokens = run.sum(sums)
    log.write(dict(step=step, val_loss=total / tokens), f"step {step} | val_loss {total / tokens:.4f}")


# ---------------------------------------------------------------------------------------------- the command
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="run folder or step_* (the newest of out/stage3 ... out/stage0)")
    parser.add_argument("--base", help="where the untouched weights are, if they have moved")
    parser.add_argument("--data", default="out/toy", help="the micro-world's folder")
    parser.add_argument("--video", help="ask about this file")
    parser.add_argument("--ask", help="the question; without it, a chat")
    parser.add_argument("--start", type=float, help="seconds")
    parser.add_argument("--end", type=float, help="seconds")
    args = parser.parse_args(argv)
    try:
        stages = [f"out/stage{n}" for n in (3, 2, 1, 0)]
        ckpt = args.ckpt or next((s for s in stages if newest_checkpoint(s)), stages[1])
        model, tokenizer, state = load_checkpoint(ckpt, args.base)
        device = pick_device()
        print(choose_attention(device, torch.float32, model.to(device).cfg))
        if args.video:
            converse(model, tokenizer, args.video, args.ask, args.start, args.end)
            return
        folder = newest_checkpoint(ckpt)
        print(f"{folder}: stage {state['stage']}, step {state['step']}")
        toy_benchmark(model, tokenizer, args.data, state["stage"], folder.parent)
    except (DataError, ValueError, FileNotFoundError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
