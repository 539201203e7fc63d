"""What only a GPU can say about this repository. A machine that is lent for ten minutes a command takes two of them:

    python tests/gpu.py --out DIR --seconds 560 --parts correct,tiles,speed,step    # first what decides something
    python tests/gpu.py --out DIR --seconds 560 --parts compile,stages,run,data,answer

    python tests/gpu.py --out DIR                       # all parts, one JSON line a finding in DIR/gpu.jsonl
    python tests/gpu.py --out DIR --dry                 # every part at tiny sizes on a CPU: does the script itself run?
    python tests/gpu.py --table tests/gpu-h100.jsonl    # the tables of tests/README.md

Every part is a process of its own with a time limit of its own, so that a hang or a dead device costs one part; what
--seconds leaves no time for is said. Rows are written as they are found. A wrong kernel is a row that says so, and never
stops the parts after it. Without git (a bare copy) REVISION=... names the code in every row.

How the rows of "tiles" decide between the two forms of the kernels: tests/kernels/descriptors.py stays where all its cases
in "correct" are right and "turns" has its time below 0.97 of the pointers' in every round, over all shapes of a kernel.
"""
import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"                        # read when the kernels are made
    os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "kernels")]

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench
import cases
import data
import eval
import model as network
import train
from model import PRESETS, Segments, attention, launch

if DRY:
    # What the compiler makes for a CPU is proved by tests/test_kernels.py, and takes it a minute.
    torch.compile = partial(torch.compile, backend="aot_eager")
DEVICE = "cpu" if DRY else "cuda"
PRESET = "toy" if DRY else "7b"
SECONDS = {"correct": 120, "speed": 60, "tiles": 180, "step": 190, "compile": 200, "stages": 200, "data": 120, "run": 220,
           "answer": 90}                                        # limit of each part
if DRY:
    SECONDS = dict.fromkeys(SECONDS, 300)
H100 = 989e12                   # FLOP/s in bfloat16, dense, of an H100 SXM and of an H200, which has more memory only
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-5}      # of the largest true value


def say(out, part, **figures):
    """Append one finding, with what it was found on."""
    import triton
    row = dict(part=part, **figures, card=torch.cuda.get_device_name() if DEVICE == "cuda" else "none (dry)",
               torch=torch.__version__, triton=triton.__version__, revision=os.environ.get("REVISION") or network.git_revision())
    with open(Path(out) / "gpu.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print("  ".join(f"{key} {value}" for key, value in row.items() if key not in ("part", "card", "torch", "triton", "revision")), flush=True)


def free():
    """Give back what earlier measurements left, and begin a new peak."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_of(call, repeats=20, rounds=5):
    """Device seconds of one call: the median round of `repeats` calls. On a GPU all of a round's launches are queued
    while the device is busy with something else, so Python's own time does not count."""
    call()
    if DEVICE == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    found = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(40_000_000)                           # about 20 ms
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1000 / repeats)
    return statistics.median(found)


# ------------------------------------------------------------------------------------------------------ 1 correct
# queries and keys of each segment, heads, kv_heads, causal, window
CASES = cases.CASES | {
    "grouped 4:1, ragged, causal": ((300, 1, 577, 64, 129), (300, 1, 577, 64, 129), 8, 2, True, None),
    "grouped 3:1, new queries on a cache": ((20, 33, 1, 128), (1562, 1575, 1543, 1650), 6, 2, True, None),
    "window of 1024": ((1560, 700), (1560, 700), 4, 1, True, 1024),
    "one new query each": ((1,) * 5, (3081, 70, 1, 64, 1000), 8, 2, True, None),
    "empty segments": ((0, 70, 0, 5), (0, 70, 3, 0), 2, 2, False, None),
    "577 tokens, 16 frames": ((577,) * 16, (577,) * 16, 4, 4, False, None),
    "3,081 tokens": ((3081, 1560), (3081, 1560), 8, 2, True, None)}
if DRY:
    CASES = {name: case for name, case in cases.CASES.items() if "long" not in name}


def run_attention(case, backend, dtype, head_dim):
    """Output and the three gradients of a case, whose inputs are rounded to `dtype`; "float64": the formula."""
    q_lens, k_lens, heads, kv_heads, causal, window = CASES[case]
    rng = torch.Generator().manual_seed(0)
    q, do = (torch.randn(sum(q_lens), heads, head_dim, generator=rng).to(dtype) for _ in range(2))
    k, v = (torch.randn(sum(k_lens), kv_heads, head_dim, generator=rng).to(dtype) for _ in range(2))
    if backend == "float64":
        q, k, v, do = (t.double() for t in (q, k, v, do))
        backend = "reference"
    q, k, v = (t.to(DEVICE).requires_grad_() for t in (q, k, v))
    torch.full((1 << 24,), float("nan"), device=DEVICE)         # freed at once: memory that nobody writes reads as nan
    out = attention(q, k, v, Segments.cached(q_lens, k_lens, DEVICE), causal=causal, window=window, backend=backend)
    return dict(zip(("o", "dq", "dk", "dv"), (out.detach(), *torch.autograd.grad(out, (q, k, v), do.to(DEVICE)))))


