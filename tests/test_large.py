"""The real thing in small: published weights through train.py, memory savers that change nothing, plans that hold."""
import json
import re
import shutil
from dataclasses import replace
from functools import cache

import bench
import pytest
import torch
from conftest import RANKS, REPO, TORCHRUN, flags, run
from safetensors.torch import load_file, save_file
from test_train import agree, go, log, weights
from test_weights import videollama2            # noqa: F401 (a fixture)

from data import Tokenizer
from model import PRESETS, Exo2Ego, autocast, load_checkpoint, newest_checkpoint


@pytest.mark.parametrize("stage", (2, 3))
def test_ddp_equals_fsdp_equals_accumulation(toy, tmp_path, stage):
    """Five steps: 1 rank x 2 micro batches == 2 ranks FSDP that compute whole blocks again (stage 2) or their cheap steps
    (stage 3), in float32. Three steps on two FSDP ranks and two more on one give the same again."""
    args = [*flags(toy, stage), "--steps", 5, "--batch", 8, "--optimizer", "adamw", "--lr", 1e-4, "--save-every", 1, "--keep", 9]
    plain, sharded = tmp_path / "plain", tmp_path / "fsdp"
    savers = ["--fsdp", "--recompute", "blocks" if stage == 2 else "cheap"]
    run(REPO / "train.py", *args, "--out", plain, "--micro-batch", 4, "--no-eval")
    run(*(TORCHRUN if stage == 2 else RANKS), REPO / "train.py", *args, "--out", sharded, *savers)
    agree(plain, sharded)
    assert "ego_em" in json.loads((sharded / "eval.json").read_text())
    shutil.rmtree(sharded / "step_000004")
    shutil.rmtree(sharded / "step_000005")
    run(REPO / "train.py", *args, "--out", sharded, "--no-eval")      # the last two steps, whole again on one rank
    agree(plain, sharded)


@pytest.mark.parametrize("recompute", ("cheap", "blocks"))
def test_what_is_computed_again_changes_nothing(toy, tmp_path, recompute):
    run(REPO / "train.py", *flags(toy, 2), "--out", tmp_path / "again", "--steps", 3, "--no-eval", "--recompute", recompute)
    kept, again = weights(toy / "stage2"), weights(tmp_path / "again")
    assert all(torch.equal(kept[n], again[n]) for n in kept)


@pytest.mark.parametrize("backend", ["sdpa", "tiled", "reference"])
@pytest.mark.parametrize("stage, dtype, most", [(1, "float32", 0.85), (2, "float32", 0.85), (3, "float32", 0.92), (1, "bfloat16", 0.95),
                                                (3, "bfloat16", 0.95)])
def test_the_policy_changes_no_bit_and_computes_no_product_again(monkeypatch, stage, dtype, most, backend):
    """What backward computes again gives the same loss and gradients from fewer bytes at the peak, whichever attention is in
    use. `cheap` computes no product again but those of attention written in plain torch."""
    monkeypatch.setenv("EXO2EGO_ATTENTION", backend)
    batch, found = bench.make_batch(stage, PRESETS["toy"]), {}
    for recompute in ("none", "cheap", "blocks"):
        objective, trained, run = bench.our_objective(stage, "toy", "--dtype", dtype, "--recompute", recompute)
        with bench.Meter([*objective.parameters(), *objective.buffers()]) as meter:
            with autocast(run.device, run.bf16):
                loss = objective(batch, float(batch.weights.sum()), batch.samples)["loss"]
            loss.backward()
        found[recompute] = loss, [p.grad for p in trained.values()], meter
    loss, grads, plain = found["none"]
    for other, theirs, _ in found.values():
        assert torch.equal(loss, other) and all(torch.equal(a, b) for a, b in zip(grads, theirs, strict=True))
    if backend == "sdpa":
        assert found["cheap"][2].flops == plain.flops < found["blocks"][2].flops
        assert found["blocks"][2].most < found["cheap"][2].most < most * plain.most


