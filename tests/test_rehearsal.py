"""The paper's whole path at a tiny size: every command that a laboratory types at 7b, in its order, on files in the real formats.

The commands are README's. What differs is how much: --steps, --batch, the number of ranks, and where files lie. The weights are
random, in VideoLLaMA2's layout with Mistral's own tokenizer; the videos are real files with a few dim pictures.
"""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, run
from safetensors.torch import load_file, save_file
from test_bench import file_sets
from test_builders import UID, ego_exo, egoclip, egoexolearn, egotimeqa, egtea, openeqa, ssv2
from test_train import descendants
from test_video import encode
from test_weights import clip_model, edit_config, mistral_model, videollama2        # noqa: F401

from data import encode_png, write_video
from eval import BENCHES
from model import load_checkpoint, load_delta, newest_checkpoint, read_state

mistral_common = pytest.importorskip("mistral_common")

TOKENIZER = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
END = 2                                                         # the number of </s> among its pieces
RATE = 5                                                        # frames per second of all films here
BUILT = {
    "egoclip": "python data.py egoclip --root ego4d --out ego4d/egoclip.jsonl",
    "ego-exo4d": "python data.py ego-exo4d --root egoexo4d --out egoexo4d/exoclip.jsonl",
    "egtea": "python data.py egtea --root egtea --out egtea/egtea.jsonl",
    "ssv2": "python data.py ssv2 --root ssv2 --out ssv2/ssv2.jsonl",
    "egotimeqa": "python data.py egotimeqa --root egotimeqa --out egotimeqa/egotimeqa.jsonl",
    "openeqa": "python data.py openeqa --root openeqa --out openeqa/openeqa.jsonl",
    "egoexolearn": "python data.py egoexolearn --root egoexolearn --out egoexolearn/egoexolearn.jsonl"}
EGOIT = "egtea/egtea.jsonl ssv2/ssv2.jsonl egotimeqa/egotimeqa.jsonl openeqa/openeqa.jsonl egoexolearn/egoexolearn.jsonl"
CHECK = "python data.py check egoexo4d/exoclip.jsonl --tokenizer VL2 --preset 7b"
PLAN = "python tests/bench.py plan --preset 7b --stage 1 --ranks 8 --memory 80"
STAGE_0 = "python train.py --stage 0 --preset 7b --base VL2 --data ego4d/egoclip.jsonl --fsdp --batch 2 --steps 2"
STAGE_1 = ("torchrun --nproc_per_node 2 train.py --stage 1 --preset 7b --base VL2 --init out/stage0 "
           "--data egoexo4d/exoclip.jsonl --fsdp --batch 2 --steps 6")
STAGE_2 = "python train.py --stage 2 --preset 7b --data egoexo4d/exoclip.jsonl --fsdp --batch 2 --steps 1"
STAGE_3 = f"python train.py --stage 3 --preset 7b --data {EGOIT} --fsdp --batch 2 --steps 1"
BENCH = "python eval.py --bench all --data benchmarks --out results --report"
EXPORT = "python model.py --export-hf out/stage3 hf"


# -------------------------------------------------------------------------------------- what a laboratory has downloaded
def film(path, seconds=6):
    """A real mp4 of dim noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(0).integers(0, 60, (RATE * seconds, 48, 64, 3), np.uint8)
    write_video(path, frames, RATE)
    return path


def download_ego4d(root):
    """EgoClip's table, and the ten-minute pieces of its video that the table's clips lie in."""
    egoclip(root)
    for piece in range(2):
        film(root / UID / f"{piece}.mp4")


def download_ego_exo4d(root):
    """One take, 60 s long, of an ego camera and two exo cameras."""
    ego_exo(root)
    first = film(root / "takes/cmu_bike_1/frame_aligned_videos/downscaled/448/aria02_214-1.mp4", seconds=60)
    for name in ("cam01", "cam02"):
        shutil.copy(first, first.with_name(f"{name}.mp4"))


def download_egoit(root):
    """The five sources of EgoIT, each in a folder of its own."""
    for line in (egtea(root / "egtea") / "train_split1.txt").read_text().splitlines():
        clip = line.split()[0]
        film(root / "egtea/cropped_clips" / "-".join(clip.split("-")[:3]) / f"{clip}.mp4")
    for number in ("78687", "36585"):
        encode(ssv2(root / "ssv2") / f"{number}.webm", "libvpx-vp9")
    film(egotimeqa(root / "egotimeqa") / "16fc2d81.mp4")
    film(egoexolearn(root / "egoexolearn") / "vid.mp4")
    walk = openeqa(root / "openeqa") / "frames/hm3d-v0/000-hm3d-BFRyYbPCCPE"
    walk.mkdir(parents=True)
    for i, picture in enumerate(np.random.default_rng(0).integers(0, 60, (6, 48, 64, 3), np.uint8)):
        (walk / f"{i}-rgb.png").write_bytes(encode_png(picture))


def download_benchmarks(root, tmp):
    """Every benchmark's files and videos, in a folder of its own."""
    rows = [{"ego": {"video": f"{i}.mp4"}} for i in range(4)]
    for i in range(4):
        film(tmp / f"toy/{i}.mp4")
    (tmp / "toy/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    videos = file_sets(root, tmp) / "videos"
    for name in BENCHES:
        shutil.copytree(videos, root / name / "videos")
    shutil.move(root / "egoexomem/videos/takes", root / "egoexomem/takes")
    shutil.rmtree(videos)


def download_videollama2(published, folder):
    """Random weights in the published layout, in bfloat16 as published, with Mistral's tokenizer and its 32,000 pieces.

    They find </s> likelier than any other piece: every embedding has a large first channel, which its row of the head reads. So
    an answer ends before it has thousands of tokens.
    """
    shutil.copytree(published, folder)
    edit_config(folder, vocab_size=32000, dtype="bfloat16")
    torch.manual_seed(0)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            tensors[name] = 0.1 * torch.randn(32000, tensors[name].shape[1])
            pieces = slice(None) if "embed" in name else END
            tensors[name][pieces, 0] = 3
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, shard, {"format": "pt"})
    shutil.copy(TOKENIZER, folder / "tokenizer.model")


