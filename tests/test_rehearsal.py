"""The paper's whole path at a tiny size: what a laboratory types at 7b, in its order, on files in the real formats.

The commands are README's. What differs is how much (--steps, --batch, the number of ranks) and where files lie. The
weights are random, in VideoLLaMA2's layout with Mistral's own tokenizer; the videos are real files of dim noise.
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

import train
from data import encode_png, write_video
from eval import BENCHES
from model import load_checkpoint, load_delta, newest_checkpoint, read_state

mistral_common = pytest.importorskip("mistral_common")
TOKENIZER = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
END = 2                                                         # the number of </s> among its pieces
RATE = 5                                                        # frames per second of all films here

# Each data set lies in a folder of its name, and its manifest beside it, where the paths of its videos start.
SOURCES = ("egoclip", "ego-exo4d", "egtea", "ssv2", "egotimeqa", "openeqa", "egoexolearn")
MANIFESTS = {source: f"{source}/{source}.jsonl" for source in SOURCES}
EGOCLIP, EXOCLIP, *EGOIT = MANIFESTS.values()
COMMANDS = {source: f"python data.py {source} --root {source} --out {MANIFESTS[source]}" for source in SOURCES} | {
    "check": f"python data.py check {EXOCLIP} --tokenizer VL2 --preset 7b",
    "plan": "python tests/bench.py plan --preset 7b --stage 1 --ranks 8 --memory 80",
    "stage 0": f"python train.py --stage 0 --preset 7b --base VL2 --data {EGOCLIP} --fsdp --batch 2 --steps 2",
    "stage 1": "torchrun --nproc_per_node 2 train.py --stage 1 --preset 7b "
               f"--data {EXOCLIP} --fsdp --batch 2 --steps 10",
    "stage 2": f"python train.py --stage 2 --preset 7b --data {EXOCLIP} --fsdp --batch 2 --steps 1",
    "stage 3": f"python train.py --stage 3 --preset 7b --data {' '.join(EGOIT)} --fsdp --batch 2 --steps 1",
    "one card": "python train.py --stage 1 --preset 7b --base VL2 "
                f"--data {EXOCLIP} --batch 2 --steps 1 --out out/alone",
    "without F": "python train.py --stage 2 --preset 7b --no-mapping --init out/stage1 "
                 f"--data {EXOCLIP} --batch 2 --steps 1 --out out/x/stage2",
    "without F, EgoIT": f"python train.py --stage 3 --preset 7b --data {' '.join(EGOIT)} "
                        "--batch 2 --steps 1 --out out/x/stage3",
    "bench": "python eval.py --bench all --data benchmarks --out results --report",
    "answers": "python eval.py --ckpt out/stage3 --data egtea/egtea.jsonl",
    "export": "python model.py --export-hf out/stage3 hf"}
MAY_DIFFER = {"--nproc_per_node", "--data", "--out", "--batch", "--steps"}      # from README's


# -------------------------------------------------------------------------------- what a laboratory has downloaded
def film(path, seconds=6):
    """A real mp4 of dim noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(0).integers(0, 60, (RATE * seconds, 48, 64, 3), np.uint8)
    write_video(path, frames, RATE)
    return path


def download_egoclip(root):
    """EgoClip's table, and the ten-minute pieces of a video that the table's clips lie in."""
    egoclip(root)
    for piece in range(2):
        film(root / UID / f"{piece}.mp4")


def download_ego_exo4d(root):
    """One take of a minute, of an ego camera and two exo cameras."""
    videos = ego_exo(root) / "takes/cmu_bike_1/frame_aligned_videos/downscaled/448"
    ego = film(videos / "aria02_214-1.mp4", seconds=60)
    for name in ("cam01", "cam02"):
        shutil.copy(ego, videos / f"{name}.mp4")


def download_egoit(root):
    """EgoIT's five sources: trimmed mp4s, webms, clips of Ego4D, a folder of pictures, a long video."""
    for line in (egtea(root / "egtea") / "train_split1.txt").read_text().splitlines():
        clip = line.split()[0]
        session = "-".join(clip.split("-")[:3])
        film(root / f"egtea/cropped_clips/{session}/{clip}.mp4")
    for number in ("78687", "36585"):
        encode(ssv2(root / "ssv2") / f"{number}.webm", "libvpx-vp9")
    film(egotimeqa(root / "egotimeqa") / "16fc2d81.mp4")
    walk = openeqa(root / "openeqa") / "frames/hm3d-v0/000-hm3d-BFRyYbPCCPE"
    walk.mkdir(parents=True)
    pictures = np.random.default_rng(0).integers(0, 60, (6, 48, 64, 3), np.uint8)
    for number, picture in enumerate(pictures):
        (walk / f"{number}-rgb.png").write_bytes(encode_png(picture))
    film(egoexolearn(root / "egoexolearn") / "vid.mp4")


