"""Video reading never lies, manifests fail by name, and a batch is a function of (seed, step, rank)."""
import atexit
import errno
import json
import os
import signal
import subprocess
import sys
import time
import types
from fractions import Fraction

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import REPO, run

import data
from data import DataError, Loader, Tokenizer, World, read_clip, read_manifest, read_manifests, write_jsonl, write_video
from model import IGNORE, PRESETS, VIDEO

FPS = 10


def numbered(path, frames=60, size=48, fps=FPS, gop=12):
    """A video whose pixels carry the frame number, as six bits in six fields."""
    images = np.zeros((frames, size, size, 3), np.uint8)
    for i in range(frames):
        for bit in range(6):
            images[i, :, bit * size // 6:(bit + 1) * size // 6] = 235 if i >> bit & 1 else 20
    write_video(path, images, fps, gop)
    return path


def number(frame):
    """(3, S, S) -> the frame number its pixels carry."""
    fields = np.array_split(frame.mean(0).mean(0), 6)
    return sum((field[1:-1].mean() > 128) << bit for bit, field in enumerate(fields))


@pytest.mark.parametrize("gop", (1, 8, 60))
def test_every_frame_is_the_one_asked_for(tmp_path, gop):
    video = numbered(tmp_path / "v.mp4", gop=gop)
    for start, end, frames in ((0, 6, 16), (1.0, 2.0, 5), (3.7, 4.1, 4), (2.3, 2.4, 3), (5.5, 6.0, 5), (None, None, 6)):
        clip = read_clip(video, start, end, frames, 48)
        begin, stop = start or 0, 6 if end is None else end
        moments = begin + (stop - begin) * (np.arange(frames) + 0.5) / frames
        assert [number(f) for f in clip] == [int(t * FPS + 1e-6) for t in moments]


def test_training_frames_are_random_within_their_span(tmp_path):
    video, seen = numbered(tmp_path / "v.mp4"), set()
    for seed in range(20):
        rng, again = (np.random.default_rng(seed) for _ in range(2))
        clip = read_clip(video, 0, 6, 4, 48, rng)
        numbers = [number(f) for f in clip]
        assert numbers == [int(t * FPS + 1e-6) for t in 6 * (np.arange(4) + again.random(4)) / 4]
        assert all(15 * i <= n < 15 * (i + 1) for i, n in enumerate(numbers))
        seen.update(numbers)
    assert len(seen) > 20


def test_a_short_clip_repeats_real_frames(tmp_path):
    video = numbered(tmp_path / "v.mp4")
    assert [number(f) for f in read_clip(video, 2.0, 2.2, 6, 48)] == [20, 20, 20, 21, 21, 21]


def test_wide_video_is_padded_to_a_square(tmp_path):
    write_video(tmp_path / "w.mp4", np.full((4, 32, 64, 3), 200, np.uint8), FPS)
    clip = read_clip(tmp_path / "w.mp4", None, None, 2, 48)
    assert clip.shape == (2, 3, 48, 48) and abs(int(clip[0, 0, 24, 24]) - 200) < 12 and clip[0, 0, 2, 24] == 122


def test_bad_videos_are_named(tmp_path):
    video = numbered(tmp_path / "v.mp4")
    whole = video.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:len(whole) // 3])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("ffconcat version 1.0\nfile v.mp4\n")
    for name in ("missing.mp4", "cut.mp4", "empty.mp4", "text.mp4"):
        with pytest.raises(DataError, match=name):
            read_clip(tmp_path / name, 0, 1, 4, 48)
    with pytest.raises(DataError, match="no length"):
        read_clip(video, 2.0, 2.0, 4, 48)
    with pytest.raises(DataError, match="starts at 9"):
        read_clip(video, 9.0, 9.5, 4, 48)


@pytest.mark.parametrize("line, words", [
    ("{not json", "line 2 is not JSON"), ('{"ego": {}}', 'line 2 lacks "id"'), ('[1]', 'line 2 lacks "id"'),
    ('{"id": "a", "ego": {"start": 0}}', 'lacks "video"'), ('{"id": "a", "exo": {"video": "v.mp4"}}', "list"),
    ('{"id": "a", "ego": {"video": "v.mp4", "start": 1, "end": 1}}', "zero length"),
    ('{"id": "a", "ego": {"video": "v.mp4", "start": NaN}}', "'nan', not a number"),
    ('{"id": "a", "ego": {"video": "../v.mp4"}}', "outside"), ('{"id": "a", "ego": {"video": "/etc/passwd"}}', "outside"),
    ('{"id": "a", "text": " "}', '"text" is empty, and what is trained would be silence'),
    ('{"id": "a", "turns": [{"user": "q", "assistant": ""}]}', '"assistant" is empty'), ('{"id": "a", "text": 3}', "string"), ('{"id": "a", "turns": [{"assistant": "q"}]}', "turns"),
    ('{"id": "a", "turns": [{"user": "q"}, {"user": "q", "assistant": "a"}]}', "turns"),
    ('{"id": "a", "ego": {"video": "v.mp4", "start": true}}', "'True', not a number"),
    ('{"id": "a", "ego": {"video": "v.mp4", "end": "7"}}', "'7', not a number"),
    ('{"id": "a", "ego": {"video": "v.mp4", "end": 1' + "0" * 400 + "}}", "not a number"),
    ('{"id": "a", "ego": {"video": "v.mp4", "fps": NaN}}', "not a number"),
    *[(json.dumps({"id": "a", view: clip if view == "ego" else [clip]}), f"a clip has {words}, which nothing reads")
      for view, clip, words in (("ego", {"video": "v.mp4", "start_sec": 12, "end_sec": 13}, "'end_sec', 'start_sec'"),
                                ("exo", {"video": "v.mp4", "begin": 1, "stop": 2}, "'begin', 'stop'"),
                                ("ego", {"video": "v.mp4", "start": 1, "End": 2}, "'End'"))],
    ('{"id": "a", "turns": [{"user": "q", "assistant": "a", "role": "x"}]}', "turns"),
    ('{"id": "a", "turns": [{"user": "<video> <video>", "assistant": "a"}]}', "more than one <video> mark"),
    (r'{"id": "a", "turns": [{"user": "What \ud83d am I doing?", "assistant": "a"}]}', "half of a character"),
    (r'{"id": "a", "text": "a \ude00"}', "half of a character"), ('{"id": "ok"}', "stands in line 1 already"),
    ("", "line 2 is not JSON")])
def test_bad_manifest_lines_are_named(tmp_path, line, words):
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": "ok", "text": "x"}\n' + line + '\n{"id": "last"}\n')
    with pytest.raises(DataError, match=words) as error:
        read_manifest(path)
    assert "m.jsonl line 2" in str(error.value)


def test_manifests_are_utf_8_and_may_end_in_blank_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"id": "a", "text": "Caf\u00e9 \U0001f600"}\r\n{"id": "b"}\n\n  \n'.encode())
    code = f"import data; print(ascii([row.get('text') for row in data.read_manifest({str(path)!r})]))"
    env = os.environ | {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, env=env)
    assert done.stdout == "['Caf\\xe9 \\U0001f600', None]\n", done.stderr


