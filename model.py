"""The network of Exo2Ego (arXiv 2503.09143): first-person video understood through a learned third-person
view.

Read this file first, then data.py, train.py, eval.py. Everything is here, from attention to
`Exo2Ego.generate`:

    pixels -> VisionEncoder (CLIP) -> grid -> [Mapping F: ego -> exo] -> Connector (STC) -> Decoder -> text

Two visual encoders (ViT + connector) see the world: exo, the demonstrator, and ego, the learner. The decoder
reads [con_ego(x) ; con_exo(F(x))], so that inference needs the ego video alone. Shapes in comments are the
`7b` preset's.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
    ff: int
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
    def grid(self) -> int:          # patches a side
        return self.image_size // self.patch

    @property
    def visual_tokens(self) -> int:
        """n of one connector: 7b 9 x 13 x 13 = 1521."""
        t, s = ((side + 2 * self.stc_padding) // 2 for side in (self.frames, self.grid))
        return t * s * s


PRESETS = {
    # The micro-world on a laptop CPU: every size is our choice, the shapes of the architecture are the
    # paper's.
    "toy": ModelConfig(
        frames=4, image_size=48, patch=12, vit_width=96, vit_layers=3, vit_heads=3, stc_depth=1,
        stc_padding=0, map_blocks=4, map_downs=1, map_width=64, width=96, layers=2, heads=3, kv_heads=1,
        ff=256, vocab=512, rope_theta=1e4, max_length=256, lora_rank=16, lora_alpha=32, lora_dropout=0.0),
    # Benchmarks and first tries on a GPU: our choice.
    "small": ModelConfig(
        frames=8, image_size=112, patch=14, vit_width=384, vit_layers=7, vit_heads=6, stc_depth=4,
        stc_padding=1, map_blocks=9, map_downs=1, map_width=128, width=512, layers=8, heads=8, kv_heads=2,
        ff=1536, vocab=32000, rope_theta=1e6, max_length=2048, lora_rank=64, lora_alpha=128,
        lora_dropout=0.1),
    # The paper: two CLIP-L/14-336, VideoLLaMA2's connector, Mistral-7B-Instruct-v0.2, 16 frames, LoRA
    # 128/256/0.1.
    "7b": ModelConfig(
        frames=16, image_size=336, patch=14, vit_width=1024, vit_layers=24, vit_heads=16, stc_depth=4,
        stc_padding=1, map_blocks=9, map_downs=2, map_width=512, width=4096, layers=32, heads=32, kv_heads=8,
        ff=14336, vocab=32000, rope_theta=1e6, max_length=4096, lora_rank=128, lora_alpha=256,
        lora_dropout=0.1),
}


# ------------------------------------------------------------------------------------------------- attention
@dataclass(frozen=True)
class Segments:
    """Where each sequence of a packed batch starts and ends: no padding, so no mask. All layers share one.

    `q_lens` and `k_lens` are host integers (loops over them never wait for a GPU); `cu_q` and `cu_k` are
    their running sums, int32 on the device, for kernels. Queries are aligned to the end of their keys (a KV
    cache has more keys).
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

    @classmethod
    def uniform(cls, count: int, length: int, device="cpu") -> Segments:
        """`count` sequences of one length: the ViT's patches of each frame."""
        return cls.packed((length,) * count, device)

    @property
    def is_uniform(self) -> bool:
        return len(set(self.q_lens)) == 1 and len(set(self.k_lens)) == 1

    @property
    def is_tiny(self) -> bool:
        """Many short sequences of like lengths: one right-padded call beats a loop of calls."""
        total, longest = sum(self.q_lens), max(self.q_lens, default=0)
        count = len(self.q_lens)
        return self.q_lens == self.k_lens and total < 64 * count and longest * count < 1.4 * total

    @cached_property
    def slots(self) -> Tensor:
        """Where each packed token stands in a right-padded (batch, longest) layout."""
        longest = max(self.q_lens)
        rows = [torch.arange(n) + i * longest for i, n in enumerate(self.q_lens)]
        return torch.cat(rows).to(self.cu_q.device)


