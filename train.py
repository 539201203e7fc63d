"""Train Exo2Ego, stage by stage. The stage table is the paper's method; one loop runs every row of it.

    torchrun train.py --stage 1                        # makes the micro-world and stage 0 if they are missing
    torchrun --nproc_per_node 2 train.py --stage 2     # any number of processes: the same batches

The same command again resumes, bit for bit. Every step is one object in out/stageN/log.jsonl.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from data import (Batch, DataError, Loader, Tokenizer, add_flags, die_with_parent, file_lock, manifest_of,
                  read_manifest, toy_tokenizer, toy_world)
from eval import toy_benchmark
from model import (BLOCKS, IGNORE, PRESETS, VIDEO, DecoderBlock, Exo2Ego, attention, choose_attention,
                   feature_kl, fingerprint, git_revision, file_hash, load_checkpoint, newest_checkpoint,
                   load_delta, pick_device, autocast, read_state, to_device_and_dtype)


# ------------------------------------------------------------------------------------------- the stage table
@dataclass(frozen=True)
class Phase:
    """One row: what trains (part -> peak learning rate; the rest is frozen), on what, towards what."""
    name: str
    trains: dict[str, float]
    split: str                          # of the micro-world; --data replaces it
    view: str                           # text | exo | ego | pair: what a sample shows
    losses: dict[str, float]            # weight of each term
    batch: int                          # samples a step over all ranks
    steps: int = 0                      # 0: epochs decide
    warmup: float = 0.03                # share of the steps; then cosine down to `floor` of the peak
    epochs: int = 1
    floor: float = 0.05
    text: str = "text"                  # what is supervised: the narration ("text"), answers ("turns"), "mix"
    copies: tuple = ()                  # parts that start as a copy: (from, to)

# The micro-world: rates (on Muon's scale), steps and weights are our choice, from trials.
TOY = {
    0: (Phase("language", dict(decoder=3e-3), "corpus", "text", dict(vtg=1), 64, 110, 0.08, text="mix"),
        Phase("clip", dict(exo_vit=1.5e-2, loss=1.5e-2), "corpus", "exo", dict(clip=1), 48, 150, 0.08),
        Phase("init exo", dict(exo_vit=3e-3, exo_connector=1e-2), "corpus", "exo", dict(vtg=1), 48, 80, 0.08),
        Phase("init ego", dict(ego_vit=3e-3, ego_connector=1e-3), "ego", "ego", dict(vtg=1), 32, 80, 0.08,
              copies=(("exo_vit", "ego_vit"), ("exo_connector", "ego_connector")))),
    1: (Phase("demonstrator self-preparation", dict(exo_vit=3e-3, exo_connector=3e-3), "pairs", "exo",
              dict(vtg=1), 32, 120),),
    2: (Phase("demonstrator-learner guidance", dict(ego_vit=1e-3, ego_connector=1e-3, F=3e-3, G=3e-3),
              "pairs", "pair", dict(vtg=1, kl=5, ccl=0.1), 32, 480),),
    3: (Phase("learner self-practice", dict(ego_vit=3e-4, F=3e-4, lora=3e-3), "instruct", "ego", dict(vtg=1),
              32, 150, text="turns"),),
}
# The paper's rates, batches, epochs (noted); its Init comes with --base; what it leaves open is as in TOY.
PAPER = {
    stage: (replace(TOY[stage][0], trains=dict.fromkeys(TOY[stage][0].trains, lr), batch=batch, epochs=epochs,
                    steps=0, floor=0),)
    for stage, lr, batch, epochs in ((1, 1e-4, 256, 2), (2, 1e-4, 256, 2), (3, 2e-5, 64, 1))}

@dataclass(frozen=True)
class TrainConfig:
    """Every flag. None: the stage table's row, or what the comment says. FREE ones may change on resuming."""
    stage: Literal[0, 1, 2, 3]                      # 0 Init | 1 demonstrator | 2 guidance | 3 self-practice
    preset: Literal["toy", "small", "7b"] = "toy"   # all sizes; 7b is the paper's
    data: str = "out/toy"                           # a manifest (.jsonl), or the micro-world's folder
    root: str | None = None                         # where the manifest's paths start (its folder)
    base: str | None = None                         # untouched weights, a folder (stage0 beside --out)
    vision: str | None = None                       # a CLIP directory, where --base has no vision tower
    tokenizer: str | None = None                    # a tokenizer.model (the one beside the weights)
    init: str | None = None                         # checkpoint to start from (stage{N-1} beside --out)
    out: str | None = None                          # run folder (out/stage{N})
    steps: int | None = None                        # optimiser steps
    epochs: int | None = None                       # instead of steps
    batch: int | None = None                        # samples a step over all ranks
    micro_batch: int | None = None                  # samples a forward of one rank (batch / ranks)
    lr: float | None = None  # peak rate of the fastest part; the others keep their ratio
    seed: int = 0                                   # of new weights and of the order of samples
    dtype: Literal["bfloat16", "float32"] | None = None     # compute (bfloat16 on CUDA, else float32)
    optimizer: Literal["muon", "adamw"] | None = None       # of matrices (muon; adamw for 7b)
    save_every: int | None = None                   # steps; the last step is always saved
    keep: int = 2                                   # checkpoints kept
    val_every: int | None = None                    # steps between validation losses
    workers: int = 1                                # loader processes a rank
    fsdp: bool = False                              # FSDP2 instead of DDP: a rank holds its share of it all
    checkpoint_activations: bool = False            # computed again in backward: less memory, more work
    compile: bool = False                           # torch.compile of the blocks: a slow start, less memory
    timeout: int = 600                              # seconds until a silent rank ends the run
    max_bad: float = 0.01                           # share of samples that may be unreadable
    allow_outside: bool = False                     # manifest paths may leave their root
    overfit: bool = False                           # train on the first batch only
    no_eval: bool = False                           # skip the benchmark at the end
    no_kl: bool = False                             # the paper's ablation: no KL(exo || F(ego))
    no_cycle: bool = False                          # the paper's ablation: no cycle consistency, so no G
    forward_cycle_only: bool = False                # the paper's ablation: |G(F(x)) - x| alone
    no_mapping: bool = False                        # the paper's ablation: x alone, neither F nor G
    mapping: Literal["resnet", "mlp"] = "resnet"    # of which blocks F and G are; mlp is an ablation
    no_lora: bool = False                           # the paper's ablation: stage 3 without LoRA
    contrastive: float | None = None                # weight of InfoNCE between F(x) and y (0)
    shuffle_pairs: bool = False                     # our control: wrong exo partners
    kl_space: Literal["connector", "vit"] = "connector"     # where exo and F(ego) are compared
    kl_weight: float | None = None                  # instead of the stage table's
    ccl_weight: float | None = None                 # instead of the stage table's
    kl_temperature: float = 1.0                     # of the softmax over channels

