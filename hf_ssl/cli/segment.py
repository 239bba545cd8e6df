"""`hf-ssl segment`: what single patches of an encoder know."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def segment(
    model: Annotated[str, typer.Argument(help="A run, an encoder folder or a Hub name.")],
    dataset: Annotated[str, typer.Option(help="Hub name or folder of parquet files.")],
    num_classes: Annotated[int, typer.Option("--num_classes", help="Without the ignored class at the end.")],
    ignore_index: Annotated[
        int | None, typer.Option("--ignore_index", help="Class of pixels that do not count.")
    ] = None,
    splits: Annotated[
        list[str] | None,
        typer.Option(help="Splits to learn from and to score: give it twice; train and test."),
    ] = None,
    config_name: Annotated[
        str | None, typer.Option("--config_name", help="Configuration of a Hub dataset.")
    ] = None,
    image_column: Annotated[str, typer.Option("--image_column")] = "image",
    annotation_column: Annotated[
        str, typer.Option("--annotation_column", help="Pictures that hold the class of every pixel.")
    ] = "annotation",
    size: Annotated[
        tuple[int, int] | None, typer.Option(help="Height and width; else those of the first image.")
    ] = None,
    num_patches: Annotated[int, typer.Option("--num_patches", help="Training patches.")] = 20_000,
    output: Annotated[str | None, typer.Option(help="Write the scores to this JSON file.")] = None,
) -> None:
    """Score frozen patches by linear and nearest-patch segmentation, beside pixels and random weights."""
    from hf_ssl.cli.loading import load_encoder
    from hf_ssl.cli.quiet import quiet_libraries
    from hf_ssl.data.annotated import open_annotated
    from hf_ssl.evaluation.dense import evaluate_segmentation
    from hf_ssl.training.pulling import pulled

    quiet_libraries()
    names = splits or ["train", "test"]
    if len(names) != 2:
        raise ValueError(f"got {len(names)} splits; give --splits twice, to learn from and to score")
    encoder, processor = pulled(model, lambda: load_encoder(model))
    columns = {"image_column": image_column, "annotation_column": annotation_column}
    train, test = (open_annotated(dataset, split, config_name=config_name, **columns) for split in names)
    scores = evaluate_segmentation(
        encoder,
        processor,
        train,
        test,
        num_classes,
        ignore_index=ignore_index,
        size=size,
        num_patches=num_patches,
    )
    typer.echo(f"{'features':<12} {'linear mIoU':>11} {'kNN mIoU':>9}")
    for score in scores:
        typer.echo(f"{score.features:<12} {score.linear_miou:>10.1%} {score.knn_miou:>9.1%}")
    if output is not None:
        Path(output).write_text(json.dumps([asdict(score) for score in scores], indent=1), encoding="utf-8")
        typer.echo(f"scores    {output}")
