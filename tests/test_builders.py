"""Each builder on small hand-written files in the real format, with the values that shared formats prescribe."""
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from test_data import numbered

import data
from data import BUILDERS, EGOIT, DataError, encode_png, read_clip, read_manifest, write_jsonl


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def build(command, root, *flags):
    """Run a builder; its rows by id."""
    data.main([command, "--root", str(root), "--out", str(root / "out.jsonl"), *flags])
    return {row["id"]: row for row in map(json.loads, (root / "out.jsonl").read_text().splitlines())}


# ------------------------------------------------------------------------------------------------- Ego-Exo4D
def stream(name):
    return {"relative_path": f"frame_aligned_videos/{name}.mp4"}


def take(uid, name, cameras, streams, duration=60.0):
    return {"take_uid": uid, "take_name": name, "root_dir": f"takes/{name}", "duration_sec": duration, "frame_aligned_videos": streams,
            "capture": {"cameras": [{"cam_id": cam, "is_ego": ego} for cam, ego in cameras.items()]}}


def said(text, timestamp, unsure=False, visible=True, subject="C", best="cam02", key="subject"):
    return {"text": text, "timestamp": timestamp, key: subject, "ego_visible": visible, "unsure": unsure,
            "best_exo": {"raw_cam_id": "2", "cam_id": best} if best else None}


def ego_exo(root):
    aria = {"aria02": {"rgb": stream("aria02_214-1"), "slam-left": stream("aria02_1201-1")}, "cam01": {"0": stream("cam01")},
            "cam02": {"0": stream("cam02")}, "gp05": {"0": stream("gp05")}, "collage": {"0": {"relative_path": None}},
            "best_exo": {"0": {"relative_path": None}}, "cam03": {"0": {"relative_path": None}}}
    write(root / "takes.json", [
        take("u1", "cmu_bike_1", {"aria02": True, "cam01": False, "cam02": False, "cam03": False, "gp05": True, "mobile": False}, aria),
        take("u2", "no_exo", {"aria01": True}, {"aria01": {"rgb": stream("aria01_214-1")}}),
        take("u4", "another_split", {"aria01": True}, {"aria01": {"rgb": stream("aria01_214-1")}})])
    write(root / "annotations/splits.json", {"take_uid_to_split": {"u1": "train", "u2": "train", "u3": "train", "u4": "val"}})
    first = [said("C touches the screw of the hub with his right hand.", 18.48356), said("C picks C's tool.", 0.03831),
             said("C looks around.", 9.5, unsure=True)]
    second = [said("The Man X walks towards C.", 0.76281, "0", "1", "O", key="narration_subject"), said("C sits.", 5.0, "1", "1"),
              said("C opens a box.", 59.99, "0", "1", best=None), said("C hides it.", 20.0, "0", "0")]
    write(root / "annotations/atomic_descriptions_train.json", {"ds": "x", "take_cam_id_map": {}, "annotations": {
        "u1": [{"annotation_uid": "a", "annotator_id": "p1", "rejected": False, "descriptions": first},
               {"annotation_uid": "b", "annotator_id": "p2", "rejected": False, "descriptions": second},
               {"annotation_uid": "c", "annotator_id": "p3", "rejected": True, "descriptions": [said("C errs.", 1.0)]}],
        "u2": [{"annotation_uid": "d", "annotator_id": "p1", "rejected": False, "descriptions": first}],
        "u3": [{"annotation_uid": "e", "annotator_id": "p1", "rejected": False, "descriptions": first}],
        "u4": [{"annotation_uid": "f", "annotator_id": "p1", "rejected": False, "descriptions": first}]}})
    return root


def test_ego_exo4d(tmp_path, capsys):
    rows = build("ego-exo4d", ego_exo(tmp_path))
    assert list(rows) == ["cmu_bike_1/p1/0", "cmu_bike_1/p1/1", "cmu_bike_1/p2/2"]
    row = rows["cmu_bike_1/p1/0"]
    folder = "takes/cmu_bike_1/frame_aligned_videos/downscaled/448"
    assert row["ego"]["video"] == f"{folder}/aria02_214-1.mp4"
    assert [clip["video"] for clip in row["exo"]] == [f"{folder}/cam01.mp4", f"{folder}/cam02.mp4"]     # not gp05, collage, best_exo, cam03
    beta = (18.48356 - 0.03831) / 2                         # three narrations, sorted, before any filter
    assert beta == pytest.approx(9.222625)
    assert row["ego"]["end"] - row["ego"]["start"] == pytest.approx(1.882168, abs=1e-6)
    assert row["ego"]["start"] == pytest.approx(18.48356 - 1.882168 / 2, abs=1e-6) and row["exo"][0]["end"] == row["ego"]["end"]
    assert rows["cmu_bike_1/p1/1"]["ego"]["start"] == 0     # would begin below 0
    assert rows["cmu_bike_1/p2/2"]["ego"]["end"] == 60      # cut at the take's end
    assert row["text"] == "Camera-wearer touches the screw of the hub with his right hand."
    assert rows["cmu_bike_1/p1/1"]["text"] == "Camera-wearer picks Camera-wearer's tool."
    out = capsys.readouterr().out
    for line in ("take not in takes.json: 1", "take without an ego or exo video: 1", "take of another split: 1", "unsure: 2", "not the wearer: 1",
                 "rejected annotation: 1", "not seen by the ego camera: 1", "takes: 1", "3 rows, 6 ego-exo pairs", "mean clip", "2,925 takes"):
        assert line in out or line == "take of another split: 1", (line, out)


