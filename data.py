"""What the network sees: a row, its video, its text, a batch; and a micro-world to learn from.

    python data.py toy --out out/toy            # render the micro-world: mp4 files, JSON lines, a tokenizer
    python data.py show out/toy/val.jsonl       # contact sheet: ego above exo, text below
    python data.py check out/toy/val.jsonl      # read every clip once, list the bad ones
    python data.py ego-exo4d --root DIR --out x.jsonl   # convert a data set; --help names seven more

One row of a manifest (JSON lines) is one moment; training reads nothing else, and needs of it what its stage uses:

    {"id": "s7/2", "ego": {"video": "ego/7.mp4", "start": 2.0, "end": 3.0},
     "exo": [{"video": "cam0/7.mp4", "start": 2.0, "end": 3.0}], "text": "Camera-wearer cuts ...",
     "turns": [{"user": "Which hand do I use?", "assistant": "The left."}]}

Times are seconds from the first picture of a video, even where its sound starts earlier; without them the clip is the
whole video. A video is a file (.mp4, .mov, .mkv, .webm, most .avi) or a folder of numbered .png or .jpg, "fps" per
second.

Nine words:

    row       one line of a manifest: a moment with its clips and its words
    moment    what happens in a row's few seconds, whichever camera sees it
    sample    one item of a batch: a row, or, where exo clips are read, a row and one of its exo cameras
    clip      a piece of one video, from its start to its end
    camera    what films a moment: one on the head (ego), and fixed ones (exo), which have numbers from 0
    text      the words that go with a moment
    turn      a question of the user and the answer of the assistant
    chat      the turns of one text, in the order in which the model reads them
    segment   one sequence among those that are packed behind each other (model.py's `Segments`)
"""
from __future__ import annotations

import argparse
import atexit
import copy
import csv
import errno
import inspect
import json
import marshal
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields, replace
from fractions import Fraction
from functools import cache, lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints

import av
import numpy as np
import sentencepiece
import torch
from av.video.reformatter import VideoReformatter
from einops import rearrange, repeat
from torch import Tensor

from model import IGNORE, PRESETS, VIDEO, AnyPath, newest_checkpoint

try:
    import fcntl
except ModuleNotFoundError:
    sys.exit("Exo2Ego runs on Linux and macOS; on Windows, in WSL")


# ------------------------------------------------------------------------------------------------------------- 1 a row
class DataError(ValueError):
    """Bad input: the message names file, line or field, and the way out; `reason` is its kind, in a word."""

    def __init__(self, message: str, reason: str = "unreadable"):
        super().__init__(message)
        self.reason = reason


def read_manifest(path: AnyPath, root=None, allow_outside=False, skip=True) -> Rows:
    """The rows of a JSON-lines manifest, checked: a sequence, which holds them as bytes and decodes the row that is
    asked for. Every video has an absolute path, and every row has a key "where": its file and line.

    Paths start at `root` (default: the folder of the manifest). They must stay inside it after links are
    resolved, unless `allow_outside`. With `skip`, the rows on the skip list that `data.py check` left
    beside the manifest are left out, and counted. DataError names the line that is wrong.
    """
    path = Path(path)
    base = os.path.realpath(root or path.parent)
    rows = checked_rows(path, base, allow_outside)
    # Leave out what `data.py check` found to be bad.
    skip_list = path.with_suffix(".bad.jsonl")
    if skip and skip_list.is_file():
        rows = without_bad_clips(rows, skip_list, base)
    kept = Rows(rows)
    if not kept:
        raise DataError(f"{skip_list} leaves out all rows of {path}")
    return kept


def clips_of(row) -> list:
    """A row's clips, ego before exo."""
    ego = [row["ego"]] if "ego" in row else []
    return ego + row.get("exo", [])


# --------------------------------------------------------------------------------------------------------- 2 its video
def read_clip(
        video: AnyPath,
        start,                                  # seconds; None: the start of the video
        end,                                    # seconds; None: its end
        num_frames: int,
        size: int,                              # S, pixels per side
        rng=None,                               # a numpy Generator
        fps=None):                              # of a folder of images
    """`num_frames` RGB frames of [start, end) seconds -> uint8 (T, 3, S, S).

    The clip is cut into T equal spans; a frame is what a viewer would see at one time in each span: at its
    centre, or with `rng` (training) at a random time. Frames are found by their timestamps, never by index
    times fps, and time zero is the first picture; a clip with fewer frames repeats real ones. Pictures are
    padded to a square with CLIP's mean colour, as in VideoLLaMA2. DataError if the clip cannot be read.
    """
    refuse_times_without_rate(video, start, end, fps)
    with open_video(video, fps) as opened:
        # One time in each of T equal spans.
        begin, stop = clip_span(video, start, end, opened.seconds)
        offsets = 0.5 if rng is None else rng.random(num_frames)
        times = begin + (stop - begin) * ((np.arange(num_frames) + offsets) / num_frames)
        # A frame that is on display at two of these times is converted once.
        out = np.empty((num_frames, 3, size, size), np.uint8)
        last = None
        for i, (frame, orientation) in enumerate(opened.frames_at(times)):
            if frame is last:
                out[i] = out[i - 1]
            else:
                out[i] = _pixels(frame, size, orientation, opened.pixel_shape)
            last = frame
        return out


def clip_span(video: AnyPath, start, end, length):
    """Start and end of the clip in seconds, cut at the ends of the video; a clip without length is refused."""
    begin = max(start or 0.0, 0.0)
    stop = length if end is None else min(end, length)
    if begin >= length:
        raise DataError(f"{video}: clip starts at {begin} s, the video ends at {length:.2f} s", "too short")
    if not begin < stop:
        raise DataError(f"{video}: clip [{begin}, {stop}) s has no length", "too short")
    return begin, stop


def read_row_clip(clip, num_frames, size, rng=None):
    """read_clip of a clip as a row has it: {"video"[, "start"][, "end"][, "fps"]}."""
    return read_clip(
        clip["video"], clip.get("start"), clip.get("end"), num_frames, size, rng, clip.get("fps"))


CLIP_MEAN_COLOUR = np.array([122, 116, 104], np.uint8)
UPRIGHT = (1, 0, 0, 1)          # a stored picture that needs no turn; others are among ORIENTATIONS
_reformatter = VideoReformatter()   # one for the process: its tables are expensive to make


def _pixels(frame, size, orientation=UPRIGHT, pixel_shape=1.0):
    """One frame as RGB (3, S, S), as a player shows it: scaled to fit inside the square, in its middle."""
    width = frame.width * pixel_shape
    scale = size / max(width, frame.height)
    width = max(1, round(width * scale))
    height = max(1, round(frame.height * scale))
    scaled = _reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
    rgb = scaled.to_ndarray()                                   # (height, width, 3)
    rgb = upright(rgb, orientation)
    # The longer side fills the square; the other one has a margin at both ends.
    height, width = rgb.shape[:2]
    top = (size - height) // 2
    left = (size - width) // 2
    out = np.empty((3, size, size), np.uint8)
    out[:] = CLIP_MEAN_COLOUR[:, None, None]
    out[:, top:top + height, left:left + width] = rgb.transpose(2, 0, 1)
    return out


# ---------------------------------------------------------------------------------------------------------- 3 its text
NARRATE = "Narrate the video."  # the prompt of a row's `text` (our choice: the paper names none for it)
WEARER = "Camera-wearer"        # who acts in a narration


class Tokenizer:
    """A sentencepiece vocabulary, and Mistral-Instruct's template for a chat. A first turn about a video and a second
    turn become

        <s>[INST] <video>
        question [/INST] answer</s>[INST] question [/INST] answer</s>

    Every checkpoint holds its own tokenizer.
    """

    def __init__(self, path: AnyPath):
        """`path`: a sentencepiece tokenizer.model, or a folder that holds one (of a run its newest checkpoint)."""
        self.path = Path(newest_checkpoint(path) or path)
        if self.path.is_dir():
            self.path = self.path / "tokenizer.model"
        if not self.path.is_file():
            raise DataError(f"no tokenizer at {self.path}: it should be a sentencepiece tokenizer.model")
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        self.bos = self.sp.bos_id()
        self.eos = self.sp.eos_id()
        self.size = self.sp.get_piece_size()
        # Mistral 7B v0.3 has a token for each mark of its template; the template here is that of v0.1 and v0.2.
        if self.sp.piece_to_id("[INST]") != self.sp.unk_id():
            raise DataError(f"{self.path} is the tokenizer of Mistral v0.3 or later, which knows [INST] as one "
                            f"token: use that of Mistral-7B-Instruct-v0.2 and its weights")

    def encode(self, text) -> list:
        """Text to ids, without <s> or </s>; control tokens written out in the text stay plain text."""
        return self.sp.encode(whole_text(text, "this input", "text"))

    def decode(self, ids: Sequence) -> str:
        """Ids to text; VIDEO, control tokens and ids without a piece of text vanish."""
        return self.sp.decode([int(i) for i in ids if 0 <= i < self.size])

    def chat(self, turns, video_tokens):
        """Turns {"user", "assistant"[, "system"]} -> ids and labels.

        `<video>` (put first if no turn has it) becomes `video_tokens` VIDEO ids. Supervised are the
        assistant's tokens and their closing </s>, nothing else. A last turn without "assistant" is a prompt
        to be continued.
        """
        marks = video_marks(turns)
        if marks > 1 or (marks and video_tokens <= 0):
            raise ValueError(f"{marks} <video> marks in the questions: one at most, none without a video")
        ids, labels = [self.bos], [IGNORE]
        for number, turn in enumerate(turns):
            # The video stands before the first question, unless a question says where.
            user = turn["user"]
            if number == 0 and marks == 0 and video_tokens:
                user = "<video>\n" + user
            # Mistral has no role for a system text: it stands at the head of the user's turn, before the video.
            if "system" in turn:
                user = f"{turn['system']}\n\n{user}"
            # The model reads the prompt; nothing of it is supervised.
            before, *after = f"[INST] {user} [/INST]".split("<video>")
            prompt = self.encode(before)
            for chunk in after:
                prompt += [VIDEO] * video_tokens + self.encode(chunk)
            ids += prompt
            labels += [IGNORE] * len(prompt)
            # The answer is supervised, and the </s> that ends it.
            if "assistant" in turn:
                answer = self.encode(turn["assistant"]) + [self.eos]
                ids += answer
                labels += answer
        return ids, labels


def chats_of(row, supervise):
    """The chats that a row may be read as: its "narration", its "turns" (a row without turns narrates), or with "mix"
    both; a list of lists of turns, empty where nothing of the row can be supervised."""
    narration, conversation = [], []
    if row.get("text"):
        narration = [[{"user": NARRATE, "assistant": row["text"]}]]
    if row.get("turns") and supervise != "narration":
        conversation = [row["turns"]]
    if supervise == "turns":
        return conversation or narration
    return narration + conversation


# ----------------------------------------------------------------------------------------------------------- 4 a batch
@dataclass
class Batch:
    """One micro batch: E moments, X samples, and N texts, packed one behind another. In pairs a moment has one sample
    per exo camera; its ego clip and its text are read once. Where exo clips are shown alone, each sample counts as a
    moment."""
    ego: Tensor                         # (E, T, 3, S, S) uint8, or None
    exo: Tensor                         # (X, T, 3, S, S) uint8, or None
    ego_of: Tensor                      # (X,) the moment of each sample: exo clip i goes with ego clip ego_of[i]
    ids: Tensor                         # (tokens,) of all texts
    labels: Tensor                      # (tokens,) IGNORE where a token is not supervised
    weights: Tensor                     # (tokens,) a supervised token counts once per sample of its moment; others 0
    lens: list                          # N, the tokens of each text
    text_of: Tensor                     # (N,) the moment of each text; a moment may have none
    samples: int
    names: list                         # E ids of rows
    texts: list                         # E narrations of the rows, "" where there is none; the N texts may be chats
    skipped: list                       # samples that could not be read, with the reason

    def tensors(self) -> dict:
        """The fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device) -> Batch:
        """This batch on a device; pinned memory is copied beside the GPU's work."""
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in self.tensors().items()})

    def pin_memory(self) -> Batch:
        """This batch in pinned memory; torch's DataLoader calls this where there is a GPU."""
        return replace(self, **{k: v.pin_memory() for k, v in self.tensors().items()})

    def describe(self, tokenizer):
        """Shapes, and of the first text what is read and what is supervised."""
        said = f"{len(self.ids)} tokens"
        for name, frames in (("ego", self.ego), ("exo", self.exo)):
            if frames is not None:
                said = f"{name} {tuple(frames.shape)}, {said}"
        if self.lens:
            ids, labels = self.ids[:self.lens[0]], self.labels[:self.lens[0]]
            read = tokenizer.decode(ids[labels == IGNORE].tolist())
            supervised = tokenizer.decode(ids[labels != IGNORE].tolist())
            said += f"; first text, of {self.names[self.text_of[0]]}: read {read!r}, supervised {supervised!r}"
        return said

    def __reduce__(self):
        return batch_from_fields, (fields_for_sending(self),)


@dataclass
class Moment:
    """A moment in a micro batch: its text is read once, however many exo cameras show it."""
    number: int                         # in the order of the batch
    row: dict
    ids: list                           # the text's tokens; empty for a row without text
    labels: list
    samples: int = 0                    # how many samples of the micro batch show it


