"""The network of Exo2Ego (arXiv 2503.09143): first-person video read through a learned third-person view.

Read this file first, then data.py, train.py and eval.py, each of them down to its stop line. A clip passes the parts of
the network in this order:

    pixels -> ViT (CLIP) -> patch features -> [Mapping F: ego -> exo] -> Connector (STC) -> Decoder -> text

Two visual encoders see the world: exo, the demonstrator, and ego, the learner. A visual encoder is a ViT and the
connector behind it; x and y are what the ego and the exo ViT give. The decoder reads [con_ego(x) ; con_exo(F(x))],
where con_ego and con_exo are the two connectors, so inference needs the ego video alone.

Shapes at the right margin are those of the `7b` preset. In docstrings B is a number of clips, T of frames, h x w of
patches, n of the visual tokens that one connector gives for a clip; D is the ViT's width, W the decoder's.

    python model.py --check-attention           # what this machine can run, against the formula
    python model.py --export-hf CKPT DIR        # its decoder and ViTs as directories that transformers loads
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if sys.version_info < (3, 11):
    sys.exit(f"Exo2Ego needs Python 3.11 or newer, this is {sys.version.split()[0]}: make a virtual environment of a "
             f"newer one")

AnyPath = str | os.PathLike
# The id that stands for one visual token. It is no word: the visual token takes the place of an embedding.
VIDEO = -1
# The label of a token that is not supervised.
IGNORE = -100
# CLIP's normalisation, per RGB channel in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


# ----------------------------------------------------------------------------------------------- 1 config and presets
@dataclass(frozen=True)
class ModelConfig:
    """All sizes of the network. A checkpoint stores it, so weights and shapes can never disagree silently."""
    # the clip
    frames: int                     # T, frames read from a clip
    image_size: int                 # S, pixels per side
    patch: int                      # pixels per side of a ViT patch
    # the ViT (CLIP)
    vit_width: int                  # D
    vit_layers: int                 # layers that run: one less than CLIP has, since its last one is not read
    vit_heads: int
    vit_mlp_dim: int
    # the connector (STC)
    stc_depth: int                  # RegNet blocks before and after the Conv3d
    stc_padding: int                # of the Conv3d: VideoLLaMA2 pads by 1 (24 x 24 -> 13 x 13)
    # F and G
    map_blocks: int                 # ResNet blocks in F and in G
    map_downs: int                  # stride-2 convolutions before them, and up-convolutions after them
    map_width: int                  # channels inside F and G
    # the decoder (Mistral)
    width: int                      # W, of the decoder and of a visual token
    layers: int
    heads: int
    kv_heads: int                   # grouped-query attention: heads / kv_heads queries share a key
    mlp_dim: int
    vocab: int
    rope_theta: float
    max_length: int                 # tokens, visual ones included
    # stage 3's low-rank updates
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    # what Mistral's variants differ in
    head_dim: int | None = None     # None: width / heads
    window: int | None = None       # sliding-window attention; None: all earlier tokens
    norm_eps: float = 1e-5
    # what later stages have added
    mapping: str = "none"           # from stage 2 on F and G: "resnet" (the paper) or "mlp" (its ablation)
    lora: bool = False              # True from stage 3 on

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one connector: 9 x 13 x 13 = 1521 for 7b."""
        times = (self.frames + 2 * self.stc_padding) // 2
        side = (self.patches_per_side + 2 * self.stc_padding) // 2
        return times * side * side

    @property
    def decoder_head_dim(self) -> int:
        return self.head_dim or self.width // self.heads


PRESETS = {
    # The micro-world on a laptop CPU: the architecture is the paper's, every size is our choice.
    "toy": ModelConfig(
        frames=4, image_size=48, patch=12,
        vit_width=96, vit_layers=2, vit_heads=3, vit_mlp_dim=384,
        stc_depth=1, stc_padding=0,
        map_blocks=4, map_downs=1, map_width=64,
        width=96, layers=2, heads=3, kv_heads=1, mlp_dim=256, vocab=512, rope_theta=1e4, max_length=256,
        lora_rank=16, lora_alpha=32, lora_dropout=0.0),
    # Benchmarks and first tries on a GPU: our choice.
    "small": ModelConfig(
        frames=8, image_size=112, patch=14,
        vit_width=384, vit_layers=6, vit_heads=6, vit_mlp_dim=1536,
        stc_depth=4, stc_padding=1,
        map_blocks=9, map_downs=1, map_width=128,
        width=512, layers=8, heads=8, kv_heads=2, mlp_dim=1536, vocab=32000, rope_theta=1e6, max_length=2048,
        lora_rank=64, lora_alpha=128, lora_dropout=0.1),
    # The paper: two CLIP-L/14-336, VideoLLaMA2's STC, Mistral-7B-Instruct-v0.2.
    "7b": ModelConfig(
        frames=16, image_size=336, patch=14,
        vit_width=1024, vit_layers=23, vit_heads=16, vit_mlp_dim=4096,
        stc_depth=4, stc_padding=1,
        map_blocks=9, map_downs=2, map_width=512,
        width=4096, layers=32, heads=32, kv_heads=8, mlp_dim=14336, vocab=32000, rope_theta=1e6, max_length=4096,
        lora_rank=128, lora_alpha=256, lora_dropout=0.1),
}


# -------------------------------------------------------------------------------------------------------- 2 attention
@dataclass(frozen=True)
class Segments:
    """Where each sequence of a packed batch starts and ends. The batch holds no padding.

    `q_lens` and `k_lens` are integers on the host, so that a loop never waits for a GPU. `cu_q` and `cu_k` are their
    running sums, int32 on the device. With a KV cache a sequence has more keys: the queries are its last positions.
    """
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    cu_q: Tensor
    cu_k: Tensor

    @classmethod
    def cached(cls, new, total, device="cpu") -> Segments:
        """`new[i]` queries behind a cache, with which sequence i has `total[i]` keys. Without a cache: `packed`."""
        q_lens = tuple(map(int, new))
        k_lens = tuple(map(int, total))
        if len(q_lens) != len(k_lens) or min(q_lens + k_lens, default=0) < 0:
            raise ValueError(f"segments need as many key as query lengths, all >= 0: got {q_lens}, {k_lens}")
        cu_q = torch.tensor((0,) + q_lens).cumsum(0).to(device, torch.int32)
        cu_k = torch.tensor((0,) + k_lens).cumsum(0).to(device, torch.int32)
        return cls(q_lens, k_lens, cu_q, cu_k)

    @classmethod
    def packed(cls, lens, device="cpu") -> Segments:
        """Whole sequences of these lengths, one after another."""
        return cls.cached(lens, lens, device)


BACKENDS = (
    # the formula, `_reference`: every other backend is tested against it
    "reference",
    # FlashAttention in plain torch
    "tiled",
    # torch's fused kernel
    "sdpa",
    # FlashAttention on a GPU
    "triton")
# What "auto" means in half precision on a GPU: `choose_attention` sets it once, at start-up.
half_gpu_backend = "sdpa"


def attention(q: Tensor, k: Tensor, v: Tensor, seg: Segments, *, causal: bool, window: int | None = None,
              scale: float | None = None, backend: str = "auto") -> Tensor:
    """softmax(q k^T * scale) v inside each segment; the only attention in this repository.

    q (Tq, H, d), k and v (Tk, HK, d) -> (Tq, H, d): d is the width of a head, and HK divides H (grouped queries). If
    causal, a query at position i of its sequence sees the keys at j <= i, with a window only those at j > i - window.
    A query without keys gives zeros. ValueError names the argument that does not fit. EXO2EGO_ATTENTION in the
    environment replaces "auto".
    """
    if backend == "auto":
        half_on_gpu = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
        backend = os.environ.get("EXO2EGO_ATTENTION") or (half_gpu_backend if half_on_gpu else "sdpa")
    _check_attention(q, k, v, seg, causal, window, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    # Autocast is off inside: each backend knows which sums need float32.
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        if backend == "triton":
            return _triton(q, k, v, seg, causal, window, scale)
        kernel = {"reference": _reference, "tiled": _tiled, "sdpa": _sdpa}[backend]
        return _segmentwise(kernel, q, k, v, seg, causal, window, scale)


def _reference(q, k, v, causal, window, scale):
    """The formula for whole sequences, q (B, H, lq, d), k and v (B, HK, lk, d), in any dtype: every other backend is
    tested against it in float64."""
    lq, lk = q.shape[2], k.shape[2]
    # Heads that share a key get a copy each.
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) * scale                                                # (B, H, lq, lk)
    if not causal:
        return scores.softmax(-1) @ v
    mask = _visible(range(lk - lq, lk), range(lk), window, q.device)
    probs = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    # A row that sees nothing would be nan: it is zero.
    return probs.masked_fill(~mask.any(-1, keepdim=True), 0) @ v


def _visible(queries: range, keys: range, window, device) -> Tensor:
    """Which keys (columns) each query (row) sees; both are given by their places among all keys."""
    i = torch.arange(queries.start, queries.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None]
    if window is None:
        return j <= i
    return (j <= i) & (j > i - window)


# -------------------------------------------------------------------------------------------------------------- 3 ViT
class ViTBlock(nn.Module):
    """Transformer block with norms first and quick-GELU, as CLIP's."""
    # An attribute, so that the attention of one block can be exchanged.
    attention = staticmethod(attention)

    def __init__(self, width, heads, mlp_dim):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)

    def forward(self, x, seg):                                              # (N * 577, 1024)
        # attention among the patches of a frame
        h = self.norm1(x)
        q = rearrange(self.q(h), "t (h d) -> t h d", h=self.heads)          # (N * 577, 16, 64)
        k = rearrange(self.k(h), "t (h d) -> t h d", h=self.heads)
        v = rearrange(self.v(h), "t (h d) -> t h d", h=self.heads)
        o = self.attention(q, k, v, seg, causal=False)
        x = x + self.out(rearrange(o, "t h d -> t (h d)"))
        # the MLP, each patch alone
        h = self.fc1(self.norm2(x))                                         # (N * 577, 4096)
        h = nnf.silu(1.702 * h) / 1.702                                     # quick-GELU: h * sigmoid(1.702 h)
        return x + self.fc2(h)


class ViT(nn.Module):
    """CLIP's ViT up to the last layer but one, whose patches are the features of LLaVA and VideoLLaMA2.

    Normalised pixels (N, 3, S, S) -> (N, h, w, D). CLIP's last layer and post norm are never run, so they are not
    built: of the 303,507,456 parameters of CLIP-L/14-336's published tower 290,909,184 are here.
    """
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width = cfg.vit_width
        tokens = cfg.patches_per_side ** 2 + 1                              # with the class token
        self.cfg = cfg
        self.patch = cfg.patch
        self.patch_embedding = nn.Conv2d(3, width, cfg.patch, stride=cfg.patch, bias=False)
        self.class_token = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.position = nn.Parameter(torch.randn(tokens, width) * width ** -0.5)
        self.pre_norm = nn.LayerNorm(width)
        blocks = [ViTBlock(width, cfg.vit_heads, cfg.vit_mlp_dim) for _ in range(cfg.vit_layers)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, pixels) -> Tensor:                                    # (N, 3, 336, 336)
        n = len(pixels)
        side = self.cfg.patches_per_side
        # The convolution's stride is its kernel, so no pixel is in two patches: it is a linear layer on each patch.
        p = self.patch
        patches = rearrange(pixels, "n c (h p) (w q) -> n (h w) (c p q)", p=p, q=p)
        x = nnf.linear(patches, self.patch_embedding.weight.flatten(1))
        class_token = self.class_token.to(x.dtype).expand(n, 1, -1)
        x = torch.cat([class_token, x], dim=1)
        x = self.pre_norm(x + self.position)                                # (N, 577, 1024)

        # Every frame is a sequence of its own.
        seg = Segments.packed([x.shape[1]] * n, x.device)
        x = rearrange(x, "n t d -> (n t) d")
        for block in self.blocks:
            x = block(x, seg)

        # The class token is dropped; the patches are copied once here, not by everyone who reads them.
        x = rearrange(x, "(n t) d -> n t d", n=n)[:, 1:].contiguous()
        return rearrange(x, "n (h w) d -> n h w d", h=side)                 # (N, 24, 24, 1024)

    @classmethod
    def from_hf(cls, path, dtype: torch.dtype | None = None) -> ViT:
        """A CLIPVisionModel or CLIPModel directory of Hugging Face; dtype None keeps the file's."""
        return vit_from_hf(HFCheckpoint(path), dtype, alone=True)


