"""Training is exact: resuming, accumulating, splitting over ranks; and only what the stage table names moves."""
import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import RANKS, REPO, TORCHRUN, flags, run
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from model import PRESETS, VIDEO, Exo2Ego, base_checkpoint_of, checkpoints, load_checkpoint, load_delta, newest_checkpoint, read_state


CFG = train.TrainConfig(stage=1, out="out")


def weights(folder):
    return load_file(newest_checkpoint(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def go(*args):
    """train.py in this process."""
    train.main([str(a) for a in args])


def all_tensors(folder):
    """Of a checkpoint, by name, the "extra." ones too: those of its base, overlaid with its own."""
    return (load_delta(base_checkpoint_of(folder)) if base_checkpoint_of(folder) else {}) | load_delta(folder)


@pytest.mark.parametrize("stage, moves", [
    (0, {"exo_vit", "exo_connector", "ego_vit", "ego_connector", "decoder"}), (1, {"exo_vit", "exo_connector"}),
    (2, {"ego_vit", "ego_connector", "F", "G"}), (3, {"ego_vit", "F", "lora"})])
def test_only_the_parts_of_the_stage_move(toy, stage, moves):
    after = all_tensors(newest_checkpoint(toy / f"stage{stage}"))
    assert {p for row in train.TOY[stage] for p in row.trains} - {"extra"} <= moves
    if stage == 0:
        return
    before = all_tensors(newest_checkpoint(toy / f"stage{stage - 1}"))
    changed = {train.part_of(n) for n, t in after.items()
               if not n.startswith("extra.") and (n not in before or not torch.equal(t, before[n]))}
    assert changed == moves
    whole = {n: t for n, t in after.items() if train.part_of(n) in moves and t.ndim > 1 and n in before}
    assert all(not torch.equal(t, before[n]) for n, t in whole.items())     # every matrix of a trained part moves


def test_a_checkpoint_holds_what_differs_from_the_base(toy):
    names = {stage: {train.part_of(n) for n in weights(toy / f"stage{stage}")} for stage in (1, 2, 3)}
    assert names[1] == {"exo_vit", "exo_connector"}
    assert names[2] == names[1] | {"ego_vit", "ego_connector", "F", "G"}
    assert names[3] == names[2] | {"lora"}
    (model, state), tokenizer = load_checkpoint(toy / "stage3"), data.Tokenizer(newest_checkpoint(toy / "stage3"))
    assert state["stage"] == 3 and model.cfg.lora and model.cfg.mapping == "resnet" and tokenizer.size > 300


def test_killed_and_resumed_equals_uninterrupted(toy, tmp_path):
    args = ["--stage", 2, "--data", toy / "toy", "--base", toy / "stage0", "--init", toy / "stage1", "--steps", 60,
            "--save-every", 4, "--batch", 8, "--no-eval", "--keep", 20]
    go(*args, "--out", tmp_path / "whole")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", REPO / "train.py", *args, "--out",
               tmp_path / "cut"]
    for victim in ("rank", "launcher"):
        launcher = subprocess.Popen([str(c) for c in command], env=os.environ | {"OMP_NUM_THREADS": "1"},
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        done = 4 if victim == "rank" else 12
        deadline = time.time() + 90
        while not (tmp_path / "cut" / f"step_{done:06d}").exists() and time.time() < deadline:
            time.sleep(0.02)
        family = descendants(launcher.pid)
        assert len(family) >= 2, "a rank and a loader worker"
        os.kill(family[0] if victim == "rank" else launcher.pid, signal.SIGKILL)
        launcher.wait(timeout=60)
        deadline = time.time() + 6
        while any(alive(pid) for pid in family) and time.time() < deadline:
            time.sleep(0.1)
        assert not any(alive(pid) for pid in family), f"a process outlived its killed {victim}"
    assert newest_checkpoint(tmp_path / "cut").name < "step_000060", "an orphan has two seconds to notice: it must not be done by then"
    go(*args, "--out", tmp_path / "cut")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    steps = lambda name: [(r["step"], r["loss"], r["kl"], r["ccl"]) for r in log(tmp_path / name)]
    assert steps("cut") == steps("whole")


def test_a_run_that_its_loader_refuses_ends(toy, tmp_path):
    """It hung once: the error's traceback held the workers, which wait for their parent's word."""
    rows = [json.loads(line) for line in (toy / "toy/pairs.jsonl").read_text().splitlines()]
    for row in rows:
        row["exo"] = [{"video": "gone.mp4"}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, said = run("train.py", "--stage", 1, "--data", tmp_path / "long.jsonl", "--root", toy / "toy", "--base", toy / "stage0", "--init",
                        toy / "stage0", "--out", tmp_path / "out", "--steps", 90, "--batch", 8, "--no-eval", check=False, timeout=60)
    assert code == 2 and "ten samples, one after another, cannot be read" in said and "Traceback" not in said
    with pytest.raises(SystemExit):                             # in a notebook: no worker stays, of which a later collection waits ten seconds
        go("--stage", 1, "--data", tmp_path / "long.jsonl", "--root", toy / "toy", "--base", toy / "stage0", "--init", toy / "stage0", "--out",
           tmp_path / "again", "--steps", 90, "--batch", 8, "--no-eval")
    assert not multiprocessing.active_children()


BROKEN = """
import sys, time
sys.path.insert(0, {repo!r})
import data, torch, train
read = data.read_clip
def hang(*args):
    if torch.utils.data.get_worker_info():
        time.sleep(600)
    return read(*args)
def bug(*_):
    raise TypeError("the bug of a fork")
if {hangs}:
    data.read_clip = hang
else:
    train.Objective.vtg = bug
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("hangs, code, words", [(True, 2, "a loader worker died, or was silent for --timeout 3 seconds"), (False, 1, "the bug of a fork")])
def test_a_run_ends_whatever_its_workers_do(toy, tmp_path, hangs, code, words):
    """multiprocessing waits at exit for its children, and these ignore its SIGTERM: a bug in a loss was a hang."""
    ended, _, said = run("-c", BROKEN.format(repo=str(REPO), hangs=hangs), *flags(toy, 1), "--out", tmp_path / "out", "--steps", 90,
                         "--timeout", 3, "--no-eval", check=False, timeout=60)
    assert ended == code and words in said and said.count("Traceback") == 1 - hangs, said


RESTARTS = """
import os, signal, time
import torch.distributed as dist
import train
train.join_ranks("gloo", 60)
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], dist.get_rank()
print(f"rank {rank} met the other in attempt {attempt};\\n", end="", flush=True)
dist.barrier()
if attempt != "4":
    os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)
"""


def test_restarted_ranks_find_each_other_and_not_the_dead(tmp_path):
    """With the store's names as torchrun leaves them, one restart in two fails or hangs for five minutes."""
    (tmp_path / "ranks.py").write_text(RESTARTS)
    _, said, _ = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--max-restarts", 4,
                     tmp_path / "ranks.py", env={"PYTHONPATH": str(REPO)}, timeout=200)
    assert sorted(said.split("\n"))[1:] == [f"rank {rank} met the other in attempt {n};" for rank in (0, 1) for n in range(5)]


def test_every_flag_says_what_it_does():
    for config in (train.TrainConfig, data.World, data.Build):
        parser = argparse.ArgumentParser()
        data.add_flags(parser, config)
        silent = [action.dest for action in parser._actions if not (action.help or "").split("(")[0].strip(" %")]
        assert not silent and parser.format_help(), f"no comment on the line of {silent}"


def test_a_missing_stage_is_named_before_anything_is_made(tmp_path):
    code, _, said = run("train.py", "--stage", 3, "--data", tmp_path / "toy", "--out", tmp_path / "stage3", check=False)
    assert code == 2 and said == f"train.py: --init {tmp_path / 'stage2'}: no checkpoint there; python train.py --stage 2 --out {tmp_path / 'stage2'}\n"
    assert not (tmp_path / "toy").exists()


def test_stage_0_is_made_under_its_own_lock(tmp_path, monkeypatch):
    """So that a train.py --stage 0 beside it is refused."""
    second = []

    def busy(cfg):
        code = f"import data\nwith data.file_lock({cfg.out + '/.lock'!r}, wait=False): pass"
        second.append(run("-c", code, check=False)[2])
    monkeypatch.setattr(train, "train", busy)
    train.make_missing_stage_0(train.parse(["--stage", "1", "--out", str(tmp_path / "stage1")]))
    assert f"is in use by process {os.getpid()}" in second[0]


def test_ranks_that_start_from_nothing_make_one_world(tmp_path):
    run(REPO / "data.py", "toy", "corpus", "ego", "--out", tmp_path / "toy", "--corpus", 60, "--ego", 30)
    (tmp_path / "toy/tokenizer.model").unlink()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 4, REPO / "train.py", "--stage", 0,
               "--data", tmp_path / "toy", "--out", tmp_path / "stage0", "--steps", 1, "--batch", 8, "--no-eval"]
    run(*command, timeout=120)
    assert newest_checkpoint(tmp_path / "stage0").name == "step_000004"


def stage_2(toy, *more):
    """What a run of stage 2 starts with."""
    cfg = train.parse([*map(str, flags(toy, 2)), *more])
    run_ = train.Run(cfg, 0, 1, torch.device("cpu"), False)
    return cfg, run_, train.stages_of(cfg)[0], *train.initial_model(run_)


