"""`hf-ssl evaluate`: kNN, linear and attentive probes, fine-tuning, beside what an encoder must beat."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="A run, an encoder folder or a Hub name.")],
    dataset: Annotated[
        str | None, typer.Option(help="Labelled images; without it, the run's own probe data.")
    ] = None,
    splits: Annotated[list[str] | None, typer.Option(help="Train and test split: give it twice.")] = None,
    config_name: Annotated[
        str | None, typer.Option("--config_name", help="Configuration of a Hub dataset.")
    ] = None,
    image_column: Annotated[str | None, typer.Option("--image_column")] = None,
    label_column: Annotated[str | None, typer.Option("--label_column")] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(help="pooler, class_token, mean, grid2 or last4; may be given again."),
    ] = None,
    probe: Annotated[str | None, typer.Option(help="lbfgs, sgd or none; else as the run.")] = None,
    num_neighbors: Annotated[
        int | None, typer.Option("--num_neighbors", help="Of the kNN; 20, or as the run has it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many images of each split.")] = None,
    fine_tune: Annotated[
        float | None, typer.Option("--fine_tune", help="Also fine-tune for so many epochs.")
    ] = None,
    attentive: Annotated[
        int | None, typer.Option(help="Also fit an attentive probe on the patches, for so many epochs.")
    ] = None,
    retrieval: Annotated[
        str | None, typer.Option(help="Images with captions: find each by the other (CLIP, SigLIP).")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option("--text_column", help="Column of captions of --retrieval.")
    ] = None,
    zero_shot: Annotated[
        str | None, typer.Option("--zero_shot", help="Labelled images to classify by their classes' names.")
    ] = None,
    templates: Annotated[
        str, typer.Option(help="Prompts of --zero_shot: simple, best7, imagenet80, or one with {}.")
    ] = "simple",
    output: Annotated[str | None, typer.Option(help="Write the scores to this JSON file.")] = None,
) -> None:
    """Score an encoder by kNN and linear probe, beside raw pixels and random weights."""
    from hf_ssl.cli.loading import load_encoder, run_recipe
    from hf_ssl.cli.quiet import quiet_libraries
    from hf_ssl.evaluation.protocol import evaluate_encoder
    from hf_ssl.training.probe_data import probe_sources
    from hf_ssl.training.pulling import pulled
    from hf_ssl.training.recipes import DataArguments

    quiet_libraries()
    if retrieval is not None or zero_shot is not None:
        if dataset is not None or pool or probe or fine_tune is not None or attentive is not None:
            raise ValueError("--retrieval and --zero_shot fit no probe; leave --dataset and probes out")
        columns = {"config_name": config_name, "image_column": image_column}
        named = {"text_column": text_column, "label_column": label_column}
        result = _with_texts(model, retrieval, zero_shot, splits, columns | named, templates, limit)
        _write(output, result)
        return
    if text_column is not None:
        raise ValueError("text_column belongs to --retrieval; name its data, or leave it out")
    encoder, processor = pulled(model, lambda: load_encoder(model))
    if dataset is None:
        if splits or config_name or image_column or label_column:
            raise ValueError(
                "splits, config_name and columns belong to a --dataset; name it, or leave them out"
            )
        data = run_recipe(model).data
    else:
        data = DataArguments(
            dataset=dataset,
            probe_dataset=dataset,
            probe_splits=splits,
            config_name=config_name,
            image_column=image_column,
            probe_label_column=label_column,
        )
    pair = probe_sources(data)
    if pair is None:
        raise ValueError(
            "these images have no labels; name a column with --label_column or give other images"
        )
    scores = evaluate_encoder(
        encoder,
        processor,
        *pair,
        pools=pool or data.probe_pools,
        num_neighbors=data.probe_num_neighbors if num_neighbors is None else num_neighbors,
        probe=probe or ("lbfgs" if data.probe_linear else "none"),
        train_limit=limit,
        test_limit=limit,
    )
    typer.echo(scores.table())
    result = scores.to_dict()
    if attentive is not None:
        result["attentive_top1"] = _attentive(encoder, processor, pair, attentive, limit)
    if fine_tune is not None:
        result["fine_tune_top1"] = _fine_tune(model, processor, pair, fine_tune, limit)
    _write(output, result)


def _write(output: str | None, result: dict[str, Any]) -> None:
    if output is not None:
        Path(output).write_text(json.dumps(result, indent=1), encoding="utf-8")
        typer.echo(f"scores    {output}")


def _with_texts(
    model: str,
    retrieval: str | None,
    zero_shot: str | None,
    splits: list[str] | None,
    columns: dict[str, str | None],
    templates: str,
    limit: int | None,
) -> dict[str, Any]:
    """Scores of a model of images and texts; of the test split where no other is named."""
    from hf_ssl.cli.loading import load_image_text
    from hf_ssl.data.sources import DataError, open_images
    from hf_ssl.evaluation.retrieval import evaluate_retrieval
    from hf_ssl.evaluation.zero_shot import TEMPLATES, evaluate_zero_shot
    from hf_ssl.training.pulling import pulled

    if splits is not None and len(splits) != 1:
        raise ValueError(f"--retrieval and --zero_shot score one split, got {', '.join(splits)}")

    def opened(name: str, **named: str | None) -> Any:
        options = {key: columns[key] for key in ("config_name", "image_column")} | named
        try:
            return open_images(name, split=splits[0] if splits else "test", **options)  # type: ignore
        except DataError as error:
            hint = "" if splits else "; name its split with --splits"
            raise DataError(f"{error}{hint}") from error

    encoder = pulled(model, lambda: load_image_text(model))
    result: dict[str, Any] = {}
    if retrieval is not None:
        source = opened(retrieval, text_column=columns["text_column"] or "")
        found = evaluate_retrieval(encoder, source, limit)
        typer.echo(found.table())
        result["retrieval"] = found.to_dict()
    if zero_shot is not None:
        prompts = TEMPLATES.get(templates, (templates,))
        source = opened(zero_shot, label_column=columns["label_column"])
        scores = evaluate_zero_shot(encoder, source, prompts, limit=limit)
        typer.echo(scores.table())
        result["zero_shot"] = scores.to_dict()
    return result


def _attentive(
    encoder: Any, processor: Any, pair: tuple[Any, Any], epochs: int, limit: int | None
) -> dict[str, float]:
    """Accuracies by kind of features."""
    from hf_ssl.evaluation.attentive import evaluate_attentive

    scores = evaluate_attentive(encoder, processor, *pair, epochs=epochs, train_limit=limit, test_limit=limit)
    found = {score.features: score.top1 for score in scores}
    shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in found.items())
    typer.echo(f"attentive probe, {epochs} epochs: {shown}")
    return found


def _fine_tune(
    model: str, processor: Any, pair: tuple[object, object], epochs: float, limit: int | None
) -> float:
    """Fine-tune the native encoder (a run's is in `encoder/`)."""
    import tempfile

    from hf_ssl.data.clips import frames_of
    from hf_ssl.evaluation.fine_tune import fine_tune

    if frames_of(processor) is not None:
        raise ValueError("--fine_tune is for encoders of images; clips have probes alone, leave it out")
    native = Path(model) / "encoder"
    with tempfile.TemporaryDirectory() as folder:
        outcome = fine_tune(
            native if native.is_dir() else model,
            *pair,
            folder,
            epochs=epochs,
            train_limit=limit,
            test_limit=limit,
        )
    typer.echo(f"fine-tuned {epochs:g} epochs: {100 * outcome.top1:.1f} %")
    return float(outcome.top1)
