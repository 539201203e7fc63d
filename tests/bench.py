"""Measurements side by side: ratios within one run count, times on a busy machine do not.

    python tests/bench.py plan --memory 80 --ranks 8    # before a run: parameters, FLOPs and memory of a stage, on the meta device
    python tests/bench.py attention             # naive, padded with a dense mask, tiled, ours: time and memory
    OMP_NUM_THREADS=2 python tests/bench.py full    # a step of the 7b preset for real: seconds, memory against the plan
    python tests/bench.py step                  # a training step beside transformers' modules composed; parts; scaling
    python tests/bench.py run                   # start-up, waiting for the loader, two processes beside one
    python tests/bench.py score                 # options about one video: the prefix cached and packed, or each pair alone
    python tests/bench.py generate              # 64 tokens: with a cache, without, transformers; decode: the decoder's step alone
    python tests/bench.py data                  # clips of a 3-minute take: from its start, by seeking; decord
    python tests/bench.py all --json FILE       # all but plan and full, an hour

Every side of a comparison is a process of its own with one thread; the sides take turns, round by round.
"""
import argparse
import contextlib
import ctypes
import importlib.util
import io
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

import data
import eval
import model as model_file
import train
from model import CLIP_NAMES, IGNORE, MISTRAL_NAMES, PRESETS, VIDEO, Exo2Ego, Segments, attention, rename

# --- the planner: a step on the meta device
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Arithmetic(TorchFunctionMode):
    """Matrices are multiplied in one dtype whatever their weights are stored in; norms run in float32. On the
    meta device attention is the fused one, which holds no scores."""
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.autograd.backward:                     # what it computes again is computed likewise
            with self:
                return torch.autograd.graph._engine_run_backward(
                    args[0], tuple(map(torch.ones_like, args[0])), False, False, (), allow_unreachable=True, accumulate_grad=True)
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return FLASH(*args[:3], 0.0, kwargs["is_causal"], scale=kwargs["scale"])[0]
        wide = {F.layer_norm: torch.float32, F.rms_norm: torch.float32}
        wide |= dict.fromkeys((F.linear, F.conv2d, F.conv_transpose2d), self.dtype)
        if func in wide:
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(wide[func]), (args, kwargs))
        out = func(*args, **kwargs)
        return out.float() if func is F.embedding else out


class Meter(TorchDispatchMode):
    """Bytes that a step on the meta device would hold beyond `given` (weights, inputs), now and at most; the
    FLOPs of its matrix products."""
    def __init__(self, given):
        super().__init__()
        self.now, self.most, self.flops, self.seen = 0, 0, 0, WeakIdKeyDictionary()
        for tensor in given:
            self.seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            # each gradient costs as much as the forward; torch's own count of a depthwise filter's is C times that
            grad, x, weight, transposed = *args[:3], args[7]
            positions = len(x) * math.prod((x if transposed else grad).shape[2:])
            self.flops += 2 * positions * weight.numel() * sum(args[10][:2])
        elif count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        elif func.overloadpacket in (FLASH, FLASH_BACKWARD):    # causal counts whole
            q, k = args[:2] if func.overloadpacket is FLASH else args[1:3]
            self.flops += (4 if func.overloadpacket is FLASH else 10) * q.numel() * k.shape[2]
        for tensor in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen[storage], size = True, storage.nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, size)
        return out

    def gone(self, size: int):
        self.now -= size