# -------------------------------------------------------------------------------------------------------- 4 connector
class ConvNorm(nn.Module):
    """1x1 or depthwise 3x3 convolution and LayerNorm over channels: (N, h, w, C) -> (N, h, w, C').

    Channels are last, where LayerNorm wants them. So a 1x1 convolution is a linear layer, whose weight nn.Conv2d
    holds in the published shape. Names (conv, bn, se, b1, ...) are those of timm's files.
    """
    def __init__(self, c_in: int, c_out: int, kernel: int):
        super().__init__()
        groups = 1 if kernel == 1 else c_in
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(c_out)                                       # timm's name for any norm

    def forward(self, x):
        if self.conv.kernel_size == (1, 1):
            return self.bn(nnf.linear(x, self.conv.weight.flatten(1)))
        x = self.conv(x.permute(0, 3, 1, 2))
        return self.bn(x.permute(0, 2, 3, 1))


class SqueezeExcite(nn.Module):
    """Scales each channel by what the whole frame shows."""
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x):                                                   # (N, 24, 24, 4096)
        s = x.mean((1, 2), keepdim=True)                                    # (N, 1, 1, 4096)
        s = nnf.linear(s, self.fc1.weight.flatten(1), self.fc1.bias)
        s = nnf.linear(nnf.silu(s), self.fc2.weight.flatten(1), self.fc2.bias)
        return x * torch.sigmoid(s)


class RegNetBlock(nn.Module):
    """The block of VideoLLaMA2's STC (timm's RegStage): 1x1, depthwise 3x3, squeeze-excite, 1x1, residual, SiLU.

    Our choice: the last norm's weight starts at zero, so that a new block gives SiLU of its (widened) input;
    otherwise a connector that starts from random weights does not train.
    """
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = ConvNorm(c_in, c_out, 1)
        self.conv2 = ConvNorm(c_out, c_out, 3)
        self.se = SqueezeExcite(c_out, c_in // 4)                           # timm: a quarter of the input's width
        self.conv3 = ConvNorm(c_out, c_out, 1)
        self.downsample = ConvNorm(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv3.bn.weight)

    def forward(self, x):                                                   # (N, 24, 24, 1024 or 4096)
        h = nnf.silu(self.conv1(x))                                         # (N, 24, 24, 4096)
        h = self.se(nnf.silu(self.conv2(h)))
        return nnf.silu(self.conv3(h) + self.downsample(x))


def reg_stage(c_in: int, c_out: int, depth: int) -> nn.Sequential:
    """`depth` RegNet blocks under timm's names b1, b2, ..."""
    stage = nn.Sequential()
    for i in range(depth):
        block = RegNetBlock(c_in if i == 0 else c_out, c_out)
        stage.add_module(f"b{i + 1}", block)
    return stage


class Connector(nn.Module):
    """VideoLLaMA2's STC: RegNet stage, Conv3d that halves time, height and width (padded by 1), RegNet stage, MLP.

    (B, T, h, w, D) -> (B, n, W), n in the order (t h w): 16 x 24 x 24 patches -> 9 x 13 x 13 = 1521 tokens.
    """
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width = cfg.width
        self.s1 = reg_stage(cfg.vit_width, width, cfg.stc_depth)
        conv = nn.Conv3d(width, width, 2, stride=2, padding=cfg.stc_padding)
        self.sampler = nn.Sequential(conv, nn.SiLU())
        self.s2 = reg_stage(width, width, cfg.stc_depth)
        self.readout = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width))

    def forward(self, features) -> Tensor:                                  # (B, 16, 24, 24, 1024)
        b = len(features)
        # 1) each frame alone: widen to the decoder's width
        x = self.s1(rearrange(features, "b t h w d -> (b t) h w d"))        # (B*16, 24, 24, 4096)
        # 2) over time: halve all three sides
        x = self.halve(rearrange(x, "(b t) h w d -> b t h w d", b=b))       # (B, 9, 13, 13, 4096)
        # 3) each frame alone again, then the tokens that the decoder reads
        x = self.s2(rearrange(x, "b t h w d -> (b t) h w d"))
        return self.readout(rearrange(x, "(b t) h w d -> b (t h w) d", b=b))    # (B, 1521, 4096)

    def halve(self, x):
        """The Conv3d as a linear layer on cubes of 2 x 2 x 2 places: its stride is its kernel, so they do not
        overlap."""
        conv, activation = self.sampler
        p = conv.padding[0]
        x = nnf.pad(x, (0, 0, p, p, p, p, p, p))
        # An odd side loses its last, as in the convolution.
        t, h, w = (side // 2 * 2 for side in x.shape[1:4])
        x = x[:, :t, :h, :w]
        # The weight has the axes (out, d, i, j, k): a cube is flattened in the same order.
        cubes = rearrange(x, "b (t i) (h j) (w k) d -> b t h w (d i j k)", i=2, j=2, k=2)
        return activation(nnf.linear(cubes, conv.weight.flatten(1), conv.bias))


# ---------------------------------------------------------------------------------------------------------- 5 F and G
class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, h, w). CycleGAN's instance norm would erase what a feature grid means."""
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """conv-norm-relu-conv-norm plus identity (N, 512, 6, 6). F and G stack nine of these each, as CycleGAN's
    generator."""
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = ChannelNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = ChannelNorm(width)

    def forward(self, x):
        h = self.norm1(self.conv1(x))
        h = self.norm2(self.conv2(nnf.relu(h)))
        return x + h


class FCBlock(nn.Module):
    """The paper's ablation "FC layers instead of ResNet blocks" (N, 512, 6, 6): each place alone, without its
    neighbours."""
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x):
        h = self.norm(x.permute(0, 2, 3, 1))                                # (N, 6, 6, 512)
        h = self.fc2(nnf.relu(self.fc1(h)))
        return x + h.permute(0, 3, 1, 2)


class Mapping(nn.Module):
    """F: ego -> exo or G: exo -> ego on the ViT's patches, frame by frame: (B, T, h, w, D) -> the same shape.

    After CycleGAN's generator: 1x1 convolution, stride-2 convolutions, ResNet blocks (nine in the paper),
    up-convolutions, 1x1 convolution; a LayerNorm ends it. Kernels, widths and norms are our choice. Kind "mlp" has FC
    blocks in the place of the ResNet blocks. There is no skip connection around it all: with one, F starts as a copy
    of x and stays near it (measured).
    """
    def __init__(self, cfg: ModelConfig, kind="resnet"):
        super().__init__()
        if kind not in ("resnet", "mlp"):
            raise ValueError(f"mapping is {kind!r}: choose resnet or mlp")
        side = cfg.patches_per_side
        if side % 2 ** cfg.map_downs:
            raise ValueError(f"map_downs={cfg.map_downs} does not divide the {side} x {side} patch grid")
        block = FCBlock if kind == "mlp" else ResBlock
        outer = cfg.vit_width
        inner = cfg.map_width
        layers = [nn.Conv2d(outer, inner, 1)]
        for _ in range(cfg.map_downs):
            down = nn.Conv2d(inner, inner, 3, stride=2, padding=1, bias=False)
            layers += [down, ChannelNorm(inner), nn.ReLU()]
        layers += [block(inner) for _ in range(cfg.map_blocks)]
        for _ in range(cfg.map_downs):
            up = nn.ConvTranspose2d(inner, inner, 2, stride=2, bias=False)
            layers += [up, ChannelNorm(inner), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(inner, outer, 1))
        self.norm = nn.LayerNorm(outer)

    def forward(self, features) -> Tensor:                                  # (B, 16, 24, 24, 1024)
        x = rearrange(features, "b t h w d -> (b t) d h w")
        x = self.net(x)                                                     # 24 x 24 -> 6 x 6 -> 24 x 24
        return self.norm(rearrange(x, "(b t) d h w -> b t h w d", b=len(features)))


def feature_kl(exo: Tensor, estimate: Tensor) -> Tensor:
    """KL(exo || F(ego)) of each pair: visual tokens (B, n, W) of both -> (B,).

    A token becomes a distribution over its channels by LayerNorm and softmax; the mean over tokens is taken. This is
    our choice (measured): the paper does not say how features become distributions.
    """
    channels = exo.shape[-1:]
    log_p = nnf.log_softmax(nnf.layer_norm(exo.float(), channels), dim=-1)
    log_q = nnf.log_softmax(nnf.layer_norm(estimate.float(), channels), dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)                            # (B, n)
    return kl.mean(-1)


# ---------------------------------------------------------------------------------------------------------- 6 decoder
class LoRALinear(nn.Linear):
    """A linear layer, plus alpha / rank * dropout(x) A^T B^T once `add_lora` was called. A and B train in float32.
    Where the layer's own weight is bfloat16, call it under `autocast`, which multiplies in one dtype."""
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def add_lora(self, rank, alpha, dropout):
        self.lora_scale = alpha / rank
        self.lora_dropout = dropout
        options = dict(device=self.weight.device, dtype=torch.float32)
        # A is random, as in PEFT: uniform, at most 1 / sqrt(in_features).
        bound = self.in_features ** -0.5
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **options).uniform_(-bound, bound))
        # B is zero: the layer starts as it was.
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **options))

    def forward(self, x):
        y = super().forward(x)
        if self.lora_a is None:
            return y
        x = nnf.dropout(x, self.lora_dropout, self.training)
        low = nnf.linear(x, self.lora_a)                                    # (tokens, 128)
        return y + nnf.linear(self.lora_scale * low, self.lora_b)


def rope(x, cos, sin) -> Tensor:
    """Channels i and i + d/2 turn by the angle position * theta^(-2i/d). x (tokens, H, d), in its dtype."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.cat(turned, dim=-1)


class DecoderBlock(nn.Module):
    """Mistral's: RMSNorm, grouped-query attention with RoPE, RMSNorm, SwiGLU."""
    attention = staticmethod(attention)

    def __init__(self, cfg: ModelConfig, index):
        super().__init__()
        self.index = index
        self.window = cfg.window
        self.head_dim = cfg.decoder_head_dim
        self.norm1 = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.q = LoRALinear(cfg.width, cfg.heads * self.head_dim, bias=False)
        self.k = LoRALinear(cfg.width, cfg.kv_heads * self.head_dim, bias=False)
        self.v = LoRALinear(cfg.width, cfg.kv_heads * self.head_dim, bias=False)
        self.out = LoRALinear(cfg.heads * self.head_dim, cfg.width, bias=False)
        self.norm2 = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.gate = LoRALinear(cfg.width, cfg.mlp_dim, bias=False)
        self.up = LoRALinear(cfg.width, cfg.mlp_dim, bias=False)
        self.down = LoRALinear(cfg.mlp_dim, cfg.width, bias=False)

    def forward(self, x, seg, cos, sin, cache):                             # (tokens, 4096)
        # attention over the sequence's earlier tokens
        h = self.norm1(x)
        q = rearrange(self.q(h), "t (h d) -> t h d", d=self.head_dim)       # (tokens, 32, 128)
        k = rearrange(self.k(h), "t (h d) -> t h d", d=self.head_dim)       # (tokens, 8, 128)
        v = rearrange(self.v(h), "t (h d) -> t h d", d=self.head_dim)
        q = rope(q, cos, sin)
        k = rope(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.index, k, v, seg)
        o = self.attention(q, k, v, seg, causal=True, window=self.window)
        x = x + self.out(rearrange(o, "t h d -> t (h d)"))
        # SwiGLU, each token alone
        h = self.norm2(x)
        return x + self.down(nnf.silu(self.gate(h)) * self.up(h))           # (tokens, 14336) inside