def test_the_best_constant_that_a_cycle_must_beat(toy, tmp_path):
    """The median of each patch and channel is L1's best constant: the CCL of mappings that give it is what the log has once."""
    cfg, run_, phase, model, tokenizer = stage_2(toy, "--micro-batch", "8")
    loader = train.training_loader(run_, phase, model, tokenizer)
    objective = train.Objective(model, tokenizer, phase, cfg, 1)
    batch = loader.micro_batch(range(loader.samples))
    with torch.no_grad():
        x, y = (torch.nn.functional.layer_norm(model.patch_features(vit, clips), (96,))
                for vit, clips in ((model.ego_vit, batch.ego[batch.ego_of]), (model.exo_vit, batch.exo)))
        def ccl(statistic):
            return sum(float((z - statistic(z.flatten(0, 1))).abs().mean()) for z in (x, y))
        plain, found = ccl(lambda z: z.median(0).values), train.constant_ccl(objective, loader, samples=10 ** 6)
        assert found == pytest.approx(plain, rel=0.02) and found < min(ccl(lambda z: z.mean(0)), ccl(lambda z: 0))
        # Only the direction of features counts: mean and spread are LayerNorm-ed away.
        assert objective.distance(x, 3 * x + 1).max() < 1e-5 and objective.distance(x, x.flip(-1)).min() > 0.1
    go(*flags(toy, 2), "--out", tmp_path / "o", "--steps", 2, "--no-eval")
    assert ["ccl_constant" in row for row in log(tmp_path / "o")] == [True, False]


def test_a_loss_of_a_fork_needs_a_weight_and_a_term_of_every_sample(toy, monkeypatch):
    cfg, run_, phase, model, tokenizer = stage_2(toy, "--batch", "4")
    batch = train.training_loader(run_, phase, model, tokenizer).batch(0)[0]
    for losses, terms, sentence in (
            (dict(vtg=1, mine=1), {"vtg": torch.zeros(4)}, "the loss 'mine' has no term from views()"),
            (dict(vtg=1), {"vtg": torch.zeros(4), "mine": torch.zeros(4)}, "the loss 'mine' has no weight in the stage table"),
            (dict(vtg=1, mine=1), {"vtg": torch.zeros(4), "mine": torch.zeros(())}, "the loss 'mine' has shape ()")):
        objective = train.Objective(model, tokenizer, phase, cfg, 1)
        objective.stage = replace(phase, losses=losses)
        monkeypatch.setattr(objective, "views", lambda batch, terms=terms: terms)
        with pytest.raises(data.DataError, match=re.escape(sentence)):
            objective(batch, 4, 4)


def test_a_loss_of_a_fork_goes_with_the_mapping(monkeypatch):
    """README's way to another loss: a weight in the table, a term in views; --no-mapping must still run."""
    row, = train.TOY[2]
    monkeypatch.setitem(train.TOY, 2, (replace(row, losses=row.losses | {"mine": 1}),))
    stage, = train.stages_of(train.parse(["--stage", "2", "--no-mapping"]))
    assert stage.losses == {"vtg": 1} and set(stage.trains) == {"ego_vit", "ego_connector"}


def test_a_connector_that_gives_other_tokens_is_said_with_both_numbers(toy):
    _, run_, phase, model, tokenizer = stage_2(toy, "--batch", "4")
    batch = train.training_loader(run_, phase, model, tokenizer).batch(0)[0]
    visual = torch.zeros(len(batch.lens), 7, model.cfg.width)
    slots = int((batch.ids == VIDEO).sum())
    with pytest.raises(ValueError, match=f"{7 * len(batch.lens)} visual tokens for {slots} places in the text"):
        model.insert_visual_tokens(visual, batch.ids)


def test_more_steps_go_on_and_nothing_else_may_change(toy, tmp_path, capsys, monkeypatch):
    out = ["--out", tmp_path / "run", "--no-eval"]
    go(*flags(toy, 1), *out, "--steps", 4)
    first = log(tmp_path / "run")
    capsys.readouterr()
    go(*flags(toy, 1), *out, "--steps", 7)
    said = capsys.readouterr().out
    assert "step_000004 goes on from step 4; with 7 steps instead of 4: at step 4 the rate jumps from 0.050 to " in said
    rows = log(tmp_path / "run")
    assert rows[:4] == first and [row["step"] for row in rows] == list(range(1, 8)) and rows[-1]["steps"] == 7
    stage, = train.TOY[1]
    assert rows[4]["lr"] == pytest.approx(train.schedule(4, 7, stage) * 3e-3)
    for change, words in ((["--steps", 5], "--steps may only grow"), (["--steps", 9, "--seed", 1], "seed=0, this one has 1"),
                          (["--steps", 9, "--batch", 16], "batch=32, this one has 16")):
        with pytest.raises(SystemExit):
            go(*flags(toy, 1), *out, *change)
        assert words in capsys.readouterr().err
    # A recipe edited in the stage table is another run, too.
    monkeypatch.setitem(train.TOY, 1, (replace(stage, losses={"vtg": 2}),))
    with pytest.raises(SystemExit):
        go(*flags(toy, 1), *out, "--steps", 7)
    assert "demonstrator self-preparation: losses={'vtg': 1}, this one has {'vtg': 2}: choose another --out" in capsys.readouterr().err


def test_stage_3_goes_on_from_a_finished_stage_3(toy, tmp_path):
    go(*flags(toy, 3), "--init", toy / "stage3", "--out", tmp_path / "more", "--steps", 2, "--no-eval", "--seed", 5)
    state = read_state(newest_checkpoint(tmp_path / "more"))
    assert state["stage"] == 3 and state["init_stage"] == 3 and read_state(newest_checkpoint(toy / "stage3"))["init_stage"] == 2
    before, after = all_tensors(newest_checkpoint(toy / "stage3")), all_tensors(newest_checkpoint(tmp_path / "more"))
    assert before.keys() == after.keys()
    assert {train.part_of(n) for n in after if not torch.equal(before[n], after[n])} == {"ego_vit", "F", "lora"}
    model, _ = load_checkpoint(tmp_path / "more", toy / "stage0")
    assert model.cfg.lora


def test_validation_loss_on_ones_own_data(toy, tmp_path, capsys):
    """It changes nothing of the run; a set smaller than a batch is whole."""
    data_ = ["--data", toy / "toy/pairs.jsonl", "--val-data", toy / "toy/val.jsonl"]
    args = [*flags(toy, 1), "--steps", 6, "--no-eval"]
    go(*args, *data_, "--val-every", 2, "--out", tmp_path / "v")
    rows = [row for row in log(tmp_path / "v") if "val_loss" in row]
    said = capsys.readouterr().out
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert f"step {row['step']} | val_loss {row['val_loss']:.4f}\n" in said
    go(*args, "--data", toy / "toy/pairs.jsonl", "--out", tmp_path / "plain")
    assert same(weights(tmp_path / "v"), weights(tmp_path / "plain"))
    # The plain computation, of all of its rows.
    run_, phase, model, tokenizer, objective = one_objective(toy, tmp_path / "v")
    loader = data.Loader(data.read_manifest(toy / "toy/val.jsonl"), model.cfg, tokenizer, view="exo", batch=1, train=False)
    total = tokens = 0
    with torch.no_grad():
        for i in range(loader.samples):
            batch, = loader.batch(i)
            total += float(objective(batch, 1, 1)["vtg"])
            tokens += float(batch.weights.sum())
    assert rows[-1]["val_loss"] == pytest.approx(total / tokens, rel=1e-5)


def one_objective(toy, out):
    """The finished stage 1 in `out`, as an objective that is not trained."""
    cfg = train.parse([str(a) for a in [*flags(toy, 1), "--out", out]])
    run_ = train.Run(cfg, 0, 1, torch.device("cpu"), False)
    model, _ = load_checkpoint(out, toy / "stage0")
    tokenizer = data.Tokenizer(newest_checkpoint(out))
    phase, = train.stages_of(cfg)
    return run_, phase, model, tokenizer, train.Objective(model, tokenizer, phase, cfg, 1).eval()


def test_a_skip_list_that_appears_between_runs_is_said_and_folders_may_move(toy, tmp_path):
    rows = [json.loads(line) for line in (toy / "toy/pairs.jsonl").read_text().splitlines()]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(toy / "stage0", tmp_path / "a/stage0")
    args = ["--stage", 1, "--data", tmp_path / "m.jsonl", "--root", toy / "toy", "--batch", 4, "--steps", 2]
    go(*args, "--out", tmp_path / "a/stage1")
    shutil.move(tmp_path / "a", tmp_path / "b")
    code, out, _ = run(REPO / "train.py", *args, "--out", tmp_path / "b/stage1")
    assert "is finished" in out
    (tmp_path / "m.bad.jsonl").write_text("")                   # a check that found nothing
    code, out, _ = run(REPO / "train.py", *args, "--out", tmp_path / "b/stage1")
    assert "is finished" in out
    (tmp_path / "m.bad.jsonl").write_text(json.dumps({"id": rows[0]["id"], "videos": [rows[0]["exo"][0]["video"]]}) + "\n")
    code, out, _ = run(REPO / "train.py", *args, "--out", tmp_path / "b/stage1", "--steps", 3)
    assert "goes on from step 2; with another list of rows to skip" in out and [row["step"] for row in log(tmp_path / "b/stage1")] == [1, 2, 3]


