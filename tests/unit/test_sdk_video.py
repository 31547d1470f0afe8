"""Access units: NAL units, parameter sets, and the videos that real programs write."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import clips

from facelane import Encoding, PictureError, Reason
from facelane.video import NotPassableError, ParameterSets, Passage, access_units, head_of

SPS, PPS, IDR, SLICE, SEI, AUD = b"\x67sps", b"\x68pps", b"\x65idr", b"\x41p", b"\x06i", b"\x09a"
VPS_5, SPS_5, PPS_5, IDR_5 = b"\x40\x01v", b"\x42\x01s", b"\x44\x01p", b"\x26\x01i"


def annex_b(*units: bytes, code: bytes = b"\0\0\0\1") -> bytes:
    return b"".join(code + unit for unit in units)


@pytest.mark.parametrize("code", [b"\0\0\1", b"\0\0\0\1"])
def test_the_units_before_the_picture(code: bytes) -> None:
    data = annex_b(AUD, SPS, PPS, SEI, IDR, IDR, code=code)
    head, slices = head_of(data, Encoding.H264)
    assert head == [(9, AUD), (7, SPS), (8, PPS), (6, SEI)]
    assert data[slices:] == annex_b(IDR, IDR, code=code)


@given(st.binary(max_size=200), st.sampled_from([Encoding.H264, Encoding.H265]))
def test_whatever_the_bytes_are(data: bytes, encoding: Encoding) -> None:
    head, slices = head_of(data, encoding)
    assert 0 <= slices <= len(data)
    assert sum(len(unit) for _, unit in head) <= slices
    sets = ParameterSets(encoding)
    sets.learn(data)
    assert sets.complete(data).endswith(data[slices:])


def test_a_key_frame_gets_the_sets_that_it_lacks() -> None:
    sets = ParameterSets(Encoding.H264)
    sets.learn(annex_b(SPS, PPS))
    assert sets.complete(annex_b(IDR)) == annex_b(SPS, PPS, IDR)
    assert sets.complete(annex_b(AUD, SEI, IDR)) == annex_b(AUD, SPS, PPS, SEI, IDR)
    whole = annex_b(SPS, PPS, IDR)
    assert sets.complete(whole) is whole
    assert sets.complete(annex_b(b"\x67new", IDR)) == annex_b(b"\x67new", PPS, IDR)
    assert sets.complete(annex_b(IDR)) == annex_b(b"\x67new", PPS, IDR), "the newest hold"


def test_those_of_h265() -> None:
    sets = ParameterSets(Encoding.H265)
    sets.learn(annex_b(VPS_5, SPS_5, PPS_5))
    assert sets.complete(annex_b(IDR_5)) == annex_b(VPS_5, SPS_5, PPS_5, IDR_5)
    assert sets.sequence == (SPS_5,)


def test_nothing_is_known_of_sets_that_never_came() -> None:
    assert ParameterSets(Encoding.H264).complete(annex_b(IDR)) == annex_b(IDR)


@pytest.mark.parametrize("kind", [k for k in clips.KINDS if k not in clips.NOT_PASSABLE])
def test_a_video_as_access_units(kind: str, tmp_path: Path) -> None:
    frames = list(access_units(clips.write(tmp_path, kind)))
    assert len(frames) == 30
    assert {frame.picture.encoding for frame in frames} == {
        Encoding.H265 if "H.265" in kind else Encoding.H264
    }
    seen = clips.shown([frame.picture for frame in frames])
    assert seen == pytest.approx([clips.brightness(n) for n in range(30)], abs=4)
    offsets = [frame.stream_offset or 0.0 for frame in frames]
    step = 0.04 if kind == "no container" else 0.1  # which tells no time: FFmpeg's 25 a second
    assert offsets == pytest.approx([n * step for n in range(30)], abs=0.002)
    assert all(frame.capture_time is None for frame in frames), "a file is not live"


@pytest.mark.parametrize("kind", clips.NOT_PASSABLE)
def test_what_servers_do_not_take_is_told(kind: str, tmp_path: Path) -> None:
    with pytest.raises(NotPassableError) as caught:
        next(access_units(clips.write(tmp_path, kind)))
    assert caught.value.reason == Reason.ENCODING_UNSUPPORTED
    assert isinstance(caught.value, PictureError)
    words = {"4:2:2": "yuv422p", "interlaced": "interlaced", "MPEG-4": "mpeg4"}
    assert words[kind] in caught.value.message


@pytest.mark.parametrize("kind", ["plain", "transport stream", "H.265, closed groups"])
def test_every_key_frame_is_a_beginning(kind: str, tmp_path: Path) -> None:
    """Also of files that hold their parameter sets once: a decoder can begin at each."""
    pictures = [frame.picture for frame in access_units(clips.write(tmp_path, kind))]
    seen = clips.shown(pictures[10:])
    assert seen == pytest.approx([clips.brightness(n) for n in range(10, 30)], abs=4)


def test_sizes_may_change(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    small = clips.write(tmp_path / "a", "no container", frames=10)
    large = clips.write(tmp_path / "b", "no container", frames=10, size=(256, 192))
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    pictures = [frame.picture for frame in access_units(both)]
    assert len(clips.shown(pictures)) == 20


def test_a_format_may_change_into_one_that_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    good = clips.write(tmp_path, "no container", frames=10).read_bytes()
    with av.open(str(tmp_path / "b" / "c.h264"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv422p"
        frame = av.VideoFrame(128, 96, "yuv422p")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    both = tmp_path / "both.h264"
    both.write_bytes(good + (tmp_path / "b" / "c.h264").read_bytes())
    taken = []
    with pytest.raises(NotPassableError):
        taken.extend(access_units(both))
    frames = access_units(both)
    assert len([next(frames) for _ in range(10)]) == 10


@pytest.mark.parametrize("patient", [True, False])
def test_a_first_key_frame_that_came_in_part(patient: bool, tmp_path: Path) -> None:
    with av.open(str(clips.write(tmp_path, "no container"))) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        whole = bytes(packets[0])
        _, slices = head_of(whole, Encoding.H264)
        part = av.Packet(whole[:slices] + b"\0\0\1\x65\x88")
        part.is_keyframe, part.time_base = True, packets[0].time_base
        passage = Passage(stream, patient=patient)
        if not patient:
            with pytest.raises(NotPassableError):
                passage.take(part)
            return
        units = [passage.take(packet) for packet in (part, *packets[1:])]
    pictures = [unit.picture for unit in units if unit is not None]
    assert clips.shown(pictures) == pytest.approx(
        [clips.brightness(n) for n in range(10, 30)], abs=4
    )


def test_an_open_container_stays_open(tmp_path: Path) -> None:
    with av.open(str(clips.write(tmp_path, "plain"))) as container:
        frames = list(access_units(container, live=True))
        assert len(frames) == 30
        came = [frame.capture_time for frame in frames if frame.capture_time is not None]
        assert len(came) == 30
        assert all(a <= b for a, b in pairwise(came))
        container.seek(0)
        assert next(container.decode(video=0)).width == 128


def test_what_cannot_be_opened_repeats_no_secret(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be opened") as caught:
        next(access_units("rtsp://user:secret@127.0.0.1:1/x"))
    assert "secret" not in str(caught.value)
    with pytest.raises(OSError, match="cannot be opened"):
        next(access_units(tmp_path / "none.mp4"))


def test_pyav_is_imported_when_it_is_used() -> None:
    code = "import sys, facelane.video; sys.exit('av' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
