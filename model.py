"""The network of Exo2Ego (arXiv 2503.09143): first-person video read through a learned third-person view.

Read this file first, then data.py, train.py, eval.py. From attention to `Exo2Ego.generate`:

    pixels -> VisionEncoder (CLIP) -> grid -> [Mapping F: ego -> exo] -> Connector (STC) -> Decoder -> text

Two visual encoders (ViT + connector) see the world: exo, the demonstrator, and ego, the learner. The decoder
reads [con_ego(x) ; con_exo(F(x))], so inference needs the ego video alone. Shapes are the `7b` preset's.
"""
from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

VIDEO = -1  # the id that stands for one visual token; it never reaches sentencepiece or the embedding
IGNORE = -100               # the label of a token that is not supervised
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)      # CLIP's normalisation, per RGB channel in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

@dataclass(frozen=True)
class ModelConfig:
    """All sizes of the network. A checkpoint stores it, so weights and shapes can never disagree silently."""
    frames: int                     # T, frames read from a clip
    image_size: int                 # S, pixels a side
    patch: int                      # pixels a side of a ViT patch
    vit_width: int                  # D
    vit_layers: int  # CLIP's count; the features are layer -2's, so the last layer is never built
    vit_heads: int
    stc_depth: int                  # RegNet blocks before and after the Conv3d
    stc_padding: int                # of the Conv3d: VideoLLaMA2 pads by 1 (24 x 24 -> 13 x 13)
    map_blocks: int                 # ResNet blocks in F and in G
    map_downs: int                  # stride-2 convolutions before them, and up-convolutions after them
    map_width: int                  # channels inside F and G
    width: int                      # W, of the decoder and of a visual token
    layers: int
    heads: int
    kv_heads: int                   # grouped-query attention: heads / kv_heads queries share a key
    mlp_dim: int
    vocab: int
    rope_theta: float
    max_length: int                 # tokens, visual ones included
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    head_dim: int | None = None     # None: width / heads
    window: int | None = None       # sliding-window attention; None: all earlier tokens
    norm_eps: float = 1e-5
    mapping: str = "none"  # "none" until stage 2 adds F and G: "resnet" (the paper) or "mlp" (its ablation)
    lora: bool = False              # True from stage 3 on

    @property
    def patches_per_side(self) -> int:          # patches a side
        return self.image_size // self.patch

    @property
    def visual_tokens(self) -> int:
        """n of one connector: 7b 9 x 13 x 13 = 1521."""
        t, s = ((side + 2 * self.stc_padding) // 2 for side in (self.frames, self.patches_per_side))
        return t * s * s

PRESETS = {
    # The micro-world on a laptop CPU: the architecture is the paper's, every size our choice.
    "toy": ModelConfig(
        frames=4, image_size=48, patch=12, vit_width=96, vit_layers=3, vit_heads=3, stc_depth=1,
        stc_padding=0, map_blocks=4, map_downs=1, map_width=64, width=96, layers=2, heads=3, kv_heads=1,
        mlp_dim=256, vocab=512, rope_theta=1e4, max_length=256, lora_rank=16, lora_alpha=32, lora_dropout=0.0),
    "small": ModelConfig(           # benchmarks and first tries on a GPU: our choice
        frames=8, image_size=112, patch=14, vit_width=384, vit_layers=7, vit_heads=6, stc_depth=4,
        stc_padding=1, map_blocks=9, map_downs=1, map_width=128, width=512, layers=8, heads=8, kv_heads=2,
        mlp_dim=1536, vocab=32000, rope_theta=1e6, max_length=2048, lora_rank=64, lora_alpha=128,
        lora_dropout=0.1),
    "7b": ModelConfig(             # the paper: two CLIP-L/14-336, VideoLLaMA2's STC, Mistral-7B-Instruct-v0.2
        frames=16, image_size=336, patch=14, vit_width=1024, vit_layers=24, vit_heads=16, stc_depth=4,
        stc_padding=1, map_blocks=9, map_downs=2, map_width=512, width=4096, layers=32, heads=32, kv_heads=8,
        mlp_dim=14336, vocab=32000, rope_theta=1e6, max_length=4096, lora_rank=128, lora_alpha=256,
        lora_dropout=0.1),
}

# ------------------------------------------------------------------------------------------- device and precision
def pick_device() -> torch.device:
    """This process's GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, bf16: bool):
    """The context of a forward and its backward: torch's autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def to_device_and_dtype(model: Exo2Ego, device: torch.device, bf16: bool) -> Exo2Ego:
    """The model on a device, stored in dtypes that `precision` computes with."""
    for p in model.parameters():
        half = torch.bfloat16 if p.dtype == torch.float16 else p.dtype
        p.data = p.data.to(device, half if bf16 else torch.float32)
    return model


# ------------------------------------------------------------------------------------------------- attention
@dataclass(frozen=True)
class Segments:
    """Where each sequence of a packed batch starts and ends: no padding, so no mask. All layers share one.
    `q_lens` and `k_lens` are host integers (a loop never waits for a GPU), `cu_q` and `cu_k` their running
    sums, int32 on the device. Queries stand at the end of their keys: a KV cache has more keys.
    """
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    cu_q: Tensor
    cu_k: Tensor

    @classmethod
    def cached(cls, new: Sequence[int], total: Sequence[int], device="cpu") -> Segments:
        """`new[i]` queries at the end of `total[i]` keys: decoding with a cache."""
        q_lens, k_lens = tuple(map(int, new)), tuple(map(int, total))
        if len(q_lens) != len(k_lens) or min(q_lens + k_lens, default=0) < 0:
            raise ValueError(f"segments need as many key as query lengths, all >= 0: got {q_lens}, {k_lens}")
        sums = [torch.tensor((0,) + lens).cumsum(0).to(device, torch.int32) for lens in (q_lens, k_lens)]
        return cls(q_lens, k_lens, *sums)

    @classmethod
    def packed(cls, lens: Sequence[int], device="cpu") -> Segments:
        """Whole sequences of these lengths, one after another."""
        return cls.cached(lens, lens, device)

# the formula; flash attention in plain torch; torch's fused kernel; our tiles on a GPU
BACKENDS = ("reference", "tiled", "sdpa", "triton")
AUTO = "sdpa"                   # what "auto" means for half precision on CUDA; choose_attention may raise it

def attention(q: Tensor, k: Tensor, v: Tensor, seg: Segments, *, causal: bool, window: int | None = None,
              scale: float | None = None, backend: str = "auto") -> Tensor:
    """softmax(q k^T * scale) v inside each segment; the only attention in this repository.

    q (Tq, H, D), k and v (Tk, HK, D) -> (Tq, H, D), where HK divides H (grouped queries). Causal is bottom-
    right aligned: query i sees key j iff i - window < j <= i; window=1 sees itself only and needs causal. A
    row without keys gives zeros. ValueError names the argument that does not fit. EXO2EGO_ATTENTION in the
    environment replaces "auto".
    """
    if backend == "auto":
        half_gpu = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
        backend = os.environ.get("EXO2EGO_ATTENTION") or (AUTO if half_gpu else "sdpa")
    _check_attention(q, k, v, seg, causal, window, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):  # its precision is chosen here
        if backend == "triton":
            return _triton(q, k, v, seg, causal, window, scale)
        one = dict(reference=_reference, tiled=_tiled, sdpa=_sdpa)[backend]
        return _segmentwise(one, q, k, v, seg, causal, window, scale)

def _check_attention(q, k, v, seg, causal, window, backend):
    if backend not in BACKENDS:
        raise ValueError(f"attention backend (or EXO2EGO_ATTENTION) is {backend!r}: choose one of {BACKENDS}")
    if k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k, v need one head_dim, k and v one shape: {[(*t.shape,) for t in (q, k, v)]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, k has {k.shape[1]}: the second must divide the first")
    if len(kinds := {(t.dtype, t.device) for t in (q, k, v)}) != 1 or not q.is_floating_point():
        raise ValueError(f"q, k, v need one floating dtype and one device, got {kinds}")
    if (sum(seg.q_lens), sum(seg.k_lens)) != (len(q), len(k)):
        raise ValueError(f"seg has {sum(seg.q_lens)} queries, {sum(seg.k_lens)} keys; q {len(q)}, k {len(k)}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window is {window} with causal={causal}: it must be >= 1 and needs causal=True")
    if backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not (q.is_cuda or interpreted) or seg.cu_q.device != q.device:
            raise ValueError(f"backend triton needs q and seg on one GPU: q is on {q.device}, seg on "
                             f"{seg.cu_q.device}; use sdpa elsewhere")
        if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"backend triton does not take q in {q.dtype}: use sdpa")
        if q.shape[-1] not in (32, 64, 128):
            raise ValueError(f"backend triton has head_dim 32, 64 and 128, q has {q.shape[-1]}: use sdpa")


def _segmentwise(one, q, k, v, seg, causal, window, scale):
    """Call `one` on (batch, heads, tokens, D): once where lengths are equal, or short and alike; else for
    each segment, which beats padding with a mask 2.8-15 times on a CPU."""
    exact, lens, total = one is _reference, seg.q_lens, len(q)
    if len(set(lens)) == len(set(seg.k_lens)) == 1 and not exact:
        q, k, v = (rearrange(t, "(b t) h d -> b h t d", b=len(lens)) for t in (q, k, v))
        return rearrange(one(q, k, v, causal, window, scale), "b h t d -> (b t) h d")
    tiny = lens == seg.k_lens and total < 64 * len(lens) and max(lens) * len(lens) < 1.4 * total
    if causal and tiny and not exact:                           # padding comes last: causal rows never see it
        q, k, v = (pad_sequence(t.split(lens), batch_first=True).transpose(1, 2) for t in (q, k, v))
        out = one(q, k, v, causal, window, scale).transpose(1, 2)
        return torch.cat([o[:n] for o, n in zip(out, lens)])
    parts = zip(*(t.split(n) for t, n in ((q, lens), (k, seg.k_lens), (v, seg.k_lens))))
    out = [one(*(rearrange(t, "t h d -> 1 h t d") for t in part), causal, window, scale) for part in parts]
    return torch.cat([rearrange(o, "1 h t d -> t h d") for o in out]) if out else q

def _visible(rows: range, keys: range, window: int | None, device) -> Tensor:
    """Causal visibility of keys (columns) by queries (rows), both given as positions among the keys."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None]
    return (j <= i) if window is None else (j <= i) & (j > i - window)

def _reference(q, k, v, causal, window, scale):
    lq, lk = q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale                                # (B, H, lq, lk)
    if not causal:
        return scores.softmax(-1) @ v
    mask = _visible(range(lk - lq, lk), range(lk), window, q.device)
    probs = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return probs.masked_fill(~mask.any(-1, keepdim=True), 0) @ v            # a row that sees nothing: 0

def _sdpa(q, k, v, causal, window, scale):
    dtype, lq, (kv_heads, lk) = q.dtype, q.shape[2], k.shape[1:3]
    if lq == 0 or lk == 0:
        return q * 0
    if causal and lq > lk:                                      # the first rows see nothing: zeros
        return F.pad(_sdpa(q[:, :, lq - lk:], k, v, causal, window, scale), (0, 0, lq - lk, 0))
    if q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled():
        q, k, v = q.float(), k.float(), v.float()   # torch's half-precision backward is 2-6x slower on a CPU
    plain = causal and 1 < lq == lk and window is None          # torch's is_causal is top-left aligned
    open_row = not causal or (lq == 1 and window is None)       # the last query sees every key: no mask
    mask = None if plain or open_row else _visible(range(lk - lq, lk), range(lk), window, q.device)
    if lq == 1:                         # one query: the heads that share a key become the rows of one matrix
        q = rearrange(q, "b (g r) 1 d -> b g r d", g=kv_heads)
    if q.is_cuda and (mask is not None or dtype == torch.float32):  # no fused kernel there shares keys
        k, v = (t.repeat_interleave(q.shape[1] // kv_heads, dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=scale,
                                         enable_gqa=q.shape[1] != k.shape[1]).to(dtype)
    return rearrange(out, "b g r d -> b (g r) 1 d") if lq == 1 else out

class Tiled(torch.autograd.Function):
    """FlashAttention-2 in plain torch: exact attention that never holds more than one tile of scores.

    A tile of queries meets the keys tile by tile and keeps three running values a row: m, the largest score
    so far; l, the sum of exp(s - m); acc, the sum of exp(s - m) v. When m grows, l and acc shrink by alpha =
    exp(m_old - m_new); in the end o = acc / l. Backward keeps one number a row, lse = m + log l, from which
    the probabilities come back, again tile by tile: p = exp(s - lse), delta = rowsum(do o),

        dv = p^T do        dp = do v^T        ds = p (dp - delta)        dq = ds k        dk = ds^T q

    The heads that share a key are rows of one matrix. The Triton kernels have the same names.
    """
    tile = 256                                                  # beat 1024: scores stay in the CPU's cache

    @staticmethod
    def walk(lq, lk, causal, window, device):
        """For each tile of queries its slice and [(slice of keys, what is hidden there or None), ...]."""
        for i in range(0, lq, Tiled.tile):
            rows = range(i + lk - lq, min(i + Tiled.tile, lq) + lk - lq)    # positions among the keys
            lo, hi = max(0, rows[0] - window + 1) if window else 0, min(lk, rows.stop) if causal else lk
            tiles = []
            for j in range(lo, hi, Tiled.tile):
                keys = range(j, min(j + Tiled.tile, lk))
                full = keys[-1] <= rows[0] and (not window or keys[0] > rows[-1] - window)
                hidden = None if full or not causal else ~_visible(rows, keys, window, device)
                tiles.append((slice(keys.start, keys.stop), hidden))
            yield slice(i, i + len(rows)), tiles

    @staticmethod
    def scores(qi, kj, hidden, scale):
        s = (qi @ kj.mT).mul_(scale)                            # (B * HK, group * rows, keys)
        if hidden is not None:
            s.unflatten(1, (-1, len(hidden))).masked_fill_(hidden, float("-inf"))
        return s

    @staticmethod
    def forward(ctx, q, k, v, causal, window, scale):           # (B * HK, group, lq, D), (B * HK, lk, D)
        o, lse = torch.empty_like(q), q.new_empty(*q.shape[:3], 1)
        for rows, tiles in Tiled.walk(q.shape[2], k.shape[1], causal, window, q.device):
            qi = q[:, :, rows].flatten(1, 2)
            m, acc = qi.new_full((*qi.shape[:2], 1), float("-inf")), torch.zeros_like(qi)
            l = torch.zeros_like(m)
            for keys, hidden in tiles:
                s = Tiled.scores(qi, k[:, keys], hidden, scale)
                m_new = torch.maximum(m, s.amax(-1, keepdim=True))
                finite = m_new.masked_fill(m_new == float("-inf"), 0)       # nothing visible yet
                p, alpha = s.sub_(finite).exp_(), (m - finite).exp_()
                l = l * alpha + p.sum(-1, keepdim=True)
                acc = acc.mul_(alpha).baddbmm_(p, v[:, keys])
                m = m_new
            empty = l == 0                      # a row without keys: o = 0, and lse = inf makes its p vanish
            o[:, :, rows] = (acc / l.masked_fill(empty, 1)).unflatten(1, (q.shape[1], -1))
            lse[:, :, rows] = (m + l.log()).masked_fill(empty, float("inf")).unflatten(1, (q.shape[1], -1))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.rest = causal, window, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        (q, k, v, o, lse), (causal, window, scale) = ctx.saved_tensors, ctx.rest
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (do * o).sum(-1, keepdim=True)
        for rows, tiles in Tiled.walk(q.shape[2], k.shape[1], causal, window, q.device):
            qi, do_i, lse_i, delta_i = (t[:, :, rows].flatten(1, 2) for t in (q, do, lse, delta))
            dq_i = torch.zeros_like(qi)
            for keys, hidden in tiles:
                p = Tiled.scores(qi, k[:, keys], hidden, scale).sub_(lse_i).exp_()
                ds = (do_i @ v[:, keys].mT).sub_(delta_i).mul_(p).mul_(scale)
                dq_i.baddbmm_(ds, k[:, keys])
                dk[:, keys] += ds.mT @ qi
                dv[:, keys] += p.mT @ do_i
            dq[:, :, rows] = dq_i.unflatten(1, (q.shape[1], -1))
        return dq, dk, dv, None, None, None

def _tiled(q, k, v, causal, window, scale):
    """(B, H, t, D) in and out; half precision is raised to float32."""
    wide, (batch, groups) = torch.promote_types(q.dtype, torch.float32), k.shape[:2]
    rows = rearrange(q.to(wide), "b (g r) t d -> (b g) r t d", g=groups)
    out = Tiled.apply(rows, *(t.to(wide).flatten(0, 1) for t in (k, v)), causal, window, scale)
    return rearrange(out, "(b g) r t d -> b (g r) t d", b=batch).to(q.dtype)

# ----------------------------------------------------------------------------- attention, checked where it runs
CASES = {                       # queries and keys of each segment, heads, kv_heads, causal, window
    "ragged, grouped, causal": ((150, 5, 64), (150, 5, 64), 6, 2, True, None),
    "new queries on a cache, window": ((8, 1, 140), (170, 3, 175), 2, 2, True, 16),
    "more queries than keys": ((140, 7), (17, 0), 2, 1, True, None),
    "ragged, bidirectional": ((137, 5, 64, 0), (137, 50, 70, 3), 2, 2, False, None),
    "long, causal": ((1000, 700), (1000, 700), 6, 2, True, None),           # loops in their steady state
    "long, bidirectional": ((577, 577), (577, 577), 2, 2, False, None)}


TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-5}  # of the largest true value


def run_case(case: str, backend: str, device, dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    """Output and the three gradients of one of CASES on inputs rounded to dtype."""
    q_lens, k_lens, heads, kv_heads, causal, window = CASES[case]
    rng, shapes = torch.Generator().manual_seed(0), [(sum(q_lens), heads)] + [(sum(k_lens), kv_heads)] * 2
    q, k, v = (torch.randn(*shape, head_dim, generator=rng).to(dtype) for shape in shapes)
    do = torch.randn(q.shape, generator=rng).to(dtype)
    if backend == "reference":
        device, (q, k, v, do) = "cpu", (t.double() for t in (q, k, v, do))
    leaves = [t.to(device).requires_grad_() for t in (q, k, v)]
    seg = Segments.cached(q_lens, k_lens, device)
    with torch.enable_grad():                                   # also where the caller only answers questions
        out = attention(*leaves, seg, causal=causal, window=window, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, do.to(device))]


def attention_error(backend: str, device, dtype: torch.dtype, head_dim: int) -> float:
    """Largest deviation from the float64 formula over CASES, outputs and gradients, as a share of TOLERANCE:
    at most 1 passes, nan does not."""
    worst = [torch.zeros(())]
    for case in CASES:
        results = (run_case(case, name, device, dtype, head_dim) for name in (backend, "reference"))
        worst += [(a.cpu().double() - b).abs().max() / b.abs().max() for a, b in zip(*results)]
    return float(torch.stack(worst).max() / TOLERANCE[dtype])


def choose_attention(device: torch.device, dtype: torch.dtype, cfg: ModelConfig, agree=lambda check: check()) -> str:
    """Decide what "auto" means, once at start-up; returns the line to print. On a GPU of sm_80 or newer, in half
    precision, our kernels are taken if they pass a check on it. `agree` calls the check on every rank of a run and
    returns the first problem of any."""
    global AUTO
    AUTO, kind = "sdpa", str(dtype).removeprefix("torch.")
    if forced := os.environ.get("EXO2EGO_ATTENTION"):
        if forced not in BACKENDS:
            raise ValueError(f"EXO2EGO_ATTENTION is {forced!r}: choose one of {BACKENDS}")
        return f"attention: {forced}, by EXO2EGO_ATTENTION"
    if device.type != "cuda" or dtype == torch.float32:
        return f"attention: sdpa, for {kind} on {device.type}"

    def problem() -> str | None:
        try:
            if torch.cuda.get_device_capability(device) < (8, 0):
                return "it needs sm_80 or newer"
            heads = {cfg.vit_width // cfg.vit_heads, cfg.head_dim or cfg.width // cfg.heads}
            errors = {d: round(attention_error("triton", device, dtype, d), 2) for d in sorted(heads)}
            return None if all(e <= 1 for e in errors.values()) else f"error / tolerance by head_dim {errors}"
        except Exception as error:                              # whatever stops our kernels, torch's own run
            torch.cuda.synchronize(device)                      # unless the device itself is dead: raised here
            return f"{type(error).__name__}: {str(error)[:90]}"
    found = agree(problem)
    if found is None:
        AUTO = "triton"
        return f"attention: triton, for {kind}, after a self-check"
    return f"attention: sdpa; not triton: {found}"


def check_attention() -> int:
    """`python model.py --check-attention`: correctness and equal reruns of what this machine can run (speed:
    tests/bench.py attention); the number of failed checks."""
    device, failed, checks = pick_device(), 0, {}
    gpu = device.type == "cuda"
    for backend in (("triton",) if gpu else ()) + ("tiled", "sdpa"):
        for dtype, d in product(list(TOLERANCE)[:2 if gpu else 3], (32, 64, 128)):
            checks[f"{backend:6} {dtype} head_dim {d}"] = partial(attention_error, backend, device, dtype, d)
    for case in CASES if gpu else ():
        run = partial(run_case, case, "triton", device, torch.bfloat16, 64)
        checks[f"triton, bit-equal: {case}"] = lambda run=run: 2 * (not all(map(torch.equal, run(), run())))
    for text, check in checks.items():
        try:
            error = check()
        except Exception as problem:
            error, text = math.nan, f"{text}: {type(problem).__name__}: {str(problem)[:90]}"
        failed += not error <= 1
        print(f"{'ok  ' if error <= 1 else 'FAIL'} {text}: error {error:.2f} of the tolerance", flush=True)
    if not gpu:
        print("not run, they need a GPU: triton, equal reruns; pytest interprets and compiles triton")
    return failed


# -------------------------------------------------------------------------------------- VisionEncoder (CLIP)
class ViTBlock(nn.Module):
    """Pre-LN transformer block with quick-GELU, as CLIP's."""
    attention = staticmethod(attention)

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, seg):                                              # (N * 577, 1024)
        h = self.norm1(x)
        q, k, v = (rearrange(proj(h), "t (h d) -> t h d", h=self.heads) for proj in (self.q, self.k, self.v))
        x = x + self.out(rearrange(self.attention(q, k, v, seg, causal=False), "t h d -> t (h d)"))
        h = self.fc1(self.norm2(x))                                         # (N * 577, 4096)
        return x + self.fc2(F.silu(1.702 * h) / 1.702)                      # quick-GELU