def attention(q: Tensor, k: Tensor, v: Tensor, seg: Segments, *, causal: bool, window: int | None = None,
              scale: float | None = None, backend: str = "auto") -> Tensor:
    """softmax(q k^T * scale) v inside each segment; the only attention in this repository.

    q (Tq, H, D), k and v (Tk, HK, D) -> (Tq, H, D), where HK divides H (grouped queries). Causal is bottom-
    right aligned: query i sees key j iff i - window < j <= i; window=1 sees itself only and needs causal. A
    row without keys gives zeros. Backends: "reference" is the formula, "sdpa" torch's fused kernel, "auto"
    takes sdpa.
    """
    _check_attention(q, k, v, seg, causal, window, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    one = _reference if backend == "reference" else _sdpa
    if seg.is_uniform and backend != "reference":                           # one batched call
        batch = len(seg.q_lens)
        q, k, v = (rearrange(t, "(b t) h d -> b h t d", b=batch) for t in (q, k, v))
        return rearrange(one(q, k, v, causal, window, scale), "b h t d -> (b t) h d")
    if backend != "reference" and causal and seg.is_tiny:       # padding comes last: causal rows never see it
        rows = len(seg.q_lens) * max(seg.q_lens)
        q, k, v = (t.new_zeros(rows, *t.shape[1:]).index_copy(0, seg.slots, t) for t in (q, k, v))
        q, k, v = (rearrange(t, "(b t) h d -> b h t d", b=len(seg.q_lens)) for t in (q, k, v))
        return rearrange(one(q, k, v, causal, window, scale), "b h t d -> (b t) h d")[seg.slots]
    parts = zip(q.split(seg.q_lens), k.split(seg.k_lens), v.split(seg.k_lens))
    out = [one(*(rearrange(t, "t h d -> 1 h t d") for t in part), causal, window, scale) for part in parts]
    return torch.cat([rearrange(o, "1 h t d -> t h d") for o in out]) if out else q


def _check_attention(q, k, v, seg, causal, window, backend):
    if backend not in ("auto", "sdpa", "reference"):
        raise ValueError(f"backend is {backend!r}: choose auto, sdpa or reference")
    if k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k, v need one head_dim, k and v one shape: {[(*t.shape,) for t in (q, k, v)]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, k has {k.shape[1]}: the second must divide the first")
    if len({(t.dtype, t.device) for t in (q, k, v)}) != 1:
        raise ValueError(f"q, k, v need one dtype and device: {[(t.dtype, t.device) for t in (q, k, v)]}")
    if (sum(seg.q_lens), sum(seg.k_lens)) != (len(q), len(k)):
        raise ValueError(f"seg has {sum(seg.q_lens)} queries, {sum(seg.k_lens)} keys; q {len(q)}, k {len(k)}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window is {window} with causal={causal}: it must be >= 1 and needs causal=True")


def _visible(lq: int, lk: int, causal: bool, window: int | None, device) -> Tensor | None:
    """(lq, lk) booleans, or None when every query sees every key."""
    if not causal:
        return None
    i = torch.arange(lk - lq, lk, device=device)[:, None]       # queries stand at the end of their keys
    j = torch.arange(lk, device=device)[None]
    return (j <= i) if window is None else (j <= i) & (j > i - window)


def _reference(q, k, v, causal, window, scale):
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale                                # (B, H, lq, lk)
    mask = _visible(q.shape[2], k.shape[2], causal, window, q.device)
    if mask is None:
        return scores.softmax(-1) @ v
    probs = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return probs.masked_fill(~mask.any(-1, keepdim=True), 0) @ v            # a row that sees nothing: 0


def _sdpa(q, k, v, causal, window, scale):
    lq, lk = q.shape[2], k.shape[2]
    if lq == 0 or lk == 0:
        return torch.zeros_like(q)
    grouped = q.shape[1] != k.shape[1]
    plain = causal and lq == lk and window is None              # torch's is_causal is top-left aligned
    open_row = not causal or (lq == 1 and window is None)       # the last query sees every key: no mask
    mask = None if plain or open_row else _visible(lq, lk, causal, window, q.device)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=scale, enable_gqa=grouped)
    return out if lq <= lk or mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0)


