"""The shape of the tree: who imports whom, what a method folder holds, how things are named, what is shipped.

The files are parsed, not imported, so that a wrong import is found even where importing it would work. Every
test runs over what exists: a new folder or method is covered without an edit here.
"""

import ast
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_ssl"
METHODS_DIR = PACKAGE / "modeling"
NOT_METHODS = {"shared", "__pycache__"}

# Folder -> the prefixes of our own modules it may import. `hf_ssl/__init__.py` stands outside: it is lazy.
ALLOWED = {
    "modeling": ["hf_ssl.modeling"],
    "data": ["hf_ssl.data", "hf_ssl.modeling.shared"],
    "evaluation": ["hf_ssl.evaluation", "hf_ssl.modeling", "hf_ssl.data"],
    "pictures": ["hf_ssl.pictures", "hf_ssl.modeling", "hf_ssl.data"],
    "hub": ["hf_ssl.hub", "hf_ssl.modeling", "hf_ssl.__version__"],
    "training": [
        f"hf_ssl.{name}" for name in ("training", "modeling", "data", "evaluation", "pictures", "hub")
    ],
    "cli": ["hf_ssl"],
}
HEAVY = {"timm", "sklearn", "matplotlib", "datasets"}  # imported inside functions only
EXTRA_FILES = {  # beside the four every method has
    **{name: {f"processing_{name}.py"} for name in ("clip", "siglip", "glip", "flair")},
}
LONG_FILE = 400