def blank_batch(run, phase, model, device, text: int = 64) -> data.Batch:
    """A micro batch of a stage's shapes, for measuring; `text` tokens, half of them the answer (assumed)."""
    cfg, micro = model.cfg, train.samples_per_forward(phase, run.cfg, run.world)
    visual = cfg.visual_tokens * (1 + (phase.view != "exo" and model.F is not None))
    ids = torch.cat([torch.full((micro, visual), VIDEO), torch.ones(micro, text, dtype=torch.long)], 1)
    labels = torch.where(torch.arange(visual + text) < visual + text // 2, IGNORE, ids)
    shape = (micro, cfg.frames, 3, cfg.image_size, cfg.image_size)
    each, names = torch.arange(micro), [""] * micro
    ego, exo = (torch.zeros(shape, dtype=torch.uint8, device=device) if phase.view in (view, "pair") else None
                for view in ("ego", "exo"))
    return data.Batch(ego, exo, each, ids.flatten(), labels.flatten(), (labels > 0).flatten().float(),
                 [visual + text] * micro, each, micro, names, names, [])


def leave_out_idle(model, preset, stage):
    """At 7b the encoders that a stage never looks through, as train.initial_model leaves them out."""
    if preset == "7b" and stage == 0:
        model.exo_vit = model.exo_connector = None
    if preset == "7b" and stage == 1:
        model.ego_vit = model.ego_connector = None


def meta_objective(stage, preset, *flags):
    """-> (run, phase, objective) of a stage on the meta device: nothing is allocated. bfloat16, as on a GPU."""
    base = ["--base", "published"] if stage == 0 and preset == "7b" else []
    cfg = train.parse(["--stage", str(stage), "--preset", preset, "--dtype", "bfloat16", *base, *flags])
    run, phase = train.Run(cfg, 0, 1, torch.device("cpu"), True), train.stages_of(cfg)[0]
    mapping = cfg.mapping if stage > 1 and not cfg.no_mapping else "none"
    with torch.device("meta"):
        model = Exo2Ego(replace(PRESETS[preset], mapping=mapping, lora=stage == 3 and not cfg.no_lora))
        objective = train.Objective(model, None, phase, cfg, 1)
    leave_out_idle(model, preset, stage)
    train.freeze(objective, True)
    return run, phase, objective


def planned(stage, preset, micro, recompute, *flags):
    """What a step of `micro` clips needs on one rank, in bytes by kind, and its FLOPs a sample."""
    run, phase, objective = meta_objective(stage, preset, "--micro-batch", str(micro), *flags)
    most, flops = measure_step(run, phase, objective, recompute)
    size = {p: p.numel() * p.element_size() for p in objective.parameters()}
    gradients = sum(size[p] for p in size if p.requires_grad)
    return dict(weights=sum(size.values()), gradients=gradients, optimiser=gradients * (1 if run.cfg.optimizer == "muon" else 2),
                activations=max(most - gradients, 0), flops=flops,
                block=max(sum(map(size.get, m.parameters())) for m in objective.modules() if isinstance(m, model_file.BLOCKS)))


# What the paper's data sets hold, in samples: EgoClip's clips, Ego-ExoClip's pairs, EgoIT's questions.
SAMPLES = {0: 3.8e6, 1: 1.12e6, 2: 1.12e6, 3: 0.6e6}


def bench_plan(args):
    """What a stage needs on each rank, in every way to run it, beside --memory (GB of a card), and how long the paper's
    stage takes: computed on the meta device, where nothing is allocated."""
    given = ["--micro-batch", str(args.micro_batch)] if args.micro_batch else []
    run, phase, objective = meta_objective(args.stage, args.preset, *given)
    micro = train.samples_per_forward(phase, run.cfg, args.ranks)
    print(f"stage {args.stage} ({phase.name}), preset {args.preset}, {args.ranks} ranks, bfloat16, {micro} clips per forward")
    for name, module in [*objective.model.named_children(), ("all", objective.model)]:
        on, off = (sum(p.numel() for p in module.parameters() if p.requires_grad == kind) for kind in (True, False))
        print(f"   {name:14} {on:>13,} trained {off:>14,} frozen")
    rows = []
    for recompute in ("none", "cheap", "blocks"):
        need = planned(args.stage, args.preset, micro, recompute)
        gb = {kind: size / 1e9 for kind, size in need.items()}
        # What a compiler keeps is not known: at most what is kept where nothing is computed again.
        compiled = " (and the most that a compiled step, the default on CUDA, may need)" if recompute == "none" else ""
        print(f"   --recompute {recompute}{compiled}: activations {gb['activations']:.2f} GB")
        for kind, shards in (("DDP", 1), ("FSDP", args.ranks)):
            held = (gb["weights"] + gb["gradients"] + gb["optimiser"]) / shards + 2 * gb["block"] * (shards > 1)
            # Each rank loads the whole model before it keeps its share.
            rank = max(held + gb["activations"], gb["weights"])
            loading = f" ({gb['weights']:.2f} while it is loaded)" if shards > 1 else ""
            print(f"      {kind:4} weights, gradients, optimiser {held:.2f} + activations {gb['activations']:.2f}: {rank:.2f} GB per rank{loading}"
                  + (f", {'fits' if rank < args.memory else 'does not fit'} in {args.memory:g}" if args.memory else ""))
            rows.append(dict(bench="plan", stage=args.stage, preset=args.preset, ranks=args.ranks, micro=micro, kind=kind,
                             recompute=recompute, gb=rank, tflop=need["flops"] / 1e12))
    tflop = rows[0]["tflop"]                                    # what is computed again does not count
    print(f"   a sample: {blank_batch(run, phase, objective.model, 'meta').lens[0]} tokens, 64 of them text, of at most "
          f"{objective.model.cfg.max_length}; {tflop:.1f} TFLOP, forward and backward")
    if args.preset == "7b":
        samples = SAMPLES[args.stage] * phase.epochs
        hours = samples * tflop / args.tflops / 3600 / args.ranks
        print(f"   the paper's stage {args.stage}: {samples / 1e6:.2f}M samples, {samples * tflop / 1e6:.0f} EFLOP, {hours:.0f} hours of {args.ranks} "
              f"cards at {args.tflops:g} TFLOP/s each (computed, not run)")
        rows[-1] |= dict(samples=samples, eflop=samples * tflop / 1e6, hours=hours)
    return rows


def measure_step(run, phase, objective, recompute: str) -> tuple[int, float]:
    """The most bytes beyond weights that a step, run on the meta device, would hold; FLOPs a sample."""
    batch = blank_batch(run, phase, objective.model, "meta")
    maths = Arithmetic(torch.bfloat16 if run.bf16 else torch.float32)
    cfg = replace(run.cfg, fsdp=False, recompute=recompute)
    train.wrap(replace(run, world=1, cfg=cfg), objective)
    clips = [clip for clip in (batch.ego, batch.exo) if clip is not None]
    with Meter([*objective.parameters(), *objective.buffers(), *clips]) as meter, maths:
        torch.autograd.backward(objective(batch, float(batch.weights.sum()), batch.samples)["loss"])
    objective.zero_grad(set_to_none=True)
    return meter.most, meter.flops / batch.samples


# name: lengths, heads, kv_heads, head_dim, causal
SHAPES = {"ViT, 4 frames of 577": ((577,) * 4, 16, 16, 64, False),
          "one causal sequence of 3200, grouped": ((3200,), 8, 2, 128, True),
          "a ragged batch of an MLLM": ((1538, 777, 773, 800), 8, 2, 64, True),
          "a very ragged batch": ((1500, 700, 300, 90, 60, 40, 30, 30), 8, 2, 64, True)}


def naive(q, k, v, lens, causal):
    """What one writes first: each sequence alone, all scores at once."""
    return attention(q, k, v, Segments.packed(lens), causal=causal, backend="reference")


def padded(q, k, v, lens, causal):
    """What most training code does: pad to the longest, hide the padding with a dense mask."""
    longest, real = max(lens), torch.tensor(lens)
    mask = (torch.arange(longest)[None] < real[:, None])[:, None, None]                 # (B, 1, 1, keys)
    if causal:
        mask = mask & torch.ones(longest, longest, dtype=torch.bool).tril()
    q, k, v = (pad_sequence(t.split(lens), batch_first=True).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
    return torch.cat([o[:n] for o, n in zip(out, lens)])


def tiled(q, k, v, lens, causal):
    return attention(q, k, v, Segments.packed(lens), causal=causal, backend="tiled")


def ours(q, k, v, lens, causal):
    return attention(q, k, v, Segments.packed(lens), causal=causal)


SIDES = {side.__name__: side for side in (naive, padded, tiled, ours)}


def status(key: str) -> int:
    """A figure of this process in bytes: VmRSS is resident now, VmHWM its peak since it was last reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def peak_of(call) -> int:
    """Bytes that a call needs above what was resident before it (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)                     # what earlier calls left must not serve this one
    Path("/proc/self/clear_refs").write_text("5")               # resets the peak
    level = status("VmRSS")
    call()
    return status("VmHWM") - level


def work(pipe, side, shape, dtype, training):
    """One side: on every request one measurement, (seconds, bytes above the level before)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lens, heads, kv_heads, head_dim, causal = SHAPES[shape]
    qkv = [torch.randn(sum(lens), h, head_dim, dtype=dtype, requires_grad=training) for h in (heads, kv_heads, kv_heads)]
    do = torch.randn(sum(lens), heads, head_dim, dtype=dtype)

    def call():
        with torch.set_grad_enabled(training):
            out = SIDES[side](*qkv, lens, causal)
            if training:
                torch.autograd.grad(out, qkv, do)

    def seconds():
        began = time.process_time()
        call()
        return time.process_time() - began
    while request := pipe.recv():
        pipe.send(peak_of(call) if request == "memory" else seconds())


def compare(shape, dtype, training, rounds):
    """{side: (seconds of each round, peak bytes)}; the memory is measured first, which warms up too."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for side in SIDES:
        pipes[side], other = context.Pipe()
        context.Process(target=work, args=(other, side, shape, dtype, training), daemon=True).start()

    def ask(request):
        for side, pipe in pipes.items():
            pipe.send(request)
            yield side, pipe.recv()
    peaks, times = dict(ask("memory")), {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, seconds in ask("time"):
            times[side].append(seconds)
    for pipe in pipes.values():
        pipe.send("")
    return {side: (times[side], peaks[side]) for side in SIDES}


def bench_attention(args):
    """Time and peak memory of attention alone, against naive and against padded with a dense mask."""
    rows = []
    print("CPU seconds and peak MB of one call, 1 thread; x: how many times as much as ours (range over rounds)")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for training in (False, True):
                sides = compare(shape, dtype, training, args.rounds)
                print(f"{shape}, {str(dtype)[6:]}, {'training' if training else 'inference'}")
                times, peak = sides["ours"]
                for side, (runs, bytes_) in sides.items():
                    ratios = [a / b for a, b in zip(runs, times)]
                    row = dict(bench="attention", shape=shape, dtype=str(dtype), train=training, side=side, seconds=min(runs),
                               bytes=bytes_, ratio=statistics.median(ratios), low=min(ratios), high=max(ratios),
                               memory_ratio=bytes_ / max(peak, 1 << 20))
                    print("    {side:7} {seconds:7.3f} s {mb:5.0f} MB   time {ratio:5.1f}x ({low:.1f}-{high:.1f})   memory "
                          "{memory_ratio:5.1f}x".format(mb=bytes_ / 2**20, **row), flush=True)
                    rows.append(row)
    return rows


def bench_full(args):
    """One forward and backward of a stage of the 7b preset with random weights, in this machine's memory: frozen
    weights in bfloat16, activations checkpointed, a clip of 16 frames; seconds, peak, and what the plan had said."""
    ctypes.CDLL("libc.so.6").mallopt(-3, 4 << 20)               # glibc's own mmap threshold rises to 32 MB: holes in the heap
    run, phase, objective = meta_objective(args.stage, "7b", "--micro-batch", "1", "--recompute", "blocks")
    most, flops = measure_step(run, phase, objective, "blocks")
    stored = sum(p.numel() * p.element_size() for p in objective.parameters())
    print(f"plan: weights {stored / 1e9:.2f} + step {most / 1e9:.2f} = {(stored + most) / 1e9:.2f} GB, "
          f"{flops / 1e12:.1f} TFLOP", flush=True)
    for module in objective.modules():
        for name, p in module.named_parameters(recurse=False):
            value = torch.empty(p.shape, dtype=p.dtype).normal_(std=0.02) if p.ndim > 1 else torch.ones(p.shape, dtype=p.dtype)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.ones(buffer.shape))
    print(f"weights are there: {status('VmRSS') / 1e9:.2f} GB", flush=True)
    train.wrap(run, objective)
    batch, began = blank_batch(run, phase, objective.model, "cpu"), time.time()
    with model_file.autocast(run.device, True):
        loss = objective(batch, float(batch.weights.sum()), 1)["loss"]
        print(f"forward: {time.time() - began:.0f} s, loss {float(loss.detach()):.2f}, {status('VmHWM') / 1e9:.2f} GB at most", flush=True)
    loss.backward()
    seconds, peak = time.time() - began, status("VmHWM")
    norm = sum(float(p.grad.square().sum()) for p in objective.parameters() if p.requires_grad) ** 0.5
    print(f"stage {args.stage}, forward and backward: {seconds:.0f} s, {flops / seconds / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} "
          f"threads, gradient norm {norm:.3g}, peak {peak / 1e9:.2f} GB; the plan over the peak: {(stored + most) / peak:.3f}")
    return [dict(bench="full", stage=args.stage, seconds=seconds, bytes=peak, planned=stored + most, flops=flops)]


def make_take(path, seconds, width, height, fps=30):
    """An H.264 take with a key frame every 250 frames: a textured scene that a shaking camera pans over."""
    rng = np.random.default_rng(0)
    cells = width // 20 + 40
    coarse = rng.integers(0, 255, (cells, cells, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    scene = np.clip(coarse.astype(int) + rng.integers(-20, 20, coarse.shape), 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=fps, options={"preset": "veryfast", "g": "250", "bf": "2"})
        stream.width, stream.height = width, height
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        for i in range(seconds * fps):
            x, y = (int(300 + 250 * math.sin(i / 97 + k) + rng.integers(-2, 3)) for k in (0, 1))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[y:y + height, x:x + width]), format="rgb24")))
        out.mux(stream.encode())


