"""tests/WALK.md: one moment of the test split, from its bytes to its answer, with the shapes and numbers of a real run.

    python tests/walk.py                # reads README's folders: out/toy, out/stage1 ... out/stage3, and out/x/stage2
    python tests/walk.py --links        # after an edit of the code: the lines that the page links to

The losses that the page shows in three lines each are functions of this file: what a reader sees is what was computed.
"""
import argparse
import ast
import copy
import inspect
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from einops import rearrange

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))
import train
from data import NARRATE, Loader, Tokenizer, read_manifest, read_row_clip, toy_split
from eval import CLIPS, encode_clips, exo_features, generate_answers, rank_exo_clips
from model import IGNORE, PRESETS, VIDEO, Exo2Ego, feature_kl, load_checkpoint, newest_checkpoint

PAGE = REPO / "tests/WALK.md"
# What makes each folder, in the order in which one needs them.
NEEDED = {
    "stage1": "torchrun train.py --stage 1",
    "stage2": "torchrun train.py --stage 2",
    "stage3": "torchrun train.py --stage 3",
    "x/stage2": "torchrun train.py --stage 2 --no-mapping --lr 9e-3 --data out/toy --base out/stage0 "
                "--init out/stage1 --out out/x/stage2"}


# ----------------------------------------------------------------------------------------------- links to the code
def line_of(file, symbol):
    """The line on which a symbol of one of the four files begins, such as "Objective.vtg"."""
    scope = ast.parse((REPO / file).read_text()).body
    for part in symbol.split("."):
        for node in scope:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if part in [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]:
                break
        else:
            raise SystemExit(f"{PAGE}: {file} has no {symbol}")
        scope = getattr(node, "body", [])
    return node.lineno


def with_lines(page):
    """A page whose links [`file: symbol`](...) lead to the lines where the code has the symbols now."""
    def link(found):
        file, symbol = found.groups()
        return f"[`{file}: {symbol}`](../{file}#L{line_of(file, symbol)})"
    return re.sub(r"\[`(\w+\.py): ([\w.]+)`\](?:\([^)]*\))?", link, page)


# -------------------------------------------------------------------------------------------- shapes, toy beside 7b
SHAPES = (          # what it is, the symbol that makes it, where it is seen: behind a part of the model, or before it
    ("frames of one clip, uint8", "data.py: read_clip", "frames"),
    ("x: the ego ViT's patches of each frame", "model.py: ViT", "into F"),
    ("F(x): the same grid, as the exo ViT would give it", "model.py: Mapping", "F"),
    ("con_ego(x): tokens, as wide as the LLM", "model.py: Connector", "ego_connector"),
    ("con_exo(F(x)): the same, by the frozen exo connector", "model.py: Exo2Ego.forward", "exo_connector"),
    ("what the LLM reads: both, one behind the other", "model.py: Exo2Ego.ego_tokens", "visual"))


def shapes(preset):
    """The shapes of SHAPES for one ego clip, found on the meta device, which needs no weights."""
    found = {}
    with torch.device("meta"):
        model = Exo2Ego(PRESETS[preset])
        model.add(mapping="resnet")
        for name, part in model.named_children():
            part.register_forward_hook(lambda part, given, made, name=name: found.update(
                {name: made.shape, f"into {name}": given[0].shape}))
        cfg = model.cfg
        frames = torch.empty(1, cfg.frames, 3, cfg.image_size, cfg.image_size, dtype=torch.uint8)
        visual = model.encode_ego(frames)
    return found | dict(frames=frames.shape, visual=visual.shape)


