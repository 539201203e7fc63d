"""Train Exo2Ego, stage by stage. The stage table is the paper's method; one loop runs every row of it.

    torchrun train.py --stage 1                        # makes the micro-world and stage 0 if they are missing
    torchrun --nproc_per_node 2 train.py --stage 2     # any number of processes: the same batches

The same command again resumes, bit for bit. Every step is one object in out/stageN/log.jsonl, every validation another.
"""
from __future__ import annotations

import os

if __name__ == "__main__":
    # OpenMP's threads spin while they wait. Where several programs share the cores, that takes time from all of them.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import contextlib
import ctypes
import json
import math
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple
from unittest import mock

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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from data import (DataError, Loader, Tokenizer, add_flags, die_with_parent, file_lock, read_manifests, toy_split,
                  toy_tokenizer, toy_world)
from eval import show_own_samples, toy_benchmark
from model import (BLOCKS, PRESETS, Exo2Ego, choose_attention, feature_kl, file_hash, fingerprint, git_revision,
                   load_checkpoint, load_delta, newest_checkpoint, pick_device, read_state, signature)


# --------------------------------------------------------------------------------------------------- 1 the stage table
@dataclass(frozen=True)
class Stage:
    """What trains, on what, towards what."""
    name: str
    trains: dict[str, float]            # part -> peak learning rate, all else is frozen; "loss": a loss's own parameters
    split: str                          # of the micro-world; --data replaces it
    view: str                           # what a sample shows: text | exo | ego | pair
    losses: dict[str, float]            # weight of each term
    batch: int                          # samples a step, over all ranks
    steps: int = 0                      # 0: epochs decide
    epochs: int = 1
    warmup: float = 0.03                # share of the steps; after it a cosine goes down to `floor` of the peak
    floor: float = 0.05
    text: str = "text"                  # what is supervised: the narration ("text"), answers ("turns"), or "mix"
    loss_fn: str = "views"              # which method of Objective makes the terms: views | language | clip
    copies: tuple = ()                  # parts that start as a copy: (from, to)


# The paper: rates, batches and epochs are its own; the loss weights and the warm-up are our choice. Its Init is
# VideoLLaMA2's training, whose weights come with --base.
PAPER = {
    1: (Stage(
        name="demonstrator self-preparation",
        trains=dict(exo_vit=1e-4, exo_connector=1e-4),
        split="pairs", view="exo", losses=dict(vtg=1),
        batch=256, epochs=2, floor=0),),
    2: (Stage(
        name="demonstrator-learner guidance",
        trains=dict(ego_vit=1e-4, ego_connector=1e-4, F=1e-4, G=1e-4),
        split="pairs", view="pair", losses=dict(vtg=1, kl=5, ccl=0.1),
        batch=256, epochs=2, floor=0),),
    3: (Stage(
        name="learner self-practice",
        trains=dict(ego_vit=2e-5, F=2e-5, lora=2e-5),
        split="instruct", view="ego", losses=dict(vtg=1), text="turns",
        batch=64, epochs=1, floor=0),),
}
# The micro-world: rates (on Muon's scale), steps and weights are our choice, from trials. Stage 0 is our stand-in for
# a download: a decoder that reads visual tokens, a CLIP, and the paper's Init of both encoders.
TOY = {
    0: (Stage(
            name="language",
            trains=dict(decoder=3e-3),
            split="corpus", view="text", losses=dict(vtg=1), text="mix", loss_fn="language",
            batch=64, steps=110, warmup=0.08),
        Stage(
            name="clip",
            trains=dict(exo_vit=1.5e-2, loss=1.5e-2),
            split="corpus", view="exo", losses=dict(clip=1), loss_fn="clip",
            batch=48, steps=150, warmup=0.08),
        Stage(
            name="init exo",
            trains=dict(exo_vit=3e-3, exo_connector=1e-2),
            split="corpus", view="exo", losses=dict(vtg=1),
            batch=48, steps=80, warmup=0.08),
        Stage(
            name="init ego",
            trains=dict(ego_vit=3e-3, ego_connector=1e-3),
            copies=(("exo_vit", "ego_vit"), ("exo_connector", "ego_connector")),
            split="ego", view="ego", losses=dict(vtg=1),
            batch=32, steps=80, warmup=0.08)),
    1: (Stage(
        name="demonstrator self-preparation",
        trains=dict(exo_vit=3e-3, exo_connector=3e-3),
        split="pairs", view="exo", losses=dict(vtg=1),
        batch=32, steps=120),),
    2: (Stage(
        name="demonstrator-learner guidance",
        trains=dict(ego_vit=1e-3, ego_connector=1e-3, F=3e-3, G=3e-3),
        split="pairs", view="pair", losses=dict(vtg=1, kl=5, ccl=0.1),
        batch=32, steps=480),),
    3: (Stage(
        name="learner self-practice",
        trains=dict(ego_vit=3e-4, F=3e-4, lora=3e-3),
        split="instruct", view="ego", losses=dict(vtg=1), text="turns",
        batch=32, steps=150),),
}


# ---------------------------------------------------------------------------------------------------------- 2 the loop
def run_stage(run, model, tokenizer, stage, loader, before, steps, folder, log):
    """The `steps` steps of a stage, or what the checkpoint `folder` has left of them. `done` and `step` count within the
    stage, `run_step` from 1 on through all stages of the run, of which `before` steps came earlier."""
    cfg = run.cfg
    objective, trained, done = prepare_objective(run, model, tokenizer, stage, loader, before, folder)
    if run.rank == 0:
        describe(run, objective, loader, steps, log)
    wrapped, trained, optimizers = prepare_training(run, objective, trained)
    validation = validation_loader(run, stage, model, tokenizer) if cfg.val_every or cfg.val_data else None
    batches = loader.stream(done, steps, cfg.workers, cfg.overfit, cfg.timeout)
    # After the DataLoader is made, which draws a random number.
    if done:
        load_optimizers(folder, optimizers, run.rank, run.device)
    log.start(done)

    for step, micro_batches in enumerate(batches, start=done):
        # 1) learning rate: linear warm-up, then a cosine down to the stage's floor
        lr_scale = schedule(step, steps, stage)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale

        # 2) every loss is divided by what the whole step holds, over micro batches and ranks: count that first
        micro_batches = [batch.to(run.device) for batch in micro_batches]
        counts = StepCounts.of(micro_batches, run)

        # 3) forward and backward, one micro batch at a time; ranks exchange gradients at the last one only
        totals = {}
        for i, batch in enumerate(micro_batches):
            sync_gradients(wrapped, run, now=i == len(micro_batches) - 1)
            with run.autocast():
                terms = wrapped(batch, counts.supervised, counts.samples)
            terms["loss"].backward()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0) + value.detach()
        losses = run.mean(totals)

        # 4) clip, refuse NaN by the names of the samples, update
        norm = nn.utils.clip_grad_norm_(trained.values(), 1.0)
        norm = float(gather_full_tensor(norm))
        run_step = before + step + 1
        refuse_nan(losses, norm, run_step, micro_batches)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # 5) one line of log.jsonl; too many unreadable samples end the run
        log.skip(micro_batches, int(counts.skipped), (step + 1) * stage.batch, cfg.max_bad)
        row = dict(step=run_step, steps=run.steps, lr=lr_scale * max(stage.trains.values()), grad_norm=norm)
        log.step(step + 1, steps, counts.samples, counts.tokens, losses, row)

        # 6) validate, save
        last = step + 1 == steps
        if validation and (last or cfg.val_every and run_step % cfg.val_every == 0):
            validate(run, objective, validation, run_step, log)
        due = cfg.save_every and run_step % cfg.save_every == 0
        if due or counts.stop or last:
            save_checkpoint(run, objective, optimizers, run_step, trained, log.skipped)
        if counts.stop:
            sys.exit(f"stopped at step {run_step}, saved: the same command goes on")