def check_cases(dtype, head_dim, form="pointers"):
    """Findings of all cases: error of each tensor as a share of the largest true value, ours and torch's own kernel's."""
    if form == "descriptors":
        import descriptors
        network.triton_kernels = descriptors.triton_kernels     # this process is a worker's, and checks this form alone
    found = []
    # Interpreted, a case takes seconds, and tests/kernels has checked both forms so.
    for case in list(CASES)[:1 if DRY and form == "descriptors" else None]:
        row = dict(case=case, dtype=str(dtype)[6:], head_dim=head_dim, form=form)
        try:
            ours, again = (run_attention(case, "triton", dtype, head_dim) for _ in range(2))
            truth = run_attention(case, "float64", dtype, head_dim)
            torchs = run_attention(case, "sdpa", dtype, head_dim)
            errors, beside, wrong = {}, {}, []
            for name, true in truth.items():
                largest = true.abs().max()
                apart = (ours[name].double() - true).abs() / largest
                errors[name] = float(apart.max())               # nan stays nan
                beside[name] = float((torchs[name].double() - true).abs().max() / largest)
                if not errors[name] <= TOLERANCE[dtype]:
                    row_errors = apart.flatten(1).amax(1)
                    first = int((~(row_errors <= TOLERANCE[dtype])).nonzero()[0])
                    wrong.append(f"{name}: error {errors[name]:.2e}, first wrong row {first}")
            if not all(torch.equal(ours[name], again[name]) for name in ours):
                wrong.append("a rerun is not equal to the bit")
            share = {name: round(errors[name] / beside[name], 2) for name in errors if beside[name] > 0}
            row |= dict(ok=not wrong, wrong=wrong, errors=errors, share_of_torchs=share)
        except Exception as problem:
            row |= dict(ok=False, wrong=[f"{type(problem).__name__}: {str(problem)[:300]}"])
        found.append(row)
    return found


def part_correct(out):
    """Our kernels against the float64 formula, and equal reruns."""
    dtypes = (torch.float16,) if DRY else (torch.bfloat16, torch.float16)       # bfloat16 is not interpreted
    kinds = [(dtype, head_dim, "pointers") for head_dim in ((32,) if DRY else (128, 64, 32)) for dtype in dtypes]
    kinds += [(dtypes[0], head_dim, "descriptors") for head_dim in ((32,) if DRY else (128, 64))]
    # Most of the time is compiling. A worker takes one kind, so a dead one takes no other's rows along.
    with ProcessPoolExecutor(2 if DRY else 8, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for kind, rows in {kind: pool.submit(check_cases, *kind) for kind in kinds}.items():
            try:
                for row in rows.result():
                    say(out, "correct", **row)
            except Exception as problem:
                say(out, "correct", ok=False, wrong=f"{kind}: {type(problem).__name__}: {str(problem)[:300]}")


# -------------------------------------------------------------------------------------------------------- 2 speed
# tokens of each sequence, heads, kv_heads, head_dim, causal
SHAPES = {"ViT: 16 frames of 577, D 64": ((577,) * 16, 16, 16, 64, False),
          "4 x 1,560 causal, 32/8 heads, D 128": ((1560,) * 4, 32, 8, 128, True),
          "4 x 3,081 causal, 32/8 heads, D 128": ((3081,) * 4, 32, 8, 128, True),
          "ragged causal, 32/8 heads, D 128": ((3081, 1560, 1600, 90, 30, 700), 32, 8, 128, True)}
if DRY:
    SHAPES = {"equal": ((40, 40), 2, 2, 32, False), "ragged": ((40, 9), 2, 1, 32, True)}


def attention_work(lens, heads, head_dim, causal):
    """FLOPs of a forward; a backward counts 2.5 times as many."""
    return 4 * heads * head_dim * sum(n * (n + 1) / 2 if causal else n * n for n in lens)


def attention_sides(lens, heads, kv_heads, head_dim, causal, dtype):
    """{side: (a forward that returns the output, its leaves)}; each side has the layout it likes best."""
    def leaves(*shapes):
        return [torch.randn(*shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]
    total, seg, sides = sum(lens), Segments.packed(lens, DEVICE), {}
    packed = leaves((total, heads, head_dim), (total, kv_heads, head_dim), (total, kv_heads, head_dim))
    sides["ours, triton"] = partial(attention, *packed, seg, causal=causal, backend="triton"), packed
    if len(set(lens)) == 1:
        batch = leaves((len(lens), heads, lens[0], head_dim), *[(len(lens), kv_heads, lens[0], head_dim)] * 2)
        for name, kind in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            def torchs(*qkv, kind=SDPBackend.MATH if DRY else kind):
                with sdpa_kernel(kind):
                    return F.scaled_dot_product_attention(*qkv, is_causal=causal, enable_gqa=qkv[0].shape[1] != qkv[1].shape[1])
            inputs, side = batch, f"torch SDPA, {name}"
            try:
                torchs(*inputs)
            except RuntimeError:                                # no kernel of this kind shares keys among heads
                inputs, side = leaves(*[batch[0].shape] * 3), f"{side}, keys repeated"
            sides[side] = partial(torchs, *inputs), inputs
    elif not DRY:
        from torch.nn.attention.varlen import varlen_attn
        repeated = leaves(*[(total, heads, head_dim)] * 3)
        whole = partial(varlen_attn, *repeated, seg.cu_q, seg.cu_k, max(lens), max(lens), window_size=(-1, 0 if causal else -1))
        sides["torch varlen_attn, keys repeated"] = whole, repeated
    return sides


def part_speed(out):
    """TFLOP/s of attention forward, and forward and backward, beside torch's kernels."""
    for shape, (lens, heads, kv_heads, head_dim, causal) in SHAPES.items():
        work = attention_work(lens, heads, head_dim, causal)
        for side, (forward, leaves) in attention_sides(lens, heads, kv_heads, head_dim, causal, torch.float32 if DRY else torch.bfloat16).items():
            try:
                do = torch.randn_like(forward())
                with torch.no_grad():
                    once = seconds_of(forward)
                both = seconds_of(lambda: torch.autograd.grad(forward(), leaves, do))
                say(out, "speed", shape=shape, side=side, ok=True, forward_us=round(once * 1e6, 1), both_us=round(both * 1e6, 1),
                    forward_tflops=round(work / once / 1e12, 4), both_tflops=round(3.5 * work / both / 1e12, 4))
            except Exception as problem:
                say(out, "speed", shape=shape, side=side, ok=False, wrong=f"{type(problem).__name__}: {str(problem)[:300]}")


# -------------------------------------------------------------------------------------------------------- 3 tiles
# (queries, keys), warps, stages: those of a longer list that the compiler here gives few or no spills on sm_90
CANDIDATES = {
    ("forward", 64): ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (128, 64, 4, 4),
                      (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (128, 32, 4, 4), (256, 64, 8, 3), (64, 64, 4, 2)),
    ("forward", 128): ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 3),
                       (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 4), (64, 128, 8, 2), (64, 128, 4, 2), (128, 32, 8, 4)),
    ("dq", 64): ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3),
                 (64, 128, 4, 2), (128, 32, 4, 3), (128, 32, 4, 5), (128, 32, 8, 3), (64, 32, 4, 4), (128, 64, 8, 4)),
    ("dq", 128): ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4), (64, 64, 4, 2),
                  (64, 64, 4, 3), (64, 32, 4, 4), (64, 128, 8, 2), (64, 64, 8, 2), (128, 128, 8, 1), (64, 32, 4, 3)),
    ("dkdv", 64): ((32, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 3), (32, 64, 4, 3), (32, 64, 4, 4),
                   (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (32, 128, 4, 3), (64, 64, 8, 3), (128, 128, 8, 2)),
    ("dkdv", 128): ((32, 64, 8, 2), (32, 64, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 2), (16, 128, 8, 2),
                    (16, 128, 8, 3), (64, 64, 8, 2), (32, 64, 4, 2), (16, 64, 4, 3), (16, 64, 8, 3), (64, 64, 4, 2))}
