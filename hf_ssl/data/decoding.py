"""From whatever a dataset stores as an image to one uint8 RGB array.

One policy for every decoder: transparent pixels lie over white, 16-bit values keep their high byte, EXIF
orientation is not applied (the reference pipelines do not), of an animation the first frame counts.
JPEG goes through simplejpeg where it is installed (the extra `fast`), else through torchvision: both are
equal to Pillow in every pixel, and faster. All else, CMYK JPEG included, goes through Pillow.

Data come from strangers: the size that a header states is compared with Pillow's limit,
`PIL.Image.MAX_IMAGE_PIXELS`, before anything is decoded; and only formats of pictures are opened, as Pillow
hands some others (EPS, WMF) to further programs.
"""

import io
import warnings
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hf_ssl.data.columns import printable

try:  # torchvision 0.29 announces, at every call, that its decoders will be removed
    from torchvision.io import ImageReadMode, decode_jpeg

    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)
except ImportError:
    decode_jpeg = None
try:
    import simplejpeg
except ImportError:
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")


NO_VIDEOS = "this is a video; only recipes whose view has `frames` take videos"


class BrokenImageError(ValueError):
    """An image that cannot be decoded; the message is one line and says why."""


class FrameFiles(NamedTuple):
    """A clip that is stored as one image file for each frame, in order."""

    paths: tuple[str, ...]


def decode_image(data: bytes | Image.Image | NDArray[np.uint8] | Tensor) -> NDArray[np.uint8]:
    """Decodes an image to RGB.

    Args:
        data: an encoded file; a PIL image of any mode; an array (H, W) or (H, W, C), or a tensor (H, W) or
            (C, H, W), of type uint8 or uint16 with C = 1, 3 or 4 (RGBA).

    Returns:
        uint8 array (H, W, 3). It may share memory with `data`, and may be read-only.

    Raises:
        BrokenImageError: the data are no image, are cut short, or have a type or shape not named above.
    """
    if isinstance(data, (bytes, bytearray, memoryview)):
        return _decode_file(bytes(data))
    if isinstance(data, Image.Image):
        return _decode_pil(data)
    if isinstance(data, Tensor):
        pixels = data.detach().cpu().numpy()
        return _decode_array(pixels if pixels.ndim == 2 else np.moveaxis(pixels, 0, -1))
    if isinstance(data, np.ndarray):
        return _decode_array(data)
    if isinstance(data, FrameFiles):
        raise BrokenImageError(NO_VIDEOS)
    raise BrokenImageError(
        f"cannot decode {type(data).__name__}; give the bytes of a file, a PIL image, an array or a tensor"
    )


def is_video(start: bytes) -> bool:
    """Whether the first 12 bytes of a file are those of an MP4, QuickTime, AVI or Matroska video."""
    is_quicktime = start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free")
    is_picture_in_it = start[8:12] in (b"avif", b"avis", b"heic", b"mif1")
    is_avi = start[:4] == b"RIFF" and start[8:12] == b"AVI "
    return (is_quicktime and not is_picture_in_it) or is_avi or start[:4] == b"\x1aE\xdf\xa3"  # Matroska


def _decode_file(data: bytes) -> NDArray[np.uint8]:
    if data[:3] == b"\xff\xd8\xff" and (header := _jpeg_header(data)):
        width, height, num_channels = header
        check_size(width, height)
        pixels_HWC = _decode_jpeg(data) if num_channels in (1, 3) else None  # 4: CMYK
        if pixels_HWC is not None:
            return pixels_HWC
    if not data:
        raise BrokenImageError("cannot decode an image of 0 bytes")
    if is_video(data[:12]):
        raise BrokenImageError(NO_VIDEOS)
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            return _decode_pil(image)
    except BrokenImageError:
        raise
    except (
        Exception
    ) as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise BrokenImageError(f"cannot decode {len(data)} bytes: {_one_line(error)}") from error


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Pixels (H, W, 3); None where Pillow has to decide, and to word the error."""
    try:
        if simplejpeg is not None:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
            return pixels
        if decode_jpeg is not None:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels_CHW = decode_jpeg(encoded, ImageReadMode.RGB)
            return np.ascontiguousarray(pixels_CHW.permute(1, 2, 0).numpy())
    except (RuntimeError, ValueError):
        pass
    return None


@cache
def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # a Pillow may have been built without some


def _jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and number of channels that a JPEG's frame header states (ITU T.81, B.1 and B.2.2).

    None for a file that does not come to it by plain segments: Pillow decides about those.
    """
    place = 2
    while place + 9 < len(data) and data[place] == 0xFF and data[place + 1] >= 0xC0:
        marker = data[place + 1]
        if 0xD0 <= marker <= 0xD9 or marker == 0xFF:  # without a length, or a fill byte
            return None
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = data[place + 5 : place + 7], data[place + 7 : place + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big"), data[place + 9]
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def check_size(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise BrokenImageError(
            f"{width} x {height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS allows, {limit:,}; raise it "
            "if such images are meant"
        )


def _decode_pil(image: Image.Image) -> NDArray[np.uint8]:
    try:
        check_size(*image.size)
        image.load()
        if image.mode in ("F", "I"):
            return _decode_array(_as_uint16(image))
        if image.mode.startswith("I;16"):
            return _decode_array(np.asarray(image, dtype=np.uint16))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except BrokenImageError:
        raise
    except Exception as error:
        raise BrokenImageError(f"cannot decode a {image.mode} image: {_one_line(error)}") from error


def _as_uint16(image: Image.Image) -> NDArray[np.uint16]:
    """Pillow opens some 16-bit grey files as 32-bit integers; others, and floats, have no known range."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise BrokenImageError(
            f"an image of mode {image.mode} with values from {values.min():g} to {values.max():g} has no "
            "defined white; store it with 8 or 16 bits"
        )
    return values.astype(np.uint16)


def _decode_array(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> NDArray[np.uint8]:
    if pixels.dtype not in (np.uint8, np.uint16):
        raise BrokenImageError(f"pixels of type {pixels.dtype}; give uint8 or uint16")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or pixels.size == 0:
        raise BrokenImageError(
            f"an array laid out (height, width, channels) of shape {tuple(pixels.shape)}; give 1, 3 or "
            "4 channels (tensors have theirs first) and at least one pixel"
        )
    pixels_HWC = (pixels >> 8 if pixels.dtype == np.uint16 else pixels).astype(np.uint8, copy=False)
    if pixels_HWC.shape[2] == 4:
        return _decode_pil(Image.fromarray(np.ascontiguousarray(pixels_HWC), "RGBA"))
    return pixels_HWC if pixels_HWC.shape[2] == 3 else np.repeat(pixels_HWC, 3, axis=2)


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split())) or type(error).__name__