class VisionEncoder(nn.Module):
    """CLIP ViT whose output is layer -2's patch grid: LLaVA's and VideoLLaMA2's choice of features.
    (N, 3, S, S) normalised pixels -> (N, h, w, D). The last layer and the post norm are never run, so they
    are not built: 7b has 303,507,456 parameters in the published files, 290,909,184 of them here."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, self.grid, self.patch = cfg, cfg.patches_per_side, cfg.patch
        self.patch_embedding = nn.Conv2d(3, cfg.vit_width, cfg.patch, stride=cfg.patch, bias=False)
        self.class_token = nn.Parameter(torch.randn(cfg.vit_width) * cfg.vit_width ** -0.5)
        self.position = nn.Parameter(torch.randn(cfg.patches_per_side ** 2 + 1, cfg.vit_width) * cfg.vit_width ** -0.5)
        self.pre_norm = nn.LayerNorm(cfg.vit_width)
        self.blocks = nn.ModuleList(ViTBlock(cfg.vit_width, cfg.vit_heads) for _ in range(cfg.vit_layers - 1))

    def forward(self, pixels: Tensor) -> Tensor:                            # (N, 3, 336, 336)
        n = len(pixels)
        patches = rearrange(pixels, "n c (h p) (w q) -> n (h w) (c p q)", p=self.patch, q=self.patch)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1))       # stride = kernel: a matmul
        x = torch.cat([self.class_token.to(x.dtype).expand(n, 1, -1), x], dim=1)
        x = self.pre_norm(x + self.position)                                # (N, 577, 1024)
        seg = Segments.packed([x.shape[1]] * n, x.device)                   # each frame sees itself
        x = rearrange(x, "n t d -> (n t) d")
        for block in self.blocks:
            x = block(x, seg)
        x = rearrange(x, "(n t) d -> n t d", n=n)[:, 1:].contiguous()       # without the class token
        return rearrange(x, "n (h w) d -> n h w d", h=self.grid)            # (N, 24, 24, 1024)

    @classmethod
    def from_hf(cls, path, dtype: torch.dtype | None = None, prefix: str = "") -> VisionEncoder:
        """A CLIPVisionModel or CLIPModel directory of Hugging Face, or an open one and its names' prefix.
        Sizes are the tensors'; dtype None keeps the file's. ValueError names what does not fit."""
        files = path if isinstance(path, Published) else Published(path)
        config = {} if files is path else files.config.get("vision_config", files.config)
        prefix += "vision_model." * any(n.startswith(f"{prefix}vision_model.") for n in files.where)
        width, _, patch, _ = files.shape(f"{prefix}embeddings.patch_embedding.weight")
        side = math.isqrt(files.shape(f"{prefix}embeddings.position_embedding.weight")[0] - 1) * patch
        layers = files.count(prefix + "encoder.layers.")
        files.expect(config, hidden_act="quick_gelu", layer_norm_eps=1e-5, num_hidden_layers=layers,
                     image_size=side)
        cfg = replace(PRESETS["7b"], image_size=side, patch=patch, vit_width=width, vit_layers=layers,
                      vit_heads=config.get("num_attention_heads", width // 64))
        with torch.device("meta"):
            vit = cls(cfg)
        files.fill(vit, prefix, CLIP_NAMES, dtype)
        never_run = (f"encoder.layers.{layers - 1}.", "post_layernorm.", "embeddings.position_ids")
        files.used |= {n for n in files.where if n.startswith(tuple(prefix + name for name in never_run))}
        if files is not path:
            files.check_used("text_model.", "text_projection.", "visual_projection.", "logit_scale")
        return vit

# ------------------------------------------------------------------------------------------- Connector (STC)
class ConvNorm(nn.Module):
    """1x1 or depthwise 3x3 convolution and LayerNorm over channels, on channels-last grids (N, h, w, C)."""
    def __init__(self, c_in: int, c_out: int, kernel: int):
        super().__init__()
        groups = 1 if kernel == 1 else c_in
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(c_out)                           # timm calls it bn whatever it is

    def forward(self, x):
        if self.conv.kernel_size == (1, 1):
            return self.bn(F.linear(x, self.conv.weight.flatten(1)))        # channels are last: no transposes
        return self.bn(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

class SqueezeExcite(nn.Module):
    """Channels gated by what the whole frame shows."""
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x):                                                   # (N, 24, 24, 4096)
        s = x.mean((1, 2), keepdim=True)                                    # (N, 1, 1, 4096)
        s = F.silu(F.linear(s, self.fc1.weight.flatten(1), self.fc1.bias))  # RegStage passes its SiLU on
        return x * torch.sigmoid(F.linear(s, self.fc2.weight.flatten(1), self.fc2.bias))

class RegNetBlock(nn.Module):
    """The block of VideoLLaMA2's STC (a timm RegStage): 1x1, depthwise 3x3, gate, 1x1, residual, SiLU.
    Our choice: the gain of the last norm starts at zero, the block as SiLU(x); else it never trained."""
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = ConvNorm(c_in, c_out, 1)
        self.conv2 = ConvNorm(c_out, c_out, 3)
        self.se = SqueezeExcite(c_out, c_in // 4)
        self.conv3 = ConvNorm(c_out, c_out, 1)
        self.downsample = ConvNorm(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv3.bn.weight)

    def forward(self, x):                                                   # (N, 24, 24, 1024 or 4096)
        h = F.silu(self.conv1(x))                                           # (N, 24, 24, 4096)
        h = self.se(F.silu(self.conv2(h)))
        return F.silu(self.conv3(h) + self.downsample(x))

def reg_stage(c_in: int, c_out: int, depth: int) -> nn.Sequential:
    """`depth` RegNet blocks under timm's names b1, b2, ..."""
    blocks = ((f"b{i + 1}", RegNetBlock(c_out if i else c_in, c_out)) for i in range(depth))
    return nn.Sequential(OrderedDict(blocks))