FREE = {"out", "save_every", "keep", "val_every", "workers", "timeout", "micro_batch", "no_eval", "max_bad",
        "fsdp", "checkpoint_activations", "base", "init"}       # those two are known by their hashes
ZERO = {"stage", "seed", "workers", "max_bad", "contrastive", "kl_weight", "ccl_weight"}        # may be 0
STAGE_2 = {"no_kl", "no_cycle", "forward_cycle_only", "no_mapping", "mapping", "contrastive", "shuffle_pairs",
           "kl_space", "kl_weight", "ccl_weight", "kl_temperature"}     # would do nothing elsewhere

def parse(argv: list[str] | None = None) -> TrainConfig:
    """The command line: one flag a field; unknown, abbreviated and misspelt ones are refused by name."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, TrainConfig)
    cfg = TrainConfig(**vars(parser.parse_args(argv)))
    for name, value in vars(cfg).items():
        if type(value) in (int, float) and name not in ZERO and not value > 0:
            parser.error(f"--{name.replace('_', '-')} {value}: a number above 0 is needed")
        if name in STAGE_2 and cfg.stage != 2 and value != getattr(TrainConfig, name):
            parser.error(f"--{name.replace('_', '-')} is of stage 2, whose F and G stage 3 goes on with")
    if cfg.data.endswith(".jsonl") != Path(cfg.data).is_file():
        parser.error(f"--data {cfg.data}: a manifest is a file that ends in .jsonl, a micro-world a folder")
    out = Path(cfg.out or f"out/stage{cfg.stage}")
    return replace(cfg, out=str(out), base=cfg.base or str(out.parent / "stage0"),
                   init=cfg.init or str(out.parent / f"stage{max(cfg.stage - 1, 0)}"),
                   optimizer=cfg.optimizer or ("adamw" if cfg.preset == "7b" else "muon"))

def phases(cfg: TrainConfig) -> tuple[Phase, ...]:
    """The rows of this run: the table's, changed by the flags."""
    rows = (PAPER if cfg.preset == "7b" else TOY).get(cfg.stage)
    if rows is None:
        raise DataError("stage 0 is the micro-world's own: --preset 7b is of stages 1, 2 and 3")
    no_cycle = cfg.no_mapping or cfg.no_cycle
    gone = dict(F=cfg.no_mapping, G=no_cycle, ccl=no_cycle, kl=cfg.no_mapping or cfg.no_kl, lora=cfg.no_lora)
    given = dict(kl=cfg.kl_weight, ccl=cfg.ccl_weight, contrastive=cfg.contrastive) if cfg.stage == 2 else {}

    def change(row: Phase) -> Phase:
        trains = {part: lr for part, lr in row.trains.items() if not gone.get(part)}
        losses = row.losses | {name: weight for name, weight in given.items() if weight is not None}
        factor = cfg.lr / max(trains.values()) if cfg.lr else 1
        return replace(row, trains={part: lr * factor for part, lr in trains.items()},
                       losses={name: weight for name, weight in losses.items() if not gone.get(name)},
                       batch=cfg.batch or row.batch, epochs=cfg.epochs or row.epochs,
                       steps=0 if cfg.epochs else cfg.steps or row.steps)
    return tuple(map(change, rows))

