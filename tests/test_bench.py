"""EgoBench: metrics against independent oracles, and every benchmark through the whole command on tiny files."""
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, run

import data
import eval
from data import DataError, Tokenizer, read_clip, write_video
from eval import VideoContext, charades_map, parse_letter, retrieval_metrics, rouge_l
from model import load_checkpoint, newest_checkpoint


# ------------------------------------------------------------------------------------- oracles, written plainly
def oracle_map(sim, rel):
    """EK-100's mAP, query by query in plain loops."""
    total = 0.0
    for s, r in zip(sim, rel):
        ranked = [r[j] for j in sorted(range(len(s)), key=lambda j: (-s[j], j))]
        hits = [k for k, value in enumerate(ranked) if value == 1.0]
        total += sum(sum(ranked[:k + 1]) / (k + 1) for k in hits) / len(hits)
    return total / len(sim)


def oracle_ndcg(sim, rel):
    total = 0.0
    for s, r in zip(sim, rel):
        order = sorted(range(len(s)), key=lambda j: (s[j], j))[::-1]        # ties the other way round
        k = sum(value > 0 for value in r)
        gain = sum(r[j] / math.log2(i + 2) for i, j in enumerate(order[:k]))
        total += gain / sum(value / math.log2(i + 2) for i, value in enumerate(sorted(r, reverse=True)[:k]))
    return total / len(sim)


def relevancies(rng, videos=40, texts=17):
    """Like EK-100's: verb equal or not, overlap of noun sets; every row and column has an exact match."""
    rel = rng.choice([0, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1], (videos, texts), p=[.6, .05, .1, .05, .1, .05, .05])
    rel[np.arange(videos), np.arange(videos) % texts] = 1
    return rel


@pytest.mark.parametrize("ties", (False, True))
def test_retrieval_is_the_official_arithmetic(ties):
    rng = np.random.default_rng(0)
    rel = relevancies(rng)
    sim = rng.normal(size=rel.shape)
    sim = np.round(sim) if ties else sim
    got = retrieval_metrics(sim, rel)
    for name, oracle in (("mAP", oracle_map), ("nDCG", oracle_ndcg)):
        v2t, t2v = oracle(sim, rel), oracle(sim.T, rel.T)
        assert abs(got[f"{name}_V2T"] - v2t) < 1e-9 and abs(got[f"{name}_T2V"] - t2v) < 1e-9
        assert abs(got[f"{name}_avg"] - (v2t + t2v) / 2) < 1e-9
    assert set(got) == {f"{m}_{d}" for m in ("mAP", "nDCG") for d in ("V2T", "T2V", "avg")}


def test_retrieval_extremes():
    rng = np.random.default_rng(1)
    rel = relevancies(rng, 60, 30)
    assert retrieval_metrics(rel, rel)["mAP_avg"] == 1 and abs(retrieval_metrics(rel, rel)["nDCG_avg"] - 1) < 1e-12
    binary = retrieval_metrics((rel == 1).astype(float), rel)
    assert binary["mAP_avg"] == 1 and binary["nDCG_avg"] < 1            # ties destroy nDCG
    noise, constant = (retrieval_metrics(s, rel)["mAP_avg"] for s in (rng.normal(size=rel.shape), np.zeros_like(rel)))
    assert noise < 0.4 and constant < 0.4                               # chance, not 100
    s = rng.normal(size=rel.shape)
    textbook = np.mean([np.mean([(np.cumsum(r == 1) / np.arange(1, len(r) + 1))[k] for k in np.flatnonzero(r == 1)])
                        for r in np.take_along_axis(rel, np.argsort(-s), 1)])
    assert retrieval_metrics(s, rel)["mAP_V2T"] > textbook + 0.1        # graded precision is not the textbook's


def test_charades_is_the_official_arithmetic():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(50, 12)), (rng.random((50, 12)) < 0.2).astype(int)
    labels[7] = 0                                           # a row without any label: ranked last whatever its scores
    scores[7] = 99
    labels[:, 3] = 0                                        # a class without a positive
    each = []
    for c in range(12):
        order = sorted(range(50), key=lambda i: (-(scores[i, c] if labels[i].any() else -math.inf), i))
        hits = [k for k, i in enumerate(order) if labels[i, c]]
        each.append(sum((n + 1) / (k + 1) for n, k in enumerate(hits)) / len(hits) if hits else math.nan)
    got = charades_map(scores, labels)
    assert math.isnan(got["mAP"]) and abs(got["nanmAP"] - np.nanmean(each)) < 1e-9
    kept = [c for c in range(12) if c != 3]
    assert abs(charades_map(scores[:, kept], labels[:, kept])["mAP"] - np.nanmean(each)) < 1e-9


def test_letters_are_parsed_strictly():
    for reply, letter in (("B", 1), ("(B)", 1), (" B. ", 1), ("B) to the door", 1), ("A: yes", 0), ("(D) Stop", 3), ("C\n", 2)):
        assert parse_letter(reply, 4) == letter, reply
    for reply, letter in (("(A).", 0), ("(B): text", 1), ("A).", 0), ("**B**", 1), ("**C.** I cut", 2)):
        assert parse_letter(reply, 4) == letter, reply
    for reply in ("A.M. routine", "B\nBecause"):
        assert parse_letter(reply, 4) == {"B\nBecause": 1}.get(reply), reply
    for reply in ("", "A man walks", "Based on the video, B", "b", "E", "(E)", "AB", "the answer is B", "?", "None"):
        assert parse_letter(reply, 4) is None, reply


def test_a_reply_that_names_a_second_option_is_no_choice():
    """A list of all of them was counted as A. Words behind the letter may hold capitals, and even the letter again."""
    for reply in ("A.\nB.\nC.\nD.", "A\nB", "A. B. C. D.", "(A) (B) (C) (D)", "A. left B. right", "A. left\nB. right", "C) or D)", "A) x, B) y", "A: x; B: y",
                  "A. x\nB. y\nAnswer: B", "A. B", "A.\n\nB.", "A. put box (B) take bag", "A, B", "A and B", "A. or B.", "A or B", "(A) or (C)", "A/B", "- A.\n- B.", "E.\nB."):
        assert parse_letter(reply, 4) is None, reply
    for reply, letter in (("B. A man walks", 1), ("B. Vitamin C.", 1), ("B. Turn left or D", 1), ("A.\nA.", 0), ("C. I cut it.\n\nThe hand moves.", 2), ("B: the A team", 1), ("B) take a U-turn", 1)):
        assert parse_letter(reply, 4) == letter, reply


def test_rouge_is_of_the_longest_common_subsequence():
    assert rouge_l("the cat sat", "The cat, sat!") == 1 and rouge_l("", "x") == 0 == rouge_l("a b", "c")
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police kill the gunman") == pytest.approx(0.5)
    # Words of any script: an exact answer in Japanese had 0.
    assert rouge_l("\u5207\u3063\u3066", "\u5207\u3063\u3066") == 1 and rouge_l("caf\u00e9", "caf") == 0


# -------------------------------------------------------------------------------- scoring on a cached video
@pytest.fixture(scope="module")
def learner(toy):
    model, _ = load_checkpoint(toy / "stage3", toy / "stage0")
    return model, Tokenizer(newest_checkpoint(toy / "stage3"))


def test_cached_prefix_and_packed_options_score_like_each_pair_alone(learner):
    model, tokenizer = learner
    visual = model.encode_ego(torch.randint(0, 255, (1, 4, 3, 48, 48), dtype=torch.uint8))
    pairs = [(q, a) for q in ("What am I doing?", "Which hand am I using?", "Is it red?") for a in ("The left hand.", "Yes.", "I cut it.", "No")]
    got = VideoContext(model, tokenizer, visual).score(pairs, batch=5)
    for (question, text), (total, mean) in zip(pairs, got):
        ids, labels = tokenizer.chat([{"user": question, "assistant": text}], visual.shape[1])
        alone = model.log_likelihood(visual, torch.tensor(ids), torch.tensor(labels), [len(ids)])
        assert abs(float(alone) - total) < 1e-4 and mean == pytest.approx(total / sum(label != -100 for label in labels), abs=1e-6)
    order = [7, 2, 11, 0, 5, 3, 9, 1, 10, 4, 8, 6]
    again = VideoContext(model, tokenizer, visual).score([pairs[i] for i in order])
    assert np.abs(again - got[order]).max() < 1e-4                      # the order of options changes nothing


