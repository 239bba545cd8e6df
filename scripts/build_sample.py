"""Rebuild the built-in sample, hf_ssl/data/sample/, from two npm packages of emoji pictures.

    npm pack emoji-datasource-google@16.0.0 && npm pack emoji-datasource-twitter@16.0.0
    python scripts/build_sample.py emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz

The packages are 74 and 62 MB; only `emoji.json` and `img/*/64/` are read. Result: two parquet files with one
row per picture (two rows per emoji, one in each design), emoji split at random into train and test, so that
no test emoji is in train in either design. Running it twice gives the same pictures in the same order.
"""

import argparse
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

OUTPUT_DIR = Path(__file__).resolve().parent.parent / "hf_ssl" / "data" / "sample"
DESIGNS = {"noto": "google", "twemoji": "twitter"}  # our name -> the package's
IMAGE_SIDE = 64
NUM_COLORS = 128  # no visible difference at 64 px; a full-colour PNG of both designs would be 16 MB
TEST_FRACTION = 0.25
SPLIT_SEED = 0


class EmojiPackage:
    """The emoji list and the pictures of one packed npm package."""

    def __init__(self, path: Path, design: str):
        self.prefix = f"package/img/{DESIGNS[design]}/{IMAGE_SIDE}/"
        self.files: dict[str, bytes] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name == "package/emoji.json" or member.name.startswith(self.prefix):
                    content = archive.extractfile(member)
                    if content is not None:
                        self.files[member.name] = content.read()

    def entries(self) -> list[dict[str, Any]]:
        """The emoji in the order of the Unicode charts."""
        entries: list[dict[str, Any]] = json.loads(self.files["package/emoji.json"])
        return sorted(entries, key=lambda entry: entry["sort_order"])

    def picture(self, file_name: str) -> Image.Image | None:
        """The picture laid over white, or None where this design has none."""
        content = self.files.get(self.prefix + file_name)
        if content is None:
            return None
        drawing = Image.open(io.BytesIO(content)).convert("RGBA")
        paper = Image.new("RGBA", drawing.size, "white")
        paper.alpha_composite(drawing)
        return paper.convert("RGB")


def encode(picture: Image.Image) -> bytes:
    """Smallest PNG of the picture with a palette of `NUM_COLORS`."""
    buffer = io.BytesIO()
    picture.quantize(NUM_COLORS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def collect(packages: dict[str, EmojiPackage]) -> list[dict[str, Any]]:
    """One entry per emoji that has a picture of its own in both designs.

    Some flags and families share one picture; kept, they would be wrong answers in retrieval that are right.
    """
    seen: set[tuple[str, bytes]] = set()
    emoji = []
    for entry in packages["noto"].entries():
        pictures = {design: package.picture(entry["image"]) for design, package in packages.items()}
        if any(picture is None for picture in pictures.values()):
            continue
        keys = {(design, picture.tobytes()) for design, picture in pictures.items() if picture is not None}
        if keys & seen:
            continue
        seen |= keys
        emoji.append({"entry": entry, "png": {design: encode(p) for design, p in pictures.items() if p}})
    return emoji


def write_splits(emoji: list[dict[str, Any]], output_dir: Path) -> None:
    """Write train.parquet and test.parquet with the `datasets` feature schema in their metadata."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    names = {
        key: sorted({item["entry"][key] for item in emoji})
        for key in ("short_name", "category", "subcategory")
    }
    features = Features(
        {
            "image": ImageFeature(),
            "text": Value("string"),
            "emoji": ClassLabel(names=names["short_name"]),
            "category": ClassLabel(names=names["category"]),
            "subcategory": ClassLabel(names=names["subcategory"]),
            "design": ClassLabel(names=list(DESIGNS)),
        }
    )
    order = random.Random(SPLIT_SEED).sample(range(len(emoji)), len(emoji))
    num_test = round(TEST_FRACTION * len(emoji))
    for split, indices in (("train", order[num_test:]), ("test", order[:num_test])):
        rows = [
            {
                "image": {"bytes": emoji[index]["png"][design], "path": None},
                "text": emoji[index]["entry"]["name"].lower(),
                "emoji": emoji[index]["entry"]["short_name"],
                "category": emoji[index]["entry"]["category"],
                "subcategory": emoji[index]["entry"]["subcategory"],
                "design": design,
            }
            for index in indices
            for design in DESIGNS
        ]
        random.Random(SPLIT_SEED).shuffle(rows)
        path = output_dir / f"{split}.parquet"
        Dataset.from_list(rows, features=features).to_parquet(path, batch_size=100)
        print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Read the two packages named on the command line and write the sample."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("google", type=Path, help="emoji-datasource-google-16.0.0.tgz")
    parser.add_argument("twitter", type=Path, help="emoji-datasource-twitter-16.0.0.tgz")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR)
    options = parser.parse_args()
    packages = {
        "noto": EmojiPackage(options.google, "noto"),
        "twemoji": EmojiPackage(options.twitter, "twemoji"),
    }
    write_splits(collect(packages), options.output_dir)


if __name__ == "__main__":
    main()
