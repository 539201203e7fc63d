"""Score a checkpoint, or ask it about a video.

    python eval.py  # the toy benchmark of the newest stage, with pictures
    python eval.py --video my.mp4 --ask "What am I doing?"      # one question; a chat without --ask
    python eval.py --bench egoschema --data DIR --out results   # EgoBench; --report makes a page

Every score comes with its chance level, a 95 % interval and the number of items. Narrations and answers are
decoded greedily and count as right when they match the truth exactly.
"""
from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from data import (COLOURS, NARRATE, PATTERNS, VERBS, Batch, DataError, Files, Loader, Tokenizer, contact_sheet,
                  convert, encode_png, file_lock, frame_rate, progress, read_clip, read_manifest, toy_split,
                  toy_world, verbalise_wearer, write_jsonl, write_text_atomic)
from model import (IGNORE, VIDEO, Exo2Ego, KVCache, Segments, SharedPrefix, autocast, choose_attention,
                   feature_kl, fingerprint, git_revision, load_checkpoint, newest_checkpoint, pick_device,
                   to_device_and_dtype)


# ------------------------------------------------------- 1 a score is a share, its chance and its interval
def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion: it stays inside [0, 1] and is honest near both ends."""
    z = 1.96
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def proportion(name: str, outcomes, chance: float) -> dict[str, float]:
    """The mean of outcomes in [0, 1], as the five figures that every score has."""
    outcomes = np.asarray(outcomes, float)
    share = float(outcomes.mean())
    low, high = wilson(share, len(outcomes))
    return {
        name: share,
        f"{name}_chance": chance,
        f"{name}_lo": low,
        f"{name}_hi": high,
        f"{name}_n": len(outcomes)}


def choice_score(scores: np.ndarray, answer: int) -> float:
    """1 if the answer alone has the best score, 1/k if k candidates share it, else 0.

    A model that gives every candidate the same score so gets chance, wherever the answer stands.
    """
    best = scores == scores.max()
    return float(best[answer]) / best.sum()


def format_figures(figures: dict) -> str:
    """One line `key: value` a figure."""
    lines = []
    for key, value in figures.items():
        text = f"{value:.4f}" if isinstance(value, float) else value
        lines.append(f"{key}: {text}")
    return "\n".join(lines)


def spread(n: int, count: int, first: int = 0) -> range:
    """At most `count` indices below n, evenly spaced from `first` on: the samples that are shown."""
    return range(first, n, max(1, n // count))[:count]


# -------------------------------------------------------------------------------------------- 2 answering
def iterate_batches(model: Exo2Ego, tokenizer: Tokenizer, rows: list[dict], view: str,
                    batch: int = 100) -> Iterator[Batch]:
    """The clips of all rows, in order, in batches on the model's device.

    `view` is ego, exo or pair. Of a row's exo cameras the first one is read. DataError: a clip cannot be read.
    """
    device = next(model.parameters()).device
    one_camera = [row | {"exo": row["exo"][:1]} if "exo" in row else row for row in rows]
    loader = Loader(one_camera, model.cfg, tokenizer, view=view, batch=batch, train=False)
    for micro_batches in loader.stream(0, math.ceil(len(rows) / batch)):
        for micro_batch in micro_batches:
            if micro_batch.skipped:
                raise DataError(f"a benchmark needs every clip: {micro_batch.skipped[0]}")
            yield micro_batch.to(device)


@torch.no_grad()
def encode_clips(model: Exo2Ego, tokenizer: Tokenizer, rows: list[dict], view: str) -> Tensor:
    """Visual tokens (rows, tokens, W) of every row's clip; `view` is ego or exo."""
    encode = model.encode_ego if view == "ego" else model.encode_exo
    batches = iterate_batches(model, tokenizer, rows, view)
    return torch.cat([encode(getattr(batch, view)) for batch in batches])


def generate_answers(model: Exo2Ego, tokenizer: Tokenizer, visual: Tensor, questions: list[str],
                     batch: int = 125, max_new: int = 32) -> list[str]:
    """Greedy answers to one question about each row of `visual` (questions, tokens, W)."""
    answers = []
    for first in range(0, len(questions), batch):
        prompts = []
        for question in questions[first:first + batch]:
            ids, _ = tokenizer.chat([{"user": question}], visual.shape[1])
            prompts.append(torch.tensor(ids))
        shown = visual[first:first + batch]
        replies = model.generate(shown, prompts, eos=tokenizer.eos, max_new=max_new)
        answers += [tokenizer.decode(reply).strip() for reply in replies]
    return answers


def narration_log_likelihood(model: Exo2Ego, tokenizer: Tokenizer, visual: Tensor,
                             pairs: list[tuple[int, str]], batch: int = 250) -> np.ndarray:
    """log p(narration | clip) in nats, summed over its tokens, of each (row of visual, narration) -> (n,)."""
    scores = []
    for first in range(0, len(pairs), batch):
        clips, ids, labels, lens = [], [], [], []
        for clip, text in pairs[first:first + batch]:
            turn = {"user": NARRATE, "assistant": text}
            its_ids, its_labels = tokenizer.chat([turn], visual.shape[1])
            clips.append(clip)
            ids += its_ids
            labels += its_labels
            lens.append(len(its_ids))
        packed_ids = torch.tensor(ids, device=visual.device)
        packed_labels = torch.tensor(labels, device=visual.device)
        scores.append(model.log_likelihood(visual[clips], packed_ids, packed_labels, lens))
    return torch.cat(scores).cpu().numpy()


# ------------------------------------------------------------------------------------ 3 the toy benchmark
# A narration of the micro-world and its four facts.
NARRATION = re.compile(r"Camera-wearer (?P<verb>.+) the (?P<colour>\w+) (?P<pattern>\w+) block "
                       r"with the (?P<hand>\w+) hand\.")
NARRATION_CHANCE = 1 / (len(VERBS) * len(COLOURS) * len(PATTERNS) * 2)
GREEN = (20, 130, 50)
RED = (190, 40, 40)
GREY = (110, 110, 110)


def toy_benchmark(model: Exo2Ego, tokenizer: Tokenizer, data: str, stage: int, out: str | os.PathLike,
                  init: str | os.PathLike | None = None) -> dict:
    """The figures of a stage on clips of unseen scenes. They are printed and kept in out/eval.json.

    Stages 0 and 1 score the demonstrator's narrations of exo clips. Stage 2 scores the learner's narrations,
    and the KL of true and of shuffled partners. Stage 3 scores its narrations, its choice of a clip among five,
    and its answers. out/predictions.jsonl holds what the model said of each clip, out/samples.png shows a few.
    `init` is the run that the stage started from: stage 1 says how good that one was.
    """
    began = time.time()
    if not (Path(data) / "world.json").is_file():
        raise DataError(f"--data {data} is no micro-world (data.py toy makes one); your own videos: --video")
    model.eval()
    out = Path(out)
    world = toy_world(data)
    split, view = ("exo_test", "exo") if stage <= 1 else ("test", "ego")
    rows = read_manifest(toy_split(data, split, world))
    visual = encode_clips(model, tokenizer, rows, view)

    # Each column of predictions.jsonl has one value a row.
    figures, narrations = evaluate_narrations(model, tokenizer, rows, visual, view)
    columns = {"said": narrations}
    if stage == 2:
        pairs = read_manifest(toy_split(data, "val", world))
        figures |= kl_true_vs_shuffled(model, tokenizer, pairs)
    if stage == 3:
        choice_figures, columns["inter"], columns["intra"] = choose_clip(model, tokenizer, rows, visual)
        question_figures, columns["reply"] = evaluate_questions(model, tokenizer, rows, visual)
        figures |= choice_figures | question_figures

    # The choice takes at most a thousand rows, so its columns may be shorter than the others.
    predictions = []
    for row, *values in zip_longest(rows, *columns.values()):
        truth = {key: row[key] for key in ("id", "text", "turns")}
        predictions.append(truth | dict(zip(columns, values)))
    write_jsonl(out / "predictions.jsonl", predictions)
    draw_samples(out / "samples.png", rows, view, narrations, columns.get("reply"))

    # Before the figures of stage 1 comes the one that it set out from.
    earlier = Path(init or "") / "eval.json"
    if stage == 1 and init and earlier.is_file():
        before = json.loads(earlier.read_text())["exo_em"]
        print(f"exo narration exact match: {before:.3f} before, {figures['exo_em']:.3f} after")
    print(format_figures(figures))
    print(f"pictures: {out / 'samples.png'} ({time.time() - began:.0f} s)", flush=True)
    (out / "eval.json").write_text(json.dumps(figures, indent=1))
    return figures