# The second form (tests/kernels/descriptors.py): what shipped, and what its fewer registers may allow. At head_dim 64 the
# compiler gains nothing from it in dkdv, which keeps its pointers.
SQUARE = ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3))
SECOND_FORM = {("forward", 64): SQUARE, ("forward", 128): SQUARE, ("dq", 64): SQUARE, ("dq", 128): SQUARE,
               ("dkdv", 128): ((32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2))}
if DRY:
    CANDIDATES = {("forward", 32): ((16, 32, 4, 1),), ("dkdv", 32): ((32, 32, 4, 1),)}
    SECOND_FORM = {("forward", 32): ((32, 32, 4, 1),), ("dq", 32): ((32, 32, 4, 1),), ("dkdv", 32): ((32, 32, 4, 1),)}
FORMS = {"pointers": CANDIDATES, "descriptors": SECOND_FORM}


class Launch:
    """One kernel, ready to be launched in both forms with any tile on one shape's tensors."""
    def __init__(self, kernel, lens, heads, kv_heads, head_dim, causal):
        dtype = torch.float16 if DRY else torch.bfloat16
        torch.manual_seed(0)
        q, do = (torch.randn(sum(lens), heads, head_dim, device=DEVICE, dtype=dtype) for _ in range(2))
        k, v = (torch.randn(sum(lens), kv_heads, head_dim, device=DEVICE, dtype=dtype) for _ in range(2))
        self.kernel, self.table = kernel, network.TILES if DRY else network.TILES_90
        seg = Segments.packed(lens, DEVICE)
        self.before = q, k, seg.cu_q, seg.cu_k, max(lens), max(lens), causal, None, head_dim ** -0.5
        o, lse = torch.empty_like(q), torch.empty(heads, len(q), device=DEVICE)
        launch("forward", *self.before, q, k, v, o, lse)
        dq, delta = torch.empty_like(q), torch.empty_like(lse)
        launch("dq", *self.before, q, k, v, o, do, lse, dq, delta)
        self.inputs, self.results = {"forward": ((q, k, v), (o, lse)), "dq": ((q, k, v, o, do, lse), (dq, delta)),
                                     "dkdv": ((q, k, v, do, lse, delta), (torch.empty_like(k), torch.empty_like(v)))}[kernel]

    def __call__(self, form="pointers", tile=None):
        import descriptors
        kernels = descriptors.triton_kernels if form == "descriptors" else network.triton_kernels
        tiles = self.table[self.before[0].shape[-1]]
        with mock.patch.dict(tiles, {self.kernel: tile or tiles[self.kernel]}), mock.patch.object(network, "triton_kernels", kernels):
            launch(self.kernel, *self.before, *self.inputs, *self.results)


