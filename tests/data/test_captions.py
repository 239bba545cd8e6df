"""Captions: found among columns, one of several drawn by the sample's seed, resumed to the same ones."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_ssl.data.captions import captions_of, choose_caption, read_captions
from hf_ssl.data.loader import TrainLoader
from hf_ssl.data.sources import DataError, open_images
from hf_ssl.data.views import ViewMaker

VIEWS = [{"count": 1, "kind": "global", "size": 16, "crop": {"scale": [0.5, 1.0]}, "transforms": []}]


def picture(shade: int) -> dict:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, shade, shade)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def dataset(count: int = 12, **columns) -> datasets.Dataset:
    """Rows whose captions name their number; by default five each, beside a column of other texts."""
    several = [[f"{row}: caption {number}" for number in range(5)] for row in range(count)]
    columns = columns or {"captions": several, "image_id": [str(row) for row in range(count)]}
    rows = {"image": [picture(20 * row) for row in range(count)], **columns}
    data = datasets.Dataset.from_dict(rows)
    return data.cast_column("image", datasets.Image(decode=False)).cast_column("image", datasets.Image())


def texts(source, steps: range, **options) -> list[list[str]]:
    options = {"batch_size": 4, "seed": 5, "start_batch": steps.start, **options}
    loader = TrainLoader(source, ViewMaker(VIEWS), **options)
    return [batch["text"] for _, batch in zip(steps, loader, strict=False)]


def test_a_column_of_captions_is_found_by_its_name_and_type():
    assert open_images(dataset(), text_column="").text_column == "captions"
    assert open_images(dataset()).text_column is None
    assert open_images("sample", text_column="").text_column == "text"


def test_columns_that_are_no_captions_or_too_many_are_refused():
    with pytest.raises(DataError, match='column "label" of .* holds no texts'):
        open_images(dataset(3, label=[1, 2, 3]), text_column="label")
    with pytest.raises(DataError, match="no column of texts; name one"):
        open_images(dataset(3, label=[1, 2, 3]), text_column="")
    with pytest.raises(DataError, match="several columns of texts, first, second; name one as text_column"):
        open_images(dataset(1, first=["a"], second=["b"]), text_column="")


def test_a_folder_of_images_has_no_captions(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="folder of images without texts"):
        open_images(tmp_path, text_column="")


def test_parquet_files_give_their_captions(tmp_path):
    dataset().to_parquet(tmp_path / "train.parquet")
    source = open_images(tmp_path, text_column="")
    batch = texts(source, range(1))[0]
    assert all(isinstance(text, str) and ": caption " in text for text in batch)


def test_one_of_several_captions_is_drawn_and_all_come_in_time():
    source = open_images(dataset(), text_column="")
    seen = [text for batch in texts(source, range(90)) for text in batch]
    assert len(set(seen)) == 60  # 12 images of 5
    shares = np.bincount([int(text[-1]) for text in seen]) / len(seen)
    assert (abs(shares - 0.2) < 0.08).all()


def test_captions_do_not_depend_on_workers_or_on_an_interruption():
    source = open_images(dataset(), text_column="")
    whole = texts(source, range(8))
    assert texts(source, range(3, 8)) == whole[3:]
    assert texts(source, range(8), num_workers=2) == whole
    assert texts(source, range(8), seed=6) != whole


def test_the_caption_belongs_to_its_image():
    source = open_images(dataset(), text_column="")
    loader = TrainLoader(source, ViewMaker(VIEWS), batch_size=4, seed=0)
    batch = next(iter(loader))
    shades = batch["pixel_values"][:, 0, 8, 8].tolist()
    assert [int(text.split(":")[0]) for text in batch["text"]] == [shade // 20 for shade in shades]


def test_an_image_without_a_caption_is_skipped_and_named(caplog):
    several = [["a"], [], ["  "], None, *([["b"]] * 8)]
    source = open_images(dataset(captions=several), text_column="")
    loader = TrainLoader(source, ViewMaker(VIEWS), batch_size=12, seed=0)
    batch = next(iter(loader))
    assert set(batch["text"]) == {"a", "b"} and loader.bad_images.count == 3
    assert "the image has no caption" in caplog.text


def test_one_text_is_one_caption():
    assert (
        captions_of("a dog") == ["a dog"]
        and captions_of(["", None, "b"]) == ["b"]
        and captions_of(None) == []
    )
    assert choose_caption("a dog", (0, 0, 0)) == "a dog"


def test_captions_are_read_for_a_tokenizer_without_decoding_images():
    source = open_images(dataset(3), text_column="")
    assert len(list(read_captions([source], limit=2))) == 10