def evaluate_narrations(model, tokenizer, rows: list[dict], visual: Tensor, view: str):
    """Exact match of whole narrations and of each of their four facts -> figures, the narrations."""
    narrations = generate_answers(model, tokenizer, visual, [NARRATE] * len(rows))
    exact = [said == row["text"] for said, row in zip(narrations, rows)]
    figures = proportion(f"{view}_em", exact, NARRATION_CHANCE)

    # A narration of another form has none of the facts right.
    matches = [(NARRATION.fullmatch(said), NARRATION.fullmatch(row["text"]))
               for said, row in zip(narrations, rows)]
    for fact in NARRATION.groupindex:
        right = [said is not None and said[fact] == true[fact] for said, true in matches]
        figures[f"{view}_{fact}"] = float(np.mean(right))

    for i in spread(len(rows), 5):
        if exact[i]:
            print(f"  ok    {narrations[i]}")
        else:
            print(f"  wrong {narrations[i]}   (true: {rows[i]['text']})")
    return figures, narrations


def evaluate_questions(model, tokenizer, rows: list[dict], visual: Tensor):
    """Exact match of the answers to each row's first question -> figures, the answers.

    Chance is a uniform draw from the answers that this very question has in the test set.
    """
    turns = [row["turns"][0] for row in rows]
    replies = generate_answers(model, tokenizer, visual, [turn["user"] for turn in turns])
    answers_of = defaultdict(set)
    for turn in turns:
        answers_of[turn["user"]].add(turn["assistant"])
    chance = float(np.mean([1 / len(answers_of[turn["user"]]) for turn in turns]))
    right = [reply == turn["assistant"] for reply, turn in zip(replies, turns)]
    for i in spread(len(rows), 5, first=1):
        print(f"  Q: {turns[i]['user']}  A: {replies[i]}   (true: {turns[i]['assistant']})")
    return proportion("qa", right, chance), replies


def choose_clip(model, tokenizer, rows: list[dict], visual: Tensor, n: int = 1000):
    """EgoMCQ's task: which of five clips does this narration describe?

    The five are of five scenes (inter), or the five moments of one scene (intra); all have different
    narrations. -> figures, the outcome of each inter item, and of each intra item.
    """
    # An inter item needs four narrations beside the five of its own scene.
    different = len({row["text"] for row in rows})
    if different < 9:
        raise DataError(f"the test split tells {different} things, a choice needs 9: render a larger --test")
    rng = np.random.default_rng(0)
    count = min(n, len(rows))
    figures, outcomes = {}, []
    for kind in ("inter", "intra"):
        pairs = []
        for item in range(count):
            candidates = [item, *wrong_clips(rows, item, kind, rng)]
            pairs += [(clip, rows[item]["text"]) for clip in candidates]
        scores = narration_log_likelihood(model, tokenizer, visual, pairs).reshape(count, 5)
        right = [choice_score(five, answer=0) for five in scores]
        figures |= proportion(f"mcq_{kind}", right, chance=0.2)
        outcomes.append(right)
    return figures, *outcomes


def wrong_clips(rows: list[dict], item: int, kind: str, rng: np.random.Generator) -> list[int]:
    """The four other candidates of an item, as row numbers; five rows in a row are of one scene."""
    first = item // 5 * 5
    scene = range(first, first + 5)
    if kind == "intra":
        return [clip for clip in scene if clip != item]
    clips, texts = [], {rows[item]["text"]}
    while len(clips) < 4:
        clip = int(rng.integers(len(rows)))
        if clip not in scene and rows[clip]["text"] not in texts:
            clips.append(clip)
            texts.add(rows[clip]["text"])
    return clips


