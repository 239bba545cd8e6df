"""The built-in sample: it holds what its documentation says, and reading it leaves no trace."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from hf_ssl.data.sample import SAMPLE_DIR, load_retrieval_task, load_sample


def test_split_and_design_give_the_documented_number_of_rows():
    assert {split: len(load_sample(split)) for split in ("train", "test")} == {"train": 2814, "test": 938}
    assert len(load_sample("train", design="noto")) == len(load_sample("train", design="twemoji")) == 1407


def test_no_emoji_of_the_test_split_is_in_the_train_split():
    train, test = (set(load_sample(split)["emoji"]) for split in ("train", "test"))
    assert (len(train), len(test), len(train & test)) == (1407, 469, 0)


def test_both_designs_list_the_same_emoji_in_the_same_order():
    noto, twemoji = (load_sample("test", design=design) for design in ("noto", "twemoji"))
    assert noto["emoji"][:] == twemoji["emoji"][:]
    assert noto["text"][:] == twemoji["text"][:]


def test_columns_have_their_feature_types_and_label_names():
    features = load_sample().features
    assert list(features) == ["image", "text", "emoji", "category", "subcategory", "design"]
    assert features["image"].__class__.__name__ == "Image"
    assert {name: features[name].num_classes for name in ("emoji", "category", "subcategory", "design")} == {
        "emoji": 1876,
        "category": 10,
        "subcategory": 99,
        "design": 2,
    }


def test_a_known_emoji_has_its_name_and_category():
    rows = load_sample("train")
    features = rows.features
    by_name = {features["emoji"].int2str(row["emoji"]): row for row in rows.remove_columns("image")}
    by_name |= {
        features["emoji"].int2str(row["emoji"]): row for row in load_sample("test").remove_columns("image")
    }
    worm = by_name["worm"]
    assert worm["text"] == "worm"
    assert features["category"].int2str(worm["category"]) == "Animals & Nature"
    assert features["subcategory"].int2str(worm["subcategory"]) == "animal-bug"


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_picture_is_64_pixels_square_and_differs_from_all_others(split):
    seen = set()
    for image in load_sample(split)["image"]:
        assert image.size == (64, 64)
        seen.add(hashlib.sha256(image.convert("RGB").tobytes()).hexdigest())
    assert len(seen) == len(load_sample(split))


def test_reading_it_writes_nothing(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = load_sample("test")
    assert rows[0]["image"].mode in ("P", "RGB")
    assert rows.cache_files == [] and list(tmp_path.iterdir()) == []


def test_unknown_split_and_design_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no split 'validation'; use one of train, test"):
        load_sample("validation")
    with pytest.raises(ValueError, match="no design 'apple'; use one of noto, twemoji"):
        load_sample("train", design="apple")


def test_files_are_small_and_carry_their_licences():
    assert sum(path.stat().st_size for path in SAMPLE_DIR.iterdir()) < 6.5e6
    notice = Path(SAMPLE_DIR / "NOTICE.md").read_text()
    assert "Apache License 2.0" in notice and "CC-BY 4.0" in notice
    assert "Apache License" in (SAMPLE_DIR / "LICENSE-NOTO.txt").read_text()


def test_right_answer_to_query_i_is_row_i_of_the_gallery():
    gallery, queries = load_retrieval_task()
    assert gallery["emoji"][:] == queries["emoji"][:] == sorted(set(queries["emoji"]))
    assert set(gallery["design"]) == {0} and set(queries["design"]) == {1}


def test_a_query_is_the_mirrored_middle_of_its_picture():
    gallery, queries = load_retrieval_task()
    picture = np.asarray(load_sample("test", design="twemoji")[7]["image"].convert("RGB"))
    query = np.asarray(queries[7]["image"].convert("RGB"))
    assert query.shape == (48, 48, 3)
    np.testing.assert_array_equal(query, picture[8:56, 8:56][:, ::-1])


def test_the_task_leaves_no_trace_and_is_the_same_each_time(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    first, second = (load_retrieval_task()[1] for _ in range(2))
    assert first.cache_files == [] and list(tmp_path.iterdir()) == []
    assert first.data.table.equals(second.data.table)
