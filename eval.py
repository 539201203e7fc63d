"""Score a checkpoint, or ask it about a video.

    python eval.py  # the toy benchmark of the last finished stage, with pictures
    python eval.py --video my.mp4 --ask "What am I doing?"      # one question; a chat without --ask
    python eval.py --data held-out.jsonl        # answers to the rows of one's own manifest, beside the truth
    python eval.py --bench egoschema --data DIR --out results   # EgoBench; --report makes a page

A share of right answers comes with its chance level, a 95 % interval and the number of items; divergences and
ranks are plain figures beside it. Narrations and answers are decoded greedily and count as right when they
match the truth exactly (benchmarks ignore case and full stops).
"""
from __future__ import annotations

import os

if __name__ == "__main__":
    # OpenMP's threads spin while they wait, on cores that others need.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import ast
import contextlib
import hashlib
import json
import math
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import zip_longest
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from data import (CLIPS, COLOURS, GREY, NARRATE, PATTERNS, VERBS, DataError, Loader, Screen, Tokenizer, chats_of,
                  clips_of, clock_seconds, contact_sheet, convert, encode_png, file_lock, film_strip, is_inside,
                  led_by, progress, read_manifest, read_manifests, read_row_clip, read_text, spread, time_of_frame,
                  toy_split, verbalise_wearer, write_jsonl, write_text_atomic, written)
from model import (VIDEO, Exo2Ego, KVCache, SharedPrefix, autocast,
                   choose_attention, feature_kl, fingerprint, git_revision, load_checkpoint,
                   newest_checkpoint, pick_device, read_state, to_device_and_dtype)


# --------------------------------------------------------------------------------------------------------- 1 answering
def iterate_batches(model, tokenizer, rows, view, batch=100):
    """The clips of all rows, in order, in batches on the model's device.

    `view` is ego, exo or pair. A batch has one sample per row: the splits that are scored have one exo clip per row.
    DataError: a clip cannot be read.
    """
    device = next(model.parameters()).device
    loader = Loader(rows, model.cfg, tokenizer, view=view, batch=batch, train=False)
    steps = math.ceil(len(rows) / batch)
    for (micro_batch,) in loader.stream(0, steps):
        yield micro_batch.to(device)


@torch.no_grad()
def encode_clips(model, tokenizer, rows, view) -> Tensor:
    """Visual tokens (rows, tokens, W) of every row's clip; `view` is ego or exo."""
    # All clips of a split fit into memory as tokens, and several tasks read them.
    encode = model.encode_ego if view == "ego" else model.encode_exo
    batches = iterate_batches(model, tokenizer, rows, view)
    return torch.cat([encode(getattr(batch, view)) for batch in batches])


def generate_answers(model, tokenizer, visual, questions, batch=125, max_new=32):
    """Greedy answers to one question about each row of `visual` (questions, tokens, W)."""
    prompts = []
    for question in questions:
        ids, _ = tokenizer.chat([{"user": question}], visual.shape[1])
        prompts.append(torch.tensor(ids))
    answers = {}
    for part in batches_of_one_length(prompts, batch):
        # One prompt per clip; all prompts of a batch are decoded together.
        replies = model.generate(visual[part], [prompts[i] for i in part], eos=tokenizer.eos, max_new=max_new)
        answers |= dict(zip(part, replies))
    return [tokenizer.decode(answers[i]).strip() for i in range(len(prompts))]


def narration_log_likelihood(model, tokenizer, visual, pairs, batch=250):
    """log p(narration | clip) in nats, summed over its tokens, of each (row number, narration) -> (pairs,)."""
    scores = []
    for first in range(0, len(pairs), batch):
        # The narration is the supervised answer of a chat that shows the clip.
        numbers, chats = [], []
        for number, text in pairs[first:first + batch]:
            turn = {"user": NARRATE, "assistant": text}
            numbers.append(number)
            chats.append(tokenizer.chat([turn], visual.shape[1]))
        ids, labels, lens = pack(chats, visual.device)
        scores.append(model.log_likelihood(visual[numbers], ids, labels, lens))
    return torch.cat(scores).cpu().numpy()


def pack(chats, device):
    """(ids, labels) of several chats -> all ids (tokens,), all labels (tokens,), each chat's length."""
    ids, labels, lens = [], [], []
    for chat_ids, chat_labels in chats:
        ids += chat_ids
        labels += chat_labels
        lens.append(len(chat_ids))
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device), lens


# --------------------------------------------------------------------------------------------------- 2 what F imagines
@torch.no_grad()
def exo_features(model, tokenizer, rows):
    """What the exo connector makes of y, of F(x), and, as a control, of x as it is: three of (rows, tokens, W)."""
    parts = []
    for batch in iterate_batches(model, tokenizer, rows, "pair"):
        views = model(batch.ego, batch.exo)
        parts.append((model.exo_connector(views.y), views.estimate, model.exo_connector(views.x)))
    return [torch.cat(part) for part in zip(*parts)]


def transfer(model, tokenizer, rows, picture):
    """Is the exo clip of the same moment the nearest to F(x)? The distance is the loss's: KL between connector tokens.

    The candidates are first the exo clips of 200 scenes, one per scene, and then the five exo clips of one scene.
    -> the share of moments where it is the nearest, its median rank, and both figures for x without F.
    """
    rows = rows[:200 * CLIPS]
    exo, mapped, unmapped = exo_features(model, tokenizer, rows)
    figures = {}
    for name, estimate in {"": mapped, "_x": unmapped}.items():
        # The candidates are the first moments of all scenes.
        orders = rank_exo_clips(exo[::CLIPS], estimate[::CLIPS])
        figures |= rank_figures(f"transfer{name}", own_ranks(orders), candidates=len(orders))
        if estimate is mapped:
            show_transfer(picture, rows[::CLIPS], orders)
        # The candidates are the five moments of one scene.
        ranks = []
        for scene, estimates in zip(exo.split(CLIPS), estimate.split(CLIPS)):
            ranks += own_ranks(rank_exo_clips(scene, estimates))
        figures |= rank_figures(f"transfer_scene{name}", ranks, candidates=CLIPS)
    return figures


def rank_exo_clips(exo, estimate):
    """For each estimate the exo clips, by number, from near to far."""
    orders = []
    for one in estimate:
        distances = feature_kl(exo, one.expand_as(exo))
        orders.append(distances.argsort(stable=True).tolist())
    return orders


def own_ranks(orders):
    """The rank of clip i in the i-th order; the nearest has rank 1."""
    return [1 + order.index(i) for i, order in enumerate(orders)]


def rank_figures(name, ranks, candidates):
    """How often the own clip is the nearest, and its median rank, beside what chance gives."""
    return proportion(f"{name}_top1", np.equal(ranks, 1), 1 / candidates) | {
        f"{name}_median_rank": float(np.median(ranks)),
        f"{name}_median_rank_chance": (candidates + 1) / 2}


