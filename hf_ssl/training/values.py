"""Values of recipes and command lines: YAML by today's rules, checked against the types of dataclasses.

PyYAML follows YAML 1.1, where `1e-4` is text, `no` is false and `12:30` is a number; here numbers are what
Python takes for numbers, and only `true` and `false` are truth values.
"""

import re
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

_PLAIN_SCALARS = {
    "null": (r"^(?:~|null|None)$", "~nN"),
    "bool": (r"^(?:true|True|false|False)$", "tTfF"),
    "int": (r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    "float": (
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, (_pattern, _first) in _PLAIN_SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def load_yaml(text: str) -> Any:
    """Content of a YAML text.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)


def dump_yaml(content: Any) -> str:
    """YAML text that `load_yaml` reads back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_value(value: Any) -> Any:
    """A value from a command line: text that reads as number, truth value, list or mapping is one."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    is_plain_text = any(re.match(pattern, text) for pattern, _ in _PLAIN_SCALARS.values())
    if not is_plain_text and text[:1] not in ("[", "{"):
        return value  # unread: a folder may be called '#1' or 'a: b'
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return value


def fit_types(values: dict[str, Any], dataclass_type: type) -> dict[str, Any]:
    """Values as the fields of a dataclass want them: `1e3` for an int is 1000, `a,b` for a list is [a, b].

    Args:
        values: by names of fields.
        dataclass_type: the dataclass.

    Raises:
        ValueError: a value of another type.
    """
    hints = get_type_hints(dataclass_type)
    fitted = {}
    for name, value in values.items():
        try:
            fitted[name] = _fit(value, hints[name])
        except TypeError:
            raise ValueError(f"{name} must be {_describe(hints[name])}, got {value!r}") from None
    return fitted


def _fit(value: Any, hint: Any) -> Any:
    for choice in _choices(hint):
        if _is_instance(value, choice):
            return value
    for choice in _choices(hint):
        for conversion in _conversions(choice):
            converted = conversion(value)
            if converted is not None:
                return converted
    raise TypeError


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_instance(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_is_instance(item, get_args(hint)[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, (int, float))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, (str, hint))
    return isinstance(value, origin or hint) if isinstance(origin or hint, type) else True


def _conversions(hint: Any) -> list[Callable[[Any], Any]]:
    """Harmless conversions to a type; each gives None where it does not apply."""
    if hint is int:
        return [lambda value: int(value) if isinstance(value, float) and value.is_integer() else None]
    if hint is str:  # a folder called 2024
        return [lambda value: str(value) if type(value) in (int, float) else None]
    if get_origin(hint) is list:
        return [lambda value: _fit_list(value, get_args(hint)[0])]
    return []


def _fit_list(value: Any, item_hint: Any) -> list[Any] | None:
    if isinstance(value, str):
        value = [parse_value(item) for item in value.split(",")]
    items = value if isinstance(value, list) else [value]
    try:
        return [_fit(item, item_hint) for item in items]
    except TypeError:
        return None


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    words = []
    for choice in _choices(hint):
        is_list = get_origin(choice) is list
        words.append("a list" if is_list else names.get(choice, getattr(choice, "__name__", str(choice))))
    return " or ".join(dict.fromkeys(words))