# -------------------------------------------------------------------------------------- VisionEncoder (CLIP)
class ViTBlock(nn.Module):
    """Pre-LN transformer block with quick-GELU, as CLIP's."""

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
        x = x + self.out(rearrange(attention(q, k, v, seg, causal=False), "t h d -> t (h d)"))
        h = F.silu(1.702 * self.fc1(self.norm2(x))) / 1.702                 # quick-GELU: h * sigmoid(1.702 h)
        return x + self.fc2(h)


class VisionEncoder(nn.Module):
    """CLIP ViT whose output is layer -2's patch grid: LLaVA's and VideoLLaMA2's choice of features.

    (N, 3, S, S) normalised pixels -> (N, h, w, D). The last layer and the post norm are never run, so they
    are not built: 7b has 303,507,456 parameters in the published files, 290,909,184 of them here.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.grid, self.patch = cfg.grid, cfg.patch
        self.patch_embedding = nn.Conv2d(3, cfg.vit_width, cfg.patch, stride=cfg.patch, bias=False)
        self.class_token = nn.Parameter(torch.randn(cfg.vit_width) * cfg.vit_width ** -0.5)
        self.position = nn.Parameter(torch.randn(cfg.grid ** 2 + 1, cfg.vit_width) * cfg.vit_width ** -0.5)
        self.pre_norm = nn.LayerNorm(cfg.vit_width)
        self.blocks = nn.ModuleList(ViTBlock(cfg.vit_width, cfg.vit_heads) for _ in range(cfg.vit_layers - 1))

    def forward(self, pixels: Tensor) -> Tensor:                            # (N, 3, 336, 336)
        n = len(pixels)
        patches = rearrange(pixels, "n c (h p) (w q) -> n (h w) (c p q)", p=self.patch, q=self.patch)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1))       # stride = kernel: a matmul
        x = torch.cat([self.class_token.to(x.dtype).expand(n, 1, -1), x], dim=1)
        x = self.pre_norm(x + self.position)                                # (N, 577, 1024)
        seg = Segments.uniform(n, x.shape[1], x.device)
        x = rearrange(x, "n t d -> (n t) d")
        for block in self.blocks:
            x = block(x, seg)
        x = rearrange(x, "(n t) d -> n t d", n=n)[:, 1:]                    # without the class token
        return rearrange(x, "n (h w) d -> n h w d", h=self.grid)            # (N, 24, 24, 1024)


# ------------------------------------------------------------------------------------------- Connector (STC)
class ConvNorm(nn.Module):
    """1x1 or depthwise 3x3 convolution and LayerNorm over channels, on channels-last grids (N, h, w, C)."""

    def __init__(self, c_in: int, c_out: int, kernel: int):
        super().__init__()
        groups = 1 if kernel == 1 else c_in
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(c_out, eps=1e-6)                 # timm calls it bn whatever it is

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
        s = F.relu(F.linear(s, self.fc1.weight.flatten(1), self.fc1.bias))
        return x * torch.sigmoid(F.linear(s, self.fc2.weight.flatten(1), self.fc2.bias))


class RegNetBlock(nn.Module):
    """The block of VideoLLaMA2's STC (a timm RegStage): 1x1, depthwise 3x3, gate, 1x1, residual, SiLU.

    From scratch it was seen to stay on the blind plateau: it garbles what the ViT says. Our choice: the gain
    of the last norm starts at zero, so that the block starts as SiLU(x), and trains.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = ConvNorm(c_in, c_out, 1)
        self.conv2 = ConvNorm(c_out, c_out, 3)
        self.se = SqueezeExcite(c_out, c_in // 4)
        self.conv3 = ConvNorm(c_out, c_out, 1)
        self.downsample = ConvNorm(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv3.bn.weight)

    def forward(self, x):                                                   # (N, 24, 24, 1024 or 4096)
        h = F.silu(self.conv1(x))
        h = self.se(F.silu(self.conv2(h)))
        return F.silu(self.conv3(h) + self.downsample(x))                   # (N, 24, 24, 4096)


def reg_stage(c_in: int, c_out: int, depth: int) -> nn.Sequential:
    """`depth` RegNet blocks under timm's names b1, b2, ..."""
    blocks = {f"b{i + 1}": RegNetBlock(c_in if i == 0 else c_out, c_out) for i in range(depth)}
    return nn.Sequential(OrderedDict(blocks))


class Connector(nn.Module):
    """VideoLLaMA2's STC: RegNet stage, Conv3d that halves time, height and width, RegNet stage, MLP.

    (B, T, h, w, D) -> (B, n, W), n in (t h w) order: 16 x 24 x 24 -> 9 x 13 x 13 = 1521 tokens (padding 1).
    """

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


class ResBlock(nn.Module):
    """conv-norm-relu-conv-norm plus identity: nine of these make CycleGAN's generator, F and G."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = ChannelNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = ChannelNorm(width)

    def forward(self, x):                                                   # (N, 512, 6, 6)
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class FCBlock(nn.Module):
    """The paper's ablation "FC layers instead of ResNet blocks": each patch alone, no neighbours."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.fc2(F.relu(self.fc1(self.norm(x))))


class Mapping(nn.Module):
    """F: ego -> exo or G: exo -> ego on the ViT's grid, frame by frame: (B, T, h, w, D) -> the same shape.

    "resnet": 1x1 conv in, stride-2 convs down, ResNet blocks, up-convs, 1x1 conv out, LayerNorm over channels
    (9 blocks between down- and up-sampling as the paper says; widths and norms are our choice). "mlp": as
    many FC blocks on each patch alone. No outer skip: a copy of x is where F must not start (measured:
    toyworld B4).
    """

    def __init__(self, cfg: ModelConfig, kind: str = "resnet"):
        super().__init__()
        d, c, downs = cfg.vit_width, cfg.map_width, cfg.map_downs
        if kind not in ("resnet", "mlp"):
            raise ValueError(f"mapping is {kind!r}: choose resnet or mlp")
        if cfg.grid % 2 ** downs:
            raise ValueError(f"map_downs={downs} does not divide the {cfg.grid} x {cfg.grid} patch grid")
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
        a = torch.empty(rank, self.in_features, **like).normal_(std=self.in_features ** -0.5)
        self.lora_a = nn.Parameter(a)
        # zero: training starts at the base
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))

    def merge_lora(self):
        update = self.lora_scale * self.lora_b @ self.lora_a
        self.weight.data += update.to(self.weight.dtype)
        self.lora_a = self.lora_b = None

    def forward(self, x):
        y = super().forward(x)
        if self.lora_a is None:
            return y
        low = F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_a)
        return y + self.lora_scale * F.linear(low, self.lora_b)


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

    def segments(self, new: Sequence[int], device) -> Segments:
        """The layout of the next forward, which brings `new[i]` tokens of sequence i."""
        total = [past + n for past, n in zip(self.lens, new, strict=True)]
        return Segments.cached(new, total, device)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position: channel i and channel i + D/2 turn by the angle position * theta^(-2i/D). x (tokens,
    H, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class DecoderBlock(nn.Module):
    """Mistral's: RMSNorm, grouped-query attention with RoPE, RMSNorm, SwiGLU."""

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
        self.gate = Linear(cfg.width, cfg.ff, bias=False)
        self.up = Linear(cfg.width, cfg.ff, bias=False)
        self.down = Linear(cfg.ff, cfg.width, bias=False)

    def forward(self, x, seg, cos, sin, cache):                             # (tokens, 4096)
        h = self.norm1(x)
        q, k, v = (rearrange(p(h), "t (h d) -> t h d", d=self.head_dim) for p in (self.q, self.k, self.v))
        q, k = rope(q, cos, sin), rope(k, cos, sin)             # (tokens, 32, 128), (tokens, 8, 128)
        if cache is not None:
            k, v = cache.extend(self.index, k, v, seg)
        o = attention(q, k, v, seg, causal=True, window=self.window)
        x = x + self.out(rearrange(o, "t h d -> t (h d)"))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """A causal language model on packed sequences: one flat (tokens, W) tensor and `Segments`, no padding
    anywhere."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab, cfg.width)
        self.blocks = nn.ModuleList(DecoderBlock(cfg, i) for i in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.head = nn.Linear(cfg.width, cfg.vocab, bias=False)
        # loud words: visual tokens have to be heard beside them
        nn.init.normal_(self.embedding.weight, std=0.5)
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
        # float32: positions are large
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
        return self.head(hidden)

    def lora_modules(self) -> list[Linear]:
        """All linear layers of the blocks (the paper's LoRA targets are not named: our choice, VideoLLaMA2's
        habit)."""
        return [m for block in self.blocks for m in block.modules() if isinstance(m, Linear)]

    def add_lora(self, rank: int, alpha: float, dropout: float):
        """Give every linear layer of the blocks a low-rank update that starts at zero (7b: rank 128, alpha
        256)."""
        for module in self.lora_modules():
            module.add_lora(rank, alpha, dropout)

    def merge_lora(self):
        """Fold the low-rank updates into the weights; the outputs stay the same, to rounding."""
        for module in self.lora_modules():
            module.merge_lora()


def feature_kl(exo: Tensor, estimate: Tensor, tau: float = 1.0) -> Tensor:
    """KL(exo || F(ego)) per sample: (B, n, C) features -> (B,). Softmax over channels of LayerNorm-ed tokens
    (no affine), mean over tokens; the paper does not say how features become distributions: our choice,
    measured in toyworld B6."""
    p, q = (F.log_softmax(F.layer_norm(f.float(), f.shape[-1:]) / tau, dim=-1) for f in (exo, estimate))
    return (p.exp() * (p - q)).sum(-1).mean(-1) * tau ** 2


# --------------------------------------------------------------------------------------------------- Exo2Ego
class Exo2Ego(nn.Module):
    """The whole model. Parts: exo_vit, exo_connector, ego_vit, ego_connector, F, G, decoder (F, G from stage
    2 on)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.exo_vit, self.ego_vit = VisionEncoder(cfg), VisionEncoder(cfg)
        self.exo_connector, self.ego_connector = Connector(cfg), Connector(cfg)
        self.F = Mapping(cfg, cfg.mapping) if cfg.mapping != "none" else None
        self.G = Mapping(cfg, cfg.mapping) if cfg.mapping != "none" else None
        self.decoder = Decoder(cfg)
        if cfg.lora:
            self.decoder.add_lora(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)

    # -- seeing
    def grid(self, vit: VisionEncoder, frames: Tensor) -> Tensor:
        """uint8 (B, T, 3, S, S) -> the ViT's grid (B, T, h, w, D)."""
        x = rearrange(frames, "b t c h w -> (b t) c h w").float()
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] * 255 for v in (PIXEL_MEAN, PIXEL_STD))
        return rearrange(vit((x - mean) / std), "(b t) h w d -> b t h w d", b=len(frames))

    def read_ego(self, x: Tensor) -> Tensor:
        """[con_ego(x) ; con_exo(F(x))], along tokens: F(x) lives in exo space, the exo connector reads it."""
        tokens = self.ego_connector(x)                                      # (B, 1521, 4096)
        return tokens if self.F is None else torch.cat([tokens, self.exo_connector(self.F(x))], dim=1)

    def encode_ego(self, frames: Tensor) -> Tensor:
        """uint8 ego frames (B, T, 3, S, S) -> visual tokens (B, 3042, W); (B, 1521, W) before stage 2."""
        return self.read_ego(self.grid(self.ego_vit, frames))

    def encode_exo(self, frames: Tensor) -> Tensor:
        """uint8 exo frames (B, T, 3, S, S) -> visual tokens (B, 1521, W)."""
        return self.exo_connector(self.grid(self.exo_vit, frames))

    # -- speaking
    def splice(self, visual: Tensor | None, ids: Tensor) -> Tensor:
        """Embeddings of packed ids (tokens,) in which each VIDEO id stands for one visual token, in order."""
        embeddings = self.decoder.embed(ids.clamp(min=0))
        if visual is None:
            return embeddings
        slots = (ids == VIDEO).nonzero().squeeze(1)
        return embeddings.index_copy(0, slots, visual.flatten(0, 1).to(embeddings.dtype))

    def text_logits(self, visual: Tensor | None, ids: Tensor, labels: Tensor, lens: Sequence[int]):
        """Logits only where a label is supervised: (supervised, vocab) and their targets (supervised,).

        Packed ids and labels (tokens,), visual (B, n, W) with sum(ids == VIDEO) = B * n; position t predicts
        token t + 1.
        """
        seg = Segments.packed(lens, ids.device)
        positions = torch.cat([torch.arange(n) for n in lens]).to(ids.device)
        hidden = self.decoder(self.splice(visual, ids), seg, positions)
        where = (labels[1:] != IGNORE).nonzero().squeeze(1)     # never a sequence's first token: the
        return self.decoder.logits(hidden[where]), labels[1:][where]    # shift stays inside a sequence

    @torch.no_grad()
    def score(self, visual: Tensor, ids: Tensor, labels: Tensor, lens: Sequence[int]):
        """Per sequence: sum of the log-probabilities of its supervised tokens (B,), and whether greedy
        decoding would write exactly these tokens (B,) bool. One forward: with the truth as prefix, all argmax
        right = greedy right."""
        logits, targets = self.text_logits(visual, ids, labels, lens)
        logp = logits.float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        owner = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens)).to(ids.device)[1:]
        owner = owner[labels[1:] != IGNORE]
        total = torch.zeros(len(lens), device=ids.device).index_add(0, owner, logp)
        misses = (logits.argmax(-1) != targets).float()
        wrong = torch.zeros(len(lens), device=ids.device).index_add(0, owner, misses)
        return total, wrong == 0

    @torch.no_grad()
    def generate(self, visual: Tensor, prompts: Sequence[Tensor], *, eos: int, max_new: int = 64,
                 temperature: float = 0.0, use_cache: bool = True) -> list[list[int]]:
        """Answers as token ids, without the closing eos; one prompt (with its VIDEO ids) per row of visual
        (B, n, W).

        temperature 0 is greedy. The cache changes the speed, not the tokens.
        """
        device = visual.device
        ids = [p.to(device) for p in prompts]
        cache, done, answers = KVCache(len(ids)), [False] * len(ids), [[] for _ in ids]
        x, new = self.splice(visual, torch.cat(ids)), [len(p) for p in ids]
        for _ in range(max_new):
            seg = cache.segments(new, device)
            start = [k - q for q, k in zip(seg.q_lens, seg.k_lens)]
            positions = torch.cat([torch.arange(s, s + n) for s, n in zip(start, new)]).to(device)
            last = self.decoder(x, seg, positions, cache)[seg.cu_q[1:].long() - 1]
            logits = self.decoder.logits(last).float()                      # (B, vocab)
            token = logits.argmax(-1) if temperature == 0 else torch.multinomial(
                (logits / temperature).softmax(-1), 1).squeeze(1)
            for i, t in enumerate(token.tolist()):
                done[i] = done[i] or t == eos
                if not done[i]:
                    answers[i].append(t)
            if all(done):
                break
            if use_cache:
                x, new = self.decoder.embed(token), [1] * len(ids)
            else:                                               # the slow way: the cache's oracle
                ids = [torch.cat([p, t[None]]) for p, t in zip(ids, token)]
                cache, x, new = KVCache(len(ids)), self.splice(visual, torch.cat(ids)), [len(p) for p in ids]
        return answers