class Loader:
    """Samples in an order that is a pure function of the seed: the batch of a step is the same for any number of
    ranks and micro batches, and resuming needs no state.

    A sample is (row, camera) for view="exo" and "pair", else a row; the cameras of a row are adjacent.
    `supervise` picks what is supervised: "narration", "turns" (a row without turns narrates), or "mix", which
    alternates between the two. With view="none" no video is read at all. `rows` are read_manifest's, or a list.
    """

    def __init__(
            self,
            rows,
            cfg,
            tokenizer,
            *,
            view,                               # exo | ego | pair | none
            supervise="narration",              # narration | turns | mix
            batch,                              # samples of a step, over all ranks
            micro=0,                            # samples of a micro batch; 0: a rank's share of a step
            seed=0,
            rank=0,
            world=1,                            # number of ranks
            train=True,                         # random order and random frame times, epoch after epoch
            video_tokens=None):                 # None: as many as the model's connector gives
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.view = view
        self.supervise = supervise
        self.batch_size = batch
        self.micro = micro or max(1, batch // world)
        self.seed = seed
        self.rank = rank
        self.world = world
        self.train = train
        self.video_tokens = cfg.visual_tokens if video_tokens is None else video_tokens
        if batch % (self.micro * world):
            raise DataError(f"--batch {batch} is no multiple of {self.micro} (--micro-batch) x {world} ranks")

        # Rows that this stage cannot use are left out and counted, or refused by name.
        self.views = {"exo": ["exo"], "ego": ["ego"], "pair": ["ego", "exo"], "none": []}[view]
        self.rows, self.cameras = usable_rows(rows, self)
        self.samples = int(self.cameras.sum())
        self._epoch = None              # the epoch whose order is kept

    def sample(self, index):
        """Global sample number -> (row, camera). An epoch has every sample once: rows in random order for training,
        and the cameras of a row one after another."""
        # The order of an epoch's rows is made once, and kept until another epoch is asked for.
        epoch, in_epoch = divmod(index, self.samples)
        if epoch != self._epoch:
            self._order = np.arange(len(self.rows))
            if self.train:
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self._order)
            # _done[i] is how many samples the first i + 1 rows of the order have.
            self._done = np.cumsum(self.cameras[self._order])
            self._epoch = epoch
        # The sample is of the first row for which _done[i] > in_epoch.
        at = np.searchsorted(self._done, in_epoch, side="right")
        row = int(self._order[at])
        first = int(self._done[at] - self.cameras[row])
        return row, in_epoch - first

    def batch(self, step) -> list:
        """The micro batches of this rank at this step. In evaluation the last batch may be short."""
        first = step * self.batch_size
        end = first + self.batch_size
        if not self.train:
            end = min(end, self.samples)
        # Ranks take turns, one micro batch after another, so that their number changes no batch.
        starts = range(first + self.rank * self.micro, end, self.world * self.micro)
        return [self.micro_batch(range(start, min(start + self.micro, end))) for start in starts]

    def micro_batch(self, indices: range) -> Batch:
        """Read the clips of these samples. In training a sample that cannot be read is named, and another one is read
        instead."""
        # Samples may share a moment: its ego clip and its text are read once.
        moments = {}
        ego, exo, ego_of, skipped = [], [], [], []
        for index in indices:
            moment, clips = self._read(index, moments, skipped)
            if "ego" in clips:
                ego.append(clips["ego"])
            if "exo" in clips:
                exo.append(clips["exo"])
            moment.samples += 1
            ego_of.append(moment.number)

        # Pack the texts one after another, without padding.
        ids, labels, weights, lens, text_of = [], [], [], [], []
        for moment in moments.values():
            if moment.ids:
                ids += moment.ids
                labels += moment.labels
                weights += [0 if label == IGNORE else moment.samples for label in moment.labels]
                lens.append(len(moment.ids))
                text_of.append(moment.number)
        return Batch(
            ego=torch.from_numpy(np.stack(ego)) if ego else None,
            exo=torch.from_numpy(np.stack(exo)) if exo else None,
            ego_of=torch.tensor(ego_of),
            ids=torch.tensor(ids, dtype=torch.long),
            labels=torch.tensor(labels, dtype=torch.long),
            weights=torch.tensor(weights, dtype=torch.float32),
            lens=lens,
            text_of=torch.tensor(text_of, dtype=torch.long),
            samples=len(indices),
            names=[moment.row["id"] for moment in moments.values()],
            texts=[moment.row.get("text", "") for moment in moments.values()],
            skipped=skipped)

    def _read(self, index, moments, skipped):
        """-> the moment of a sample, and its clips' frames, without the ego clip where this micro batch has it already.

        In training a sample that cannot be read is noted in `skipped`, and another one takes its place: which one is
        a pure function of the seed, the sample and the attempt. An evaluation needs every clip.
        """
        tried = index
        for attempt in range(1, 11):
            try:
                return self._read_sample(tried, index, moments)
            except DataError as error:
                row, _ = self.sample(tried)
                sentence = f"{self.rows[row]['id']}: {error}"
                if not self.train:
                    raise DataError(f"an evaluation needs every clip: {sentence}", error.reason) from None
                skipped.append(sentence)
            # Another sample of this epoch, whichever.
            epoch_begins = index - index % self.samples
            other = np.random.default_rng([self.seed, index, attempt]).integers(self.samples)
            tried = epoch_begins + int(other)
        raise DataError(f"ten samples, one after another, cannot be read, the last: {skipped[-1]}")

    def _read_sample(self, tried, wanted, moments):
        """-> the moment of sample `tried`, and its clips' frames. It is read as, or instead of, sample `wanted`."""
        row_number, camera = self.sample(tried)
        row = self.rows[row_number]
        epoch = tried // self.samples
        # All cameras of a moment have the same seed of random frame times, so that their frames are synchronized.
        time_seed = (self.seed, epoch, row_number)
        # The samples of a pair's moment share one entry of `moments`. Where exo clips are shown alone, each sample
        # has an entry of its own, since each needs its own text behind its visual tokens.
        key = (*time_seed, wanted) if self.view == "exo" else time_seed
        clips = {}
        if "ego" in self.views and key not in moments:
            clips["ego"] = self._frames(row["ego"], time_seed)
        if "exo" in self.views:
            clips["exo"] = self._frames(row["exo"][camera], time_seed)
        # With "mix" a row is read as its narration in one epoch and as its turns in the next.
        if key not in moments:
            ids, labels = self.chat_of(row, epoch + row_number)
            moments[key] = Moment(len(moments), row, ids, labels)
        return moments[key], clips

    def _frames(self, clip, time_seed):
        """A clip's frames (T, 3, S, S), in training at random times."""
        rng = np.random.default_rng(time_seed) if self.train else None
        return read_row_clip(clip, self.cfg.frames, self.cfg.image_size, rng)

    def chat_of(self, row, number):
        """ids and labels of one of a row's chats: of the first, for an odd `number` of the second if there is one.
        Empty for a row without text."""
        chats = chats_of(row, self.supervise)
        if not chats:
            return [], []
        return self.tokenizer.chat(chats[number % len(chats)], self.video_tokens)

    def stream(self, start, stop, workers=1, repeat=False, timeout=600.0) -> Iterator:
        """batch(start) ... batch(stop - 1), read ahead by workers, which have `timeout` seconds for each;
        `repeat`: batch(0) every time.

        If a step cannot be read, training gets the DataError as an item, since ranks have to agree about what to do
        then; an evaluation gets it raised.
        """
        steps = [0] * (stop - start) if repeat else range(start, stop)
        return read_ahead(self, steps, workers, timeout)


# --------------------------------------------------------------------------------------------------- 5 the micro-world
# A table, two blocks, two hands, nine actions. A scene is five moments of one second; each camera films it into one
# mp4. The exo camera stands opposite the actor: left and right are swapped, and the actor's body is in view. The ego
# camera rides on the head: it follows the hands late, walks, rolls and zooms, and big hands cover what they do. Sizes
# were tuned by trial (our choice).
@dataclass(frozen=True)
class World:
    """The knobs of the micro-world: how many clips each split has (no scene is in two splits), and how hard it is."""
    seed: int = 0               # of all scenes
    corpus: int = 5000          # exo clips from varying angles, narrated: the stand-in for VideoLLaMA2's corpora
    ego: int = 1000             # ego clips, narrated: the stand-in for EgoClip
    pairs: int = 1200           # synchronized ego + exo clips, narrated: the stand-in for Ego-ExoClip
    instruct: int = 1000        # ego clips with a question and answer: the stand-in for EgoIT
    val: int = 600              # ego + exo: to choose settings by
    test: int = 2000            # ego + exo: for results of the learner
    exo_test: int = 1000        # exo: for results of the demonstrator
    exo_cams: int = 2           # fixed exo cameras of a training pair
    noise: float = 0.4          # head motion, roll, zoom, light of the ego camera; 0 = a steady head, 1 = a wild one
    fov: float = 1.0            # field of view of the ego camera; smaller sees less
    scale: float = 1.0          # multiplies the training clips
    narrated: float = 1.0       # share of the pairs that have a text: synchronized video is the cheaper part


SPLITS = {                      # who films each split; their order is part of the seed
    "corpus": "exo",
    "ego": "ego",
    "pairs": "ego, exo",
    "instruct": "ego",
    "val": "ego, exo",
    "test": "ego, exo",
    "exo_test": "exo"}


FPS = 8
CLIP_FRAMES = FPS               # of a clip: one second
CLIPS = 5                       # clips of a scene
SCENE_FRAMES = CLIPS * CLIP_FRAMES
COLOURS = {
    "red": (214, 54, 48),
    "green": (40, 150, 70),
    "blue": (48, 90, 214),
    "yellow": (250, 216, 50),
    "purple": (190, 64, 190)}
PATTERNS = ("plain", "striped", "dotted")
VERBS = {
    "picks up": "pick up",
    "puts down": "put down",
    "pushes": "push",
    "pulls": "pull",
    "cuts": "cut",
    "hammers": "hammer",
    "wipes": "wipe",
    "waters": "water",
    "taps": "tap"}


def plan_scene(rng):
    """Two blocks of different colours, five different moments: what the scene's narrations will say."""
    # Two blocks side by side, within reach of both hands.
    colours = rng.permutation(list(COLOURS))[:2]
    blocks = [(str(colour), str(rng.choice(PATTERNS))) for colour in colours]
    across = np.array([-0.44, 0.44]) + rng.uniform(-0.08, 0.08, 2)
    away = rng.uniform(0.42, 0.64, 2)
    # Five moments, none twice: each is one sentence.
    moments = []
    while len(moments) < CLIPS:
        verb = str(rng.choice(list(VERBS)))
        target = int(rng.integers(2))
        hand = str(rng.choice(["left", "right"]))
        if (verb, target, hand) not in moments:
            moments.append((verb, target, hand))
    return {"blocks": blocks, "places": np.stack([across, away], 1), "moments": moments}


def narration(verb, colour, pattern, hand):
    """The sentence of a moment: one of 9 x 5 x 3 x 2 = 270."""
    return f"{WEARER} {verb} the {colour} {pattern} block with the {hand} hand."


def questions(verb, colour, pattern, hand, rng):
    """EgoIT's style: the wearer asks, and is answered in the first person."""
    # Half of the yes-or-no questions are about another action.
    asked = verb
    if rng.random() >= 0.5:
        asked = str(rng.choice([other for other in VERBS if other != verb]))
    answers = {
        NARRATE: narration(verb, colour, pattern, hand),
        "What am I doing?": f"I {VERBS[verb]} the {colour} {pattern} block with the {hand} hand.",
        "Which hand am I using?": f"The {hand} hand.",
        "What colour is the block I use?": f"It is {colour}.",
        "What pattern does the block I use have?": f"It is {pattern}.",
        "What do I do to the block?": f"I {VERBS[verb]} it.",
        f"Am I {GERUNDS[asked]} the block?": "Yes." if asked == verb else "No."}
    return [{"user": question, "assistant": answer} for question, answer in answers.items()]


def make_scene(world, split, scene, out):
    """Render one scene's videos and return its rows. A pure function of (world, split, scene)."""
    # All draws come from one generator: their order is part of the seed.
    rng = np.random.default_rng([world.seed, list(SPLITS).index(split), scene])
    plan = plan_scene(rng)
    films = film_scene(plan, act(plan, rng), world, split, rng)
    for camera, frames in films.items():
        write_video(out / split / camera / f"{scene}.mp4", frames, FPS, gop=CLIP_FRAMES)
    # Each moment is a row: a second of every film, a sentence, a question with its answer.
    rows = []
    for i, (verb, target, hand) in enumerate(plan["moments"]):
        number = scene * CLIPS + i
        facts = (verb, *plan["blocks"][target], hand)
        turns = questions(*facts, rng)
        # The first question asks for the narration. Two splits keep it as a question, the others have it as text
        # alone.
        if split not in ("corpus", "instruct"):
            turns = turns[1:]
        row = {"id": f"{split}/{scene}/{i}"}
        # With --narrated 0.1 every tenth pair has a text: the one that completes one more tenth.
        texts_before = int(number * world.narrated)
        texts_with_it = int((number + 1) * world.narrated)
        if split != "pairs" or texts_with_it > texts_before:
            row["text"] = narration(*facts)
            row["turns"] = [turns[number % len(turns)]]
        span = {"start": float(i), "end": i + 1.0}
        clips = {camera: {"video": f"{split}/{camera}/{scene}.mp4", **span} for camera in films}
        if "ego" in clips:
            row["ego"] = clips.pop("ego")
        if clips:
            row["exo"] = list(clips.values())
        rows.append(row)
    return rows


# ===== a first reader can stop here =====


