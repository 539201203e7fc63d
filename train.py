"""Train Exo2Ego, stage by stage. The table below is the paper's method; one loop runs every row of it.

    torchrun train.py --stage 1                          # makes the micro-world and stage 0 first if they are missing
    torchrun --nproc_per_node 2 train.py --stage 2       # any number of processes: the same result
    torchrun train.py --stage 3

The same command again resumes, bit for bit. Every step is one object in out/stageN/log.jsonl.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eval as evaluation
from data import (IGNORE, VIDEO, Batch, DataError, Loader, die_with_parent, file_lock, read_manifest, toy_split,
                  toy_tokenizer, toy_world)
from model import (PRESETS, Exo2Ego, ModelConfig, Tokenizer, checkpoint_tensors, feature_kl, fingerprint,
                   load_strict, newest_checkpoint, read_state)


# -------------------------------------------------------------------------------------------- the stage table
@dataclass(frozen=True)
class Phase:
    """One row: what trains (part -> peak learning rate; every other part is frozen), on what, towards what."""
    name: str
    trains: dict[str, float]
    split: str                          # of the micro-world; --data replaces it
    view: str                           # exo | ego | pair: what a sample shows
    losses: dict[str, float]            # weight of each term
    batch: int                          # samples a step over all ranks
    steps: int = 0                      # the micro-world's; 0: epochs decide
    epochs: int = 1
    warmup: float = 0.03                # share of the steps, then cosine to `floor`
    floor: float = 0.05                 # share of the peak at the end (our choice; toy only)
    text: str = "text"                  # what is supervised: the narration, or the turns
    copies: tuple[tuple[str, str], ...] = ()        # parts that start as a copy: (from, to)


# The micro-world: rates, steps and weights are our choice, found by trial on its validation split. Muon's scale.
TOY = {
    0: (Phase("language", dict(decoder=3e-3), "corpus", "text", dict(vtg=1), 64, 110, warmup=0.08, text="mix"),
        Phase("clip", dict(exo_vit=1.5e-2, loss=1.5e-2), "corpus", "exo", dict(clip=1), 48, 150, warmup=0.08),
        Phase("init exo", dict(exo_vit=3e-3, exo_connector=1e-2), "corpus", "exo", dict(vtg=1), 48, 80, warmup=0.08),
        Phase("init ego", dict(ego_vit=3e-3, ego_connector=1e-3), "ego", "ego", dict(vtg=1), 32, 80, warmup=0.08,
              copies=(("exo_vit", "ego_vit"), ("exo_connector", "ego_connector")))),
    1: (Phase("demonstrator self-preparation", dict(exo_vit=3e-3, exo_connector=3e-3), "pairs", "exo", dict(vtg=1),
              32, 120),),
    2: (Phase("demonstrator-learner guidance", dict(ego_vit=1e-3, ego_connector=1e-3, F=3e-3, G=3e-3), "pairs", "pair",
              dict(vtg=1, kl=3, ccl=0.1), 32, 240),),
    3: (Phase("learner self-practice", dict(ego_vit=3e-4, F=3e-4, lora=3e-3), "instruct", "ego", dict(vtg=1), 32, 150,
              text="turns"),),
}
# The paper's table (batch, rate, warm-up, epochs: noted). Init is given by --base or trained from the two corpora;
# whether a connector trains with its ViT, and the weights of kl and ccl, are open: our choice, as in the micro-world.
PAPER = {
    1: (Phase("demonstrator self-preparation", dict(exo_vit=1e-4, exo_connector=1e-4), "", "exo", dict(vtg=1), 256,
              epochs=2, floor=0.0),),
    2: (Phase("demonstrator-learner guidance", dict(ego_vit=1e-4, ego_connector=1e-4, F=1e-4, G=1e-4), "", "pair",
              dict(vtg=1, kl=3, ccl=0.1), 256, epochs=2, floor=0.0),),
    3: (Phase("learner self-practice", dict(ego_vit=2e-5, F=2e-5, lora=2e-5), "", "ego", dict(vtg=1), 64, epochs=1,
              floor=0.0, text="turns"),),
}


@dataclass(frozen=True)
class TrainConfig:
    """Every flag. Optional ones default to the stage table's row."""
    stage: int = -1                     # 0 Init | 1 demonstrator | 2 guidance | 3 self-practice
    preset: str = "toy"                 # toy | small | 7b
    data: str = "out/toy"               # a manifest (.jsonl), or the micro-world's folder
    root: str | None = None             # where the manifest's paths start (its folder)
    base: str | None = None             # untouched weights and tokenizer (out/stage0 beside --out)
    init: str | None = None             # checkpoint to start from (out/stage{N-1})
    out: str | None = None              # run folder (out/stage{N})
    steps: int | None = None            # optimiser steps (the table's)
    epochs: int | None = None           # instead of steps
    batch: int | None = None            # samples a step over all ranks: results do not depend on the number of ranks
    micro_batch: int | None = None      # samples a forward of one rank (batch / ranks)
    lr: float | None = None             # peak rate of the fastest part; the others keep their ratio
    seed: int = 0
    dtype: str | None = None            # float32 | bfloat16 (bfloat16 on CUDA, else float32)
    optimizer: str | None = None        # muon (toy, small) | adamw (7b)
    save_every: int | None = None       # steps; the last step is always saved
    keep: int = 2                       # checkpoints kept
    val_every: int | None = None        # steps between validation losses
    workers: int = 1                    # loader processes a rank
    timeout: int = 600                  # seconds until a silent rank ends the run
    max_bad: float = 0.01               # share of samples that may be unreadable
    allow_outside: bool = False         # manifest paths may leave their root
    overfit: bool = False               # train on the first batch only
    no_eval: bool = False               # skip the benchmark at the end
    no_kl: bool = False                 # the paper's ablations ...
    no_cycle: bool = False              # (no G either)
    forward_cycle_only: bool = False
    no_mapping: bool = False            # x alone: no F, no G, no losses on them
    mapping: str = "resnet"             # resnet | mlp
    no_lora: bool = False
    contrastive: float = 0.0            # ... our controls and the open points: weight of InfoNCE between F(x) and y
    shuffle_pairs: bool = False         # wrong exo partners: a fixed derangement
    kl_space: str = "connector"         # connector | vit: where exo and F(ego) are compared
    kl_weight: float | None = None
    ccl_weight: float | None = None
    kl_temperature: float = 1.0

    # Flags that may change between a run and its resumption: they do not change the result.
    FREE = ("out", "save_every", "keep", "val_every", "workers", "timeout", "micro_batch", "no_eval", "max_bad")