def kl_true_vs_shuffled(model, tokenizer, rows):
    """KL(exo || F(ego)) of true partners and of shuffled ones: after transfer the true one is well below."""
    exo, estimate, _ = exo_features(model, tokenizer, rows)
    # The partner that is half of the rows away is of another scene.
    shuffled = exo.roll(len(exo) // 2, 0)
    return {
        "kl_true": float(feature_kl(exo, estimate).mean()),
        "kl_shuffled": float(feature_kl(shuffled, estimate).mean()),
        "kl_n": len(exo)}


def narrate_with_mean_F(model, tokenizer, rows, visual):
    """Does the decoder learn from F(x) what a clip shows? If it does, the score drops when the mean over all clips
    takes the place of F(x). A model that was trained on x alone is the fairer control (--no-mapping)."""
    own, mapped = visual.split(model.cfg.visual_tokens, dim=1)
    mean = mapped.mean(0, keepdim=True).expand_as(mapped)
    figures, _ = exact_narrations("ego_em_mean_F", model, tokenizer, rows, torch.cat([own, mean], dim=1))
    return figures


def learner_after_init(source, base, tokenizer, rows, half):
    """The narrations of the learner that stage 2 starts from: Init has trained it, stage 1 has left it as it was. Its
    weights may stay in half precision where `half` says so."""
    before, _ = load_checkpoint(source, base)
    before = to_device_and_dtype(before.eval(), pick_device(), half)
    visual = encode_clips(before, tokenizer, rows, "ego")
    figures, _ = exact_narrations("ego_em_init", before, tokenizer, rows, visual)
    return figures


# ------------------------------------------------------------------------------------------------- 3 the toy benchmark
# A narration of the micro-world, its four facts, and how many different ones of each there are.
NARRATION = re.compile(r"Camera-wearer (?P<verb>.+) the (?P<colour>\w+) (?P<pattern>\w+) block "
                       r"with the (?P<hand>\w+) hand\.")
FACTS = {"verb": len(VERBS), "colour": len(COLOURS), "pattern": len(PATTERNS), "hand": 2}
NARRATION_CHANCE = 1 / math.prod(FACTS.values())                            # 1 / 270


def toy_benchmark(model: Exo2Ego, tokenizer: Tokenizer, data: str, stage: int, out, source=None, base=None) -> dict:
    """The figures of a stage on clips of unseen scenes. They are printed and kept in out/eval.json.

    Stages 0 and 1 score the demonstrator's narrations of exo clips. Stage 2 scores the learner's
    narrations, and what F imagines, in out/transfer.png. Stage 3 scores its narrations, its choice of a
    clip among five, and its answers. out/predictions.jsonl holds what the model said of each clip, and
    out/samples.png shows a few. `source` is the run that the stage started from, `base` has the weights that
    it leaves as they are.
    """
    if not (Path(data) / "world.json").is_file():
        raise DataError(f"--data {data} is no micro-world (data.py toy makes one); your own videos: --video")
    model.eval()
    out = Path(out)

    # The exo encoder reads the demonstrator's clips, the ego encoder the learner's.
    split, view = "test", "ego"
    if stage <= 1:
        split, view = "exo_test", "exo"
    rows = read_manifest(toy_split(data, split))
    visual = encode_clips(model, tokenizer, rows, view)

    # Each column of predictions.jsonl has one value per row.
    figures, columns = evaluate_narrations(model, tokenizer, rows, visual, view)
    if stage == 2:
        if source:
            half = any(p.dtype == torch.bfloat16 for p in model.parameters())
            figures |= learner_after_init(source, base, tokenizer, rows, half)
        if model.F is not None:
            figures |= narrate_with_mean_F(model, tokenizer, rows, visual)
            figures |= kl_true_vs_shuffled(model, tokenizer, read_manifest(toy_split(data, "val")))
            figures |= transfer(model, tokenizer, rows, out / "transfer.png")
    if stage == 3:
        for evaluate in (choose_clip, evaluate_questions):
            more_figures, more_columns = evaluate(model, tokenizer, rows, visual)
            figures |= more_figures
            columns |= more_columns

    # The choice takes at most a thousand rows, so its columns may be shorter than the others.
    predictions = []
    for row, *values in zip_longest(rows, *columns.values()):
        truth = {key: row[key] for key in ("id", "text", "turns")}
        predictions.append(truth | dict(zip(columns, values)))
    write_jsonl(out / "predictions.jsonl", predictions)
    show_samples(out / "samples.png", rows, predictions, f"After stage {stage}: {view} clips of unseen scenes")

    # The run that this stage started from has a score to compare with, if it read clips of the same view.
    before = content_of(Path(source), "eval").get(f"{view}_em") if source else None
    if before is not None:
        print(f"{view} narrations exact: {100 * before:.1f} % before this stage")
    keep_figures(out / "eval.json", figures, about={})
    pictures = ", ".join(map(str, sorted(out.glob("*.png"))))
    print(f"pictures: {pictures}; figures: {out}/eval.json")
    print(f"next: {next_command(stage, out, data)}", flush=True)
    return figures


def evaluate_narrations(model, tokenizer, rows, visual, view):
    """Exact match of whole narrations and of each of their four facts -> figures, {"said": narrations}."""
    figures, narrations = exact_narrations(f"{view}_em", model, tokenizer, rows, visual)
    # A narration of another form has none of the facts right.
    found = list(map(NARRATION.fullmatch, narrations))
    expected = [NARRATION.fullmatch(row["text"]) for row in rows]
    for fact, count in FACTS.items():
        right = [a is not None and a[fact] == b[fact] for a, b in zip(found, expected)]
        figures |= proportion(f"{view}_{fact}", right, 1 / count)
    return figures, {"said": narrations}


def exact_narrations(name, model, tokenizer, rows, visual):
    """The share of rows whose narration is exact -> the figures of this score, the narrations."""
    narrations = generate_answers(model, tokenizer, visual, [NARRATE] * len(rows))
    exact = [said == row["text"] for said, row in zip(narrations, rows)]
    return proportion(name, exact, NARRATION_CHANCE), narrations


def evaluate_questions(model, tokenizer, rows, visual):
    """Exact match of the answers to each row's first question -> figures, {"reply": answers}."""
    questions = [row["turns"][0]["user"] for row in rows]
    truths = [row["turns"][0]["assistant"] for row in rows]
    replies = generate_answers(model, tokenizer, visual, questions)

    chance = guess_chance(questions, truths)
    right = [reply == truth for reply, truth in zip(replies, truths)]
    return proportion("qa", right, chance), {"reply": replies}


def guess_chance(questions, truths):
    """The share that a uniform draw gets right: it draws from the different truths of the same question. All
    questions that are asked only once have one set of truths."""
    asked = Counter(questions)
    kinds = [question if asked[question] > 1 else None for question in questions]
    truths_of = defaultdict(set)
    for kind, truth in zip(kinds, truths):
        truths_of[kind].add(truth)
    return np.mean([1 / len(truths_of[kind]) for kind in kinds])


def choose_clip(model, tokenizer, rows, visual):
    """EgoMCQ's task: which of five clips does this narration describe?

    The wrong four are from other scenes (inter), or the other moments of its scene (intra); all have different
    narrations. -> figures, the outcome of each item as columns "inter" and "intra".
    """
    # Nine different narrations are enough: a scene has at most five of them, which leaves four for the wrong clips.
    different = len({row["text"] for row in rows})
    if different < 9:
        raise DataError(f"the test split tells {different} things, a choice needs 9: render a larger --test")
    # The same items for every model.
    rng = np.random.default_rng(0)
    count = min(1000, len(rows))
    figures, columns = {}, {}
    for kind in ("inter", "intra"):
        # The right clip comes first, which cannot help: equally good candidates share the point.
        pairs = []
        for item in range(count):
            candidates = [item, *wrong_clips(rows, item, kind, rng)]
            pairs += [(number, rows[item]["text"]) for number in candidates]
        scores = narration_log_likelihood(model, tokenizer, visual, pairs).reshape(count, 5)
        columns[kind] = [choice_score(five, right=0) for five in scores]
        figures |= proportion(f"mcq_{kind}", columns[kind], chance=0.2)
    return figures, columns


def wrong_clips(rows, item, kind, rng):
    """The four other candidates of an item, as row numbers."""
    # Five consecutive rows are the moments of one scene.
    first = item // CLIPS * CLIPS
    scene = range(first, first + CLIPS)
    if kind == "intra":
        return [number for number in scene if number != item]
    # Rows of other scenes are drawn until four have narrations of their own.
    drawn = []
    texts = {rows[item]["text"]}
    while len(drawn) < 4:
        number = int(rng.integers(len(rows)))
        if number not in scene and rows[number]["text"] not in texts:
            drawn.append(number)
            texts.add(rows[number]["text"])
    return drawn


# ------------------------------------------------------------------- 4 a score is a share, its chance and its interval
def proportion(name, outcomes, chance):
    """The mean of outcomes in [0, 1], with its chance level (unless it is None), its interval and their number."""
    share = np.mean(outcomes)
    low, high = wilson(share, len(outcomes))
    guessed = {} if chance is None else {f"{name}_chance": chance}
    return {
        name: share,
        **guessed,
        f"{name}_lo": low,
        f"{name}_hi": high,
        f"{name}_n": len(outcomes)}


def wilson(share, n):
    """Wilson's 95 % interval of a proportion: it stays inside [0, 1] and is honest near both ends."""
    # The normal distribution holds 95 % within z standard deviations.
    z = 1.96
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def choice_score(scores, right):
    """1 if the best score is right, a share if several candidates have the best score, else 0.

    `right` is the index of the right candidate, or a mask of several. A model that gives every candidate the
    same score gets chance, wherever the right one stands.
    """
    best = scores == scores.max()
    return best[right].sum() / best.sum()


# ------------------------------------------------------------------------------------------------- 5 one video, a chat
class VideoContext:
    """What the decoder has read before a question: a video's tokens, or none at all (`visual` None).

    The keys and values of this prefix are computed once. `score` and `generate` leave them as they are, so
    questions do not see each other; `stream` appends to them, so a conversation goes on.
    """
    @torch.no_grad()
    def __init__(self, model, tokenizer, visual):
        """`visual` has shape (1, tokens, W)."""
        self.model = model
        self.tokenizer = tokenizer
        self.device = model.decoder.lm_head.weight.device
        self.video_tokens = 0 if visual is None else visual.shape[1]
        # The tokens of a conversation that wait to be read with the next question.
        self.unread = []

        # The prefix ends with the last visual token. Without a video it is <s> alone.
        ids, _ = tokenizer.chat([{"user": ""}], self.video_tokens)
        self.start = 1
        if visual is not None:
            self.start = ids.index(VIDEO) + self.video_tokens
        prefix = torch.tensor(ids[:self.start], device=self.device)
        embeddings = model.insert_visual_tokens(visual, prefix)
        self.cache = KVCache(sequences=1)
        model.hidden_states(embeddings, [self.start], self.cache)

    def prompt(self, question, answer=None):
        """ids and labels of what follows the prefix: a question, and its answer if there is one. DataError: they are
        longer than what the model reads."""
        # The video stands in the prefix already.
        turn = {"user": question.replace("<video>", "")}
        if answer is not None:
            turn["assistant"] = answer
        ids, labels = self.tokenizer.chat([turn], self.video_tokens)
        room_for_answer(self.model, ids if answer is None else ids[:-1])
        return ids[self.start:], labels[self.start:]

    @torch.no_grad()
    def score(self, pairs, batch=64):
        """log p(answer, </s> | video, question) of each (question, answer) -> (pairs, 2).

        The columns are the sum over the answer's tokens and their mean, in which tokens without a loss (those of
        the prompt) do not count. At most `batch` answers are in memory at a time.
        """
        scores = []
        for first in range(0, len(pairs), batch):
            # The new tokens of all pairs are packed; each pair also sees the prefix.
            chats = [self.prompt(*pair) for pair in pairs[first:first + batch]]
            ids, labels, lens = pack(chats, self.device)
            shared = SharedPrefix(self.cache, len(lens), keep=False)
            losses = self.model.text_losses(None, ids, labels, lens, shared)
            for own in losses.cpu().double().split(lens):
                scores.append([-float(own.sum()), -mean_per_token(own)])
        return np.array(scores)

    def generate(self, question, max_new=64):
        """The greedy answer to a question."""
        prompt = torch.tensor(self.prompt(question)[0])
        max_new = min(max_new, self.room(len(prompt)))
        alone = SharedPrefix(self.cache, 1, keep=True)
        reply, = self.model.generate(None, [prompt], eos=self.tokenizer.eos, max_new=max_new, cache=alone)
        return self.tokenizer.decode(reply).strip()

    def room(self, tokens):
        """How many more tokens the model reads when `tokens` new ones follow what it has read."""
        return self.model.cfg.max_length - self.cache.lens[0] - tokens

    def next_turn(self, question):
        """The ids of the next question of the conversation, behind the end of the answer before it."""
        if not self.unread:
            return self.prompt(question)[0]
        return self.unread + self.tokenizer.encode(f"[INST] {question} [/INST]")

    def stream(self, question, max_new=256):
        """Pieces of an answer as they come; the next question goes on from here."""
        prompt = torch.tensor(self.next_turn(question))
        max_new = min(max_new, self.room(len(prompt)))
        eos = self.tokenizer.eos
        tokens, emitted = [], ""
        for (token,) in self.model.stream(None, [prompt], eos=eos, max_new=max_new, cache=self.cache):
            tokens.append(token)
            text = self.tokenizer.decode(tokens)
            # A character of several bytes is emitted when its last byte is there.
            if not text.endswith("\ufffd"):
                yield text[len(emitted):]
                emitted = text
        # The model never reads the last token that it chose: the cache lacks the answer's </s>, and the last token of
        # an answer that was cut short.
        self.unread = [eos]
        if len(tokens) == max_new:
            self.unread = [tokens[-1], eos]


@torch.no_grad()
def look_at(model, clip, view="ego"):
    """The visual tokens (1, tokens, W) of a clip of a manifest's form ("video", "start", "end", "fps")."""
    encode = model.encode_ego if view == "ego" else model.encode_exo
    frames = read_row_clip(clip, model.cfg.frames, model.cfg.image_size)
    pixels = torch.from_numpy(frames)[None]                                 # (1, T, 3, S, S)
    return encode(pixels.to(model.decoder.lm_head.weight.device))


def prefill(model, tokenizer, clip):
    """Read one ego clip, or nothing for None."""
    visual = None if clip is None else look_at(model, clip)
    return VideoContext(model, tokenizer, visual)


def chat(model, tokenizer, clip, question):
    """Print the answer to one question about a clip. For None hold a chat, until an empty line or Ctrl-D."""
    context = prefill(model, tokenizer, clip)
    if question is not None:
        print_answer(context, question)
        return
    print("Ask about the video. An empty line ends the chat.")
    for question in typed_questions():
        try:
            if context.unread and context.room(len(context.next_turn(question))) < 1:
                print(f"(more than the {model.cfg.max_length} tokens that the model reads: the chat begins again)")
                context = prefill(model, tokenizer, clip)
            print_answer(context, question)
        except DataError as error:
            # A chat goes on after a question that cannot be read.
            print(error, flush=True)


def print_answer(context, question):
    """Print an answer piece by piece, as the model finds it."""
    for piece in context.stream(question):
        print(piece, end="", flush=True)
    print(" (cut short)" if len(context.unread) > 1 else "", flush=True)


# ===== a first reader can stop here =====


# -------------------------------------------------------------------------------------------------- A batches, pictures
def typed_questions():
    """What is typed, line by line, until an empty line or Ctrl-D."""
    with contextlib.suppress(EOFError):
        while True:
            question = input("? ").strip()
            if not question:
                return
            yield question


def batches_of_one_length(prompts, most):
    """Lists of prompts' numbers: prompts of one length are decoded 3 to 5 times faster than ragged ones."""
    of_length = defaultdict(list)
    for number, prompt in enumerate(prompts):
        of_length[len(prompt)].append(number)
    batches = []
    for _, same in sorted(of_length.items()):
        batches += [same[first:first + most] for first in range(0, len(same), most)]
    return batches


def room_for_answer(model, ids):
    """How many tokens the model reads behind these. DataError: none, so they leave no room for an answer."""
    room = model.cfg.max_length - len(ids)
    if room < 1:
        raise DataError(f"{len(ids)} tokens are as many as the {model.cfg.max_length} that this model reads, or more: "
                        f"a shorter question is needed")
    return room


# What a score of the toy benchmark is about, in words.
IN_WORDS = {
    "exo_em": "exo narrations exact",
    "ego_em": "ego narrations exact",
    "ego_em_init": "ego narrations exact before this stage, after Init",
    "ego_em_mean_F": "ego narrations exact with the mean of F(x) for F(x)",
    "transfer_top1": "own exo clip nearest to F(x), among scenes",
    "transfer_x_top1": "own exo clip nearest to x as it is, among scenes",
    "transfer_scene_top1": "own exo clip nearest to F(x), in its scene",
    "transfer_scene_x_top1": "own exo clip nearest to x as it is, in its scene",
    "mcq_inter": "which clip, the other four from other scenes",
    "mcq_intra": "which of a scene's five moments",
    "qa": "questions exact",
    "exact": "answers exact",
    "rouge_l": "ROUGE-L of the answers"}


def keep_figures(path, figures, about):
    """Print figures, and write them to a file, behind what `about` says of them."""
    write_text_atomic(path, json.dumps(about | figures, indent=1))
    print_figures(figures)


def print_figures(figures):
    """A sentence for each score, with its interval, its number of items and its chance level, if it has one; other
    figures in one line each."""
    for name, value in figures.items():
        score, _, part = name.rpartition("_")
        if part in ("chance", "lo", "hi", "n") and f"{score}_lo" in figures:
            continue                                            # it stands in the sentence of its score
        # A score that is no number (None) has no interval.
        if value is None or f"{name}_lo" not in figures:
            print(f"   {name}:", f"{value:.4g}" if isinstance(value, float) else value)
            continue
        low, high, n = (figures[f"{name}_{part}"] for part in ("lo", "hi", "n"))
        line = f"{IN_WORDS.get(name, name)}: {100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {n:,}"
        if f"{name}_chance" in figures:
            line += f", chance {100 * figures[f'{name}_chance']:.1f} %"
        print(line)


def next_command(stage, out, world=None):
    """What one would type after a stage whose run is `out`; `world` is the micro-world, None for one's own data."""
    # Ego video is for the learner of stages 2 and 3.
    if stage < (3 if world else 2):
        data = world or "pairs.jsonl (and --preset as before)"
        return f"python train.py --stage {stage + 1} --init {out} --data {data}"
    video = f"{world}/test/ego/0.mp4 --start 0 --end 1" if world else "FILE"
    return f"python eval.py --ckpt {out} --video {video} --ask 'What am I doing?'"


# The colours of a sample's text: right, wrong; the truth is grey.
GREEN = (20, 130, 50)
RED = (190, 40, 40)


def show_transfer(path, rows, orders):
    """Six moments, a row each: the ego clip, its exo clip, and the three exo clips that are nearest to F(x), the true
    one in a green frame."""
    titles = ("ego: x", "exo: y", "nearest to F(x)", "second", "third")
    width = 2 * (96 + 4) + 16
    sheet = [np.concatenate([written(title, width, GREY) for title in titles], axis=1)]
    ranks = own_ranks(orders)
    for i in spread(range(len(rows)), 6):
        tiles = []
        near = orders[i][:3]
        clips = [rows[i]["ego"], *(rows[number]["exo"][0] for number in [i, *near])]
        for clip, number in zip(clips, [None, None, *near]):
            tile = np.full((96 + 16, width, 3), GREEN if number == i else 255, np.uint8)
            tile[8:-8, 8:-8] = film_strip(read_row_clip(clip, num_frames=2, size=96))
            tiles.append(tile)
        caption = f"rank {ranks[i]} of {len(rows)}: {rows[i]['text']}"
        sheet += [np.concatenate(tiles, axis=1), written(caption, len(tiles) * width, GREY)]
    path.write_bytes(encode_png(np.concatenate(sheet)))


def show_samples(path, rows, predictions, title):
    """Eight clips of a toy benchmark, evenly spread."""
    shown = []
    for row, prediction in spread(list(zip(rows, predictions)), 8):
        answers = [("", row["text"], prediction["said"])]
        if "reply" in prediction:
            turn = row["turns"][0]
            answers.append((f"{turn['user']} ", turn["assistant"], prediction["reply"]))
        shown.append((clips_of(row)[0], answers))
    show_answers(path, shown, title, miss="WRONG")


def show_answers(path, shown, title, miss):
    """Clips and the answers about them, on the screen and as a contact sheet.

    `shown`: (clip, its (question, truth or None, what the model said)); `miss` is the word before what is not the
    truth.
    """
    items = []
    for clip, answers in shown:
        # Lines of text below the frames, each with its colour.
        lines = []
        for question, truth, said in answers:
            line = question + said
            if truth is None:
                lines.append((f"said: {line}", GREY))
                print(f"  said  {line}")
            elif said.split() == truth.split():
                lines.append((f"right: {line}", GREEN))
                print(f"  ok    {line}")
            else:
                lines += [(f"{miss}: {line}", RED), (f"true: {truth}", GREY)]
                print(f"  {miss:5} {line}   (true: {truth})")
        items.append(({"": read_row_clip(clip, num_frames=4, size=96)}, lines))
    contact_sheet(path, items, title)


# ---------------------------------------------------------------------------------------------------------- B commands
@dataclass
class Checkpoint:
    """A checkpoint on this machine's device, in the dtype that it computes with."""
    model: Exo2Ego
    tokenizer: Tokenizer
    state: dict                             # its state.json
    folder: Path


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", help="run folder or step_* (the last finished stage of out/stage3 ... out/stage0)")
    add("--base", help="where the untouched weights are, if they have moved")
    add("--vision", help="where the CLIP directory is, if it has moved")
    add("--data", help="a micro-world's folder (that of the training), a manifest, or the benchmarks' folder")
    add("--root", help="where the paths of a manifest in --data start (its folder)")
    add("--video", help="ask about this file")
    add("--ask", help="the question; without it, a chat")
    add("--start", type=float, help="seconds, of --video")
    add("--end", type=float, help="seconds, of --video")
    add("--fps", type=float, help="images per second, where --video is a folder of them")
    add("--bench", choices=[*BENCHES, "all"], help="DATA/<name>/ has the official files")
    add("--videos", help="where the benchmark's videos are (DATA/<name>/, or videos/ in it)")
    add("--out", help="where predictions and scores go (results for --bench and --report, else --ckpt)")
    add("--answer", choices=("likelihood", "letter", "generate"), default="likelihood",
        help="how options are chosen; open questions are always generated")
    add("--template", help="a text file with {question}, {options}, {goal}: the words of --answer letter and generate")
    add("--prompt", choices=("base", "task", "cue"), default="base",
        help="what leads a question, as in data.py: nothing, task details, or the first-person cue and those")
    add("--blind", action="store_true", help="without the video: the floor of text alone")
    add("--limit", type=int, help="so many items only, evenly spread over the file")
    add("--allow-outside", action="store_true", help="video paths may leave their folder")
    add("--report", action="store_true", help="OUT/report.html from what is in OUT")
    args = parser.parse_args(argv)
    # These flags do nothing without another one.
    needs = {"video": "ask start end fps", "data": "bench root", "bench": "videos answer template prompt blind limit"}
    for other, flags in needs.items():
        for flag in flags.split():
            if getattr(args, flag) != parser.get_default(flag) and not getattr(args, other):
                parser.error(f"--{flag} needs --{other}")
    # A video is asked about and leaves nothing; a benchmark has its own folder in --data.
    clashes = {"video": "bench data out report", "bench": "root"}
    for one, others in clashes.items():
        for other in others.split():
            if getattr(args, one) and getattr(args, other):
                parser.error(f"--{other} does nothing with --{one}: give one of them")
    if args.ask is not None and not args.ask.strip():
        parser.error("--ask needs a question; without --ask there is a chat")
    if args.fps is not None and not (0 < args.fps < 1000 and os.path.isdir(args.video)):
        parser.error(f"--fps {args.fps:g}: images per second of a --video that is a folder of them, more than 0")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: 1 or more is needed")
    return args


def main(argv=None):
    args = parse(argv)
    screen = Screen(sys.stdout)
    try:
        with contextlib.redirect_stdout(screen):
            # A page is made of what earlier calls left: by itself it needs no checkpoint.
            if args.bench or not args.report:
                use_checkpoint(args)
            else:
                print(write_report(Path(args.out or "results")))
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        kept = "; what is done is kept, the same command goes on" if args.bench else ""
        sys.exit(f"\neval.py: stopped{kept}")
    except (RuntimeError, MemoryError) as error:
        # torch says it in other words on each device. Any other error is a bug, whose place helps.
        if not re.search("out of memory|allocate memory|^$", str(error)):
            raise
        sys.exit("eval.py: out of memory: free some, or use a smaller checkpoint; CUDA_VISIBLE_DEVICES= in front of "
                 "the command takes the CPU's")
    finally:
        screen.flush()


def default_run():
    """The last stage that is finished; if none is, the last that has a checkpoint."""
    runs = list(filter(newest_checkpoint, ["out/stage3", "out/stage2", "out/stage1", "out/stage0"]))
    for run in runs:
        state = read_state(newest_checkpoint(run))
        if state["step"] == state["steps"]:
            if run != runs[0]:
                print(f"{runs[0]} is not finished: {run} is taken (--ckpt {runs[0]} takes the other)")
            return run
    return runs[0] if runs else "out/stage3"


def use_checkpoint(args):
    """Score or ask the checkpoint that the flags name, or the last stage's."""
    run = args.ckpt or default_run()
    model, state = load_checkpoint(run, args.base, args.vision)
    folder = newest_checkpoint(run)

    # Published weights do not say how they compute: in half precision if they are stored so.
    stored_half = any(p.dtype != torch.float32 for p in model.parameters())
    bf16 = state.get("bf16", stored_half)
    device = pick_device()
    print(choose_attention(device, torch.bfloat16 if bf16 else torch.float32, model.cfg), flush=True)
    model = to_device_and_dtype(model, device, bf16)
    ckpt = Checkpoint(model, Tokenizer(folder), state, folder)
    with autocast(device, bf16):
        if args.bench:
            run_benches(ckpt, args)
        elif args.video:
            if state["stage"] < 2:
                print(f"{folder} is of stage {state['stage']}: ego video is for the learner of stages 2 and 3")
            clip = {"video": args.video, "start": args.start, "end": args.end, "fps": args.fps}
            chat(model, ckpt.tokenizer, clip, args.ask)
        else:
            score(ckpt, args, args.out or run)


def score(ckpt, args, out):
    """The toy benchmark of a checkpoint, on the micro-world in --data or the one it was trained on; or its answers to
    the rows of a manifest in --data, or five of those it was trained on. What it finds lies in the folder that --ckpt
    names (of a run, or of one of its steps), or in --out."""
    state = ckpt.state
    config = state.get("config", {})                # published weights have none
    trained_on = config.get("data", [])
    Path(out).mkdir(parents=True, exist_ok=True)
    print(f"{ckpt.folder}: stage {state['stage']}, step {state['step']} of {state['steps']}")
    data = [args.data] if args.data else config.get("data", ["out/toy"])
    if data[0].endswith(".jsonl"):
        root = args.root if args.data else config["root"]
        rows = read_manifests(data, root, args.allow_outside or config.get("allow_outside", False))
        if args.data:
            # A name in which nothing is a pattern, and which no other results have.
            name = re.sub(r"[^\w-]", "_", Path(args.data).stem)
            answer_manifest(ckpt, rows, Path(out), f"answers-{name}")
        else:
            show_own_samples(ckpt.model, ckpt.tokenizer, rows, state["stage"], out)
        return
    # The result on another world is not the run's own.
    elsewhere = list(map(os.path.realpath, data)) != list(map(os.path.realpath, trained_on))
    if elsewhere and not args.out and Path(data[0], "world.json").is_file():
        raise DataError(f"{ckpt.folder} was not trained on {data[0]}: pass --out for its result there")
    # The run that this one started from may have moved, or been trained again.
    source = config.get("init")
    found = source and newest_checkpoint(source)
    if not found or fingerprint(found) != state["init"] or elsewhere:
        source = None
    toy_benchmark(ckpt.model, ckpt.tokenizer, data[0], state["stage"], out, source, args.base)


def run_benches(ckpt, args):
    """One benchmark, or all whose folder is there, by this process or as one of torchrun's ranks."""
    names = [args.bench]
    if args.bench == "all":
        names = [name for name in BENCHES if (Path(args.data) / name).is_dir()]
    if not names:
        raise DataError(f"{args.data} has none of the folders {', '.join(BENCHES)}")
    if len(names) < len(BENCHES) and args.bench == "all":
        print(f"{args.data} has no folder for {', '.join(name for name in BENCHES if name not in names)}")
    refused = []
    for name in names:
        own = {"bench": name, "root": f"{args.data}/{name}", "out": args.out or "results"}
        try:
            all_done = egobench(ckpt, argparse.Namespace(**vars(args) | own))
        except DataError as error:
            # The others of "all" need not suffer from one whose files are not as they should be.
            if len(names) == 1:
                raise
            refused.append(name)
            print(f"{name}: {error}", flush=True)
    # Of several ranks the one that ends last makes the page.
    if args.report and len(refused) < len(names) and all_done:
        print(write_report(Path(args.out or "results")))
    # One of several ranks that left with an error would end the others.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if refused and (alone or len(refused) == len(names)):
        raise DataError(f"not scored, as said above: {', '.join(refused)}")


def content_of(folder, name):
    """What FOLDER/NAME.json holds, such as the figures of a benchmark; nothing if it is not there."""
    path = folder / f"{name}.json"
    return json.loads(read_text(path)) if path.is_file() else {}


# ------------------------------------------------------------------------------------------------- C EgoBench: metrics
# Ten public benchmarks: their metrics, their official files, a run, the figures, a page.
def mean_per_token(losses):
    """The mean loss of an answer's tokens, as EgoPlan takes it: a token without any loss does not count."""
    counted = losses[losses != 0]
    return float(counted.sum()) / max(1, len(counted))


def ranked_precision(sim, rel):
    """AP of each query (rows). EK-100's: hits are relevance 1, but precision counts graded relevance too."""
    order = np.argsort(-sim, kind="stable")
    ranked = np.take_along_axis(rel, order, axis=1)
    ranks = np.arange(1, rel.shape[1] + 1)
    precision = np.cumsum(ranked, axis=1) / ranks
    hits = ranked == 1
    return (precision * hits).sum(1) / hits.sum(1)


def ranked_gain(sim, rel):
    """nDCG of each query over as many ranks as it has relevant items (> 0).

    Ties are in reversed order, as in the official code.
    """
    order = np.argsort(sim, kind="stable")[:, ::-1]
    ranked = np.take_along_axis(rel, order, axis=1)
    ideal = np.sort(rel)[:, ::-1]
    ranks = np.arange(rel.shape[1])
    relevant = (rel > 0).sum(1)[:, None]
    weight = 1 / np.log2(ranks + 2) * (ranks < relevant)
    return (ranked * weight).sum(1) / (ideal * weight).sum(1)


def retrieval_metrics(sim: np.ndarray, rel: np.ndarray) -> dict:
    """EPIC-KITCHENS-100 multi-instance retrieval: sim and rel (videos, texts), float64 -> fractions.

    The arithmetic is the official one (joint-part-of-speech embeddings, mAP.py and nDCG.py), with stable
    sorts.
    """
    figures = {}
    for name, metric in (("mAP", ranked_precision), ("nDCG", ranked_gain)):
        text_of_video = metric(sim, rel).mean()
        video_of_text = metric(sim.T, rel.T).mean()
        figures[f"{name}_V2T"] = text_of_video
        figures[f"{name}_T2V"] = video_of_text
        figures[f"{name}_avg"] = (text_of_video + video_of_text) / 2
    return figures


def class_precision(scores, labels):
    """AP of each class (columns), NaN without a positive; rows without any label are ranked last."""
    labelled = labels.any(1)[:, None]
    scores = np.where(labelled, scores, -np.inf)
    with np.errstate(invalid="ignore"):
        return ranked_precision(scores.T, labels.T)


def charades_map(scores: np.ndarray, labels: np.ndarray) -> dict:
    """Charades: (videos, classes) -> mAP (NaN if a class has no positive, as official) and its nan-mean."""
    each = class_precision(scores, labels)
    return {"mAP": each.mean(), "nanmAP": np.nanmean(each)}


def rouge_l(said, truth):
    """ROUGE-L's F1 on lower-case words and numbers, of any script, without stemming."""
    a = re.findall(r"[^\W_]+", said.lower())
    b = re.findall(r"[^\W_]+", truth.lower())
    # row[j] is the length of the longest common subsequence of the words of a so far and the first j of b.
    row = [0] * (len(b) + 1)
    for word in a:
        above = row
        row = [0]
        for j, other in enumerate(b):
            longest = above[j] + 1 if word == other else max(row[j], above[j + 1])
            row.append(longest)
    return 2 * row[-1] / max(1, len(a) + len(b))


def parse_letter(reply: str, options: int):
    """The index of the option that a reply names, read strictly: "B", "(B)", "B.", "B) text" ...

    A word that starts with a letter, an empty reply, a letter beyond the options, and a reply that marks a second
    letter (at the start of a line, in brackets, or before words) are None: counted, wrong.
    """
    reply = reply.replace("**", "")                             # Markdown's bold
    found = re.match(r"\s*(?:\([A-Z]\)[.:]?|[A-Z]\)?[.:]?)(?=\s*$|\s*\n|(?<=[.:)])\s)", reply)
    # "A. B. C." and "A.\nB" are lists; "B. vitamin C" names one option, and so does "B. A man walks".
    mark = r"\([A-Z]\)|\b[A-Z]\)|(?:^\W*|(?<=[.:)]\s))[A-Z](?:[.:]|\s*$)|(?<=\s)[A-Z][.:](?=[ \t]+\S)"
    mark += r"|(?<=[.:)]\s)or \(?[A-Z]\)?[.:]?\s*$"
    marked = set(re.findall("[A-Z]", " ".join(re.findall(mark, reply, re.MULTILINE))))
    letter = found and found[0].strip(" \n\t().:")
    index = ascii_uppercase.index(letter) if letter else options
    return index if index < options and marked == {letter} else None


# ------------------------------------------------------------------------------------------------- EgoBench: the files
@dataclass
class Item:
    """One question of a benchmark. The model never sees a path, for a path can name the answer.

    `answer` is the index of the right option or clip; a text, where there are no options; for charades-ego
    the indices of all classes that occur, for ek100-mir the relevance of each text. None: the publishers
    hide it. A reader's item is checked when it is made, for a record may hold anything.
    """
    id: str
    clips: list[dict]                       # EgoMCQ has five to choose from
    question: str = ""
    options: list[str] = field(default_factory=list)
    answer: int | str | list | None = None
    kind: str = ""                          # a part of the benchmark with a score of its own
    goal: str = ""                          # of a plan, for --template

    def __post_init__(self):
        """ValueError: what should be a text, or the number of an option or clip, is not."""
        texts = [self.id, self.question, self.kind, self.goal, *self.options]
        if not all(isinstance(text, str) for text in texts) or isinstance(self.options, str):
            raise ValueError(f"these should be texts: {texts}")
        if not all(map(str.strip, self.options)):
            raise ValueError(f"an option is empty: {self.options}")
        if self.answer is None or isinstance(self.answer, list):
            return
        # JSON's true and 2.0 are no numbers of an option.
        numbers = range(len(self.options) or len(self.clips))
        fits = isinstance(self.answer, str)
        if self.options or len(numbers) > 1:
            fits = type(self.answer) is int and self.answer in numbers
        if not fits:
            raise ValueError(f"the answer is {self.answer!r}: a text, or for a choice one of {numbers}, is needed")

    def chance(self):
        """What a guess gets, and so do equal scores. Of an open question that is 0, or half for yes or no."""
        if isinstance(self.answer, str):
            return 0.5 if plain_words(self.answer) in ("yes", "no") else 0.0
        return outcome(self, {"scores": [0] * (len(self.options) or len(self.clips))})


# The answer of an item is none of its options. A reader says so after the item has been checked.
OUTSIDE = -1


# A reader yields the items of a benchmark from its `Files`, with the paths of their videos as the publishers
# name them.
def whole_video(files, name):
    """The one clip of an item that is about all of a video."""
    return [{"video": files.video(f"{name}.mp4")}]


def egoschema(files, args):
    """EgoSchema: questions.json (5,031), subset_answers.json (the 500 public answers); whole videos."""
    answers = files.json("subset_answers.json")
    for q in files.each(files.json("questions.json")):
        yield Item(
            id=q["q_uid"],
            clips=whole_video(files, q["q_uid"]),
            question=q["question"],
            options=[q[f"option {i}"] for i in range(5)],
            answer=answers.get(q["q_uid"]))


def qaego4d(files, args):
    """QAEgo4D, where `video_id` is an Ego4D clip that is shown whole.

    qaego4d-closed: annotations.QaEgo4D_test_close.json (GroundVQA: 500 items, three wrong answers each),
    in an order that the item's id decides. qaego4d-open: annotations.test.json or ...QaEgo4D_test.json.
    GroundVQA's archive has its files in data/unified/.
    """
    closed = args.bench == "qaego4d-closed"
    names = ["annotations.test.json", "annotations.QaEgo4D_test.json"]
    if closed:
        names = ["annotations.QaEgo4D_test_close.json"]
    for q in files.each(files.json(*names, *[f"data/unified/{name}" for name in names])):
        options, answer = [], q["answer"]
        if closed:
            options = [q["answer"], *q["wrong_answers"]]
            seed = zlib.crc32(q["sample_id"].encode())
            order = np.random.default_rng(seed).permutation(len(options))
            options = [options[i] for i in order]
            answer = int(np.argmin(order))
        yield Item(
            id=q["sample_id"],
            clips=whole_video(files, q["video_id"]),
            question=q["question"],
            options=options,
            answer=answer)


def egotaskqa(files, args):
    """EgoTaskQA, direct or indirect: test_qas.json or formatted_test_qas_encode.json, and answer_set.txt.

    The official test is open-vocabulary: classification over answer_set.txt by likelihood, or exact match of
    what is generated. Where egotaskqa.json is there, EgoThinker's choice among five is taken instead: a later
    paper that follows Exo2Ego has multiple choice, so the paper probably had, too.
    """
    if args.answer != "generate" and (files.root / "egotaskqa.json").is_file():
        for i, q in enumerate(files.each(files.json("egotaskqa.json"))):
            letters = sorted(q["option"])
            truth = q["option"][q["a"]].lower()
            yield Item(
                id=str(i),
                clips=[{"video": files.video(q["video_path"])}],
                question=q["q"],
                options=[q["option"][letter] for letter in letters],
                answer=letters.index(q["a"]),
                kind="5-way, yes or no" if truth in ("yes", "no") else "5-way")
        return
    known = []
    if args.answer != "generate":
        answers = [" ".join(words) for words in files.lines("answer_set.txt")]
        known = [answer for answer in answers if not answer.startswith("<UNK")]
    for q in files.each(files.json("formatted_test_qas_encode.json", "test_qas.json")):
        truth = q["answer"].lower()
        kind = "binary" if truth in ("yes", "no") else "open"
        if known:
            # Official code sees the encoded answer. Of one outside the vocabulary no option is right.
            if "answer_encode" in q:
                truth = answers[int(q["answer_encode"])]
            truth = known.index(truth) if truth in known else None
        item = Item(
            id=str(q["question_id"]),
            clips=whole_video(files, q["interval"]),
            question=q["question"],
            options=known,
            answer=truth,
            kind=kind)
        if truth is None:
            item.answer = OUTSIDE
        yield item


def charades(files, args):
    """Charades-Ego: CharadesEgo_v1_test_only1st.csv and Charades_v1_classes.txt.

    Every class is scored on the whole video (157-way zero-shot protocol).
    """
    names = {code: " ".join(words) for code, *words in files.lines("Charades_v1_classes.txt")}
    codes = sorted(names)
    for row in files.table("CharadesEgo_v1_test_only1st.csv"):
        # An action is a class's code, its start and its end in seconds.
        occur = {action.split()[0] for action in row["actions"].split(";") if action}
        yield Item(
            id=row["id"],
            clips=whole_video(files, row["id"]),
            question="What am I doing?",
            options=[names[code] for code in codes],
            answer=sorted(map(codes.index, occur)))


def egoplan(files, args):
    """EgoPlan-Bench: EgoPlan_validation.json; the candidates are answer texts.

    The clip runs from the first progress to the current frame. Ego4D's frames count at the file's own rate;
    those of EPIC count from 1, whatever the file's rate: 60 per second for P01_13, 50 for P01_103 (the
    extension has three digits).
    """
    for q in files.each(files.json("EgoPlan_validation.json")):
        # Without any progress so far the clip is the current frame and the one before.
        frames = frames_so_far(q, q["current_observation_frame"] - 1)
        clip = {"video": files.video(f"{q['video_id']}.mp4"), "frames": frames}
        if q["video_source"] == "EpicKitchens":
            number = q["video_id"].rpartition("_")[2]
            clip["frames"] = [frame - 1 for frame in frames]
            clip["rate"] = 60 if len(number) == 2 else 50
        yield plan_item(q, clip, q["video_source"])


def egoplan2(files, args):
    """EgoPlan-Bench2: EgoPlan-Bench2.json. Its videos are Ego4D's, named by `sample_id` before its last "_".

    The clip runs from the first progress, or from `task_start_frame` where there is none, to the current frame,
    at the file's own rate.
    """
    for q in files.each(files.json("EgoPlan-Bench2.json")):
        video = q["sample_id"].rpartition("_")[0]
        clip = {"video": files.video(f"{video}.mp4"), "frames": frames_so_far(q, q["task_start_frame"])}
        yield plan_item(q, clip, q["domain"])


def frames_so_far(q, otherwise):
    """[first frame of the first progress, or `otherwise` without any, current frame]."""
    starts = [int(step["start_frame"]) for step in q["task_progress_metadata"]]
    return [min(starts, default=int(otherwise)), int(q["current_observation_frame"])]


def plan_item(q, clip, kind):
    """The item of a record of either EgoPlan-Bench."""
    goal = q["task_goal"].strip(" .,;:!?").lower()
    if "goal" in goal:
        goal = goal.partition(" to ")[2] or goal                # "the goal is to cook rice"
    # "I want to clean the sink", but "I am cleaning the sink".
    first = goal.split()[0]
    wish = "I am" if first.endswith("ing") and first not in ("bring", "string", "swing") else "I want to"
    return Item(
        id=str(q["sample_id"]),
        clips=[clip],
        question=f"{wish} {goal}. The video shows what I have done so far. What do I do next?",
        options=[q[f"choice_{name}"] for name in "abcd"],
        answer=["A", "B", "C", "D"].index(q["golden_choice_idx"]),
        kind=kind,
        goal=goal)


def egoexomem(files, args):
    """EgoExoMem's Ego-Exo4D part: qa_merged_v6.json (764 items), of which the ego video alone is shown, whole.

    `required_view` says which camera's video answers the question; both are on record, so the items that need
    "exo" ask what F claims. A take's ego video is the one that its camera's name finds; where several have such a
    name, takes.json says which has the colour stream, as in data.py ego-exo4d.
    """
    root = Path(files.videos or files.root)
    coloured = colour_cameras(root)
    for q in files.each(files.json("qa_merged_v6.json", "data/EgoExo4D/qa_merged_v6.json")):
        # Of several videos with an ego camera's name, the one whose camera has a colour stream.
        folder = f"takes/{q['take_name']}/frame_aligned_videos"
        names = {path.name for path in root.glob(f"{folder}/**/aria*_214-1.mp4")} or {"aria01_214-1.mp4"}
        if len(names) > 1:
            names &= coloured[q["take_name"]]
        name, = names                                           # or ValueError: takes.json does not tell
        small = f"{folder}/downscaled/448/{name}"
        # `verification` tells when the answer is seen: the model must not.
        yield Item(
            id=str(q["qa_id"]),
            clips=[{"video": small if (root / small).is_file() else f"{folder}/{name}"}],
            question=q["question"],
            options=q["options"],
            answer=q["correct_answer"],
            kind=q["required_view"])


def colour_cameras(root):
    """The names of each take's videos with a colour stream, from Ego-Exo4D's takes.json; nothing if it is not there."""
    coloured = defaultdict(set)
    for take in content_of(root, "takes"):
        for streams in take["frame_aligned_videos"].values():
            coloured[take["take_name"]].add(Path(streams.get("rgb", {}).get("relative_path", "")).name)
    return coloured


def vln_qa(files, args):
    """VLN-QA: MVBench's egocentric_navigation.json (200 items, four candidates); whole videos."""
    for i, q in enumerate(files.each(files.json("egocentric_navigation.json"))):
        yield Item(
            id=str(i),
            clips=[{"video": files.video(q["video"])}],
            question=q["question"],
            options=q["candidates"],
            answer=q["candidates"].index(q["answer"]))


def egomcq(files, args):
    """EgoMCQ: egomcq.json; which of five clips does a narration describe?

    Type 1 is inter and 2 intra (the original code prints them swapped). Clips are in seconds of the whole
    Ego4D video, negative ones cut to 0.
    """
    for key, q in files.each(files.json("egomcq.json").items()):
        # The candidates are clips of up to five videos.
        clips = []
        for number in range(5):
            choice = q["choices"][str(number)]
            clips.append({
                "video": files.video(f"{choice['video_uid']}.mp4"),
                "start": max(float(choice["clip_start"]), 0.0),     # in this order NaN stays NaN
                "end": float(choice["clip_end"])})
        narration = verbalise_wearer(q["query"]["clip_text"])
        kind = {1: "inter", 2: "intra"}[q["types"]]
        yield Item(id=key, clips=clips, question=narration, answer=q["answer"], kind=kind)


def ek100(files, args):
    """EPIC-KITCHENS-100 retrieval: EPIC_100_retrieval_test.csv (videos) and ..._test_sentence.csv (texts).

    The relevance of a text is (same verb class + overlap of noun sets) / 2; texts keep their file's order.
    """
    videos, classes = {}, {}
    for row in files.table("EPIC_100_retrieval_test.csv",
                           "retrieval_annotations/EPIC_100_retrieval_test.csv"):
        key = row["narration_id"]
        videos[key] = row
        nouns = ast.literal_eval(row["all_noun_classes"])
        classes[key] = int(row["verb_class"]), set(nouns)
    texts = {}
    for row in files.table("EPIC_100_retrieval_test_sentence.csv",
                           "retrieval_annotations/EPIC_100_retrieval_test_sentence.csv"):
        texts[row["narration_id"]] = row["narration"]
    for key, row in videos.items():
        clip = {
            "video": files.video(f"{row['video_id']}.mp4"),
            "start": clock_seconds(row["start_timestamp"]),
            "end": clock_seconds(row["stop_timestamp"])}
        # One relevance per text, in the order of the options.
        relevance = [relevance_of(classes[key], classes[text]) for text in texts]
        yield Item(
            id=key,
            clips=[clip],
            question="Narrate the video.",
            options=list(texts.values()),
            answer=relevance)


def relevance_of(video, text):
    """EK-100's relevance of a text for a video, both as (verb class, noun classes): 1 is a match."""
    verb, nouns = video
    other_verb, other_nouns = text
    # The share of nouns that they have in common.
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


BEFORE_NOW = ("frames are centres of equal spans: the last of 16 lies 1/32 of the clip before the state that is asked "
              "about")
# The paper's Table, and the best open figures that we know of; the list is not complete.
BENCHES = {
    "egoschema": Bench(egoschema, "choice", "61.3", "77.9 (Qwen2-VL-72B)",
                       note="ours: the 500 public answers"),
    "qaego4d-closed": Bench(qaego4d, "choice", "62.1", "67.2 (EgoThinker-7B)",
                            note="500 items"),
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
    "egoplan": Bench(egoplan, "choice", "42.7", "47.1 (EgoThinker-7B)", note=BEFORE_NOW),
    "vln-qa": Bench(vln_qa, "choice", "44.5", "54.0 (EgoThinker-7B)",
                    note="200 items: +- 6.9 points"),
    "egomcq": Bench(egomcq, "clips", "88.4 inter, 41.2 intra", "91.0 / 63.1 (EgoVLPv2, LaViLa-L)",
                    note="dual encoders choose by similarity, we by likelihood"),
    # These two are outside the paper's average.
    "egoplan2": Bench(egoplan2, "choice", "none", "", note=f"not in the paper; {BEFORE_NOW}"),
    "egoexomem": Bench(egoexomem, "choice", "none", "50.4 ego, 51.2 both (VideoRAG, InternVL)",
                       note="not in the paper; the Ego-Exo4D part, of the ego video alone")}
# The number of items tells which test EgoTaskQA's choice among five is.
FIVE_WAY = ("a choice among five, neither direct nor indirect: EgoThinker's has 8,783 items (best open 64.4), of which "
            "31 % are yes or no among nonsense, so that 50 % is chance; lmms-eval's has 18,936 (on 500 of them a 2B "
            "model had 96.4)")
# The words around a question, which are ours; --template has a user's own.
TEMPLATES = {
    "likelihood": "{question}",
    "letter": "{question}\n{options}\nAnswer with the letter of the right option.",
    "generate": "{question}"}
# Task details, which may lead a question as they lead EgoIT's instructions (--prompt). They are ours, too.
TASK_DETAILS = {
    "likelihood": "Answer the question about the video.",
    "letter": "Choose the option that answers the question about the video.",
    "generate": "Answer the question about the video in a few words."}


def question_words(item: Item, args):
    """The words that ask an item: its question, below what --prompt puts first, in the template of --answer."""
    question = led_by(args.prompt, TASK_DETAILS[args.answer], item.question)
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, item.options))
    parts = {"question": question, "options": options, "goal": item.goal}
    # What is put in may hold such marks itself: they stay as they are.
    return re.sub(r"\{(question|options|goal)\}", lambda mark: parts[mark[1]], args.words or TEMPLATES[args.answer])


