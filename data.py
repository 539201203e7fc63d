"""Everything before a tensor reaches the network: video, manifests, the loader; a micro-world to learn from.

    python data.py toy --out out/toy            # render the micro-world: mp4 files, JSON lines, a tokenizer
    python data.py show out/toy/val.jsonl       # contact sheet: ego above exo, text below
    python data.py ego-exo4d --root DIR --out x.jsonl   # and seven more data sets; check, cache, mix

One row of a manifest (JSON lines) is one narrated moment; training reads nothing else:

    {"id": "s7/2", "ego": {"video": "ego/7.mp4", "start": 2.0, "end": 3.0}, "exo": [{"video": "cam0/7.mp4"}],
     "text": "Camera-verbalise_wearer cuts ...", "turns": [{"user": "Which hand do I use?", "assistant": "The left."}]}
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import csv
import fcntl
import hashlib
import inspect
import io
import json
import math
import multiprocessing.util
import os
import re
import signal
import sys
import textwrap
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import av
import numpy as np
import sentencepiece
import torch
from av.video.reformatter import VideoReformatter
from einops import rearrange
from torch import Tensor

from model import IGNORE, PRESETS, VIDEO, ModelConfig

NARRATE = "Narrate the video."  # the prompt of a row's `text` (our choice: the paper names none for it)
MAX_SIDE, MAX_PIXELS = 16384, 64 << 20  # refused before a frame of such a size is decoded
OPEN_OPTIONS = {  # FFmpeg opens more than files: playlists, URLs, concat scripts. We do not.
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"}
TICK = Fraction(1, 90_000)      # of a cached file's clock
IMAGES = {".png": "png_pipe", ".jpg": "jpeg_pipe", ".jpeg": "jpeg_pipe"}

class DataError(ValueError):
    """Bad input: the message names file, line or field, and the way out; `reason` is its kind, in a word."""
    def __init__(self, message: str, reason: str = "unreadable"):
        super().__init__(message)
        self.reason = reason

# ----------------------------------------------------------------------------------------------------- video
def read_clip(video: str | os.PathLike, start: float | None, end: float | None, num_frames: int, size: int,
              rng: np.random.Generator | None = None, fps: float | None = None, fit: str = "pad"):
    """`num_frames` RGB frames of [start, end) seconds -> uint8 (T, 3, S, S).

    The clip is cut into T equal spans; a frame is what a viewer would see at one moment of each span: its
    centre, or with `rng` (training) a random moment. By timestamp, never by index times fps; a clip with
    fewer frames repeats real ones. `fps` is for folders of images; `fit` "pad" is VideoLLaMA2's square with
    CLIP's mean colour, "crop" the centre. DataError if it cannot be read.
    """
    with open_video(video, fps) as (length, frames_at):
        begin, stop = clip_span(video, start, end, length)
        at = (np.arange(num_frames) + (0.5 if rng is None else rng.random(num_frames))) / num_frames
        out, last = np.empty((num_frames, 3, size, size), np.uint8), None
        for i, frame in enumerate(frames_at(begin + (stop - begin) * at)):
            out[i] = out[i - 1] if frame is last else _pixels(frame, size, fit)
            last = frame
        return out

def clip_span(video, start: float | None, end: float | None, length: float) -> tuple[float, float]:
    """The clip in seconds, cut at the video's end; one without length is refused."""
    begin, stop = 0.0 if start is None else max(start, 0.0), length if end is None else min(end, length)
    if begin >= length:
        raise DataError(f"{video}: clip starts at {begin} s, the video ends at {length:.2f} s", "too short")
    if not begin < stop:
        raise DataError(f"{video}: clip [{begin}, {stop}) s has no length", "too short")
    return begin, stop

@contextmanager
def open_video(video: str | os.PathLike, fps: float | None = None) -> Iterator[tuple[float, Callable]]:
    """-> its length in seconds, and a function from ascending moments (seconds from its first frame) to the
    frames on display then. A folder of images is a video too (`*-rgb.png` if there are any, at `fps`, or
    VideoLLaMA2's 3). One decoding thread: slice threads deadlock in loader workers."""
    try:
        if os.path.isdir(video):
            files = image_files(video)
            rate = fps or 3.0
            last = len(files) - 1
            yield len(files) / rate, lambda moments: (_image(files[min(int(t * rate + 1e-3), last)])
                                                      for t in moments)
            return
        with av.open(str(video), options=OPEN_OPTIONS, metadata_errors="replace") as container:
            stream = next(iter(container.streams.video), None)
            context = stream and stream.codec_context           # none: an unknown codec
            if context is None:
                raise DataError(f"{video} has no video stream that can be decoded")
            if max(context.width, context.height) > MAX_SIDE or context.width * context.height > MAX_PIXELS:
                raise DataError(f"{video} claims {context.width} x {context.height} pixels: refused")
            context.thread_type, context.thread_count = "NONE", 1
            context.options = {"max_pixels": str(MAX_PIXELS)}   # sizes may change inside a stream
            yield _seconds(container, stream), partial(_frames_at, container, stream)
    except (av.FFmpegError, OSError, OverflowError, MemoryError) as error:
        missing = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{video} cannot be read: {why}", missing) from None

def _seconds(container, stream) -> float:
    """Length of the video, as its header says; Matroska keeps it in a tag, as the moment of its end."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    if tag or container.duration:
        end = container.duration / av.time_base if not tag else (
            3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3]))
        return end - float((stream.start_time or 0) * stream.time_base)
    raise DataError(f"{container.name} has no duration: re-encode it")

def _frames_at(container, stream, moments: Sequence[float]) -> Iterator:
    """The frame on display at each of these ascending moments."""
    slack, back = 1e-4, 0.0                                     # timestamps are rounded to the time base
    first = stream.start_time or 0
    zero = float(first * stream.time_base)
    while True:                                                 # to the key frame before
        at = max(int((zero + moments[0] - back) / stream.time_base), first)
        container.seek(at, stream=stream)
        frames = (frame for frame in container.decode(stream) if frame.pts is not None)
        shown = next(frames, None)
        if at == first or shown is not None and shown.time <= zero + moments[0] + slack:
            break
        back = 2 * back + 1             # an open group of pictures: its first frames need the group before
    if shown is None:
        raise DataError(f"{container.name} holds no frame at {moments[0]:.2f} s: truncated?", "truncated")
    ahead, step = next(frames, None), 0.1
    for moment in moments:
        while ahead is not None and ahead.time <= zero + moment + slack:
            step = max(0.1, ahead.time - shown.time)            # how long a frame may stay, at the end
            shown, ahead = ahead, next(frames, None)
        stays = max(2 * step, float((shown.duration or 0) * stream.time_base))
        if ahead is None and shown.time + stays < zero + moment:
            raise DataError(f"{container.name} ends at {shown.time - zero:.2f} s, {moment:.2f} s was asked "
                            f"for: truncated?", "truncated")
        if shown.is_corrupt:
            raise DataError(f"{container.name} is damaged at {shown.time - zero:.2f} s")
        yield shown

def image_files(folder: str | os.PathLike) -> list[Path]:
    """The images of a folder in order of their names; none may be a link out of it."""
    files = sorted(Path(folder).glob("*-rgb.png")) or sorted(
        f for f in Path(folder).iterdir() if f.suffix.lower() in IMAGES)
    if not files:
        raise DataError(f"{folder} has no images (.png or .jpg)", "missing")
    if outside := [f for f in files if f.is_symlink() and f.resolve().parent != Path(folder).resolve()]:
        raise DataError(f"{outside[0]} is a link out of its folder: refused")
    return files

def _image(path: Path):
    """A PNG or JPEG file as one frame."""
    with av.open(str(path), format=IMAGES[path.suffix.lower()],
                 options={"protocol_whitelist": "file"}) as container:
        context = container.streams.video[0].codec_context
        context.thread_type, context.options = "NONE", {"max_pixels": str(MAX_PIXELS)}
        frame = next(container.decode(video=0), None)
    if frame is None:
        raise DataError(f"{path} holds no image")
    return frame

_reformatter = VideoReformatter()   # one a process: making its tables costs more than using them

def _pixels(frame, size: int, fit: str = "pad") -> np.ndarray:
    """One frame as RGB (3, S, S), upright: scaled to fit inside the square, or to cover it (crop)."""
    scale = size / (min if fit == "crop" else max)(frame.width, frame.height)
    w, h = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
    rgb = _reformatter.reformat(frame, w, h, "rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
    rgb = np.rot90(rgb, frame.rotation // 90) if frame.rotation else rgb        # counter-clockwise
    (h, w), out = rgb.shape[:2], np.empty((3, size, size), np.uint8)
    top, left = abs(size - h) // 2, abs(size - w) // 2
    if h >= size and w >= size:
        out[:] = rgb[top:top + size, left:left + size].transpose(2, 0, 1)
        return out
    out[:] = np.array([122, 116, 104], np.uint8)[:, None, None]
    out[:, top:top + h, left:left + w] = rgb.transpose(2, 0, 1)
    return out

@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write to; it becomes `path` at the end: a killed write never looks finished."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    yield part
    os.replace(part, path)

def write_video(path: str | os.PathLike, frames: np.ndarray, fps: int, gop: int = 12):
    """uint8 (N, H, W, 3) -> mp4 (mpeg4, 400 kbit/s)."""
    with atomic_write(path) as part, av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 400_000
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())

# ------------------------------------------------------------------------------------------------- manifests
def read_manifest(path: str | os.PathLike, root: str | os.PathLike | None = None,
                  allow_outside: bool = False, skip: bool = True) -> list[dict]:
    """Rows of a JSON-lines manifest, checked, with every video path made absolute. Paths count from `root`
    (default: the manifest's folder) and must stay inside it, links resolved, unless allow_outside. Rows on
    the skip list that `data.py check` left beside it are left out, and counted."""
    path = Path(path)
    base = Path(os.path.realpath(root or path.parent))
    rows = []
    try:
        lines = path.read_text().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    lines = [] if lines == [""] else lines
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}): one object a line") from None
        rows.append(_check_row(row, where, base, allow_outside))
    if skip and (bad := path.with_suffix(".bad.jsonl")).is_file():
        wrong = {entry["id"]: {_real(str(base), video) for video in entry["videos"]}
                 for entry in map(json.loads, bad.read_text().splitlines())}
        kept = [row for row in (_without(row, wrong.get(row["id"], ())) for row in rows) if row]
        if wrong:
            print(f"{bad}: {len(rows) - len(kept)} of {len(rows)} rows are left out, and bad exo views of "
                  f"others; after a change of the files run data.py check again")
        rows = kept
    if not rows:
        raise DataError(f"{path} is empty: it needs one JSON object a line")
    return rows

def _without(row: dict, videos: Sequence[str]) -> dict | None:
    """A row without its bad exo views; None if its ego clip is bad, or no exo view is left."""
    kept = [clip for clip in row.get("exo", []) if clip["video"] not in videos]
    if row.get("ego", {}).get("video") in videos or row.get("exo") and not kept:
        return None
    return row | {"exo": kept} if "exo" in row else row

def clips_of(row: dict) -> list[dict]:
    """A row's clips, ego before exo."""
    return ([row["ego"]] if "ego" in row else []) + row.get("exo", [])

@cache
def _real(base: str, video: str) -> str:
    """An absolute path with its links resolved; a video is named by many rows."""
    return os.path.realpath(os.path.join(base, video))

def _check_row(row, where: str, base: Path, allow_outside: bool) -> dict:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise DataError(f'{where} lacks "id" (a string)')
    if not isinstance(row.get("exo", []), list):
        raise DataError(f'{where}: "exo" must be a list of clips')
    if not isinstance(row.get("text", ""), str):
        raise DataError(f'{where}: "text" must be a string')
    for clip in clips_of(row):
        if not isinstance(clip, dict) or not isinstance(clip.get("video"), str):
            raise DataError(f'{where}: a clip lacks "video" (a path)')
        times = [clip.get(key) for key in ("start", "end")]
        if not all(t is None or isinstance(t, (int, float)) and math.isfinite(t) for t in times):
            raise DataError(f'{where}: "start" and "end" are seconds, got {times}')
        if None not in times and not times[0] < times[1]:
            raise DataError(f"{where}: {clip['video']} from {times[0]} to {times[1]} s has zero length")
        if not isinstance(fps := clip.get("fps", 1), (int, float)) or not 0 < fps < 1000:
            raise DataError(f'{where}: "fps" is {fps!r}: images a second, more than 0')
        real = _real(str(base), clip["video"].replace("\0", "?"))
        if not allow_outside and not real.startswith(os.path.join(base, "")):
            raise DataError(f"{where}: {clip['video']} is outside {base}: pass --root or --allow-outside")
        clip["video"] = real
    turns = row.get("turns", [])
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("user"), str)
                                              and isinstance(t.get("assistant"), str) for t in turns):
        raise DataError(f'{where}: "turns" is a list of {{"user": ..., "assistant": ...}}')
    return row