def test_a_skip_list_shortens_no_run_that_has_begun(toy, tmp_path, capsys):
    """Where epochs say how long a run is, a list of bad rows takes steps away: a run that ended with "data.py check" goes on to its former length."""
    rows = [json.loads(line) for line in (toy / "toy/pairs.jsonl").read_text().splitlines()][:12]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = sum(len(row["exo"]) for row in rows)
    args = ["--stage", 1, "--data", tmp_path / "m.jsonl", "--root", toy / "toy", "--base", toy / "stage0", "--batch", 4, "--no-eval"]
    go(*args, "--epochs", 1, "--out", tmp_path / "o")
    assert len(log(tmp_path / "o")) == samples // 4
    (tmp_path / "m.bad.jsonl").write_text("".join(json.dumps({"id": row["id"], "videos": [row["exo"][0]["video"]]}) + "\n" for row in rows[:2]))
    go(*args, "--epochs", 1, "--out", tmp_path / "o")
    assert "is finished: nothing to train; with another list of rows to skip" in capsys.readouterr().out
    # The list comes within a run: it goes on, is saved with the list, and goes on again.
    (tmp_path / "m.bad.jsonl").rename(tmp_path / "list")
    go(*args, "--epochs", 1, "--out", tmp_path / "twice", "--save-every", 1, "--keep", 99)
    (tmp_path / "list").rename(tmp_path / "m.bad.jsonl")
    for step in (2, 4):
        for folder in (tmp_path / "twice").glob("step_*"):
            if folder.name > f"step_{step:06d}":
                shutil.rmtree(folder)
        go(*args, "--epochs", 1, "--out", tmp_path / "twice", "--save-every", 1, "--keep", 99)
        assert len(log(tmp_path / "twice")) == samples // 4
    (tmp_path / "m.bad.jsonl").rename(tmp_path / "list")
    capsys.readouterr()
    go(*args, "--epochs", 1, "--out", tmp_path / "twice", "--save-every", 1, "--keep", 99)
    assert "nothing to train; with another list of rows to skip" in capsys.readouterr().out
    (tmp_path / "list").rename(tmp_path / "m.bad.jsonl")
    # Other epochs are another length, as ever.
    go(*args, "--epochs", 2, "--out", tmp_path / "o")
    assert len(log(tmp_path / "o")) == 2 * (samples - 2) // 4        # two clips are bad


def test_a_run_is_of_one_world(toy, tmp_path, capsys):
    """Other knobs of the micro-world change pictures, and no row of a manifest."""
    world = json.loads((toy / "toy/world.json").read_text())
    shutil.copytree(toy / "toy", tmp_path / "toy")
    (tmp_path / "toy/world.json").write_text(json.dumps(world | {"noise": 0.123}))
    args = [*flags(toy, 1), "--out", tmp_path / "o", "--steps", 1, "--no-eval"]
    go(*args)
    with pytest.raises(SystemExit):
        go(*args, "--data", tmp_path / "toy")
    assert "holds a run with manifest=" in capsys.readouterr().err


def test_what_a_shorter_run_has_shown_is_no_result_of_a_longer_one(toy, tmp_path, monkeypatch):
    """It is killed while it is scored: the next call scores it, and takes no older figures for its own."""
    go(*flags(toy, 1), "--out", tmp_path / "o", "--steps", 1)
    assert (tmp_path / "o/eval.json").is_file()

    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "toy_benchmark", killed)
        go(*flags(toy, 1), "--out", tmp_path / "o", "--steps", 9)
    assert not (tmp_path / "o/eval.json").exists()
    go(*flags(toy, 1), "--out", tmp_path / "o", "--steps", 9)
    assert (tmp_path / "o/eval.json").is_file()


def test_a_signal_in_the_last_step_is_heeded(toy, tmp_path, monkeypatch):
    save = train.Keeper.save

    def save_and_signal(keeper):
        save(keeper)
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(train.Keeper, "save", save_and_signal)
    with pytest.raises(SystemExit, match="stopped at step 1, saved"):
        go(*flags(toy, 1), "--out", tmp_path / "o", "--steps", 1)
    assert not (tmp_path / "o/eval.json").exists() and log(tmp_path / "o")[-1]["step"] == 1


def test_moments_are_numbered_by_part_and_not_by_rate():
    """A changed rate in the stage table moves no moment to another parameter."""
    model = Exo2Ego(replace(PRESETS["toy"], mapping="resnet"))
    trained = {name: p for name, p in model.named_parameters() if train.part_of(name) in ("ego_vit", "F", "G")}
    orders = []
    for rates in (dict(ego_vit=1e-3, F=1e-3, G=1e-2), dict(ego_vit=1e-3, F=1e-2, G=1e-3)):
        made = train.make_optimizers(trained, {name: rates[train.part_of(name)] for name in trained}, replace(CFG, optimizer="muon"))
        orders.append([id(p) for optimizer in made for group in optimizer.param_groups for p in group["params"]])
        assert all(group["lr"] == rates[part] for optimizer in made for part, group in zip(("ego_vit", "F", "G"), optimizer.param_groups))
    assert orders[0] == orders[1]


def test_a_result_of_a_half_precision_base_is_shown_in_float32(toy, tmp_path, monkeypatch):
    cfg, run_, phase, model, tokenizer = stage_2(toy, "--out", str(tmp_path))
    dtypes = []
    monkeypatch.setattr(train, "load_checkpoint", lambda *_: (model.bfloat16(), {}))
    monkeypatch.setattr(train, "toy_benchmark", lambda shown, *_: dtypes.append({p.dtype for p in shown.parameters()}))
    train.show_result(run_, model, tokenizer, [], was_finished=True)
    assert dtypes == [{torch.float32}]


def test_stage_0_is_made_by_one_process_for_any_number_of_ranks(tmp_path, monkeypatch):
    made = []
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(train, "train", made.append)
    train.make_missing_stage_0(train.parse(["--stage", "1", "--batch", "48", "--seed", "3", "--data", "d", "--out", str(tmp_path / "stage1")]))
    assert made[0].stage == 0 and os.environ["WORLD_SIZE"] == "3" and (made[0].seed, made[0].data) == (3, ["d"])


def test_a_bug_is_named_with_its_place(tmp_path):
    with pytest.raises(ValueError) as bug:
        first, second = "one",
    assert re.search(r"not enough values to unpack .* \(test_train.py:\d+\)$", train.explain(bug.value, CFG, 1))
    with pytest.raises(OSError) as denied:
        open(tmp_path)
    assert f"{tmp_path} cannot be written or read" in train.explain(denied.value, CFG, 1)


def test_all_ranks_wait_for_a_save_before_one_ends(monkeypatch):
    """torchrun ends all ranks 30 seconds after the first has ended: too soon for a save of 20 GB."""
    order = []
    monkeypatch.setattr(train, "save_checkpoint", lambda *_, **__: order.append("saved"))
    monkeypatch.setattr(train.dist, "barrier", lambda: order.append("met"))
    keeper = train.Keeper(train.Run(CFG, 0, 2, torch.device("cpu"), False), None, None, None, train.Log(None, 0), 0)
    keeper.end_update(1)
    with pytest.raises(SystemExit):
        keeper.leave_if(SystemExit("stopped"))
    assert order == ["saved", "met"]


def test_a_signal_ends_a_validation(toy, monkeypatch):
    """torchrun kills 30 seconds after a signal; a validation at 7b takes minutes."""
    cfg, run_, phase, model, tokenizer = stage_2(toy, "--val-every", "1")
    objective = train.Objective(model, tokenizer, phase, cfg, 1)
    loader = train.validation_loader(run_, objective)
    assert loader.view == "ego", "its text loss needs no exo clips"
    read = []
    monkeypatch.setattr(train.Objective, "text_sum", lambda self, batch: read.append(batch) or torch.ones(2))
    train.validate(run_, objective, loader, 1, train.Log(None, 0))
    assert read
    run_.stop = 1.0
    train.validate(run_, objective, loader, 1, train.Log(None, 0))
    assert len(read) == math.ceil(loader.samples / loader.batch_size)


def test_a_validation_loss_that_is_no_number_ends_nothing(tmp_path):
    log = train.Log(tmp_path / "log.jsonl", 0)
    log.write(dict(step=1, val_loss=math.nan))
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "val_loss": None}


def test_a_validation_reads_rows_from_all_of_its_file(toy, monkeypatch):
    """Of a large file only the first takes counted."""
    cfg = train.parse([str(arg) for arg in (*flags(toy, 3), "--out", "o", "--val-every", 1, "--batch", 1)])
    read = []
    monkeypatch.setattr(train, "make_loader", lambda *_, rows, **__: read.extend(row["id"] for row in rows))
    objective = argparse.Namespace(stage=train.stages_of(cfg)[0], model=None, tokenizer=None)
    train.validation_loader(train.Run(cfg, 0, 1, torch.device("cpu"), False), objective)
    every = [json.loads(line)["id"] for line in (toy / "toy/val.jsonl").read_text().splitlines()]
    assert len(every) // 8 // 2 < len(read) <= 8 < len(every) and read == every[::-(-len(every) // 8)]