def parse(argv: list[str] | None = None) -> TrainConfig:
    """The command line: one flag a field; unknown and abbreviated ones are refused."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(TrainConfig):
        flag = "--" + f.name.replace("_", "-")
        if f.type == "bool":
            parser.add_argument(flag, action="store_true")
        else:
            kind = {"int": int, "float": float, "str": str}[f.type.split(" ")[0]]
            parser.add_argument(flag, type=kind, default=f.default, metavar=kind.__name__.upper())
    cfg = TrainConfig(**vars(parser.parse_args(argv)))
    choices = dict(stage=(0, 1, 2, 3), preset=tuple(PRESETS), optimizer=(None, "muon", "adamw"),
                   mapping=("resnet", "mlp"), kl_space=("connector", "vit"), dtype=(None, "float32", "bfloat16"))
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            parser.error(f"--{name.replace('_', '-')} must be one of {', '.join(str(a) for a in allowed if a is not None)}"
                         f", got {getattr(cfg, name)}")
    out = cfg.out or f"out/stage{cfg.stage}"
    side = Path(out).parent
    return replace(cfg, out=out, base=cfg.base or str(side / "stage0"),
                   init=cfg.init or (str(side / f"stage{cfg.stage - 1}") if cfg.stage else None),
                   optimizer=cfg.optimizer or ("adamw" if cfg.preset == "7b" else "muon"))


def phases(cfg: TrainConfig) -> tuple[Phase, ...]:
    """The rows of this run: the table's, changed by the flags."""
    table = PAPER if cfg.preset == "7b" else TOY
    if cfg.stage not in table:
        raise DataError(f"--stage {cfg.stage} --preset {cfg.preset}: this stage is not trained here, pass --base")
    rows = []
    for row in table[cfg.stage]:
        trains, losses = dict(row.trains), dict(row.losses)
        if cfg.stage == 2:
            off = [name for name, flag in (("kl", cfg.no_kl), ("ccl", cfg.no_cycle)) if flag or cfg.no_mapping]
            losses = {name: weight for name, weight in losses.items() if name not in off}
            given = dict(kl=cfg.kl_weight, ccl=cfg.ccl_weight, contrastive=cfg.contrastive or None)
            losses.update({n: w for n, w in given.items() if w is not None and n not in off})
        gone = ("F", "G") if cfg.no_mapping else ("G",) if "ccl" not in losses else ()
        trains = {p: lr for p, lr in trains.items() if p not in gone + (("lora",) if cfg.no_lora else ())}
        factor = cfg.lr / max(trains.values()) if cfg.lr else 1.0
        rows.append(replace(row, trains={p: lr * factor for p, lr in trains.items()}, losses=losses,
                            batch=cfg.batch or row.batch, steps=0 if cfg.epochs else cfg.steps or row.steps,
                            epochs=cfg.epochs or row.epochs))
    return tuple(rows)