# ------------------------------------------------------------------------------------------------ the losses
class Objective(nn.Module):
    """The losses of a phase. Each term is a sum over samples (or tokens) divided by the whole step's count,
    so that micro batches and ranks add up to the plain mean; DDP averages, hence the factor `world`."""
    def __init__(self, model: Exo2Ego, tokenizer: Tokenizer, phase: Phase, cfg: TrainConfig, world: int):
        super().__init__()
        self.model, self.tokenizer, self.phase, self.cfg, self.world = model, tokenizer, phase, cfg, world
        self.loss = nn.Module()                                 # what a loss needs and the model does not
        if "clip" in phase.losses:
            self.loss.words = nn.EmbeddingBag(model.cfg.vocab, 64, mode="sum")
            self.loss.image = nn.Linear(model.cfg.vit_width, 64)
            self.loss.log_scale = nn.Parameter(torch.tensor(14.0).log())
        if "ccl" in phase.losses:
            self.loss.register_buffer("std", torch.ones(model.cfg.patches_per_side, model.cfg.patches_per_side, model.cfg.vit_width))

    def forward(self, batch, supervised: float, samples: int) -> dict[str, Tensor]:
        """-> {"loss": the weighted sum, and each term} of one micro batch, as its share of the step."""
        token_share, sample_share = self.world / max(supervised, 1), self.world / samples
        terms = {"language": self.language, "clip": self.clip}.get(self.phase.name, self.see)(batch)
        if wrong := {*terms} ^ {*self.phase.losses} or {n for n, t in terms.items() if t.dim() != 1}:
            raise DataError(f"{wrong}: a loss is a weight in the stage table and a term of shape (samples,)")
        terms = {n: t.sum() * (token_share if n == "vtg" else sample_share) for n, t in terms.items()}
        return terms | {"loss": sum(self.phase.losses[name] * value for name, value in terms.items())}

    def vtg(self, visual: Tensor, batch) -> Tensor:
        """Vision-grounded text generation: next-token cross-entropy of each supervised token."""
        if not batch.lens:  # no row with text: a stand-in of weight 0, so that all ranks run the same blocks
            ids = torch.tensor([VIDEO] * visual.shape[1] + [1], device=batch.ids.device)
            batch = replace(batch, ids=ids, labels=ids.where(ids > 0, IGNORE), weights=ids * 0,
                            lens=[len(ids)], text_of=torch.zeros_like(ids[:1]))
        shown = visual[batch.text_of.to(visual.device)]
        logits, targets = self.model.text_logits(shown, batch.ids, batch.labels, batch.lens)
        weight = batch.weights[1:][batch.weights[1:] > 0].to(logits.device)   # 2: two exo views
        return F.cross_entropy(logits.float(), targets, reduction="none") * weight

    def see(self, batch) -> dict[str, Tensor]:
        """Init and stages 1 and 3 show one view and have one loss; stage 2 shows two and has them all."""
        model, losses = self.model, self.phase.losses
        if batch.ego is None:
            return {"vtg": self.vtg(model.encode_exo(batch.exo), batch)}
        x = model.patch_features(model.ego_vit, batch.ego)                            # (E, T, h, w, D): E moments
        if self.phase.view == "ego" or model.F is None:
            return {"vtg": self.vtg(model.ego_tokens(x), batch)}
        with torch.no_grad():                                               # the demonstrator is frozen
            y = model.patch_features(model.exo_vit, batch.exo)            # (X, T, h, w, D): their X exo views
        fx = model.F(x)
        estimate = model.exo_connector(fx)
        terms = {"vtg": self.vtg(torch.cat([model.ego_connector(x), estimate], dim=1), batch)}
        pair = batch.ego_of.to(x.device)                        # the moment that each exo view shows
        if "kl" in losses:
            terms["kl"] = self.kl(y, fx[pair], estimate[pair])
        if "ccl" in losses:
            terms["ccl"] = self.cycle(x.detach(), y, pair)
        if "contrastive" in losses:
            terms["contrastive"] = self.contrastive(y, fx[pair])
        return terms

    def kl(self, y: Tensor, fx: Tensor, estimate: Tensor) -> Tensor:
        """KL(exo || F(ego)) of each pair (X,), on the tokens that the decoder reads or on the patch grid."""
        if self.cfg.kl_space == "connector":
            with torch.no_grad():
                target = self.model.exo_connector(y)                        # (X, n, W)
        else:
            target, estimate = (rearrange(g, "b t h w d -> b (t h w) d") for g in (y, fx))
        return feature_kl(target, estimate, self.cfg.kl_temperature)

    def cycle(self, x: Tensor, y: Tensor, pair: Tensor) -> Tensor:
        """CCL(F, G) of each pair (X,): |G(F(x)) - x| + |F(G(y)) - y|, standardised by the demonstrator's
        statistics. x (of E moments) and y are data here, as in CycleGAN: only F and G learn from it."""
        def distance(a, b):
            return ((a - b) / self.loss.std).abs().flatten(1).mean(1)       # the mean cancels
        forward = distance(self.model.G(self.model.F(x)), x)[pair]
        backward = 0 if self.cfg.forward_cycle_only else distance(self.model.F(self.model.G(y)), y)
        return forward + backward

    def contrastive(self, y: Tensor, fx: Tensor, tau: float = 0.07) -> Tensor:
        """InfoNCE (X,) of pooled F(x) against the y of all ranks: it depends on the batch."""
        a, b = (F.normalize(g.float().mean((1, 2, 3)), dim=-1) for g in (fx, y))
        first = 0
        if self.world > 1:
            others = [torch.empty_like(b) for _ in range(self.world)]
            dist.all_gather(others, b)                          # y is frozen: no gradient goes back
            first, b = dist.get_rank() * len(b), torch.cat(others)
        return F.cross_entropy(a @ b.T / tau, first + torch.arange(len(a), device=a.device), reduction="none")

    @torch.no_grad()
    def measure(self, loader: Loader, samples: int = 256):
        """The cycle's constant, stored in the checkpoint: spread of exo features per patch and channel."""
        n, total, squares, samples = 0, 0, 0, min(samples, loader.samples)
        for i in range(0, samples, loader.micro):               # sums: 256 grids of 7b are 10 GB
            frames = loader.micro_batch(range(i, min(i + loader.micro, samples))).exo.to(self.loss.std.device)
            y = self.model.patch_features(self.model.exo_vit, frames).flatten(0, 1).cpu().double()    # (m T, h, w, D)
            n, total, squares = n + len(y), total + y.sum(0), squares + y.square().sum(0)
        self.loss.std.copy_(((squares - total ** 2 / n) / (n - 1)).clamp(min=1e-6).sqrt())

    def language(self, batch) -> dict[str, Tensor]:
        """Stage 0, instead of a download: the decoder learns to read scattered, noisy words before a text."""
        words = [self.tokenizer.encode(text) for text in batch.texts]
        mixture = scatter_words(words, self.model.cfg.visual_tokens, self.model.cfg.vocab)
        visual = mixture.to(batch.ids.device) @ self.model.decoder.embedding.weight         # (B, slots, W)
        return {"vtg": self.vtg(visual + 0.1 * torch.randn_like(visual), batch)}

    def clip(self, batch) -> dict[str, Tensor]:
        """Stage 0: CLIP's InfoNCE of frames and narrations; its text tower, a bag of words, is not kept."""
        grid = self.model.patch_features(self.model.exo_vit, batch.exo[:, ::2])  # every second frame: (B, T/2, h, w, D)
        image = self.loss.image(rearrange(grid, "b t h w d -> (b t) (h w) d").amax(1))
        words = [self.tokenizer.encode(text) for text in batch.texts]
        starts = torch.tensor([0] + [len(w) for w in words[:-1]], device=image.device).cumsum(0)
        text = self.loss.words(torch.tensor(sum(words, []), device=image.device), starts)
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        logits = self.loss.log_scale.exp() * image @ text.T                 # (B*T/2, B)
        same = torch.tensor([[float(a == b) for b in batch.texts] for a in batch.texts], device=image.device)
        right = same.repeat_interleave(grid.shape[1], 0)        # equal narrations are equally right
        both = sum((logits.log_softmax(d) * right / right.sum(d, keepdim=True)).sum(d).mean() for d in (0, 1))
        return {"clip": (-both / 2 * len(text))[None]}

