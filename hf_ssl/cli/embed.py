"""`hf-ssl embed`: features of all images to one parquet file."""

from typing import Annotated

import typer


def embed(
    model: Annotated[str, typer.Argument(help="A run, an encoder folder or a Hub name.")],
    dataset: Annotated[
        str, typer.Option(help="Hub name, folder of images, parquet or tar files, or sample.")
    ],
    output: Annotated[str, typer.Option(help="The parquet file.")],
    split: Annotated[str | None, typer.Option(help="Split of the dataset.")] = None,
    config_name: Annotated[
        str | None, typer.Option("--config_name", help="Configuration of a Hub dataset.")
    ] = None,
    image_column: Annotated[str | None, typer.Option("--image_column")] = None,
    pool: Annotated[str, typer.Option(help="pooler, class_token, mean or grid2.")] = "mean",
    batch_size: Annotated[int, typer.Option("--batch_size")] = 256,
    limit: Annotated[int | None, typer.Option(help="At most so many images.")] = None,
) -> None:
    """Write features of images; an interrupted call continues where it stopped."""
    from hf_ssl.cli.loading import load_encoder
    from hf_ssl.cli.quiet import quiet_libraries
    from hf_ssl.data import open_images
    from hf_ssl.evaluation.embeddings import embed as write_embeddings
    from hf_ssl.training.pulling import pulled

    quiet_libraries()
    source = open_images(dataset, split=split, config_name=config_name, image_column=image_column)
    encoder, processor = pulled(model, lambda: load_encoder(model))
    path = write_embeddings(encoder, processor, source, output, pool, batch_size=batch_size, limit=limit)
    typer.echo(f"features  {path}")
