"""Train Exo2Ego, stage by stage. The stage table is the paper's method; one loop runs every row of it.

    torchrun train.py --stage 1                        # makes the micro-world and stage 0 if they are missing
    torchrun --nproc_per_node 2 train.py --stage 2     # any number of processes that divides a batch: the same batches

A run saves itself after every tenth of its steps, and whenever ten minutes have passed. After a kill -9 the same
command goes on from the last save, bit for bit; Ctrl-C, SIGTERM and other polite signals save first. Every step is
one object in out/stageN/log.jsonl, every validation another.
"""
from __future__ import annotations

import os

if __name__ == "__main__":
    # OpenMP's threads spin while they wait. Where several programs share the cores, that takes time from all of them.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import re
import resource
import shutil
import signal
import sys
import tempfile
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
import torch.nn.functional as nnf
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from data import (DataError, Loader, Screen, Tokenizer, add_flags, chats_of, die_with_parent, file_lock,
                  read_manifests, toy_split, toy_tokenizer, usable_cores)
from eval import show_own_samples, toy_benchmark
from model import (BLOCKS, PRESETS, Exo2Ego, autocast, checkpoints, choose_attention, feature_kl, file_hash,
                   fingerprint, git_revision, load_checkpoint, load_delta, newest_checkpoint, pick_device, read_state,
                   save_files)


# -------------------------------------------------------------------------------------------------- 1 the stage table
@dataclass(frozen=True)
class Stage:
    """What trains, on what, towards what."""
    name: str
    trains: dict[str, float]            # part -> peak rate, all else is frozen; "extra": parameters that a loss brings
    split: str                          # of the micro-world; --data replaces it
    view: str                           # what a sample shows: exo | ego | pair | none
    losses: dict[str, float]            # weight of each term
    batch: int                          # samples per step, over all ranks
    micro: int = 0                      # samples per forward of one rank; 0: its whole share of the batch
    steps: int = 0                      # 0: epochs decide
    epochs: int = 1
    warmup: float = 0.03                # share of the steps; after it a cosine goes down to `floor` of the peak
    floor: float = 0.05
    supervise: str = "narration"        # which text: the "narration", the "turns" of a chat, or a "mix" of both
    terms: str = "views"                # which method of Objective makes the terms: views | language | image_text
    copies: tuple = ()                  # parts that start as a copy: (from, to)


# The paper: rates, batches, epochs and warm-up are its own; the loss weights and what stage 3 freezes (the ego
# connector) are our choice. A micro batch is what an 80-GB card takes. Init has a row for its ego half: the exo half
# is VideoLLaMA2's own, whose weights come with --base.
PAPER = {
    0: (Stage(
        name="init ego",
        trains=dict(ego_vit=1e-3, ego_connector=1e-3),
        split="ego", view="ego", losses=dict(vtg=1),
        batch=512, micro=1, epochs=5, warmup=0.1, floor=0),),
    1: (Stage(
        name="demonstrator self-preparation",
        trains=dict(exo_vit=1e-4, exo_connector=1e-4),
        split="pairs", view="exo", losses=dict(vtg=1),
        batch=256, micro=2, epochs=2, floor=0),),
    2: (Stage(
        name="demonstrator-learner guidance",
        trains=dict(ego_vit=1e-4, ego_connector=1e-4, F=1e-4, G=1e-4),
        split="pairs", view="pair", losses=dict(vtg=1, kl=5, ccl=3),
        batch=256, micro=1, epochs=2, floor=0),),
    3: (Stage(
        name="learner self-practice",
        trains=dict(ego_vit=2e-5, F=2e-5, lora=2e-5),           # not ego_connector: our choice
        split="instruct", view="ego", losses=dict(vtg=1), supervise="turns",
        batch=64, micro=1, epochs=1, floor=0),),
}
# The micro-world: rates (on Muon's scale), steps and weights are our choice, from trials. Stage 0 is our stand-in for
# a download: a decoder that reads visual tokens, a CLIP, and the paper's Init of both encoders.
TOY = {
    0: (Stage(
            name="language",
            trains=dict(decoder=3e-3),
            split="corpus", view="none", losses=dict(vtg=1), supervise="mix", terms="language",
            batch=64, steps=110, warmup=0.08),
        Stage(
            name="images and texts",
            trains=dict(exo_vit=1.5e-2, extra=1.5e-2),
            split="corpus", view="exo", losses=dict(image_text=1), terms="image_text",
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
        trains=dict(ego_vit=3e-3, ego_connector=3e-3, F=1e-2, G=1e-2),
        split="pairs", view="pair", losses=dict(vtg=1, kl=5, ccl=3),
        batch=32, steps=480),),
    3: (Stage(
        name="learner self-practice",
        trains=dict(ego_vit=3e-4, F=3e-4, lora=3e-3),
        split="instruct", view="ego", losses=dict(vtg=1), supervise="turns",
        batch=32, steps=150),),
}


# --------------------------------------------------------------------------------------------------------- 2 the loop
def run_stage(run, stage, loader, objective, earlier, steps, folder, log):
    """Take the `steps` steps of one row of the stage table. Where there is a checkpoint `folder`, take those that it
    lacks.

    A run has one row, or in the toy's stage 0 four. `step` counts within the row, from 0. `run_step` counts through
    the run, from 1; `earlier` steps came before this row.
    """
    trained, first = prepare_objective(run, objective, earlier, folder)
    if run.rank == 0:
        describe(run, objective, loader, steps, log)
    wrapped, trained, optimizers = prepare_training(run, objective, trained, folder if first > 0 else None)
    validation = validation_loader(run, objective)
    batches = loader.stream(first, steps, run.cfg.workers, run.cfg.overfit, run.cfg.timeout)
    keeper = Keeper(run, objective, optimizers, trained, log, earlier + first)

    with keeper:
        for step, micro_batches in enumerate(log.timed(batches, first), start=first):
            # 1) learning rate: linear warm-up, then a cosine down to the stage's floor
            run_step = earlier + step + 1
            lr_scale = schedule(step, steps, stage)
            set_rates(optimizers, lr_scale)

            # 2) count what the whole step holds, over micro batches and ranks: every loss is divided by that. If a
            # rank got a signal, or has an error instead of micro batches, all ranks save and leave here, between two
            # steps
            counts = StepCounts.of(micro_batches, run, save=keeper.is_due(run_step))
            keeper.leave_if(keeper.reason_to_leave(counts, micro_batches, seen=(step + 1) * stage.batch))

            # 3) forward and backward, one micro batch at a time; ranks exchange gradients at the last one only
            totals = {}
            for i, batch in enumerate(micro_batches):
                sync_gradients(wrapped, run, now=i == len(micro_batches) - 1)
                with autocast(run.device, run.bf16):
                    terms = wrapped(batch.to(run.device), counts.supervised, counts.samples)
                terms["loss"].backward()
                for name, value in terms.items():
                    totals[name] = totals.get(name, 0) + value.detach()
            losses = run.mean(totals)

            # 4) clip the gradients; leave if a loss is no number; update
            norm = float(gather_full_tensor(nn.utils.clip_grad_norm_(trained.values(), 1.0)))
            keeper.leave_if(not_a_number(losses, norm, run_step, micro_batches))
            keeper.begin_update()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            # 5) one line of log.jsonl. A failure between begin_update and end_update saves nothing: the step is half
            # done
            rate = lr_scale * max(stage.trains.values())
            row = dict(step=run_step, steps=run.steps, lr=rate, grad_norm=norm)
            log.step(step + 1, steps, counts, losses, row)
            keeper.end_update(run_step)

            # 6) save, validate
            last = step + 1 == steps
            if last or counts.save:
                keeper.save()
            if validation and (last or run_step % (run.cfg.val_every or run.steps) == 0):
                validate(run, objective, validation, run_step, log)


class StepCounts(NamedTuple):
    """What a whole step holds, over all micro batches and ranks."""
    supervised: float = 0               # tokens, each once for every sample it serves
    samples: float = 0
    tokens: float = 0
    skipped: float = 0                  # tries to read a sample that failed; another sample took its place
    broken: float = 0                   # ranks that have an error instead of micro batches
    stop: float = 0                     # ranks that a signal asked to stop
    save: float = 0                     # 1 if rank 0 finds that it is time to save after this step

    @classmethod
    def of(cls, micro_batches, run, save) -> StepCounts:
        broken = isinstance(micro_batches, Exception)
        own = [cls(broken=broken, stop=run.stop > 0, save=save and run.rank == 0)]
        for batch in [] if broken else micro_batches:
            own.append(cls(
                supervised=batch.weights.sum(),
                samples=batch.samples,
                tokens=len(batch.ids),
                skipped=len(batch.skipped)))
        total = torch.tensor(own, dtype=torch.float32).sum(0)
        return cls(*run.sum(total.to(run.device)))


def prepare_objective(run, objective, earlier, folder):
    """Put the objective on its device, with the weights of the checkpoint `folder` if there is one -> what trains, by
    name; how many steps of the stage are done."""
    stage, model = objective.stage, objective.model
    # The checkpoint may be of an earlier row: then none of this row's steps are done.
    done = 0
    if folder:
        done = max(0, read_state(folder)["step"] - earlier)
        restore_weights(objective, folder, run.device)
    if done == 0:
        for source, target in stage.copies:
            getattr(model, target).load_state_dict(getattr(model, source).state_dict())
    return freeze(objective, run.bf16), done


def prepare_training(run, objective, trained, folder):
    """-> the objective as the ranks share it, what trains, and its optimisers; these, and the random numbers to come,
    as the checkpoint `folder` has them."""
    wrapped = wrap(run, objective)
    # FSDP has replaced the parameters by their shards.
    trained = {name: p for name, p in objective.named_parameters() if name in trained}
    rates = {name: objective.stage.trains[part_of(name)] for name in trained}
    optimizers = make_optimizers(trained, rates, run.cfg)
    if folder:
        load_optimizers(folder, optimizers, run.rank, run.device)
    return wrapped, trained, optimizers