class StepCounts(NamedTuple):
    """What a whole step holds, over all micro batches and ranks."""
    supervised: float                                           # tokens, each once for every sample it serves
    samples: float
    skipped: float                                              # samples that could not be read
    tokens: float
    stop: float                                                 # ranks that a signal asked to stop

    @classmethod
    def of(cls, micro_batches, run) -> StepCounts:
        own = [cls(
            supervised=batch.weights.sum(),
            samples=batch.samples,
            skipped=len(batch.skipped),
            tokens=len(batch.ids),
            stop=run.stop > 0) for batch in micro_batches]
        total = torch.tensor(own).sum(0)
        return cls(*run.sum(total.to(run.device)))


def prepare_objective(run, model, tokenizer, stage, loader, before, folder):
    """-> the objective on its device, what trains, and how many steps of the stage are done."""
    # Each rank draws noise and dropout of its own. Parameters that a loss brings are rank 0's: DDP copies them.
    torch.manual_seed(hash((run.cfg.seed, before, run.rank)) % 2 ** 31)
    objective = Objective(model, tokenizer, stage, run.cfg, run.world).to(run.device)
    # A checkpoint may also stand where the stage before it ended: then none of this one's steps are done.
    done = 0
    if folder:
        done = max(0, read_state(folder)["step"] - before)
        restore_weights(objective, folder, run.device)
    if done == 0:
        for source, target in stage.copies:
            getattr(model, target).load_state_dict(getattr(model, source).state_dict())
    trained = freeze(objective, stage, run.bf16)
    if "ccl" in stage.losses and done == 0:
        with run.autocast():
            objective.measure_feature_std(loader)
    return objective, trained, done


def prepare_training(run, objective, trained):
    """-> the objective as the ranks share it, what trains, and its optimisers."""
    wrapped = wrap(run, objective)
    # FSDP has replaced the parameters by their shards.
    trained = {name: p for name, p in objective.named_parameters() if name in trained}
    rates = {name: objective.stage.trains[part_of(name)] for name in trained}
    return wrapped, trained, make_optimizers(trained, rates, run.cfg.optimizer)


def refuse_nan(losses, norm, step, micro_batches):
    """End the run before an update spoils the weights; the terms, and this rank's samples of the step, may show why."""
    if not math.isfinite(losses["loss"] + norm):
        terms = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        names = [batch.names for batch in micro_batches]
        raise DataError(f"step {step}: {terms}, gradient norm {norm:g}: try a lower --lr, "
                        f"or --dtype float32; the samples were {names}")