# --------------------------------------------------------------------------------------- stage 0, our stand-in
def scatter_words(texts: list[list[int]], slots: int, vocab: int) -> Tensor:
    """How loud each word is in each slot that stands for a video (B, slots, vocab): the words of a text, each
    spread over few or many slots, among fainter words of another. What the toy decoder learns to read."""
    mixture = torch.zeros(len(texts), slots, vocab)
    for row, own, other in zip(mixture, texts, texts[-1:] + texts):
        loud = torch.cat([torch.empty(len(own)).uniform_(0.7, 1.3), torch.empty(len(other)).uniform_(0, 0.5)])
        focus = 10 ** torch.empty(len(loud), 1).uniform_(-1.5, 1)  # small: one slot; large: all of them
        spread = torch._standard_gamma(focus.expand(-1, slots)) + 1e-6      # (words, slots)
        spread = 0.35 * slots * loud[:, None] * spread / spread.sum(1, keepdim=True)
        row.index_add_(1, torch.tensor(own + other), spread.T.contiguous())
    return mixture


# -------------------------------------------------------------------------------------------- the optimisers
class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, scaled to AdamW's step: all directions of a matrix learn at one speed, or the
    connector never starts. torch's own works in bfloat16 (10-40x slower on a CPU), without convolutions."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(momentum, 0.95).flatten(1)).view_as(p)          # Nesterov
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.flatten(1).shape)))

def orthogonal(m: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps, Muon's coefficients."""
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if m.shape[0] > m.shape[1] else x

def make_optimizers(trained: dict[str, nn.Parameter], rates: dict[str, float], kind: str) -> list:
    """Muon for the matrices inside the network, AdamW for the rest (both ends, norms, biases, depthwise
    filters); kind "adamw": AdamW for all. `rates`: peak learning rate of each name."""
    groups = {True: {}, False: {}}
    for name, p in trained.items():
        ends = any(word in name for word in ("embedding", "position", "head", "loss."))
        matrix = kind == "muon" and not ends and p.ndim >= 2 and p.shape[1] > 1
        groups[matrix].setdefault(rates[name], []).append(p)
    muon, adamw = ([dict(params=ps, lr=lr, peak=lr) for lr, ps in by.items()] for by in groups.values())
    return ([Muon(muon, {})] if muon else []) + ([torch.optim.AdamW(
        adamw, betas=(0.9, 0.95), weight_decay=0, fused=True)] if adamw else [])

def schedule(step: int, steps: int, phase) -> float:
    """Share of the peak rate at a step: linear warm-up, then cosine down to `floor`."""
    warm = max(1, round(phase.warmup * steps))
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))
    return (step + 1) / warm if step < warm else phase.floor + (1 - phase.floor) * cosine


# ----------------------------------------------------------------------------------------------------- a run
@dataclass
class Run:
    """One process of a run: its flags and place, and what its checkpoints will record."""
    cfg: object                                                 # train.py: TrainConfig
    rank: int
    world: int
    device: torch.device
    bf16: bool
    attention: str = ""                                         # which backend, and why
    total: int = 0                                              # steps of all phases
    record: dict = field(default_factory=lambda: dict(base=None, base_hash=None, init=None))
    inherited: set = field(default_factory=set)                 # tensors that earlier stages trained
    stop: float = 0.0                                           # when a signal asked it to

    def sum(self, tensor: Tensor) -> list:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()


@contextlib.contextmanager
def listen(run: Run) -> Iterator[None]:
    """SIGTERM or Ctrl-C: the step under way ends, is saved, and the run exits. A second signal, more than a
    second later (launchers pass theirs on at once), ends it on the spot. torchrun kills 30 s after its own
    SIGTERM: where a step and a save take longer, rely on --save-every."""
    def asked(number, _):
        if run.stop and time.monotonic() - run.stop > 1:
            os._exit(128 + number)
        run.stop = run.stop or time.monotonic()
    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def part_of(name: str) -> str:
    """The part of the stage table that a parameter belongs to."""
    return "lora" if ".lora_" in name else name.removeprefix("model.").split(".")[0]

def set_trained(objective: Objective, phase: Phase, fresh: bool, bf16: bool) -> dict[str, nn.Parameter]:
    """Freeze everything but the phase's parts; returns what trains, by name. Trained weights are float32;
    frozen ones are kept as they are computed with, but in stage 0, where the next phase may train them."""
    for source, target in phase.copies if fresh else ():
        getattr(objective.model, target).load_state_dict(getattr(objective.model, source).state_dict())
    for name, p in objective.named_parameters():
        p.requires_grad_(part_of(name) in phase.trains)
        half = bf16 and not p.requires_grad and objective.cfg.stage > 0
        p.data = p.data.to(torch.bfloat16 if half else torch.float32)
    objective.train()  # LoRA's dropout is the only thing this switches
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}

def make_loader(run: Run, phase: Phase, model: Exo2Ego, tokenizer: Tokenizer, split: str | None = None):
    """The phase's samples, with visual tokens for [x ; F(x)] or one view; `split`: "val", in order."""
    cfg = run.cfg
    if split and (cfg.stage == 0 or cfg.data.endswith(".jsonl")):
        raise DataError("--val-every needs stage 1, 2 or 3 on the micro-world, which has a validation split")
    path = manifest_of(cfg.data, split or phase.split)
    rows = read_manifest(path, cfg.root, cfg.allow_outside)
    if cfg.shuffle_pairs and phase.view == "pair" and not split:
        rows = shuffle_pairs(rows, cfg.seed)
    files = [f for f in (path, path.with_suffix(".bad.jsonl")) if f.is_file() and f.stat().st_size]
    run.record.setdefault("manifest", "+".join(file_hash(f)[:16] for f in files))         # with its skip list
    return Loader(rows, model.cfg, tokenizer, view=phase.view, text=phase.text, batch=phase.batch,
                  micro=cfg.micro_batch, seed=cfg.seed, rank=run.rank, world=run.world, train=not split,
                  video_tokens=model.cfg.visual_tokens * (1 + (phase.view != "exo" and model.F is not None)))