def python_files(folder: Path = PACKAGE) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def dotted_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names of the modules a file imports, wherever in the file, with the line."""
    package = dotted_name(path) if path.name == "__init__.py" else dotted_name(path).rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                name = ".".join([*anchor, *([name] if name else [])])
            # `from hf_ssl import data` names a module as well as `import hf_ssl.data` does.
            if name == "hf_ssl":
                for alias in node.names:
                    yield f"hf_ssl.{alias.name}", node.lineno
            else:
                yield name, node.lineno


def is_within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def method_dirs() -> list[Path]:
    folders = (path for path in METHODS_DIR.iterdir() if path.is_dir() and path.name not in NOT_METHODS)
    return sorted(path for path in folders if any(path.glob("*.py")))


def class_names(path: Path) -> list[str]:
    return [node.name for node in parse(path).body if isinstance(node, ast.ClassDef)]


def model_types() -> dict[str, str]:
    """Every `model_type = "..."` of a class in hf_ssl/modeling, by class name."""
    found = {}
    for path in python_files(METHODS_DIR):
        for owner in ast.walk(parse(path)):
            if not isinstance(owner, ast.ClassDef):
                continue
            for node in owner.body:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                is_model_type = any(isinstance(t, ast.Name) and t.id == "model_type" for t in targets)
                if is_model_type and isinstance(getattr(node, "value", None), ast.Constant):
                    found[owner.name] = node.value.value
    return found


# Who imports whom


@pytest.mark.parametrize("folder", ALLOWED)
def test_folder_imports_only_what_it_may_know(folder):
    wrong = [
        f"{place(path, line)} imports {module}"
        for path in python_files(PACKAGE / folder)
        for module, line in imported_modules(path)
        if is_within(module, "hf_ssl") and not any(is_within(module, prefix) for prefix in ALLOWED[folder])
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_the_package_has_a_rule():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(ALLOWED)


def test_nothing_imports_the_command_line():
    wrong = [
        place(path, line)
        for path in python_files()
        if not is_within(dotted_name(path), "hf_ssl.cli")
        for module, line in imported_modules(path)
        if is_within(module, "hf_ssl.cli")
    ]
    assert not wrong, "\n".join(wrong)


def test_shared_knows_no_method_and_a_method_knows_no_other():
    wrong = []
    for path in python_files(METHODS_DIR):
        folder = path.relative_to(METHODS_DIR).parts[0]
        if folder == "__init__.py":
            continue  # the table of methods
        own = (
            ["hf_ssl.modeling.shared"]
            if folder == "shared"
            else ["hf_ssl.modeling.shared", f"hf_ssl.modeling.{folder}"]
        )
        wrong += [
            f"{place(path, line)} imports {module}"
            for module, line in imported_modules(path)
            if is_within(module, "hf_ssl") and not any(is_within(module, prefix) for prefix in own)
        ]
    assert not wrong, "\n".join(wrong)


def test_imports_across_folders_are_absolute():
    wrong = [
        place(path, node.lineno)
        for path in python_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.level > 1
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_in_modeling_name_modules_and_not_packages():
    # The flat code that travels with a checkpoint is made by rewriting these lines.
    packages = {dotted_name(path) for path in python_files(METHODS_DIR) if path.name == "__init__.py"}
    wrong = [
        f"{place(path, line)} imports from {module}"
        for path in python_files(METHODS_DIR)
        if path.name != "__init__.py"
        for module, line in imported_modules(path)
        if module in packages
    ]
    assert not wrong, "\n".join(wrong)


def top_level_imports(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", node.lineno
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from top_level_imports(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            yield from top_level_imports(node.body)


def test_heavy_libraries_are_imported_inside_functions():
    wrong = [
        f"{place(path, line)} imports {module}"
        for path in python_files()
        for module, line in top_level_imports(parse(path).body)
        if module.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


# Methods


@pytest.mark.parametrize("folder", method_dirs(), ids=lambda folder: folder.name)
class TestMethodFolder:
    def test_has_the_four_files_and_no_drawer(self, folder):
        name = folder.name
        expected = {
            "__init__.py",
            f"configuration_{name}.py",
            f"modeling_{name}.py",
            f"image_processing_{name}.py",
            *EXTRA_FILES.get(name, set()),
        }
        assert {path.name for path in folder.glob("*.py")} == expected

    def test_classes_have_the_papers_name_and_transformers_suffixes(self, folder):
        name = folder.name
        configs = [cls for cls in class_names(folder / f"configuration_{name}.py") if cls.endswith("Config")]
        papers = [cls.removesuffix("Config") for cls in configs]
        spelled = [paper for paper in papers if paper.lower().removeprefix("ssl") == name.replace("_", "")]
        assert len(spelled) == 1, f"one config class named after {name} expected, found {configs}"
        models = class_names(folder / f"modeling_{name}.py")
        assert {f"{spelled[0]}Model", f"{spelled[0]}ForPreTraining"} <= set(models)
        assert f"{spelled[0]}ImageProcessor" in class_names(folder / f"image_processing_{name}.py")

    def test_says_which_paper_it_follows(self, folder):
        text = ast.get_docstring(parse(folder / f"modeling_{folder.name}.py")) or ""
        assert re.search(r"\d{4}\.\d{4,5}", text), "the module's docstring names no arXiv number"


def test_there_is_a_method_once_the_table_of_methods_exists():
    has_table = any(
        isinstance(node, ast.Name) and node.id == "METHODS"
        for node in ast.walk(parse(METHODS_DIR / "__init__.py"))
    )
    assert not has_table or "simclr" in {folder.name for folder in method_dirs()}


def test_every_model_type_is_ours_by_prefix_and_unique():
    types = {owner: name for owner, name in model_types().items() if name}
    assert all(name.startswith("hf_ssl_") for name in types.values()), types
    assert max(Counter(types.values()).values(), default=1) == 1, types
    assert types or not method_dirs()


def test_no_class_of_modeling_is_named_as_one_of_transformers():
    import transformers

    ours = {
        name for path in python_files(METHODS_DIR) for name in class_names(path) if not name.startswith("_")
    }
    assert not ours & set(dir(transformers))


def test_base_names_in_modeling_are_unique():
    # Remote code on the Hub is flat: all files of a method and of shared/ land in one folder.
    counts = Counter(path.name for path in python_files(METHODS_DIR) if path.name != "__init__.py")
    assert not {name: count for name, count in counts.items() if count > 1}


# Style that ruff does not hold


def test_only_the_command_line_prints():
    wrong = [
        place(path, node.lineno)
        for path in python_files()
        if not is_within(dotted_name(path), "hf_ssl.cli")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_named_by_what_is_in_them():
    drawers = {"utils.py", "misc.py", "helpers.py", "base.py", "common.py"}
    assert not [str(path.relative_to(ROOT)) for path in python_files() if path.name in drawers]


def test_file_sizes_are_shown(capsys):
    # A table to look at, no limit: run with `-k file_sizes -p no:xdist`.
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    with capsys.disabled():
        print(f"\n{sum(lines.values())} lines in {len(lines)} files; those of more than {LONG_FILE} lines:")
        for name, count in sorted(lines.items(), key=lambda item: -item[1]):
            if count > LONG_FILE:
                print(f"{count:6} {name}")
    assert lines


# Links and what is shipped


@pytest.mark.parametrize("name", ["modeling", "training"])
class TestLinkForReaders:
    def test_points_into_the_package_relatively(self, name):
        link = ROOT / name
        if not link.is_symlink():
            pytest.skip("this checkout has no links (a system without them, or they were removed)")
        assert link.readlink() == Path("hf_ssl") / name

    def test_importing_it_by_the_short_name_is_refused(self, name):
        path = PACKAGE / name / "__init__.py"
        if all(isinstance(node, ast.Expr) for node in parse(path).body):
            pytest.skip(f"{path.relative_to(ROOT)} holds no code yet")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        with pytest.raises(ImportError, match=rf"import hf_ssl\.{name}"):
            spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True
    )
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_wheel_holds_every_module_once_and_nothing_beside_the_package(wheel_names):
    modules = [name for name in wheel_names if name.endswith(".py")]
    assert sorted(modules) == sorted(path.relative_to(ROOT).as_posix() for path in python_files())
    assert {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name} == {"hf_ssl"}


@pytest.mark.slow
def test_wheel_holds_sample_recipes_and_licences(wheel_names):
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".py")
    data = [path for path in files if path.parent.name != "__pycache__"]
    expected = {path.relative_to(ROOT).as_posix() for path in data}
    assert (
        {"hf_ssl/data/sample/train.parquet", "hf_ssl/data/sample/NOTICE.md"} <= expected <= set(wheel_names)
    )
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