def shape_table():
    toy, large = shapes("toy"), shapes("7b")
    lines = ["| what | made by | toy | 7b |", "|---|---|---|---|"]
    for what, symbol, part in SHAPES:
        sizes = [" x ".join(map(str, found[part])) for found in (toy, large)]
        lines.append(f"| {what} | [`{symbol}`] | {sizes[0]} | {sizes[1]} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the losses, as one says them
def vtg(model, visual, ids, labels):
    hidden = model.hidden_states(model.insert_visual_tokens(visual, ids), [len(ids)])
    p = model.decoder.logits(hidden).softmax(-1)
    # Position t - 1 predicts token t.
    return -torch.stack([p[t - 1, label].log() for t, label in enumerate(labels) if label != IGNORE]).mean()


def kl(con_exo_y, con_exo_fx):
    p, q = (nnf.layer_norm(tokens, tokens.shape[-1:]).softmax(-1) for tokens in (con_exo_y, con_exo_fx))
    return (p * (p / q).log()).sum(-1).mean()


def ccl(F, G, x, y):
    a, b, c, d = (nnf.layer_norm(features, features.shape[-1:]) for features in (G(F(x)), x, F(G(y)), y))
    return (a - b).abs().mean() + (c - d).abs().mean()


def source(*functions):
    """Code as the page shows it."""
    return "```python\n" + "\n".join(inspect.getsource(function) for function in functions) + "```"


# ---------------------------------------------------------------------------------------------------- one moment
class Moment:
    """The models of a run, and the moment that the page follows."""

    def __init__(self, out):
        self.out = out
        toy = out / "toy"
        self.words = Tokenizer(newest_checkpoint(out / "stage2"))
        self.cfg = train.parse(["--stage", "2", "--data", str(toy), "--init", str(out / "stage1"),
                                "--base", str(out / "stage0"), "--out", str(out / "stage2")])
        self.stage, = train.stages_of(self.cfg)
        # As stage 2 begins, and as it ends.
        self.before, _ = train.initial_model(train.Run(self.cfg, 0, 1, torch.device("cpu"), False))
        self.after, self.alone, self.tuned = (
            load_checkpoint(out / folder)[0].eval() for folder in ("stage2", "x/stage2", "stage3"))
        # One moment per scene takes part in the search for the nearest exo clip.
        rows = read_manifest(toy_split(toy, "test"))
        said, said_alone = (read_lines(out / folder / "predictions.jsonl") for folder in ("stage2", "x/stage2"))
        self.right = [[line["said"] == line["text"] for line in lines] for lines in (said, said_alone)]
        self.scenes = list(range(0, min(len(rows), 200 * CLIPS), CLIPS))
        gained = [number for number in self.scenes if self.right[0][number] > self.right[1][number]]
        self.is_gained = bool(gained)
        self.number = gained[0] if gained else 0
        self.row = rows[self.number]
        self.rows = [rows[number] for number in self.scenes]
        self.said = {"[x ; F(x)]": said[self.number]["said"], "x alone": said_alone[self.number]["said"]}

    def batch(self, model):
        """What a Loader makes of this moment, without random times."""
        connectors = 1 if model.F is None else 2
        loader = Loader([self.row], model.cfg, self.words, view="pair", batch=1, train=False,
                        video_tokens=connectors * model.cfg.visual_tokens)
        return loader.micro_batch(range(1))

    @torch.no_grad()
    def probabilities(self, model):
        """p of each token of the answer, given the video and the words before it."""
        batch = self.batch(model)
        visual = model.encode_ego(batch.ego)
        losses = model.text_losses(visual, batch.ids, batch.labels, batch.lens)
        return (-losses[batch.labels != IGNORE]).exp().tolist()

    def losses(self):
        """Of this moment after stage 2: by hand, and by train.py's Objective."""
        model, batch = self.after, self.batch(self.after)
        objective = train.Objective(model, self.words, self.stage, self.cfg, 1)
        with torch.no_grad():
            ours = objective(batch, float(batch.weights.sum()), batch.samples)
            seen = model(batch.ego, batch.exo)
            by_hand = {
                "vtg": vtg(model, seen.visual, batch.ids, batch.labels),
                "kl": kl(model.exo_connector(seen.y), model.exo_connector(seen.fx)),
                "ccl": ccl(model.F, model.G, seen.x, seen.y)}
        for name, value in by_hand.items():
            assert abs(float(value) - float(ours[name])) < 1e-4 * max(1, float(value)), name
        return {name: (float(value), float(ours[name])) for name, value in by_hand.items()}

    def gradients(self):
        """Norm of each weighted loss's gradient on each part as stage 2 begins: {loss: {part: norm}}."""
        model, batch = self.before, self.batch(self.before)
        objective = train.Objective(model, self.words, self.stage, self.cfg, 1)
        trained = train.freeze(objective, bf16=False)
        norms = {}
        for name, weight in self.stage.losses.items():
            objective.zero_grad(set_to_none=True)
            (weight * objective(batch, float(batch.weights.sum()), batch.samples)[name]).backward()
            squares = {}
            for key, parameter in trained.items():
                if parameter.grad is not None:
                    part = train.part_of(key)
                    squares[part] = squares.get(part, 0) + float(parameter.grad.square().sum())
            norms[name] = {part: square ** 0.5 for part, square in squares.items()}
        return norms

    def imagined(self, model):
        """-> the exo clips of all scenes from near to far, their KL to F(x), the KL of each visual token, and the rank of
        the moment's own clip."""
        y, fx, _ = exo_features(model, self.words, self.rows)
        own = self.scenes.index(self.number)
        order, = rank_exo_clips(y, fx[own:own + 1])
        distances = feature_kl(y, fx[own:own + 1].expand_as(y))
        # One token at a time, each as a clip of its own.
        per_token = feature_kl(rearrange(y[own], "n w -> n 1 w"), rearrange(fx[own], "n w -> n 1 w"))
        return order, distances.tolist(), per_token.tolist(), order.index(own) + 1


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- pictures
def draw_views(moment, file):
    """What both cameras see, with words inside the picture."""
    from matplotlib import pyplot
    frames = moment.after.cfg.frames
    figure = pyplot.figure(figsize=(2 * frames, 4.8), layout="constrained")
    views = {"ego: the camera on the head, what the learner sees": moment.row["ego"],
             "exo: a fixed camera, for the demonstrator, in training only": moment.row["exo"][0]}
    for part, (title, clip) in zip(figure.subfigures(2, 1), views.items()):
        part.suptitle(title, x=0.01, ha="left", fontsize=11)
        panels = part.subplots(1, frames)
        start, length = clip["start"], clip["end"] - clip["start"]
        for i, (panel, frame) in enumerate(zip(panels, read_row_clip(clip, frames, 96))):
            panel.imshow(rearrange(frame, "c h w -> h w c"))
            panel.set(xticks=[], yticks=[], xlabel=f"{start + length * (i + 0.5) / frames:.3f} s")
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def draw_imagined(moment, found, file):
    """The three exo clips that are nearest to F(x), and the KL of each visual token, before and after stage 2."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 5, figsize=(11, 4.8), layout="constrained", width_ratios=[1, 1, 1, 1, 2])
    highest = max(max(per_token) for _, _, per_token, _ in found.values())
    for panels, (when, (order, _, per_token, _)) in zip(axes, found.items()):
        clips = [(f"{when}\nthe true exo clip", moment.row)]
        for place, number in zip(("nearest to F(x)", "second", "third"), order):
            mark = " (the true one)" if moment.rows[number] == moment.row else ""
            clips.append((f"{place}{mark}", moment.rows[number]))
        for panel, (title, row) in zip(panels, clips):
            frame = read_row_clip(row["exo"][0], 3, 96)[1]
            panel.imshow(rearrange(frame, "c h w -> h w c"))
            panel.set(xticks=[], yticks=[])
            panel.set_title(title, fontsize=9)
        panels[-1].bar(range(1, len(per_token) + 1), per_token)
        panels[-1].set(ylim=(0, highest * 1.05), xlabel="visual token")
        panels[-1].set_title(f"KL to y of each token, mean {np.mean(per_token):.2f}", fontsize=9)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------- the page
def token_lines(moment):
    """Ids beside their words: of the prompt, and of the answer, which is supervised."""
    batch, words = moment.batch(moment.after), moment.words
    lines = {"prompt": [], "answer": []}
    video = 0
    for token, label in zip(batch.ids.tolist(), batch.labels.tolist()):
        video += token == VIDEO
        if token != VIDEO:
            kind = "prompt" if label == IGNORE else "answer"
            if video and kind == "prompt" and f"<video> x {video}" not in lines[kind]:
                lines[kind].append(f"<video> x {video}")
            lines[kind].append(f"{token} {words.sp.id_to_piece(token)!r}")
    # A space inside a token's entry must not end a line.
    told = [f"{kind}: " + "  ".join(entry.replace(" ", "\xa0") for entry in lines[kind]) for kind in lines]
    return "\n".join(textwrap.fill(line, 118, subsequent_indent=4 * " ") for line in told).replace("\xa0", " ")


def make_page(moment, pictures):
    """The text of WALK.md, without the lines of its links; its pictures are drawn in a folder."""
    out, row, model = moment.out, moment.row, moment.after
    scores = {name: json.loads((out / name / "eval.json").read_text()) for name in ("stage1", "stage2", "stage3")}
    percent = lambda stage, key: f"{100 * scores[stage][key]:.1f} %"
    found = {"before stage 2": moment.imagined(moment.before.eval()), "after stage 2": moment.imagined(model)}
    draw_views(moment, pictures / "walk.png")
    draw_imagined(moment, found, pictures / "walk-f.png")

    tokens_before, tokens_after = (per_token for _, _, per_token, _ in found.values())
    fallen = sum(after < before for before, after in zip(tokens_before, tokens_after))
    nearest = []
    for when, (order, distances, _, rank) in found.items():
        told = "; ".join(f"{distances[i]:.2f} {moment.rows[i]['text'].removeprefix('Camera-wearer ')}" for i in order[:3])
        nearest.append(f"| {when} | {rank} of {len(order)} | {told} |")

    labels = moment.batch(model).labels
    pieces = [moment.words.sp.id_to_piece(token) for token in labels[labels != IGNORE].tolist()]
    chances = list(zip(pieces, moment.probabilities(moment.alone), moment.probabilities(model)))
    words = [f"| `{piece}` | {alone:.3f} | {both:.3f} |" for piece, alone, both in chances]
    decides, _, _ = max(chances, key=lambda piece: piece[2] - piece[1])

    logged = read_lines(out / "stage2/log.jsonl")
    last = {name: np.mean([line[name] for line in logged if name in line][-20:]) for name in moment.stage.losses}
    losses = [f"| {name.upper()} | {by_hand:.4f} | {ours:.4f} | {last[name]:.4f} | {moment.stage.losses[name]:g} |"
              for name, (by_hand, ours) in moment.losses().items()]

    norms = moment.gradients()
    parts = ("ego_vit", "ego_connector", "F", "G", "exo_vit", "exo_connector", "decoder")
    learns = []
    for part in parts:
        cells = [f"{norms[name][part]:.2f}" if part in norms[name] else "-" for name in norms]
        learns.append(f"| {part} | " + (" | ".join(cells) if part in moment.stage.trains else "frozen | frozen | frozen") + " |")

    turn = row["turns"][0]
    visual = encode_clips(moment.tuned, moment.words, [row], "ego")
    answer, narrated = generate_answers(moment.tuned, moment.words, visual.repeat(2, 1, 1), [turn["user"], NARRATE])
    both, alone = (sum(right) for right in moment.right)
    gained = sum(a > b for a, b in zip(*moment.right))
    lost = sum(a < b for a, b in zip(*moment.right))
    chosen = ("We chose the moment to show what F is for: among the moments that open a scene it is the first that the model with F\n"
              "narrates rightly after stage 2, and a model trained on x alone (`--no-mapping`, at the rate of the study) wrongly. It is an exception:")
    if not moment.is_gained:
        chosen = "It is the first moment: none that opens a scene is narrated rightly with F and wrongly without (`--no-mapping`, at the rate of the study);"
    # The row as it stands in the file: paths from its folder.
    shown = copy.deepcopy({key: value for key, value in row.items() if key != "where"})
    for clip in (shown["ego"], *shown["exo"]):
        clip["video"] = str(Path(clip["video"]).relative_to(Path(out / "toy").resolve()))
    return f"""# A walk through one moment

Ten minutes, one moment, top to bottom: a second of video that no stage has seen, from its bytes to its answer. The numbers
and pictures were computed by `python tests/walk.py` from a run of README's commands and one more (`--no-mapping --lr 9e-3`), with seed
0 in one thread; another number of threads rounds otherwise and ends a few points apart. Its scores: demonstrator
{percent("stage1", "exo_em")} of {scores["stage1"]["exo_em_n"]:,} exo clips exact after stage 1; learner {percent("stage2", "ego_em")} of {len(moment.right[0]):,} ego clips after stage 2, {percent("stage3", "ego_em")} after stage 3; the own exo clip nearest to F(x) in {percent("stage2", "transfer_top1")} of
{scores["stage2"]["transfer_top1_n"]} moments. Each step links to the code that does it.

{chosen} of all moments
{both:,} are right with F and {alone:,} without; {gained:,} are gained, {lost:,} lost.

## 1 A row
One line of a manifest, rendered by [`data.py: make_scene`], checked by [`data.py: read_manifest`]. Times are seconds.

```json
{json.dumps(shown, indent=1)}
```

## 2 Two cameras, one second
[`data.py: read_clip`] cuts the second into {model.cfg.frames} equal spans and takes the frame that a viewer sees in the middle of each (in training:
at a random time, the same for both cameras). The fixed camera stands opposite, so left and right are swapped; it sees the
whole scene from one place, while the head moves. The words are the same.

![four frames of the head's camera, four of the fixed one](assets/walk.png)

## 3 Words become tokens
[`data.py: Tokenizer.chat`] puts the question around the video and the answer behind it. The model reads both; only the answer
and the `</s>` that ends it are supervised. `<video> x N` are the places of N visual tokens, filled in step 6.

```
{token_lines(moment)}
```

## 4 Pixels become features
[`model.py: Exo2Ego.forward`] is the whole path. The toy's sizes beside the paper's, one clip each:

{shape_table()}

x is what the *learner* sees, y what the *demonstrator* sees of the same second: the same shape, from the exo ViT.

## 5 What F imagines
F sees x alone and says what the exo ViT would give. Which exo clip comes nearest to that? Of {len(moment.rows)} scenes we take one each, and
rank them by the loss's own distance, KL(con_exo(y) || con_exo(F(x))): [`model.py: feature_kl`], [`eval.py: rank_exo_clips`].

| | the true clip's rank | the three nearest: KL, what happens in them |
|---|---|---|
{chr(10).join(nearest)}

![the exo clips that are nearest to F(x), and the KL of each visual token, before and after stage 2](assets/walk-f.png)

Before stage 2 F is random, so its nearest clips have nothing to do with the moment. Afterwards the KL is lower in {fallen} of {len(tokens_after)}
visual tokens.

## 6 The LLM reads [x ; F(x)], then the words
In full: [con_ego(x) ; con_exo(F(x))].
[`model.py: Exo2Ego.insert_visual_tokens`] puts {2 * model.cfg.visual_tokens} visual tokens where the prompt has `<video>`: {model.cfg.visual_tokens} of con_ego(x), then {model.cfg.visual_tokens} of con_exo(F(x)).
[`model.py: Exo2Ego.stream`] then takes the likeliest token, again and again. With F it says "{moment.said["[x ; F(x)]"]}",
the model without F says "{moment.said["x alone"]}" The probability of each piece of the true answer, given the
pieces before it, shows where they part, at `{decides}`:

| piece | the `--no-mapping` model | [x ; F(x)] |
|---|---|---|
{chr(10).join(words)}

## 7 The losses of this moment
VTG asks for the words ([`train.py: Objective.vtg`]), KL for the demonstrator's tokens ([`train.py: Objective.kl`]), CCL for a way back
([`train.py: Objective.cycle`]). By hand:

{source(vtg, kl, ccl)}

| loss | by hand | by train.py | mean of the last 20 training steps | its weight |
|---|---|---|---|---|
{chr(10).join(losses)}

## 8 Who learns from what
Gradient norms of this moment as stage 2 begins, each loss times its weight. What is frozen has none, but the gradients of VTG and
KL pass *through* the frozen exo connector to F, and through F to the ego ViT ([`train.py: Objective.views`], the table there).

| part | VTG | KL | CCL |
|---|---|---|---|
{chr(10).join(learns)}

CCL teaches F and G alone: x and y are given to it without their gradients. Which parts train in which stage is the table
[`train.py: PAPER`] (here [`train.py: TOY`]); [`train.py: freeze`] obeys it, and [`train.py: run_stage`] takes the steps.

## 9 Stage 3: a question
Instruction tuning moves the ego ViT, F and a LoRA on the LLM ([`model.py: LoRALinear`]). Asked "{turn["user"]}" the learner now answers
"{answer}" (the truth: "{turn["assistant"]}"), and asked to narrate: "{narrated}"

Ask it yourself: `python eval.py --video out/toy/{shown["ego"]["video"]} --start {row["ego"]["start"]:g} --end {row["ego"]["end"]:g} --ask "{turn["user"]}"`
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="the folder of the runs (out)")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that is written (tests/WALK.md)")
    parser.add_argument("--links", action="store_true", help="only bring the lines of the page's links up to date")
    args = parser.parse_args()
    if args.links:
        args.page.write_text(with_lines(args.page.read_text()))
        return
    missing = [folder for folder in NEEDED if not (args.out / folder / "eval.json").is_file()]
    if missing:
        commands = "\n    ".join(NEEDED[folder] for folder in NEEDED if folder in missing)
        sys.exit(f"walk.py: {args.out / missing[0]} holds no finished run. "
                 f"These commands make what is missing, in out/:\n    {commands}")
    torch.set_num_threads(1)
    pictures = args.page.parent / "assets"
    pictures.mkdir(exist_ok=True)
    args.page.write_text(with_lines(make_page(Moment(args.out), pictures)))
    print(f"{args.page}, {pictures}/walk.png, {pictures}/walk-f.png")


if __name__ == "__main__":
    main()