def test_ego_exo4d_options(tmp_path, capsys):
    root = ego_exo(tmp_path)
    full = tmp_path / "takes/cmu_bike_1/frame_aligned_videos"
    assert len(build("ego-exo4d", root, "--keep-unsure")) == 5
    assert len(build("ego-exo4d", root, "--keep-hidden")) == 4
    assert "cmu_bike_1/p2/0" in build("ego-exo4d", root, "--subject", "any")
    best = build("ego-exo4d", root, "--views", "best")
    assert {len(row["exo"]) for row in best.values()} == {1} and "cmu_bike_1/p2/2" not in best
    assert best["cmu_bike_1/p1/0"]["exo"][0]["video"].endswith("cam02.mp4")
    times = [18.48356, 0.03831, 9.5, 0.76281, 5.0, 59.99, 20.0, 1.0]
    pooled = (max(times) - min(times)) / (len(times) - 1)
    row = build("ego-exo4d", root, "--beta", "take")["cmu_bike_1/p1/0"]
    assert row["ego"]["end"] - row["ego"]["start"] == pytest.approx(pooled / 4.9)
    capsys.readouterr()
    row = build("ego-exo4d", root, "--beta", "take", "--alpha", "9.8")["cmu_bike_1/p1/0"]
    assert row["ego"]["end"] - row["ego"]["start"] == pytest.approx(pooled / 9.8)
    capsys.readouterr()
    full.mkdir(parents=True)
    numbered(full / "cam01.mp4")                                    # only the full size is there
    rows = build("ego-exo4d", root)
    assert rows["cmu_bike_1/p1/0"]["exo"][0]["video"].endswith("frame_aligned_videos/cam01.mp4")


def test_a_narration_alone_gets_alpha_for_a_gap_and_two_frames_at_least(tmp_path):
    root = ego_exo(tmp_path)
    path = root / "annotations/atomic_descriptions_train.json"
    content = json.loads(path.read_text())
    content["annotations"] = {"u1": [
        {"annotation_uid": "a", "annotator_id": "p1", "rejected": False, "descriptions": [said("C sits down.", 10.0)]},
        {"annotation_uid": "b", "annotator_id": "p2", "rejected": False, "descriptions": [said("C stands up.", 30.0), said("C goes.", 30.0)]}]}
    write(path, content)
    rows = build("ego-exo4d", root)
    assert rows["cmu_bike_1/p1/0"]["ego"] | {"video": ""} == {"video": "", "start": 9.5, "end": 10.5}
    assert rows["cmu_bike_1/p2/0"]["ego"]["end"] - rows["cmu_bike_1/p2/0"]["ego"]["start"] == pytest.approx(2 / 30)


# ----------------------------------------------------------------------------------------------------- EgoClip
CLIPS = ("video_uid video_dur narration_source narration_ind narration_time clip_start clip_end clip_text tag_verb tag_noun ").replace(" ", "\t")
UID = "001e3e4e-2743-47fc-8564-d5efd11f9e90"


def egoclip(root):
    """As released: no clip_idx, and a tab at the end of the header; a row may lack the cells at its end."""
    write(root / "egoclip.csv", "\n".join((
        CLIPS, f'{UID}\t128.033333\tnarration_pass_1\t0\t3.3445\t2.967651\t3.721266\t#C C picks a bag of clothes from the floor\t[93]\t[192, 115, 12]\t',
        f'{UID}\t700\tnarration_pass_2\t1\t0.1\t-0.3\t0.4\t#C C walks "to" the door\t[1]\t[]',
        f"{UID}\t700\tnarration_pass_1\t2\t600.2\t599.5\t601.5\t#c c opens the red door",
        f"{UID}\t700\tnarration_pass_1\t3\t5\t4\t6\t#C C walks #unsure\t[]\t[]", f"{UID}\t700\tnarration_pass_1\t3\t5\t4\t6\t#C talks\t[]\t[]",
        f"{UID}\t700\tnarration_pass_1\t3\t5\t4\t6\t#C C\ttalks to the man\t[]\t[]\t\tone too many")))
    return root


def test_egoclip(tmp_path, capsys):
    rows = build("egoclip", egoclip(tmp_path))
    row = rows["egoclip/0"]
    assert row["ego"] == {"video": f"{UID}/0.mp4", "start": 2.967651, "end": 3.721266}
    assert (row["ego"]["start"] + row["ego"]["end"]) / 2 == pytest.approx(3.3445, abs=1e-3)      # EgoVLP's row 0
    assert (row["ego"]["end"] - row["ego"]["start"]) * 4.9 == pytest.approx(3.6927, abs=1e-3)    # its beta
    assert row["text"] == "Camera-wearer picks a bag of clothes from the floor"
    assert rows["egoclip/1"]["ego"]["start"] == 0 and rows["egoclip/1"]["text"] == 'Camera-wearer walks "to" the door'
    assert rows["egoclip/2"]["ego"] == {"video": f"{UID}/1.mp4", "start": 0, "end": 1.5}          # of two files the one of its middle
    assert rows["egoclip/2"]["text"] == "Camera-wearer opens the red door"
    assert len(rows) == 3
    out = capsys.readouterr().out
    assert "malformed line: 1" in out and "unsure, short or without length: 2" in out
    assert build("egoclip", tmp_path, "--chunk", "0")["egoclip/2"]["ego"] == {"video": f"{UID}.mp4", "start": 599.5, "end": 601.5}


@pytest.mark.parametrize("narrated, text", (
    ("#C C walks to the door", "Camera-wearer walks to the door"), ("#c c walks", "Camera-wearer walks"), ("#C c walks", "Camera-wearer walks"),
    ("# C c walks", "Camera-wearer walks"), ("#CC stares at C's hand", "Camera-wearer stares at Camera-wearer's hand"),
    ("#c C  walks", "Camera-wearer walks"), ("C C touches the cup", "Camera-wearer touches the cup"), ("#C walks", "Camera-wearer walks"),
    ("C touches the cup.", "Camera-wearer touches the cup."), ("#C C a black car drives past C", "a black car drives past Camera-wearer"),
    ("#O A man X talks to C", "A man X talks to Camera-wearer"), ("#AA a woman walks", "a woman walks"),
    ("The Man X walks towards C.", "The Man X walks towards Camera-wearer."), ("#C C picks vitamin c", "Camera-wearer picks vitamin c")))
def test_one_rule_names_the_wearer(narrated, text):
    assert data.verbalise_wearer(narrated) == text