# ------------------------------------------------------------------------------------------------- Tokenizer
class Tokenizer:
    """A sentencepiece vocabulary and Mistral-Instruct's chat template. It lives beside the network because a
    checkpoint is both: the rows of the embedding mean nothing without it.

        <s>[INST] <video> question [/INST] answer</s>[INST] question [/INST] answer</s>
    """

    def __init__(self, path: str | os.PathLike):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: it should be a sentencepiece tokenizer.model")
        self.path = Path(path)
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.bos, self.eos, self.size = self.sp.bos_id(), self.sp.eos_id(), self.sp.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Text to ids, without <s> or </s>; control tokens written out in the text stay plain text."""
        return self.sp.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; VIDEO and control tokens vanish."""
        return self.sp.decode([int(i) for i in ids if i >= 0])

    def chat(self, turns: Sequence[dict], video_tokens: int) -> tuple[list[int], list[int]]:
        """Turns {"user", "assistant"} -> ids and labels. `<video>` (put first when no user turn has it)
        becomes `video_tokens` VIDEO ids. Supervised: the assistant's tokens and their closing </s>, nothing
        else. A last turn without "assistant" is a prompt to be continued."""
        marks = sum(turn["user"].count("<video>") for turn in turns)
        if marks > (video_tokens > 0):
            raise ValueError(f"{marks} <video> marks in the user turns: one at most, none without a video")
        ids, labels = [self.bos], [IGNORE]
        for i, turn in enumerate(turns):
            user = turn["user"] if i or marks or not video_tokens else "<video>\n" + turn["user"]
            for j, chunk in enumerate(f"[INST] {user} [/INST]".split("<video>")):
                prompt = [VIDEO] * (video_tokens if j else 0) + self.encode(chunk)
                ids, labels = ids + prompt, labels + [IGNORE] * len(prompt)
            if "assistant" in turn:
                answer = self.encode(turn["assistant"]) + [self.eos]
                ids, labels = ids + answer, labels + answer
        return ids, labels