class Connector(nn.Module):
    """VideoLLaMA2's STC: RegNet stage, Conv3d that halves time, height and width, RegNet stage, MLP.
    (B, T, h, w, D) -> (B, n, W), n in (t h w) order: 16 x 24 x 24 -> 9 x 13 x 13 = 1521 (padding 1)."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        w = cfg.width
        self.s1 = reg_stage(cfg.vit_width, w, cfg.stc_depth)
        self.sampler = nn.Sequential(nn.Conv3d(w, w, 2, stride=2, padding=cfg.stc_padding), nn.SiLU())
        self.s2 = reg_stage(w, w, cfg.stc_depth)
        self.readout = nn.Sequential(nn.Linear(w, w), nn.GELU(), nn.Linear(w, w))

    def forward(self, grid: Tensor) -> Tensor:                              # (B, 16, 24, 24, 1024)
        b = len(grid)
        x = self.s1(rearrange(grid, "b t h w d -> (b t) h w d"))            # (B*16, 24, 24, 4096)
        x = self.down(rearrange(x, "(b t) h w d -> b t h w d", b=b))        # (B, 9, 13, 13, 4096)
        x = self.s2(rearrange(x, "b t h w d -> (b t) h w d"))
        return self.readout(rearrange(x, "(b t) h w d -> b (t h w) d", b=b))    # (B, 1521, 4096)

    def down(self, x):
        """The Conv3d: kernel 2 with stride 2 touches each voxel once, so it is a matmul over 2x2x2 cubes."""
        conv, act = self.sampler
        p = conv.padding[0]
        x = F.pad(x, (0, 0, p, p, p, p, p, p))
        t, h, w = (side // 2 * 2 for side in x.shape[1:4])              # an odd side loses its last
        x = x[:, :t, :h, :w]
        cubes = rearrange(x, "b (t i) (h j) (w k) d -> b t h w (d i j k)", i=2, j=2, k=2)
        return act(F.linear(cubes, conv.weight.flatten(1), conv.bias))

# ----------------------------------------------------------------------------------------- Mapping (F and G)
class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, h, w); CycleGAN's instance norm would erase what a grid means."""
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