# ------------------------------------------------------------------------------------------------------- EgoIT
def egtea(root):
    write(root / "action_idx.txt", "Inspect/Read_recipe 1\nTake_eating:utensil 2\nTurn on_faucet 3\n")
    write(root / "train_split1.txt", "P21-R04-ContinentalBreakfast-291175-294945-F006979-F007088 1 1 1\n"
                                     "P04-R06-GreekSalad-682170-683940-F016368-F016419 2 1 1 7\n")
    return root


def test_egtea(tmp_path):
    rows = list(build("egtea", egtea(tmp_path)).values())
    assert rows[0]["ego"] == {"video": "cropped_clips/P21-R04-ContinentalBreakfast/P21-R04-ContinentalBreakfast-291175-294945-F006979-F007088.mp4"}
    assert [row["turns"][0]["assistant"] for row in rows] == ["inspect/read recipe", "take eating utensil"]     # ids count from 1


def ssv2(root):
    write(root / "train.json", [
        {"id": "78687", "label": "holding potato next to vicks vaporub bottle", "template": "Holding [something] next to [something]",
         "placeholders": ["potato", "vicks vaporub bottle"]},
        {"id": "36585", "label": "plastic falling like a feather or paper", "template": "[Something] falling like a feather or paper",
         "placeholders": ["plastic"]}])
    write(root / "test.json", [{"id": "1420"}])
    return root


def test_ssv2(tmp_path):
    rows = build("ssv2", ssv2(tmp_path))
    row = rows["ssv2/36585"]
    assert row["ego"] == {"video": "36585.webm"} and row["turns"][0]["assistant"] == "plastic falling like a feather or paper"
    with pytest.raises(SystemExit, match="test split has no labels"):
        build("ssv2", tmp_path, "--split", "test")


def egotimeqa(root):
    record = {"video_id": "16fc2d81", "sample_id": "16fc2d81", "answer": "gave it to Person B", "question": "What did l do with the coffee?",
              "moment_start_frame": -3.4, "moment_end_frame": 3857.57, "wrong_answers": ["drank it", "left it", "spilled it"]}
    write(root / "annotations.EgoTimeQA.json", [record, record | {"question": "Where did I go?"}])
    return root


def test_egotimeqa(tmp_path):
    rows = build("egotimeqa", egotimeqa(tmp_path))
    row = rows["egotimeqa/16fc2d81/1"]
    assert row["ego"] == {"video": "16fc2d81.mp4"} and "What did I do with the coffee?" in row["turns"][0]["user"]
    assert row["turns"][0]["assistant"] == "gave it to Person B"
    records = json.loads((tmp_path / "annotations.EgoTimeQA.json").read_text())
    write(tmp_path / "annotations.EgoTimeQA.json", records + [records[0] | {"wrong_answers": ["one"]}])
    with pytest.raises(SystemExit, match="record 3.*1 wrong answers, not 3"):
        build("egotimeqa", tmp_path)


def openeqa(root):
    write(root / "open-eqa-v0.json", [
        {"question": "What is the white object on the wall above the TV?", "answer": "Air conditioning unit", "category": "object recognition",
         "question_id": "f2e82760", "episode_history": "hm3d-v0/000-hm3d-BFRyYbPCCPE"},
        {"question": "Is it warm", "answer": "yes", "category": "x", "question_id": "q2", "episode_history": "hm3d-v0/000-hm3d-BFRyYbPCCPE",
         "extra_answers": ["sure"]}])
    return root


def test_openeqa(tmp_path):
    folder = openeqa(tmp_path) / "frames/hm3d-v0/000-hm3d-BFRyYbPCCPE"
    folder.mkdir(parents=True)
    for i in range(6):
        (folder / f"{i}-rgb.png").write_bytes(encode_png(np.full((16, 16, 3), 40 * i, np.uint8)))
        (folder / f"{i}-depth.png").write_bytes(encode_png(np.full((16, 16, 3), 255, np.uint8)))
    build("openeqa", tmp_path)
    row = read_manifest(tmp_path / "out.jsonl")[0]
    frames = read_clip(row["ego"]["video"], None, None, 6, 16, None, row["ego"]["fps"])
    assert frames[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160, 200]        # never a depth file
    assert row["turns"][0]["assistant"] == "Air conditioning unit"


def egoexolearn(root):
    write(root / "annotations/fine_annotation_trainval_en.csv",
          "annotation_id,narration_en,start_sec,view,end_sec,subset,scene,video_uid,narration_en_hand_prompt,narration_en_no_hand_prompt\n"
          'a1,"Use your left hand to hold the meat, and\nuse your right hand to cut.",0.5,ego,70.30000000000001,train,kitchen,vid,x,y\n'
          "a2,You open it,9.0,ego,9.5,train,kitchen,vid,x,y\na3,You open it,1.0,exo,2.0,train,lab,vid,x,y\n"
          "a4,You close it,1.0,ego,2.0,val,lab,vid,x,y\n")
    return root


def test_egoexolearn(tmp_path, capsys):
    numbered(egoexolearn(tmp_path) / "vid.mp4")                             # 6 s
    rows = build("egoexolearn", tmp_path)
    assert list(rows) == ["egoexolearn/a1"] and rows["egoexolearn/a1"]["ego"] == {"video": "vid.mp4", "start": 0.5, "end": 6.0}
    assert rows["egoexolearn/a1"]["turns"][0]["assistant"] == "Use my left hand to hold the meat, and\nuse my right hand to cut."
    out = capsys.readouterr().out
    assert "beyond the video's end: 1" in out and "cut at the video's end: 1" in out
    assert list(build("egoexolearn", tmp_path, "--split", "val")) == ["egoexolearn/a4"]


@pytest.mark.parametrize("told, mine", (
    ("Use your left hand to hold the cup in front of you.", "Use my left hand to hold the cup in front of me."), ("You open it, and you are done", "I open it, and I am done"),
    ("He hands you the knife; do it yourself before you cut.", "He hands me the knife; do it myself before I cut."),
    ("so that you can turn it towards you", "so that I can turn it towards me"), ("Your young cook thanks you", "My young cook thanks me"),
    ("You're cutting while you're stirring.", "I am cutting while I am stirring."), ("You were there", "I was there")))