def read_template(path, item, answer):
    """The text of --template. DataError: it asks for what an item lacks, or not for what it needs."""
    text = read_text(path).rstrip("\n")
    marks = set(re.findall(r"\{(\w+)\}", text))
    allowed = [name for name in ("question", "options", "goal") if vars(item)[name]]
    asks = marks - {"options"} and (answer != "letter" or "options" in marks)
    if not asks or marks - set(allowed) or "<video>" in text:
        raise DataError(f"{path} has {sorted(marks)}: here a template may have {allowed}, each in {{}}; one of "
                        f"question and goal, options for letters, and no <video>, which stands first by itself")
    return text


# ----------------------------------------------------------------------------------------------------- EgoBench: a run
def egobench(ckpt, args):
    """Score the benchmark `args.bench`, whose official files are in `args.root`; -> whether all of it is done, and
    summed up."""
    bench = BENCHES[args.bench]
    items = list(convert(bench.reader, args))
    if not items or len({item.id for item in items}) < len(items):
        raise DataError(f"{args.root}: ids repeat, or there are no items")
    settle_answering(bench, items, args)
    said = cautions(bench, items, args)
    if args.limit:
        # Those that can be scored, if the answers of some are public.
        some = spread([item for item in items if item.answer is not None] or items, args.limit)
        if len(some) < len(items):
            said.insert(0, f"{len(some)} of {len(items)} items alone")
        items = some
    protocol = protocol_of(ckpt, items, bench=args.bench, answer=args.answer, blind=args.blind, prompt=args.prompt,
                           words=[NARRATE, question_words(items[0], args)])
    place_clips(items, Path(args.videos or args.root), args.allow_outside, args.blind)

    name = f"{args.bench}-blind" if args.blind else args.bench
    predictions = share_items(Path(args.out), name, protocol, items,
                              lambda todo: run_items(ckpt, todo, items, bench, args))
    if predictions is None:
        return False
    figures = summarise(bench, items, predictions, args)
    # JSON has no NaN.
    figures = {key: None if value != value else value for key, value in figures.items()}
    path = f"{args.out}/{name}.json"
    note = "; ".join(said)
    keep_figures(path, figures, protocol | {"note": note})
    print(f"   {note}\n{path}", flush=True)
    return True


