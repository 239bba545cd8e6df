import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import ViTImageProcessor, ViTModel

from hf_ssl.evaluation.embeddings import embed
from hf_ssl.evaluation.features import extract_features
from hf_ssl.evaluation.images import read_batches
from tests.evaluation.tiny import tiny_vit

SETTINGS = {"batch_size": 2, "batches_per_part": 2}


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.fixture(scope="module")
def encoder():
    return tiny_vit(image_size=8)


@pytest.fixture(scope="module")
def rows():
    pixels = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)
    return [{"image": Image.fromarray(image), "label": number % 3} for number, image in enumerate(pixels)]


class InterruptedSource:
    """Gives the rows of a list, and fails before row `fails_at`."""

    name = "rows"

    def __init__(self, rows, fails_at=None):
        self.all_rows, self.fails_at, self.num_read = rows, fails_at, 0

    def rows(self, limit=None, start=0):
        stop = None if limit is None else start + limit
        for number, row in enumerate(self.all_rows[start:stop], start):
            if number == self.fails_at:
                raise KeyboardInterrupt
            self.num_read += 1
            yield row


def test_file_holds_the_features_labels_and_row_numbers(encoder, processor, rows, tmp_path):
    table = pq.read_table(embed(encoder, processor, rows, tmp_path / "all.parquet", **SETTINGS))
    batches = [batch.pixel_values for batch in read_batches(rows, processor, 2)]
    assert_close(torch.tensor(table["features"].to_pylist()), extract_features(encoder, batches)["mean"])
    assert table["row"].to_pylist() == list(range(11))
    assert table["label"].to_pylist() == [number % 3 for number in range(11)]
    assert str(table.schema.field("features").type) == "list<element: float>"
    assert [path.name for path in tmp_path.iterdir()] == ["all.parquet"]


@pytest.mark.parametrize(("fails_at", "rows_left"), [(3, 11), (6, 7), (10, 3)])
def test_second_call_continues_after_the_last_part_and_gives_the_same_file(
    encoder, processor, rows, tmp_path, fails_at, rows_left
):
    whole = embed(encoder, processor, InterruptedSource(rows), tmp_path / "whole.parquet", **SETTINGS)
    output = tmp_path / "resumed.parquet"
    with pytest.raises(KeyboardInterrupt):
        embed(encoder, processor, InterruptedSource(rows, fails_at), output, **SETTINGS)
    assert not output.exists()
    second = InterruptedSource(rows)
    embed(encoder, processor, second, output, **SETTINGS)
    assert second.num_read == rows_left
    assert output.read_bytes() == whole.read_bytes()


def test_third_call_reads_nothing(encoder, processor, rows, tmp_path):
    output = embed(encoder, processor, InterruptedSource(rows), tmp_path / "all.parquet", **SETTINGS)
    again = InterruptedSource(rows)
    embed(encoder, processor, again, output, **SETTINGS)
    assert again.num_read == 0


def test_unfinished_part_of_a_killed_call_is_not_taken_for_a_part(encoder, processor, rows, tmp_path):
    whole = embed(encoder, processor, rows, tmp_path / "whole.parquet", **SETTINGS)
    output = tmp_path / "resumed.parquet"
    with pytest.raises(KeyboardInterrupt):
        embed(encoder, processor, InterruptedSource(rows, 5), output, **SETTINGS)
    settings = tmp_path / "resumed.parquet.parts" / "settings.json"
    settings.write_text(settings.read_text().replace('"rows"', '"list of 11 rows"'))
    (tmp_path / "resumed.parquet.parts" / "000001.parquet.tmp").write_bytes(b"cut short")
    embed(encoder, processor, rows, output, **SETTINGS)
    assert output.read_bytes() == whole.read_bytes()


def test_other_weights_do_not_continue_a_file(encoder, processor, rows, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embed(encoder, processor, InterruptedSource(rows, 5), tmp_path / "all.parquet", **SETTINGS)
    other = ViTModel(encoder.config, add_pooling_layer=False)
    with pytest.raises(ValueError, match="made with another encoder"):
        embed(other, processor, InterruptedSource(rows), tmp_path / "all.parquet", **SETTINGS)


def test_foreign_file_is_not_overwritten(encoder, processor, rows, tmp_path):
    output = embed(encoder, processor, rows, tmp_path / "all.parquet", **SETTINGS)
    with pytest.raises(ValueError, match="made with another pool"):
        embed(encoder, processor, rows, output, "class_token", **SETTINGS)


def test_rows_without_labels_give_no_label_column(encoder, processor, rows, tmp_path):
    unlabelled = [{"image": row["image"]} for row in rows]
    output = embed(encoder, processor, unlabelled, tmp_path / "all.parquet", limit=5, **SETTINGS)
    assert pq.read_table(output).column_names == ["row", "features"]
    assert pq.read_table(output).num_rows == 5


def test_broken_images_have_no_row_even_where_a_whole_part_is_broken(encoder, processor, rows, tmp_path):
    broken = [
        {**row, "image": b""} if 4 <= number < 8 or number == 1 else row for number, row in enumerate(rows)
    ]
    table = pq.read_table(embed(encoder, processor, broken, tmp_path / "all.parquet", **SETTINGS))
    assert table["row"].to_pylist() == [0, 2, 3, 8, 9, 10]


def test_datasets_reads_the_file(encoder, processor, rows, tmp_path):
    from datasets import Dataset

    output = embed(encoder, processor, rows, tmp_path / "all.parquet", "grid2", **SETTINGS)
    dataset = Dataset.from_parquet(str(output), cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == 11 and len(dataset[0]["features"]) == 4 * 16


def test_source_without_images_is_refused(encoder, processor, tmp_path):
    with pytest.raises(ValueError, match="no readable image"):
        embed(encoder, processor, [{"image": b""}], tmp_path / "all.parquet")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_part_of_the_settings_and_near_full_precision(encoder, processor, rows, tmp_path):
    attention = encoder.config._attn_implementation
    features = []
    for name, dtype in (("full", None), ("half", torch.bfloat16)):
        path = embed(encoder, processor, rows, tmp_path / f"{name}.parquet", dtype=dtype, **SETTINGS)
        features.append(torch.tensor(pq.read_table(path)["features"].to_pylist()))
    assert torch.nn.functional.cosine_similarity(*features).min() > 0.999
    assert not torch.equal(*features)
    assert encoder.config._attn_implementation == attention
    with pytest.raises(ValueError, match="made with another dtype"):
        embed(encoder, processor, rows, tmp_path / "half.parquet", **SETTINGS)