def download_benchmarks(root, films):
    """Every benchmark's files and videos, in a folder of its own."""
    # test_bench.py takes four videos of a micro-world: here they are ours.
    names = [film(films / f"toy/{i}.mp4").name for i in range(4)]
    rows = [json.dumps({"ego": {"video": name}}) for name in names]
    (films / "toy/test.jsonl").write_text("\n".join(rows))
    videos = file_sets(root, films) / "videos"
    for name in BENCHES:
        shutil.copytree(videos, root / name / "videos")
    # EgoExoMem's videos are Ego-Exo4D's takes.
    shutil.move(root / "egoexomem/videos/takes", root / "egoexomem/takes")
    shutil.rmtree(videos)


def download_videollama2(published, folder):
    """Random weights in the published layout, in bfloat16, with Mistral's tokenizer and its 32,000 pieces.

    They find </s> likelier than any other piece: every embedding has a large first channel, which </s>'s row of the
    head reads. So an answer ends before it has thousands of tokens.
    """
    shutil.copytree(published, folder)
    edit_config(folder, vocab_size=32000, dtype="bfloat16")
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    torch.manual_seed(0)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            tensors[name] = 0.1 * torch.randn(32000, tensors[name].shape[1])
            pieces = END if name == "lm_head.weight" else slice(None)
            tensors[name][pieces, 0] = 3
        halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        save_file(halves, shard, {"format": "pt"})


# ------------------------------------------------------------------------------------------------- what it types
def words_of(line):
    """A command as a list of words for Python, with the repository's files where they are."""
    program, *words = shlex.split(line)
    words = [str(REPO / word) if word.endswith(".py") else word for word in words]
    if program == "torchrun":
        return ["-m", "torch.distributed.run", "--standalone", *words]
    return words


