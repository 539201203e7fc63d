"""Score a checkpoint, and ask it about a video.

    python eval.py  # the toy benchmark of the newest stage, with pictures
    python eval.py --video my.mp4 --ask "What am I doing?"      # one question; a chat without --ask

Every score comes with its chance level, a 95 % interval and n. Narrations and answers are greedy decoding,
exact match.
"""
from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import (COLOURS, NARRATE, PATTERNS, VERBS, Batch, DataError, Loader, contact_sheet, read_clip,
                  read_manifest, toy_split, toy_world)
from model import Exo2Ego, Tokenizer, feature_kl, load_checkpoint, newest_checkpoint

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
    """The figures of a stage on clips of unseen scenes, printed as `key: value` and kept in out/eval.json.

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
    replies = [""] * len(rows)
    if stage == 2:
        figures |= partners(model, tokenizer, read_manifest(toy_split(data, "val", world)))
    if stage == 3:
        figures |= choose_clip(model, tokenizer, rows, visual)
        more, replies = ask(model, tokenizer, rows, visual)
        figures |= more
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
    the five moments of one scene. All five have different narrations."""
    rng, count = np.random.default_rng(0), min(n, len(rows))
    figures = {}
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
        figures |= proportion(f"mcq_{kind}", [choice_score(s, 0) for s in scores.reshape(count, 5)], 0.2)
    return figures


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
        if torch.cuda.is_available():
            model.cuda()
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