@torch.no_grad()
def validate(run, objective, loader, step, log):
    """Text loss per token on the first validation clips, at most as many as eight training batches hold; ranks share
    them."""
    sums = torch.zeros(2, device=run.device)
    # Ranks stay in step, each with a share of every whole batch. One process also reads the last, short one.
    batches = loader.samples / loader.batch_size
    batches = math.ceil(batches) if run.world == 1 else int(batches)
    batches = min(batches, 8 * objective.stage.batch // loader.batch_size)
    objective.eval()
    for i in range(batches):
        for batch in loader.batch(i):
            batch = batch.to(run.device)
            with run.autocast():
                # A loss is a sum times world / count. With `world` as the count it is the plain sum.
                vtg = objective(batch, supervised=run.world, samples=run.world)["vtg"]
            sums += torch.stack([vtg, batch.weights.sum()])
    objective.train()
    total, tokens = run.sum(sums)
    loss = total / tokens if tokens else math.nan
    log.write(dict(step=step, val_loss=loss), f"step {step} | val_loss {loss:.4f}")


# -------------------------------------------------------------------------------------------------------- 3 objectives
class Objective(nn.Module):
    """The losses of a stage. Each term is a sum over samples (or tokens), divided by what the whole step holds, so that
    micro batches and ranks add up to the plain mean. DDP averages over ranks, hence the factor `world`.

    To add a loss: give it a weight in the stage table and return its term from `views`, a vector whose sum counts: one
    number a sample.
    """
    def __init__(self, model, tokenizer, stage, cfg, world):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.stage, self.cfg, self.world = stage, cfg, world
        # What a loss needs and the model does not.
        self.loss = nn.Module()
        if "clip" in stage.losses:
            self.loss.words = nn.EmbeddingBag(model.cfg.vocab, 64, mode="sum")
            self.loss.image = nn.Linear(model.cfg.vit_width, 64)
            self.loss.log_scale = nn.Parameter(torch.tensor(14.0).log())
        if "ccl" in stage.losses:
            side = model.cfg.patches_per_side
            self.loss.register_buffer("feature_std", torch.ones(side, side, model.cfg.vit_width))

    def forward(self, batch, supervised, samples):
        """-> {"loss": the weighted sum, and each term} of one micro batch, as its share of the whole step, which holds
        `supervised` tokens and `samples` samples. (A sample of stage 2 is a moment's ego clip with one of its exo views; the
        text of a moment is read once, and its tokens count once for each of its samples.)"""
        if self.stage.loss_fn == "language":
            terms = self.language(batch)
        elif self.stage.loss_fn == "clip":
            terms = self.clip(batch)
        else:
            terms = self.views(batch)
        # Every term needs a weight, every weight a term.
        weights = self.stage.losses
        for name in terms.keys() ^ weights.keys():
            lacks = "weight in the stage table" if name in terms else f"term from {self.stage.loss_fn}()"
            raise DataError(f"the loss {name!r} has no {lacks}: it needs both")
        for name, term in terms.items():
            if term.dim() != 1:
                raise DataError(f"the loss {name!r} has shape {tuple(term.shape)}: one number a sample is needed")

        # Text is averaged over tokens, everything else over samples.
        shares = {}
        loss = 0
        for name, term in terms.items():
            count = max(supervised, 1) if name == "vtg" else samples
            shares[name] = term.sum() * (self.world / count)
            loss = loss + self.stage.losses[name] * shares[name]
        return shares | {"loss": loss}

    def views(self, batch):
        """Init and stages 1 and 3 show one view and have one loss; stage 2 shows both and has them all."""
        model, losses = self.model, self.stage.losses
        if batch.ego is None:
            return {"vtg": self.vtg(model.encode_exo(batch.exo), batch)}
        x = model.patch_features(model.ego_vit, batch.ego)                  # (E, T, h, w, D): E moments
        if self.stage.view == "ego" or model.F is None:
            return {"vtg": self.vtg(model.ego_tokens(x), batch)}

        # The demonstrator is frozen, so its features need no gradient. Its connector is frozen too, because it makes KL's
        # target: if it moved, the target would. It also reads F(x) below, and there gradients pass through it to F.
        with torch.no_grad():
            y = model.patch_features(model.exo_vit, batch.exo)              # (X, T, h, w, D): their X exo views
        # The learner reads [con_ego(x) ; con_exo(F(x))].
        fx = model.F(x)
        own = model.ego_connector(x)                                        # (E, 1521, 4096)
        estimate = model.exo_connector(fx)                                  # (E, 1521, 4096)
        visual = torch.cat([own, estimate], dim=1)
        terms = {"vtg": self.vtg(visual, batch)}

        # Each exo view shows the moment of one ego clip: they are compared pair by pair.
        pair = batch.ego_of.to(x.device)
        if "kl" in losses:
            terms["kl"] = self.kl(y, fx[pair], estimate[pair])
        if "ccl" in losses:
            terms["ccl"] = self.cycle(x.detach(), y, pair)
        if "contrastive" in losses:
            terms["contrastive"] = self.contrastive(y, fx[pair], pair)
        return terms

    def vtg(self, visual, batch) -> Tensor:
        """Vision-grounded text generation: the next-token cross-entropy of each supervised token."""
        if not batch.lens:
            # All ranks must run the same blocks, also where no row has text.
            batch = batch.with_stand_in_text(visual.shape[1])
        # The clip that each text tells of.
        shown = visual[batch.text_of.to(visual.device)]
        logits, targets = self.model.text_logits(shown, batch.ids, batch.labels, batch.lens)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        # The weight of each supervised token, in order: a narration of two exo views counts twice. (The first token of a
        # batch is nobody's target.) A stand-in text has one loss and no weight: (1,) * (0,) is empty and adds nothing.
        weights = batch.weights[1:]
        weights = weights[weights > 0].to(logits.device)
        return losses * weights

    def kl(self, y: Tensor, fx: Tensor, estimate: Tensor) -> Tensor:
        """KL(exo || F(ego)) of each pair (X,), between the connector's tokens, which the decoder reads (`estimate` is
        con_exo(F(x))), or with --kl-space vit between the patches."""
        if self.cfg.kl_space == "connector":
            with torch.no_grad():
                target = self.model.exo_connector(y)                        # (X, 1521, 4096)
        else:
            target, estimate = (rearrange(t, "b t h w d -> b (t h w) d") for t in (y, fx))
        return feature_kl(target, estimate, self.cfg.kl_temperature)

    def cycle(self, x, y, pair) -> Tensor:
        """CCL(F, G) of each pair (X,): |G(F(x)) - x| + |F(G(y)) - y|, in units of the demonstrator's spread.

        x (of E moments) and y are data here, as in CycleGAN: only F and G learn from it. So F runs again, on x without its
        gradient.
        """
        F_, G = self.model.F, self.model.G
        forward = self.distance(G(F_(x)), x)[pair]
        if self.cfg.forward_cycle_only:
            return forward
        return forward + self.distance(F_(G(y)), y)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean absolute difference of each sample. Standardising subtracts one mean from both, so only the spread counts."""
        return ((a - b) / self.loss.feature_std).abs().flatten(1).mean(1)

    def contrastive(self, y: Tensor, fx: Tensor, pair: Tensor, tau: float = 0.07) -> Tensor:
        """InfoNCE (X,) of pooled F(x) against every y of the micro batch: it depends on what else is in there."""
        a = F.normalize(fx.float().mean((1, 2, 3)), dim=-1)
        b = F.normalize(y.float().mean((1, 2, 3)), dim=-1)
        own = torch.arange(len(a), device=a.device)
        # Another view of the same moment is no negative.
        sibling = (pair[:, None] == pair).fill_diagonal_(False)
        logits = (a @ b.T / tau).masked_fill(sibling, -math.inf)
        return F.cross_entropy(logits, own, reduction="none")

    @torch.no_grad()
    def measure_feature_std(self, loader, samples=256):
        """The cycle's constant, which the checkpoint stores: the spread of exo features per patch and channel."""
        std = self.loss.feature_std
        samples = min(samples, loader.samples)
        # Sums, batch by batch: the features of 256 clips of 7b are 10 GB.
        n, total, squares = 0, 0, 0
        for i in range(0, samples, loader.micro):
            indices = range(i, min(i + loader.micro, samples))
            frames = loader.micro_batch(indices).exo.to(std.device)
            y = self.model.patch_features(self.model.exo_vit, frames)
            y = y.flatten(0, 1).cpu().double()                              # (samples * T, h, w, D)
            n += len(y)
            total = total + y.sum(0)
            squares = squares + y.square().sum(0)
        variance = (squares - total ** 2 / n) / (n - 1)
        std.copy_(variance.clamp(min=1e-6).sqrt())

    # -------------------------------------------------------------------------------------------- stage 0's stand-ins
    def language(self, batch):
        """Instead of a download: the decoder learns to read scattered, noisy words that stand before a text."""
        ids = [self.tokenizer.encode(text) for text in batch.texts]
        mixture = scatter_words(ids, self.model.cfg.visual_tokens, self.model.cfg.vocab)
        embedding = self.model.decoder.embedding.weight
        visual = mixture.to(embedding.device) @ embedding                   # (B, slots, W)
        return {"vtg": self.vtg(visual + 0.1 * torch.randn_like(visual), batch)}

    def clip(self, batch):
        """CLIP's InfoNCE of frames and narrations. Its text tower, a bag of words, is not kept."""
        # Every second frame, its strongest patch in each channel.
        features = self.model.patch_features(self.model.exo_vit, batch.exo[:, ::2])         # (B, T/2, h, w, D)
        image = self.loss.image(rearrange(features, "b t h w d -> (b t) (h w) d").amax(1))

        # Narrations as bags of words: all ids in a row, and where each narration starts.
        ids = [self.tokenizer.encode(text) for text in batch.texts]
        lengths = torch.tensor([len(own) for own in ids], device=image.device)
        starts = lengths.cumsum(0) - lengths
        text = self.loss.words(torch.tensor(sum(ids, []), device=image.device), starts)

        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        logits = self.loss.log_scale.exp() * image @ text.T                                 # (B*T/2, B)
        # Equal narrations are equally right.
        same = [[float(a == b) for b in batch.texts] for a in batch.texts]
        same = torch.tensor(same, device=image.device)                                      # (B, B)
        right = same.repeat_interleave(features.shape[1], 0)                                # (B*T/2, B)
        text_to_image = logits.log_softmax(0) * right / right.sum(0, keepdim=True)
        text_to_image = text_to_image.sum(0).mean()
        image_to_text = logits.log_softmax(1) * right / right.sum(1, keepdim=True)
        image_to_text = image_to_text.sum(1).mean()
        # A mean over the batch, given as a sum over it: `forward` divides by the samples.
        mean = -(text_to_image + image_to_text) / 2
        return {"clip": (mean * len(text))[None]}


def scatter_words(texts, slots, vocab) -> Tensor:
    """The weight of each word in each place of a video's tokens (B, slots, vocab): the words of a text (their ids), each
    spread over few or many places, among fainter words of another text. The toy decoder learns to read this."""
    mixture = torch.zeros(len(texts), slots, vocab)
    others = texts[-1:] + texts[:-1]                            # the text before it in the batch
    for row, own, other in zip(mixture, texts, others):
        strong = torch.empty(len(own)).uniform_(0.7, 1.3)
        faint = torch.empty(len(other)).uniform_(0, 0.5)
        weight = torch.cat([strong, faint])
        # A small focus puts a word into one place, a large one into all of them.
        focus = 10 ** torch.empty(len(weight), 1).uniform_(-1.5, 1)
        spread = torch._standard_gamma(focus.expand(-1, slots)) + 1e-6                      # (words, slots)
        total = spread.sum(1, keepdim=True)
        spread = 0.35 * slots * weight[:, None] * spread / total
        row.index_add_(1, torch.tensor(own + other), spread.T.contiguous())
    return mixture


# ------------------------------------------------------------------------------------------------------- 4 what trains
def part_of(name):
    """The part of the stage table that a parameter belongs to."""
    if ".lora_" in name:
        return "lora"
    return name.removeprefix("model.").split(".")[0]


def freeze(objective, stage, bf16):
    """Freeze every part that the stage does not train; returns what trains, by name.

    Trained weights are float32. Frozen ones are kept in the dtype they are computed with, except in stage 0, where the
    next row may train them.
    """
    trained = {}
    for name, p in objective.named_parameters():
        p.requires_grad_(part_of(name) in stage.trains)
        half = bf16 and not p.requires_grad and objective.cfg.stage > 0
        p.data = p.data.to(torch.bfloat16 if half else torch.float32)
        if p.requires_grad:
            trained[name] = p
    # LoRA's dropout is the only thing that train mode switches on.
    objective.train()
    return trained


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, scaled to the size of AdamW's step: all directions of a matrix learn at one speed.
    Without it the toy's connector does not start to learn. torch's own Muon takes no convolutions."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 0.05)
                # Nesterov: the gradient, moved towards the momentum.
                ahead = p.grad.lerp(momentum, 0.95)
                update = orthogonal(ahead.flatten(1)).view_as(p)
                size = 0.2 * math.sqrt(max(p.flatten(1).shape))
                p.add_(update, alpha=-group["lr"] * size)


def orthogonal(m: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, by five Newton-Schulz steps with Muon's coefficients."""
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        # A = x x^T
        # B = -4.7750 A + 2.0315 A A
        # x = 3.4445 x + B x
        a = x @ x.T
        b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, b, x, beta=3.4445)
    return x.T if m.shape[0] > m.shape[1] else x


def make_optimizers(trained, rates, kind) -> list:
    """Muon for the matrices inside the network, AdamW for the rest: both ends, norms, biases, depthwise filters. Kind
    "adamw": AdamW for all. `rates` is the peak learning rate of each name."""
    matrices, others = {}, {}                                   # rate -> parameters
    for name, p in trained.items():
        is_end = any(word in name for word in ("embedding", "position", "head", "loss."))
        is_matrix = p.ndim >= 2 and p.shape[1] > 1
        by_rate = matrices if kind == "muon" and is_matrix and not is_end else others
        by_rate.setdefault(rates[name], []).append(p)

    optimizers = []
    if matrices:
        groups = [dict(params=params, lr=rate, peak_lr=rate) for rate, params in matrices.items()]
        optimizers.append(Muon(groups, {}))
    if others:
        groups = [dict(params=params, lr=rate, peak_lr=rate) for rate, params in others.items()]
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0, fused=True))
    return optimizers