def test_cameras_of_a_moment_are_no_negatives(toy, tmp_path, capsys):
    """A micro batch of two was two cameras of one moment: InfoNCE was zero, and so was its gradient."""
    with pytest.raises(SystemExit):
        go(*flags(toy, 2), "--out", tmp_path / "o", "--contrastive", 0.1, "--micro-batch", 2, "--steps", 1, "--no-eval")
    assert "may be the 2 cameras of one moment: a --micro-batch of more than 2 is needed" in capsys.readouterr().err


def test_skips_are_counted_against_their_own_stage(toy, tmp_path):
    """Of tries, each of which either shows a sample or fails: 8 failures beside 120 samples are 8 of 128 tries."""
    made, cfg = train.Log(None, 0), replace(CFG, max_bad=0.01)
    keeper = train.Keeper(train.Run(cfg, 0, 1, torch.device("cpu"), False), None, None, None, made, 0)
    failed = train.StepCounts(skipped=4)

    def begin(first):
        list(made.timed(iter([]), first))
    begin(0)
    assert keeper.reason_to_leave(failed, [], 1000) is None
    begin(0)                                                    # the next stage
    assert keeper.reason_to_leave(failed, [], 100) is None
    begin(3)                                                    # resumed inside it
    assert "8 of 128 tries to read a sample failed" in str(keeper.reason_to_leave(failed, [], 120))