# ----------------------------------------------------------------------------------------------- the losses
class Objective(nn.Module):
    """The losses of a phase. Each term is a sum over samples (or tokens) divided by the whole step's count, so that
    micro batches and ranks add up to the plain mean: DDP averages, hence the factor `world`."""

    def __init__(self, model: Exo2Ego, tokenizer: Tokenizer, phase: Phase, cfg: TrainConfig, world: int):
        super().__init__()
        self.model, self.tokenizer, self.phase, self.cfg, self.world = model, tokenizer, phase, cfg, world
        self.loss = nn.Module()                                 # what a loss needs and the model does not
        if "clip" in phase.losses:
            self.loss.words = nn.EmbeddingBag(model.cfg.vocab, 64, mode="sum")
            self.loss.image = nn.Linear(model.cfg.vit_width, 64)
            self.loss.log_scale = nn.Parameter(torch.tensor(14.0).log())
        if "ccl" in phase.losses:
            shape = (model.cfg.grid, model.cfg.grid, model.cfg.vit_width)
            self.loss.register_buffer("mean", torch.zeros(shape))
            self.loss.register_buffer("std", torch.ones(shape))

    def forward(self, batch: Batch, supervised: int, samples: int) -> dict[str, Tensor]:
        """-> {"loss": weighted sum, and each term}, of one micro batch."""
        self.token_share, self.sample_share = self.world / max(supervised, 1), self.world / samples
        terms = {"language": self.language, "clip": self.clip}.get(self.phase.name, self.see)(batch)
        loss = sum(self.phase.losses[name] * value for name, value in terms.items())
        return terms | {"loss": loss + self.touch(loss)}

    def touch(self, loss):
        """0 x every trained weight: DDP waits for a gradient of each, also where a batch has no text."""
        return sum(p.flatten()[0] * 0.0 for p in self.parameters() if p.requires_grad)

    def vtg(self, visual: Tensor | None, batch: Batch) -> Tensor:
        """Vision-grounded text generation: next-token cross-entropy on the supervised tokens."""
        with_text = [i for i, n in enumerate(batch.lens) if n]
        if not with_text:
            return self.touch(None)
        if visual is not None and len(with_text) < len(batch.lens):
            visual = visual[with_text]
        lens = [batch.lens[i] for i in with_text]
        logits, targets = self.model.text_logits(visual, batch.ids, batch.labels, lens)
        owner = torch.repeat_interleave(torch.tensor(with_text), torch.tensor(lens)).to(batch.ids.device)[1:]
        weight = batch.repeats[owner[batch.labels[1:] != IGNORE]]           # a row with two exo views counts twice
        return (F.cross_entropy(logits.float(), targets, reduction="none") * weight).sum() * self.token_share

    def see(self, batch: Batch) -> dict[str, Tensor]:
        """Stages 1 and 3 and Init: one view, one loss. Stage 2: two views."""
        model, terms = self.model, {}
        if batch.ego is None:
            return {"vtg": self.vtg(model.encode_exo(batch.exo), batch)}
        x = model.grid(model.ego_vit, batch.ego)                            # (E, T, h, w, D)
        if self.phase.view == "ego" or self.cfg.no_mapping:
            return {"vtg": self.vtg(model.read_ego(x), batch)}
        with torch.no_grad():                                               # the demonstrator is frozen
            y = model.grid(model.exo_vit, batch.exo)                        # (X, T, h, w, D), X views of E moments
        fx = model.F(x)
        estimate = model.exo_connector(fx)
        terms["vtg"] = self.vtg(torch.cat([model.ego_connector(x), estimate], dim=1), batch)
        fx, estimate = fx[batch.ego_of], estimate[batch.ego_of]             # one row a pair
        if "kl" in self.phase.losses:
            terms["kl"] = self.kl(y, fx, estimate).sum() * self.sample_share
        if "ccl" in self.phase.losses:
            terms["ccl"] = self.cycle(x.detach()[batch.ego_of], y).sum() * self.sample_share
        if "contrastive" in self.phase.losses:
            terms["contrastive"] = self.contrastive(y, fx) * len(y) * self.sample_share
        return terms

    def kl(self, y: Tensor, fx: Tensor, estimate: Tensor) -> Tensor:
        """KL(exo || F(ego)) of each pair (X,), in the space the decoder reads (con_exo), where it transfers; "vit" is the
        literal reading, measured worse."""
        if self.cfg.kl_space == "connector":
            with torch.no_grad():
                target = self.model.exo_connector(y)                        # (X, n, W)
        else:
            target, estimate = (rearrange(g, "b t h w d -> b (t h w) d") for g in (y, fx))
        return feature_kl(target, estimate, self.cfg.kl_temperature)

    def standardise(self, grid: Tensor) -> Tensor:
        return (grid - self.loss.mean) / self.loss.std

    def cycle(self, x: Tensor, y: Tensor) -> Tensor:
        """CCL(F, G) of each pair (X,): |G(F(x)) - x| + |F(G(y)) - y|, on features standardised by the demonstrator's
        statistics; x and y are data here, as in CycleGAN, so only F and G learn from it."""
        distance = lambda a, b: (self.standardise(a) - self.standardise(b)).abs().flatten(1).mean(1)
        forward = distance(self.model.G(self.model.F(x)), x)
        if self.cfg.forward_cycle_only:
            return forward
        return forward + distance(self.model.F(self.model.G(y)), y)

    def contrastive(self, y: Tensor, fx: Tensor, tau: float = 0.07) -> Tensor:
        """InfoNCE between pooled F(x) and y over the micro batches of all ranks (off by default; it depends on the
        batch, so it is outside the exactness contract)."""
        a, b = (F.normalize(g.float().mean((1, 2, 3)), dim=-1) for g in (fx, y))
        if self.world > 1:
            others = [torch.empty_like(b) for _ in range(self.world)]
            dist.all_gather(others, b)                                      # y is frozen: no gradient to send back
            start, b = dist.get_rank() * len(b), torch.cat(others)
        else:
            start = 0
        return F.cross_entropy(a @ b.T / tau, torch.arange(start, start + len(a), device=a.device))

    # -- stage 0 of the micro-world, the stand-in for downloading Mistral and CLIP
    def language(self, batch: Batch) -> dict[str, Tensor]:
        """Teach the decoder to read facts from a prefix: the words of the narration, scattered over the visual slots
        with random weights, among fainter words of another narration."""
        embedding, slots = self.model.decoder.embedding.weight, int((batch.ids == VIDEO).sum()) // len(batch.lens)
        words = [self.tokenizer.encode(text) for text in batch.texts]
        visual = []
        for i, own in enumerate(words):
            faint = words[i - 1]
            strength = torch.cat([torch.empty(len(own)).uniform_(0.7, 1.3), torch.empty(len(faint)).uniform_(0, 0.5)])
            focus = 10 ** torch.empty(len(strength), 1).uniform_(-1.5, 1)   # one slot ... all slots
            spread = torch._standard_gamma(focus.expand(-1, slots)) + 1e-6
            spread = strength[:, None] * spread / spread.sum(1, keepdim=True).clamp(min=1e-6)
            visual.append(spread.T.to(embedding.device) @ embedding[torch.tensor(own + faint, device=embedding.device)])
        visual = torch.stack(visual)
        visual = visual * slots * 0.35 + 0.1 * torch.randn_like(visual)
        return {"vtg": self.vtg(visual, batch)}

    def clip(self, batch: Batch) -> dict[str, Tensor]:
        """CLIP's InfoNCE between single frames and narrations; the text tower is a bag of words, thrown away after."""
        grid = self.model.grid(self.model.exo_vit, batch.exo[:, ::2])       # every second frame: (B, T/2, h, w, D)
        image = self.loss.image(rearrange(grid, "b t h w d -> (b t) (h w) d").amax(1))
        words = [self.tokenizer.encode(text) for text in batch.texts]
        offsets = torch.tensor([0] + [len(w) for w in words[:-1]]).cumsum(0).to(image.device)
        text = self.loss.words(torch.tensor([t for w in words for t in w], device=image.device), offsets)
        scale = self.loss.log_scale.exp().clamp(max=100)
        logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T           # (B*T, B)
        same = torch.tensor([[a == b for b in batch.texts] for a in batch.texts], device=image.device)
        frames = len(image) // len(text)
        positive = same.float().repeat_interleave(frames, 0)                # equal narrations are equally right
        to_text = -(logits.log_softmax(1) * positive / positive.sum(1, keepdim=True)).sum(1).mean()
        to_image = -(logits.log_softmax(0) * positive / positive.sum(0, keepdim=True)).sum(0).mean()
        return {"clip": (to_text + to_image) / 2 * len(text) * self.sample_share}

    @torch.no_grad()
    def measure(self, loader: Loader, samples: int = 256):
        """Statistics of the demonstrator's ViT features per patch and channel, on the first training pairs: constants
        of the cycle loss, stored in the checkpoint."""
        grids = [self.model.grid(self.model.exo_vit, b.exo) for b in
                 (loader.micro_batch(range(i, i + 32)) for i in range(0, min(samples, loader.samples), 32))]
        y = rearrange(torch.cat(grids), "b t h w d -> (b t) h w d").float()
        self.loss.mean.copy_(y.mean(0))
        self.loss.std.copy_(y.std(0).clamp(min=1e-3))


