"""Flat code: what it may be made of, and that it computes what the package computes, without the package."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ssl.hub import prepare_repository
from hf_ssl.hub.remote_code import flat_code, known_code_files, method_modules
from hf_ssl.modeling import METHODS
from tests.clean_process import run_python
from tests.modeling.tiny import BY_NAME, TINY_METHODS

ROWS = [*{row.method: row for row in reversed(TINY_METHODS)}.values(), BY_NAME["simclr-cnn"]]

LOAD_AND_RUN = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining
without_timm = json.loads(sys.argv[2])
results = {}
for name in json.loads(sys.argv[1]):
    sys.modules.pop("timm", None)
    if name in without_timm:
        sys.modules["timm"] = None
    options = {"subfolder": "pretraining", "trust_remote_code": True}
    config = AutoConfig.from_pretrained(name, **options)
    processor = AutoImageProcessor.from_pretrained(name, **options)
    model = AutoModelForPreTraining.from_pretrained(name, **options)
    assert type(config).__module__.startswith("transformers_modules"), type(config)
    assert processor.views and type(processor).__module__.startswith("transformers_modules")
    batch = load_file(f"{name}.safetensors")
    model.begin_step(0, 10, seed=3)
    model.prepare_step([batch])
    rows = torch.arange(len(batch[model.main_input_name]))
    results[name] = model(**batch, row_index=rows).loss.detach()
    encoder = AutoModel.from_pretrained(name, **options)
    published = model.published_branch().backbone.state_dict()
    assert all(torch.equal(value, published[key]) for key, value in encoder.backbone.state_dict().items())
    model.save_pretrained(f"{name}-again")
save_file(results, "results.safetensors")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write modules of a package `zoo` and return its flat code."""

    def make(start: str, **files: str) -> dict[str, str]:
        for name, source in files.items():
            path = tmp_path / "zoo" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.split(".")[0] == "zoo"]:
            monkeypatch.delitem(sys.modules, name)
        return flat_code([start], package="zoo")

    return make


def test_every_import_of_the_package_becomes_one_of_a_file_beside(package):
    files = package(
        "zoo.cat.model",
        cat__model="from zoo.shared.legs import (\n    four,\n)\nfrom .config import Config\nimport math\n",
        cat__config="def late():\n    from zoo.shared.fur import color\n    return color\n",
        shared__legs="from zoo.shared.fur import color  # used\nfour = 4\n",
        shared__fur="color = 'from zoo.shared.legs import four'\n",
        shared__unused="import nothing\n",
    )
    assert set(files) == {"model.py", "config.py", "legs.py", "fur.py"}
    assert "from .legs import (\n    four,\n)\nfrom .config import Config\nimport math\n" in files["model.py"]
    assert "    from .fur import color\n" in files["config.py"]
    assert "from .fur import color  # used\n" in files["legs.py"]
    assert "'from zoo.shared.legs import four'" in files["fur.py"]  # a text is no import


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import zoo.shared.legs\n", "line 1: 'import zoo.shared.legs' cannot be flattened"),
        ("x = 1\nfrom . import config\n", "line 2: 'from . import' cannot be flattened"),
        ("from zoo.shared import legs\n", "zoo.shared is a package"),
        ("from zoo.shared.tails import long\n", "there is no module zoo.shared.tails"),
        ("from zoo.shared.model import other\n", "would both become model.py"),
    ],
)
def test_what_cannot_be_flattened_is_refused(package, source, message):
    with pytest.raises(ValueError, match=message):
        package(
            "zoo.cat.model", cat__model=source, cat__config="", shared__legs="", shared__model="other = 1\n"
        )


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_code_of_a_method_is_complete_and_names_nothing_of_the_package(method):
    files = flat_code(method_modules(method))
    assert set(files) <= known_code_files()
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1 and not (node.module or "").startswith("hf_ssl"), (name, node.lineno)
                assert node.level == 0 or f"{node.module}.py" in files
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("hf_ssl") for alias in node.names), (name, node.lineno)
    others = {f"modeling_{name}.py" for name in METHODS} - {f"modeling_{method.name}.py"}
    assert not others & set(files)


def test_models_load_and_compute_the_same_loss_in_a_process_without_this_package(tmp_path: Path):
    expected = {}
    for row in ROWS:
        model = row.build().eval()
        processor = METHODS[row.method].processor_class.for_image_size(row.image_size)
        batch = {key: value.contiguous() for key, value in row.batch(4).items() if "local" not in key}
        save_file(batch, tmp_path / f"{row.name}.safetensors")
        prepare_repository(model, tmp_path / row.name, processor=processor)
        model.begin_step(0, 10, seed=3)
        model.prepare_step([batch])
        with torch.no_grad():
            expected[row.name] = float(model(**batch, row_index=torch.arange(4)).loss)
    needing_no_timm = [row.name for row in ROWS if row.has_vit]
    assert 0 < len(needing_no_timm) < len(ROWS)
    run_python(
        LOAD_AND_RUN,
        json.dumps([row.name for row in ROWS]),
        json.dumps(needing_no_timm),
        with_package=False,
        cwd=tmp_path,
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    results = load_file(tmp_path / "results.safetensors")
    assert {name: float(value) for name, value in results.items()} == expected
    for row in ROWS:  # a derivative keeps the code
        assert (tmp_path / f"{row.name}-again" / f"modeling_{row.method}.py").is_file()