class ResBlock(nn.Sequential):
    """conv-norm-relu-conv-norm plus identity, (N, 512, 6, 6): nine make CycleGAN's generator, F and G."""
    def __init__(self, width: int):
        convs = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        super().__init__(next(convs), ChannelNorm(width), nn.ReLU(), next(convs), ChannelNorm(width))

    def forward(self, x):
        return x + super().forward(x)

class FCBlock(nn.Sequential):
    """The paper's ablation "FC layers instead of ResNet blocks": each patch alone, no neighbours."""
    def __init__(self, c: int):
        super().__init__(nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.ReLU(), nn.Linear(2 * c, c))

    def forward(self, x):
        return x + super().forward(x)

class Mapping(nn.Module):
    """F: ego -> exo or G: exo -> ego on the ViT's grid, frame by frame: (B, T, h, w, D) -> the same shape.
    "resnet": 1x1 conv, stride-2 convs, 9 ResNet blocks, up-convs, 1x1 conv, LayerNorm; widths and norms are
    ours. "mlp": as many FC blocks on each patch alone. No outer skip: F must not start as a copy (measured).
    """
    def __init__(self, cfg: ModelConfig, kind: str = "resnet"):
        super().__init__()
        d, c, downs = cfg.vit_width, cfg.map_width, cfg.map_downs
        if kind not in ("resnet", "mlp"):
            raise ValueError(f"mapping is {kind!r}: choose resnet or mlp")
        if cfg.patches_per_side % 2 ** downs:
            raise ValueError(f"map_downs={downs} does not divide the {cfg.patches_per_side} x {cfg.patches_per_side} patch grid")
        self.kind = kind
        if kind == "mlp":
            blocks = [FCBlock(c) for _ in range(cfg.map_blocks)]
            self.net = nn.Sequential(nn.Linear(d, c), *blocks, nn.Linear(c, d))
        else:
            layers = [nn.Conv2d(d, c, 1)]
            for _ in range(downs):
                layers += [nn.Conv2d(c, c, 3, stride=2, padding=1, bias=False), ChannelNorm(c), nn.ReLU()]
            layers += [ResBlock(c) for _ in range(cfg.map_blocks)]
            for _ in range(downs):
                layers += [nn.ConvTranspose2d(c, c, 2, stride=2, bias=False), ChannelNorm(c), nn.ReLU()]
            self.net = nn.Sequential(*layers, nn.Conv2d(c, d, 1))
        self.norm = nn.LayerNorm(d)

    def forward(self, grid: Tensor) -> Tensor:                              # (B, 16, 24, 24, 1024)
        if self.kind == "mlp":
            return self.norm(self.net(grid))
        x = rearrange(grid, "b t h w d -> (b t) d h w")
        x = self.net(x)                                                     # 24 x 24 -> 6 x 6 -> 24 x 24
        return self.norm(rearrange(x, "(b t) d h w -> b t h w d", b=len(grid)))

def feature_kl(exo: Tensor, estimate: Tensor, tau: float = 1.0) -> Tensor:
    """KL(exo || F(ego)) per sample: (B, n, C) features -> (B,). Softmax over channels of LayerNorm-ed tokens,
    mean over tokens: our choice (measured), the paper does not say how features become distributions."""
    p, q = (F.log_softmax(F.layer_norm(f.float(), f.shape[-1:]) / tau, dim=-1) for f in (exo, estimate))
    return (p.exp() * (p - q)).sum(-1).mean(-1) * tau ** 2


# ----------------------------------------------------------------------------------------- Decoder (Mistral)
class Linear(nn.Linear):
    """y = x W^T, plus alpha/rank * dropout(x) A^T B^T once `add_lora` was called (LoRA)."""
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def add_lora(self, rank: int, alpha: float, dropout: float):
        self.lora_scale, self.lora_dropout = alpha / rank, dropout
        like = dict(device=self.weight.device, dtype=torch.float32)
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features, **like) * self.in_features ** -0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))    # 0: starts at the base

    def forward(self, x):
        y = super().forward(x)
        if self.lora_a is None:
            return y
        low = F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_a)
        return y + F.linear(self.lora_scale * low, self.lora_b)             # scaled where it is small

class KVCache:
    """Keys and values already computed, per layer, packed like the batch: `keys[l]` (tokens, HK, D)."""
    def __init__(self, sequences: int):
        self.lens = (0,) * sequences
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor, seg: Segments) -> tuple[Tensor, Tensor]:
        """Append each sequence's new keys to its old ones; returns all of them, in packed order."""
        if layer in self.layers:
            old = [total - new for total, new in zip(seg.k_lens, seg.q_lens)]
            k, v = (torch.cat([part for pair in zip(past.split(old), new.split(seg.q_lens)) for part in pair])
                    for past, new in zip(self.layers[layer], (k, v)))
        self.layers[layer] = k, v
        return k, v

# A first reader can stop here: what follows asks a trained model, and scores it on real benchmarks.
class SharedPrefix(KVCache):
    """A cache whose sequences all start with the tokens of another one: a video is read once, whatever is
    asked about it. Without `keep` one layer's copies exist at a time (scoring); with it, all (generating)."""
    def __init__(self, first: KVCache, sequences: int, keep: bool):
        super().__init__(sequences)
        self.first, self.keep, self.lens = first, keep, first.lens * sequences

    def extend(self, layer: int, k: Tensor, v: Tensor, seg: Segments) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            return super().extend(layer, k, v, seg)
        k, v = (torch.cat([part for piece in new.split(seg.q_lens) for part in (old, piece)])
                for old, new in zip(self.first.layers[layer], (k, v)))
        if self.keep:
            self.layers[layer] = k, v
        return k, v


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels i and i + D/2 turn by the angle position * theta^(-2i/D). x (tokens, H, D)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)                 # as transformers does; in float32 a sixth of a GPU's step
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

class DecoderBlock(nn.Module):
    """Mistral's: RMSNorm, grouped-query attention with RoPE, RMSNorm, SwiGLU."""
    attention = staticmethod(attention)

    def __init__(self, cfg: ModelConfig, index: int):
        super().__init__()
        self.index, self.window = index, cfg.window
        self.head_dim = cfg.head_dim or cfg.width // cfg.heads
        self.norm1 = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.q = Linear(cfg.width, cfg.heads * self.head_dim, bias=False)
        self.k = Linear(cfg.width, cfg.kv_heads * self.head_dim, bias=False)
        self.v = Linear(cfg.width, cfg.kv_heads * self.head_dim, bias=False)
        self.out = Linear(cfg.heads * self.head_dim, cfg.width, bias=False)
        self.norm2 = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.gate = Linear(cfg.width, cfg.mlp_dim, bias=False)
        self.up = Linear(cfg.width, cfg.mlp_dim, bias=False)
        self.down = Linear(cfg.mlp_dim, cfg.width, bias=False)

    def forward(self, x, seg, cos, sin, cache):                             # (tokens, 4096)
        h = self.norm1(x)
        q, k, v = (rearrange(p(h), "t (h d) -> t h d", d=self.head_dim) for p in (self.q, self.k, self.v))
        q, k = rope(q, cos, sin), rope(k, cos, sin)             # (tokens, 32, 128), (tokens, 8, 128)
        if cache is not None:
            k, v = cache.extend(self.index, k, v, seg)
        o = self.attention(q, k, v, seg, causal=True, window=self.window)
        x = x + self.out(rearrange(o, "t h d -> t (h d)"))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

# what activation checkpointing and FSDP take as one unit
BLOCKS = (ViTBlock, RegNetBlock, ResBlock, FCBlock, DecoderBlock)

