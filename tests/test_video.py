"""Video reading never lies: whatever the container does, every returned frame is the one on display then."""
import itertools
import os
import resource
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from conftest import REPO
from test_data import FPS, number, numbered

import data
from data import DataError, encode_png, open_video, read_clip

SIDE = 48


def picture(i, width=SIDE, height=SIDE):
    """Frame i: its number as six bits in six fields, (H, W, 3)."""
    bits = np.array([235 if i >> bit & 1 else 20 for bit in range(6)], np.uint8)
    return np.broadcast_to(bits.repeat(width // 6)[None, :, None], (height, width // 6 * 6, 3)).copy()


def encode(path, codec="libx264", times=None, width=SIDE, height=SIDE, pix_fmt="yuv420p", gop=12, options=None, offset=0):
    """60 numbered frames at these times (seconds; 10 a second), in any codec."""
    times = np.arange(60) / FPS if times is None else times
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=FPS, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.gop_size, stream.codec_context.time_base = gop, Fraction(1, 1000)
        for i, t in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.pad(picture(i, width, height), ((0, 0), (0, width % 6), (0, 0)), "edge"), format="rgb24")
            frame.pts, frame.time_base = round((t + offset) * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def shown(path, times, clips=((0, 6), (2.3, 3.1), (5.0, 5.9), (None, None), (4.05, 4.12))):
    """Every frame of some clips against the frame on display at its moment."""
    with open_video(path) as opened:
        length = opened.seconds
    for (start, end), frames in itertools.product(clips, (4, 9)):
        begin, stop = start or 0, min(length, 99 if end is None else end)
        moments = begin + (stop - begin) * (np.arange(frames) + 0.5) / frames
        expected = [np.searchsorted(times, t + 1e-4, side="right") - 1 for t in moments]
        assert [number(f) for f in read_clip(path, start, end, frames, SIDE)] == expected, (start, end)


EVEN = np.arange(60) / FPS
UNEVEN = np.cumsum(np.random.default_rng(0).choice([0.04, 0.1, 0.25], 60)) - 0.04


@pytest.mark.parametrize("what", (
    dict(name="v.mp4", options={"bf": "3"}), dict(name="v.mp4", options={"bf": "3", "x264-params": "open-gop=1:keyint=12:bframes=3"}),
    dict(name="v.webm", codec="libvpx-vp9", options={"deadline": "realtime"}), dict(name="v.mkv", options={"bf": "2"}),
    dict(name="v.mp4", pix_fmt="yuv420p10le"), dict(name="v.mp4", width=54, height=38), dict(name="v.mov", codec="mpeg4", gop=1)),
    ids=lambda w: f"{w.get('codec', 'h264')}-{w['name']}-{'-'.join(map(str, list(w.values())[1:]))[:30]}")
def test_codecs_and_orders(tmp_path, what):
    path = encode(tmp_path / what.pop("name"), **what)
    shown(path, EVEN)


@pytest.mark.parametrize("name, codec", (("v.mp4", "libx264"), ("v.webm", "libvpx-vp9"), ("v.mkv", "libx264")))
def test_variable_frame_rate(tmp_path, name, codec):
    path = encode(tmp_path / name, codec, UNEVEN - UNEVEN[0])
    shown(path, UNEVEN - UNEVEN[0], ((0, 6), (1.2, 2.0), (3.33, 4.9)))


@pytest.mark.parametrize("bframes", (0, 3))
def test_time_starts_at_the_first_frame(tmp_path, bframes):
    """A stream that starts at 2.5 s (cut from a longer one), and a container with an edit list."""
    path = encode(tmp_path / "v.mp4", offset=2.5, options={"bf": str(bframes)})
    shown(path, EVEN, ((0, 5.9), (2.0, 3.0)))


@pytest.mark.parametrize("codec, bframes", (("libx264", 2), ("libx264", 0), ("mpeg4", 2)))
def test_an_avi_that_does_not_say_its_times_is_refused(tmp_path, codec, bframes):
    """FFmpeg's guess was up to two frames wrong, and with H.264 always one."""
    path = encode(tmp_path / "v.avi", codec, options={"bf": str(bframes)})
    with pytest.raises(DataError, match=r"v.avi is an AVI with H.264 or B-frames, .* ffmpeg -i v.avi new.mp4"):
        read_clip(path, 0, 1, 4, SIDE)


@pytest.mark.parametrize("codec, pix_fmt", (("mpeg4", "yuv420p"), ("mjpeg", "yuvj420p")))
def test_an_avi_of_pictures_in_order_has_its_times(tmp_path, codec, pix_fmt):
    shown(encode(tmp_path / "v.avi", codec, pix_fmt=pix_fmt), EVEN)


def test_odd_sizes_ten_bits_and_webm_have_all_their_pixels(tmp_path):
    path = encode(tmp_path / "v.mkv", "ffv1", width=54, height=37, pix_fmt="yuv444p10le")
    clip = read_clip(path, 0, 6, 2, 54)
    assert clip.shape == (2, 3, 54, 54) and (clip[:, 0, :8] == 122).all()


def test_rotation_is_applied(tmp_path):
    """A phone's portrait video: the track header's matrix turns it by a quarter."""
    upright = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    upright[:, :SIDE, 0] = 230                                              # left half red, as stored
    data.write_video(tmp_path / "v.mp4", np.stack([upright] * 10), FPS)
    content = (tmp_path / "v.mp4").read_bytes()
    one, minus = (1 << 16).to_bytes(4, "big"), (2 ** 32 - (1 << 16)).to_bytes(4, "big")
    zero, last = bytes(4), (1 << 30).to_bytes(4, "big")
    identity = one + zero * 3 + one + zero * 3 + last
    at = content.index(identity, content.index(b"tkhd"))
    for matrix, red in ((zero + one + zero + minus + zero * 4 + last, "top"), (zero + minus + zero + one + zero * 4 + last, "bottom"),
                        (minus + zero * 3 + minus + zero * 3 + last, "right")):
        (tmp_path / "r.mp4").write_bytes(content[:at] + matrix + content[at + 36:])
        frame = read_clip(tmp_path / "r.mp4", 0, 1, 1, 64)[0, 0].astype(int)    # (64, 64) red channel
        halves = {"top": frame[:30, 20:44], "bottom": frame[34:, 20:44], "right": frame[20:44, 34:], "left": frame[20:44, :30]}
        assert halves[red].mean() > 200 and min(h.mean() for h in halves.values()) < 120, red


def test_a_folder_of_images_is_a_video(tmp_path):
    folder = tmp_path / "walk"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:05d}-rgb.png").write_bytes(encode_png(picture(i)))
        (folder / f"{i:05d}-depth.png").write_bytes(encode_png(np.zeros((SIDE, SIDE, 3), np.uint8)))
    assert [number(f) for f in read_clip(folder, 1.0, 2.0, 5, SIDE, fps=10)] == [11, 13, 15, 17, 19]
    assert [number(f) for f in read_clip(folder, None, None, 6, SIDE)] == [5, 15, 25, 35, 45, 55]       # 3 a second
    (folder / "00060-rgb.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(DataError, match="link out of its folder"):
        read_clip(folder, 0, 1, 2, SIDE, fps=10)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        read_clip(tmp_path / "empty", None, None, 2, SIDE)


def test_ffmpeg_opens_nothing_but_files(tmp_path):
    numbered(tmp_path / "v.mp4")
    hls = "#EXTM3U\n#EXTINF:6\n" + str(tmp_path / "v.mp4") + "\n#EXT-X-ENDLIST\n"
    (tmp_path / "hls.mp4").write_text(hls)
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path}/v.mp4'\n")
    for video in (tmp_path / "hls.mp4", tmp_path / "concat.mp4", f"concat:{tmp_path}/v.mp4", f"subfile,,start,0,end,0,,:{tmp_path}/v.mp4",
                  "http://127.0.0.1:9/v.mp4", f"file:{tmp_path}/missing.mp4"):
        with pytest.raises(DataError):
            read_clip(video, 0, 1, 2, SIDE)


FUZZ = """
import sys, resource
sys.path.insert(0, {repo!r})
import numpy as np
from data import DataError, read_clip
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
good = bad = 0
for path in sys.argv[1:]:
    try:
        clip = read_clip(path, 0.5, 5.5, 8, 48, np.random.default_rng(0))
        assert clip.shape == (8, 3, 48, 48) and clip.dtype == np.uint8
        good += 1
    except DataError as error:
        assert path in str(error) and "\\n" not in str(error), error
        bad += 1
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))    # ru_maxrss knows the parent's, too
print(good, bad, int(peak.split()[1]) // 1024)
"""


def mutants(source: bytes, count: int, seed: int):
    """Bit flips, cuts at every kind of box, zeros, huge sizes, foreign content."""
    rng, boxes = np.random.default_rng(seed), [b"ftyp", b"moov", b"mdat", b"trak", b"stbl", b"stsd", b"stts", b"stsz", b"stco", b"stsc",
                                               b"\x1aE\xdf\xa3", b"\x18S\x80g", b"\x1fC\xb6u"]
    cuts = [at + k for box in boxes if (at := source.find(box)) >= 0 for k in (0, 4, 12)]
    yield from (source[:cut] for cut in cuts)
    yield from (source[:cut - 4] + b"\xff\xff\xff\xff" + source[cut:] for cut in cuts if cut >= 4)
    yield from (b"", b"\x00" * 5000, b"<html>not a video</html>", b"\x89PNG\r\n\x1a\n" + source, source * 2, source[len(source) // 3:])
    for _ in range(count):
        broken = bytearray(source)
        for at in rng.integers(0, len(source) if rng.random() < 0.5 else 2000, int(rng.integers(1, 30))):
            broken[min(at, len(source) - 1)] ^= 1 << int(rng.integers(8))
        yield bytes(broken)


def test_two_hundred_broken_videos_give_frames_or_one_sentence(tmp_path):
    """Never a crash, a hang or 1 GB: in a process of its own, which is watched."""
    sources = [numbered(tmp_path / "a.mp4"), encode(tmp_path / "b.mp4"), encode(tmp_path / "c.webm", "libvpx-vp9", options={"deadline": "realtime"})]
    paths = []
    for k, source in enumerate(sources):
        for i, content in enumerate(mutants(source.read_bytes(), 60, k)):
            paths.append(tmp_path / f"{k}_{i}{source.suffix}")
            paths[-1].write_bytes(content)
    paths.append(tmp_path / "text.mp4")
    paths[-1].write_text("just text\n" * 100)
    assert len(paths) > 250
    done = subprocess.run([sys.executable, "-c", FUZZ.format(repo=str(REPO)), *map(str, paths)], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    good, bad, memory = map(int, done.stdout.split()[-3:])
    assert good + bad == len(paths) and good > 20 and bad > 60 and memory < 1024, done.stdout


@pytest.mark.parametrize("limit, most", (("MAX_SIDE", SIDE - 1), ("MAX_PIXELS", SIDE * SIDE - 1)))
def test_a_huge_claim_is_refused_before_allocation(tmp_path, monkeypatch, limit, most):
    path = encode(tmp_path / "v.mp4")
    assert read_clip(path, 0, 1, 2, SIDE).shape == (2, 3, SIDE, SIDE)
    monkeypatch.setattr(data, limit, most)
    with pytest.raises(DataError, match=f"v.mp4 claims {SIDE} x {SIDE} pixels: refused"):
        read_clip(path, 0, 1, 2, SIDE)


def test_a_cut_file_says_so(tmp_path):
    content = encode(tmp_path / "v.mkv", "ffv1").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[:len(content) // 2])
    with pytest.raises(DataError, match="cut.mkv"):
        read_clip(tmp_path / "cut.mkv", 4.5, 5.5, 4, SIDE)


def test_matroska_lengths_with_a_late_start_or_longer_sound(tmp_path):
    """Its header gives the end of the longest stream, in absolute time."""
    path = encode(tmp_path / "v.mkv", offset=2.5)
    with open_video(path) as opened:
        assert abs(opened.seconds - 6) < 0.11
    assert number(read_clip(path, None, None, 6, SIDE)[5]) >= 54


def test_a_truncated_end_is_no_frozen_frame(tmp_path):
    content = encode(tmp_path / "v.mkv", "ffv1").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[:len(content) // 2])
    with open_video(tmp_path / "cut.mkv") as opened:
        last = None
        with pytest.raises(DataError, match="truncated"):
            for t in np.arange(0, opened.seconds, 0.05):
                last = t, next(iter(opened.frames_at([t])))
    assert last[0] < 3.6


# ------------------------------------------------------------------------------------------- what a viewer sees
CORNERS = np.zeros((96, 128, 3), np.uint8)
CORNERS[:48, :64], CORNERS[:48, 64:], CORNERS[48:, :64], CORNERS[48:, 64:] = (220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30)
NAMES = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 0): "yellow"}
# EXIF's eight orientations, as a viewer sees the picture above: top left, top right, bottom left, bottom right
SEEN = {1: "red green blue yellow", 2: "green red yellow blue", 3: "yellow blue green red", 4: "blue yellow red green",
        5: "red blue green yellow", 6: "blue red yellow green", 7: "yellow green blue red", 8: "green yellow red blue"}


def corners(frame, margin=20):
    """The colours in the four corners of a frame (3, S, S), as words."""
    size = frame.shape[-1]
    at = (margin, size - margin)
    return " ".join(NAMES[tuple(int(x > 127) for x in frame[:, y, x])] for y in at for x in at)


def coloured(path, frames=10, stream=None, **options):
    """A video of the four coloured corners; `stream(container, stream)` may set what a header says."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=10, **options)
        video.width, video.height, video.pix_fmt = 128, 96, "yuv420p"
        if stream:
            stream(video)
        for _ in range(frames):
            out.mux(video.encode(av.VideoFrame.from_ndarray(CORNERS, format="rgb24")))
        out.mux(video.encode())
    return path


@pytest.mark.parametrize("number", SEEN)
def test_a_film_is_turned_and_mirrored_as_its_matrix_says(tmp_path, number):
    a, b, c, d = data.ORIENTATIONS[number]
    one = 1 << 16
    matrix = (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path = coloured(tmp_path / "v.mp4", stream=lambda video: video.set_display_matrix(matrix))
    assert corners(read_clip(path, None, None, 1, 96)[0]) == SEEN[number]


@pytest.mark.parametrize("number", SEEN)
@pytest.mark.parametrize("order", "<>")
def test_a_photo_is_turned_and_mirrored_as_its_camera_says(tmp_path, number, order):
    codec = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 128, 96, "yuvj420p", 1
    frame = av.VideoFrame.from_ndarray(CORNERS, format="rgb24").reformat(format="yuvj420p")
    jpeg = b"".join(map(bytes, codec.encode(frame) + codec.encode()))
    tags = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IHHHIHHI", 8, 1, 0x112, 3, 1, number, 0, 0)
    exif = b"Exif\0\0" + tags
    (tmp_path / "1.jpg").write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])
    (tmp_path / "2.jpg").write_bytes(jpeg)
    turned, plain = read_clip(tmp_path, None, None, 2, 96)
    assert corners(turned) == SEEN[number] and corners(plain) == SEEN[1]


def test_pixels_that_are_not_square(tmp_path):
    """128 x 96 pixels of shape 2:1 are shown as 256 x 96."""
    def stream(video):
        video.codec_context.sample_aspect_ratio = Fraction(2, 1)
    path = coloured(tmp_path / "v.mp4", stream=stream)
    frame = read_clip(path, None, None, 1, 256)[0].astype(int)
    shown = np.abs(frame - data.CLIP_MEAN_COLOUR[:, None, None]).sum(0) > 60
    assert shown.any(0).sum() == 256 and abs(shown.any(1).sum() - 96) <= 2


def test_the_track_that_a_player_shows(tmp_path):
    """A thumbnail comes first, without the default flag."""
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as out:
        tracks = []
        for side, default in ((16, 0), (96, 1)):
            video = out.add_stream("libx264", rate=10)
            video.width, video.height, video.pix_fmt = side, side, "yuv420p"
            video.disposition = av.stream.Disposition(default)
            tracks.append(video)
        for _ in range(10):
            for video in tracks:
                grey = np.full((video.height, video.width, 3), 2 * video.height, np.uint8)
                out.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        for video in tracks:
            out.mux(video.encode())
    assert abs(int(read_clip(path, None, None, 1, 48).mean()) - 192) < 4


def with_sound(path, frames, seconds):
    """A film of so many frames, 10 a second, and so many seconds of sound."""
    with av.open(str(path), "w") as out:
        video, sound = out.add_stream("libvpx", rate=10), out.add_stream("libopus", rate=48000)
        video.width, video.height, video.pix_fmt = 48, 48, "yuv420p"
        for i in range(frames):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        for i in range(round(seconds * 50)):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), format="s16", layout="stereo")
            samples.sample_rate, samples.pts = 48000, 960 * i
            out.mux(sound.encode(samples))
        out.mux(video.encode())
        out.mux(sound.encode())
    return path


def test_sound_that_outlasts_the_picture(tmp_path):
    """As browsers write it: no length of each stream, one of the whole file alone."""
    path = with_sound(tmp_path / "v.webm", 50, 7)
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"NOTATION"))
    with open_video(path) as opened:
        assert abs(opened.seconds - 5) < 0.11
    assert [number(f) for f in read_clip(path, None, None, 5, SIDE)] == [5, 15, 25, 35, 45]


def test_what_follows_from_a_damaged_key_frame_is_refused(tmp_path):
    path = coloured(tmp_path / "v.mp4", frames=60, options={"x264-params": "keyint=20:scenecut=0"})
    with av.open(str(path)) as container:
        second = [packet for packet in container.demux(video=0) if packet.is_keyframe][1]
    content = bytearray(path.read_bytes())
    at = second.pos + second.size // 3
    content[at:at + 100] = np.random.default_rng(0).integers(0, 256, 100, np.uint8).tobytes()
    path.write_bytes(content)
    assert read_clip(path, 0, 1.9, 4, SIDE).shape and read_clip(path, 4.05, 6, 4, SIDE).shape
    for start in (2.0, 2.5, 3.5):
        with pytest.raises(DataError, match=r"v\.mp4 is damaged at"):
            read_clip(path, start, start + 0.3, 2, SIDE)


def test_a_folder_of_images_in_natural_order_with_strangers(tmp_path):
    for i in range(12):
        (tmp_path / f"{i + 1}.png").write_bytes(encode_png(picture(i)))
    (tmp_path / "._1.png").write_bytes(b"\0\5\x16\7 what a Mac leaves behind")
    os.rename(tmp_path / "12.png", tmp_path / "12.jpg")                     # a PNG by content
    assert [number(f) for f in read_clip(tmp_path, None, None, 12, SIDE, fps=1)] == list(range(12))


def test_numbers_that_do_not_ascend_are_no_places(tmp_path):
    """0.1, 0.11 ... 0.99 as `f"{t:g}"` writes them: 0.2 comes behind 0.19, and its last number is 2."""
    for i in range(90):
        (tmp_path / f"{(10 + i) / 100:g}.png").write_bytes(encode_png(picture(i % 16)))
    assert [number(f) for f in read_clip(tmp_path, None, None, 90, SIDE, fps=100)] == [i % 16 for i in range(90)]


def test_a_name_without_a_number_comes_before_those_with_one(tmp_path):
    for i, name in enumerate(("frame", "frame1", "frame2", "frame10")):
        (tmp_path / f"{name}.png").write_bytes(encode_png(picture(i)))
    assert [number(f) for f in read_clip(tmp_path, None, None, 4, SIDE, fps=1)] == list(range(4))


@pytest.mark.parametrize("name", ("12:30 walk.mp4", "50%d.mp4", "pipe:0.mp4", "n\udce9.mp4"))
def test_names_are_names(tmp_path, monkeypatch, name):
    os.rename(encode(tmp_path / "v.mp4"), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        assert number(read_clip(path, 1.0, 1.1, 1, SIDE)[0]) == 10
        with open_video(path) as opened:
            assert opened.rate == FPS


def test_a_title_need_not_be_utf_8(tmp_path):
    path = encode(tmp_path / "v.mkv")
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"\xe9\xe8vf"))
    with open_video(path) as opened:
        assert number(read_clip(path, 1.0, 1.1, 1, SIDE)[0]) == 10 and opened.rate == FPS


@pytest.mark.parametrize("suffix, codec", (("ts", "libx264"), ("flv", "libx264"), ("mpg", "mpeg1video"), ("wmv", "wmv2"), ("gif", "gif")))
def test_another_container_gets_the_way_out(tmp_path, suffix, codec):
    path = encode(tmp_path / f"v.{suffix}", codec, pix_fmt="rgb8" if suffix == "gif" else "yuv420p") if suffix not in ("mpg", "wmv") else None
    if path is None:
        path = tmp_path / f"v.{suffix}"
        with av.open(str(path), "w") as out:
            video = out.add_stream(codec, rate=25)
            video.width, video.height, video.pix_fmt = 48, 48, "yuv420p"
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(3), format="rgb24")))
            out.mux(video.encode())
    with pytest.raises(DataError, match=rf"no \.mp4, \.mov, \.mkv, \.webm or \.avi .* ffmpeg -i v\.{suffix} -c copy new\.mp4"):
        read_clip(path, None, None, 2, SIDE)


def test_sound_with_a_cover_is_no_video(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as out:
        sound, cover = out.add_stream("aac", rate=48000), out.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 48, 48, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        samples.sample_rate = 48000
        out.mux(cover.encode(av.VideoFrame.from_ndarray(picture(3), format="rgb24")))
        out.mux(sound.encode(samples))
        out.mux(cover.encode())
        out.mux(sound.encode())
    with pytest.raises(DataError, match="song.m4a is sound with a cover picture"):
        read_clip(path, None, None, 1, SIDE)


def test_far_moments_are_sought_and_near_ones_decoded_on(tmp_path, monkeypatch):
    """The same frames either way; a seek only where it saves half a second of decoding."""
    path = encode(tmp_path / "v.mp4", options={"x264-params": "keyint=10:scenecut=0:bframes=2"})
    seeks = []
    sought = data._seek
    monkeypatch.setattr(data, "_seek", lambda *words: seeks.append(words) or sought(*words))
    assert [number(f) for f in read_clip(path, 0, 6, 3, SIDE)] == [10, 30, 50] and len(seeks) == 3
    seeks.clear()
    assert [number(f) for f in read_clip(path, 0.3, 1.0, 7, SIDE)] == [3, 4, 5, 6, 7, 8, 9] and len(seeks) == 1


# ------------------------------------------------------------------------ a file that says less than it promises
def jpeg(i, size=64):
    """Frame i as a JPEG."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = size // 6 * 6, size, "yuvj420p", 1
    frame = av.VideoFrame.from_ndarray(picture(i, size, size), format="rgb24").reformat(format="yuvj420p")
    return b"".join(map(bytes, codec.encode(frame) + codec.encode()))


@pytest.mark.parametrize("kind", (".png", ".jpg"))
@pytest.mark.parametrize("damage", ("empty", "html", "cut at 60 %", "last bytes", "zeros", "html behind"))
def test_a_picture_that_holds_none_or_half_of_one_is_refused_by_name(tmp_path, kind, damage):
    """All later pictures would come earlier, or a part of it be green."""
    for i in range(12):
        whole = jpeg(i) if kind == ".jpg" else encode_png(picture(i, 64, 64))
        (tmp_path / f"{i}{kind}").write_bytes(whole)
    assert [number(f) for f in read_clip(tmp_path, None, None, 12, SIDE, fps=1)] == list(range(12))
    whole = (tmp_path / f"5{kind}").read_bytes()
    half = len(whole) * 6 // 10
    broken = {"empty": b"", "html": b"<html>404</html>", "cut at 60 %": whole[:half], "last bytes": whole[:-8],
              "zeros": whole[:half] + bytes(len(whole) - half), "html behind": whole[:half] + b"<html>" * 200}[damage]
    (tmp_path / f"5{kind}").write_bytes(broken)
    (tmp_path / f"99{kind}").touch()                            # the folder changes
    (tmp_path / f"99{kind}").unlink()
    with pytest.raises(DataError, match=rf"/5\{kind} (holds no picture|is damaged or cut off): download it again, or remove it"):
        read_clip(tmp_path, None, None, 12, SIDE, fps=1)


def test_a_folder_without_a_rate_has_no_seconds(tmp_path):
    """Its pictures were taken as three per second: second 1 of a film of 30 showed pictures 3 to 5."""
    folder(tmp_path / "f", [f"{i}.png" for i in range(12)])
    for start, end in ((1.0, 2.0), (None, 2.0), (1.0, None)):
        with pytest.raises(DataError, match=r'/f is a folder of images: a clip from .* s of it needs "fps"'):
            read_clip(tmp_path / "f", start, end, 4, SIDE)
    assert [number(f) for f in read_clip(tmp_path / "f", None, None, 12, SIDE)] == list(range(12))


def folder(root, names):
    """Picture i under the i-th name."""
    root.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        (root / name).write_bytes(encode_png(picture(i)))
    return root


@pytest.mark.parametrize("names", (
    ["0.0.jpg", "0.25.jpg", "0.5.jpg", "0.75.jpg", "1.0.jpg", "1.25.jpg", "10.5.jpg"], ["0.jpg", "0.033.jpg", "0.1.jpg", "0.4.jpg", "2.jpg"],
    ["t_1.5s.png", "t_2.05s.png", "t_2.5s.png", "t_11.25s.png"], [f"1.{i}.png" for i in range(1, 13)],
    [f"cam0_{i}.png" for i in range(1, 13)], ["0012.png", "0013.png", "0014.png"], [f"2024010112345678901{i}.png" for i in range(8)]))
def test_pictures_are_in_the_order_of_the_numbers_in_their_names(tmp_path, names):
    shown = [number(f) for f in read_clip(folder(tmp_path / "f", names), None, None, len(names), SIDE, fps=1)]
    assert shown == list(range(len(names)))


@pytest.mark.parametrize("name", ("{}.png", "frame_{:05d}.png", "{:03d}-rgb.png", "cam0_{:02d}.png"))
@pytest.mark.parametrize("step", (1, 5))
def test_a_missing_number_leaves_later_pictures_at_their_times(tmp_path, name, step):
    for i in set(range(40)) - {13, 14, 30}:
        (tmp_path / name.format(step * (i + 1))).write_bytes(encode_png(picture(i)))
    with open_video(tmp_path, 10) as opened:
        assert opened.seconds == 4.0 and opened.missing == 3
    assert [number(f) for f in read_clip(tmp_path, 1.2, 1.7, 5, SIDE, fps=10)] == [12, 12, 12, 15, 16]
    assert [number(f) for f in read_clip(tmp_path, 2.9, 3.2, 3, SIDE, fps=10)] == [29, 29, 31]


def test_names_that_do_not_count_give_the_order_alone(tmp_path):
    """Milliseconds, chosen frames: no step is that of most."""
    for k, names in enumerate(([f"{t}.png" for t in (0, 33, 67, 100, 133, 167)], ["3.png", "20.png", "31.png", "400.png"], ["a1.png", "b1.png", "b2.png"])):
        assert [number(f) for f in read_clip(folder(tmp_path / str(k), names), None, None, len(names), SIDE, fps=1)] == list(range(len(names)))
    few = folder(tmp_path / "few", [f"{i}.png" for i in (*range(8), 1000)])
    with pytest.raises(DataError, match=r"few: 992 pictures are missing among 0.png ... 1000.png: number them"):
        read_clip(few, None, None, 4, SIDE)


@pytest.mark.parametrize("suffix", (".webp", ".BMP", ".gif", ".tiff", ".heic"))
def test_pictures_that_are_not_counted_are_named(tmp_path, suffix):
    folder(tmp_path, ["cover.png"])
    (tmp_path / f"1{suffix}").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=rf"1\{suffix} is a picture that is not read: convert it to .png or .jpg, or move it away"):
        read_clip(tmp_path, None, None, 8, SIDE)


@pytest.mark.parametrize("name", ("v.mp4", "v.mov", "v.mkv"))
@pytest.mark.parametrize("bframes", (0, 2, 3))
def test_slides_last_until_the_next_one(tmp_path, name, bframes):
    """With B-frames an mp4's header says 3 s."""
    times = [0, 1, 2, 32]
    path = encode(tmp_path / name, times=times, options={"bf": str(bframes)})
    with open_video(path) as opened:
        assert opened.seconds >= 32
    assert [number(f) for f in read_clip(path, 0.5, 32.01, 7, SIDE)] == [2] * 7
    assert [number(f) for f in read_clip(path, 31.9, 32.02, 6, SIDE)] == [2, 2, 2, 2, 2, 3]
    assert number(read_clip(path, 1.5, 1.6, 1, SIDE)[0]) == 1


@pytest.mark.parametrize("codec, pix_fmt", (("mpeg4", "yuv420p"), ("mjpeg", "yuvj420p")))
def test_an_avi_that_was_cut_is_no_shorter_film(tmp_path, codec, pix_fmt):
    path = encode(tmp_path / "v.avi", codec, pix_fmt=pix_fmt)
    assert number(read_clip(path, 5.5, 5.6, 1, SIDE)[0]) in (54, 55)
    content = path.read_bytes()
    for share in (0.9, 0.6, 0.3):
        path.write_bytes(content[:int(len(content) * share)])
        with pytest.raises(DataError, match=r"v.avi ends at .* s, its header says 6.0. s: truncated\?") as error:
            read_clip(path, 0, 0.5, 2, SIDE)
        assert error.value.reason == "truncated"


def fragmented(path, source, copies):
    """The packets of a film (no B-frames), again and again, as an mp4 with a segment index, which is read piece by piece."""
    with av.open(str(source)) as film:
        packets = [(float(p.pts * p.time_base), bytes(p), p.is_keyframe) for p in film.demux(video=0) if p.pts is not None]
        with av.open(str(path), "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov+global_sidx+default_base_moof"}) as out:
            stream = out.add_stream_from_template(film.streams.video[0])
            for copy in range(copies):
                for t, content, key in packets:
                    packet = av.Packet(content)
                    packet.pts = packet.dts = round(1000 * t) + 6000 * copy
                    packet.duration, packet.is_keyframe, packet.stream, packet.time_base = 100, key, stream, Fraction(1, 1000)
                    out.mux(packet)
    return path


def test_a_fragmented_film_is_sought_as_a_plain_one(tmp_path, monkeypatch):
    """Twenty minutes in pieces of 1.2 s: three seeks, not 12,000 frames."""
    piece = encode(tmp_path / "piece.mp4", options={"bf": "0"})
    path = fragmented(tmp_path / "v.mp4", piece, 200)
    decoded, plain = [], data._decoded
    monkeypatch.setattr(data, "_decoded", lambda *words: (decoded.append(frame) or frame for frame in plain(*words)))
    moments = np.array([50.05, 400.35, 1100.85])
    with open_video(path) as opened:
        assert opened.seconds == pytest.approx(1200, abs=0.2)
        shown = [frame for frame, _ in opened.frames_at(moments)]
    assert [number(data._pixels(frame, SIDE)) for frame in shown] == [20, 43, 28] and len(decoded) < 60


def test_a_seek_that_does_not_help_is_made_once(tmp_path, monkeypatch):
    """One key frame, and an index that seems to end early: what was decoded is not decoded for every moment."""
    times = np.arange(60) / 2
    path = encode(tmp_path / "v.mkv", options={"bf": "0", "x264-params": "scenecut=0"}, gop=600, times=times)
    seeks, sought = [], data._seek
    monkeypatch.setattr(data, "_seek", lambda *words: seeks.append(words) or sought(*words))
    shown(path, times, ((0.1, 29.3),))                          # two clips
    assert len(seeks) <= 4


def test_time_counts_from_the_first_picture(tmp_path):
    """As loaders that count frames have it; check says where ego and exo differ in it."""
    def late(path, seconds):
        with av.open(str(path), "w") as out:
            video, sound = out.add_stream("libx264", rate=10), out.add_stream("aac", rate=48000)
            video.width, video.height, video.pix_fmt, sound.layout = 48, 48, "yuv420p", "mono"
            video.codec_context.time_base = Fraction(1, 1000)
            for i in range(400):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                samples.sample_rate, samples.pts, samples.time_base = 48000, 1024 * i, Fraction(1, 48000)
                out.mux(sound.encode(samples))
            for i in range(60):
                frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
                frame.pts, frame.time_base = 100 * i + 1000 * seconds, Fraction(1, 1000)
                out.mux(video.encode(frame))
            out.mux(video.encode())
            out.mux(sound.encode())
        return path
    ego, exo = late(tmp_path / "ego.mp4", 2), late(tmp_path / "exo.mp4", 0)
    for path, seconds in ((ego, 2), (exo, 0)):
        assert [number(f) for f in read_clip(path, 1, 2, 5, SIDE)] == [11, 13, 15, 17, 19]
        with open_video(path) as opened:
            assert opened.begins == pytest.approx(seconds, abs=0.03)
    row = {"id": "a", "ego": {"video": str(ego), "start": 1, "end": 2}, "exo": [{"video": str(exo), "start": 1, "end": 2}], "text": "x"}
    (_, (found, remarks)), (_, (_, none)) = (data._check_videos(r, 60, tmp_path / "begun") for r in (row, row | {"exo": [row["ego"]]}))
    assert not found and [kind for kind, _ in remarks] == ["pictures begin apart"] and "2.00, 0.00 s" in remarks[0][1] and not none