def try_tile(form, kernel, head_dim, tile):
    """Compile one candidate and compare it with the shipped tile and form on a ragged batch, both masks: None, or what is
    wrong."""
    try:
        for causal in (False, True):
            launch = Launch(kernel, (40, 5) if DRY else (577, 5, 300, 1000), 4, 2, head_dim, causal)
            launch()
            truth = [t.clone().float() for t in launch.results]
            for t in launch.results:
                t.fill_(float("nan"))
            launch(form, tile)
            for ours, true in zip(launch.results, truth):
                if not (ours.float() - true).abs().max() <= 2e-2 * true.abs().max():
                    return f"other results than the shipped tile (causal {causal})"
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:120]}"


def part_tiles(out):
    """Every candidate tile of both forms: is it right, and how fast; the fastest of each form as a table to paste; then
    the fastest of both forms in turns."""
    best, launches = {}, {}
    for form, candidates in FORMS.items():
        jobs = [(kernel, head_dim, tile) for (kernel, head_dim), tiles in candidates.items() for tile in tiles]
        # Compiled code lands in a cache on disk. A form of which a worker dies does not take the other form along.
        with ProcessPoolExecutor(1 if DRY else 14, mp_context=get_context("spawn")) as pool:
            tried = {job: pool.submit(try_tile, form, *job) for job in jobs}
            for job, future in tried.items():
                kernel, head_dim, tile = job
                shapes = {name: shape for name, shape in SHAPES.items() if shape[3] == head_dim}
                times = []
                try:
                    problem = future.result()
                    if (kernel, head_dim) not in launches:      # one kernel's at a time
                        launches = {(kernel, head_dim): [Launch(kernel, *shape) for shape in shapes.values()]}
                    if problem is None:
                        times = [seconds_of(partial(launch, form, tile)) for launch in launches[kernel, head_dim]]
                except Exception as error:
                    problem = f"{type(error).__name__}: {str(error)[:120]}"
                if problem is None:
                    best.setdefault((kernel, head_dim), {}).setdefault(form, []).append((sum(times), tile))
                # A tile that asks for more shared memory than there is is an answer, too.
                fits = "OutOfResources" not in str(problem)
                say(out, "tiles", form=form, kernel=kernel, head_dim=head_dim, tile=tile, ok=problem is None or not fits, wrong=problem,
                    us={name: round(t * 1e6, 1) for name, t in zip(shapes, times)})
    fastest = {key: {form: min(found) for form, found in forms.items()} for key, forms in best.items()}
    say(out, "tiles", ok=True, best={f"{form} {kernel} {head_dim}": tile for (kernel, head_dim), forms in fastest.items()
                                     for form, (_, tile) in forms.items()})
    for (kernel, head_dim), forms in fastest.items():
        if len(forms) == 2:
            in_turns(out, kernel, head_dim, {form: tile for form, (_, tile) in forms.items()})


def in_turns(out, kernel, head_dim, tiles):
    """The fastest tile of both forms of a kernel, nine rounds in turns: the clock drifts by more than the forms differ. And
    one launch on few tokens by the host's clock: a descriptor is made anew for each."""
    shapes = {name: shape for name, shape in SHAPES.items() if shape[3] == head_dim}
    launches, ratios = [Launch(kernel, *shape) for shape in shapes.values()], []
    for _ in range(1 if DRY else 9):
        spent = {form: sum(seconds_of(partial(launch, form, tile), rounds=1) for launch in launches) for form, tile in tiles.items()}
        ratios.append(spent["descriptors"] / spent["pointers"])
    small, host = Launch(kernel, (1,) * 8, 4, 2, head_dim, True), {}
    for form, tile in tiles.items():
        small(form, tile)
        began = time.perf_counter()
        for _ in range(1 if DRY else 200):
            small(form, tile)
        host[form] = (time.perf_counter() - began) / (1 if DRY else 200)
    say(out, "tiles", turns=f"{kernel} {head_dim}", ok=True, tiles=tiles, descriptors_over_pointers=round(statistics.median(ratios), 3),
        lowest=round(min(ratios), 3), highest=round(max(ratios), 3), host_us={form: round(1e6 * t, 1) for form, t in host.items()})


# --------------------------------------------------------------------------------------------------------- 4 step, 5 compile, 6 stages
def planned_bytes(stage, preset, micro, recompute):
    """The plan's peak of a step."""
    need = bench.planned(stage, preset, micro, recompute, "--optimizer", "adamw")
    return need["weights"] + need["gradients"] + need["optimiser"] + need["activations"]


def measure(out, step, flops, plan=None, **what):
    """One row: seconds of a step, TFLOP/s, peak memory beside the plan; or that it did not fit."""
    try:
        free()
        losses = [step() for _ in range(2)]
        rounds = []
        for _ in range(3):
            began = time.perf_counter()
            losses.append(step())                               # returns a number, so it waits for the device
            rounds.append(time.perf_counter() - began)
        seconds = statistics.median(rounds)
        row = dict(ok=all(map(float_is_finite, losses)), seconds=round(seconds, 4), tflops=round(flops / seconds / 1e12, 3),
                   share_of_989=round(flops / seconds / H100, 4), first_loss=round(losses[0], 4))
        if DEVICE == "cuda":
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    except torch.OutOfMemoryError as problem:
        problem.__traceback__ = None                            # its frames hold the tensors of the step that did not fit
        row = dict(ok=True, wrong="out of memory")
    except Exception as problem:
        row = dict(ok=False, wrong=f"{type(problem).__name__}: {str(problem)[:300]}")
    if plan:
        row["planned_gb"] = round(plan() / 1e9, 2)
    say(out, "step", **what, **row)


def float_is_finite(x):
    return abs(x) < float("inf")


