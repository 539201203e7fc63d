"""The study's controls that no flag of train.py makes, each a few lines: an experiment of a fork looks like this.

    python tests/study/variants.py Distillation --stage 2 --no-cycle --data DIR ...     # then train.py's flags

A variant is a class of losses, a function that changes the model before training, another row of the stage table, or
several of them. train.py does all else: the loop, saving, resuming, the log, the benchmark.
"""
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from data import Tokenizer, read_manifest, toy_split, toy_world, write_jsonl
from eval import evaluate_narrations, iterate_batches
from model import load_checkpoint, newest_checkpoint


# ---------------------------------------------------------------------------------- the second path without a mapping
def identity(model):
    """F = identity: the exo connector reads the ego features as they are. G goes with the cycle (--no-cycle)."""
    model.F.forward = lambda features: features


class FrozenF(train.Objective):
    """F random and frozen: a second path that is there and learns nothing; the ego encoder learns through it."""
    def __init__(self, model, tokenizer, stage, cfg, world):
        trains = {part: rate for part, rate in stage.trains.items() if part not in ("F", "G")}
        super().__init__(model, tokenizer, replace(stage, trains=trains), cfg, world)


# ---------------------------------------------------------------------------------------- partners without a mapping
def no_mapping(model):
    """The decoder reads x alone, as with --no-mapping; but the exo clips are still read."""
    model.F = model.G = None
    model.cfg = replace(model.cfg, mapping="none")


class Distillation(train.Objective):
    """KL(con_exo(y), con_ego(x)): the learner's own tokens are drawn to the demonstrator's: plain distillation."""
    def views(self, batch):
        seen = self.model(batch.ego, batch.exo)
        terms = {"vtg": self.vtg(seen.visual, batch)}
        pair = batch.ego_of.to(seen.visual.device)
        if "kl" in self.stage.losses:
            terms["kl"] = self.kl(seen.y, seen.visual[pair])
        return terms


# --------------------------------------------------------------------------------------------------------- the oracle
class Oracle(train.Objective):
    """[con_ego(x) ; con_exo(y)]: the true exo clip in the place of F(x), in training and when it is asked."""
    def views(self, batch):
        seen = self.model(batch.ego, batch.exo)
        # Of the cameras of a moment the first.
        moments = range(len(seen.x))
        first = torch.tensor([batch.ego_of.tolist().index(moment) for moment in moments])
        return {"vtg": self.vtg(oracle_tokens(self.model, seen.x, seen.y[first]), batch)}


def oracle_tokens(model, x, y):
    """What the oracle's decoder reads, along tokens: features of both views -> (B, 2 n, W)."""
    return model.ego_tokens(x, model.exo_connector(y))


@torch.no_grad()
def score_oracle(cfg):
    """eval.py never shows an exo clip to a learner, so the oracle is scored here: eval.json and predictions.jsonl."""
    model, _ = load_checkpoint(cfg.out)
    tokenizer = Tokenizer(newest_checkpoint(cfg.out))
    rows = read_manifest(toy_split(cfg.toy_folder, "test", toy_world(cfg.toy_folder)))
    visual = []
    for batch in iterate_batches(model, tokenizer, rows, "pair"):
        seen = model(batch.ego, batch.exo)
        visual.append(oracle_tokens(model, seen.x, seen.y))
    figures, columns = evaluate_narrations(model, tokenizer, rows, torch.cat(visual), "ego")
    predictions = [dict(id=row["id"], text=row["text"], said=said) for row, said in zip(rows, columns["said"])]
    write_jsonl(Path(cfg.out) / "predictions.jsonl", predictions)
    (Path(cfg.out) / "eval.json").write_text(json.dumps(figures, indent=1))


# ------------------------------------------------------------------------------------------- what pairs stage 2 draws
def told_alone(rows):
    """The pairs that have a narration."""
    return [row for row in rows if row.get("text")]


def half_told(rows):
    """All pairs, those that have a narration so often that they are every second sample, or once where all have one."""
    told = told_alone(rows)
    untold = [row for row in rows if not row.get("text")]
    return untold + told * max(1, round(len(untold) / len(told)))


# -------------------------------------------------------------------------------------------------------- all of them
@dataclass(frozen=True)
class Variant:
    """What train.train is given besides its flags, and how the result is scored where eval.py cannot."""
    objective: type = train.Objective
    change: object = None
    score: object = None
    view: str = "pair"                  # what a sample of stage 2 shows; "ego": a told ego clip, as with --no-mapping
    rows: object = half_told            # of the rows of stage 2 those that it reads


VARIANTS = {
    "TextAlone": Variant(view="ego"),
    "Identity": Variant(change=identity, view="ego"),
    "FrozenF": Variant(objective=FrozenF, view="ego"),
    "IdentityWithKL": Variant(change=identity),
    "HalfTold": Variant(),
    "ToldAlone": Variant(rows=told_alone),
    "AllAlike": Variant(rows=list),
    "Distillation": Variant(objective=Distillation, change=no_mapping),
    "Oracle": Variant(objective=Oracle, score=score_oracle, rows=told_alone),
}


def main(argv=None):
    name, *flags = sys.argv[1:] if argv is None else argv
    if name not in VARIANTS:
        sys.exit(f"variant {name!r}: choose one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    flags += ["--no-eval"] if variant.score else []
    cfg, read = train.parse(flags), train.read_manifests
    train.TOY[2] = tuple(replace(stage, view=variant.view) for stage in train.TOY[2])
    if cfg.stage == 2:
        train.read_manifests = lambda *given: variant.rows(read(*given))
    train.main(flags, objective=variant.objective, change=variant.change)
    if variant.score:
        variant.score(cfg)


if __name__ == "__main__":
    main()