def build(run: Run) -> tuple[Exo2Ego, Tokenizer | None]:
    """The model at the start of the stage: the previous stage's, or published weights, plus what it adds."""
    cfg, tokenizer, init = run.cfg, None, newest_checkpoint(run.cfg.init)
    recorded = init and newest_checkpoint(init.parent / (read_state(init)["base"] or ""))
    base = newest_checkpoint(cfg.base) or recorded
    torch.manual_seed(cfg.seed * 10 + cfg.stage)
    published = base is not None and (base / "config.json").is_file()
    new = {} if cfg.no_mapping or cfg.stage < 2 else {"mapping": cfg.mapping}
    lora = {"lora": True} if cfg.stage == 3 and not cfg.no_lora else {}
    if cfg.stage == 0:
        return Exo2Ego(PRESETS[cfg.preset]), Tokenizer(toy_tokenizer(cfg.data, toy_world(cfg.data)))
    else:
        first = cfg.stage == 1
        source, state = start_point(base if published and first else cfg.init, 0 if first else cfg.stage - 1)
        base = source if state["base"] is None else base
        added = new if cfg.stage == 2 else lora
        model, state = load_checkpoint(source, base, cfg.vision, **added)
        tokenizer = Tokenizer(cfg.tokenizer or source)
        if (pieces := tokenizer.size) > (vocab := model.cfg.vocab):
            raise DataError(f"{tokenizer.path}: {pieces} pieces, the decoder {vocab}: pass its --tokenizer")
        if not published and replace(model.cfg, mapping="none", lora=False) != PRESETS[cfg.preset]:
            raise DataError(f"{source} has other sizes than --preset {cfg.preset}: pass its own preset")
        run.record |= dict(init=fingerprint(source), base_hash=fingerprint(base),
                           vision=os.path.abspath(cfg.vision) if cfg.vision else state.get("vision"),
                           base=os.path.relpath(base if published else base.parent, cfg.out))
        earlier = load_delta(source) if state["base"] else {}
        run.inherited = {*earlier, *(n for n in model.state_dict() if part_of(n) in ("F", "G"))}
    if cfg.preset == "7b" and cfg.stage == 1:                   # never looked through: the memory is dear
        model.ego_vit = model.ego_connector = None
    return model, tokenizer

def shuffle_pairs(rows: list[dict], seed: int) -> list[dict]:
    """The control: every ego clip gets another row's exo clips (a cyclic shift in random order)."""
    order = np.random.default_rng(seed).permutation(len(rows))
    partner = dict(zip(order, np.roll(order, 1)))
    return [row | {"exo": rows[partner[i]]["exo"]} for i, row in enumerate(rows)]


