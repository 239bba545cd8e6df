"""Cards say what the files of a run say, in the Hub's own form, and nothing that belongs to one machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from hf_ssl.hub import prepare_repository, publish
from hf_ssl.hub.cards import UNKNOWN_LICENCE, build_card, citation, describe_data, public_recipe, read_run
from hf_ssl.hub.landing import ExportReport
from hf_ssl.modeling import METHODS
from hf_ssl.training.recipes import load_recipe
from hf_ssl.training.run import Run
from tests.hub_server import HubServer


def report_of(run: Path) -> ExportReport:
    return ExportReport(**json.loads((run / "encoder" / "export.json").read_text()))


def card_of(run: Path, tmp_path: Path, repo_id: str | None = "tester/cnn", **changes: Any) -> ModelCard:
    """The card as the Hub's own class reads it back, after changes of the recipe."""
    record = read_run(run)
    for section, values in changes.items():
        record.recipe[section] = {**record.recipe[section], **values} if isinstance(values, dict) else values
    build_card(record, report_of(run), repo_id).save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_scores_of_the_encoder_come_back_from_the_model_index(moco_run: Run, tmp_path: Path):
    card = card_of(moco_run.folder, tmp_path)
    assert moco_run.scores is not None
    (encoder,) = (row for row in moco_run.scores.rows if row.features == "encoder")
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {
        "kNN, plain, features mean": round(encoder.knn, 4),
        "kNN, centred, features mean": round(encoder.knn_centered, 4),
        "kNN, standardised, features mean": round(encoder.knn_standardized, 4),
        "linear probe, features mean": round(encoder.linear, 4),
    }
    first = card.data.eval_results[0]
    assert (first.dataset_type, first.dataset_name, first.metric_type) == ("local", "pets", "accuracy")
    assert card.data.model_name == "cnn"


def test_the_table_has_the_floors_beside_the_encoder(moco_run: Run, tmp_path: Path):
    text = card_of(moco_run.folder, tmp_path).text
    assert moco_run.scores is not None
    for row in moco_run.scores.rows:
        cells = [f"{100 * value:.1f}" for value in (row.knn, row.knn_centered, row.knn_standardized)]
        assert f"| {row.features} | {row.pool} | {row.width} | {' | '.join(cells)} | " in text
    assert "4 images of pets are named by 16 labelled images of pets" in text
    assert "differences under 67.1 points can be chance" in text  # 0.03 * sqrt(2000 / 4)


def test_a_run_without_labels_claims_no_result(mae_run: Run, tmp_path: Path):
    card = card_of(mae_run.folder, tmp_path)
    assert card.data.eval_results is None and "model-index" not in card.content
    assert "Not measured: there were no labelled images" in card.text


def test_head_of_the_card_says_what_is_known_and_no_more(moco_run: Run, mae_run: Run, tmp_path: Path):
    data = card_of(moco_run.folder, tmp_path).data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-feature-extraction"
    assert {"self-supervised-learning", "moco", "custom_code", "timm"} <= set(data.tags)
    assert data.license is None and data.datasets is None and data.base_model is None
    assert "timm" not in card_of(mae_run.folder, tmp_path).data.tags
    started = card_of(moco_run.folder, tmp_path, init_from="someone/moco@abc123")
    assert started.data.base_model == "someone/moco"
    assert (
        "[someone/moco](https://huggingface.co/someone/moco) at `abc123`, whose licence applies too"
        in started.text
    )
    with_licence = build_card(read_run(moco_run.folder), report_of(moco_run.folder), "tester/cnn", "mit")
    assert with_licence.data.license == "mit" and "This model: mit." in with_licence.text


def test_card_says_how_to_load_every_part_and_how_to_train_it_again(moco_run: Run, tmp_path: Path):
    text = card_of(moco_run.folder, tmp_path).text
    for line in (
        'AutoModel.from_pretrained("tester/cnn")',
        'timm.create_model("hf-hub:tester/cnn", pretrained=True)',
        '"tester/cnn", subfolder="pretraining", trust_remote_code=True',
        "hf-ssl train moco --init_from tester/cnn",
        "hf download tester/cnn pretraining/recipe.yaml --local-dir .\n"
        "hf-ssl train --recipe pretraining/recipe.yaml\n",
        "3 steps of 4 images",
        "timm resnet18 at 16 px, 3x3 stem of stride 2",
        "![Loss, learning rate and scores over the steps](figures/curves.png)",
        "transformers 5.",
        "by repeating pixels",  # a note of the export
    ):
        assert line in text, line