class Decoder(nn.Module):
    """A causal language model on packed sequences: flat (tokens, W) and `Segments`, without padding."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab, cfg.width)
        self.blocks = nn.ModuleList(DecoderBlock(cfg, i) for i in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)

        # Word embeddings as large as what a fresh connector gives: otherwise words or visual tokens would drown the
        # others.
        nn.init.normal_(self.embedding.weight, std=0.5)
        for name, weight in self.blocks.named_parameters():
            if weight.ndim == 2:
                # The two layers that add to the residual stream start smaller, the more so the deeper the network is.
                adds = name.endswith(("out.weight", "down.weight"))
                shrink = math.sqrt(2 * cfg.layers) if adds else 1
                nn.init.normal_(weight, std=cfg.width ** -0.5 / shrink)

    def embed(self, ids) -> Tensor:
        """(tokens,) -> (tokens, W)."""
        return self.embedding(ids)

    def forward(self, embeddings, seg, positions, cache=None) -> Tensor:
        """(tokens, W), each token's position in its own sequence (tokens,) -> hidden states (tokens, W)."""
        # RoPE's angles, the same for all blocks.
        half = self.cfg.decoder_head_dim // 2
        channel = torch.arange(half, device=positions.device, dtype=torch.float32)
        angle = positions[:, None].float() * self.cfg.rope_theta ** (-channel / half)
        cos = angle.cos()[:, None]                                          # (tokens, 1, 64)
        sin = angle.sin()[:, None]
        # Each block appends its keys and values to the cache, if there is one. Every block must find the old lengths
        # there, so they change after the last one.
        x = embeddings
        for block in self.blocks:
            x = block(x, seg, cos, sin, cache)
        if cache is not None:
            cache.lens = seg.k_lens
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, W) -> (tokens, vocab). Call it on the positions that you need: 32,000 floats each."""
        return self.lm_head(hidden)

    def lora_modules(self):
        """All linear layers of the blocks: our choice, as in VideoLLaMA2; the paper names no targets."""
        return [module for module in self.blocks.modules() if isinstance(module, LoRALinear)]

    def add_lora(self, rank, alpha, dropout):
        """Give every linear layer of the blocks a low-rank update that starts at zero."""
        for module in self.lora_modules():
            module.add_lora(rank, alpha, dropout)

    def merge_lora(self):
        """Fold the low-rank updates into the weights. All of the decoder becomes float32: bfloat16 would round small
        updates away. The outputs stay the same to float32's rounding."""
        self.float()
        for module in self.lora_modules():
            if module.lora_a is not None:
                update = module.lora_scale * module.lora_b @ module.lora_a
                module.weight.data = module.weight.data + update
                module.lora_a = module.lora_b = None

    @classmethod
    def from_hf(cls, path, dtype: torch.dtype | None = None) -> Decoder:
        """A MistralForCausalLM directory of Hugging Face; dtype None keeps the file's."""
        return decoder_from_hf(HFCheckpoint(path), dtype, alone=True)


# ---------------------------------------------------------------------------------------------------------- 7 Exo2Ego
class Views(NamedTuple):
    """What E ego clips and X exo clips give. (A moment has one ego clip and may have several exo clips.)"""
    visual: Tensor                      # for the decoder: (E, 2 n, W) of ego clips with F; else (E, n, W) or (X, n, W)
    x: Tensor | None = None             # (E, T, h, w, D) ego features
    y: Tensor | None = None             # (X, T, h, w, D) exo features
    fx: Tensor | None = None            # (E, T, h, w, D) F(x): the exo features that F predicts
    estimate: Tensor | None = None      # (E, n, W) con_exo(F(x)): the visual tokens of fx


class Exo2Ego(nn.Module):
    """The whole model: exo_vit, exo_connector, ego_vit, ego_connector, decoder; F and G from stage 2 on.

    How its weights start, where nothing is loaded (what is not named has torch's default):

        ViT                 class token and positions: normal, 1 / sqrt(D)
        Connector           gain of each RegNet block's last norm: 0, so that a block gives SiLU of its input
        F, G                all as torch has it
        Decoder             embedding: normal, 0.5; linear layers of blocks: normal, 1 / sqrt(W), smaller where they
                            add to the residual stream
        LoRA                A uniform within 1 / sqrt(width in), B zero
    """
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.exo_vit = ViT(cfg)
        self.exo_connector = Connector(cfg)
        self.ego_vit = ViT(cfg)
        self.ego_connector = Connector(cfg)
        self.decoder = Decoder(cfg)
        self.F = self.G = None
        self.add(cfg.mapping, cfg.lora)

    def add(self, mapping: str = "none", lora: bool = False):
        """Give the model F and G ("resnet" or "mlp") and the decoder's low-rank updates, which start fresh. The
        constructor does so; a model without them can get them later."""
        kept = self.cfg.mapping if mapping == "none" else mapping
        cfg = self.cfg = replace(self.cfg, mapping=kept, lora=lora or self.cfg.lora)
        if mapping != "none":
            self.F = Mapping(cfg, mapping)
            self.G = Mapping(cfg, mapping)
        if lora:
            self.decoder.add_lora(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)

    def forward(self, ego: Tensor | None = None, exo: Tensor | None = None) -> Views:
        """From clips to what the decoder reads and what the losses compare: uint8 frames (E, T, 3, S, S) of the ego
        view, (X, T, 3, S, S) of the exo view, or of both. Where there is ego video, the decoder reads that alone."""
        y = None
        if exo is not None:
            y = self.patch_features(self.exo_vit, exo)                      # (X, 16, 24, 24, 1024)
        if ego is None:
            return Views(self.exo_connector(y), y=y)                        # visual: (X, 1521, 4096)

        x = self.patch_features(self.ego_vit, ego)                          # (E, 16, 24, 24, 1024)
        if self.F is None:
            return Views(self.ego_connector(x), x=x, y=y)                   # visual: (E, 1521, 4096)
        # F(x) lives in exo space, so the exo connector reads it.
        fx = self.F(x)
        estimate = self.exo_connector(fx)                                   # (E, 1521, 4096)
        return Views(self.ego_tokens(x, estimate), x=x, y=y, fx=fx, estimate=estimate)

    def ego_tokens(self, x, estimate) -> Tensor:
        """What the decoder reads of an ego video: [con_ego(x) ; con_exo(F(x))], along tokens."""
        return torch.cat([self.ego_connector(x), estimate], dim=1)          # (E, 3042, 4096)

    def encode_ego(self, frames: Tensor) -> Tensor:
        """uint8 ego frames (B, T, 3, S, S) -> visual tokens (B, 3042, W); without F (B, 1521, W)."""
        return self(ego=frames).visual

    def encode_exo(self, frames: Tensor) -> Tensor:
        """uint8 exo frames (B, T, 3, S, S) -> visual tokens (B, 1521, W)."""
        return self(exo=frames).visual

    @classmethod
    def from_videollama2(cls, path, dtype: torch.dtype | None = None, vision=None) -> Exo2Ego:
        """The published VideoLLaMA2-7B-16F layout: its ViT and connector become both visual encoders. `vision`, a
        CLIP directory, is read instead of its ViT; a directory without one (plain Mistral, fresh connectors) needs
        it."""
        return exo2ego_from_videollama2(path, dtype, vision)

    def patch_features(self, vit, frames) -> Tensor:
        """uint8 frames (B, T, 3, S, S) -> the ViT's patch features (B, T, h, w, D)."""
        if frames.dtype != torch.uint8:
            raise ValueError(f"frames are uint8, 0 to 255, and are normalised here; these are {frames.dtype}")
        # CLIP's normalisation, on the device.
        x = rearrange(frames, "b t c h w -> (b t) c h w").float()
        mean = torch.tensor(PIXEL_MEAN, device=x.device)[:, None, None] * 255
        std = torch.tensor(PIXEL_STD, device=x.device)[:, None, None] * 255
        features = vit((x - mean) / std)                                    # (B*16, 24, 24, 1024)
        return rearrange(features, "(b t) h w d -> b t h w d", b=len(frames))

    def insert_visual_tokens(self, visual, ids) -> Tensor:
        """Embeddings of packed ids (tokens,), in which each VIDEO id stands for one visual token, in order."""
        device = self.decoder.embedding.weight.device
        embeddings = self.decoder.embed(ids.clamp(min=0).to(device))        # of VIDEO, -1, any: it is replaced
        slots = (ids == VIDEO).nonzero().squeeze(1).to(device)
        given = 0 if visual is None else visual.shape[0] * visual.shape[1]
        if given != len(slots):
            raise ValueError(f"{given} visual tokens for {len(slots)} places in the text: what the connectors give and "
                             f"what ModelConfig.visual_tokens (times two with F) promises must agree")
        if visual is None:
            return embeddings
        return embeddings.index_copy(0, slots, visual.flatten(0, 1).to(embeddings.dtype))

    def hidden_states(self, embeddings, lens, cache=None) -> Tensor:
        """Packed embeddings (tokens, W) of sequences of these lengths, each behind what `cache` holds of it ->
        (tokens, W)."""
        past = cache.lens if cache else [0] * len(lens)
        total = [before + new for before, new in zip(past, lens)]
        device = embeddings.device
        positions = [torch.arange(0)]                                       # a batch may have no text at all
        positions += [torch.arange(before, end) for before, end in zip(past, total)]
        positions = torch.cat(positions).to(device)
        return self.decoder(embeddings, Segments.cached(lens, total, device), positions, cache)

    # ------------------------------------------------------------------------------------------- 8 generate and score
    def text_losses(self, visual, ids, labels, lens, cache=None) -> Tensor:
        """-log p of each supervised token given all that stands before it, in nats; 0 for others (tokens,).

        ids and labels are packed (tokens,); visual (B, n, W), with F (B, 2 n, W), fills all places where ids == VIDEO.
        """
        # All positions pass the decoder's blocks. Only those that predict a supervised token pass its head.
        hidden = self.hidden_states(self.insert_visual_tokens(visual, ids), lens, cache)
        supervised = (labels != IGNORE).nonzero().squeeze(1)
        targets = labels[supervised].to(hidden.device)
        supervised = supervised.to(hidden.device)
        # Token t is predicted at position t - 1. That is in the same sequence, since no sequence's first token is
        # supervised.
        logits = self.decoder.logits(hidden[supervised - 1]).float()        # (supervised, 32000)
        losses = nnf.cross_entropy(logits, targets, reduction="none")
        return losses.new_zeros(len(labels)).index_copy(0, supervised, losses)

    @torch.no_grad()
    def log_likelihood(self, visual, ids, labels, lens) -> Tensor:
        """log p of each sequence's supervised tokens given what stands before them, summed, in nats (B,)."""
        losses = self.text_losses(visual, ids, labels, lens)
        return torch.stack([-own.sum() for own in losses.split(lens)])

    @torch.no_grad()
    def stream(self, visual: Tensor | None, prompts: Sequence[Tensor], *, eos: int, max_new: int = 64,
               cache: KVCache | None = None) -> Iterator[list[int | None]]:
        """Greedy answers as they come: for each step a token id of each sequence, None once it has ended.

        Prompts hold VIDEO ids for visual (B, n, W). They stand behind what `cache` holds already.
        """
        device = self.decoder.lm_head.weight.device
        cache = cache or KVCache(len(prompts))
        embeddings = self.insert_visual_tokens(visual, torch.cat(list(prompts)).to(device))
        lens = [len(prompt) for prompt in prompts]
        ended = [False] * len(prompts)
        for _ in range(max_new):
            hidden = self.hidden_states(embeddings, lens, cache)
            # The last position of each sequence predicts its next token.
            last = torch.tensor(lens, device=device).cumsum(0) - 1
            token = self.decoder.logits(hidden[last]).float().argmax(-1)    # (B,)
            chosen = token.tolist()
            ended = [before or t == eos for before, t in zip(ended, chosen)]
            if all(ended):
                break
            yield [None if over else t for over, t in zip(ended, chosen)]
            # From now on each sequence grows by one token per step.
            embeddings = self.decoder.embed(token)
            lens = [1] * len(prompts)

    def generate(self, visual: Tensor | None, prompts: Sequence[Tensor], **options) -> list[list[int]]:
        """Whole answers, without the closing eos; `options` as of `stream`."""
        answers = [[] for _ in prompts]
        for step in self.stream(visual, prompts, **options):
            for answer, token in zip(answers, step):
                if token is not None:
                    answer.append(token)
        return answers


