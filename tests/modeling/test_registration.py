"""`import hf_ssl` is cheap; every method is registered whichever import comes first. A process a case."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf_ssl.modeling import METHODS
from tests.conftest import ROOT
from tests.modeling.tiny import BY_NAME

HEAVY = [
    "torch",
    "transformers",
    "numpy",
    "timm",
    "datasets",
    "PIL",
    "yaml",
    "safetensors",
    "huggingface_hub",
]


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_importing_the_package_imports_nothing_heavy_and_lists_its_names():
    code = f"""
import sys
import hf_ssl
print([name for name in {HEAVY} if name in sys.modules])
assert "SimCLRForPreTraining" in dir(hf_ssl) and hf_ssl.__version__
try:
    hf_ssl.SimCLRForPretraining
except AttributeError as error:
    print(error)
print([name for name in {HEAVY} if name in sys.modules])
"""
    first, error, second = run(code).splitlines()
    assert first == second == "[]" and error == "module 'hf_ssl' has no attribute 'SimCLRForPretraining'"


def test_importing_our_package_without_transformers_still_lets_others_be_found():
    code = """
import importlib.util
import hf_ssl
assert importlib.util.find_spec("transformers").loader is not None
assert importlib.util.find_spec("no_such_package_anywhere") is None
"""
    run(code)


ORDERS = {
    "ours first": "import hf_ssl; import transformers",
    "transformers first": "import transformers; import hf_ssl",
    "a module of ours first": "from hf_ssl.modeling.moco.modeling_moco import MoCoForPreTraining",
    "a public name first": "from hf_ssl import MAEForPreTraining",
    "a shared module first": "from hf_ssl.modeling.shared.vit import SSLViTBackbone",
}


@pytest.mark.slow
def test_all_auto_classes_know_every_method_in_every_order_of_imports(tmp_path):
    BY_NAME["moco-v2"].build().save_pretrained(tmp_path)
    METHODS["moco"].processor_class.for_image_size(16).save_pretrained(tmp_path)
    alone = {
        "AutoConfig alone": ("AutoConfig", "MoCoConfig"),
        "AutoImageProcessor alone": ("AutoImageProcessor", "MoCoImageProcessor"),
    }
    codes = {
        name: f"import hf_ssl\nfrom transformers import {auto}\n"
        f"assert type({auto}.from_pretrained({str(tmp_path)!r})).__name__ == {expected!r}"
        for name, (auto, expected) in alone.items()
    }
    every = f"""
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining
folder = {str(tmp_path)!r}
assert type(AutoModelForPreTraining.from_pretrained(folder)).__name__ == "MoCoForPreTraining"
assert type(AutoModel.from_pretrained(folder)).__name__ == "MoCoModel"
assert type(AutoImageProcessor.from_pretrained(folder)).__name__ == "MoCoImageProcessor"
for name in {list(METHODS)!r}:
    assert type(AutoConfig.for_model("hf_ssl_" + name)).__name__.endswith("Config")
"""
    codes |= {name: f"{imports}\n{every}" for name, imports in ORDERS.items()}
    with ThreadPoolExecutor(2) as pool:
        for name, _ in zip(codes, pool.map(run, codes.values()), strict=True):
            assert name


def test_our_package_first_registers_when_transformers_arrives():
    """The most delicate order, in the ordinary suite; the others are slow."""
    run(
        "import hf_ssl, sys\n"
        "from transformers import AutoConfig\n"
        "assert type(AutoConfig.for_model('hf_ssl_mae')).__name__ == 'MAEConfig'\n"
        "import transformers\n"
        "assert not any(type(finder).__name__ == '_RegisterAfterTransformers' for finder in sys.meta_path)\n"
        "assert type(transformers.__spec__.loader).__name__ != '_RegisterAfterTransformers'\n"
    )


def test_registration_is_idempotent_and_names_are_the_papers():
    from hf_ssl.modeling import register

    register()
    names = {name: method.config_class.__name__ for name, method in METHODS.items()}
    assert names == {
        "simclr": "SimCLRConfig",
        "moco": "MoCoConfig",
        "mocov3": "MoCoV3Config",
        "mae": "MAEConfig",
        "beit_tokenizer": "BEiTTokenizerConfig",
        "beit": "BEiTConfig",
        "dino": "DINOConfig",
        "ibot": "iBOTConfig",
        "dinov2": "DINOv2Config",
        "ijepa": "IJEPAConfig",
        "vjepa": "VJEPAConfig",
        "clip": "SSLCLIPConfig",
        "siglip": "SigLIPConfig",
    }


def test_the_link_for_readers_is_not_importable_as_a_second_package():
    with pytest.raises(AssertionError, match="import hf_ssl.modeling"):
        run(f"import sys; sys.path.insert(0, {str(ROOT / 'hf_ssl')!r}); import modeling")