def ours_and_theirs(out, stage, preset, clips, dtype, configurations, beside=()):
    """Steps of one stage: ours in several configurations (what is computed again, compiled or not), then the composition
    of transformers' modules, for each of `beside` with its activations checkpointed or kept."""
    batches = {n: bench.make_batch(stage, PRESETS[preset], n, views=min(n, 2), text=(64, 65)) for n in clips}
    cfg = train.parse(["--stage", str(stage), "--preset", preset, "--optimizer", "adamw", "--micro-batch", "1", "--no-compile",
                       "--recompute", "none"])
    meta_run, phase = train.Run(cfg, 0, 1, torch.device("cpu"), False), train.stages_of(cfg)[0]
    work = {n: bench.step_flops(meta_run, phase, stage, batch, preset) for n, batch in batches.items()}
    batches = {n: batch.to(DEVICE) for n, batch in batches.items()}
    kernels = network.choose_attention(torch.device(DEVICE), dtype, PRESETS[preset])
    objective, trained, run = bench.our_objective(stage, preset, "--dtype", str(dtype)[6:], "--optimizer", "adamw", device=DEVICE)
    for recompute, compiled in configurations:
        for n in clips:
            set_up = replace(run, cfg=replace(run.cfg, recompute=recompute, compile=compiled, no_compile=not compiled))
            train.wrap(set_up, objective)
            step = bench.make_step(objective, trained, set_up, batches[n])
            # What a compiler keeps is not planned.
            plan = None if compiled else partial(planned_bytes, stage, preset, n, recompute)
            measure(out, step, work[n], plan, stage=stage, preset=preset, clips=n, side="ours", recompute=recompute, compiled=compiled,
                    attention=kernels.removeprefix("attention: "))
            objective.zero_grad(set_to_none=True)
    del objective, trained, step, set_up, run
    for checkpointed in beside:
        free()
        try:
            step = bench.composed_step(stage, batches[clips[0]], dtype, preset, DEVICE, checkpointed)[1]
        except Exception as problem:
            say(out, "step", stage=stage, preset=preset, side="composition of transformers", ok=False,
                wrong=f"{type(problem).__name__}: {str(problem)[:300]}")
            continue
        for n in clips:
            measure(out, partial(step, batches[n]), work[n], stage=stage, preset=preset, clips=n,
                    side="composition of transformers", recompute="blocks" if checkpointed else "none", compiled=False)
        del step


def part_step(out):
    """Training steps of stages 1 to 3 at preset small, of stage 1 at 7b, ours beside the composition."""
    if DRY:
        ours_and_theirs(out, 1, "toy", (2,), torch.float32, [("none", False), ("cheap", False), ("blocks", False)], beside=(True, False))
        return
    ours_and_theirs(out, 1, "7b", (2, 4), torch.bfloat16, [("cheap", False), ("none", False), ("blocks", False)], beside=(True, False))
    for stage in (1, 2, 3):
        ours_and_theirs(out, stage, "small", (32,), torch.bfloat16, [("none", False), ("cheap", False)], beside=(True, False))


def part_compile(out):
    """The same steps under --compile, 7b's default here."""
    if DRY:
        ours_and_theirs(out, 1, "toy", (2,), torch.float32, [("none", True)])
        return
    ours_and_theirs(out, 1, "7b", (4, 3, 2), torch.bfloat16, [("none", True)])
    for stage in (2, 1, 3):
        ours_and_theirs(out, stage, "small", (32,), torch.bfloat16, [("none", True)])


def part_stages(out):
    """Steps of stages 2 and 3 at 7b; a pair is two clips."""
    if DRY:
        for stage in (2, 3):
            ours_and_theirs(out, stage, "toy", (1,), torch.float32, [("cheap", False)])
        return
    for stage, clips in ((3, (2, 1)), (2, (2, 1))):
        ours_and_theirs(out, stage, "7b", clips, torch.bfloat16, [("none", True), ("cheap", False), ("blocks", False)])