class Decoder(nn.Module):
    """A causal language model on packed sequences: flat (tokens, W) and `Segments`, no padding anywhere."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab, cfg.width)
        self.blocks = nn.ModuleList(DecoderBlock(cfg, i) for i in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.5)         # visual tokens must be heard beside words
        for name, weight in self.blocks.named_parameters():
            if weight.ndim == 2:
                deep = name.endswith(("out.weight", "down.weight"))         # they add to the residual stream
                nn.init.normal_(weight, std=cfg.width ** -0.5 / (math.sqrt(2 * cfg.layers) if deep else 1))

    def embed(self, ids: Tensor) -> Tensor:
        """(tokens,) -> (tokens, W)."""
        return self.embedding(ids)

    def forward(self, embeddings: Tensor, seg: Segments, positions: Tensor,
                cache: KVCache | None = None) -> Tensor:
        """(tokens, W), each token's position in its own sequence (tokens,) -> hidden (tokens, W)."""
        half = (self.cfg.head_dim or self.cfg.width // self.cfg.heads) // 2
        channel = torch.arange(half, device=positions.device, dtype=torch.float32)
        angle = positions[:, None].float() * self.cfg.rope_theta ** (-channel / half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]               # (tokens, 1, 64)
        x = embeddings
        for block in self.blocks:
            x = block(x, seg, cos, sin, cache)
        if cache is not None:
            cache.lens = seg.k_lens
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, W) -> (tokens, vocab); call it on the positions you need, 32,000 floats each."""
        return self.lm_head(hidden)

    @classmethod
    def from_hf(cls, path, dtype: torch.dtype | None = None) -> Decoder:
        """A MistralForCausalLM directory of Hugging Face, or an open one; what config.json leaves out has
        transformers' default, dtype None keeps the file's. A head tied to the embedding becomes a copy."""
        files = path if isinstance(path, Published) else Published(path)
        c = {"num_attention_heads": 32, "intermediate_size": 14336, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
        c |= {key: value for key, value in files.config.items() if value is not None}
        rope = (c.get("rope_parameters") or {}) | (c.get("rope_scaling") or {})
        (vocab, width), layers = files.shape("model.embed_tokens.weight"), files.count("model.layers.")
        files.expect(c, hidden_act="silu", attention_bias=False, mlp_bias=False, vocab_size=vocab,
                     hidden_size=width, num_hidden_layers=layers)
        files.expect(c | rope, rope_type="default", type="default", partial_rotary_factor=1)
        cfg = replace(PRESETS["7b"], width=width, layers=layers, vocab=vocab, norm_eps=c["rms_norm_eps"],
                      heads=c["num_attention_heads"], mlp_dim=c["intermediate_size"], head_dim=c.get("head_dim"),
                      kv_heads=files.config.get("num_key_value_heads", 8) or c["num_attention_heads"],
                      window=files.config.get("sliding_window", 4096),
                      rope_theta=float((c | rope)["rope_theta"]))
        with torch.device("meta"):
            decoder = cls(cfg)
        if c.get("tie_word_embeddings"):
            files.where.setdefault("lm_head.weight", files.where["model.embed_tokens.weight"])
        files.fill(decoder, "", MISTRAL_NAMES, dtype)
        if files is not path:
            files.expect(c, model_type="mistral")
            files.check_used()
        return decoder

    def lora_modules(self) -> list[Linear]:
        """All linear layers of the blocks: our choice, as in VideoLLaMA2; the paper names no targets."""
        return [m for block in self.blocks for m in block.modules() if isinstance(m, Linear)]

    def add_lora(self, rank: int, alpha: float, dropout: float):
        """Give every linear layer of the blocks a low-rank update that starts at zero."""
        for module in self.lora_modules():
            module.add_lora(rank, alpha, dropout)

    def merge_lora(self):
        """Fold the low-rank updates into the weights; the outputs stay the same, to rounding."""
        for m in (m for m in self.lora_modules() if m.lora_a is not None):
            m.weight.data += (m.lora_scale * m.lora_b @ m.lora_a).to(m.weight.dtype)
            m.merged, m.lora_a, m.lora_b = (m.lora_a, m.lora_b), None, None

    def unmerge_lora(self):
        """The opposite of merge_lora, to rounding."""
        for m in (m for m in self.lora_modules() if m.lora_a is None and hasattr(m, "merged")):
            m.lora_a, m.lora_b = m.merged
            m.weight.data -= (m.lora_scale * m.lora_b @ m.lora_a).to(m.weight.dtype)

# --------------------------------------------------------------------------------------------------- Exo2Ego
class Exo2Ego(nn.Module):
    """The whole model: exo_vit, exo_connector, ego_vit, ego_connector, decoder; F and G from stage 2 on."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.exo_vit, self.ego_vit = VisionEncoder(cfg), VisionEncoder(cfg)
        self.exo_connector, self.ego_connector = Connector(cfg), Connector(cfg)
        self.F = self.G = None
        self.add(mapping=cfg.mapping)
        self.decoder = Decoder(cfg)
        self.add(lora=cfg.lora)

    @classmethod
    def from_videollama2(cls, path, dtype: torch.dtype | None = None, vision=None) -> Exo2Ego:
        """The published VideoLLaMA2-7B-16F layout: its ViT and connector become both visual encoders. Without
        a ViT (plain Mistral, fresh connectors) it comes from `vision`, a CLIP directory."""
        files, tower = Published(path), "model.vision_tower.vision_tower."
        if (kind := files.config.get("model_type")) not in ("videollama2_mistral", "mistral"):
            raise ValueError(f"{path}/config.json: model_type is {kind!r}, videollama2_mistral fits here")
        files.expect(files.config, mm_projector_type="stc_connector", mm_vision_select_layer=-2,
                     mm_vision_select_feature="patch")
        if vision is None and not any(n.startswith(tower) for n in files.where):
            raise ValueError(f"{path} holds no vision tower: pass --vision DIR, a CLIP directory")
        decoder = Decoder.from_hf(files, dtype)
        vit = VisionEncoder.from_hf(vision or files, dtype, "" if vision else tower)
        depth = files.count("model.mm_projector.s1.b") - 1      # its blocks count from 1
        seen = ("image_size", "patch", "vit_width", "vit_layers", "vit_heads")
        cfg = replace(decoder.cfg, **{size: getattr(vit.cfg, size) for size in seen},
                      stc_depth=depth if depth > 0 else PRESETS["7b"].stc_depth,
                      frames=files.config.get("num_frames") or PRESETS["7b"].frames)
        with torch.device("meta"):
            model = cls(cfg)
        model.decoder, model.exo_vit, model.ego_vit = decoder, vit, copy.deepcopy(vit)
        if depth > 0:
            files.fill(model.exo_connector, "model.mm_projector.", (), dtype)
        else:
            model.exo_connector = Connector(cfg)
        model.ego_connector = copy.deepcopy(model.exo_connector)
        files.check_used(*[tower] * bool(vision))
        return model.eval()

    def add(self, mapping: str = "none", lora: bool = False):
        """Parts that start fresh: F and G, "resnet" or "mlp"; a low-rank update for the decoder."""
        self.cfg = cfg = replace(self.cfg, mapping=self.cfg.mapping if mapping == "none" else mapping,
                                 lora=self.cfg.lora or lora)
        if mapping != "none":
            self.F, self.G = Mapping(cfg, mapping), Mapping(cfg, mapping)
        if lora:
            self.decoder.add_lora(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)

    def patch_features(self, vit: VisionEncoder, frames: Tensor) -> Tensor:
        """uint8 (B, T, 3, S, S) -> the ViT's grid (B, T, h, w, D)."""
        if frames.dtype != torch.uint8:
            raise ValueError(f"frames are uint8, 0 to 255, and are normalised here; these are {frames.dtype}")
        x = rearrange(frames, "b t c h w -> (b t) c h w").float()
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] * 255 for v in (PIXEL_MEAN, PIXEL_STD))
        return rearrange(vit((x - mean) / std), "(b t) h w d -> b t h w d", b=len(frames))

    def ego_tokens(self, x: Tensor) -> Tensor:
        """[con_ego(x) ; con_exo(F(x))], along tokens: F(x) lives in exo space, the exo connector reads it."""
        tokens = self.ego_connector(x)                                      # (B, 1521, 4096)
        return tokens if self.F is None else torch.cat([tokens, self.exo_connector(self.F(x))], dim=1)

    def encode_ego(self, frames: Tensor) -> Tensor:
        """uint8 ego frames (B, T, 3, S, S) -> visual tokens (B, 3042, W); (B, 1521, W) before stage 2."""
        return self.ego_tokens(self.patch_features(self.ego_vit, frames))

    def encode_exo(self, frames: Tensor) -> Tensor:
        """uint8 exo frames (B, T, 3, S, S) -> visual tokens (B, 1521, W)."""
        return self.exo_connector(self.patch_features(self.exo_vit, frames))

    def insert_visual_tokens(self, visual: Tensor | None, ids: Tensor) -> Tensor:
        """Embeddings of packed ids (tokens,) in which each VIDEO id stands for one visual token, in order."""
        embeddings = self.decoder.embed(ids.clamp(min=0).to(self.decoder.embedding.weight.device))
        if visual is None:
            return embeddings
        slots = (ids == VIDEO).nonzero().squeeze(1).to(embeddings.device)
        return embeddings.index_copy(0, slots, visual.flatten(0, 1).to(embeddings.dtype))

    def text_logits(self, visual: Tensor | None, ids: Tensor, labels: Tensor, lens: Sequence[int]):
        """Logits (supervised, vocab) where a label is, and their targets: position t predicts t + 1. ids and
        labels are packed (tokens,), visual (B, n, W) fills the B * n slots where ids == VIDEO."""
        x = self.insert_visual_tokens(visual, ids)
        positions = torch.cat([torch.arange(n) for n in lens]).to(x.device)
        hidden = self.decoder(x, Segments.packed(lens, x.device), positions)
        where = (labels[1:] != IGNORE).nonzero().squeeze(1)     # never a sequence's first token: the
        targets = labels[1:][where].to(hidden.device)                   # shift stays inside a sequence
        return self.decoder.logits(hidden[where.to(hidden.device)]), targets

    @torch.no_grad()
    def log_likelihood(self, visual: Tensor, ids: Tensor, labels: Tensor, lens: Sequence[int]) -> Tensor:
        """log p of each sequence's supervised tokens given what stands before them, summed, in nats (B,)."""
        logits, targets = self.text_logits(visual, ids, labels, lens)
        logp = logits.float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        sequence = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens)).to(ids.device)
        supervised = labels[1:] != IGNORE
        total = torch.zeros(len(lens), device=ids.device)
        return total.index_add(0, sequence[1:][supervised], logp)

    @torch.no_grad()
    def stream(self, visual: Tensor | None, prompts: Sequence[Tensor], *, eos: int, max_new: int = 64,
               temperature: float = 0.0, cache: KVCache | None = None):
        """Answers as they come: a token id a sequence and step, None once it has ended. Prompts (with VIDEO
        ids for visual (B, n, W)) go on where `cache` stands; temperature 0 is greedy."""
        device = self.decoder.lm_head.weight.device
        cache, done = cache or KVCache(len(prompts)), [False] * len(prompts)
        x, new = self.insert_visual_tokens(visual, torch.cat(list(prompts)).to(device)), [*map(len, prompts)]
        for _ in range(max_new):
            total = [past + n for past, n in zip(cache.lens, new)]
            seg = Segments.cached(new, total, device)
            positions = torch.cat([torch.arange(t - n, t) for t, n in zip(total, new)]).to(device)
            last = self.decoder(x, seg, positions, cache)[seg.cu_q[1:].long() - 1]
            logits = self.decoder.logits(last).float()                      # (B, vocab)
            token = logits.argmax(-1) if temperature == 0 else torch.multinomial(
                (logits / temperature).softmax(-1), 1).squeeze(1)
            done = [over or t == eos for over, t in zip(done, token.tolist())]
            if all(done):
                break
            yield [None if over else t for over, t in zip(done, token.tolist())]
            x, new = self.decoder.embed(token), [1] * len(prompts)

    def generate(self, visual: Tensor | None, prompts: Sequence[Tensor], **options) -> list[list[int]]:
        """Whole answers, without the closing eos; `options` as `stream`."""
        steps = list(self.stream(visual, prompts, **options))
        return [[t for t in answer if t is not None] for answer in zip(*steps)] or [[] for _ in prompts]

