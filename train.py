"""Train Exo2Ego, stage by stage. The stage table is the paper's method; one loop runs every row of it.

    torchrun train.py --stage 1                        # makes the micro-world and stage 0 if they are missing
    torchrun --nproc_per_node 2 train.py --stage 2     # any number of processes: the same batches

The same command again resumes, bit for bit. Every step is one object in out/stageN/log.jsonl.
"""
import argparse
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn

from data import (DataError, Loader, add_flags, file_lock, manifest_of, pick_device, read_manifest,
                  scatter_words, shuffle_pairs, start_process, toy_tokenizer, toy_world)
from eval import (Log, Run, choose_attention, describe, explain, feature_kl, join_ranks, keep_heap, listen,
                  load_optimizers, lock_of, plan, precision, ready, resume_point, save_checkpoint, schedule,
                  start_point, toy_benchmark, validate, whole, wrap)
from model import (IGNORE, PRESETS, VIDEO, Exo2Ego, Tokenizer, fingerprint, hash_of, load_checkpoint,
                   newest_checkpoint, own_tensors, read_state)

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
    plan: bool = False                              # print parameters, FLOPs and memory, allocate nothing
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
        "fsdp", "checkpoint_activations", "plan", "base", "init"}       # those two are known by their hashes
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
        if name in STAGE_2 and cfg.stage != 2 and not cfg.plan and value != getattr(TrainConfig, name):
            parser.error(f"--{name.replace('_', '-')} is of stage 2, whose F and G stage 3 goes on with")
    if cfg.data.endswith(".jsonl") != Path(cfg.data).is_file() and not cfg.plan:
        parser.error(f"--data {cfg.data}: a manifest is a file that ends in .jsonl, a micro-world a folder")
    out = Path(cfg.out or f"out/stage{cfg.stage}")
    return replace(cfg, out=str(out), base=cfg.base or str(out.parent / "stage0"),
                   init=cfg.init or str(out.parent / f"stage{max(cfg.stage - 1, 0)}"),
                   optimizer=cfg.optimizer or ("adamw" if cfg.preset == "7b" else "muon"))

def phases(cfg: TrainConfig) -> tuple[Phase, ...]:
    """The rows of this run: the table's, changed by the flags."""
    rows = (PAPER if cfg.preset == "7b" else TOY).get(cfg.stage)
    if rows is None or cfg.plan and cfg.stage == 0:
        raise DataError("stage 0 is the micro-world's own: --preset 7b and --plan are of stages 1, 2 and 3")
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
            self.loss.register_buffer("std", torch.ones(model.cfg.grid, model.cfg.grid, model.cfg.vit_width))

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
        x = model.grid(model.ego_vit, batch.ego)                            # (E, T, h, w, D): E moments
        if self.phase.view == "ego" or model.F is None:
            return {"vtg": self.vtg(model.read_ego(x), batch)}
        with torch.no_grad():                                               # the demonstrator is frozen
            y = model.grid(model.exo_vit, batch.exo)            # (X, T, h, w, D): their X exo views
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
            y = self.model.grid(self.model.exo_vit, frames).flatten(0, 1).cpu().double()    # (m T, h, w, D)
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
        grid = self.model.grid(self.model.exo_vit, batch.exo[:, ::2])  # every second frame: (B, T/2, h, w, D)
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

# ----------------------------------------------------------------------------------------------------- a run
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
    run.record.setdefault("manifest", "+".join(hash_of(f)[:16] for f in files))         # with its skip list
    return Loader(rows, model.cfg, tokenizer, view=phase.view, text=phase.text, batch=phase.batch,
                  micro=cfg.micro_batch, seed=cfg.seed, rank=run.rank, world=run.world, train=not split,
                  video_tokens=model.cfg.visual_tokens * (1 + (phase.view != "exo" and model.F is not None)))