def from_start(video, start, end, frames, size):
    """What a loader without seeking does: decode from the first frame, keep those on display at the moments."""
    wanted, out = start + (end - start) * (np.arange(frames) + 0.5) / frames, []
    with av.open(str(video)) as container:
        container.streams.video[0].thread_type, container.streams.video[0].codec_context.thread_count = "NONE", 1
        shown = None
        for frame in container.decode(video=0):
            while len(out) < frames and frame.time > wanted[len(out)] + 1e-4:
                out.append(data._pixels(shown, size))
            if len(out) == frames:
                return np.stack(out)
            shown = frame
    return np.stack(out + [data._pixels(shown, size)] * (frames - len(out)))


def decord_clip(video, start, end, frames, size):
    """decord's reader, one thread, frames by index: what many video MLLMs use."""
    import decord
    reader = decord.VideoReader(str(video), ctx=decord.cpu(0), num_threads=1, width=size, height=size)
    moments = start + (end - start) * (np.arange(frames) + 0.5) / frames
    return reader.get_batch([int(t * reader.get_avg_fps() + 1e-6) for t in moments]).asnumpy().transpose(0, 3, 1, 2)


def bench_data(args):
    """Random 0.7 s clips, 16 frames at 336 pixels, one core, from a 3-minute take of 448 pixels: decoded from the file's
    start, or sought; and from a take of 1080p."""
    with tempfile.TemporaryDirectory() as folder:
        take, large, rng = Path(folder) / "take.mp4", Path(folder) / "1080p.mp4", np.random.default_rng(0)
        make_take(take, 180, 448, 448)
        make_take(large, 34, 1920, 1080)                        # five key frames: as far from the last one as in a long take
        starts = rng.uniform(0, 179, 12)
        sides = {"from the start": partial(from_start, take), "read_clip": partial(data.read_clip, take)}
        if importlib.util.find_spec("decord"):
            sides["decord"] = partial(decord_clip, take)
        else:
            print("decord is not installed: not compared")
        pictures = {name: read(starts[0], starts[0] + 0.7, 16, 336) for name, read in sides.items()}
        for name in pictures:
            apart = np.abs(pictures[name].astype(int) - pictures["read_clip"]).mean()
            print(f"    {name}: pixels {apart:.2f} of 255 from read_clip's", flush=True)
        times = {name: [] for name in sides}
        for start in starts:                                    # the sides take turns, clip by clip
            for name, read in sides.items():
                began = time.process_time()
                read(start, start + 0.7, 16, 336)
                times[name].append(time.process_time() - began)
        times["read_clip, 1080p"] = []
        for start in starts:
            began = time.process_time()
            data.read_clip(large, start % 33, start % 33 + 0.7, 16, 336)
            times["read_clip, 1080p"].append(time.process_time() - began)
    out = []
    for name, runs in times.items():
        ratio = sum(runs) / sum(times["read_clip"])
        print(f"    {name:15} {1000 * statistics.mean(runs):7.1f} ms a clip, {len(runs) / sum(runs):6.1f} clips/s a core, "
              f"{ratio:6.2f}x the time of read_clip")
        out.append(dict(bench="data", side=name, seconds=statistics.mean(runs), ratio=ratio))
    return out