# ----------------------------------------------------------------------------------------- published weights
# our name -> theirs, as regular expressions in turn; CLIP's misspelling is its own
CLIP_NAMES = (
    (r"\.([qkv])\.", r".self_attn.\1_proj."), (r"^class_token", "embeddings.class_embedding"),
    (r"^position", "embeddings.position_embedding.weight"), (r"^pre_norm", "pre_layrnorm"),
    (r"^patch_embedding", "embeddings.patch_embedding"), (r"^blocks", "encoder.layers"),
    (r"\.norm([12])\.", r".layer_norm\1."), (r"\.fc([12])\.", r".mlp.fc\1."),
    (r"\.out\.", ".self_attn.out_proj."))
MISTRAL_NAMES = (
    (r"\.([qkv])\.", r".self_attn.\1_proj."), (r"^embedding", "model.embed_tokens"),
    (r"^blocks", "model.layers"), (r"^norm", "model.norm"),
    (r"\.norm1\.", ".input_layernorm."), (r"\.norm2\.", ".post_attention_layernorm."),
    (r"\.(gate|up|down)\.", r".mlp.\1_proj."), (r"\.out\.", ".self_attn.o_proj."))

def rename(name: str, table) -> str:
    """Our name of a tensor -> its published one."""
    for ours, theirs in table:
        name = re.sub(ours, theirs, name)
    return name

def read_json(path: Path):
    """A JSON file that holds an object, or ValueError with its name."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None

class Published:
    """A directory in Hugging Face's layout. Tensors are mapped, read one at a time: no 7B in memory twice."""
    def __init__(self, path: str | os.PathLike):
        self.path, self.where, self.used = Path(path), {}, set()        # name -> its file and its name there
        self.config, index = read_json(self.path / "config.json"), self.path / "model.safetensors.index.json"
        names = read_json(index).get("weight_map", {}) if index.is_file() else {"": "model.safetensors"}
        for shard in sorted(set(names.values())):
            file, pickles = self.path / shard, sorted(p.name for p in self.path.glob("*.bin"))
            if file.parent != self.path or shard == "..":
                raise ValueError(f"{index} names {shard!r}: a shard is a plain file name in that directory")
            if pickles and not file.is_file():
                raise ValueError(f"{file} is missing, and {pickles[0]} is a pickle, which can run code: "
                                 f"convert it once, as README shows")
            try:
                handle = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                what = "cannot be read" if file.is_file() else "is missing"
                raise ValueError(f"{file} {what} ({error}): download it again") from None
            self.where |= {name: (handle, name) for name in handle.keys()}

    def expect(self, config: dict, **wanted):
        """Refuse by name what the network here cannot represent; absent and null are as wanted."""
        for key, value in wanted.items():
            if config.get(key) not in (None, value):
                raise ValueError(f"{self.path}/config.json: {key} is {config[key]!r}, {value!r} fits here")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that must be there, read from its file's header."""
        if name not in self.where:
            raise ValueError(f"{self.path} lacks the tensor {name}")
        handle, there = self.where[name]
        return tuple(handle.get_slice(there).get_shape())

    def count(self, prefix: str) -> int:
        """1 + the largest number that follows this prefix in a name."""
        numbers = (re.match(r"\d+", n[len(prefix):]) for n in self.where if n.startswith(prefix))
        return 1 + max((int(number[0]) for number in numbers if number), default=-1)

    def fill(self, module: nn.Module, prefix: str, table=(), dtype: torch.dtype | None = None):
        """Give every tensor of a module that was built on the meta device its value."""
        for name, blank in module.state_dict().items():
            theirs = prefix + rename(name, table)
            shape, (handle, there) = self.shape(theirs), self.where[theirs]
            value, (owner, _, leaf) = handle.get_tensor(there), name.rpartition(".")
            if shape != blank.shape or not value.is_floating_point():
                raise ValueError(f"{self.path}: {theirs} is {shape} {value.dtype}, not {(*blank.shape,)}")
            value = value.to(torch.get_default_device(), dtype, copy=True)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(value))
            self.used.add(theirs)

    def check_used(self, *ignore: str):
        """Every tensor must have found its place, but for prefixes to ignore and RoPE's old tables."""
        extra = (n for n in self.where if not n.endswith("rotary_emb.inv_freq") and not n.startswith(ignore))
        if extra := sorted(set(extra) - self.used):
            raise ValueError(f"{self.path} has tensors that have no place here: {extra[:3]}")

