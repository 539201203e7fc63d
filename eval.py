"""Score a checkpoint, ask it about a video; around the training loop: log, checkpoints, precision, the plan.

    python eval.py  # the toy benchmark of the newest stage, with pictures
    python eval.py --video my.mp4 --ask "What am I doing?"      # one question; a chat without --ask
    python eval.py --bench egoschema --data DIR --out results   # EgoBench; --report makes a page

Every score comes with its chance level, a 95 % interval and n. Narrations and answers are greedy decoding,
exact match.
"""
from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import html
import itertools
import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from data import (COLOURS, NARRATE, PATTERNS, VERBS, Batch, DataError, Files, Loader, Tokenizer, contact_sheet,
                  convert, encode_png, file_lock, frame_rate, progress, read_clip, read_manifest, toy_split,
                  toy_world, verbalise_wearer, write_jsonl, write_text_atomic)
from model import (IGNORE, VIDEO, Exo2Ego, KVCache, Segments, SharedPrefix, choose_attention, feature_kl, fingerprint,
                   git_revision, load_checkpoint, newest_checkpoint, pick_device, autocast, read_json, to_device_and_dtype)

SLOTS = re.compile(r"Camera-verbalise_wearer (?P<verb>.+) the (?P<colour>\w+) (?P<pattern>\w+) block "
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
    """log p(narration | clip) in nats, summed over its tokens, for pairs (row of visual, text) -> (n,)."""
    scores = []
    for i in range(0, len(pairs), batch):
        packs = [tokenizer.chat([{"user": NARRATE, "assistant": text}], visual.shape[1])
                 for _, text in pairs[i:i + batch]]
        ids, labels = (torch.tensor(sum(parts, []), device=visual.device) for parts in zip(*packs))
        shown = visual[[clip for clip, _ in pairs[i:i + batch]]]
        scores.append(model.log_likelihood(shown, ids, labels, [len(p[0]) for p in packs]))
    return torch.cat(scores).cpu().numpy()

# ----------------------------------------------------------------------------------------- the toy benchmark
def toy_benchmark(model: Exo2Ego, tokenizer: Tokenizer, data: str, stage: int, out: str | os.PathLike,
                  init: str | os.PathLike | None = None) -> dict:
    """The figures of a stage on clips of unseen scenes, printed as `key: value` and kept in out/eval.json;
    what the model said of each clip in out/predictions.jsonl.

    Stages 0 and 1: the demonstrator on exo clips. Stage 2: the learner's narrations, KL of true and shuffled
    partners. Stage 3: narrations, text-to-clip choice among 5, questions.
    """
    if not (Path(data) / "world.json").is_file():
        raise DataError(f"--data {data} is no micro-world (data.py toy makes one); your own videos: --video")
    model.eval()
    began, world, out = time.time(), toy_world(data), Path(out)
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
    if (different := len({row["text"] for row in rows})) < 9:   # a scene's five, four others
        raise DataError(f"the test split tells {different} things, a choice needs 9: render a larger --test")
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
    """KL(exo || F(ego)) of true partners and of shuffled ones: after transfer true is well below."""
    if model.F is None:
        return {}
    exo, estimate = [], []
    for batch in clips(model, tokenizer, rows, "pair"):
        exo.append(model.encode_exo(batch.exo))
        estimate.append(model.exo_connector(model.F(model.patch_features(model.ego_vit, batch.ego))))
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

# --------------------------------------------------------------------------- attention, checked where it runs
# ------------------------------------------------------------------------------ appendix: one video, EgoBench
class Seen:
    """What the decoder knows before a question: the video, read once (or nothing, with visual None)."""
    @torch.no_grad()
    def __init__(self, model: Exo2Ego, tokenizer: Tokenizer, visual: Tensor | None):
        self.model, self.tokenizer, self.cache, self.unread = model, tokenizer, KVCache(1), []
        self.device = model.decoder.lm_head.weight.device
        self.slots = 0 if visual is None else visual.shape[1]           # visual is (1, n, W)
        ids, _ = tokenizer.chat([{"user": ""}], self.slots)
        self.head = ids[:len(ids) - ids[::-1].index(VIDEO)] if self.slots else ids[:1]
        embeddings = model.insert_visual_tokens(visual, torch.tensor(self.head, device=self.device))
        self.pooled = None if visual is None else visual[0].float().mean(0)
        seg = Segments.packed([len(self.head)], self.device)
        model.decoder(embeddings, seg, torch.arange(len(self.head), device=self.device), self.cache)

    def prompt(self, question: str, answer: str | None = None) -> tuple[list[int], list[int]]:
        """ids and labels of a question (and answer) that go on after the video."""
        turn = {"user": question.replace("<video>", "")} | ({} if answer is None else {"assistant": answer})
        ids, labels = self.tokenizer.chat([turn], self.slots)
        return ids[len(self.head):], labels[len(self.head):]

    @torch.no_grad()
    def score(self, pairs: list[tuple[str, str]], batch: int = 64) -> np.ndarray:
        """log p(answer, </s> | video, question) of each (question, answer) -> (pairs, 2): the sum over its
        tokens, and the mean over those whose loss is not exactly 0 (EgoPlan's rule). At most `batch` answers,
        each with a copy of one layer's keys and values of the video, are in memory at a time."""
        scores = []
        for i in range(0, len(pairs), batch):
            ids, labels = zip(*(self.prompt(*pair) for pair in pairs[i:i + batch]))
            new, start = [len(p) for p in ids], len(self.head)
            seg = Segments.cached(new, [start + n for n in new], self.device)
            positions = torch.cat([torch.arange(start, start + n) for n in new]).to(self.device)
            flat = torch.tensor(sum(ids, []), device=self.device)
            hidden = self.model.decoder(self.model.decoder.embed(flat), seg, positions,
                                        SharedPrefix(self.cache, len(new), keep=False))
            targets = torch.tensor(sum(labels, []), device=self.device)[1:]
            where = targets != IGNORE                           # never a sequence's first token
            losses = F.cross_entropy(self.model.decoder.logits(hidden[:-1][where]).float(), targets[where],
                                     reduction="none").double().cpu()
            for part in losses.split([sum(t != IGNORE for t in told) for told in labels]):
                scores.append((-float(part.sum()), -float(mean_of_nonzero(part[None]))))
        return np.array(scores)

    def reply(self, questions: list[str], max_new: int = 64) -> list[str]:
        """Greedy answers to several questions at once."""
        prompts = [torch.tensor(self.prompt(question)[0]) for question in questions]
        ids = self.model.generate(None, prompts, eos=self.tokenizer.eos, max_new=max_new,
                                  cache=SharedPrefix(self.cache, len(prompts), keep=True))
        return [self.tokenizer.decode(answer).strip() for answer in ids]

    def speak(self, question: str, max_new: int = 256) -> Iterator[str]:
        """Pieces of an answer as they come; the conversation goes on from here."""
        ids, tokens, told = self.prompt(question)[0], [], ""
        if self.cache.lens[0] > len(self.head):                 # a later turn: after the last answer's </s>
            ids = self.unread + [self.tokenizer.eos] + self.tokenizer.encode(f"[INST] {question} [/INST]")
        for (token,) in self.model.stream(None, [torch.tensor(ids)], eos=self.tokenizer.eos, max_new=max_new,
                                          cache=self.cache):
            tokens.append(token)
            text = self.tokenizer.decode(tokens)
            if not text.endswith("\ufffd"):                     # a character that is still incomplete
                yield text[len(told):]
                told = text
        self.unread = tokens[-1:] if len(tokens) == max_new else []     # cut short: its last is not cached

@torch.no_grad()
def look(model: Exo2Ego, tokenizer: Tokenizer, clip: dict | None) -> Seen:
    """Read one ego clip of a manifest's form, or for None nothing."""
    if clip is None:
        return Seen(model, tokenizer, None)
    frames = torch.from_numpy(read_clip(clip["video"], clip.get("start"), clip.get("end"), model.cfg.frames,
                                        model.cfg.image_size, None, clip.get("fps")))[None]
    return Seen(model, tokenizer, model.encode_ego(frames.to(next(model.parameters()).device)))

def converse(model: Exo2Ego, tokenizer: Tokenizer, video: str, question: str | None, start=None, end=None):
    """Answer one question about an ego video, or chat until an empty line. The video is read once."""
    seen = look(model, tokenizer, {"video": video, "start": start, "end": end})
    with contextlib.suppress(EOFError):                         # Ctrl-D
        while asked := question or input("? ").strip():
            for piece in seen.speak(asked):
                print(piece, end="", flush=True)
            print(flush=True)
            if question:
                return

# ----------------------------------------------------------------------------------------- EgoBench: metrics
def mean_of_nonzero(losses: Tensor) -> Tensor:
    """(candidates, L) -> (candidates,): the mean of the losses that are not exactly 0."""
    return losses.sum(1) / (losses != 0).sum(1).clamp(min=1)

def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """EgoPlan's selection: (candidates, L, V), (candidates, L) -> mean loss (candidates,). Position t
    predicts label t + 1, -100 is ignored, tokens of exactly zero loss do not count."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none",
                             ignore_index=IGNORE)
    return mean_of_nonzero(losses.view(len(labels), -1))

def ranked_precision(sim: np.ndarray, rel: np.ndarray) -> np.ndarray:
    """EK-100's AP of each query (rows): hits are relevance 1, but precision counts graded relevance too."""
    ranked = np.take_along_axis(rel, np.argsort(-sim, axis=1, kind="stable"), axis=1)
    precision = np.cumsum(ranked, axis=1) / np.arange(1, rel.shape[1] + 1)
    return (precision * (ranked == 1)).sum(1) / (ranked == 1).sum(1)

def ranked_gain(sim: np.ndarray, rel: np.ndarray) -> np.ndarray:
    """nDCG of each query over as many ranks as it has relevant items (> 0); ties in reversed order, as in the
    official code."""
    discount = 1 / np.log2(np.arange(2, rel.shape[1] + 2))
    counted = np.arange(rel.shape[1]) < (rel > 0).sum(1)[:, None]
    order = np.argsort(sim, axis=1, kind="stable")[:, ::-1]
    gain, ideal = ((r * discount * counted).sum(1) for r in (
        np.take_along_axis(rel, order, axis=1), np.sort(rel, axis=1)[:, ::-1]))
    return gain / ideal

def retrieval_metrics(sim: np.ndarray, rel: np.ndarray) -> dict[str, float]:
    """EPIC-KITCHENS-100 multi-instance retrieval: sim and rel (videos, texts), as fractions; the official
    arithmetic (joint-part-of-speech embeddings, mAP.py and nDCG.py), with stable sorts."""
    out, (sim, rel) = {}, (np.asarray(m, np.float64) for m in (sim, rel))
    for name, metric in (("mAP", ranked_precision), ("nDCG", ranked_gain)):
        both = [float(metric(s, r).mean()) for s, r in ((sim, rel), (sim.T, rel.T))]
        out |= {f"{name}_V2T": both[0], f"{name}_T2V": both[1], f"{name}_avg": sum(both) / 2}
    return out

def class_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AP of each class (columns), NaN without a positive; rows without any label are ranked last."""
    scores = np.where(labels.any(1)[:, None], scores, -np.inf)
    ranked = np.take_along_axis(labels, np.argsort(-scores, axis=0, kind="stable"), axis=0) > 0
    precision = np.cumsum(ranked, axis=0) / np.arange(1, len(labels) + 1)[:, None]
    with np.errstate(invalid="ignore"):
        return (precision * ranked).sum(0) / ranked.sum(0)

def charades_map(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Charades: (videos, classes) -> mAP (NaN if a class has no positive, as official) and its nan-mean."""
    each = class_precision(np.asarray(scores, np.float64), np.asarray(labels))
    return {"mAP": float(each.mean()), "nanmAP": float(np.nanmean(each))}

def egomcq_accuracy(scores: np.ndarray, answers: np.ndarray, types: np.ndarray) -> dict[str, float]:
    """EgoMCQ: (n, 5) scores -> percent right, the first best wins ties; type 1 is inter, 2 is intra (the
    original code prints them swapped); NaN where a type is absent."""
    right, types = np.argmax(scores, 1) == np.asarray(answers), np.asarray(types)
    return {name: 100 * float(right[types == kind].mean()) if (types == kind).any() else math.nan
            for kind, name in ((1, "inter"), (2, "intra"))}

def rouge_l(said: str, truth: str) -> float:
    """ROUGE-L's F1 on lower-case words and numbers, without stemming."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (said, truth))
    row = [0] * (len(b) + 1)                                    # longest common subsequence, row by row
    for word in a:
        row = list(itertools.accumulate(range(1, len(b) + 1), lambda left, j, old=row: max(
            left, old[j], old[j - 1] + 1 if word == b[j - 1] else 0), initial=0))
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0

def parse_letter(reply: str, options: int) -> int | None:
    """A strict reading: "B", "(B)", "B.", "B) text" ...; a word that starts with a letter, an empty reply and
    a letter beyond the options are none: counted, and wrong."""
    found = re.match(r"\s*(?:\(([A-Z])\)|([A-Z])[.:)]?)(?=\s*$|\s*\n|(?<=[.:)])\s)", reply)
    index = ord(found[1] or found[2]) - ord("A") if found else options
    return index if index < options else None

def judge_scores(replies: dict) -> dict[str, float]:
    """Video-ChatGPT's aggregation of a judge's replies {id: {"pred": "yes", "score": 4} or [that, ...]}: Acc
    over replies with a yes or no, Score the mean of int(score) over all."""
    replies = [reply[0] if isinstance(reply, list) else reply for reply in replies.values()]
    said = [next((word for word in ("yes", "no") if word in r["pred"].lower()), "") for r in replies]
    decided = said.count("yes") + said.count("no")
    return {"judge_acc": said.count("yes") / decided if decided else math.nan, "judge_n": len(replies),
            "judge_score": float(np.mean([int(r["score"]) for r in replies])) if replies else math.nan}

# --------------------------------------------------------------------------------------- EgoBench: the files
@dataclass
class Item:
    """One question of a benchmark: clips (EgoMCQ has five), and options with the index of the right one, or
    no options and the right text. `answer` None: hidden by the publishers. The model never sees a path."""
    id: str
    clips: list[dict]
    question: str = ""
    options: list[str] = field(default_factory=list)
    answer: int | str | list | None = None
    kind: str = ""

def shuffled(key: str, options: list[str]) -> tuple[list[str], int]:
    """Options whose first is right, in an order that the key decides -> them, and the answer's index."""
    order = np.random.default_rng(zlib.crc32(key.encode())).permutation(len(options))
    return [options[i] for i in order], int(np.argmin(order))

def egoschema(files: Files, o) -> Iterator[Item]:
    """EgoSchema: questions.json (5,031), subset_answers.json (the 500 public answers); whole videos."""
    answers = files.json("subset_answers.json")
    for q in files.each(files.json("questions.json")):
        yield Item(q["q_uid"], [{"video": files.video(f"{q['q_uid']}.mp4")}], q["question"],
                   [q[f"option {i}"] for i in range(5)], answers.get(q["q_uid"]))

def qaego4d(files: Files, o) -> Iterator[Item]:
    """QAEgo4D: annotations.QaEgo4D_test_close.json (GroundVQA: 500 items, three wrong answers each) or
    annotations.test.json (open). `video_id` is an Ego4D clip, shown whole. The official options are shuffled
    at load: --answer letter asks each question in five orders and averages."""
    closed = o.bench == "qaego4d-closed"
    for q in files.each(files.json(f"annotations.{'QaEgo4D_test_close' if closed else 'test'}.json")):
        clips = [{"video": files.video(f"{q['video_id']}.mp4")}]
        for turn in range(5 if closed and o.answer == "letter" else 1):
            key = f"{q['sample_id']}#{turn}" if turn else q["sample_id"]
            choice = shuffled(key, [q["answer"], *q["wrong_answers"]]) if closed else ([], q["answer"])
            yield Item(key, clips, q["question"], *choice)

def egotaskqa(files: Files, o) -> Iterator[Item]:
    """EgoTaskQA, direct or indirect: the official test file (test_qas.json or formatted_test_qas_encode.json)
    is open-vocabulary: classification over answer_set.txt by likelihood, or exact match of what is generated.
    egotaskqa.json is EgoThinker's 5-way form {q, video_path, a, option}: another test."""
    if (files.root / "egotaskqa.json").is_file():
        for i, q in enumerate(files.each(files.json("egotaskqa.json"))):
            letters, clips = sorted(q["option"]), [{"video": files.video(q["video_path"])}]
            options = [q["option"][letter] for letter in letters]
            yield Item(str(i), clips, q["q"], options, letters.index(q["a"]), "5-way")
        return
    known = [] if o.answer == "generate" else [
        answer for answer in map(" ".join, files.lines("answer_set.txt")) if not answer.startswith("<UNK")]
    for q in files.each(files.json("formatted_test_qas_encode.json", "test_qas.json")):
        truth, clips = q["answer"].lower(), [{"video": files.video(f"{q['interval']}.mp4")}]
        yield Item(str(q["question_id"]), clips, q["question"], known,
                   truth if not known else known.index(truth) if truth in known else -1,
                   "binary" if truth in ("yes", "no") else "open")

def charades(files: Files, o) -> Iterator[Item]:
    """Charades-Ego: CharadesEgo_v1_test_only1st.csv and Charades_v1_classes.txt; every class is scored on the
    whole video (157-way zero-shot protocol). `answer` is the list of classes that occur."""
    names = dict(line.split(" ", 1) for line in files.text("Charades_v1_classes.txt").splitlines() if line)
    codes = sorted(names)
    for row in files.table("CharadesEgo_v1_test_only1st.csv"):
        true = sorted({codes.index(part.split()[0]) for part in row["actions"].split(";") if part})
        yield Item(row["id"], [{"video": files.video(f"{row['id']}.mp4")}], "What am I doing?",
                   [names[code] for code in codes], true)

def egoplan(files: Files, o) -> Iterator[Item]:
    """EgoPlan-Bench: EgoPlan_validation.json; the clip runs from the first progress to the current frame, the
    candidates are answer texts. Frames count at the file's own rate."""
    for q in files.each(files.json("EgoPlan_validation.json")):
        video, goal = files.video(f"{q['video_id']}.mp4"), q["task_goal"].strip().rstrip(".").lower()
        now, steps = q["current_observation_frame"], q["task_progress_metadata"]
        frames = [min([s["start_frame"] for s in steps], default=max(0, now - 1)), now]
        options = [q[f"choice_{letter}"] for letter in "abcd"]
        yield Item(str(q["sample_id"]), [{"video": video, "frames": frames}],
                   f"I want to {goal}. The video shows what I have done so far. What do I do next?", options,
                   dict(zip("ABCD", range(4))).get(q["golden_choice_idx"]), q["video_source"])

def vln_qa(files: Files, o) -> Iterator[Item]:
    """VLN-QA: MVBench's egocentric_navigation.json (200 items, four candidates); whole videos. The folder of
    a video can name the answer: paths are never shown."""
    for i, q in enumerate(files.each(files.json("egocentric_navigation.json"))):
        yield Item(str(i), [{"video": files.video(q["video"])}], q["question"], q["candidates"],
                   q["candidates"].index(q["answer"]))

def egomcq(files: Files, o) -> Iterator[Item]:
    """EgoMCQ: egomcq.json; which of five clips does a narration describe? Type 1 is inter, 2 intra; seconds
    of the whole Ego4D video, negative ones cut to 0."""
    for key, q in files.each(files.json("egomcq.json").items()):
        clips = [{"video": files.video(f"{c['video_uid']}.mp4"), "start": max(0.0, float(c["clip_start"])),
                  "end": float(c["clip_end"])} for c in (q["choices"][str(k)] for k in range(5))]
        text = verbalise_wearer(re.sub(r"^#\w+\s+", "", q["query"]["clip_text"]))
        yield Item(key, clips, text, [], q["answer"], {1: "inter", 2: "intra"}[q["types"]])

def ek100(files: Files, o) -> Iterator[Item]:
    """EPIC-KITCHENS-100 retrieval: EPIC_100_retrieval_test.csv (videos) and ..._test_sentence.csv (texts, in
    that file's order). `answer` is the row of relevancies: (same verb class + overlap of noun sets) / 2."""
    def facts(row):
        return int(row["verb_class"]), set(ast.literal_eval(row["all_noun_classes"]))

    def seconds(clock):
        return sum(float(part) * 60 ** i for i, part in enumerate(reversed(clock.split(":"))))
    folder = "retrieval_annotations/" if (files.root / "retrieval_annotations").is_dir() else ""
    rows = {row["narration_id"]: (row, *facts(row))
            for row in files.table(f"{folder}EPIC_100_retrieval_test.csv")}
    texts = [(row["narration"], *rows[row["narration_id"]][1:])
             for row in files.table(f"{folder}EPIC_100_retrieval_test_sentence.csv")]
    for key, (row, verb, nouns) in rows.items():
        yield Item(key, [{"video": files.video(f"{row['video_id']}.mp4"),
                          "start": seconds(row["start_timestamp"]), "end": seconds(row["stop_timestamp"])}],
                   "Narrate the video.", [text for text, *_ in texts],
                   [((verb == v) + len(nouns & n) / len(nouns | n)) / 2 for _, v, n in texts])

@dataclass(frozen=True)
class Bench:
    """A benchmark: its reader, its task, the paper's per cent, the best open one known, a caution."""
    reader: Callable
    task: str                                                   # choice | open | clips | classes | retrieval
    paper: str
    best: str
    note: str = ""

BENCHES = {     # anchors: the paper's Table; shared notes of November 2026, incomplete
    "egoschema": Bench(egoschema, "choice", "61.3", "77.9 (Qwen2-VL-72B)", "ours: the 500 public answers"),
    "qaego4d-closed": Bench(qaego4d, "choice", "62.1", "67.2 (EgoThinker-7B)", "500 items"),
    "qaego4d-open": Bench(qaego4d, "open", "28.3 / 2.7", "",
                          "the paper: judged by GPT; ours: exact match, ROUGE-L"),
    "egotaskqa-direct": Bench(egotaskqa, "choice", "44.7", "48.7 (MFAS, fine-tuned)",
                              "the paper's form is unknown"),
    "egotaskqa-indirect": Bench(egotaskqa, "choice", "50.3", "45.4 (MFAS, fine-tuned)",
                                "the paper's form is unknown"),
    "charades-ego": Bench(charades, "classes", "70.9", "36.1 (LaViLa-L, fine-tuned)",
                          "70.9 cannot come from the standard 157-class protocol, which ours is"),
    "ek100-mir": Bench(ek100, "retrieval", "49.7 mAP, 63.6 nDCG", "45.9 / 38.6 zero-shot (EgoVideo)",
                       "63.6 nDCG is not the standard zero-shot protocol, which ours is"),
    "egoplan": Bench(egoplan, "choice", "42.7", "47.1 (EgoThinker-7B)"),
    "vln-qa": Bench(vln_qa, "choice", "44.5", "54.0 (EgoThinker-7B)", "200 items: +- 6.9 points"),
    "egomcq": Bench(egomcq, "clips", "88.4 inter, 41.2 intra", "91.0 / 63.1 (EgoVLPv2, LaViLa-L)",
                    "dual encoders choose by similarity, we by likelihood")}

# ------------------------------------------------------------------------------------------- EgoBench: a run
def egobench(model: Exo2Ego, tokenizer: Tokenizer, o, protocol: dict, rank: int, world: int):
    """Score one benchmark: predictions are written as they come, one object a line, by each rank for its
    share; the same command goes on where a killed one stopped. The first rank sums up."""
    bench, out = BENCHES[o.bench], Path(o.out)
    o.root = str(Path(o.data) / o.bench)
    items = list(convert(bench.reader, o))[:o.limit]
    if len({item.id for item in items}) < len(items) or not items:
        raise DataError(f"{o.root}: ids repeat, or there are no items")
    o = replace_mode(o, bench, items)
    content = hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()[:16]
    protocol |= dict(bench=o.bench, answer=o.answer, length=o.length, blind=o.blind, items=len(items),
                     content=content)
    place_clips(items, Path(o.videos) if o.videos else Path(o.root), o.allow_outside, o.blind)
    name = f"{o.bench}-blind" if o.blind else o.bench
    done = {key: row for key, row in read_predictions(out, name, protocol).items() if "error" not in row}
    barrier()                                                   # all have read before any writes
    own = out / (f"{name}.rank{rank}.jsonl" if rank else f"{name}.jsonl")
    mine = {item.id: done[item.id] for item in items if item.id in done} if rank == 0 else {}
    if rank == 0:
        write_jsonl(own, [protocol, *mine.values()])
        for old in out.glob(f"{name}.rank*.jsonl"):             # of more ranks than there are now
            old.unlink()
    barrier()                                                   # now the other ranks' old files may go
    if rank:
        write_jsonl(own, [protocol])
    todo = [item for item in items[rank::world] if item.id not in done]
    todo.sort(key=lambda item: str(item.clips[0]))              # the questions about a video in a row
    print(f"{name}: {len(items)} items, {len(items) - len(todo)} of them done or of other ranks", flush=True)
    with open(own, "a", buffering=1) as file:
        answered = answers(model, tokenizer, todo, items, bench, o)
        for prediction in progress(answered, len(todo), "items") if rank == 0 else answered:
            file.write(json.dumps(prediction) + "\n")
    barrier()
    if rank:
        return
    done = read_predictions(out, name, protocol)
    write_jsonl(out / f"{name}.jsonl", [protocol, *(done[item.id] for item in items)])
    for extra in out.glob(f"{name}.rank*.jsonl"):
        extra.unlink()
    figures = summarise(bench, items, [done[item.id] for item in items], o)
    figures = {key: None if value != value else value for key, value in figures.items()}    # NaN is not JSON
    write_text_atomic(out / f"{name}.json", json.dumps(protocol | figures, indent=1))
    print("".join(f"{key}: {value:.4f}\n" if isinstance(value, float) else f"{key}: {value}\n"
                  for key, value in figures.items()) + f"{out / name}.json", flush=True)

def replace_mode(o, bench: Bench, items: list[Item]):
    """The flags with the way of answering that this benchmark allows: open questions are generated, letters
    need a choice among at most 26, everything else goes by likelihood; a change is said."""
    mode = o.answer if o.answer == "letter" else "likelihood"
    if bench.task != "choice" or len(items[0].options) > 26:
        mode = "likelihood"
    if bench.task != "clips" and not items[0].options:
        mode = "generate"
    if mode != o.answer:
        print(f"{o.bench}: answered by {mode}, --answer {o.answer} does not apply")
    return argparse.Namespace(**vars(o) | {"answer": mode})

def barrier():
    """All ranks have come this far."""
    if dist.is_initialized():
        dist.barrier()

def place_clips(items: list[Item], root: Path, allow_outside: bool, blind: bool):
    """Make paths absolute, below the root, also where EPIC-KITCHENS puts its files (P01/videos/P01_11.MP4);
    frame numbers become seconds at the file's own rate. Refused if not one video is there."""
    rates, places, base = {}, {}, os.path.realpath(root)
    for clip in (clip for item in items for clip in item.clips):
        name = clip["video"]
        if name not in places:
            stem = Path(name).stem
            tries = [root / name, (root / name).with_suffix(".MP4"),
                     root / stem.split("_")[0] / f"videos/{stem}.MP4"]
            places[name] = os.path.realpath(next((path for path in tries if path.is_file()), tries[0]))
        video = clip["video"] = places[name]
        if not allow_outside and not video.startswith(os.path.join(base, "")):
            raise DataError(f"{name} is outside {base}: pass --videos or --allow-outside")
        if "frames" in clip:
            if video not in rates:
                rates[video] = 30.0
                with contextlib.suppress(DataError):            # unreadable: its item will say so
                    rates[video] = frame_rate(video)
            first, last = clip.pop("frames")
            clip |= {"start": max(0, first) / rates[video], "end": (max(last, first) + 1) / rates[video]}
    if not blind and not any(os.path.isfile(video) for video in places.values()):
        raise DataError(f"none of {len(places)} videos is there, such as {next(iter(places.values()))}: pass "
                        f"--videos")

def read_predictions(out: Path, name: str, protocol: dict) -> dict[str, dict]:
    """What earlier runs of this very protocol left, by item; another protocol's file is refused by field."""
    done = {}
    for path in [out / f"{name}.jsonl", *sorted(out.glob(f"{name}.rank*.jsonl"))]:
        for i, line in enumerate(path.read_text().splitlines() if path.is_file() else []):
            try:
                row = json.loads(line)
            except ValueError:
                break                                           # the line that a kill cut short
            if i == 0:
                for key, value in protocol.items():
                    if row.get(key) != value and key not in ("ckpt", "git"):
                        raise DataError(f"{path} was made with {key}={row.get(key)}, this run has {value}: "
                                        f"choose another --out or remove it")
            else:
                done[row["id"]] = row
    return done

def answers(model, tokenizer, items: list[Item], everything: list[Item], bench: Bench, o) -> Iterator[dict]:
    """Predictions item by item; a video in a row of questions is read once. What cannot be read is an error
    in its prediction, counts as wrong, and is counted."""
    texts = text_side(model, tokenizer, everything, o.blind) if items and bench.task == "retrieval" else None
    last = None, None                                           # a clip, and what the model saw of it
    for item in items:
        kept = dict(options=[], answer=None) if bench.task in ("retrieval", "classes") else {}      # too long
        out = {"id": item.id, "item": asdict(item) | kept}      # for the report
        try:
            if bench.task == "clips":
                seen = [look(model, tokenizer, None if o.blind else clip) for clip in item.clips]
                out["scores"] = [float(s.score([(NARRATE, item.question)])[0, 0]) for s in seen]
            else:
                clip = None if o.blind else item.clips[0]
                last = last if last[0] == clip and last[1] else (clip, look(model, tokenizer, clip))
                out |= answer_item(last[1], item, bench, o, texts)
        except DataError as error:
            out["error"] = str(error)
        yield out

def answer_item(seen: Seen, item: Item, bench: Bench, o, texts) -> dict:
    """One item: likelihood, `log p(option | video, question)` summed or a mean per token; letter, a generated
    letter, strictly parsed; generate, an open answer."""
    if bench.task == "retrieval":
        return retrieve(seen, item, texts)
    if not item.options:
        return {"reply": seen.reply([item.question])[0]}
    if o.answer == "letter":
        listed = "\n".join(f"{chr(65 + i)}. {text}" for i, text in enumerate(item.options))
        reply = seen.reply([f"{item.question}\n{listed}\nAnswer with the letter of the right option."], 16)[0]
        return {"reply": reply, "choice": parse_letter(reply, len(item.options))}
    scores = seen.score([(item.question, option) for option in item.options])[:, int(o.length == "mean")]
    return {"scores": scores.tolist()}

@torch.no_grad()
def text_side(model, tokenizer, items: list[Item], blind: bool) -> tuple[Tensor, Tensor, np.ndarray]:
    """For retrieval: the mean pooled video of the first 64 clips (W,), each text's mean word embedding around
    their mean (texts, W), and its mean log-likelihood without a video (texts,)."""
    texts, device, clips = items[0].options, model.decoder.lm_head.weight.device, []
    ids = (torch.tensor(tokenizer.encode(text), device=device) for text in texts)
    words = torch.stack([model.decoder.embed(words).float().mean(0) for words in ids])
    for item in [] if blind else items[:64]:
        with contextlib.suppress(DataError):
            clips.append(look(model, tokenizer, item.clips[0]).pooled)
    alone = Seen(model, tokenizer, None).score([(NARRATE, text) for text in texts])[:, 1]
    centre = torch.stack(clips).mean(0) if clips else torch.zeros_like(words[0])
    return centre, F.normalize(words - words.mean(0), dim=-1), alone

def retrieve(seen: Seen, item: Item, texts, shortlist: int = 16) -> dict:
    """A dual score for every text, the cosine of pooled [x ; F(x)] and pooled word embeddings, each around
    its mean: the decoder reads both in one space (our choice; on the toy world it beat pooled hidden states).
    Its best are re-ranked by what the video adds to the text's mean log-likelihood, squashed to (0, 1).
    Blind: how likely the text is by itself, the same for every video."""
    centre, words, alone = texts
    if seen.pooled is None:
        dual, best = alone / (1 + np.abs(alone).max()), np.array([], int)
        gain = alone[best]
    else:
        dual = (words * F.normalize(seen.pooled - centre, dim=-1)).sum(-1).cpu().numpy()    # in float32
        best = np.argsort(-dual, kind="stable")[:shortlist]
        gain = seen.score([(NARRATE, item.options[i]) for i in best])[:, 1] - alone[best]
    return {"dual": base64.b64encode(dual.astype(np.float16).tobytes()).decode(),
            "top": {int(i): 1 / (1 + math.exp(-g)) for i, g in zip(best, gain)}}

def similarity(prediction: dict, texts: int) -> np.ndarray:
    """The row of scores of a retrieval prediction: (dual + 1) / 2, and above all those 1 + the re-ranked."""
    if "dual" not in prediction:
        return np.zeros(texts)
    row = np.frombuffer(base64.b64decode(prediction["dual"]), np.float16).astype(float) / 2 + 0.5
    for index, value in prediction["top"].items():
        row[int(index)] = 1 + value
    return row

def outcome(item: Item, prediction: dict) -> float:
    """1 right, 0 wrong or unread; equal best options share. Equal texts count as one option (EgoPlan)."""
    if "scores" in prediction:
        best = np.array(prediction["scores"]) == max(prediction["scores"])
        options = item.options or range(len(best))
        right = np.array([option == options[item.answer] for option in options])
        return float((best & right).sum() / best.sum()) if item.answer >= 0 else 0.0
    if "choice" in prediction:
        return float(prediction["choice"] is not None
                     and item.options[prediction["choice"]] == item.options[item.answer])
    said, truth = (" ".join(str(text).lower().strip(" .").split())
                   for text in (prediction.get("reply", ""), item.answer))
    return float(said == truth)

def summarise(bench: Bench, items: list[Item], predictions: list[dict], o) -> dict:
    """The score with n, chance and a 95 % interval, and whatever else the benchmark reports; what it needs on
    disk: a submission file, the input of a judge."""
    out = {"unreadable": sum("error" in p for p in predictions)}
    name = f"{o.out}/{o.bench}{'-blind' * o.blind}"
    if bench.task in ("retrieval", "classes"):
        return out | ranking_figures(bench, items, predictions)
    replies = [p["reply"] for p in predictions if "reply" in p]
    if not items or not any(item.answer is not None for item in items):
        raise DataError(f"{o.bench}: none of these {len(items)} items has a public answer")
    if o.answer == "letter":
        out["parser_failures"] = sum(p.get("choice") is None for p in predictions)
    known = [(item, p) for item, p in zip(items, predictions) if item.answer is not None]
    merged: dict[str, list] = {}                                # the orders of one question are averaged
    for item, p in known:
        key = item.id.split("#")[0] if o.answer == "letter" else item.id
        merged.setdefault(key, []).append(outcome(item, p))
    results = [float(np.mean(values)) for values in merged.values()]
    chance = float(np.mean([1 / (len(item.options) or len(item.clips)) if item.options or len(item.clips) > 1
                            else 0 for item, _ in known]))
    figures = proportion("score", results, chance)
    kinds = [item.kind for item, _ in known]
    for kind in sorted(set(kinds) - {""}):
        figures |= proportion(kind, [outcome(*pair) for pair, k in zip(known, kinds) if k == kind], chance)
    if not items[0].options and bench.task != "clips":
        figures["rouge_l"] = float(np.mean([rouge_l(p.get("reply", ""), item.answer) for item, p in known]))
        pairs = [dict(id=item.id, q=item.question, a=item.answer, pred=p.get("reply", ""))
                 for item, p in known]
        write_text_atomic(f"{name}.judge_in.json", json.dumps(pairs, indent=1))
        if o.judge:
            figures |= judge_scores(read_json(Path(o.judge)))
    if o.bench in ("egoschema", "egoplan") and o.answer != "generate":
        chosen = {item.id: p.get("choice", int(np.argmax(p["scores"])) if "scores" in p else 0) or 0
                  for item, p in zip(items, predictions)}
        write_text_atomic(f"{name}.submission.json", json.dumps(chosen if o.bench == "egoschema" else [
            {"sample_id": int(key), "label": "ABCD"[choice]} for key, choice in chosen.items()]))
    if replies:
        out["empty_replies"] = sum(not reply for reply in replies)
    return out | figures

def ranking_figures(bench: Bench, items: list[Item], predictions: list[dict]) -> dict:
    """mAP (and nDCG), with chance as random scores on the same labels get it; the interval is the spread over
    queries or classes (normal)."""
    random = np.random.default_rng(0).normal(size=(len(items), len(items[0].options)))
    if bench.task == "classes":
        labels = np.zeros_like(random)
        for row, item in zip(labels, items):
            row[item.answer] = 1
        lowest = min((min(p["scores"]) for p in predictions if "scores" in p), default=0.0) - 1
        unread = [lowest] * len(items[0].options)               # ranked last
        scores = np.array([p.get("scores", unread) for p in predictions])
        each, figures = class_precision(scores, labels), charades_map(scores, labels)
        score, chance = figures["nanmAP"], charades_map(random, labels)["nanmAP"]
        each = each[np.isfinite(each)]
    else:
        rel = np.array([item.answer for item in items])
        told = (rel == 1).any(0)                                # with --limit some texts have no video
        sim = np.array([similarity(p, rel.shape[1]) for p in predictions])[:, told]
        rel, random = rel[:, told], random[:, told]
        figures, by_chance = retrieval_metrics(sim, rel), retrieval_metrics(random, rel)
        score, chance = figures["mAP_avg"], by_chance["mAP_avg"]
        figures["nDCG_avg_chance"] = by_chance["nDCG_avg"]
        each = ranked_precision(sim, rel)
    if not len(each):
        raise DataError(f"none of these {len(items)} items has a label to rank")
    half = 1.96 * float(each.std()) / math.sqrt(len(each))
    return dict(score=score, score_chance=chance, score_lo=max(0.0, score - half),
                score_hi=min(1.0, score + half), score_n=len(items)) | figures

# -------------------------------------------------------------------------------------- EgoBench: the report
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>EgoBench</title><style>
body {font: 15px/1.45 system-ui, sans-serif; margin: auto; max-width: 70rem; padding: 1rem; color: #222}
table {border-collapse: collapse; width: 100%} .wide {overflow-x: auto} small {color: #666}
td, th {padding: .3rem .5rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top}
.bar {position: relative; height: 1.1rem; background: #eee; min-width: 9rem}
.bar i {position: absolute; top: 0; bottom: 0} .right {color: #14823c} .wrong {color: #b92828}
.item {border: 1px solid #ddd; border-radius: 6px; padding: .7rem; margin: .8rem 0}
.item img {max-width: 100%} td small {display: block; min-width: 13rem} td {min-width: 4.5rem}</style>
<h1>EgoBench</h1><p>Per cent; intervals are 95 %. In the bars: the interval (blue), the score (black), chance
(red). The last columns follow protocols of their own.</p><div class=wide>
<table><tr><th>benchmark<th>ours<th><th>n<th>chance<th>blind<th>paper<th>best open<th>protocol</tr>"""

def report(out: Path, frames: bool = True, samples: int = 4) -> Path:
    """results/ -> one self-contained page (no scripts, nothing loaded from elsewhere): every score with its
    interval, chance and blind floor beside the paper's, and sample items. All text is escaped."""
    esc, parts = html.escape, [PAGE]
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in BENCHES
               if (out / f"{name}.json").is_file()}
    if not results:
        raise DataError(f"{out} holds no results: run eval.py --bench NAME --out {out} first")
    for name, r in results.items():
        blind = read_json(out / f"{name}-blind.json") if (out / f"{name}-blind.json").is_file() else {}
        same = all(blind.get(key) == r[key] for key in ("weights", "answer", "length", "content"))
        lo, hi, mid, chance = (100 * r[key] for key in ("score_lo", "score_hi", "score", "score_chance"))
        parts_of = ("inter", "intra", "nDCG_avg", "rouge_l", "binary", "open", "judge_acc")
        extra = "".join(f"<br>{key} {100 * r[key]:.1f}" for key in parts_of if r.get(key) is not None)
        marks = ((lo, f"{hi - lo:.1f}%", "#8ab"), (mid, "2px", "#000"), (chance, "2px", "#c33"))
        bar = "".join(f'<i style="left:{at:.1f}%;width:{width};background:{ink}"></i>'
                      for at, width, ink in marks)
        note = f"{r['answer']}, {r['length']}{'; ' + BENCHES[name].note if BENCHES[name].note else ''}"
        cells = (f"{mid:.1f} [{lo:.1f}, {hi:.1f}]{extra}", f"<div class=bar>{bar}</div>", r["score_n"],
                 f"{chance:.1f}", f"{100 * blind['score']:.1f}" if same else "not run",
                 esc(BENCHES[name].paper), esc(BENCHES[name].best), f"<small>{esc(note)}</small>")
        parts.append(f"<tr><td>{name}" + "".join(f"<td>{cell}" for cell in cells) + "</tr>")
    checkpoints = sorted({f"{r['ckpt']}, code {r['git']}" for r in results.values()})
    parts.append(f"</table></div><p><small>{esc('; '.join(checkpoints))}</small></p>")
    for name in results:
        parts.append(f"<h2>{name}</h2>")
        shown = {key: row for key, row in read_predictions(out, name, {}).items()
                 if row["item"]["options"] or row["item"]["answer"] is not None}
        for row in list(shown.values())[::max(1, len(shown) // samples)][:samples]:
            parts.append(report_item(row, frames))
    write_text_atomic(out / "report.html", "\n".join(parts) + "</html>")
    return out / "report.html"

def report_item(row: dict, frames: bool) -> str:
    """One sample: frames of its first clip, the question, what was chosen or said, and the truth."""
    esc, item, pictures = html.escape, row["item"], ""
    if frames:
        with contextlib.suppress(DataError):
            clip = item["clips"][0]
            strip = read_clip(clip["video"], clip.get("start"), clip.get("end"), 4, 160)
            png = encode_png(rearrange(strip, "t c h w -> h (t w) c"))
            pictures = f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    lines, truth = [], item["answer"]
    options = item["options"] or [f"clip {i + 1}" for i in range(len(item["clips"]))] * ("scores" in row)
    if "scores" in row and isinstance(truth, int | None):
        odds = np.exp(np.array(row["scores"]) - max(row["scores"]))
        for i, (text, p) in enumerate(zip(options, odds / odds.sum())):
            mark = "right" if i == truth else "wrong" if p == max(odds / odds.sum()) else ""
            lines.append(f'<li class="{mark}">{esc(text)} <small>{100 * p:.0f} %</small>')
    said = esc(row.get("reply", row.get("error", "")))
    told = esc(options[truth] if isinstance(truth, int) and 0 <= truth < len(options) else
               truth if isinstance(truth, str) else "")
    return (f'<div class=item>{pictures}<p>{esc(item["question"])}</p><ol>{"".join(lines)}</ol>'
            + f"<p>said: {said}</p>" * bool(said) + f"<p>true: {told}</p></div>")

# ----------------------------------------------------------------------------------------------- the commands
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="run folder or step_* (the newest of out/stage3 ... out/stage0)")
    parser.add_argument("--base", help="where the untouched weights are, if they have moved")
    parser.add_argument("--vision", help="where the CLIP directory is, if it has moved")
    parser.add_argument("--data", help="the micro-world's folder (that of the training), or the benchmarks'")
    parser.add_argument("--video", help="ask about this file")
    parser.add_argument("--ask", help="the question; without it, a chat")
    parser.add_argument("--start", type=float, help="seconds")
    parser.add_argument("--end", type=float, help="seconds")
    parser.add_argument("--bench", choices=[*BENCHES, "all"], help="DATA/<name>/ has the official files")
    parser.add_argument("--videos", help="where the benchmark's videos are (DATA/<name>/, or videos/ in it)")
    parser.add_argument("--out", default="results", help="where predictions and scores go")
    parser.add_argument("--answer", choices=("likelihood", "letter", "generate"), default="likelihood",
                        help="how options are chosen; open questions are always generated")
    parser.add_argument("--length", choices=("mean", "sum"), default="mean", help="of token log-likelihoods")
    parser.add_argument("--blind", action="store_true", help="without the video: the floor of text alone")
    parser.add_argument("--limit", type=int, help="the first items only")
    parser.add_argument("--judge", help="a judge's replies (JSON) to qaego4d-open.judge_in.json")
    parser.add_argument("--allow-outside", action="store_true", help="video paths may leave their folder")
    parser.add_argument("--report", action="store_true", help="OUT/report.html from what is in OUT")
    args = parser.parse_args(argv)
    if args.ask and not args.video or args.bench and not args.data:
        parser.error("--ask needs --video FILE, and --bench needs --data DIR")
    try:
        if args.bench:
            run_benches(args)
        if args.report:
            print(report(Path(args.out)))
        if args.bench or args.report:
            return
        model, tokenizer, state, folder, half = open_checkpoint(args)
        with autocast(next(model.parameters()).device, half):
            if args.video:
                converse(model, tokenizer, args.video, args.ask, args.start, args.end)
                return
            print(f"{folder}: stage {state['stage']}, step {state['step']} of {state['steps']}")
            data = args.data or state.get("config", {}).get("data", "out/toy")
            toy_benchmark(model, tokenizer, data, state["stage"], folder.parent)
    except (DataError, ValueError, FileNotFoundError) as error:
        sys.exit(f"eval.py: {error}")

def open_checkpoint(args):
    """The checkpoint that the flags name, on this machine -> model, tokenizer, state, its folder, bf16."""
    stages = [f"out/stage{n}" for n in (3, 2, 1, 0)]
    ckpt = args.ckpt or next((s for s in stages if newest_checkpoint(s)), stages[1])
    model, state = load_checkpoint(ckpt, args.base, args.vision)
    tokenizer = Tokenizer(newest_checkpoint(ckpt))
    half = state.get("bf16", any(p.dtype != torch.float32 for p in model.parameters()))
    device = pick_device()
    print(choose_attention(device, torch.bfloat16 if half else torch.float32, model.cfg))
    return to_device_and_dtype(model, device, half), tokenizer, state, newest_checkpoint(ckpt), half

def run_benches(args):
    """One benchmark, or all whose folder is there; alone or as one of torchrun's ranks."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))      # the others wait for the slowest
    model, tokenizer, state, folder, half = open_checkpoint(args)
    protocol = dict(ckpt=str(folder), weights=fingerprint(folder), stage=state["stage"], git=git_revision())
    there = [name for name in BENCHES if (Path(args.data) / name).is_dir()]
    names = there if args.bench == "all" else [args.bench]
    if not names:
        raise DataError(f"{args.data} has none of the folders {', '.join(BENCHES)}")
    for args.bench in names:
        try:
            lock = Path(args.out) / f".{args.bench}{'-blind' * args.blind}.lock{rank}"
            with autocast(next(model.parameters()).device, half), file_lock(lock, wait=False):
                egobench(model, tokenizer, args, protocol, rank, world)
        except KeyboardInterrupt:
            sys.exit(f"\nstopped: what is done is in {args.out}/{args.bench}.jsonl, the same command goes on")
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