# --------------------------------------------------------------------------------------------------------- 7 data
def write_take(path, seconds, width, height):
    """An H.264 take with a key frame every 250 frames: a textured scene that a camera pans over."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 235, (height // 20 + 30, width // 20 + 30, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    scene = coarse + rng.integers(0, 20, coarse.shape, np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options={"preset": "veryfast", "g": "250", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(int(seconds * 30)):
            x, y = 300 + int(250 * np.sin(i / 97)), 300 + int(250 * np.cos(i / 97))
            picture = np.ascontiguousarray(scene[y:y + height, x:x + width])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def part_data(out):
    """How long a 7b step of stage 1 waits for clips of 0.7 s from 1080p takes, with four loader workers."""
    batch_size, workers = (2, 1) if DRY else (3, 4)
    steps = 3 * workers
    seconds, width, height = (3, 320, 180) if DRY else (15, 1920, 1080)
    objective, _, run = bench.our_objective(1, PRESET, "--dtype", "float32" if DRY else "bfloat16", "--optimizer", "adamw", device=DEVICE)
    network.choose_attention(torch.device(DEVICE), torch.float32 if DRY else torch.bfloat16, PRESETS[PRESET])
    with tempfile.TemporaryDirectory() as folder:
        write_take(Path(folder) / "take.mp4", seconds, width, height)
        starts = np.random.default_rng(0).uniform(0, seconds - 1, 64).round(2)
        rows = [dict(id=str(i), exo=[dict(video="take.mp4", start=float(at), end=float(at) + 0.7)], text="I cut the red block.")
                for i, at in enumerate(starts)]
        (Path(folder) / "takes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        loader = data.Loader(data.read_manifests([Path(folder) / "takes.jsonl"]), PRESETS[PRESET], bench.toy_words(folder), view="exo",
                             batch=batch_size)
        alone = time_of_batches(loader, steps, workers, lambda batch: None)[0]
        forward_and_backward(objective, run, loader.batch(0)[0])                        # compiles
        each, waited = time_of_batches(loader, steps, workers, partial(forward_and_backward, objective, run))
    say(out, "data", what=f"clips of 0.7 s, {height}p, {workers} workers", ok=True, clips=batch_size, seconds=round(each, 4),
        waited=round(waited, 4), share_waited=round(waited / each, 3), clips_a_second_read=round(batch_size / alone, 1))


def time_of_batches(loader, steps, workers, use):
    """Seconds per batch, and of these seconds of waiting for it. What the workers have read ahead before the first is used
    does not count, and as much is still to be read when the last one is."""
    ahead = 2 * workers + 2
    batches, waited = loader.stream(0, steps + 2 * ahead, workers), []
    for step in range(steps + ahead):
        if step == ahead:
            began = time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - asked)
        use(batch[0])
    return (time.perf_counter() - began) / steps, sum(waited[ahead:]) / steps


def forward_and_backward(objective, run, batch):
    batch = batch.to(DEVICE)
    with network.autocast(run.device, run.bf16):
        loss = objective(batch, float(batch.weights.sum()), batch.samples)["loss"]
    loss.backward()
    objective.zero_grad(set_to_none=True)
    return float(loss.detach())


# ---------------------------------------------------------------------------------------------------------- 8 run
def command(*words, **options):
    """Start train.py (or data.py) as a user does, in its own group of processes, which ends with this part: else the next
    part would be timed beside it."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS" or DRY}   # bench.py has set it for itself
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=HERE.parent, env=env, start_new_session=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, **options)
    STARTED.append(process)
    return process


STARTED = []                                                    # by this part


def end_what_was_started(*_):
    for process in STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    os._exit(1)


def differing(a, b):
    """Names of the tensors of two run folders' last checkpoints that are not equal to the bit."""
    names = []
    for file in ("model.safetensors", "optim.safetensors"):
        one, two = (load_file(sorted(folder.glob("step_*"))[-1] / file) for folder in (a, b))
        names += [f"{file}: {name}" for name in one if not torch.equal(one[name], two[name])]
    return names


def self_check(out):
    """How long start-up's check of the kernels takes, with nothing compiled before and with all."""
    code = ("import time, torch, model\nfrom model import PRESETS\nbegan = time.time()\n"
            f"print(model.choose_attention(torch.device('{DEVICE}'), torch.bfloat16, PRESETS['7b']), time.time() - began)")
    with tempfile.TemporaryDirectory() as cache:
        for name in ("nothing compiled before", "compiled before"):
            done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, env=os.environ | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True)
            said = done.stdout.strip() or done.stderr.strip()[-300:]
            fast = done.returncode == 0 and (DRY or "attention: triton" in said)
            say(out, "run", what="self-check at start-up", cache=name, ok=fast, said=said, wrong=None if fast else said)


def part_run(out):
    """The README's command on a GPU; a killed run resumed; FSDP2 over one rank; start-up's self-check."""
    with tempfile.TemporaryDirectory() as folder:
        folder, few = Path(folder), ["--steps", "3"] if DRY else []
        toy, base = folder / "toy", folder / "stage0"
        if DRY:
            tiny = [word for split in ("corpus", "ego", "pairs", "val", "test", "exo-test", "instruct") for word in (f"--{split}", "24")]
            command("data.py", "toy", "--out", toy, *tiny).communicate()
            command("train.py", "--stage", "0", "--data", toy, "--out", base, *few).communicate()
        else:
            command("data.py", "toy", "val", "--out", toy).communicate()
        began = time.time()
        first = command("-m", "torch.distributed.run", "train.py", "--stage", "1", "--data", toy, "--out", folder / "stage1", *few)
        said, _ = first.communicate()
        print(said[-3000:], flush=True)
        figures = json.loads((folder / "stage1/eval.json").read_text()) if first.returncode == 0 else {}
        say(out, "run", what="torchrun train.py --stage 1, world and stage 0 included", ok=first.returncode == 0, seconds=round(time.time() - began, 1),
            exo_em=figures.get("exo_em"), wrong=said[-300:] if first.returncode else None)
        resume_after_kill(out, folder, toy, base)
        twenty_steps(out, folder, toy)
    fsdp_on_one_rank(out)
    self_check(out)


def resume_after_kill(out, folder, toy, base):
    """Two whole runs, and one that was killed halfway and run again: the same weights and moments, to the bit?"""
    steps, every = (6, 2) if DRY else (40, 10)
    stage = ["train.py", "--stage", "1", "--data", toy, "--base", base, "--init", base, "--steps", steps, "--save-every", every, "--no-eval", "--out"]
    whole = [command(*stage, folder / name) for name in ("whole", "again")]
    killed = command(*stage, folder / "killed")
    log = folder / "killed/log.jsonl"
    while killed.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > steps // 2):
        time.sleep(0.02)
    if killed.poll() is None:
        os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    if killed.returncode != -signal.SIGKILL:
        say(out, "run", what="resume after kill -9", ok=False, wrong="the run had ended before it was killed")
        return
    for process in (*whole, command(*stage, folder / "killed")):
        said, _ = process.communicate()
        if process.returncode:
            say(out, "run", what="resume after kill -9", ok=False, wrong=said[-300:])
            return
    for what, other in (("a run repeated", "again"), ("resume after kill -9", "killed")):
        names = differing(folder / "whole", folder / other)
        say(out, "run", what=f"{what}, equal to the bit", ok=not names, differing=len(names), first=names[:3])