# ----------------------------------------------------------------------------------- ranks, memory, precision
def start_process() -> tuple[int, int]:
    """Rank and world size, as torchrun tells. The process takes its share of the cores and its GPU."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    rank, world, local_world = (int(os.environ.get(key, default)) for key, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // local_world))
    if torch.cuda.is_available():
        torch.cuda.set_device(pick_device())
    return rank, world


def join_ranks(backend: str, seconds: float):
    """Join the other ranks, within `seconds`. torchrun keeps one store over its restarts, so a rank would
    find the addresses of the dead (pytorch#135712): on one machine each restart has names of its own. Many
    machines count apart: there start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."""
    alone = os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    dist.init_process_group(backend, store=dist.PrefixStore(attempt, store), rank=rank, world_size=world,
                            timeout=timedelta(seconds=seconds))


def agree(check):
    """Call a check that returns a problem or None, first in local rank 0 (it fills the caches of compiled
    kernels), then in the others; returns the first problem of any rank."""
    if not dist.is_initialized():
        return check()
    problems = [None] * dist.get_world_size()
    early = os.environ.get("LOCAL_RANK", "0") == "0"
    own = check() if early else None
    dist.barrier()
    dist.all_gather_object(problems, own if early else check())
    return next(filter(None, problems), None)


def keep_heap():
    """glibc returns what a step freed to the kernel, which clears every page again in the next: 7-12 %."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):           # Linux
        libc.mallopt(-4, 0)                                     # M_MMAP_MAX: no tensor is its own mapping
        libc.mallopt(-1, -1)                                    # M_TRIM_THRESHOLD: the heap never shrinks


def compiled(block):
    """torch.compile of a block that trains, or that gradients pass; elsewhere, as it is: scores have other
    shapes. A decoder block's tokens change in number from step to step. Attention is fused by hand."""
    if hasattr(block, "attention"):
        block.attention = torch.compiler.disable(attention)
    plain, fast = block.forward, torch.compile(block.forward, dynamic=isinstance(block, DecoderBlock))
    return lambda *args: (fast if torch.is_grad_enabled() else plain)(*args)


# What a block's forward keeps for its backward, unless the whole block is computed again: products and fused
# attention. The rest (norms, activations, gates) costs little and is computed again.
aten = torch.ops.aten


KEPT = (aten.mm.default, aten.addmm.default, aten.convolution.default, torch.ops.exo2ego.flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default)


def wrap(run, objective):
    """The objective as the ranks share it: blocks compiled, checkpointed; then DDP, or FSDP2 by block."""
    blocks = [m for m in objective.modules() if isinstance(m, BLOCKS)]
    for block in blocks:
        block.__dict__.pop("forward", None)                     # of an earlier phase
        if run.cfg.compile:                                     # the compiler decides by itself what it keeps
            block.forward = compiled(block)
        if run.cfg.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        elif not run.cfg.compile:
            keep = partial(create_selective_checkpoint_contexts, list(KEPT))
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=keep)
    if run.cfg.fsdp and (run.cfg.optimizer == "muon" or run.cfg.stage == 0):
        raise DataError("--fsdp needs --optimizer adamw (Muon wants whole matrices) and stage 1, 2 or 3")
    if run.cfg.fsdp:
        for block in blocks + [objective]:
            fully_shard(block)
        return objective
    if run.world > 1:
        return DistributedDataParallel(objective, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return objective


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded over the ranks, in one piece, on each of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --------------------------------------------------------------------------------------- saving and resuming
def moments_of(optimizers: list) -> dict[str, Tensor]:
    """The optimisers' state by name, in one piece; every rank must call it."""
    return {f"{i}.{j}.{key}": whole(value.detach()).contiguous().cpu()
            for i, optimizer in enumerate(optimizers)
            for j, values in optimizer.state_dict()["state"].items() for key, value in values.items()}


def save_checkpoint(run: Run, objective, optimizers: list, step: int, trained: dict, skipped: int):
    """What differs from the base (in stage 0 everything), and what resuming exactly needs, in step_000200/.
    Written under a temporary name, synced, renamed: a killed save never looks finished."""
    cfg, rng = run.cfg, [random_state(run.device).to(run.device) for _ in range(run.world)]
    if run.world > 1:
        dist.all_gather(rng, rng[0].clone())
    if run.rank and not cfg.fsdp:                               # DDP's ranks are alike; shards meet
        return
    keep = run.inherited | {n.removeprefix("model.") for n in trained}
    named = {n.removeprefix("model."): t for n, t in objective.state_dict().items()}
    tensors = {n: whole(t).contiguous().cpu() for n, t in named.items()
               if cfg.stage == 0 or n.startswith("loss.") or n in keep}
    moments = moments_of(optimizers)
    if run.rank:
        return
    folder = Path(cfg.out) / f"step_{step:06d}"
    part = folder.with_name(f"part_{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(tensors, part / "model.safetensors")
    save_file(moments | {f"rng.{rank}": s.cpu() for rank, s in enumerate(rng)}, part / "optim.safetensors")
    shutil.copyfile(objective.tokenizer.path, part / "tokenizer.model")
    state = dict(stage=cfg.stage, step=step, steps=run.total, model=asdict(objective.model.cfg),
                 config=asdict(cfg), skipped=skipped, bf16=run.bf16, git=git_revision(),
                 sha256={f.name: file_hash(f) for f in sorted(part.glob("*.safetensors"))}) | run.record
    (part / "state.json").write_text(json.dumps(state, indent=1))
    if step == run.total:
        (part / "README.md").write_text(model_card(state, len(tensors)))
    for file in part.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)
    for old in sorted(folder.parent.glob("step_[0-9]*"))[:-cfg.keep]:
        shutil.rmtree(old)


def model_card(state: dict, tensors: int) -> str:
    """What a finished checkpoint is, in words: for whoever finds the folder."""
    config = state["config"]
    return f"""# Exo2Ego (arXiv 2503.09143), stage {state["stage"]}, preset {config["preset"]}

An independent reimplementation's checkpoint: {state["step"]} steps on `{config["data"]}` (manifest
{state.get("manifest")}), seed {config["seed"]}, code revision {state["git"]}. `model.safetensors` holds the
{tensors} tensors that differ from its base, `{state["base"] or "none"}`; settings are in `state.json`.

    from model import load_checkpoint
    model, tokenizer, state = load_checkpoint("this folder", base="where the base is")

Intended for research on first-person video. It inherits the licence of its base (CLIP, Mistral, VideoLLaMA2
weights are under their publishers' terms) and the terms of the videos it saw (Ego4D and Ego-Exo4D: signed
agreement; the micro-world: none). Not tested for safety, bias or accuracy beyond `eval.json` beside it.
"""


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
    moments = load_delta(folder, "optim.safetensors")
    for i, optimizer in enumerate(optimizers):
        values, places = {}, [p for group in optimizer.param_groups for p in group["params"]]
        for name in (n for n in moments if n.startswith(f"{i}.")):
            _, j, key = name.split(".")
            p, value = places[int(j)], moments[name]
            if isinstance(p, DTensor) and value.shape == p.shape:
                value = distribute_tensor(value.to(device), p.device_mesh, p.placements)
            values.setdefault(int(j), {})[key] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": values})
    if f"rng.{rank}" in moments:
        set_random_state(moments[f"rng.{rank}"], device)


def resume_point(out: str, config: dict, record: dict) -> Path | None:
    """The newest finished checkpoint of this very run, or None; another run's folder is refused by field."""
    folder = newest_checkpoint(out)
    state = read_state(folder) if folder else {}
    if folder and os.environ.get("RANK", "0") == "0" and state["git"] != (now := git_revision()):
        print(f"{folder} was made by code {state['git']}, {now} goes on with it")
    was = state.get("config", {}) | {key: state.get(key) for key in record}
    for key, value in (config | record).items():
        if folder and was.get(key) != value and key != "base":  # that may move: base_hash tells it
            raise DataError(f"{out} holds a run with {key}={was.get(key)}, this one has {value}: choose "
                             f"another --out or remove the folder")
    return folder


def start_point(init: str, stage: int) -> tuple[Path, dict]:
    """The last checkpoint of the finished run `init` of this stage, and its state; all else is refused."""
    folder = newest_checkpoint(init)
    if folder is None:
        raise DataError(f"--init {init}: no checkpoint there; torchrun train.py --stage {stage} --out {init}")
    state = read_state(folder)
    if state["stage"] != stage or state["step"] < state["steps"]:
        raise DataError(f"--init {init} is of stage {state['stage']} at step {state['step']} of "
                        f"{state['steps']}; stage {stage + 1} starts from a finished stage {stage}")
    return folder, state


# ---------------------------------------------------------------------------------- the log, and what is shown
def lock_of(out: str, rank: int) -> Path:
    """The lock file that a rank holds in its run folder; its time is the rank's last sign of life."""
    return Path(out) / (f".lock{rank}" if rank else ".lock")


def explain(error: Exception, out: str, rank: int, world: int) -> str:
    """The sentence of an error that a user can mend; of a time-out it names the rank, other than this, that
    was silent for longest. What else goes wrong is raised again."""
    text = (str(error) or repr(error)).splitlines()[0][:300]
    if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, FileNotFoundError):
        return f"{getattr(error, 'filename', None) or out} cannot be written or read: {text}"
    if isinstance(error, DataError):
        return str(error)
    if not isinstance(error, RuntimeError):                     # perhaps a bug: then where it is helps
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{error} ({Path(at.filename).name}:{at.lineno})" if at.name != "_or_raise" else str(error)
    if "DataLoader" in text:
        return f"a loader worker died or hangs; the same command goes on from the last checkpoint ({text})"
    if world == 1 or not re.search("timed out|timeout|connection (closed|reset)", text, re.IGNORECASE):
        raise error
    locks = {other: lock_of(out, other) for other in range(world) if other != rank}
    last = {other: lock.stat().st_mtime if lock.is_file() else 0 for other, lock in locks.items()}
    late = min(last, key=last.get)
    heard = f"last heard of {time.time() - last[late]:.0f} s ago" if last[late] else "never heard of"
    return f"the ranks waited in vain for rank {late}, {heard} (--timeout); {text}"