def write_text_atomic(path: str | os.PathLike, text: str):
    """A text file that is never seen half written."""
    with atomic_write(path) as part:
        part.write_text(text)

def write_jsonl(path: str | os.PathLike, rows: list[dict]):
    """Rows as JSON lines."""
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))

@contextmanager
def file_lock(path: str | os.PathLike, wait: bool):
    """Hold a lock file (a POSIX record lock: gone with its process, even after kill -9). Without `wait` a
    second holder is refused by the first one's pid."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            file.seek(0)
            raise DataError(f"{Path(path).parent} is in use by process {file.read().strip() or '?'}: wait "
                            f"for it, or choose another --out") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

# ------------------------------------------------------------------------------------------------------ text
class Tokenizer:
    """A sentencepiece vocabulary and Mistral-Instruct's chat template; every checkpoint holds its own:
    <s>[INST] <video> question [/INST] answer</s>[INST] question [/INST] answer</s>"""
    def __init__(self, path: str | os.PathLike):
        """`path`: a sentencepiece tokenizer.model, or a folder that holds one."""
        self.path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no tokenizer at {self.path}: it should be a sentencepiece tokenizer.model")
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        self.bos, self.eos, self.size = self.sp.bos_id(), self.sp.eos_id(), self.sp.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Text to ids, without <s> or </s>; control tokens written out in the text stay plain text."""
        return self.sp.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; VIDEO and control tokens vanish."""
        return self.sp.decode([int(i) for i in ids if i >= 0])

    def chat(self, turns: Sequence[dict], video_tokens: int) -> tuple[list[int], list[int]]:
        """Turns {"user", "assistant"[, "system"]} -> ids and labels. `<video>` (put first if no turn has it)
        becomes `video_tokens` VIDEO ids. Supervised: the assistant's tokens and their closing </s>, nothing
        else. A last turn without "assistant" is a prompt to be continued."""
        marks = sum(turn["user"].count("<video>") for turn in turns)
        if marks > (video_tokens > 0):
            raise ValueError(f"{marks} <video> marks in the user turns: one at most, none without a video")
        ids, labels = [self.bos], [IGNORE]
        for i, turn in enumerate(turns):
            user = turn["user"] if i or marks or not video_tokens else "<video>\n" + turn["user"]
            if "system" in turn:                                # Mistral has no such role
                user = f"{turn['system']}\n\n{user}"
            for j, chunk in enumerate(f"[INST] {user} [/INST]".split("<video>")):
                prompt = [VIDEO] * (video_tokens if j else 0) + self.encode(chunk)
                ids, labels = ids + prompt, labels + [IGNORE] * len(prompt)
            if "assistant" in turn:
                answer = self.encode(turn["assistant"]) + [self.eos]
                ids, labels = ids + answer, labels + answer
        return ids, labels


# --------------------------------------------------------------------------------------------------- loading
@dataclass
class Batch:
    """One micro batch of E ego clips (moments), X exo clips and S packed texts."""
    ego: Tensor | None                  # (E, T, 3, S, S) uint8
    exo: Tensor | None                  # (X, T, 3, S, S) uint8
    ego_of: Tensor                      # (X,) the moment that each exo clip shows
    ids: Tensor                         # (tokens,) packed
    labels: Tensor                      # (tokens,) IGNORE where not supervised
    weights: Tensor                     # (tokens,) for how many samples a supervised token counts, else 0
    lens: list[int]                     # tokens of each text
    text_of: Tensor                     # (S,) the moment that each text tells; a moment may have none
    samples: int
    names: list[str]                    # of the moments
    texts: list[str]                    # their narrations
    skipped: list[str]                  # samples that could not be read, with the reason

    def __getstate__(self) -> dict:
        """Workers hand frames over in shared memory, the rest by value, cheaper than a descriptor each."""
        return {k: v.numpy() if isinstance(v, Tensor) and v.dim() == 1 else v for k, v in vars(self).items()}

    def __setstate__(self, state: dict):
        for key, v in state.items():
            setattr(self, key, torch.from_numpy(v) if isinstance(v, np.ndarray) else v)

    def to(self, device) -> Batch:
        parts = (getattr(self, f.name) for f in fields(self))
        return Batch(*(p.to(device, non_blocking=True) if isinstance(p, Tensor) else p for p in parts))

    def pin_memory(self) -> Batch:
        """For a copy to the GPU that runs beside its work; torch's DataLoader calls this."""
        parts = (getattr(self, f.name) for f in fields(self))
        return Batch(*(p.pin_memory() if isinstance(p, Tensor) else p for p in parts))