def schedule(step, steps, stage) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine down to the stage's floor."""
    warm = max(1, round(stage.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    left = max(1, steps - warm)
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / left)
    return stage.floor + (1 - stage.floor) * cosine


# ------------------------------------------------------------------------------- 5 where a stage starts, what it reads
@dataclass
class Run:
    """One process of a run: its flags, its place among the ranks, and what its checkpoints will record."""
    cfg: TrainConfig
    rank: int
    world: int
    device: torch.device
    bf16: bool
    attention: str = ""                                         # which backend, and why
    steps: int = 0                                              # of all its stages
    provenance: dict = field(default_factory=lambda: dict(base=None, base_hash=None, init=None))
    inherited: set = field(default_factory=set)                 # tensors that its checkpoints hold, trained here or not
    stop: float = 0.0                                           # when a signal asked it to stop

    def autocast(self):
        """The context of a forward pass: products in bfloat16 if asked for, norms and losses in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def sum(self, tensor):
        """The sum of a tensor over all ranks, as numbers."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def mean(self, totals):
        """The mean of each loss over all ranks."""
        sums = self.sum(torch.stack(list(totals.values())))
        return {name: total / self.world for name, total in zip(totals, sums)}


def initial_model(run):
    """The model at the start of the stage: the previous stage's, or published weights, plus the parts it adds."""
    cfg = run.cfg
    torch.manual_seed(cfg.seed * 10 + cfg.stage)
    if cfg.stage == 0:
        model = Exo2Ego(PRESETS[cfg.preset])
        return model, Tokenizer(toy_tokenizer(cfg.toy_folder, toy_world(cfg.toy_folder)))

    source, base, added = starting_point(cfg)
    model, state = load_checkpoint(source, base, cfg.vision, **added)
    tokenizer = Tokenizer(cfg.tokenizer or source)
    vocab = model.cfg.vocab
    if tokenizer.size > vocab:
        raise DataError(f"{tokenizer.path}: {tokenizer.size} pieces, the decoder {vocab}: pass its --tokenizer")
    published = (base / "config.json").is_file()
    sizes = replace(model.cfg, mapping="none", lora=False)
    if not published and sizes != PRESETS[cfg.preset]:
        raise DataError(f"{source} has other sizes than --preset {cfg.preset}: pass its own preset")

    # What the checkpoints of this run record of where it began. They record the folder of the base's run, not its step:
    # whoever loads them takes the newest.
    recorded_base = base if published else base.parent
    run.provenance |= dict(
        init=fingerprint(source),
        init_stage=state["stage"],
        base_hash=fingerprint(base),
        base=os.path.relpath(recorded_base, cfg.out),
        vision=os.path.abspath(cfg.vision) if cfg.vision else state.get("vision"))
    # What a checkpoint of this stage has to hold besides what it trains.
    run.inherited = set(load_delta(source)) if state["base"] else set()
    run.inherited |= {name for name in model.state_dict() if part_of(name) in ("F", "G")}
    if cfg.preset == "7b" and cfg.stage == 1:
        # Stage 1 sees exo clips only: 780 million parameters less in memory.
        model.ego_vit = model.ego_connector = None
    return model, tokenizer


def starting_point(cfg):
    """-> the checkpoint that a stage goes on from, the one with the weights that no stage trains (published ones, or stage
    0's), and the parts that the stage adds."""
    if cfg.stage == 1:
        source = init_checkpoint(cfg.init, 0)
        added = {}
    elif cfg.stage == 2:
        source = init_checkpoint(cfg.init, 1)
        added = {} if cfg.no_mapping else {"mapping": cfg.mapping}
    else:
        # Instruction tuning may go on from instruction tuning, with other data.
        source = init_checkpoint(cfg.init, 2, 3)
        added = {} if cfg.no_lora else {"lora": True}
    return source, base_folder(cfg), added


def base_folder(cfg):
    """The checkpoint with the untouched weights: --init if it holds them all, else --base if it is given, else the one
    that --init recorded, else stage0 beside --out. None if it is not there; stage 0 has none."""
    if cfg.stage == 0:
        return None
    base = newest_checkpoint(cfg.base)
    given = Path(cfg.base) != Path(cfg.out).parent / "stage0"   # else it is what `parse` has filled in
    if given and base is None:
        raise DataError(f"--base {cfg.base}: there are no weights")
    init = newest_checkpoint(cfg.init)
    recorded = read_state(init)["base"] if init else None
    # A checkpoint that builds on no other holds all weights: it is the base.
    if init and recorded is None:
        return init
    if given or recorded is None:
        return base
    return newest_checkpoint(init.parent / recorded) or base


def init_checkpoint(init, *stages: int):
    """The last checkpoint of the finished run `init` of one of these stages; all else is refused."""
    wanted = " or ".join(map(str, stages))
    folder = newest_checkpoint(init)
    if folder is None:
        weights = "pass --base WEIGHTS, or " if stages[0] == 0 else ""
        raise DataError(f"--init {init}: no checkpoint there; {weights}torchrun train.py "
                        f"--stage {stages[0]} --out {init}")
    state = read_state(folder)
    step, steps = state["step"], state["steps"]
    if state["stage"] not in stages or step < steps:
        raise DataError(f"--init {init} is of stage {state['stage']} at step {step} of {steps}; "
                        f"stage {stages[0] + 1} starts from a finished stage {wanted}")
    return folder


def training_loader(run, stage, model, tokenizer) -> Loader:
    """The samples of a stage: of its split of the micro-world, or of --data."""
    cfg = run.cfg
    manifests = cfg.data
    if cfg.toy_folder:
        manifests = [toy_split(cfg.toy_folder, stage.split, toy_world(cfg.toy_folder))]
    rows = read_manifests(manifests, cfg.root, cfg.allow_outside)
    if cfg.shuffle_pairs and stage.view == "pair":
        rows = shuffle_pairs(rows, cfg.seed)
    run.provenance.setdefault("manifest", hash_with_skip_lists(manifests))
    if (cfg.micro_batch or stage.batch // run.world) == 1 and stage.losses.keys() & {"clip", "contrastive"}:
        raise DataError("InfoNCE compares the samples of a micro batch with one another: "
                        "--micro-batch 2 or more")
    return make_loader(run, stage, model, tokenizer, rows=rows, batch=stage.batch, micro=cfg.micro_batch)


def make_loader(run, stage, model, tokenizer, **options) -> Loader:
    """A loader of what the stage shows, with room for the visual tokens of [x ; F(x)] or of one view."""
    # The learner reads x and F(x), everybody else one view.
    connectors = 2 if stage.view != "exo" and model.F is not None else 1
    return Loader(
        cfg=model.cfg,
        tokenizer=tokenizer,
        view=stage.view,
        text=stage.text,
        seed=run.cfg.seed,
        rank=run.rank,
        world=run.world,
        video_tokens=connectors * model.cfg.visual_tokens,
        **options)


# --------------------------------------------------------------------------------------------- 6 a run from end to end
def stages_of(cfg) -> tuple[Stage, ...]:
    """The rows of this run: the table's, changed by the flags. Stage 0 has four, every other stage one."""
    table = PAPER if cfg.preset == "7b" else TOY
    if cfg.stage not in table:
        raise DataError("stage 0 is the micro-world's own: --preset 7b is of stages 1, 2 and 3")
    return tuple(changed_by_flags(stage, cfg) for stage in table[cfg.stage])


def train(cfg, rank=0, world=1):
    """Run a stage to its end, then score it."""
    # The stages of this run: stage 0 has four, every other stage one.
    stages = stages_of(cfg)
    bf16 = torch.cuda.is_available() if cfg.dtype is None else cfg.dtype == "bfloat16"
    run = Run(cfg, rank, world, pick_device(), bf16)
    run.provenance["bf16"] = bf16
    model, tokenizer = initial_model(run)
    dtype = torch.bfloat16 if bf16 else torch.float32
    run.attention = choose_attention(run.device, dtype, model.cfg, first_problem_of_any_rank)

    loaders = [training_loader(run, stage, model, tokenizer) for stage in stages]
    stage_steps = [stage.steps or max(1, stage.epochs * loader.samples // stage.batch)
                   for stage, loader in zip(stages, loaders)]
    run.steps = sum(stage_steps)
    # Where an earlier call of this command has come.
    folder = resume_checkpoint(run)
    state = read_state(folder) if folder else dict(step=0, skipped=0)
    resumed_at = state["step"]
    was_finished = resumed_at == run.steps
    if was_finished and rank == 0:
        print(f"{folder} is finished: nothing to train")
    log_file = Path(cfg.out) / "log.jsonl"
    log = Log(log_file if rank == 0 else None, resumed_at, state["skipped"])

    # One stage after another, those that are not finished. The first of them goes on from the checkpoint.
    before = 0
    for stage, loader, steps in zip(stages, loaders, stage_steps):
        if resumed_at < before + steps:
            with stop_gracefully_on_signals(run):
                run_stage(run, model, tokenizer, stage, loader, before, steps, folder, log)
            folder = None
        before += steps

    result = Path(cfg.out) / ("eval.json" if cfg.toy_folder else "samples.png")
    already_shown = was_finished and result.is_file()
    if rank == 0 and not cfg.no_eval and not already_shown:
        if cfg.fsdp or was_finished:
            # Read the result: with FSDP this process holds a share of it, and a finished run has trained nothing.
            model, _ = load_checkpoint(cfg.out, base_folder(cfg), cfg.vision)
        show_result(run, model.to(run.device), tokenizer, loaders[-1].rows)


def show_result(run, model, tokenizer, rows):
    """The micro-world has a benchmark for every stage; of one's own data a few samples are shown."""
    cfg = run.cfg
    with run.autocast():
        if cfg.toy_folder:
            init = cfg.init if cfg.stage > 0 else None
            toy_benchmark(model, tokenizer, cfg.toy_folder, cfg.stage, cfg.out, init, base_folder(cfg))
        else:
            show_own_samples(model, tokenizer, rows, cfg.stage, cfg.out)


# ===== a first reader can stop here =====


# ------------------------------------------------------------------------------------------------------------- A flags
@dataclass(frozen=True)
class TrainConfig:
    """Every flag. Where the default is None, the stage table's row decides, or what stands in the comment's brackets."""
    stage: Literal[0, 1, 2, 3]                      # 0 Init | 1 demonstrator | 2 guidance | 3 self-practice
    preset: Literal["toy", "small", "7b"] = "toy"   # all sizes; 7b is the paper's
    data: list[str] = field(default_factory=lambda: ["out/toy"])    # manifests (.jsonl), or the micro-world's folder
    root: str | None = None                         # where the paths of the manifests start (each one's folder)
    base: str | None = None                         # untouched weights, a folder (stage0 beside --out)
    vision: str | None = None                       # a CLIP directory, where --base has no vision tower
    tokenizer: str | None = None                    # a tokenizer.model (the one beside the weights)
    init: str | None = None                         # checkpoint to start from (stage 1: --base; stage{N-1} beside --out)
    out: str | None = None                          # run folder (out/stage{N})
    steps: int | None = None                        # optimiser steps; in stage 0 of each of its four rows
    epochs: int | None = None                       # instead of steps
    batch: int | None = None                        # samples a step over all ranks
    micro_batch: int | None = None                  # samples a forward of one rank (batch / ranks)
    lr: float | None = None                         # peak rate of the fastest part; the others keep their ratio
    seed: int = 0                                   # of new weights and of the order of samples
    dtype: Literal["bfloat16", "float32"] | None = None     # compute (bfloat16 on CUDA, else float32)
    optimizer: Literal["muon", "adamw"] | None = None       # of matrices (muon; adamw for 7b)
    save_every: int | None = None                   # steps; the last step is always saved
    keep: int = 2                                   # checkpoints kept
    val_data: str | None = None                     # a manifest for the validation loss (the micro-world has its own)
    val_every: int | None = None                    # steps between validation losses (at the end, with --val-data)
    workers: int = 1                                # loader processes a rank
    fsdp: bool = False                              # FSDP2 instead of DDP: a rank holds its share of it all
    checkpoint_activations: bool = False            # backward computes whole blocks again: less memory, more work
    compile: bool = False                           # torch.compile of the blocks: a slow start, less memory
    timeout: int = 600                              # seconds until a silent rank ends the run
    max_bad: float = 0.01                           # share of samples that may be unreadable
    allow_outside: bool = False                     # manifest paths may leave their root
    overfit: bool = False                           # train on the first batch only
    no_eval: bool = False                           # skip the benchmark at the end
    no_kl: bool = False                             # the paper's ablation: no KL(exo || F(ego))
    no_cycle: bool = False                          # the paper's ablation: no cycle consistency; G is not trained
    forward_cycle_only: bool = False                # the paper's ablation: |G(F(x)) - x| alone
    no_mapping: bool = False                        # the paper's ablation: the LLM reads x alone, neither F nor G
    mapping: Literal["resnet", "mlp"] = "resnet"    # of which blocks F and G are; mlp is an ablation
    no_lora: bool = False                           # the paper's ablation: stage 3 without LoRA
    contrastive: float | None = None                # weight of InfoNCE between F(x) and y (0)
    shuffle_pairs: bool = False                     # our control: wrong exo partners
    kl_space: Literal["connector", "vit"] = "connector"     # where exo and F(ego) are compared
    kl_weight: float | None = None                  # instead of the stage table's
    ccl_weight: float | None = None                 # instead of the stage table's
    kl_temperature: float = 1.0                     # of the softmax over channels

    @property
    def toy_folder(self):
        """The folder of the micro-world, or None where manifests are given."""
        return None if self.data[0].endswith(".jsonl") else self.data[0]


# Flags that may differ when a run resumes. Most do not change what it computes. Two can: more steps stretch the schedule,
# and where the negatives of a loss are the micro batch (--contrastive, stage 0's clip), another micro_batch has others.
# base and init are known by their hashes.
MAY_CHANGE = {"out", "save_every", "keep", "val_data", "val_every", "workers", "timeout", "micro_batch", "no_eval", "max_bad",
              "fsdp", "checkpoint_activations", "base", "init", "steps"}
MAY_BE_ZERO = {"stage", "seed", "workers", "max_bad", "contrastive", "kl_weight", "ccl_weight"}
STAGE_2_ONLY = {"no_kl", "no_cycle", "forward_cycle_only", "no_mapping", "mapping", "contrastive", "shuffle_pairs",
                "kl_space", "kl_weight", "ccl_weight", "kl_temperature"}

# What an ablation takes away leaves these flags without effect.
CLASHES = {
    "no_kl": ("kl_weight", "kl_space", "kl_temperature"),
    "no_cycle": ("ccl_weight", "forward_cycle_only"),
    "no_mapping": ("kl_weight", "kl_space", "kl_temperature", "ccl_weight",
                   "forward_cycle_only", "contrastive")}


def parse(argv: list[str] | None = None) -> TrainConfig:
    """The command line: one flag a field. Unknown, abbreviated and misspelt flags are refused by name."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, TrainConfig, [f.name for f in fields(TrainConfig) if f.name != "data"])
    parser.add_argument("--data", nargs="+", default=["out/toy"], help="manifests (.jsonl), or the micro-world's folder")
    cfg = TrainConfig(**vars(parser.parse_args(argv)))
    for name, value in vars(cfg).items():
        flag = "--" + name.replace("_", "-")
        if type(value) in (int, float):
            may_be_zero = name in MAY_BE_ZERO
            if not 0 <= value < math.inf or value == 0 and not may_be_zero:
                parser.error(f"{flag} {value}: a number {'of 0 or more' if may_be_zero else 'above 0'} is needed")
        if name in STAGE_2_ONLY and cfg.stage != 2 and value != getattr(TrainConfig, name):
            parser.error(f"{flag} is of stage 2, whose F and G stage 3 goes on with")
    if cfg.no_lora and cfg.stage != 3:
        parser.error("--no-lora is of stage 3: no other stage trains a LoRA")
    if cfg.stage == 0 and cfg.toy_folder is None:
        parser.error("stage 0 is the micro-world's own: your own data starts at stage 1, from its weights or from --base")
    validates = cfg.val_every or cfg.val_data
    if validates and (cfg.stage == 0 or not (cfg.val_data or cfg.toy_folder)):
        parser.error("a validation loss needs stage 1, 2 or 3, and --val-data x.jsonl or the micro-world")
    if cfg.steps and cfg.epochs:
        parser.error("--steps and --epochs both say how long: give one of them")
    for ablation, idle in CLASHES.items():
        for name in idle:
            if getattr(cfg, ablation) and getattr(cfg, name) != getattr(TrainConfig, name):
                parser.error(f"--{name} does nothing with --{ablation}: give one of them".replace("_", "-"))
    if cfg.val_data and not cfg.val_data.endswith(".jsonl"):
        parser.error(f"--val-data {cfg.val_data}: a manifest is a file that ends in .jsonl")
    manifests = [*cfg.data, cfg.val_data] if cfg.val_data else cfg.data
    for path in manifests:
        is_manifest = path.endswith(".jsonl")
        if is_manifest and not Path(path).is_file():
            parser.error(f"{path} is not there")
        if not is_manifest and (len(cfg.data) > 1 or Path(path).is_file()):
            parser.error(f"--data {path}: a manifest is a file that ends in .jsonl, a micro-world one folder")

    # What is not given lies beside --out. Stage 1 starts from the base, every later stage from the one before it.
    out = Path(cfg.out or f"out/stage{cfg.stage}")
    base = cfg.base or str(out.parent / "stage0")
    init = cfg.init or (base if cfg.stage < 2 else str(out.parent / f"stage{cfg.stage - 1}"))
    optimizer = cfg.optimizer or ("adamw" if cfg.preset == "7b" else "muon")
    if cfg.fsdp and (optimizer == "muon" or cfg.stage == 0):
        parser.error("--fsdp needs --optimizer adamw (Muon wants whole matrices) and stage 1, 2 or 3")
    return replace(
        cfg,
        out=str(out),
        base=base,
        init=init,
        optimizer=optimizer)


def changed_by_flags(stage, cfg) -> Stage:
    losses = dict(stage.losses)
    trains = dict(stage.trains)
    if cfg.stage == 2:
        given = dict(kl=cfg.kl_weight, ccl=cfg.ccl_weight, contrastive=cfg.contrastive)
        losses |= {name: weight for name, weight in given.items() if weight is not None}

    # The ablations take away parts and losses.
    gone = set()
    if cfg.no_mapping:
        gone |= {"F", "G", *losses} - {"vtg"}                   # every other loss compares what F or G has mapped
    if cfg.no_cycle:
        gone |= {"G", "ccl"}
    if cfg.no_kl:
        gone |= {"kl"}
    if cfg.no_lora:
        gone |= {"lora"}
    trains = {part: rate for part, rate in trains.items() if part not in gone}
    losses = {name: weight for name, weight in losses.items() if name not in gone}

    # --lr is the fastest part's rate; the other parts keep their ratio to it.
    factor = cfg.lr / max(trains.values()) if cfg.lr else 1
    trains = {part: rate * factor for part, rate in trains.items()}
    return replace(
        stage,
        trains=trains,
        losses=losses,
        batch=cfg.batch or stage.batch,
        epochs=cfg.epochs or stage.epochs,
        steps=0 if cfg.epochs else cfg.steps or stage.steps)


# --------------------------------------------------------------------------------------------------- B ranks, wrapping
def start_process():
    """Rank and world size, as torchrun tells. The process takes its share of the cores."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if "OMP_NUM_THREADS" not in os.environ:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, os.cpu_count() // neighbours))
    return rank, world


def join_ranks(backend, seconds):
    """Meet the other ranks, within `seconds`.

    torchrun keeps one store over its restarts, in which a rank would find the addresses of the dead (pytorch#135712):
    on one machine each restart gets names of its own. Several machines count restarts apart; start torchrun there with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    one_machine = os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
    limit = timedelta(seconds=seconds)
    store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    store = dist.PrefixStore(attempt, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)


def first_problem_of_any_rank(check):
    """Call a check first on local rank 0, which fills the cache of compiled kernels, then on the others."""
    if not dist.is_initialized():
        return check()
    # One process of each machine compiles, then the others find the result.
    problems = [None] * dist.get_world_size()
    goes_first = os.environ.get("LOCAL_RANK", "0") == "0"
    own = check() if goes_first else None
    dist.barrier()
    if not goes_first:
        own = check()
    dist.all_gather_object(problems, own)
    return next(filter(None, problems), None)


@contextlib.contextmanager
def stop_gracefully_on_signals(run):
    """SIGTERM or Ctrl-C: the step under way ends, at most one more is taken, then the run saves and exits.

    A second signal, more than a second later (launchers pass theirs on at once), ends it on the spot. torchrun kills
    30 s after its own SIGTERM: where two steps and a save take longer, rely on --save-every.
    """
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


def tune_malloc():
    """Let glibc keep the memory that a step frees: the kernel would clear every page again for the next step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                                     # M_MMAP_MAX: no tensor is a mapping of its own
        libc.mallopt(-1, -1)                                    # M_TRIM_THRESHOLD: the heap never shrinks


# Operators whose results are stored during a block's forward: products and fused attention. Backward computes the rest
# of the block (norms, activations, gates) again, which costs little.
KEPT_FOR_BACKWARD = [
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default,
    torch.ops.exo2ego.flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default]


def wrap(run, objective) -> nn.Module:
    """The objective as the ranks share it: its blocks compiled or checkpointed, then DDP, or FSDP2 by block."""
    cfg = run.cfg
    blocks = [module for module in objective.modules() if isinstance(module, BLOCKS)]
    keep_products = partial(create_selective_checkpoint_contexts, KEPT_FOR_BACKWARD)
    if cfg.compile:
        # All blocks of a class share their compiled code: one version for each width, frozen or trained.
        torch._dynamo.config.recompile_limit = 64
    for block in blocks:
        # Undo what an earlier row of stage 0 has set.
        block.__dict__.pop("forward", None)
        if cfg.compile:
            block.forward = compiled(block)
        # The one policy of memory: keep products, or with --checkpoint-activations the block's input alone. A compiler
        # decides by itself.
        if cfg.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        elif not cfg.compile:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=keep_products)

    if cfg.fsdp:
        for module in [*blocks, objective]:
            fully_shard(module)
        return objective
    if run.world > 1:
        return DistributedDataParallel(objective, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return objective


def compiled(block: nn.Module):
    """torch.compile of a block where gradients pass; scoring has other shapes and runs as it is. Attention is left out:
    its kernels are fused already, and the lengths in `seg` differ in every batch."""
    if hasattr(block, "attention"):
        block.attention = torch.compiler.disable(type(block).attention)
    plain = block.forward
    fast = torch.compile(block.forward, dynamic=getattr(block, "tokens_vary", False))

    def forward(*args):
        return fast(*args) if torch.is_grad_enabled() else plain(*args)
    return forward


def sync_gradients(wrapped, run, now):
    """Whether the next backward exchanges gradients with the other ranks. To be said before its forward."""
    if run.cfg.fsdp:
        wrapped.set_requires_gradient_sync(now)
    elif run.world > 1:
        wrapped.require_backward_grad_sync = now


def gather_full_tensor(tensor) -> Tensor:
    """A tensor that may be sharded over the ranks, whole, on each of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# -------------------------------------------------------------------------------------------------- C saving, resuming
def save_checkpoint(run, objective, optimizers, step, trained, skipped):
    """What differs from the base (in stage 0 everything), and what resuming exactly needs, in step_000200/.

    It is written under a temporary name, synced, and renamed: a killed save never looks finished.
    """
    cfg = run.cfg
    # The random state of every rank.
    own = random_state(run.device).to(run.device)
    rng = [own.clone() for _ in range(run.world)]
    if run.world > 1:
        dist.all_gather(rng, own)
    # With DDP all ranks hold the same. With FSDP each has a share, and all must help to gather it.
    if run.rank and not cfg.fsdp:
        return
    # Of the model what this stage or an earlier one trained, and what a loss needs.
    kept = run.inherited | {name.removeprefix("model.") for name in trained}
    tensors = {}
    for name, tensor in objective.state_dict().items():
        name = name.removeprefix("model.")
        if cfg.stage == 0 or name.startswith("loss.") or name in kept:
            tensors[name] = gather_full_tensor(tensor).contiguous().cpu()
    resume = optimizer_state(optimizers)
    if run.rank:
        return
    resume |= {f"rng.{rank}": state.cpu() for rank, state in enumerate(rng)}

    # The files under a temporary name.
    folder = Path(cfg.out) / f"step_{step:06d}"
    unfinished = folder.with_name(f"part_{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(tensors, unfinished / "model.safetensors")
    save_file(resume, unfinished / "optim.safetensors")
    shutil.copyfile(objective.tokenizer.path, unfinished / "tokenizer.model")
    state = run.provenance | signature(unfinished) | dict(
        stage=cfg.stage,
        step=step,
        steps=run.steps,
        model=asdict(objective.model.cfg),
        config=asdict(cfg),
        recipe=recipe_of(cfg),
        skipped=skipped)
    (unfinished / "state.json").write_text(json.dumps(state, indent=1))

    # On disk, before the folder takes its name.
    for file in unfinished.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(unfinished, folder)
    for old in sorted(folder.parent.glob("step_[0-9]*"))[:-cfg.keep]:
        shutil.rmtree(old)


def optimizer_state(optimizers):
    """The optimisers' moments by name: number of the optimiser, of the parameter, key. Every rank must call it."""
    tensors = {}
    for i, optimizer in enumerate(optimizers):
        for j, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                whole = gather_full_tensor(value.detach())
                tensors[f"{i}.{j}.{key}"] = whole.contiguous().cpu()
    return tensors


def load_optimizers(folder, optimizers, rank, device):
    """Moments and this rank's random state, exactly as saved."""
    saved = load_delta(folder, "optim.safetensors")
    for i, optimizer in enumerate(optimizers):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = {}
        for name, value in saved.items():
            if not name.startswith(f"{i}."):
                continue
            _, j, key = name.split(".")
            p = params[int(j)]
            if isinstance(p, DTensor) and value.shape == p.shape:
                value = distribute_tensor(value.to(device), p.device_mesh, p.placements)
            state.setdefault(int(j), {})[key] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    if f"rng.{rank}" in saved:
        set_random_state(saved[f"rng.{rank}"], device)


def random_state(device) -> Tensor:
    """The generators that a rank draws from, as bytes: the CPU's, then its GPU's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_random_state(state, device):
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size])
    if device.type == "cuda" and len(state) > size:
        torch.cuda.set_rng_state(state[size:], device)


def recipe_of(cfg):
    """What a run computes, by name: the flags that matter, and the rows of the stage table as the flags changed them."""
    recipe = {flag: value for flag, value in asdict(cfg).items() if flag not in MAY_CHANGE}
    for stage in stages_of(cfg):
        row = asdict(stage)
        del row["steps"]                                        # which may grow
        recipe |= {f"{stage.name}: {key}": value for key, value in row.items()}
    return json.loads(json.dumps(recipe))                       # as a file gives it back


def hash_with_skip_lists(manifests) -> str:
    """Known by their bytes, and by those of the lists of bad rows that data.py check left beside them."""
    hashes = []
    for manifest in map(Path, manifests):
        for file in (manifest, manifest.with_suffix(".bad.jsonl")):
            if file.is_file() and file.stat().st_size:
                hashes.append(file_hash(file)[:16])
    return "+".join(hashes)


def resume_checkpoint(run):
    """The newest finished checkpoint of this very run, or None."""
    folder = newest_checkpoint(run.cfg.out)
    if folder is not None:
        refuse_another_run(run, folder)
    return folder


def refuse_another_run(run, folder):
    """The recipe of a checkpoint, and what it stands on, must be those of the run, field by field; steps may grow."""
    cfg, state = run.cfg, read_state(folder)
    now = git_revision()
    if run.rank == 0 and state["git"] != now:
        print(f"{folder} was made by code {state['git']}, {now} goes on with it")
    # The base may move: its hash tells which it is.
    saved = state["recipe"] | {key: state.get(key) for key in run.provenance}
    for key, value in (recipe_of(cfg) | run.provenance).items():
        if saved.get(key) != value and key != "base":
            raise DataError(f"{cfg.out} holds a run with {key}={saved.get(key)}, this one has {value}: choose "
                            f"another --out or remove the folder")
    # More steps than the run was meant to have go on from where it is, on the schedule of the new length.
    before = state["steps"]
    if run.steps < before or run.steps > before and cfg.stage == 0:
        raise DataError(f"{cfg.out} holds a run of {before} steps, this one has {run.steps}: --steps may only grow, "
                        f"and not in stage 0; choose another --out")
    if run.steps > before and run.rank == 0:
        stage, = stages_of(cfg)
        old, new = (schedule(state["step"], length, stage) for length in (before, run.steps))
        print(f"{folder} goes on to step {run.steps} instead of {before}: at step {state['step']} the rate jumps from "
              f"{old:.3f} to {new:.3f} of its peak")


def restore_weights(objective, folder, device):
    """Put a checkpoint's own tensors into the objective; they are assigned, since the base may be half precision."""
    tensors = {}
    for name, tensor in load_delta(folder).items():
        owner = "" if name.startswith("loss.") else "model."
        tensors[owner + name] = tensor.to(device, copy=True)
    objective.load_state_dict(tensors, strict=False, assign=True)


# --------------------------------------------------------------------------------------------------------------- D log
class Log:
    """log.jsonl, one object a step, cut back to the step that a run resumes from; and the progress line."""
    def __init__(self, path, step, skipped=0):
        """`path` None: a rank that keeps no log."""
        self.file, self.skipped = None, skipped
        self.flops = 0.0                                        # of a sample; 0 is not known
        self.peak = None                                        # TFLOP/s of all ranks' GPUs, where it is known
        if path is None:
            return
        # What was logged after the checkpoint is run again, so it goes.
        kept = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break                                           # a kill cut this line short
            if row["step"] <= step:
                kept.append(line + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept))
        self.file = open(path, "a", buffering=1)

    def write(self, row, text=""):
        """One object to the file, one line to the screen."""
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            if text:
                print(text, flush=True)

    def skip(self, micro_batches, number, seen, max_bad):
        """Name this rank's unreadable samples, and count those of all ranks, `number`. Too many of `seen` end the run."""
        for batch in micro_batches:
            for reason in batch.skipped:
                print(f"skipped {reason}", flush=True)
        # Of a short run a few may be bad.
        self.skipped += number
        if self.skipped > max_bad * max(seen, 500):
            raise DataError(f"{self.skipped} of {seen} samples could not be read, more than "
                            f"--max-bad {max_bad}; the lines above name them, python data.py check "
                            f"all of them; a new run leaves those out")

    def start(self, done: int):
        """A stage begins, or goes on after its first `done` steps; then their skipped samples still count."""
        if done == 0:
            self.skipped = 0
        self.clock = time.monotonic()
        self.shown = done, self.clock                           # the step of the last line, and when it was

    def step(self, done, length, samples, tokens, losses, row):
        """Step number `done` of `length` is over. Its time runs from the end of the step before: with waiting for data, and
        with a validation or a save that came between."""
        now = time.monotonic()
        took, self.clock = now - self.clock, now
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        work = samples * self.flops / 1e12                      # TFLOP
        row = row | losses | dict(
            skipped=self.skipped,
            seconds=took,
            clips_per_second=samples / took,
            tokens_per_second=tokens / took,
            tflops=work / took,
            max_memory_bytes=memory)
        # The screen gets every tenth step.
        text = ""
        if done % 10 == 0 or done == length:
            # The speed is that since the last line.
            shown, when = self.shown
            each = (now - when) / (done - shown)
            self.shown = done, now
            values = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            speed = f"{each:.3f} s/step | {samples / each:.0f} clips/s"
            if work:
                speed += f" | {work / each:.3g} TFLOP/s"
            if work and self.peak:
                speed += f", {100 * work / each / self.peak:.0f} % of the peak"
            seconds_left = (length - done) * each
            text = f"step {done}/{length} | {values} | {speed} | ETA {seconds_left:.0f} s"
        self.write(row, text)


# TFLOP/s of cards in bfloat16, as their makers give them for dense matrices. The first name that is in a card's counts.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250}


def count_flops(objective, batch) -> float:
    """FLOPs a sample of the matrix products of a step, forward and backward (what --checkpoint-activations computes again
    does not count). A twin on the meta device, which has shapes and no numbers, takes the micro batch."""
    from torch.utils.flop_counter import FlopCounterMode        # here, because it registers an exit hook
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = Exo2Ego(objective.model.cfg)
        twin = Objective(model, objective.tokenizer, objective.stage, objective.cfg, objective.world)
    freeze(twin, objective.stage, bf16=False)
    ego, exo = (clips if clips is None else clips.to("meta") for clips in (batch.ego, batch.exo))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward_flops})
    # The counter knows products, not the fused kernels of attention: torch's formula, then, which the variable asks for.
    plain = mock.patch.dict(os.environ, EXO2EGO_ATTENTION="sdpa")
    with torch.random.fork_rng(devices=[]), plain, sdpa_kernel(SDPBackend.MATH), counter:
        twin(replace(batch, ego=ego, exo=exo), 1, 1)["loss"].backward()
    return counter.get_total_flops() / batch.samples