def export_hf(ckpt: str | os.PathLike, out: str | os.PathLike, base=None, vision=None):
    """`python model.py --export-hf CKPT DIR`: DIR/decoder (LoRA merged), DIR/exo_vision and DIR/ego_vision as
    transformers loads them. CLIP's last layer, never run here, is written as zeros, which pass their input
    on: hidden state -2 and the last one are both our features."""
    model, _ = load_checkpoint(ckpt, base, vision)
    cfg, decoder, parts = model.cfg, model.decoder, {}
    if cfg.lora:
        decoder.merge_lora()
    clip = dict(architectures=["CLIPVisionModel"], model_type="clip_vision_model", hidden_size=cfg.vit_width,
                intermediate_size=4 * cfg.vit_width, num_hidden_layers=cfg.vit_layers, num_channels=3,
                num_attention_heads=cfg.vit_heads, image_size=cfg.image_size, patch_size=cfg.patch,
                hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=cfg.vit_width)
    mistral = dict(architectures=["MistralForCausalLM"], model_type="mistral", hidden_size=cfg.width,
                   intermediate_size=cfg.mlp_dim, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
                   num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim or cfg.width // cfg.heads,
                   hidden_act="silu", rms_norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta,
                   vocab_size=cfg.vocab, sliding_window=cfg.window, max_position_embeddings=32768,
                   tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    parts["decoder"] = {rename(n, MISTRAL_NAMES): t for n, t in decoder.state_dict().items()}, mistral
    for name, vit in (("exo_vision", model.exo_vit), ("ego_vision", model.ego_vit)):
        last = {n.replace("blocks.0.", f"blocks.{cfg.vit_layers - 1}."): torch.zeros_like(t)
                for n, t in vit.state_dict().items() if n.startswith("blocks.0.")}
        tensors = {rename(n, CLIP_NAMES): t for n, t in (vit.state_dict() | last).items()}
        tensors |= {"post_layernorm.weight": vit.pre_norm.weight.new_ones(cfg.vit_width),
                    "post_layernorm.bias": vit.pre_norm.weight.new_zeros(cfg.vit_width)}
        parts[name] = {f"vision_model.{n}": t for n, t in tensors.items()}, clip
    for name, (tensors, config) in parts.items():
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, folder / "model.safetensors",
                  {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        print(f"{folder}: {len(tensors)} tensors")
    shutil.copyfile(newest_checkpoint(ckpt) / "tokenizer.model", Path(out) / "decoder/tokenizer.model")


# ----------------------------------------------------------------------------------------------- checkpoints
def newest_checkpoint(run: str | os.PathLike) -> Path | None:
    """The newest `step_*` of a run folder (a save takes that name when whole), or the folder itself if it is
    a checkpoint or holds published weights; None if there is none."""
    run = Path(run)
    is_one = (run / "state.json").is_file() or (run / "config.json").is_file()
    return max([run] if is_one else run.glob("step_[0-9]*"), default=None, key=lambda p: p.name)

def fingerprint(path: str | os.PathLike) -> str:
    """A short hash of each file's first (its header) and last MiB: gigabytes would take too long."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("model*.safetensors")):
        with open(file, "rb") as f:
            digest.update(f.read(1 << 20))
            f.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(f.read())
    return digest.hexdigest()[:16]

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


def read_state(path: Path) -> dict:
    """state.json of a checkpoint; published weights count as a finished stage 0."""
    if (path / "config.json").is_file():
        return dict(stage=0, step=0, steps=0, base=None)
    return read_json(path / "state.json")

def base_checkpoint_of(path: Path, base: str | os.PathLike | None = None) -> Path | None:
    """The folder that a checkpoint builds on, `base` or the one it recorded, by hash; None: it is whole."""
    state = read_state(path)
    if state["base"] is None:
        return None
    root = newest_checkpoint(base or path.parent / state["base"])
    if root is None:
        raise FileNotFoundError(f"{path} builds on {state['base']}, which is not there: pass --base DIR")
    if fingerprint(root) != state["base_hash"]:
        raise ValueError(f"{root} is not the base of {path}, its weights differ: pass --base DIR")
    return root

def file_hash(file: Path) -> str:
    """sha256 of a whole file."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def load_delta(path: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    """What a checkpoint's own file holds, every tensor that differs from its base; a flipped bit is seen."""
    try:
        if read_state(path).get("sha256", {}).get(name) not in (None, file_hash(path / name)):
            raise ValueError("it has changed since it was saved")
        return load_file(path / name)
    except Exception as error:
        raise ValueError(f"{path / name} cannot be read ({error}): remove {path} to fall back to the "
                         f"checkpoint before it") from None

def load_checkpoint(path: str | os.PathLike, base: str | os.PathLike | None = None,
                    vision: str | os.PathLike | None = None, **added):
    """-> Exo2Ego (eval mode), state.json. `path` (run folder, `step_*`, published weights) has
    what was trained, `base` (as recorded) the rest; `added` (mapping="resnet", lora=True) starts fresh."""
    folder = newest_checkpoint(path)
    if folder is None:
        raise FileNotFoundError(f"no checkpoint in {path}: train it first (torchrun train.py --stage N)")
    state, root = read_state(folder), base_checkpoint_of(folder, base)
    published = next((p for p in (folder, root) if p and (p / "config.json").is_file()), None)
    optional = sum(({"mapping": ("F.", "G."), "lora": ("lora_",)}[key] for key in added), ())   # start fresh
    if published:
        model = Exo2Ego.from_videollama2(published, vision=vision or state.get("vision"))
        state.setdefault("model", asdict(model.cfg))
        optional += tuple(model.state_dict())                   # there already
        model.add(**{key: state["model"][key] for key in ("mapping", "lora")} | added)
        tensors = load_delta(folder) if root else {}
    else:
        model = Exo2Ego(replace(ModelConfig(**state["model"]), **added))
        tensors = (load_delta(root) if root else {}) | load_delta(folder)
    tensors = {n: t for n, t in tensors.items() if not n.startswith("loss.")}
    try:
        missing, extra = model.load_state_dict(tensors, strict=False, assign=bool(published))
    except RuntimeError as error:                               # torch names tensor and both shapes
        raise ValueError(f"{folder} does not fit the model: {error}") from None
    missing = [n for n in missing if not any(word in n for word in optional)]
    if missing or extra:
        raise ValueError(f"{folder} does not fit the model: missing {missing[:3]}, unknown {extra[:3]}")
    return model.eval(), state

# ------------------------------------------------------------------- appendix: the tiles of Tiled, on a GPU
# tile (queries, keys), warps, stages by kernel and head_dim: a test compiles all, no spills on sm_80, sm_90
TILES = {("forward", 32): (128, 64, 4, 3), ("dq", 32): (128, 64, 8, 2), ("dkdv", 32): (32, 64, 4, 2),
         ("forward", 64): (128, 64, 8, 3), ("dq", 64): (128, 64, 8, 2), ("dkdv", 64): (32, 64, 8, 2),
         ("forward", 128): (128, 32, 8, 3), ("dq", 128): (128, 32, 8, 2), ("dkdv", 128): (32, 64, 8, 2)}
# Hopper (sm_90): the fastest of twelve each, measured on an H100 (tests/gpu.py); those of dkdv spill, and win
TILES_90 = TILES | {("forward", 64): (64, 64, 4, 3), ("dq", 64): (128, 64, 8, 3), ("dkdv", 64): (32, 128, 4, 3),
                    ("forward", 128): (64, 64, 4, 3), ("dq", 128): (64, 64, 4, 2), ("dkdv", 128): (32, 64, 4, 2)}
FLOAT32_TILES = {32: (32, 32, 8, 1), 64: (16, 16, 4, 1), 128: (16, 16, 8, 1)}

@cache
def triton_kernels() -> dict:
    """The three kernels by name. Made on first use: triton is imported here only, and may be missing.

    One program owns one tile of the result and walks along the other side, so nothing is added atomically
    and results repeat bit for bit. static_range unrolls the walk into two loops, over tiles that are visible
    whole and over those to be masked (with a window: all). Scores are in base 2, exp2 being one instruction.
    """
    global tl, bounds, key_walk, hide, load     # triton's interpreter looks for names among the module's globals
    try:
        import triton
        import triton.language as tl
    except ImportError:
        raise ImportError("backend triton needs the package triton, not installed here: use sdpa") from None

    @triton.jit
    def bounds(cu_q, cu_k):
        q0, k0 = tl.load(cu_q + tl.program_id(2)), tl.load(cu_k + tl.program_id(2))
        return q0, tl.load(cu_q + tl.program_id(2) + 1) - q0, k0, tl.load(cu_k + tl.program_id(2) + 1) - k0

    @triton.jit
    def key_walk(first, lk, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr):
        lo, tail, hi = 0, lk // BN * BN, lk         # [lo, tail): visible whole; [tail, hi): to be masked
        if CAUSAL:
            tail, hi = tl.minimum(tl.maximum(first + 1, 0), lk) // BN * BN, tl.minimum(lk, first + BM)
        if WINDOW:
            lo = tl.maximum(first - window + 1, 0) // BN * BN
            tail = lo
        return lo, tail, hi

    @triton.jit
    def hide(s, i, j, lk, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
        seen = j < lk                               # keys j by queries at positions i
        if CAUSAL:
            seen = seen & (j <= i)
        if WINDOW:
            seen = seen & (j > i - window)
        return tl.where(seen, s, float("-inf"))

    @triton.jit
    def load(at, inside, MASKED: tl.constexpr):
        if MASKED:
            return tl.load(at, mask=inside, other=0.0)
        return tl.load(at)                          # a whole tile: all of it lies inside

    @triton.jit(do_not_specialize=["total", "heads", "kv_heads", "window"])
    def forward(q, k, v, o, lse, cu_q, cu_k, total, heads, kv_heads, window, scale, D: tl.constexpr,
                CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)    # causal: the longest walks first
        q0, lq, k0, lk = bounds(cu_q, cu_k)
        if tile * BM >= lq:
            return
        rows, d = tile * BM + tl.arange(0, BM), tl.arange(0, D)
        first_q = (tl.cast(q0, tl.int64) * heads + head) * D        # where the segment's rows of this head start
        first_k = (tl.cast(k0, tl.int64) * kv_heads + head // (heads // kv_heads)) * D
        at_q = rows[:, None] * (heads * D) + d[None, :]
        qi = tl.load(q + first_q + at_q, mask=rows[:, None] < lq, other=0.0)
        m, l = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D], tl.float32)
        lo, tail, hi = key_walk(tile * BM + lk - lq, lk, window, CAUSAL, WINDOW, BM, BN)
        for masked in tl.static_range(1 if WINDOW else 0, 2):
            for j in range(tail if masked else lo, hi if masked else tail, BN):
                keys = j + tl.arange(0, BN)
                at_k = keys * (kv_heads * D)
                kj = load(k + first_k + at_k[None, :] + d[:, None], keys[None, :] < lk, masked)     # (D, BN)
                vj = load(v + first_k + at_k[:, None] + d[None, :], keys[:, None] < lk, masked)     # (BN, D)
                s = tl.dot(qi, kj, input_precision="ieee") * (scale * 1.4426950408889634)   # log2(e)
                if masked:
                    s = hide(s, (rows + lk - lq)[:, None], keys[None, :], lk, window, CAUSAL, WINDOW)
                m_new = tl.maximum(m, tl.max(s, 1))
                finite = tl.where(m_new == float("-inf"), 0.0, m_new)       # nothing visible yet
                p, alpha = tl.exp2(s - finite[:, None]), tl.exp2(m - finite)
                l = l * alpha + tl.sum(p, 1)
                acc = tl.dot(p.to(vj.dtype), vj, acc * alpha[:, None], input_precision="ieee")
                m = m_new
        some = tl.where(l == 0.0, 1.0, l)                       # a row without keys: o = 0, lse = inf
        tl.store(o + first_q + at_q, (acc / some[:, None]).to(o.dtype.element_ty), mask=rows[:, None] < lq)
        lse_i = tl.where(l == 0.0, float("inf"), m + tl.log2(some))
        tl.store(lse + tl.cast(head, tl.int64) * total + q0 + rows, lse_i, mask=rows < lq)

    @triton.jit(do_not_specialize=["total", "heads", "kv_heads", "window"])
    def dq(q, k, v, o, do, lse, dq, delta, cu_q, cu_k, total, heads, kv_heads, window, scale, D: tl.constexpr,
           CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)    # causal: the longest walks first
        q0, lq, k0, lk = bounds(cu_q, cu_k)
        if tile * BM >= lq:
            return
        rows, d = tile * BM + tl.arange(0, BM), tl.arange(0, D)
        first_q = (tl.cast(q0, tl.int64) * heads + head) * D
        first_k = (tl.cast(k0, tl.int64) * kv_heads + head // (heads // kv_heads)) * D
        at_q = rows[:, None] * (heads * D) + d[None, :]
        at_row = tl.cast(head, tl.int64) * total + q0 + rows
        qi = tl.load(q + first_q + at_q, mask=rows[:, None] < lq, other=0.0)
        do_i = tl.load(do + first_q + at_q, mask=rows[:, None] < lq, other=0.0)
        o_i = tl.load(o + first_q + at_q, mask=rows[:, None] < lq, other=0.0)
        delta_i = tl.sum(do_i.to(tl.float32) * o_i.to(tl.float32), 1)
        tl.store(delta + at_row, delta_i, mask=rows < lq)       # for dkdv, which runs next
        lse_i = tl.load(lse + at_row, mask=rows < lq, other=float("inf"))
        dq_i = tl.zeros([BM, D], tl.float32)
        lo, tail, hi = key_walk(tile * BM + lk - lq, lk, window, CAUSAL, WINDOW, BM, BN)
        for masked in tl.static_range(1 if WINDOW else 0, 2):
            for j in range(tail if masked else lo, hi if masked else tail, BN):
                keys = j + tl.arange(0, BN)
                at_k = keys[:, None] * (kv_heads * D) + d[None, :]
                kj = load(k + first_k + at_k, keys[:, None] < lk, masked)                   # (BN, D)
                vj = load(v + first_k + at_k, keys[:, None] < lk, masked)
                s = tl.dot(qi, tl.trans(kj), input_precision="ieee") * (scale * 1.4426950408889634)
                if masked:
                    s = hide(s, (rows + lk - lq)[:, None], keys[None, :], lk, window, CAUSAL, WINDOW)
                p = tl.exp2(s - lse_i[:, None])
                ds = p * (tl.dot(do_i, tl.trans(vj), input_precision="ieee") - delta_i[:, None])
                dq_i = tl.dot(ds.to(kj.dtype), kj, dq_i, input_precision="ieee")
        tl.store(dq + first_q + at_q, (dq_i * scale).to(dq.dtype.element_ty), mask=rows[:, None] < lq)

    @triton.jit(do_not_specialize=["total", "heads", "kv_heads", "window"])
    def dkdv(q, k, v, do, lse, delta, dk, dv, cu_q, cu_k, total, heads, kv_heads, window, scale,
             D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        tile, kv_head = tl.program_id(0), tl.program_id(1)
        q0, lq, k0, lk = bounds(cu_q, cu_k)
        if tile * BN >= lk:
            return
        keys, d = tile * BN + tl.arange(0, BN), tl.arange(0, D)
        first_k = (tl.cast(k0, tl.int64) * kv_heads + kv_head) * D
        at_k = keys[:, None] * (kv_heads * D) + d[None, :]
        kj = tl.load(k + first_k + at_k, mask=keys[:, None] < lk, other=0.0)
        vj = tl.load(v + first_k + at_k, mask=keys[:, None] < lk, other=0.0)
        dk_j, dv_j = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
        # queries [lo, full) and [whole, hi) are to be masked; [full, whole) are whole tiles that see all these
        # keys. Past the last query lse is inf, so p is 0; keys past the end are not stored
        lo, full, hi, first = 0, 0, lq, tile * BN + lq - lk     # first: the query at the tile's first key
        if CAUSAL:
            lo = tl.maximum(first, 0) // BM * BM
            full = tl.minimum((tl.maximum(first + BN - 1, 0) + BM - 1) // BM * BM, lq)
        whole = tl.maximum(full, hi // BM * BM)
        if WINDOW:
            hi = tl.minimum(lq, first + BN - 1 + window)
            full = hi
        for head in range(kv_head * (heads // kv_heads), (kv_head + 1) * (heads // kv_heads)):
            first_q = (tl.cast(q0, tl.int64) * heads + head) * D
            for part in tl.static_range(0 if CAUSAL else 1, 1 if WINDOW else 3):        # 1: the whole tiles
                begin, end = lo, full
                if part == 1:
                    begin, end = full, whole
                if part == 2:
                    begin, end = whole, hi
                for i in range(begin, end, BM):
                    rows = i + tl.arange(0, BM)
                    at_q = rows[:, None] * (heads * D) + d[None, :]
                    at_row = tl.cast(head, tl.int64) * total + q0 + rows
                    qi = load(q + first_q + at_q, rows[:, None] < lq, part != 1)
                    do_i = load(do + first_q + at_q, rows[:, None] < lq, part != 1)
                    lse_i = tl.load(lse + at_row, mask=rows < lq, other=float("inf"))
                    delta_i = load(delta + at_row, rows < lq, part != 1)
                    s = tl.dot(kj, tl.trans(qi), input_precision="ieee") * (scale * 1.4426950408889634)
                    if part != 1:                               # transposed: keys are rows, (BN, BM)
                        s = hide(s, (rows + lk - lq)[None, :], keys[:, None], lk, window, CAUSAL, WINDOW)
                    p = tl.exp2(s - lse_i[None, :])
                    dv_j = tl.dot(p.to(do_i.dtype), do_i, dv_j, input_precision="ieee")
                    ds = p * (tl.dot(vj, tl.trans(do_i), input_precision="ieee") - delta_i[None, :])
                    dk_j = tl.dot(ds.to(qi.dtype), qi, dk_j, input_precision="ieee")
        tl.store(dk + first_k + at_k, (dk_j * scale).to(dk.dtype.element_ty), mask=keys[:, None] < lk)
        tl.store(dv + first_k + at_k, dv_j.to(dv.dtype.element_ty), mask=keys[:, None] < lk)

    return {"forward": forward, "dq": dq, "dkdv": dkdv}

def launch(kernel: str, q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int,
           causal: bool, window: int | None, scale: float, *tensors: Tensor):
    """One program for each tile of each head of each segment; those past a segment's end return at once."""
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    table = TILES_90 if hopper else TILES
    rows, keys, warps, stages = FLOAT32_TILES[head_dim] if q.dtype == torch.float32 else table[kernel, head_dim]
    if kernel == "dkdv":                                        # its programs own a tile of keys
        tiles, owners = math.ceil(longest_k / keys), kv_heads
    else:
        tiles, owners = math.ceil(longest_q / rows), heads
    if tiles == 0:
        return
    with torch.cuda.device_of(q):
        triton_kernels()[kernel][tiles, owners, len(cu_q) - 1](
            *tensors, cu_q, cu_k, len(q), heads, kv_heads, window or 0, scale, head_dim, causal, window is not None,
            rows, keys, num_warps=warps, num_stages=stages)


# The kernels as one differentiable operator of torch, so that activation checkpointing can keep its result
# (an autograd.Function would run again) and torch.compile passes it by.
SCHEMA = ("Tensor q, Tensor k, Tensor v, {} Tensor cu_q, Tensor cu_k, int longest_q, int longest_k, bool causal, "
          "int? window, float scale")


@torch.library.custom_op("exo2ego::flash_attention", mutates_args=(), schema=f"({SCHEMA.format('')}) -> (Tensor, Tensor)")
def flash_attention(q, k, v, cu_q, cu_k, longest_q, longest_k, causal, window, scale):
    """-> o (Tq, H, D) as q, and lse (H, Tq) float32 for the backward."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    o, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q), device=q.device)
    launch("forward", q, k, cu_q, cu_k, longest_q, longest_k, causal, window, scale, q, k, v, o, lse)
    return o, lse


@torch.library.custom_op("exo2ego::flash_attention_backward", mutates_args=(),
                         schema=f"({SCHEMA.format('Tensor o, Tensor lse, Tensor do,')}) -> (Tensor, Tensor, Tensor)")
def flash_attention_backward(q, k, v, o, lse, do, cu_q, cu_k, longest_q, longest_k, causal, window, scale):
    """-> dq, dk, dv; dq also leaves delta for dkdv, which runs after it."""
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous()
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    rest = cu_q, cu_k, longest_q, longest_k, causal, window, scale
    launch("dq", q, k, *rest, q, k, v, o, do, lse, dq, delta)
    launch("dkdv", q, k, *rest, q, k, v, do, lse, delta, dk, dv)
    return dq, dk, dv


def _keep_for_backward(ctx, inputs, output):
    q, k, v, cu_q, cu_k, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do, _):
    q, k, v, o, lse, cu_q, cu_k = ctx.saved_tensors
    grads = flash_attention_backward(q, k, v, o, lse, do, cu_q, cu_k, *ctx.rest)
    return *grads, None, None, None, None, None, None, None


flash_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def _triton(q, k, v, seg, causal, window, scale):
    longest_q, longest_k = max(seg.q_lens, default=0), max(seg.k_lens, default=0)
    return flash_attention(q, k, v, seg.cu_q, seg.cu_k, longest_q, longest_k, causal, window, scale)[0]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check-attention", action="store_true", help=check_attention.__doc__)
    what.add_argument("--export-hf", nargs=2, metavar=("CKPT", "DIR"), help=export_hf.__doc__)
    parser.add_argument("--base", help="where the untouched weights are, if they have moved")
    parser.add_argument("--vision", help="where the CLIP directory is, if it has moved")
    args = parser.parse_args(argv)
    try:
        if args.export_hf:
            export_hf(*args.export_hf, args.base, args.vision)
        elif failures := check_attention():
            sys.exit(f"{failures} checks failed")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"model.py: {error}")


if __name__ == "__main__":
    main()