def test_replies_from_the_cache_are_the_plain_ones_and_a_chat_goes_on(learner):
    model, tokenizer = learner
    visual = model.encode_ego(torch.randint(0, 255, (1, 4, 3, 48, 48), dtype=torch.uint8))
    questions = ["What am I doing?", "Which hand am I using?"]
    plain = eval.generate_answers(model, tokenizer, visual.expand(2, -1, -1), questions, max_new=12)
    seen = VideoContext(model, tokenizer, visual)
    assert [seen.generate(question, 12) for question in questions] == plain
    assert [seen.generate(question, 12) for question in questions[::-1]] == plain[::-1]
    chat = VideoContext(model, tokenizer, visual)
    first = "".join(chat.stream(questions[0], 12)).strip()
    assert first == plain[0]
    length = chat.cache.lens[0]
    "".join(chat.stream(questions[1], 12))
    assert chat.cache.lens[0] > length


# ----------------------------------------------------------------------------- the whole command, tiny file sets
QUESTIONS = 6
Done = namedtuple("Done", "returncode stdout stderr")


def file_sets(root, toy):
    """Every benchmark's files as its publishers name them, on videos of the micro-world's test split."""
    def put(bench, name, content):
        path = root / bench / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    videos = root / "videos"
    videos.mkdir(parents=True)
    rows = [json.loads(line) for line in (toy / "toy" / "test.jsonl").read_text().splitlines()]
    for i, name in enumerate(sorted({row["ego"]["video"] for row in rows})[:4]):
        for alias in (f"v{i}.mp4", f"left/{i}.mp4", f"27k|P1|{i}|9.mp4"):
            (videos / alias).parent.mkdir(exist_ok=True)
            (videos / alias).write_bytes((toy / "toy" / name).read_bytes())
    put("egoschema", "questions.json", [{"q_uid": f"v{i % 4}", "google_drive_id": "x", "question": f"Why <script>alert({i})</script>?"}
                                        | {f"option {k}": f"C does {k} {i}" for k in range(5)} for i in range(4)])
    put("egoschema", "subset_answers.json", {"v0": 3, "v1": 4, "v2": 0})
    closed = [{"video_id": f"v{i % 4}", "sample_id": f"s{i}_0", "question": "Where is it?", "answer": f"on {i}", "moment_start_frame": 1.5,
               "moment_end_frame": 9, "wrong_answers": ["under", "inside", "gone"]} for i in range(QUESTIONS)]
    put("qaego4d-closed", "annotations.QaEgo4D_test_close.json", closed)
    put("qaego4d-open", "annotations.test.json", [{k: v for k, v in q.items() if k != "wrong_answers"} for q in closed])
    for kind in ("direct", "indirect"):
        put(f"egotaskqa-{kind}", "test_qas.json", [{"interval": f"27k|P1|{i % 4}|9", "question": "What?", "answer": ("yes", "cup", "unheard of")[i % 3],
                                                    "question_id": i} for i in range(QUESTIONS)])
        put(f"egotaskqa-{kind}", "answer_set.txt", "yes\nno\ncup\nred block\n")
    put("charades-ego", "Charades_v1_classes.txt", "".join(f"c{k:03d} Doing {k}\n" for k in range(5)))
    put("charades-ego", "CharadesEgo_v1_test_only1st.csv", "id,subject,scene,actions,length\n" + "".join(
        f'v{i},S,K,"{a}",5\n' for i, a in enumerate(("c001 0.0 2.0;c003 1.0 2.0;c001 3 4", "c000 0 1", "", "c002 1 2;c004 0 5"))))
    head = "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
    put("ek100-mir", "EPIC_100_retrieval_test.csv", head + "".join(
        f"P_{i},P,v{i % 4},00:00:00.5,00:00:0{i % 3}.10,00:00:0{i % 3}.90,1,2,{text},take,{verb},plate,2,['a'],\"{nouns}\"\n"
        for i, (text, verb, nouns) in enumerate((("take plate", 0, [2]), ("wash plate", 1, [2, 3]), ("take cup", 0, [4]), ("take plate", 0, [2])))))
    put("ek100-mir", "EPIC_100_retrieval_test_sentence.csv", "narration_id,narration\nP_2,take cup\nP_0,take plate\nP_1,wash plate\n")
    put("egoplan", "EgoPlan_validation.json", [{"sample_id": 10 + i, "video_source": "Ego4D", "video_id": f"v{i % 4}", "task_goal": "Store cereal.",
                                                "question": "?", "choice_a": "put box", "choice_b": "take bag", "choice_c": "take bag", "choice_d": "open",
                                                "golden_choice_idx": "ABCD"[i % 4], "answer": "x", "current_observation_frame": 20,
                                                "task_progress_metadata": [{"narration_text": "t", "start_frame": 4, "stop_frame": 9}][:i % 2]}
                                               for i in range(QUESTIONS)])
    turns = ["Turn left and move forward", "Turn right and move forward", "Move forward", "Stop"]
    plans = [{"sample_id": f"v{i % 4}_{i}", "domain": ("Work", "Hobbies")[i % 2], "scenario": "baking", "task_goal": "Bake pastry.", "choice_a": "open oven",
              "choice_b": "put tray", "choice_c": "wait", "choice_d": "stir", "golden_choice_idx": "ABCD"[i % 4], "answer": "x", "task_start_frame": 2,
              "current_observation_frame": 20, "task_progress_metadata": [{"narration_text": "t", "start_frame": 4, "stop_frame": 9}][:i % 2]}
             for i in range(QUESTIONS)]
    put("egoplan2", "EgoPlan-Bench2.json", plans)
    put("egoexomem", "qa_merged_v6.json", [{"qa_id": f"m{i}", "qa_type": f"Q{i % 8 + 1}", "take_name": f"take_{i % 2}", "scenario": "Cooking", "required_view":
                                            ("ego", "exo", "either")[i % 3], "question": "What did I take first?", "options": ["pan", "pot", "lid", "cup"],
                                            "correct_answer": i % 4, "verification": {"timestamps": [3.5]}, "idx": i} for i in range(QUESTIONS)])
    for take in range(2):
        ego = videos / f"takes/take_{take}/frame_aligned_videos/aria01_214-1.mp4"
        ego.parent.mkdir(parents=True)
        ego.write_bytes((videos / f"v{take}.mp4").read_bytes())
    put("vln-qa", "egocentric_navigation.json", [{"video": f"left/{i % 4}.mp4", "question": "What next?", "candidates": turns, "answer": turns[i % 4]}
                                                 for i in range(QUESTIONS)])
    put("egomcq", "egomcq.json", {str(i): {"answer": i % 5, "types": 1 + i % 2, "query": {"clip_text": "#C C picks up the red block"}, "choices": {
        str(k): {"video_uid": f"v{k % 4}", "clip_start": str(k * 0.5 - 0.2), "clip_end": k * 0.5 + 0.7, "clip_text": "x"} for k in range(5)}}
        for i in range(QUESTIONS)})
    return root


def bench(data, out, toy, name, *flags, **options):
    """The whole command -> its exit code and what it printed."""
    return Done(*run(REPO / "eval.py", "--bench", name, "--data", data, "--videos", data / "videos", "--ckpt", toy / "stage3", "--base", toy / "stage0",
               "--out", out, *flags, **options))


@pytest.fixture(scope="module")
def sets(tmp_path_factory, toy):
    return file_sets(tmp_path_factory.mktemp("benches"), toy)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, sets, toy):
    out = tmp_path_factory.mktemp("results")
    bench(sets, out, toy, "all")
    return out


