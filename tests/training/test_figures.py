"""Pictures of a run: those that suit its method. (All of MAE's are drawn in tests/cli.)"""

from pathlib import Path

import pytest

from hf_ssl.training.figures import draw_run
from hf_ssl.training.recipes import RecipeError
from hf_ssl.training.run import train
from tests.training.test_run import TINY


def test_a_contrastive_cnn_without_labels_has_no_reconstructions(image_folder: Path, tmp_path: Path):
    options = {
        name: value
        for name, value in TINY.items()
        if not name.startswith(("decoder", "hidden", "patch", "num_")) and name != "image_size"
    }
    run = train(
        "simclr",
        output_dir=str(tmp_path / "run"),
        dataset=str(image_folder),
        model_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
        image_size=16,
        **options,
    )
    paths = draw_run(str(run.folder))
    assert {path.name for path in paths} == {"views.png", "neighbors.png", "curves.png"}
    for other in ({"images": str(image_folder)}, {"size": 32}):
        with pytest.raises(RecipeError, match="which a CNN has none of"):
            draw_run(str(run.folder), **other)
    assert all(path.parent == run.folder / "figures" and path.stat().st_size > 1000 for path in paths)


@pytest.mark.parametrize("distils", [False, True])
def test_tokenizers_show_pixels_where_codes_give_pixels(image_folder: Path, tmp_path: Path, distils: bool):
    options = {name: value for name, value in TINY.items() if not name.startswith("decoder")}
    options |= {"num_codes": 16, "code_size": 4}
    if distils:
        mae = train("mae", output_dir=str(tmp_path / "mae"), dataset=str(image_folder), **TINY)
        options["distill_from"] = str(mae.folder)
    run = train("beit_tokenizer", output_dir=str(tmp_path / "run"), dataset=str(image_folder), **options)
    names = {path.stem for path in draw_run(str(run.folder))}
    expected = {"patch_features", "attention", "views", "neighbors", "curves"}
    assert names == (expected if distils else expected | {"reconstructions"})


def test_beit_shows_tokens(image_folder: Path, tmp_path: Path):
    options = {name: value for name, value in TINY.items() if not name.startswith("decoder")}
    codes = {"num_codes": 16, "code_size": 4}
    data = {"dataset": str(image_folder)}
    tokenizer = train("beit_tokenizer", output_dir=str(tmp_path / "tokens"), **data, **options, **codes)
    run = train("beit", output_dir=str(tmp_path / "run"), tokenizer=str(tokenizer.folder), **data, **options)
    names = {path.stem for path in draw_run(str(run.folder))}
    assert names == {"tokens", "patch_features", "attention", "views", "neighbors", "curves"}


def test_ijepa_shows_its_predictions(image_folder: Path, tmp_path: Path):
    options = {name: value for name, value in TINY.items() if not name.startswith("decoder")}
    run = train("ijepa", output_dir=str(tmp_path / "run"), dataset=str(image_folder), **options)
    names = {path.stem for path in draw_run(str(run.folder))}
    assert names == {"agreement", "patch_features", "views", "neighbors", "curves"}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="is no run"):
        draw_run(str(tmp_path))
    assert not list(tmp_path.iterdir())