def twenty_steps(out, folder, toy):
    """A run of preset small, as log.jsonl tells it: seconds of a step and of waiting for its data."""
    preset, steps = ("toy", 4) if DRY else ("small", 20)
    common = ["train.py", "--preset", preset, "--data", toy, "--no-eval"]
    base = [*common, "--stage", "0", "--out", folder / "twenty0", "--steps", "2", "--batch", "8"]
    stage1 = [*common, "--stage", "1", "--out", folder / "twenty1", "--steps", steps, "--batch", "32", "--base", folder / "twenty0",
              "--init", folder / "twenty0"]
    for words in (base, stage1):
        process = command(*words)
        said, _ = process.communicate()
        if process.returncode:
            say(out, "run", what=f"{steps} steps of preset {preset}", ok=False, wrong=said[-300:])
            return
    rows = [json.loads(line) for line in (folder / "twenty1/log.jsonl").read_text().splitlines() if '"seconds"' in line][steps // 4:]
    say(out, "run", what=f"{steps} steps of preset {preset}, batch 32", ok=True, seconds=round(statistics.median(row["seconds"] for row in rows), 4),
        waited=round(statistics.median(row["waited"] for row in rows), 4),
        clips_a_second=round(statistics.median(row["clips_per_second"] for row in rows), 1))


def fsdp_on_one_rank(out):
    """FSDP2 on a group of one: loss and gradients beside the plain objective's."""
    store = dist.HashStore()
    dist.init_process_group("gloo" if DRY else "nccl", store=store, rank=0, world_size=1)
    batch, results = bench.make_batch(1, PRESETS["toy"], 4, text=(8, 30)).to(DEVICE), []
    for flags in ((), ("--fsdp",)):
        objective, trained, run = bench.our_objective(1, "toy", "--dtype", "float32", "--optimizer", "adamw", *flags, device=DEVICE)
        loss = objective(batch, float(batch.weights.sum()), batch.samples)["loss"]
        torch.autograd.backward(loss)
        grads = [train.gather_full_tensor(p.grad).flatten() for p in objective.parameters() if p.grad is not None]
        results.append((float(loss.detach()), torch.cat(grads)))
    dist.destroy_process_group()
    (plain, plain_grad), (sharded, sharded_grad) = results
    apart = float((plain_grad - sharded_grad).norm() / plain_grad.norm())
    say(out, "run", what="FSDP2 on one rank beside plain", ok=apart < 1e-5 and abs(plain - sharded) < 1e-5, loss_apart=abs(plain - sharded), gradients_apart=apart)


# ------------------------------------------------------------------------------------------------------- 9 answer
@torch.no_grad()
def part_answer(out):
    """Generating with our cache beside transformers' generate; options scored with the video's prefix shared or not."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = network.Exo2Ego(replace(PRESETS[PRESET], mapping="resnet", max_length=8192))
    bf16 = not DRY
    model = network.to_device_and_dtype(model, torch.device(DEVICE), bf16).bfloat16().eval() if bf16 else model.eval()
    print(network.choose_attention(torch.device(DEVICE), torch.bfloat16 if bf16 else torch.float32, model.cfg), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        words = bench.toy_words(folder)
    visual = torch.randn(1, 2 * model.cfg.visual_tokens, model.cfg.width, device=DEVICE, dtype=model.decoder.embedding.weight.dtype)
    ids = torch.tensor(words.chat([{"user": "What am I doing?"}], visual.shape[1])[0], device=DEVICE)
    new = 8 if DRY else 64
    theirs = bench.as_transformers(model)

    def ours():
        return model.generate(visual, [ids], eos=-1, max_new=new)[0]

    def reference():
        embeddings = model.insert_visual_tokens(visual, ids)[None]
        mask = torch.ones(1, len(ids), dtype=torch.long, device=DEVICE)
        return theirs.generate(inputs_embeds=embeddings, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=mask)[0].tolist()

    def timed(call, rounds=3):
        result, found = call(), []
        for _ in range(rounds):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
        return result, statistics.median(found)
    with network.autocast(torch.device(DEVICE), bf16):
        (tokens, seconds), (other, beside) = timed(ours), timed(reference)
        equal = next((i for i, (a, b) in enumerate(zip(tokens, other)) if a != b), len(tokens))
        say(out, "answer", what=f"{new} tokens after {len(ids):,}", ok=True, ours_tokens_a_second=round(new / seconds, 1),
            transformers_tokens_a_second=round(new / beside, 1), ratio=round(beside / seconds, 2), equal_tokens=equal)
        del theirs
        free()
        pairs = [(f"Question {i}: which of these do I do to the block?", f"I {verb} the red block with the left hand.")
                 for i in range(8) for verb in ("cut", "push", "wipe", "tap", "pull")]

        def alone():
            scores = []
            for question, answer in pairs:
                one, labels = words.chat([{"user": question, "assistant": answer}], visual.shape[1])
                one, labels = (torch.tensor(t, device=DEVICE) for t in (one, labels))
                scores.append(float(model.log_likelihood(visual, one, labels, [len(one)])))
            return torch.tensor(scores)

        def cached():
            return torch.tensor(eval.VideoContext(model, words, visual).score(pairs)[:, 0])
        (each, seconds), (shared, fast) = timed(alone, 1), timed(cached)
        say(out, "answer", what="8 questions x 5 options about one video", ok=True, alone_seconds=round(seconds, 3), cached_seconds=round(fast, 3),
            ratio=round(seconds / fast, 2), largest_difference=round(float((each - shared).abs().max()), 4), spread_of_scores=round(float(each.std()), 3))


# ------------------------------------------------------------------------------------------------------- the rest
PARTS = {"correct": part_correct, "speed": part_speed, "tiles": part_tiles, "step": part_step, "compile": part_compile,
         "stages": part_stages, "data": part_data, "run": part_run, "answer": part_answer}


def run_part(part, out, left=float("inf")):
    """A part as a process of its own, ended with all that it started when its time is up, or the seconds that are left."""
    limit = min(SECONDS[part], left)
    words = [sys.executable, __file__, "--part", part, "--out", str(out), *["--dry"] * DRY]
    process, began = subprocess.Popen(words, start_new_session=True), time.time()
    try:
        code = process.wait(limit)
        wrong = f"the part ended with exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        wrong = f"ended at its limit of {limit:.3g} s"
        process.terminate()                                     # it ends what it has started in groups of their own
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)                  # also what it left behind
    except ProcessLookupError:
        pass
    process.wait()
    say(out, part, what="the whole part", ok=wrong is None, wrong=wrong, seconds=round(time.time() - began, 1))


def table(path):
    """The findings as the tables of tests/README.md."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    machines = sorted({f"{row['card']}, torch {row['torch']}, triton {row['triton']}" for row in rows})
    print(f"{'; '.join(machines)}; revisions {', '.join(sorted({str(r['revision']) for r in rows}))}.\n")
    correct = [r for r in rows if r["part"] == "correct" and "case" in r]
    shares = [share for r in correct for share in r.get("share_of_torchs", {}).values()]
    if shares:
        print(f"Correct: {sum(r['ok'] for r in correct)} of {len(correct)} cases (output and three gradients, equal reruns). "
              f"Error beside that of torch's own kernel in the same dtype: median {statistics.median(shares):.2f}, largest {max(shares):.2f}.\n")
    groups = [("tiles", ("turns", "descriptors_over_pointers", "lowest", "highest", "host_us")),
              ("speed", ("shape", "side", "forward_tflops", "both_tflops", "wrong")),
              ("step", ("stage", "preset", "clips", "side", "checkpointed", "recompute", "compiled", "attention", "seconds", "tflops", "share_of_989", "peak_gb", "planned_gb", "wrong")),
              ("data", ("what", "clips", "seconds", "waited", "share_waited", "clips_a_second_read", "wrong")),
              ("run", ("what", "ok", "seconds", "waited", "clips_a_second", "exo_em", "differing", "gradients_apart", "wrong")),
              ("answer", ("what", "ours_tokens_a_second", "transformers_tokens_a_second", "alone_seconds", "cached_seconds", "ratio"))]
    for part, columns in groups:
        body = [r for r in rows if r["part"] == part and r.get("what") != "the whole part" and any(c in r for c in columns[1:])]
        columns = [c for c in columns if any(r.get(c) is not None for r in body)]
        if body:
            print("| " + " | ".join(c.replace("_", " ") for c in columns) + " |\n|" + "---|" * len(columns))
            for r in body:
                print("| " + " | ".join("" if r.get(c) is None else str(r[c]) for c in columns) + " |")
            print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="folder of gpu.jsonl")
    parser.add_argument("--parts", default=",".join(PARTS), help="in this order: " + ", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=3600, help="for all parts together (3600)")
    parser.add_argument("--part", choices=PARTS, help="one part in this very process")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, kernels interpreted")
    parser.add_argument("--table", metavar="FILE", help="print the findings of a gpu.jsonl as tables")
    args = parser.parse_args()
    if args.table:
        return table(args.table)
    if args.out is None or (unknown := {*args.parts.split(",")} - {*PARTS}):
        parser.error("--out DIR is needed" if args.out is None else f"--parts {unknown}: choose of {', '.join(PARTS)}")
    if not (os.environ.get("REVISION") or network.git_revision()):
        parser.error("there is no git here: REVISION=... in front of the command names the code in every row")
    if not DRY and not torch.cuda.is_available():
        print("gpu.py: no GPU is visible here: --dry tries the script itself on a CPU", file=sys.stderr)
        sys.exit(2)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        data.die_with_parent()
        signal.signal(signal.SIGTERM, end_what_was_started)
        try:
            return PARTS[args.part](args.out)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
    ends = time.monotonic() + args.seconds
    for part in args.parts.split(","):
        print(f"--- {part}", flush=True)
        left = ends - time.monotonic()
        if left < 30:
            say(args.out, part, what="the whole part", ok=False, wrong="not begun: --seconds left no time for it")
        else:
            run_part(part, args.out, left)
    rows = [json.loads(line) for line in (args.out / "gpu.jsonl").read_text().splitlines()]
    wrong = [r for r in rows if not r["ok"]]
    print(f"{len(rows)} findings, {len(wrong)} of them wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
