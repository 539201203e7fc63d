"""Scores mean what they say: chance for constant answers, ties shared, real greedy answers."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import REPO, flags, run

import eval as evaluation
from data import NARRATE, DataError, narration, Tokenizer, read_clip, read_manifest
from model import FORMAT, Segments, feature_kl, load_checkpoint, newest_checkpoint


def load(run):
    return load_checkpoint(run)[0], Tokenizer(newest_checkpoint(run))


def test_constant_scores_give_chance_and_ties_are_shared():
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 5, 400)
    assert abs(np.mean([evaluation.choice_score(np.zeros(5), a) for a in answers]) - 0.2) < 1e-12
    assert evaluation.choice_score(np.array([1.0, 2, 2, 0]), 2) == 0.5
    assert evaluation.choice_score(np.array([1.0, 2, 2, 0]), 0) == 0.0


def test_wilson_interval():
    low, high = evaluation.wilson(0.5, 100)
    assert abs(low - 0.4038) < 1e-4 and abs(high - 0.5962) < 1e-4
    assert evaluation.wilson(0.0, 10)[0] == 0.0 and evaluation.wilson(1.0, 10)[1] == 1.0


def test_benchmark_prints_every_figure(toy, tmp_path):
    out = (toy / "stage3" / "eval.json").read_text()
    figures = json.loads(out)
    for name in ("ego_em", "mcq_inter", "mcq_intra", "qa"):
        assert {name, f"{name}_chance", f"{name}_lo", f"{name}_hi", f"{name}_n"} <= figures.keys()
        assert 0 <= figures[f"{name}_lo"] <= figures[name] <= figures[f"{name}_hi"] <= 1
    assert abs(figures["ego_em_chance"] - 1 / 270) < 1e-9 and figures["mcq_intra_chance"] == 0.2
    assert {"kl_true", "kl_shuffled"} <= json.loads((toy / "stage2" / "eval.json").read_text()).keys()
    assert (toy / "stage3" / "samples.png").stat().st_size > 5000
    _, printed, _ = run(REPO / "eval.py", "--ckpt", toy / "stage3", "--data", toy / "toy")
    for name, words in (("ego_em", "ego narrations exact"), ("mcq_intra", "which of a scene's five moments"), ("qa", "questions exact")):
        share, low, high, chance = (100 * figures[key] for key in (name, f"{name}_lo", f"{name}_hi", f"{name}_chance"))
        assert f"{words}: {share:.1f} % [{low:.1f}, {high:.1f}] of {figures[name + '_n']:,}, chance {chance:.1f} %\n" in printed
    assert f"ego_verb: {100 * figures['ego_verb']:.1f} % [" in printed and "chance 11.1 %" in printed and "_lo" not in printed
    assert f"next: python eval.py --ckpt {toy}/stage3 --video {toy}/toy/test/ego/0.mp4 --start 0" in printed


def test_narrations_count_as_a_whole_and_fact_by_fact(monkeypatch):
    """One of three is exact; another has the wrong verb alone; the third has another form."""
    truth = narration("cuts", "red", "plain", "left")
    said = [truth, truth.replace("cuts", "taps"), "A hand moves."]
    monkeypatch.setattr(evaluation, "generate_answers", lambda *_: said)
    figures, columns = evaluation.evaluate_narrations(None, None, [{"text": truth}] * 3, None, "ego")
    shares = [3 * figures[f"ego_{fact}"] for fact in ("em", "verb", "colour", "pattern", "hand")]
    assert shares == pytest.approx([1, 1, 2, 2, 2]) and columns == {"said": said}


def test_what_transfer_compares_is_what_the_encoders_give(toy):
    """y of the exo clips, F(x) of the ego clips: y beside itself would be a perfect score."""
    model, tokenizer = load(toy / "stage2")
    rows = read_manifest(toy / "toy/val.jsonl")[:4]
    exo, estimate, plain = evaluation.exo_features(model, tokenizer, rows)
    assert torch.allclose(exo, evaluation.encode_clips(model, tokenizer, rows, "exo"), atol=1e-5)
    own, second = evaluation.encode_clips(model, tokenizer, rows, "ego").chunk(2, dim=1)
    assert torch.allclose(estimate, second, atol=1e-5) and not torch.allclose(plain, second, atol=1e-2)


def test_the_kl_of_shuffled_partners_is_that_of_others(monkeypatch):
    exo = torch.randn(6, 8, 96, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(evaluation, "exo_features", lambda *_: (exo, exo, None))
    figures = evaluation.kl_true_vs_shuffled(None, None, None)
    assert figures["kl_true"] == pytest.approx(0, abs=1e-6) and figures["kl_shuffled"] > 0.1


def test_a_choice_is_between_the_own_clip_and_four_others(toy, monkeypatch):
    """A model that knows each clip's narration is always right, and the others are of the same scene, or of none but others."""
    rows = read_manifest(toy / "toy" / "test.jsonl")
    monkeypatch.setattr(evaluation, "narration_log_likelihood", lambda model, tokenizer, visual, pairs: np.array(
        [float(rows[number]["text"] == text) for number, text in pairs]))
    figures, _ = evaluation.choose_clip(None, None, rows, None)
    assert figures["mcq_inter"] == figures["mcq_intra"] == 1
    for item in range(len(rows)):
        scene = item // 5
        others = {kind: [n // 5 for n in evaluation.wrong_clips(rows, item, kind, np.random.default_rng(item))] for kind in ("inter", "intra")}
        assert scene not in others["inter"] and others["intra"] == [scene] * 4


def test_likelihood_is_the_sum_over_answer_tokens(toy):
    model, tokenizer = load(toy / "stage3")
    rows = read_manifest(toy / "toy" / "test.jsonl")[:3]
    visual = evaluation.encode_clips(model, tokenizer, rows, "ego")
    scores = evaluation.narration_log_likelihood(model, tokenizer, visual, [(2, rows[0]["text"])])
    ids, labels = tokenizer.chat([{"user": NARRATE, "assistant": rows[0]["text"]}], visual.shape[1])
    with torch.no_grad():
        embeddings = model.insert_visual_tokens(visual[2:], torch.tensor(ids))
        hidden = model.decoder(embeddings, Segments.packed([len(ids)]), torch.arange(len(ids)))
        log_p = model.decoder.logits(hidden).log_softmax(-1)
    supervised = [t for t in range(len(ids)) if labels[t] != -100]
    byhand = sum(float(log_p[t - 1, ids[t]]) for t in supervised)
    assert len(supervised) == len(tokenizer.encode(rows[0]["text"])) + 1 and abs(byhand - scores[0]) < 1e-3


def test_batched_answers_equal_single_ones(toy, monkeypatch):
    """They are asked in batches of one length: ragged prompts are slow. Answers come back in the asked order."""
    model, tokenizer = load(toy / "stage3")
    lengths = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda visual, prompts, **how: lengths.append([*map(len, prompts)]) or generate(visual, prompts, **how))
    rows = read_manifest(toy / "toy" / "test.jsonl")[:6]
    visual = evaluation.encode_clips(model, tokenizer, rows, "ego")
    asked = [row["turns"][0]["user"] for row in rows]
    alone = [evaluation.generate_answers(model, tokenizer, visual[i:i + 1], [q])[0] for i, q in enumerate(asked)]
    lengths.clear()
    assert evaluation.generate_answers(model, tokenizer, visual, asked) == alone
    assert all(len(set(batch)) == 1 for batch in lengths) and sorted(lengths) == lengths and sum(map(len, lengths)) == 6
    prompts = [[0] * n for n in (3, 1, 3, 3, 1, 2)]
    assert evaluation.batches_of_one_length(prompts, 2) == [[1, 4], [5], [0, 2], [3]]


def test_a_world_too_small_for_a_choice_is_refused(toy):
    """It looked for four other narrations for ever."""
    rows = read_manifest(toy / "toy" / "test.jsonl")[:5]
    with pytest.raises(DataError, match="tells 5 things, a choice needs 9"):
        evaluation.choose_clip(None, None, rows, None)


def test_ask_one_video(toy):
    video = toy / "toy" / "val" / "ego" / "0.mp4"
    code, out, _ = run(REPO / "eval.py", "--ckpt", toy / "stage3", "--video", video, "--ask", "Which hand am I using?",
                       "--start", 1, "--end", 2)
    assert len(out.strip()) > 0
    code, _, err = run(REPO / "eval.py", "--ckpt", toy / "stage3", "--video", "gone.mp4", "--ask", "What?", check=False)
    assert code != 0 and "gone.mp4" in err and "Traceback" not in err
    _, _, err = run(REPO / "eval.py", "--ckpt", toy / "stage3", "--video", video, input="What am I doing?\n")
    assert not err, err                                         # piped, or Ctrl-D
    code, _, err = run(REPO / "eval.py", "--ckpt", toy / "nowhere", check=False)
    assert code != 0 and "no checkpoint" in err and "Traceback" not in err


def test_a_checkpoint_is_scored_on_the_world_it_was_trained_on(toy, tmp_path):
    _, out, _ = run(REPO / "eval.py", "--ckpt", toy / "stage3")
    assert "ego narrations exact: " in out and " of 20, chance 0.4 %" in out
    # Scored again, stage 2 has the figures that its training left, those of its start among them.
    after_training = json.loads((toy / "stage2/eval.json").read_text())
    run(REPO / "eval.py", "--ckpt", toy / "stage2")
    assert json.loads((toy / "stage2/eval.json").read_text()) == after_training and "ego_em_init" in after_training
    code, _, err = run(REPO / "eval.py", "--ckpt", toy / "stage3", "--data", toy / "stage3", check=False)
    assert code and "is no micro-world (data.py toy" in err
    # The result on another world is not the run's own, nor is what the stage before had on this one.
    shutil.copytree(toy / "toy", tmp_path / "toy")
    code, _, err = run(REPO / "eval.py", "--ckpt", toy / "stage3", "--data", tmp_path / "toy", check=False)
    assert code and f"was not trained on {tmp_path}/toy: pass --out for its result there" in err
    run(REPO / "eval.py", "--ckpt", toy / "stage3", "--data", f"{toy}/stage3/../toy/")          # the same, in other words
    _, out, _ = run(REPO / "eval.py", "--ckpt", toy / "stage3", "--data", tmp_path / "toy", "--out", tmp_path / "there")
    assert (tmp_path / "there/eval.json").is_file() and "before this stage" not in out


def own_rows(toy):
    """Rows of every kind: a system text with two turns, a narration alone, a film that is not there, a question that is too long,
    and one whose answer nobody knows."""
    ego = {"video": "test/ego/0.mp4", "start": 1.0, "end": 2.0}
    turns = [{"system": "Be short.", "user": "What am I doing?", "assistant": "I cut."}, {"user": "Which hand?", "assistant": "The left."}]
    return [{"id": "both", "ego": ego, "text": "Camera-wearer cuts.", "turns": turns},
            {"id": "told", "ego": ego, "text": "\u5207\u3063\u3066"},
            {"id": "gone", "ego": {"video": "test/ego/gone.mp4"}, "text": "Camera-wearer cuts."},
            {"id": "long", "ego": ego, "turns": [{"user": "word " * 300, "assistant": "Yes."}]},
            {"id": "open", "ego": ego, "turns": [{"user": "Why?"}]},
            {"id": "exo alone", "exo": [ego], "text": "Camera-wearer cuts."}]


def test_every_row_of_a_file_is_answered_as_it_was_trained(toy):
    """Stage 3: the turns with what leads up to them, else the narration; answers, scores and pictures have names of their own."""
    (toy / "toy/held out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own_rows(toy)))
    names = ("eval.json", "predictions.jsonl", "samples.png")
    before = [(toy / "stage3" / name).read_bytes() for name in names]
    command = [REPO / "eval.py", "--ckpt", toy / "stage3", "--data", toy / "toy/held out.jsonl"]
    _, out, _ = run(*command, env={"PYTHONIOENCODING": "ascii"})            # a narrow terminal shows what it can
    assert [(toy / "stage3" / name).read_bytes() for name in names] == before
    head, *found = map(json.loads, (toy / "stage3/answers-held_out.jsonl").read_text().splitlines())
    assert [one["id"] for one in found] == ["both", "both turn 2", "told", "gone", "long", "open"]
    assert [one["truth"] for one in found] == ["I cut.", "The left.", "\u5207\u3063\u3066", "Camera-wearer cuts.", "Yes.", None]
    assert [one["question"] for one in found[:4]] == ["What am I doing?", "Which hand?", NARRATE, NARRATE]
    assert "gone.mp4 cannot be read" in found[3]["error"] and "tokens" in found[4]["error"] and "error" not in found[0]
    # By hand: the whole template, the system text before the video, the true answer of the turn before; as long as it fits.
    model, tokenizer = load(toy / "stage3")
    row = own_rows(toy)[0]
    frames = read_clip(toy / "toy/test/ego/0.mp4", 1, 2, model.cfg.frames, model.cfg.image_size)
    visual = model.encode_ego(torch.from_numpy(frames)[None])
    for one, chat in ((found[0], [row["turns"][0] | {"assistant": None}]), (found[1], [row["turns"][0], {"user": "Which hand?"}])):
        chat[-1].pop("assistant", None)
        ids, _ = tokenizer.chat(chat, visual.shape[1])
        assert tokenizer.decode(ids).count("Be short.") == 1
        reply, = model.generate(visual, [torch.tensor(ids)], eos=tokenizer.eos, max_new=model.cfg.max_length - len(ids))
        assert one["answer"] == tokenizer.decode(reply).strip() and one["right"] is (one["answer"] == one["truth"])
    figures = json.loads((toy / "stage3/answers-held_out.json").read_text())
    assert figures["rows without an ego clip"] == 1 and figures["answers"] == 6 and figures["exact_n"] == figures["rouge_l_n"] == 5 and figures["unreadable"] == 2
    assert figures["exact"] == np.mean([one["right"] for one in found[:5]]) and found[5]["right"] is None
    assert "answers exact: " in out and "ROUGE-L of the answers: " in out and "not shown: " in out and "\\u5207" in out
    assert (toy / "stage3/answers-held_out.png").stat().st_size > 5000
    # Done is done; other weights are refused; a reader of stdout who leaves ends nothing.
    (toy / "stage3/answers-held_out.json").unlink()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(300) == 0 and not errors, errors
    assert json.loads((toy / "stage3/answers-held_out.json").read_text()) == figures
    (toy / "stage3/answers-held_out.jsonl").write_text(json.dumps(head | {"weights": "others"}) + "\n")
    code, _, err = run(*command, check=False)
    assert code and "weights='others'" in err and "choose another --out" in err


def test_a_question_without_a_truth_is_answered_and_counted_apart(toy):
    model, tokenizer = load(toy / "stage3")
    ego = read_manifest(toy / "toy/test.jsonl")[0]["ego"]
    rows = [{"id": "a", "ego": ego, "turns": [{"user": "Is it red?", "assistant": "Yes."}, {"user": "Why?"}]}, {"id": "b", "ego": ego},
            {"id": "c", "exo": [ego], "text": "x"}]
    found = list(evaluation.answer_own(model, tokenizer, evaluation.own_items(rows[:2], stage=3), view="ego"))
    assert [(one["id"], one["question"], one["truth"]) for one in found] == [
        ("a", "Is it red?", "Yes."), ("a turn 2", "Why?", None), ("b", NARRATE, None)]
    assert [one["right"] is None for one in found] == [False, True, True]
    # Stages before the third narrate; the first of them sees exo clips.
    asked = [item.question for item in evaluation.own_items([rows[0] | {"text": "y"}], stage=2)]
    assert asked == [NARRATE] and [item.id for item in evaluation.own_items(rows, stage=1)] == ["c"]


def test_chance_is_a_draw_from_the_answers_to_the_same_question():
    asked = ["Is it red?", "Is it red?", "Which?", "Which?", "Which?", "Is it big?", "Is it wet?"]
    truths = ["yes", "no", "a", "b", "c", "yes", "no"]
    assert evaluation.guess_chance(asked, truths) == pytest.approx((2 / 2 + 3 / 3 + 2 / 2) / 7)
    assert evaluation.guess_chance(list("abcd"), ["yes", "no", "yes", "yes"]) == 0.5       # each of another question


def test_a_moved_base_is_named_and_another_one_refused(toy, tmp_path):
    shutil.copytree(toy / "stage1", tmp_path / "a" / "stage1")
    code, _, err = run(REPO / "eval.py", "--ckpt", tmp_path / "a" / "stage1", "--data", toy / "toy", check=False)
    assert code != 0 and "--base" in err
    model, _ = load_checkpoint(tmp_path / "a" / "stage1", base=toy / "stage0")
    assert model is not None
    # Stage 2 scores the learner of the moved run too.
    run(REPO / "train.py", "--stage", 2, "--data", toy / "toy", "--init", tmp_path / "a/stage1", "--base", toy / "stage0",
        "--out", tmp_path / "stage2", "--steps", 1)
    assert "ego_em_init" in json.loads((tmp_path / "stage2/eval.json").read_text())
    code, _, err = run(REPO / "eval.py", "--ckpt", tmp_path / "a" / "stage1", "--base", toy / "stage2", check=False)
    assert code != 0 and "not the base" in err


def test_predictions_are_what_the_figures_count(toy):
    for stage, view in ((1, "exo"), (3, "ego")):
        figures = json.loads((toy / f"stage{stage}" / "eval.json").read_text())
        rows = [json.loads(line) for line in (toy / f"stage{stage}" / "predictions.jsonl").read_text().splitlines()]
        assert len(rows) == figures[f"{view}_em_n"] and len({row["id"] for row in rows}) == len(rows)
        assert sum(row["said"] == row["text"] for row in rows) / len(rows) == pytest.approx(figures[f"{view}_em"])
    assert sum(r["reply"] == r["turns"][0]["assistant"] for r in rows) / len(rows) == pytest.approx(figures["qa"])
    for kind in ("inter", "intra"):
        outcomes = [row[kind] for row in rows if row[kind] is not None]
        assert len(outcomes) == figures[f"mcq_{kind}_n"]
        assert sum(outcomes) / len(outcomes) == pytest.approx(figures[f"mcq_{kind}"])


def test_a_chat_says_how_to_leave_and_begins_again_when_it_is_full(toy):
    video = toy / "toy" / "val" / "ego" / "0.mp4"
    asked = "What colour is the block I use?\n" * 12
    _, out, err = run(REPO / "eval.py", "--ckpt", toy / "stage3", "--video", video, input=asked)
    assert out.count("Ask about the video. An empty line ends the chat.\n") == 1 and not err
    assert "(more than the 256 tokens that the model reads: the chat begins again)" in out
    code, _, err = run(REPO / "eval.py", "--ckpt", toy / "stage3", "--video", video, "--ask", " ", check=False)
    assert code and "--ask needs a question; without --ask there is a chat" in err


def test_a_first_question_that_is_too_long_is_one_sentence(toy, capsys, monkeypatch):
    """Of --ask it is the end; a chat goes on. No answer grows longer than what the model reads."""
    args = ["--ckpt", str(toy / "stage3"), "--video", str(toy / "toy/val/ego/0.mp4")]
    with pytest.raises(SystemExit, match=r"^eval.py: \d+ tokens are as many as the 256 that this model reads, or more: a shorter question is needed$"):
        evaluation.main([*args, "--ask", "word " * 300])
    asked = iter(["word " * 300, "What am I doing?", "half \ud800 of a character", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    evaluation.main(args)
    out = capsys.readouterr().out
    assert out.count("a shorter question is needed\n") == 1 and len(out.split("is needed\n")[1].strip()) > 0 and "UTF-8" in out
    model, tokenizer = load(toy / "stage3")
    context = evaluation.prefill(model, tokenizer, {"video": toy / "toy/val/ego/0.mp4"})
    question = next("word " * n for n in range(300, 0, -1) if len(tokenizer.chat([{"user": "word " * n}], context.video_tokens)[0]) < 255)
    list(context.stream(question))
    assert context.cache.lens[0] + len(context.unread) - 1 <= 256
    # An answer for which there was no room left is called one.
    context = evaluation.prefill(model, tokenizer, {"video": toy / "toy/val/ego/0.mp4"})
    capsys.readouterr()
    evaluation.print_answer(context, question)
    assert capsys.readouterr().out.endswith(" (cut short)\n")
    replies = []
    monkeypatch.setattr(model, "generate", lambda *_, max_new, **__: replies.append(max_new) or [[]])
    context = evaluation.prefill(model, tokenizer, {"video": toy / "toy/val/ego/0.mp4"})
    context.generate("What?", 999)
    assert replies == [256 - context.start - len(context.prompt("What?")[0])]


@pytest.mark.parametrize("args, words", [
    (["--ask", "What?"], "--ask needs --video"), (["--start", "1"], "--start needs --video"), (["--bench", "egomcq"], "--bench needs --data"),
    (["--blind"], "--blind needs --bench"), (["--limit", "3"], "--limit needs --bench"), (["--answer", "letter"], "--answer needs --bench"),
    (["--bench", "egomcq", "--data", ".", "--video", "v.mp4"], "--bench does nothing with --video: give one of them"),
    (["--video", "v.mp4", "--data", "."], "--data does nothing with --video"), (["--video", "v.mp4", "--out", "o"], "--out does nothing with --video"),
    (["--video", "v.mp4", "--report"], "--report does nothing with --video"), (["--fps", "3"], "--fps needs --video"),
    (["--video", "v.mp4", "--fps", "3"], "--fps 3: images per second of a --video that is a folder"), (["--video", ".", "--fps", "0"], "--fps 0: images"),
    (["--bench", "egomcq", "--data", ".", "--root", "r"], "--root does nothing with --bench"),
    (["--bench", "egomcq", "--data", ".", "--limit", "0"], "--limit 0: 1 or more")])
def test_no_flag_is_passed_over_in_silence(capsys, args, words):
    with pytest.raises(SystemExit):
        evaluation.main(args)
    assert words in capsys.readouterr().err


def test_a_step_has_results_of_its_own(toy, tmp_path):
    """They do not stand for those of the run that goes on from it."""
    for name in ("stage0", "stage1"):
        shutil.copytree(toy / name, tmp_path / name)
    step = newest_checkpoint(tmp_path / "stage1")
    (tmp_path / "stage1/eval.json").write_text("{}")
    _, out, _ = run(REPO / "eval.py", "--ckpt", step, "--data", toy / "toy")
    assert (tmp_path / "stage1/eval.json").read_text() == "{}" and f"figures: {step}/eval.json" in out
    assert json.loads((step / "eval.json").read_text())["exo_em_n"] == 20


def test_a_figure_beside_a_score_is_printed_too(capsys):
    evaluation.print_figures(evaluation.proportion("qa", [1, 0], 0.5) | {"qa_seconds": 3.5, "rest": None})
    assert re.fullmatch(r"questions exact: 50.0 % .* chance 50.0 %\n   qa_seconds: 3.5\n   rest: None\n", capsys.readouterr().out)


def test_ego_video_is_not_for_the_demonstrator(toy):
    video = toy / "toy" / "val" / "ego" / "0.mp4"
    _, out, _ = run(REPO / "eval.py", "--ckpt", toy / "stage1", "--video", video, "--ask", "What am I doing?")
    assert "is of stage 1: ego video is for the learner of stages 2 and 3" in out
    _, out, _ = run(REPO / "eval.py", "--ckpt", toy / "stage2", "--video", video, "--ask", "What am I doing?")
    assert "is of stage" not in out


def test_ones_own_data_is_shown_after_training_and_asked_for(toy, tmp_path):
    """What was said beside what is true of five rows, a picture, the next command; eval.py alone shows the same."""
    own = ["--data", toy / "toy/instruct.jsonl", "--root", toy / "toy", "--out", tmp_path / "own"]
    _, out, _ = run(REPO / "train.py", *flags(toy, 3), *own, "--steps", 2)
    _, again, _ = run(REPO / "eval.py", "--ckpt", tmp_path / "own", "--base", toy / "stage0")
    asked = [json.loads(line)["turns"][0]["user"] for line in (toy / "toy/instruct.jsonl").read_text().splitlines()]
    for said in (out, again):
        shown = re.findall(r"^  (?:ok    |said  )(.*?[?.]) .*$", said, re.M)
        assert len(shown) == 5 and set(shown) <= set(asked)                 # the turns were trained, and are asked
        assert f"next: python eval.py --ckpt {tmp_path}/own --video FILE" in said
    assert (tmp_path / "own/samples.png").stat().st_size > 5000
    _, out, _ = run(REPO / "train.py", *flags(toy, 1), "--data", toy / "toy/pairs.jsonl", "--out", tmp_path / "exo", "--steps", 2)
    assert len(re.findall(r"^  (?:ok|said) ", out, re.M)) == 5


def test_a_sample_that_cannot_be_read_is_not_shown(toy, tmp_path, capsys):
    model, tokenizer = load(toy / "stage3")
    rows = read_manifest(toy / "toy" / "instruct.jsonl")[:5]
    rows[1]["ego"] = {"video": "/nowhere.mp4"}
    evaluation.show_own_samples(model, tokenizer, rows, 3, tmp_path)
    said = capsys.readouterr().out
    assert "not shown: /nowhere.mp4 cannot be read" in said and len(re.findall(r"^  (?:ok|said) ", said, re.M)) == 4


def test_ctrl_c_while_scoring_is_one_line(toy, monkeypatch):
    """The signal arrives while the benchmark works: on a tiny world a real one would often come too late."""
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    monkeypatch.setattr(evaluation, "toy_benchmark", interrupted)
    with pytest.raises(SystemExit, match="^\neval.py: stopped$"):
        evaluation.main(["--ckpt", str(toy / "stage3")])


def test_the_last_finished_stage_is_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluation.default_run() == "out/stage3"             # load_checkpoint says that there is none
    for stage, step in ((1, 9), (2, 9), (3, 4)):
        folder = tmp_path / f"out/stage{stage}/step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, "steps": 9}))
    assert evaluation.default_run() == "out/stage2"
    assert capsys.readouterr().out == "out/stage3 is not finished: out/stage2 is taken (--ckpt out/stage3 takes the other)\n"
    shutil.rmtree(tmp_path / "out/stage1")
    shutil.rmtree(tmp_path / "out/stage2")
    assert evaluation.default_run() == "out/stage3" and capsys.readouterr().out == ""


def test_what_is_next_can_be_typed(toy):
    """In any container, for the run's own folder; ego video is asked about from stage 2 on."""
    for stage in range(4):
        command = evaluation.next_command(stage, toy / f"stage{stage}", toy / "toy")
        assert command.startswith("python ") and str(toy / f"stage{stage}") in command and ("--video" in command) == (stage == 3)
        own = evaluation.next_command(stage, "out/mine")
        assert ("--video" in own) == (stage >= 2) and ("--stage 2 --init out/mine --data pairs.jsonl" in own) == (stage == 1)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_is_one_sentence(monkeypatch, error):
    def fail(args):
        raise error
    monkeypatch.setattr(evaluation, "use_checkpoint", fail)
    with pytest.raises(SystemExit, match="^eval.py: out of memory: .*$"):
        evaluation.main([])
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        evaluation.main([])


def test_samples_are_evenly_spread():
    assert evaluation.spread(list(range(200)), 50) == list(range(0, 200, 4)) and evaluation.spread([1, 2, 3], 5) == [1, 2, 3]
    assert evaluation.spread(list(range(10)), 4) == [0, 2, 5, 7]


def test_own_samples_do_not_stumble_over_a_text_that_training_never_read(toy, tmp_path, capsys):
    """A row whose turns fit is trained in stage 3, however long its narration is."""
    model, tokenizer = load(toy / "stage3")
    rows = read_manifest(toy / "toy" / "instruct.jsonl")[:5]
    rows[2]["text"] = "word " * 300
    evaluation.show_own_samples(model, tokenizer, rows, 3, tmp_path)
    assert len(re.findall(r"^  (?:ok|said) ", capsys.readouterr().out, re.M)) == 5
    # Pairs without any text are a stage 2 of their own (KL and cycle): there is nothing to set a sample beside.
    for row in rows:
        row["text"], row["turns"] = None, []
    evaluation.show_own_samples(model, tokenizer, rows, 2, tmp_path)
    assert capsys.readouterr().out == "none of 5 rows has an ego clip and a text: there is no sample to show\n"


def test_stage_2_tells_what_F_is_good_for(toy):
    """Before and after, and F(x) replaced by its mean: each a score with chance and interval."""
    figures = json.loads((toy / "stage2/eval.json").read_text())
    for name, chance in (("ego_em_init", 1 / 270), ("ego_em_mean_F", 1 / 270), ("transfer_top1", 1 / 4), ("transfer_x_top1", 1 / 4),
                         ("transfer_scene_top1", 1 / 5), ("transfer_scene_x_top1", 1 / 5)):
        assert figures[f"{name}_chance"] == pytest.approx(chance) and figures[f"{name}_lo"] <= figures[name] <= figures[f"{name}_hi"]
    assert figures["transfer_top1_n"] == 4 and figures["transfer_scene_top1_n"] == 20
    assert 1 <= figures["transfer_median_rank"] <= 4 and figures["transfer_median_rank_chance"] == 2.5
    # The learner after Init is what stage 1's checkpoint holds.
    model, tokenizer = load(toy / "stage1")
    rows = read_manifest(toy / "toy/test.jsonl")
    said = evaluation.generate_answers(model, tokenizer, evaluation.encode_clips(model, tokenizer, rows, "ego"), [NARRATE] * 20)
    assert figures["ego_em_init"] == np.mean([a == row["text"] for a, row in zip(said, rows)])


def test_the_mean_of_F_says_nothing_of_the_clip(toy, monkeypatch):
    """The decoder gets x as it was and, of F(x), the same for every clip."""
    seen = []
    monkeypatch.setattr(evaluation, "generate_answers", lambda model, tokenizer, visual, questions: seen.append(visual) or questions)
    visual = torch.randn(6, 8, 3)
    model = Namespace(cfg=Namespace(visual_tokens=4))
    evaluation.narrate_with_mean_F(model, None, [{"text": ""}] * 6, visual)
    assert torch.equal(seen[0][:, :4], visual[:, :4])
    assert torch.allclose(seen[0][:, 4:], visual[:, 4:].mean(0).expand(6, 4, 3)) and seen[0].shape == visual.shape


def test_transfer_ranks_the_true_clip_by_the_losss_distance(toy, tmp_path, monkeypatch):
    """A perfect F finds every clip, an F that gives another clip's features finds that one, and equal ones go by number."""
    rows = read_manifest(toy / "toy/test.jsonl")
    exo = torch.randn(20, 4, 16, generator=torch.Generator().manual_seed(0))
    wrong = exo.roll(-5, 0)                                     # the next scene's
    monkeypatch.setattr(evaluation, "exo_features", lambda *_: (exo, exo, wrong))
    figures = evaluation.transfer(None, None, rows, tmp_path / "transfer.png")
    assert figures["transfer_top1"] == figures["transfer_scene_top1"] == 1 and figures["transfer_median_rank"] == 1
    assert figures["transfer_x_top1"] == 0 and figures["transfer_x_median_rank"] > 1
    orders = evaluation.rank_exo_clips(exo, wrong)
    assert [order[0] for order in orders] == [(i + 5) % 20 for i in range(20)]
    for order, estimate in zip(orders, wrong):
        apart = [float(feature_kl(y[None], estimate[None])) for y in exo]
        assert order == sorted(range(20), key=apart.__getitem__)
    assert evaluation.rank_exo_clips(exo[:1].expand(3, -1, -1), exo[:2]) == [[0, 1, 2], [0, 1, 2]]


def test_the_picture_of_transfer_frames_the_true_clip_alone(toy, tmp_path, monkeypatch):
    rows = read_manifest(toy / "toy/test.jsonl")[::5]
    images = []
    monkeypatch.setattr(evaluation, "encode_png", lambda image: images.append(image) or b"")
    evaluation.show_transfer(tmp_path / "a.png", rows, [[0, 1, 2, 3], [0, 1, 2, 3], [3, 1, 0, 2], [0, 1, 2, 3]])
    green = (images[0] == evaluation.GREEN).all(-1)
    # Titles are 26 pixels high, a row 112 and its caption 26; tiles are 216 wide: rank 1, 2, 4 and 4.
    corners = [[bool(green[26 + 138 * row, 216 * column]) for column in range(5)] for row in range(4)]
    assert corners == [[False, False, True, False, False], [False, False, False, True, False], [False] * 5, [False] * 5]
