import logging
import os
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from fastpo.data import media
from fastpo.sample import BadSample, Media

SIZE = (64, 48)


def picture(k: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """[h, w, 3]: a bar that walks to the right over a gradient, brighter in every frame."""
    width, height = size
    image = np.zeros((height, width, 3), np.uint8)
    image[:, :, 0] = 10 * k % 256
    image[:, :, 2] = np.arange(width) * 3 % 256
    image[height // 4 : height // 2, 2 * k % width : 2 * k % width + 9, 1] = 255
    return image


def clip(path: Path, count: int = 20, size=SIZE, codec: str = "h264", x264: str = "", rate: int = 10, **options: str):
    """x264 makes B-frames unless its parameters say otherwise."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"x264-params": x264} if x264 else {}
        for k in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(k, size), format="rgb24")))
        container.mux(stream.encode())
    return path


def all_frames(path: Path) -> np.ndarray:
    """Every frame from the start, by the shortest way."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def video(path: Path, frames: int) -> np.ndarray:
    return media.decode(Media(kind="video", path=path), frames)


def image(path: Path) -> np.ndarray:
    return media.decode(Media(kind="image", path=path), 16)


@pytest.mark.parametrize(("count", "frames"), [(20, 16), (20, 7), (20, 1), (5, 16), (1, 3), (13, 13)])
def test_frames_are_sampled_uniformly(tmp_path, count, frames):
    path = clip(tmp_path / "a.mp4", count)
    found = video(path, frames)
    assert found.dtype == np.uint8 and found.shape == (frames, 48, 64, 3)
    every = all_frames(path)
    assert len(every) == count
    interval = count / float(frames)  # as the authors write it
    np.testing.assert_array_equal(found, every[[int(interval * k) for k in range(frames)]])
    assert np.abs(found[0].astype(int) - picture(0)).mean() < 10  # RGB, not BGR, and the right way up


CLOSED = "keyint=6:bframes=2:scenecut=0"
OPEN = "keyint=3:bframes=2:b-adapt=0:open-gop=1"


@pytest.mark.parametrize(
    ("name", "made", "seekable", "by_decord"),
    [
        ("a.mp4", {"x264": CLOSED}, True, True),
        ("a.mp4", {"x264": "keyint=1", "size": (66, 50)}, True, True),
        ("a.mp4", {"x264": CLOSED, "movflags": "frag_keyframe+empty_moov"}, True, True),
        ("a.mov", {}, True, True),
        ("a.mkv", {"x264": CLOSED}, True, True),
        ("a.webm", {"codec": "libvpx-vp9"}, True, True),
        ("a.mp4", {"x264": OPEN}, True, False),
        ("a.mp4", {"x264": "keyint=8:intra-refresh=1"}, True, False),
        ("a.mkv", {"x264": OPEN}, True, False),
        ("a.mp4", {"codec": "mpeg4"}, True, False),
        ("a.avi", {"x264": CLOSED}, False, False),
        ("a.ts", {"x264": CLOSED}, False, False),
        ("a.flv", {"x264": CLOSED}, False, False),
        ("a.mpg", {"codec": "mpeg1video", "rate": 25}, False, False),
    ],
)
def test_frames_are_those_of_decoding_from_the_start(tmp_path, caplog, name, made, seekable, by_decord):
    path = clip(tmp_path / name, 33, **made)
    every, found = all_frames(path), media.read_clip(path)
    assert found.frames == len(every) == 33 and bool(found.pts) == seekable
    for wanted in ([32], [17, 16], [0, 4, 9, 9, 30], list(range(33))):
        np.testing.assert_array_equal(media.decode_pyav(path, found, wanted), every[wanted])
        if by_decord:
            np.testing.assert_array_equal(media.decode_decord(path, found, wanted), every[wanted])
    np.testing.assert_array_equal(video(path, 16), every[media.uniform(33, 16)])
    assert [f"{path}: PyAV decodes it" in line for line in caplog.messages] == [True] * (not by_decord)


def test_decoding_starts_at_fresh_key_frames_only(tmp_path):
    closed = media.read_clip(clip(tmp_path / "a.mp4", 40, x264="keyint=10:scenecut=0"))
    assert closed.pts and closed.keys == closed.pts[::10] and closed.closed
    opened = media.read_clip(clip(tmp_path / "b.mp4", 40, x264=OPEN))
    assert opened.pts and opened.keys == opened.pts[:1] and not opened.closed


def test_pyav_decodes_only_from_the_nearest_key_frame(tmp_path):
    """Everything before the last key frame is garbage on the disk, or everything after a few frames is gone."""
    path = clip(tmp_path / "a.mp4", 40, x264="keyint=10:scenecut=0")
    every, found, data = all_frames(path), media.read_clip(path), bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = sorted((packet.pos, packet.size) for packet in container.demux() if packet.size)
    for at, size in packets[:30]:
        data[at + 4 : at + size] = bytes(size - 4)
    path.write_bytes(data)
    np.testing.assert_array_equal(media.decode_pyav(path, found, [30, 39]), every[[30, 39]])
    path = clip(tmp_path / "b.mp4", 40, x264="keyint=10:scenecut=0", movflags="faststart")
    with av.open(str(path)) as container:
        at = sorted(packet.pos for packet in container.demux() if packet.size)
    path.write_bytes(path.read_bytes()[: at[36] + 3])  # the end is missing, and not asked for
    np.testing.assert_array_equal(media.decode_pyav(path, found, [30]), every[[30]])


def test_a_frame_that_does_not_come_is_missed(tmp_path):
    path = clip(tmp_path / "a.mp4", 5)
    found = media.read_clip(path)
    assert found.pts
    with pytest.raises(BadSample, match="a.mp4: frame 5 of 6 does not decode"):
        media.decode_pyav(path, found._replace(frames=6, pts=[*found.pts, found.pts[-1] + 1]), [0, 5])


def test_no_file_stays_open(tmp_path):
    good, bad = clip(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    bad.write_bytes(good.read_bytes()[:900])
    for path in (good, bad) * 6:
        before = len(os.listdir("/dev/fd"))
        try:
            video(path, 4)
        except BadSample:
            pass
        media.decode_pyav(good, media.read_clip(good), [3])
        assert len(os.listdir("/dev/fd")) == before


def test_pyav_where_decord_is_missing(tmp_path, monkeypatch, caplog):
    path = clip(tmp_path / "a.mp4")
    expected = video(path, 5)
    monkeypatch.setattr(media, "decord", None)
    media._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            np.testing.assert_array_equal(video(path, 5), expected)
    assert caplog.messages == ["decord is not installed, PyAV decodes all videos"]


def test_a_phone_video_is_turned_upright(tmp_path, caplog):
    path, every = clip(tmp_path / "a.mp4"), all_frames(tmp_path / "a.mp4")
    data, one = bytearray(path.read_bytes()), 0x10000
    at = data.index(b"tkhd") + 44  # the matrix of the track
    for turns, (a, b, c, d) in {1: (0, -one, one, 0), 2: (-one, 0, 0, -one), 3: (0, one, -one, 0)}.items():
        data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
        turned = tmp_path / f"{turns}.mp4"
        turned.write_bytes(data)
        upright = video(turned, 4)
        np.testing.assert_array_equal(upright, np.rot90(every[::5], turns, (1, 2)))
        assert media.size(Media(kind="video", path=turned)) == upright.shape[1:3]
    assert len(caplog.messages) == 2  # decord 0.6 turns by 180 degrees only; else it makes four channels


def test_frames_before_the_cut_of_a_trimmed_clip_are_not_sampled(tmp_path, caplog):
    """A stream copy from the middle of a group of pictures: an edit list hides the frames before the cut."""
    source = clip(tmp_path / "a.mp4", 40, x264="keyint=20:bframes=2:scenecut=0")
    path = tmp_path / "trimmed.mp4"
    with av.open(str(source)) as read, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as write:
        old = read.streams.video[0]
        new = write.add_stream_from_template(old)
        cut = int(0.8 / old.time_base)
        for packet in read.demux(old):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, new
                write.mux(packet)
    every = all_frames(source)[8:]
    assert media.read_clip(path).frames == 32
    np.testing.assert_array_equal(video(path, 16), every[::2])
    assert "it counts 40 frames where 32 are shown" in caplog.text


def faststart(path: Path) -> bytes:
    """An mp4 whose index stands first, so that it opens however much of the end is missing."""
    return clip(path, 60, movflags="faststart").read_bytes()


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for k in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, k * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("without_decord", [False, True])
def test_broken_videos_are_refused(tmp_path, monkeypatch, without_decord):
    if without_decord:
        monkeypatch.setattr(media, "decord", None)
    whole, first = clip(tmp_path / "whole.mp4", 60).read_bytes(), faststart(tmp_path / "first.mp4")
    mkv = clip(tmp_path / "whole.mkv", 60).read_bytes()
    broken = {"zero.mp4": b"", "text.mp4": b"no video\n" * 100, "text.gif": b"no gif"}
    for percent in (10, 50, 90):
        broken[f"no_moov_{percent}.mp4"] = whole[: len(whole) * percent // 100]
        broken[f"cut_{percent}.mp4"] = first[: len(first) * percent // 100]
        broken[f"cut_{percent}.mkv"] = mkv[: len(mkv) * percent // 100]
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    audio_only(tmp_path / "audio.mp4")
    for name in [*broken, "audio.mp4", "gone.mp4"]:
        with pytest.raises(BadSample, match=f"/{name}: "):
            video(tmp_path / name, 4)
    for name, reason in {"audio.mp4": "no video stream", "zero.mp4": "empty file", "cut_50.mp4": "truncated"}.items():
        with pytest.raises(BadSample, match=reason):
            video(tmp_path / name, 4)


def test_a_container_that_declares_more_than_it_holds(tmp_path):
    """Cut between two packets, where every packet is whole."""
    data, path = faststart(tmp_path / "a.mp4"), tmp_path / "cut.mp4"
    with av.open(str(tmp_path / "a.mp4")) as container:
        at = sorted(packet.pos for packet in container.demux() if packet.size)
    for kept, end in [(30, r"3\.\d"), (1, r"0\.\d")]:
        path.write_bytes(data[: at[kept]])
        with pytest.raises(BadSample, match=rf"declares 6\.0 s and its packets end at {end} s"):
            video(path, 4)
    path.write_bytes(data[:-3])
    with pytest.raises(BadSample, match="truncated, a packet at 5.9 s is cut"):
        video(path, 4)


def test_a_codec_that_no_one_knows(tmp_path):
    path = clip(tmp_path / "a.mkv")
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC"))
    with pytest.raises(BadSample, match="a.mkv: no decoder for its video stream"):
        video(path, 4)


def test_video_without_frames(tmp_path):
    path = tmp_path / "a.mp4"
    clip(path, 0, movflags="empty_moov+frag_keyframe")
    with pytest.raises(BadSample, match="a.mp4: "):
        video(path, 4)


def test_a_broadcast_whose_frames_change_their_size(tmp_path):
    path, rate = tmp_path / "a.ts", Fraction(1, 5)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for start, (width, height) in ((0, (64, 48)), (4, (96, 80))):
            coder = av.CodecContext.create("mpeg2video", "w")
            coder.width, coder.height, coder.pix_fmt, coder.time_base, coder.framerate = (
                width,
                height,
                "yuv420p",
                rate,
                5,
            )
            packets = []
            for k in range(start, start + 4):
                frame = av.VideoFrame.from_ndarray(picture(k, (width, height)), format="rgb24")
                frame.pts, frame.time_base = k, rate
                packets += coder.encode(frame)
            for packet in packets + coder.encode(None):
                packet.stream, packet.time_base = stream, rate
                container.mux(packet)
    assert video(path, 1).shape == (1, 48, 64, 3)
    with pytest.raises(BadSample, match="a.ts: its frames differ in size: 64 x 48, 96 x 80"):
        video(path, 4)


def test_gif(tmp_path):
    frames = [Image.fromarray(picture(3 * k)) for k in range(9)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as gif:
        expected = []
        for k in (0, 2, 4, 6):  # floor(k * 9 / 4)
            gif.seek(k)
            expected.append(np.asarray(gif.convert("RGB")))
    np.testing.assert_array_equal(video(path, 4), np.stack(expected))
    assert media.size(Media(kind="video", path=path)) == expected[0].shape[:2]
    data = path.read_bytes()
    for percent in (10, 50, 90):
        path.write_bytes(data[: len(data) * percent // 100])
        with pytest.raises(BadSample, match="a.gif: not a readable image"):
            video(path, 4)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1"])
def test_images_of_all_modes(tmp_path, mode):
    path = tmp_path / "a.tiff"
    Image.fromarray(picture(20)).convert(mode).save(path)
    with Image.open(path) as source:
        assert source.mode == mode
        expected = np.asarray(source.convert("RGB"))
    np.testing.assert_array_equal(image(path), expected[None])


def test_16_bit_grey_is_scaled(tmp_path):
    grey = (np.arange(48 * 64).reshape(48, 64) * 21).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    found = image(tmp_path / "a.png")[0]
    assert np.abs(found - grey[..., None] / 257).max() <= 1 and (found == found[..., :1]).all()
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(BadSample, match="a.tiff: .*pixel mode F"):
        image(tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_broken_images_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture(3)).save(path)
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"no image", b""):
        path.write_bytes(broken)
        with pytest.raises(BadSample, match=f"a.{suffix}: "):
            image(path)


def test_the_size_of_an_image_comes_from_its_header(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(20)).save(path)
    assert media.size(Media(kind="image", path=path)) == image(path).shape[1:3]
    (tmp_path / "b.png").write_bytes(path.read_bytes()[:60])
    assert media.size(Media(kind="image", path=tmp_path / "b.png")) == image(path).shape[1:3]
    with pytest.raises(BadSample, match=r"c\.png: not a readable image"):
        media.size(Media(kind="image", path=tmp_path / "c.png"))


def test_what_a_file_is_counts_and_not_its_name(tmp_path):
    """A video called .avi is a video all the same, and as an image refused; a picture as a video is one frame of it."""
    film = clip(tmp_path / "a.mp4")
    for name in ("a.avi", "a.jpg", "a.gif"):
        (tmp_path / name).write_bytes(film.read_bytes())
    np.testing.assert_array_equal(video(tmp_path / "a.avi", 4), video(film, 4))
    with pytest.raises(BadSample, match=r"a\.jpg: not a readable image"):
        image(tmp_path / "a.jpg")
    with pytest.raises(BadSample, match=r"a\.gif: not a readable image"):
        video(tmp_path / "a.gif", 4)
    Image.fromarray(picture(3)).save(tmp_path / "b.png")
    (tmp_path / "b.mp4").write_bytes((tmp_path / "b.png").read_bytes())
    np.testing.assert_array_equal(image(tmp_path / "b.png"), image(tmp_path / "b.mp4"))
    np.testing.assert_array_equal(video(tmp_path / "b.mp4", 2), np.stack([picture(3)] * 2))


def test_an_animated_gif_as_an_image_is_its_first_frame(tmp_path):
    frames = [Image.fromarray(picture(9 * k)) for k in range(5)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as gif:
        np.testing.assert_array_equal(image(tmp_path / "a.gif"), np.asarray(gif.convert("RGB"))[None])


def test_16_bit_colour_and_cmyk_jpegs(tmp_path):
    """A PNG of 16 bits a channel, written by hand, keeps its high bytes."""
    deep = (np.arange(5 * 7 * 3).reshape(5, 7, 3) * 601 % 65536).astype(">u2")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + line.tobytes() for line in deep)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)), chunk(b"IDAT", zlib.compress(lines))]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(image(tmp_path / "a.png")[0], deep >> 8)
    Image.fromarray(picture(20)).convert("CMYK").save(tmp_path / "b.jpg", quality=98)
    assert np.abs(image(tmp_path / "b.jpg")[0].astype(int) - picture(20)).mean() < 3