def test_bfloat16_weights_on_any_cpu(toy, tmp_path):
    """Frozen weights are stored in bfloat16, trained ones in float32; the loss is float32's to 2 %."""
    args = [*flags(toy, 2), "--steps", 3, "--batch", 8]
    run(REPO / "train.py", *args, "--out", tmp_path / "a", "--no-eval")
    _, out, _ = run(REPO / "train.py", *args, "--out", tmp_path / "b", "--dtype", "bfloat16")
    assert "ego narrations exact:" in out
    assert "ego narrations exact:" in run(REPO / "eval.py", "--ckpt", tmp_path / "b", "--data", toy / "toy")[1]
    for a, b in zip(log(tmp_path / "a"), log(tmp_path / "b"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 0.02 * a["loss"]
    kinds = {n.split(".")[0]: t.dtype for n, t in weights(tmp_path / "b").items()}
    assert kinds["ego_vit"] == kinds["F"] == torch.float32 and kinds["exo_vit"] == torch.bfloat16


def test_published_weights_through_the_stages(videollama2, toy, tmp_path, monkeypatch):          # noqa: F811
    """train.py --base DIR, stages 1 to 3: only what trained is saved, and the whole model comes back from both."""
    import mistral_common
    from pathlib import Path
    base = tmp_path / "base"
    shutil.copytree(videollama2[0], base)
    spm = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
    rows = [json.loads(line) for line in (toy / "toy/pairs.jsonl").read_text().splitlines()]
    data = toy / "toy" / "real.jsonl"
    data.write_text("".join(json.dumps(row | {"text": "cut", "turns": [{"user": "do", "assistant": "cut"}]}) + "\n" for row in rows))
    shutil.copy(spm, base / "tokenizer.model")
    code, _, err = run(REPO / "train.py", "--stage", 1, "--preset", "7b", "--base", base, "--data", data, "--out", tmp_path / "s0",
                       "--steps", 1, "--batch", 2, check=False)
    assert code == 2 and "32000 pieces, the decoder 512" in err # this tokenizer is not that decoder's
    small = toy / "toy/tokenizer.model"
    before = Exo2Ego.from_videollama2(base)
    # F and G of 7b have a hundred million parameters whatever the encoders; test_rehearsal.py trains those.
    monkeypatch.setitem(PRESETS, "7b", replace(PRESETS["7b"], map_blocks=2, map_width=32))
    for stage in (1, 2, 3):
        # Stage 1 starts from the base; later stages find it where the one before recorded it.
        given = ["--base", base] if stage == 1 else ["--init", tmp_path / f"stage{stage - 1}"]
        go("--stage", stage, "--preset", "7b", *given, "--tokenizer", small, "--data", data, "--batch", 2,
           "--out", tmp_path / f"stage{stage}", "--steps", 2)
        model, state = load_checkpoint(tmp_path / f"stage{stage}")
        assert Tokenizer(newest_checkpoint(tmp_path / f"stage{stage}")).size <= 512 and state["base"].endswith("base")
        saved = weights(tmp_path / f"stage{stage}")
        assert not any(n.startswith("decoder.") and "lora" not in n for n in saved)
        own, old = model.state_dict(), before.state_dict()
        moved = {n.split(".")[0] for n in old if n in own and not torch.equal(own[n], old[n])}
        assert moved == {1: {"exo_vit", "exo_connector"}}.get(stage, {"exo_vit", "exo_connector", "ego_vit", "ego_connector"})
        assert all(torch.equal(own[n], t) for n, t in saved.items() if not n.startswith("loss."))
    shutil.copytree(base, tmp_path / "other")
    shard = next((tmp_path / "other").glob("*-00002-*"))
    save_file({n: t + 1 for n, t in load_file(shard).items()}, shard)
    with pytest.raises(ValueError, match="is not the base of"):
        load_checkpoint(tmp_path / "stage3", base=tmp_path / "other")


def test_resuming_on_a_half_precision_base_is_exact(videollama2, toy, tmp_path):    # noqa: F811
    base = tmp_path / "base"
    shutil.copytree(videollama2[0], base)
    for shard in base.glob("*.safetensors"):
        save_file({n: t.bfloat16() for n, t in load_file(shard).items()}, shard)
    shutil.copy(toy / "toy/tokenizer.model", base)
    args = ["--stage", 1, "--preset", "7b", "--base", base, "--data", toy / "toy/pairs.jsonl", "--batch", 2, "--steps", 3,
            "--lr", 1e-3, "--save-every", 1, "--keep", 9, "--no-eval"]
    run(REPO / "train.py", *args, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step_000002")
    shutil.rmtree(tmp_path / "cut/step_000003")
    run(REPO / "train.py", *args, "--out", tmp_path / "cut")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[n], b[n]) and t.dtype == torch.float32 for n, t in a.items())


def test_ranks_without_text_keep_step(toy, tmp_path):
    """Half the rows have no text and a rank sees one sample at a time: FSDP and validation meet at the same blocks."""
    rows = [json.loads(line) for line in (toy / "toy/pairs.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        del row["text"], row["turns"]
    world = tmp_path / "toy"
    shutil.copytree(toy / "toy", world)
    (world / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [*flags(toy, 2), "--data", world, "--steps", 3, "--batch", 8, "--micro-batch", 1, "--optimizer", "adamw", "--lr", 1e-4,
            "--no-eval", "--val-every", 3, "--save-every", 1, "--keep", 9]
    run(REPO / "train.py", *args, "--out", tmp_path / "one")
    run(*RANKS, REPO / "train.py", *args, "--out", tmp_path / "two", "--fsdp", "--timeout", 60)
    agree(tmp_path / "one", tmp_path / "two")
    assert "val_loss" in log(tmp_path / "two")[-1]


def test_fsdp_with_muon_is_refused(toy, tmp_path):
    code, _, err = run(*RANKS, REPO / "train.py", *flags(toy, 1, "o"), "--steps", 1, "--batch", 8, "--fsdp", "--no-eval", check=False)
    assert code != 0 and "--fsdp needs --optimizer adamw" in err


@pytest.fixture(scope="module")
def plans():
    """bench.planned, which computes nothing twice here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "planned", cache(bench.planned))
        yield


def test_plan_of_the_7b_counts_what_is_published(plans, capsys):
    bench.bench_plan(bench.parser().parse_args(["plan", "--stage", "3", "--ranks", "4", "--memory", "80"]))
    out = capsys.readouterr().out
    parts = {name: (int(on.replace(",", "")), int(off.replace(",", "")))
             for name, on, off in re.findall(r"^   (\w+) +([\d,]+) trained +([\d,]+) frozen", out, re.M)}
    assert parts["decoder"] == (335_544_320, 7_241_732_096) and parts["exo_connector"] == (0, 489_188_608)
    assert parts["ego_vit"] == (290_909_184, 0) and sum(parts["all"]) == sum(map(sum, parts.values())) - sum(parts["all"])
    assert "3106 tokens, 64 of them text, of at most 4096" in out
    needs = {kind: float(gb) for kind, gb in re.findall(r"(DDP|FSDP) .*: ([\d.]+) GB per rank", out)}
    assert 25 < needs["DDP"] < 120


def test_readmes_7b_commands_fit_the_cards_they_name(plans):
    """With the defaults that train.py uses (on a card: compiled, which the step that keeps all bounds), in 80 GB per rank; and README's
    table has the plan's figures."""
    readme = (REPO / "README.md").read_text()
    commands = re.findall(r"^(?:torchrun --nproc_per_node (\d+)|python) train.py --stage (\d) --preset 7b(.*)$", readme, re.M)
    assert sorted(stage for _, stage, _ in commands) == ["0", "1", "1", "2", "3"]
    found = {}
    for ranks, stage, more in commands:
        ranks, stage, sharded = int(ranks or 1), int(stage), "--fsdp" in more
        if stage not in found:
            run_, phase, _ = bench.meta_objective(stage, "7b")
            found[stage] = bench.train.samples_per_forward(phase, run_.cfg, 8), {
                kept: bench.planned(stage, "7b", bench.train.samples_per_forward(phase, run_.cfg, 8), kept) for kept in ("none", "blocks")}
        micro, needs = found[stage]

        def gb(kept, shards):
            need = {kind: size / 1e9 for kind, size in needs[kept].items()}
            held = (need["weights"] + need["gradients"] + need["optimiser"]) / shards + 2 * need["block"] * (shards > 1)
            return max(held + need["activations"], need["weights"])
        assert gb("none", ranks if sharded else 1) < 80, (stage, ranks, more)
        row = f"| {stage} | {micro} | {gb('none', 8):.1f} GB | {gb('none', 1):.1f} GB | {gb('blocks', 8):.1f} GB |"
        assert row in readme, row