def test_a_finished_run_holds_its_card_for_its_own_folder(moco_run: Run):
    card = ModelCard.load(moco_run.folder / "README.md")
    assert 'AutoModel.from_pretrained("encoder")' in card.text and "subfolder" not in card.text
    assert (moco_run.folder / "figures" / "curves.png").is_file()
    assert card.data.model_name == "moco_tiny" and len(card.data.eval_results) == 4


def test_data_are_named_with_their_licence_where_it_can_be_known(hub: HubServer, moco_run: Run):
    record = read_run(moco_run.folder)

    def lines(*names: str) -> list[str]:
        record.recipe["data"] = {"dataset": list(names)}
        return describe_data(record)

    hub.commit("datasets", "lab/licensed", {"README.md": "---\nlicense: cc-by-4.0\n---\n"})
    hub.commit("datasets", "lab/silent", {"README.md": "# data\n"})
    hub.commit("datasets", "lab/bare", {"data.txt": "x"})
    (sample,) = lines("sample")
    assert "Noto Emoji (Apache-2.0)" in sample and "Twemoji (CC-BY 4.0)" in sample
    assert lines("lab/licensed") == [
        "[lab/licensed](https://huggingface.co/datasets/lab/licensed), licence cc-by-4.0"
    ]
    for name in ("lab/silent", "lab/bare", "lab/absent"):
        assert lines(name)[0].endswith(f"licence {UNKNOWN_LICENCE}"), name
    assert lines("/home/me/photos/", "./scans") == [
        "images in a local folder or file, `photos`; licence not stated",
        "images in a local folder or file, `scans`; licence not stated",
    ]


def test_hub_datasets_stand_in_the_head(hub: HubServer, moco_run: Run, tmp_path: Path):
    card = card_of(
        moco_run.folder,
        tmp_path,
        data={"dataset": ["lab/cats", "sample", "/data/x"], "probe_dataset": "lab/cats"},
    )
    assert card.data.datasets == ["lab/cats"]
    assert card.data.eval_results[0].dataset_type == "lab/cats"


def test_nothing_of_the_machine_or_the_account_is_published(
    moco_run: Run, image_classes: Path, tmp_path: Path
):
    recipe = {
        **yaml.safe_load((moco_run.folder / "recipe.yaml").read_text()),
        "init_from": "/home/me/runs/first",
        "distill_from": "/home/me/runs/large",
        "training": {
            "max_steps": 3,
            "hub_token": "hf_secret",
            "hub_model_id": "me/x",
            "push_to_hub": True,
            "report_to": "wandb",
        },
    }
    published = yaml.safe_load(public_recipe(recipe))
    assert published["training"] == {"max_steps": 3}
    assert published["data"]["dataset"] == "./pets" and published["init_from"] == "./first"
    assert published["distill_from"] == "./large"
    prepare_repository(moco_run.folder, tmp_path / "repository", "tester/cnn")
    for path in (tmp_path / "repository").rglob("*"):
        if path.is_file():
            for private in (image_classes.parent, moco_run.folder.parent, tmp_path):
                assert str(private).encode() not in path.read_bytes(), path
    assert load_recipe(str(tmp_path / "repository" / "pretraining" / "recipe.yaml")).method == "moco"


def test_pictures_of_the_run_are_on_the_card_in_a_fixed_order(moco_run: Run, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(moco_run.folder, run)
    for name in ("views", "neighbors", "other"):
        shutil.copy(run / "figures" / "curves.png", run / "figures" / f"{name}.png")
    text = card_of(run, tmp_path).text
    places = [text.index(f"(figures/{name}.png)") for name in ("curves", "views", "neighbors", "other")]
    assert places == sorted(places)
    prepare_repository(run, tmp_path / "repository", "tester/cnn")
    assert len(list((tmp_path / "repository" / "figures").iterdir())) == 4


def test_the_hub_accepts_the_card(hub: HubServer, moco_run: Run):
    publish(moco_run.folder, "tester/cnn", license="apache-2.0")
    assert hub.asked("POST /api/validate-yaml")[0].status == 200
    card = ModelCard.load("tester/cnn")
    assert card.data.license == "apache-2.0" and len(card.data.eval_results) == 4
    assert HfApi().model_info("tester/cnn").sha


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_has_a_citation(method):
    text = citation(method)
    assert method.title and method.authors and f"eprint = {{{method.paper}}}" in text
    assert text.count("{") == text.count("}") and f"year = {{20{method.paper[:2]}}}" in text
