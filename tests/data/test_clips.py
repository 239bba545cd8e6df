"""Clips of videos: which frames, one view for all of them, broken files, and the stream's guarantees."""

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ssl.data import clips
from hf_ssl.data.clips import ClipMaker, decode_clip, frames_of, make_view_maker
from hf_ssl.data.decoding import BrokenImageError, decode_image
from hf_ssl.data.loader import TrainLoader
from hf_ssl.data.sources import open_images
from hf_ssl.data.view_recipe import FramesSpec
from hf_ssl.evaluation.baselines import PixelExtractor
from hf_ssl.evaluation.images import read_batches
from hf_ssl.modeling.vjepa import VJEPAImageProcessor
from tests.conftest import ROOT

av = pytest.importorskip("av")

ACTIONS = ROOT.parent / "shared" / "data" / "weizmann_actions"
VIEWS = VJEPAImageProcessor.for_image_size(
    16,
    views=[
        {
            "crop": {"scale": [0.5, 1.0]},
            "transforms": [{"type": "horizontal_flip", "probability": 0.5}],
            "frames": {"count": 4, "step": 2},
        }
    ],
).views


def video_of(
    levels: list[int],
    side: int = 32,
    key_frames: int = 4,
    suffix: str = "mp4",
    times: list[int] | None = None,
    b_frames: int = 0,
) -> bytes:
    """A video whose frame i is grey of level i, shown at 25 frames a second or at these twenty-fifths."""
    file = io.BytesIO()
    with av.open(file, mode="w", format="matroska" if suffix == "mkv" else suffix) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = key_frames
        stream.bit_rate = 4_000_000
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = Fraction(1, 25)
        for number, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((side, side, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


LEVELS = list(range(10, 250, 12))  # 20 frames


def levels_of(frames: np.ndarray) -> list[int]:
    """The frame number that each frame's grey is nearest to."""
    return [int(np.abs(np.array(LEVELS) - frame.mean()).argmin()) for frame in frames]


def folder_of_videos(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:02}.mp4").write_bytes(video_of(LEVELS[number % 4 :]))
    return folder


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize(
    ("frames", "place", "expected"),
    [
        (FramesSpec(4, 3), 0.0, [0, 3, 6, 9]),
        (FramesSpec(4, 3), 1.0, [10, 13, 16, 19]),
        (FramesSpec(1, 4), 0.5, [10]),
    ],
)
def test_frames_lie_at_the_distance_asked(suffix, frames, place, expected):
    assert levels_of(decode_clip(video_of(LEVELS, suffix=suffix), frames, place)) == expected


@pytest.mark.parametrize(("suffix", "b_frames"), [("mp4", 0), ("mkv", 0), ("mp4", 2), ("avi", 2)])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_frames_are_counted_whatever_their_times(suffix, b_frames, place):
    even = suffix == "avi"  # whose frames have no times of their own
    times = None if even else [number if number < 10 else 5 * number - 40 for number in range(20)]
    video = video_of(LEVELS, suffix=suffix, times=times, b_frames=b_frames)
    first = round(place * 10)
    assert levels_of(decode_clip(video, FramesSpec(4, 3), place)) == list(range(first, first + 10, 3))


def test_a_video_too_short_for_the_distance_has_a_smaller_one_and_then_repeats_its_last_frame():
    assert levels_of(decode_clip(video_of(LEVELS[:9]), FramesSpec(4, 4), 0.0)) == [0, 2, 4, 6]
    assert levels_of(decode_clip(video_of(LEVELS[:2]), FramesSpec(4, 4), 0.0)) == [0, 1, 1, 1]


def test_an_image_is_a_clip_that_stands_still_and_frames_in_memory_are_one():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    clip = decode_clip(image, FramesSpec(3, 2))
    assert clip.shape == (3, 8, 8, 3) and (clip == image).all()
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    assert decode_clip(frames, FramesSpec(3, 2), 0.0)[:, 0, 0, 0].tolist() == [0, 2, 4]


def test_only_frames_from_the_key_frame_to_the_last_wanted_are_decoded(monkeypatch):
    converted = []
    real = av.VideoFrame.to_ndarray
    monkeypatch.setattr(clips, "_pixels_of", lambda frame: converted.append(1) or real(frame, format="rgb24"))
    decode_clip(video_of(LEVELS), FramesSpec(2, 1), 1.0)
    assert len(converted) == 2


@pytest.mark.parametrize(
    "data", [video_of(LEVELS)[:200], b"\x00\x00\x00\x18ftypisom" + b"\x00" * 50, b"", b"no video at all"]
)
def test_broken_videos_are_broken_images(data):
    with pytest.raises(BrokenImageError):
        decode_clip(data, FramesSpec(2, 1))


def test_videos_of_too_many_pixels_are_refused(monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 500)
    with pytest.raises(BrokenImageError, match="32 x 32 pixels are more than"):
        decode_clip(video_of(LEVELS[:3]), FramesSpec(2, 1))


def test_pictures_that_are_larger_than_the_header_states_are_refused(monkeypatch):
    def jpegs_of(side: int) -> list[av.Packet]:
        codec = av.CodecContext.create("mjpeg", "w")
        codec.width = codec.height = side
        codec.pix_fmt, codec.time_base = "yuvj420p", Fraction(1, 25)
        frame = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")
        frame.pts = 0
        return [*codec.encode(frame.reformat(format="yuvj420p")), *codec.encode(None)]

    file = io.BytesIO()
    with av.open(file, mode="w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p"
        for number, side in enumerate([32, 32, 96]):
            for packet in jpegs_of(side):
                packet.stream, packet.pts, packet.dts = stream, number, number
                container.mux(packet)
    assert decode_clip(file.getvalue(), FramesSpec(2, 1), 0.0).shape == (2, 32, 32, 3)
    assert decode_clip(file.getvalue(), FramesSpec(1, 1), 1.0).shape == (1, 96, 96, 3)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(BrokenImageError, match="cannot decode the video"):
        decode_clip(file.getvalue(), FramesSpec(1, 1), 1.0)


def test_a_codec_that_is_not_known_makes_a_broken_video():
    video = video_of(LEVELS[:3], suffix="mkv")
    assert video.count(b"V_MPEG4/ISO/ASP") == 1
    with pytest.raises(BrokenImageError, match="no pictures that PyAV can decode"):
        decode_clip(video.replace(b"V_MPEG4/ISO/ASP", b"V_OTHER/ISO/ASP"), FramesSpec(2, 1))


def test_one_box_and_one_flip_hold_for_all_frames():
    picture = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
    for side in (1, 4):  # small and large pictures go other ways
        maker, large = ClipMaker(VIEWS), np.kron(picture, np.ones((side, side, 1), np.uint8))
        [view] = maker(np.repeat(large[None], 4, axis=0), (0, 0, 5))
        assert view.shape == (4, 3, 16, 16) and view.dtype == torch.uint8
        assert (view == view[:1]).all()


def test_place_and_view_depend_on_the_seed_alone():
    maker, data = make_view_maker(VIEWS), video_of(LEVELS)
    starts = {levels_of(maker.decode(data, (0, epoch, 3)))[0] for epoch in range(12)}
    assert len(starts) > 3
    first, again = (maker(maker.decode(data, (0, 1, 3)), (0, 1, 3))[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_of_clips_resumes_bit_equal(tmp_path, num_workers):
    source = open_images(str(folder_of_videos(tmp_path / "videos")))

    def batches(start: int, count: int, workers: int) -> list[torch.Tensor]:
        loader = TrainLoader(
            source, make_view_maker(VIEWS), batch_size=4, seed=1, start_batch=start, num_workers=workers
        )
        return [batch["pixel_values_videos"].clone() for batch, _ in zip(loader, range(count), strict=False)]

    whole = batches(0, 5, 0)
    assert whole[0].shape == (4, 4, 3, 16, 16)
    for resumed, expected in zip(batches(2, 3, num_workers), whole[2:], strict=True):
        assert torch.equal(resumed, expected)


def test_processes_share_the_clips_and_each_clip_is_the_one_that_its_seed_draws(tmp_path):
    source, maker = open_images(str(folder_of_videos(tmp_path / "videos"))), make_view_maker(VIEWS)
    seen = []
    for rank in range(2):
        loader = TrainLoader(source, maker, batch_size=3, seed=1, rank=rank, world_size=2)
        for batch, _ in zip(loader, range(2), strict=False):
            for clip, sample_id in zip(
                batch["pixel_values_videos"], batch["sample_id"].tolist(), strict=True
            ):
                data, seed = source.load(source.row(sample_id)), (1, 0, sample_id)
                assert torch.equal(clip, maker(maker.decode(data, seed), seed)[0])
                seen.append(sample_id)
    assert sorted(seen) == list(range(12))


def test_a_broken_video_is_skipped_counted_and_named(tmp_path):
    folder = folder_of_videos(tmp_path / "videos")
    (folder / "05.mp4").write_bytes((folder / "05.mp4").read_bytes()[:100])
    loader = TrainLoader(open_images(str(folder)), make_view_maker(VIEWS), batch_size=4, seed=1)
    for _, _ in zip(loader, range(3), strict=False):
        pass
    assert loader.bad_images.count == 1 and "05.mp4" in loader.bad_images.names[0]


def folder_of_frames(folder: Path, clips: dict[str, int]) -> Path:
    """Clips of so many frames, whose frame i is grey of level i."""
    for name, count in clips.items():
        (folder / name).mkdir(parents=True)
        for number, level in enumerate(LEVELS[:count]):
            Image.fromarray(np.full((20, 24, 3), level, np.uint8)).save(folder / name / f"{number}.png")
    return folder


def test_folders_of_frames_are_clips_in_the_order_of_their_numbers(tmp_path):
    clips = {"up/a": 12, "up/b": 3, "down/a": 1, "down/c": 12}
    source = open_images(str(folder_of_frames(tmp_path, clips)), image_column="frames")
    assert source.label_names == ["down", "up"] and "folders of frames" in source.describe()
    rows = list(source.rows())
    assert [row["label"] for row in rows] == [0, 0, 1, 1]
    shown = [levels_of(decode_clip(row["image"], FramesSpec(4, 3), 1.0)) for row in rows]
    assert shown == [[0, 0, 0, 0], [2, 5, 8, 11], [2, 5, 8, 11], [0, 1, 2, 2]]
    assert source.row_name(3).endswith("up/b")
    processor = VJEPAImageProcessor.for_image_size(16, views=VIEWS)
    [batch] = read_batches(source, processor)
    assert batch.pixel_values.shape == (4, 4, 3, 16, 16) and batch.labels.tolist() == [0, 0, 1, 1]


def test_a_folder_with_splits_of_frames_and_one_without_labels(tmp_path):
    folder_of_frames(tmp_path, {"train/a": 2, "train/b": 2, "test/c": 2})
    source = open_images(str(tmp_path), split="train", image_column="frames")
    assert source.num_rows == 2 and source.label_column is None


def test_frames_that_lie_in_no_clip_or_are_missing_are_refused_by_name(tmp_path):
    folder_of_frames(tmp_path / "clips", {"a": 2})
    with pytest.raises(ValueError, match=r"frames of no clip, such as 0\.png"):
        open_images(str(tmp_path / "clips" / "a"), image_column="frames")
    with pytest.raises(ValueError, match="holds no images"):
        open_images(str(folder_of_videos(tmp_path / "videos", 1)), image_column="frames")


def test_a_broken_or_odd_frame_breaks_the_clips_that_show_it(tmp_path):
    folder_of_frames(tmp_path, {"a": 6})
    [row] = open_images(str(tmp_path), image_column="frames").rows()
    Image.new("RGB", (10, 20)).save(tmp_path / "a" / "4.png")
    (tmp_path / "a" / "5.png").write_bytes(b"")
    assert levels_of(decode_clip(row["image"], FramesSpec(3, 1), 0.0)) == [0, 1, 2]
    with pytest.raises(BrokenImageError, match="several sizes, 10 x 20 and 24 x 20"):
        decode_clip(row["image"], FramesSpec(2, 1), 0.75)
    with pytest.raises(BrokenImageError, match=r"frame 5\.png: cannot decode an image of 0 bytes"):
        decode_clip(row["image"], FramesSpec(2, 1), 1.0)
    with pytest.raises(BrokenImageError, match="only recipes whose view has `frames`"):
        decode_image(row["image"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_clip_that_is_broken_in_some_places_does_not_change_what_a_resumed_run_sees(tmp_path, num_workers):
    folder_of_frames(tmp_path, dict.fromkeys("abcdefgh", 20))
    for name in "abc":
        (tmp_path / name / "15.png").write_bytes(b"")  # in about half of the clips that are drawn
    source = open_images(str(tmp_path), image_column="frames")

    def batches(start: int, count: int, workers: int) -> tuple[list[torch.Tensor], int]:
        loader = TrainLoader(
            source,
            make_view_maker(VIEWS),
            batch_size=4,
            seed=1,
            start_batch=start,
            num_workers=workers,
            max_bad_fraction=1.0,
        )
        clips = [batch["pixel_values_videos"].clone() for batch, _ in zip(loader, range(count), strict=False)]
        return clips, loader.bad_images.met

    whole, num_broken = batches(0, 12, 0)
    assert 0 < num_broken < 18
    resumed, _ = batches(5, 7, num_workers)
    assert all(torch.equal(clip, expected) for clip, expected in zip(resumed, whole[5:], strict=True))


def test_evaluation_takes_the_middle_and_the_floor_sees_motion(tmp_path):
    processor = VJEPAImageProcessor.for_image_size(16, views=VIEWS)
    assert frames_of(processor) == FramesSpec(4, 2)
    rows = [{"image": video_of(LEVELS), "label": 0}, {"image": video_of([100] * 20), "label": 1}]
    [batch] = read_batches(rows, processor)
    assert batch.pixel_values.shape == (2, 4, 3, 16, 16)
    motion = PixelExtractor.of(processor)(batch.pixel_values)["motion 8x8"]
    assert motion[0].mean() > 0.05 > 0.01 > motion[1].abs().max()


@pytest.mark.skipif(not ACTIONS.exists(), reason="needs ../shared/data/weizmann_actions")
def test_actions_are_found_by_their_column_and_decoded():
    source = open_images(str(ACTIONS), split="train")
    assert source.image_column == "video" and source.num_rows == 136
    row = next(iter(source.rows(limit=1)))
    assert decode_clip(row["image"], FramesSpec(8, 4)).shape == (8, 64, 64, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": {"count": 0}}, "count"),
        ({"frames": {"count": 4, "stride": 2}}, "stride"),
        ({"count": 2}, "one global view of a clip"),
        ({"kind": "local"}, "one global view of a clip"),
    ],
)
def test_recipes_of_clips_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_view_maker([{**VIEWS[0], **change}])


def test_without_pyav_a_video_names_the_extra(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    data = video_of(LEVELS[:3])
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'pip install "hf-ssl\[video\]"'):
        decode_clip(data, FramesSpec(2, 1))
