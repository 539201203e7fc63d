"""Measurements side by side: ratios within one run count, times on a busy machine do not.

    python tests/bench.py attention             # naive, padded with a dense mask, tiled, ours: time and memory
    OMP_NUM_THREADS=2 python tests/bench.py full    # a step of the 7b preset for real: seconds, memory against the plan
    python tests/bench.py tflops                # the same on a GPU: TFLOP/s, ours beside torch's
    python tests/bench.py data                  # clips of a 3-minute take: from its start, by seeking, cached; decord

Every side of a comparison is a process of its own with one thread; the sides take turns, round by round.
"""
import argparse
import ctypes
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import Timer

import data
import eval
import train
from model import Segments, attention

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


def work(pipe, side, shape, dtype, train):
    """One side: on every request one measurement, (seconds, bytes above the level before)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lens, heads, kv_heads, head_dim, causal = SHAPES[shape]
    qkv = [torch.randn(sum(lens), h, head_dim, dtype=dtype, requires_grad=train) for h in (heads, kv_heads, kv_heads)]
    do = torch.randn(sum(lens), heads, head_dim, dtype=dtype)

    def call():
        with torch.set_grad_enabled(train):
            out = SIDES[side](*qkv, lens, causal)
            if train:
                torch.autograd.grad(out, qkv, do)

    def seconds():
        began = time.process_time()
        call()
        return time.process_time() - began
    while request := pipe.recv():
        pipe.send(peak_of(call) if request == "memory" else seconds())


def compare(shape, dtype, train, rounds):
    """{side: (seconds of each round, peak bytes)}; the memory is measured first, which warms up too."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for side in SIDES:
        pipes[side], other = context.Pipe()
        context.Process(target=work, args=(other, side, shape, dtype, train), daemon=True).start()

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
            for train in (False, True):
                sides = compare(shape, dtype, train, args.rounds)
                print(f"{shape}, {str(dtype)[6:]}, {'training' if train else 'inference'}")
                times, peak = sides["ours"]
                for side, (runs, bytes_) in sides.items():
                    ratios = [a / b for a, b in zip(runs, times)]
                    row = dict(bench="attention", shape=shape, dtype=str(dtype), train=train, side=side, seconds=min(runs),
                               bytes=bytes_, ratio=statistics.median(ratios), low=min(ratios), high=max(ratios),
                               memory_ratio=bytes_ / max(peak, 1 << 20))
                    print("    {side:7} {seconds:7.3f} s {mb:5.0f} MB   time {ratio:5.1f}x ({low:.1f}-{high:.1f})   memory "
                          "{memory_ratio:5.1f}x".format(mb=bytes_ / 2**20, **row), flush=True)
                    rows.append(row)
    return rows


def attention_speed(device, dtype, backends, shapes):
    """TFLOP/s of forward and of forward + backward for each backend and (name, lens, heads, kv_heads,
    head_dim, causal); a backward counts 2.5 forwards."""
    for name, lens, heads, kv_heads, d, causal in shapes:
        work = 4 * heads * d * sum(n * (n + 1) / 2 if causal else n * n for n in lens)
        qkv = [torch.randn(sum(lens), h, d, device=device, dtype=dtype, requires_grad=True)
               for h in (heads, kv_heads, kv_heads)]
        for backend in backends:
            run = partial(attention, *qkv, Segments.packed(lens, device), causal=causal, backend=backend)
            names, train = dict(run=run, qkv=qkv, grad=torch.autograd.grad), "grad(run(), qkv, qkv[0])"
            speeds = [work * share / Timer(code, globals=names).blocked_autorange().median / 1e12
                      for code, share in (("run()", 1), (train, 3.5))]
            print(f"{name:26} {backend:6} forward {speeds[0]:8.3f}, with backward {speeds[1]:8.3f} TFLOP/s")


def bench_tflops(args):
    """TFLOP/s of attention on this machine's GPU, ours beside torch's."""
    if not torch.cuda.is_available():
        sys.exit("bench.py tflops needs a GPU; on a CPU: bench.py attention")
    attention_speed("cuda", torch.bfloat16, ("sdpa", "triton"), (
        ("16 frames, bidirectional", (577,) * 16, 16, 16, 64, False),
        ("4 x 1560 tokens, causal", (1560,) * 4, 32, 8, 128, True),
        ("4 x 3081 tokens, causal", (3081,) * 4, 32, 8, 128, True),
        ("ragged, causal", (3081, 1560, 1600, 90, 30, 700), 32, 8, 128, True)))
    return []


