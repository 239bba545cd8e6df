"""Embeddings of a whole source in one parquet file, written in parts so that an interruption costs one part.

Columns: `row` (number in the source), `features` (list of float32), `label` (where rows have labels).
Parts lie in `<file>.parts/` until the last one is there; then they become one file and are removed. A part or
the file appears under its name only when it is whole. Parts hold fixed ranges of rows and batches never cross
them, so a file made in several calls equals one made in a single call to the byte.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from hf_ssl.evaluation.features import FeatureExtractor
from hf_ssl.evaluation.images import ImageBatch, Source, read_batches, source_name
from hf_ssl.modeling.shared.distributed import rank, wait_for_all, world_size

logger = logging.getLogger(__name__)

METADATA_KEY = b"hf_ssl_embeddings"
SETTINGS_FILE = "settings.json"
SCHEMA = pa.schema([("row", pa.int64()), ("features", pa.list_(pa.float32())), ("label", pa.int64())])


def embed(
    encoder: nn.Module,
    processor: Any,
    source: Source,
    output: str | Path,
    pool: str = "mean",
    *,
    batch_size: int = 256,
    batches_per_part: int = 32,
    limit: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes the features of all images of `source` to the parquet file `output`.

    A second call with the same arguments continues after the last finished part, and does nothing if the file
    is there. Broken images have no row and are named in the log. In several processes (torchrun) each makes
    its part of the parts; the file is the same.

    Args:
        encoder: the frozen network.
        processor: its image processor.
        source: an `ImageSource`, or a list of rows.
        output: name of the file.
        pool: which features, see `pool_tokens`.
        batch_size: images a forward.
        batches_per_part: what an interruption can cost.
        limit: only so many rows, the first ones.
        device: where the forwards run.
        dtype: autocast type of the forwards.

    Returns:
        `output`.

    Raises:
        ValueError: what is there was made with another encoder, source or setting; there is no image; or
            several processes would share a source whose number of rows is not known.
    """
    output = Path(output)
    settings: dict[str, Any] = {
        "encoder": _fingerprint(encoder),
        "processor": processor.to_dict() if hasattr(processor, "to_dict") else repr(processor),
        "source": source_name(source),
        "pool": pool,
        "batch_size": batch_size,
        "batches_per_part": batches_per_part,
        "limit": limit,
        "dtype": str(dtype),
    }
    settings = json.loads(json.dumps(settings, default=str))
    if output.exists():
        metadata = pq.read_schema(output).metadata or {}
        _check_same(json.loads(metadata.get(METADATA_KEY, b"{}")), settings, output)
        return output
    parts_dir = output.with_name(output.name + ".parts")
    if rank() == 0:
        _open_parts(parts_dir, settings)
    wait_for_all()
    _check_same(json.loads((parts_dir / SETTINGS_FILE).read_text(encoding="utf-8")), settings, parts_dir)
    rows_per_part = batch_size * batches_per_part
    extractor = FeatureExtractor(encoder, [pool], device, dtype)
    read = partial(read_batches, source, processor, batch_size, spread=False)
    for number, part in _missing_parts(read, parts_dir, rows_per_part, limit, _num_rows(source)):
        table = _table(extractor, pool, part)
        _write_whole(parts_dir / f"{number:06d}.parquet", [table], SCHEMA)
        logger.info("embedded %d rows of %s", number * rows_per_part + len(table), settings["source"])
    wait_for_all()
    if rank() == 0:
        _join(parts_dir, output, settings)
    wait_for_all()
    return output


def _num_rows(source: Source) -> int | None:
    return len(source) if isinstance(source, Sequence) else getattr(source, "num_rows", None)


def _missing_parts(
    read: Callable[..., Iterator[ImageBatch]],
    parts_dir: Path,
    rows_per_part: int,
    limit: int | None,
    num_rows: int | None,
) -> Iterator[tuple[int, Iterable[ImageBatch]]]:
    """Numbers and images of the parts that this process has to make; without those that hold no image."""
    if world_size() == 1:
        start = _next_part(parts_dir) * rows_per_part
        batches = read(limit=None if limit is None else max(0, limit - start), start=start)
        yield from groupby(batches, key=lambda batch: batch.row_ids[0] // rows_per_part)
        return
    if num_rows is None:
        raise ValueError("several processes cannot share a stream of unknown length; use one process")
    num_rows = num_rows if limit is None else min(limit, num_rows)
    for number in range(rank(), -(-num_rows // rows_per_part), world_size()):
        if (parts_dir / f"{number:06d}.parquet").exists():
            continue
        start = number * rows_per_part
        batches = read(limit=min(rows_per_part, num_rows - start), start=start)
        first = next(batches, None)
        if first is not None:
            yield number, chain([first], batches)


def _fingerprint(encoder: nn.Module) -> str:
    """Changes with every weight."""
    digest = hashlib.sha256(type(encoder).__name__.encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        # Bytes, since numpy knows no bfloat16.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _open_parts(parts_dir: Path, settings: dict[str, Any]) -> None:
    settings_file = parts_dir / SETTINGS_FILE
    if settings_file.exists():
        _check_same(json.loads(settings_file.read_text(encoding="utf-8")), settings, parts_dir)
        return
    parts_dir.mkdir(parents=True, exist_ok=True)
    unfinished = settings_file.with_name(SETTINGS_FILE + ".tmp")
    unfinished.write_text(json.dumps(settings), encoding="utf-8")
    os.replace(unfinished, settings_file)


def _check_same(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ValueError(f"{path} was made with another {key}; choose another output or delete it")


def _parts(parts_dir: Path) -> list[Path]:
    return sorted(parts_dir.glob("*.parquet"))


def _next_part(parts_dir: Path) -> int:
    """After the parts that follow each other; several processes may have left gaps."""
    finished = {int(part.stem) for part in _parts(parts_dir)}
    return next(number for number in count() if number not in finished)


def _table(extractor: FeatureExtractor, pool: str, batches: Iterable[ImageBatch]) -> pa.Table:
    return pa.concat_tables([_batch_table(extractor(batch.pixel_values)[pool], batch) for batch in batches])


def _batch_table(features_BD: Tensor, batch: ImageBatch) -> pa.Table:
    num_rows, width = features_BD.shape
    offsets = pa.array(range(0, (num_rows + 1) * width, width), pa.int32())
    features = pa.ListArray.from_arrays(offsets, pa.array(features_BD.flatten().numpy()))
    labels = [None] * num_rows if batch.labels is None else batch.labels.tolist()
    columns = [pa.array(batch.row_ids, pa.int64()), features, pa.array(labels, pa.int64())]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _write_whole(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Writes under another name and renames; each table becomes one row group."""
    unfinished = path.with_name(path.name + ".tmp")
    with pq.ParquetWriter(unfinished, schema) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))
    os.replace(unfinished, path)


def _join(parts_dir: Path, output: Path, settings: dict[str, Any]) -> None:
    parts = _parts(parts_dir)
    if not parts:
        shutil.rmtree(parts_dir)
        raise ValueError(f"{settings['source']} has no readable image; there is nothing to embed")
    has_labels = any(_num_labels(part) for part in parts)
    names = SCHEMA.names if has_labels else ["row", "features"]
    schema = pa.schema([SCHEMA.field(name) for name in names])
    schema = schema.with_metadata({METADATA_KEY: json.dumps(settings)})
    _write_whole(output, (pq.read_table(part, columns=names) for part in parts), schema)
    shutil.rmtree(parts_dir)


def _num_labels(part: Path) -> int:
    labels = pq.read_table(part, columns=["label"]).column("label")
    return len(labels) - int(labels.null_count)
