"""The built-in sample: 1,876 emoji, each drawn in two designs, for demos and tests without a download.

The pictures are Noto Emoji (Apache-2.0) and Twemoji (CC-BY 4.0), 64 pixels square on white;
`sample/NOTICE.md` names authors, licences and changes. `scripts/build_sample.py` rebuilds the files.

The task it is made for: find the same emoji in the other design. The designs differ in shape, line and
colour, and the emoji of the test split are in the train split in neither design, so that a right answer is
recognised, not remembered.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

SAMPLE_DIR = Path(__file__).resolve().parent / "sample"
SPLITS = ("train", "test")
DESIGNS = ("noto", "twemoji")
RETRIEVAL_PARTS = ("gallery", "queries")
IMAGE_SIDE = 64
QUERY_CROP_SIDE = 0.75  # of the picture's side, in the middle; see `load_retrieval_task`


def load_sample(split: str = "train", design: str | None = None) -> datasets.Dataset:
    """Rows of the built-in sample, in memory: nothing is downloaded and nothing is written to a cache.

    Args:
        split: `"train"` (1,407 emoji) or `"test"` (469 others).
        design: `"noto"` or `"twemoji"` for the pictures of one design, in the same order of emoji for both;
            None for the pictures of both designs, shuffled (2,814 and 938 rows).

    Returns:
        Columns `image` (64 x 64 RGB), `text` (the lower-cased Unicode name), and the class labels `emoji`
        (1,876: which emoji it is), `category` (10), `subcategory` (99) and `design` (2).

    Raises:
        ValueError: `split` or `design` is none of the names above.
    """
    if split not in SPLITS:
        raise ValueError(f"the built-in sample has no split {split!r}; use one of {', '.join(SPLITS)}")
    if design is not None and design not in DESIGNS:
        raise ValueError(f"the built-in sample has no design {design!r}; use one of {', '.join(DESIGNS)}")
    import pyarrow.compute
    import pyarrow.parquet
    from datasets import Dataset, NamedSplit
    from datasets.table import InMemoryTable

    # Not `Dataset.from_parquet`: that converts the file into a copy in the user's cache first.
    table = pyarrow.parquet.read_table(SAMPLE_DIR / f"{split}.parquet")
    if design is not None:
        table = table.filter(pyarrow.compute.field("design") == DESIGNS.index(design)).sort_by("emoji")
    return Dataset(InMemoryTable(table), split=NamedSplit(split))


def load_retrieval_task() -> tuple[datasets.Dataset, datasets.Dataset]:
    """Gallery and queries of the demo's task: name the emoji from a mirrored close-up in the other design.

    The gallery is the test split in the Noto design, as it is. The queries are the same 469 emoji in the
    Twemoji design, each mirrored and cropped to its middle three quarters. The right answer to query i is
    row i of the gallery, and both carry the label `emoji`: the share of right nearest neighbours (k-NN with
    k = 1) is the score, 1 / 469 = 0.2 % by chance. Mirroring and cropping are among the changes that
    pre-training views teach an encoder to see through; pixels compared place by place do not.

    Returns:
        Gallery and queries, 469 rows each, with the columns of `load_sample`. Nothing is written to a cache.
    """
    import io

    import datasets
    from PIL import ImageOps

    gallery, queries = (load_sample("test", design=design) for design in DESIGNS)
    margin = round(IMAGE_SIDE * (1 - QUERY_CROP_SIDE) / 2)
    encoded = []
    for image in queries["image"]:
        close_up = ImageOps.mirror(ImageOps.crop(image, margin))
        buffer = io.BytesIO()
        close_up.save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    columns = {"image": encoded, **queries.remove_columns("image").to_dict()}
    altered = datasets.Dataset.from_dict(columns, features=queries.features, split=queries.split)
    return gallery, altered