def bench_full(args):
    """One forward and backward of a stage of the 7b preset with random weights, in this machine's memory: frozen
    weights in bfloat16, activations checkpointed, a clip of 16 frames; seconds, peak, and what the plan had said."""
    ctypes.CDLL("libc.so.6").mallopt(-3, 4 << 20)               # glibc's own mmap threshold rises to 32 MB: holes in the heap
    cfg = train.parse(["--stage", str(args.stage), "--preset", "7b", "--micro-batch", "1", "--checkpoint-activations",
                       "--dtype", "bfloat16"])
    run, phase = train.Run(cfg, 0, 1, torch.device("cpu"), True), train.phases(cfg)[0]
    with torch.device("meta"):
        model, _ = train.build(replace(run, cfg=replace(cfg, plan=True)))
        objective = train.Objective(model, None, phase, cfg, 1).to("meta")
    train.set_trained(objective, phase, False, True)
    most, flops = eval.measure_step(run, phase, objective, True)
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
    eval.wrap(run, objective)
    batch, began = eval.blank_batch(run, phase, model, "cpu"), time.time()
    with eval.precision(run.device, True):
        loss = objective(batch, float(batch.weights.sum()), 1)["loss"]
        print(f"forward: {time.time() - began:.0f} s, loss {float(loss.detach()):.2f}, {status('VmHWM') / 1e9:.2f} GB at most", flush=True)
        torch.autograd.backward(loss)
    seconds, peak = time.time() - began, status("VmHWM")
    norm = sum(float(p.grad.square().sum()) for p in objective.parameters() if p.requires_grad) ** 0.5
    print(f"stage {args.stage}, forward and backward: {seconds:.0f} s, {flops / seconds / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} "
          f"threads, gradient norm {norm:.3g}, peak {peak / 1e9:.2f} GB; the plan over the peak: {(stored + most) / peak:.3f}")
    return [dict(bench="full", stage=args.stage, seconds=seconds, bytes=peak, planned=stored + most, flops=flops)]


def make_take(path, seconds=180, fps=30, size=448):
    """A 3-minute H.264 take with a key frame every 250 frames: a textured scene that a shaking camera pans over."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (60, 60, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    scene = np.clip(coarse.astype(int) + rng.integers(-20, 20, coarse.shape), 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=fps, options={"preset": "veryfast", "g": "250", "bf": "2"})
        stream.width = stream.height = size
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        for i in range(seconds * fps):
            x, y = (int(300 + 250 * math.sin(i / 97 + k) + rng.integers(-2, 3)) for k in (0, 1))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[y:y + size, x:x + size]), format="rgb24")))
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
    """Random 0.7 s clips, 16 frames at 336 pixels, one core: decoded from the file's start, sought, cached."""
    with tempfile.TemporaryDirectory() as folder:
        take, rng = Path(folder) / "take.mp4", np.random.default_rng(0)
        make_take(take)
        starts = rng.uniform(0, 179, 12)
        rows = [{"id": str(i), "ego": {"video": "take.mp4", "start": s, "end": s + 0.7}, "text": "x"} for i, s in enumerate(starts)]
        data.write_jsonl(Path(folder) / "m.jsonl", rows)
        data.main(["cache", f"{folder}/m.jsonl", "--out", f"{folder}/cache"])
        cached = data.read_manifest(f"{folder}/cache/manifest.jsonl")[0]["ego"]["video"]
        sides = {"from the start": partial(from_start, take), "read_clip": partial(data.read_clip, take), "cached": partial(data.read_clip, cached)}
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
    out = []
    for name, runs in times.items():
        ratio = sum(runs) / sum(times["read_clip"])
        print(f"    {name:15} {1000 * statistics.mean(runs):7.1f} ms a clip, {len(runs) / sum(runs):6.1f} clips/s a core, "
              f"{ratio:6.2f}x the time of read_clip")
        out.append(dict(bench="data", side=name, seconds=statistics.mean(runs), ratio=ratio))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    benches = {"attention": bench_attention, "tflops": bench_tflops, "full": bench_full, "data": bench_data}
    parser.add_argument("bench", choices=benches)
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3), help="of `full`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a measurement")
    args = parser.parse_args()
    rows = benches[args.bench](args)
    if args.json:
        with open(args.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