def interleaved(sides, rounds):
    """{side: CPU seconds of each round}; the sides take turns, after one call each to warm up."""
    times = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, call in sides.items():
            began = time.process_time()
            call()
            if turn:
                times[name].append(time.process_time() - began)
    return times


def show_ratios(bench, times, ours):
    """Print each side against ours: median and range of the ratios of one round."""
    rows = []
    for name, runs in times.items():
        ratios = [a / b for a, b in zip(runs, times[ours])]
        rows.append(dict(bench=bench, side=name, seconds=statistics.median(runs), ratio=statistics.median(ratios), low=min(ratios), high=max(ratios)))
        print("    {side:52} {seconds:8.3f} s   {ratio:6.2f}x ({low:.2f}-{high:.2f})".format(**rows[-1]), flush=True)
    return rows


def toy_words(folder):
    """A small sentencepiece vocabulary, trained on the spot."""
    out = Path(folder) / "tokenizer.model"
    lines = [data.narration(v, c, p, h) for v in data.VERBS for c in data.COLOURS for p in data.PATTERNS for h in ("left", "right")]
    with open(out, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, vocab_size=400, model_type="bpe",
                                                 byte_fallback=True, hard_vocab_limit=False, num_threads=1, minloglevel=2)
    return data.Tokenizer(out)


def small_model():
    """Preset small with random weights, all four sides of stage 3, ready to answer."""
    torch.manual_seed(0)
    return Exo2Ego(replace(PRESETS["small"], mapping="resnet")).eval()


