"""Clips: some frames of a video at even distances, and views of them.

Of a video only the frames up to the last one wanted are decoded, from the key frame before the first one on,
and only those wanted become pixels. One box, one flip and one change of colour hold for all frames of a view.
A video that is too short for the distance has a smaller one; one with too few frames repeats its last; an
image is a clip that stands still. Videos are decoded by PyAV (the extra `video`), with one thread and always
closed: a container left open makes forked workers hang.
Shape suffixes: T = frames, C = channels, H, W = height, width, S = side of a view.
"""

import io
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hf_ssl.data.batched_views import MAX_BATCHED_SIDE, make_views
from hf_ssl.data.columns import DataError, printable
from hf_ssl.data.decoding import BrokenImageError, FrameFiles, check_size, decode_image, is_video
from hf_ssl.data.readers import load_image
from hf_ssl.data.view_draws import FRAMES_DRAW, generator_of_sample
from hf_ssl.data.view_recipe import FramesSpec, parse_frames
from hf_ssl.data.views import ViewMaker, make_view

Seed = tuple[int, int, int]
Frames = NDArray[np.uint8]  # (T, H, W, 3)


def decode_clip(data: Any, frames: FramesSpec, place: float = 0.5) -> Frames:
    """Frames of a video.

    Args:
        data: the bytes of a video's file; the files of its frames; an array (T, H, W, 3) of uint8; or what
            `decode_image` takes.
        frames: how many, and at what distance.
        place: where the clip lies in the video: 0 at its start, 1 at its end.

    Returns:
        uint8 (T, H, W, 3) with T = `frames.num_frames`.

    Raises:
        BrokenImageError: the video cannot be decoded, or its pictures are too large.
        DataError: PyAV is not installed.
    """
    if isinstance(data, np.ndarray) and data.ndim == 4:
        return data[_chosen(len(data), frames, place)]
    if isinstance(data, FrameFiles):
        return _decode_files([data.paths[number] for number in _chosen(len(data.paths), frames, place)])
    if isinstance(data, (bytes, bytearray, memoryview)) and is_video(bytes(data[:12])):
        return _decode_video(bytes(data), frames, place)
    return np.repeat(decode_image(data)[None], frames.num_frames, axis=0)