def build(run: Run) -> tuple[Exo2Ego, Tokenizer | None]:
    """The model at the start of the stage: the previous stage's, or published weights, plus what it adds;
    for a plan without published weights, the preset's."""
    cfg, tokenizer, init = run.cfg, None, newest_checkpoint(run.cfg.init)
    recorded = init and newest_checkpoint(init.parent / (read_state(init)["base"] or ""))
    base = newest_checkpoint(cfg.base) or recorded
    torch.manual_seed(cfg.seed * 10 + cfg.stage)
    published = base is not None and (base / "config.json").is_file()
    new = {} if cfg.no_mapping or cfg.stage < 2 else {"mapping": cfg.mapping}
    lora = {"lora": True} if cfg.stage == 3 and not cfg.no_lora else {}
    if cfg.plan and not published:
        model = Exo2Ego(replace(PRESETS[cfg.preset], **new, **lora))
    elif cfg.stage == 0:
        return Exo2Ego(PRESETS[cfg.preset]), Tokenizer(toy_tokenizer(cfg.data, toy_world(cfg.data)))
    else:
        first = cfg.stage == 1 or cfg.plan                      # a plan adds all parts to the base itself
        source, state = start_point(base if published and first else cfg.init, 0 if first else cfg.stage - 1)
        base = source if state["base"] is None else base
        added = new | lora if cfg.plan else new if cfg.stage == 2 else lora
        model, tokenizer, state = load_checkpoint(source, base, cfg.vision, cfg.tokenizer, **added)
        if (pieces := tokenizer.size) > (vocab := model.cfg.vocab):
            raise DataError(f"{tokenizer.path}: {pieces} pieces, the decoder {vocab}: pass its --tokenizer")
        if not published and replace(model.cfg, mapping="none", lora=False) != PRESETS[cfg.preset]:
            raise DataError(f"{source} has other sizes than --preset {cfg.preset}: pass its own preset")
        run.record |= dict(init=fingerprint(source), base_hash=fingerprint(base),
                           vision=os.path.abspath(cfg.vision) if cfg.vision else state.get("vision"),
                           base=os.path.relpath(base if published else base.parent, cfg.out))
        earlier = own_tensors(source) if state["base"] else {}
        run.inherited = {*earlier, *(n for n in model.state_dict() if part_of(n) in ("F", "G"))}
    if cfg.preset == "7b" and cfg.stage == 1:                   # never looked through: the memory is dear
        model.ego_vit = model.ego_connector = None
    return model, tokenizer

def train(cfg: TrainConfig, rank: int = 0, world: int = 1):
    """Run a stage to its end, then score it."""
    bf16 = cfg.dtype == "bfloat16" or cfg.dtype is None and torch.cuda.is_available()
    run, rows = Run(cfg, rank, world, pick_device(), bf16), phases(cfg)
    if cfg.plan or cfg.preset == "7b":                          # printed; what cannot fit is refused
        with torch.device("meta"):
            model, _ = build(replace(run, record={}, cfg=replace(cfg, plan=True)))
            objective = Objective(model, None, rows[0], cfg, world).to("meta")
        set_trained(objective, rows[0], False, bf16)
        plan(run, rows[0], objective)
    if cfg.plan:
        return
    model, tokenizer = build(run)
    run.attention = choose_attention(run.device, torch.bfloat16 if bf16 else torch.float32, model.cfg)
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
        with precision(run.device, bf16):
            toy_benchmark(ready(model, run.device, bf16), tokenizer, cfg.data, cfg.stage, cfg.out, cfg.init)

def run_phase(run: Run, model: Exo2Ego, tokenizer: Tokenizer, phase: Phase, loader: Loader, start: int,
              length: int, folder: Path | None, log):
    """The training loop: steps `start` to `start + length` of the run, or what `folder` left of them."""
    cfg, world = run.cfg, run.world
    torch.manual_seed(hash((cfg.seed, start, run.rank)) % 2 ** 31)
    objective = Objective(model, tokenizer, phase, cfg, world).to(run.device)
    step = max(start, read_state(folder)["step"]) if folder else start
    if folder:                                                  # assigned: the base may be half precision
        own = {n: t.to(run.device, copy=True) for n, t in own_tensors(folder).items()}
        saved = own | {f"model.{n}": t for n, t in own.items()}
        objective.load_state_dict(saved, strict=False, assign=True)
    trained = set_trained(objective, phase, step == start, run.bf16)
    if "ccl" in phase.losses and step == start:
        with precision(run.device, run.bf16):
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
            with precision(run.device, run.bf16):
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
    if (cfg.stage == 0 or cfg.plan or cfg.preset == "7b" or Path(cfg.data).suffix == ".jsonl"
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