# ===== a first reader can stop here =====


# ------------------------------------------------------------- A how attention runs: checks, batching, torch's kernel
def _check_attention(q, k, v, seg, causal, window, backend):
    # What the caller asks for.
    if backend not in BACKENDS:
        raise ValueError(f"attention backend (or EXO2EGO_ATTENTION) is {backend!r}: choose one of {BACKENDS}")
    # Shapes and dtypes.
    if k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k, v need one head_dim, k and v one shape: {[(*t.shape,) for t in (q, k, v)]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, k has {k.shape[1]}: the second must divide the first")
    kinds = {(t.dtype, t.device) for t in (q, k, v)}
    if len(kinds) > 1 or not q.is_floating_point():
        raise ValueError(f"q, k, v need one floating dtype and one device, got {kinds}")
    # Lengths and masks.
    queries, keys = sum(seg.q_lens), sum(seg.k_lens)
    if queries != len(q) or keys != len(k):
        raise ValueError(f"seg has {queries} queries, {keys} keys; q {len(q)}, k {len(k)}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window is {window} with causal={causal}: it must be >= 1 and needs causal=True")
    if backend == "triton":
        _check_triton(q, seg)


def _check_triton(q, seg):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (q.is_cuda or interpreted) or seg.cu_q.device != q.device:
        raise ValueError(f"backend triton needs q and seg on one GPU: q is on {q.device}, "
                         f"seg on {seg.cu_q.device}; use sdpa elsewhere")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"backend triton does not take q in {q.dtype}: use sdpa")
    if q.shape[-1] not in (32, 64, 128):
        raise ValueError(f"backend triton has head_dim 32, 64 and 128, q has {q.shape[-1]}: use sdpa")


def _segmentwise(kernel, q, k, v, seg, causal, window, scale):
    """Call a kernel that knows no packed sequences, on (batch, heads, tokens, D). The results are equal; what is
    fastest depends on the lengths: one call for all sequences, one call with padding, or one call per sequence."""
    sequences = len(seg.q_lens)
    if kernel is _reference:
        return _attend_each(kernel, q, k, v, seg, causal, window, scale)

    # Equal lengths, such as the frames of a ViT: one call.
    if len(set(seg.q_lens)) == len(set(seg.k_lens)) == 1:
        q, k, v = (rearrange(t, "(b t) h d -> b h t d", b=sequences) for t in (q, k, v))
        return rearrange(kernel(q, k, v, causal, window, scale), "b h t d -> (b t) h d")

    # Many short sequences (below 64 tokens) of nearly one length (at most 1.4 times as many tokens with padding): one
    # padded call costs less than many small ones.
    tokens = len(q)
    padded = max(seg.q_lens, default=0) * sequences
    pad_is_cheap = tokens < 64 * sequences and padded < 1.4 * tokens
    if causal and pad_is_cheap and seg.q_lens == seg.k_lens:
        return _attend_padded(kernel, q, k, v, seg.q_lens, window, scale)
    return _attend_each(kernel, q, k, v, seg, causal, window, scale)


def _attend_padded(kernel, q, k, v, lens, window, scale):
    """Padding stands at the end, where causal rows never see it."""
    # Where each token lies when all sequences are as long as the longest.
    longest = max(lens)
    places = torch.cat([torch.arange(length) + i * longest for i, length in enumerate(lens)]).to(q.device)

    def pad(t):
        room = t.new_zeros(len(lens) * longest, *t.shape[1:])
        return rearrange(room.index_copy(0, places, t), "(b t) h d -> b h t d", b=len(lens))
    out = kernel(pad(q), pad(k), pad(v), True, window, scale)
    return rearrange(out, "b h t d -> (b t) h d").index_select(0, places)


def _attend_each(kernel, q, k, v, seg, causal, window, scale):
    pieces = []
    sequences = zip(q.split(seg.q_lens), k.split(seg.k_lens), v.split(seg.k_lens))
    for sequence in sequences:
        batch = (rearrange(t, "t h d -> 1 h t d") for t in sequence)
        out = kernel(*batch, causal, window, scale)
        pieces.append(rearrange(out, "1 h t d -> t h d"))
    return torch.cat(pieces) if pieces else q


def _sdpa(q, k, v, causal, window, scale):
    """torch's fused kernel, (B, H, lq, D)."""
    dtype = q.dtype
    lq, lk = q.shape[2], k.shape[2]
    if lq == 0 or lk == 0:
        return q * 0

    # The first rows see no key: they are zeros.
    if causal and lq > lk:
        blind = lq - lk
        seeing = _sdpa(q[:, :, blind:], k, v, causal, window, scale)
        return nnf.pad(seeing, (0, 0, blind, 0))

    # On a CPU torch's half-precision backward is slower than float32's.
    half = dtype in (torch.bfloat16, torch.float16)
    if half and q.device.type == "cpu" and torch.is_grad_enabled():
        q, k, v = q.float(), k.float(), v.float()

    # torch aligns its causal mask at the top left: that is ours only where there are as many queries as keys. A
    # single query is the last of its sequence and sees all keys: it needs no mask.
    mask, square_causal = None, False
    if causal and (lq > 1 or window is not None):
        square_causal = lq == lk and window is None
        if not square_causal:
            mask = _visible(range(lk - lq, lk), range(lk), window, q.device)
    return _fused(q, k, v, mask, square_causal, scale).to(dtype)


def _fused(q, k, v, mask, square_causal, scale):
    """torch's scaled_dot_product_attention. Groups of heads share a key, which its kernels take in different ways."""
    kv_heads = k.shape[1]
    # Decoding has one query per head. The r heads of a group see the same keys, so they can be r queries of one head:
    # (B, g * r, 1, D) -> (B, g, r, D). A mask (of a window) has one row, which counts for all of them.
    one_query = q.shape[2] == 1
    if one_query:
        q = rearrange(q, "b (g r) 1 d -> b g r d", g=kv_heads)

    # On a GPU no fused kernel shares keys among heads with a mask, or in float32.
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        group = q.shape[1] // kv_heads
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
    shared = q.shape[1] != k.shape[1]
    out = nnf.scaled_dot_product_attention(
        q, k, v, mask, is_causal=square_causal, scale=scale, enable_gqa=shared)
    return rearrange(out, "b g r d -> b (g r) 1 d") if one_query else out


# -------------------------------------------------------------------------------------- FlashAttention in plain torch
class Tiled(torch.autograd.Function):
    """FlashAttention-2 in plain torch: exact attention that never holds more than one tile of scores.

    A tile of queries meets the keys tile by tile and keeps three running values per row: m, the largest score so far;
    l, the sum of exp(s - m); acc, the sum of exp(s - m) v. When m grows, l and acc shrink by alpha =
    exp(m_old - m_new); in the end o = acc / l. The backward keeps one number per row, lse = m + log l, from which the
    probabilities come back, again tile by tile: s = scale q k^T, p = exp(s - lse), delta = rowsum(do o),

        dv = p^T do     dp = do v^T     ds = scale p (dp - delta)     dq = ds k     dk = ds^T q

    The heads that share a key are rows of one matrix. The Triton kernels have the same names.
    """
    tile = 256

    @staticmethod
    def walk(lq, lk, causal, window, device) -> Iterator:
        """For each tile of queries: its slice, and the tiles of keys that it sees, each with a mask of what is hidden
        in it (None: nothing is)."""
        for i in range(0, lq, Tiled.tile):
            # Where these queries stand among the keys: at their end.
            ahead = lk - lq
            places = range(i + ahead, min(i + Tiled.tile, lq) + ahead)
            first = max(0, places[0] - window + 1) if window else 0
            stop = min(lk, places.stop) if causal else lk
            tiles = []
            for j in range(first, stop, Tiled.tile):
                keys = range(j, min(j + Tiled.tile, lk))
                in_window = not window or keys[0] > places[-1] - window
                all_seen = not causal or (keys[-1] <= places[0] and in_window)
                hidden = None if all_seen else ~_visible(places, keys, window, device)
                tiles.append((slice(keys.start, keys.stop), hidden))
            yield slice(i, i + len(places)), tiles

    @staticmethod
    def scores(qi, kj, hidden, scale):
        s = (qi @ kj.mT).mul_(scale)                                        # (B * HK, group * rows, keys)
        if hidden is not None:
            # This writes into s: the group's heads see the same keys.
            s.unflatten(1, (-1, len(hidden))).masked_fill_(hidden, float("-inf"))
        return s

    @staticmethod
    def forward(ctx, q, k, v, causal, window, scale):                       # (B * HK, group, lq, D), (B * HK, lk, D)
        group = q.shape[1]
        o = torch.empty_like(q)
        lse = q.new_empty(*q.shape[:3], 1)
        for rows, tiles in Tiled.walk(q.shape[2], k.shape[1], causal, window, q.device):
            # The running values of a tile of rows.
            qi = q[:, :, rows].flatten(1, 2)
            m = qi.new_full((*qi.shape[:2], 1), float("-inf"))
            l = torch.zeros_like(m)
            acc = torch.zeros_like(qi)
            for keys, hidden in tiles:
                s = Tiled.scores(qi, k[:, keys], hidden, scale)
                m_new = torch.maximum(m, s.amax(-1, keepdim=True))
                # Where nothing is visible yet, m is -inf, and -inf - -inf would be nan.
                finite = m_new.masked_fill(m_new == float("-inf"), 0)
                p = s.sub_(finite).exp_()
                alpha = (m - finite).exp_()
                l = l * alpha + p.sum(-1, keepdim=True)
                acc = acc.mul_(alpha).baddbmm_(p, v[:, keys])
                m = m_new
            # A row without keys: o is 0, and lse = inf makes its p vanish in the backward.
            empty = l == 0
            o_i = acc / l.masked_fill(empty, 1)
            lse_i = (m + l.log()).masked_fill(empty, float("inf"))
            o[:, :, rows] = o_i.unflatten(1, (group, -1))
            lse[:, :, rows] = lse_i.unflatten(1, (group, -1))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.options = causal, window, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        causal, window, scale = ctx.options
        dq = torch.zeros_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        delta = (do * o).sum(-1, keepdim=True)
        for rows, tiles in Tiled.walk(q.shape[2], k.shape[1], causal, window, q.device):
            qi, do_i, lse_i, delta_i = (t[:, :, rows].flatten(1, 2) for t in (q, do, lse, delta))
            dq_i = torch.zeros_like(qi)
            for keys, hidden in tiles:
                s = Tiled.scores(qi, k[:, keys], hidden, scale)
                p = s.sub_(lse_i).exp_()
                dp = do_i @ v[:, keys].mT
                ds = dp.sub_(delta_i).mul_(p).mul_(scale)
                dq_i.baddbmm_(ds, k[:, keys])
                dk[:, keys] += ds.mT @ qi
                dv[:, keys] += p.mT @ do_i
            dq[:, :, rows] = dq_i.unflatten(1, (q.shape[1], -1))
        return dq, dk, dv, None, None, None