def kill_a_rank(line, lab, out):
    """Start a command, kill one rank with -9 when the run `out` has saved itself, and wait for torchrun to end."""
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    launcher = subprocess.Popen([sys.executable, *words_of(line)], cwd=lab, **silent)
    deadline = time.time() + 120
    while newest_checkpoint(lab / out) is None and launcher.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert launcher.poll() is None and newest_checkpoint(lab / out), "it ended, or saved nothing in two minutes"
    os.kill(descendants(launcher.pid)[0], signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0


@pytest.fixture(scope="module")
def laboratory(videollama2, tmp_path_factory):                                     # noqa: F811
    """-> the folder in which all commands were typed, and what each of them printed."""
    lab = tmp_path_factory.mktemp("laboratory")
    download_egoclip(lab / "egoclip")
    download_ego_exo4d(lab / "ego-exo4d")
    download_egoit(lab)
    download_benchmarks(lab / "benchmarks", films=tmp_path_factory.mktemp("films"))
    download_videollama2(videollama2[0], lab / "VL2")

    said = {}
    for name, line in COMMANDS.items():
        begun = time.time()
        if name == "stage 1":
            kill_a_rank(line, lab, "out/stage1")
        said[name] = run(*words_of(line), cwd=lab)[1]
        print(f"{time.time() - begun:5.1f} s  {line}")
    yield lab, said
    # F and G with AdamW's moments are more than a gigabyte.
    shutil.rmtree(lab)


def delta(lab, stage):
    """The tensors in the last checkpoint of a stage."""
    return load_delta(newest_checkpoint(lab / f"out/stage{stage}"))


def parts_of(tensors):
    return {name.split(".")[0] for name in tensors}


# ----------------------------------------------------------------------------------------- what must be there then
def essence(line):
    """The program of a command, and its flags but for those that may differ."""
    flags = re.findall(r"(--[\w-]+)((?: (?!--)[^\s#]+)*)", line)
    return re.search(r"\w+\.py", line)[0], {name: value.strip() for name, value in flags if name not in MAY_DIFFER}


def test_readme_has_no_command_that_is_not_rehearsed():
    section = (REPO / "README.md").read_text().split("## The paper's 7B")[1].split("\n## ")[0]
    lines = re.search("```bash\n(.*?)```", section, re.DOTALL)[1].splitlines()
    rehearsed = [essence(line) for line in COMMANDS.values()]
    assert len(lines) >= 7 and [line for line in lines if essence(line) not in rehearsed] == []


@pytest.mark.parametrize("source, rows, pairs", (
    ("egoclip", 3, 0),              # of 6 lines: one has too many cells, one is unsure, one is short
    ("ego-exo4d", 3, 6),            # of 8 narrations of the one take that has an exo video, with two exo cameras each
    ("egtea", 2, 0), ("ssv2", 2, 0), ("egotimeqa", 2, 0), ("openeqa", 2, 0),
    ("egoexolearn", 1, 0)))         # of 4 segments: one is exo, one of another split, one behind the video's end
def test_each_manifest_has_what_its_rules_keep(laboratory, source, rows, pairs):
    lab, said = laboratory
    assert len((lab / MANIFESTS[source]).read_text().splitlines()) == rows
    assert f"{MANIFESTS[source]}: {rows} rows, {pairs} ego-exo pairs" in said[source]


def test_check_and_plan_agree_to_the_run(laboratory):
    lab, said = laboratory
    assert "3 of 3 rows are good; nothing is wrong" in said["check"]
    assert (lab / EXOCLIP).with_suffix(".bad.jsonl").read_text() == ""
    assert "fits in 80" in said["plan"] and "the paper's stage 1: 2.24M samples" in said["plan"]


@pytest.mark.parametrize("stage, start, samples, steps", (
    (0, "VL2", 3, 2), (1, "out/stage0/step_000002", 6, 10), (2, "out/stage1/step_000010", 6, 1),
    (3, "out/stage2/step_000001", 9, 1)))
def test_each_stage_sees_all_of_its_data_and_leaves_its_files(laboratory, stage, start, samples, steps):
    lab, said = laboratory
    out = lab / f"out/stage{stage}"
    assert f"starts from {start}, untouched weights are those of " in said[f"stage {stage}"]
    assert f"{steps} steps x 2 of {samples} samples" in said[f"stage {stage}"]
    rows = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)

    files = {file.name for file in newest_checkpoint(out).iterdir()}
    assert files == {"model.safetensors", "optim.safetensors", "state.json", "tokenizer.model"}
    state = read_state(newest_checkpoint(out))
    assert (state["stage"], state["step"], state["steps"]) == (stage, steps, steps)
    assert state["base"] == "../../VL2" and (out / "samples.png").stat().st_size


def test_after_kill_9_the_same_command_goes_on(laboratory):
    _, said = laboratory
    resumed = re.search(r"out/stage1/step_(\d+) goes on from step (\d+)", said["stage 1"])
    assert resumed and 1 <= int(resumed[1]) == int(resumed[2]) < 10


def test_stage_1_may_start_from_published_weights_alone(laboratory):
    lab, said = laboratory
    assert "starts from VL2, " in said["one card"]
    # It lies beside a stage 0 that took hours.
    assert "out/stage0 is not used: --init out/stage0 starts from it, if it is finished" in said["one card"] and "is not used" not in said["stage 1"]
    assert parts_of(load_delta(newest_checkpoint(lab / "out/alone"))) == {"exo_vit", "exo_connector"}


def test_stage_0_may_be_given_as_the_base_of_stage_1(laboratory, monkeypatch):
    """Its own base is VideoLLaMA2's folder, which it recorded."""
    lab, _ = laboratory
    monkeypatch.chdir(lab)
    start = train.starting_point(train.parse(["--stage", "1", "--preset", "7b", "--base", "out/stage0", "--data", EXOCLIP]))
    assert start.source == newest_checkpoint("out/stage0") and start.base.resolve() == lab.resolve() / "VL2"


