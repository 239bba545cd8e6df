"""`hf-ssl train`: pre-train an encoder from a recipe."""

from typing import Annotated, Any

import typer


def train(
    context: typer.Context,
    method: Annotated[
        str | None, typer.Argument(help="A method; alone it runs its tiny recipe on emoji.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Name or file of a recipe.")] = None,
    output_dir: Annotated[str | None, typer.Option("--output_dir", help="Folder of the run.")] = None,
    resume: Annotated[str | None, typer.Option(help="Continue this run, or one of its checkpoints.")] = None,
    init_from: Annotated[
        str | None,
        typer.Option("--init_from", help="Start from this folder, owner/name[@revision] or timm model."),
    ] = None,
    allow_new_heads: Annotated[
        bool,
        typer.Option("--allow_new_heads", help="Start afresh what --init_from lacks beside the encoder."),
    ] = False,
    distill_from: Annotated[
        str | None,
        typer.Option("--distill_from", help="Frozen teacher of a smaller DINOv2, or of a tokenizer."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A trained beit_tokenizer, whose tokens beit predicts.")
    ] = None,
) -> None:
    """Pre-train an encoder; any key of the recipe can follow as --key value (see `hf-ssl methods NAME`)."""
    from hf_ssl.cli.keys import parse_keys
    from hf_ssl.cli.quiet import quiet_libraries
    from hf_ssl.training.publishing import BOTH_TOWERS
    from hf_ssl.training.run import train as run_training

    quiet_libraries()
    arguments = list(context.args)
    if method is not None and method.startswith("--"):
        # Where no method is named, click takes the first free key for it.
        arguments, method = [method, *arguments], None
    keys: dict[str, Any] = dict(parse_keys(arguments))
    if method is not None and "method" in keys:
        raise ValueError(f"the method is given twice: {method} and --method {keys['method']}")
    method = keys.pop("method", method)
    run = run_training(
        method,
        recipe=recipe,
        output_dir=output_dir,
        resume=resume,
        init_from=init_from,
        allow_new_heads=allow_new_heads,
        distill_from=distill_from,
        tokenizer=tokenizer,
        **keys,
    )
    _leave_processes()
    if not run.trainer.is_world_process_zero():
        return
    if run.scores is not None:
        typer.echo(f"\n{run.scores.table()}\n\n{run.verdict()}")
    both_towers = run.folder / BOTH_TOWERS
    typer.echo(
        f"\nrun       {run.folder}\n"
        f"encoder   {run.folder / 'encoder'}  ({run.native_class}, loads without hf_ssl)\n"
        + (f"dual      {both_towers}  (images and texts)\n" if both_towers.is_dir() else "")
        + (f"published {run.url}\n" if run.url else "")
        + f"next      hf-ssl show {run.folder}\n"
        f"          hf-ssl evaluate {run.folder} --dataset NAME_OR_FOLDER\n"
        f'          python -c "from transformers import AutoModel; '
        f"AutoModel.from_pretrained('{run.folder / 'encoder'}')\""
    )


def _leave_processes() -> None:
    """Without it an abort at exit can hide that all went well."""
    import torch

    from hf_ssl.modeling.shared.distributed import wait_for_all

    wait_for_all()  # one that left while the first still exports was now and then aborted
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
