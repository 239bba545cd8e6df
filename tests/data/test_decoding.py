"""Decoding of every kind of image to RGB."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ssl.data import decoding
from hf_ssl.data.views import BrokenImageError, decode_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (7, 5), dtype=np.uint8)
SIXTEEN = RNG.integers(0, 65536, (7, 5)).astype(np.uint16)


@pytest.fixture(params=["simplejpeg", "torchvision", "pillow"], autouse=True)
def decoder(request, monkeypatch):
    """Every test runs with each decoder of JPEG files that may be there."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg", reason="comes with the extra `fast`")
        monkeypatch.setattr(decoding, "decode_jpeg", None)  # must not be needed
    else:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    if request.param == "pillow":
        monkeypatch.setattr(decoding, "decode_jpeg", None)
    return request.param


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def three(gray: np.ndarray) -> np.ndarray:
    return np.stack([gray] * 3, axis=2)


def smooth(mode: str) -> Image.Image:
    return Image.radial_gradient("L").resize((40, 30)).convert(mode)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (RGB, RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (GRAY, three(GRAY)),
        (GRAY[:, :, None], three(GRAY)),
        (torch.from_numpy(GRAY)[None], three(GRAY)),
        (SIXTEEN, three(SIXTEEN >> 8)),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GRAY), three(GRAY)),
        (Image.fromarray(GRAY > 99), three(np.where(GRAY > 99, 255, 0))),
        (encode(Image.fromarray(RGB)), RGB),
        (encode(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
        (encode(Image.fromarray(GRAY)), three(GRAY)),
        (encode(Image.fromarray(SIXTEEN)), three(SIXTEEN >> 8)),
        (encode(Image.fromarray(SIXTEEN), "TIFF"), three(SIXTEEN >> 8)),
        (Image.fromarray(SIXTEEN.astype(np.int32)), three(SIXTEEN >> 8)),
    ],
)
def test_lossless_images_come_back_as_rgb(data, expected):
    decoded = decode_image(data)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_decodes_as_pillow_does(mode, options):
    data = encode(smooth(mode), "JPEG", quality=80, **options)
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_photographs_decode_as_pillow_does(shared_dir):
    for path in sorted((shared_dir / "data" / "photos").glob("*.jpg"))[:4]:
        assert np.array_equal(decode_image(path.read_bytes()), np.asarray(Image.open(path).convert("RGB"))), (
            path
        )


def test_transparent_pixels_lie_over_white():
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], dtype=np.uint8)
    expected = [[[255, 255, 255], [10, 20, 30], [204, 204, 204]]]  # 51 / 255 = a fifth of black
    rgba = Image.fromarray(pixels)
    for data in (pixels, torch.from_numpy(pixels).permute(2, 0, 1), rgba, encode(rgba)):
        assert decode_image(data).tolist() == expected
    assert decode_image(Image.fromarray(pixels[:, :, [0, 3]], "LA"))[0, 0].tolist() == [255, 255, 255]


def test_palette_images_come_back_in_their_colours_with_white_where_transparent():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    assert decode_image(encode(image)).tolist() == [[[200, 0, 0], [0, 0, 200]]]
    assert decode_image(encode(image, transparency=1)).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_exif_orientation_is_not_applied_by_any_decoder():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for file_format in ("JPEG", "PNG"):
        data = encode(smooth("RGB"), file_format, exif=exif)
        assert decode_image(data).shape == (30, 40, 3)


JPEG = encode(smooth("RGB"), "JPEG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"no image at all", "cannot identify"),
        (JPEG[: len(JPEG) // 2], "cannot decode .* bytes"),
        (JPEG[:-2], "cannot decode .* bytes"),
        (JPEG[:3], "cannot decode 3 bytes"),
        (encode(Image.fromarray(RGB))[:-40], "cannot decode .*truncated"),
        (Image.fromarray(np.ones((4, 4), dtype=np.float32)), "no defined white"),
        (Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), "no defined white"),
        (np.ones((4, 4, 3)), "float64"),
        (np.ones((4, 4, 2), dtype=np.uint8), r"\(4, 4, 2\)"),
        (np.ones((0, 4, 3), dtype=np.uint8), r"\(0, 4, 3\)"),
        (torch.ones(5, 4, 3, dtype=torch.uint8), r"\(4, 3, 5\)"),
        ("photo.jpg", "cannot decode str"),
        (None, "cannot decode NoneType"),
    ],
)
def test_broken_images_are_refused_in_one_line(data, message):
    with pytest.raises(BrokenImageError, match=message) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)