# ----------------------------------------------------------------------------------------------- checkpoints
def newest_checkpoint(run: str | os.PathLike) -> Path | None:
    """The newest finished `step_*` of a run folder (or the folder itself if it is a checkpoint); None if
    there is none."""
    run = Path(run)
    if (run / "state.json").is_file():
        return run
    # a save takes this name only when whole
    return max(run.glob("step_[0-9]*"), default=None, key=lambda p: p.name)


def fingerprint(path: str | os.PathLike) -> str:
    """A short hash that tells two checkpoints apart without reading gigabytes: header, first and last MiB."""
    digest, file = hashlib.sha256(), Path(path) / "model.safetensors"
    with open(file, "rb") as f:
        digest.update(f.read(1 << 20))
        f.seek(max(0, file.stat().st_size - (1 << 20)))
        digest.update(f.read())
    return digest.hexdigest()[:16]


def read_state(path: Path) -> dict:
    """state.json of a checkpoint folder."""
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}/state.json cannot be read ({error}): is this a checkpoint?") from None


def checkpoint_tensors(path: Path, base: str | os.PathLike | None = None) -> dict[str, Tensor]:
    """All tensors of the model: those of the checkpoint's base, overlaid with its own."""
    state = read_state(path)
    tensors = {}
    if state["base"]:
        root = newest_checkpoint(base or path.parent / state["base"])
        if root is None:
            raise FileNotFoundError(f"{path} builds on {state['base']}, which is not there: pass --base DIR")
        if fingerprint(root) != state["base_hash"]:
            raise ValueError(f"{root} is not the base of {path}, its weights differ: pass --base DIR")
        tensors = checkpoint_tensors(root)
    try:
        return tensors | load_file(path / "model.safetensors")
    except Exception as error:
        raise ValueError(f"{path}/model.safetensors cannot be read ({error}): remove {path} to fall back to "
                         f"the checkpoint before it") from None