def cautions(bench, items, args) -> list[str]:
    """What must be said of a score: the benchmark's own caution, and how its questions were asked."""
    said = [bench.note] if bench.note else []
    if items[0].kind.startswith("5-way"):
        said.append(FIVE_WAY)
    if bench.task == "choice":
        said.append("options not shown" if args.answer == "likelihood" else "options in one order")
    if bench.task in ("choice", "open") and not args.words:
        said.append("our words")
    return said


def share_items(out, name, protocol, items, answer):
    """The predictions of all items, in their order; None while other ranks have some of them to do.

    torchrun's ranks share the items. `answer(todo)` yields predictions, which are written as they come, so the
    same command goes on where a killed one stopped. The rank that ends last finds all of them, and so does any
    later call without torchrun.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    files = PredictionFiles(out, name, protocol, rank=rank, world=world)
    with files.lock():
        # This process answers what is not done of its share: all questions about one clip, then the next clip's.
        done = files.begin()
        todo = [item for item in items[rank::world] if item.id not in done]
        todo.sort(key=lambda item: str(item.clips[0]))
        others = len(items) - len(todo)
        print(f"{name}: {len(items)} items, {others} of them done or of other ranks", flush=True)
        predictions = answer(todo)
        if rank == 0:
            predictions = progress(predictions, len(todo), "items")
        files.append(predictions)
    predictions = files.gather(items)
    if predictions is None:
        print(f"{name}: rank {rank} is done; the last rank sums up, or later this command without torchrun")
    return predictions


def settle_answering(bench, items, args):
    """Set --answer, --template and --prompt to what this benchmark allows, which is said where it is not what was
    asked for; and args.words to the template's text.

    Open questions are generated, letters need a choice among at most 26, all others go by likelihood.
    """
    options = len(items[0].options)
    if bench.task != "clips" and options == 0:
        mode = "generate"
    elif args.answer == "letter" and bench.task == "choice" and options <= 26:
        mode = "letter"
    else:
        mode = "likelihood"
    # What does not apply to this benchmark is said, and then as if it had not been given.
    allowed = {"answer": mode}
    if mode == "likelihood":
        allowed["template"] = None
    if bench.task in ("clips", "retrieval"):
        allowed["prompt"] = "base"
    for flag, value in allowed.items():
        if getattr(args, flag) != value:
            print(f"{args.bench}: answered by {mode}, --{flag} {getattr(args, flag)} does not apply")
            setattr(args, flag, value)
    args.words = args.template and read_template(args.template, items[0], mode)


def protocol_of(ckpt, items, **how):
    """What predictions depend on: the weights, the questions and the way of answering."""
    # A file that the publishers change makes another test.
    content = json.dumps([asdict(item) for item in items])
    return {
        "ckpt": str(ckpt.folder),
        "weights": fingerprint(ckpt.folder),
        "preset": ckpt.state.get("config", {}).get("preset"),
        "git": git_revision(),
        **how,
        "items": len(items),
        "content": hashlib.sha256(content.encode()).hexdigest()[:16]}


def place_clips(items, root: Path, allow_outside, blind):
    """Make the paths of all clips absolute, and their frame numbers seconds.

    DataError: a path leads out of `root`, or not one video is there.
    """
    # Links are followed before the comparison.
    base = os.path.realpath(root)
    videos = set()
    for item in items:
        for clip in item.clips:
            video = find_video(root, clip["video"])
            if not (allow_outside or is_inside(base, video)):
                raise DataError(f"{clip['video']} is outside {base}: pass --videos or --allow-outside")
            clip["video"] = video
            videos.add(video)
            if "frames" in clip:
                # The clip ends with the last frame.
                rate = clip.pop("rate", None)
                first, last = clip.pop("frames")
                clip["start"] = seconds_of(video, max(0, first), rate)
                clip["end"] = seconds_of(video, last + 1, rate)
    if not blind and not any(map(os.path.isfile, videos)):
        raise DataError(f"none of {len(videos)} videos is there, such as {min(videos)}: pass --videos")


def seconds_of(video, frame, rate):
    """When a frame is shown: at the rate that its benchmark counts with, or by the file's own time stamps. A file
    that cannot be read will be the error of its items."""
    if rate:
        return frame / rate
    try:
        return time_of_frame(video, frame)
    except DataError:
        return frame / 30


def find_video(root: Path, name):
    """The real path of a video, also where EPIC-KITCHENS puts its files (P01/videos/P01_11.MP4)."""
    stem = Path(name).stem
    person = stem.split("_")[0]
    tries = [
        root / name,
        (root / name).with_suffix(".MP4"),
        root / f"{person}/videos/{stem}.MP4"]
    return os.path.realpath(next(filter(Path.is_file, tries), tries[0]))


@dataclass
class PredictionFiles:
    """The predictions of one benchmark: NAME.jsonl, and NAME.rankN.jsonl of each of torchrun's ranks.

    A file's first line is the protocol, then comes one prediction per line. A process appends to its own file,
    whose lock it holds meanwhile, and reads all, also those that another number of ranks left.
    """
    out: Path
    name: str
    protocol: dict
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        self.gathered = self.out / f"{self.name}.jsonl"
        self.own = self.gathered
        if self.world > 1:
            self.own = self.out / f"{self.name}.rank{self.rank}.jsonl"

    def lock(self):
        """A second process of a rank is refused."""
        return file_lock(self.out / f".{self.name}.lock{self.rank}", wait=False)

    def rows(self, path):
        """The predictions in one file."""
        lines = read_text(path).splitlines() if path.is_file() else []
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except ValueError:
                return                                          # a kill cut this last line short
            if number == 0:
                self.check_protocol(path, row)
            else:
                yield row

    def check_protocol(self, path, found):
        """DataError names the field in which a file has another protocol; its place and code may differ."""
        for key, value in self.protocol.items():
            if found.get(key) != value and key not in ("ckpt", "git"):
                raise DataError(
                    f"{path} was made with {key}={found.get(key)!r}, this run has {value!r}: "
                    f"choose another --out or remove it")
        # What other code has answered stays, and its revision is named, too.
        if found.get("git") != self.protocol.get("git"):
            revisions = f"{found.get('git')} + {self.protocol['git']}".split(" + ")
            self.protocol["git"] = " + ".join(dict.fromkeys(revisions))

    def read(self) -> dict:
        """The prediction of each item that has one, by id; an error gives way to a success."""
        rows = []
        for path in sorted(self.out.glob(f"{self.name}.*jsonl")):
            rows += self.rows(path)
        rows.sort(key=lambda row: "error" not in row)
        return {row["id"]: row for row in rows}

    def begin(self):
        """Make the own file ready to be appended to; -> ids of the items that are done."""
        # Items with errors are not done: they are tried again.
        kept = [row for row in self.rows(self.own) if "error" not in row]
        write_jsonl(self.own, [self.protocol, *kept])
        return {key for key, row in self.read().items() if "error" not in row}

    def append(self, predictions):
        """Write each prediction as it comes."""
        with open(self.own, "a", buffering=1) as file:
            for prediction in predictions:
                file.write(json.dumps(prediction) + "\n")

    def gather(self, items):
        """All predictions, in the items' order, which NAME.jsonl then holds. None: other ranks have some to do."""
        predictions = self.read()
        ordered = [predictions[item.id] for item in items if item.id in predictions]
        if len(ordered) < len(items):
            return None
        write_jsonl(self.gathered, [self.protocol, *ordered])
        return ordered


