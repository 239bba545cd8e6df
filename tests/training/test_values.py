"""Values: numbers are numbers, names are names, and types are those of the fields."""

from dataclasses import dataclass
from typing import Any

import pytest

from hf_ssl.training.values import dump_yaml, fit_types, load_yaml, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("-.5", -0.5),
        ("true", True),
        ("null", None),
        ("[1, 2e-1]", [1, 0.2]),
        ("{scale: [0.2, 1.0]}", {"scale": [0.2, 1.0]}),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("007", "007"),
        ("nan", "nan"),
        ("2024-01-01", "2024-01-01"),
        ("#1 images", "#1 images"),
        ("a: b", "a: b"),
        ("[unclosed", "[unclosed"),
        ("", ""),
    ],
)
def test_texts_of_a_command_line(text: str, value: Any):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_files_follow_the_same_rules():
    assert load_yaml("a: 1e-4\nb: no\nc: 12:30\nd: ~") == {"a": 1e-4, "b": "no", "c": "12:30", "d": None}


def test_dumped_values_come_back():
    content = {
        "a": 1e-5,
        "b": "1e-5",
        "c": "no",
        "d": "true",
        "e": None,
        "f": [0.1, "x"],
        "g": 5e-324,
        "h": "",
    }
    assert load_yaml(dump_yaml(content)) == content


@dataclass
class _Fields:
    count: int = 0
    rate: float | None = None
    names: list[str] | None = None
    name: str | list[str] = ""
    flag: bool = False


def test_harmless_conversions():
    values = {"count": 1e3, "rate": 1, "names": "a,b", "name": 2024, "flag": True}
    fitted = fit_types(values, _Fields)
    assert fitted == {"count": 1000, "rate": 1, "names": ["a", "b"], "name": "2024", "flag": True}
    assert fit_types({"name": "a,b"}, _Fields) == {"name": "a,b"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", "abc", "count must be a whole number, got 'abc'"),
        ("count", 1.5, "count must be a whole number, got 1.5"),
        ("count", True, "count must be a whole number, got True"),
        ("rate", "fast", "rate must be a number or null, got 'fast'"),
        ("flag", "maybe", "flag must be true or false, got 'maybe'"),
        ("names", [1, [2]], "names must be a list or null"),
    ],
)
def test_other_types_are_refused_by_name(name: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        fit_types({name: value}, _Fields)