def load_strict(model: nn.Module, tensors: dict[str, Tensor], source: str, fresh: tuple[str, ...] = ()):
    """Copy tensors by name: none missing (but those named by `fresh`), none left over, all shapes equal."""
    own = model.state_dict()
    missing = sorted(n for n in own.keys() - tensors.keys() if not any(word in n for word in fresh))
    extra = sorted(tensors.keys() - own.keys())
    wrong = [f"{n}: {tuple(tensors[n].shape)} in the file, {tuple(own[n].shape)} in the model"
             for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    if missing or extra or wrong:
        raise ValueError(f"{source} does not fit the model: missing {missing[:3]}, unknown {extra[:3]}, "
                         f"shapes {wrong[:3]}")
    model.load_state_dict(tensors, strict=False)                            # safe: names were just checked


def load_checkpoint(path: str | os.PathLike, base: str | os.PathLike | None = None, **added):
    """-> Exo2Ego (eval mode), Tokenizer, state (stage, step, config, ...). `path` is a run folder or one of
    its `step_*`: it holds what was trained, `base` (default: as recorded) the rest. `added` changes the
    ModelConfig (mapping="resnet", lora=True): those parts start fresh."""
    folder = newest_checkpoint(path)
    if folder is None:
        raise FileNotFoundError(f"no checkpoint in {path}: train it first (torchrun train.py --stage N)")
    state = read_state(folder)
    model = Exo2Ego(replace(ModelConfig(**state["model"]), **added))
    tensors = {n: t for n, t in checkpoint_tensors(folder, base).items() if not n.startswith("loss.")}
    fresh = {"mapping": ("F.", "G."), "lora": ("lora_a", "lora_b")}
    load_strict(model, tensors, str(folder), sum((fresh[key] for key in added), ()))
    return model.eval(), Tokenizer(folder / "tokenizer.model"), state


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], optimizers: list, rng: list[Tensor],
                    state: dict, tokenizer: Path, keep: int):
    """Write a checkpoint under a temporary name, sync it, rename it: a killed save never looks finished. The
    newest `keep` of the run stay."""
    part = folder.with_name(f"part_{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, part / "model.safetensors")
    moments = {f"rng.{rank}": s.cpu() for rank, s in enumerate(rng)}
    for i, optimizer in enumerate(optimizers):
        for j, values in optimizer.state_dict()["state"].items():
            moments |= {f"{i}.{j}.{key}": value.detach().contiguous() for key, value in values.items()}
    save_file(moments, part / "optim.safetensors")
    shutil.copyfile(tokenizer, part / "tokenizer.model")
    (part / "state.json").write_text(json.dumps(state, indent=1))
    for file in part.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)
    for old in sorted(folder.parent.glob("step_[0-9]*"))[:-keep]:
        shutil.rmtree(old)