@torch.no_grad()
def kl_true_vs_shuffled(model, tokenizer, rows: list[dict]) -> dict[str, float]:
    """KL(exo || F(ego)) of true partners and of shuffled ones: after transfer the true one is well below."""
    if model.F is None:
        return {}
    exo, estimate = [], []
    for batch in iterate_batches(model, tokenizer, rows, "pair"):
        exo.append(model.encode_exo(batch.exo))
        x = model.patch_features(model.ego_vit, batch.ego)
        estimate.append(model.exo_connector(model.F(x)))
    exo, estimate = torch.cat(exo), torch.cat(estimate)                     # (rows, tokens, W)
    shuffled = exo.roll(len(exo) // 2, 0)
    return {
        "kl_true": float(feature_kl(exo, estimate).mean()),
        "kl_shuffled": float(feature_kl(shuffled, estimate).mean()),
        "kl_n": len(exo)}


def draw_samples(path: Path, rows: list[dict], view: str, narrations: list[str], replies: list[str] | None):
    """A contact sheet: frames, what the model said (green when right), and the truth when it was wrong."""
    items = []
    for i in spread(len(rows), 8):
        row, said = rows[i], narrations[i]
        if said == row["text"]:
            lines = [(said, GREEN), ("", GREY)]
        else:
            lines = [(said, RED), (f"true: {row['text']}", GREY)]
        if replies and replies[i]:
            turn = row["turns"][0]
            ink = GREEN if replies[i] == turn["assistant"] else RED
            lines.append((f"{turn['user']} {replies[i]}", ink))
        clip = row["ego"] if view == "ego" else row["exo"][0]
        frames = read_clip(clip["video"], clip["start"], clip["end"], num_frames=4, size=96)
        items.append(([frames], lines))
    contact_sheet(path, items)


# ------------------------------------------------------------------------------------- 4 one video, a chat
class VideoContext:
    """What the decoder has read before a question: a video's tokens, or none at all (`visual` None).

    The keys and values of this prefix are computed once. `score` and `generate` leave them as they are, so
    questions do not see each other; `stream` appends to them, so a conversation goes on.
    """
    @torch.no_grad()
    def __init__(self, model: Exo2Ego, tokenizer: Tokenizer, visual: Tensor | None):
        """`visual` has shape (1, tokens, W)."""
        self.model = model
        self.tokenizer = tokenizer
        self.device = model.decoder.lm_head.weight.device
        self.cache = KVCache(sequences=1)
        self.video_tokens = 0 if visual is None else visual.shape[1]
        self.pooled = None if visual is None else visual[0].float().mean(0)             # (W,)
        self.unread = []        # the last token of an answer that was cut short: the cache lacks it

        # The prefix ends with the last visual token. Without a video it is <s> alone.
        ids, _ = tokenizer.chat([{"user": ""}], self.video_tokens)
        length = len(ids) - ids[::-1].index(VIDEO) if self.video_tokens else 1
        self.prefix = ids[:length]
        embeddings = model.insert_visual_tokens(visual, torch.tensor(self.prefix, device=self.device))
        positions = torch.arange(length, device=self.device)
        model.decoder(embeddings, Segments.packed([length], self.device), positions, self.cache)

    def prompt(self, question: str, answer: str | None = None) -> tuple[list[int], list[int]]:
        """ids and labels of what follows the prefix: a question, and its answer if there is one."""
        turn = {"user": question.replace("<video>", "")}
        if answer is not None:
            turn["assistant"] = answer
        ids, labels = self.tokenizer.chat([turn], self.video_tokens)
        return ids[len(self.prefix):], labels[len(self.prefix):]

    @torch.no_grad()
    def score(self, pairs: list[tuple[str, str]], batch: int = 64) -> np.ndarray:
        """log p(answer, </s> | video, question) of each (question, answer) -> (pairs, 2).

        The columns are the sum over the answer's tokens, and the mean as `mean_of_nonzero` takes it. At most
        `batch` answers, each with a copy of one layer's keys and values of the video, are in memory at a time.
        """
        decoder, start = self.model.decoder, len(self.prefix)
        scores = []
        for first in range(0, len(pairs), batch):
            # The new tokens of all pairs are packed; each pair also sees the prefix.
            ids, labels, lens, supervised = [], [], [], []
            for question, answer in pairs[first:first + batch]:
                its_ids, its_labels = self.prompt(question, answer)
                ids += its_ids
                labels += its_labels
                lens.append(len(its_ids))
                supervised.append(sum(label != IGNORE for label in its_labels))
            seg = Segments.cached(lens, [start + n for n in lens], self.device)
            positions = torch.cat([torch.arange(start, start + n) for n in lens]).to(self.device)
            shared = SharedPrefix(self.cache, len(lens), keep=False)
            embeddings = decoder.embed(torch.tensor(ids, device=self.device))
            hidden = decoder(embeddings, seg, positions, shared)

            # Position t predicts token t + 1. A sequence's first token is never supervised, so this shift
            # stays inside a sequence.
            targets = torch.tensor(labels, device=self.device)[1:]
            where = targets != IGNORE
            logits = decoder.logits(hidden[:-1][where]).float()
            losses = F.cross_entropy(logits, targets[where], reduction="none").double().cpu()
            for own in losses.split(supervised):
                scores.append((-float(own.sum()), -float(mean_of_nonzero(own))))
        return np.array(scores)

    def generate(self, questions: list[str], max_new: int = 64) -> list[str]:
        """Greedy answers to several questions at once."""
        prompts = [torch.tensor(self.prompt(question)[0]) for question in questions]
        shared = SharedPrefix(self.cache, len(prompts), keep=True)
        replies = self.model.generate(None, prompts, eos=self.tokenizer.eos, max_new=max_new, cache=shared)
        return [self.tokenizer.decode(reply).strip() for reply in replies]

    def stream(self, question: str, max_new: int = 256) -> Iterator[str]:
        """Pieces of an answer as they come; the next question goes on from here."""
        ids, _ = self.prompt(question)
        if self.cache.lens[0] > len(self.prefix):
            # A later turn stands after the </s> of the answer before, which no decoding step has read.
            turn = self.tokenizer.encode(f"[INST] {question} [/INST]")
            ids = [*self.unread, self.tokenizer.eos, *turn]
        tokens, emitted = [], ""
        steps = self.model.stream(None, [torch.tensor(ids)], eos=self.tokenizer.eos, max_new=max_new,
                                  cache=self.cache)
        for (token,) in steps:
            tokens.append(token)
            text = self.tokenizer.decode(tokens)
            # A character of several bytes is emitted when its last byte is there.
            if not text.endswith("\ufffd"):
                yield text[len(emitted):]
                emitted = text
        self.unread = tokens[-1:] if len(tokens) == max_new else []


def mean_of_nonzero(losses: Tensor) -> Tensor:
    """The mean over the last axis of the losses that are not exactly 0: EgoPlan's rule for a mean per token."""
    return losses.sum(-1) / (losses != 0).sum(-1).clamp(min=1)


@torch.no_grad()
def prefill(model: Exo2Ego, tokenizer: Tokenizer, clip: dict | None) -> VideoContext:
    """Read one ego clip of a manifest's form ("video", "start", "end", "fps"), or nothing for None."""
    if clip is None:
        return VideoContext(model, tokenizer, None)
    frames = read_clip(clip["video"], clip.get("start"), clip.get("end"), num_frames=model.cfg.frames,
                       size=model.cfg.image_size, rng=None, fps=clip.get("fps"))
    pixels = torch.from_numpy(frames)[None].to(next(model.parameters()).device)         # (1, T, 3, S, S)
    return VideoContext(model, tokenizer, model.encode_ego(pixels))


def chat(model: Exo2Ego, tokenizer: Tokenizer, clip: dict, question: str | None):
    """Print the answer to one question about a clip, or without one chat until an empty line or Ctrl-D."""
    context = prefill(model, tokenizer, clip)
    with contextlib.suppress(EOFError):
        while asked := question or input("? ").strip():
            for piece in context.stream(asked):
                print(piece, end="", flush=True)
            print(flush=True)
            if question:
                return


# --------------------------------------------------------------------------------------------- 5 commands
@dataclass
class Checkpoint:
    """A checkpoint on this machine's device, in the dtype that it computes with."""
    model: Exo2Ego
    tokenizer: Tokenizer
    state: dict                             # its state.json
    folder: Path
    bf16: bool


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", help="run folder or step_* (the newest of out/stage3 ... out/stage0)")
    add("--base", help="where the untouched weights are, if they have moved")
    add("--vision", help="where the CLIP directory is, if it has moved")
    add("--data", help="the micro-world's folder (that of the training), or the benchmarks'")
    add("--video", help="ask about this file")
    add("--ask", help="the question; without it, a chat")
    add("--start", type=float, help="seconds")
    add("--end", type=float, help="seconds")
    add("--bench", choices=[*BENCHES, "all"], help="DATA/<name>/ has the official files")
    add("--videos", help="where the benchmark's videos are (DATA/<name>/, or videos/ in it)")
    add("--out", default="results", help="where predictions and scores go")
    add("--answer", choices=("likelihood", "letter", "generate"), default="likelihood",
        help="how options are chosen; open questions are always generated")
    add("--length", choices=("mean", "sum"), default="mean", help="of token log-likelihoods")
    add("--blind", action="store_true", help="without the video: the floor of text alone")
    add("--limit", type=int, help="the first items only")
    add("--allow-outside", action="store_true", help="video paths may leave their folder")
    add("--report", action="store_true", help="OUT/report.html from what is in OUT")
    args = parser.parse_args(argv)
    if args.ask and not args.video or args.bench and not args.data:
        parser.error("--ask needs --video FILE, and --bench needs --data DIR")
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    try:
        if args.bench:
            run_benches(args)
        if args.report:
            print(write_report(Path(args.out)))
        if args.bench or args.report:
            return
        ckpt = open_checkpoint(args)
        with autocast(next(ckpt.model.parameters()).device, ckpt.bf16):
            if args.video:
                clip = {"video": args.video, "start": args.start, "end": args.end}
                chat(ckpt.model, ckpt.tokenizer, clip, args.ask)
            else:
                score_toy(ckpt, args.data)
    except (DataError, ValueError, FileNotFoundError) as error:
        sys.exit(f"eval.py: {error}")


def open_checkpoint(args) -> Checkpoint:
    """The checkpoint that the flags name, or the newest stage's."""
    runs = ["out/stage3", "out/stage2", "out/stage1", "out/stage0"]
    run = args.ckpt or next(filter(newest_checkpoint, runs), runs[0])
    model, state = load_checkpoint(run, args.base, args.vision)
    folder = newest_checkpoint(run)
    bf16 = state.get("bf16", any(p.dtype != torch.float32 for p in model.parameters()))
    device = pick_device()
    print(choose_attention(device, torch.bfloat16 if bf16 else torch.float32, model.cfg))
    model = to_device_and_dtype(model, device, bf16)
    return Checkpoint(model=model, tokenizer=Tokenizer(folder), state=state, folder=folder, bf16=bf16)


def score_toy(ckpt: Checkpoint, data: str | None):
    """The toy benchmark of a checkpoint, on the micro-world that it was trained on unless `data` is another."""
    state = ckpt.state
    print(f"{ckpt.folder}: stage {state['stage']}, step {state['step']} of {state['steps']}")
    data = data or state.get("config", {}).get("data", "out/toy")
    toy_benchmark(ckpt.model, ckpt.tokenizer, data, state["stage"], out=ckpt.folder.parent)


def run_benches(args):
    """One benchmark, or all whose folder is there, by this process or as one of torchrun's ranks."""
    names = [args.bench]
    if args.bench == "all":
        names = [name for name in BENCHES if (Path(args.data) / name).is_dir()]
    if not names:
        raise DataError(f"{args.data} has none of the folders {', '.join(BENCHES)}")
    ckpt = open_checkpoint(args)
    for name in names:
        changed = {"bench": name, "root": str(Path(args.data) / name)}
        try:
            with autocast(next(ckpt.model.parameters()).device, ckpt.bf16):
                egobench(ckpt, argparse.Namespace(**vars(args) | changed))
        except KeyboardInterrupt:
            sys.exit(f"\nstopped: what is done is in {args.out}/{name}*.jsonl, the same command goes on")


# ------------------------------------------------------------------------------------- appendix: EgoBench
# Eight public benchmarks. A first reader can stop here.
# ------------------------------------------------------------------------------------- EgoBench: metrics
def ranked_precision(sim: np.ndarray, rel: np.ndarray) -> np.ndarray:
    """EK-100's AP of each query (rows): hits are relevance 1, but precision counts graded relevance too."""
    order = np.argsort(-sim, axis=1, kind="stable")
    ranked = np.take_along_axis(rel, order, axis=1)
    precision = np.cumsum(ranked, axis=1) / np.arange(1, rel.shape[1] + 1)
    hits = ranked == 1
    return (precision * hits).sum(1) / hits.sum(1)


def ranked_gain(sim: np.ndarray, rel: np.ndarray) -> np.ndarray:
    """nDCG of each query over as many ranks as it has relevant items (> 0).

    Ties are in reversed order, as in the official code.
    """
    order = np.argsort(sim, axis=1, kind="stable")[:, ::-1]
    ranked = np.take_along_axis(rel, order, axis=1)
    ideal = np.sort(rel, axis=1)[:, ::-1]
    discount = 1 / np.log2(np.arange(2, rel.shape[1] + 2))
    counted = np.arange(rel.shape[1]) < (rel > 0).sum(1)[:, None]
    return (ranked * discount * counted).sum(1) / (ideal * discount * counted).sum(1)


def retrieval_metrics(sim: np.ndarray, rel: np.ndarray) -> dict[str, float]:
    """EPIC-KITCHENS-100 multi-instance retrieval: sim and rel (videos, texts) -> fractions.

    The arithmetic is the official one (joint-part-of-speech embeddings, mAP.py and nDCG.py), with stable sorts.
    """
    sim = np.asarray(sim, np.float64)
    rel = np.asarray(rel, np.float64)
    figures = {}
    for name, metric in (("mAP", ranked_precision), ("nDCG", ranked_gain)):
        text_of_video = float(metric(sim, rel).mean())
        video_of_text = float(metric(sim.T, rel.T).mean())
        figures[f"{name}_V2T"] = text_of_video
        figures[f"{name}_T2V"] = video_of_text
        figures[f"{name}_avg"] = (text_of_video + video_of_text) / 2
    return figures


def class_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AP of each class (columns), NaN without a positive; rows without any label are ranked last."""
    labelled = labels.any(1)[:, None]
    order = np.argsort(-np.where(labelled, scores, -np.inf), axis=0, kind="stable")
    ranked = np.take_along_axis(labels, order, axis=0) > 0
    precision = np.cumsum(ranked, axis=0) / np.arange(1, len(labels) + 1)[:, None]
    with np.errstate(invalid="ignore"):
        return (precision * ranked).sum(0) / ranked.sum(0)


def charades_map(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Charades: (videos, classes) -> mAP (NaN if a class has no positive, as official) and its nan-mean."""
    each = class_precision(np.asarray(scores, np.float64), np.asarray(labels))
    return {"mAP": float(each.mean()), "nanmAP": float(np.nanmean(each))}


def rouge_l(said: str, truth: str) -> float:
    """ROUGE-L's F1 on lower-case words and numbers, without stemming."""
    a = re.findall(r"[a-z0-9]+", said.lower())
    b = re.findall(r"[a-z0-9]+", truth.lower())
    # row[j] is the length of the longest common subsequence of the words of a so far and the first j of b.
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(row[j], above[j + 1]))
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


