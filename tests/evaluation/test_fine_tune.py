import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor, ViTModel

from hf_ssl.evaluation.fine_tune import LabelledImages, accuracy_metrics, fine_tune, layer_groups
from hf_ssl.hub import export_encoder
from tests.evaluation.tiny import tiny_vit
from tests.modeling.tiny import BY_NAME


def colored(num_rows, seed=0):
    """Red or blue noise."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        pixels = generator.integers(0, 100, (8, 8, 3), dtype=np.uint8)
        pixels[..., 2 * (i % 2)] += 150
        rows.append({"image": Image.fromarray(pixels), "label": i % 2})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A landed encoder, as an export leaves it."""
    path = tmp_path_factory.mktemp("encoder")
    tiny_vit(image_size=8).save_pretrained(path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(path)
    return path


def test_native_folder_learns_an_easy_task_and_is_saved(folder, tmp_path):
    class Source:
        label_names = ["red", "blue"]

        def rows(self, limit=None, start=0):
            yield from colored(64)[start:limit]

    result = fine_tune(
        folder, Source(), colored(32, seed=1), tmp_path / "tuned", epochs=6, batch_size=16,
        learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert result.top1 == 1 and result.top5 == 1
    model = AutoModelForImageClassification.from_pretrained(result.folder)
    assert model.config.id2label == {0: "red", 1: "blue"}
    test = LabelledImages(colored(32, seed=1), ViTImageProcessor.from_pretrained(result.folder))
    images = torch.stack([test[i]["pixel_values"] for i in range(32)])
    assert (model(images).logits.argmax(dim=1) == test.labels).all()


def test_fine_tuning_starts_from_the_encoders_weights(folder):
    encoder = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=2)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, classifier.vit.state_dict()[name]), name


def test_rates_fall_by_layer_from_the_classifier_to_the_embeddings(folder):
    classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=2)
    depth, names = classifier.config.num_hidden_layers, {id(p): n for n, p in classifier.named_parameters()}
    rates = {}
    for group in layer_groups(classifier, 0.5, 1.0, 0.1):
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["lr"]
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0)
    assert rates.keys() == set(names.values())
    assert rates["classifier.weight"] == rates["vit.layernorm.weight"] == 1
    assert rates["vit.embeddings.cls_token"] == 0.5 ** (depth + 1)
    for layer in range(depth):
        (rate,) = {value for name, value in rates.items() if f".layers.{layer}." in name}
        assert rate == 0.5 ** (depth - layer)


def test_fine_tuning_with_rates_by_layer_learns_too(folder, tmp_path):
    result = fine_tune(
        folder, colored(64), colored(32, seed=1), tmp_path / "tuned", epochs=6, batch_size=16,
        learning_rate=2e-2, layer_decay=0.75, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert result.top1 > 0.9


def test_a_beit_is_fine_tuned_on_the_mean_of_its_patches(tmp_path):
    row = BY_NAME["beit"]
    export_encoder(row.build(), tmp_path / "encoder")
    result = fine_tune(
        tmp_path / "encoder", colored(8), colored(4), tmp_path / "tuned", epochs=1, use_cpu=True
    )
    model = AutoModelForImageClassification.from_pretrained(result.folder)
    assert model.config.use_mean_pooling and model.beit.pooler.layernorm is not None


def test_metrics_of_a_trainer_are_shares_of_right_answers():
    class Prediction:
        predictions = np.eye(7, dtype=np.float32)[[0, 1, 2, 3]]
        label_ids = np.array([0, 1, 2, 6])

    assert accuracy_metrics(Prediction) == {"top1": 0.75, "top5": 0.75}


def test_augmentation_changes_training_images_only(folder):
    processor = ViTImageProcessor.from_pretrained(folder)
    torch.manual_seed(0)
    augmented = LabelledImages(colored(1), processor, augment=True)
    plain = LabelledImages(colored(1), processor)
    assert not torch.equal(augmented[0]["pixel_values"], augmented[0]["pixel_values"])
    assert torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "train source has no readable image"),
        ([{"image": colored(1)[0]["image"]}], "train labels are missing"),
        (colored(1) * 3, "class 0 only"),
    ],
)
def test_unusable_input_is_refused_in_one_line(folder, tmp_path, train, message):
    with pytest.raises(ValueError, match=message) as caught:
        fine_tune(folder, train, colored(2), tmp_path)
    assert "\n" not in str(caught.value)