def run_items(ckpt, items, every_item, bench, args):
    """The predictions of items, of a benchmark's `every_item`, one by one; a clip is read once for all consecutive
    items about it.

    A prediction holds its item and "scores", "reply" or both "reply" and "choice". What cannot be read is an
    "error" in its prediction, which counts as wrong and is counted.
    """
    model, tokenizer = ckpt.model, ckpt.tokenizer
    sides = None
    if items and bench.task == "retrieval":
        # All items of a retrieval have the same texts, and one centre, whichever of them are still to do.
        sides = text_side(model, tokenizer, [] if args.blind else every_item, items[0].options)
    seen = None
    for item in items:
        # The item stands in its prediction, so that a reader or a judge needs no other file. But some share up to
        # thousands of texts, which no file needs in each line.
        prediction = asdict(item)
        if bench.task in ("retrieval", "classes"):
            prediction |= {"options": [], "answer": None}
        try:
            # Only EgoMCQ's items have several clips: the narration gets a score for each.
            scores = []
            for clip in item.clips:
                if clip != seen:
                    visual = None if args.blind else look_at(model, clip)
                    context = VideoContext(model, tokenizer, visual)
                    seen = clip
                if bench.task == "clips":
                    scores.append(context.score([(NARRATE, item.question)])[0, 0])
            if bench.task == "retrieval":
                scores = score_texts(context, visual, item.options, sides)
            said = {"scores": scores} if scores else score_item(context, item, args)
            if not np.isfinite(said.get("scores", 0)).all():
                raise DataError("the model's scores are no numbers")
            prediction |= said
        except DataError as error:
            prediction["error"] = str(error)
        yield prediction