# --------------------------------------------------------------------------------------------------- the run
@dataclass
class Run:
    """One process of a run: where it is, what it trains, what it has read."""
    cfg: TrainConfig
    device: torch.device
    rank: int
    world: int
    rows: tuple[Phase, ...] = ()
    lengths: tuple[int, ...] = ()       # steps of each phase
    skipped: int = 0
    parents: dict = field(default_factory=dict)     # init, base and manifest, as state.json records them
    inherited: tuple[str, ...] = ()     # tensors that an earlier stage trained

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, text: str):
        if self.main:
            print(text, flush=True)


def part_of(name: str) -> str:
    """The part of the stage table that a parameter belongs to."""
    return "lora" if ".lora_" in name else name.removeprefix("model.").split(".")[0]


def set_trained(objective: Objective, phase: Phase) -> dict[str, nn.Parameter]:
    """Freeze everything but the phase's parts; returns what trains, by name."""
    for source, target in phase.copies:
        getattr(objective.model, target).load_state_dict(getattr(objective.model, source).state_dict())
    trained = {}
    for name, p in objective.named_parameters():
        p.requires_grad_(part_of(name) in phase.trains)
        if p.requires_grad:
            trained[name] = p
    for name, module in objective.model.named_children():       # dropout only where something trains
        module.train(name in phase.trains or name == "decoder" and "lora" in phase.trains)
    return trained


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: all directions of a matrix learn at one speed, which is what makes the
    connector start from scratch at all. Convolutions count as matrices (out, in * kernel). The step is scaled to
    AdamW's, so that both read one learning rate.

    torch.optim.Muon is the same rule; its Newton-Schulz runs in bfloat16, which a CPU without AMX emulates (measured
    here: 10-40x slower than float32), and it takes no convolutions.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(momentum, 0.95).flatten(1)).view_as(p)      # Nesterov
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.flatten(1).shape)))


