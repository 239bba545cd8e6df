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
    pool: Annotated[str, typer.Option(help="pooler, class_token, mean, grid2 or last4.")] = "mean",
    batch_size: Annotated[int, typer.Option("--batch_size")] = 256,
    limit: Annotated[int | None, typer.Option(help="At most so many images.")] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Forward in bfloat16, where the machine has it.")
    ] = False,
) -> None:
    """Write features of images; an interrupted call continues where it stopped.

    Under torchrun the processes share the images and write the same file.
    """
    import torch
    from accelerate import PartialState

    from hf_ssl.cli.loading import load_encoder
    from hf_ssl.cli.quiet import quiet_libraries
    from hf_ssl.data import open_images
    from hf_ssl.evaluation.embeddings import embed as write_embeddings
    from hf_ssl.training.pulling import pulled

    quiet_libraries()
    source = open_images(dataset, split=split, config_name=config_name, image_column=image_column)
    encoder, processor = pulled(model, lambda: load_encoder(model))
    state = PartialState(cpu=not torch.accelerator.is_available())
    path = write_embeddings(
        encoder,
        processor,
        source,
        output,
        pool,
        batch_size=batch_size,
        limit=limit,
        device=state.device,
        dtype=torch.bfloat16 if bf16 else None,
    )
    if state.is_main_process:
        typer.echo(f"features  {path}")
    state.destroy_process_group()