def score_item(context: VideoContext, item: Item, args):
    """What a model says of one question.

    likelihood: log p(option | video, question), as a mean over tokens. letter: a generated letter,
    strictly parsed. generate: an open answer.
    """
    words = question_words(item, args)
    if args.answer == "generate":
        return {"reply": context.generate(words)}
    if args.answer == "letter":
        reply = context.generate(words, max_new=16)
        return {"reply": reply, "choice": parse_letter(reply, len(item.options))}
    # The model does not see the options beside each other, so their order cannot matter.
    scores = context.score([(words, option) for option in item.options])
    return {"scores": scores[:, 1].tolist()}


def mean_token(visual):
    """The mean (W,) of a video's tokens (1, tokens, W), in float32."""
    return visual[0].float().mean(0)


@torch.no_grad()
def text_side(model, tokenizer, items, texts):
    """What a retrieval computes once for all videos.

    -> the mean pooled video of the first 64 clips (W,), each text's mean word embedding around the mean of
    all (texts, W), and its mean log-likelihood without a video (texts,).
    """
    # The decoder's own embeddings, averaged over the words of a text.
    device = model.decoder.lm_head.weight.device
    words = []
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text), device=device)
        words.append(model.decoder.embed(ids).float().mean(0))
    words = torch.stack(words)
    # All videos look alike to a cosine until their mean is taken away.
    videos = []
    for item in items[:64]:
        with contextlib.suppress(DataError):
            videos.append(mean_token(look_at(model, item.clips[0])))
    centre = torch.stack(videos).mean(0) if videos else 0.0
    words = nnf.normalize(words - words.mean(0), dim=-1)
    blind = VideoContext(model, tokenizer, None)
    alone = blind.score([(NARRATE, text) for text in texts])
    return centre, words, alone[:, 1]