def test_every_benchmark_gives_predictions_and_a_score(scored):
    for name in eval.BENCHES:
        figures = json.loads((scored / f"{name}.json").read_text())
        lines = (scored / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == 1 + figures["items"] and figures["unreadable"] == 0, name
        assert 0 <= figures["score_lo"] <= figures["score"] <= figures["score_hi"] <= 1 and figures["score_n"] and figures["git"], name
        # Half of EgoPlan's questions here have the right option twice; one of EgoTaskQA's three truths is no option.
        assert figures["score_chance"] == pytest.approx({"egoschema": .2, "qaego4d-closed": .25, "qaego4d-open": 0, "egoplan": .375, "vln-qa": .25,
                                                         "egoplan2": .25, "egoexomem": .25, "egomcq": .2, "egotaskqa-direct": 1 / 6, "egotaskqa-indirect": 1 / 6}.get(name, figures["score_chance"]))
    assert json.loads((scored / "egoschema.json").read_text())["score_n"] == 3            # the public answers
    said = [json.loads(line) for line in (scored / "qaego4d-open.jsonl").read_text().splitlines()[1:]]
    assert all({"id", "question", "answer", "reply"} < row.keys() for row in said)        # anyone can judge them
    assert [row["answer"] for row in said] == [f"on {i}" for i in range(QUESTIONS)]
    assert {"inter", "intra"} < set(json.loads((scored / "egomcq.json").read_text()))
    assert {"mAP_V2T", "nDCG_avg", "nDCG_avg_chance"} < set(json.loads((scored / "ek100-mir.json").read_text()))
    assert {"binary", "open"} < set(json.loads((scored / "egotaskqa-direct.json").read_text()))
    assert {"Work", "Hobbies"} < set(json.loads((scored / "egoplan2.json").read_text()))
    figures = json.loads((scored / "egoexomem.json").read_text())
    assert {"ego", "exo", "either"} < set(figures) and "of the ego video alone" in figures["note"]
    assert "3.5" not in (scored / "egoexomem.jsonl").read_text()                          # when the answer is seen


def test_the_relevancies_and_columns_of_ek100(sets):
    items = list(eval.convert(eval.ek100, Namespace(root=str(sets / "ek100-mir"), bench="ek100-mir")))
    assert items[0].options == ["take cup", "take plate", "wash plate"]
    assert [item.answer for item in items] == [[0.5, 1.0, 0.25], [0.0, 0.25, 1.0], [1.0, 0.5, 0.0], [0.5, 1.0, 0.25]]


def test_likelihoods_are_the_plain_ones(scored, sets, learner):
    """One prediction recomputed without cache and packing, and the letters of no path in the prompt."""
    model, tokenizer = learner
    row = json.loads((scored / "vln-qa.jsonl").read_text().splitlines()[1])
    frames = read_clip(row["clips"][0]["video"], None, None, 4, 48)
    visual = model.encode_ego(torch.from_numpy(frames)[None])
    for text, score in zip(row["options"], row["scores"]):
        ids, labels = tokenizer.chat([{"user": row["question"], "assistant": text}], visual.shape[1])
        total = model.log_likelihood(visual, torch.tensor(ids), torch.tensor(labels), [len(ids)])
        assert abs(float(total) / sum(label != -100 for label in labels) - score) < 1e-4


def test_equal_texts_count_both_and_constant_scores_give_chance():
    item = eval.Item("x", [{}], "?", ["put", "take", "take", "open"], 1)
    assert eval.outcome(item, {"scores": [0, 1, 1, 0]}) == 1 and eval.outcome(item, {"scores": [0, 0, 9, 0]}) == 1
    assert eval.outcome(item, {"scores": [0, 0, 0, 0]}) == 0.5 and eval.outcome(item, {"error": "gone"}) == 0
    assert item.chance() == 0.5
    # An open question has no options to guess from, but yes or no are two.
    assert [eval.Item("x", [{}], "?", [], answer).chance() for answer in ("on it", "Yes.", "no")] == [0, 0.5, 0.5]
    assert eval.outcome(eval.Item("x", [{}], "?", [], ""), {"error": "gone"}) == 0       # an empty truth, a video not read
    four = eval.Item("x", [{}], "?", list("abcd"), 2)
    assert eval.outcome(four, {"scores": [1] * 4}) == 0.25
    assert eval.outcome(eval.Item("x", [{}] * 5, "text", [], 4), {"scores": [0, 0, 0, 0, 1]}) == 1
    outside = eval.Item("x", [{}], "?", ["yes"])
    outside.answer = eval.OUTSIDE                           # of the vocabulary
    assert eval.outcome(outside, {"scores": [1.0]}) == 0


def test_the_key_of_shuffled_options_is_the_true_one(sets):
    for i, item in enumerate(read_items(sets / "qaego4d-closed", "qaego4d-closed")):
        assert item.options[item.answer] == f"on {i}"


def test_the_kinds_of_egomcq_are_its_own(tmp_path):
    (tmp_path / "egomcq.json").write_text(json.dumps({"0": MCQ, "1": MCQ | {"types": 2}}))
    assert [item.kind for item in read_items(tmp_path, "egomcq")] == ["inter", "intra"]


def test_what_the_video_adds_ranks_the_best_texts():
    """Of three texts the first is likelier with the video, the second less likely, the third as before."""
    context = Namespace(score=lambda pairs: np.array([[0, {"a": -1.0, "b": -3.0, "c": -2.0}[text]] for _, text in pairs]))
    visual = torch.tensor([[[3.0, 2.0, 1.0]]])
    scores = eval.score_texts(context, visual, list("abc"), (0.0, torch.eye(3), np.full(3, -2.0)))
    assert np.argsort(scores)[::-1].tolist() == [0, 2, 1]


def test_the_interval_of_a_mean_precision_is_that_of_its_classes():
    labels = [0, 1, 2, 0, 1, 0]
    items = [eval.Item(str(i), [{}], "?", ["a", "b", "c"], [label]) for i, label in enumerate(labels)]
    scores = np.random.default_rng(1).normal(size=(6, 3))
    figures = eval.ranking_figures(eval.BENCHES["charades-ego"], items, [{"scores": row.tolist()} for row in scores])
    normal = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    each = eval.class_precision(normal, np.eye(3)[labels])
    assert each.std() > 0.1 and figures["score"] == pytest.approx(each.mean())
    assert figures["score"] - figures["score_lo"] == pytest.approx(min(each.mean(), 1.96 * each.std() / 3 ** 0.5))


def test_letters_are_asked_once_and_failures_counted(sets, toy, tmp_path):
    bench(sets, tmp_path, toy, "qaego4d-closed", "--answer", "letter")
    figures = json.loads((tmp_path / "qaego4d-closed.json").read_text())
    assert figures["items"] == figures["score_n"] == QUESTIONS
    assert 0 <= figures["parser_failures"] <= QUESTIONS
    rows = [json.loads(line) for line in (tmp_path / "qaego4d-closed.jsonl").read_text().splitlines()[1:]]
    assert len({row["options"].index(f"on {i}") for i, row in enumerate(rows)}) > 1          # the right one stands anywhere


def test_a_killed_run_goes_on_and_two_ranks_equal_one(scored, sets, toy, tmp_path):
    whole = (scored / "qaego4d-open.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "qaego4d-open.jsonl").write_text("".join(lines[:3]) + lines[3][:20])            # a kill inside the third
    done = bench(sets, tmp_path, toy, "qaego4d-open")
    assert (tmp_path / "qaego4d-open.jsonl").read_text() == whole and "2 of them done" in done.stdout
    assert (tmp_path / "qaego4d-open.json").read_text() == (scored / "qaego4d-open.json").read_text()
    two = tmp_path / "two"
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", REPO / "eval.py", "--bench", "vln-qa",
                    "--data", sets, "--videos", sets / "videos", "--ckpt", toy / "stage3", "--base", toy / "stage0", "--out", two], check=True,
                   capture_output=True, timeout=300)
    a, b = ((folder / "vln-qa.jsonl").read_text().splitlines() for folder in (scored, two))
    assert a == b and (two / "vln-qa.json").read_text() == (scored / "vln-qa.json").read_text()
    wrong = bench(sets, tmp_path, toy, "qaego4d-open", "--prompt", "task", check=False)
    assert wrong.returncode and "prompt='base', this run has 'task'" in wrong.stderr