def random_state(device: torch.device) -> Tensor:
    """The generators that a rank draws from, as bytes: the CPU's, then its GPU's."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(states)


def set_random_state(state: Tensor, device: torch.device):
    """The opposite of random_state."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size])
    if device.type == "cuda" and len(state) > size:
        torch.cuda.set_rng_state(state[size:], device)


def load_optimizers(folder: Path, optimizers: list, rank: int, device: torch.device):
    """Moments and this rank's random state, exactly as saved."""
    moments = load_file(folder / "optim.safetensors")
    for i, optimizer in enumerate(optimizers):
        values = {}
        for name in (n for n in moments if n.startswith(f"{i}.")):
            _, j, key = name.split(".")
            values.setdefault(int(j), {})[key] = moments[name]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": values})
    if f"rng.{rank}" in moments:
        set_random_state(moments[f"rng.{rank}"], device)


def pick_device() -> torch.device:
    """This process's GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resume_point(out: str, config: dict, record: dict) -> Path | None:
    """The newest finished checkpoint of this very run, or None; another run's folder is refused by field."""
    folder = newest_checkpoint(out)
    state = read_state(folder) if folder else {}
    was = state.get("config", {}) | {key: state.get(key) for key in record}
    for key, value in (config | record).items():
        if folder and was.get(key) != value:
            raise ValueError(f"{out} holds a run with {key}={was.get(key)}, this one has {value}: choose "
                             f"another --out or remove the folder")
    return folder


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