def orthogonal(m: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix to (rows, cols), roughly: five Newton-Schulz steps (coefficients: Jordan's Muon)."""
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if m.shape[0] > m.shape[1] else x


def make_optimizers(trained: dict[str, nn.Parameter], phase: Phase, kind: str) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for the rest (ends, norms, biases); adamw: AdamW for all."""
    def is_matrix(name, p):
        inside = not any(word in name for word in ("embedding", "position", "head", "loss."))
        return kind == "muon" and inside and p.ndim >= 2 and p.shape[1] > 1         # depthwise convs are no matrices
    groups = {True: {}, False: {}}
    for name, p in trained.items():
        groups[is_matrix(name, p)].setdefault(phase.trains[part_of(name)], []).append(p)
    make = lambda by_lr: [dict(params=ps, lr=lr, peak=lr) for lr, ps in by_lr.items()]
    optimizers = [Muon(make(groups[True]), {})] if groups[True] else []
    if groups[False]:
        optimizers.append(torch.optim.AdamW(make(groups[False]), weight_decay=0.0, betas=(0.9, 0.95), fused=True))
    return optimizers


def schedule(step: int, steps: int, phase: Phase) -> float:
    """Linear warm-up, then cosine to `floor`: the share of the peak rate at this step of the phase."""
    warm = max(1, round(phase.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return phase.floor + (1 - phase.floor) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def make_loader(run: Run, phase: Phase, model_cfg: ModelConfig, tokenizer: Tokenizer, split: str | None = None) -> Loader:
    """The phase's samples; `split` "val" reads the validation rows instead, in order."""
    cfg, train = run.cfg, split is None
    path = Path(cfg.data)
    if path.suffix != ".jsonl":
        path = toy_split(path, split or phase.split, toy_world(path))
    rows = read_manifest(path, cfg.root, cfg.allow_outside)
    if train:
        run.parents["manifest"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    if cfg.shuffle_pairs and phase.view == "pair" and train:
        rows = shuffle_pairs(rows, cfg.seed)
    n = model_cfg.visual_tokens * (2 if phase.view in ("ego", "pair") and model_cfg.mapping != "none" else 1)
    return Loader(rows, model_cfg, tokenizer, view=phase.view, text=phase.text, batch=phase.batch,
                  micro=cfg.micro_batch, seed=cfg.seed, rank=run.rank, world=run.world, train=train, video_tokens=n)


def shuffle_pairs(rows: list[dict], seed: int) -> list[dict]:
    """The control: every ego clip gets another row's exo clips (a cyclic shift in random order has no fixed point)."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    partner = {order[i]: order[i - 1] for i in range(len(order))}
    return [row | {"exo": rows[partner[i]]["exo"]} for i, row in enumerate(rows)]


def build(run: Run) -> tuple[Exo2Ego, Tokenizer]:
    """The model at the start of the stage: the previous stage's checkpoint, plus the parts this stage adds."""
    cfg = run.cfg
    torch.manual_seed(cfg.seed * 10 + cfg.stage)
    if cfg.stage == 0:
        world = toy_world(cfg.data)
        tokenizer = Tokenizer(toy_tokenizer(cfg.data, world, PRESETS["toy"].vocab))
        return Exo2Ego(PRESETS[cfg.preset]), tokenizer
    source = newest_checkpoint(cfg.init)
    if source is None:
        raise DataError(f"--init {cfg.init}: no checkpoint there; train it first: torchrun train.py --stage "
                        f"{cfg.stage - 1}")
    state = read_state(source)
    if state["stage"] != cfg.stage - 1:
        raise DataError(f"--init {cfg.init} is of stage {state['stage']}, stage {cfg.stage} starts from stage "
                        f"{cfg.stage - 1}")
    if state["step"] < state["steps"]:
        raise DataError(f"--init {cfg.init} stopped at step {state['step']} of {state['steps']}: finish it first")
    model_cfg = ModelConfig(**state["model"])
    fresh = ()
    if cfg.stage == 2 and not cfg.no_mapping:
        model_cfg, fresh = replace(model_cfg, mapping=cfg.mapping), ("F.", "G.")
    if cfg.stage == 3 and not cfg.no_lora:
        model_cfg, fresh = replace(model_cfg, lora=True), tuple(f"decoder.blocks.{i}." for i in range(model_cfg.layers))
    model = Exo2Ego(model_cfg)
    tensors = {n: t for n, t in checkpoint_tensors(source).items() if not n.startswith("loss.")}
    load_strict(model, tensors, str(source), fresh)
    base = source if state["base"] is None else newest_checkpoint(source.parent / state["base"])
    run.parents |= dict(init=fingerprint(source), base=os.path.relpath(base.parent, cfg.out), base_hash=fingerprint(base))
    if state["base"] is not None:
        run.inherited = tuple(load_file(source / "model.safetensors"))
    return model, Tokenizer(source / "tokenizer.model")


# -------------------------------------------------------------------------------------------------- checkpoints
def save(run: Run, objective: Objective, optimizers: list, step: int, trained: dict[str, nn.Parameter]):
    """out/stepN: written under a temporary name, synced, renamed last. model.safetensors holds what differs from the
    base (everything, in stage 0); every rank's RNG goes into optim.safetensors."""
    rng = torch.get_rng_state()
    states = [torch.empty_like(rng) for _ in range(run.world)]
    if run.world > 1:
        dist.all_gather(states, rng)
    else:
        states = [rng]
    if not run.main:
        return
    out, name = Path(run.cfg.out), f"step_{step:06d}"
    part = out / f"part_{name}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    whole = objective.model.state_dict()
    keep = set(whole) if run.cfg.stage == 0 else set(run.inherited) | {n.removeprefix("model.") for n in trained}
    tensors = {n: t for n, t in whole.items() if n in keep}
    tensors |= {n: t for n, t in objective.state_dict().items() if n.startswith("loss.")}
    save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, part / "model.safetensors")
    moments = {f"rng.{r}": s for r, s in enumerate(states)}
    names = {p: n for n, p in trained.items()}
    for optimizer in optimizers:
        for p, values in optimizer.state.items():
            moments |= {f"{key}/{names[p]}": value.detach().clone() for key, value in values.items()}
    save_file(moments, part / "optim.safetensors")
    shutil.copyfile(objective.tokenizer.path, part / "tokenizer.model")
    state = dict(stage=run.cfg.stage, step=step, steps=sum(run.lengths), model=asdict(objective.model.cfg),
                 config=asdict(run.cfg), base=None, base_hash=None, init=None, skipped=run.skipped,
                 git=git_revision()) | run.parents
    (part / "state.json").write_text(json.dumps(state, indent=1))
    for file in part.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(out / name, ignore_errors=True)
    os.rename(part, out / name)
    for old in sorted(out.glob("step_[0-9]*"))[:-run.cfg.keep]:
        shutil.rmtree(old)


def restore(run: Run, objective: Objective, optimizers: list, folder: Path, trained: dict[str, nn.Parameter]):
    """Optimiser moments and this rank's RNG, as saved."""
    moments = load_file(folder / "optim.safetensors")
    by_key = {}
    for name, value in moments.items():
        key, _, parameter = name.partition("/")
        by_key.setdefault(parameter, {})[key] = value
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = next(n for n, q in trained.items() if q is p)
                if name in by_key:
                    optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in by_key[name].items()}
    if f"rng.{run.rank}" in moments:
        torch.set_rng_state(moments[f"rng.{run.rank}"])


def resume_point(run: Run) -> Path | None:
    """The newest finished checkpoint of this very configuration, or None; another configuration is refused."""
    folder = newest_checkpoint(run.cfg.out)
    if folder is None:
        return None
    state, mine = read_state(folder), json.loads(json.dumps(asdict(run.cfg)))
    for key, value in mine.items():
        if key not in TrainConfig.FREE and state["config"].get(key) != value:
            raise DataError(f"{run.cfg.out} holds a run with {key}={state['config'].get(key)}, this one has {value}: "
                            f"choose another --out or remove the folder")
    for key, value in run.parents.items():
        if key != "manifest" and state.get(key) != value:
            raise DataError(f"{run.cfg.out} was trained from another {key} ({state.get(key)}, now {value}): choose "
                            f"another --out")
    return folder


def git_revision() -> str | None:
    """Commit of this code, with + when files differ from it."""
    call = lambda *a: subprocess.run(["git", *a], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    try:
        revision = call("rev-parse", "--short=12", "HEAD")
        return revision + "+" * bool(call("status", "--porcelain")) if revision else None
    except OSError:
        return None


# ----------------------------------------------------------------------------------------------------- the loop
def train(cfg: TrainConfig, rank: int = 0, world: int = 1) -> dict:
    """Run a stage to its end; returns the benchmark's figures (rank 0) or {}."""
    run = Run(cfg, pick_device(), rank, world)
    run.rows = phases(cfg)
    model, tokenizer = build(run)
    folder = resume_point(run)
    if folder is not None and (state := read_state(folder))["step"] == state["steps"]:
        run.say(f"{folder} is finished: nothing to do")
        return {}
    log = open_log(run, read_state(folder)["step"] if folder else 0)
    model.to(run.device)
    start = 0
    loaders = [make_loader(run, phase, model.cfg, tokenizer) for phase in run.rows]
    run.lengths = tuple(p.steps or max(1, p.epochs * l.samples // p.batch) for p, l in zip(run.rows, loaders))
    for phase, loader, length in zip(run.rows, loaders, run.lengths):
        done = read_state(folder)["step"] if folder else 0
        if not folder or done < start + length:
            run_phase(run, model, tokenizer, phase, loader, start, length, folder, log)
            folder = None
        start += length
    if not run.main or cfg.no_eval:
        return {}
    return evaluation.toy_benchmark(model, tokenizer, cfg.data, cfg.stage, Path(cfg.out), Path(cfg.init or cfg.out))


def run_phase(run: Run, model: Exo2Ego, tokenizer: Tokenizer, phase: Phase, loader: Loader, start: int, length: int,
              folder: Path | None, log):
    """The training loop: steps start ... start + length of the run."""
    cfg, world = run.cfg, run.world
    torch.manual_seed((cfg.seed, start, run.rank).__hash__() % 2 ** 31)
    objective = Objective(model, tokenizer, phase, cfg, world).to(run.device)
    trained = set_trained(objective, phase)
    optimizers = make_optimizers(trained, phase, cfg.optimizer)
    step = start
    if folder is not None and read_state(folder)["step"] > start:
        step = read_state(folder)["step"]
        tensors = load_file(folder / "model.safetensors")
        objective.load_state_dict({n if n.startswith("loss.") else f"model.{n}": t for n, t in tensors.items()}, strict=False)
        restore(run, objective, optimizers, folder, trained)
    elif "ccl" in phase.losses:
        objective.measure(loader)
    wrapped = nn.parallel.DistributedDataParallel(objective, forward_sync_buffers=False) if world > 1 else objective
    describe(run, phase, objective, trained, loader, length)
    val = make_loader(run, phase, model.cfg, tokenizer, "val") if cfg.val_every else None
    batches = loader.stream(step - start, length, cfg.workers) if not cfg.overfit else None
    first = loader.batch(0) if cfg.overfit else None
    clock = began = time.time()
    for step in range(step, start + length):
        share = schedule(step - start, length, phase)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * share
        micro = [b.to(run.device) for b in (first or next(batches))]
        totals = torch.tensor([sum(b.supervised for b in micro), sum(b.samples for b in micro),
                               sum(len(b.skipped) for b in micro)], device=run.device)
        reduce(totals, world)
        supervised, samples, skipped = totals.tolist()
        terms = {}
        for i, batch in enumerate(micro):
            if world > 1:
                wrapped.require_backward_grad_sync = i == len(micro) - 1        # before the forward; sync once a step
            with torch.autocast(run.device.type, torch.bfloat16, enabled=use_bf16(cfg, run.device)):
                out = wrapped(batch, supervised, samples)
            out["loss"].backward()
            for name, value in out.items():
                terms[name] = terms.get(name, 0) + value.detach()
        norm = nn.utils.clip_grad_norm_(trained.values(), 1.0)
        sums = torch.stack([v.reshape(()) for v in terms.values()])
        reduce(sums, world)
        figures = dict(zip(terms, (sums / world).tolist()))
        stop_if_not_finite(figures["loss"], float(norm), micro, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        report_skipped(run, micro, int(skipped), (step + 1 - start) * phase.batch)
        took, clock = time.time() - clock, time.time()
        done = step + 1
        write_log(run, log, done, figures, share, float(norm), took, samples, sum(len(b.ids) for b in micro) * world)
        if run.main and (done % 10 == 0 or done == start + length):
            progress(phase, done - start, length, figures, share, (time.time() - began) / (done - start), samples)
        if val is not None and done % cfg.val_every == 0:
            validate(run, objective, val, done, log)
        if done == start + length or cfg.save_every and done % cfg.save_every == 0:
            save(run, objective, optimizers, done, trained)


def use_bf16(cfg: TrainConfig, device: torch.device) -> bool:
    return (cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32")) == "bfloat16"


def reduce(tensor: Tensor, world: int):
    """Sum over ranks, in place."""
    if world > 1:
        dist.all_reduce(tensor)


def stop_if_not_finite(loss: float, norm: float, micro: list[Batch], step: int):
    if not math.isfinite(loss + norm):
        names = [name for batch in micro for name in batch.names]
        raise DataError(f"step {step + 1}: loss {loss}, gradient norm {norm}; the samples of this rank: {names}")


def report_skipped(run: Run, micro: list[Batch], skipped: int, seen: int):
    """Say which samples could not be read, count them, and stop when they are too many."""
    for reason in (r for batch in micro for r in batch.skipped):
        print(f"skipped {reason}", flush=True)
    run.skipped += skipped
    if run.skipped > run.cfg.max_bad * max(seen, 500):
        raise DataError(f"{run.skipped} of {seen} samples could not be read, more than --max-bad {run.cfg.max_bad}: the "
                        f"lines above name them")


@torch.no_grad()
def validate(run: Run, objective: Objective, loader: Loader, step: int, log, batches: int = 8):
    """Narration loss per token on fixed validation clips, the ranks sharing the work."""
    sums = torch.zeros(2, device=run.device)
    for i in range(batches):
        for batch in (b.to(run.device) for b in loader.batch(i)):
            objective.token_share = objective.sample_share = 1.0
            sums += torch.stack([objective.see(batch)["vtg"], torch.tensor(float(batch.supervised), device=run.device)])
    reduce(sums, run.world)
    run.say(f"step {step} | val_loss {sums[0] / sums[1]:.4f}")
    if run.main:
        log.write(json.dumps(dict(step=step, val_loss=float(sums[0] / sums[1]))) + "\n")


# --------------------------------------------------------------------------------------------- what a run says
def describe(run: Run, phase: Phase, objective: Objective, trained: dict, loader: Loader, length: int):
    """Before step 0: what trains, and what the model is fed."""
    if not run.main:
        return
    say, batch = run.say, loader.batch(0)[0]
    say(f"\n== stage {run.cfg.stage}: {phase.name} == {length} steps x {phase.batch} samples = {run.world} ranks x "
        f"{loader.micro} a micro batch x {phase.batch // loader.micro // run.world} micro batches; {loader.samples} samples")
    for name, module in objective.model.named_children():
        count = lambda on: sum(p.numel() for p in module.parameters() if p.requires_grad == on)
        say(f"   {name:14} {count(True):>10,} trained {count(False):>10,} frozen")
    say(f"   losses {phase.losses}, rates {phase.trains}, {run.cfg.optimizer}, {torch.get_num_threads()} threads, "
        f"{run.device}, {'bfloat16' if use_bf16(run.cfg, run.device) else 'float32'}")
    shapes = [f"{k} {tuple(v.shape)}" for k, v in (("ego", batch.ego), ("exo", batch.exo)) if v is not None]
    say(f"   fed: {', '.join(shapes + [f'{len(batch.ids)} tokens'])}; sample {batch.names[0]}, [supervised]:")
    tokenizer, text, n = objective.tokenizer, "", batch.lens[0]
    ids, labels = batch.ids[:n].tolist(), batch.labels[:n].tolist()
    for i, (token, label) in enumerate(zip(ids, labels)):
        if token != VIDEO:
            piece = tokenizer.sp.id_to_piece(token)
            text += f"[{piece}]" if label != IGNORE else piece
        elif i == 0 or ids[i - 1] != VIDEO:
            text += f"<video: {ids.count(VIDEO)} tokens>"
    say("   " + text)


def progress(phase: Phase, done: int, length: int, figures: dict, share: float, each: float, samples: int):
    losses = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
    left = (length - done) * each
    print(f"step {done}/{length} | {losses} | lr x{share:.2f} | {each:.3f} s/step | {samples / each:.0f} clips/s | "
          f"ETA {left:.0f} s", flush=True)


def open_log(run: Run, step: int):
    """log.jsonl, cut back to the step that is resumed from."""
    if not run.main:
        return None
    path = Path(run.cfg.out) / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break                                               # the line a kill cut short
    path.write_text("".join(kept))
    return open(path, "a", buffering=1)


def write_log(run: Run, log, step: int, figures: dict, share: float, norm: float, took: float, samples: int, tokens: int):
    if not run.main:
        return
    memory = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else peak_memory()
    row = dict(step=step, steps=sum(run.lengths), **figures, lr=share * max(max(p.trains.values()) for p in run.rows),
               grad_norm=norm, seconds=took, clips_per_second=samples / took, tokens_per_second=tokens / took,
               max_memory_bytes=memory, skipped=run.skipped)
    log.write(json.dumps(row) + "\n")


def peak_memory() -> int:
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------------- launch
def pick_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def prepare(cfg: TrainConfig):
    """The micro-world's tokenizer and stage 0, if this run needs them and they are missing: by whoever holds the lock
    first, before the process group starts; the others wait on the lock and find them done."""
    folder = Path(cfg.data)
    if cfg.stage == 0 or folder.suffix == ".jsonl" or cfg.init != cfg.base and cfg.stage == 1:
        return
    side = Path(cfg.base)
    with file_lock(side.parent / ".stage0.lock", wait=True):
        newest = newest_checkpoint(side)
        if newest is None or read_state(newest)["step"] < read_state(newest)["steps"]:
            train(parse(["--stage", "0", "--preset", cfg.preset, "--data", cfg.data, "--seed", str(cfg.seed),
                         "--out", cfg.base, "--workers", str(cfg.workers)]))


def main(argv: list[str] | None = None):
    cfg = parse(argv)
    local, rank, world = (int(os.environ.get(k, d)) for k, d in (("LOCAL_RANK", 0), ("RANK", 0), ("WORLD_SIZE", 1)))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    try:
        prepare(cfg)
        if world > 1:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=cfg.timeout))
        if rank == 0:
            with file_lock(Path(cfg.out) / ".lock", wait=False):
                train(cfg, rank, world)
        else:
            train(cfg, rank, world)
    except (DataError, ValueError, FileNotFoundError) as error:
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        os._exit(2) if world > 1 else sys.exit(2)               # peers must not wait for a rank that gave up
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