def _tiled(q, k, v, causal, window, scale):
    """(B, H, t, D) in and out; half precision is raised to float32."""
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    batch, kv_heads = k.shape[:2]
    q = rearrange(q.to(wide), "b (g r) t d -> (b g) r t d", g=kv_heads)
    k = k.to(wide).flatten(0, 1)
    v = v.to(wide).flatten(0, 1)
    out = Tiled.apply(q, k, v, causal, window, scale)
    return rearrange(out, "(b g) r t d -> b (g r) t d", b=batch).to(dtype)


# -------------------------------------------------------------------------------------------- FlashAttention on a GPU
# For each head_dim the tile (queries, keys), warps and stages of each kernel. A test compiles them all.
TILES = {
    32: dict(forward=(128, 64, 4, 3), dq=(128, 64, 8, 2), dkdv=(32, 64, 4, 2)),
    64: dict(forward=(128, 64, 8, 3), dq=(128, 64, 8, 2), dkdv=(32, 64, 8, 2)),
    128: dict(forward=(128, 32, 8, 3), dq=(128, 32, 8, 2), dkdv=(32, 64, 8, 2))}
# Hopper (sm_90): the fastest of twelve each on an H100 (tests/gpu.py); those of dkdv spill registers, and win.
TILES_90 = {
    32: TILES[32],
    64: dict(forward=(64, 64, 4, 3), dq=(128, 64, 8, 3), dkdv=(32, 128, 4, 3)),
    128: dict(forward=(64, 64, 4, 3), dq=(64, 64, 4, 2), dkdv=(32, 64, 4, 2))}
# Float32 has no use for tensor cores here.
FLOAT32_TILES = {
    32: dict(forward=(16, 16, 4, 1), dq=(16, 16, 4, 1), dkdv=(16, 16, 4, 1)),
    64: dict(forward=(16, 16, 8, 1), dq=(16, 16, 8, 1), dkdv=(16, 16, 8, 1)),
    128: dict(forward=(16, 16, 8, 1), dq=(16, 16, 8, 1), dkdv=(16, 64, 8, 1))}