def score_texts(context: VideoContext, visual, texts, sides):
    """A score of every text for one video, whose tokens `context` has read. `sides` is what `text_side` returned.

    Blind, it is how likely a text is by itself, the same for every video.
    """
    centre, words, alone = sides
    if visual is None:
        return alone.tolist()

    # The cosine of pooled [x ; F(x)] and pooled word embeddings, each around its mean: the decoder reads both
    # in one space (our choice).
    video = nnf.normalize(mean_token(visual) - centre, dim=-1)
    cosine = (words * video).sum(-1).cpu().numpy()
    scores = cosine.astype(float).round(5)

    # The best texts are ranked again, by what the video adds to their log-likelihood: as a number between 1 and 2, and
    # so above all others, of which none is above 1.
    best = np.argsort(-cosine, kind="stable")[:16]
    with_video = context.score([(NARRATE, texts[i]) for i in best])
    gain = with_video[:, 1] - alone[best]
    scores[best] = 1 + 1 / (1 + np.exp(-gain))
    return scores.tolist()


# ----------------------------------------------------------------------------------------------- EgoBench: the figures
def outcome(item: Item, prediction):
    """1 right, 0 wrong or unread; equally good options share. Equal texts count as one option (EgoPlan)."""
    if item.answer == OUTSIDE:
        return 0
    # A likelihood or a similarity for each option, or for each clip.
    if "scores" in prediction:
        scores = np.array(prediction["scores"])
        options = np.array(item.options or range(len(scores)))
        return choice_score(scores, right=options == options[item.answer])
    # A letter.
    if "choice" in prediction:
        choice = prediction["choice"]
        return choice is not None and item.options[choice] == item.options[item.answer]
    # An open answer; what could not be read has none.
    return "reply" in prediction and plain_words(prediction["reply"]) == plain_words(item.answer)


def plain_words(text):
    """Lower case, single spaces, no full stop at either end: what an exact match compares."""
    return " ".join(str(text).lower().strip(" .").split())


def summarise(bench, items, predictions, args):
    """The score with n, chance and a 95 % interval, and whatever else the benchmark reports."""
    known = [(item, p) for item, p in zip(items, predictions) if item.answer is not None]
    if not known:
        raise DataError(f"{args.bench}: none of these {len(items)} items has a public answer")

    # A reply without a letter is wrong, and is counted besides.
    figures = {"unreadable": sum("error" in p for _, p in known)}
    if bench.task in ("retrieval", "classes"):
        return figures | ranking_figures(bench, items, predictions)
    if args.answer == "letter":
        figures["parser_failures"] = sum(p.get("choice", 0) is None for _, p in known)

    # The score of all items, then one for each kind of them, each beside its own chance.
    outcomes, chances = defaultdict(list), defaultdict(list)
    for item, prediction in known:
        for name in filter(None, ("score", item.kind)):
            outcomes[name].append(outcome(item, prediction))
            chances[name].append(item.chance())
    for name, rights in outcomes.items():
        figures |= proportion(name, rights, np.mean(chances[name]))
    if args.answer == "generate":
        overlaps = [rouge_l(p.get("reply", ""), item.answer) for item, p in known]
        figures |= proportion("rouge_l", overlaps, chance=None)
    return figures