def test_questions_in_other_words_are_another_run_and_older_code_is_named(scored, sets, toy, tmp_path):
    """A fork's own template was scored with what the former one had been answered, under the new revision."""
    head, *rows = (scored / "vln-qa.jsonl").read_text().splitlines()
    head = json.loads(head)

    def put(**change):
        (tmp_path / "vln-qa.jsonl").write_text("\n".join([json.dumps(head | change), *rows]) + "\n")
    put(words=[data.NARRATE, "Other words?"])
    wrong = bench(sets, tmp_path, toy, "vln-qa", check=False)
    assert wrong.returncode and "was made with words=['Narrate the video.', 'Other words?'], this run has" in wrong.stderr
    put(git="0123abc")
    for _ in range(2):
        assert f"{QUESTIONS} of them done" in bench(sets, tmp_path, toy, "vln-qa").stdout
        assert json.loads((tmp_path / "vln-qa.json").read_text())["git"] == f"0123abc + {head['git']}"


def test_a_part_of_a_benchmark_is_called_one(sets, toy, tmp_path):
    done = bench(sets, tmp_path, toy, "vln-qa", "--limit", 2)
    assert json.loads((tmp_path / "vln-qa.json").read_text())["note"].startswith(f"2 of {QUESTIONS} items alone; ") and "items alone" in done.stdout