def convolution_backward_flops(grad, x, weight, bias, stride, padding, dilation, transposed, outside, groups, wanted, **_):
    """Each of the `wanted` gradients costs what the forward did. torch's own count forgets that groups do not mix. The
    tensors are given as their shapes."""
    positions = x[0] * math.prod((x if transposed else grad)[2:])
    return 2 * positions * math.prod(weight) * sum(wanted[:2])


def describe(run, objective, loader, length, log):
    """Before the first step of a stage: the arithmetic, what trains, and what the model is fed."""
    stage, micro = objective.stage, loader.micro
    arithmetic = f"{stage.batch // micro} micro batches x {micro} in all, on {run.world} ranks"
    print(f"\n== stage {run.cfg.stage}: {stage.name} == {length} steps x {stage.batch} of {loader.samples} samples "
          f"({arithmetic})")
    # Parameters of each part, trained and frozen.
    parts = [*objective.model.named_children(), ("loss", objective.loss)]
    for name, module in parts:
        trained = frozen = 0
        for p in module.parameters():
            if p.requires_grad:
                trained += p.numel()
            else:
                frozen += p.numel()
        if trained or frozen:
            print(f"   {name:14} {trained:>10,} trained {frozen:>10,} frozen")
    dtype = "bfloat16" if run.bf16 else "float32"
    machine = f"{run.device}, {dtype}, {torch.get_num_threads()} threads; {run.attention}"
    print(f"   losses {stage.losses}, rates {stage.trains}, {run.cfg.optimizer}, {machine}")
    if run.cfg.compile:
        print("   compiling: the first steps take a minute or more")
    batch = loader.batch(0)[0]
    print(f"   fed: {batch.describe(objective.tokenizer)}", flush=True)
    # For the speeds that follow: the work of a sample, and the most that the GPUs can do.
    try:
        log.flops = count_flops(objective, batch)
    except RuntimeError as error:
        # A loss of one's own may look at numbers, which the twin has not.
        print(f"   TFLOP/s are not counted: {error}")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    log.peak = next((run.world * peak for name, peak in PEAK_TFLOPS.items() if name in card), None)