def ranking_figures(bench, items, predictions):
    """mAP (and nDCG), with chance as random scores on the same labels get it.

    The interval is the normal one of a mean over classes, or over the videos as queries.
    """
    # A video that was not read ranks last.
    scores = np.full((len(items), len(items[0].options)), -1e9)
    for row, prediction in zip(scores, predictions):
        if "scores" in prediction:
            row[:] = prediction["scores"]
            # Videos differ in how likely they make any text at all, and AP compares videos. A log-softmax over the
            # classes of each video that was read takes that away (LaViLa's protocol).
            row -= np.logaddexp.reduce(row) if bench.task == "classes" else 0
    if bench.task == "classes":
        truth = np.zeros_like(scores)
        for row, item in zip(truth, items):
            row[item.answer] = 1
        name = "nanmAP"
        metrics = charades_map
        precision = class_precision
    else:
        # With --limit some texts have no video.
        truth = np.array([item.answer for item in items])
        used = (truth == 1).any(0)
        scores = scores[:, used]
        truth = truth[:, used]
        name = "mAP_avg"
        metrics = retrieval_metrics
        precision = ranked_precision
    figures = metrics(scores, truth)
    random = np.random.default_rng(0).normal(size=scores.shape)
    by_chance = metrics(random, truth)
    score = figures[name]
    if "nDCG_avg" in figures:
        figures["nDCG_avg_chance"] = by_chance["nDCG_avg"]
    # A class that never occurs has no precision.
    each = precision(scores, truth)
    each = each[np.isfinite(each)]
    if len(each) == 0:
        raise DataError(f"none of these {len(items)} items has a label to rank")
    half = 1.96 * each.std() / math.sqrt(len(each))
    return {
        "score": score,
        "score_chance": by_chance[name],
        "score_lo": max(0.0, score - half),
        "score_hi": min(1.0, score + half),
        "score_n": len(items),
        **figures}


# ------------------------------------------------------------------------------------------------ EgoBench: the report
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>EgoBench</title><style>
body {font: 15px/1.45 system-ui, sans-serif; margin: auto; max-width: 70rem; padding: 1rem; color: #222}
table {border-collapse: collapse; width: 100%} .wide {overflow-x: auto} small {color: #666}
td, th {padding: .3rem .5rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top}
.bar {position: relative; height: 1.1rem; background: #eee; min-width: 9rem}
.bar i {position: absolute; top: 0; bottom: 0}
td small {display: block; min-width: 13rem} td {min-width: 4.5rem}</style>
<h1>EgoBench</h1><p>Per cent; intervals are 95 %, as if all questions were independent: questions about one video
are not, so theirs should be wider. In the bars: the interval (blue), the score (black), chance
(red). The last columns follow protocols of their own. Ours by likelihood: options are not shown, each is scored by
itself. By letter: all are listed, and the letter that the reply begins with counts. Words around a question are ours,
but for a template of your own. EgoSchema, QAEgo4D and EgoMCQ are of Ego4D, as EgoClip and EgoTimeQA are on which the
paper's model is trained, EgoPlan of Ego4D and EPIC-KITCHENS: zero-shot means that no benchmark's training split was
used.</p>"""
TABLE = """<div class=wide>
<table><tr><th>benchmark<th>ours<th><th>n<th>chance<th>blind<th>paper<th>best open<th>protocol</tr>"""
ROW = ('<tr><td>{name}<td>{percent[score]:.1f} [{percent[score_lo]:.1f}, {percent[score_hi]:.1f}]{parts}'
       '<td><div class=bar>'
       '<i style="left:{percent[score_lo]:.1f}%;width:{width:.1f}%;background:#8ab"></i>'
       '<i style="left:{percent[score]:.1f}%;width:2px;background:#000"></i>'
       '<i style="left:{percent[score_chance]:.1f}%;width:2px;background:#c33"></i></div>'
       '<td>{result[score_n]}<td>{percent[score_chance]:.1f}<td>{floor}<td>{bench.paper}<td>{bench.best}'
       '<td><small>{result[answer]}<br>{note}</small></tr>')
TOY = ("<p><b>These figures show that the programs work, not how good the method is: the checkpoint is a toy, trained "
       "on the micro-world.</b></p>")
UNSCORED = ("<tr><td>{name}<td colspan=7>no score: {result[items]} items, {result[unreadable]} unreadable"
            "<td><small>{note}</small></tr>")


def write_report(out):
    """results/ -> one page, without scripts, that loads nothing from elsewhere; foreign text is escaped.

    It shows every score with its interval, its chance level and its blind floor beside the paper's.
    """
    results = {name: figures for name in BENCHES if (figures := content_of(out, name))}
    if not results:
        raise DataError(f"{out} holds no results: run eval.py --bench NAME --out {out} first")
    rows = [report_score(name, figures, content_of(out, f"{name}-blind")) for name, figures in results.items()]
    toy = any(figures.get("preset") == "toy" for figures in results.values())
    path = out / "report.html"
    write_text_atomic(path, "\n".join([PAGE, TOY if toy else "", TABLE, *rows, "</table></div></html>"]))
    return path


def report_score(name, result, blind):
    """A benchmark's row of the table."""
    # The caution, and which checkpoint and which code these are the figures of.
    note = escape(f"{result['note']}; {result['ckpt']}, code {result['git']}")
    if result.get("score") is None:
        return UNSCORED.format(name=name, result=result, note=note)
    percent = {key: 100 * value for key, value in result.items() if isinstance(value, float)}
    # What else has an interval stands below the score: its kinds of items, other metrics.
    others = [key for key in percent if f"{key}_lo" in result and key != "score" or key == "nDCG_avg"]
    parts = "".join(f"<br>{escape(key)} {percent[key]:.1f}" for key in others)
    # These count as wrong.
    lost = {"unreadable": "unreadable", "parser_failures": "without a letter"}
    parts += "".join(f"<br>{result[key]} {name}" for key, name in lost.items() if result.get(key))
    # The blind floor counts if all but the video was the same.
    floor = "not run"
    same = ("weights", "answer", "prompt", "words", "content")
    if blind.get("score") is not None and all(blind.get(key) == result.get(key) for key in same):
        floor = f"{100 * blind['score']:.1f}"
    return ROW.format(
        name=name,
        bench=BENCHES[name],
        result=result,
        percent=percent,
        width=percent["score_hi"] - percent["score_lo"],
        parts=parts,
        floor=floor,
        note=note)


# ----------------------------------------------------------------------------------------- D answers for one's own data
@dataclass
class OwnItem(Item):
    """A question about one clip of one's own manifest, in a chat where the turns before it have their true answers."""
    chat: list[dict] = field(default_factory=list)


def own_view(stage):
    """The view of a row that a stage is asked about."""
    return "exo" if stage == 1 else "ego"


def own_items(rows, stage):
    """What a stage is trained to answer about the rows that have its clip: an item for each answer, as trained.

    Stage 3 answers a row's turns, if it has some; else the row is narrated. A last turn without an answer, and a row
    without any text, are questions whose truth nobody knows.
    """
    view = own_view(stage)
    for row in rows:
        # The first exo clip, or the ego clip.
        clips = clips_of({view: row[view]})[:1] if row.get(view) else []
        chats = chats_of(row, "turns" if stage == 3 else "narration")
        turns = chats[0] if chats else [{"user": NARRATE}]
        for number, turn in enumerate(turns if clips else []):
            # The chat ends with the question: its answer waits.
            asked = {key: text for key, text in turn.items() if key != "assistant"}
            yield OwnItem(
                id=f"{row['id']} turn {number + 1}" if number else row["id"],
                clips=clips,
                question=turn["user"],
                answer=turn.get("assistant"),
                chat=[*turns[:number], asked])


def answer_own(model, tokenizer, items, view):
    """Predictions: id, clip, question, truth, answer, and whether it is right (but for spaces; None without a truth).
    Where a clip cannot be read or a chat is too long, there is an "error", which counts as wrong."""
    model.eval()
    seen = None
    for item in items:
        clip, = item.clips
        truth = item.answer
        prediction = {"id": item.id, "clip": clip, "question": item.question, "truth": truth, "answer": ""}
        try:
            # A clip is read once, whatever is asked about it.
            if clip != seen:
                visual = look_at(model, clip, view)
                seen = clip
            ids, _ = tokenizer.chat(item.chat, visual.shape[1])
            # A model that never ends an answer stops after twice the length of the true one, and not before 256 tokens.
            most = max(256, 2 * len(tokenizer.encode(truth or "")))
            most = min(most, room_for_answer(model, ids))
            reply, = model.generate(visual, [torch.tensor(ids)], eos=tokenizer.eos, max_new=most)
            prediction["answer"] = tokenizer.decode(reply).strip()
        except DataError as error:
            prediction["error"] = str(error)
        right = "error" not in prediction and prediction["answer"].split() == str(truth).split()
        yield prediction | {"right": None if truth is None else right}


def answer_manifest(ckpt, rows, out, name):
    """Answer every row of a manifest as it was trained. OUT/NAME.jsonl has the answers, NAME.json the scores against
    what the rows say, NAME.png five of them."""
    stage = ckpt.state["stage"]
    view = own_view(stage)
    items = list(own_items(rows, stage))
    ids = {item.id for item in items}
    if len(ids) < len(items) or not items:
        raise DataError(f"no row has an {view} clip, which stage {stage} reads, or ids repeat")
    protocol = protocol_of(ckpt, items, data=name)
    predictions = share_items(out, name, protocol, items,
                              lambda todo: answer_own(ckpt.model, ckpt.tokenizer, todo, view))
    if predictions is None:
        return
    figures = {
        f"rows without an {view} clip": sum(not row.get(view) for row in rows),
        "answers": len(predictions),
        "unreadable": sum("error" in one for one in predictions)}
    # Exact match and ROUGE-L of those whose truth is known.
    known = [one for one in predictions if one["truth"] is not None]
    if known:
        truths = [one["truth"] for one in known]
        chance = guess_chance([one["question"] for one in known], truths)
        overlaps = [rouge_l(one["answer"], one["truth"]) for one in known]
        figures |= proportion("exact", [one["right"] for one in known], chance)
        figures |= proportion("rouge_l", overlaps, chance=None)
    show_own(out / f"{name}.png", predictions)
    keep_figures(out / f"{name}.json", figures, protocol)
    print(f"{out}/{name}.jsonl, .json, .png", flush=True)


def show_own(path, predictions):
    """Five answers beside the truth, on the screen and as a picture. Other words need not be wrong."""
    shown, errors = [], []
    for one in predictions:
        if "error" in one:
            errors.append(one["error"])
        else:
            shown.append((one["clip"], [(f"{one['question']} ", one["truth"], one["answer"])]))
    for error in errors[:5]:
        print(f"not shown: {error}")
    if shown:
        show_answers(path, spread(shown, 5), "What the model says, and where it differs the truth", miss="said")


def show_own_samples(model, tokenizer, rows, stage, out):
    """Five rows of what a run was trained on: what the model says of them beside what they say."""
    view = own_view(stage)
    some = spread(rows, 1000)
    items = spread([item for item in own_items(some, stage) if item.answer is not None], 5)
    if not items:
        print(f"none of {len(some)} rows has an {view} clip and a text: there is no sample to show")
        return
    show_own(Path(out) / "samples.png", answer_own(model, tokenizer, items, view))
    print(f"pictures: {out}/samples.png\nnext: {next_command(stage, out)}", flush=True)


if __name__ == "__main__":
    main()