def test_ctrl_c_leaves_a_usable_part(sets, toy, tmp_path):
    process = subprocess.Popen([sys.executable, REPO / "eval.py", "--bench", "egomcq", "--data", sets, "--videos", sets / "videos", "--ckpt",
                                toy / "stage3", "--base", toy / "stage0", "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "egomcq.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and (not part.is_file() or len(part.read_text().splitlines()) < 2) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode:                                  # it may have been done already
        assert "the same command goes on" in errors and "Traceback" not in errors, errors
    bench(sets, tmp_path, toy, "egomcq")
    assert len(part.read_text().splitlines()) == 1 + QUESTIONS


def test_blind_is_reported_beside_the_score_and_the_page_is_safe(scored, sets, toy):
    bench(sets, scored, toy, "egoschema", "--blind")
    bench(sets, scored, toy, "egoschema", "--report")
    page = (scored / "report.html").read_text()
    blind = json.loads((scored / "egoschema-blind.json").read_text())["score"]
    assert re.search(rf"<td>egoschema(<td>.*?){{4}}<td>{100 * blind:.1f}<td>61.3", page) and page.count("not run") == len(eval.BENCHES) - 1
    assert page.count("These figures show that the programs work") == 1 and "the checkpoint is a toy" in page
    figures = json.loads((scored / "egoschema.json").read_text())
    assert f"{figures['ckpt']}, code {figures['git']}</small>" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "") and all(name in page for name in eval.BENCHES)


@pytest.mark.parametrize("name, file, words", (
    ("egoschema", "questions.json", "lacks 'question'|lacks 'option 0'|lacks 'q_uid'"), ("egoplan", "EgoPlan_validation.json", "lacks"),
    ("egomcq", "egomcq.json", "lacks"), ("ek100-mir", "EPIC_100_retrieval_test.csv", "lacks"),
    ("charades-ego", "CharadesEgo_v1_test_only1st.csv", "lacks")))
def test_a_missing_field_or_file_is_named(sets, tmp_path, name, file, words):
    from data import DataError
    o = Namespace(root=str(tmp_path / name), bench=name, answer="likelihood")
    shutil.copytree(sets / name, tmp_path / name)
    text = (tmp_path / name / file).read_text()
    broken = re.sub(r'"(question|choice_a|answer|clip_start|types)":', '"gone":', text) if file.endswith("json") else (
        text.replace("all_noun_classes", "gone").replace("actions", "gone"))
    (tmp_path / name / file).write_text(broken)
    with pytest.raises(DataError, match=f"{file}.*({words})"):
        list(eval.convert(eval.BENCHES[name].reader, o))
    (tmp_path / name / file).unlink()
    with pytest.raises(DataError, match=f"{file} is missing"):
        list(eval.convert(eval.BENCHES[name].reader, o))


def test_a_video_that_cannot_be_read_counts_as_wrong(sets, toy, tmp_path):
    shutil.copytree(sets / "vln-qa", tmp_path / "vln-qa")
    content = json.loads((tmp_path / "vln-qa/egocentric_navigation.json").read_text())
    content[1]["video"] = "left/gone.mp4"
    (tmp_path / "vln-qa/egocentric_navigation.json").write_text(json.dumps(content))
    shutil.copytree(sets / "videos", tmp_path / "videos")
    bench(tmp_path, tmp_path / "r", toy, "vln-qa")
    figures = json.loads((tmp_path / "r/vln-qa.json").read_text())
    assert figures["unreadable"] == 1 and figures["score_n"] == QUESTIONS
    assert "<br>1 unreadable<" in eval.write_report(tmp_path / "r").read_text()
    content[1]["video"] = "../../outside.mp4"
    (tmp_path / "vln-qa/egocentric_navigation.json").write_text(json.dumps(content))
    wrong = bench(tmp_path, tmp_path / "r2", toy, "vln-qa", check=False)
    assert wrong.returncode and "is outside" in wrong.stderr


def test_an_empty_report_is_refused(tmp_path):
    wrong = Done(*run(REPO / "eval.py", "--report", "--out", tmp_path, check=False))
    assert wrong.returncode and "holds no results" in wrong.stderr


# ---------------------------------------------------------------------------- what a second reader found, kept found
def test_all_benchmarks_run_blind_and_without_a_video(sets, toy, tmp_path):
    done = run(REPO / "eval.py", "--bench", "all", "--blind", "--data", sets, "--ckpt", toy / "stage3", "--base", toy / "stage0", "--out", tmp_path)
    assert "has no folder for" not in done[1]
    assert all((tmp_path / f"{name}-blind.json").is_file() for name in eval.BENCHES), done
    assert json.loads((tmp_path / "egoschema-blind.json").read_text())["unreadable"] == 0


def test_the_way_of_answering_is_the_benchmarks(sets, toy, tmp_path):
    for name, asked, mode in (("charades-ego", "letter", "likelihood"), ("egomcq", "letter", "likelihood"), ("vln-qa", "generate", "likelihood"),
                              ("vln-qa", "letter", "letter"), ("qaego4d-open", "letter", "generate")):
        out = tmp_path / f"{name}-{asked}"
        done = bench(sets, out, toy, name, "--answer", asked)
        figures = json.loads((out / f"{name}.json").read_text())
        assert figures["answer"] == mode and ("does not apply" in done.stdout) == (asked != mode)
        assert ("parser_failures" in figures) == (mode == "letter")


def test_errors_are_tried_again_and_other_questions_refused(sets, toy, tmp_path):
    shutil.copytree(sets / "vln-qa", tmp_path / "vln-qa")
    (tmp_path / "videos/left").mkdir(parents=True)
    shutil.copy(sets / "videos/left/0.mp4", tmp_path / "videos/left/0.mp4")
    bench(tmp_path, tmp_path / "r", toy, "vln-qa")
    assert json.loads((tmp_path / "r/vln-qa.json").read_text())["unreadable"] == 4
    for i in (1, 2, 3):
        shutil.copy(sets / f"videos/left/{i}.mp4", tmp_path / f"videos/left/{i}.mp4")
    bench(tmp_path, tmp_path / "r", toy, "vln-qa")
    assert json.loads((tmp_path / "r/vln-qa.json").read_text())["unreadable"] == 0
    content = json.loads((tmp_path / "vln-qa/egocentric_navigation.json").read_text())
    (tmp_path / "vln-qa/egocentric_navigation.json").write_text(json.dumps(content[::-1]))
    wrong = bench(tmp_path, tmp_path / "r", toy, "vln-qa", check=False)
    assert wrong.returncode and "content=" in wrong.stderr
    shutil.rmtree(tmp_path / "videos/left")
    wrong = bench(tmp_path, tmp_path / "r3", toy, "vln-qa", check=False)
    assert wrong.returncode and "none of 4 videos is there" in wrong.stderr


def test_what_more_ranks_left_is_not_taken_for_news(sets, toy, tmp_path, scored):
    """A killed run of two ranks, whose second had errors; then one process does all."""
    lines = [json.loads(line) for line in (scored / "vln-qa.jsonl").read_text().splitlines()]
    stale = [lines[0]] + [{key: row[key] for key in row if key != "scores"} | {"error": "gone"} for row in lines[1:]]
    (tmp_path / "vln-qa.rank1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stale))
    bench(sets, tmp_path, toy, "vln-qa")
    assert json.loads((tmp_path / "vln-qa.json").read_text())["unreadable"] == 0


def test_ranks_share_items_by_their_files_alone(sets, toy, tmp_path, scored):
    """Nobody waits for anybody: whoever ends last sums up, or a later call without torchrun."""
    whole, figures = ((scored / name).read_text() for name in ("vln-qa.jsonl", "vln-qa.json"))
    first, second = ({"RANK": str(rank), "WORLD_SIZE": "2"} for rank in (0, 1))
    done = bench(sets, tmp_path / "a", toy, "vln-qa", "--report", env=first)
    assert "rank 0 is done" in done.stdout and not (tmp_path / "a/vln-qa.json").exists() and not (tmp_path / "a/report.html").exists()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    bench(sets, tmp_path / "a", toy, "vln-qa", "--report", env=second)
    assert (tmp_path / "a/report.html").is_file()
    assert "3 of them done" in bench(sets, tmp_path / "b", toy, "vln-qa").stdout
    for out in (tmp_path / "a", tmp_path / "b"):
        assert (out / "vln-qa.jsonl").read_text() == whole and (out / "vln-qa.json").read_text() == figures
    assert "distributed" not in (REPO / "eval.py").read_text()


def test_files_of_another_number_of_ranks_are_neither_lost_nor_counted_twice(sets, toy, tmp_path, scored):
    whole = (scored / "vln-qa.jsonl").read_text()
    head, *rows = whole.splitlines(keepends=True)
    for rank, own in enumerate((rows[:1], rows[1:3], rows[2:4])):           # three ranks, killed; one row twice
        (tmp_path / f"vln-qa.rank{rank}.jsonl").write_text("".join([head, *own]) + '{"id": "5", "sc')
    done = bench(sets, tmp_path, toy, "vln-qa", env={"RANK": "1", "WORLD_SIZE": "2"})       # items 1, 3 and 5
    assert "5 of them done or of other ranks" in done.stdout and "rank 1 is done" in done.stdout
    assert "5 of them done" in bench(sets, tmp_path, toy, "vln-qa").stdout                  # all but item 4
    assert (tmp_path / "vln-qa.jsonl").read_text() == whole


def test_the_last_rank_finds_all_predictions(tmp_path):
    """Items of another rank are waited for by nobody; an error gives way to a success, whichever file has it."""
    files = [eval.PredictionFiles(tmp_path, "x", {"bench": "x"}, rank=rank, world=2) for rank in (0, 1)]
    items = [eval.Item(str(i), [{}]) for i in range(2)]
    for own, item in zip(files, items):
        assert own.begin() == {row["id"] for row in own.read().values()}
        own.append([{"id": item.id}])
        assert own.gather(items) == (None if own is files[0] else [{"id": "0"}, {"id": "1"}])
    head, *rows = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert head == {"bench": "x"} and rows == [{"id": "0"}, {"id": "1"}]
    alone = eval.PredictionFiles(tmp_path, "y", {"bench": "x"})
    for name, row in (("y.jsonl", {"id": "0", "error": "gone"}), ("y.rank0.jsonl", {"id": "0"}), ("y.rank1.jsonl", {"id": "0", "error": "gone"})):
        (tmp_path / name).write_text(json.dumps({"bench": "x"}) + "\n" + json.dumps(row) + "\n")
    assert alone.read() == {"0": {"id": "0"}} and alone.begin() == {"0"} and alone.gather(items[:1]) == [{"id": "0"}]


def test_two_runs_into_one_folder_are_refused(sets, toy, tmp_path):
    with data.file_lock(tmp_path / ".vln-qa.lock0", wait=False):
        second = bench(sets, tmp_path, toy, "vln-qa", check=False)
    assert second.returncode and "is in use by process" in second.stderr and not (tmp_path / "vln-qa.jsonl").exists()


def test_the_videos_may_be_named_from_the_root_of_the_disk(toy):
    video = str((toy / "toy/val/ego/0.mp4").resolve())
    items = [eval.Item("0", [{"video": video.lstrip("/")}])]
    eval.place_clips(items, Path("/"), allow_outside=False, blind=False)
    assert items[0].clips == [{"video": video}]


def test_retrieval_under_autocast(learner):
    """CUDA's default: a product in bfloat16 cannot become numpy, and its cosines would tie."""
    model, tokenizer = learner
    item = eval.Item("0", [{}], "?", ["The left hand.", "It is red.", "I cut it."], [1, 0, 0])
    frames, scores = torch.randint(0, 255, (1, 4, 3, 48, 48), dtype=torch.uint8), []
    for half in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            visual = model.encode_ego(frames)
            sides = eval.text_side(model, tokenizer, [], item.options)
            scores.append(np.array(eval.score_texts(VideoContext(model, tokenizer, visual), visual, item.options, sides)))
    assert np.abs(scores[0] - scores[1]).max() < 0.05           # bfloat16 of the features themselves


def test_a_retrieval_has_one_centre_whatever_is_still_to_do(learner, toy):
    """EK-100 compares videos: an item that is answered alone, by a resumed run or another rank, gets the scores that it has among all."""
    ckpt = Namespace(model=learner[0], tokenizer=learner[1])
    texts = [f"Camera-wearer {verb} the red plain block with the left hand." for verb in ("cuts", "taps", "pulls")]
    items = [eval.Item(str(i), [{"video": str(toy / f"toy/val/ego/{i}.mp4")}], "?", texts, [1, 0, 0]) for i in range(4)]
    args = Namespace(blind=False, answer="likelihood", prompt="base", words=None)
    answer = lambda todo: list(eval.run_items(ckpt, todo, items, eval.BENCHES["ek100-mir"], args))
    assert answer(items[3:])[0]["scores"] == answer(items)[3]["scores"]


def test_ranks_that_end_together_write_one_file(tmp_path, monkeypatch):
    """Each writes the same content, under a name of its own until it is whole."""
    monkeypatch.setenv("RANK", "0")
    with data.atomic_write(tmp_path / "x.json") as first:
        first.write_text("same")
        monkeypatch.setenv("RANK", "1")
        data.write_text_atomic(tmp_path / "x.json", "same")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_each_kind_of_question_has_its_own_chance_and_an_unread_clip_is_no_reply():
    items = [eval.Item(f"{kind}{i}", [{}], "?", list("abcde")[:count], 0, kind=kind) for kind, count in (("two", 2), ("five", 5)) for i in range(5)]
    bench_, args = eval.BENCHES["vln-qa"], Namespace(answer="likelihood", bench="x")
    figures = eval.summarise(bench_, items, [{"scores": [0.0] * len(item.options)} for item in items], args)
    for name, chance in (("two", 0.5), ("five", 0.2), ("score", 0.35)):
        assert figures[name] == figures[f"{name}_chance"] == pytest.approx(chance), name
    said = [{"error": "gone"}] + [{"reply": "?", "choice": None}] * 2 + [{"reply": "A", "choice": 0}] * 7
    figures = eval.summarise(bench_, items, said, Namespace(answer="letter", bench="x"))
    assert (figures["unreadable"], figures["parser_failures"]) == (1, 2)


def test_hidden_answers_are_counted_nowhere():
    items = [eval.Item(str(i), [{}], "?", ["a", "b"], 0 if i < 2 else None) for i in range(9)]
    said = [{"choice": None}, {"choice": 0}, *[{"choice": None}] * 6, {"error": "gone"}]
    figures = eval.summarise(eval.BENCHES["egoschema"], items, said, Namespace(answer="letter", bench="egoschema"))
    assert (figures["score_n"], figures["parser_failures"], figures["unreadable"]) == (2, 1, 0)


@pytest.mark.parametrize("goal, asked", [
    ("Clean the sink.", "I want to clean the sink."), ("cleaning the sink", "I am cleaning the sink."), ("Bring the cups", "I want to bring the cups."),
    ("The goal is to cook rice!", "I want to cook rice.")])
def test_a_goal_becomes_a_sentence(goal, asked):
    record = {"sample_id": 1, "task_goal": goal, "golden_choice_idx": "A"} | {f"choice_{name}": name for name in "abcd"}
    assert eval.plan_item(record, {}, "").question.startswith(f"{asked} The video shows")


def test_a_note_says_how_the_questions_were_asked():
    item, = items = [eval.Item("0", [{}], "?", ["a", "b"], 0)]
    for name, answer, words, want in (
            ("egoplan", "likelihood", None, [eval.BEFORE_NOW, "options not shown", "our words"]),
            ("egoplan", "letter", None, [eval.BEFORE_NOW, "options in one order", "our words"]),
            ("egoplan", "letter", "{question}{options}", [eval.BEFORE_NOW, "options in one order"]), ("ek100-mir", "likelihood", None, [eval.BENCHES["ek100-mir"].note])):
        assert eval.cautions(eval.BENCHES[name], items, Namespace(answer=answer, words=words)) == want


def test_unread_videos_are_ranked_last_and_hidden_answers_are_none():
    items = [eval.Item(str(i), [{}], "?", ["a", "b"], [i % 2]) for i in range(20)]
    good = [{"scores": [-1.0 - (i % 2), -2.0 + (i % 2)]} for i in range(20)]
    whole = eval.ranking_figures(eval.BENCHES["charades-ego"], items, good)["score"]
    one = eval.ranking_figures(eval.BENCHES["charades-ego"], items, [{"error": "gone"}, *good[1:]])["score"]
    assert whole == 1 and 0.9 < one < 1
    assert eval.mean_per_token(torch.zeros(3)) == 0 and eval.mean_per_token(torch.tensor([0., 2, 4])) == 3


def test_charades_compares_videos_by_a_softmax_over_their_classes():
    """How likely a video makes any text at all is no class: an offset of its own moved the mAP, a softmax takes it away."""
    rng = np.random.default_rng(0)
    labels = rng.random((60, 20)) < 0.2
    items = [eval.Item(str(i), [{}], "?", [f"c{k}" for k in range(20)], list(map(int, np.flatnonzero(row)))) for i, row in enumerate(labels)]
    scores = rng.normal(size=labels.shape) + labels
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    want = charades_map(shares, labels)["nanmAP"]
    for spread in (0, 1, 30, 1000):
        offsets = spread * rng.normal(size=(60, 1))
        said = [{"scores": row.tolist()} for row in scores + offsets]
        figures = eval.ranking_figures(eval.BENCHES["charades-ego"], items, said)
        assert figures["score"] == pytest.approx(want, abs=1e-9), spread
    raw = charades_map(scores + 30 * rng.normal(size=(60, 1)), labels)["nanmAP"]
    assert raw < want - 0.1                                     # what comparing raw likelihoods would give
    # An unread video is still the last, wherever its labels are; raw scores stay in the predictions.
    said[0] = {"error": "gone"}
    scores[0] = -1e9
    shares[0] = 0
    assert eval.ranking_figures(eval.BENCHES["charades-ego"], items, said)["score"] == pytest.approx(charades_map(shares, labels)["nanmAP"], abs=1e-9)


def test_a_score_that_is_no_number_is_an_item_that_was_not_read(learner, monkeypatch, toy):
    model, tokenizer = learner
    video = str(toy / "toy/val/ego/0.mp4")
    items = [eval.Item(str(i), [{"video": video}], "?", ["a", "b"], 0) for i in range(3)]
    said = iter((np.array([[0, -1.0], [0, -2.0]]), np.array([[0, math.nan], [0, -2.0]]), np.array([[0, -math.inf], [0, -2.0]])))
    monkeypatch.setattr(VideoContext, "score", lambda *_, **__: next(said))
    args = Namespace(blind=False, answer="likelihood", prompt="base", words=None, bench="x")
    found = list(eval.run_items(Namespace(model=model, tokenizer=tokenizer), items, items, eval.BENCHES["vln-qa"], args))
    assert [one.get("error") for one in found] == [None, *["the model's scores are no numbers"] * 2]
    figures = eval.summarise(eval.BENCHES["vln-qa"], items, found, args)
    assert figures["unreadable"] == 2 and figures["score"] == pytest.approx(1 / 3) and json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_question_that_is_too_long_is_an_error_of_its_item(learner, toy):
    model, tokenizer = learner
    clip = {"video": str(toy / "toy/val/ego/0.mp4")}
    items = [eval.Item("0", [clip], "word " * 300, ["a", "b"], 0), eval.Item("1", [clip], "What?", ["a", "b"], 0)]
    for answer in ("likelihood", "letter", "generate"):
        args = Namespace(blind=False, answer=answer, prompt="base", words=None)
        long, short = eval.run_items(Namespace(model=model, tokenizer=tokenizer), items, items, eval.BENCHES["vln-qa"], args)
        assert "a shorter question is needed" in long["error"] and "error" not in short, answer


def test_a_cut_answer_stays_in_the_conversation(learner):
    model, tokenizer = learner
    visual = model.encode_ego(torch.randint(0, 255, (1, 4, 3, 48, 48), dtype=torch.uint8))
    chat = VideoContext(model, tokenizer, visual)
    tokens = tokenizer.encode("".join(chat.stream("What am I doing?", 3)))
    assert len(chat.unread) == 2 and chat.unread[1] == tokenizer.eos
    second = "".join(chat.stream("Which hand am I using?", 5))
    plain = VideoContext(model, tokenizer, visual)
    ids = plain.prompt("What am I doing?")[0]
    first = [t[0] for t in model.stream(None, [torch.tensor(ids)], eos=tokenizer.eos, max_new=3, cache=plain.cache)]
    again = VideoContext(model, tokenizer, visual)
    whole = ids + first + [tokenizer.eos] + tokenizer.encode("[INST] Which hand am I using? [/INST]")
    want = [t[0] for t in model.stream(None, [torch.tensor(whole)], eos=tokenizer.eos, max_new=5, cache=again.cache)]
    assert second == tokenizer.decode(want).rstrip("\ufffd") and tokens


# ------------------------------------------------------------------------------------------------ real files
def read_items(root, name, **options):
    args = Namespace(**dict(bench=name, root=str(root), answer="likelihood", videos=None) | options)
    return list(eval.convert(eval.BENCHES[name].reader, args))


def plan(video, source, goal="clean the sink"):
    return {"sample_id": 1, "video_source": source, "video_id": video, "task_goal": goal, "question": "?", "choice_a": "a", "choice_b": "b",
            "choice_c": "c", "choice_d": "d", "golden_choice_idx": "B", "answer": "b", "current_observation_frame": 601,
            "task_progress_metadata": [{"narration_text": "t", "start_frame": 61, "stop_frame": 90}]}


def test_egoplan_counts_epics_frames_at_the_rate_of_its_images(tmp_path):
    """60 a second for P01_13, 50 for P01_103, from 1, whatever the file's rate; Ego4D at the file's own, from 0."""
    (tmp_path / "P01/videos").mkdir(parents=True)
    for name in ("P01/videos/P01_13.MP4", "P01/videos/P01_103.MP4", "uid.mp4"):
        write_video(tmp_path / name, np.zeros((700 if name == "uid.mp4" else 5, 32, 32, 3), np.uint8), 30)
    for video, source, start, end in (("P01_13", "EpicKitchens", 1.0, 601 / 60), ("P01_103", "EpicKitchens", 1.2, 601 / 50),
                                      ("uid", "Ego4D", 61 / 30, 602 / 30)):
        (tmp_path / "EgoPlan_validation.json").write_text(json.dumps([plan(video, source), plan(video, source, "Cleaning the sink.")]))
        items = read_items(tmp_path, "egoplan")
        eval.place_clips(items, tmp_path, False, False)
        clip, = items[0].clips
        assert (clip["start"], clip["end"]) == pytest.approx((start, end)) and set(clip) == {"video", "start", "end"}
        assert items[0].question.startswith("I want to clean the sink. ") and items[1].question.startswith("I am cleaning the sink. ")


QUESTION = {"video": "v.mp4", "question": "What next?", "candidates": ["left", "right"], "answer": "left"}
SCHEMA = {"q_uid": "u", "question": "Why?"} | {f"option {i}": f"o{i}" for i in range(5)}
CHOICES = {str(k): {"video_uid": "v", "clip_start": 0, "clip_end": 1} for k in range(5)}
MCQ = {"answer": 0, "types": 1, "query": {"clip_text": "#C C walks"}, "choices": CHOICES}


@pytest.mark.parametrize("name, file, content, place", [
    ("vln-qa", "egocentric_navigation.json", [QUESTION, QUESTION | {"candidates": ["left", None]}], "record 2"),
    ("vln-qa", "egocentric_navigation.json", [QUESTION | {"candidates": ["left", " "]}], "record 1"),
    ("vln-qa", "egocentric_navigation.json", [QUESTION | {"question": 7}], "record 1"),
    ("vln-qa", "egocentric_navigation.json", [QUESTION | {"answer": "up"}], "record 1"),
    ("egoschema", {"u": "3"}, [SCHEMA], "record 1"), ("egoschema", {"u": 5}, [SCHEMA], "record 1"), ("egoschema", {"u": -1}, [SCHEMA], "record 1"),
    ("egoschema", {"u": 2.0}, [SCHEMA], "record 1"), ("egoschema", {"u": True}, [SCHEMA], "record 1"),
    ("vln-qa", "egocentric_navigation.json", [QUESTION | {"candidates": "left", "answer": "l"}], "record 1"), ("egoschema", {}, [SCHEMA, SCHEMA | {"q_uid": 9}], "record 2"),
    ("egomcq", "egomcq.json", {"0": MCQ, "1": MCQ | {"answer": 5}}, "record 2"), ("egomcq", "egomcq.json", {"0": MCQ | {"answer": "0"}}, "record 1"),
    ("egoplan2", "EgoPlan-Bench2.json", [{"golden_choice_idx": ""}], "record 1"), ("egoplan2", "EgoPlan-Bench2.json", [{"golden_choice_idx": "BC"}], "record 1"),
    ("egoplan2", "EgoPlan-Bench2.json", [{"task_start_frame": math.nan}], "record 1"), ("egoplan2", "EgoPlan-Bench2.json", [{"choice_b": None}], "record 1")])
def test_an_item_is_checked_when_it_is_read(tmp_path, name, file, content, place):
    """A null option won every time, a wrong answer was found after the last item; now its file and record are named."""
    if name == "egoschema":
        (tmp_path / "subset_answers.json").write_text(json.dumps(file))
        file = "questions.json"
    if name == "egoplan2":
        content = [plan("v", "x") | {"sample_id": "v_1", "domain": "Work", "task_start_frame": 1, "task_progress_metadata": []} | content[0]]
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{file} {place} is not as expected"):
        read_items(tmp_path, name)


def test_a_time_that_is_no_number_never_becomes_zero(tmp_path):
    choices = CHOICES | {"3": {"video_uid": "v", "clip_start": "nan", "clip_end": 1}}
    (tmp_path / "egomcq.json").write_text(json.dumps({"0": MCQ | {"choices": choices}}))
    item, = read_items(tmp_path, "egomcq")
    assert math.isnan(item.clips[3]["start"]) and item.clips[0]["start"] == 0
    write_video(tmp_path / "v.mp4", np.zeros((5, 32, 32, 3), np.uint8), 5)
    eval.place_clips([item], tmp_path, False, False)
    with pytest.raises(DataError, match="v.mp4"):
        read_clip(item.clips[3]["video"], item.clips[3]["start"], 1, 4, 32)


def test_egoplan2_by_hand(tmp_path):
    """From the first progress, or the task's start, to the current frame at the file's own rate; equal texts are equally right."""
    write_video(tmp_path / "ab_c.mp4", np.zeros((700, 32, 32, 3), np.uint8), 25)
    record = plan("unused", "unused") | {"sample_id": "ab_c_2", "domain": "Work", "task_start_frame": 11}
    del record["video_id"], record["video_source"]
    rest = {"sample_id": "ab_c_3", "domain": "Hobbies", "task_progress_metadata": [], "choice_c": "b", "task_goal": "Cleaning the sink."}
    (tmp_path / "EgoPlan-Bench2.json").write_text(json.dumps([record, record | rest]))
    items = read_items(tmp_path, "egoplan2")
    eval.place_clips(items, tmp_path, False, False)
    assert [items[0].clips[0][key] for key in ("start", "end")] == pytest.approx([61 / 25, 602 / 25])
    assert [items[1].clips[0][key] for key in ("start", "end")] == pytest.approx([11 / 25, 602 / 25])
    assert [(i.kind, i.goal, i.answer) for i in items] == [("Work", "clean the sink", 1), ("Hobbies", "cleaning the sink", 1)]
    said = [{"scores": [0, 1, 2, 3]}, {"scores": [0, 1, 2, 1]}]                            # wrong; right by its twin
    figures = eval.summarise(eval.BENCHES["egoplan2"], items, said, Namespace(answer="likelihood", bench="egoplan2"))
    assert (figures["score"], figures["Work"], figures["Hobbies"], figures["score_chance"]) == (0.5, 0, 1, pytest.approx(0.375))


def test_egoexomem_by_hand(tmp_path):
    """The ego video alone, downscaled if it is there; of several cameras with such a name the one with a colour stream."""
    records = [{"qa_id": f"q{i}", "qa_type": "Q1", "take_name": f"t{i}", "required_view": view, "question": "What?", "options": list("wxyz"),
                "correct_answer": i, "verification": {"timestamps": [9]}, "idx": i} for i, view in enumerate(("ego", "exo", "either", "exo"))]
    (tmp_path / "data/EgoExo4D").mkdir(parents=True)
    (tmp_path / "data/EgoExo4D/qa_merged_v6.json").write_text(json.dumps(records))
    for name in ("t0/{}/aria01_214-1.mp4", "t1/{}/aria02_214-1.mp4", "t1/{}/downscaled/448/aria02_214-1.mp4", "t1/{}/cam01.mp4", "t2/{}/aria01_214-1.mp4",
                 "t2/{}/aria03_214-1.mp4"):
        path = tmp_path / "takes" / name.format("frame_aligned_videos")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    streams = {"aria01": {"rgb": {}, "slam": {"relative_path": "s.mp4"}}, "aria03": {"rgb": {"relative_path": "frame_aligned_videos/aria03_214-1.mp4"}},
               "cam01": {"0": {"relative_path": "frame_aligned_videos/cam01.mp4"}}}
    (tmp_path / "takes.json").write_text(json.dumps([{"take_name": "t2", "frame_aligned_videos": streams}]))
    items = read_items(tmp_path, "egoexomem")
    assert [i.clips[0]["video"].removeprefix("takes/").replace("frame_aligned_videos", "-") for i in items] == [
        "t0/-/aria01_214-1.mp4", "t1/-/downscaled/448/aria02_214-1.mp4", "t2/-/aria03_214-1.mp4", "t3/-/aria01_214-1.mp4"]
    assert [item.id for item in read_items(tmp_path / "data/EgoExo4D", "egoexomem", videos=str(tmp_path))] == ["q0", "q1", "q2", "q3"]
    said = [{"scores": [1, 0, 0, 0]}, {"scores": [1, 0, 0, 0]}, {"scores": [0, 0, 1, 1]}, {"error": "not there"}]
    figures = eval.summarise(eval.BENCHES["egoexomem"], items, said, Namespace(answer="likelihood", bench="egoexomem"))
    assert (figures["score"], figures["ego"], figures["exo"], figures["either"]) == (1.5 / 4, 1, 0, 0.5)
    assert figures["exo_n"] == 2 and figures["score_chance"] == 0.25 and figures["unreadable"] == 1
    (tmp_path / "takes.json").write_text(json.dumps([{"take_name": "t2", "frame_aligned_videos": streams | {"aria04": streams["aria03"]}}]))
    assert read_items(tmp_path, "egoexomem")[2].clips                                       # the same file twice is one
    (tmp_path / "takes.json").write_text("[]")
    with pytest.raises(DataError, match="record 3 is not as expected .*see the docstring of egoexomem"):
        read_items(tmp_path, "egoexomem")


def test_which_egotaskqa_it_is_is_said(sets, toy, tmp_path, scored):
    """The number of items, which stands beside the score, tells which choice among five it is; the other form has no such note."""
    shutil.copytree(sets / "egotaskqa-direct", tmp_path / "egotaskqa-direct")
    five = {"q": "Did it?", "video_path": "v0.mp4", "a": "D", "option": dict(zip("ABCDE", ("cup", "red", "no", "yes", "blue")))}
    (tmp_path / "egotaskqa-direct/egotaskqa.json").write_text(json.dumps([five]))
    run(REPO / "eval.py", "--bench", "egotaskqa-direct", "--data", tmp_path, "--videos", sets / "videos", "--ckpt", toy / "stage3", "--base",
        toy / "stage0", "--out", tmp_path)
    note = json.loads((tmp_path / "egotaskqa-direct.json").read_text())["note"]
    assert "neither direct nor indirect: EgoThinker's has 8,783 items" in note and "lmms-eval's has 18,936" in note
    assert "choice among five" not in json.loads((scored / "egotaskqa-direct.json").read_text())["note"]


def test_a_template_has_a_users_own_words(tmp_path):
    item = eval.Item("0", [{}], "Is {goal} \\1 it?", ["put {question}", "take"], 0, goal="clean the sink")
    args = Namespace(answer="letter", prompt="base", words="To {goal}: {question}\n{options}\n{}{ x }The answer is (")
    assert eval.question_words(item, args) == "To clean the sink: Is {goal} \\1 it?\nA. put {question}\nB. take\n{}{ x }The answer is ("
    args.words = None
    assert eval.question_words(item, args).splitlines() == ["Is {goal} \\1 it?", "A. put {question}", "B. take", "Answer with the letter of the right option."]
    for prompt, lines in (("base", 0), ("task", 1), ("cue", 2)):
        args = Namespace(answer="likelihood", prompt=prompt, words=None)
        first, question = eval.question_words(item, args).splitlines()[:lines], eval.question_words(item, args).splitlines()[lines:]
        assert question == [item.question] and (data.CUE in first) == (prompt == "cue") and (eval.TASK_DETAILS["likelihood"] in first) == (prompt != "base")
    path = tmp_path / "words.txt"
    for text, lacking in (("{question}\n", ""), ("{qestion}", "qestion"), ("{options}", "one of question"), ("Why?", "one of question"),
                          ("{question} {goal}", "goal"), ("<video> {question}", "<video>")):
        path.write_text(text)
        plain = eval.Item("0", [{}], "Is it?", ["a", "b"], 0)
        if lacking:
            with pytest.raises(DataError, match=f"{path}.*{lacking}"):
                eval.read_template(path, plain, "generate")
        else:
            assert eval.read_template(path, plain, "generate") == "{question}"
            with pytest.raises(DataError, match="options for letters"):
                eval.read_template(path, plain, "letter")


def test_a_template_is_part_of_the_protocol(sets, toy, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("{options}\nWhich of these? {question}")
    bench(sets, tmp_path, toy, "vln-qa", "--answer", "letter", "--template", words, "--prompt", "cue")
    head = json.loads((tmp_path / "vln-qa.jsonl").read_text().splitlines()[0])
    assert head["prompt"] == "cue" and "\nWhich of these? This is my own view" in head["words"][1]
    words.write_text("{options}\nWhich of those? {question}")
    wrong = bench(sets, tmp_path, toy, "vln-qa", "--answer", "letter", "--template", words, "--prompt", "cue", check=False)
    assert wrong.returncode and f"words={head['words']!r}" in wrong.stderr
    done = bench(sets, tmp_path / "r", toy, "egomcq", "--template", words, "--prompt", "task")
    assert "--template" in done.stdout and "--prompt task does not apply" in done.stdout
    head = json.loads((tmp_path / "r/egomcq.jsonl").read_text().splitlines()[0])
    assert "these?" not in head["words"][1] and head["prompt"] == "base"


def test_a_result_without_a_score_has_a_line_on_the_page(tmp_path):
    figures = {"ckpt": "c", "git": "g", "weights": "w", "answer": "likelihood", "content": "x", "items": 3, "unreadable": 3, "score": None,
               "note": "<script>alert(1)</script>"}
    (tmp_path / "charades-ego.json").write_text(json.dumps(figures))
    page = eval.write_report(tmp_path).read_text()
    assert "<script" not in page and "&lt;script&gt;alert" in page
    assert "<td>charades-ego<td colspan=7>no score: 3 items, 3 unreadable<td>" in page


def test_egotaskqa_as_a_choice_and_with_encoded_answers(tmp_path):
    (tmp_path / "answer_set.txt").write_text("<UNK1>\nyes\nget plate from table\n")
    (tmp_path / "formatted_test_qas_encode.json").write_text(json.dumps([
        {"interval": "a|P1|1|9", "question": "What?", "answer": "Get plate from table", "question_id": 1, "answer_encode": 0},
        {"interval": "a|P1|1|9", "question": "Is it?", "answer": "yes", "question_id": 2, "answer_encode": 1}]))
    assert [item.answer for item in read_items(tmp_path, "egotaskqa-direct")] == [eval.OUTSIDE, 0]
    (tmp_path / "egotaskqa.json").write_text(json.dumps([{"q": "Did it?", "video_path": "28k|P1|5|6.mp4", "a": "D", "option": {
        "A": "poweredness", "B": "edible", "C": "no", "D": "yes", "E": "Close sink"}}]))
    item, = read_items(tmp_path, "egotaskqa-direct")
    assert item.answer == 3 and item.options[3] == "yes" and item.chance() == 0.2 and item.clips[0]["video"] == "28k|P1|5|6.mp4"


def test_qaego4d_by_either_name_in_either_folder(tmp_path):
    record = {"video_id": "v", "sample_id": "s", "question": "Where?", "answer": "there", "wrong_answers": ["a", "b", "c"]}
    for i, (name, bench_) in enumerate((("annotations.test.json", "open"), ("annotations.QaEgo4D_test.json", "open"),
                                        ("data/unified/annotations.QaEgo4D_test.json", "open"),
                                        ("data/unified/annotations.QaEgo4D_test_close.json", "closed"))):
        path = tmp_path / str(i) / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([record]))
        assert len(read_items(tmp_path / str(i), f"qaego4d-{bench_}")) == 1


def test_egomcq_names_the_wearer_by_the_one_rule(tmp_path):
    choices = {str(k): {"video_uid": "v", "clip_start": 0, "clip_end": 1} for k in range(5)}
    (tmp_path / "egomcq.json").write_text(json.dumps({str(i): {"answer": 0, "types": 1, "query": {"clip_text": text}, "choices": choices}
                                                      for i, text in enumerate(("#c c walks", "#CC stares", "#O a man talks to C"))}))
    asked = [item.question for item in read_items(tmp_path, "egomcq")]
    assert asked == ["Camera-wearer walks", "Camera-wearer stares", "a man talks to Camera-wearer"]


def test_an_error_of_a_table_names_file_and_record(tmp_path):
    (tmp_path / "Charades_v1_classes.txt").write_text("c000 Doing\n")
    (tmp_path / "CharadesEgo_v1_test_only1st.csv").write_text("id,actions\na,c000 0 1\nb,c999 0 1\n")
    with pytest.raises(DataError, match="CharadesEgo_v1_test_only1st.csv record 2"):
        read_items(tmp_path, "charades-ego")


def test_a_limit_is_spread_over_the_file(sets, toy, tmp_path):
    """The real VLN-QA is sorted: its first 50 answers are one."""
    bench(sets, tmp_path, toy, "vln-qa", "--limit", "3")
    lines = (tmp_path / "vln-qa.jsonl").read_text().splitlines()[1:]
    assert sorted(json.loads(line)["id"] for line in lines) == ["0", "2", "4"]


@pytest.mark.parametrize("rate", [None, 50])
def test_frame_numbers_become_seconds_by_time_stamps(tmp_path, rate):
    """Of a film of variable rate; where a benchmark counts at a rate of its own, at that."""
    from test_video import UNEVEN, encode
    encode(tmp_path / "v.mp4", "libx264", UNEVEN - UNEVEN[0])
    item = eval.Item(id="1", clips=[{"video": "v.mp4", "frames": (10, 19)} | ({"rate": rate} if rate else {})], question="q", answer="a")
    eval.place_clips([item], tmp_path, allow_outside=False, blind=False)
    clip, times = item.clips[0], UNEVEN - UNEVEN[0]
    wanted = (times[10], times[20]) if rate is None else (10 / 50, 20 / 50)
    assert (clip["start"], clip["end"]) == pytest.approx(wanted, abs=1e-3)