# -------------------------------------------------------------------------------------------------------------- E main
def validation_loader(run, stage, model, tokenizer) -> Loader:
    """The samples of the validation loss: of --val-data, or of the micro-world."""
    cfg = run.cfg
    manifest = cfg.val_data or toy_split(cfg.toy_folder, "val", toy_world(cfg.toy_folder))
    rows = read_manifests([manifest], cfg.root, cfg.allow_outside)
    if len(rows) < run.world:
        raise DataError(f"{manifest} has {len(rows)} rows, fewer than the {run.world} ranks "
                        f"that share them")
    # A small set is a batch, too: every rank has a share of it.
    micro = min(cfg.micro_batch or stage.batch // run.world, len(rows) // run.world)
    return make_loader(run, stage, model, tokenizer, rows=rows, batch=micro * run.world, micro=micro, train=False)


def shuffle_pairs(rows, seed) -> list[dict]:
    """The control: every ego clip gets the exo clips of another row (a cyclic shift in random order)."""
    if not all("exo" in row for row in rows):
        return rows                                             # the loader names the row that lacks them
    order = np.random.default_rng(seed).permutation(len(rows))
    partner = dict(zip(order, np.roll(order, 1)))
    return [row | {"exo": rows[partner[i]]["exo"]} for i, row in enumerate(rows)]


def make_missing_stage_0(cfg):
    """Train stage 0 if it is missing: by whichever process gets the lock first. The others wait, and find it done."""
    def missing():
        newest = base_folder(cfg)
        return newest is None or read_state(newest)["step"] < read_state(newest)["steps"]
    if cfg.stage == 0 or cfg.preset == "7b" or cfg.toy_folder is None:
        return
    # A stage 1 that sets out from another run needs none.
    if cfg.stage == 1 and cfg.init != cfg.base:
        return
    if not missing():
        return
    with file_lock(Path(cfg.base) / ".lock", wait=True):
        if missing():
            # A later stage that has no start should say so now, not when stage 0 is done.
            if cfg.stage > 1:
                starting_point(cfg)
            train(parse([
                "--stage", "0",
                "--preset", cfg.preset,
                "--data", cfg.toy_folder,
                "--seed", str(cfg.seed),
                "--out", cfg.base,
                "--workers", str(cfg.workers)]))


def explain(error, out, world):
    """The sentence of an error that a user can mend; a RuntimeError that nobody foresaw is raised again."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped: the same command goes on"
    if isinstance(error, DataError):
        return str(error)
    text = (str(error) or repr(error)).splitlines()[0][:300]
    # A file that is missing is named by the error itself, below.
    if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, FileNotFoundError):
        return f"{getattr(error, 'filename', None) or out} cannot be written or read: {text}"
    if not isinstance(error, RuntimeError):
        # Perhaps it is a bug, and then its place helps; but for what a loader's worker had to say, which data.py's
        # _raise_if_error passes on.
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(at.filename).name}:{at.lineno}"
        return str(error) if at.name == "_raise_if_error" else f"{error} ({place})"
    if "DataLoader" in text:
        return f"a loader worker died or hangs; the same command goes on from the last checkpoint ({text})"
    if world > 1 and re.search("timed out|timeout|connection (closed|reset)", text, re.IGNORECASE):
        return f"the ranks waited in vain for one another (--timeout); {text}"
    raise error


def main(argv=None):
    cfg = parse(argv)
    rank, world = start_process()
    # At 7b, holes in such a heap would cost gigabytes.
    if cfg.preset != "7b":
        tune_malloc()
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(pick_device())
        make_missing_stage_0(cfg)
        # Rank 0 holds the run folder: a second run into it is refused.
        lock = contextlib.nullcontext()
        if rank == 0:
            lock = file_lock(Path(cfg.out) / ".lock", wait=False)
        with lock:
            if world > 1:
                join_ranks("nccl" if torch.cuda.is_available() else "gloo", cfg.timeout)
            # One process has nobody to share with.
            train(cfg if world > 1 else replace(cfg, fsdp=False), rank, world)
    except (ValueError, OSError, RuntimeError, SafetensorError, KeyboardInterrupt) as error:
        print(f"train.py: {explain(error, cfg.out, world)}", file=sys.stderr, flush=True)
        # With several ranks at once: the others must not wait for a rank that gave up.
        if world > 1:
            os._exit(2)
        sys.exit(2)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