def parse_letter(reply: str, options: int) -> int | None:
    """The index of the option that a reply names, read strictly: "B", "(B)", "B.", "B) text" ...

    A word that starts with a letter, an empty reply and a letter beyond the options are None: counted, wrong.
    """
    found = re.match(r"\s*(?:\(([A-Z])\)|([A-Z])[.:)]?)(?=\s*$|\s*\n|(?<=[.:)])\s)", reply)
    if not found:
        return None
    index = ord(found[1] or found[2]) - ord("A")
    return index if index < options else None


# --------------------------------------------------------------------------------------- EgoBench: the files
@dataclass
class Item:
    """One question of a benchmark. The model never sees a path, for a path can name the answer.

    `answer` is the index of the right option or clip; a text, where there are no options; for charades-ego the
    indices of all classes that occur, for ek100-mir the relevance of each text. None: the publishers hide it.
    """
    id: str
    clips: list[dict]                       # EgoMCQ has five to choose from
    question: str = ""
    options: list[str] = field(default_factory=list)
    answer: int | str | list | None = None
    kind: str = ""                          # a part of the benchmark with a score of its own

    def video_order(self) -> str:
        """Items sorted by this read each clip once."""
        return str(self.clips[0])

    def chance(self) -> float:
        """What a guess gets; an open question has no chance level."""
        if self.options:
            return 1 / len(self.options)
        return 1 / len(self.clips) if len(self.clips) > 1 else 0.0


def egoschema(files: Files, args) -> Iterator[Item]:
    """EgoSchema: questions.json (5,031), subset_answers.json (the 500 public answers); whole videos."""
    answers = files.json("subset_answers.json")
    for q in files.each(files.json("questions.json")):
        yield Item(
            id=q["q_uid"],
            clips=[{"video": files.video(f"{q['q_uid']}.mp4")}],
            question=q["question"],
            options=[q[f"option {i}"] for i in range(5)],
            answer=answers.get(q["q_uid"]))


def qaego4d(files: Files, args) -> Iterator[Item]:
    """QAEgo4D, where `video_id` is an Ego4D clip that is shown whole.

    qaego4d-closed: annotations.QaEgo4D_test_close.json (GroundVQA: 500 items, three wrong answers each), in an
    order that the item's id decides. qaego4d-open: annotations.test.json.
    """
    closed = args.bench == "qaego4d-closed"
    file = "annotations.QaEgo4D_test_close.json" if closed else "annotations.test.json"
    for q in files.each(files.json(file)):
        item = Item(
            id=q["sample_id"],
            clips=[{"video": files.video(f"{q['video_id']}.mp4")}],
            question=q["question"],
            answer=q["answer"])
        if closed:
            options = [q["answer"], *q["wrong_answers"]]
            order = np.random.default_rng(zlib.crc32(item.id.encode())).permutation(len(options))
            item.options = [options[i] for i in order]
            item.answer = int(np.argmin(order))
        yield item