@torch.no_grad()
def bench_score(args):
    """Preset small, random weights, one thread: choosing among five options, eight questions about one video."""
    model, frames = small_model(), torch.randint(0, 255, (1, 8, 3, 112, 112), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        words = toy_words(folder)
    pairs = [(f"Question {i}: which of these do I do to the block?", f"I {verb} the red block with the left hand.")
             for i in range(8) for verb in ("cut", "push", "wipe", "tap", "pull")]

    def alone(encode_once):
        visual, scores = model.encode_ego(frames), []
        for question, answer in pairs:
            visual = visual if encode_once else model.encode_ego(frames)
            ids, labels = words.chat([{"user": question, "assistant": answer}], visual.shape[1])
            scores.append(float(model.log_likelihood(visual, torch.tensor(ids), torch.tensor(labels), [len(ids)])))
        return np.array(scores)

    def cached():
        return eval.VideoContext(model, words, model.encode_ego(frames)).score(pairs)[:, 0]
    print(f"8 questions x 5 options about one video: largest difference of scores {np.abs(cached() - alone(True)).max():.1e}")
    sides = {"each pair alone, video encoded each time": lambda: alone(False), "each pair alone, video encoded once": lambda: alone(True),
             "prefix cached, options packed": cached}
    return show_ratios("score", interleaved(sides, args.rounds), "prefix cached, options packed")


@torch.no_grad()
def bench_generate(args):
    """Preset small, random weights, one thread: 64 tokens about a video whose features are there."""
    model, frames = small_model(), torch.randint(0, 255, (1, 8, 3, 112, 112), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        words = toy_words(folder)
    visual = model.encode_ego(frames)
    ids = torch.tensor(words.chat([{"user": "What am I doing?"}], visual.shape[1])[0])

    def ours():
        return model.generate(visual, [ids], eos=-1, max_new=64)[0]

    def uncached():
        x, told = model.insert_visual_tokens(visual, ids), []
        for _ in range(64):
            hidden = model.decoder(x, Segments.packed([len(x)]), torch.arange(len(x)))
            told.append(int(model.decoder.logits(hidden[-1:]).argmax()))
            x = torch.cat([x, model.decoder.embed(torch.tensor(told[-1:]))])
        return told
    theirs = as_transformers(model)

    def reference():
        return theirs.generate(inputs_embeds=model.insert_visual_tokens(visual, ids)[None], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0,
                               attention_mask=torch.ones(1, len(ids), dtype=torch.long))[0].tolist()
    print(f"64 tokens after {len(ids)}: equal tokens: cache and none {ours() == uncached()}, transformers {ours() == reference()}")
    return show_ratios("generate", interleaved({"no cache": uncached, "transformers generate": reference, "ours": ours}, args.rounds), "ours")


@torch.no_grad()
def bench_decode(args):
    """Preset small, one thread: 16 more tokens after contexts of several lengths; our packed cache beside transformers'
    DynamicCache, the decoder alone in both (no sampling code)."""
    from transformers import DynamicCache
    model, rows = small_model(), []
    theirs, decoder = as_transformers(model), model.decoder
    for batch, context in ((1, 256), (1, 1024), (1, 2000), (8, 256), (8, 1024), (125, 80)):
        ids = torch.randint(0, 32000, (batch, context + 16))
        start = model_file.KVCache(batch)
        decoder(decoder.embed(ids[:, :context].flatten()), Segments.cached([context] * batch, [context] * batch),
                torch.arange(context).repeat(batch), start)
        kept, past = theirs(ids[:, :context], use_cache=True).past_key_values, {}

        def ours():
            cache = model_file.KVCache(batch)
            cache.lens, cache.layers = (context,) * batch, dict(start.layers)           # every call starts from the same keys
            for t in range(context, context + 16):
                hidden = decoder(decoder.embed(ids[:, t]), Segments.cached([1] * batch, [t + 1] * batch), torch.full((batch,), t), cache)
                past["ours"] = decoder.logits(hidden)

        def reference():
            cache = DynamicCache([(layer.keys, layer.values) for layer in kept.layers])
            for t in range(context, context + 16):
                past["theirs"] = theirs(ids[:, t:t + 1], past_key_values=cache, use_cache=True).logits[:, 0]
        times = interleaved({"transformers": reference, "ours": ours}, args.rounds)
        print(f"{batch} x 16 tokens after {context}: logits {(past['ours'] - past['theirs']).abs().max():.1e} apart, "
              f"{statistics.median(times['ours']) / 16 * 1000:.1f} ms a step")
        rows += [row | dict(batch=batch, context=context) for row in show_ratios("decode", times, "ours")]
    return rows


def bench_all(args):
    """Everything that fits one sitting of about an hour: attention, data, score, generate, decode, step, parts, scaling, run."""
    names = ("attention", "data", "score", "generate", "decode", "step", "parts", "scaling", "run")
    return sum((BENCHES[name](parser().parse_args([name, "--rounds", str(args.rounds)])) for name in names), [])


def as_transformers(model):
    """The decoder's weights, shared and not copied, in transformers' MistralForCausalLM (without low-rank updates)."""
    from transformers import MistralConfig, MistralForCausalLM
    c = model.decoder.cfg
    config = MistralConfig(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.mlp_dim, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, sliding_window=None, max_position_embeddings=4096)
    with torch.device("meta"):
        theirs = MistralForCausalLM(config).eval()
    weights = {rename(n, MISTRAL_NAMES): t for n, t in model.decoder.state_dict().items() if ".lora_" not in n}
    theirs.load_state_dict(weights, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(model.decoder.lm_head.weight.device)    # its table is no weight
    return theirs


# ------------------------------------------------------------------- a training step beside the library composition
def make_batch(stage, cfg, clips=8, views=2, text=(8, 200)):
    """A micro batch of the preset's shapes with ragged texts; stage 2 shows each moment in `views` exo clips."""
    rng = np.random.default_rng(0)
    moments = clips // views if stage == 2 else clips
    visual = cfg.visual_tokens * (1 if stage == 1 else 2)
    lens, ids, labels = rng.integers(*text, moments), [], []
    for n in lens:
        words = rng.integers(10, cfg.vocab, int(n)).tolist()
        ids.append([1] + [VIDEO] * visual + words)
        labels.append([IGNORE] * (1 + visual + len(words) // 3) + words[len(words) // 3:])
    pixels = [torch.from_numpy(rng.integers(0, 255, (n, cfg.frames, 3, cfg.image_size, cfg.image_size), dtype=np.uint8)) for n in (moments, clips)]
    flat = torch.tensor(sum(labels, []))
    return data.Batch(None if stage == 1 else pixels[0], None if stage == 3 else pixels[1], torch.arange(clips) // (views if stage == 2 else 1),
                      torch.tensor(sum(ids, [])), flat, (flat != IGNORE).float() * (views if stage == 2 else 1), [len(i) for i in ids],
                      torch.arange(moments), clips, [""] * moments, [""] * moments, [])


def our_objective(stage, preset, *more, device="cpu"):
    """-> (objective of train.py, wrapped as train.py does; what trains, by name; the run): random weights, no dropout."""
    cfg = train.parse(["--stage", str(stage), "--preset", preset, *more])
    run, phase = train.Run(cfg, 0, 1, torch.device(device), cfg.dtype == "bfloat16"), train.stages_of(cfg)[0]
    torch.manual_seed(0)
    with torch.device(device):
        model = Exo2Ego(replace(PRESETS[preset], mapping="resnet" if stage > 1 else "none", lora=stage == 3, lora_dropout=0.0))
        objective = train.Objective(model, None, phase, cfg, 1)
    leave_out_idle(model, preset, stage)
    trained = train.freeze(objective, run.bf16)
    return train.wrap(run, objective), trained, run


def our_step(stage, batch, dtype=torch.float32, compile=False, preset="small", device="cpu"):
    """-> (objective, a step): AdamW is the optimiser on both sides."""
    objective, trained, run = our_objective(stage, preset, "--dtype", str(dtype)[6:], *["--compile"] * compile, device=device)
    return objective, make_step(objective, trained, run, batch)


def make_step(objective, trained, run, batch):
    """Forward, backward, clipping and AdamW of one micro batch, as train.py's loop: returns the loss."""
    optimizers = train.make_optimizers(trained, {n: 1e-4 for n in trained}, replace(run.cfg, optimizer="adamw"))

    def step():
        with model_file.autocast(run.device, run.bf16):
            loss = objective(batch, float(batch.weights.sum()), batch.samples)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
    return step


class LowRank(torch.nn.Module):
    """What LoRA libraries wrap a linear layer in."""
    def __init__(self, base, ours):
        super().__init__()
        self.base, self.a, self.b, self.scale = base, torch.nn.Parameter(ours.lora_a.detach().clone()), torch.nn.Parameter(
            ours.lora_b.detach().clone()), ours.lora_scale

    def forward(self, x):
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


def composed_step(stage, batch, dtype, preset="small", device="cpu", checkpointed=False):
    """The same model and weights as a user composes them: CLIPVisionModel, a connector, MistralForCausalLM, padded
    batches, full logits; stage 2 the literal recipe: each pair by itself, gradients everywhere, nothing shared. On a GPU
    what is frozen is bfloat16, as anyone would store seven billion weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    objective, _, _ = our_objective(stage, preset, "--dtype", "bfloat16" if device == "cuda" else "float32", device=device)
    model, cfg = objective.model, objective.model.cfg

    def clip(vit):
        theirs = CLIPVisionModel(CLIPVisionConfig(hidden_size=cfg.vit_width, intermediate_size=4 * cfg.vit_width, num_hidden_layers=cfg.vit_layers + 1,
                                                  num_attention_heads=cfg.vit_heads, image_size=cfg.image_size, patch_size=cfg.patch))
        known = theirs.state_dict()
        prefix = "vision_model." if any(n.startswith("vision_model.") for n in known) else ""
        known.update({prefix + rename(n, CLIP_NAMES): t for n, t in vit.state_dict().items()})
        theirs.load_state_dict(known)
        return theirs.to(device).train()
    exo, ego, llm = clip(model.exo_vit), model.ego_vit and clip(model.ego_vit), as_transformers(model).train()
    if checkpointed:
        exo.gradient_checkpointing_enable(), llm.gradient_checkpointing_enable()
    if stage == 3:
        for block, ours in zip(llm.model.layers, model.decoder.blocks):
            for owner, name, own in ((block.self_attn, "q_proj", ours.q), (block.self_attn, "k_proj", ours.k), (block.self_attn, "v_proj", ours.v),
                                     (block.self_attn, "o_proj", ours.out), (block.mlp, "gate_proj", ours.gate), (block.mlp, "up_proj", ours.up),
                                     (block.mlp, "down_proj", ours.down)):
                setattr(owner, name, LowRank(getattr(owner, name), own))
    exo_connector, ego_connector = (c and (timm_connector(c) or c) for c in (model.exo_connector, model.ego_connector))
    parts = {"exo_vit": exo, "ego_vit": ego, "exo_connector": exo_connector, "ego_connector": ego_connector, "F": model.F, "G": model.G}
    for module in (llm, *filter(None, parts.values())):
        module.requires_grad_(False)
    for name in objective.stage.trains:
        if name in parts:
            parts[name].requires_grad_(True)
    for module in llm.modules():
        if isinstance(module, LowRank):
            module.a.requires_grad_(True), module.b.requires_grad_(True)
    trained = [p for module in (llm, *filter(None, parts.values())) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0, fused=True)
    mean, std = (torch.tensor(v, device=device)[:, None, None] * 255 for v in (model_file.PIXEL_MEAN, model_file.PIXEL_STD))

    def grid(vit, frames):
        x = (frames.flatten(0, 1).float() - mean) / std
        hidden = vit(x, output_hidden_states=True).hidden_states[-2][:, 1:]
        return hidden.unflatten(1, (cfg.patches_per_side, cfg.patches_per_side)).unflatten(0, (-1, cfg.frames))

    def text_loss(visual, batch):
        texts, labels = batch.ids.split(batch.lens), batch.labels.split(batch.lens)
        again = len(visual) // len(texts)                                   # every exo view repeats its text
        rows = [i for i in range(len(texts)) for _ in range(again)]
        longest = max(batch.lens)
        ids = torch.stack([F.pad(texts[i], (0, longest - len(texts[i]))) for i in rows])
        goal = torch.stack([F.pad(labels[i], (0, longest - len(labels[i])), value=-100) for i in rows])
        mask = torch.stack([torch.arange(longest, device=device) < len(texts[i]) for i in rows])
        embeddings = llm.get_input_embeddings()(ids.clamp(min=0))
        embeddings = embeddings.masked_scatter((ids == VIDEO)[..., None], visual.to(embeddings.dtype))
        return llm(inputs_embeds=embeddings, attention_mask=mask.long(), labels=goal).loss

    def forward(batch):
        if stage == 1:
            loss = text_loss(exo_connector(grid(exo, batch.exo)), batch)
        elif stage == 3:
            x = grid(ego, batch.ego)
            loss = text_loss(torch.cat([ego_connector(x), exo_connector(model.F(x))], 1), batch)
        else:
            x, y = grid(ego, batch.ego[batch.ego_of]), grid(exo, batch.exo)             # an ego clip again for each view
            loss = text_loss(torch.cat([ego_connector(x), exo_connector(model.F(x))], 1), batch)
            loss = loss + 5 * model_file.feature_kl(exo_connector(y), exo_connector(model.F(x))).mean()
            for there, here in ((model.G(model.F(x)), x), (model.F(model.G(y)), y)):
                a, b = (F.layer_norm(t.float(), t.shape[-1:]) for t in (there, here))
                loss = loss + 3 * (a - b).abs().mean()
        return loss

    def step(batch=batch):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
    return objective, step


def timm_connector(ours):
    """VideoLLaMA2's connector as published, of timm's own blocks, with our weights; None where timm is not installed."""
    if not importlib.util.find_spec("timm"):
        return None
    sys.path.insert(0, str(Path(__file__).with_name("golden")))
    from make import STC
    theirs = STC(ours.s1.b1.conv1.conv.in_channels, ours.readout[0].in_features, len(ours.s1))
    theirs.load_state_dict(ours.state_dict())
    return theirs.to(ours.readout[0].weight.device)


STEP_SIDES = {"composition": composed_step, "composition, heap kept": composed_step, "ours": our_step,
              "ours, --compile": partial(our_step, compile=True), "ours, float32": our_step}


def computed(dtype):
    """What the CPU multiplies in fastest: bfloat16 where it has the instructions for it, else float32."""
    return dtype if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def step_worker(pipe, side, stage, dtype, clips, preset):
    """One side in a process of its own: answers "loss", "memory", "time", and "peak" (FLOP/s of a matmul)."""
    torch.set_num_threads(1)
    if side != "composition":
        train.tune_malloc()                                                   # as train.py does
    batch = make_step_batch(stage, preset, clips)
    _, step = STEP_SIDES[side](stage, batch, torch.float32 if side.endswith("float32") else dtype, preset=preset)
    while request := pipe.recv():
        if request == "time":
            began = time.process_time()
            step()
            pipe.send(time.process_time() - began)
        elif request == "peak":
            a = torch.randn(2048, 2048, dtype=computed(dtype))
            began = time.process_time()
            for _ in range(4):
                a @ a
            pipe.send(4 * 2 * 2048 ** 3 / (time.process_time() - began))
        else:
            pipe.send(step() if request == "loss" else peak_of(step))


def make_step_batch(stage, preset, clips):
    """What the sides of `step` are given: at small texts of 8 to 199 tokens, at toy of 20 to 39, as the micro-world has them."""
    return make_batch(stage, PRESETS[preset], clips, text=(20, 40) if preset == "toy" else (8, 200))


def bench_step(args):
    """A training step of stages 1, 2, 3 at preset small (8 clips with texts of 8 to 199 tokens) or toy (32 clips), one thread:
    ours, eager and compiled, beside the library composition, eager (stage 2: the literal recipe), as it is and with our
    setting of glibc's heap; share of the matmul peak."""
    preset = args.preset
    clips = args.clips or (32 if preset == "toy" else 8)
    context, rows, dtype = multiprocessing.get_context("spawn"), [], getattr(torch, args.dtype)
    print(f"connector of the composition: {'timm' if importlib.util.find_spec('timm') else 'ours, timm is not installed'}")
    for stage in args.stages:
        batch, pipes = make_step_batch(stage, preset, clips), {}
        for side in STEP_SIDES:
            if dtype == torch.bfloat16 or not side.endswith("float32"):
                pipes[side], other = context.Pipe()
                context.Process(target=step_worker, args=(other, side, stage, dtype, clips, preset), daemon=True).start()

        def ask(request):
            answers = {}
            for side, pipe in pipes.items():                                # one at a time
                pipe.send(request)
                answers[side] = pipe.recv()
            return answers
        loss, _, memory = ask("loss"), ask("time"), [ask("memory") for _ in range(3)]       # compiled code is there after two steps
        memory = {side: statistics.median(m[side] for m in memory) for side in pipes}       # a heap's holes differ by 10 %
        rounds, peaks = [], []
        for _ in range(args.rounds):
            rounds.append(ask("time"))
            peaks.append(ask("peak")["ours"])                               # the best round is the peak: the machine is noisy
        cfg = train.parse(["--stage", str(stage), "--preset", preset, "--optimizer", "adamw", "--batch", str(clips)])
        run, phase = train.Run(cfg, 0, 1, torch.device("cpu"), False), train.stages_of(cfg)[0]
        flops = step_flops(run, phase, stage, batch, preset)
        print(f"stage {stage}, {preset}, {args.dtype}, {clips} clips: {flops / 1e9:.0f} GFLOP; first losses "
              f"{ {side: round(value, 5) for side, value in loss.items()} }; matmul peak ({str(computed(dtype))[6:]}) {max(peaks) / 1e9:.0f} GFLOP/s")
        for side in pipes:
            ratios, seconds = [r["composition"] / r[side] for r in rounds], statistics.median(r[side] for r in rounds)
            rows.append(dict(bench="step", stage=stage, preset=preset, dtype=args.dtype, clips=clips, side=side, seconds=seconds,
                             ratio=statistics.median(ratios), low=min(ratios), high=max(ratios), memory=memory[side],
                             memory_ratio=memory[side] / memory["composition"], flops=flops, share=flops / seconds / max(peaks)))
            print("    {side:16} {seconds:7.2f} s a step, the composition {ratio:.2f}x ({low:.2f}-{high:.2f}); {mb:5.0f} MB, {memory_ratio:.2f}x; "
                  "{share:.0%} of the matmul peak".format(mb=memory[side] / 2**20, **rows[-1]), flush=True)
        for pipe in pipes.values():
            pipe.send("")
    return rows


def step_flops(run, phase, stage, batch, preset):
    """FLOPs of our step on this batch, counted on the meta device."""
    with torch.device("meta"):
        model = Exo2Ego(replace(PRESETS[preset], mapping="resnet" if stage > 1 else "none", lora=stage == 3, lora_dropout=0.0))
        objective = train.Objective(model, None, phase, run.cfg, 1)
    train.freeze(objective, False)
    meta = replace(batch, ego=None if batch.ego is None else batch.ego.to("meta"), exo=None if batch.exo is None else batch.exo.to("meta"))
    maths = Arithmetic(torch.float32)
    train.wrap(run, objective)
    with Meter([*objective.parameters(), *objective.buffers()]) as meter, maths:
        torch.autograd.backward(objective(meta, float(batch.weights.sum()), batch.samples)["loss"])
    return meter.flops


def bench_parts(args):
    """Where a step of ours goes: CPU seconds of each part, which sum to the step (stage 1, 2, 3; preset small); reading
    the clips (from the micro-world's videos) is a worker's, beside the step."""
    train.tune_malloc()
    rows = []
    for stage in args.stages:
        batch = make_batch(stage, PRESETS["small"])
        objective, trained, run = our_objective(stage, "small")
        make_step(objective, trained, run, batch)()
        spent, stack = {}, []
        for name, module in objective.model.named_children():
            def before(*_, name=name):
                stack.append((name, time.process_time(), 0.0))

            def after(*_):
                name, began, inside = stack.pop()
                took = time.process_time() - began
                spent[name] = spent.get(name, 0) + took - inside
                if stack:
                    stack[-1] = (*stack[-1][:2], stack[-1][2] + took)
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
        began = time.process_time()
        loss = objective(batch, float(batch.weights.sum()), batch.samples)["loss"]
        forward = time.process_time() - began
        spent["losses and the rest of forward"] = forward - sum(spent.values())
        began = time.process_time()
        loss.backward()
        spent["backward"] = time.process_time() - began
        optimizers = train.make_optimizers(trained, {n: 1e-4 for n in trained}, replace(run.cfg, optimizer="adamw"))
        began = time.process_time()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        spent["clipping and optimiser"] = time.process_time() - began
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            log = train.Log(Path(folder) / "log.jsonl", 0)
            next(log.timed(iter([batch]), 0))
            began = time.process_time()
            log.step(10, 10, train.StepCounts(samples=8, tokens=len(batch.ids)), {"loss": float(loss.detach())}, {"step": 10, "lr": 1e-4, "grad_norm": 1.0, "skipped": 0})
            spent["logging"] = time.process_time() - began
            phase = train.stages_of(train.parse(["--stage", str(stage)]))[0]
            manifest = data.toy_split(Path(folder) / "toy", phase.split, data.World(**{phase.split: 8, "exo_cams": 2 if stage == 2 else 1}))
            loader = data.Loader(data.read_manifest(manifest), PRESETS["small"], toy_words(folder), view=phase.view, supervise=phase.supervise, batch=8)
            began = time.process_time()
            loader.batch(0)
            read = time.process_time() - began
        total = sum(spent.values())
        print(f"stage {stage}: {total:.2f} s; the worker reads the next batch in {read:.2f} s")
        rows.append(dict(bench="parts", stage=stage, part="reading, in the worker", seconds=read))
        for name, seconds in spent.items():
            print(f"    {name:32} {seconds:7.3f} s {seconds / total:5.0%}")
            rows.append(dict(bench="parts", stage=stage, part=name, seconds=seconds))
    return rows


def bench_scaling(args):
    """A step's cost over clips, text length and frames (stage 1, preset small): seconds, and the slope on log axes."""
    train.tune_malloc()
    rows, small = [], PRESETS["small"]
    for knob, values in (("clips", (1, 2, 4, 8)), ("text", (64, 128, 256, 512, 1024)), ("frames", (4, 8, 16, 32))):
        seconds = []
        for value in values:
            cfg = replace(small, frames=value) if knob == "frames" else small
            text = (value, value + 1) if knob == "text" else (64, 65)
            batch = make_batch(1, cfg, clips=value if knob == "clips" else 2, text=text)
            PRESETS["small"] = cfg
            _, step = our_step(1, batch)
            PRESETS["small"] = small
            step()
            runs = []
            for _ in range(args.rounds):
                began = time.process_time()
                step()
                runs.append(time.process_time() - began)
            seconds.append(min(runs))
            rows.append(dict(bench="scaling", knob=knob, value=value, seconds=seconds[-1]))
        slope = np.polyfit(np.log(values), np.log(seconds), 1)[0]
        print(f"    {knob:7} {dict(zip(values, (round(t, 2) for t in seconds)))} s; slope on log axes {slope:.2f}", flush=True)
    if args.plot:
        from matplotlib import pyplot
        figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
        for knob, label in (("clips", "clips"), ("frames", "frames a clip (2 clips)"), ("text", "text tokens (2 clips)")):
            axes.plot(*zip(*((row["value"], row["seconds"]) for row in rows if row["knob"] == knob)), "o-", label=label)
        axes.set(xscale="log", yscale="log", xlabel="how many", ylabel="seconds a step", title="stage 1, preset small, one thread")
        axes.legend()
        figure.savefig(args.plot, dpi=110)
    return rows


def bench_run(args):
    """Whole runs of stage 1 as a user starts them, presets toy and small: start-up, share of time waiting for the
    loader, two processes of one thread beside one."""
    root, env, rows = Path(__file__).parents[1], os.environ | {"OMP_NUM_THREADS": "1"}, []

    def python(*words):
        return subprocess.run([sys.executable, *map(str, words)], cwd=root, env=env, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        python("data.py", "toy", "pairs", "corpus", "ego", "--out", folder / "toy", "--scale", "0.3")
        watch = folder / "watch.py"
        watch.write_text(f"import sys, time\nsys.path.insert(0, {str(root)!r})\nimport data, train\nplain, waited = data.Loader.stream, []\n"
                         "def stream(self, *args):\n    batches = plain(self, *args)\n    while True:\n        began = time.perf_counter()\n"
                         "        try:\n            batch = next(batches)\n        except StopIteration:\n            return\n"
                         "        waited.append(time.perf_counter() - began)\n        yield batch\ndata.Loader.stream, began = stream, time.perf_counter()\n"
                         "train.main(sys.argv[1:])\nprint('WAITED', sum(waited[2:]))\n")
        for preset, steps, more in (("toy", 60, ()), ("small", 8, ("--optimizer", "adamw", "--batch", 8))):
            base = folder / f"{preset}0"
            python("train.py", "--stage", 0, "--preset", preset, "--data", folder / "toy", "--out", base, "--steps", 2, "--batch", 8, "--no-eval")

            def stage1(out, steps, ranks=1, script="train.py", clips=folder / "toy"):
                """-> (what it printed, its log)"""
                launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks] if ranks > 1 else []
                said = python(*launch, script, "--stage", 1, "--data", clips, "--base", base, "--init", base, "--preset", preset,
                              "--out", folder / out, "--no-eval", "--steps", steps, *more)
                return said, [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]
            def waiting(out, **clips):
                """Share of the time, after two steps, in which the model waited for its loader."""
                said, log = stage1(out, steps, script=watch, **clips)
                return float(said.rsplit("WAITED", 1)[1]) / sum(row["seconds"] for row in log[2:])
            starts = []
            for turn in range(3):
                began = time.time()
                stage1(f"{preset}_start{turn}", 1)
                starts.append(time.time() - began)
            share, ratios = waiting(f"{preset}_wait"), []
            for turn in range(args.rounds):
                speeds = [statistics.median(row["clips_per_second"] for row in stage1(f"{preset}{ranks}_{turn}", steps, ranks)[1][4:]) for ranks in (1, 2)]
                ratios.append(speeds[1] / speeds[0])
            rows.append(dict(bench="run", preset=preset, seconds=min(starts), waiting=share, ratio=statistics.median(ratios), low=min(ratios), high=max(ratios)))
            print("preset {preset}: from the command to one step and its checkpoint {seconds:.1f} s; waiting for the loader (1 worker) {waiting:.1%} of the "
                  "time; two processes of one thread {ratio:.2f}x the clips/s of one ({low:.2f}-{high:.2f})".format(**rows[-1]), flush=True)
    return rows


BENCHES = {"plan": bench_plan, "attention": bench_attention, "full": bench_full, "step": bench_step, "parts": bench_parts,
           "scaling": bench_scaling, "run": bench_run, "score": bench_score, "generate": bench_generate, "decode": bench_decode,
           "data": bench_data, "all": bench_all}


def parser():
    """Each bench has flags, and a --help, of its own."""
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    benches = whole.add_subparsers(dest="bench", required=True, metavar="BENCH", help=", ".join(BENCHES))
    one = {}
    for name, bench in BENCHES.items():
        one[name] = benches.add_parser(name, description=bench.__doc__, allow_abbrev=False)
        one[name].add_argument("--json", metavar="FILE", help="append one JSON line a measurement")
        if name not in ("plan", "full"):
            one[name].add_argument("--rounds", type=int, default=3, help="how often the sides take turns (3)")
    for name in ("plan", "full"):
        one[name].add_argument("--stage", type=int, default=1, choices=(0, 1, 2, 3))
    for name in ("step", "parts"):
        one[name].add_argument("--stages", type=int, nargs="*", default=(1, 2, 3))
    plan, step = one["plan"], one["step"]
    plan.add_argument("--preset", default="7b", choices=PRESETS)
    plan.add_argument("--ranks", type=int, default=1, help="processes, a card each (1)")
    plan.add_argument("--memory", type=float, help="GB of a card: what fits?")
    plan.add_argument("--micro-batch", type=int, help="clips per forward (as train.py's)")
    plan.add_argument("--tflops", type=float, default=400, help="what a card does per second (400)")
    step.add_argument("--preset", default="small", choices=("toy", "small"))
    step.add_argument("--clips", type=int, help="8; at toy 32")
    step.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    one["scaling"].add_argument("--plot", metavar="PNG", help="a picture on log axes")
    return whole


def main():
    args = parser().parse_args()
    rows = BENCHES[args.bench](args)
    if args.json:
        with open(args.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
