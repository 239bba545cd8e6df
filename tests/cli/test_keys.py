"""Free keys of a command line."""

import pytest

from hf_ssl.cli.keys import parse_keys


def test_three_ways_to_give_a_value():
    keys = parse_keys(["--a", "1", "--b=2=3", "--some-key", "x", "--flag"])
    assert keys == {"a": "1", "b": "2=3", "some_key": "x", "flag": "true"}


def test_negative_numbers_and_lists_are_values():
    assert parse_keys(["--rate", "-1e-4", "--views", "[{count: 1}]"]) == {
        "rate": "-1e-4",
        "views": "[{count: 1}]",
    }


@pytest.mark.parametrize("arguments", [["5"], ["--a", "1", "2"], ["-a", "1"]])
def test_a_value_without_a_key_is_refused(arguments: list[str]):
    with pytest.raises(ValueError, match="belongs to no key; write --key value"):
        parse_keys(arguments)


def test_a_key_given_twice_is_refused():
    with pytest.raises(ValueError, match="--a is given twice"):
        parse_keys(["--a", "1", "--a", "2"])
