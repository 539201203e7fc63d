"""What is inside a trained model: stage by stage, without the video, and what KL and cycle see.

    python tests/study/probe.py --world DIR --stage0 DIR --stage1 DIR --stage2 DIR --stage3 DIR --seed N

run.py --probes calls it for every seed whose `full` cell is cached, and keeps the line it prints last (JSON).
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as nnf

sys.path.insert(0, str(Path(__file__).parents[2]))
import eval
import train
from data import Tokenizer, read_manifest, toy_split, toy_world
from model import feature_kl, load_checkpoint, newest_checkpoint
from run import pack


def narrations(ckpt, rows, view="learner") -> dict:
    """Outcome of every test clip as run.py writes them: ego clips, read by the learner or by the exo encoder, or a
    grey clip in the place of each."""
    (model, _), tokenizer = load_checkpoint(ckpt), Tokenizer(newest_checkpoint(ckpt))
    model.eval()
    if view == "exo encoder":
        model.ego_vit, model.ego_connector, model.F = model.exo_vit, model.exo_connector, None
    if view == "blind":
        grey = torch.full((1, model.cfg.frames, 3, model.cfg.image_size, model.cfg.image_size), 128, dtype=torch.uint8)
        with torch.no_grad():
            visual = model.encode_ego(grey).expand(len(rows), -1, -1)
    else:
        visual = eval.encode_clips(model, tokenizer, rows, "ego")
    said = eval.generate_answers(model, tokenizer, visual, [eval.NARRATE] * len(rows))
    found = {"outcomes": pack(answer == row["text"] for answer, row in zip(said, rows))}
    if view == "blind":
        figures, _ = eval.evaluate_questions(model, tokenizer, rows, visual)
        found["qa"] = figures["qa"]
    return found


@torch.no_grad()
def features(ckpt, rows) -> dict:
    """What KL compares, over validation pairs: how much of the demonstrator's tokens is the same for every clip, and
    the KL of four estimates of them: their mean over clips, F(x) of a shuffled clip, F(x), and of F(x) what is left
    when its own mean is put right."""
    (model, _), tokenizer = load_checkpoint(ckpt), Tokenizer(newest_checkpoint(ckpt))
    model.eval()
    exo, estimate, patches = [], [], []
    for batch in eval.iterate_batches(model, tokenizer, rows, "pair"):
        seen = model(batch.ego, batch.exo)
        exo.append(model.exo_connector(seen.y))
        estimate.append(seen.estimate)
        patches.append(seen.y)
    y, fx = (nnf.layer_norm(torch.cat(t).float(), t[0].shape[-1:]) for t in (exo, estimate))  # (600, 8, 96)
    constant = y.mean(0, keepdim=True)
    own, theirs = y - constant, fx - fx.mean(0, keepdim=True)
    estimates = {
        "mean": constant.expand_as(y),
        "shuffled": fx.roll(len(fx) // 2, 0),
        "true": fx,
        "true, mean put right": constant + theirs}
    size = (own.square().mean() * theirs.square().mean()).sqrt()
    grid = torch.cat(patches).flatten(0, 1).float()
    return {"constant share of y": float(constant.square().mean() / y.square().mean()),
            "constant share of patches": float(grid.mean(0).square().mean() / grid.square().mean()),
            "correlation of what is left": float((own * theirs).mean() / size),
            "size of it, F(x) / y": float(theirs.std() / own.std()),
            "KL": {name: float(feature_kl(y, estimate).mean()) for name, estimate in estimates.items()}}


def gradients(ckpt, world, stage1, base, seed, at: str) -> dict:
    """Norm of each weighted loss's gradient on the ego encoder, F and G, for one batch of stage 2."""
    cfg = train.parse(["--stage", "2", "--data", world, "--init", stage1, "--base", base, "--seed", seed])
    stage, = train.stages_of(cfg)
    run = train.Run(cfg, 0, 1, torch.device("cpu"), False)
    model, tokenizer = train.initial_model(run)
    if at == "end":
        model, _ = load_checkpoint(ckpt)
    objective = train.Objective(model, tokenizer, stage, cfg, 1)
    train.freeze(objective, bf16=False)
    loader = train.training_loader(run, stage, model, tokenizer)
    batch, norms = loader.micro_batch(range(32)), {}
    for name, weight in stage.losses.items():
        objective.zero_grad(set_to_none=True)
        (weight * objective(batch, float(batch.weights.sum()), batch.samples)[name]).backward()
        for part in ("ego_vit", "F", "G"):
            grads = [p.grad for p in getattr(model, part).parameters() if p.grad is not None]
            norms[f"{name} on {part}"] = float(sum(g.square().sum() for g in grads)) ** 0.5
    return norms


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("world", "stage0", "stage1", "stage2", "stage3"):
        parser.add_argument(f"--{flag}", required=True)
    parser.add_argument("--seed", required=True, help="of the runs")
    parser.add_argument("--only-features", action="store_true", help="of stage 2: for rows other than full")
    args = parser.parse_args()
    torch.set_num_threads(1)
    val = read_manifest(toy_split(args.world, "val", toy_world(args.world)))
    if args.only_features:
        return print(json.dumps({"features": features(args.stage2, val)}))
    test = read_manifest(toy_split(args.world, "test", toy_world(args.world)))
    found = {
        "exo encoder, after Init": narrations(args.stage0, test, "exo encoder"),
        "learner, after Init": narrations(args.stage0, test),
        "exo encoder, after stage 1": narrations(args.stage1, test, "exo encoder"),
        "blind, after stage 3": narrations(args.stage3, test, "blind")}
    norms = {at: gradients(args.stage2, args.world, args.stage1, args.stage0, args.seed, at) for at in ("start", "end")}
    print(json.dumps({"narrations": found, "features": features(args.stage2, val), "gradients": norms}))


if __name__ == "__main__":
    main()