def test_the_second_person_becomes_the_first(told, mine):
    assert data.in_first_person(told) == mine


def test_an_unsure_flag_may_be_null():
    assert [data._is_true(flag) for flag in (True, "1", False, "0", None)] == [True, True, False, False, False]
    with pytest.raises(ValueError, match="a flag is 2"):
        data._is_true(2)


def test_openeqa_answers_lose_their_spaces(tmp_path):
    write(tmp_path / "open-eqa-v0.json", [{"question": "What? ", "answer": " A cup ", "question_id": "q", "episode_history": "hm3d/1"}])
    turn, = build("openeqa", tmp_path)["openeqa/q"]["turns"]
    assert turn["assistant"] == "A cup" and turn["user"].endswith("What?")


def talk(root):
    write(root / "talk.json", [
        {"id": 0, "video": "videos/a.mp4", "image": "wins.mp4", "start": 1.5, "end": 2.5,
         "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cup."},
                           {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
        {"id": "x_0", "image": {"video": "b.mp4"}, "conversations": [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Which?\n<video>"},
                                                                     {"from": "gpt", "value": "B"}]},
        {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi"}]}])
    return root


def test_conversations(tmp_path, capsys):
    rows = build("conversations", talk(tmp_path), "--file", "talk.json")
    assert rows["0"]["ego"] == {"video": "wins.mp4", "start": 1.5, "end": 2.5}      # image wins over video
    assert rows["0"]["turns"] == [{"user": "What?", "assistant": "A cup."}, {"user": "Sure?", "assistant": "Yes."}]
    assert rows["x_0"]["ego"] == {"video": "b.mp4"} and rows["x_0"]["turns"] == [{"user": "Which?", "assistant": "B"}]
    assert "without a video: 1" in capsys.readouterr().out
    assert build("conversations", tmp_path, "--file", "talk.json", "--view", "exo")["0"]["exo"][0]["video"] == "wins.mp4"
    records = json.loads((tmp_path / "talk.json").read_text())
    write(tmp_path / "lines.jsonl", "".join(json.dumps(r) + "\n" for r in [records[0], records[0], records[1] | {"image": None, "video": "v.mkv"},
                                                                           records[1] | {"image": "still.jpg"}]))
    rows = build("conversations", tmp_path, "--file", "lines.jsonl")        # ids repeat in the real files; stills are no videos
    odd = json.dumps(records[0] | {"conversations": [{"from": "human", "value": "a\u2028b"}, {"from": "gpt", "value": "c"}]}, ensure_ascii=False)
    (tmp_path / "odd.jsonl").write_text(odd + "\n\n")           # a line separator inside a string, an empty line at the end
    assert build("conversations", tmp_path, "--file", "odd.jsonl")["0"]["turns"][0]["user"] == "a\u2028b"
    assert list(rows) == ["0", "0#2", "x_0"] and rows["x_0"]["ego"]["video"] == "v.mkv" and "still image: 1" in capsys.readouterr().out
    for change, words in (({"conversations": [{"from": "human", "value": "odd"}]}, "take turns"),
                          ({"conversations": [{"from": "robot", "value": "?"}, {"from": "gpt", "value": "!"}]}, "robot"),
                          ({"conversations": 7}, "record 2")):
        records = json.loads((tmp_path / "talk.json").read_text())
        write(tmp_path / "broken.json", [records[0], records[1] | change])
        with pytest.raises(SystemExit, match=f"broken.json record 2.*{words}|broken.json {words}"):
            build("conversations", tmp_path, "--file", "broken.json")
    write(tmp_path / "broken.json", "[{]")
    with pytest.raises(SystemExit, match="broken.json is not as expected"):
        build("conversations", tmp_path, "--file", "broken.json")


def test_conversations_of_other_tools(tmp_path):
    """EgoGPT counts frames and marks speech; VideoLLaMA3 lists one video, and a system speaks first."""
    said = [{"from": "human", "value": "<video>\n<speech>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
    write(tmp_path / "talk.json", [
        {"id": 0, "video": "v.mp4", "start_frame": 10, "end_frame": 35, "conversations": said},
        {"id": 1, "video": ["v.mp4"], "conversations": [{"from": "system", "value": "Be brief."}, *said]},
        {"id": 2, "video": "walk.gif", "conversations": said}])
    numbered(tmp_path / "v.mp4")                                            # 10 frames a second
    rows = build("conversations", tmp_path, "--file", "talk.json")
    assert rows["0"]["ego"] == {"video": "v.mp4", "start": 1.0, "end": 3.5} and rows["2"]["ego"]["video"] == "walk.gif"
    assert rows["0"]["turns"] == [{"user": "What?", "assistant": "A cup."}]
    assert rows["1"]["ego"] == {"video": "v.mp4"} and rows["1"]["turns"] == [{"system": "Be brief.", "user": "What?", "assistant": "A cup."}]
    for change, words in (({"video": "gone.mp4", "start_frame": 1, "end_frame": 2}, "gone.mp4 cannot be read"),
                          ({"video": ["a.mp4", "b.mp4"]}, "talk.json record 1")):
        write(tmp_path / "talk.json", [{"id": 0, "conversations": said} | change])
        with pytest.raises(SystemExit, match=words):
            build("conversations", tmp_path, "--file", "talk.json")


def test_something_something_in_the_folder_of_its_archive(tmp_path):
    (ssv2(tmp_path) / "20bn-something-something-v2").mkdir()
    assert {row["ego"]["video"].split("/")[0] for row in build("ssv2", tmp_path).values()} == {"20bn-something-something-v2"}


def test_ten_instructions_a_source_chosen_by_the_row(tmp_path):
    for source, described in EGOIT.items():
        details, ten = described.task, described.instructions
        assert len(set(ten)) == 10 and details
        assert all(("{}" in t) == (source in ("egotimeqa", "openeqa")) for t in ten)
        chosen = Counter(data.instruction(source, str(i), "base", "Q?") for i in range(1000))
        assert len(chosen) == 10 and min(chosen.values()) > 60
        base, task, cue = (data.instruction(source, "7", prompt, "Q?") for prompt in ("base", "task", "cue"))
        assert task == f"{details}\n{base}" and cue == f"{data.CUE}\n{task}"
    first = build("egtea", egtea(tmp_path), "--prompt", "base")
    assert first == build("egtea", tmp_path, "--prompt", "base") != build("egtea", tmp_path)


# ---------------------------------------------------------------------------------------- wrong files, for all
SOURCES = {"ego-exo4d": (ego_exo, ()), "egoclip": (egoclip, ()), "egtea": (egtea, ()), "ssv2": (ssv2, ()), "egotimeqa": (egotimeqa, ()),
           "openeqa": (openeqa, ()), "egoexolearn": (egoexolearn, ()), "conversations": (talk, ("--file", "talk.json"))}


@pytest.mark.parametrize("command", BUILDERS)
def test_a_missing_file_is_named(tmp_path, command):
    flags = SOURCES[command][1]
    with pytest.raises(SystemExit, match="is missing"):
        build(command, tmp_path, *flags)


def breakings(content: str, rng: random.Random):
    """One way to damage an annotation file."""
    kind = rng.randrange(6)
    at = rng.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:                                       # another type where something stood
        return re.sub(r'"[^"]*"|\d+\.?\d*', lambda m: rng.choice(("null", "[]", '"x"', "-1e999", "{}")) if rng.random() < 0.1 else m[0], content)
    if kind == 2:
        return re.sub(r'"(\w+)":', lambda m: f'"{m[1]}_":' if rng.random() < 0.05 else m[0], content)     # a field goes
    if kind == 3:
        return content[:at] + rng.choice(("\x00", "\t", '"', "}", "\ud7ff", "[" * 3000)) + content[at:]
    if kind == 4:
        return content.replace("1", rng.choice(("9" * 400, "NaN", "Infinity", "-1")))
    return "".join(rng.sample(content, len(content)))


@pytest.mark.parametrize("command", BUILDERS)
def test_broken_annotations_give_rows_or_one_sentence(tmp_path, command, capsys):
    """25 damaged files a builder, 200 in all."""
    make, flags = SOURCES[command]
    rng, outcomes = random.Random(command), Counter()
    for trial in range(25):
        root = make(tmp_path / str(trial))
        files = sorted(p for p in root.rglob("*") if p.suffix in (".json", ".csv", ".txt") and p.name != "test.json")
        path = rng.choice(files)
        path.write_bytes(breakings(path.read_text(), rng).encode(errors="surrogatepass"))
        try:
            build(command, root, *flags)
            outcomes["rows"] += 1
            read_manifest(root / "out.jsonl")
        except SystemExit as error:
            assert str(error).startswith("data.py: ") and str(error).count("\n") <= 1, error
            outcomes["sentence"] += 1
    assert outcomes["sentence"] >= 5, outcomes


# ----------------------------------------------------------------------------------------------------- check
def small_set(root):
    """Six rows: four good, one blank, one of a video that is not there."""
    numbered(root / "a.mp4")
    data.write_video(root / "short.mp4", np.random.default_rng(0).integers(0, 255, (30, 48, 48, 3), np.uint8), 10)
    data.write_video(root / "black.mp4", np.zeros((60, 48, 48, 3), np.uint8), 10)
    rows = [{"id": f"g{i}", "ego": {"video": "a.mp4", "start": i or 0.2, "end": i + 1.0}, "text": "x"} for i in range(4)]
    rows += [{"id": "black", "ego": {"video": "black.mp4", "start": 0, "end": 1}, "text": "x"},
             {"id": "gone", "ego": {"video": "gone.mp4"}, "text": "x"},
             {"id": "over", "ego": {"video": "a.mp4", "start": 5.5, "end": 9.0}, "text": "x"},
             {"id": "uneven", "ego": {"video": "a.mp4"}, "exo": [{"video": "short.mp4"}], "text": "x"}]
    write_jsonl(root / "m.jsonl", rows)
    return root / "m.jsonl"


def test_check_names_what_is_wrong_and_training_skips_it(tmp_path, capsys):
    manifest = small_set(tmp_path)
    with pytest.raises(SystemExit, match=r"50.0% of the rows are bad, more than --max-bad 1.0%"):
        data.main(["check", str(manifest)])
    out = capsys.readouterr().out
    for words in ("black: blank", "gone: missing", "over: too short", "uneven: ego and exo differ", "4 of 8 rows are good"):
        assert words in out
    kept = read_manifest(manifest)
    assert [row["id"] for row in kept] == ["g0", "g1", "g2", "g3"] and "4 of 8 rows are left out" in capsys.readouterr().out
    data.main(["check", str(manifest), "--max-bad", "0.6"])
    write_jsonl(tmp_path / "deep/x.jsonl", [{"id": "out", "ego": {"video": str(tmp_path / "black.mp4"), "start": 0, "end": 1}, "text": "x"},
                                            {"id": "good", "ego": {"video": str(tmp_path / "a.mp4"), "start": 0, "end": 1}, "text": "x"}])
    data.main(["check", str(tmp_path / "deep/x.jsonl"), "--max-bad", "0.6", "--allow-outside"])
    (tmp_path / "deep").rename(tmp_path / "other")              # files that are named absolutely stay where they are
    assert [row["id"] for row in read_manifest(tmp_path / "other/x.jsonl", allow_outside=True)] == ["good"]
    tmp_path.rename(tmp_path.with_name("moved"))                # the list goes with its files
    assert [row["id"] for row in read_manifest(tmp_path.with_name("moved") / manifest.name)] == ["g0", "g1", "g2", "g3"]


def test_a_camera_that_was_stopped_later_is_no_bad_one(tmp_path, capsys):
    """Every row of such a set was on the skip list, and training then had none."""
    small_set(tmp_path)
    write_jsonl(tmp_path / "later.jsonl", [{"id": "later", "ego": {"video": "a.mp4", "start": 1, "end": 2}, "exo": [
        {"video": "short.mp4", "start": 1, "end": 2}], "text": "x"}])
    data.main(["check", str(tmp_path / "later.jsonl")])
    out = capsys.readouterr().out
    assert "has videos that last 6.00, 3.00 s: do they begin together?" in out and "1 of 1 rows are good; videos differ in length: 1" in out


def test_check_outlives_decoders_that_hang_or_crash(tmp_path, monkeypatch, capsys):
    manifest, read = small_set(tmp_path), data.read_clip

    def trap(video, start, *rest):
        if start == 1:
            while True:                                     # hangs: the kernel's alarm ends the worker
                pass
        if start == 2:
            import os
            os.kill(os.getpid(), 11)                        # a decoder that crashes
        return read(video, start, *rest)
    monkeypatch.setattr(data, "read_clip", trap)
    with pytest.raises(SystemExit, match="more than --max-bad"):
        data.main(["check", str(manifest), "--limit", "1"])
    out = capsys.readouterr().out
    assert "g1: hangs or crashes" in out and "g2: hangs or crashes" in out and "g0: hangs" not in out and "g3: hangs" not in out


def test_check_waits_while_rows_begin(tmp_path):
    """Ten rows that each take longer than the limit give no reply, but one after another they begin: a good row behind them is waited for."""
    import multiprocessing
    begun, replies = tmp_path / "begun", []

    class Pool:
        def next(self, timeout):
            replies.append(timeout)
            if len(replies) == 11:
                return "g", ([], [])
            if len(replies) < 11:
                begun.write_bytes(b"." * len(replies))
            raise multiprocessing.TimeoutError
    begun.touch()
    assert list(data._until_silence(Pool(), begun, 7)) == [("g", ([], []))] and replies == 12 * [7]


def test_a_bad_record_is_of_its_own_split(tmp_path):
    root = ego_exo(tmp_path)
    train_file = root / "annotations/atomic_descriptions_train.json"
    write(root / "annotations/atomic_descriptions_val.json", {"annotations": {}})
    content = json.loads(train_file.read_text())
    del content["annotations"]["u1"][0]["descriptions"][0]["ego_visible"]
    write(train_file, content)
    with pytest.raises(SystemExit, match="atomic_descriptions_train.json: take cmu_bike_1, annotator p1, narration 0"):
        build("ego-exo4d", root, "--split", "all")


def test_a_text_of_two_lines_with_many_commas_is_one_cell(tmp_path):
    """A cell that swallowed rows ends as the row it ends with: with the commas of the cells before it."""
    text = "take the bowl, and pour water, oil, salt, sugar\nand stir"
    (tmp_path / "t.csv").write_text(f'a,b,c\n1,"{text}",3\n4,"swallows,0\n5,6,7\n8,9",10\n')
    files = data.Files(tmp_path)
    assert [row["b"] for row in files.table("t.csv")] == [text] and files.count["malformed line"] == 1


def test_conversations_need_their_file(tmp_path):
    with pytest.raises(SystemExit, match="--file is needed"):
        build("conversations", talk(tmp_path))


def test_a_folder_of_images_trains(tmp_path, toy):
    """Through the loader, at the row's own rate."""
    from model import PRESETS
    folder = tmp_path / "walk"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}-rgb.png").write_bytes(encode_png(np.full((48, 48, 3), 20 * i, np.uint8)))
    write_jsonl(tmp_path / "m.jsonl", [{"id": "w", "ego": {"video": "walk", "fps": 3}, "text": "Camera-wearer walks."}])
    loader = data.Loader(read_manifest(tmp_path / "m.jsonl"), PRESETS["toy"], data.Tokenizer(toy / "toy" / "tokenizer.model"), view="ego", batch=1)
    batch = loader.batch(0)[0]
    assert batch.ego.shape == (1, 4, 3, 48, 48) and not batch.skipped
    with pytest.raises(DataError, match='"fps" is -1'):
        write_jsonl(tmp_path / "bad.jsonl", [{"id": "w", "ego": {"video": "walk", "fps": -1}, "text": "x"}])
        read_manifest(tmp_path / "bad.jsonl")


# ---------------------------------------------------------------------------- what a second reader found, kept found
def test_one_bad_record_in_many_is_counted(tmp_path, capsys):
    lines = (egoclip(tmp_path) / "egoclip.csv").read_text().split("\n")
    good = lines[1].split("\t")
    rows = ["\t".join(good) for i in range(300)]
    broken = ["\t".join([*good[:5], "", *good[6:]]), "only\tthree\tcells"]
    write(tmp_path / "egoclip.csv", "\n".join([lines[0], *rows, *broken]))
    assert len(build("egoclip", tmp_path)) == 300
    said = capsys.readouterr().out
    assert "bad record (ValueError): 1, the first: " in said and "egoclip.csv record 301: could not convert string to float" in said
    assert "bad record (KeyError): 1, the first: " in said and "egoclip.csv record 302: 'clip_start'" in said


def test_the_first_bad_record_of_a_table_is_named(tmp_path):
    lines = (egoclip(tmp_path) / "egoclip.csv").read_text().split("\n")
    write(tmp_path / "egoclip.csv", "\n".join([lines[0], lines[1], lines[2].replace("-0.3", "soon")]))
    with pytest.raises(SystemExit, match="egoclip.csv record 2 is not as expected"):
        build("egoclip", tmp_path)
    write(tmp_path / "egoclip.csv", "\n".join([lines[0].replace("clip_end", "stop"), lines[1]]))
    with pytest.raises(SystemExit, match="egoclip.csv record 1 lacks 'clip_end'"):
        build("egoclip", tmp_path)


def test_two_annotations_by_one_annotator_and_a_broken_video(tmp_path, capsys):
    root = ego_exo(tmp_path)
    path = root / "annotations/atomic_descriptions_train.json"
    content = json.loads(path.read_text())
    content["annotations"]["u1"][1]["annotator_id"] = "p1"
    content["annotations"]["u1"][0]["descriptions"].append(said("C leaves.", 300.0))         # after the take's end
    write(path, content)
    small = root / "takes/cmu_bike_1/frame_aligned_videos/downscaled/448"
    small.mkdir(parents=True)
    (small / "cam01.mp4").write_bytes(b"")
    rows = build("ego-exo4d", root)
    assert len(rows) == 3
    assert "later than its take: 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--alpha 0"):
        build("ego-exo4d", root, "--alpha", "0")


def test_blank_is_seen_in_any_shape_and_one_dark_frame_is_none(tmp_path, capsys):
    blue = np.zeros((20, 48, 96, 3), np.uint8)
    blue[..., 2] = 255
    data.write_video(tmp_path / "blue.mp4", blue, 10)
    fade = np.random.default_rng(0).integers(0, 255, (20, 48, 96, 3), np.uint8)
    fade[:3] = 0
    data.write_video(tmp_path / "fade.mp4", fade, 10)
    write_jsonl(tmp_path / "m.jsonl", [{"id": name, "ego": {"video": f"{name}.mp4"}, "text": "x"} for name in ("blue", "fade")])
    data.main(["check", str(tmp_path / "m.jsonl"), "--max-bad", "0.5"])
    assert "blue: blank" in (out := capsys.readouterr().out) and "fade: blank" not in out


def test_a_bad_exo_view_leaves_the_others(tmp_path):
    numbered(tmp_path / "a.mp4")
    numbered(tmp_path / "b.mp4")
    span = {"start": 1, "end": 2}
    write_jsonl(tmp_path / "m.jsonl", [{"id": "r", "ego": {"video": "a.mp4", **span}, "text": "x",
                                        "exo": [{"video": "b.mp4", **span}, {"video": "gone.mp4", **span}]}])
    data.main(["check", str(tmp_path / "m.jsonl"), "--max-bad", "1"])
    assert [clip["video"][-5:] for clip in read_manifest(tmp_path / "m.jsonl")[0]["exo"]] == ["b.mp4"]


# ------------------------------------------------------------------- what a file says is checked where it enters
def many(root, count=300, change=None):
    """An Ego-Exo4D set of one take and one annotator with so many narrations, a second apart; `change(narrations)`."""
    ego_exo(root)
    path = root / "annotations/atomic_descriptions_train.json"
    content = json.loads(path.read_text())
    narrated = [said(f"C cuts tomato {i}.", float(i)) for i in range(count)]
    if change:
        change(narrated)
    content["annotations"] = {"u1": [{"annotation_uid": "a", "annotator_id": "p1", "rejected": False, "descriptions": narrated}]}
    write(path, content)
    takes = json.loads((root / "takes.json").read_text())
    takes[0]["duration_sec"] = count + 1.0
    write(root / "takes.json", takes)
    return root


@pytest.mark.parametrize("time, reason", ((float("nan"), "without a time"), (float("-inf"), "without a time"), (None, "without a time"),
                                          ("soon", "without a time"), (-0.5, "before its take"), (-1e9, "before its take"), (1e9, "later than its take")))
def test_a_narration_without_a_time_of_its_take_costs_itself(tmp_path, capsys, time, reason):
    """The others of its annotator keep their times: none is at 0 ... 60 s."""
    def change(narrated):
        narrated[3]["timestamp"] = time
    rows = build("ego-exo4d", many(tmp_path, 6, change))
    assert [key[-1] for key in rows] == list("01245") and f"{reason}: 1" in capsys.readouterr().out
    gap = 5 / 4                                             # five narrations from 0 to 5 s
    assert rows["cmu_bike_1/p1/4"]["ego"] | {"video": ""} == {"video": "", "start": pytest.approx(4 - gap / 9.8), "end": pytest.approx(4 + gap / 9.8)}


@pytest.mark.parametrize("bad, kind", (({"text": None}, "without a text: 1"), ({"text": " "}, "without a text: 1"),
                                       ({"text": "C cuts \ud83d"}, "bad record (half of a character): 1, the first: "),
                                       ({"ego_visible": 2}, "bad record (ValueError): 1, the first: ")))
@pytest.mark.parametrize("place", (0, 117))
def test_a_bad_narration_costs_itself(tmp_path, capsys, bad, kind, place):
    """Not its take, and not the build where it comes first."""
    rows = build("ego-exo4d", many(tmp_path, 300, lambda narrated: narrated[place].update(bad)))
    out = capsys.readouterr().out
    assert len(rows) == 299 and f"cmu_bike_1/p1/{place}" not in rows and kind in out
    assert "the first" not in kind or f"take cmu_bike_1, annotator p1, narration {place}" in out


def test_the_first_bad_record_of_each_reason_is_named(tmp_path, capsys):
    """An impossible row among 300 (1 %), wherever it stands; more than that are another format."""
    good = {"video": "v.mp4", "start": 1, "end": 2, "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cup."}]}
    records = [{"id": i} | good for i in range(300)]
    records[0] |= {"start": 2}
    records[7]["conversations"] = [{"from": "human", "value": "What \ud83d?"}, {"from": "gpt", "value": "A cup."}]
    records[8] |= {"start": float("nan")}
    write(tmp_path / "talk.json", records)
    assert len(build("conversations", tmp_path, "--file", "talk.json")) == 297
    out = capsys.readouterr().out
    for record, reason in ((1, "zero length"), (8, "half of a character"), (9, "no number")):
        assert re.search(rf"bad record \({reason}\): 1, the first: \S*talk.json record {record}", out), out
    assert len(read_manifest(tmp_path / "out.jsonl")) == 297
    before = (tmp_path / "out.jsonl").read_bytes()
    write(tmp_path / "talk.json", records[:299])
    with pytest.raises(SystemExit, match="talk.json record 1.* zero length"):
        build("conversations", tmp_path, "--file", "talk.json")
    assert (tmp_path / "out.jsonl").read_bytes() == before and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("column", ("clip_start", "clip_end"))
@pytest.mark.parametrize("value", ("nan", "inf", "-inf", ""))
def test_egoclip_has_no_time_that_is_no_number(tmp_path, capsys, column, value):
    lines = (egoclip(tmp_path) / "egoclip.csv").read_text().split("\n")
    rows = [lines[1].split("\t") for _ in range(200)]
    rows[5][CLIPS.split("\t").index(column)] = value
    write(tmp_path / "egoclip.csv", "\n".join([lines[0], *map("\t".join, rows)]))
    made = build("egoclip", tmp_path)
    assert len(made) == 199 and "egoclip/5" not in made and "egoclip.csv record 6: " in capsys.readouterr().out


@pytest.mark.parametrize("rows, words", (
    (lambda k: f'a{k},"You cut, and wash,{k}.0,ego,{k}.5,train,kitchen,vid,x,y', "a quotation mark is not closed"),
    (lambda k: f'a{k},You cut "it,{k}.0,ego,{k}.5,train,kitchen,vid,x,"', "a quotation mark is not closed"),
    (lambda k: f'a{k},"You cut" it,{k}.0,ego,{k}.5,train,kitchen,vid,x,y', "a quotation mark is not closed")))
@pytest.mark.parametrize("quoted", (True, False))
def test_an_open_quotation_mark_swallows_no_rows(tmp_path, rows, words, quoted):
    """Row 100 of 300."""
    header = "annotation_id,narration_en,start_sec,view,end_sec,subset,scene,video_uid,narration_en_hand_prompt,narration_en_no_hand_prompt\n"
    text = '"You open it, and wait"' if quoted else "You open it"
    lines = [rows(k) if k == 100 else f"a{k},{text},{k}.0,ego,{k}.5,train,kitchen,vid,x,y" for k in range(300)]
    write(tmp_path / "annotations/fine_annotation_trainval_en.csv", header + "\n".join(lines) + "\n")
    with pytest.raises(SystemExit, match=words):
        build("egoexolearn", tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_mark_that_a_later_row_closes_costs_these_rows(tmp_path, capsys):
    header = "annotation_id,narration_en,start_sec,view,end_sec,subset,scene,video_uid,narration_en_hand_prompt,narration_en_no_hand_prompt\n"
    lines = [f"a{k},You open it,{k}.0,ego,{k}.5,train,kitchen,vid,x,y" for k in range(300)]
    lines[100] = lines[100].replace("You", '"You')
    lines[103] = lines[103].replace("it", 'it"')
    write(tmp_path / "annotations/fine_annotation_trainval_en.csv", header + "\n".join(lines) + "\n")
    assert len(build("egoexolearn", tmp_path)) == 296 and "malformed line: 1" in capsys.readouterr().out


def test_a_conversation_is_taken_as_far_as_its_keys_are_known(tmp_path, capsys):
    talk = [{"from": "human", "value": "<video>\nWhat does <video> mean?"}, {"from": "gpt", "value": "A <video> or an <image>."}]
    records = [{"id": "a", "videos": ["v.mp4"], "conversations": talk}, {"id": "b", "video_path": "v.mp4", "conversations": talk},
               {"id": "c", "video": {"video": "v.mp4", "begin": 3}, "conversations": talk}, {"id": "d", "video": "v.mp4", "start_time": 3, "end_time": 4, "conversations": talk},
               {"id": "e", "images": ["a.jpg"], "conversations": talk}, {"id": "f", "image": None, "conversations": talk}]
    write(tmp_path / "talk.json", records)
    rows = build("conversations", tmp_path, "--file", "talk.json")
    out = capsys.readouterr().out
    assert list(rows) == list("abcd") and all(row["ego"] == {"video": "v.mp4"} for row in rows.values())
    for words in ("key 'start_time', which nothing reads: 1", "key 'end_time', which nothing reads: 1", "key 'begin', which nothing reads: 1",
                  "key 'images', which nothing reads: 1", "without a video: 2"):
        assert words in out, out
    # Words of an answer, and within a question, are words; a row has no narration unless it was narrated.
    assert rows["a"]["turns"] == [{"user": "What does <video> mean?", "assistant": "A <video> or an <image>."}] and "text" not in rows["a"]
    write(tmp_path / "talk.json", [records[0] | {"videos": ["a.mp4", "b.mp4"]}])
    with pytest.raises(SystemExit, match="2 videos: a row shows one"):
        build("conversations", tmp_path, "--file", "talk.json")


def test_ids_differ_whatever_they_were(tmp_path):
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cup."}]
    write(tmp_path / "talk.json", [{"id": i, "video": "v.mp4", "conversations": talk} for i in ("1", "1#2", "1", 1, "1#2", "1#3")])
    rows = build("conversations", tmp_path, "--file", "talk.json")
    assert list(rows) == ["1", "1#2", "1#3", "1#4", "1#2#2", "1#3#2"]
    assert len(read_manifest(tmp_path / "out.jsonl")) == 6


def test_frame_numbers_of_a_variable_rate_are_looked_up(tmp_path):
    """30 per second for 2 s, then 10: the mean would place frame 50 at 2.86 s."""
    from test_video import encode
    times = [*np.arange(30) / 30, *(1 + np.arange(30) / 10)]
    encode(tmp_path / "v.mp4", times=times, options={"bf": "2"})
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cup."}]
    write(tmp_path / "talk.json", [{"id": i, "video": "v.mp4", "start_frame": a, "end_frame": b, "conversations": talk}
                                   for i, (a, b) in enumerate(((15, 21), (30, 50), (15.5, 60)))])
    rows = build("conversations", tmp_path, "--file", "talk.json")
    for key, start, end in (("0", 0.5, 0.7), ("1", 1.0, 3.0), ("2", 0.517, 4.0)):
        assert rows[key]["ego"]["start"] == pytest.approx(start, abs=2e-3) and rows[key]["ego"]["end"] == pytest.approx(end, abs=0.12 if key == "2" else 2e-3)


def test_a_skip_list_of_something_else_is_named(tmp_path):
    write_jsonl(tmp_path / "m.jsonl", [{"id": "a", "text": "x"}])
    for line in ("{", "[]", '{"id": "a"}', '{"id": "a", "videos": 3}', '{"id": "a", "videos": [3]}', "null"):
        (tmp_path / "m.bad.jsonl").write_text('{"id": "b", "videos": []}\n' + line + "\n")
        with pytest.raises(DataError, match="m.bad.jsonl line 2 is none of data.py check's: run it again, or remove"):
            read_manifest(tmp_path / "m.jsonl")