def egotaskqa(files: Files, args) -> Iterator[Item]:
    """EgoTaskQA, direct or indirect: test_qas.json or formatted_test_qas_encode.json, and answer_set.txt.

    The official test is open-vocabulary: classification over answer_set.txt by likelihood, or exact match of
    what is generated. egotaskqa.json is EgoThinker's 5-way form {q, video_path, a, option}: another test.
    """
    if (files.root / "egotaskqa.json").is_file():
        for i, q in enumerate(files.each(files.json("egotaskqa.json"))):
            letters = sorted(q["option"])
            yield Item(
                id=str(i),
                clips=[{"video": files.video(q["video_path"])}],
                question=q["q"],
                options=[q["option"][letter] for letter in letters],
                answer=letters.index(q["a"]),
                kind="5-way")
        return
    known = []
    if args.answer != "generate":
        answers = [" ".join(words) for words in files.lines("answer_set.txt")]
        known = [answer for answer in answers if not answer.startswith("<UNK")]
    for q in files.each(files.json("formatted_test_qas_encode.json", "test_qas.json")):
        truth = q["answer"].lower()
        answer = truth
        if known:
            answer = known.index(truth) if truth in known else -1           # -1: no option is right
        yield Item(
            id=str(q["question_id"]),
            clips=[{"video": files.video(f"{q['interval']}.mp4")}],
            question=q["question"],
            options=known,
            answer=answer,
            kind="binary" if truth in ("yes", "no") else "open")


def charades(files: Files, args) -> Iterator[Item]:
    """Charades-Ego: CharadesEgo_v1_test_only1st.csv and Charades_v1_classes.txt.

    Every class is scored on the whole video (157-way zero-shot protocol).
    """
    lines = files.text("Charades_v1_classes.txt").splitlines()
    names = dict(line.split(" ", 1) for line in lines if line)
    codes = sorted(names)
    for row in files.table("CharadesEgo_v1_test_only1st.csv"):
        actions = [action for action in row["actions"].split(";") if action]
        yield Item(
            id=row["id"],
            clips=[{"video": files.video(f"{row['id']}.mp4")}],
            question="What am I doing?",
            options=[names[code] for code in codes],
            answer=sorted({codes.index(action.split()[0]) for action in actions}))


def egoplan(files: Files, args) -> Iterator[Item]:
    """EgoPlan-Bench: EgoPlan_validation.json; the candidates are answer texts.

    The clip runs from the first progress to the current frame. Frames count at the file's own rate.
    """
    for q in files.each(files.json("EgoPlan_validation.json")):
        now = q["current_observation_frame"]
        starts = [step["start_frame"] for step in q["task_progress_metadata"]]
        first = min(starts, default=max(0, now - 1))
        goal = q["task_goal"].strip().rstrip(".").lower()
        letter = q["golden_choice_idx"]
        yield Item(
            id=str(q["sample_id"]),
            clips=[{"video": files.video(f"{q['video_id']}.mp4"), "frames": [first, now]}],
            question=f"I want to {goal}. The video shows what I have done so far. What do I do next?",
            options=[q[f"choice_{name}"] for name in "abcd"],
            answer="ABCD".index(letter) if letter in [*"ABCD"] else None,
            kind=q["video_source"])


def vln_qa(files: Files, args) -> Iterator[Item]:
    """VLN-QA: MVBench's egocentric_navigation.json (200 items, four candidates); whole videos."""
    for i, q in enumerate(files.each(files.json("egocentric_navigation.json"))):
        yield Item(
            id=str(i),
            clips=[{"video": files.video(q["video"])}],
            question=q["question"],
            options=q["candidates"],
            answer=q["candidates"].index(q["answer"]))


def egomcq(files: Files, args) -> Iterator[Item]:
    """EgoMCQ: egomcq.json; which of five clips does a narration describe?

    Type 1 is inter and 2 intra (the original code prints them swapped). Clips are in seconds of the whole Ego4D
    video, negative ones cut to 0.
    """
    for key, q in files.each(files.json("egomcq.json").items()):
        clips = []
        for number in range(5):
            choice = q["choices"][str(number)]
            clips.append({
                "video": files.video(f"{choice['video_uid']}.mp4"),
                "start": max(0.0, float(choice["clip_start"])),
                "end": float(choice["clip_end"])})
        narration = re.sub(r"^#\w+\s+", "", q["query"]["clip_text"])
        kind = {1: "inter", 2: "intra"}[q["types"]]
        yield Item(id=key, clips=clips, question=verbalise_wearer(narration), answer=q["answer"], kind=kind)


def ek100(files: Files, args) -> Iterator[Item]:
    """EPIC-KITCHENS-100 retrieval: EPIC_100_retrieval_test.csv (videos) and ..._test_sentence.csv (texts).

    The relevance of a text is (same verb class + overlap of noun sets) / 2; texts keep their file's order.
    """
    nested = (files.root / "retrieval_annotations").is_dir()
    prefix = "retrieval_annotations/EPIC_100_retrieval" if nested else "EPIC_100_retrieval"
    videos, classes = {}, {}
    for row in files.table(f"{prefix}_test.csv"):
        key = row["narration_id"]
        videos[key] = row
        classes[key] = int(row["verb_class"]), set(ast.literal_eval(row["all_noun_classes"]))
    texts = {row["narration_id"]: row["narration"] for row in files.table(f"{prefix}_test_sentence.csv")}
    for key, row in videos.items():
        clip = {
            "video": files.video(f"{row['video_id']}.mp4"),
            "start": clock_seconds(row["start_timestamp"]),
            "end": clock_seconds(row["stop_timestamp"])}
        relevance = [relevance_of(classes[key], classes[text]) for text in texts]
        yield Item(
            id=key,
            clips=[clip],
            question="Narrate the video.",
            options=list(texts.values()),
            answer=relevance)


def clock_seconds(clock: str) -> float:
    """Seconds of "00:01:02.50"."""
    hours, minutes, seconds = clock.split(":")
    return float(seconds) + 60 * float(minutes) + 3600 * float(hours)


def relevance_of(video: tuple[int, set], text: tuple[int, set]) -> float:
    """EK-100's relevance of a text for a video, both as (verb class, noun classes): 1 is a match."""
    verb, nouns = video
    other_verb, other_nouns = text
    overlap = len(nouns & other_nouns) / len(nouns | other_nouns)
    return ((verb == other_verb) + overlap) / 2


@dataclass(frozen=True)
class Bench:
    """A benchmark: its reader, its task, the paper's per cent, the best open one known, a caution."""
    reader: Callable
    task: str                                                   # choice | open | clips | classes | retrieval
    paper: str
    best: str
    note: str = ""


# The paper's Table, and the best open figures that we know of; the list is not complete.
BENCHES = {
    "egoschema": Bench(egoschema, "choice", "61.3", "77.9 (Qwen2-VL-72B)",
                       note="ours: the 500 public answers"),
    "qaego4d-closed": Bench(qaego4d, "choice", "62.1", "67.2 (EgoThinker-7B)", note="500 items"),
    "qaego4d-open": Bench(qaego4d, "open", "28.3 / 2.7", "",
                          note="the paper: judged by GPT; ours: exact match, ROUGE-L"),
    "egotaskqa-direct": Bench(egotaskqa, "choice", "44.7", "48.7 (MFAS, fine-tuned)",
                              note="the paper's form is unknown"),
    "egotaskqa-indirect": Bench(egotaskqa, "choice", "50.3", "45.4 (MFAS, fine-tuned)",
                                note="the paper's form is unknown"),
    "charades-ego": Bench(charades, "classes", "70.9", "36.1 (LaViLa-L, fine-tuned)",
                          note="70.9 cannot come from the standard 157-class protocol, which ours is"),
    "ek100-mir": Bench(ek100, "retrieval", "49.7 mAP, 63.6 nDCG", "45.9 / 38.6 zero-shot (EgoVideo)",
                       note="63.6 nDCG is not the standard zero-shot protocol, which ours is"),
    "egoplan": Bench(egoplan, "choice", "42.7", "47.1 (EgoThinker-7B)"),
    "vln-qa": Bench(vln_qa, "choice", "44.5", "54.0 (EgoThinker-7B)", note="200 items: +- 6.9 points"),
    "egomcq": Bench(egomcq, "clips", "88.4 inter, 41.2 intra", "91.0 / 63.1 (EgoVLPv2, LaViLa-L)",
                    note="dual encoders choose by similarity, we by likelihood")}


