"""The online probe: floors once, scores beside them, the encoder left as it was."""

from typing import Any

import pytest
import torch

from hf_ssl.modeling import METHODS
from hf_ssl.training.probes import OnlineProbe
from tests.modeling.tiny import BY_NAME
from tests.training.conftest import random_image


def labelled(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"image": random_image(first + index), "label": index % 2} for index in range(count)]


def make_probe(**options: Any) -> OnlineProbe:
    processor = METHODS["moco"].processor_class.for_image_size(16)
    return OnlineProbe(labelled(12), labelled(6, first=50), processor, num_neighbors=1, **options)


@pytest.mark.parametrize(("linear", "names"), [(True, {"knn", "linear"}), (False, {"knn"})])
def test_scores_and_floors_have_the_same_names(linear: bool, names: set[str]):
    probe, model = make_probe(linear=linear), BY_NAME["moco-v2-splits"].build()
    probe.measure_floors(model)
    assert set(probe(model)) == names
    assert set(probe.named_floors()) == {
        f"{floor}_{name}" for floor in ("pixels", "random_init") for name in names
    }
    assert probe.scores is not None
    assert [row.features for row in probe.scores.rows] == ["pixels", "pixels", "random init", "encoder"]


def test_queries_from_the_bank_are_found_with_one_neighbour():
    processor = METHODS["moco"].processor_class.for_image_size(16)
    rows = labelled(8)
    probe = OnlineProbe(rows, rows, processor, num_neighbors=1, linear=False)
    model = BY_NAME["moco-v2"].build()
    probe.measure_floors(model)
    assert probe(model) == {"knn": 1.0}
    assert probe.named_floors() == {"pixels_knn": 1.0, "random_init_knn": 1.0}


def test_model_is_left_in_its_modes_with_its_statistics():
    probe, model = make_probe(), BY_NAME["moco-v2-splits"].build()
    model.teacher.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    probe.measure_floors(model)
    probe(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_restored_floors_are_the_measured_ones():
    probe, model = make_probe(), BY_NAME["moco-v2"].build()
    stored = probe.measure_floors(model).to_dict()
    other = make_probe()
    other.restore_floors(BY_NAME["moco-v2"].build(seed=1), stored)
    assert other.named_floors() == probe.named_floors()
    assert other.floors == probe.floors