@cache
def triton_kernels() -> dict:
    """The three kernels by name. They are made on first use: triton is imported here only, and may be missing.

    One program owns one tile of the result and walks along the other side, so nothing is added atomically and results
    repeat bit for bit. `static_range` unrolls the walk into loops over tiles that are visible whole and over those to
    be masked (with a window: all). Scores are in base 2, because exp2 is one instruction.
    """
    # Triton's interpreter looks for these names among the module's globals.
    global tl, segment_of, head_start, tile_offsets, load, key_range, hide, scores
    try:
        import triton
        import triton.language as tl
    except ImportError:
        raise ImportError("backend triton needs the package triton, not installed here: use sdpa") from None

    varying = ["total", "heads", "kv_heads", "window"]

    @triton.jit
    def segment_of(cu):
        # First row and length of this program's segment.
        number = tl.program_id(2)
        first = tl.load(cu + number)
        return first, tl.load(cu + number + 1) - first

    @triton.jit
    def head_start(first, head, heads, D: tl.constexpr):
        # Where a segment's rows of one head start: 64 bits, since a batch may be long.
        return (tl.cast(first, tl.int64) * heads + head) * D

    @triton.jit
    def tile_offsets(rows, heads, D: tl.constexpr):
        # Where each row's D numbers lie, counted from `head_start`.
        return rows[:, None] * (heads * D) + tl.arange(0, D)[None, :]

    @triton.jit
    def load(at, inside, MASKED: tl.constexpr):
        # A whole tile lies inside its segment and needs no check.
        if MASKED:
            return tl.load(at, mask=inside, other=0.0)
        return tl.load(at)

    @triton.jit
    def scores(a, b, scale):
        # The factor is log2(e).
        return tl.dot(a, b, input_precision="ieee") * (scale * 1.4426950408889634)

    @triton.jit
    def key_range(first, lk, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr):
        # Keys [start, masked_from) are visible whole, [masked_from, stop) are to be masked.
        start, masked_from, stop = 0, lk // BN * BN, lk
        if CAUSAL:
            masked_from = tl.minimum(tl.maximum(first + 1, 0), lk) // BN * BN
            stop = tl.minimum(lk, first + BM)
        if WINDOW:
            start = tl.maximum(first - window + 1, 0) // BN * BN
            masked_from = start
        return start, masked_from, stop

    @triton.jit
    def hide(s, i, j, lk, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
        # Keys j as queries at positions i see them.
        seen = j < lk
        if CAUSAL:
            seen = seen & (j <= i)
        if WINDOW:
            seen = seen & (j > i - window)
        return tl.where(seen, s, float("-inf"))

    @triton.jit(do_not_specialize=varying)
    def forward(q, k, v, o, lse, cu_q, cu_k, total, heads, kv_heads, window, scale, D: tl.constexpr,
                CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        # The last queries walk along the most keys: they go first.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        head = tl.program_id(1)
        q0, lq = segment_of(cu_q)
        k0, lk = segment_of(cu_k)
        if tile * BM >= lq:
            return
        # This program's queries.
        rows, d = tile * BM + tl.arange(0, BM), tl.arange(0, D)
        in_q = rows < lq
        at_q = head_start(q0, head, heads, D) + tile_offsets(rows, heads, D)
        at_row = tl.cast(head, tl.int64) * total + q0 + rows
        first_k = head_start(k0, head // (heads // kv_heads), kv_heads, D)
        qi = tl.load(q + at_q, mask=in_q[:, None], other=0.0)

        # The running values of a row.
        m = tl.full([BM], float("-inf"), tl.float32)
        l = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D], tl.float32)
        position = tile * BM + lk - lq                          # of the first query among the keys
        start, masked_from, stop = key_range(position, lk, window, CAUSAL, WINDOW, BM, BN)
        for masked in tl.static_range(1 if WINDOW else 0, 2):
            for j in range(masked_from if masked else start, stop if masked else masked_from, BN):
                keys = j + tl.arange(0, BN)
                in_k = keys < lk
                at_k = first_k + keys * (kv_heads * D)
                kj = load(k + at_k[None, :] + d[:, None], in_k[None, :], masked)            # (D, BN)
                vj = load(v + at_k[:, None] + d[None, :], in_k[:, None], masked)            # (BN, D)
                # Scores of a tile, and the probabilities under the largest score so far.
                s = scores(qi, kj, scale)
                if masked:
                    s = hide(s, (rows + lk - lq)[:, None], keys[None, :], lk, window, CAUSAL, WINDOW)
                m_new = tl.maximum(m, tl.max(s, 1))
                # Where nothing is visible yet, m is -inf, and -inf - -inf would be nan.
                finite = tl.where(m_new == float("-inf"), 0.0, m_new)
                p = tl.exp2(s - finite[:, None])
                alpha = tl.exp2(m - finite)
                l = l * alpha + tl.sum(p, 1)
                acc = tl.dot(p.to(vj.dtype), vj, acc * alpha[:, None], input_precision="ieee")
                m = m_new

        # A row without keys: o is 0, and lse = inf makes its p vanish in the backward.
        some = tl.where(l == 0.0, 1.0, l)
        o_i = acc / some[:, None]
        lse_i = tl.where(l == 0.0, float("inf"), m + tl.log2(some))
        tl.store(o + at_q, o_i.to(o.dtype.element_ty), mask=in_q[:, None])
        tl.store(lse + at_row, lse_i, mask=in_q)

    @triton.jit(do_not_specialize=varying)
    def dq(q, k, v, o, do, lse, dq, delta, cu_q, cu_k, total, heads, kv_heads, window, scale, D: tl.constexpr,
           CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        head = tl.program_id(1)
        q0, lq = segment_of(cu_q)
        k0, lk = segment_of(cu_k)
        if tile * BM >= lq:
            return
        # This program's queries.
        rows = tile * BM + tl.arange(0, BM)
        in_q = rows < lq
        at_q = head_start(q0, head, heads, D) + tile_offsets(rows, heads, D)
        at_row = tl.cast(head, tl.int64) * total + q0 + rows
        first_k = head_start(k0, head // (heads // kv_heads), kv_heads, D)
        qi = tl.load(q + at_q, mask=in_q[:, None], other=0.0)
        do_i = tl.load(do + at_q, mask=in_q[:, None], other=0.0)
        o_i = tl.load(o + at_q, mask=in_q[:, None], other=0.0)
        lse_i = tl.load(lse + at_row, mask=in_q, other=float("inf"))

        # delta is kept for dkdv, which runs next.
        delta_i = tl.sum(do_i.to(tl.float32) * o_i.to(tl.float32), 1)
        tl.store(delta + at_row, delta_i, mask=in_q)
        # The same walk as in the forward.
        dq_i = tl.zeros([BM, D], tl.float32)
        position = tile * BM + lk - lq                          # of the first query among the keys
        start, masked_from, stop = key_range(position, lk, window, CAUSAL, WINDOW, BM, BN)
        for masked in tl.static_range(1 if WINDOW else 0, 2):
            for j in range(masked_from if masked else start, stop if masked else masked_from, BN):
                keys = j + tl.arange(0, BN)
                in_k = keys < lk
                at_k = first_k + tile_offsets(keys, kv_heads, D)
                kj = load(k + at_k, in_k[:, None], masked)                  # (BN, D)
                vj = load(v + at_k, in_k[:, None], masked)
                s = scores(qi, tl.trans(kj), scale)
                if masked:
                    s = hide(s, (rows + lk - lq)[:, None], keys[None, :], lk, window, CAUSAL, WINDOW)
                p = tl.exp2(s - lse_i[:, None])
                dp = tl.dot(do_i, tl.trans(vj), input_precision="ieee")
                ds = p * (dp - delta_i[:, None])
                dq_i = tl.dot(ds.to(kj.dtype), kj, dq_i, input_precision="ieee")
        dq_i = dq_i * scale
        tl.store(dq + at_q, dq_i.to(dq.dtype.element_ty), mask=in_q[:, None])

    @triton.jit(do_not_specialize=varying)
    def dkdv(q, k, v, do, lse, delta, dk, dv, cu_q, cu_k, total, heads, kv_heads, window, scale,
             D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        tile, kv_head = tl.program_id(0), tl.program_id(1)
        q0, lq = segment_of(cu_q)
        k0, lk = segment_of(cu_k)
        if tile * BN >= lk:
            return
        # This program's keys.
        keys = tile * BN + tl.arange(0, BN)
        in_k = keys < lk
        at_k = head_start(k0, kv_head, kv_heads, D) + tile_offsets(keys, kv_heads, D)
        kj = tl.load(k + at_k, mask=in_k[:, None], other=0.0)
        vj = tl.load(v + at_k, mask=in_k[:, None], other=0.0)
        dk_j = tl.zeros([BN, D], tl.float32)
        dv_j = tl.zeros([BN, D], tl.float32)

        # Queries [start, whole_from) and [whole_to, stop) are to be masked; tiles between them see all these keys.
        # Past the last query lse is inf, so p is 0. Keys past the end are not stored.
        first = tile * BN + lq - lk                             # the query at the tile's first key
        start, whole_from, stop = 0, 0, lq
        if CAUSAL:
            start = tl.maximum(first, 0) // BM * BM
            last = tl.maximum(first + BN - 1, 0)
            whole_from = tl.minimum((last + BM - 1) // BM * BM, lq)
        whole_to = tl.maximum(whole_from, stop // BM * BM)
        if WINDOW:
            stop = tl.minimum(lq, first + BN - 1 + window)
            whole_from = stop
        group = heads // kv_heads
        for head in range(kv_head * group, (kv_head + 1) * group):
            first_q = head_start(q0, head, heads, D)
            # Part 1 is the whole tiles, parts 0 and 2 are to be masked.
            for part in tl.static_range(0 if CAUSAL else 1, 1 if WINDOW else 3):
                begin, end = start, whole_from
                if part == 1:
                    begin, end = whole_from, whole_to
                if part == 2:
                    begin, end = whole_to, stop
                for i in range(begin, end, BM):
                    rows = i + tl.arange(0, BM)
                    in_q = rows < lq
                    at_q = first_q + tile_offsets(rows, heads, D)
                    at_row = tl.cast(head, tl.int64) * total + q0 + rows
                    qi = load(q + at_q, in_q[:, None], part != 1)
                    do_i = load(do + at_q, in_q[:, None], part != 1)
                    delta_i = load(delta + at_row, in_q, part != 1)
                    lse_i = tl.load(lse + at_row, mask=in_q, other=float("inf"))
                    # Transposed: keys are rows, (BN, BM).
                    s = scores(kj, tl.trans(qi), scale)
                    if part != 1:
                        s = hide(s, (rows + lk - lq)[None, :], keys[:, None], lk, window, CAUSAL, WINDOW)
                    p = tl.exp2(s - lse_i[None, :])
                    dv_j = tl.dot(p.to(do_i.dtype), do_i, dv_j, input_precision="ieee")
                    dp = tl.dot(vj, tl.trans(do_i), input_precision="ieee")
                    ds = p * (dp - delta_i[None, :])
                    dk_j = tl.dot(ds.to(qi.dtype), qi, dk_j, input_precision="ieee")
        dk_j = dk_j * scale
        tl.store(dk + at_k, dk_j.to(dk.dtype.element_ty), mask=in_k[:, None])
        tl.store(dv + at_k, dv_j.to(dv.dtype.element_ty), mask=in_k[:, None])

    return {"forward": forward, "dq": dq, "dkdv": dkdv}


def launch(kernel, q, k, cu_q, cu_k, longest_q, longest_k, causal, window, scale, *tensors):
    """One program for each tile of each head of each segment; those past a segment's end return at once."""
    heads, head_dim = q.shape[1:]
    kv_heads = k.shape[1]
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    table = TILES_90 if hopper else TILES
    if q.dtype == torch.float32:
        table = FLOAT32_TILES
    rows, keys, warps, stages = table[head_dim][kernel]
    if kernel == "dkdv":                                        # its programs own a tile of keys
        tiles, owners = math.ceil(longest_k / keys), kv_heads
    else:
        tiles, owners = math.ceil(longest_q / rows), heads
    if tiles == 0:
        return
    grid = tiles, owners, len(cu_q) - 1
    sizes = len(q), heads, kv_heads, window or 0, scale
    constants = head_dim, causal, window is not None, rows, keys
    with torch.cuda.device_of(q):
        compiled = triton_kernels()[kernel]
        compiled[grid](*tensors, cu_q, cu_k, *sizes, *constants, num_warps=warps, num_stages=stages)


# The kernels are one differentiable operator of torch: activation checkpointing can keep its result (an
# autograd.Function would run again), and torch.compile passes it by.
OPTIONS = "Tensor cu_q, Tensor cu_k, int longest_q, int longest_k, bool causal, int? window, float scale"


@torch.library.custom_op("exo2ego::flash_attention", mutates_args=(),
                         schema=f"(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)")
def flash_attention(q, k, v, *options):
    """-> o (Tq, H, D) as q, and lse (H, Tq) in float32 for the backward."""
    q = q.contiguous()
    k = k.contiguous()
    v = v.contiguous()
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[1], len(q), device=q.device)
    launch("forward", q, k, *options, q, k, v, o, lse)
    return o, lse


@torch.library.custom_op(
    "exo2ego::flash_attention_backward", mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, {OPTIONS}) -> (Tensor, Tensor, Tensor)")
def flash_attention_backward(q, k, v, o, lse, do, *options):
    """-> dq, dk, dv."""
    q, k, v, do = (t.contiguous() for t in (q, k, v, do))
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    delta = torch.empty_like(lse)
    launch("dq", q, k, *options, q, k, v, o, do, lse, dq, delta)
    launch("dkdv", q, k, *options, q, k, v, do, lse, delta, dk, dv)
    return dq, dk, dv


def _keep_for_backward(ctx, inputs, output):
    q, k, v, cu_q, cu_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do, _):
    q, k, v, o, lse, cu_q, cu_k = ctx.saved_tensors
    dq, dk, dv = flash_attention_backward(q, k, v, o, lse, do, cu_q, cu_k, *ctx.options)
    return dq, dk, dv, None, None, None, None, None, None, None


flash_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def _triton(q, k, v, seg, causal, window, scale):
    longest_q = max(seg.q_lens, default=0)
    longest_k = max(seg.k_lens, default=0)
    o, _ = flash_attention(q, k, v, seg.cu_q, seg.cu_k, longest_q, longest_k, causal, window, scale)
    return o


# ------------------------------------------------------------------------------- which backend: a check where it runs
# The largest deviation that passes, as a share of the largest true value.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-5}


def attention_error(backend, device, dtype, head_dim) -> float:
    """Largest deviation from the formula in float64, of the output and the three gradients, as a share of TOLERANCE:
    at most 1 passes, nan does not. The batch is ragged and has grouped heads; it is tried causal and not."""
    lens, heads, kv_heads = (400, 5, 64), 6, 2
    rng = torch.Generator().manual_seed(0)
    shapes = [(sum(lens), h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, do = (torch.randn(shape, generator=rng).to(dtype) for shape in shapes)
    seg = Segments.packed(lens, device)

    def run(causal, backend, where, dtype):
        leaves = [t.to(where, dtype).requires_grad_() for t in (q, k, v)]
        out = attention(*leaves, seg, causal=causal, backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, do.to(where, dtype))
    worst = [torch.zeros(())]
    # Gradients also where the caller only answers questions.
    with torch.enable_grad():
        for causal in (True, False):
            ours = run(causal, backend, device, dtype)
            true = run(causal, "reference", "cpu", torch.float64)
            for a, b in zip(ours, true):
                apart = (a.cpu().double() - b).abs().max()
                worst.append(apart / b.abs().max())
    return float(torch.stack(worst).max() / TOLERANCE[dtype])


def problem_with_triton(device, dtype, cfg):
    """Why our kernels cannot be used on this GPU, or None."""
    try:
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs sm_80 or newer"
        for head_dim in {cfg.vit_width // cfg.vit_heads, cfg.decoder_head_dim}:
            error = attention_error("triton", device, dtype, head_dim)
            if not error <= 1:
                return f"error {error:.2f} of the tolerance at head_dim {head_dim}"
        return None
    except Exception as error:
        # Whatever stops our kernels, torch's own run, unless the device itself is dead: then this line raises.
        torch.cuda.synchronize(device)
        return f"{type(error).__name__}: {str(error)[:90]}"


def choose_attention(device, dtype, cfg, on_every_rank: Callable | None = None) -> str:
    """Decide what "auto" means, once, at start-up; returns the line to print.

    In half precision on a GPU our kernels are taken if they pass a check there. `on_every_rank` runs that check on
    all ranks of a run, since one choice serves them all.
    """
    global half_gpu_backend
    half_gpu_backend = "sdpa"
    kind = str(dtype).removeprefix("torch.")
    forced = os.environ.get("EXO2EGO_ATTENTION")
    if forced:
        if forced not in BACKENDS:
            raise ValueError(f"EXO2EGO_ATTENTION is {forced!r}: choose one of {BACKENDS}")
        return f"attention: {forced}, by EXO2EGO_ATTENTION"
    if device.type != "cuda" or dtype == torch.float32:
        return f"attention: sdpa, for {kind} on {device.type}"

    def check():
        return problem_with_triton(device, dtype, cfg)
    problem = on_every_rank(check) if on_every_rank else check()
    if problem:
        return f"attention: sdpa; not triton: {problem}"
    half_gpu_backend = "triton"
    return f"attention: triton, for {kind}, after a self-check"


def check_attention() -> int:
    """Check the backends that this machine can run against the formula; returns how many checks failed."""
    device = pick_device()
    failed = 0
    gpu = device.type == "cuda"
    backends = ("tiled", "sdpa", "triton") if gpu else ("tiled", "sdpa")
    for backend, dtype, head_dim in product(backends, TOLERANCE, (32, 64, 128)):
        try:
            error = attention_error(backend, device, dtype, head_dim)
            found = f"error {error:.2f} of the tolerance"
        except Exception as problem:
            # Triton is not there, say, or the GPU is too old.
            error, found = math.inf, f"{type(problem).__name__}: {problem}"
        failed += not error <= 1
        print(f"{'ok  ' if error <= 1 else 'FAIL'} {backend:6} {dtype} head_dim {head_dim}: {found}")
    if not gpu:
        print("not run, it needs a GPU: triton; pytest interprets and compiles it, tests/gpu.py proves it")
    return failed


# -------------------------------------------------------------------------------------------- B decoding with a cache
class KVCache:
    """Keys and values already computed, per layer, packed like the batch: (tokens, HK, D) each."""
    def __init__(self, sequences: int):
        self.lens = (0,) * sequences
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer, k, v, seg):
        """Append each sequence's new keys and values to its old ones; returns all of them, in packed order."""
        if layer in self.layers:
            past_k, past_v = self.layers[layer]
            k = append_packed(past_k, k, seg)
            v = append_packed(past_v, v, seg)
        self.layers[layer] = k, v
        return k, v


class SharedPrefix(KVCache):
    """A cache whose sequences all start with the tokens of one video, which is read once, whatever is asked about it.

    `prefix` holds that one sequence. In the first pass each layer puts its keys and values before those of every
    sequence, which needs one copy per sequence. `keep`: store these copies for later passes. Generating needs them;
    scoring takes one pass, so a layer's copies can go when the layer is done.
    """
    def __init__(self, prefix: KVCache, sequences: int, keep: bool):
        super().__init__(sequences)
        self.prefix = prefix
        self.keep = keep
        self.lens = prefix.lens * sequences

    def extend(self, layer, k, v, seg) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            return super().extend(layer, k, v, seg)
        prefix_k, prefix_v = self.prefix.layers[layer]
        sequences = len(seg.q_lens)
        k = interleave([prefix_k] * sequences, k.split(seg.q_lens))
        v = interleave([prefix_v] * sequences, v.split(seg.q_lens))
        if self.keep:
            self.layers[layer] = k, v
        return k, v


def append_packed(past, new, seg) -> Tensor:
    """Packed (past tokens, HK, D) and (new tokens, HK, D) -> the past of each sequence, followed by its new tokens."""
    past_lens = [total - own for total, own in zip(seg.k_lens, seg.q_lens)]
    # Equal lengths, such as answers to one question: one copy, not two per sequence.
    if len(set(past_lens)) == len(set(seg.q_lens)) == 1:
        past, new = (rearrange(t, "(b t) h d -> b t h d", b=len(past_lens)) for t in (past, new))
        return rearrange(torch.cat([past, new], dim=1), "b t h d -> (b t) h d")
    return interleave(past.split(past_lens), new.split(seg.q_lens))


def interleave(past, new) -> Tensor:
    """One piece of the past, one that is new, and so on."""
    return torch.cat([piece for pair in zip(past, new) for piece in pair])


# ------------------------------------------------------------------------------------------------------ C checkpoints
# The number of the format of state.json and of the names of tensors. Another one is refused by name.
FORMAT = 4
FOUR_FILES = ("model.py", "data.py", "train.py", "eval.py")


def read_json(path) -> dict:
    """A JSON file that holds an object, or ValueError with its name."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def newest_checkpoint(run: AnyPath):
    """The last of `checkpoints` of a run folder, or the folder itself if it is a checkpoint or holds published
    weights; None if there is none."""
    run = Path(run).expanduser()
    if (run / "state.json").is_file() or (run / "config.json").is_file():
        return run
    return max(checkpoints(run), default=None, key=step_of)


def checkpoints(run) -> list[Path]:
    """The `step_000040` of a run folder, in order of their steps; a save takes that name when it is whole. Any other
    name (`step_000040 copy`, `step_000040_best`) is its owner's."""
    return sorted((path for path in Path(run).glob("step_*") if step_of(path) is not None), key=step_of)


def step_of(path) -> int | None:
    """The step in a checkpoint's name; None if it has another name."""
    found = re.fullmatch(r"step_(\d{6,})", path.name)
    return int(found[1]) if found else None


def read_state(path) -> dict:
    """state.json of a checkpoint; published weights count as a finished stage 0."""
    if (path / "config.json").is_file():
        return dict(stage=0, step=0, steps=0, base=None)
    state = read_json(path / "state.json")
    found = state.get("format", 1)
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, this code reads format {FORMAT}: train it again, or use the "
                         f"code that made it (revision {state.get('git')})")
    return state


def git_revision():
    """The last commit that changed the four files, with + where they differ from it; None outside a checkout."""
    def git(*words):
        command = ["git", *words, "--", *FOUR_FILES]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        commit = git("log", "-1", "--format=%h", "--abbrev=12").stdout.strip()
        changed = git("diff", "--quiet", "HEAD").returncode
    except OSError:
        return None
    return commit + "+" * (changed != 0) if commit else None


def file_hash(file) -> str:
    """sha256 of a whole file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def save_files(folder, files: dict) -> dict:
    """Write the tensors of a checkpoint, file by file -> what its state.json says of how it was made, so that a
    change of its weights is noticed."""
    hashes = {}
    for name, tensors in files.items():
        save_tensors(tensors, folder / name)
        hashes[name] = file_hash(folder / name)
    return dict(format=FORMAT, git=git_revision(), sha256=hashes)


def fingerprint(path: AnyPath) -> str:
    """A short hash of the first MiB (with the header) and of the last MiB of each weight file."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("model*.safetensors")):
        with open(file, "rb") as opened:
            digest.update(opened.read(1 << 20))
            opened.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(opened.read())
    return digest.hexdigest()[:16]


def base_checkpoint_of(path, base=None):
    """The folder that a checkpoint builds on: `base`, or the one it recorded, known by its hash. None: it is
    whole."""
    state = read_state(path)
    if state["base"] is None:
        return None
    root = newest_checkpoint(base or path.parent / state["base"])
    if root is None:
        raise FileNotFoundError(f"{path} builds on {state['base']}, which is not there: pass --base DIR")
    if fingerprint(root) != state["base_hash"]:
        raise ValueError(f"{root} is not the base of {path}, its weights differ: pass --base DIR")
    return root


def load_delta(path, name="model.safetensors"):
    """The tensors of a checkpoint's own file: those that differ from its base. A flipped bit is noticed."""
    recorded = read_state(path).get("sha256", {})
    try:
        if recorded.get(name) in (None, file_hash(path / name)):
            return load_file(path / name)
        damage = "it has changed since it was saved"
    except SafetensorError as error:
        damage = error
    except FileNotFoundError:
        damage = "it is missing"
    except (OSError, MemoryError) as error:
        # The file may be whole: the machine could not read it, or has no room for it.
        raise ValueError(f"{path / name} cannot be read here: {error or 'not enough memory'}") from None
    raise ValueError(f"{path / name} is damaged ({damage}): remove {path} to fall back to the checkpoint before it")


def save_tensors(tensors, file, metadata=None):
    """A safetensors file that others may read as they may read the owner's other files: the umask decides."""
    file = Path(file)
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata)
    file.chmod(mode)


def load_checkpoint(path: AnyPath, base: AnyPath | None = None,
                    vision: AnyPath | None = None, **added) -> tuple[Exo2Ego, dict]:
    """-> Exo2Ego in eval mode, and state.json. Where weights are bfloat16, run it under `autocast`.

    Parts that are `added` (mapping="resnet", lora=True) start fresh. All others are read from `path` (a run folder or
    a `step_*` of it, or published weights) and from its `base` (by default the recorded one):

        path                    base                        the weights
        stage 0, published      none                        those of path
        a later stage           stage 0, or published       those of base, where path has none of its own
    """
    folder = newest_checkpoint(path)
    if folder is None:
        raise FileNotFoundError(f"no checkpoint in {path}: train it first (torchrun train.py --stage N)")
    state = read_state(folder)
    base = base_checkpoint_of(folder, base)                     # None: it is whole
    # No file holds the parts that are added now.
    may_be_missing = []
    if "mapping" in added:
        may_be_missing += ["F.", "G."]
    if "lora" in added:
        may_be_missing += ["lora_"]

    published = next((place for place in (folder, base) if place and (place / "config.json").is_file()), None)
    if published:
        # These weights have a reader of their own, and are in the model then. A checkpoint of ours that builds on
        # them holds what was trained here: its tensors replace some of theirs, and the others need not be in its
        # file.
        model = Exo2Ego.from_videollama2(published, vision=vision or state.get("vision"))
        may_be_missing += list(model.state_dict())
        state.setdefault("model", asdict(model.cfg))
        # F, G and LoRA, which published weights never have: those that the checkpoint has, and those that are added
        # now.
        parts = {key: state["model"][key] for key in ("mapping", "lora")}
        model.add(**parts | added)
        tensors = load_delta(folder) if base else {}
    else:
        model = Exo2Ego(replace(ModelConfig(**state["model"]), **added))
        tensors = load_delta(base) if base else {}
        tensors |= load_delta(folder)

    # What only a loss needs is not the model's. Every other name must fit.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("extra.")}
    try:
        missing, unknown = model.load_state_dict(tensors, strict=False, assign=bool(published))
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit the model: {error}") from None
    missing = [name for name in missing if not any(word in name for word in may_be_missing)]
    if missing or unknown:
        raise ValueError(f"{folder} does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}")
    return model.eval(), state


# -------------------------------------------------------------------------------------- published weights, in and out
# Our name -> theirs, as regular expressions in turn. The misspelling of CLIP's first norm is its own.
CLIP_NAMES = (
    (r"\.([qkv])\.", r".self_attn.\1_proj."),
    (r"\.out\.", ".self_attn.out_proj."),
    (r"\.fc([12])\.", r".mlp.fc\1."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^blocks", "encoder.layers"),
    (r"^class_token", "embeddings.class_embedding"),
    (r"^position", "embeddings.position_embedding.weight"),
    (r"^patch_embedding", "embeddings.patch_embedding"),
    (r"^pre_norm", "pre_layrnorm"))
MISTRAL_NAMES = (
    (r"\.([qkv])\.", r".self_attn.\1_proj."),
    (r"\.out\.", ".self_attn.o_proj."),
    (r"\.(gate|up|down)\.", r".mlp.\1_proj."),
    (r"\.norm1\.", ".input_layernorm."),
    (r"\.norm2\.", ".post_attention_layernorm."),
    (r"^blocks", "model.layers"),
    (r"^norm", "model.norm"),
    (r"^embedding", "model.embed_tokens"))


def rename(name, table) -> str:
    """Our name of a tensor -> its published one."""
    for ours, theirs in table:
        name = re.sub(ours, theirs, name)
    return name


class HFCheckpoint:
    """A directory in Hugging Face's layout. Tensors are read one at a time: 7B are never in memory twice."""
    def __init__(self, path: AnyPath):
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self.where = {}                                         # name of a tensor -> its open file
        self.used = set()
        index = self.path / "model.safetensors.index.json"
        shards = read_json(index).get("weight_map", {}) if index.is_file() else {"": "model.safetensors"}
        for shard in sorted(set(shards.values())):
            handle = self.open_shard(shard, index)
            for name in handle.keys():
                self.where[name] = handle

    def open_shard(self, shard, index):
        file = self.path / shard
        if file.parent != self.path or shard == "..":
            raise ValueError(f"{index} names {shard!r}: a shard is a plain file name in that directory")
        pickles = sorted(self.path.glob("pytorch_model*.bin"))
        if pickles and not file.is_file():
            raise ValueError(f"{file} is missing, and {pickles[0].name} is a pickle, which can run code: load "
                             f"it with transformers where that harms nothing; its save_pretrained writes safetensors")
        try:
            return safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            what = "cannot be read" if file.is_file() else "is missing"
            raise ValueError(f"{file} {what} ({error}): download it again") from None

    def require(self, config, **wanted):
        """Refuse by name what the network here cannot represent. Absent and null are as wanted."""
        for key, value in wanted.items():
            found = config.get(key)
            if found not in (None, value):
                raise ValueError(f"{self.path}/config.json: {key} is {found!r}, {value!r} fits here")

    def shape(self, name):
        """Of a tensor that must be there, read from its file's header."""
        if name not in self.where:
            raise ValueError(f"{self.path} lacks the tensor {name}")
        return tuple(self.where[name].get_slice(name).get_shape())

    def count(self, prefix) -> int:
        """1 + the largest number that follows this prefix in a name: how many layers there are."""
        names = "\n".join(self.where)
        numbers = re.findall(rf"^{re.escape(prefix)}(\d+)", names, re.MULTILINE)
        return 1 + max(map(int, numbers), default=-1)

    def load_into(self, module, prefix, table=(), dtype=None):
        """Give every tensor of a module that was built on the meta device its value."""
        for name, blank in module.state_dict().items():
            theirs = prefix + rename(name, table)
            shape = self.shape(theirs)
            value = self.where[theirs].get_tensor(theirs)
            if shape != blank.shape or not value.is_floating_point():
                raise ValueError(f"{self.path}: {theirs} is {shape} {value.dtype}, not {(*blank.shape,)}")
            value = value.to(torch.get_default_device(), dtype, copy=True)
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(value))
            self.used.add(theirs)

    def assert_all_used(self, *ignored: str):
        """Every tensor must have found its place, but for these prefixes and RoPE's old tables."""
        unused = set(self.where) - self.used
        unused = sorted(name for name in unused
                        if not name.startswith(ignored) and not name.endswith("rotary_emb.inv_freq"))
        if unused:
            raise ValueError(f"{self.path} has tensors that have no place here: {unused[:3]}")


def vit_from_hf(files, dtype=None, prefix="", alone=False) -> ViT:
    """The CLIP ViT whose tensors start with `prefix`; sizes are the tensors'. `alone`: the directory holds CLIP only,
    so its config.json must fit and every tensor must find its place. ValueError names what does not fit."""
    config = files.config.get("vision_config", files.config) if alone else {}
    if any(name.startswith(f"{prefix}vision_model.") for name in files.where):
        prefix += "vision_model."
    # The tensors tell the sizes, config.json must agree with them.
    width, _, patch, _ = files.shape(f"{prefix}embeddings.patch_embedding.weight")
    tokens, _ = files.shape(f"{prefix}embeddings.position_embedding.weight")
    image_size = math.isqrt(tokens - 1) * patch
    layers = files.count(f"{prefix}encoder.layers.")
    files.require(config, hidden_act="quick_gelu", layer_norm_eps=1e-5,
                  num_hidden_layers=layers, image_size=image_size)
    cfg = replace(
        PRESETS["7b"],
        image_size=image_size,
        patch=patch,
        vit_width=width,
        vit_layers=layers - 1,
        vit_heads=config.get("num_attention_heads", width // 64),
        vit_mlp_dim=files.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0])
    with torch.device("meta"):
        vit = ViT(cfg)
    files.load_into(vit, prefix, CLIP_NAMES, dtype)

    # The last layer and the post norm are in the files and are never run.
    never_run = tuple(prefix + name for name in (
        f"encoder.layers.{layers - 1}.", "post_layernorm.", "embeddings.position_ids"))
    files.used |= {name for name in files.where if name.startswith(never_run)}
    if alone:
        files.assert_all_used("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    return vit


# What transformers takes for a Mistral whose config.json does not say.
MISTRAL_DEFAULTS = {"num_attention_heads": 32, "intermediate_size": 14336, "rms_norm_eps": 1e-6,
                    "rope_theta": 1e4}


def decoder_from_hf(files, dtype=None, alone=False) -> Decoder:
    """The Mistral of a directory; sizes are the tensors'. A head that is tied to the embedding becomes a copy of it.
    `alone`: the directory holds Mistral only. ValueError names what does not fit."""
    given = {key: value for key, value in files.config.items() if value is not None}
    config = MISTRAL_DEFAULTS | given
    rope_config = config | (config.get("rope_parameters") or {}) | (config.get("rope_scaling") or {})
    # The tensors tell the sizes, config.json must agree with them and ask for nothing else.
    vocab, width = files.shape("model.embed_tokens.weight")
    layers = files.count("model.layers.")
    files.require(config, hidden_act="silu", attention_bias=False, mlp_bias=False,
                  vocab_size=vocab, hidden_size=width, num_hidden_layers=layers)
    files.require(rope_config, rope_type="default", type="default", partial_rotary_factor=1)
    heads = config["num_attention_heads"]
    cfg = replace(
        PRESETS["7b"],
        width=width,
        layers=layers,
        vocab=vocab,
        heads=heads,
        # null means something else than absent for these two
        kv_heads=files.config.get("num_key_value_heads", 8) or heads,
        window=files.config.get("sliding_window", 4096),
        mlp_dim=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        head_dim=config.get("head_dim"),
        rope_theta=float(rope_config["rope_theta"]))
    with torch.device("meta"):
        decoder = Decoder(cfg)
    # A tied head has no tensor of its own.
    tied = config.get("tie_word_embeddings") and "lm_head.weight" not in files.where
    table = MISTRAL_NAMES + ((r"^lm_head", "model.embed_tokens"),) if tied else MISTRAL_NAMES
    files.load_into(decoder, "", table, dtype)
    if alone:
        files.require(config, model_type="mistral")
        files.assert_all_used()
    return decoder


def exo2ego_from_videollama2(path, dtype=None, vision=None) -> Exo2Ego:
    """See Exo2Ego.from_videollama2."""
    kind = read_json(Path(path) / "config.json").get("model_type")
    if kind not in ("videollama2_mistral", "mistral"):
        raise ValueError(f"{path}/config.json: model_type is {kind!r}, videollama2_mistral fits here")
    files, tower = HFCheckpoint(path), "model.vision_tower.vision_tower."
    files.require(files.config, mm_projector_type="stc_connector", mm_vision_select_layer=-2,
                  mm_vision_select_feature="patch")
    if vision is None and not any(name.startswith(tower) for name in files.where):
        raise ValueError(f"{path} holds no vision tower: pass --vision DIR, a CLIP directory")

    # The three parts are read one after another; their sizes make the whole model's.
    decoder = decoder_from_hf(files, dtype)
    if vision:
        vit = ViT.from_hf(vision, dtype)
    else:
        vit = vit_from_hf(files, dtype, tower)
    depth = files.count("model.mm_projector.s1.b") - 1          # its blocks count from 1
    cfg = replace(
        decoder.cfg,
        image_size=vit.cfg.image_size,
        patch=vit.cfg.patch,
        vit_width=vit.cfg.vit_width,
        vit_layers=vit.cfg.vit_layers,
        vit_heads=vit.cfg.vit_heads,
        vit_mlp_dim=vit.cfg.vit_mlp_dim,
        stc_depth=depth if depth > 0 else PRESETS["7b"].stc_depth,
        frames=files.config.get("num_frames") or PRESETS["7b"].frames)
    # F and G halve the patch grid twice, or as often as its side allows: CLIP-L 24 x 24 twice, CLIP-B/16 14 x 14 once.
    while cfg.patches_per_side % 2 ** cfg.map_downs:
        cfg = replace(cfg, map_downs=cfg.map_downs - 1)
    with torch.device("meta"):
        model = Exo2Ego(cfg)
    model.decoder = decoder
    model.exo_vit = vit
    model.ego_vit = copy.deepcopy(vit)
    if depth > 0:
        files.load_into(model.exo_connector, "model.mm_projector.", (), dtype)
    else:
        model.exo_connector = Connector(cfg)
    model.ego_connector = copy.deepcopy(model.exo_connector)
    if vision:
        files.assert_all_used(tower)
    else:
        files.assert_all_used()
    return model.eval()


def export_hf(ckpt: AnyPath, out: AnyPath, base=None, vision=None):
    """Write what transformers knows of a checkpoint: DIR/decoder (LoRA merged, in float32) with its tokenizer,
    DIR/exo_vision, DIR/ego_vision. It has no place for connectors, F and G. Its AutoTokenizer needs the packages
    sentencepiece and protobuf to read the tokenizer."""
    model, _ = load_checkpoint(ckpt, base, vision)
    # The decoder, which transformers knows as Mistral.
    if model.cfg.lora:
        model.decoder.merge_lora()
    tensors = {rename(name, MISTRAL_NAMES): tensor for name, tensor in model.decoder.state_dict().items()}
    write_hf(Path(out) / "decoder", tensors, mistral_config(model.cfg))
    shutil.copyfile(newest_checkpoint(ckpt) / "tokenizer.model", Path(out) / "decoder/tokenizer.model")
    (Path(out) / "decoder/tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1))
    # The two ViTs, which it knows as CLIP's.
    write_hf(Path(out) / "exo_vision", clip_tensors(model.exo_vit), clip_config(model.cfg))
    write_hf(Path(out) / "ego_vision", clip_tensors(model.ego_vit), clip_config(model.cfg))


# What AutoTokenizer must know to give the ids of data.py's Tokenizer: <s> comes first, and the chat is
# Mistral-Instruct's.
TOKENIZER_CONFIG = dict(
    tokenizer_class="LlamaTokenizer",
    bos_token="<s>",
    eos_token="</s>",
    unk_token="<unk>",
    add_bos_token=True,
    add_eos_token=False,
    legacy=True,
    clean_up_tokenization_spaces=False,
    chat_template=(
        "{{ bos_token }}{% set lead = namespace(text='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set lead.text = message['content'] + '\n\n' %}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' + lead.text + message['content'] + ' [/INST]' }}"
        "{% set lead.text = '' %}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"))


def write_hf(folder, tensors, config):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    print(f"{folder}: {len(tensors)} tensors")


def clip_tensors(vit):
    """CLIP's names. Its last layer, which is never run here, is written as zeros: a block of zeros passes its input
    on, so hidden state -2 and the last one are both our features."""
    state = vit.state_dict()
    last = f"blocks.{vit.cfg.vit_layers}."
    for name, tensor in list(state.items()):
        if name.startswith("blocks.0."):
            state[name.replace("blocks.0.", last)] = torch.zeros_like(tensor)
    tensors = {f"vision_model.{rename(name, CLIP_NAMES)}": tensor for name, tensor in state.items()}
    weight = vit.pre_norm.weight
    tensors["vision_model.post_layernorm.weight"] = torch.ones_like(weight)
    tensors["vision_model.post_layernorm.bias"] = torch.zeros_like(weight)
    return tensors


def clip_config(cfg) -> dict:
    return dict(
        architectures=["CLIPVisionModel"],
        model_type="clip_vision_model",
        hidden_size=cfg.vit_width,
        intermediate_size=cfg.vit_mlp_dim,
        num_hidden_layers=cfg.vit_layers + 1,
        num_attention_heads=cfg.vit_heads,
        num_channels=3,
        image_size=cfg.image_size,
        patch_size=cfg.patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        projection_dim=cfg.vit_width)


def mistral_config(cfg) -> dict:
    return dict(
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp_dim,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.decoder_head_dim,
        hidden_act="silu",
        rms_norm_eps=cfg.norm_eps,
        rope_theta=cfg.rope_theta,
        vocab_size=cfg.vocab,
        sliding_window=cfg.window,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2)


# ------------------------------------------------------------------------------------------ D device, dtype, commands
def pick_device() -> torch.device:
    """This process's GPU, else Apple's, else the CPU. ValueError: there are more processes than GPUs."""
    if torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", 0))
        if number >= torch.cuda.device_count():
            raise ValueError(f"process {number + 1} of this machine finds {torch.cuda.device_count()} GPUs, and each "
                             f"needs one of its own: a smaller --nproc_per_node")
        return torch.device("cuda", number)
    # Gloo, by which ranks without CUDA meet, does not know Apple's.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return torch.device("mps" if torch.backends.mps.is_available() and alone else "cpu")


def autocast(device, bf16):
    """The context of a forward pass: products in bfloat16 if asked for, norms and losses in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def to_device_and_dtype(model, device, bf16) -> Exo2Ego:
    """Move a model to a device. With `bf16` float16 becomes bfloat16, and float32 and bfloat16 stay; without it all
    weights become float32. (There are no buffers.)"""
    for p in model.parameters():
        kept = torch.bfloat16 if p.dtype == torch.float16 else p.dtype
        p.data = p.data.to(device, kept if bf16 else torch.float32)
    return model


# What activation checkpointing, torch.compile and FSDP take as one unit.
BLOCKS = (ViTBlock, RegNetBlock, ResBlock, FCBlock, DecoderBlock)


def main(argv=None):
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
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"model.py: {error}")


if __name__ == "__main__":
    main()