# ------------------------------------------------------------------------------------------- EgoBench: a run
def egobench(ckpt: Checkpoint, args):
    """Score the benchmark `args.bench`, whose official files are in `args.root`.

    torchrun's ranks share the items. Predictions are written as they come, so the same command goes on where a
    killed one stopped. The rank that ends last sums up, and so does any later call without torchrun.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    bench = BENCHES[args.bench]
    items = list(convert(bench.reader, args))[:args.limit]
    if not items or len({item.id for item in items}) < len(items):
        raise DataError(f"{args.root}: ids repeat, or there are no items")
    args.answer = answer_mode(bench, items, args)
    protocol = protocol_of(ckpt, items, args)
    place_clips(items, Path(args.videos or args.root), args.allow_outside, args.blind)
    name = f"{args.bench}-blind" if args.blind else args.bench
    files = PredictionFiles(Path(args.out), name, protocol, rank=rank, world=world)
    with files.lock(rank):
        done = files.begin()
        todo = [item for item in items[rank::world] if item.id not in done]
        todo.sort(key=Item.video_order)
        skipped = len(items) - len(todo)
        print(f"{name}: {len(items)} items, {skipped} of them done or of other ranks", flush=True)
        predictions = run_items(ckpt, todo, items[0].options, bench, args)
        if rank == 0:
            predictions = progress(predictions, len(todo), "items")
        files.append(predictions)

    predictions = files.gather(items)
    if predictions is None:
        print(f"{name}: rank {rank} is done; the last rank sums up, or later this command without torchrun")
        return
    figures = summarise(bench, items, predictions, args)
    if args.bench in ("egoschema", "egoplan"):
        write_submission(f"{args.out}/{name}.submission.json", args.bench, items, predictions)
    # JSON has no NaN.
    figures = {key: None if value != value else value for key, value in figures.items()}
    write_text_atomic(f"{args.out}/{name}.json", json.dumps(protocol | figures, indent=1))
    print(f"{format_figures(figures)}\n{args.out}/{name}.json", flush=True)


def answer_mode(bench: Bench, items: list[Item], args) -> str:
    """--answer, or what this benchmark allows instead of it, which is then said.

    Open questions are generated, letters need a choice among at most 26, all others go by likelihood.
    """
    options = len(items[0].options)
    if bench.task != "clips" and options == 0:
        mode = "generate"
    elif args.answer == "letter" and bench.task == "choice" and options <= 26:
        mode = "letter"
    else:
        mode = "likelihood"
    if mode != args.answer:
        print(f"{args.bench}: answered by {mode}, --answer {args.answer} does not apply")
    return mode


def protocol_of(ckpt: Checkpoint, items: list[Item], args) -> dict:
    """What predictions depend on: the weights, the questions and the way of answering."""
    questions = json.dumps([asdict(item) for item in items])
    return {
        "ckpt": str(ckpt.folder),
        "weights": fingerprint(ckpt.folder),
        "preset": ckpt.state.get("config", {}).get("preset"),
        "stage": ckpt.state["stage"],
        "git": git_revision(),
        "bench": args.bench,
        "answer": args.answer,
        "length": args.length,
        "blind": args.blind,
        "items": len(items),
        "content": hashlib.sha256(questions.encode()).hexdigest()[:16]}


def place_clips(items: list[Item], root: Path, allow_outside: bool, blind: bool):
    """Make the paths of all clips absolute, and their frame numbers seconds at the file's own rate.

    DataError: a path leads out of `root`, or not one video is there.
    """
    inside = os.path.join(os.path.realpath(root), "")
    places, rates = {}, {}
    for clip in [clip for item in items for clip in item.clips]:
        name = clip["video"]
        if name not in places:
            places[name] = find_video(root, name)
        video = places[name]
        if not allow_outside and not video.startswith(inside):
            raise DataError(f"{name} is outside {inside}: pass --videos or --allow-outside")
        clip["video"] = video
        if "frames" in clip:
            if video not in rates:
                rates[video] = 30.0
                # A file that cannot be read will be the error of its items.
                with contextlib.suppress(DataError):
                    rates[video] = frame_rate(video)
            first, last = clip.pop("frames")
            clip["start"] = max(0, first) / rates[video]
            clip["end"] = (max(last, first) + 1) / rates[video]
    if not blind and not any(os.path.isfile(video) for video in places.values()):
        example = next(iter(places.values()))
        raise DataError(f"none of {len(places)} videos is there, such as {example}: pass --videos")


def find_video(root: Path, name: str) -> str:
    """The real path of a video, also where EPIC-KITCHENS puts its files (P01/videos/P01_11.MP4)."""
    stem = Path(name).stem
    person = stem.split("_")[0]
    tries = [root / name, (root / name).with_suffix(".MP4"), root / person / "videos" / f"{stem}.MP4"]
    return os.path.realpath(next(filter(Path.is_file, tries), tries[0]))


class PredictionFiles:
    """The predictions of one benchmark: NAME.jsonl, or while torchrun's ranks work NAME.rankN.jsonl for each.

    A file's first line is the protocol, then comes one prediction a line. A process appends to its own file
    and reads all, also those that another number of ranks left. It holds the lock of its rank meanwhile.
    """
    def __init__(self, out: Path, name: str, protocol: dict, rank: int = 0, world: int = 1):
        self.out = out
        self.name = name
        self.protocol = protocol
        self.gathered = out / f"{name}.jsonl"
        self.own = self.gathered if world == 1 else out / f"{name}.rank{rank}.jsonl"

    def lock(self, rank: int | str, wait: bool = False):
        """A second process of this rank is refused; "all" is held for a moment, to read or gather all files."""
        return file_lock(self.out / f".{self.name}.lock{rank}", wait)

    def rank_files(self) -> list[Path]:
        """The files of ranks, of this run or an earlier one."""
        return sorted(self.out.glob(f"{self.name}.rank*.jsonl"))

    def rows(self, path: Path) -> Iterator[dict]:
        """The predictions in one file. DataError names the field in which it has another protocol."""
        lines = path.read_text().splitlines() if path.is_file() else []
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except ValueError:
                return                                          # a kill cut this last line short
            if number > 0:
                yield row
                continue
            for key, value in self.protocol.items():
                if row.get(key) != value and key not in ("ckpt", "git"):
                    raise DataError(f"{path} was made with {key}={row.get(key)}, this run has {value}: "
                                    f"choose another --out or remove it")

    def read(self) -> dict[str, dict]:
        """The prediction of each item that has one, by id; an error gives way to a success."""
        predictions = {}
        for path in [self.gathered, *self.rank_files()]:
            for row in self.rows(path):
                known = predictions.get(row["id"])
                if known is None or "error" in known:
                    predictions[row["id"]] = row
        return predictions

    def begin(self) -> set[str]:
        """Make the own file ready to be appended to; -> ids of the items that are done.

        Items with errors are not done: they are tried again.
        """
        with self.lock("all", wait=True):
            done = {key for key, row in self.read().items() if "error" not in row}
            kept = [row for row in self.rows(self.own) if "error" not in row]
            write_jsonl(self.own, [self.protocol, *kept])
        return done

    def append(self, predictions: Iterator[dict]):
        """Write each prediction as it comes."""
        with open(self.own, "a", buffering=1) as file:
            for prediction in predictions:
                file.write(json.dumps(prediction) + "\n")

    def gather(self, items: list[Item]) -> list[dict] | None:
        """All predictions, in the items' order, which NAME.jsonl alone holds from now on.

        None: items are missing, a rank is still at work, or another one has gathered them already.
        """
        with contextlib.ExitStack() as locks:
            locks.enter_context(self.lock("all", wait=True))
            if not self.own.is_file():
                return None
            try:
                for path in sorted(self.out.glob(f".{self.name}.lock[0-9]*")):
                    locks.enter_context(file_lock(path, wait=False))
            except DataError:
                return None
            predictions = self.read()
            if any(item.id not in predictions for item in items):
                return None
            ordered = [predictions[item.id] for item in items]
            write_jsonl(self.gathered, [self.protocol, *ordered])
            for path in self.rank_files():
                path.unlink()
        return ordered


def run_items(ckpt: Checkpoint, items: list[Item], texts: list[str], bench: Bench, args) -> Iterator[dict]:
    """The predictions of items, one by one; a clip that several questions in a row are about is read once.

    A prediction holds its item and "scores", "reply" or both "reply" and "choice". What cannot be read is an
    "error" in its prediction, which counts as wrong and is counted. `texts` are those of a retrieval.
    """
    model, tokenizer = ckpt.model, ckpt.tokenizer
    sides = None
    if items and bench.task == "retrieval":
        sides = text_side(model, tokenizer, [] if args.blind else items, texts)
    clip, context = None, None                                  # the clip that was read last
    for item in items:
        prediction = asdict(item)
        if bench.task in ("retrieval", "classes"):
            # All items have the same texts, up to thousands of them: no file needs them in each line.
            prediction |= {"options": [], "answer": None}
        try:
            if bench.task == "clips":
                scores = [score_clip(ckpt, None if args.blind else one, item.question) for one in item.clips]
                prediction["scores"] = scores
            else:
                wanted = None if args.blind else item.clips[0]
                if context is None or wanted != clip:
                    context = prefill(model, tokenizer, wanted)
                    clip = wanted
                prediction |= score_item(context, item, bench, args, sides)
        except DataError as error:
            prediction["error"] = str(error)
        yield prediction


def score_clip(ckpt: Checkpoint, clip: dict | None, narration: str) -> float:
    """log p(narration | clip)."""
    context = prefill(ckpt.model, ckpt.tokenizer, clip)
    return float(context.score([(NARRATE, narration)])[0, 0])


def score_item(context: VideoContext, item: Item, bench: Bench, args, sides) -> dict:
    """What a model says of one item.

    likelihood: log p(option | video, question), as a sum or a mean over tokens. letter: a generated letter,
    strictly parsed. generate: an open answer.
    """
    if bench.task == "retrieval":
        return {"scores": score_texts(context, item.options, sides)}
    if not item.options:
        return {"reply": context.generate([item.question])[0]}
    if args.answer == "letter":
        lines = [item.question]
        for letter, text in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", item.options):
            lines.append(f"{letter}. {text}")
        lines.append("Answer with the letter of the right option.")
        reply = context.generate(["\n".join(lines)], max_new=16)[0]
        return {"reply": reply, "choice": parse_letter(reply, len(item.options))}
    scores = context.score([(item.question, option) for option in item.options])
    column = 1 if args.length == "mean" else 0
    return {"scores": scores[:, column].tolist()}


@torch.no_grad()
def text_side(model, tokenizer, items: list[Item], texts: list[str]) -> tuple[Tensor, Tensor, np.ndarray]:
    """What a retrieval computes once for all videos.

    -> the mean pooled video of the first 64 clips (W,), each text's mean word embedding around the mean of all
    (texts, W), and its mean log-likelihood without a video (texts,).
    """
    device = model.decoder.lm_head.weight.device
    words = []
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text), device=device)
        words.append(model.decoder.embed(ids).float().mean(0))
    words = torch.stack(words)
    clips = [torch.zeros_like(words[0])] if not items else []
    for item in items[:64]:
        with contextlib.suppress(DataError):
            clips.append(prefill(model, tokenizer, item.clips[0]).pooled)
    centre = torch.stack(clips or [torch.zeros_like(words[0])]).mean(0)
    alone = VideoContext(model, tokenizer, None).score([(NARRATE, text) for text in texts])[:, 1]
    return centre, F.normalize(words - words.mean(0), dim=-1), alone


def score_texts(context: VideoContext, texts: list[str], sides, shortlist: int = 16) -> list[float]:
    """A score of every text for one video, where `sides` is what `text_side` returned.

    First comes the cosine of pooled [x ; F(x)] and pooled word embeddings, each around its mean, for the decoder
    reads both in one space (our choice). The best texts are then ranked again, above all others, by what the
    video adds to their mean log-likelihood. Blind: how likely a text is by itself, the same for every video.
    """
    centre, words, alone = sides
    if context.pooled is None:
        return (alone / (1 + np.abs(alone).max())).round(5).tolist()
    cosine = (words * F.normalize(context.pooled - centre, dim=-1)).sum(-1).cpu().numpy()
    scores = cosine.astype(float).round(5)
    best = np.argsort(-cosine, kind="stable")[:shortlist]
    with_video = context.score([(NARRATE, texts[i]) for i in best])[:, 1]
    gain = with_video - alone[best]
    scores[best] = 1 + 1 / (1 + np.exp(-gain))                  # above every cosine
    return scores.tolist()


# ------------------------------------------------------------------------------------- EgoBench: the figures
def outcome(item: Item, prediction: dict) -> float:
    """1 right, 0 wrong or unread; equally good options share. Equal texts count as one option (EgoPlan)."""
    if "scores" in prediction:
        if item.answer < 0:
            return 0.0
        scores = np.array(prediction["scores"])
        best = scores == scores.max()
        options = item.options or range(len(scores))
        right = np.array([option == options[item.answer] for option in options])
        return float((best & right).sum() / best.sum())
    if "choice" in prediction:
        choice = prediction["choice"]
        return float(choice is not None and item.options[choice] == item.options[item.answer])
    said = plain_words(prediction.get("reply", ""))
    return float(said == plain_words(item.answer))


def plain_words(text) -> str:
    """Lower case, single spaces, no full stop at either end: what an exact match compares."""
    return " ".join(str(text).lower().strip(" .").split())


def summarise(bench: Bench, items: list[Item], predictions: list[dict], args) -> dict:
    """The score with n, chance and a 95 % interval, and whatever else the benchmark reports."""
    counts = {"unreadable": sum("error" in p for p in predictions)}
    if bench.task in ("retrieval", "classes"):
        return counts | ranking_figures(bench, items, predictions)
    known = [(item, p) for item, p in zip(items, predictions) if item.answer is not None]
    if not known:
        raise DataError(f"{args.bench}: none of these {len(items)} items has a public answer")
    if args.answer == "letter":
        counts["parser_failures"] = sum(p.get("choice") is None for p in predictions)
    replies = [p["reply"] for p in predictions if "reply" in p]
    if replies:
        counts["empty_replies"] = sum(not reply for reply in replies)

    # The score of all items, then one for each kind of them.
    chance = float(np.mean([item.chance() for item, _ in known]))
    outcomes = [outcome(item, p) for item, p in known]
    figures = proportion("score", outcomes, chance)
    by_kind = defaultdict(list)
    for (item, _), right in zip(known, outcomes):
        by_kind[item.kind].append(right)
    for kind in sorted(by_kind.keys() - {""}):
        figures |= proportion(kind, by_kind[kind], chance)
    if args.answer == "generate":
        overlaps = [rouge_l(p.get("reply", ""), item.answer) for item, p in known]
        figures["rouge_l"] = float(np.mean(overlaps))
    return counts | figures


def write_submission(path: str, bench: str, items: list[Item], predictions: list[dict]):
    """The file that the benchmark's server takes; an item without a choice gets the first option."""
    choices = {}
    for item, prediction in zip(items, predictions):
        choices[item.id] = prediction.get("choice") or 0
        if "scores" in prediction:
            choices[item.id] = int(np.argmax(prediction["scores"]))
    if bench == "egoplan":
        choices = [{"sample_id": int(key), "label": "ABCD"[choice]} for key, choice in choices.items()]
    write_text_atomic(path, json.dumps(choices))