class Loader:
    """Samples in an order that is a pure function of (seed, step, rank): resuming needs no state, and the
    global batch is the same for any number of ranks and micro batches.

    A sample is (row, exo view) for view="exo" and "pair", a row for view="ego"; the views of a row are
    adjacent. `text` picks what is supervised: "text" narrates, "turns" answers (a row without turns
    narrates), "mix" takes turns; view="text" reads no video at all.
    """
    def __init__(self, rows: list[dict], cfg: ModelConfig, tokenizer: Tokenizer, *, view: str,
                 text: str = "text", batch: int, micro: int | None = None, seed: int = 0, rank: int = 0,
                 world: int = 1, train: bool = True, video_tokens: int | None = None):
        def told(row):
            return view == "pair" or row.get("text") or text == "turns" and row.get("turns")
        if train and 0 < (silent := sum(not told(row) for row in rows)) < len(rows):
            print(f"{silent} of {len(rows)} rows have no text: left out, only stage 2 uses them")
            rows = list(filter(told, rows))
        self.rows, self.cfg, self.tokenizer, self.view, self.text = rows, cfg, tokenizer, view, text
        self.batch_size, self.micro = batch, micro or max(1, batch // world)
        self.seed, self.train, self.rank, self.world = seed, train, rank, world
        self.video_tokens = cfg.visual_tokens if video_tokens is None else video_tokens
        if batch % (self.micro * world):
            raise DataError(f"--batch {batch} is no multiple of {self.micro} (--micro-batch) x {world} ranks")
        need = {"exo": ("exo",), "ego": ("ego",), "pair": ("ego", "exo"), "text": ()}[view]
        for row in rows:
            for key in need + (() if told(row) else ("text",)):
                if not row.get(key):
                    raise DataError(f'row {row["id"]!r} lacks "{key}", which this stage needs')
        self.views = np.array([len(row["exo"]) if view in ("exo", "pair") else 1 for row in rows])
        self.samples = int(self.views.sum())
        self._epoch = (None, None)

    def sample(self, index: int) -> tuple[int, int]:
        """Global sample number -> (row, view)."""
        epoch, place = divmod(index, self.samples)
        if self._epoch[0] != epoch:
            order = np.arange(len(self.rows))
            if self.train:
                order = np.random.default_rng([self.seed, epoch]).permutation(order)
            row_of = np.repeat(order, self.views[order])
            first = np.repeat(np.cumsum(self.views[order]) - self.views[order], self.views[order])
            self._epoch = (epoch, np.stack([row_of, np.arange(self.samples) - first], 1))
        row, view = self._epoch[1][place]
        return int(row), int(view)

    def batch(self, step: int) -> list[Batch]:
        """The micro batches of this rank at this step. In evaluation the last batch may be short."""
        first = step * self.batch_size
        last = first + self.batch_size if self.train else min(first + self.batch_size, self.samples)
        chunks = range(self.rank, self.batch_size // self.micro, self.world)
        spans = [(first + c * self.micro, min(first + (c + 1) * self.micro, last)) for c in chunks]
        return [self.micro_batch(range(a, b)) for a, b in spans if a < b]

    def micro_batch(self, indices: range) -> Batch:
        """Read the clips of these samples; one that cannot be read is named and replaced by a real one."""
        moments, skipped, ego, exo, ego_of = {}, [], [], [], []     # moments: key -> [row, samples, prompt]
        for index in indices:
            key, row, clips = self._read(index, moments, skipped)
            if key not in moments:
                moments[key] = [row, 0, self.prompt(row, index)]
                ego += [clips["ego"]] if "ego" in clips else []
            moments[key][1] += 1
            exo += [clips["exo"]] if "exo" in clips else []
            ego_of.append(list(moments).index(key))
        rows, repeats, prompts = zip(*moments.values())
        ids, labels = ([token for prompt in prompts for token in prompt[k]] for k in (0, 1))
        weights = [n * (label != IGNORE) for n, (_, labels_) in zip(repeats, prompts) for label in labels_]
        told = [i for i, (text, _) in enumerate(prompts) if text]
        return Batch(
            torch.from_numpy(np.stack(ego)) if ego else None,
            torch.from_numpy(np.stack(exo)) if exo else None,
            torch.tensor(ego_of), torch.tensor(ids, dtype=torch.long), torch.tensor(labels, dtype=torch.long),
            torch.tensor(weights, dtype=torch.float32), [len(prompts[i][0]) for i in told],
            torch.tensor(told, dtype=torch.long), len(indices), [row["id"] for row in rows],
            [row.get("text", "") for row in rows], skipped)

    def _read(self, index: int, moments: dict, skipped: list) -> tuple[tuple, dict, dict[str, np.ndarray]]:
        """-> the moment's key, its row, and the frames it still lacks."""
        for attempt in range(10):
            number = index
            if attempt:                     # a substitute: a pure function of seed, sample and attempt
                number = int(np.random.default_rng([self.seed, index, attempt]).integers(self.samples))
            place, view = self.sample(number)
            row, draw = self.rows[place], (self.seed, number // self.samples, place)
            key = (*draw, index) if self.view == "exo" else draw    # views of a narration share its moment
            clips = {}
            if self.view in ("ego", "pair") and key not in moments:
                clips["ego"] = row["ego"]
            if self.view in ("exo", "pair"):
                clips["exo"] = row["exo"][view]
            try:                            # one draw of moments for all views: they are synchronized
                return key, row, {name: read_clip(
                    clip["video"], clip.get("start"), clip.get("end"), self.cfg.frames, self.cfg.image_size,
                    np.random.default_rng(draw) if self.train else None, clip.get("fps"))
                    for name, clip in clips.items()}
            except DataError as error:
                skipped.append(f"{row['id']}: {error}")
        raise DataError(f"ten samples in a row cannot be read, the last: {skipped[-1]}")

    def prompt(self, row: dict, index: int = 0) -> tuple[list[int], list[int]]:
        """ids and labels of a row; empty for a row without text."""
        if row.get("turns") and (self.text == "turns" or self.text == "mix" and index % 2):
            ids, labels = self.tokenizer.chat(row["turns"], self.video_tokens)
        elif row.get("text"):
            turn = {"user": NARRATE, "assistant": row["text"]}
            ids, labels = self.tokenizer.chat([turn], self.video_tokens)
        else:
            return [], []
        if len(ids) > self.cfg.max_length:
            raise DataError(f"row {row['id']!r} has {len(ids)} tokens, over {self.cfg.max_length}: shorten")
        return ids, labels

    def __getitem__(self, step: int) -> list[Batch] | ValueError:
        """What torch's DataLoader asks a worker for: an error raised there would be a traceback."""
        try:
            return self.batch(step)
        except ValueError as error:
            return error

    def stream(self, start: int, stop: int, workers: int = 1, repeat: bool = False,
               timeout: float = 600) -> Iterator[list[Batch]]:
        """batch(start) ... batch(stop - 1), read ahead by workers, which have `timeout` seconds for each;
        `repeat`: batch(0) every time."""
        steps = [0] * (stop - start) if repeat else range(start, stop)
        loader = torch.utils.data.DataLoader(
            self, sampler=steps, batch_size=None, num_workers=workers,
            worker_init_fn=_start_worker, prefetch_factor=2 if workers else None,
            pin_memory=torch.cuda.is_available(), timeout=timeout if workers else 0,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None)
        return map(_or_raise, iter(loader))

def _or_raise(item):
    if isinstance(item, ValueError):
        raise copy.copy(item)           # the traceback of `item` would hold `item` itself, and so the workers
    return item

def _start_worker(_):
    for number in (signal.SIGTERM, signal.SIGINT):              # launchers signal the whole group: the rank
        signal.signal(number, signal.SIG_IGN)                   # still needs its batches to end the step
    torch.set_num_threads(1)
    die_with_parent()

def _end_workers():
    """At exit, before multiprocessing sends the SIGTERM that they ignore, and waits for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)               # torch's handler would call it a failure
    for worker in (child for child in multiprocessing.active_children() if child.daemon):
        worker.kill()
multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)

def die_with_parent():
    """End this process within two seconds of its parent's death: kill -9 must not leave orphans."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()

def worker_pool():
    """A process a core; none outlives its parent."""
    method = "fork" if sys.platform == "linux" else "spawn"
    return multiprocessing.get_context(method).Pool(os.cpu_count(), initializer=die_with_parent)

def progress(items: Iterator, total: int, what: str) -> Iterator:
    """Pass items on, with a line that says how many, how fast, and how long it will take."""
    began = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown > 0.5 or done == total:
            shown, rate = time.monotonic(), done / max(time.monotonic() - began, 1e-9)
            print(f"\r{done}/{total} {what}, {rate:.1f} a second, {(total - done) / rate:.0f} s left   ",
                  end="" if done < total else "\n", flush=True)

# --------------------------------------------------------------------------------------------- looking at it
GLYPHS = " abcdefghijklmnopqrstuvwxyz0123456789.,:?!'-()/"  # 5 x 8 dots each, a byte a column, low bit on top
FONT = np.unpackbits(np.frombuffer(bytes.fromhex(
    "0000000000" "2054547840" "7f28444438" "3844444428" "384444287f" "3854545418" "00087e0902" "18a4a49c78"
    "7f08040478" "00447d4000" "2040403d00" "7f10284400" "00417f4000" "7c04780478" "7c08040478" "3844444438"
    "fc18242418" "18242418fc" "7c08040408" "4854545424" "04043f4424" "3c4040207c" "1c2040201c" "3c4030403c"
    "4428102844" "4c9090907c" "4464544c44" "3e5149453e" "00427f4000" "7249494946" "2141494d33" "1814127f10"
    "2745454539" "3c4a494931" "4121110907" "3649494936" "464949291e" "0000606000" "0080703000" "0000140000"
    "0201590906" "00005f0000" "0008070300" "0808080808" "001c224100" "0041221c00" "2010080402"),
    np.uint8).reshape(-1, 5, 1), axis=2, bitorder="little").astype(bool)

def write_line(canvas: np.ndarray, text: str, top: int, left: int, colour):
    """Draw lower-case text on (H, W, 3) uint8, in place; what does not fit is left off."""
    for char in text.lower():
        glyph = FONT[max(GLYPHS.find(char), 0)].T                           # (8, 5)
        area = canvas[top:top + 8, left:left + 5]
        area[glyph[:area.shape[0], :area.shape[1]]] = colour
        left += 6

def contact_sheet(path: str | os.PathLike, items: list[tuple[list, list]], columns: int = 2):
    """A PNG of items: clips (T, 3, S, S) as rows of frames, one above another; lines of (text, RGB)."""
    tiles = []
    for clips, lines in items:
        zoom = max(1, 96 // clips[0].shape[-1])
        strips = [rearrange(clip, "t c h w -> h (t w) c").repeat(zoom, 0).repeat(zoom, 1) for clip in clips]
        room = strips[0].shape[1] // 6 - 1
        lines = [(part, ink) for line, ink in lines for part in textwrap.wrap(line, room)]
        text = np.full((12 * len(lines) + 8, strips[0].shape[1], 3), 255, np.uint8)
        for i, (line, ink) in enumerate(lines):
            write_line(text, line, 4 + 12 * i, 2, ink)
        tiles.append(np.pad(np.concatenate(strips + [text]), ((0, 8), (0, 8), (0, 0)), constant_values=255))
    height = max(tile.shape[0] for tile in tiles)
    tiles = [np.pad(t, ((0, height - t.shape[0]), (0, 0), (0, 0)), constant_values=255) for t in tiles]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    sheet = rearrange(np.stack(tiles), "(r c) h w k -> (r h) (c w) k", c=columns)
    Path(path).write_bytes(encode_png(sheet))

def encode_png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> PNG, through FFmpeg's encoder."""
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return b"".join(bytes(packet) for packet in codec.encode(frame) + codec.encode(None))

# ------------------------------------------------------------------------------------------- the micro-world
# A table, two blocks, two hands, nine actions. A scene is one mp4 of five one-second clips. The exo
# camera stands opposite the actor (left and right swapped, the actor's body in view); the ego camera rides on
# the head: it follows the hands late, walks, rolls and zooms, and big hands cover what they do. Sizes were
# tuned by trial (our choice).
FPS, CLIP_FRAMES, CLIPS, SIDE = 8, 8, 5, 48
COLOURS = {"red": (214, 54, 48), "green": (40, 150, 70), "blue": (48, 90, 214), "yellow": (250, 216, 50),
           "purple": (190, 64, 190)}
PATTERNS = ("plain", "striped", "dotted")
VERBS = {"picks up": "pick up", "puts down": "put down", "pushes": "push", "pulls": "pull", "cuts": "cut",
         "hammers": "hammer", "wipes": "wipe", "waters": "water", "taps": "tap"}
GERUNDS = {"picks up": "picking up", "puts down": "putting down", "pushes": "pushing", "pulls": "pulling",
           "cuts": "cutting", "hammers": "hammering", "wipes": "wiping", "waters": "watering",
            "taps": "tapping"}
SKIN, SLEEVE, SHADOW, WOOD = (236, 188, 150), (70, 86, 122), (60, 52, 48), (196, 164, 128)
BLOCK = (0.3, 0.25)             # half width and half depth, table units
REST = {"left": (-0.62, 0.0), "right": (0.62, 0.0)}        # where an idle hand lies, in table units

@dataclass(frozen=True)
class World:
    """The knobs of the micro-world: clips a split (no scene is in two), then what the study turns."""
    seed: int = 0               # of all scenes
    corpus: int = 5000          # exo clips from any angle, narrated: the stand-in for VideoLLaMA2's corpora
    ego: int = 1000             # ego clips, narrated: the stand-in for EgoClip
    pairs: int = 1200           # synchronized ego + exo clips, narrated: the stand-in for Ego-ExoClip
    instruct: int = 1000        # ego clips with a question and answer: the stand-in for EgoIT
    val: int = 600              # ego + exo: for choices
    test: int = 2000            # ego + exo: for results of the learner
    exo_test: int = 1000        # exo: for results of the demonstrator
    exo_cams: int = 2           # fixed exo cameras of a training pair
    noise: float = 1.0          # head motion, roll, zoom and light of the ego camera, 0 = a steady head
    fov: float = 1.0            # field of view of the ego camera; smaller sees less
    scale: float = 1.0          # multiplies the training clips
    narrated: float = 1.0       # share of the pairs that have a text: synchronized video is the cheaper part

SPLITS = {"corpus": ("exo",), "ego": ("ego",), "pairs": ("ego", "exo"), "instruct": ("ego",),
          "val": ("ego", "exo"), "test": ("ego", "exo"), "exo_test": ("exo",)}

def plan_scene(rng: np.random.Generator) -> dict:
    """Two blocks of different colours, five different moments: what the scene's narrations will say."""
    colours = rng.permutation(list(COLOURS))[:2]
    blocks = [(str(c), str(rng.choice(PATTERNS))) for c in colours]
    places = np.stack([np.array([-0.44, 0.44]) + rng.uniform(-0.08, 0.08, 2), rng.uniform(0.42, 0.64, 2)], 1)
    moments = []
    while len(moments) < CLIPS:
        moment = (str(rng.choice(list(VERBS))), int(rng.integers(2)), str(rng.choice(["left", "right"])))
        if moment not in moments:
            moments.append(moment)
    return {"blocks": blocks, "places": places, "moments": moments}

def narration(verb: str, colour: str, pattern: str, hand: str) -> str:
    """What the scene's moment is: 9 x 5 x 3 x 2 = 270 possible sentences."""
    return f"Camera-verbalise_wearer {verb} the {colour} {pattern} block with the {hand} hand."

def questions(verb: str, colour: str, pattern: str, hand: str, rng: np.random.Generator) -> list[dict]:
    """EgoIT's style: a question of the verbalise_wearer, answered in the first person."""
    asked = verb if rng.random() < 0.5 else str(rng.choice([v for v in VERBS if v != verb]))
    pairs = [
        (NARRATE, narration(verb, colour, pattern, hand)),
        ("What am I doing?", f"I {VERBS[verb]} the {colour} {pattern} block with the {hand} hand."),
        ("Which hand am I using?", f"The {hand} hand."),
        ("What colour is the block I use?", f"It is {colour}."),
        ("What pattern does the block I use have?", f"It is {pattern}."),
        ("What do I do to the block?", f"I {VERBS[verb]} it."),
        (f"Am I {GERUNDS[asked]} the block?", "Yes." if asked == verb else "No.")]
    return [{"user": q, "assistant": a} for q, a in pairs]

class Camera:
    """An affine camera per frame: pixel = origin + M (x, y) - lift * height, table units, x right, y away."""
    def __init__(self, centre, angle, zoom, tilt: float):
        frames = len(centre)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.stack([np.stack([cos, -sin], -1), np.stack([-sin * tilt, -cos * tilt], -1)], -2)
        self.m = (turn * (zoom * SIDE / 2)[:, None, None]).astype(np.float32)          # (F, 2, 2)
        self.inverse = np.linalg.inv(self.m)
        self.scale = zoom * SIDE / 2
        self.lift = self.scale * 0.6
        self.origin = np.full((frames, 2), SIDE / 2) - np.einsum("fij,fj->fi", self.m, centre)

    def pixels(self, points: np.ndarray, height=0.0) -> np.ndarray:
        """(F, 2) table points -> (F, 2) pixels."""
        at = self.origin + np.einsum("fij,fj->fi", self.m, points)
        at[:, 1] -= self.lift * height
        return at

def exo_camera(frames: int, azimuth: float, zoom: float) -> Camera:
    """Stands opposite the actor, looks slightly down and never moves."""
    full = np.ones(frames)
    return Camera(np.tile([0.0, 0.36], (frames, 1)), full * (np.pi + azimuth), full * zoom, tilt=0.8)

def ego_camera(hand: np.ndarray, world: World, rng: np.random.Generator) -> Camera:
    """Rides on the head: the gaze follows the acting hand late, and the head walks, rolls and zooms."""
    frames, n = len(hand), world.noise
    steady = [rng.normal(0, spread * n, (frames // CLIP_FRAMES, 2)) for spread in (0.08, 0.12, 0.08)]
    aim, roll, zoom = (value.repeat(CLIP_FRAMES, 0) for value in steady)            # one draw a clip
    walk = aim + 0.4 * rng.normal(0, 0.03 * n, (frames, 2)).cumsum(0)
    roll = roll[:, 0] + rng.normal(0, 0.02 * n, frames)
    zoom = (1.25 + zoom[:, 0]) / world.fov
    gaze = np.empty_like(hand)
    for i in range(frames):
        if i % CLIP_FRAMES == 0:
            late = 0.5 * hand[i] + (0, 0.25)
        late = 0.7 * late + 0.3 * (0.6 * hand[i] + (0, 0.22))
        gaze[i] = late
    return Camera(gaze + walk, roll, zoom, tilt=0.95)

class Canvas:
    """RGB frames (F, 48, 48, 3), and the one way to draw on them: a soft-edged shape around a point."""
    def __init__(self, background: np.ndarray, frames: int):
        self.rgb = np.empty((frames, SIDE, SIDE, 3), np.float32)
        self.rgb[:] = background

    def stamp(self, camera: Camera, at: np.ndarray, which: np.ndarray, radius: float, shape, colour):
        """Blend `colour` where `shape(x, y)` (distance to the edge in table units, negative inside) covers
        the window around pixels `at` (F, 2) of the frames `which`. colour: RGB, or a function of (x, y) ->
        (..., 3)."""
        half = min(int(np.ceil(radius * camera.scale.max())) + 1, SIDE // 2)
        centre = np.rint(at[which]).astype(int)
        if half == SIDE // 2:  # larger than the picture: the window is the picture
            centre[:] = SIDE // 2
        inside = (np.abs(centre - SIDE // 2) < SIDE // 2 + half).all(1)
        which, centre = which[inside], centre[inside]
        span = np.arange(-half, half + 1)
        cols, rows = centre[:, 0, None] + span, centre[:, 1, None] + span               # (f, k)
        dx = (cols - at[which, 0, None]).astype(np.float32)[:, None, :]
        dy = (rows - at[which, 1, None]).astype(np.float32)[:, :, None]
        inv = camera.inverse[which][:, :, :, None, None]
        x, y = inv[:, 0, 0] * dx + inv[:, 0, 1] * dy, inv[:, 1, 0] * dx + inv[:, 1, 1] * dy
        cover = 0.5 - shape(x, y) * camera.scale[which, None, None].astype(np.float32)
        rows_in, cols_in = ((0 <= line) & (line < SIDE) for line in (rows, cols))   # may hang over the edge
        f, r, c = np.nonzero((cover > 0) & rows_in[:, :, None] & cols_in[:, None, :])   # paint no others
        cover = np.minimum(cover[f, r, c], 1)[:, None]
        paint = colour(x[f, r, c], y[f, r, c]) if callable(colour) else np.array(colour, np.float32)
        index = which[f], rows[f, r], cols[f, c]
        self.rgb[index] += cover * (paint - self.rgb[index])

    def frames(self, gain=1.0) -> np.ndarray:
        """uint8 (F, 48, 48, 3)."""
        return np.clip(self.rgb * gain, 0, 255).astype(np.uint8)

    def hold(self):
        """Everything drawn so far (in frame 0) stays: the still background of a fixed camera."""
        self.rgb[1:] = self.rgb[0]

def disc(r: float):
    """Distance to a disc's edge, negative inside; as all shapes, in table units."""
    return lambda x, y: np.sqrt(x * x + y * y) - r

def box(w: float, h: float):
    """Distance to the edge of a box of these half sizes."""
    return lambda x, y: np.maximum(np.abs(x) - w, np.abs(y) - h)

def limb(reach: np.ndarray, r: float):
    """A capsule from -reach to +reach (F, 2), which differs per frame."""
    dx, dy = reach.astype(np.float32).T[:, :, None, None]

    def distance(x, y):
        t = np.clip((x * dx + y * dy) / (dx * dx + dy * dy + 1e-6), -1, 1)
        return np.sqrt((x - t * dx) ** 2 + (y - t * dy) ** 2) - r
    return distance

def block_paint(colour: str, pattern: str):
    """Plain, with white stripes, or with dark dots: large enough to be read at 48 pixels."""
    base = np.array(COLOURS[colour], np.float32)

    def paint(x, y):
        if pattern == "plain":
            return np.broadcast_to(base, x.shape + (3,))
        if pattern == "striped":
            mark, ink = np.clip(0.5 + (np.abs(np.mod(x, 0.24) - 0.12) - 0.06) * 24, 0, 1), 250.0
        else:
            u, v = np.abs(np.abs(x) - 0.15), np.abs(np.abs(y) - 0.12)
            mark, ink = np.clip(0.5 - (np.sqrt(u * u + v * v) - 0.08) * 24, 0, 1), 20.0
        return base + mark[..., None] * (ink - base)
    return paint

def act(plan: dict, rng: np.random.Generator) -> dict:
    """Motion of the scene, frame by frame: hands (F, 2) and heights (F,), blocks, the tool of each clip."""
    frames = CLIPS * CLIP_FRAMES
    hands = {side: np.array(rest) + rng.normal(0, 0.01, (frames, 2)) for side, rest in REST.items()}
    lift = {side: np.zeros(frames) for side in REST}
    blocks = np.tile(plan["places"][:, None], (1, frames, 1))                         # (2, F, 2)
    height, gap = np.zeros((2, frames)), np.zeros((2, frames))
    tools = []
    for clip, (verb, target, side) in enumerate(plan["moments"]):
        f = np.arange(clip * CLIP_FRAMES, (clip + 1) * CLIP_FRAMES)
        t = (np.arange(CLIP_FRAMES) + rng.uniform(0, 0.6)) / CLIP_FRAMES
        t = np.minimum(t, 1) ** rng.uniform(0.8, 1.25)
        home = plan["places"][target]
        spot = home + (0.05 if side == "right" else -0.05, -0.32)
        beat = np.sin(t * 2 * np.pi * rng.uniform(1.7, 2.3) + rng.uniform(0, 6)) * 0.5 + 0.5
        hands[side][f] = spot
        if verb in ("picks up", "puts down"):
            rise = t if verb == "picks up" else 1 - t
            height[target, f] = lift[side][f] = 0.75 * rise
        elif verb in ("pushes", "pulls"):
            move = (t if verb == "pushes" else 1 - t)[:, None] * (0, 0.42) - (0, 0.16)
            blocks[target, f] = home + move
            hands[side][f] = spot + move
        elif verb == "cuts":
            gap[target, f] = 0.16 * t
            lift[side][f] = 0.1 + 0.12 * beat
        elif verb == "wipes":
            phase = t * 2 * np.pi * 1.2 + rng.uniform(0, 6)
            hands[side][f] = spot + np.stack([0.2 * np.cos(phase), 0.08 + 0.1 * np.sin(phase)], 1)
        elif verb in ("hammers", "taps"):
            lift[side][f] = 0.35 * beat
        else:
            lift[side][f] = 0.4
        tools.append((verb, target, side, f, beat))
    return {"hands": hands, "lift": lift, "blocks": blocks, "height": height, "gap": gap, "tools": tools}

def render(plan: dict, motion: dict, camera: Camera, ego: bool, wall, gain=1.0) -> np.ndarray:
    """The scene through one camera, painter's order -> uint8 (40, 48, 48, 3)."""
    frames = CLIPS * CLIP_FRAMES
    every = np.arange(frames)
    canvas = Canvas(np.array(wall, np.float32), frames)
    table = np.tile([0.0, 0.45], (frames, 1))
    canvas.stamp(camera, camera.pixels(table), every if ego else every[:1], 1.6, box(1.05, 0.62), WOOD)
    if not ego:                                                 # the demonstrator is seen: body, head
        for at, shape, colour in (((0.0, -0.36), box(0.42, 0.2), SLEEVE), ((0.0, -0.62), disc(0.2), SKIN)):
            canvas.stamp(camera, camera.pixels(np.tile(at, (frames, 1))), every[:1], 0.6, shape, colour)
        canvas.hold()
    order = np.argsort(plan["places"][:, 1])
    for b in order if not ego else order[::-1]:
        where = (motion[key][b] for key in ("blocks", "height", "gap"))
        _draw_block(canvas, camera, plan["blocks"][b], *where)
    for side in ("left", "right"):
        hand, up = motion["hands"][side], motion["lift"][side]
        shoulder = np.array([(-0.36 if side == "left" else 0.36), -0.3 if not ego else -0.75])
        size = 0.15 if ego else 0.12
        at = camera.pixels(hand, up)
        sleeve = 0.5 * (shoulder + hand)
        arm = limb(0.5 * (shoulder - hand), 0.7 * size)
        canvas.stamp(camera, camera.pixels(sleeve, 0.5 * up), every, 0.75, arm, SLEEVE)
        canvas.stamp(camera, at, every, 0.25, disc(size), SKIN)
        for verb, target, who, f, beat in motion["tools"]:
            if who == side:
                _draw_tool(canvas, camera, verb, hand, up, f, beat, motion["blocks"][target])
    return canvas.frames(gain)

def _draw_block(canvas, camera, look, place, height, gap):
    every, (w, h) = np.arange(len(place)), BLOCK
    canvas.stamp(camera, camera.pixels(place), every[height > 0.02], 0.5, box(0.85 * w, 0.85 * h), SHADOW)
    canvas.stamp(camera, camera.pixels(place, height), every[gap == 0], 0.5, box(w, h), block_paint(*look))
    for sign in (-1, 1):                                        # cut: two halves drift apart
        half = place + np.stack([sign * (0.5 * w + gap), np.zeros_like(gap)], 1)
        canvas.stamp(camera, camera.pixels(half), every[gap > 0], 0.5, box(0.48 * w, h), block_paint(*look))

TOOLS = {   # verb: what the hand holds, as (offset ahead of the hand, half width, half height, colour)
    "cuts": ((0.2, 0.05, 0.1, (40, 40, 44)), (0.42, 0.06, 0.22, (232, 238, 246))),
    "hammers": ((0.2, 0.04, 0.16, (120, 76, 40)), (0.37, 0.2, 0.1, (52, 54, 60))),
    "wipes": ((0.2, 0.17, 0.12, (250, 150, 190)),),
    "waters": ((0.2, 0.15, 0.12, (60, 190, 190)),)}

def _draw_tool(canvas, camera, verb, hand, up, f, beat, block):
    for ahead, w, h, colour in TOOLS.get(verb, ()):
        canvas.stamp(camera, camera.pixels(hand + (0, ahead), up), f, 0.3, box(w, h), colour)
    if verb == "waters":
        for i in range(3):
            fall = np.zeros(len(hand))
            fall[f] = 0.4 * np.mod(beat + i / 3, 1)
            drop = camera.pixels(block + (0.09 * (i - 1), 0.05), fall)
            canvas.stamp(camera, drop, f, 0.12, disc(0.055), (170, 226, 255))

def make_scene(world: World, split: str, scene: int, out: Path) -> list[dict]:
    """Render one scene's videos and return its rows. A pure function of (seed, split, scene)."""
    rng = np.random.default_rng([world.seed, list(SPLITS).index(split), scene])
    plan = plan_scene(rng)
    motion = act(plan, rng)
    frames, views = CLIPS * CLIP_FRAMES, {}
    wall = rng.uniform(150, 235, 3)
    if "exo" in SPLITS[split]:
        fixed = split != "corpus"
        cams = {"pairs": world.exo_cams}.get(split, 1)
        for cam in range(cams):
            if fixed:
                azimuth, zoom = (0.22 if cam % 2 == 0 else -0.22) + rng.normal(0, 0.03), 1.1
            else:
                azimuth, zoom = rng.uniform(-0.45, 0.45), rng.uniform(0.95, 1.15)
            look = (205, 214, 220) if fixed else wall
            views[f"cam{cam}"] = render(plan, motion, exo_camera(frames, azimuth, zoom), False, look)
    if "ego" in SPLITS[split]:
        acting = np.concatenate([motion["hands"][side][f] for _, _, side, f, _ in motion["tools"]])
        gain = 1 + rng.normal(0, 0.1 * world.noise, CLIPS).astype(np.float32)
        gain = gain.repeat(CLIP_FRAMES)[:, None, None, None]
        views["ego"] = render(plan, motion, ego_camera(acting, world, rng), True, wall, gain)
    for view, images in views.items():
        write_video(out / split / view / f"{scene}.mp4", images, FPS, gop=CLIP_FRAMES)
    rows = []
    for i, (verb, target, hand) in enumerate(plan["moments"]):
        span = {"start": i * CLIP_FRAMES / FPS, "end": (i + 1) * CLIP_FRAMES / FPS}
        clip = {view: {"video": f"{split}/{view}/{scene}.mp4", **span} for view in views}
        facts = (verb, *plan["blocks"][target], hand)
        # a test asks no narration
        asked = questions(*facts, rng)[0 if split in ("corpus", "instruct") else 1:]
        number = scene * CLIPS + i
        turn = asked[number % len(asked)]
        told = split != "pairs" or int((number + 1) * world.narrated) > int(number * world.narrated)
        row = {"id": f"{split}/{scene}/{i}"} | ({"text": narration(*facts), "turns": [turn]} if told else {})
        if "ego" in views:
            row["ego"] = clip.pop("ego")
        if clip:
            row["exo"] = list(clip.values())
        rows.append(row)
    return rows

def _scene_job(job):
    return make_scene(*job)

def toy_split(out: str | os.PathLike, split: str, world: World = World()) -> Path:
    """The manifest of one split of the micro-world, rendered when first needed (under a lock)."""
    out = Path(out)
    manifest = out / f"{split}.jsonl"
    with file_lock(out / ".lock", wait=True):
        _claim_world(out, world)
        if manifest.is_file():
            return manifest
        scale = 1 if split in ("val", "test", "exo_test") else world.scale
        scenes = max(1, round(getattr(world, split) * scale / CLIPS))
        jobs = [(world, split, scene, out) for scene in range(scenes)]
        rows = []
        with worker_pool() as pool:
            made = pool.imap(_scene_job, jobs, chunksize=4)
            for scene_rows in progress(made, scenes, f"scenes of {split}"):
                rows += scene_rows
        write_jsonl(manifest, rows)
    return manifest

def _claim_world(out: Path, world: World):
    """A folder holds one world: refuse other knobs by name."""
    file = out / "world.json"
    if not file.is_file():
        if others := [f for f in out.iterdir() if f.name[0] != "." and f.suffix != ".part"]:
            raise DataError(f"{others[0]} is there and no micro-world: choose a new folder, or pass a .jsonl")
        write_text_atomic(file, json.dumps(asdict(world)))
    made = asdict(toy_world(out))
    for key, value in asdict(world).items():
        if made[key] != value:
            raise DataError(f"{out} holds a world with {key}={made[key]}, not {value}: use another --out")

def toy_world(out: str | os.PathLike) -> World:
    """The knobs of the world in this folder (the defaults if it is not made yet)."""
    file = Path(out) / "world.json"
    return World(**json.loads(file.read_text())) if file.is_file() else World()

def manifest_of(data: str | os.PathLike, split: str) -> Path:
    """A manifest as it is (.jsonl), or a split of the micro-world in this folder, rendered if need be."""
    return Path(data) if Path(data).suffix == ".jsonl" else toy_split(data, split, toy_world(data))

def toy_tokenizer(out: str | os.PathLike, world: World) -> Path:
    """A sentencepiece BPE model with byte fallback (as Mistral's), trained on the text of the exo corpus."""
    path = Path(out) / "tokenizer.model"
    with file_lock(path.with_name(".tokenizer.lock"), wait=True):
        if path.is_file():
            return path
        rows = read_manifest(toy_split(out, "corpus", world))
        lines = [f"[INST] \n{turn['user']} [/INST] {turn['assistant']}" for row in rows
                 for turn in row["turns"] + [{"user": NARRATE, "assistant": row["text"]}]]
        with atomic_write(path) as part, open(part, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=file, vocab_size=PRESETS["toy"].vocab,
                model_type="bpe", byte_fallback=True, hard_vocab_limit=False, num_threads=1, minloglevel=2,
                normalization_rule_name="identity", remove_extra_whitespaces=False)
    return path

# ----------------------------------------------------------------------------- appendix: real data, converted
# A first reader can stop here.
# Each builder reads the files that a licence holder downloads and yields rows; sources and known traps are in
# its docstring. "Our choice" is what neither the paper nor the files settle: a flag of Build says it.
@dataclass(frozen=True)
class Build:
    """Flags of the builders; each builder takes the ones that concern it (BUILDERS)."""
    root: str                                       # where the data set was downloaded to; paths start here
    out: str                                        # the manifest to write
    split: str = "train"                            # of the data set's own
    alpha: str = "4.9"                              # EgoClip's scale in seconds, or "mean": of these takes
    allow_outside: bool = False                     # links may lead out of the root
    beta: Literal["annotator", "take"] = "annotator"        # whose narrations set the mean gap
    views: Literal["all", "best"] = "all"           # every exo camera, or the annotator's choice
    subject: Literal["C", "any"] = "C"              # whose actions: the camera verbalise_wearer's
    keep_unsure: bool = False                       # narrations that are marked as unsure
    keep_hidden: bool = False                       # narrations of what the ego camera does not see
    video_size: Literal["448", "full"] = "448"      # downscaled files where there are any
    prompt: Literal["base", "task", "cue"] = "cue"  # the paper's variants: + task details, + first-person cue
    chunk: float = 600                              # seconds of EgoVLP's video pieces; 0: whole videos
    file: str = ""                                  # of the conversations
    view: Literal["ego", "exo"] = "ego"             # what the videos of the conversations are

CUE = "This is my own view: I wear the camera."
EGOIT = {       # the instructions of EgoIT, our wording: task details, then ten for each source
    "egtea": ("Name one kitchen action, a verb and its object.", (
        "What am I doing?", "Which action do my hands perform?", "What am I doing in the kitchen right now?",
        "Name the action in this clip.", "Which step of cooking is this?", "Tell me what I just did.",
        "What do I do with the object in my hands?", "Label this clip with its action.",
        "What is happening at my hands?", "Describe my action in a few words.")),
    "ssv2": ("Say in one phrase what is done to which object.", (
        "What is being done here?", "What do the hands do with the object?", "Caption this short clip.",
        "Which action does this clip show?", "What happens to the object?", "Describe the motion.",
        "Name the interaction of hand and object.", "What did I just do?", "How is the object handled?",
        "Summarise the movement in a few words.")),
    "egotimeqa": ("Answer in at most five words.", (
        "Watch my video and answer: {}", "Think back to what I did. {}", "{}", "Here is what I recorded. {}",
        "Help me remember: {}", "Look at the whole clip before you answer. {}", "Question about my day: {}",
        "From what you saw: {}", "I forgot something. {}", "Use the video to answer. {}")),
    "openeqa": ("Answer with a short phrase about this place.", (
        "I walked through these rooms. {}", "{}", "Look around and answer: {}", "From this tour: {}",
        "You have seen what I saw. {}", "About the place in the video: {}", "Use what the walk shows. {}",
        "For someone who lives here: {}", "Remember the rooms. {}", "On my surroundings: {}")),
    "egoexolearn": ("Describe hands and objects in one sentence.", (
        "Describe what I am doing.", "What do my two hands do?", "Narrate this step.", "Caption this moment.",
        "Give a detailed account of this action.", "What am I working on, and how?", "How do I do this step?",
        "Tell me what you see me do.", "Explain my current step.", "Describe my actions precisely."))}

def instruction(source: str, key: str, prompt: str, question: str = "") -> str:
    """The user's turn: one of the source's ten, picked by the row's id, below what `prompt` puts first."""
    details, ten = EGOIT[source]
    ask = ten[zlib.crc32(key.encode()) % len(ten)].format(question)
    return "\n".join([CUE] * (prompt == "cue") + [details] * (prompt != "base") + [ask])

def taught(source: str, key: str, video: str, answer: str, o: Build, question: str = "", **clip) -> dict:
    """A row of EgoIT."""
    turn = {"user": instruction(source, key, o.prompt, question), "assistant": answer}
    return {"id": f"{source}/{key}", "ego": {"video": video, **clip}, "turns": [turn], "source": source}

MISSHAPEN = (LookupError, TypeError, ValueError, AttributeError, SyntaxError, csv.Error, RecursionError,
             MemoryError, OSError, av.FFmpegError)              # what reading a wrong file can raise

class Files:
    """The files of a data set, which always know the record they are at: errors name it."""
    def __init__(self, root: str, videos: str | None = None):
        """`videos`: a folder of their own, in which paths start."""
        self.root, self.where, self.count, self.videos = Path(root), root, Counter(), videos

    def text(self, *names: str) -> str:
        """Of the first of these files that exists."""
        path = next((self.root / n for n in names if (self.root / n).is_file()), self.root / names[0])
        self.where = str(path)
        if not path.is_file():
            raise DataError(f"{path} is missing: download it, or name the folder that has it")
        return path.read_text(encoding="utf-8-sig")

    def each(self, items: Iterable) -> Iterator:
        """Items of the file read last, one by one."""
        file = self.where
        for number, item in enumerate(items, 1):
            self.where = f"{file} record {number}"
            yield item

    def tolerant(self, records: Iterable, rows: Callable, most: float = 0.01) -> Iterator[dict]:
        """`rows(record)` of each record (of a list or tuple: its parts); bad ones are counted. More than
        `most` of them, or a bad first one, end it with the first one's error: the format is another."""
        bad, first, total = 0, None, 0
        for total, record in enumerate(self.each(records), 1):
            try:
                yield from list(rows(*record) if isinstance(record, (list, tuple)) else rows(record))
            except MISSHAPEN as error:
                bad, first = bad + 1, first or (self.where, error)
                if total == 1:
                    break
        self.count["bad record"] += bad
        if bad > most * total:
            self.where, error = first
            raise error

    def json(self, *names: str):
        """A JSON file."""
        return json.loads(self.text(*names))

    def lines(self, *names: str) -> Iterator[list[str]]:
        """The words of each line that has any."""
        return self.each(filter(None, map(str.split, self.text(*names).splitlines())))

    def table(self, *names: str, delimiter: str = ",") -> Iterator[dict]:
        """The rows of a CSV file, by the names in its first line; those with other lengths are counted."""
        quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        rows = csv.DictReader(io.StringIO(self.text(*names)), delimiter=delimiter, quoting=quoting)
        for row in self.each(rows):
            if None in row or None in row.values():
                self.count["malformed line"] += 1
            else:
                yield row

    def video(self, name: str) -> str:
        """A video's path from the root (or from `videos`): in `videos/` if that folder is there."""
        return f"videos/{name}" if not self.videos and (self.root / "videos").is_dir() else name

def is_true(flag) -> bool:
    """Ego-Exo4D's flags are booleans from one annotator, "1" and "0" from another: bool("0") is True."""
    if flag not in (True, False, "1", "0"):
        raise ValueError(f"a flag is {flag!r}, not true, false, 1 or 0")
    return flag in (True, "1")

def verbalise_wearer(text: str) -> str:
    """The narrators' C is verbalised (the paper's one published example)."""
    return re.sub(r"\bC\b", "Camera-verbalise_wearer", text).strip()

def ego_exo4d(files: Files, o: Build) -> Iterator[dict]:
    """Ego-ExoClip from Ego-Exo4D v2: takes.json, annotations/{splits,atomic_descriptions_*}.json, takes/.

    A row is one narration at t with all its exo views (a published "pair" is narration x view), clip t +-
    beta / (2 alpha): EgoClip's rule, beta the mean gap of one annotator's narrations in the take, sorted,
    before any filter. Cut at the take's ends, two frames at least. takes.json is the list of what exists; the
    ego camera is the one with an `rgb` stream, exo views are the capture's cameras that are not `is_ego`.
    """
    captures = {c["capture_uid"]: c for c in files.json("captures.json")} if (
        files.root / "captures.json").is_file() else {}
    takes = {take["take_uid"]: take for take in files.each(files.json("takes.json"))}
    split_of = files.json("annotations/splits.json")["take_uid_to_split"]
    names = ("train", "val") if o.split == "all" else (o.split,)
    told = [pair for name in names
            for pair in files.json(f"annotations/atomic_descriptions_{name}.json")["annotations"].items()]

    def gap(narrators, alpha):
        times = sorted(float(d["timestamp"]) for a in narrators for d in a["descriptions"])
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else alpha
    groups = [group for _, all_ in told
              for group in ([[a] for a in all_] if o.beta == "annotator" else [all_])]
    alpha = 4.9 if o.alpha == "mean" else float(o.alpha)
    if not 0 < alpha < math.inf:
        raise DataError(f"--alpha {o.alpha}: seconds above 0, or mean")
    if o.alpha == "mean":
        alpha = float(np.mean([gap(group, alpha) for group in groups]))
        print(f"alpha: the mean gap is {alpha:.3f} s")

    def rows(uid, narrators):
        take = takes.get(uid)
        if take is None or split_of.get(uid) not in names:
            files.count["take not in takes.json" if take is None else "take of another split"] += 1
            return
        ego, exo = take_videos(files, take, captures, o)
        if not ego or not exo:
            files.count["take without an ego or exo video"] += 1
            return
        files.count["takes"] += 1
        for annotation in narrators:
            half = gap([annotation] if o.beta == "annotator" else narrators, alpha) / (2 * alpha)
            for i, said in enumerate(annotation["descriptions"]):
                subject, best = said.get("subject", said.get("narration_subject")), said.get("best_exo") or {}
                cameras = exo if o.views == "all" else {
                    name: video for name, video in exo.items() if name == best.get("cam_id")}
                t, length = float(said["timestamp"]), float(take["duration_sec"])
                why = ("rejected annotation" if is_true(annotation.get("rejected", False)) else
                       "unsure" if is_true(said["unsure"]) and not o.keep_unsure else
                       "not the verbalise_wearer" if subject != "C" and o.subject == "C" else
                       "not seen by the ego camera" if not is_true(said["ego_visible"]) and not o.keep_hidden
                       else "no best exo view" if not cameras
                       else "later than its take" if t > length else "")
                if why:
                    files.count[why] += 1
                    continue
                reach = max(half, 1 / 30)
                span = {"start": max(0.0, min(t - reach, length - 2 / 30)),
                        "end": min(length, max(t + reach, 2 / 30))}
                yield {"id": f"{take['take_name']}/{annotation['annotator_id']}/{i}",
                       "ego": {"video": ego, **span}, "exo": [{"video": v, **span} for v in cameras.values()],
                       "text": verbalise_wearer(said["text"]), "source": "ego-exo4d"}
    yield from files.tolerant(told, rows)

def frame_rate(video: str | os.PathLike) -> float:
    """Mean frames a second of a file, as its header says."""
    try:
        with av.open(str(video), options=OPEN_OPTIONS) as container:
            return float(container.streams.video[0].average_rate or 30)
    except (av.FFmpegError, OSError, IndexError) as error:
        raise DataError(f"{video} cannot be read: {error}") from None

def take_videos(files: Files, take: dict, captures: dict, o: Build) -> tuple[str | None, dict[str, str]]:
    """-> the ego video, and {camera: exo video} of an Ego-Exo4D take; rates other than 30 are counted."""
    capture = take.get("capture") or captures.get(take.get("capture_uid"), {})
    outside = {c["cam_id"] for c in capture.get("cameras", []) if not c["is_ego"]}

    def path(stream):
        full = Path(take["root_dir"]) / stream["relative_path"]
        small = full.parent / "downscaled/448" / full.name
        there = [p for p in (small, full)[o.video_size == "full":] if (files.root / p).is_file()]
        chosen = (there + [full if o.video_size == "full" else small])[0]
        if not (files.root / chosen).is_file():
            files.count["video not downloaded"] += 1
        else:
            try:
                files.count["video not at 30 fps"] += abs(frame_rate(files.root / chosen) - 30) > 0.1
            except DataError:
                files.count["video unreadable"] += 1            # the rows stay: data.py check names them
        return str(chosen)
    streams = take["frame_aligned_videos"]
    ego = [path(s["rgb"]) for s in streams.values() if "rgb" in s and s["rgb"].get("relative_path")]
    exo = {cam: path(s["0"]) for cam, s in sorted(streams.items())
           if cam in outside and "0" in s and s["0"].get("relative_path")}
    return (ego[0] if len(ego) == 1 else None), exo

def egoclip(files: Files, o: Build) -> Iterator[dict]:
    """EgoClip (EgoVLP's egoclip.csv, tab-separated, 3.8M rows): the Init stage's ego data. The released clip
    times are used, negative ones cut to 0; `--chunk` seconds a file as EgoVLP's script cuts them, a clip that
    spans two stays in that of its middle. Dropped (our reading of its appendix): #unsure, under 3 words."""
    def rows(row):
        text = re.sub(r"^#\s*\w+\s+", "", row["clip_text"].strip())
        start, end = max(0.0, float(row["clip_start"])), float(row["clip_end"])
        if "#unsure" in row["clip_text"].lower() or len(text.split()) < 3 or not start < end:
            files.count["unsure, short or without length"] += 1
            return
        piece, name = int((start + end) / 2 // o.chunk) if o.chunk else 0, row["video_uid"]
        if o.chunk:
            start, end = (min(max(t - piece * o.chunk, 0), o.chunk) for t in (start, end))
            name += f"/{piece}"
        yield {"id": f"egoclip/{row['clip_idx']}", "text": verbalise_wearer(text), "source": "egoclip",
               "ego": {"video": files.video(f"{name}.mp4"), "start": round(start, 6), "end": round(end, 6)},
               "verbs": ast.literal_eval(row["tag_verb"]), "nouns": ast.literal_eval(row["tag_noun"])}
    yield from files.tolerant(files.table("egoclip.csv", delimiter="\t"), rows)

def egtea(files: Files, o: Build) -> Iterator[dict]:
    """EGTEA Gaze+ (`--split train` or `test`, of split 1): `<clip> <action> <verb> <noun>` with ids from 1;
    the trimmed file is the clip, a little longer than its label. The answer is the action's cleaned name."""
    actions = {int(number): " ".join(label) for *label, number in files.lines("action_idx.txt")}

    def rows(clip, action, *_):
        *session, start, end, first, last = clip.split("-")
        label = re.sub("[_:]", " ", actions[int(action)]).lower()
        row = taught("egtea", clip, f"cropped_clips/{'-'.join(session[:3])}/{clip}.mp4", label, o)
        yield row | {"seconds": [int(start) / 1000, int(end) / 1000],
                     "frames": [int(first[1:]), int(last[1:])]}
    yield from files.tolerant(files.lines(f"{o.split}_split1.txt"), rows)

def ssv2(files: Files, o: Build) -> Iterator[dict]:
    """Something-Something V2 (`--split train` or `validation`): the answer is the label; the class is the
    template without its brackets. The whole webm is the clip."""
    names = [[f"{prefix}{name}.json" for prefix in ("", "something-something-v2-", "labels/")]
             for name in ("labels", o.split)]
    classes = files.json(*names[0])
    if o.split == "test":
        raise DataError("the test split has no labels: use --split train or validation")

    def rows(record):
        number = classes[record["template"].translate({ord("["): None, ord("]"): None})]
        video = files.video(f"{record['id']}.webm")
        yield taught("ssv2", record["id"], video, record["label"], o) | {"class": int(number)}
    yield from files.tolerant(files.json(*names[1]), rows)

def egotimeqa(files: Files, o: Build) -> Iterator[dict]:
    """EgoTimeQA (GroundVQA's annotations.EgoTimeQA.json): `video_id` is an Ego4D *clip*; the whole clip is
    shown, because the released windows were rescaled (our choice). ' l ' is the generator's typo for I."""
    def rows(record):
        if len(record["wrong_answers"]) != 3:
            raise ValueError(f"{len(record['wrong_answers'])} wrong answers, not 3")
        question, answer = (record[key].replace(" l ", " I ").strip() for key in ("question", "answer"))
        video = files.video(f"{record['video_id']}.mp4")
        number = files.where.rpartition(" ")[2]
        yield taught("egotimeqa", f"{record['video_id']}/{number}", video, answer, o, question)
    yield from files.tolerant(files.json("annotations.EgoTimeQA.json",
                                         "data/unified/annotations.EgoTimeQA.json"), rows)

def openeqa(files: Files, o: Build) -> Iterator[dict]:
    """OpenEQA (open-eqa-v0.json): episodes are folders of `*-rgb.png`, at no rate that matters (the whole
    walk is sampled evenly)."""
    def rows(record):
        folder = f"frames/{record['episode_history']}"
        folder = folder if (files.root / "frames").is_dir() else f"data/{folder}"
        yield taught("openeqa", record["question_id"], folder, record["answer"], o, record["question"], fps=3)
    yield from files.tolerant(files.json("open-eqa-v0.json", "data/open-eqa-v0.json"), rows)

def egoexolearn(files: Files, o: Build) -> Iterator[dict]:
    """EgoExoLearn (annotations/fine_annotation_trainval_en.csv): ego rows of the split, columns by name; the
    second person becomes the first. Segments beyond the video's end are cut or dropped where it is there."""
    lengths: dict[str, float] = {}
    person = {"your": "my", "you": "I", "yourself": "myself"}

    def rows(row):
        if row["view"] != "ego" or row["subset"] != o.split:
            files.count["exo or another split"] += 1
            return
        video = files.video(f"{row['video_uid']}.mp4")
        start, end = float(row["start_sec"]), float(row["end_sec"])
        if video not in lengths:
            lengths[video] = math.inf
            if (files.root / video).is_file():
                with contextlib.suppress(DataError), open_video(files.root / video) as (lengths[video], _):
                    pass                                        # unreadable: data.py check will say so
        if not start < min(end, lengths[video]):
            files.count["beyond the video's end"] += 1
            return
        files.count["cut at the video's end"] += end > lengths[video]
        text = re.sub(r"\b(your|you|yourself)\b", lambda m: person[m[0].lower()], row["narration_en"].strip(),
                      flags=re.IGNORECASE)
        key = row.get("annotation_id") or row["annotation_uid"]
        yield taught("egoexolearn", key, video, text, o, start=start, end=min(end, lengths[video]))
    table = files.table("annotations/fine_annotation_trainval_en.csv", "fine_annotation_trainval_en.csv")
    yield from files.tolerant(table, rows)

def conversations(files: Files, o: Build) -> Iterator[dict]:
    """LLaVA's and VideoLLaMA2's JSON array or lines (`--file`, below --root), with our optional "start" and
    "end" in seconds. `image` wins over `video`, as in their loader; marks of the video are put back by ours.
    Still images are left out, and counted: this model reads videos."""
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

    def rows(record):
        record = json.loads(record) if lines else record
        video = record.get("image") or record.get("video")
        video = video["video"] if isinstance(video, dict) else video
        if video is None or Path(video).suffix.lower() in (*IMAGES, ".gif", ".webp", ".bmp"):
            files.count["text only" if video is None else "still image"] += 1
            return
        said = [(roles[m["from"]], re.sub(r"<(video|image)>\n?", "", m["value"]).strip())
                for m in record["conversations"]]
        said = said[1:] if said and said[0][0] == "assistant" else said
        if [role for role, _ in said] != ["user", "assistant"] * (len(said) // 2) or not said:
            raise ValueError("human and gpt must take turns, human first")
        clip = {"video": video} | {key: record[key] for key in ("start", "end", "fps") if key in record}
        turns = [{"user": q, "assistant": a} for (_, q), (_, a) in zip(said[::2], said[1::2])]
        yield {"id": str(record.get("id", files.where.rpartition(" ")[2])), "turns": turns,
               o.view: clip if o.view == "ego" else [clip], "text": turns[0]["assistant"],
               "source": "conversations"}
    lines = o.file.endswith(".jsonl")
    yield from files.tolerant(filter(str.strip, files.text(o.file).split("\n")) if lines else
                              files.json(o.file), rows)

BUILDERS = {    # command: the builder, and the flags of Build that it takes besides --root and --out
    "ego-exo4d": (ego_exo4d, ("split", "alpha", "beta", "views", "subject", "keep_unsure", "keep_hidden",
                              "video_size")),
    "egoclip": (egoclip, ("chunk",)), "egtea": (egtea, ("split", "prompt")),
    "ssv2": (ssv2, ("split", "prompt")),
    "egotimeqa": (egotimeqa, ("prompt",)), "openeqa": (openeqa, ("prompt",)),
    "egoexolearn": (egoexolearn, ("split", "prompt")), "conversations": (conversations, ("file", "view"))}

def convert(make: Callable, o) -> Iterator:
    """What `make(files, o)` yields; whatever is wrong with a file is one sentence that names the place."""
    files = Files(o.root, getattr(o, "videos", None))
    try:
        yield from make(files, o)
    except KeyError as error:
        raise DataError(f"{files.where} lacks {error}") from None
    except MISSHAPEN as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{files.where} is not as expected ({type(error).__name__}: {str(error)[:200]}); see "
                        f"the docstring of {make.__name__} for the format") from None
    finally:
        for reason, number in files.count.items():
            print(f"   {reason}: {number:,}" if number else "", end="\n" if number else "")

def command_build(args):
    """Convert a data set to a manifest, and say what was kept and what was dropped, by reason."""
    o = Build(**{f.name: getattr(args, f.name) for f in fields(Build) if hasattr(args, f.name)})
    rows, views, spans, seen = [], 0, [], Counter()
    base = Path(os.path.realpath(o.root))
    for row in convert(BUILDERS[args.command][0], o):
        _check_row(json.loads(json.dumps(row)), f"row {row['id']!r}", base, o.allow_outside)
        seen[row["id"]] += 1
        row["id"] += f"#{seen[row['id']]}" * (seen[row["id"]] > 1)      # conversations repeat ids
        rows.append(row)
        views += len(row.get("exo", []))
        spans += [c["end"] - c["start"] for c in clips_of(row)[:1] if "end" in c]
    if not rows:
        raise DataError(f"{o.root}: no row was left, see the reasons above")
    write_jsonl(o.out, rows)
    print(f"{o.out}: {len(rows):,} rows, {views:,} ego-exo pairs" + (
        f", mean clip {np.mean(spans):.2f} s, {100 * np.mean(np.array(spans) < 1):.0f} % under 1 s" if spans
        else ""))
    if args.command == "ego-exo4d":
        print("   the paper: 2,925 takes, 261.3K narrations, 1.1M pairs, mean clip 0.68 s, 82 % under 1 s")
    if Path(os.path.realpath(o.out)).parent != base:
        print(f"   its paths start at {o.root}: pass --root {o.root} to whatever reads it")

# ------------------------------------------------------------------------------------------ checking, caching
def _check_job(job) -> tuple[dict, list[tuple[str, str, str]]]:
    """Read a row's clips once -> the row, and [(kind, sentence, video), ...] of what is wrong."""
    row, limit = job
    signal.setitimer(signal.ITIMER_REAL, limit)     # the kernel ends a decoder that hangs: Python could not
    found, lengths, spans = [], [], set()
    for clip in clips_of(row):
        video, start, end, fps = (clip.get(key) for key in ("video", "start", "end", "fps"))
        try:
            with open_video(video, fps) as (length, _):
                begin, stop = clip_span(video, start, end, length)
            frames = read_clip(video, start, end, 8, 64, None, fps, "crop")
            lengths.append(length)
            spans.add((start, end))
            if stop < (end or 0) - 0.1:
                found.append(("too short", f"{video} ends at {length:.2f} s, the clip at {end} s", video))
            if (frames.reshape(8, 3, -1).std(2).max(1) < 1).all():      # every frame of one colour
                found.append(("blank", f"{video} shows one colour at {begin:.2f} - {stop:.2f} s", video))
        except DataError as error:
            found.append((error.reason, str(error), video))
    if len(spans) == 1 and max(lengths) - min(lengths) > 0.1:   # one clock: synchronized files end together
        found += [("ego and exo differ", f"the videos of this moment last {lengths} s", clip["video"])
                  for clip in clips_of(row)]
    signal.setitimer(signal.ITIMER_REAL, 0)
    return row, found

def command_check(args):
    """Read every clip once, in all cores; report what is wrong by kind and file, write the skip list."""
    rows = read_manifest(args.manifest, args.root, args.allow_outside, skip=False)
    bad, kinds, seen = {}, Counter(), set()
    base = os.path.realpath(args.root or Path(args.manifest).parent)
    if len({row["id"] for row in rows}) < len(rows):
        raise DataError(f"{args.manifest}: ids repeat, so a skip list could not name rows: make them differ")

    def results(pool):
        replies = pool.imap_unordered(_check_job, [(row, args.limit) for row in rows])
        with contextlib.suppress(StopIteration, multiprocessing.TimeoutError):
            while True:
                yield replies.next(timeout=2 * args.limit + 5)  # none for so long: what is left was killed
    with worker_pool() as pool:
        for row, found in progress(results(pool), len(rows), "rows"):
            seen.add(row["id"])
            bad |= {row["id"]: found} if found else {}
    bad |= {row["id"]: [("hangs or crashes", f"a decoder crashed or took over {args.limit} s on one of "
                         f"these, {clip['video']}", clip["video"]) for clip in clips_of(row)]
            for row in rows if row["id"] not in seen}
    bad = {row["id"]: bad[row["id"]] for row in rows if row["id"] in bad}       # in the manifest's order
    for name, found in bad.items():
        kinds.update({kind for kind, _, _ in found})
        for kind, sentence, _ in found:
            print(f"{name}: {kind}: {sentence}")
    write_jsonl(Path(args.manifest).with_suffix(".bad.jsonl"), [
        {"id": name, "videos": [os.path.relpath(video, base) if video.startswith(os.path.join(base, "")) else
                                video for *_, video in found],
         "reasons": [f"{kind}: {text}" for kind, text, _ in found]}
        for name, found in bad.items()])
    share = len(bad) / len(rows)
    print(f"{len(rows) - len(bad)} of {len(rows)} rows are good; " +
          (", ".join(f"{kind}: {number}" for kind, number in kinds.most_common()) or "nothing is wrong"))
    if share > args.max_bad:
        raise DataError(f"{share:.1%} of the rows are bad, more than --max-bad {args.max_bad:.1%}")

def _cache_job(job) -> tuple[tuple, dict[tuple, str]]:
    """One video's sampled frames -> one all-intra file (JPEG frames in mp4); returns its key, and the clips
    that could not be read with the reason."""
    (video, fps), clips, target, frames, size, fit = job
    bad, good, length = {}, [], 0.0
    for clip in clips:
        try:
            with open_video(video, fps) as (length, _):
                good.append((clip, clip_span(video, *clip, length)))
        except DataError as error:
            bad[clip] = str(error)
    while good:
        moments = {0.0}                                         # the file starts when its source does
        for _, (begin, stop) in good:                           # `begin`: no frame of an earlier clip
            moments |= {begin, *(begin + (stop - begin) * (np.arange(frames) + 0.5) / frames)}
        moments = sorted({round(moment / TICK) for moment in moments})
        try:
            with open_video(video, fps) as (length, frames_at), atomic_write(target) as part:
                _write_intra(part, moments, frames_at, round(length / TICK), size, fit)
            break
        except DataError as error:                              # then clip by clip: which ones are at fault?
            again = []
            for clip, span in good:
                try:
                    read_clip(video, *clip, frames, size, None, fps)
                    again.append((clip, span))
                except DataError as problem:
                    bad[clip] = str(problem)
            if len(again) == len(good):                         # each can be read, all in a row cannot
                bad |= {clip: str(error) for clip, _ in good}
                again = []
            good = again
    return (video, fps), bad

def _write_intra(path: Path, moments: list[int], frames_at: Callable, length: int, size: int, fit: str):
    """The frames on display at these moments (in TICKs), each a key frame that starts at its moment."""
    last, stream = None, None
    with av.open(str(path), "w", format="mp4") as out:
        for moment, frame in zip(moments, frames_at([float(moment * TICK) for moment in moments])):
            if frame is last and moment < moments[-1]:
                continue
            last, image = frame, _pixels(frame, size, fit)
            if stream is None:
                stream = out.add_stream("mjpeg", rate=30)
                stream.width, stream.height, stream.pix_fmt = size, size, "yuvj420p"
                stream.codec_context.time_base = stream.time_base = TICK
                stream.codec_context.qmin = stream.codec_context.qmax = 2
            picture = av.VideoFrame.from_ndarray(rearrange(image, "c h w -> h w c"), format="rgb24")
            picture.pts, picture.time_base = moment, TICK
            for packet in stream.encode(picture):
                packet.duration = max(1, length - moment)       # the last one's counts
                out.mux(packet)
        out.mux(stream.encode())

def command_cache(args):
    """Decode each video once, front to back, and keep only the frames that its clips show, in one file whose
    frames are all key frames: a clip then costs one small read. Clips keep their times; the frames kept are
    the --frames centres, so training draws its random moments among those."""
    rows, out = read_manifest(args.manifest, args.root, args.allow_outside), Path(args.out)
    wanted: dict[tuple, set] = {}
    for clip in (clip for row in rows for clip in clips_of(row)):
        wanted.setdefault((clip["video"], clip.get("fps")), set()).add((clip.get("start"), clip.get("end")))
    wanted = {key: sorted(clips, key=str) for key, clips in wanted.items()}
    form = args.frames, args.size, args.fit                     # another cache in this folder has other names
    target = {key: f"{hashlib.sha256(repr((key, clips, *form)).encode()).hexdigest()[:20]}.mp4"
              for key, clips in wanted.items()}
    jobs = [(key, clips, str(out / target[key]), *form) for key, clips in wanted.items()]
    errors = {}
    with worker_pool() as pool:
        for key, bad in progress(pool.imap_unordered(_cache_job, jobs), len(jobs), "videos"):
            errors |= {(*key, *clip): error for clip, error in bad.items()}
    kept = []
    for row in rows:
        wrong = [place for clip in clips_of(row)
                 if (place := tuple(clip.get(key) for key in ("video", "fps", "start", "end"))) in errors]
        if row := _without(row, [video for video, *_ in wrong]):
            for clip in clips_of(row):
                clip["video"] = target[clip["video"], clip.pop("fps", None)]
            kept.append(row)
    print("".join(f"left out: {error}\n" for error in errors.values()), end="")
    if (lost := len(rows) - len(kept)) > args.max_bad * len(rows):
        raise DataError(f"{lost} of {len(rows)} rows are bad, more than --max-bad {args.max_bad}")
    write_jsonl(out / "manifest.jsonl", kept)
    size = sum(f.stat().st_size for f in out.glob("*.mp4")) / 1e6
    print(f"{out}/manifest.jsonl: {len(kept)} of {len(rows)} rows, {len(jobs)} videos, {size:.1f} MB")

def command_mix(args):
    """One manifest from several: a.jsonl:0.3 b.jsonl:0.7 are shares of the mixture (as large as it gets with
    no row twice), a.jsonl alone gives all its rows. The choice is a function of the seed. --root is where the
    paths of all of them start, and those of the mixture; without it each counts from its own folder."""
    base = Path(os.path.realpath(args.root or Path(args.out).parent))
    parts, mixed = [], []
    for name in args.manifests:
        path, share = re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", name).groups()
        if share is not None and not 0 < float(share) <= 1:
            raise DataError(f"{name}: the share after the colon is a number above 0, at most 1")
        parts.append((read_manifest(path, args.root, allow_outside=True), float(share or 0), path))
    total = min((len(rows) / share for rows, share, _ in parts if share), default=0)
    for k, (rows, share, path) in enumerate(parts):
        take = round(share * total) if share else len(rows)
        chosen = sorted(np.random.default_rng([args.seed, k]).permutation(len(rows))[:take])
        print(f"{path}: {take} of {len(rows)} rows")
        for row in (rows[i] for i in chosen):
            for clip in clips_of(row):
                clip["video"] = os.path.relpath(clip["video"], base)
            mixed.append(row | {"id": f"{k}:{row['id']}"})
    write_jsonl(args.out, mixed)
    print(f"{args.out}: {len(mixed)} rows, paths start at {base}"
          + (f": pass --root {args.root} to whatever reads it" if args.root else ""))

# -------------------------------------------------------------------------------------------------- commands
def command_toy(args):
    """Render the micro-world (every split, or those named)."""
    world = World(**{f.name: getattr(args, f.name) for f in fields(World)})
    for split in args.splits or SPLITS:
        print(toy_split(args.out, split, world))
    print(toy_tokenizer(args.out, world))

def command_show(args):
    """Contact sheet of a manifest: ego above exo, text below."""
    rows, items = read_manifest(args.manifest, args.root, args.allow_outside), []
    for row in rows[::max(1, len(rows) // args.n)][:args.n]:
        frames = [read_clip(c["video"], c.get("start"), c.get("end"), 4, 96, None, c.get("fps"))
                  for c in clips_of(row)]
        lines = [(row.get("text", ""), (0, 0, 0))]
        lines += [(f"q: {t['user']}  a: {t['assistant']}", (90, 90, 90)) for t in row.get("turns", [])[:2]]
        items.append((frames, lines))
    contact_sheet(args.out, items)
    print(f"{args.out}: {len(items)} rows of {args.manifest}")

def add_flags(parser: argparse.ArgumentParser, config: type, names: Sequence[str] | None = None):
    """One flag a field of a dataclass (or of `names`): a bool is a switch, a Literal has choices, no default
    is required; the comment on the field's line is its help."""
    told = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(config), re.M))
    for f in (f for f in fields(config) if names is None or f.name in names):
        flag, hint = "--" + f.name.replace("_", "-"), get_type_hints(config)[f.name]
        kind = get_args(hint)[0] if isinstance(hint, UnionType) or get_origin(hint) is Union else hint
        choices = get_args(kind) or None                        # of a Literal
        text = told.get(f.name, "").replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            default = None if f.default is MISSING else f.default
            parser.add_argument(flag, type=type(choices[0]) if choices else kind, choices=choices,
                                required=f.default is MISSING, default=default,
                                help=f"{text} ({default})" if default not in (None, "") else text)

def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name, function, *places):
        first = " ".join(function.__doc__.split()).split(". ")[0].rstrip(".")
        own = commands.add_parser(name, help=first, description=function.__doc__, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        own.set_defaults(run=command_build if name in BUILDERS else function)
        for place in places:
            own.add_argument(place)
        return own
    toy = add("toy", command_toy)
    toy.add_argument("splits", nargs="*", help=f"of {', '.join(SPLITS)} (all)")
    toy.add_argument("--out", default="out/toy")
    add_flags(toy, World)
    for name, (builder, flags) in BUILDERS.items():
        add_flags(add(name, builder), Build, ("root", "out", "allow_outside") + flags)
    check, cache, show = (add(name, function, "manifest") for name, function in (
        ("check", command_check), ("cache", command_cache), ("show", command_show)))
    mix = add("mix", command_mix)
    mix.add_argument("manifests", nargs="+", help="a.jsonl:0.3 b.jsonl:0.7")
    for own in (check, cache, show, mix):
        own.add_argument("--root", help="where the paths of the manifest start (its folder)")
    for own in (check, cache, show):
        own.add_argument("--allow-outside", action="store_true", help="paths may leave their root")
    for own in (check, cache):
        own.add_argument("--max-bad", type=float, default=0.01, help="share of rows that may be bad")
    check.add_argument("--limit", type=float, default=60, help="seconds that one row may take")
    for own, default in ((cache, None), (show, "sheet.png"), (mix, None)):
        own.add_argument("--out", default=default, required=default is None)
    cache.add_argument("--size", type=int, default=336, help="pixels a side")
    cache.add_argument("--frames", type=int, default=16, help="frames of a clip")
    cache.add_argument("--fit", choices=("pad", "crop"), default="pad", help="to a square")
    show.add_argument("--n", type=int, default=8)
    mix.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except DataError as error:
        sys.exit(f"data.py: {error}")

if __name__ == "__main__":
    main()