def test_a_row_too_long_is_left_out_before_the_first_step(toy, tmp_path, capsys):
    """523 tokens where 256 fit; a benchmark must not leave one out; data.py check says the same."""
    tokenizer, cfg = Tokenizer(toy / "toy" / "tokenizer.model"), PRESETS["toy"]
    rows = read_manifest(toy / "toy" / "ego.jsonl")[:4]
    rows[1]["text"] = "word " * 300
    rows[2]["turns"][0]["user"] = "word " * 300
    for supervise, left in (("narration", [0, 2, 3]), ("turns", [0, 1, 3]), ("mix", [0, 3])):
        one = Loader(rows, cfg, tokenizer, view="ego", supervise=supervise, batch=1)
        assert [rows.index(row) for row in one.rows] == left
        assert len([one.batch(step) for step in range(4)]) == 4
        said = capsys.readouterr().out
        assert f"{4 - len(left)} of 4 rows are too long and left out: " in said and "ego.jsonl line " in said
    with pytest.raises(DataError, match=r"ego.jsonl line 2 \('ego/0/1'\) has more tokens than the 256 that fit"):
        Loader(rows, cfg, tokenizer, view="ego", batch=1, train=False)
    with pytest.raises(DataError, match="shorten its text"):
        Loader(rows[1:2], cfg, tokenizer, view="ego", batch=1)
    # A text whose tokens just fit, with more bytes than that.
    room = cfg.max_length - len(tokenizer.chat([{"user": data.NARRATE, "assistant": ""}], cfg.visual_tokens)[0])
    for more, fits in ((0, True), (1, False)):
        text = " block" * (room + more - 1)
        assert len(tokenizer.encode(text)) == room + more
        assert data.is_too_long(data.chats_of({"text": text}, "narration"), tokenizer, cfg.visual_tokens, cfg) is not fits
    for row in rows:
        del row["where"]
    write_jsonl(tmp_path / "m.jsonl", rows)
    done = subprocess.run([sys.executable, "data.py", "check", str(tmp_path / "m.jsonl"), "--root", "/", "--tokenizer", str(tokenizer.path),
                           "--preset", "toy", "--max-bad", "1"], capture_output=True, text=True, cwd=REPO)
    assert "2 of 4 rows are good; too long: 2" in done.stdout
    assert len(read_manifest(tmp_path / "m.jsonl", root="/")) == 4


def test_a_row_that_lacks_what_a_stage_reads_is_named_with_its_strange_keys(toy, tmp_path):
    (tmp_path / "m.jsonl").write_text('{"id": "a", "ego": {"video": "v.mp4"}, "turn": []}\n')
    with pytest.raises(DataError, match=r"m.jsonl line 1 \('a'\) lacks \"text\", which this stage needs; it has 'turn', which nothing reads"):
        Loader(read_manifest(tmp_path / "m.jsonl"), PRESETS["toy"], Tokenizer(toy / "toy" / "tokenizer.model"), view="ego", batch=1)


