"""The code of a model as flat files, which transformers can load from a repository without this package.

transformers looks for code at the root of a repository only, and follows imports of the form
`from .name import ...` only. So every module that the model needs is written beside the others under its
last name, and its imports from this package are rewritten to that form.
"""

import ast
import re
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_ssl import __version__

PACKAGE = "hf_ssl"


def method_modules(method: Any) -> list[str]:
    """Modules from which the code of a method (a row of `METHODS`) is collected."""
    folder = f"{PACKAGE}.modeling.{method.name}"
    kinds = ("configuration", "modeling", "image_processing")
    return [f"{folder}.{kind}_{method.name}" for kind in kinds]


def auto_map(method: Any) -> dict[str, str]:
    """Where transformers finds a method's classes among the flat files; the same for model and processor.

    In a local folder whose root is a timm model, transformers looks for the processor in config.json.
    """
    configuration, modeling, image_processing = (
        module.rpartition(".")[2] for module in method_modules(method)
    )
    return {
        "AutoConfig": f"{configuration}.{method.config_class.__name__}",
        "AutoModel": f"{modeling}.{method.model_class.__name__}",
        "AutoModelForPreTraining": f"{modeling}.{method.pretraining_class.__name__}",
        "AutoImageProcessor": f"{image_processing}.{method.processor_class.__name__}",
    }


def flat_code(modules: Iterable[str], package: str = PACKAGE) -> dict[str, str]:
    """Modules and all that they import from a package, as files of one folder.

    Args:
        modules: dotted names to start from.
        package: only imports from it are followed and rewritten.

    Returns:
        Source text by file name.

    Raises:
        ValueError: an import that names no module of its own (`import package.x`, `from package.x import
            module`), or two modules of the same last name.
    """
    files: dict[str, str] = {}
    origin_of: dict[str, str] = {}
    queue = deque(modules)
    while queue:
        module = queue.popleft()
        name = module.rpartition(".")[2]
        if origin_of.setdefault(name, module) != module:
            raise ValueError(
                f"{module} and {origin_of[name]} would both become {name}.py; rename one of them"
            )
        if f"{name}.py" in files:
            continue
        source = _source_of(module)
        files[f"{name}.py"] = _flattened(module, source, package)
        queue.extend(target for _, target in _own_imports(module, source, package))
    return files


def write_flat_code(method: Any, folder: Path) -> list[str]:
    """Write the flat code of a method into a folder; returns the names of the files."""
    files = flat_code(method_modules(method))
    for name, source in files.items():
        (folder / name).write_text(source, encoding="utf-8")
    return sorted(files)


@cache
def known_code_files() -> frozenset[str]:
    """Names of all files that `write_flat_code` can write, for whichever method."""
    folder = Path(str(find_spec(f"{PACKAGE}.modeling").submodule_search_locations[0]))  # type: ignore
    return frozenset(path.name for path in folder.rglob("*.py") if path.name != "__init__.py")


def _source_of(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no module {module}")
    if spec.submodule_search_locations is not None:
        raise ValueError(f"{module} is a package; import from the module that defines the name")
    return Path(spec.origin).read_text(encoding="utf-8")


def _own_imports(module: str, source: str, package: str) -> Iterator[tuple[ast.ImportFrom, str]]:
    """Every import from the package, wherever it stands, with the module that it names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_within(alias.name, package):
                    raise ValueError(
                        f"{module}, line {node.lineno}: 'import {alias.name}' cannot be flattened; write "
                        "'from module import name'"
                    )
        elif isinstance(node, ast.ImportFrom):
            target = _target(module, node)
            if _is_within(target, package):
                if node.level and not node.module:
                    raise ValueError(
                        f"{module}, line {node.lineno}: 'from . import' cannot be flattened; write "
                        "'from .module import name'"
                    )
                yield node, target


def _target(module: str, node: ast.ImportFrom) -> str:
    """Dotted name of the module that a `from` imports from."""
    if not node.level:
        return node.module or ""
    anchor = module.split(".")[: -node.level]
    return ".".join([*anchor, *([node.module] if node.module else [])])


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _flattened(module: str, source: str, package: str) -> str:
    lines = source.splitlines(keepends=True)
    for node, target in _own_imports(module, source, package):
        line = lines[node.lineno - 1]
        start, statement = line[: node.col_offset], line[node.col_offset :]
        flat = re.sub(r"^from\s+\S+\s+import\b", f"from .{target.rpartition('.')[2]} import", statement)
        if flat == statement and not statement.startswith(f"from .{target.rpartition('.')[2]} import"):
            raise ValueError(f"{module}, line {node.lineno}: cannot rewrite '{statement.strip()}'")
        lines[node.lineno - 1] = start + flat
    header = f"# {module} of hf_ssl {__version__} (Apache-2.0), written by its export.\n"
    return header + "".join(lines)