def ranking_figures(bench: Bench, items: list[Item], predictions: list[dict]) -> dict:
    """mAP (and nDCG), with chance as random scores on the same labels get it.

    The interval is the normal one of a mean, over queries or classes. A video that was not read ranks last.
    """
    read = [p["scores"] for p in predictions if "scores" in p]
    texts = len(items[0].options)
    last = [np.min(read, initial=0.0) - 1] * texts
    scores = np.array([p.get("scores", last) for p in predictions])
    random = np.random.default_rng(0).normal(size=scores.shape)
    if bench.task == "classes":
        labels = np.zeros_like(scores)
        for row, item in zip(labels, items):
            row[item.answer] = 1
        figures = charades_map(scores, labels)
        score, chance = figures["nanmAP"], charades_map(random, labels)["nanmAP"]
        each = class_precision(scores, labels)
        each = each[np.isfinite(each)]
    else:
        # With --limit some texts have no video.
        labels = np.array([item.answer for item in items])
        used = (labels == 1).any(0)
        scores, random, labels = (table[:, used] for table in (scores, random, labels))
        figures = retrieval_metrics(scores, labels)
        by_chance = retrieval_metrics(random, labels)
        score, chance = figures["mAP_avg"], by_chance["mAP_avg"]
        figures["nDCG_avg_chance"] = by_chance["nDCG_avg"]
        each = ranked_precision(scores, labels)
    if len(each) == 0:
        raise DataError(f"none of these {len(items)} items has a label to rank")
    half = 1.96 * float(each.std()) / math.sqrt(len(each))
    interval = {"score_lo": max(0.0, score - half), "score_hi": min(1.0, score + half)}
    return {"score": score, "score_chance": chance} | interval | {"score_n": len(items)} | figures