def test_links_do_not_leave_the_root(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    numbered(tmp_path / "v.mp4")
    (inside / "link.mp4").symlink_to(tmp_path / "v.mp4")
    (inside / "m.jsonl").write_text('{"id": "a", "ego": {"video": "link.mp4"}}\n')
    with pytest.raises(DataError, match="outside"):
        read_manifest(inside / "m.jsonl")
    assert read_manifest(inside / "m.jsonl", allow_outside=True)


def test_the_root_may_be_the_whole_disk(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"id": "a", "ego": {"video": str(tmp_path / "v.mp4")}}) + "\n")
    assert read_manifest(tmp_path / "m.jsonl", root="/")[0]["ego"]["video"] == str(tmp_path / "v.mp4")


def test_several_manifests_are_one(tmp_path):
    """In their order, each with its own folder and skip list; one alone is as it always was."""
    for name in ("a", "b"):
        rows = [{"id": str(i), "ego": {"video": f"{i}.mp4"}, "text": f"{name}{i}"} for i in range(4)]
        write_jsonl(tmp_path / name / "m.jsonl", rows)
    write_jsonl(tmp_path / "b" / "m.bad.jsonl", [{"id": "2", "videos": ["2.mp4"], "reasons": []}])
    paths = [tmp_path / name / "m.jsonl" for name in ("a", "b")]
    rows = read_manifests(paths)
    assert [row["text"] for row in rows] == ["a0", "a1", "a2", "a3", "b0", "b1", "b3"]
    assert rows[1]["ego"]["video"] == str((tmp_path / "a/1.mp4").resolve())
    assert rows[5]["ego"]["video"] == str((tmp_path / "b/1.mp4").resolve())
    assert list(read_manifests(paths[1:])) == list(read_manifest(paths[1]))
    rooted = read_manifests(paths, root=tmp_path)
    assert {row["ego"]["video"] for row in rooted} == {str((tmp_path / f"{i}.mp4").resolve()) for i in range(4)}