def test_init_reaches_stage_2_through_a_stage_that_has_no_ego_encoder(laboratory):
    """One tensor of the ego ViT, from VideoLLaMA2's folder to stage 2, and whole parts to stage 3."""
    lab, said = laboratory
    assert "ego_vit" not in said["stage 1"] and parts_of(delta(lab, 0)) == {"ego_vit", "ego_connector"}
    name = "ego_vit.blocks.0.q.weight"
    published = load_checkpoint(lab / "VL2")[0].state_dict()[name].float()
    init, carried, guided = (delta(lab, stage)[name] for stage in (0, 1, 2))
    # Init's rate is 1e-3, stage 2's 1e-4: in one step AdamW moves a weight by the rate at most.
    assert (init - published).abs().max() > 5e-4
    assert torch.equal(carried, init)
    assert 0 < (guided - init).abs().max() < 1.1e-4
    # What a later stage freezes stays as an earlier one left it.
    for part, trained_last in (("exo_vit", 1), ("exo_connector", 1), ("ego_connector", 2)):
        before, after = delta(lab, trained_last), delta(lab, 3)
        names = [name for name in before if name.startswith(f"{part}.")]
        assert names and all(torch.equal(before[name], after[name]) for name in names)


def test_table_5_has_a_row_without_f(laboratory):
    lab, said = laboratory
    assert "starts from out/x/stage2/step_000001, " in said["without F, EgoIT"]
    for stage, lora in ((2, set()), (3, {"decoder"})):
        tensors = load_delta(newest_checkpoint(lab / f"out/x/stage{stage}"))
        assert parts_of(tensors) == {"exo_vit", "exo_connector", "ego_vit", "ego_connector"} | lora


def test_every_benchmark_has_a_score_and_a_place_on_the_page(laboratory):
    lab, _ = laboratory
    page = (lab / "results/report.html").read_text()
    for name in BENCHES:
        figures = json.loads((lab / f"results/{name}.json").read_text())
        predictions = (lab / f"results/{name}.jsonl").read_text().splitlines()[1:]
        assert len(predictions) == figures["items"] > 0 == figures["unreadable"], name
        assert 0 <= figures["score"] <= 1 and figures["ckpt"] == "out/stage3/step_000001"
        assert f"<td>{name}" in page


def test_answers_for_ones_own_data_and_what_transformers_reads(laboratory):
    lab, said = laboratory
    figures = json.loads((lab / "out/stage3/answers-egtea.json").read_text())
    assert figures["answers"] == 2 and figures["unreadable"] == 0 and "exact" in figures
    model, _ = load_checkpoint(lab / "out/stage3")
    for view in ("exo", "ego"):
        exported = load_file(lab / f"hf/{view}_vision/model.safetensors")
        own = getattr(model, f"{view}_vit").blocks[0].q.weight
        assert torch.equal(exported["vision_model.encoder.layers.0.self_attn.q_proj.weight"], own)
    assert (lab / "hf/decoder/tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


# ------------------------------------------------------------------------------- a rung between the toy and 7b
def test_a_smaller_mistral_and_a_clip_b_train_through_base_and_vision(tmp_path):
    """The decoder of --base and the ViT of --vision, each as transformers saves it, and fresh connectors."""
    small = mistral_model(vocab_size=32000, num_key_value_heads=1, tie_word_embeddings=True)
    small.save_pretrained(tmp_path / "decoder")
    shutil.copy(TOKENIZER, tmp_path / "decoder/tokenizer.model")
    clip_model(width=64, heads=1).save_pretrained(tmp_path / "clip")
    download_ego_exo4d(tmp_path / "ego-exo4d")
    run(*words_of(COMMANDS["ego-exo4d"]), cwd=tmp_path)
    # Stage 2 finds both folders where stage 1 recorded them.
    data = f"--data {EXOCLIP} --batch 2 --steps 1 --no-eval"
    for stage, flags in ((1, "--base decoder --vision clip"), (2, "--mapping mlp")):
        run(*words_of(f"python train.py --stage {stage} --preset 7b {flags} {data}"), cwd=tmp_path)
        row = json.loads((tmp_path / f"out/stage{stage}/log.jsonl").read_text())
        assert np.isfinite(row["loss"]) and row["grad_norm"] > 0
    model, state = load_checkpoint(tmp_path / "out/stage1")
    cfg = model.cfg
    assert (cfg.vit_width, cfg.vit_heads, cfg.kv_heads, cfg.stc_depth, cfg.frames) == (64, 1, 1, 4, 16)
    assert state["base"] == "../../decoder" and state["vision"] == str(tmp_path / "clip")
    assert parts_of(delta(tmp_path, 1)) == {"exo_vit", "exo_connector"}