@pytest.mark.parametrize("at", (1, 9, 10))                  # within "language", before and within "init ego"
def test_stage_0_resumes_across_its_phases(toy, tmp_path, at):
    args = ["--stage", 0, "--data", toy / "toy", "--steps", 3, "--batch", 8, "--no-eval", "--save-every", 1, "--keep", 99]
    go(*args, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in (tmp_path / "cut").glob("step_*"):
        if folder.name > f"step_{at:06d}":
            shutil.rmtree(folder)
    go(*args, "--out", tmp_path / "cut")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def descendants(pid):
    children = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split("\n")
    pairs = [tuple(map(int, line.split())) for line in children if line.strip()]
    found = [pid]
    for parent in found:
        found += [p for p, q in pairs if q == parent]
    return found[1:]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def agree(plain, other):
    """Two runs with --save-every 1 computed the same in another order: losses, norms, gradients, and where they led."""
    rows = [[row for row in log(folder) if "loss" in row] for folder in (plain, other)]
    for a, b in zip(*rows, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-5 * abs(a["loss"]) and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-3
    # AdamW's first moment, after one step a tenth of the gradient. Off by 1e-3 of the largest of its tensor (a relu or an L1
    # whose argument is rounding may turn over) or a millionth of the largest of all, for the key's bias, whose gradient is zero.
    a, b = (load_file(folder / "step_000001/optim.safetensors") for folder in (plain, other))
    moments = [name for name in a if name.endswith("exp_avg")]
    assert moments == [name for name in b if name.endswith("exp_avg")]
    largest = max(a[name].abs().max() for name in moments)
    for name in moments:
        assert (a[name] - b[name]).abs().max() <= 1e-3 * a[name].abs().max() + 1e-6 * largest, name
    # AdamW moves a weight by up to its rate whatever the size of its gradient: where that is zero but for rounding (behind a
    # dead relu), weights may part. One in a thousand may be off by more than a twentieth of a step of 1e-4; none was, where
    # at 1e-3 they parted within four steps with AVX2.
    a, b = weights(plain), weights(other)
    assert a.keys() == b.keys()
    off = sum(int(((a[name] - b[name]).abs() > 5e-6).sum()) for name in a)
    assert off <= 1e-3 * sum(t.numel() for t in a.values()), off


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_accumulation_and_ranks_equal_one_batch(toy, tmp_path, stage):
    """1 x 8 == 4 x 2 == 2 ranks x 4, in float32, over four steps."""
    args = [*flags(toy, stage), "--steps", 4, "--batch", 8, "--no-eval", "--optimizer", "adamw", "--lr", 1e-4,
            "--save-every", 1, "--keep", 9]
    run(REPO / "train.py", *args, "--out", tmp_path / "plain")
    run(REPO / "train.py", *args, "--out", tmp_path / "micro", "--micro-batch", 2)
    run(*(TORCHRUN if stage == 1 else RANKS), REPO / "train.py", *args, "--out", tmp_path / "ranks")
    agree(tmp_path / "plain", tmp_path / "micro")
    agree(tmp_path / "plain", tmp_path / "ranks")
    if stage == 2:
        # A micro batch of one parts the cameras of a moment.
        run(REPO / "train.py", *args, "--out", tmp_path / "one", "--micro-batch", 1)
        agree(tmp_path / "plain", tmp_path / "one")


def test_overfit_reaches_nothing(toy, tmp_path, monkeypatch):
    """Stage 0 on one batch: a decoder that reads four narrations, then an encoder that shows it the four clips."""
    rows = [row for row in train.TOY[0] if row.name in ("language", "init exo")]
    monkeypatch.setitem(train.TOY, 0, tuple(rows))
    go(*flags(toy, 0), "--out", tmp_path / "o", "--overfit", "--batch", 4, "--steps", 240, "--no-eval")
    language, shown = log(tmp_path / "o")[239::240]
    assert language["vtg"] < 0.3 and shown["vtg"] < 0.05        # the evidence of the first is random


@pytest.mark.parametrize("change, present, absent", [
    (["--no-kl"], {"ccl"}, {"kl"}), (["--no-cycle"], {"kl"}, {"ccl"}), (["--forward-cycle-only"], {"kl", "ccl"}, set()),
    (["--no-mapping"], {"vtg"}, {"kl", "ccl"}), (["--mapping", "mlp"], {"kl", "ccl"}, set()),
    (["--contrastive", "0.5"], {"contrastive"}, set()), (["--shuffle-pairs"], {"kl"}, set()),
    (["--kl-weight", "1", "--ccl-weight", "0.2"], {"kl"}, set())])
def test_every_ablation_runs_and_does_what_it_says(toy, tmp_path, change, present, absent):
    go(*flags(toy, 2), *change, "--out", tmp_path / "a", "--steps", 2, "--batch", 8, "--no-eval")
    row = log(tmp_path / "a")[-1]
    assert present <= row.keys() and not absent & row.keys()
    weight = dict(vtg=1, kl=5, ccl=3, contrastive=0.5) | (dict(kl=1, ccl=0.2) if "--kl-weight" in change else {})
    assert row["loss"] == pytest.approx(sum(weight[name] * row[name] for name in weight if name in row), rel=1e-5)
    assert any(re.match(r"F\..*\.fc1\.", name) for name in weights(tmp_path / "a")) == ("mlp" in change)
    parts = {train.part_of(n) for n in weights(tmp_path / "a")}
    assert ("F" in parts) == (change[0] != "--no-mapping")
    assert load_checkpoint(tmp_path / "a", base=toy / "stage0")[1]["stage"] == 2        # whole, with an idle G too


def test_a_cycle_that_goes_forward_alone_is_a_part_of_both(toy):
    objective, batch = ready_objective(toy, 2)
    model = objective.model
    with torch.no_grad():
        seen = model(batch.ego, batch.exo)
        both = objective.cycle(seen.x, seen.y, batch.ego_of)
        objective.cfg = replace(objective.cfg, forward_cycle_only=True)
        forward = objective.cycle(seen.x, seen.y, batch.ego_of)
        assert torch.allclose(forward, objective.distance(model.G(model.F(seen.x)), seen.x)[batch.ego_of])
        assert torch.allclose(both - forward, objective.distance(model.F(model.G(seen.y)), seen.y), atol=1e-5)


def test_shuffled_pairs_reach_the_loader(toy):
    plain, wrong = (train.training_loader(run_, phase, model, tokenizer).rows
                    for _, run_, phase, model, tokenizer in (stage_2(toy), stage_2(toy, "--shuffle-pairs")))
    assert len(plain) == len(wrong) and all(a["id"] == b["id"] and a["exo"] != b["exo"] for a, b in zip(plain, wrong))


def test_the_recipe_is_the_papers():
    """What stands in the ledger: batches, epochs, warm-up, rates; the losses' weights, ours; AdamW's betas at 7b."""
    for table in (train.PAPER, train.TOY):
        assert table[2][0].losses == dict(vtg=1, kl=5, ccl=3)
    rows = [train.PAPER[stage][0] for stage in range(4)]
    assert [(row.batch, row.epochs, row.warmup) for row in rows] == [(512, 5, 0.1), (256, 2, 0.03), (256, 2, 0.03), (64, 1, 0.03)]
    assert [set(row.trains.values()) for row in rows] == [{1e-3}, {1e-4}, {1e-4}, {2e-5}]
    trained = {"model.ego_vit.x": torch.nn.Parameter(torch.zeros(2))}
    adamw, = train.make_optimizers(trained, dict.fromkeys(trained, 1.0), replace(CFG, preset="7b", optimizer="adamw"))
    assert adamw.defaults["betas"] == (0.9, 0.999) and adamw.defaults["weight_decay"] == 0


def test_another_view_of_the_moment_is_no_negative():
    """Of moments 0, 0 and 1 each row has its own y and that of the other moment to tell apart."""
    y, fx = torch.randn(2, 3, 1, 2, 2, 8, generator=torch.Generator().manual_seed(0))
    found = train.Objective.contrastive(None, y, fx, torch.tensor([0, 0, 1]))
    similar = torch.nn.functional.cosine_similarity(fx.mean((1, 2, 3))[:, None], y.mean((1, 2, 3))[None], dim=-1) / 0.07
    want = [similar[i, rivals].logsumexp(0) - similar[i, i] for i, rivals in enumerate(([0, 2], [1, 2], [0, 1, 2]))]
    assert torch.allclose(found, torch.stack(want), atol=1e-5)


def test_stage_3_without_lora(toy, tmp_path):
    go(*flags(toy, 3), "--no-lora", "--out", tmp_path / "a", "--steps", 2, "--no-eval")
    assert not any("lora" in n for n in weights(tmp_path / "a"))
    assert not load_checkpoint(tmp_path / "a")[0].cfg.lora


def test_shuffled_pairs_are_a_derangement():
    rows = [{"id": str(i), "exo": i} for i in range(50)]
    shuffled = train.shuffle_pairs(rows, 0)
    assert sorted(r["exo"] for r in shuffled) == list(range(50))
    assert all(a["exo"] != b["exo"] for a, b in zip(rows, shuffled)) and shuffled == train.shuffle_pairs(rows, 0)


def test_rows_without_text_take_part_through_kl_and_ccl(toy, tmp_path):
    rows = [json.loads(line) for line in (toy / "toy" / "pairs.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        del row["text"]
    path = toy / "toy" / "half.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, micro in (("a", 8), ("b", 2)):                    # with micro batches of 2 some have no text at all
        go(*flags(toy, 2), "--data", path, "--out", tmp_path / name, "--steps", 3, "--batch", 8, "--micro-batch", micro,
           "--optimizer", "adamw", "--lr", 1e-4, "--no-eval", "--save-every", 1, "--keep", 9)
    agree(tmp_path / "a", tmp_path / "b")


def test_log_and_validation(toy, tmp_path, capsys):
    go(*flags(toy, 1), "--out", tmp_path / "v", "--steps", 4, "--val-every", 2, "--no-eval")
    assert f"starts from {newest_checkpoint(toy / 'stage0')}, untouched weights" in capsys.readouterr().out
    rows = log(tmp_path / "v")
    want = {"step", "steps", "loss", "vtg", "lr", "grad_norm", "seconds", "clips_per_second", "tokens_per_second",
            "max_memory_bytes", "skipped", "waited"}
    assert want <= rows[0].keys() and [r["step"] for r in rows if "val_loss" in r] == [2, 4]


def ready_objective(toy, stage):
    """The objective of a stage before its first step, and its first micro batch."""
    cfg = train.parse([str(word) for word in flags(toy, stage, "none")])
    run_ = train.Run(cfg, 0, 1, torch.device("cpu"), False)
    model, tokenizer = train.initial_model(run_)
    phase = train.stages_of(cfg)[0]
    loader = train.training_loader(run_, phase, model, tokenizer)
    objective = train.Objective(model, tokenizer, phase, cfg, 1)
    train.prepare_objective(run_, objective, 0, None)
    return objective, loader.batch(0)[0]


def test_the_flops_of_a_step_are_those_of_torchs_counter(toy, tmp_path, monkeypatch):
    """Stage 3 freezes the connectors, whose grouped filters torch counts wrongly; the formula pads no text: 1 part in 100."""
    objective, batch = ready_objective(toy, 3)
    before = torch.get_rng_state()
    ours = train.count_flops(objective, batch)
    assert torch.equal(before, torch.get_rng_state()), "the run must draw what it drew before"
    assert not any(p.is_meta for p in objective.parameters()) and all(p.grad is None for p in objective.parameters())
    monkeypatch.setenv("EXO2EGO_ATTENTION", "reference")
    with FlopCounterMode(display=False) as counter:
        objective(batch, 1, 1)["loss"].backward()
    assert ours == pytest.approx(counter.get_total_flops() / batch.samples, rel=0.01)


def test_grouped_filters_are_counted_as_what_they_cost():
    """torch's counter takes each group's gradient for a whole convolution's."""
    conv = torch.nn.Conv2d(8, 8, 3, groups=8, padding=1, device="meta")
    x = torch.empty(2, 8, 5, 5, device="meta", requires_grad=True)
    count = {torch.ops.aten.convolution_backward: train.convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=count) as counter:
        conv(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 5 * 5) * conv.weight.numel()


def test_a_loss_that_looks_at_numbers_trains_without_a_count(toy, tmp_path, capsys, monkeypatch):
    """A fork's loss may call item() or choose rows by their values: the twin without numbers cannot follow."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    plain = train.Objective.views

    def looks(self, batch):
        terms = plain(self, batch)
        assert float(terms["vtg"].detach().sum()) > 0
        return terms
    monkeypatch.setattr(train.Objective, "views", looks)
    go(*flags(toy, 1), "--out", tmp_path / "o", "--steps", 2, "--no-eval", "--workers", 0, "--dtype", "float32")
    out = capsys.readouterr().out
    assert "   TFLOP/s are not counted: " in out and " clips/s | ETA" in out
    assert not any("tflops" in row for row in log(tmp_path / "o"))


def test_the_step_line_says_how_fast_and_of_what_peak(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 0.0, 0.5, 2.0])                          # begun; asked for a batch, got it; the step is over
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    made = train.Log(tmp_path / "log.jsonl", 0)
    made.flops, made.peak = 5e11, 40
    next(made.timed(iter(["batch"]), 0))
    made.step(1, 1, train.StepCounts(samples=64, tokens=10), losses={"loss": 1.0}, row={"step": 1})
    assert "| 2.000 s/step, 0.500 of it waiting for data | 32 clips/s | 16 TFLOP/s, 40 % of the peak |" in capsys.readouterr().out
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert row["tflops"] == 16 and row["waited"] == 0.5


def test_a_non_finite_loss_stops_and_names_the_samples(toy, tmp_path):
    shutil.copytree(toy / "stage0", tmp_path / "stage0")
    file = newest_checkpoint(tmp_path / "stage0") / "model.safetensors"
    tensors = load_file(file)
    tensors["exo_vit.pre_norm.weight"][3] = float("nan")
    from safetensors.torch import save_file
    save_file(tensors, file)
    state = json.loads((file.parent / "state.json").read_text())
    (file.parent / "state.json").write_text(json.dumps(state | {"sha256": {}}))         # else the change is seen
    code, _, err = run(REPO / "train.py", "--stage", 1, "--data", toy / "toy", "--init", tmp_path / "stage0", "--base",
                       tmp_path / "stage0", "--out", tmp_path / "n", "--steps", 3, check=False)
    assert code != 0 and "vtg nan, loss nan, gradient norm nan" in err and "pairs/" in err


# What the command line alone tells; and what takes a look at files.
BAD_FLAGS = [
    (["--stage", "5"], "--stage: invalid choice: 5"),
    (["--stage", "1", "--preset", "huge"], "--preset: invalid choice: 'huge'"),
    (["--stage", "1", "--bach", "3"], "--bach"),
    (["--stage", "1", "--st", "3"], "--st"),
    (["--stage", "1", "--data", "{toy}/no.jsonl"], "no.jsonl is not there"),
    (["--stage", "1", "--lr", "0"], "--lr 0.0: a number above 0"),
    (["--stage", "1", "--micro-batch", "-2"], "--micro-batch -2: a number"),
    (["--stage", "3", "--no-mapping"], "--no-mapping is of stage 2"),
    (["--stage", "1", "--kl-weight", "3"], "--kl-weight is of stage 2"),
    (["--stage", "2", "--no-mapping", "--contrastive", "1"], "--contrastive does nothing with --no-mapping"),
    (["--stage", "2", "--no-mapping", "--no-kl"], "--no-kl does nothing with --no-mapping"),
    (["--stage", "2", "--no-kl", "--kl-weight", "7"], "--kl-weight does nothing with --no-kl: give one of them"),
    (["--stage", "1", "--val-data", "{toy}/toy"], "toy: a manifest is a file that ends in .jsonl"),
    (["--stage", "1", "--steps", "10", "--epochs", "1"], "--epochs does nothing with --steps: give one of them"),
    (["--stage", "1", "--val-data", "{toy}/no.jsonl"], "no.jsonl is not there"),
    (["--stage", "1", "--data", "{toy}/toy/world.json"], "a manifest is a file that ends in .jsonl"),
    (["--stage", "2", "--kl-weight", "-5"], "--kl-weight -5.0: a number of 0 or more"),
    (["--stage", "1", "--max-bad", "nan"], "--max-bad nan: a"),
    (["--stage", "1", "--lr", "inf"], "--lr inf: a number above 0"),
    (["--stage", "1", "--no-lora"], "--no-lora is of stage 3"),
    (["--stage", "0", "--data", "{tmp}/rows.jsonl"], "stage 0 of this preset is the micro-world's own"),
    (["--stage", "0", "--init", "{toy}/stage0"], "leave --init and --base out"),
    (["--stage", "0", "--preset", "7b"], "pass --base, a folder with VideoLLaMA2's"),
    (["--stage", "1", "--batch", "5", "--micro-batch", "2"], "--batch 5 is no multiple of 2 (--micro-batch) x 1 ranks"),
    (["--stage", "2", "--contrastive", "1", "--micro-batch", "1"], "InfoNCE compares the samples of a micro batch"),
    (["--stage", "1", "--checkpoint-activations"], "--checkpoint-activations is now --recompute blocks"),
    (["--stage", "1", "--compile", "--no-compile"], "--compile does nothing with --no-compile"),
    (["--stage", "2", "--no-mapping", "--mapping", "mlp"], "--mapping does nothing with --no-mapping"),
    (["--stage", "2", "--kl-temperature", "2"], "unrecognized arguments: --kl-temperature"),
    (["--stage", "0", "--val-every", "2"], "a validation loss needs stage 1"),
    (["--stage", "1", "--data", "{toy}/toy/pairs.jsonl", "--val-every", "2"], "and --val-data x.jsonl or the micro-world"),
    (["--stage", "1", "--fsdp"], "--fsdp needs --optimizer adamw")]
REFUSED = [
    (["--stage", "2", "--init", "{toy}/stage0"], "of stage 0"),
    (["--stage", "1", "--init", "{toy}/nowhere"], "or train it first:  python train.py --stage 0 --out {toy}/nowhere"),
    (["--stage", "2", "--preset", "small", "--init", "{toy}/nowhere"], "python train.py --stage 1 --out {toy}/nowhere --preset small"),
    (["--stage", "2", "--init", "{toy}/nowhere"], "no checkpoint there; python train.py --stage 1 --out {toy}/nowhere"),
    (["--stage", "0", "--preset", "7b", "--base", "{toy}/stage0", "--data", "{toy}/toy/pairs.jsonl"], "ego half of published weights"),
    (["--stage", "1", "--preset", "small"], "other sizes than --preset small"),
    (["--stage", "1", "--base", "{toy}/nowhere"], "nowhere: there are no weights"),
    (["--stage", "1", "--data", "{toy}/tyo"], "tyo is no micro-world"),
    (["--stage", "3", "--init", "{toy}/stage1"], "a finished stage 2 or 3 is needed"),
    (["--stage", "1", "--out", "{toy}/stage1", "--seed", "9"], "seed=0"),
    (["--stage", "2", "--shuffle-pairs", "--data", "{toy}/toy/instruct.jsonl"], 'lacks "exo", which this stage needs'),
    (["--stage", "1", "--out", "{toy}/stage0/step_000012"], "holds weights and is no run folder"),
    (["--stage", "1", "--data", "{tmp}/missing.jsonl", "--steps", "40"], "--max-bad")]


@pytest.mark.parametrize("args, words", BAD_FLAGS)
def test_flags_that_do_not_fit_get_one_sentence(toy, tmp_path, capsys, args, words):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(SystemExit) as ended:
        train.parse([a.format(toy=toy, tmp=tmp_path) for a in args])
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("args, words", REFUSED)
def test_bad_input_gets_one_sentence(toy, tmp_path, capsys, args, words):
    row = {"exo": [{"video": "gone.mp4"}], "text": "t"}
    (tmp_path / "missing.jsonl").write_text("".join(json.dumps(row | {"id": str(i)}) + "\n" for i in range(12)) + "".join(
        (toy / "toy/pairs.jsonl").read_text().replace("pairs/", f"{toy}/toy/pairs/").splitlines(True)))
    args = [a.format(toy=toy, tmp=tmp_path) for a in args]
    stage = int(args[1]) if args[1] in "0123" else 1
    base = [str(f) for f in flags(toy, stage)]
    for name in [a for a in args if a.startswith("--")]:
        if name in base:
            del base[base.index(name):base.index(name) + 2]
    if "--out" not in args:
        base += ["--out", tmp_path / "out"]
    steps = [] if "--steps" in args else ["--steps", 3]
    outside = ["--allow-outside"] if "missing" in str(args) else []
    with pytest.raises(SystemExit) as ended:
        go(*base, *args, *steps, *outside)
    assert ended.value.code == 2 and words.format(toy=toy) in capsys.readouterr().err
    assert newest_checkpoint(tmp_path / "out") is None


def test_more_processes_than_gpus_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit):
        train.main(["--stage", "1"])
    assert "process 3 of this machine finds 2 GPUs" in capsys.readouterr().err


def test_the_base_is_the_one_given_then_the_one_recorded_then_stage0(toy, tmp_path):
    """A run of another folder goes on with the base that it was trained on, whatever out/stage0 holds."""
    def start(stage, *more):
        return train.starting_point(train.parse([str(a) for a in ["--stage", stage, "--out", tmp_path / f"stage{stage}", *more]]))
    shutil.copytree(toy / "stage0", tmp_path / "stage0")
    assert start(1)[:2] == (newest_checkpoint(tmp_path / "stage0"),) * 2
    recorded = start(2, "--init", toy / "stage1")
    assert recorded.base.samefile(newest_checkpoint(toy / "stage0")) and recorded.added == {"mapping": "resnet"}
    shutil.copytree(toy / "stage0", tmp_path / "given")
    assert start(2, "--init", toy / "stage1", "--base", tmp_path / "given").base == newest_checkpoint(tmp_path / "given")
    # The recorded base has gone: stage0 beside --out is looked at.
    shutil.copytree(toy / "stage1", tmp_path / "far/away/stage1")
    assert start(2, "--init", tmp_path / "far/away/stage1").base == newest_checkpoint(tmp_path / "stage0")
    # Init is whole: it is the base of stage 1.
    assert start(1, "--init", toy / "stage0").base == newest_checkpoint(toy / "stage0")


def test_a_base_that_init_does_not_need_is_refused(toy, tmp_path):
    shutil.copytree(toy / "stage0", tmp_path / "other")
    file = newest_checkpoint(tmp_path / "other") / "model.safetensors"
    held = file.read_bytes()
    file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    cfg = train.parse([str(a) for a in [*flags(toy, 1), "--base", tmp_path / "other"]])
    with pytest.raises(data.DataError, match="other does nothing: --init .*stage0 holds all weights itself"):
        train.refuse_an_idle_base(cfg, train.starting_point(cfg))
    shutil.copytree(toy / "stage0", tmp_path / "same")
    cfg = replace(cfg, base=str(tmp_path / "same"))
    start = train.starting_point(cfg)
    train.refuse_an_idle_base(cfg, start)
    assert start.base == newest_checkpoint(toy / "stage0")


def test_an_unfinished_stage_0_is_no_base(toy, tmp_path):
    shutil.copytree(toy / "stage0", tmp_path / "half")
    state = newest_checkpoint(tmp_path / "half") / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"steps": 99}))
    for more in (["--init", toy / "stage1", "--base", tmp_path / "half"], ["--init", tmp_path / "half"]):
        cfg = train.parse([str(a) for a in ["--stage", 2 if "--base" in more else 1, "--out", tmp_path / "x/stage", *more]])
        with pytest.raises(data.DataError, match="at step 12 of 99; a finished stage 0 is needed"):
            train.starting_point(cfg)


def test_a_finished_run_is_scored_though_its_base_has_moved(toy, tmp_path):
    for name in ("stage0", "stage1"):
        shutil.copytree(toy / name, tmp_path / "a" / name)
    shutil.move(tmp_path / "a/stage0", tmp_path / "moved")
    (tmp_path / "a/stage1/eval.json").unlink()
    _, out, _ = run(REPO / "train.py", "--stage", 1, "--data", toy / "toy", "--out", tmp_path / "a/stage1", "--steps", 3,
                    "--base", tmp_path / "moved", "--init", tmp_path / "moved")
    assert "is finished" in out and (tmp_path / "a/stage1/eval.json").is_file()


def test_a_finished_run_says_so_and_a_busy_folder_is_refused(toy):
    code, out, _ = run(REPO / "train.py", *flags(toy, 1), "--steps", 3)
    assert "is finished" in out
    holder = subprocess.Popen([sys.executable, "-c", f"import sys, time; sys.path.insert(0, {str(REPO)!r})\n"
                               f"import data\nwith data.file_lock({str(toy / 'stage1' / '.lock')!r}, wait=False):\n"
                               "    print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip() == "held"
    code, _, err = run(REPO / "train.py", *flags(toy, 1), "--steps", 3, check=False)
    holder.kill()
    assert code == 2 and f"process {holder.pid}" in err


def test_a_half_written_checkpoint_is_never_taken(toy, tmp_path):
    shutil.copytree(toy / "stage1", tmp_path / "s")
    finished = newest_checkpoint(tmp_path / "s")
    half = tmp_path / "s" / "part_step_000009"
    shutil.copytree(finished, half)
    assert newest_checkpoint(tmp_path / "s") == finished


def test_an_error_without_words_is_named_all_the_same():
    assert train.explain(OSError(), replace(CFG, out="out/mine"), 1) == "out/mine cannot be written or read: OSError()"


def test_a_rank_that_does_not_come_is_said_and_a_bug_stays_a_bug(tmp_path):
    late = RuntimeError("Timed out after 3 seconds waiting for clients")
    assert train.explain(late, CFG, 2).startswith("the ranks waited in vain for one another (--timeout); Timed out after 3")
    with pytest.raises(RuntimeError):
        train.explain(RuntimeError("a bug"), CFG, 2)


FAULTS = """
import resource, sys
sys.path.insert(0, {repo!r})
import torch, train
if {kept}:
    train.tune_malloc()
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 24), torch.ones(2 ** 18)                    # 64 MB, 1 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([step() for _ in range(6)][3:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_a_step_freed_is_not_cleared_again():
    """Page faults of a step that allocates what the one before freed: 16,000 of 4 kB, or none."""
    plain, kept = (json.loads(run("-c", FAULTS.format(repo=str(REPO), kept=kept))[1]) for kept in (False, True))
    assert max(kept) * 10 < min(plain)                          # where pages are huge, plain has 33


# ------------------------------------------------------------------------------- what was trained is kept, however a run ends
def saved_steps(folder):
    return [int(path.name[5:]) for path in checkpoints(folder)]


def test_the_plain_command_goes_on_after_kill_9(toy, tmp_path):
    """No flag about saving: a tenth of the run is lost at most, the run says where it goes on, and ends as if nothing had been."""
    args = [str(a) for a in [*flags(toy, 1), "--steps", 30, "--batch", 8, "--no-eval"]]
    go(*args, "--out", tmp_path / "whole")
    victim = subprocess.Popen([sys.executable, REPO / "train.py", *args, "--out", tmp_path / "cut"], stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not ((tmp_path / "cut/log.jsonl").is_file() and len(log(tmp_path / "cut")) >= 8) and time.time() < deadline:
        time.sleep(0.02)
    victim.kill()
    victim.wait()
    done = len(log(tmp_path / "cut"))
    first, = re.findall(r"step_0000(\d\d) goes on from step (?:\d+)", run(REPO / "train.py", *args, "--out", tmp_path / "cut")[1])
    assert done - 3 <= int(first) <= done
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("number, nohup", [(signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGHUP, True), (signal.SIGUSR1, False)])
def test_a_signal_ends_a_run_between_two_steps_and_saves(toy, tmp_path, number, nohup):
    args = [str(a) for a in [*flags(toy, 1), "--steps", 60, "--batch", 8, "--no-eval", "--out", tmp_path / "o", "--save-every", 99]]
    at_first = signal.SIG_IGN if nohup else signal.SIG_DFL      # whoever starts these tests may be under nohup itself
    one = subprocess.Popen([sys.executable, REPO / "train.py", *args], stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGHUP, at_first))
    deadline = time.time() + 120
    while not ((tmp_path / "o/log.jsonl").is_file() and log(tmp_path / "o")) and time.time() < deadline:
        time.sleep(0.02)
    for pid in [one.pid, *descendants(one.pid)]:                # as a terminal or a launcher does: the whole group
        os.kill(pid, number)
    said = one.communicate(timeout=120)[1]
    done = len(log(tmp_path / "o"))
    assert saved_steps(tmp_path / "o") == [done]
    if nohup:
        assert one.returncode == 0 and done == 60
    else:
        assert one.returncode == 1 and f"stopped at step {done}, saved: the same command goes on" in said and done < 60


@pytest.mark.parametrize("failure", ["nan", "bug", "update"])
def test_what_was_trained_before_a_failure_is_saved(toy, tmp_path, monkeypatch, capsys, failure):
    """NaN and a bug in the fourth step: three whole steps are kept, with the random state of the fourth's beginning; a failure
    within an update keeps nothing that is half. After NaN the advice works, and is said."""
    plain, args, calls = train.Objective.vtg, [*flags(toy, 3), "--batch", 8, "--no-eval", "--save-every", 99], []

    def fails(self, visual, batch):
        calls.append(torch.rand(1))                             # as dropout draws
        if len(calls) == 4 and failure == "bug":
            raise KeyError("a bug")
        return plain(self, visual, batch) * (math.nan if len(calls) == 4 and failure == "nan" else 1)
    go(*args, "--steps", 6, "--out", tmp_path / "warm-up")      # (what it draws differs, so it is no reference)
    with monkeypatch.context() as patch:
        patch.setattr(train.Objective, "vtg", lambda self, visual, batch: (torch.rand(1), plain(self, visual, batch))[1])
        go(*args, "--steps", 6, "--out", tmp_path / "whole")
        patch.setattr(train.Objective, "vtg", fails)
        if failure == "update":
            step, counts = train.Muon.step, []
            patch.setattr(train.Muon, "step", lambda self: (counts.append(1), step(self))[1] if len(counts) < 3 else 1 / 0)
        with pytest.raises((SystemExit, KeyError, ZeroDivisionError)):
            go(*args, "--steps", 6, "--out", tmp_path / "o")
        assert saved_steps(tmp_path / "o") == ([] if failure == "update" else [3])
        if failure == "update":
            return
        patch.setattr(train.Objective, "vtg", lambda self, visual, batch: (torch.rand(1), plain(self, visual, batch))[1])
        shutil.copytree(tmp_path / "o", tmp_path / "lower")
        go(*args, "--steps", 6, "--out", tmp_path / "o")
        assert same(weights(tmp_path / "o"), weights(tmp_path / "whole"))
        capsys.readouterr()
        go(*args, "--steps", 6, "--out", tmp_path / "lower", "--lr", 1e-4, "--dtype", "bfloat16")
    said = capsys.readouterr().out
    assert "goes on from step 3; with rates {" in said and "bfloat16 instead of the other dtype" in said
    assert len(log(tmp_path / "lower")) == 6


def test_samples_that_nobody_can_read_end_all_ranks_and_save(toy, tmp_path):
    """The clips of the last rows are gone: one of two ranks finds out, both leave, what was trained is kept."""
    rows = [json.loads(line) for line in (toy / "toy/pairs.jsonl").read_text().splitlines()]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "ranks.py"]
    (tmp_path / "ranks.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
import data, train
plain = data.Loader.batch
def batch(self, step):
    if step == 3 and self.rank == 1 and self.train:
        raise data.DataError("ten samples, one after another, cannot be read, the last: gone.mp4")
    return plain(self, step)
data.Loader.batch = batch
train.main(sys.argv[1:])
""")
    args = [*flags(toy, 1), "--data", tmp_path / "m.jsonl", "--root", toy / "toy", "--out", tmp_path / "o", "--steps", 9, "--batch", 8, "--no-eval",
            "--save-every", 99, "--timeout", 60]
    code, _, said = run(*command, *args, check=False)
    assert code == 1 and "ten samples, one after another, cannot be read" in said and "another rank found nothing to read" in said
    assert saved_steps(tmp_path / "o") == [3] and len(log(tmp_path / "o")) == 3
    # torchrun's own report ends with our sentence.
    assert re.search(r"traceback : train.py: .*(ten samples|another rank)", said)


def test_a_run_is_known_however_it_is_spelt(toy, tmp_path, capsys):
    shutil.copytree(toy / "toy", tmp_path / "toy")
    args = ["--stage", 1, "--base", toy / "stage0", "--init", toy / "stage0", "--out", tmp_path / "o", "--no-eval"]
    go(*args, "--data", tmp_path / "toy", "--steps", 2)
    for more in (["--data", f"{tmp_path}/toy/"], ["--data", f"{tmp_path}/./toy"], ["--data", toy / "toy"], ["--data", toy / "toy", "--batch", 32],
                 ["--data", toy / "toy", "--optimizer", "muon"]):
        capsys.readouterr()
        go(*args, *more, "--steps", 2)
        assert "is finished: nothing to train" in capsys.readouterr().out
    # A checkpoint of a code that lacked a flag, and one that has another value of it.
    state = newest_checkpoint(tmp_path / "o") / "state.json"
    recorded = json.loads(state.read_text())
    del recorded["recipe"]["overfit"]
    state.write_text(json.dumps(recorded))
    go(*args, "--data", toy / "toy", "--steps", 2)
    for more, words in ((["--overfit"], "overfit=False, this one has True"), (["--seed", 3], "seed=0, this one has 3")):
        with pytest.raises(SystemExit):
            go(*args, "--data", toy / "toy", "--steps", 2, *more)
        assert words in capsys.readouterr().err


def test_what_a_user_keeps_in_a_run_folder_is_left_alone(toy, tmp_path):
    args = [*flags(toy, 1), "--out", tmp_path / "o", "--batch", 8, "--no-eval", "--keep", 1]
    go(*args, "--steps", 2)
    own = ["step_000002 copy", "step_000002_best", "step_000002.bak", "step_2", "step_000009.tar"]
    for name in own:
        shutil.copytree(tmp_path / "o/step_000002", tmp_path / "o" / name)
    go(*args, "--steps", 4)
    assert saved_steps(tmp_path / "o") == [4] and all((tmp_path / "o" / name).is_dir() for name in own)
    # Steps order by number, also beyond six digits.
    (tmp_path / "o/step_000004").rename(tmp_path / "o/step_1000000")
    shutil.copytree(tmp_path / "o/step_1000000", tmp_path / "o/step_999999")
    assert newest_checkpoint(tmp_path / "o").name == "step_1000000"


def test_what_is_only_shown_and_what_cannot_be_removed_ends_nothing(toy, tmp_path, monkeypatch, capsys):
    remove = shutil.rmtree
    monkeypatch.setattr(train.shutil, "rmtree", lambda path, *a, **k: remove(path, *a, **k) if a or k else (_ for _ in ()).throw(OSError("busy")))
    plain = train.Log.write

    def full(self, row, text=""):
        if row["step"] == 2 and self.file:
            self.file.close()
            self.file = type("Full", (), {"write": lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")), "name": "log.jsonl"})()
        plain(self, row, text)
    monkeypatch.setattr(train.Log, "write", full)
    go(*flags(toy, 1), "--out", tmp_path / "o", "--batch", 8, "--steps", 4, "--no-eval", "--keep", 1)
    said = capsys.readouterr()
    assert "is not needed any more and cannot be removed: busy" in said.out and saved_steps(tmp_path / "o") == [1, 2, 3, 4]
    assert said.err.count("log.jsonl cannot be written any more ([Errno 28] No space left on device)") == 1
    assert "step 4/4 |" in said.out


def test_a_folder_that_renames_nothing_is_found_before_the_first_step(toy, tmp_path, monkeypatch, capsys):
    def refuses(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(train.os, "rename", refuses)
    with pytest.raises(SystemExit):
        go(*flags(toy, 1), "--out", tmp_path / "o", "--steps", 3, "--no-eval")
    assert "a checkpoint cannot be saved there (Operation not supported): choose another --out" in capsys.readouterr().err
    assert not log(tmp_path / "o") if (tmp_path / "o/log.jsonl").is_file() else True


def test_what_killed_saves_left_is_removed(toy, tmp_path):
    for name in ("part_step_000007", "part_01"):
        (tmp_path / "o" / name).mkdir(parents=True)
    go(*flags(toy, 1), "--out", tmp_path / "o", "--steps", 1, "--no-eval")
    assert [folder.name for folder in (tmp_path / "o").glob("part_*")] == ["part_01"], "and nothing of the user's"


def test_a_disk_without_room_for_one_checkpoint_is_found_before_the_first_step(toy, tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 10 ** 6})
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit):
        go(*flags(toy, 1), "--out", tmp_path / "o", "--steps", 3, "--no-eval")
    assert "has room for 0.0 GB, and a checkpoint takes 0.0 GB: choose another --out" in capsys.readouterr().err
    # What it asks for is enough, and not much more than is needed: a third of it is the moments that Muon does not keep.
    saved = sum(file.stat().st_size for file in newest_checkpoint(toy / "stage1").glob("*.safetensors"))
    assert saved < 12 * (267_072 + 141_648) < 2 * saved


def test_checkpoints_are_as_readable_as_other_files(toy, tmp_path):
    former = os.umask(0o027)
    try:
        go(*flags(toy, 1), "--out", tmp_path / "o", "--steps", 1, "--no-eval")
    finally:
        os.umask(former)
    for file in newest_checkpoint(tmp_path / "o").iterdir():
        assert file.stat().st_mode & 0o777 == 0o640, file


def test_a_tokenizer_that_moves_while_training_is_saved_all_the_same(toy, tmp_path, monkeypatch):
    shutil.copy(toy / "toy/tokenizer.model", tmp_path / "mine.model")
    plain = train.Log.step
    monkeypatch.setattr(train.Log, "step", lambda self, *a, **k: ((tmp_path / "mine.model").unlink(missing_ok=True), plain(self, *a, **k))[1])
    go(*flags(toy, 1), "--out", tmp_path / "o", "--steps", 2, "--no-eval", "--tokenizer", tmp_path / "mine.model")
    kept = newest_checkpoint(tmp_path / "o") / "tokenizer.model"
    assert kept.read_bytes() == (toy / "toy/tokenizer.model").read_bytes()


@pytest.mark.parametrize("key, words", [("lr", "rank 0 has lr=None, rank 1 has 1: ranks are one run"),
                                        ("manifest", "rank 1 has 1: ranks are one run"), ("code", "rank 1 has 1: ranks are one run"),
                                        ("step to go on from", "all machines must see one folder")])
def test_ranks_that_differ_are_named_before_the_first_step(toy, tmp_path, monkeypatch, key, words):
    cfg, run_, phase, model, tokenizer = stage_2(toy, "--out", str(tmp_path / "o"))
    train.training_loader(run_, phase, model, tokenizer)
    monkeypatch.setattr(train, "gather", lambda own: [own, own | {key: 1}])
    with pytest.raises(data.DataError, match=words):
        train.refuse_other_ranks(run_, None)


@pytest.mark.parametrize("count", (1, 7, 20))
def test_the_validation_loss_is_the_same_for_any_number_of_ranks(toy, tmp_path, count):
    """All of the rows count, once each, however many ranks share them."""
    lines = (toy / "toy/val.jsonl").read_text().splitlines(True)
    (tmp_path / "val.jsonl").write_text("".join(lines[:count]))
    cfg = train.parse([str(a) for a in [*flags(toy, 1), "--batch", 12, "--val-data", tmp_path / "val.jsonl", "--root", toy / "toy"]])
    model, tokenizer = load_checkpoint(toy / "stage1")[0], data.Tokenizer(toy / "stage1")
    stage, = train.stages_of(cfg)
    found = {}
    for world in (1, 2, 3):
        sums = []
        for rank in range(world):
            run_ = train.Run(cfg, rank, world, torch.device("cpu"), False)
            objective = train.Objective(model, tokenizer, stage, cfg, world)
            # Of one number, whether a signal came; of two, the sums that are wanted.
            run_.sum = lambda tensor: [0.0] if len(tensor) == 1 else sums.append(tensor.clone()) or [0.0, 1.0]
            train.validate(run_, objective, train.validation_loader(run_, objective), 1, train.Log(None, 0))
        total, tokens = torch.stack(sums).sum(0).tolist()
        found[world] = total / tokens, tokens
    assert found[1][1] == found[2][1] == found[3][1] and found[1][0] == pytest.approx(found[2][0], rel=1e-5) == pytest.approx(found[3][0], rel=1e-5)
    plain = data.Loader(data.read_manifest(tmp_path / "val.jsonl", toy / "toy")[:count], model.cfg, tokenizer, view="exo", batch=1, train=False)
    with torch.no_grad():
        each = [train.Objective(model, tokenizer, stage, cfg, 1).eval().text_sum(plain.batch(i)[0]) for i in range(plain.samples)]
    assert found[1][0] == pytest.approx(float(sum(s for s, _ in each) / sum(n for _, n in each)), rel=1e-5)


def test_a_validation_that_has_nothing_to_read_is_refused_before_the_first_step(toy, tmp_path, capsys):
    rows = [json.loads(line) for line in (toy / "toy/val.jsonl").read_text().splitlines()]
    (tmp_path / "mute.jsonl").write_text("".join(json.dumps({k: v for k, v in row.items() if k in ("id", "exo")}) + "\n" for row in rows))
    rows[3]["exo"][0]["video"] = "gone.mp4"
    (tmp_path / "gone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"id": row["id"], "exo": row["exo"], "turns": [{"user": "What?"}]} for row in rows]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for name, words in (("mute", "mute.jsonl has no row with a text"), ("asked", "asked.jsonl has no row with a text or an answer"), ("gone", "gone.mp4")):
        with pytest.raises(SystemExit):
            go(*flags(toy, 1), "--val-data", tmp_path / f"{name}.jsonl", "--root", toy / "toy", "--out", tmp_path / name, "--steps", 2, "--no-eval")
        assert words in capsys.readouterr().err and not (tmp_path / name / "step_000001").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you "
                                                               "tried to allocate 94371840 bytes"), torch.OutOfMemoryError("CUDA out of memory. Tried")])
def test_out_of_memory_names_the_flags_that_help(error):
    assert "a smaller --micro-batch, or --recompute blocks, needs less" in train.explain(error, CFG, 1)


def test_an_old_python_gets_one_sentence():
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); sys.version_info = (3, 10, 1); import model"
    status, _, said = run("-c", code, check=False)
    assert status == 1 and said.startswith("Exo2Ego needs Python 3.11 or newer, this is ")


def test_x_alone_reads_no_exo_clip_and_no_row_without_text(toy, tmp_path):
    """The control's samples are rows with a text, of which no exo clip is decoded."""
    rows = [json.loads(line) for line in (toy / "toy/pairs.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        del row["text"], row["turns"]
    for row in rows:
        row["exo"] = [{"video": "gone.mp4"}]
    (tmp_path / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg, run_, phase, model, tokenizer = stage_2(toy, "--no-mapping", "--data", str(tmp_path / "half.jsonl"), "--root", str(toy / "toy"))
    loader = train.training_loader(run_, phase, model, tokenizer)
    assert loader.samples == len(rows) // 2 and loader.batch(0)[0].exo is None


def test_a_reader_who_leaves_and_a_narrow_terminal_end_no_training(toy, tmp_path):
    """`| head -1`, and texts in Chinese on a terminal that knows latin-1."""
    rows = [json.loads(line) for line in (toy / "toy/pairs.jsonl").read_text().splitlines()]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row | {"text": "切红色的方块"}) + "\n" for row in rows))
    args = [*flags(toy, 1), "--data", tmp_path / "m.jsonl", "--root", toy / "toy", "--steps", 12, "--batch", 4, "--out", tmp_path / "o"]
    one = subprocess.Popen([sys.executable, REPO / "train.py", *map(str, args)], stdout=subprocess.PIPE, text=True,
                           env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUNBUFFERED": "1"})
    one.stdout.readline()
    one.stdout.close()
    assert one.wait(timeout=120) == 0 and len(log(tmp_path / "o")) == 12