def test_an_id_of_two_manifests_still_names_one_row(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"id": "x", "text": "1"}, {"id": "y", "text": "2"}])
    write_jsonl(tmp_path / "b.jsonl", [{"id": "y", "text": "3"}, {"id": "z", "text": "4"}])
    rows = read_manifests([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert [row["id"] for row in rows] == ["x", "y", f"{tmp_path / 'b.jsonl'}: y", "z"]
    with pytest.raises(DataError, match="named twice"):
        read_manifests([tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "." / "a.jsonl"])
    with pytest.raises(DataError, match="c.jsonl is not there"):
        read_manifests([tmp_path / "a.jsonl", tmp_path / "c.jsonl"])


def test_a_skip_list_that_leaves_nothing_is_named(tmp_path):
    write_jsonl(tmp_path / "m.jsonl", [{"id": "x", "ego": {"video": "v.mp4"}}])
    write_jsonl(tmp_path / "m.bad.jsonl", [{"id": "x", "videos": ["v.mp4"], "reasons": []}])
    with pytest.raises(DataError, match="m.bad.jsonl leaves out all rows of .*m.jsonl"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "n.jsonl").write_text("")
    with pytest.raises(DataError, match="n.jsonl is empty: it needs one JSON object per line"):
        read_manifest(tmp_path / "n.jsonl")


def test_importing_arranges_nothing(tmp_path):
    """Only a stream with workers registers what ends them at exit, once."""
    code = ("import atexit, multiprocessing.util as m, torch, numpy, av, sentencepiece, einops, safetensors.torch\n"
            "before = atexit._ncallbacks(), len(m._finalizer_registry)\n"
            "import model\nmodels = atexit._ncallbacks()\n"
            "import data\nassert (atexit._ncallbacks() - models, len(m._finalizer_registry)) == (0, before[1])\n")
    run("-c", f"import sys; sys.path.insert(0, {str(REPO)!r})\n{code}")


def loader(toy, view="pair", split="pairs", **options):
    tokenizer = Tokenizer(toy / "toy" / "tokenizer.model")
    return Loader(read_manifest(toy / "toy" / f"{split}.jsonl"), PRESETS["toy"], tokenizer, view=view,
                  **(dict(batch=8) | options))


def with_row(one, place, **change):
    """This loader with one changed row."""
    one.rows = data.Rows(row | change if i == place else row for i, row in enumerate(one.rows))
    return one


def test_rows_without_text_are_left_out_aloud_where_text_is_all_there_is(toy, capsys):
    rows = list(read_manifest(toy / "toy" / "pairs.jsonl"))
    for row in rows[::3]:
        del row["text"], row["turns"]
    tokenizer, left = Tokenizer(toy / "toy" / "tokenizer.model"), len(rows) - len(rows[::3])
    one = Loader(rows, PRESETS["toy"], tokenizer, view="exo", batch=2)
    assert len(one.rows) == left and all("text" in row for row in one.rows)
    assert f"{len(rows[::3])} of {len(rows)} rows have no text" in capsys.readouterr().out
    assert len(Loader(rows, PRESETS["toy"], tokenizer, view="pair", batch=2).rows) == len(rows)
    with pytest.raises(data.DataError, match='lacks "text"'):   # scores are of every row, or of none
        Loader(rows, PRESETS["toy"], tokenizer, view="exo", batch=2, train=False)
    with pytest.raises(data.DataError, match='lacks "text"'):
        Loader(rows[::3], PRESETS["toy"], tokenizer, view="exo", batch=2)


def test_a_batch_is_a_function_of_the_step(toy):
    one, other = loader(toy), loader(toy)
    other.batch(5)
    for a, b in zip(one.batch(2), other.batch(2)):
        assert torch.equal(a.ego, b.ego) and torch.equal(a.exo, b.exo) and torch.equal(a.ids, b.ids)
    streamed = list(loader(toy).stream(1, 4, workers=1))
    for step, batches in zip(range(1, 4), streamed):
        assert torch.equal(batches[0].exo, one.batch(step)[0].exo)
    assert loader(toy, seed=1).batch(0)[0].names != one.batch(0)[0].names


def test_ranks_and_micro_batches_share_one_order(toy):
    plain = [n for b in loader(toy, view="exo").batch(3) for n in b.names]
    parts = [loader(toy, view="exo", rank=r, world=2, micro=2).batch(3) for r in (0, 1)]
    interleaved = [n for pair in zip(*parts) for b in pair for n in b.names]
    assert interleaved == plain and len(plain) == 8


def test_an_epoch_shows_every_sample_once_and_views_stay_together(toy):
    one = loader(toy)
    assert one.samples == 60                                    # 30 rows x 2 exo cameras
    seen = [one.sample(i) for i in range(120)]
    assert len(set(seen[:60])) == 60 and seen[:60] != seen[60:]
    assert all(a[0] == b[0] and (a[1], b[1]) == (0, 1) for a, b in zip(seen[::2], seen[1::2]))
    batch = one.batch(0)[0]
    assert len(batch.ego) == 4 and len(batch.exo) == 8 and set(batch.weights.tolist()) == {0, 2} and batch.samples == 8
    assert batch.ego_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_views_of_a_moment_are_synchronized(tmp_path):
    for name in ("ego", "a", "b"):
        numbered(tmp_path / f"{name}.mp4")
    row = {"id": "x", "ego": {"video": "ego.mp4"}, "exo": [{"video": "a.mp4"}, {"video": "b.mp4"}], "text": "t"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    one = Loader(read_manifest(tmp_path / "m.jsonl"), PRESETS["toy"], None, view="pair", batch=2)
    one.chat_of = lambda row, number: ([], [])
    batch = one.batch(3)[0]
    numbers = [[number(f) for f in clip.numpy()] for clip in (batch.ego[0], batch.exo[0], batch.exo[1])]
    assert numbers[0] == numbers[1] == numbers[2]
    # Training sees other moments of each span every time.
    assert len({tuple(number(f) for f in one.batch(epoch)[0].ego[0].numpy()) for epoch in range(6)}) > 1


def test_an_unreadable_clip_is_named_and_replaced(toy):
    one = loader(toy, view="ego", split="ego")
    bad = one.sample(0)[0]
    one = with_row(one, bad, ego={"video": "/nowhere.mp4"})
    batch = one.batch(0)[0]
    assert len(batch.skipped) >= 1 and "nowhere.mp4" in batch.skipped[0] and batch.samples == 8
    assert one.rows[bad]["id"] not in batch.names


def test_an_evaluation_needs_every_clip(toy):
    one = with_row(loader(toy, view="ego", split="ego", train=False), 0, ego={"video": "/nowhere.mp4"})
    with pytest.raises(DataError, match="an evaluation needs every clip: ego/0/0: /nowhere.mp4"):
        one.batch(0)
    for workers in (0, 1):
        with pytest.raises(DataError, match="an evaluation needs every clip: ego/0/0: /nowhere.mp4"):
            next(one.stream(0, 1, workers=workers))


def test_mix_takes_turns_whatever_the_micro_batch(toy):
    """All views of a row have one text, and both kinds of text are learned."""
    one = loader(toy, view="pair")
    rows = [row | {"turns": [{"user": "What?", "assistant": "A tap."}]} for row in one.rows]
    for view in ("pair", "exo"):
        supervised = []
        for micro in (1, 2, 8):
            one.__init__(rows, one.cfg, one.tokenizer, view=view, supervise="mix", batch=8, micro=micro)
            texts = {}
            for batch in one.batch(0):
                for name, labels in zip(batch.names, batch.labels.split(batch.lens)):
                    texts.setdefault(name, set()).add(one.tokenizer.decode(labels[labels >= 0].tolist()))
            supervised.append(texts)
        assert supervised[0] == supervised[1] == supervised[2] and all(len(said) == 1 for said in supervised[0].values())
        assert {said == {"A tap."} for said in supervised[0].values()} == {True, False}
    # A row that narrates in one epoch answers in the next.
    said = [{}, {}]
    for epoch in (0, 1):
        for batch in one.batch(epoch * one.samples // 8) + one.batch(epoch * one.samples // 8 + 1):
            for name, labels in zip(batch.names, batch.labels.split(batch.lens)):
                said[epoch][name] = one.tokenizer.decode(labels[labels >= 0].tolist()) == "A tap."
    both = said[0].keys() & said[1].keys()
    assert both and all(said[0][name] != said[1][name] for name in both)


def test_a_substitute_keeps_texts_beside_their_videos(toy):
    """Every clip of six made unreadable in turn: each text still reads the clip of its own row."""
    rows = loader(toy, view="exo").rows[:6]
    for bad in range(6):
        one = loader(toy, view="exo", batch=6)
        broken = {"exo": [{"video": "/nowhere.mp4"}]}
        one.__init__([r | broken if i == bad else r | {"exo": r["exo"][:1]} for i, r in enumerate(rows)], one.cfg,
                     one.tokenizer, view="exo", batch=6)
        batch = one.batch(0)[0]
        assert len(batch.exo) == len(batch.names) == len(batch.lens) == 6 and batch.skipped
        assert batch.text_of.tolist() == list(range(6))


def test_a_row_without_what_the_stage_needs_is_named(toy):
    with pytest.raises(DataError, match='"exo"'):
        loader(toy, view="exo", split="ego")
    rows = [{"id": "a", "ego": {"video": "v.mp4"}}]
    with pytest.raises(DataError, match='"text"'):
        Loader(rows, PRESETS["toy"], None, view="ego", supervise="turns", batch=1)
    rows[0]["turns"] = [{"user": "What?"}]
    with pytest.raises(DataError, match="row \\('a'\\) ends with a question: training needs its answer"):
        Loader(rows, PRESETS["toy"], None, view="ego", supervise="turns", batch=1)


def test_a_worker_fails_with_one_sentence(toy):
    """In training it is an item of the stream, which goes on: ranks agree about it."""
    one = loader(toy, view="ego", split="ego")
    one.rows = data.Rows(row | {"ego": {"video": "nowhere.mp4"}} for row in one.rows)
    for workers in (0, 1):
        items = list(one.stream(0, 2, workers=workers))
        assert len(items) == 2
        for error in items:
            assert isinstance(error, DataError) and "ten samples, one after another, cannot be read, the last: " in str(error) and "nowhere.mp4" in str(error)


def test_the_workers_of_all_streams_have_one_hook_at_exit(toy):
    one = loader(toy, view="ego", split="ego")
    next(one.stream(0, 2, workers=1))
    hooks = atexit._ncallbacks()
    next(one.stream(0, 2, workers=1))
    next(one.stream(0, 2, workers=0))
    assert atexit._ncallbacks() == hooks


def test_a_slow_video_is_not_called_truncated(tmp_path):
    write_video(tmp_path / "slow.mp4", np.full((5, 48, 48, 3), 90, np.uint8), Fraction(1, 4))
    assert read_clip(tmp_path / "slow.mp4", None, None, 8, 48).shape == (8, 3, 48, 48)


def test_supervision_is_the_answer_and_its_end(toy):
    tokenizer = Tokenizer(toy / "toy" / "tokenizer.model")
    turns = [{"user": "Which hand?", "assistant": "The left hand."}, {"user": "Sure?", "assistant": "Yes."}]
    ids, labels = tokenizer.chat(turns, 8)
    supervised = [t for t, l in zip(ids, labels) if l != IGNORE]
    assert supervised == sum((tokenizer.encode(t["assistant"]) + [tokenizer.eos] for t in turns), [])
    assert all(l in (IGNORE, t) for t, l in zip(ids, labels)) and ids[0] == tokenizer.bos and ids.count(VIDEO) == 8
    prompt, none = tokenizer.chat([{"user": "Which hand?"}], 8)
    assert ids[:len(prompt)] == prompt and set(none) == {IGNORE}
    assert tokenizer.eos not in tokenizer.encode("a literal </s> stays text")
    assert tokenizer.chat([{"user": "before <video> after"}], 3)[0].count(VIDEO) == 3
    for bad in ("<video> and <video>",):
        with pytest.raises(ValueError, match="<video>"):
            tokenizer.chat([{"user": bad}], 8)


def test_words_are_single_tokens_and_any_text_survives(toy):
    tokenizer = Tokenizer(toy / "toy" / "tokenizer.model")
    text = data.narration("picks up", "red", "dotted", "left")
    assert len(tokenizer.encode(text)) <= 18 and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("Zürich \U0001f600 [x]")) == "Zürich \U0001f600 [x]"


def test_no_scene_is_in_two_splits_and_the_world_is_reproducible(tmp_path, toy):
    a, b = (data.plan_scene(np.random.default_rng([0, split, 0])) for split in (0, 1))
    assert a["moments"] != b["moments"]
    world = World(**json.loads((toy / "toy" / "world.json").read_text()))
    rows = data.make_scene(world, "pairs", 3, tmp_path)
    assert rows == [json.loads(l) for l in (toy / "toy" / "pairs.jsonl").read_text().splitlines()][15:20]
    assert (tmp_path / "pairs/ego/3.mp4").read_bytes() == (toy / "toy/pairs/ego/3.mp4").read_bytes()


def test_one_pair_in_ten_is_narrated(tmp_path):
    few, all_ = (sum((data.make_scene(World(narrated=share), "pairs", k, tmp_path) for k in range(4)), []) for share in (0.1, 1))
    assert [i for i, row in enumerate(few) if "text" in row] == [9, 19]
    for a, b in zip(few, all_):
        assert a == (b if "text" in a else {key: b[key] for key in ("id", "ego", "exo")})
    test = data.make_scene(World(narrated=0.1), "test", 0, tmp_path)
    assert all("text" in row for row in test)                   # what is scored is always known


def test_a_scene_has_five_different_moments():
    for scene in range(50):
        plan = data.plan_scene(np.random.default_rng(scene))
        facts = {(verb, plan["blocks"][block], hand) for verb, block, hand in plan["moments"]}
        assert len(facts) == 5 and len({colour for colour, _ in plan["blocks"]}) == 2


@pytest.mark.parametrize("split", ("corpus", "pairs", "test"))
def test_what_lies_outside_the_box_of_a_shape_is_not_painted(monkeypatch, split):
    """The same films, to the bit, where every shape is said to reach across the whole picture."""
    def films():
        rng = np.random.default_rng([0, list(data.SPLITS).index(split), 7])
        plan = data.plan_scene(rng)
        return data.film_scene(plan, data.act(plan, rng), World(noise=1, fov=0.8), split, rng)
    boxed = films()
    stamp = data.Canvas.stamp
    monkeypatch.setattr(data.Canvas, "stamp", lambda self, points, which, shape, *rest: stamp(
        self, points, which, shape._replace(reach=(9, 9)), *rest))
    whole = films()
    assert boxed.keys() == whole.keys() and all(np.array_equal(boxed[name], whole[name]) for name in boxed)


def test_another_world_in_the_same_folder_is_refused(toy):
    code, _, err = run(REPO / "data.py", "toy", "--out", toy / "toy", "--pairs", 7, check=False)
    assert code != 0 and "corpus=60" in err


def test_a_folder_of_other_things_is_no_micro_world(tmp_path):
    (tmp_path / "own.mp4").write_bytes(b"")
    with pytest.raises(DataError, match="own.mp4 is there and no micro-world"):
        data.toy_split(tmp_path, "pairs", World())
    with pytest.raises(DataError, match="is no micro-world"):
        data.toy_world(tmp_path)
    assert [f.name for f in tmp_path.iterdir() if f.name[0] != "."] == ["own.mp4"]


@pytest.mark.parametrize("name", ["val", 90 * "a"])
def test_contact_sheet_shows_pictures_and_text(toy, tmp_path, name):
    (tmp_path / f"{name}.jsonl").write_bytes((toy / "toy/val.jsonl").read_bytes())
    run(REPO / "data.py", "show", tmp_path / f"{name}.jsonl", "--root", toy / "toy", "--n", 4, "--out", tmp_path / "s.png")
    import av
    with av.open(str(tmp_path / "s.png")) as png:
        image = next(png.decode(video=0)).to_ndarray(format="rgb24")
    assert image.shape[1] >= 700 and image.std() > 40


def test_a_long_title_of_a_contact_sheet_takes_two_lines(tmp_path):
    import av
    heights = []
    for title in (67 * "a", 68 * "a"):
        data.contact_sheet(tmp_path / "s.png", 2 * [({"": np.zeros((4, 3, 96, 96), np.uint8)}, [])], title)
        with av.open(str(tmp_path / "s.png")) as png:
            heights.append(next(png.decode(video=0)).height)
    assert heights[1] - heights[0] == 26


def test_decoding_uses_one_thread(tmp_path, monkeypatch):
    video, seen = numbered(tmp_path / "v.mp4"), []
    plain = data._frames_at
    monkeypatch.setattr(data, "_frames_at", lambda container, stream, *rest: (
        seen.append((stream.codec_context.thread_count, str(stream.codec_context.thread_type))),
        plain(container, stream, *rest))[1])
    read_clip(video, 0, 1, 4, 48)
    assert seen[0][0] == 1 and "NONE" in seen[0][1]


def test_check_says_what_nothing_reads(tmp_path):
    numbered(tmp_path / "v.mp4")
    write_jsonl(tmp_path / "m.jsonl", [{"id": "a", "ego": {"video": "v.mp4"}, "turn": []}, {"id": "b", "ego": {"video": "v.mp4"}, "text": "x"},
                                        {"id": "c", "ego": {"video": "v.mp4"}}])
    said = run("data.py", "check", tmp_path / "m.jsonl")[1]
    assert "keys that nothing reads, in 1 rows: " in said and "m.jsonl line 1 ('a') has 'turn', which nothing reads\n" in said
    assert "no text, in 2 rows: " in said and "3 of 3 rows are good; no text: 2, keys that nothing reads: 1" in said
    write_jsonl(tmp_path / "m.jsonl", [{"id": "b", "ego": {"video": "v.mp4"}, "text": "x"}])
    assert "1 of 1 rows are good; nothing is wrong" in run("data.py", "check", tmp_path / "m.jsonl")[1]


def test_progress_in_a_file_is_a_line_a_tenth(capsys):
    assert list(data.progress(iter(range(40)), 40, "things")) == list(range(40))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10 and lines[-1].startswith("40/40 things, ") and "\r" not in "".join(lines)


def test_a_misspelt_folder_is_no_world(tmp_path):
    with pytest.raises(DataError, match="tyo is no micro-world"):
        data.toy_world(tmp_path / "tyo")
    assert not (tmp_path / "tyo").exists()


def test_ctrl_c_while_rendering_is_one_line(tmp_path):
    words = [sys.executable, "data.py", "toy", "corpus", "--out", tmp_path / "toy"]
    process = subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.glob("toy/corpus/*/*.mp4")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said == "data.py: stopped; the same command goes on or begins anew\n" and process.returncode == 1


@pytest.mark.parametrize("number", (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP))
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(data.fcntl, "lockf", lockf)
    for wait in (True, False):
        with data.file_lock(tmp_path / ".lock", wait):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert capsys.readouterr().out.count("is on a file system without locks: see to it that one run") == 2


def test_a_small_shared_memory_is_said_before_the_first_batch(toy, monkeypatch):
    """A step of eight clips has 216 kB (and their text is sent otherwise): 2 x workers + 1 of them, of all ranks of the machine."""
    free = types.SimpleNamespace(f_bavail=100, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    one = loader(toy, view="ego", split="ego")
    said, = one.stream(0, 2, workers=1)
    assert str(said).startswith("/dev/shm is too small for the loader's workers, who need 0 MB there: pass --workers 0, or enlarge it")
    assert next(one.stream(0, 2, workers=0))
    for workers, ranks in ((1, 1), (4, 1), (4, 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        steps = ranks * (2 * workers + 1)
        free.f_bavail = -(-steps * 8 * 4 * 3 * 48 * 48 // 4096)
        data.check_room_for_workers(one, workers)
        free.f_bavail -= 1
        with pytest.raises(DataError, match="is too small"):
            data.check_room_for_workers(one, workers)
    free.f_bavail = 1 << 20
    assert isinstance(next(one.stream(0, 2, workers=1)), list)


def test_a_temporary_folder_with_a_long_name_is_said_before_the_first_batch(toy, tmp_path, monkeypatch):
    """A socket's name has 107 bytes at most: a worker would wait in silence until --timeout."""
    one = loader(toy, view="ego", split="ego")
    for length, fits in ((75, True), (76, False), (130, False)):
        folder = "/tmp/" + "x" * (length - 5)
        os.makedirs(folder, exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", folder)
        item = next(one.stream(0, 1, workers=1))
        assert isinstance(item, list) if fits else f"TMPDIR {folder} is too long for the sockets" in str(item)
        assert isinstance(next(one.stream(0, 1, workers=0)), list)
        os.rmdir(folder)


def test_workers_ignore_what_a_launcher_sends_to_all():
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    code = (f"import sys; sys.path.insert(0, {str(REPO)!r})\nimport os, signal, data\ndata._start_worker(0)\n"
            f"for name in {names}:\n    os.kill(os.getpid(), getattr(signal, name))\nprint('alive')")
    assert run("-c", code)[1] == "alive\n"


def test_cores_are_counted_as_this_process_may_use_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert data.usable_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert data.usable_cores() == os.cpu_count()


def test_a_tokenizer_that_knows_the_marks_of_the_template_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["[INST] a [/INST] b c d e"] * 50), model_prefix=str(tmp_path / "tokenizer"),
                                             vocab_size=40, hard_vocab_limit=False, control_symbols=["[INST]", "[/INST]"], minloglevel=2)
    with pytest.raises(DataError, match="is the tokenizer of Mistral v0.3 or later"):
        Tokenizer(tmp_path)


def test_a_mark_in_a_system_text_counts_as_the_video(toy, tmp_path):
    tokenizer = Tokenizer(toy / "stage0")
    turns = [{"system": "Look at <video> first.", "user": "What?", "assistant": "This."}]
    ids, _ = tokenizer.chat(turns, 7)
    assert ids.count(VIDEO) == 7
    turns[0]["user"] = "What is in <video>?"
    with pytest.raises(ValueError, match="2 <video> marks in the questions"):
        tokenizer.chat(turns, 7)
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "turns": turns}) + "\n")
    with pytest.raises(DataError, match="more than one <video> mark"):
        data.read_manifest(tmp_path / "a.jsonl")


def test_mix_reads_rows_that_have_turns_alone(toy):
    rows = [{"id": "a", "text": "Camera-wearer taps."}, {"id": "b", "turns": [{"user": "What?", "assistant": "A tap."}]}]
    loader = data.Loader(rows, PRESETS["toy"], Tokenizer(toy / "stage0"), view="none", supervise="mix", batch=2)
    assert len(loader.rows) == 2


def test_show_of_rows_without_a_video_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "Camera-wearer taps."}\n')
    code, _, err = run(REPO / "data.py", "show", tmp_path / "a.jsonl", "--out", tmp_path / "s.png", check=False)
    assert code and "has no row with a video: there is nothing to show" in err and "Traceback" not in err
    (tmp_path / "a.jsonl").write_text('{"id": "a", "ego": {"video": "v.mp4"}}\n')
    code, _, err = run(REPO / "data.py", "show", tmp_path / "a.jsonl", "--n", 0, check=False)
    assert code and err == "data.py: --n 0: 1 or more is needed\n"


def test_bytes_that_are_no_utf_8_are_one_sentence(toy):
    """As a terminal hands them over; half of a pair of UTF-16 as well."""
    tokenizer = Tokenizer(toy / "stage0")
    for text in (b"caf\xe9".decode(errors="surrogateescape"), "a \ud83d b", "\udcff"):
        with pytest.raises(DataError, match=r"this input: \"text\" has half of a character \('\\ud.*: write it whole, as UTF-8"):
            tokenizer.encode(text)
        with pytest.raises(DataError, match="half of a character"):
            tokenizer.chat([{"user": text}], 4)
    assert tokenizer.decode(tokenizer.encode("caf\u00e9 \U0001f600")) == "caf\u00e9 \U0001f600"


def test_ids_without_a_piece_are_nothing(toy):
    """A decoder may have more ids than its tokenizer has pieces."""
    tokenizer = Tokenizer(toy / "stage0")
    ids = tokenizer.encode("The left hand.")
    assert tokenizer.decode([tokenizer.size, *ids, tokenizer.size + 1, 32063, VIDEO, IGNORE]) == "The left hand."
    assert tokenizer.decode(torch.tensor([tokenizer.size, *ids])) == "The left hand."


def test_rows_are_decoded_one_by_one(tmp_path):
    """A sequence like a list: a row that is changed stays as it was read."""
    made = [{"id": str(i), "ego": {"video": f"{i}.mp4", "start": i / 3, "end": i + 1}, "text": f"caf\u00e9 {i}", "note": [None, True, {"x": -1e-9}]} for i in range(50)]
    write_jsonl(tmp_path / "m.jsonl", made)
    rows = read_manifest(tmp_path / "m.jsonl")
    as_list = list(rows)
    for row, i in zip(as_list, range(50)):
        assert row == made[i] | {"where": f"{tmp_path / 'm.jsonl'} line {i + 1}", "ego": made[i]["ego"] | {"video": str((tmp_path / f"{i}.mp4").resolve())}}
    assert len(rows) == 50 and rows[-1] == as_list[-1] and rows[3:40:9] == as_list[3:40:9] and rows[::-1] == as_list[::-1]
    rows[7]["text"] = "changed"
    assert rows[7] == as_list[7] and as_list[9] in rows and rows.index(as_list[9]) == 9
    for place in (50, -51):
        with pytest.raises(IndexError):
            rows[place]
    picked = rows.pick([3, 3, 49])
    assert list(picked) == [as_list[3], as_list[3], as_list[49]] and picked._content is rows._content
    assert bool(rows) and not data.Rows()


START = """
import sys
sys.path.insert(0, {repo!r})
import data, torch
from model import PRESETS
def memory(of="self"):
    return int(next(line for line in open(f"/proc/{{of}}/status") if line.startswith("RssAnon")).split()[1]) / 1024
before = memory()
rows = data.read_manifest({path!r})
loader = data.Loader(rows, PRESETS["toy"], data.Tokenizer({tokenizer!r}), view="none", batch=8)
own = memory() - before
class Asked:
    train = True
    def batch(self, step):
        at = memory()
        for i in range(0, len(rows), 3):
            rows[i]["id"]
        return [memory() - at]
loader.batch = Asked().batch
grown, = next(loader.stream(0, 1, workers=1))
print(own, grown)
"""


def test_many_rows_start_in_little_memory_which_workers_share(toy, tmp_path):
    """30,000 rows of five clips, a tenth of what the promise is about: 0.3 GB, of which a worker copies nothing."""
    span = {"start": 12.3456789, "end": 13.0245678}
    with open(tmp_path / "m.jsonl", "w") as file:
        for i in range(30000):
            clips = [{"video": f"takes/take_{i // 60}/frame_aligned_videos/downscaled/448/cam0{c}.mp4", **span} for c in range(5)]
            file.write(json.dumps({"id": f"take_{i // 60}/p1/{i}", "ego": clips[0], "exo": clips[1:], "text": "Camera-wearer cuts a tomato with a knife."}) + "\n")
    code = START.format(repo=str(REPO), path=str(tmp_path / "m.jsonl"), tokenizer=str(toy / "stage0"))
    own, grown = map(float, run("-c", code)[1].split()[-2:])
    assert own < 40 and grown < 3, (own, grown)


def test_writing_is_done_as_rows_come(tmp_path):
    """Nothing is kept, and an error leaves nothing."""
    def rows():
        for i in range(3):
            assert (tmp_path / "m.jsonl.0.part").exists()
            yield {"id": str(i)}
        raise DataError("stop")
    with pytest.raises(DataError, match="stop"):
        write_jsonl(tmp_path / "m.jsonl", rows())
    assert not list(tmp_path.iterdir())