class Log:
    """log.jsonl, one object a step, cut back to the step that a run resumes from; and the progress line."""
    def __init__(self, path: Path | None, step: int, skipped: int = 0):
        """`path` None: a rank that keeps no log."""
        self.file, self.skipped, kept = None, skipped, []
        if path is None:
            return
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                kept += [line + "\n"] if json.loads(line)["step"] <= step else []
            except ValueError:
                break                                           # the line that a kill cut short
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept))
        self.file = open(path, "a", buffering=1)

    def write(self, row: dict, text: str = ""):
        """One object to the file, one line to the screen."""
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            print(text, end="\n" if text else "", flush=True)

    def skip(self, batches: list[Batch], number: int, seen: int, max_bad: float):
        """Name this rank's unreadable samples, count all ranks' `number`; too many of `seen` end the run."""
        for reason in (reason for batch in batches for reason in batch.skipped):
            print(f"skipped {reason}", flush=True)
        self.skipped += number
        if self.skipped > max_bad * max(seen, 500):
            raise DataError(f"{self.skipped} of {seen} samples could not be read, more than --max-bad "
                            f"{max_bad}; the lines above name them, python data.py check all of them")

    def start(self, done: int):
        """A phase begins, of which `done` steps are over already, with what they skipped."""
        self.skipped *= done > 0
        self.began = self.clock = time.monotonic()
        self.first = done

    def step(self, done: int, length: int, samples: int, tokens: int, losses: dict, row: dict):
        """The `done`-th step of the phase is over."""
        took, self.clock = time.monotonic() - self.clock, time.monotonic()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 ** (sys.platform != "darwin")
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        each, text = (time.monotonic() - self.began) / (done - self.first), ""
        if done % 10 == 0 or done == length:
            text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            text = (f"step {done}/{length} | {text} | {each:.3f} s/step | {samples / each:.0f} clips/s | "
                    f"ETA {(length - done) * each:.0f} s")
        self.write(row | losses | dict(skipped=self.skipped, seconds=took, clips_per_second=samples / took,
                                       tokens_per_second=tokens / took, max_memory_bytes=memory), text)


def describe(run, phase, objective, loader: Loader, length: int):
    """Before the first step of a phase: the arithmetic, what trains, and what the model is fed."""
    print(f"\n== stage {run.cfg.stage}: {phase.name} == {length} steps x {phase.batch} of {loader.samples} "
          f"samples ({phase.batch // loader.micro} micro batches x {loader.micro} on {run.world} ranks)")
    own = [("loss", objective.loss)] * bool([*objective.loss.parameters()])
    for name, module in [*objective.model.named_children(), *own]:
        on, off = (sum(p.numel() for p in module.parameters() if p.requires_grad == g) for g in (True, False))
        print(f"   {name:14} {on:>10,} trained {off:>10,} frozen")
    print(f"   losses {phase.losses}, rates {phase.trains}, {run.cfg.optimizer}, {run.device}, "
          f"{'bfloat16' if run.bf16 else 'float32'}, {torch.get_num_threads()} threads; {run.attention}")
    print("   " + show_prompt(loader.batch(0)[0], objective.tokenizer), flush=True)


def show_prompt(batch: Batch, tokenizer: Tokenizer) -> str:
    """What the model is fed: shapes, and the first text with its [supervised] tokens in brackets."""
    shapes = [f"{k} {tuple(v.shape)}" for k, v in (("ego", batch.ego), ("exo", batch.exo)) if v is not None]
    text, n = "", batch.lens[0] if batch.lens else 0
    ids, labels = batch.ids[:n].tolist(), batch.labels[:n].tolist()
    for i, (token, label) in enumerate(zip(ids, labels)):
        if token != VIDEO:
            piece = tokenizer.sp.id_to_piece(token)
            text += piece if label == IGNORE else f"[{piece}]"
        elif ids[i - 1] != VIDEO:
            text += f"<video: {ids.count(VIDEO)} tokens>"
    return f"fed: {', '.join(shapes + [f'{len(batch.ids)} tokens'])}; first sample {batch.names[0]}: {text}"


@torch.no_grad()
def validate(run, objective, loader: Loader, step: int, log: Log, batches: int = 8):
    """Narration loss per token on the first validation clips, shared by the ranks."""
    sums = torch.zeros(2, device=run.device)
    objective.eval()
    whole_ones = loader.samples // loader.batch_size if run.world > 1 else batches      # ranks in step
    for batch in (b.to(run.device) for i in range(min(batches, whole_ones)) for b in loader.batch(i)):
        with autocast(run.device, run.bf16):
            vtg = objective(batch, run.world, run.world)["vtg"]             # a plain sum: both counts cancel
        sums += torch.stack([vtg, batch.weights.sum()])
    objective.train()
    total, tokens = run.sum(sums)
    loss = total / tokens if tokens else math.nan
    log.write(dict(step=step, val_loss=loss), f"step {step} | val_loss {loss:.4f}")


