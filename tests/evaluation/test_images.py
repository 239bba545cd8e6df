import io

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import ViTImageProcessor

from hf_ssl.evaluation.images import count_classes, read_batches, read_rows


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": 8, "width": 8})


def picture(grey, mode="L"):
    return Image.new("L", (8, 8), grey).convert(mode)


def png(grey):
    buffer = io.BytesIO()
    picture(grey).save(buffer, format="PNG")
    return buffer.getvalue()


def test_rows_keep_their_order_number_and_label(processor):
    rows = [{"image": png(10 * i), "label": i} for i in range(7)]
    batches = list(read_batches(rows, processor, batch_size=3, limit=5, start=1))
    assert [batch.row_ids for batch in batches] == [[1, 2, 3], [4, 5]]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [1, 2, 3, 4, 5]
    # 0.5 mean and deviation: grey g becomes g / 127.5 - 1.
    grey = torch.cat([batch.pixel_values for batch in batches])[:, 0, 0, 0]
    assert_close(grey, torch.tensor([10.0, 20, 30, 40, 50]) / 127.5 - 1, atol=1e-5, rtol=0)


def test_sources_are_read_through_their_rows(processor):
    class Source:
        def rows(self, limit=None, start=0):
            yield from [{"image": png(0), "label": 3}][start:limit]

    assert next(read_batches(Source(), processor)).labels.tolist() == [3]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1"])
def test_every_mode_becomes_three_channels(processor, mode):
    assert next(read_batches([{"image": picture(255, mode)}], processor)).pixel_values.shape == (1, 3, 8, 8)


def test_broken_images_are_left_out_and_named(processor, caplog):
    rows = [{"image": png(0), "label": 0}, {"image": b"no image", "label": 1}, {"image": png(0), "label": 2}]
    batch = next(read_batches(rows, processor))
    assert batch.row_ids == [0, 2] and batch.labels.tolist() == [0, 2]
    assert "row 1 left out" in caplog.text


def test_labels_are_optional_but_not_for_some_rows_only(processor):
    assert next(read_batches([{"image": png(0)}], processor)).labels is None
    with pytest.raises(ValueError, match="row 1 has no label but others have"):
        list(read_batches([{"image": png(0), "label": 1}, {"image": png(0)}], processor))


def test_a_path_is_refused_with_the_way_out(processor):
    with pytest.raises(TypeError, match="open_images"):
        next(read_batches({"image": 1}, processor))


def test_classes_are_counted_by_name_or_by_label():
    class Source:
        label_names = ["a", "b", "c"]

    assert count_classes(Source(), torch.tensor([0, 1])) == 3
    assert count_classes([], torch.tensor([0, 1])) == 2


class SortedSource:
    """A hundred rows sorted into ten classes; counts what is read."""

    def __init__(self, num_rows=100):
        self.num_rows, self.num_read = num_rows, 0

    def rows(self, limit=None, start=0):
        for index in list(range(100))[start : None if limit is None else start + limit]:
            self.num_read += 1
            yield {"image": png(0), "label": index // 10}


def test_limit_takes_every_class_of_a_sorted_source_and_reads_no_more():
    source = SortedSource()
    found = list(read_rows(source, limit=20))
    assert [index for index, _ in found] == list(range(0, 100, 5))
    assert [row["label"] for _, row in found] == [label for label in range(10) for _ in range(2)]
    assert source.num_read == 20
    assert [index for index, _ in read_rows(list(range(7)), limit=3)] == [0, 2, 4]


def test_limit_of_a_stream_of_unknown_length_takes_the_first_rows():
    assert [index for index, _ in read_rows(SortedSource(num_rows=None), limit=3, start=2)] == [2, 3, 4]