# -------------------------------------------------------------------------------------------- the optimisers
class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: all directions of a matrix learn at one speed, which is what
    makes the connector start from scratch at all. Scaled to AdamW's step, so that both read one learning
    rate.

    torch.optim.Muon is the same rule, but its Newton-Schulz runs in bfloat16, which a CPU without AMX
    emulates (10-40x slower here), and it takes no convolutions; to us they are matrices (out, in * kernel).
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(momentum, 0.95).flatten(1)).view_as(p)          # Nesterov
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.flatten(1).shape)))


def orthogonal(m: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps with Muon's published
    coefficients."""
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if m.shape[0] > m.shape[1] else x


def make_optimizers(trained: dict[str, nn.Parameter], rates: dict[str, float], kind: str) -> list:
    """Muon for the matrices inside the network, AdamW for the rest (both ends, norms, biases, depthwise
    filters); kind "adamw": AdamW for all. `rates`: peak learning rate of each name."""
    def is_matrix(name, p):
        ends = any(word in name for word in ("embedding", "position", "head", "loss."))
        return kind == "muon" and not ends and p.ndim >= 2 and p.shape[1] > 1

    def groups(matrices):
        by_rate = {}
        for name, p in trained.items():
            if is_matrix(name, p) == matrices:
                by_rate.setdefault(rates[name], []).append(p)
        return [dict(params=params, lr=lr, peak=lr) for lr, params in by_rate.items()]
    optimizers = [Muon(groups(True), {})] if groups(True) else []
    if groups(False):
        optimizers.append(torch.optim.AdamW(groups(False), betas=(0.9, 0.95), weight_decay=0, fused=True))
    return optimizers