# ---------------------------------------------------------------------------------------------------- A opening videos
MAX_SIDE = 16384            # larger pictures are refused before one is decoded
MAX_PIXELS = 64 << 20
# FFmpeg also opens playlists, URLs and scripts. We open nothing but files of these formats.
OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"}
# The first bytes of a picture, and FFmpeg's name for its format.
IMAGES = {b"\x89PNG": "png_pipe", b"\xff\xd8\xff": "jpeg_pipe"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
OTHER_IMAGES = (".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".ppm")     # are not read
# A damaged picture is an error, and no guess.
IMAGE_OPTIONS = {"err_detect": "crccheck+explode"}
# A title need not be UTF-8. PyAV 19 reads it as it is; earlier versions have to be told.
AS_IT_IS = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
# How a stored picture is to be shown, by EXIF's number. (a, b, c, d) are the entries of FFmpeg's display matrix:
# pixel (x, y) is shown at (a x + c y, b x + d y). Numbers 2, 4, 5 and 7 are mirrored.
ORIENTATIONS = {
    1: UPRIGHT,
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0)}


@dataclass
class Video:
    """An open video: a file, or a folder of images."""
    seconds: float                  # of its picture; its sound may last longer
    rate: float                     # frames per second, on average
    pixel_shape: float              # width of a pixel over its height
    # From ascending moments, in seconds from the first frame, to the frames on display then, and how to turn
    # them (as in ORIENTATIONS).
    frames_at: Callable
    begins: float = 0.0             # seconds from the start of the file (of its sound, perhaps) to the first picture
    missing: int = 0                # numbers without a picture, among the names of a folder's images


def refuse_times_without_rate(video, start, end, fps):
    """DataError: a folder of images whose rate is not known has no seconds, unless all of it is meant."""
    if fps is None and (start, end) != (None, None) and os.path.isdir(video):
        raise DataError(f'{video} is a folder of images: a clip from {start} to {end} s of it needs "fps", its images '
                        f'per second (--fps)', "no rate")


@contextmanager
def open_video(video: AnyPath, fps=None) -> Iterator[Video]:
    """The one way to a video, a file or a folder of images at `fps` (default: VideoLLaMA2's 3).

    One decoding thread: slice threads deadlock in loader workers. DataError names the video, also where an error
    comes up while the body of the `with` reads the frames.
    """
    with _errors_name(video):
        # A folder of images needs no decoder that stays open.
        if os.path.isdir(video):
            files, places = image_files(video)
            rate = fps or 3.0
            yield Video(
                seconds=(places[-1] + 1) / rate,
                rate=rate,
                pixel_shape=1.0,
                frames_at=partial(_images_at, files, places, rate),
                missing=places[-1] + 1 - len(files))
            return
        with _open_container(video) as container:
            stream = _video_stream(container, video)
            yield Video(
                seconds=_seconds(container, stream, video),
                rate=float(stream.average_rate or 30),
                pixel_shape=float(stream.sample_aspect_ratio or 1),
                frames_at=partial(_frames_at, container, stream, video),
                begins=_begin_of_picture(stream) - (container.start_time or 0) / av.time_base)


@contextmanager
def _errors_name(video):
    """Whatever FFmpeg has to say about a video becomes a DataError that names it."""
    try:
        yield
    except (av.FFmpegError, OSError, OverflowError, MemoryError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{video} cannot be read: {why}", reason) from None


def _open_container(video):
    """A file of a container that we read. "file:" keeps a name like `12:30 walk.mp4` from being a URL."""
    try:
        return av.open(f"file:{video}", options=OPEN_OPTIONS, **AS_IT_IS)
    except av.FFmpegError as error:
        # A file that is missing, or not ours to read, needs no advice about containers.
        if not os.access(video, os.R_OK):
            raise
        raise DataError(
            f"{video} is damaged, or no .mp4, .mov, .mkv, .webm or .avi ({error.strerror}). Most others are "
            f"copied into one by  ffmpeg -i {Path(video).name} -c copy new.mp4  (or encoded again, without "
            f"-c copy)") from None


def _video_stream(container, video):
    """The video stream that a player shows, ready to decode; one without a known codec, or whose header
    claims an absurd shape, is refused."""
    stream = container.streams.best("video")
    context = stream and stream.codec_context
    if context is None:
        raise DataError(f"{video} has no video stream that can be decoded")
    if stream.disposition & av.stream.Disposition.attached_pic:
        raise DataError(f"{video} is sound with a cover picture: it has no video")
    # Check the size that the header claims, before memory is reserved for a frame.
    width, height = context.width, context.height
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise DataError(f"{video} claims {width} x {height} pixels: refused")
    # An AVI stores no times: FFmpeg guesses them, wrongly where pictures may be shown in another order than stored.
    if container.format.name == "avi" and (context.has_b_frames or context.name == "h264"):
        raise DataError(f"{video} is an AVI with H.264 or B-frames, which does not say when its pictures are shown; "
                        f"encode it again:  ffmpeg -i {Path(video).name} new.mp4")
    if not 0.1 <= (stream.sample_aspect_ratio or 1) <= 10:
        raise DataError(f"{video} claims pixels {stream.sample_aspect_ratio} times as wide as high: refused")
    context.thread_type = "NONE"
    context.thread_count = 1
    context.options = {"max_pixels": str(MAX_PIXELS)}   # the size may change inside a stream
    return stream


def _begin_of_picture(stream):
    """The time stamp of the first picture, in seconds."""
    return float((stream.start_time or 0) * stream.time_base)


def _seconds(container, stream, video):
    """Length of the picture: as the header says, or a tag of the stream, or up to the end of its last packet."""
    if stream.duration:
        return _checked_length(container, stream, video, float(stream.duration * stream.time_base))
    begin = _begin_of_picture(stream)
    # Matroska has the moment of the end in a tag.
    tag = stream.metadata.get("DURATION", "")
    if re.fullmatch(r"\d+:\d+:[\d.]+", tag):
        return clock_seconds(tag) - begin
    if not container.duration:
        raise DataError(f"{video} does not say how long it is; a copy does:  ffmpeg -i {Path(video).name} "
                        f"-c copy new.mp4")
    return _end_of_picture(container, stream) - begin


def clock_seconds(clock):
    """Seconds of "00:01:02.50"."""
    hours, minutes, seconds = map(float, clock.split(":"))
    return seconds + 60 * minutes + 3600 * hours


def _checked_length(container, stream, video, seconds):
    """The length that a header says, unless the rest of the file knows better."""
    rate = stream.average_rate or 0
    # The header of an AVI counts its frames: one that was cut off has fewer.
    promised = stream.frames / rate if container.format.name == "avi" and rate else 0
    if promised > seconds + 0.2:
        raise DataError(f"{video} ends at {seconds:.2f} s, its header says {float(promised):.2f} s: truncated?",
                        "truncated")
    # An mp4 adds up how long its frames last in the order of decoding, which is wrong where B-frames are shown at
    # uneven times: such a film is asked for its last frame.
    uneven = stream.base_rate and abs(rate / stream.base_rate - 1) > 0.01
    if uneven and stream.codec_context.has_b_frames:
        return max(seconds, _end_of_picture(container, stream) - _begin_of_picture(stream))
    return seconds


def _end_of_picture(container, stream):
    """When the last packet of the picture ends: a header may know the whole file's length alone, and the sound
    may be longer."""
    whole = container.duration / av.time_base
    container.seek(max(int(whole / stream.time_base), 0), stream=stream)
    ends = {stream: 0.0}
    for packet in container.demux():
        if packet.pts is not None and not packet.is_discard:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            ends[packet.stream] = max(end, ends.get(packet.stream, 0.0))
    # Where no stream gets there, the file has been cut off: reading its end will be refused.
    cut_off = max(ends.values()) < whole - 1
    return whole if cut_off else ends[stream]


@lru_cache(64)
def frame_times(video: AnyPath) -> np.ndarray:
    """When each frame of a file is shown, by its time stamp, and when the last one ends: ascending seconds from the
    first one, (frames + 1,). At a variable rate the mean says little. Nothing is decoded."""
    with _errors_name(video), _open_container(video) as container:
        stream = _video_stream(container, video)
        end = _seconds(container, stream, video)
        container.seek(0)
        packets = [packet for packet in container.demux(stream) if packet.pts is not None and not packet.is_discard]
        times = np.sort([float(packet.pts * stream.time_base) for packet in packets]) - _begin_of_picture(stream)
        return np.append(times, max(end, times[-1]))


def time_of_frame(video: AnyPath, number) -> float:
    """Seconds from the start of a video to its frame `number`, from 0; the end of the video behind its last frame."""
    times = frame_times(video)
    return float(np.interp(finite(number, video, "frame"), range(len(times)), times))


def _frames_at(container, stream, video, moments):
    """The frame on display at each of these ascending moments, and how to turn it."""
    rounding = 1e-4                                             # time stamps are rounded to the time base
    zero = _begin_of_picture(stream)
    # `shown` is the frame on display, `coming` the next one, which ends its stay.
    frames, shown, coming = None, None, None
    may_seek = True
    stay = 0.1                                                  # seconds for which the last frame stayed, 0.1 at least
    for moment in moments:
        time_stamp = zero + moment + rounding
        # Begin at the key frame before the moment: at first, and where that saves half a second of decoding.
        if frames is None or (coming and may_seek and _saves_decoding(stream, coming.frame.time + 0.5, time_stamp)):
            decoded = coming
            frames, shown = _seek(container, stream, time_stamp)
            if shown is None:
                raise DataError(f"{video} holds no frame at {moment:.2f} s: truncated?", "truncated")
            # Where the key frame lies behind what was decoded already, seeking costs more than it saves.
            may_seek = decoded is None or shown.frame.time > decoded.frame.time
            coming = next(frames, None)
        # Decode one frame ahead of the one on display.
        while coming and coming.frame.time <= time_stamp:
            stay = max(0.1, coming.frame.time - shown.frame.time)
            shown = coming
            coming = next(frames, None)
        # The last frame of a file need not say how long it stays: as long as two like the one before.
        frame, damaged = shown
        longest = max(2 * stay, float((frame.duration or 0) * stream.time_base))
        if coming is None and frame.time + longest < zero + moment:
            raise DataError(f"{video} ends at {frame.time - zero:.2f} s, {moment:.2f} s was asked for: "
                            f"truncated?", "truncated")
        if damaged:
            raise DataError(f"{video} is damaged at {frame.time - zero:.2f} s")
        yield frame, _display_matrix(frame)


def _saves_decoding(stream, after, until):
    """Whether a key frame lies between these times, as far as the file's index knows."""
    if until <= after:
        return False
    entries = stream.index_entries
    target = int(until / stream.time_base)
    key_frame = entries.search_timestamp(target, backward=True)
    if key_frame >= 0 and entries[key_frame].timestamp * stream.time_base > after:
        return True
    # The index of a fragmented file comes piece by piece: two seconds that are not in it may have key frames.
    known = entries.search_timestamp(target, backward=True, any_frame=True)
    return known >= 0 and entries[known].timestamp * stream.time_base < until - 2 and until - 2 > after


def _seek(container, stream, until):
    """-> the frames from the key frame before a time on, and the first of them (None if there is none).

    The first frames of an open group of pictures need the group before it: then go back further, until a
    frame is decoded that is not too late.
    """
    first = stream.start_time or 0
    back = 0.0
    while True:
        target = max(int((until - back) / stream.time_base), first)
        container.seek(target, stream=stream)
        frames = _decoded(container, stream)
        shown = next(frames, None)
        found = shown is not None and shown.frame.time <= until
        if found or target == first:
            return frames, shown
        back = 2 * back + 1


class Decoded(NamedTuple):
    """A frame, and whether it is damaged: what is predicted from a damaged frame is, too."""
    frame: av.VideoFrame
    damaged: bool


def _decoded(container, stream):
    """Each frame of a stream that says when it is shown."""
    damaged = False
    for frame in container.decode(stream):
        damaged = frame.is_corrupt or (damaged and not frame.key_frame)
        if frame.pts is not None:
            yield Decoded(frame, damaged)


def _display_matrix(frame):
    """How a player turns or mirrors this frame of a file; phones store portrait video on its side."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV before 19 lists nothing where one kind of data is new to it. The turn it still tells.
        turned = {-180: 3, 180: 3, -90: 6, 90: 8}.get(frame.rotation, 1)
        return ORIENTATIONS[turned]
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(matrix))
    return a, b, c, d


def upright(rgb, orientation):
    """A picture (H, W, 3), turned and mirrored as it is to be shown (see ORIENTATIONS)."""
    a, b, c, d = orientation
    # Either a and d or b and c are about zero: then x and y change places.
    if abs(b) > abs(a):
        rgb = rearrange(rgb, "h w c -> w h c")
        a = c
        d = b
    if a < 0:
        rgb = rgb[:, ::-1]
    if d < 0:
        rgb = rgb[::-1]
    return rgb


def image_files(folder):
    """The images of a folder in natural order (2.jpg before 10.jpg, 0.25.jpg before 0.5.jpg), and the place of each
    one in time, from 0. They are `*-rgb.png` if there are any, else every .png and .jpg but hidden ones.

    DataError names a picture that holds none, or is of a kind that is not read: the others would move up.
    """
    return _images_of(Path(folder), os.stat(folder).st_mtime_ns)


@cache
def _images_of(folder, changed):
    """image_files of a folder that was changed last at this time: every file in it has to be opened."""
    shown = [file for file in folder.iterdir() if file.name[0] != "."]
    # Where depth pictures lie beside the colour pictures (OpenEQA), only the latter count.
    shown = [file for file in shown if file.name.endswith("-rgb.png")] or shown
    for file in shown:
        if file.suffix.lower() in OTHER_IMAGES:
            raise DataError(f"{file} is a picture that is not read: convert it to .png or .jpg, or move it away")
    files = _in_natural_order([file for file in shown if file.suffix.lower() in IMAGE_SUFFIXES])
    if not files:
        raise DataError(f"{folder} has no images (.png or .jpg)", "missing")
    for file in files:
        # A link could show files that the manifest must not read.
        if file.is_symlink() and file.resolve().parent != folder.resolve():
            raise DataError(f"{file} is a link out of its folder: refused")
        if not _image_format(_head(file, 4)):
            raise DataError(f"{file} holds no picture: download it again, or remove it")
    places = _places_by_number(files)
    if places[-1] >= 2 * len(files):
        raise DataError(f"{folder}: {places[-1] + 1 - len(files)} pictures are missing among {files[0].name} ... "
                        f"{files[-1].name}: number them one after another")
    return files, places


def _in_natural_order(files):
    """Files sorted by the numbers in their names."""
    def key(number, file):
        parts = re.split(rf"({number})", file.stem)
        return tuple(Fraction(part) if i % 2 else part for i, part in enumerate(parts)), file.suffix
    # 0.5 is a decimal number, but 1.10 may be the tenth picture of part 1: then 1.1 is there as well, which is equal.
    keys = [key(r"\d+(?:\.\d+)?", file) for file in files]
    if len(set(keys)) < len(keys):
        keys = [key(r"\d+", file) for file in files]
    return [file for _, file in sorted(zip(keys, files))]


def _places_by_number(files):
    """The place of each picture in time. Where their last numbers count in equal steps (most of them), one that is
    missing leaves its place free, and the picture before it stays; other names say no more than the order."""
    names = [re.fullmatch(r"(.*?)(\d+)(\D*)", file.stem) for file in files]
    in_order = list(range(len(files)))
    if len(files) < 2 or not all(names) or len({(name[1], name[3]) for name in names}) > 1:
        return in_order
    numbers = [int(name[2]) for name in names]
    steps = Counter(after - before for before, after in zip(numbers, numbers[1:]))
    step, times = steps.most_common(1)[0]
    if min(steps) < 1 or 2 * times < len(files) or any(other % step for other in steps):
        return in_order
    return [(number - numbers[0]) // step for number in numbers]


def _head(file, size):
    """The first bytes of a file."""
    with open(file, "rb") as opened:
        return opened.read(size)


def _image_format(head):
    """FFmpeg's name for the format of a picture that begins so; None if it is no picture."""
    return next((name for start, name in IMAGES.items() if head.startswith(start)), None)


def _images_at(files, places, rate, moments):
    """The image on display at each of these moments, `rate` images per second, and how to turn it."""
    for moment in moments:
        path = files[bisect_right(places, int(moment * rate + 1e-3)) - 1]
        yield _image(path)


def _image(path):
    """The picture in a file, and how to turn it. DataError where a part of it is missing or damaged."""
    content = path.read_bytes()
    # A JPEG ends with a mark of its own, behind its last scan.
    cut_off = content.startswith(b"\xff\xd8") and content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda")
    try:
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", format=_image_format(content), options=options) as container:
            stream = _video_stream(container, path)
            stream.codec_context.options |= IMAGE_OPTIONS
            frame = next(container.decode(stream), None)
    except av.FFmpegError:
        frame = None
    if frame is None or cut_off:
        raise DataError(f"{path} is damaged or cut off: download it again, or remove it")
    return frame, ORIENTATIONS[_exif_orientation(content[:1 << 16])]


def _exif_orientation(head):
    """The orientation that a camera wrote into the head of a JPEG, 1 to 8; 1 if there is none, as in a PNG. (PyAV
    before 19 tells turns from mirrors in no other way.)"""
    # An entry of EXIF's first table: tag 0x112, type 3, one value; big-endian (MM) or little-endian (II).
    entry = re.search(rb"Exif\0\0(?:MM.*?\x01\x12\0\x03\0{3}\x01\0(.)|II.*?\x12\x01\x03\0\x01\0{3}(.)\0)", head, re.S)
    value = entry[entry.lastindex][0] if entry else 1
    return value if value in ORIENTATIONS else 1


def write_video(path, frames, fps, gop=12):
    """uint8 (N, H, W, 3) -> mp4 (mpeg4, 400 kbit/s)."""
    with atomic_write(path) as part, av.open(str(part), "w", format="mp4") as container:
        # One thread, so that the file is the same on every machine.
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 400_000
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


# ------------------------------------------------------------------------------------------------- B drawing the world
EVERY_FRAME = np.arange(SCENE_FRAMES)
SIDE = 48                       # pixels
SKIN = (236, 188, 150)
SLEEVE = (70, 86, 122)
SHADOW = (60, 52, 48)
WOOD = (196, 164, 128)
SIGN = {"left": -1, "right": 1}                             # of x, from the middle of the table
TOY_FOLDER = "out/toy"
GERUNDS = {
    "picks up": "picking up",
    "puts down": "putting down",
    "pushes": "pushing",
    "pulls": "pulling",
    "cuts": "cutting",
    "hammers": "hammering",
    "wipes": "wiping",
    "waters": "watering",
    "taps": "tapping"}


class Camera:
    """An affine camera per frame: pixel = origin + M (x, y), and 0.6 scale * height further up. Table units, x right,
    y away."""

    def __init__(self, centre, angle, zoom, tilt):
        # Turn the table under the camera; `tilt` flattens what lies further away.
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.moveaxis(np.array([[cos, -sin], [-sin * tilt, -cos * tilt]]), -1, 0)
        self.scale = zoom * SIDE / 2                            # (F,) pixels per table unit
        self.m = (turn * self.scale[:, None, None]).astype(np.float32)      # (F, 2, 2)
        self.inverse = np.linalg.inv(self.m)
        self.origin = SIDE / 2 - np.einsum("fij,fj->fi", self.m, centre)

    def pixels(self, points, height):
        """(F, 2) table points -> (F, 2) pixels."""
        at = self.origin + np.einsum("fij,fj->fi", self.m, points)
        at[:, 1] -= self.scale * 0.6 * height
        return at


def exo_camera(azimuth, zoom):
    """Stands opposite the actor, looks slightly down and never moves."""
    full = np.ones(SCENE_FRAMES)
    centre = np.tile([0.0, 0.36], (SCENE_FRAMES, 1))
    return Camera(centre, full * (np.pi + azimuth), full * zoom, tilt=0.8)


def ego_camera(hand, world, rng) -> Camera:
    """Rides on the head: the gaze follows the acting hand late, and the head walks, rolls and zooms."""
    noise = world.noise
    # Two numbers per clip say where the head is, two how it is rolled, two how near it is. (Rolling and zooming need
    # one: the second is drawn and not used.)
    drawn = [rng.normal(0, spread * noise, (CLIPS, 2)) for spread in (0.08, 0.12, 0.08)]
    aim, roll, zoom = np.repeat(drawn, CLIP_FRAMES, axis=1)                         # (3, F, 2)
    # Numbers per frame: the head walks on, and trembles.
    walk = aim + 0.4 * rng.normal(0, 0.03 * noise, (SCENE_FRAMES, 2)).cumsum(0)
    roll = roll[:, 0] + rng.normal(0, 0.02 * noise, SCENE_FRAMES)
    zoom = (1.25 + zoom[:, 0]) / world.fov

    # The gaze is a moving average of the hand's position; each clip starts anew.
    gaze = np.empty_like(hand)
    for i, place in enumerate(hand):
        if i % CLIP_FRAMES == 0:
            late = 0.5 * place + (0, 0.25)
        late = 0.7 * late + 0.3 * (0.6 * place + (0, 0.22))
        gaze[i] = late
    return Camera(gaze + walk, roll, zoom, tilt=0.95)


class Canvas:
    """RGB frames (F, 48, 48, 3) of a camera, and the one way to draw on them: a soft-edged shape around a
    point."""

    def __init__(self, camera, background):
        self.camera = camera
        self.rgb = np.full((SCENE_FRAMES, SIDE, SIDE, 3), background, np.float32)
        # The same pixels in one row, and the place of each one in it.
        self.flat = rearrange(self.rgb, "f h w k -> (f h w) k")
        self.pixels = np.arange(len(self.flat)).reshape(self.rgb.shape[:3])

    def stamp(self, points, which, shape, colour, height=0.0):
        """Blend `colour` around `points` (F, 2) of the table at a height above it, in the f frames `which`.

        colour: RGB, or a function (x, y) -> (..., 3).
        """
        # Only the pixels of a box around the shape are looked at, w of a row and h of a column: those that the
        # shape's own box reaches, with its soft edge and one pixel more.
        camera = self.camera
        scale = camera.scale[which, None]                                               # (f, 1)
        at = camera.pixels(points, height)[which]                                       # (f, 2)
        edges = np.broadcast_to(shape.reach, points.shape)[which] + 0.5 / scale
        half = np.einsum("fij,fj->fi", np.abs(camera.m[which]), edges) + 1
        w, h = np.minimum(np.ceil(2 * half.max(0, initial=0)) + 1, SIDE).astype(int)
        first = np.clip(np.floor(at - half), 0, (SIDE - w, SIDE - h)).astype(int)
        columns = first[:, 0, None] + np.arange(w)                                      # (f, w)
        rows = first[:, 1, None] + np.arange(h)                                         # (f, h)

        # Where each of them lies from the shape's centre, in table units.
        dx = (columns - at[:, 0, None]).astype(np.float32)[:, None, :]
        dy = (rows - at[:, 1, None]).astype(np.float32)[:, :, None]
        inverse = camera.inverse[which][:, :, :, None, None]
        x = inverse[:, 0, 0] * dx + inverse[:, 0, 1] * dy                               # (f, h, w)
        y = inverse[:, 1, 0] * dx + inverse[:, 1, 1] * dy

        # Paint the pixels that the shape covers.
        cover = 0.5 - shape.distance(x, y) * scale[:, :, None].astype(np.float32)
        covered = cover > 0
        paint = colour(x[covered], y[covered]) if callable(colour) else np.array(colour, np.float32)
        pixels = self.pixels[which[:, None, None], rows[:, :, None], columns[:, None, :]][covered]
        below = self.flat.take(pixels, 0)
        self.flat[pixels] = below + np.minimum(cover[covered], 1)[:, None] * (paint - below)


class Shape(NamedTuple):
    """What can be drawn, around its centre, in table units."""
    distance: Callable              # (x, y) -> how far its edge is, negative inside
    reach: tuple                    # the half sizes of a box around it; or (F, 2), one for each frame


def disc(radius):
    def distance(x, y):
        return np.sqrt(x * x + y * y) - radius
    return Shape(distance, (radius, radius))


def box(w, h):
    """A box of these half sizes."""
    def distance(x, y):
        return np.maximum(np.abs(x) - w, np.abs(y) - h)
    return Shape(distance, (w, h))


def limb(reach, radius):
    """A capsule from -reach to +reach (F, 2), which differs per frame."""
    dx, dy = reach.astype(np.float32).T[:, :, None, None]

    def distance(x, y):
        t = np.clip((x * dx + y * dy) / (dx * dx + dy * dy + 1e-6), -1, 1)
        return np.sqrt((x - t * dx) ** 2 + (y - t * dy) ** 2) - radius
    return Shape(distance, np.abs(reach) + radius)


def block_paint(colour: str, pattern: str):
    """Plain, with white stripes, or with dark dots: large enough to be read at 48 pixels."""
    base = np.array(COLOURS[colour], np.float32)

    def paint(x, y):
        if pattern == "plain":
            return base
        if pattern == "striped":
            ink = 250.0
            mark = np.clip(0.5 + (np.abs(np.mod(x, 0.24) - 0.12) - 0.06) * 24, 0, 1)
        else:
            ink = 20.0
            u = np.abs(np.abs(x) - 0.15)
            v = np.abs(np.abs(y) - 0.12)
            mark = np.clip(0.5 - (np.sqrt(u * u + v * v) - 0.08) * 24, 0, 1)
        return base + mark[..., None] * (ink - base)
    return paint


@dataclass
class Motion:
    """What moves in a scene, in each of its F = 40 frames, in table units."""
    hands: dict                     # "left" and "right": where the hand is (F, 2)
    lift: dict                      # "left" and "right": its height (F,)
    blocks: np.ndarray              # where the two blocks are (2, F, 2)
    height: np.ndarray              # their heights (2, F)
    gap: np.ndarray                 # between the halves of a block that is cut (2, F)
    actions: list                   # of each clip: verb, block, hand, its frames, its beat


def act(plan: dict, rng) -> Motion:
    """The hands and blocks of a scene, as its five moments move them."""
    # Idle hands lie at their places, and tremble.
    hands, lift = {}, {}
    for side, sign in SIGN.items():
        hands[side] = (0.62 * sign, 0) + rng.normal(0, 0.01, (SCENE_FRAMES, 2))
        lift[side] = np.zeros(SCENE_FRAMES)
    # Blocks stay where they are until a hand moves them.
    blocks = np.tile(plan["places"][:, None], (1, SCENE_FRAMES, 1))
    height = np.zeros((2, SCENE_FRAMES))
    gap = np.zeros((2, SCENE_FRAMES))
    actions = []
    for (verb, target, side), f in zip(plan["moments"], EVERY_FRAME.reshape(CLIPS, CLIP_FRAMES)):
        # Time runs from 0 to 1 in a clip, at a speed of its own. `beat` swings between 0 and 1; `along` says
        # how far the action is.
        t = (np.arange(CLIP_FRAMES) + rng.uniform(0, 0.6)) / CLIP_FRAMES
        t = t ** rng.uniform(0.8, 1.25)
        beat = np.sin(t * 2 * np.pi * rng.uniform(1.7, 2.3) + rng.uniform(0, 6)) * 0.5 + 0.5
        along = 1 - t if verb in ("puts down", "pulls") else t

        # The hand that acts is at the block; what else happens depends on the action.
        hands[side][f] = plan["places"][target] + (0.05 * SIGN[side], -0.32)
        if verb in ("picks up", "puts down"):
            height[target, f] = lift[side][f] = 0.75 * along
        elif verb in ("pushes", "pulls"):
            move = along[:, None] * (0, 0.42) - (0, 0.16)
            blocks[target, f] += move
            hands[side][f] += move
        elif verb == "cuts":
            gap[target, f] = 0.16 * t
            lift[side][f] = 0.1 + 0.12 * beat
        elif verb == "wipes":
            phase = t * 2 * np.pi * 1.2 + rng.uniform(0, 6)
            hands[side][f] += np.stack([0.2 * np.cos(phase), 0.08 + 0.1 * np.sin(phase)], 1)
        elif verb in ("hammers", "taps"):
            lift[side][f] = 0.35 * beat
        else:
            lift[side][f] = 0.4
        actions.append((verb, target, side, f, beat))
    return Motion(hands, lift, blocks, height, gap, actions)


def render(plan, motion, camera, ego, wall, gain=1.0):
    """The scene through one camera, painter's order -> uint8 (40, 48, 48, 3)."""
    canvas = Canvas(camera, wall)

    def still(point, shape, colour):
        """Draw something that does not move: for a fixed camera, once."""
        points = np.tile(point, (SCENE_FRAMES, 1))
        canvas.stamp(points, EVERY_FRAME if ego else EVERY_FRAME[:1], shape, colour)

    # What stands still comes first.
    still((0.0, 0.45), box(1.05, 0.62), WOOD)
    if not ego:
        # The demonstrator is seen: body and head.
        still((0.0, -0.36), box(0.42, 0.2), SLEEVE)
        still((0.0, -0.62), disc(0.2), SKIN)
        # The background of a fixed camera, drawn in frame 0, is that of every frame.
        canvas.rgb[1:] = canvas.rgb[0]

    # Blocks from far to near. The exo camera looks from the other side.
    order = np.argsort(plan["places"][:, 1])
    for b in order[::-1] if ego else order:
        _draw_block(canvas, plan["blocks"][b], motion.blocks[b], motion.height[b], motion.gap[b])
    for side in SIGN:
        _draw_hand(canvas, motion, side, ego)
    return np.clip(canvas.rgb * gain, 0, 255).astype(np.uint8)


def _draw_block(canvas, look, place, height, gap):
    w, h = 0.3, 0.25                                            # half width and half depth
    paint = block_paint(*look)
    # A raised block leaves its shadow on the table.
    canvas.stamp(place, EVERY_FRAME[height > 0.02], box(0.85 * w, 0.85 * h), SHADOW)
    canvas.stamp(place, EVERY_FRAME[gap == 0], box(w, h), paint, height)
    # A block that is cut has two halves, which drift apart.
    for sign in (-1, 1):
        half = place + np.outer(sign * (0.5 * w + gap), (1, 0))
        canvas.stamp(half, EVERY_FRAME[gap > 0], box(0.48 * w, h), paint)


def _draw_hand(canvas, motion, side, ego):
    hand = motion.hands[side]
    lift = motion.lift[side]
    size = 0.15 if ego else 0.12
    shoulder = np.array([0.36 * SIGN[side], -0.75 if ego else -0.3])
    # The arm is a capsule from shoulder to hand, the hand a disc at its end.
    arm = limb(0.5 * (shoulder - hand), 0.7 * size)
    canvas.stamp(0.5 * (shoulder + hand), EVERY_FRAME, arm, SLEEVE, 0.5 * lift)
    canvas.stamp(hand, EVERY_FRAME, disc(size), SKIN, lift)
    # What the hand holds is drawn in the clips in which it acts.
    for verb, target, actor, f, beat in motion.actions:
        if actor == side:
            _draw_tool(canvas, verb, hand, lift, f, beat, motion.blocks[target])


TOOLS = {   # verb: what the hand holds, as (offset ahead of the hand, half width, half height, colour)
    "cuts": (
        (0.2, 0.05, 0.1, (40, 40, 44)),
        (0.42, 0.06, 0.22, (232, 238, 246))),
    "hammers": (
        (0.2, 0.04, 0.16, (120, 76, 40)),
        (0.37, 0.2, 0.1, (52, 54, 60))),
    "wipes": (
        (0.2, 0.17, 0.12, (250, 150, 190)),),
    "waters": (
        (0.2, 0.15, 0.12, (60, 190, 190)),)}


def _draw_tool(canvas, verb, hand, lift, f, beat, block):
    for ahead, w, h, colour in TOOLS.get(verb, ()):
        canvas.stamp(hand + (0, ahead), f, box(w, h), colour, lift)
    if verb == "waters":
        # Three drops fall on the block, one after another.
        for i in range(3):
            fall = np.zeros(len(hand))
            fall[f] = 0.4 * np.mod(beat + i / 3, 1)
            drop = block + (0.09 * (i - 1), 0.05)
            canvas.stamp(drop, f, disc(0.055), (170, 226, 255), fall)


def film_scene(plan, motion, world, split, rng):
    """The scene through every camera of the split: "cam0", ... and "ego" -> frames."""
    films = {}
    wall = rng.uniform(150, 235, 3)
    if "exo" in SPLITS[split]:
        for cam in range(world.exo_cams if split == "pairs" else 1):
            if split == "corpus":
                azimuth = rng.uniform(-0.45, 0.45)
                zoom = rng.uniform(0.95, 1.15)
                background = wall
            else:
                # Fixed cameras stand left and right of the middle, in front of one wall.
                azimuth = 0.22 * (-1) ** cam + rng.normal(0, 0.03)
                zoom = 1.1
                background = (205, 214, 220)
            camera = exo_camera(azimuth, zoom)
            films[f"cam{cam}"] = render(plan, motion, camera, ego=False, wall=background)
    if "ego" in SPLITS[split]:
        # The head follows the hand that acts in each clip.
        acting = np.concatenate([motion.hands[side][f] for _, _, side, f, _ in motion.actions])
        gain = 1 + rng.normal(0, 0.1 * world.noise, CLIPS).astype(np.float32)       # light, drawn per clip
        gain = gain.repeat(CLIP_FRAMES)[:, None, None, None]
        camera = ego_camera(acting, world, rng)
        films["ego"] = render(plan, motion, camera, ego=True, wall=wall, gain=gain)
    return films


def toy_split(out: AnyPath, split, world=None) -> Path:
    """The manifest of one split of the micro-world, rendered when first needed (under a lock); `world`: its knobs, if
    they are not those that the folder has."""
    out = Path(out)
    world = world or toy_world(out)
    manifest = out / f"{split}.jsonl"
    with file_lock(out / ".lock", wait=True):
        _claim_world(out, world)
        if manifest.is_file():
            return manifest
        # Scores are always of all clips; only training splits are scaled.
        clips = getattr(world, split)
        if split not in ("val", "test", "exo_test"):
            clips *= world.scale
        scenes = max(1, round(clips / CLIPS))
        # Scenes are rendered in all cores; their rows come back in order.
        rows = []
        with worker_pool() as pool:
            made = pool.imap(partial(make_scene, world, split, out=out), range(scenes), chunksize=4)
            for scene_rows in progress(made, scenes, f"scenes of {split}"):
                rows += scene_rows
        write_jsonl(manifest, rows)
    return manifest


def _claim_world(out, world):
    """A folder holds one world: refuse other knobs by name."""
    file = out / "world.json"
    if not file.is_file():
        # Hidden files and unfinished writes may be there: other files belong to someone else.
        for other in out.iterdir():
            if other.name[0] != "." and other.suffix != ".part":
                raise DataError(f"{other} is there and no micro-world: choose a new folder, or pass a .jsonl")
        write_text_atomic(file, json.dumps(vars(world)))
    made = vars(toy_world(out))
    for key, value in vars(world).items():
        if made[key] != value:
            raise DataError(f"{out} holds a world with {key}={made[key]}, not {value}: use another --out")


def toy_world(out: AnyPath) -> World:
    """The knobs of the world in this folder. The default folder is made when it is first needed; any other
    name that is not a world may be a slip of the pen."""
    file = Path(out) / "world.json"
    if file.is_file():
        return World(**json.loads(read_text(file)))
    if Path(out) != Path(TOY_FOLDER):
        raise DataError(f"{out} is no micro-world (a folder that  data.py toy --out {out}  makes), and no "
                        f"manifest (a .jsonl file)", "missing")
    return World()


def toy_tokenizer(out, world=None):
    """A sentencepiece BPE model with byte fallback (as Mistral's), trained on the text of the exo corpus."""
    path = Path(out) / "tokenizer.model"
    with file_lock(path.with_name(".tokenizer.lock"), wait=True):
        if path.is_file():
            return path
        # The corpus asks and answers everything, in the words of the chat template.
        lines = []
        for row in read_manifest(toy_split(out, "corpus", world)):
            for turn in row["turns"] + [{"user": NARRATE, "assistant": row["text"]}]:
                lines.append(f"[INST] \n{turn['user']} [/INST] {turn['assistant']}")
        # One thread, so that the vocabulary is the same on every machine.
        with atomic_write(path) as part, open(part, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=file,
                model_type="bpe",
                vocab_size=PRESETS["toy"].vocab,
                hard_vocab_limit=False,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                num_threads=1,
                minloglevel=2)
    return path


# ----------------------------------------------------------------------------------------------------- C checking rows
class Rows(Sequence):
    """Rows of manifests, kept as bytes, one behind another: a row is decoded each time it is asked for, and a change
    of it stays with the asker. Python objects would take five times as much, and in each forked worker again."""

    def __init__(self, rows: Iterable = ()):
        self._content = bytearray()
        self._starts = array("q")
        self._ends = array("q")
        for row in rows:
            self._starts.append(len(self._content))
            self._content += marshal.dumps(row)
            self._ends.append(len(self._content))

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, place):
        """A row; of a slice a list of rows."""
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        return marshal.loads(memoryview(self._content)[self._starts[place]:self._ends[place]])

    def pick(self, places) -> Rows:
        """The rows at these places; their bytes are not copied."""
        picked = Rows()
        picked._content = self._content
        picked._starts = array("q", map(self._starts.__getitem__, places))
        picked._ends = array("q", map(self._ends.__getitem__, places))
        return picked


def read_manifests(paths: Sequence, root=None, allow_outside=False) -> Rows:
    """The rows of several manifests, one after another; each has its own skip list.

    The paths of a manifest start at its own folder, unless `root` is given for all of them. An id that an
    earlier manifest has already is put behind the name of its file, so that it still names one row.
    """
    # The same file twice would give two rows the same name, and nothing new to learn.
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise DataError(f"a manifest is named twice in {', '.join(map(str, paths))}: name each one once")
    manifests = [read_manifest(path, root, allow_outside) for path in paths]
    if len(manifests) == 1:
        return manifests[0]

    def rows():
        taken = {}                                              # the manifest that has an id, by its hash
        for path, manifest in zip(paths, manifests):
            for row in manifest:
                # Two data sets may number their rows alike. A message about a row must still name one.
                if taken.setdefault(hash(row["id"]), path) != path:
                    row["id"] = f"{path}: {row['id']}"
                yield row
    return Rows(rows())


def checked_rows(path, base, allow_outside) -> Iterator:
    """The rows of a manifest, as it is read; DataError names the first line that is wrong."""
    hashes = array("q")
    path = str(path)
    # Lines end at "\n" alone: other separators of Unicode may stand inside a text.
    for number, line in enumerate(_lines_of(path), 1):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({error}): one object per line") from None
        videos = check_row(row, where, base, allow_outside)
        for clip, video in zip(clips_of(row), videos):
            clip["video"] = video
        row["where"] = where
        hashes.append(hash(row["id"]))
        yield row
    if not hashes:
        raise DataError(f"{path} is empty: it needs one JSON object per line")
    # A message, a skip list or an answer names a row by its id.
    values, counts = np.unique(hashes, return_counts=True)
    if len(values) < len(hashes):
        first, second, *_ = np.flatnonzero(np.array(hashes) == values[counts > 1][0])
        raise DataError(f"{path} line {second + 1}: its id stands in line {first + 1} already: ids differ")


def _lines_of(path):
    """The lines of a manifest, which are read one by one; blank ones at its end are harmless."""
    blank = 0
    with open_text(path) as file:
        for line in file:
            if not line.strip():
                blank += 1
                continue
            # Blank ones before the end are lines, too.
            yield from [""] * blank
            blank = 0
            yield line


def without_bad_clips(rows, skip_list, base) -> Iterator:
    """Rows without the clips on a skip list: a row goes with its ego clip, or with its last exo camera."""
    # The list names the bad videos of each row, from the root of the manifest.
    bad_videos = {}
    for number, line in enumerate(read_text(skip_list).splitlines(), 1):
        try:
            entry = json.loads(line)
            bad_videos[entry["id"]] = {_real_path(base, video) for video in entry["videos"]}
        except (ValueError, LookupError, TypeError, AttributeError):
            raise DataError(f"{skip_list} line {number} is none of data.py check's: run it again, or remove the "
                            f"file") from None
    # A row needs its ego clip, and one of its exo cameras if it had any.
    total = left_out = 0
    for row in rows:
        total += 1
        bad = bad_videos.get(row["id"], ())
        cameras = [clip for clip in row.get("exo", []) if clip["video"] not in bad]
        lost_all_cameras = row.get("exo") and not cameras
        if row.get("ego", {}).get("video") in bad or lost_all_cameras:
            left_out += 1
            continue
        if "exo" in row:
            row["exo"] = cameras
        yield row
    if bad_videos:
        print(f"{skip_list}: {left_out} of {total} rows are left out, and the bad exo cameras of others if they "
              f"have any; after a change of the files run data.py check again")


@lru_cache(1 << 16)
def _real_path(base, video):
    """An absolute path with its links resolved. It is cached because many rows name the same video."""
    return os.path.realpath(os.path.join(base, video.replace("\0", "?")))


def check_row(row, where, base, allow_outside) -> list:
    """The absolute paths of a row's clips; DataError names the first field that is not as a manifest promises."""
    # What every row has, or may have.
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise DataError(f'{where} lacks "id" (a string)', "no id")
    if not isinstance(row.get("exo", []), list):
        raise DataError(f'{where}: "exo" must be a list of clips', "no clip")
    whole_text(row["id"], where, "id")
    if "text" in row and row["text"] != "":
        _answer(row["text"], where, "text")
    # A manifest from elsewhere must not read files outside its folder.
    paths = []
    for clip in clips_of(row):
        _check_clip(clip, where)
        path = _real_path(base, clip["video"])
        if not (allow_outside or is_inside(base, path)):
            raise DataError(f"{where}: {clip['video']} is outside {base}: pass --root or --allow-outside", "outside")
        paths.append(path)
    if "turns" in row:
        _check_turns(row["turns"], where)
    return paths


@lru_cache(1 << 16)
def is_inside(folder, path):
    """Whether a path, both being absolute, leads into a folder."""
    return path.startswith(os.path.join(folder, ""))


def _check_turns(turns, where):
    """A turn is {"user", "assistant"}, and may have a "system" text; the last question may wait for its answer."""
    wrong = DataError(f'{where}: "turns" is a list of {{"user": ..., "assistant": ...}}', "no turn")
    if not isinstance(turns, list):
        raise wrong
    for i, turn in enumerate(turns, 1):
        needed = {"user"} if i == len(turns) else {"user", "assistant"}
        if not isinstance(turn, dict) or not needed <= turn.keys() <= {"system", "user", "assistant"}:
            raise wrong
        for speaker, said in turn.items():
            whole_text(said, where, speaker)
        if "assistant" in turn:
            _answer(turn["assistant"], where, "assistant")
    if video_marks(turns) > 1:
        raise DataError(f"{where} has more than one <video> mark: a row shows one video", "marks")


def _answer(text, where, name):
    """A text that is trained: of an empty one nothing but its end, silence, would be learned."""
    if not whole_text(text, where, name).strip():
        raise DataError(f'{where}: "{name}" is empty, and what is trained would be silence: leave it out, or the row',
                        "no text")


def whole_text(text, where, name):
    """A text of a file, as it was promised: a string of whole characters, which a tokenizer can read."""
    if not isinstance(text, str):
        raise DataError(f'{where}: "{name}" must be a string, it is {str(text)[:60]!r}', "no text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a pair; bytes of a command line that are no UTF-8 become one as well.
        half = ascii(error.object[error.start:error.end])
        raise DataError(f'{where}: "{name}" has half of a character ({half}): write it whole, as UTF-8',
                        "half of a character") from None
    return text


def finite(number, where, name):
    """A number of a file, as it was promised: neither a text nor true, NaN or infinite."""
    # NaN is neither more nor less than anything.
    if type(number) not in (int, float) or not -1e15 < number < 1e15:
        raise DataError(f'{where}: "{name}" is {str(number)[:60]!r}, not a number', "no number")
    return number


def video_marks(turns):
    """How often a conversation says where its video stands."""
    return sum((turn.get("system", "") + turn["user"]).count("<video>") for turn in turns)


CLIP_KEYS = {"video", "start", "end", "fps"}


def _check_clip(clip, where):
    if not isinstance(clip, dict) or not isinstance(clip.get("video"), str):
        raise DataError(f'{where}: a clip lacks "video" (a path)', "no clip")
    # A key that nothing reads may hold the times of the clip.
    if not clip.keys() <= CLIP_KEYS:
        strange = ", ".join(map(repr, sorted(clip.keys() - CLIP_KEYS)))
        raise DataError(f'{where}: a clip has {strange}, which nothing reads: its times are "start" and "end", in '
                        f'seconds; notes belong beside the clip, into the row', "strange key")
    # Times are finite numbers, and a clip has a length.
    start = clip.get("start")
    end = clip.get("end")
    if start is not None:
        finite(start, where, "start")
    if end is not None:
        finite(end, where, "end")
    if start is not None and end is not None and start >= end:
        raise DataError(f"{where}: {clip['video']} from {start} to {end} s has zero length", "zero length")
    # A folder of images has a rate of its own.
    if "fps" in clip and not 0 < finite(clip["fps"], where, "fps") < 1000:
        raise DataError(f'{where}: "fps" is {clip["fps"]!r}: images per second, more than 0', "no rate")


def usable_rows(rows, loader):
    """-> the rows that a loader can read, and how many samples each one has: where exo clips are read, one per
    camera.

    Training leaves out, and counts, rows without a text (unless none has one: that is a wrong manifest) and rows
    whose text the model has no room for; a benchmark must not leave out any. DataError names the first row at fault.
    """
    rows = rows if isinstance(rows, Rows) else Rows(rows)
    kept, samples, textless, long = array("q"), array("q"), [], []
    for place, row in enumerate(rows):
        chats = chats_of(row, loader.supervise)
        # Stage 2 learns from pairs without a text as well.
        if not chats and loader.view != "pair":
            textless.append(place)
            continue
        for key in loader.views:
            if not row.get(key):
                raise DataError(_lacks(row, key))
        if not loader.train:
            _require_videos(row, loader.views)
        if loader.train and not all("assistant" in turns[-1] for turns in chats):
            raise DataError(f"{_name_of(row)} ends with a question: training needs its answer")
        if is_too_long(chats, loader.tokenizer, loader.video_tokens, loader.cfg):
            long.append(place)
            continue
        kept.append(place)
        samples.append(len(row["exo"]) if "exo" in loader.views else 1)
    if textless:
        if not loader.train or len(textless) == len(rows):
            raise DataError(_lacks(rows[textless[0]], "text"))
        print(f"{len(textless)} of {len(rows)} rows have no text: left out, only the pairs of stage 2 need none")
    if long:
        first = f"{_name_of(rows[long[0]])} has more tokens than the {loader.cfg.max_length} that fit"
        if not loader.train or not kept:
            raise DataError(f"{first}, with {loader.video_tokens} of its video: shorten its text")
        print(f"{len(long)} of {len(rows) - len(textless)} rows are too long and left out: {first}")
    return rows.pick(kept), np.array(samples)


def _require_videos(row, views):
    """DataError for a video that is not there: an evaluation needs every clip, and says so before it begins."""
    for clip in clips_of({view: row[view] for view in views}):
        if not os.path.exists(clip["video"]):
            raise DataError(f"{_name_of(row)}: {clip['video']} is not there: an evaluation needs every clip", "missing")


def _lacks(row, key):
    strange = _strange_keys(row)
    return f'{_name_of(row)} lacks "{key}", which this stage needs{strange and f"; it {strange}"}'


def is_too_long(chats, tokenizer, video_tokens, cfg):
    """Whether one of these chats has more tokens than the model reads."""
    for turns in chats:
        # A text has no more tokens than bytes, and the template adds less than 64 to it: most chats are short.
        most = sum(len(said.encode()) + 64 for turn in turns for said in turn.values())
        if video_tokens + most > cfg.max_length:
            ids, _ = tokenizer.chat(turns, video_tokens)
            if len(ids) > cfg.max_length:
                return True
    return False


ROW_KEYS = {"id", "ego", "exo", "text", "turns", "source", "where"}


def _name_of(row):
    """A row in a message: where it stands, and its id."""
    return f"{row.get('where', 'row')} ({row['id']!r})"


def _strange_keys(row):
    """For a message, the keys of a row that nothing reads: one may be a slip of the pen."""
    strange = sorted(set(row) - ROW_KEYS)
    return f"has {', '.join(map(repr, strange))}, which nothing reads" if strange else ""


# ----------------------------------------------------------------------------------------------- D processes and files
@contextmanager
def open_text(path: AnyPath, newline="\n"):
    """A text file to read, which is UTF-8 whatever the machine's language; a byte order mark is no part of it."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path} is not there", "missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def read_text(path: AnyPath) -> str:
    """The content of a text file."""
    with open_text(path, newline=None) as file:
        return file.read()


@contextmanager
def atomic_write(path: AnyPath):
    """A temporary name to write to; it becomes `path` at the end: a killed write never looks finished, and one that
    ends with an error leaves nothing."""
    # torchrun's ranks may write one file at once.
    rank = os.environ.get("RANK", 0)
    part = Path(f"{path}.{rank}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


def write_text_atomic(path: AnyPath, text):
    """A text file that is never seen half written."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_jsonl(path: AnyPath, rows: Iterable):
    """Rows as JSON lines, each written when it comes."""
    with atomic_write(path) as part, open(part, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


@contextmanager
def file_lock(path: AnyPath, wait: bool):
    """Hold a lock file (a POSIX record lock: it is gone with its process, even after kill -9).

    Without `wait` a second holder is refused, with the process id of the first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    with open(path, "a+") as file:
        # The file holds the process id of the first holder, which the second one reads.
        try:
            fcntl.lockf(file, mode)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                file.seek(0)
                raise DataError(f"{path.parent} is in use by process {file.read().strip() or '?'}: wait for "
                                f"it, or choose another --out") from None
            print(f"{path.parent} is on a file system without locks: see to it that one run at a time uses it")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


START_METHOD = "fork" if sys.platform == "linux" else "spawn"       # of processes that read and render


class Steps:
    """The batches of a loader by step, as torch's DataLoader asks for them. An error is an answer, too: a worker that
    raised it would send a traceback."""

    def __init__(self, loader):
        self.loader = loader

    def __getitem__(self, step):
        try:
            return self.loader.batch(step)
        except ValueError as error:
            return DataError(str(error), getattr(error, "reason", "unreadable"))


def read_ahead(loader, steps, workers, timeout) -> Iterator:
    """The batches of these steps; without workers, this process reads each one when it is asked for."""
    # (Its generator is one of its own: the torch DataLoader draws a number, which would change what the run draws.)
    options = {}
    if workers:
        options = {"timeout": timeout, "multiprocessing_context": START_METHOD}
        _end_workers_at_exit()
    try:
        check_room_for_workers(loader, workers)
        batches = torch.utils.data.DataLoader(
            Steps(loader), sampler=steps, batch_size=None, num_workers=workers, worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(), generator=torch.Generator(), **options)
    except DataError as error:
        batches = [error]
    for item in batches:
        if isinstance(item, DataError) and not loader.train:
            # What is raised keeps the variables of this function, `item` among them: a copy keeps no copy of itself.
            raise copy.copy(item)
        yield item


def check_room_for_workers(loader, workers):
    """DataError if workers cannot hand their batches over: in /dev/shm, which is 64 MB in a docker container, by
    sockets in TMPDIR. A worker reads two steps ahead, one more is in use; the ranks of a machine share its memory."""
    if not workers:
        return
    if os.path.isdir("/dev/shm"):
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        clips = len(loader.views) * loader.batch_size // loader.world
        step = clips * loader.cfg.frames * 3 * loader.cfg.image_size ** 2
        needed = ranks * (2 * workers + 1) * step
        disk = os.statvfs("/dev/shm")
        if disk.f_bavail * disk.f_frsize < needed:
            raise DataError(f"/dev/shm is too small for the loader's workers, who need {needed >> 20} MB there: "
                            f"pass --workers 0, or enlarge it (docker run --shm-size 8g)")
    # The name of a socket has at most 107 bytes, of which Python's own part takes 32.
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > 75:
        raise DataError(f"TMPDIR {folder} is too long for the sockets of the loader's workers: name a shorter one, or "
                        f"pass --workers 0")


def fields_for_sending(batch) -> dict:
    """The fields of a batch as a worker sends them: frames in shared memory, and all else by value, which costs less
    than a descriptor for each."""
    flat = {name: value.numpy() for name, value in batch.tensors().items() if value.dim() == 1}
    return vars(batch) | flat


def batch_from_fields(sent: dict) -> Batch:
    """The batch whose fields were sent so."""
    return Batch(**{
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in sent.items()})


def usable_cores() -> int:
    """How many cores this process may use: a container or a scheduler may give it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _start_worker(_):
    # A launcher sends its signals to the whole group of processes. Workers ignore them: the rank still needs
    # batches, to end the step that it is in.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    die_with_parent()


@cache
def _end_workers_at_exit():
    """Register _end_workers; the cache makes it happen once, however many streams there are."""
    atexit.register(_end_workers)


def _end_workers():
    """Kill the workers at exit: multiprocessing would send SIGTERM, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)               # torch's handler would call it a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def die_with_parent():
    """End this process within two seconds of its parent's death: kill -9 must not leave orphans."""
    # An orphan gets another process for a parent.
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def worker_pool():
    """A process for each core; none outlives its parent, and Ctrl-C is the parent's to answer."""
    return multiprocessing.get_context(START_METHOD).Pool(usable_cores(), initializer=_start_pool_worker)


def _start_pool_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()


class Screen:
    """stdout, where what is only shown ends nothing: not a lost reader (`| head`), a full disk or a narrow
    encoding."""
    def __init__(self, stream):
        stream.reconfigure(errors="backslashreplace")
        self.stream = stream

    def write(self, text):
        self.show(self.stream.write, text)

    def flush(self):
        self.show(self.stream.flush)

    def show(self, action, *text):
        try:
            action(*text)
        except OSError:
            # From here on everything goes nowhere, also what Python flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def progress(items, total, what):
    """Pass items on. Every ten seconds and at the end a line says how many, how fast, and how long it will take."""
    began = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown > 10 or done == total:
            shown = now
            rate = done / max(now - began, 1e-9)
            print(f"{done}/{total} {what}, {rate:.1f} per second, {(total - done) / rate:.0f} s left", flush=True)


def spread(rows, count):
    """At most `count` of the rows, evenly spread."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


# ------------------------------------------------------------------------------------------------- E looking, commands
GLYPHS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!'-()/ "
FONT = np.unpackbits(np.frombuffer(bytes.fromhex(      # 5 x 8 dots per letter, a byte per column, low bit on top
    "2054547840" "7f28444438" "3844444428" "384444287f" "3854545418" "00087e0902" "18a4a49c78"
    "7f08040478" "00447d4000" "2040403d00" "7f10284400" "00417f4000" "7c04780478" "7c08040478" "3844444438"
    "fc18242418" "18242418fc" "7c08040408" "4854545424" "04043f4424" "3c4040207c" "1c2040201c" "3c4030403c"
    "4428102844" "4c9090907c" "4464544c44"
    "7e1111117e" "7f49494936" "3e41414122" "7f4141221c" "7f49494941" "7f09090901" "3e4149497a" "7f0808087f"
    "00417f4100" "2040413f01" "7f08142241" "7f40404040" "7f020c027f" "7f0408107f" "3e4141413e" "7f09090906"
    "3e4151215e" "7f09192946" "4649494931" "01017f0101" "3f4040403f" "1f2040201f" "3f4038403f" "6314081463"
    "0708700807" "6151494543"
    "3e5149453e" "00427f4000" "7249494946" "2141494d33" "1814127f10"
    "2745454539" "3c4a494931" "4121110907" "3649494936" "464949291e" "0000606000" "0080703000" "0000140000"
    "0201590906" "00005f0000" "0008070300" "0808080808" "001c224100" "0041221c00" "2010080402" "0000000000"),
    np.uint8).reshape(-1, 5, 1), axis=2, bitorder="little").astype(bool)
GREY = (110, 110, 110)
LETTER = 12                     # width of a letter in pixels; a dot is two pixels wide


def written(text, width, colour):
    """Text as a strip of pixels (26, width, 3)."""
    dots = np.full((13, width // 2, 3), 255, np.uint8)
    for i, char in enumerate(text):
        # A character without a glyph is found at -1, which is the blank.
        glyph = FONT[GLYPHS.find(char)].T                                   # (8, 5)
        dots[4:12, 6 * i + 2:6 * i + 7][glyph] = colour
    return repeat(dots, "h w c -> (h up) (w across) c", up=2, across=2)


def contact_sheet(path: AnyPath, items: list, title: str):
    """A PNG of items (clips, lines) in two columns under a title. `clips`: {what a clip is: (T, 3, S, S)}, strips of
    frames one below the other; the lines of (text, RGB) stand below them."""
    tiles = [_tile(clips, lines) for clips, lines in items]
    blank = np.full_like(tiles[0][:1], 255)
    width = 2 * blank.shape[1]
    sheet = [written(line, width, GREY) for line in _wrapped(title, width // LETTER - 1)]
    for pair in zip_longest(tiles[::2], tiles[1::2], fillvalue=blank):
        # Both tiles of a row get the height of the higher one.
        height = max(map(len, pair))
        pages = [np.pad(tile, ((0, height - len(tile)), (0, 0), (0, 0)), constant_values=255) for tile in pair]
        sheet.append(np.concatenate(pages, axis=1))
    Path(path).write_bytes(encode_png(np.concatenate(sheet)))


def _tile(clips, lines):
    """One item of a contact sheet, (H, W, 3), with a white margin to the right and below."""
    parts = []
    for name, clip in clips.items():
        strip = film_strip(clip)
        if name:
            parts.append(written(name, strip.shape[1], GREY))
        parts.append(strip)
    width = strip.shape[1]
    for line, colour in lines:
        parts += [written(text, width, colour) for text in _wrapped(line, width // LETTER - 1)]
    return np.pad(np.concatenate(parts), ((0, 16), (0, 8), (0, 0)), constant_values=255)


def film_strip(clip):
    """Frames (T, 3, S, S) side by side, a white line behind each, small ones enlarged -> (H, W, 3)."""
    zoom = max(1, 96 // clip.shape[-1])
    frames = repeat(clip, "t c h w -> t (h up) (w across) c", up=zoom, across=zoom)
    frames = np.pad(frames, ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=255)
    return rearrange(frames, "t h w c -> h (t w) c")


def _wrapped(text, most):
    """Lines of at most so many letters, about equally long: none is a lone word where that can be helped."""
    count = len(textwrap.wrap(text, most))
    while most > 1 and len(textwrap.wrap(text, most - 1)) == count:
        most -= 1
    return textwrap.wrap(text, most)


def encode_png(image) -> bytes:
    """uint8 (H, W, 3) -> PNG, through FFmpeg's encoder."""
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt = "rgb24"
    codec.time_base = 1
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    return b"".join(map(bytes, codec.encode(frame) + codec.encode()))


def command_show(args):
    """Contact sheet of a manifest: ego above exo, text below."""
    rows = read_manifest(args.manifest, args.root, args.allow_outside)
    rows = rows.pick([place for place, row in enumerate(rows) if clips_of(row)])
    if not rows:
        raise DataError(f"{args.manifest} has no row with a video: there is nothing to show")
    if args.n < 1:
        raise DataError(f"--n {args.n}: 1 or more is needed")
    items = []
    for row in spread(rows, args.n):
        cameras = ["ego"] if "ego" in row else []
        cameras += [f"exo {number}" for number in range(len(row.get("exo", [])))]
        clips = {camera: read_row_clip(clip, num_frames=4, size=96) for camera, clip in zip(cameras, clips_of(row))}
        lines = [(row.get("text", ""), (0, 0, 0))]
        for turn in row.get("turns", [])[:2]:
            lines += [(f"Q: {turn['user']}", (0, 70, 160)), (f"A: {turn['assistant']}", GREY)]
        items.append((clips, lines))
    contact_sheet(args.out, items, f"{len(items)} rows of {Path(args.manifest).name}")
    print(f"{args.out}: {len(items)} rows of {args.manifest}")


def command_toy(args):
    """Render the micro-world (every split, or those named)."""
    world = _from_flags(World, args)
    for split in args.splits or SPLITS:
        print(toy_split(args.out, split, world))
    print(toy_tokenizer(args.out, world))


def command_build(args):
    """Convert a data set to a manifest, and say what was kept and what was dropped, by reason."""
    options = _from_flags(Build, args)
    builder, _ = BUILDERS[args.command]
    # Count what the paper counts: rows, pairs of a row and an exo camera, seconds of a clip.
    count = Counter()
    taken, copies = set(), Counter()

    def rows():
        for row in convert(builder, options):
            # Conversations repeat ids: the second "a" is "a#2", or the first number that is free.
            key = row["id"]
            while hash(row["id"]) in taken:
                copies[key] += 1
                row["id"] = f"{key}#{copies[key] + 1}"
            taken.add(hash(row["id"]))
            count["rows"] += 1
            count["pairs"] += len(row.get("exo", []))
            clip = clips_of(row)[0]
            if clip.get("end") is not None:
                count["clips with an end"] += 1
                count["seconds"] += clip["end"] - (clip.get("start") or 0)
            yield row
        if not count:
            raise DataError(f"{options.root}: no row was left, see the reasons above")
    write_jsonl(options.out, rows())
    summary = f"{options.out}: {count['rows']:,} rows, {count['pairs']:,} ego-exo pairs"
    if count["seconds"]:
        summary += f", mean clip {count['seconds'] / count['clips with an end']:.2f} s"
    print(summary)
    if args.command == "ego-exo4d":
        print("   the paper: 2,925 takes, 261.3K narrations, 1.1M pairs, mean clip 0.68 s")
    if os.path.dirname(os.path.realpath(options.out)) != os.path.realpath(options.root):
        print(f"   its paths start at {options.root}: pass --root {options.root} to whatever reads it")


def add_flags(parser, config: type, names: Sequence = ()):
    """One flag for each field of a dataclass (or for `names`): a bool is a switch, a Literal has choices, a field
    without a default is required; the comment on the field's line is its help, so that each flag is described in one
    place."""
    # Python keeps no comments: they are looked up in the source. Two empty lines end a class.
    source = read_text(inspect.getfile(config))
    body = source.split(f"class {config.__name__}:")[1].split("\n\n\n")[0]
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", body, re.M))
    hints = get_type_hints(config)
    for field in fields(config):
        if names and field.name not in names:
            continue
        flag = "--" + field.name.replace("_", "-")
        text = comments.get(field.name, "").replace("%", "%%")
        # `int | None` is an int; no one can type None, it is the default.
        kind = hints[field.name]
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        # Everything else takes a value, of a Literal one of its choices.
        if field.default not in (None, "", MISSING):
            text += f" ({field.default})"
        choices = get_args(kind) or None
        parser.add_argument(
            flag,
            type=type(choices[0]) if choices else kind,
            choices=choices,
            required=field.default is MISSING,
            default=field.default,
            help=text)


def _from_flags(config, args):
    """A dataclass from the flags that add_flags made; fields without a flag keep their defaults."""
    names = {field.name for field in fields(config)}
    return config(**{name: value for name, value in vars(args).items() if name in names})


def _add_command(commands, name, run, about):
    """A command that calls `run`; its help is the docstring of `about`."""
    text = " ".join(about.__doc__.split())
    command = commands.add_parser(
        name,
        help=text.partition(". ")[0],
        description=about.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    command.set_defaults(run=run)
    return command


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    # The micro-world.
    toy = _add_command(commands, "toy", command_toy, command_toy)
    toy.add_argument("splits", nargs="*", help=f"of {', '.join(SPLITS)} (all)")
    toy.add_argument("--out", default=TOY_FOLDER)
    add_flags(toy, World)

    # Any manifest.
    show = _add_command(commands, "show", command_show, command_show)
    check = _add_command(commands, "check", command_check, command_check)
    for command in (show, check):
        command.add_argument("manifest")
        command.add_argument("--root", help="where the paths of the manifest start (its folder)")
        command.add_argument("--allow-outside", action="store_true", help="paths may leave their root")
    show.add_argument("--out", default="sheet.png")
    show.add_argument("--n", type=int, default=8, help="rows (8)")
    check.add_argument("--max-bad", type=float, default=0.01, help="share of rows that may be bad (0.01)")
    check.add_argument("--tokenizer", help="a tokenizer.model or a checkpoint's folder: find texts that are too long")
    check.add_argument("--preset", choices=PRESETS, default="7b", help="the model that is to read them (7b)")
    check.add_argument("--limit", type=float, default=60, help="seconds that one row may take (60)")

    # The data sets of the appendix.
    for name, (builder, flags) in BUILDERS.items():
        command = _add_command(commands, name, command_build, builder)
        add_flags(command, Build, ("root", "out", "allow_outside") + flags)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (DataError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped; the same command goes on or begins anew")


# --------------------------------------------------------------------------------------------- F the paper's data sets
# A builder is a function (files: Files, options: Build) that reads what a
# licence holder downloads, and yields rows of a manifest. Its docstring names the files and their traps.
# "Our choice" is what neither the paper nor the files settle: a flag of Build says it.
@dataclass(frozen=True)
class Build:
    """Flags of the builders; each builder takes the ones that concern it (BUILDERS)."""
    root: str                                       # where the data set was downloaded to; paths start here
    out: str                                        # the manifest to write
    split: str = "train"                            # of the data set's own
    alpha: float = 4.9                              # EgoClip's scale in seconds
    allow_outside: bool = False                     # links may lead out of the root
    beta: Literal["annotator", "take"] = "annotator"        # whose narrations set the mean gap
    views: Literal["all", "best"] = "all"           # every exo camera, or the annotator's choice
    subject: Literal["C", "any"] = "C"              # whose actions: the camera wearer's
    keep_unsure: bool = False                       # narrations that are marked as unsure
    keep_hidden: bool = False                       # narrations of what the ego camera does not see
    prompt: Literal["base", "task", "cue"] = "cue"  # the paper's variants: + task details, + first-person cue
    chunk: float = 600                              # seconds of EgoVLP's video pieces; 0: whole videos
    file: str = ""                                  # of the conversations
    view: Literal["ego", "exo"] = "ego"             # what the videos of the conversations are


# What reading a wrong file can raise.
MISSHAPEN = (LookupError, TypeError, ValueError, AttributeError, SyntaxError, RecursionError, MemoryError, OSError)


class Files:
    """The files of a data set, which always know the record they are at: errors name it."""

    def __init__(self, root, videos=None, allow_outside=False):
        """`videos`: a folder of their own, in which the paths of videos start."""
        self.root = Path(root)
        self.base = os.path.realpath(root)
        self.videos = videos
        self.allow_outside = allow_outside
        self.file = root                                # that was opened last
        self.where = root                               # the file or record that is being read
        self.count = Counter()                          # rows and records dropped, by reason
        self.first = {}                                 # the first bad record of each reason, in a sentence

    def path(self, *names: str) -> Path:
        """The first of these files that exists."""
        for name in names:
            path = self.root / name
            if path.is_file():
                self.file = self.where = str(path)
                return path
        raise DataError(f"{self.root / names[0]} is missing: download it, or name the folder that has it")

    def each(self, items: Iterable) -> Iterator:
        """Pass on the records of the file that was read last, and count them for error messages."""
        for number, item in enumerate(items, 1):
            # The first record may have opened the file. Later ones may open others, for what they refer to.
            if number == 1:
                file = self.file
            self.where = f"{file} record {number}"
            yield item

    def tolerant(self, records: Iterable, make: Callable) -> Iterator:
        """What `make(record)` yields, for each record. A bad record costs itself: it is counted, and the first one of
        each reason is named.

        If more than 1 % of them are bad, or all of the first hundred, the file has another format: that raises the
        first error.
        """
        bad = total = 0
        for total, record in enumerate(records, 1):
            try:
                # All that a record yields, or nothing: an error may come after the first ones.
                made = list(make(record))
            except MISSHAPEN as error:
                bad += 1
                if bad == 1:
                    first_error = error
                    place = self.where
                reason = getattr(error, "reason", type(error).__name__)
                self.count[f"bad record ({reason})"] += 1
                sentence = str(error) if isinstance(error, DataError) else f"{self.where}: {error}"
                self.first.setdefault(f"bad record ({reason})", sentence)
                if bad == total == 100:
                    break
            else:
                yield from made
        if bad > 0.01 * total:
            self.where = place
            raise first_error

    def rows(self, records: Iterable, make: Callable) -> Iterator:
        """The rows that `make(record)` yields, for each record: tolerant, and checked as read_manifest would."""
        def checked(record):
            for row in make(record):
                check_row(row, self.where, self.base, self.allow_outside)
                yield row
        return self.tolerant(records, checked)

    def number(self, row, column):
        """A number of a table, where all is text."""
        return finite(float(row[column]), self.where, column)

    def known(self, record: dict, keys) -> None:
        """Count the keys of a record that nothing reads: one may be a slip of the pen."""
        for key in set(record) - set(keys):
            self.count[f"key {key!r}, which nothing reads"] += 1

    def json(self, *names: str):
        """A JSON file."""
        return json.loads(read_text(self.path(*names)))

    def lines(self, *names: str) -> Iterator:
        """The words of each line that has any."""
        words = map(str.split, read_text(self.path(*names)).splitlines())
        return self.each(filter(None, words))

    def table(self, *names: str, delimiter: str = ",") -> Iterator:
        """The rows of a CSV file, by the names in its first line. Columns without a name, and cells that are
        missing at the end, are no defect: a row lacks them. Lines with more cells are counted."""
        # Tab-separated files have no quotes: a quotation mark in them is a letter.
        quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        with open_text(self.path(*names), newline="") as file:
            rows = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
            try:
                for row in self.each(rows):
                    if any(row.pop(None, [])) or _has_swallowed_rows(row, delimiter):
                        self.count["malformed line"] += 1
                        continue
                    yield {name: cell for name, cell in row.items() if name and cell is not None}
            except csv.Error as error:
                raise DataError(f"{self.file} line {rows.line_num}: a quotation mark is not closed, there or in a row "
                                f"before ({error})") from None

    def video(self, name) -> str:
        """A video's path from the root (or from `videos`): in `videos/` if that folder is there."""
        if not self.videos and (self.root / "videos").is_dir():
            return f"videos/{name}"
        return name


def _has_swallowed_rows(row, delimiter):
    """Whether a cell holds whole rows, as after a quotation mark that a later row closes."""
    for column, cell in enumerate(row.values()):
        delimiters = [line.count(delimiter) for line in (cell or "").split("\n")]
        line_ends = len(delimiters) - 1
        # A text may have several lines, but not as many delimiters per line as a row has. A swallowed row that ends
        # in this cell has the delimiters of the columns before it.
        has_rows = sum(delimiters) >= line_ends * (len(row) - 1)
        if line_ends and has_rows and delimiters[-1] >= column:
            return True
    return False


def convert(make: Callable, options) -> Iterator:
    """What `make(files, options)` yields; an error in a file becomes one sentence that names the place."""
    files = Files(options.root, getattr(options, "videos", None), getattr(options, "allow_outside", False))
    try:
        yield from make(files, options)
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"{files.where} lacks {error}") from None
    except MISSHAPEN as error:
        raise DataError(f"{files.where} is not as expected ({type(error).__name__}: {str(error)[:200]}); see "
                        f"the docstring of {make.__name__} for the format") from None
    finally:
        # Say what was dropped even if an error ends the conversion.
        for reason, number in files.count.items():
            first = f", the first: {files.first[reason]}" if reason in files.first else ""
            print(f"   {reason}: {number:,}{first}")


def verbalise_wearer(text) -> str:
    """Narrations of Ego4D and Ego-Exo4D call the wearer C: "#C C walks" is "Camera-wearer walks" (the word is
    the paper's one published example).

    A tag says whose action it is: "#C" the wearer's, any other ("#O", "#AA") another person's. Annotators also
    wrote #c, # C, #CC, and C in small letters; and a wearer before another subject, who is left out.
    """
    text = text.strip()
    tag = re.match(r"#\s*(\w+)\s+", text)
    rest = text[tag.end():] if tag else text
    # The wearer's letter may stand twice, or not at all: then the tag is the subject of the verb.
    letters = re.match(r"(?:[Cc]\s+)*", rest)
    rest = rest[letters.end():]
    is_wearer = letters[0] or tag and tag[1].upper() in ("C", "CC") and rest[:1].islower()
    names_another = re.match(r"(?:an?|the|another|some)\s", rest, re.I)
    if is_wearer and not names_another:
        rest = f"{WEARER} {rest}"
    return re.sub(r"\bC\b", WEARER, rest)


# ----------------------------------------------------------------------------------------------------------- Ego-Exo4D
def ego_exo4d(files, options):
    """Ego-ExoClip from Ego-Exo4D v2: takes.json, annotations/{splits,atomic_descriptions_*}.json, takes/.

    A row is one narration at t with all its exo cameras (a published "pair" = narration x camera), clip t +-
    beta / (2 alpha): EgoClip's rule, beta the mean gap of one annotator's narrations in the take, sorted,
    before any filter. Cut at the take's ends, two frames at least. takes.json is the list of what exists; the
    ego camera is the one with an `rgb` stream, exo cameras are the capture's that are not `is_ego`. Ego and exo of
    some takes are five frames out of step, a quarter of a mean clip (Ego4d issue 347), which no file says.
    """
    takes = {take["take_uid"]: take for take in files.each(files.json("takes.json"))}
    split_of = files.json("annotations/splits.json")["take_uid_to_split"]
    # The narrations of the splits, take by take.
    splits = ("train", "val") if options.split == "all" else (options.split,)
    annotated = list(_annotated_takes(files, splits))
    if not 0 < options.alpha < math.inf:
        raise DataError(f"--alpha {options.alpha}: seconds above 0 are needed")

    def narrations(record):
        file, uid, annotations = record
        files.where = f"{file}: take {uid}"
        # A take needs its videos.
        if uid not in takes:
            files.count["take not in takes.json"] += 1
            return
        if split_of.get(uid) not in splits:
            files.count["take of another split"] += 1
            return
        take = takes[uid]
        ego, exo = _take_videos(files, take)
        if not ego or not exo:
            files.count["take without an ego or exo video"] += 1
            return
        length = finite(take["duration_sec"], files.where, "duration_sec")
        files.count["takes"] += 1
        for annotation in annotations:
            # Clips are as long as an annotator's pace says (or that of all annotators of the take).
            paced = [annotation] if options.beta == "annotator" else annotations
            half = _mean_gap(paced, length, options.alpha) / (2 * options.alpha)
            for i, narrated in enumerate(annotation["descriptions"]):
                place = f"{file}: take {take['take_name']}, annotator {annotation['annotator_id']}, narration {i}"
                yield place, take, annotation, i, narrated, half, ego, exo

    def rows(record):
        files.where, take, annotation, i, narrated, half, ego, exo = record
        cameras = exo
        if options.views == "best":
            best = (narrated.get("best_exo") or {}).get("cam_id")
            cameras = {name: video for name, video in exo.items() if name == best}
        reason = _why_dropped(annotation, narrated, cameras, take["duration_sec"], options)
        if reason:
            files.count[reason] += 1
            return
        span = _clip_of(_seconds_of(narrated), half, take["duration_sec"])
        yield {
            "id": f"{take['take_name']}/{annotation['annotator_id']}/{i}",
            "ego": {"video": ego, **span},
            "exo": [{"video": video, **span} for video in cameras.values()],
            "text": verbalise_wearer(narrated["text"]),
            "source": "ego-exo4d"}
    yield from files.rows(files.tolerant(annotated, narrations), rows)


def _annotated_takes(files, splits):
    """(file, take uid, its annotations), split by split."""
    for split in splits:
        read = files.json(f"annotations/atomic_descriptions_{split}.json")["annotations"]
        for uid, annotations in read.items():
            yield files.file, uid, annotations


def _mean_gap(annotations, length, otherwise):
    """Seconds between narrations of these annotations, on average; `otherwise` for a single narration. What has no
    time inside the take says nothing about their pace."""
    times = [_seconds_of(narrated) for one in annotations for narrated in one["descriptions"]]
    times = [t for t in times if 0 <= t <= length]
    if len(times) < 2:
        return otherwise
    return float(np.ptp(times)) / (len(times) - 1)


def _seconds_of(narrated):
    """When a narration was said; NaN if it does not say."""
    try:
        return float(narrated["timestamp"])
    except (TypeError, ValueError):
        return math.nan


def _why_dropped(annotation, narrated, cameras, length, options):
    """The reason why a narration gives no row, if there is one."""
    if _is_true(annotation.get("rejected", False)):
        return "rejected annotation"
    if _is_true(narrated["unsure"]) and not options.keep_unsure:
        return "unsure"
    if options.subject == "C" and narrated.get("subject", narrated.get("narration_subject")) != "C":
        return "not the wearer"
    if not _is_true(narrated["ego_visible"]) and not options.keep_hidden:
        return "not seen by the ego camera"
    if not cameras:
        return "no best exo camera"
    if not isinstance(narrated["text"], str) or not narrated["text"].strip():
        return "without a text"
    t = _seconds_of(narrated)
    if not math.isfinite(t):
        return "without a time"
    if t < 0:
        return "before its take"
    if t > length:
        return "later than its take"
    return None


def _is_true(flag):
    """Ego-Exo4D's flags are booleans from one annotator, "1" and "0" from another, null from some: no."""
    if flag not in (True, False, "1", "0", None):
        raise ValueError(f"a flag is {flag!r}, not true, false, 1 or 0")
    return flag in (True, "1")


def _clip_of(t, half, length):
    """t +- half seconds, at least two frames at 30 per second, inside the take."""
    half = max(half, 1 / 30)
    start = max(0.0, min(t - half, length - 2 / 30))
    end = min(length, max(t + half, 2 / 30))
    return {"start": start, "end": end}


def _take_videos(files, take):
    """-> the ego video (None unless there is exactly one), and {camera: exo video} of a take."""
    exo_cameras = {camera["cam_id"] for camera in take["capture"]["cameras"] if not camera["is_ego"]}
    # Glasses have several streams, of which "rgb" is the colour camera; other cameras have one, "0".
    ego, exo = [], {}
    for camera, streams in sorted(take["frame_aligned_videos"].items()):
        rgb, plain = streams.get("rgb", {}), streams.get("0", {})
        if rgb.get("relative_path"):
            ego.append(_stream_file(files, take, rgb))
        if camera in exo_cameras and plain.get("relative_path"):
            exo[camera] = _stream_file(files, take, plain)
    return ego[0] if len(ego) == 1 else None, exo


def _stream_file(files, take, stream):
    """The file of a stream: the downscaled one, if it is there. Files at another rate than the set's are counted."""
    # It has 448 pixels on its short side.
    full = Path(take["root_dir"]) / stream["relative_path"]
    small = full.parent / "downscaled/448" / full.name
    for path in (small, full):
        if (files.root / path).is_file():
            # A file that was encoded anew may begin or end elsewhere. (One that is damaged is found by `check`.)
            with suppress(DataError), open_video(files.root / path) as opened:
                if abs(opened.rate - 30) > 0.1:
                    files.count["video whose rate is not 30 frames per second"] += 1
            return str(path)
    files.count["video not downloaded"] += 1
    return str(small)


# --------------------------------------------------------------------------------------------------------------- EgoIT
CUE = "This is my own view: I wear the camera."


@dataclass(frozen=True)
class Source:
    """One source of EgoIT: its builder and its instructions (our wording)."""
    build: Callable
    task: str                           # task details, put first in the variants "task" and "cue"
    instructions: tuple                 # ten for each source; {} is the question
    flags: tuple = ("split", "prompt")  # of Build, that the builder takes


def instruction(source: str, key: str, prompt: str, question: str = "") -> str:
    """The user's turn: one of the source's ten, picked by the row's id, below what `prompt` puts first."""
    # The row's id decides, so that the same row always gets the same instruction.
    ten = EGOIT[source].instructions
    return led_by(prompt, EGOIT[source].task, ten[zlib.crc32(key.encode()) % 10].format(question))


def led_by(prompt, task, question):
    """A question below what --prompt puts first: nothing, task details, or the first-person cue and those."""
    first = {"base": [], "task": [task], "cue": [CUE, task]}[prompt]
    return "\n".join([*first, question])


def egoit_row(source, key, video, answer, options, question="", **clip) -> dict:
    """A row of EgoIT; `clip` is what else its ego clip has."""
    turn = {"user": instruction(source, key, options.prompt, question), "assistant": answer}
    return {
        "id": f"{source}/{key}",
        "ego": {"video": video, **clip},
        "turns": [turn],
        "source": source}


def egtea(files, options):
    """EGTEA Gaze+ (`--split train` or `test`, of split 1): `<clip> <action> <verb> <noun>` with ids from 1;
    the trimmed file is the clip, a little longer than its label. The answer is the action's cleaned name."""
    # The label of an action may have spaces; its number is the last word of the line.
    actions = {int(number): " ".join(label) for *label, number in files.lines("action_idx.txt")}

    def rows(words):
        clip, action, *_ = words
        # A clip's name: session (three parts), start and end in milliseconds, first and last frame.
        session = "-".join(clip.split("-")[:3])
        label = re.sub("[_:]", " ", actions[int(action)]).lower()
        yield egoit_row("egtea", clip, f"cropped_clips/{session}/{clip}.mp4", label, options)
    yield from files.rows(files.lines(f"{options.split}_split1.txt"), rows)


def ssv2(files, options):
    """Something-Something V2 (`--split train` or `validation`): the answer is the label, with its objects
    named. The whole webm is the clip."""
    if options.split == "test":
        raise DataError("the test split has no labels: use --split train or validation")

    def rows(record):
        yield egoit_row("ssv2", record["id"], f"{folder}{record['id']}.webm", record["label"], options)
    # The archive unpacks into a folder of this name.
    archive = "20bn-something-something-v2/"
    folder = archive if (files.root / archive).is_dir() else files.video("")
    name = f"{options.split}.json"
    records = files.json(name, f"something-something-v2-{name}", f"labels/{name}")
    yield from files.rows(files.each(records), rows)


def egotimeqa(files, options):
    """EgoTimeQA (GroundVQA's annotations.EgoTimeQA.json): `video_id` is an Ego4D *clip*; the whole clip is
    shown, because the released windows were rescaled (our choice). ' l ' is the generator's typo for I."""
    def rows(record):
        if len(record["wrong_answers"]) != 3:
            raise ValueError(f"{len(record['wrong_answers'])} wrong answers, not 3")
        question = record["question"].replace(" l ", " I ").strip()
        answer = record["answer"].replace(" l ", " I ").strip()
        number = files.where.rpartition(" ")[2]
        key = f"{record['video_id']}/{number}"
        yield egoit_row("egotimeqa", key, files.video(f"{record['video_id']}.mp4"), answer, options, question)
    name = "annotations.EgoTimeQA.json"
    records = files.json(name, f"data/unified/{name}")
    yield from files.rows(files.each(records), rows)


def openeqa(files, options):
    """OpenEQA (open-eqa-v0.json): episodes are folders of `*-rgb.png`, at no rate that matters (the whole
    walk is sampled evenly)."""
    frames = "frames" if (files.root / "frames").is_dir() else "data/frames"
    records = files.json("open-eqa-v0.json", "data/open-eqa-v0.json")

    def rows(record):
        video = f"{frames}/{record['episode_history']}"
        yield egoit_row("openeqa", record["question_id"], video, record["answer"].strip(), options,
                        record["question"].strip(), fps=3)
    yield from files.rows(files.each(records), rows)


def egoexolearn(files, options):
    """EgoExoLearn (annotations/fine_annotation_trainval_en.csv): ego rows of the split, columns by name; the
    second person becomes the first. Segments beyond the video's end are cut or dropped where it is there."""
    def rows(row):
        if row["view"] != "ego" or row["subset"] != options.split:
            files.count["exo or another split"] += 1
            return
        video = files.video(f"{row['video_uid']}.mp4")
        # Some annotated segments end after the video.
        length = _length_of(files.root / video)
        start = files.number(row, "start_sec")
        end = files.number(row, "end_sec")
        if not start < min(end, length):
            files.count["beyond the video's end"] += 1
            return
        if end > length:
            files.count["cut at the video's end"] += 1
        # The narrator speaks to the learner; EgoIT's answers are the learner's own.
        text = in_first_person(row["narration_en"].strip())
        key = row.get("annotation_id") or row["annotation_uid"]
        yield egoit_row("egoexolearn", key, video, text, options, start=start, end=min(end, length))
    name = "fine_annotation_trainval_en.csv"
    yield from files.rows(files.table(f"annotations/{name}", name), rows)


def in_first_person(text):
    """What a narrator tells the wearer, as the wearer would say it: "you" is "me" after a preposition and before
    what follows an object alone; else it is "I", before its verb."""
    changes = {
        r"your": "my",
        r"yourself": "myself",
        r"you(?: a|')re": "I am",
        r"you were": "I was",
        r"(of|to|for|with|from|at|by|behind|beside|near) you": r"\1 me",
        r"you(?= (?:an?|the|my|and|or|to|in|on|at|with|from|of|for)\b|[.,;:!?)]|$)": "me",
        r"you": "I"}
    starts_a_sentence = text[:1].isupper()
    for theirs, ours in changes.items():
        text = re.sub(rf"(?i)\b{theirs}(?!\w)", ours, text)
    return text[:1].upper() + text[1:] if starts_a_sentence else text


@cache
def _length_of(video):
    """Seconds; infinite for a video that is not there or cannot be read: `data.py check` will name it."""
    try:
        with open_video(video) as opened:
            return opened.seconds
    except DataError:
        return math.inf


EGOIT = {
    "egtea": Source(
        build=egtea,
        task="Name one kitchen action, a verb and its object.",
        instructions=(
            "What am I doing?",
            "Which action do my hands perform?",
            "What am I doing in the kitchen right now?",
            "Name the action in this clip.",
            "Which step of cooking is this?",
            "Tell me what I just did.",
            "What do I do with the object in my hands?",
            "Label this clip with its action.",
            "What is happening at my hands?",
            "Describe my action in a few words.")),
    "ssv2": Source(
        build=ssv2,
        task="Say in one phrase what is done to which object.",
        instructions=(
            "What is being done here?",
            "What do the hands do with the object?",
            "Caption this short clip.",
            "Which action does this clip show?",
            "What happens to the object?",
            "Describe the motion.",
            "Name the interaction of hand and object.",
            "What did I just do?",
            "How is the object handled?",
            "Summarise the movement in a few words.")),
    "egotimeqa": Source(
        build=egotimeqa,
        flags=("prompt",),
        task="Answer in at most five words.",
        instructions=(
            "Watch my video and answer: {}",
            "Think back to what I did. {}",
            "{}",
            "Here is what I recorded. {}",
            "Help me remember: {}",
            "Look at the whole clip before you answer. {}",
            "Question about my day: {}",
            "From what you saw: {}",
            "I forgot something. {}",
            "Use the video to answer. {}")),
    "openeqa": Source(
        build=openeqa,
        flags=("prompt",),
        task="Answer with a short phrase about this place.",
        instructions=(
            "I walked through these rooms. {}",
            "{}",
            "Look around and answer: {}",
            "From this tour: {}",
            "You have seen what I saw. {}",
            "About the place in the video: {}",
            "Use what the walk shows. {}",
            "For someone who lives here: {}",
            "Remember the rooms. {}",
            "On my surroundings: {}")),
    "egoexolearn": Source(
        build=egoexolearn,
        task="Describe hands and objects in one sentence.",
        instructions=(
            "Describe what I am doing.",
            "What do my two hands do?",
            "Narrate this step.",
            "Caption this moment.",
            "Give a detailed account of this action.",
            "What am I working on, and how?",
            "How do I do this step?",
            "Tell me what you see me do.",
            "Explain my current step.",
            "Describe my actions precisely."))}


# ------------------------------------------------------------------------------------------- EgoClip and conversations
def egoclip(files, options):
    """EgoClip (EgoVLP's egoclip.csv, tab-separated, 3.8M rows): the Init stage's ego data. The released clip
    times are used, negative ones cut to 0; `--chunk` seconds per file as EgoVLP's script cuts them, a clip that
    spans two stays in that of its middle. Ids are row numbers from 0. Dropped, if they are there (the released file
    has none): #unsure, and texts under 3 words, tag included."""
    def rows(row):
        start = max(0.0, files.number(row, "clip_start"))
        end = files.number(row, "clip_end")
        if "#unsure" in row["clip_text"].lower() or len(row["clip_text"].split()) < 3 or not start < end:
            files.count["unsure, short or without length"] += 1
            return
        # EgoVLP cuts videos into pieces: times count from the start of the clip's piece.
        name = row["video_uid"]
        if options.chunk:
            piece = int((start + end) / 2 // options.chunk)
            name = f"{name}/{piece}"
            begin = piece * options.chunk
            # The middle is inside the piece: the clip may hang over at both sides.
            start = max(start - begin, 0)
            end = min(end - begin, options.chunk)
        yield {
            "id": f"egoclip/{int(files.where.rpartition(' ')[2]) - 1}",
            "text": verbalise_wearer(row["clip_text"]),
            "source": "egoclip",
            "ego": {
                "video": files.video(f"{name}.mp4"),
                "start": round(start, 6),
                "end": round(end, 6)}}
    yield from files.rows(files.table("egoclip.csv", delimiter="\t"), rows)


def conversations(files, options):
    """LLaVA's and VideoLLaMA2's JSON array or lines (`--file`, below --root), with our optional "start" and "end" in
    seconds, or EgoGPT's `start_frame` and `end_frame`, which are looked up among the time stamps of the file.

    `image` wins over `video`, as in their loader; marks of the video at the head or the end of a question are put
    back by ours. Still images are left out, and counted: this model reads videos. Rows have turns alone: stages 1 and
    2, which learn narrations, need other data. Keys that nothing reads are counted.
    """
    still_images = {*IMAGE_SUFFIXES, *OTHER_IMAGES} - {".gif"}
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    if not options.file:
        raise DataError("--file is needed: the .json or .jsonl below --root that has the conversations")
    one_per_line = options.file.endswith(".jsonl")

    def rows(record):
        if one_per_line:
            record = json.loads(record)
        files.known(record, (*VIDEO_KEYS, *CLIP_KEYS, "id", "conversations", "start_frame", "end_frame"))
        video = _one_path(files, record)
        if video is None:
            files.count["without a video"] += 1
            return
        if Path(video).suffix.lower() in still_images:
            files.count["still image"] += 1
            return
        # Marks of a video, an image or its sound go: the chat template puts its own.
        speakers, texts = [], []
        for message in record["conversations"]:
            speakers.append(roles[message["from"]])
            text = whole_text(message["value"], files.where, "value")
            texts.append(_without_marks(text) if speakers[-1] == "user" else text.strip())
        # What the system says leads the first question.
        system = {}
        if speakers[:1] == ["system"]:
            system = {"system": texts.pop(0)}
            del speakers[0]
        # An assistant's greeting answers no question.
        if speakers[:1] == ["assistant"]:
            del speakers[0], texts[0]
        # The rest is question and answer, in turn.
        if not texts or speakers != ["user", "assistant"] * (len(texts) // 2):
            raise ValueError("human and gpt must take turns, human first")
        turns = [{"user": q, "assistant": a} for q, a in zip(texts[::2], texts[1::2])]
        turns[0] = system | turns[0]
        clip = {"video": video} | {key: record[key] for key in ("start", "end", "fps") if key in record}
        # EgoGPT counts frames instead of seconds.
        for key in ("start", "end"):
            if f"{key}_frame" in record:
                clip[key] = time_of_frame(files.root / video, record[f"{key}_frame"])
        yield {
            "id": str(record.get("id", files.where.rpartition(" ")[2])),
            "turns": turns,
            options.view: clip if options.view == "ego" else [clip],
            "source": "conversations"}
    if one_per_line:
        with open_text(files.path(options.file)) as file:
            yield from files.rows(files.each(filter(str.strip, file)), rows)
    else:
        yield from files.rows(files.each(files.json(options.file)), rows)


VIDEO_KEYS = ("image", "video", "videos", "video_path")     # of a record, the first one that is there


def _one_path(files, record):
    """The path of a record's one video; None if it has none. Some write {"video": path} or [path] for it."""
    video = next((record[key] for key in VIDEO_KEYS if record.get(key)), None)
    if isinstance(video, dict):
        files.known(video, {"video"})
        video = video["video"]
    if isinstance(video, list):
        if len(video) != 1:
            raise ValueError(f"{len(video)} videos: a row shows one")
        video = video[0]
    return video


def _without_marks(question):
    """A question without the marks of a video, an image or its sound at its head or its end."""
    mark = r"<(?:video|image|speech)>"
    return re.sub(rf"^(?:\s*{mark})+|(?:\s*{mark})+\s*$", "", question).strip()


BUILDERS = {    # command: the builder, and the flags of Build that it takes besides --root and --out
    "ego-exo4d": (ego_exo4d, ("split", "alpha", "beta", "views", "subject", "keep_unsure", "keep_hidden")),
    "egoclip": (egoclip, ("chunk",)),
    **{name: (source.build, source.flags) for name, source in EGOIT.items()},
    "conversations": (conversations, ("file", "view"))}


# ------------------------------------------------------------------------------------------------------------- G check
def command_check(args):
    """Read every clip once, in all cores; report what is wrong by kind and file, write the skip list.

    Damage inside a film shows where its codec can tell: H.264 mostly can. VP8, VP9 and HEVC carry no check sum that
    FFmpeg compares: bytes that were overwritten there may be shown as a wrong picture, without a word.
    """
    rows = read_manifest(args.manifest, args.root, args.allow_outside, skip=False)
    # Rows are read in all cores, in any order.
    with tempfile.NamedTemporaryFile() as begun, worker_pool() as pool:
        replies = pool.imap_unordered(partial(_check_videos, limit=args.limit, begun=begun.name), rows)
        replies = _until_silence(replies, begun.name, 2 * args.limit + 5)
        problems = dict(progress(replies, len(rows), "rows"))
    tokenizer = args.tokenizer and Tokenizer(args.tokenizer)
    cfg = PRESETS[args.preset]

    # Report in the order of the manifest.
    base = os.path.realpath(args.root or Path(args.manifest).parent)
    kinds, skip_list = Counter(), []
    # What is allowed, and may be a slip: how many rows of each kind, and the first.
    notes, noted = Counter(), {}
    for row in rows:
        found, remarks = problems.get(row["id"], (None, []))
        for kind, sentence in remarks + _remarks_on(row):
            notes[kind] += 1
            noted.setdefault(kind, f"{_name_of(row)} {sentence}")
        if found is None:
            # A row without a reply has a decoder that hung or crashed: its worker was killed.
            sentence = "a decoder crashed or took longer than --limit on one of these: "
            found = [("hangs or crashes", sentence + clip["video"], clip["video"]) for clip in clips_of(row)]
        # An ego clip is read as [x ; F(x)], which is the most that any stage shows.
        video_tokens = cfg.visual_tokens * (2 if "ego" in row else 1)
        if tokenizer and is_too_long(chats_of(row, "mix"), tokenizer, video_tokens, cfg):
            found += [("too long", f"its text does not fit into {cfg.max_length} tokens", None)]
        if found:
            kinds.update({kind for kind, _, _ in found})
            reasons = [f"{kind}: {sentence}" for kind, sentence, _ in found]
            videos = [_path_from(base, video) for _, _, video in found if video]
            print(*(f"{row['id']}: {reason}" for reason in reasons), sep="\n")
            skip_list.append({"id": row["id"], "videos": videos, "reasons": reasons})
    write_jsonl(Path(args.manifest).with_suffix(".bad.jsonl"), skip_list)
    for kind, first in noted.items():
        print(f"{kind}, in {notes[kind]} rows: {first}")
    counts = ", ".join(f"{kind}: {number}" for kind, number in (kinds + notes).most_common())
    print(f"{len(rows) - len(skip_list)} of {len(rows)} rows are good; {counts or 'nothing is wrong'}")
    share = len(skip_list) / len(rows)
    if share > args.max_bad:
        raise DataError(f"{share:.1%} of the rows are bad, more than --max-bad {args.max_bad:.1%}")


def _remarks_on(row):
    """(kind, sentence) of what a row is allowed to be, but may not be meant to."""
    remarks = []
    strange = _strange_keys(row)
    if strange:
        remarks.append(("keys that nothing reads", strange))
    if not chats_of(row, "mix"):
        remarks.append(("no text", "can be used by stage 2 alone"))
    if row.get("turns") and "assistant" not in row["turns"][-1]:
        remarks.append(("no answer", "ends with a question, which training refuses"))
    return remarks


def _path_from(base, video):
    """A path relative to the base, so that the list may move with its files; absolute if it is elsewhere."""
    return os.path.relpath(video, base) if is_inside(base, video) else video


def _until_silence(replies, begun, seconds):
    """The replies of a pool, until for so long none comes and no row begins: the workers of the others were killed.
    The file `begun` has a byte for each row that began."""
    while True:
        before = os.path.getsize(begun)
        try:
            yield replies.next(timeout=seconds)
        except StopIteration:
            return
        except multiprocessing.TimeoutError:
            if os.path.getsize(begun) == before:
                return


def _check_videos(row, limit, begun):
    """Read a row's clips once -> its id, and (kind, sentence, video) of everything that is wrong, with (kind,
    sentence) of what is worth a remark."""
    with open(begun, "ab") as file:
        file.write(b".")
    # The kernel ends a decoder that hangs. Python could not: its signal handlers wait for the decoder.
    signal.setitimer(signal.ITIMER_REAL, limit)
    found, remarks, lengths, begins, spans = [], [], [], [], set()
    for clip in clips_of(row):
        video, start, end = clip["video"], clip.get("start"), clip.get("end")
        try:
            with open_video(video, clip.get("fps")) as opened:
                length = opened.seconds
                begin, stop = clip_span(video, start, end, length)
            frames = read_row_clip(clip, num_frames=8, size=64)
        except DataError as error:
            found.append((error.reason, str(error), video))
            continue
        if stop < (end or 0) - 0.1:
            found.append(("too short", f"{video} ends at {length:.2f} s, the clip at {end} s", video))
        if opened.missing:
            remarks.append(("pictures are missing", f"has {video}, which lacks {opened.missing}: the one before stays"))
        # A covered lens or a failed recording shows one colour all the time; a dark moment is no error.
        picture = (frames != CLIP_MEAN_COLOUR[:, None, None]).any((0, 1))       # without the margins
        contrast = frames[:, :, picture].std(2)                 # of each frame and colour
        if not contrast.max() >= 1:
            found.append(("blank", f"{video} shows one colour at {begin:.2f} - {stop:.2f} s", video))
        lengths.append(length)
        begins.append(opened.begins)
        spans.add((start, end))
    # Whole films that are one moment end together. Of longer ones, one camera may have been stopped later.
    if len(spans) == 1 and np.ptp(lengths) > 0.1:
        sentence = f"has videos that last {', '.join(f'{length:.2f}' for length in lengths)} s"
        if all(end is None for _, end in spans):
            found += [("ego and exo differ", sentence, clip["video"]) for clip in clips_of(row)]
        else:
            remarks.append(("videos differ in length", f"{sentence}: do they begin together?"))
    # Time zero is the first picture: what another tool counts from the start of the sound is another time.
    if len(begins) > 1 and np.ptp(begins) > 0.05:
        late = ", ".join(f"{begin:.2f}" for begin in begins)
        sentence = f"has pictures that begin {late} s after their files do: times count from the first picture"
        remarks.append(("pictures begin apart", sentence))
    signal.setitimer(signal.ITIMER_REAL, 0)
    return row["id"], (found, remarks)


if __name__ == "__main__":
    main()