# ---------------------------------------------------------------------------------------------------- the loop
def train(cfg: TrainConfig, rank: int = 0, world: int = 1):
    """Run a stage to its end, then score it."""
    bf16 = cfg.dtype == "bfloat16" or cfg.dtype is None and torch.cuda.is_available()
    run, rows = Run(cfg, rank, world, pick_device(), bf16), phases(cfg)
    model, tokenizer = build(run)
    run.attention = choose_attention(run.device, torch.bfloat16 if bf16 else torch.float32, model.cfg, agree)
    loaders = [make_loader(run, row, model, tokenizer) for row in rows]
    lengths = [row.steps or max(1, row.epochs * ld.samples // row.batch) for row, ld in zip(rows, loaders)]
    run.total, start = sum(lengths), 0
    folder = resume_point(cfg.out, {k: v for k, v in asdict(cfg).items() if k not in FREE}, run.record)
    done, skipped = (read_state(folder)[key] if folder else 0 for key in ("step", "skipped"))
    if done == run.total:
        print(f"{folder} is finished: nothing to train")
    log = Log(Path(cfg.out) / "log.jsonl" if rank == 0 else None, done, skipped)
    for row, loader, length in zip(rows, loaders, lengths):
        if done < start + length:
            with listen(run):
                run_phase(run, model, tokenizer, row, loader, start, length, folder, log)
            folder = None
        start += length
    wanted = rank == 0 and not cfg.no_eval and Path(cfg.data).suffix != ".jsonl"
    if wanted and (done < run.total or not (Path(cfg.out) / "eval.json").is_file()):
        if cfg.fsdp or done == run.total:                       # whole again, for one process
            model = load_checkpoint(cfg.out, vision=cfg.vision)[0]
        with autocast(run.device, bf16):
            toy_benchmark(to_device_and_dtype(model, run.device, bf16), tokenizer, cfg.data, cfg.stage, cfg.out, cfg.init)

def run_phase(run: Run, model: Exo2Ego, tokenizer: Tokenizer, phase: Phase, loader: Loader, start: int,
              length: int, folder: Path | None, log):
    """The training loop: steps `start` to `start + length` of the run, or what `folder` left of them."""
    cfg, world = run.cfg, run.world
    torch.manual_seed(hash((cfg.seed, start, run.rank)) % 2 ** 31)
    objective = Objective(model, tokenizer, phase, cfg, world).to(run.device)
    step = max(start, read_state(folder)["step"]) if folder else start
    if folder:                                                  # assigned: the base may be half precision
        own = {n: t.to(run.device, copy=True) for n, t in load_delta(folder).items()}
        saved = own | {f"model.{n}": t for n, t in own.items()}
        objective.load_state_dict(saved, strict=False, assign=True)
    trained = set_trained(objective, phase, step == start, run.bf16)
    if "ccl" in phase.losses and step == start:
        with autocast(run.device, run.bf16):
            objective.measure(loader)
    wrapped = wrap(run, objective)
    trained = {n: p for n, p in objective.named_parameters() if n in trained}           # FSDP made new ones
    optimizers = make_optimizers(trained, {n: phase.trains[part_of(n)] for n in trained}, cfg.optimizer)
    if run.rank == 0:
        describe(run, phase, objective, loader, length)
    val = make_loader(run, phase, model, tokenizer, "val") if cfg.val_every else None
    batches = loader.stream(step - start, length, cfg.workers, cfg.overfit, cfg.timeout)
    if step > start:                                            # last: a new DataLoader draws a random number
        load_optimizers(folder, optimizers, run.rank, run.device)
    log.start(step - start)
    for step in range(step, start + length):
        share = schedule(step - start, length, phase)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * share
        micro = [batch.to(run.device) for batch in next(batches)]
        counts = torch.tensor([[b.weights.sum(), b.samples, len(b.skipped), len(b.ids), run.stop > 0]
                               for b in micro]).sum(0)
        lock_of(cfg.out, run.rank).touch()                      # a rank that hangs is known by its silence
        supervised, samples, skipped, tokens, stop = run.sum(counts.to(run.device))     # over the whole step
        sums = {}
        for i, batch in enumerate(micro):
            meet = i == len(micro) - 1                          # set before the forward: one meeting a step
            if cfg.fsdp:
                wrapped.set_requires_gradient_sync(meet)
            elif world > 1:
                wrapped.require_backward_grad_sync = meet
            with autocast(run.device, run.bf16):
                terms = wrapped(batch, supervised, samples)
                torch.autograd.backward(terms["loss"])           # Tensor.backward would leave `precision`
            sums = {name: sums.get(name, 0) + value.detach() for name, value in terms.items()}
        norm = float(whole(nn.utils.clip_grad_norm_(trained.values(), 1.0)))
        losses = dict(zip(sums, (total / world for total in run.sum(torch.stack(list(sums.values()))))))
        if not math.isfinite(losses["loss"] + norm):
            raise DataError(f"step {step + 1}: loss {losses['loss']}, norm {norm} {[b.names for b in micro]}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log.skip(micro, int(skipped), (step + 1 - start) * phase.batch, cfg.max_bad)
        log.step(step + 1 - start, length, samples, tokens, losses, dict(
            step=step + 1, steps=run.total, lr=share * max(phase.trains.values()), grad_norm=norm))
        if val and (step + 1) % cfg.val_every == 0:
            validate(run, objective, val, step + 1, log)
        if step + 1 == start + length or stop or cfg.save_every and (step + 1) % cfg.save_every == 0:
            save_checkpoint(run, objective, optimizers, step + 1, trained, log.skipped)
        if stop:
            sys.exit(f"stopped at step {step + 1}, saved: the same command goes on")

def prepare(cfg: TrainConfig):
    """Make a missing stage 0, by whichever process gets the lock first; the others wait and find it done."""
    def missing():
        newest = newest_checkpoint(cfg.base)
        return newest is None or read_state(newest)["step"] < read_state(newest)["steps"]
    if (cfg.stage == 0 or cfg.preset == "7b" or Path(cfg.data).suffix == ".jsonl"
            or cfg.stage == 1 and cfg.init != cfg.base or not missing()):
        return
    with file_lock(lock_of(cfg.base, 0), wait=True):
        if missing():
            if cfg.stage > 1:
                start_point(cfg.init, cfg.stage - 1)            # minutes before it would be missed
            train(parse(["--stage", "0", "--preset", cfg.preset, "--data", cfg.data, "--seed", str(cfg.seed),
                         "--out", cfg.base, "--workers", str(cfg.workers)]))

def main(argv: list[str] | None = None):
    cfg, (rank, world) = parse(argv), start_process()
    if cfg.preset != "7b":                                      # there, holes in the heap cost gigabytes
        keep_heap()
    try:
        prepare(cfg)
        with file_lock(lock_of(cfg.out, rank), wait=False):     # a sign of life, before the ranks meet
            if world > 1:
                join_ranks("nccl" if torch.cuda.is_available() else "gloo", cfg.timeout)
            train(cfg if world > 1 else replace(cfg, fsdp=False), rank, world)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        print(f"train.py: {explain(error, cfg.out, rank, world)}", file=sys.stderr, flush=True)
        os._exit(2) if world > 1 else sys.exit(2)  # the others must not wait for a rank that gave up
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