# -------------------------------------------------------------------------------------- EgoBench: the report
FEW = 100                   # fewer items than this say little: the interval is then wider than +- 10 points
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
(red). The last columns follow protocols of their own.</p>"""
TABLE = """<div class=wide>
<table><tr><th>benchmark<th>ours<th><th>n<th>chance<th>blind<th>paper<th>best open<th>protocol</tr>"""


def write_report(out: Path) -> Path:
    """results/ -> one page, without scripts, that loads nothing from elsewhere; all text is escaped.

    It shows every score with its interval, its chance level and its blind floor beside the paper's, and items.
    """
    results = {}
    for name in BENCHES:
        if (out / f"{name}.json").is_file():
            results[name] = json.loads((out / f"{name}.json").read_text())
    if not results:
        raise DataError(f"{out} holds no results: run eval.py --bench NAME --out {out} first")
    parts = [PAGE, toy_note(results), TABLE]
    for name, result in results.items():
        file = out / f"{name}-blind.json"
        blind = json.loads(file.read_text()) if file.is_file() else {}
        parts.append(report_score(name, result, blind))
    checkpoints = sorted({f"{result['ckpt']}, code {result['git']}" for result in results.values()})
    parts.append(f"</table></div><p><small>{escape('; '.join(checkpoints))}</small></p>")

    # Four items of each benchmark whose predictions hold their options or answer.
    for name in results:
        parts.append(f"<h2>{name}</h2>")
        rows = [row for row in PredictionFiles(out, name, protocol={}).read().values()
                if row["options"] or row["answer"] is not None]
        parts += [report_item(rows[i]) for i in spread(len(rows), 4)]
    write_text_atomic(out / "report.html", "\n".join(parts) + "</html>")
    return out / "report.html"


def toy_note(results: dict[str, dict]) -> str:
    """One sentence that says why these figures are no measure of the method; nothing if they may be."""
    reasons = []
    if any(result.get("preset") == "toy" for result in results.values()):
        reasons.append("the checkpoint is a toy, trained on the micro-world (preset toy)")
    few = [f"{name} ({result['score_n']})" for name, result in results.items() if result["score_n"] < FEW]
    if few:
        reasons.append(f"there are fewer than {FEW} items in {', '.join(few)}")
    if not reasons:
        return ""
    return f"<p><b>These figures show that the programs work, not how good the method is: {'; '.join(reasons)}.</b></p>"


def report_score(name: str, result: dict, blind: dict) -> str:
    """A benchmark's row of the table. `blind` counts if all but the video was the same."""
    bench = BENCHES[name]
    low, high, score, chance = (100 * result[f"score{key}"] for key in ("_lo", "_hi", "", "_chance"))
    ours = f"{score:.1f} [{low:.1f}, {high:.1f}]"
    for key in ("inter", "intra", "nDCG_avg", "rouge_l", "binary", "open"):
        if result.get(key) is not None:
            ours += f"<br>{key} {100 * result[key]:.1f}"
    bar = ""
    for left, width, ink in ((low, f"{high - low:.1f}%", "#8ab"), (score, "2px", "#000"), (chance, "2px", "#c33")):
        bar += f'<i style="left:{left:.1f}%;width:{width};background:{ink}"></i>'
    floor = "not run"
    if all(blind.get(key) == result[key] for key in ("weights", "answer", "length", "content")):
        floor = f"{100 * blind['score']:.1f}"
    note = f"{result['answer']}, {result['length']}"
    if bench.note:
        note += f"; {bench.note}"
    cells = [name, ours, f"<div class=bar>{bar}</div>", str(result["score_n"]), f"{chance:.1f}", floor,
             escape(bench.paper), escape(bench.best), f"<small>{escape(note)}</small>"]
    return f"<tr><td>{'<td>'.join(cells)}</tr>"


def report_item(row: dict) -> str:
    """One prediction: frames of its first clip, the question, what was chosen or said, and the truth."""
    options, truth = row["options"], row["answer"]
    parts = ["<div class=item>", film_strip(row["clips"][0]), f"<p>{escape(row['question'])}</p><ol>"]
    if "scores" in row:
        options = options or [f"clip {i + 1}" for i in range(len(row["clips"]))]
        odds = np.exp(np.array(row["scores"]) - max(row["scores"]))
        shares = odds / odds.sum()
        for i, (text, share) in enumerate(zip(options, shares)):
            mark = "wrong" if share == shares.max() else ""
            if i == truth:
                mark = "right"
            parts.append(f'<li class="{mark}">{escape(text)} <small>{100 * share:.0f} %</small>')
    parts.append("</ol>")
    said = row.get("reply", row.get("error", ""))
    if said:
        parts.append(f"<p>said: {escape(said)}</p>")
    if isinstance(truth, int):
        truth = options[truth] if 0 <= truth < len(options) else ""
    parts.append(f"<p>true: {escape(truth or '')}</p></div>")
    return "".join(parts)


def film_strip(clip: dict) -> str:
    """Four frames of a clip, as an image inside the page; nothing if it cannot be read."""
    try:
        frames = read_clip(clip["video"], clip.get("start"), clip.get("end"), num_frames=4, size=160)
    except DataError:
        return ""
    png = encode_png(rearrange(frames, "t c h w -> h (t w) c"))
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


if __name__ == "__main__":
    main()