@torch.no_grad()
def validate(run, objective, loader, step, log):
    """Text loss per token on the validation clips, the same for any number of ranks. Ranks share the clips in turns.
    All ranks must run the model equally often, because with FSDP they wait for one another: one without a clip reads
    the first clip again, with a weight of zero."""
    sums = torch.zeros(2, device=run.device)                                # nats, tokens
    objective.eval()
    for i in range(math.ceil(loader.samples / loader.batch_size)):
        # A signal to any rank ends it: there may be seconds left, in which the run has to save.
        asked = torch.tensor([run.stop], device=run.device)
        if sum(run.sum(asked)) > 0:
            log.write(
                dict(step=step, val_loss=math.nan),
                f"step {step} | no val_loss: the run was asked to stop")
            return
        for batch in loader.batch(i) or [without_weight(loader.micro_batch(range(1)))]:
            batch = batch.to(run.device)
            with autocast(run.device, run.bf16):
                sums += objective.text_sum(batch)
    objective.train()
    total, tokens = run.sum(sums)
    val_loss = total / tokens
    log.write(dict(step=step, val_loss=val_loss), f"step {step} | val_loss {val_loss:.4f}")


# ------------------------------------------------------------------------------------------------------- 3 objectives
class Objective(nn.Module):
    """The losses of a stage. Text is averaged over the supervised tokens of a step, all else over its samples: each
    term is a sum, divided by what the whole step holds. So micro batches and ranks add up to the plain mean; DDP
    averages over ranks, hence the factor `world`. (Some depend on what else is in a micro batch: InfoNCE
    (`contrastive`, `image_text`), by its negatives, and stage 0's `language`, by its noise.)

    To add a loss: give it a weight in a row of the stage table, and where that row has it (`in self.stage.losses`)
    return its term from `views`, a vector (X,) with one number per sample (of vtg, known by its name, one per token).
    Or give `train` a class of your own.
    """
    def __init__(self, model, tokenizer, stage, cfg, world):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.stage = stage
        self.cfg = cfg
        self.world = world
        # What a loss needs and the model does not.
        self.extra = nn.Module()
        if "image_text" in stage.losses:
            self.extra.words = nn.EmbeddingBag(model.cfg.vocab, 64, mode="sum")
            self.extra.image = nn.Linear(model.cfg.vit_width, 64)
            self.extra.log_scale = nn.Parameter(torch.tensor(14.0).log())

    def forward(self, batch, supervised, samples):
        """One micro batch -> its share of each term, and of "loss", their weighted sum. The whole step holds
        `supervised` tokens and `samples` samples.

        A sample of stage 2 is a pair: an exo clip with the ego clip of its moment. A moment's text is read once,
        however many exo clips it has; its tokens count once for each.
        """
        make_terms = {"views": self.views, "language": self.language, "image_text": self.image_text}
        terms = make_terms[self.stage.terms](batch)
        # Every term needs a weight, every weight a term.
        weights = self.stage.losses
        for name in terms.keys() ^ weights.keys():
            lacks = "weight in the stage table" if name in terms else f"term from {self.stage.terms}()"
            raise DataError(f"the loss {name!r} has no {lacks}: it needs both")
        for name, term in terms.items():
            if term.dim() != 1:
                raise DataError(f"the loss {name!r} has shape {tuple(term.shape)}: one number per sample is needed")

        shares = {}
        loss = 0
        for name, term in terms.items():
            count = max(supervised, 1) if name == "vtg" else samples
            shares[name] = term.sum() * (self.world / count)
            loss = loss + weights[name] * shares[name]
        return shares | {"loss": loss}

    def views(self, batch):
        """The paper's losses: of one view (Init, stages 1 and 3) VTG alone, of pairs (stage 2) all three.

            part in stage 2                 its weights     do gradients pass through it?
            ego ViT, ego connector, F, G    trained         yes
            exo connector, reading F(x)     frozen          yes, to F and to the ego ViT that feeds it
            exo ViT, exo connector on y     frozen          no: what is frozen and reads frozen input makes no graph
            decoder                         frozen          yes, to all visual tokens
        """
        seen = self.model(batch.ego, batch.exo)
        terms = {"vtg": self.vtg(seen.visual, batch)}
        # Each exo clip shows the moment of one ego clip: they are compared pair by pair.
        pair = batch.ego_of.to(seen.visual.device)
        if "kl" in self.stage.losses:
            terms["kl"] = self.kl(seen.y, seen.estimate[pair])
        if "ccl" in self.stage.losses:
            terms["ccl"] = self.cycle(seen.x.detach(), seen.y, pair)
        if "contrastive" in self.stage.losses:
            terms["contrastive"] = self.contrastive(seen.y, seen.fx[pair], pair)
        return terms

    def vtg(self, visual, batch) -> Tensor:
        """Vision-grounded text generation (tokens,): the cross-entropy of each supervised token, times its weight."""
        shown = visual[batch.text_of.to(visual.device)]                     # the clip that each text tells of
        losses = self.model.text_losses(shown, batch.ids, batch.labels, batch.lens)
        return losses * batch.weights.to(losses.device)

    def text_sum(self, batch) -> Tensor:
        """For validation: the sum of the text losses of a micro batch, and how many tokens that is (2,)."""
        seen = self.model(batch.ego, batch.exo if batch.ego is None else None)
        return torch.stack([self.vtg(seen.visual, batch).sum(), batch.weights.sum()])

    def kl(self, y: Tensor, estimate: Tensor) -> Tensor:
        """KL(exo || F(ego)) of each pair (X,), between tokens as the decoder reads them: con_exo(y) and
        con_exo(F(x))."""
        return feature_kl(self.model.exo_connector(y), estimate)            # both (X, 1521, 4096)

    def cycle(self, x, y, pair) -> Tensor:
        """CCL(F, G) of each pair (X,): |G(F(x)) - x| + |F(G(y)) - y|, between LayerNorm-ed features.

        Only F and G learn from it, as in CycleGAN: x (of E moments) comes without its gradient, y has none, since the
        exo ViT is frozen. F(x) of the other losses has a gradient to the ego ViT, so F runs once more here.
        """
        F, G = self.model.F, self.model.G
        forward = self.distance(G(F(x)), x)[pair]
        if self.cfg.forward_cycle_only:
            return forward
        return forward + self.distance(F(G(y)), y)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean absolute difference of each sample, after LayerNorm over channels. F and G end in a LayerNorm, and the
        features of a ViT do not: compared as they are, F and G stayed worse than the best constant (measured)."""
        channels = a.shape[-1:]
        apart = nnf.layer_norm(a.float(), channels) - nnf.layer_norm(b.float(), channels)
        return apart.abs().flatten(1).mean(1)

    def contrastive(self, y: Tensor, fx: Tensor, pair: Tensor, tau: float = 0.07) -> Tensor:
        """InfoNCE (X,) of pooled F(x) against every y of the micro batch: it depends on what else is in there."""
        a = nnf.normalize(fx.float().mean((1, 2, 3)), dim=-1)
        b = nnf.normalize(y.float().mean((1, 2, 3)), dim=-1)
        own = torch.arange(len(a), device=a.device)
        # Another camera's clip of the same moment is no negative.
        sibling = (pair[:, None] == pair).fill_diagonal_(False)
        logits = (a @ b.T / tau).masked_fill(sibling, -math.inf)
        return nnf.cross_entropy(logits, own, reduction="none")

    # -------------------------------------------------------------------------------------------- stage 0's stand-ins
    def language(self, batch):
        """Instead of a download: the decoder learns to read scattered, noisy words that stand before a text."""
        ids = [self.tokenizer.encode(text) for text in batch.texts]
        mixture = scatter_words(ids, self.model.cfg.visual_tokens, self.model.cfg.vocab)
        embedding = self.model.decoder.embedding.weight
        visual = mixture.to(embedding.device) @ embedding                   # (B, slots, W)
        return {"vtg": self.vtg(visual + 0.1 * torch.randn_like(visual), batch)}

    def image_text(self, batch):
        """CLIP's InfoNCE of frames and narrations (B,): it depends on what else is in the micro batch. Its text
        tower, a bag of words, is not kept."""
        # Every second frame, its strongest patch in each channel.
        features = self.model.patch_features(self.model.exo_vit, batch.exo[:, ::2])         # (B, T/2, h, w, D)
        image = self.extra.image(rearrange(features, "b t h w d -> (b t) (h w) d").amax(1))

        # Narrations as bags of words: all ids in a row, and where each narration starts.
        ids = [self.tokenizer.encode(text) for text in batch.texts]
        lengths = torch.tensor([len(own) for own in ids], device=image.device)
        starts = lengths.cumsum(0) - lengths
        text = self.extra.words(torch.tensor(sum(ids, []), device=image.device), starts)

        image, text = nnf.normalize(image, dim=-1), nnf.normalize(text, dim=-1)
        logits = self.extra.log_scale.exp() * image @ text.T                                # (B*T/2, B)
        # Equal narrations are equally right.
        same = [[float(a == b) for b in batch.texts] for a in batch.texts]
        same = torch.tensor(same, device=image.device)                                      # (B, B)
        right = same.repeat_interleave(features.shape[1], 0)                                # (B*T/2, B)
        from_text = -(logits.log_softmax(0) * right / right.sum(0)).sum(0)                  # (B,)
        from_image = -(logits.log_softmax(1) * right / right.sum(1, keepdim=True)).sum(1)
        from_image = from_image.unflatten(0, (len(text), -1)).mean(1)                       # (B,)
        return {"image_text": (from_text + from_image) / 2}


def scatter_words(texts, slots, vocab) -> Tensor:
    """The toy has no decoder that can read yet, and no connector. So this imitates a connector: each visual token of
    a clip is a random mixture of the words (ids) of the text that describes it. -> the weight of each word in each of
    the clip's visual tokens, the slots (B, slots, vocab).

    A word's weight is spread over the slots by a draw from a Dirichlet distribution. Its parameter, 0.03 to 10,
    differs from word to word: a small one puts the word into one slot, a large one into all of them. Fainter words of
    another text are the noise. All ranges are our choice, from trials.
    """
    mixture = torch.zeros(len(texts), slots, vocab)
    others = texts[-1:] + texts[:-1]                            # the text before it in the batch
    for row, own, other in zip(mixture, texts, others):
        clear = torch.empty(len(own)).uniform_(0.7, 1.3)
        faint = torch.empty(len(other)).uniform_(0, 0.5)
        weight = torch.cat([clear, faint])
        parameter = 10 ** torch.empty(len(weight), 1).uniform_(-1.5, 1)
        dirichlet = torch.distributions.Dirichlet(parameter.expand(-1, slots), validate_args=False)
        spread = dirichlet.sample()                             # (words, slots)
        # 0.35 is a word's mean weight in a slot.
        spread = 0.35 * slots * weight[:, None] * spread
        row.index_add_(1, torch.tensor(own + other), spread.T.contiguous())
    return mixture


# ------------------------------------------------------------------------------------------------------ 4 what trains
def part_of(name):
    """The part of the stage table that a parameter belongs to."""
    if ".lora_" in name:
        return "lora"
    return name.removeprefix("model.").split(".")[0]


def freeze(objective, bf16):
    """Freeze every part that the stage does not train; returns what trains, by name.

    Trained weights are float32. Frozen ones are kept in the dtype they are computed with; not so in the micro-world's
    stage 0 (`from_nothing`), where the next row may train them.
    """
    trained = {}
    for name, p in objective.named_parameters():
        p.requires_grad_(part_of(name) in objective.stage.trains)
        half = bf16 and not p.requires_grad and not objective.cfg.from_nothing
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
                # A loss that somebody adds may not reach every parameter.
                if p.grad is None:
                    continue
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


def make_optimizers(trained, rates, cfg) -> list:
    """Muon for the matrices inside the network, AdamW for the rest: both ends, norms, biases, depthwise filters. With
    --optimizer adamw AdamW for all. `rates` is the peak learning rate of each name."""
    matrices, others = {}, {}                                   # (part, rate) -> parameters
    for name, p in trained.items():
        is_end = any(word in name for word in ("embedding", "position", "head", "extra."))
        is_matrix = p.ndim >= 2 and p.shape[1] > 1
        groups = matrices if cfg.optimizer == "muon" and is_matrix and not is_end else others
        groups.setdefault((part_of(name), rates[name]), []).append(p)

    optimizers = []
    if matrices:
        optimizers.append(Muon(groups_of(matrices), {}))
    if others:
        # VideoLLaMA2's second beta at 7b; 0.95 at the toy's few steps, our choice.
        betas = (0.9, 0.999) if cfg.preset == "7b" else (0.9, 0.95)
        adamw = torch.optim.AdamW(groups_of(others), betas=betas, weight_decay=0, fused=True)
        optimizers.append(adamw)
    return optimizers


def groups_of(groups) -> list[dict]:
    """An optimiser's groups of parameters, one for each part. A checkpoint numbers the moments in this order, so the
    order must not depend on the rates."""
    return [dict(params=params, lr=rate, peak_lr=rate) for (_, rate), params in groups.items()]


def set_rates(optimizers, lr_scale):
    """Give every part this share of its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale


def schedule(step, steps, stage) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine down to the stage's floor."""
    warm = max(1, round(stage.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    left = max(1, steps - warm)
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / left)
    return stage.floor + (1 - stage.floor) * cosine


# ------------------------------------------------------------------------------ 5 where a stage starts, what it reads
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
    # What its checkpoints record of where it began.
    provenance: dict = field(default_factory=lambda: dict(base=None, base_hash=None, init=None))
    start: Start | None = None
    inherited: set = field(default_factory=set)                 # tensors of earlier stages, which its checkpoints keep
    tokenizer: bytes = b""                                      # the file, as it was when the run began
    stop: float = 0.0                                           # when a signal asked it to stop

    def sum(self, tensor):
        """The sum of a tensor over all ranks, as numbers."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def mean(self, totals):
        """The mean of each loss over all ranks."""
        sums = self.sum(torch.stack(list(totals.values())))
        return {name: total / self.world for name, total in zip(totals, sums)}


class Start(NamedTuple):
    """Which weights a stage starts from."""
    source: Path                        # the checkpoint that it goes on from
    base: Path                          # the one with all weights; later ones hold what training has changed
    added: dict                         # parts that the stage adds, which start fresh


def starting_point(cfg) -> Start:
    """Which weights a stage starts from. The source is the first that is given, or lies beside --out:

        stage 0 at 7b (its ego half)    --base
        stage 1                         --init, --base, stage0
        stage 2                         --init, stage1
        stage 3                         --init, stage2; it may also go on from a stage 3

    The base is the source itself if that holds all weights, else the first of: --base, the one that the source
    recorded, stage0 beside --out. DataError: there is none, it is not finished, or of another stage.
    """
    beside = Path(cfg.out).parent
    if cfg.stage == 0:
        source = finished_checkpoint(cfg, cfg.base, "--base", stages=(0,))
    elif cfg.stage == 1:
        flag = "--base" if cfg.base and not cfg.init else "--init"
        source = finished_checkpoint(cfg, cfg.init or cfg.base or beside / "stage0", flag, stages=(0,))
    else:
        stages = (1,) if cfg.stage == 2 else (2, 3)             # instruction tuning may go on, with other data
        source = finished_checkpoint(cfg, cfg.init or beside / f"stage{cfg.stage - 1}", "--init", stages)

    recorded = read_state(source)["base"]
    given = finished_checkpoint(cfg, cfg.base, "--base", stages=(0,)) if cfg.base else None
    if recorded is None:
        base = source
    elif given and given != source:
        base = given
    else:
        there = newest_checkpoint(source.parent / recorded)
        base = there or finished_checkpoint(cfg, beside / "stage0", "--base", stages=(0,))

    added = {}
    if cfg.stage == 2 and not cfg.no_mapping:
        added = {"mapping": cfg.mapping}
    if cfg.stage == 3 and not cfg.no_lora:
        added = {"lora": True}
    return Start(source, base, added)


def initial_model(run, change=None):
    """The model at the start of the stage: the previous stage's or published weights, and the parts that the stage
    adds. A function `change`, if given, is applied to the model."""
    cfg = run.cfg
    seed_torch(cfg.seed, cfg.stage)
    if cfg.from_nothing:
        model = Exo2Ego(PRESETS[cfg.preset])
        if change:
            change(model)
        tokenizer = Tokenizer(toy_tokenizer(cfg.toy_folder))
    else:
        run.start = starting_point(cfg)
        refuse_an_idle_base(cfg, run.start)
        source, base, added = run.start
        model, state = load_checkpoint(source, base, cfg.vision, **added)
        if change:
            change(model)
        tokenizer = Tokenizer(cfg.tokenizer or source)
        refuse_misfits(cfg, model, tokenizer, run.start)
        record_start(run, model, state)
        # At 7b a visual encoder through which no clip of the stage passes is left out: 780 million parameters.
        if cfg.preset == "7b" and cfg.stage == 0:
            model.exo_vit = model.exo_connector = None
        if cfg.preset == "7b" and cfg.stage == 1:
            model.ego_vit = model.ego_connector = None
    run.tokenizer = Path(tokenizer.path).read_bytes()
    run.provenance["tokenizer"] = hashlib.sha256(run.tokenizer).hexdigest()[:16]
    return model, tokenizer


def training_loader(run, stage, model, tokenizer) -> Loader:
    """The samples of a stage: of its split of the micro-world, or of --data."""
    cfg = run.cfg
    manifests = known_by = cfg.data
    if cfg.toy_folder:
        manifests = [toy_split(cfg.toy_folder, stage.split)]
        known_by = [*manifests, Path(cfg.toy_folder) / "world.json"]    # other pictures may have the same rows
    rows = read_manifests(manifests, cfg.root, cfg.allow_outside)
    if cfg.shuffle_pairs and stage.view == "pair":
        rows = shuffle_pairs(rows, cfg.seed)
    run.provenance.setdefault("manifest", hash_of_manifests(known_by))
    run.provenance.setdefault("skip_list", hash_of_manifests(skip_lists(manifests)))
    micro = samples_per_forward(stage, cfg, run.world)
    loader = make_loader(run, stage, model, tokenizer, rows=rows, batch=stage.batch, micro=micro)
    refuse_missing_negatives(stage, loader)
    return loader


def make_loader(run, stage, model, tokenizer, **options) -> Loader:
    """A loader of what the stage shows, with room for the visual tokens of two connectors or of one."""
    # The learner reads x and F(x), everybody else one view.
    connectors = 2 if stage.view != "exo" and model.F is not None else 1
    return Loader(
        cfg=model.cfg,
        tokenizer=tokenizer,
        view=stage.view,
        supervise=stage.supervise,
        seed=run.cfg.seed,
        rank=run.rank,
        world=run.world,
        video_tokens=connectors * model.cfg.visual_tokens,
        **options)


# -------------------------------------------------------------------------------------------- 6 a run from end to end
def stages_of(cfg) -> tuple[Stage, ...]:
    """The rows of this run: the table's, changed by the flags. The toy's stage 0 has four, every other stage one."""
    table = PAPER if cfg.preset == "7b" else TOY
    return tuple(changed_by_flags(stage, cfg) for stage in table[cfg.stage])


def train(cfg, rank=0, world=1, objective=Objective, change=None):
    """Run a stage to its end, then score it. A fork's experiment may bring a class of its own for the losses, and a
    function that changes the model before training."""
    stages = stages_of(cfg)
    bf16 = torch.cuda.is_available() if cfg.dtype is None else cfg.dtype == "bfloat16"
    run = Run(cfg, rank, world, pick_device(), bf16)
    model, tokenizer = initial_model(run, change)
    dtype = torch.bfloat16 if bf16 else torch.float32
    run.attention = choose_attention(run.device, dtype, model.cfg, first_problem_of_any_rank)

    loaders = [training_loader(run, stage, model, tokenizer) for stage in stages]
    lengths = [length_of(run, stage, loader) for stage, loader in zip(stages, loaders)]
    run.steps = sum(lengths)
    # Where an earlier call of this command has come.
    folder = resume_checkpoint(run, model)
    state = read_state(folder) if folder else dict(step=0, skipped=0)
    done = state["step"]
    log = Log(Path(cfg.out) / "log.jsonl" if rank == 0 else None, done, state["skipped"])

    # One stage after another, those that are not finished. The first of them goes on from the checkpoint.
    earlier = 0
    with stop_gracefully_on_signals(run):
        for stage, loader, steps in zip(stages, loaders, lengths):
            if done < earlier + steps:
                # Each rank draws noise and dropout of its own. Parameters that a loss brings are rank 0's: DDP copies
                # them.
                seed_torch(cfg.seed, cfg.stage, earlier, rank)
                losses = objective(model, tokenizer, stage, cfg, world).to(run.device)
                run_stage(run, stage, loader, losses, earlier, steps, folder, log)
                folder = None
            earlier += steps
    if rank == 0 and not cfg.no_eval:
        show_result(run, model, tokenizer, loaders[-1].rows, was_finished=done == run.steps)


def result_of(cfg) -> Path:
    """What `show_result` leaves in the run folder at last."""
    return Path(cfg.out) / ("eval.json" if cfg.toy_folder else "samples.png")


def show_result(run, model, tokenizer, rows, was_finished):
    """The micro-world has a benchmark for every stage; of one's own data a few samples are shown."""
    cfg = run.cfg
    if was_finished and result_of(cfg).is_file():
        return
    base = run.start.base if run.start else None
    if cfg.fsdp or was_finished:
        # Read the result: with FSDP this process holds a share of it, and a finished run has trained nothing.
        model, _ = load_checkpoint(cfg.out, base, cfg.vision)
    model.to(run.device)
    if not run.bf16:
        model.float()                                           # its base may be stored in half precision
    with autocast(run.device, run.bf16):
        if cfg.toy_folder:
            toy_benchmark(model, tokenizer, cfg.toy_folder, cfg.stage, cfg.out, cfg.init, base)
        else:
            show_own_samples(model, tokenizer, rows, cfg.stage, cfg.out)


# ===== a first reader can stop here =====


# ------------------------------------------------------------------------------------------------------------ A flags
@dataclass(frozen=True)
class TrainConfig:
    """Every flag. Where the default is None, what the comment has in brackets counts, or else the stage table's
    row."""
    stage: Literal[0, 1, 2, 3]                      # 0 Init | 1 demonstrator | 2 guidance | 3 self-practice
    preset: Literal["toy", "small", "7b"] = "toy"   # all sizes; 7b is the paper's
    data: list[str] = field(default_factory=lambda: ["out/toy"])    # manifests (.jsonl), or the micro-world's folder
    root: str | None = None                         # where the paths of the manifests start (each one's folder)
    base: str | None = None                         # untouched weights (what --init builds on, or stage0 beside --out)
    vision: str | None = None                       # a CLIP directory, where --base has no vision tower
    tokenizer: str | None = None                    # a tokenizer.model (the one beside the weights)
    init: str | None = None                         # run to go on from (stage{N-1} beside --out; stage 1: --base)
    out: str | None = None                          # run folder (out/stage{N})
    steps: int | None = None                        # optimiser steps; in the toy's stage 0 of each of its four rows
    epochs: int | None = None                       # instead of steps
    batch: int | None = None                        # samples per step over all ranks
    micro_batch: int | None = None                  # samples per forward of one rank (batch / ranks; at 7b 1 or 2)
    lr: float | None = None                         # peak rate of the fastest part; the others keep their ratio
    seed: int = 0                                   # of new weights and of the order of samples
    dtype: Literal["bfloat16", "float32"] | None = None     # compute (bfloat16 on CUDA, else float32)
    optimizer: Literal["muon", "adamw"] | None = None       # of matrices (muon; adamw for 7b)
    save_every: int | None = None                   # steps between saves (a tenth of the run, or ten minutes)
    keep: int = 2                                   # checkpoints kept
    val_data: str | None = None                     # a manifest for the validation loss (the micro-world has its own)
    val_every: int | None = None                    # steps between validation losses (at the end, with --val-data)
    workers: int | None = None                      # loader processes per rank (by cores and ranks, at most 8)
    fsdp: bool = False                              # FSDP2 instead of DDP: a rank holds its share of it all
    recompute: Literal["none", "cheap", "blocks"] | None = None     # in backward (none; cheap for 7b, not compiled)
    compile: bool = False                           # torch.compile the blocks: slow start, fast steps (7b on CUDA)
    no_compile: bool = False                        # not even for 7b on CUDA
    timeout: int = 600                              # seconds until a silent rank ends the run
    max_bad: float = 0.01                           # share of samples that may be unreadable
    allow_outside: bool = False                     # manifest paths may leave their root
    overfit: bool = False                           # train on the first batch only
    no_eval: bool = False                           # skip the benchmark at the end
    no_kl: bool = False                             # the paper's ablation: no KL(exo || F(ego))
    no_cycle: bool = False                          # the paper's ablation: no cycle consistency; G is not trained
    forward_cycle_only: bool = False                # the paper's ablation: |G(F(x)) - x| alone
    no_mapping: bool = False                        # our control: the LLM reads x alone, neither F nor G
    mapping: Literal["resnet", "mlp"] = "resnet"    # of which blocks F and G are; mlp is the paper's ablation
    no_lora: bool = False                           # the paper's ablation: stage 3 without LoRA
    contrastive: float | None = None                # weight of InfoNCE between F(x) and y (0)
    shuffle_pairs: bool = False                     # our control: wrong exo partners
    kl_weight: float | None = None                  # instead of the stage table's
    ccl_weight: float | None = None                 # instead of the stage table's

    @property
    def toy_folder(self):
        """The folder of the micro-world, or None where manifests are given."""
        return None if self.data[0].endswith(".jsonl") else self.data[0]

    @property
    def from_nothing(self):
        """Whether this run makes all weights itself: stage 0 of the micro-world."""
        return self.stage == 0 and self.preset != "7b"


# Flags that may differ when a run resumes: they change nothing of what it computes, or only how fast. Places (data,
# base, tokenizer, ...) are known by what they hold. More steps stretch the schedule, another rate or dtype is said.
# Where the negatives of a loss are the micro batch (InfoNCE), another micro_batch has other negatives.
MAY_CHANGE = {"data", "root", "base", "vision", "tokenizer", "init", "out", "steps", "epochs", "lr", "dtype",
              "micro_batch", "save_every", "keep", "val_data", "val_every", "workers", "fsdp", "recompute", "compile",
              "no_compile", "timeout", "max_bad", "allow_outside", "no_eval"}
# Flags whose effect is in the stage's row, which a checkpoint records.
IN_THE_ROW = {"batch", "no_kl", "no_cycle", "no_mapping", "no_lora", "contrastive", "kl_weight", "ccl_weight"}
# Losses (InfoNCE) that compare the samples of a micro batch with one another.
NEEDS_NEGATIVES = {"image_text", "contrastive"}
MAY_BE_ZERO = {"stage", "seed", "workers", "max_bad", "contrastive", "kl_weight", "ccl_weight"}
STAGE_2_ONLY = {"no_kl", "no_cycle", "forward_cycle_only", "no_mapping", "mapping", "contrastive", "shuffle_pairs",
                "kl_weight", "ccl_weight"}

# What an ablation takes away leaves these flags without effect.
CLASHES = {
    "no_kl": ("kl_weight",),
    "no_cycle": ("ccl_weight", "forward_cycle_only"),
    "no_mapping": ("no_kl", "no_cycle", "kl_weight", "ccl_weight", "forward_cycle_only", "contrastive", "mapping",
                   "shuffle_pairs"),
    "steps": ("epochs",),
    "no_compile": ("compile",)}


def parse(argv: list[str] | None = None) -> TrainConfig:
    """The command line: one flag per field. Unknown, abbreviated and misspelt flags are refused by name."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, TrainConfig, [f.name for f in fields(TrainConfig) if f.name != "data"])
    parser.add_argument("--data", nargs="+", default=["out/toy"],
                        help="manifests (.jsonl), or the micro-world's folder")
    if "--checkpoint-activations" in (argv or sys.argv):
        parser.error("--checkpoint-activations is now --recompute blocks")
    cfg = TrainConfig(**vars(parser.parse_args(argv)))
    refuse_idle_flags(parser, cfg)
    refuse_wrong_files(parser, cfg)

    # What is not given follows from the stage, the preset and the machine. Where the stage starts is
    # `starting_point`'s.
    for_7b = cfg.preset == "7b"
    compiles = cfg.compile or for_7b and torch.cuda.is_available() and not cfg.no_compile
    workers = max(1, min(8, own_cores() - 1))
    cfg = replace(
        cfg,
        out=str(Path(cfg.out or f"out/stage{cfg.stage}").expanduser()),
        optimizer=cfg.optimizer or ("adamw" if for_7b else "muon"),
        compile=compiles,
        recompute=cfg.recompute or ("cheap" if for_7b and not compiles else "none"),
        workers=workers if cfg.workers is None else cfg.workers)
    # Muon wants whole matrices, and the rows of the toy's stage 0 hand whole weights on.
    if cfg.fsdp and (cfg.optimizer == "muon" or cfg.from_nothing):
        parser.error("--fsdp needs --optimizer adamw, and not the micro-world's stage 0")
    return cfg


def refuse_idle_flags(parser, cfg):
    """Numbers that are none, and flags that would do nothing in this run."""
    for name, value in vars(cfg).items():
        flag = "--" + name.replace("_", "-")
        if type(value) in (int, float):
            least = "of 0 or more" if name in MAY_BE_ZERO else "above 0"
            if not 0 <= value < math.inf or value == 0 and least == "above 0":
                parser.error(f"{flag} {value}: a number {least} is needed")
        if name in STAGE_2_ONLY and cfg.stage != 2 and value != getattr(TrainConfig, name):
            parser.error(f"{flag} is of stage 2, whose F and G stage 3 goes on with")
    # What another flag has taken away, or another stage does.
    for reason, idle in CLASHES.items():
        for name in idle:
            if getattr(cfg, reason) and getattr(cfg, name) != getattr(TrainConfig, name):
                parser.error(f"--{name} does nothing with --{reason}: give one of them".replace("_", "-"))
    if cfg.no_lora and cfg.stage != 3:
        parser.error("--no-lora is of stage 3: no other stage trains a LoRA")
    # Where stage 0 starts, and what a validation reads.
    if cfg.from_nothing and cfg.toy_folder is None:
        parser.error("stage 0 of this preset is the micro-world's own: your own data starts at stage 1, from its "
                     "weights or from --base")
    if cfg.stage == 0 and cfg.preset == "7b" and not cfg.base:
        parser.error("stage 0 at 7b trains the ego half of published weights: pass --base, a folder with "
                     "VideoLLaMA2's")
    if cfg.stage == 0 and cfg.init or cfg.from_nothing and cfg.base:
        parser.error("stage 0 has nothing to start from but --base, and that at 7b alone: "
                     "leave --init and --base out")
    validates = cfg.val_every or cfg.val_data
    if validates and (cfg.from_nothing or not (cfg.val_data or cfg.toy_folder)):
        parser.error("a validation loss needs stage 1, 2 or 3, and --val-data x.jsonl or the micro-world")
    # How a step is divided is known before anything is trained.
    world = int(os.environ.get("WORLD_SIZE", 1))
    for stage in stages_of(cfg):
        micro = samples_per_forward(stage, cfg, world)
        if stage.batch % (micro * world):
            parser.error(f"--batch {stage.batch} is no multiple of {micro} (--micro-batch) x {world} ranks")
        if micro == 1 and stage.losses.keys() & NEEDS_NEGATIVES:
            parser.error("InfoNCE compares the samples of a micro batch with one another: "
                         "--micro-batch 2 or more")


def refuse_wrong_files(parser, cfg):
    """Manifests that are no files, and worlds that are no folders."""
    if cfg.val_data and not cfg.val_data.endswith(".jsonl"):
        parser.error(f"--val-data {cfg.val_data}: a manifest is a file that ends in .jsonl")
    manifests = [*cfg.data, cfg.val_data] if cfg.val_data else cfg.data
    for path in manifests:
        is_manifest = path.endswith(".jsonl")
        if is_manifest and not Path(path).is_file():
            parser.error(f"{path} is not there")
        if not is_manifest and (len(cfg.data) > 1 or Path(path).is_file()):
            parser.error(f"--data {path}: a manifest is a file that ends in .jsonl, a micro-world one folder")


def samples_per_forward(stage, cfg, world):
    """The micro batch of a rank: --micro-batch, or what the stage table says, but not more than the rank's share of a
    step. InfoNCE has no negatives in a micro batch of one."""
    share = max(1, stage.batch // world)
    wanted = stage.micro or share
    if stage.losses.keys() & NEEDS_NEGATIVES:
        wanted = max(wanted, 2)
    return cfg.micro_batch or min(wanted, share)


def changed_by_flags(stage, cfg) -> Stage:
    """A row of the stage table as the flags of a run change it."""
    view = stage.view
    given = dict(kl=cfg.kl_weight, ccl=cfg.ccl_weight, contrastive=cfg.contrastive)
    given = {name: weight for name, weight in given.items() if weight is not None}
    losses = stage.losses | given

    # The ablations take away parts and losses.
    gone = set()
    if cfg.no_mapping:
        # Without F and G nothing is compared with an exo clip: the losses that do so go, and the clips, too.
        gone |= {"F", "G", *losses} - {"vtg"}
        view = "ego"
    if cfg.no_cycle:
        gone |= {"G", "ccl"}
    if cfg.no_kl:
        gone |= {"kl"}
    if cfg.no_lora:
        gone |= {"lora"}
    trains = {part: rate for part, rate in stage.trains.items() if part not in gone}
    losses = {name: weight for name, weight in losses.items() if name not in gone}

    # --lr is the fastest part's rate; the other parts keep their ratio to it.
    factor = cfg.lr / max(trains.values()) if cfg.lr else 1
    trains = {part: rate * factor for part, rate in trains.items()}
    return replace(
        stage,
        trains=trains,
        view=view,
        losses=losses,
        batch=cfg.batch or stage.batch,
        epochs=cfg.epochs or stage.epochs,
        steps=0 if cfg.epochs else cfg.steps or stage.steps)


# -------------------------------------------------------------------------------------------------- B ranks, wrapping
def start_process():
    """Rank and world size, as torchrun tells. The process takes its share of the cores that it may use."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    # torchrun sets OMP_NUM_THREADS to 1 where several ranks share a machine; what a user sets counts.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(own_cores())
    return rank, world


def own_cores():
    """The cores of this rank: the ranks of a machine share them."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def join_ranks(backend, seconds):
    """Meet the other ranks, within `seconds`.

    torchrun keeps one store over its restarts, in which a rank would find the addresses of the dead (pytorch#135712):
    on one machine each restart gets names of its own. Several machines count restarts apart; start torchrun there
    with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    one_machine = os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
    limit = timedelta(seconds=seconds)
    store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    store = dist.PrefixStore(attempt, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)


def gather(value) -> list:
    """This value of every rank, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_problem_of_any_rank(check):
    """Call a check first on local rank 0, which fills the cache of compiled kernels, then on the others."""
    if not dist.is_initialized():
        return check()
    # One process of each machine compiles, then the others find the result.
    goes_first = os.environ.get("LOCAL_RANK", "0") == "0"
    own = check() if goes_first else None
    dist.barrier()
    if not goes_first:
        own = check()
    return next(filter(None, gather(own)), None)


@contextlib.contextmanager
def stop_gracefully_on_signals(run):
    """SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C: the step under way ends, then all ranks save and exit. Under nohup, which
    ignores SIGHUP, the run goes on.

    A second signal, more than a second later (launchers pass theirs on at once), ends it on the spot. torchrun kills
    30 s after its own SIGTERM; it passes SIGUSR1 on only if TORCHELASTIC_SIGNALS_TO_HANDLE names it.
    """
    def asked(number, _):
        if run.stop and time.monotonic() - run.stop > 1:
            os._exit(128 + number)
        run.stop = run.stop or time.monotonic()
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    former = {number: signal.signal(number, asked) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    # After the last step nobody else heeds a signal: what is left to do, the benchmark, is not begun.
    if run.stop:
        raise SystemExit(f"stopped at step {run.steps}, saved: the same command goes on")


def tune_malloc():
    """Let glibc keep the memory that a step frees: the kernel would clear every page again for the next step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                                     # M_MMAP_MAX: no tensor is a mapping of its own
        libc.mallopt(-1, -1)                                    # M_TRIM_THRESHOLD: the heap never shrinks


aten = torch.ops.aten
# Operators whose results --recompute cheap stores during a block's forward: products and fused attention. Backward
# computes the rest of the block (norms, activations, gates) again.
KEPT_FOR_BACKWARD = [
    aten.mm.default, aten.addmm.default, aten.convolution.default,
    torch.ops.exo2ego.flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default]


def wrap(run, objective) -> nn.Module:
    """The objective as the ranks share it: its blocks compiled, computed again in backward as --recompute says, then
    DDP, or FSDP2 by block."""
    cfg = run.cfg
    blocks = [module for module in objective.modules() if isinstance(module, BLOCKS)]
    keep_products = partial(create_selective_checkpoint_contexts, KEPT_FOR_BACKWARD)
    for block in blocks:
        # The rows of stage 0 share the model: undo what an earlier row has set.
        vars(block).pop("forward", None)
        if cfg.compile:
            # The decoder's batches have another number of tokens at every step: one compiled form for all of them.
            dynamic = any(block is one for one in objective.model.decoder.blocks)
            block.forward = compiled(block, dynamic)
        if cfg.recompute == "blocks":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.recompute == "cheap":
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=keep_products)

    if cfg.fsdp:
        for module in [*blocks, objective]:
            fully_shard(module)
        register_fsdp_forward_method(objective, "text_sum")
        return objective
    if run.world > 1:
        return DistributedDataParallel(objective, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return objective


def compiled(block: nn.Module, dynamic):
    """torch.compile of a block where gradients pass; scoring has other shapes and runs as it is. Attention is left
    out: its kernels are fused already, and the lengths in `seg` differ in every batch."""
    # All blocks of a class share their compiled code: one version for each width, frozen or trained.
    torch._dynamo.config.recompile_limit = 64
    if hasattr(block, "attention"):
        block.attention = torch.compiler.disable(type(block).attention)
    plain = block.forward
    fast = torch.compile(block.forward, dynamic=dynamic)

    def forward(*args):
        return fast(*args) if torch.is_grad_enabled() else plain(*args)
    return forward


def sync_gradients(wrapped, run, now):
    """Whether the next backward exchanges gradients with the other ranks. Call it before the forward."""
    if run.cfg.fsdp:
        wrapped.set_requires_gradient_sync(now)
    elif run.world > 1:
        wrapped.require_backward_grad_sync = now


def gather_full_tensor(tensor) -> Tensor:
    """A tensor that may be sharded over the ranks, whole, on each of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------- C saving, resuming
class Keeper:
    """Keeps what was trained, however a run ends. It saves after a tenth of the run or ten minutes (or every
    --save-every steps), and once more when the run ends early:

        all ranks leave together, between two steps         the last whole step is saved
        one process alone fails                             the same, unless it fails within an update
        one of several ranks fails                          nothing: what was saved last counts

    A step is whole when its row is in the log; the random state that is saved is that of the next step's beginning.
    """
    def __init__(self, run, objective, optimizers, trained, log, step):
        self.run = run
        self.objective = objective
        self.optimizers = optimizers
        self.trained = trained
        self.log = log
        self.step = self.saved = step                           # the last whole step, and the last that was saved
        self.saved_at = time.monotonic()
        self.updating = False
        self.remember()

    def remember(self):
        """What a checkpoint of the step that is whole now must hold besides weights."""
        self.random = random_state(self.run.device)
        self.skipped = self.log.skipped

    def is_due(self, step):
        """Whether to save after this step."""
        every = self.run.cfg.save_every
        if every:
            return step % every == 0
        tenth = math.ceil(self.run.steps / 10)
        long_ago = time.monotonic() - self.saved_at > 600
        return step % tenth == 0 or long_ago

    def begin_update(self):
        self.updating = True

    def end_update(self, step):
        self.updating = False
        self.step = step
        self.remember()

    def save(self):
        """Save the last whole step, if there is one that is not saved."""
        if self.step > self.saved:
            set_random_state(self.random, self.run.device)
            save_checkpoint(
                self.run, self.objective, self.optimizers,
                step=self.step,
                trained=self.trained,
                skipped=self.skipped)
            # torchrun ends all ranks as soon as one has ended: none goes on while another one saves.
            if self.run.world > 1:
                dist.barrier()
            self.saved = self.step
        self.saved_at = time.monotonic()

    def leave_if(self, reason):
        """End the run with this error, if it is one. All ranks must call it alike."""
        if reason is not None:
            self.save()
            raise reason

    def reason_to_leave(self, counts, micro_batches, seen):
        """What ends the run between two steps, on all ranks: clips that nobody can read, too many of them, a signal.
        None: it goes on. `seen` samples have been drawn since the stage began."""
        if counts.broken:
            # The rank that found nothing has the reason.
            if isinstance(micro_batches, Exception):
                return micro_batches
            return DataError("another rank found nothing to read: it says what")
        self.log.name_skipped(micro_batches, int(counts.skipped))
        failed = self.log.skipped
        tried = seen + failed
        most = self.run.cfg.max_bad
        # Of a short run a few may be bad.
        if failed > most * max(tried, 500):
            return DataError(f"{failed} of {tried} tries to read a sample failed, more than --max-bad {most}; "
                             f"the lines above name them. python data.py check lists all of them, and the same "
                             f"command then goes on without them")
        if counts.stop and self.step == 0:
            return SystemExit("stopped before the first step was done: there is nothing to save")
        if counts.stop:
            return SystemExit(f"stopped at step {self.step}, saved: the same command goes on")
        return None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None or self.updating or self.run.world > 1:
            return
        try:
            self.save()
        except Exception as problem:
            # The first error is the one to be told.
            print(f"step {self.step} could not be saved: {problem}", file=sys.stderr)


def not_a_number(losses, norm, step, micro_batches):
    """The error that ends the run before an update spoils the weights, or None; the terms, and this rank's samples of
    the step, may show why."""
    if math.isfinite(losses["loss"] + norm):
        return None
    terms = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    names = [batch.names for batch in micro_batches]
    return DataError(f"step {step}: {terms}, gradient norm {norm:g}; what was trained before it is saved. "
                     f"The same command with a lower --lr, or with --dtype float32, goes on from there; "
                     f"the samples were {names}")


def save_checkpoint(run, objective, optimizers, step, trained, skipped):
    """What differs from the base (where there is none everything), and what resuming exactly needs, in step_000200/.

    It is written under a temporary name, synced, and renamed: a killed save never looks finished.
    """
    cfg = run.cfg
    rng = gather(random_state(run.device))
    # With DDP all ranks hold the same. With FSDP each has a share, and all must help to gather it.
    if run.rank and not cfg.fsdp:
        return
    tensors = checkpoint_tensors(run, objective, trained)
    resume = optimizer_state(optimizers)
    if run.rank:
        return
    resume |= {f"rng.{rank}": state for rank, state in enumerate(rng)}

    # The files under a temporary name.
    folder = Path(cfg.out) / f"step_{step:06d}"
    unfinished = folder.with_name(f"part_{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    made = save_files(unfinished, {"model.safetensors": tensors, "optim.safetensors": resume})
    (unfinished / "tokenizer.model").write_bytes(run.tokenizer)
    state = run.provenance | made | dict(
        stage=cfg.stage,
        step=step,
        steps=run.steps,
        bf16=run.bf16,
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
    for old in checkpoints(folder.parent)[:-cfg.keep]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            print(f"{old} is not needed any more and cannot be removed: {error}", flush=True)


def checkpoint_tensors(run, objective, trained):
    """What this stage or an earlier one trained, and what a loss needs, by name, on the CPU. Every FSDP rank must
    call it."""
    kept = run.inherited | {name.removeprefix("model.") for name in trained}
    tensors = {}
    for name, tensor in objective.state_dict().items():
        name = name.removeprefix("model.")
        if run.cfg.from_nothing or name.startswith("extra.") or name in kept:
            tensors[name] = gather_full_tensor(tensor).contiguous().cpu()
    # Parts that are not in memory (at 7b stage 1 has no ego encoder) pass from file to file.
    absent = run.inherited - tensors.keys()
    if absent and run.rank == 0:
        carried = load_delta(run.start.source)
        tensors |= {name: carried[name] for name in absent}
    return tensors


def optimizer_state(optimizers):
    """The optimisers' moments by name: number of the optimiser, of the parameter, key. Every FSDP rank must call
    it."""
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


def seed_torch(*place: int):
    """Seed torch by a place in the run: (seed, stage) for new weights, (seed, stage, earlier steps, rank) for
    noise."""
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))


def recipe_of(cfg):
    """What a run computes, by name: the flags that matter, and the rows of the stage table as the flags changed
    them."""
    elsewhere = MAY_CHANGE | IN_THE_ROW
    recipe = {flag: value for flag, value in asdict(cfg).items() if flag not in elsewhere}
    for stage in stages_of(cfg):
        row = asdict(stage)
        # Steps may grow, and a micro batch changes nothing.
        del row["steps"], row["epochs"], row["micro"]
        recipe |= {f"{stage.name}: {key}": value for key, value in row.items()}
    return json.loads(json.dumps(recipe))                       # tuples become lists, as in a file


def hash_of_manifests(files) -> str:
    """Manifests (or skip lists) are known by their bytes, wherever they lie."""
    hashes = []
    for file in map(Path, files):
        if file.is_file() and file.stat().st_size:
            hashes.append(file_hash(file)[:16])
    return "+".join(hashes)


def skip_lists(manifests) -> list[Path]:
    """The lists of bad rows that data.py check leaves beside manifests."""
    return [Path(manifest).with_suffix(".bad.jsonl") for manifest in manifests]


def record_start(run, model, state):
    """Where a run began, for its checkpoints. They record the folder of a run, not its step: whoever loads them takes
    the newest."""
    cfg, start = run.cfg, run.start
    places = (start.source, start.base)
    source, base = (place if (place / "config.json").is_file() else place.parent for place in places)
    run.cfg = replace(cfg, init=str(source), base=str(base))
    run.provenance |= dict(
        init=fingerprint(start.source),
        init_stage=state["stage"],
        base_hash=fingerprint(start.base),
        base=os.path.relpath(base, cfg.out),
        vision=os.path.abspath(cfg.vision) if cfg.vision else state.get("vision"))
    # What a checkpoint of this run has to hold besides what it trains: what an earlier stage trained, and F and G.
    if state["base"]:
        run.inherited = {name for name in load_delta(start.source) if not name.startswith("extra.")}
    run.inherited |= {name for name in model.state_dict() if part_of(name) in ("F", "G")}


def finished_checkpoint(cfg, place, flag, stages):
    """The last checkpoint of the finished run `place`, of one of these stages; all else is refused, with the way
    out."""
    folder = newest_checkpoint(place)
    if folder is None:
        # Stage 0 gives weights to train from, or somebody has published them; a later stage is trained here.
        command = f"python train.py --stage {stages[0]} --out {place}"
        if cfg.preset != "toy":
            command += f" --preset {cfg.preset}"
        way_out = f"there are no weights; pass --base DIR, or train it first:  {command}"
        if stages[0] > 0:
            way_out = f"no checkpoint there; {command}"
        elif flag == "--base":
            way_out = "there are no weights: a folder with VideoLLaMA2's, or a run of stage 0, is needed"
        raise DataError(f"{flag} {place}: {way_out}")
    # A run that is under way, or of another stage, is no start.
    state = read_state(folder)
    step, steps = state["step"], state["steps"]
    if state["stage"] not in stages or step < steps:
        wanted = " or ".join(map(str, stages))
        raise DataError(f"{flag} {place} is of stage {state['stage']} at step {step} of {steps}; "
                        f"a finished stage {wanted} is needed here")
    return folder


def refuse_an_idle_base(cfg, start):
    """A --base beside a source that needs none, being whole, unless both are the same."""
    if cfg.base and start.base == start.source:
        given = finished_checkpoint(cfg, cfg.base, "--base", stages=(0,))
        if fingerprint(given) != fingerprint(start.source):
            raise DataError(f"--base {cfg.base} does nothing: --init {cfg.init} holds all weights itself; give one of "
                            f"them")


def refuse_missing_negatives(stage, loader):
    """InfoNCE between F(x) and y where a micro batch may be one moment: cameras of a moment are no negatives."""
    cameras = int(loader.cameras.max())
    if stage.losses.get("contrastive") and loader.micro <= cameras:
        raise DataError(f"--contrastive compares moments, and a micro batch of {loader.micro} "
                        f"may be the {cameras} cameras of one moment: "
                        f"a --micro-batch of more than {cameras} is needed")


def refuse_misfits(cfg, model, tokenizer, start):
    """A tokenizer of another vocabulary, or weights of another preset."""
    published = (start.base / "config.json").is_file()
    if cfg.stage == 0 and not published:
        raise DataError(f"--base {cfg.base}: stage 0 at 7b trains the ego half of published weights, and these are "
                        f"a run's")
    if tokenizer.size > model.cfg.vocab:
        raise DataError(f"{tokenizer.path}: {tokenizer.size} pieces, the decoder {model.cfg.vocab}: "
                        f"pass its --tokenizer")
    sizes = replace(model.cfg, mapping="none", lora=False)
    if not published and sizes != PRESETS[cfg.preset]:
        raise DataError(f"{start.source} has other sizes than --preset {cfg.preset}: pass its own preset")


def resume_checkpoint(run, model):
    """The newest finished checkpoint of this very run, or None. All ranks must find the same, and be the same run."""
    cfg = run.cfg
    folder = newest_checkpoint(cfg.out)
    if folder == Path(cfg.out):
        raise DataError(f"--out {cfg.out} holds weights and is no run folder: choose another --out")
    refuse_other_ranks(run, folder)
    if folder is not None:
        refuse_another_run(run, folder)
    if run.rank == 0:
        refuse_a_poor_folder(run, model)
        # What an earlier, shorter run has shown is no result of this one.
        if folder is None or read_state(folder)["step"] < run.steps:
            result_of(cfg).unlink(missing_ok=True)
    return folder


def refuse_other_ranks(run, folder):
    """Ranks are one run: flags, data, code and the step to go on from must be those of rank 0."""
    own = recipe_of(run.cfg) | run.provenance | dict(
        steps=run.steps,
        lr=run.cfg.lr,
        bf16=run.bf16,
        fsdp=run.cfg.fsdp,
        micro_batch=run.cfg.micro_batch,
        code=git_revision())
    # Every rank compares all with rank 0, so all end with the same sentence.
    ranks = gather(own | {"step to go on from": folder.name if folder else "none"})
    for number, other in enumerate(ranks):
        for key, value in ranks[0].items():
            if other.get(key) != value and key not in ("base", "vision"):
                where = ""
                if key.startswith("step to"):
                    where = f": all machines must see one folder {run.cfg.out}"
                raise DataError(f"rank 0 has {key}={value}, rank {number} has {other.get(key)}: "
                                f"ranks are one run{where}")


def refuse_another_run(run, folder):
    """The recipe of a checkpoint, and what it stands on, must be those of the run, field by field. What may change is
    said."""
    cfg, state = run.cfg, read_state(folder)
    changes = []
    now = git_revision()
    if state["git"] != now:
        changes.append(f"code {now} instead of {state['git']}")
    # Field by field: the flags and rows that were recorded, and the hashes of what the run stands on.
    saved = state["recipe"] | {key: state.get(key) for key in run.provenance}
    # A flag that the checkpoint's code did not have yet counts as not given.
    defaults = {flag.name: flag.default for flag in fields(TrainConfig)}
    for key, value in (recipe_of(cfg) | run.provenance).items():
        found = saved.get(key, defaults.get(key))
        if found == value or key in ("base", "vision"):         # these may move: base_hash tells which it is
            continue
        if key.endswith(": trains") and found.keys() == value.keys():
            changes.append(f"rates {value} instead of {found}")
        elif key == "skip_list":
            changes.append("another list of rows to skip: the order of the samples differs from there on")
        else:
            raise DataError(f"{cfg.out} holds a run with {key}={found}, this one has {value}: choose "
                            f"another --out or remove the folder")
    if state.get("bf16", run.bf16) != run.bf16:
        changes.append(f"{'bfloat16' if run.bf16 else 'float32'} instead of the other dtype")

    # More steps than the run was meant to have go on from where it is, on the schedule of the new length.
    former = state["steps"]
    if run.steps < former or run.steps > former and len(stages_of(cfg)) > 1:
        raise DataError(f"{cfg.out} holds a run of {former} steps, this one has {run.steps}: --steps may only grow, "
                        f"and not in stage 0; choose another --out")
    if run.steps > former:
        stage, = stages_of(cfg)
        old, new = (schedule(state["step"], length, stage) for length in (former, run.steps))
        changes.append(f"{run.steps} steps instead of {former}: at step {state['step']} the rate jumps from {old:.3f} "
                       f"to {new:.3f} of its peak")
    if run.rank == 0:
        said = f"{folder} goes on from step {state['step']}"
        if state["step"] == run.steps:
            said = f"{folder} is finished: nothing to train"
        print("; with ".join([said, *changes]), flush=True)


def refuse_a_poor_folder(run, model):
    """A run folder that cannot hold a checkpoint is found before the first step: a folder is written, synced and
    renamed in it, and there must be room."""
    out = Path(run.cfg.out)
    # What trains has weights and at most two moments in float32; what is only kept has weights.
    trains = {part for stage in stages_of(run.cfg) for part in stage.trains}
    needed = 0
    for name, p in model.named_parameters():
        if part_of(name) in trains:
            needed += 12 * p.numel()
        elif run.cfg.from_nothing or name in run.inherited:
            needed += 4 * p.numel()
    out.mkdir(parents=True, exist_ok=True)
    # What killed saves have left.
    for folder in out.glob("part_step_*"):
        shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise DataError(f"{out} has room for {free / 1e9:.1f} GB, and a checkpoint takes {needed / 1e9:.1f} GB: choose "
                        f"another --out, or make room")

    # What a save does, with a small file.
    try:
        with tempfile.TemporaryDirectory(prefix="part_step_", dir=out) as trial:
            folder = Path(trial, "folder")
            folder.mkdir()
            with open(folder / "file", "wb") as file:
                file.write(run.tokenizer)
                os.fsync(file.fileno())
            os.rename(folder, Path(trial, "renamed"))
    except OSError as error:
        raise DataError(f"{out}: a checkpoint cannot be saved there ({error.strerror or error}): choose another "
                        f"--out") from None


def restore_weights(objective, folder, device):
    """Put a checkpoint's own tensors into the objective; they are assigned, since the base may be half precision."""
    tensors = {}
    for name, tensor in load_delta(folder).items():
        owner = "" if name.startswith("extra.") else "model."
        tensors[owner + name] = tensor.to(device, copy=True)
    objective.load_state_dict(tensors, strict=False, assign=True)


def length_of(run, stage, loader):
    """Steps of a stage: the table's, or those that its epochs take. A run that has begun keeps its length, whatever
    skip list, which shortens an epoch, has come since, unless --epochs or --steps is another."""
    if stage.steps:
        return stage.steps
    folder = newest_checkpoint(run.cfg.out)
    if folder and not run.cfg.from_nothing:
        state = read_state(folder)
        begun = state.get("config", {})
        if begun and (begun["epochs"], begun["steps"]) == (run.cfg.epochs, run.cfg.steps):
            return state["steps"]
    return max(1, stage.epochs * loader.samples // stage.batch)


# -------------------------------------------------------------------------------------------------------------- D log
class Log:
    """log.jsonl, one object per step, cut back to the step that a run resumes from; and the progress line."""
    def __init__(self, path, step, skipped=0):
        """`path` None: a rank that keeps no log."""
        self.file = None
        self.resumed_at = step
        self.skipped = skipped
        self.flops = 0.0                                        # per sample; 0 is not known
        self.once = {}                                          # figures for the next row alone
        self.peak = None                                        # TFLOP/s of all ranks' GPUs, where it is known
        self.waited = 0.0                                       # seconds that this step waited for its data
        self.is_shown = path is not None
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
        """One object to the file, one line to the screen. A log that cannot be written is said once, and ends
        nothing."""
        # JSON has no NaN: a loss that is none ends a run elsewhere, a validation does not.
        row = {key: value if math.isfinite(value) else None for key, value in row.items()}
        if self.file:
            try:
                self.file.write(json.dumps(row) + "\n")
            except OSError as error:
                print(f"{self.file.name} cannot be written any more ({error}): training goes on", file=sys.stderr)
                self.file = None
        if text and self.is_shown:
            print(text, flush=True)

    def timed(self, batches, first):
        """Pass the batches on, and take the time that each step waits for its own. `first` steps of the stage are
        done; where it begins, the skipped samples of the stage before count no more."""
        if first == 0:
            self.skipped = 0
        self.clock = time.monotonic()
        # (seconds, waited) of each step since the last line on the screen
        self.unshown = []
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited = time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def name_skipped(self, micro_batches, number):
        """Name this rank's unreadable samples, and count those of all ranks, `number`."""
        for batch in micro_batches:
            for reason in batch.skipped:
                print(f"skipped {reason}", flush=True)
        self.skipped += number

    def step(self, done, length, counts, losses, row):
        """Step number `done` of `length` is over. Its time runs from the end of the step before: with waiting for
        data, and with a validation or a save that came between."""
        now = time.monotonic()
        took = now - self.clock
        self.clock = now
        self.unshown.append((took, self.waited))
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        row = row | losses | self.once | dict(
            skipped=self.skipped,
            seconds=took,
            waited=self.waited,
            clips_per_second=counts.samples / took,
            tokens_per_second=counts.tokens / took,
            max_memory_bytes=memory)
        if self.flops:
            row["tflops"] = counts.samples * self.flops / 1e12 / took
        self.once = {}
        # The screen gets every tenth step.
        text = ""
        if done % 10 == 0 or done == length:
            text = self.line(done, length, counts.samples, losses)
        self.write(row, text)

    def line(self, done, length, samples, losses):
        """What the screen says of the steps since its last line: losses, speed, the share of waiting, the time that
        is left."""
        seconds, waiting = np.mean(self.unshown, axis=0)        # per step
        self.unshown = []
        # Losses first, then what they cost.
        values = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        speed = f"{seconds:.3f} s/step, {waiting:.3f} of it waiting for data | {samples / seconds:.0f} clips/s"
        if self.flops:
            work = samples * self.flops / 1e12 / seconds
            speed += f" | {work:.3g} TFLOP/s, {100 * work / self.peak:.0f} % of the peak"
        return f"step {done}/{length} | {values} | {speed} | ETA {(length - done) * seconds:.0f} s"


# TFLOP/s of cards in bfloat16, as their makers give them for dense matrices. The first name that is in a card's
# counts.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250}


def count_flops(objective, batch) -> float:
    """FLOPs per sample of the matrix products of a step, forward and backward (what --recompute computes again does
    not count). A twin on the meta device, which has shapes and no numbers, takes the micro batch."""
    from torch.utils.flop_counter import FlopCounterMode        # here, because it registers an exit hook
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = Exo2Ego(objective.model.cfg)
        twin = type(objective)(model, objective.tokenizer, objective.stage, objective.cfg, objective.world)
    freeze(twin, bf16=False)
    ego, exo = (clips if clips is None else clips.to("meta") for clips in (batch.ego, batch.exo))
    formulas = {aten.convolution_backward: convolution_backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    # The counter knows products, not the fused kernels of attention: torch's formula, then, which the variable asks
    # for.
    plain = mock.patch.dict(os.environ, EXO2EGO_ATTENTION="sdpa")
    with torch.random.fork_rng(devices=[]), plain, sdpa_kernel(SDPBackend.MATH), counter:
        twin(replace(batch, ego=ego, exo=exo), 1, 1)["loss"].backward()
    return counter.get_total_flops() / batch.samples


def convolution_backward_flops(grad, x, weight, *options, **_):
    """Each of the gradients that are `wanted` (of the input, of the weight) costs what the forward did. torch's own
    count forgets that groups do not mix. The tensors are given as their shapes."""
    _bias, _stride, _padding, _dilation, transposed, *_, wanted = options
    positions = x[0] * math.prod((x if transposed else grad)[2:])
    return 2 * positions * math.prod(weight) * sum(wanted[:2])


@torch.no_grad()
def constant_ccl(objective, loader, samples=64):
    """What the cycle's loss would be if F and G gave one constant, the best there is: at each patch and channel the
    median of the features of some pairs. A cycle that has learned is well below."""
    model = objective.model
    device = next(model.parameters()).device
    views = {"ego": model.ego_vit, "exo": model.exo_vit}
    if objective.cfg.forward_cycle_only:
        del views["exo"]
    features = {view: [] for view in views}
    for first in range(0, min(samples, loader.samples), loader.micro):
        batch = loader.micro_batch(range(first, min(first + loader.micro, loader.samples)))
        for view, vit in views.items():
            clips = getattr(batch, view).to(device)
            features[view].append(model.patch_features(vit, clips).float().cpu())
    total = 0.0
    for of_view in map(torch.cat, features.values()):
        normed = nnf.layer_norm(of_view, of_view.shape[-1:]).flatten(0, 1)                  # (clips * T, h, w, D)
        total += float((normed - normed.median(0).values).abs().mean())
    return total


def describe(run, objective, loader, length, log):
    """Before the first step of a stage: the arithmetic, what trains, what the model is fed, and what the figures that
    follow are to be measured by."""
    stage = objective.stage
    micro = loader.micro
    arithmetic = f"{stage.batch // micro} micro batches x {micro} in all, on {run.world} ranks"
    print(f"\n== stage {run.cfg.stage}: {stage.name} == {length} steps x {stage.batch} "
          f"of {loader.samples} samples ({arithmetic})")
    if run.start:
        source, base = map(os.path.normpath, run.start[:2])
        print(f"   starts from {source}, untouched weights are those of {base}")
        beside = Path(run.cfg.out).parent / "stage0"
        another = newest_checkpoint(beside)
        if run.cfg.stage == 1 and another and another.resolve() != run.start.source.resolve():
            print(f"   {beside} is not used: --init {beside} starts from it, "
                  f"if it is finished")
    # Parameters of each part, trained and frozen.
    parts = [*objective.model.named_children(), ("extra", objective.extra)]
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
    # (The names of these instructions are those of x86; other processors say nothing.)
    able = torch.cpu.get_capabilities()
    slow = able.get("avx2") and not (able["avx512_bf16"] or able["amx_bf16"])
    if run.bf16 and run.device.type == "cpu" and slow:
        print("   this CPU has no instructions for bfloat16: --dtype float32 is several times faster")
    batch = loader.micro_batch(range(loader.micro))
    print(f"   fed: {batch.describe(objective.tokenizer)}", flush=True)

    if "ccl" in stage.losses and log.resumed_at == 0:
        with autocast(run.device, run.bf16):
            log.once = {"ccl_constant": constant_ccl(objective, loader)}
        print(f"   the best constants have ccl {log.once['ccl_constant']:.3f}: "
              f"a cycle that learns gets well below")
    # For the speeds that follow: the most that the GPUs can do, and the work of a sample.
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    log.peak = next((run.world * peak for name, peak in PEAK_TFLOPS.items() if name in card), None)
    if log.peak:
        try:
            log.flops = count_flops(objective, batch)
        except RuntimeError as error:
            # A loss of one's own may look at numbers, which the twin has not.
            print(f"   TFLOP/s are not counted: {error}")


# ------------------------------------------------------------------------------------------------------------- E main
def validation_loader(run, objective) -> Loader | None:
    """The samples of the validation loss, if one is asked for: of --val-data, or of the micro-world; of at most as
    many rows as eight batches of training hold, evenly spread. A video that is not there, or a set without a text, is
    found before the first step."""
    cfg, stage = run.cfg, objective.stage
    if not (cfg.val_every or cfg.val_data):
        return None
    # A text loss of the learner's needs no exo clips.
    stage = replace(stage, view="ego" if stage.view == "pair" else stage.view)
    manifest = cfg.val_data or toy_split(cfg.toy_folder, "val")
    rows = read_manifests([manifest], cfg.root, cfg.allow_outside)
    chats = [chats_of(row, stage.supervise) for row in rows]
    rows = [row for row, own in zip(rows, chats) if own and all("assistant" in turns[-1] for turns in own)]
    rows = rows[::max(1, math.ceil(len(rows) / (8 * stage.batch)))]
    if not rows:
        raise DataError(f"{manifest} has no row with a text or an answer: there is nothing to validate on")
    micro = samples_per_forward(stage, cfg, run.world)
    return make_loader(
        run, stage, objective.model, objective.tokenizer,
        rows=rows,
        batch=micro * run.world,
        micro=micro,
        train=False)


def without_weight(batch):
    """A micro batch whose text counts for nothing."""
    return replace(batch, weights=batch.weights * 0)


def shuffle_pairs(rows, seed) -> list[dict]:
    """The control: every ego clip gets the exo clips of another row (a cyclic shift in random order)."""
    if not all("exo" in row for row in rows):
        return rows                                             # the loader names the row that lacks them
    order = np.random.default_rng(seed).permutation(len(rows))
    partner = dict(zip(order, np.roll(order, 1)))
    return [row | {"exo": rows[partner[i]]["exo"]} for i, row in enumerate(rows)]


def make_missing_stage_0(cfg):
    """Train the micro-world's stage 0 if stage 1 is to start from it and it is not there, or not finished: by
    whichever process gets the lock first. The others wait, and find it done."""
    folder = Path(cfg.out).parent / "stage0"

    def missing():
        newest = newest_checkpoint(folder)
        return newest is None or read_state(newest)["step"] < read_state(newest)["steps"]
    starts_there = cfg.stage == 1 and cfg.preset != "7b" and not (cfg.init or cfg.base)
    if not (starts_there and cfg.toy_folder and missing()):
        return
    with file_lock(folder / ".lock", wait=True):
        if missing():
            flags = ["--stage", "0", "--preset", cfg.preset, "--data", cfg.toy_folder, "--seed", str(cfg.seed),
                     "--out", str(folder), "--workers", str(cfg.workers)]
            # This process trains it alone, whatever the number of ranks.
            with mock.patch.dict(os.environ, WORLD_SIZE="1"):
                alone = parse(flags)
            train(alone)


def explain(error, cfg, world):
    """The sentence of an error that a user can mend; a RuntimeError that nobody foresaw is raised again."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped: the same command goes on"
    if isinstance(error, DataError):
        return str(error)
    # The first line of anybody else's error; some have no words at all.
    text = (str(error) or repr(error)).splitlines()[0][:300]
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or re.search("allocate memory|out of memory", text):
        return (f"out of memory ({text}): a smaller --micro-batch, or --recompute blocks, needs less; "
                f"the batch of a step stays.  python tests/bench.py plan  says how much each needs")
    # A file that is missing is named by the error itself, below.
    if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, FileNotFoundError):
        return f"{getattr(error, 'filename', None) or cfg.out} cannot be written or read: {text}"
    if not isinstance(error, RuntimeError):
        # Perhaps it is a bug, and then its place helps.
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(at.filename).name}:{at.lineno}"
        return f"{error} ({place})"
    # What torch says of workers, of other ranks and of compilers.
    if "DataLoader" in text:
        return (f"a loader worker died, or was silent for --timeout {cfg.timeout} seconds; "
                f"the same command goes on from the last checkpoint, with a longer --timeout "
                f"where a step's clips take so long ({text})")
    if world > 1 and re.search("timed out|timeout|connection (closed|reset)", text, re.IGNORECASE):
        return f"the ranks waited in vain for one another (--timeout); {text}"
    if cfg.compile and re.search("compiler|inductor", f"{type(error).__name__} {text}", re.IGNORECASE):
        return f"the blocks cannot be compiled here ({text}): leave --compile out, or pass --no-compile"
    raise error


def tell_torchrun(sentence):
    """Leave the sentence where torchrun looks for it: then its own report of a failed rank ends with it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps(dict(message=sentence, timestamp=int(time.time()))))


def main(argv=None, **experiment):
    """Run the command line; `experiment` as of `train`."""
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
            cfg = cfg if world > 1 else replace(cfg, fsdp=False)
            # A lost reader of what is printed ends no training.
            with contextlib.redirect_stdout(Screen(sys.stdout)):
                train(cfg, rank, world, **experiment)
    except (ValueError, OSError, RuntimeError, MemoryError, SafetensorError, KeyboardInterrupt) as error:
        sentence = f"train.py: {explain(error, cfg, world)}"
        print(sentence, file=sys.stderr, flush=True)
        tell_torchrun(sentence)
        # With several ranks at once: the others must not wait for a rank that gave up.
        if world > 1:
            os._exit(2)
        sys.exit(2)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