def _chosen(num_frames: int, frames: FramesSpec, place: float) -> list[int]:
    """Numbers of the frames of a clip."""
    step = frames.step
    if frames.num_frames > 1:
        step = max(min(step, (num_frames - 1) // (frames.num_frames - 1)), 1)
    span = (frames.num_frames - 1) * step + 1
    start = round(place * max(num_frames - span, 0))
    return [min(start + number * step, num_frames - 1) for number in range(frames.num_frames)]


def _decode_files(paths: list[str]) -> Frames:
    """Frames that are files of their own; only those wanted are read, each once."""
    pixels: dict[str, NDArray[np.uint8]] = {}
    for path in dict.fromkeys(paths):
        try:
            pixels[path] = decode_image(load_image(path))
        except BrokenImageError as error:
            raise BrokenImageError(f"frame {printable(os.path.basename(path))}: {error}") from error
    sizes = sorted({f"{frame.shape[1]} x {frame.shape[0]}" for frame in pixels.values()})
    if len(sizes) > 1:
        raise BrokenImageError(f"frames of several sizes, {' and '.join(sizes)}; a clip has one")
    return np.stack([pixels[path] for path in paths])


def _decode_video(data: bytes, frames: FramesSpec, place: float) -> Frames:
    try:
        import av
    except ImportError as error:
        raise DataError('videos need PyAV; install it with pip install "hf-ssl[video]"') from error
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            stream: Any = container.streams.best("video")  # not the picture of a cover
            if stream is None or stream.codec_context is None:
                raise BrokenImageError("the file has no pictures that PyAV can decode")
            stream.thread_count = 1
            check_size(stream.width, stream.height)
            # Later pictures may be larger than the header states.
            stream.codec_context.options = {"max_pixels": str(Image.MAX_IMAGE_PIXELS or 2**31 - 1)}
            packets = _packets_of(container, stream)
            if not packets:
                raise BrokenImageError("the video has no frames")
            times = [packets[number].time for number in _chosen(len(packets), frames, place)]
            keys = [packet.stored for packet in packets if packet.is_key and packet.time <= times[0]]
            container.seek(max(keys, default=min(packet.stored for packet in packets)), stream=stream)
            return _read_frames(container, stream, times)
    except BrokenImageError:
        raise
    except (av.error.FFmpegError, IndexError, ValueError, OverflowError, MemoryError) as error:
        raise BrokenImageError(f"cannot decode the video: {printable(str(error) or repr(error))}") from error


class _Packet(NamedTuple):
    """Where a frame lies: when it is shown, and the time by which it is found, which differs for B-frames."""

    time: int
    stored: int
    is_key: bool


def _packets_of(container: Any, stream: Any) -> list[_Packet]:
    """The frames in the order in which they are shown: what is counted, at any frame rate; undecoded."""
    return sorted(
        _Packet(packet.pts, packet.pts if packet.dts is None else packet.dts, packet.is_keyframe)
        for packet in container.demux(stream)
        if packet.size > 0 and packet.pts is not None and not packet.is_discard
    )


def _read_frames(container: Any, stream: Any, times: list[int]) -> Frames:
    """Pixels of what is shown at these rising times; of a video cut short, the last frame is repeated."""
    shown: list[Any] = []
    last = None
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        while len(shown) < len(times) and times[len(shown)] < frame.pts:
            shown.append(last or frame)
        last = frame
        if frame.pts >= times[-1]:
            break
    if last is None:
        raise BrokenImageError("none of the video's frames can be decoded")
    shown += [last] * (len(times) - len(shown))
    pixels: list[NDArray[np.uint8]] = []
    for number, frame in enumerate(shown):
        pixels.append(pixels[-1] if number and frame is shown[number - 1] else _pixels_of(frame))
    return np.stack(pixels)


def _pixels_of(frame: Any) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return pixels


class ClipMaker:
    """Makes one view of a clip, or of many.

    Args:
        views: the recipe, whose one entry has `frames`.

    Attributes:
        frames: how many frames, at what distance.
        num_views: 1.
        sizes: side of the view.
        kinds: "clip".
        compiled: never.

    Raises:
        ValueError: the recipe is wrong; the message says where.
    """

    num_views = 1
    kinds = ["clip"]
    compiled = False

    def __init__(self, views: list[dict[str, Any]]) -> None:
        self.frames = parse_frames(views)
        self._views = ViewMaker([{key: views[0][key] for key in views[0] if key != "frames"}], compiled=False)
        self.sizes = self._views.sizes

    def decode(self, data: Any, seed: Seed) -> Frames:
        """Frames (T, H, W, 3) of a clip whose place in the video the seed draws."""
        return decode_clip(data, self.frames, generator_of_sample(seed, FRAMES_DRAW).random())

    def __call__(self, image: Frames, seed: Seed) -> list[Tensor]:
        """The view of a decoded clip (T, H, W, 3): [uint8 (T, 3, S, S)]."""
        height, width = image.shape[1:3]
        [parameters] = self._views.draw(height, width, seed)
        if max(height, width) <= MAX_BATCHED_SIDE:
            return [make_views(torch.from_numpy(image), [parameters] * len(image))]
        return [torch.stack([make_view(frame_HWC, parameters) for frame_HWC in image])]

    def make_batch(self, images: Sequence[Frames], seeds: Sequence[Seed]) -> list[Tensor]:
        """The views of many decoded clips: [uint8 (clips, T, 3, S, S)]."""
        return [torch.stack([self(clip, seed)[0] for clip, seed in zip(images, seeds, strict=True)])]


def frames_of(processor: Any) -> FramesSpec | None:
    """How clips are cut, for a processor that was made for clips."""
    views = getattr(processor, "views", None)
    return parse_frames(views) if views and "frames" in views[0] else None


def make_view_maker(views: list[dict[str, Any]]) -> ViewMaker | ClipMaker:
    """The maker that a recipe asks for: of clips where its entry has `frames`, else of images."""
    is_clip = bool(views) and isinstance(views[0], dict) and "frames" in views[0]
    return ClipMaker(views) if is_clip else ViewMaker(views)