# ------------------------------------------------------------------------------------------------------- what it types
def words_of(line):
    """A command as a list of words for Python, with the repository's files where they are."""
    program, *words = shlex.split(line)
    words = [str(REPO / word) if word.endswith(".py") else word for word in words]
    return ["-m", "torch.distributed.run", "--standalone", *words] if program == "torchrun" else words


def kill_a_rank(line, lab, checkpoint):
    """Start a command, kill one rank with -9 when this checkpoint is there, and wait for torchrun to end."""
    launcher = subprocess.Popen([sys.executable, *words_of(line)], cwd=lab, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (lab / checkpoint).exists() and launcher.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    os.kill(descendants(launcher.pid)[0], signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0


@pytest.fixture(scope="module")
def laboratory(videollama2, tmp_path_factory):                                     # noqa: F811
    """-> (the folder in which all commands were typed, what each printed)."""
    lab = tmp_path_factory.mktemp("laboratory")
    download_ego4d(lab / "ego4d")
    download_ego_exo4d(lab / "egoexo4d")
    download_egoit(lab)
    download_benchmarks(lab / "benchmarks", tmp_path_factory.mktemp("films"))
    download_videollama2(videollama2[0], lab / "VL2")

    said = {}
    for line in (*BUILT.values(), CHECK, PLAN, STAGE_0, STAGE_1, STAGE_2, STAGE_3, BENCH, EXPORT):
        if line == STAGE_1:
            kill_a_rank(line, lab, "out/stage1/step_000002")
        begun = time.time()
        said[line] = run(*words_of(line), cwd=lab)[1]
        print(f"{time.time() - begun:5.1f} s  {line}")
    return lab, said


# ----------------------------------------------------------------------------------------------- what must be there then
# Rows that each table's rules keep, of those that test_builders.py writes by hand; and pairs of a row and an exo camera.
ROWS = {"egoclip": 3, "ego-exo4d": 3, "egtea": 2, "ssv2": 2, "egotimeqa": 2, "openeqa": 2, "egoexolearn": 1}
PAIRS = 6


def parts_of(tensors):
    return {name.split(".")[0] for name in tensors}


def test_each_manifest_has_what_its_rules_keep(laboratory):
    lab, said = laboratory
    for source, line in BUILT.items():
        manifest = lab / line.split()[-1]
        assert len(manifest.read_text().splitlines()) == ROWS[source], source
        assert f"{ROWS[source]} rows, {PAIRS if source == 'ego-exo4d' else 0} ego-exo pairs" in said[line]
    assert "3 of 3 rows are good; nothing is wrong" in said[CHECK]
    assert "fits in 80" in said[PLAN] and "the paper's stage 1: 2.24M samples" in said[PLAN]


@pytest.mark.parametrize("line, samples, steps", ((STAGE_0, 3, 2), (STAGE_1, 6, 6), (STAGE_2, 6, 1), (STAGE_3, 9, 1)))
def test_each_stage_sees_all_of_its_rows_and_leaves_its_files(laboratory, line, samples, steps):
    lab, said = laboratory
    stage = int(re.search(r"--stage (\d)", line)[1])
    assert f"of {samples} samples" in said[line]
    folder = lab / f"out/stage{stage}"
    rows = [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)) and all(np.isfinite(row["loss"]) for row in rows)
    assert all(row["skipped"] == 0 for row in rows)
    checkpoint = newest_checkpoint(folder)
    assert {file.name for file in checkpoint.iterdir()} == {"model.safetensors", "optim.safetensors", "state.json", "tokenizer.model"}
    state = read_state(checkpoint)
    assert (state["stage"], state["step"], state["steps"]) == (stage, steps, steps) and state["base"] == "../../VL2"
    assert (folder / "samples.png").stat().st_size


def test_a_killed_rank_costs_nothing_that_was_saved(laboratory):
    _, said = laboratory
    resumed = re.search(r"out/stage1/step_(\d+) goes on from step (\d)", said[STAGE_1])
    assert resumed and 2 <= int(resumed[2]) < 6


def test_init_reaches_stage_2_through_a_stage_that_has_no_ego_encoder(laboratory):
    """One tensor of the ego ViT, from published weights to stage 3."""
    lab, _ = laboratory
    name = "ego_vit.blocks.0.q.weight"
    published = load_checkpoint(lab / "VL2")[0].state_dict()[name].float()
    init, carried, guided = (load_delta(newest_checkpoint(lab / f"out/stage{stage}"))[name] for stage in (0, 1, 2))
    # Init's rate is 1e-3, stage 2's 1e-4: in one step AdamW moves a weight by its rate at most.
    assert (init - published).abs().max() > 5e-4
    assert torch.equal(carried, init)
    assert 0 < (guided - init).abs().max() < 1.1e-4
    assert torch.equal(load_checkpoint(lab / "out/stage1")[0].state_dict()[name], init)

    # What a later stage freezes stays as the earlier one left it.
    for frozen, first, last in (("exo_vit", 1, 3), ("exo_connector", 1, 3), ("ego_connector", 2, 3)):
        before, after = (load_delta(newest_checkpoint(lab / f"out/stage{stage}")) for stage in (first, last))
        names = [name for name in before if name.startswith(f"{frozen}.")]
        assert names and all(torch.equal(before[name], after[name]) for name in names)
    assert parts_of(load_delta(newest_checkpoint(lab / "out/stage0"))) == {"ego_vit", "ego_connector"}


def test_every_benchmark_has_a_score_and_a_line_on_the_page(laboratory):
    lab, _ = laboratory
    page = (lab / "results/report.html").read_text()
    for name in BENCHES:
        figures = json.loads((lab / f"results/{name}.json").read_text())
        lines = (lab / f"results/{name}.jsonl").read_text().splitlines()
        assert len(lines) == 1 + figures["items"] and figures["unreadable"] == 0 and figures["score"] is not None, name
        assert f"<td>{name}" in page and "out/stage3/step_000001" in figures["ckpt"]
    assert set(json.loads((lab / "results/egoschema.submission.json").read_text())) == {f"v{i}" for i in range(4)}


def test_what_is_exported_is_stage_3(laboratory):
    lab, _ = laboratory
    model, _ = load_checkpoint(lab / "out/stage3")
    for view in ("exo", "ego"):
        exported = load_file(lab / f"hf/{view}_vision/model.safetensors")["vision_model.encoder.layers.0.self_attn.q_proj.weight"]
        assert torch.equal(exported, getattr(model, f"{view}_vit").blocks[0].q.weight)
    assert (lab / "hf/decoder/tokenizer.model").read_bytes() == (lab / "VL2/tokenizer.model").read_bytes()


# ------------------------------------------------------------------------------------ a rung between the toy and 7b
def test_a_smaller_mistral_and_a_clip_b_train_through_base_and_vision(tmp_path):
    """The decoder of --base and the ViT of --vision, each as transformers saves it, and fresh connectors."""
    mistral_model(vocab_size=32000, num_key_value_heads=1, tie_word_embeddings=True).save_pretrained(tmp_path / "decoder")
    shutil.copy(TOKENIZER, tmp_path / "decoder/tokenizer.model")
    clip_model(width=64, heads=1).save_pretrained(tmp_path / "clip")
    download_ego_exo4d(tmp_path / "egoexo4d")
    run(*words_of(BUILT["ego-exo4d"]), cwd=tmp_path)
    data = "--data egoexo4d/exoclip.jsonl --batch 2 --steps 1 --no-eval"
    for stage, start in ((1, "--base decoder --vision clip"), (2, "")):
        run(*words_of(f"python train.py --stage {stage} --preset 7b {start} {data}"), cwd=tmp_path)
        row = json.loads((tmp_path / f"out/stage{stage}/log.jsonl").read_text())
        assert np.isfinite(row["loss"]) and row["grad_norm"] > 0
    model, state = load_checkpoint(tmp_path / "out/stage1")
    cfg = model.cfg
    assert (cfg.vit_width, cfg.vit_heads, cfg.kv_heads, cfg.stc_depth, cfg.frames) == (64, 1, 1, 4, 16)
    assert state["base"] == "../../decoder" and state["vision"] == str(tmp_path / "clip")
    assert parts_of(load_delta(newest_checkpoint(tmp_path / "out/stage1"))) == {"exo_vit", "exo_connector"}
