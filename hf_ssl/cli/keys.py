"""Free keys of a command line."""

from collections.abc import Sequence


def parse_keys(arguments: Sequence[str]) -> dict[str, str]:
    """`--key value`, `--key=value` or a bare `--key` (true) as a dictionary.

    Raises:
        ValueError: a value without a key, or a key given twice.
    """
    keys: dict[str, str] = {}
    waiting: str | None = None
    for argument in arguments:
        if argument.startswith("--"):
            name, has_value, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name in keys:
                raise ValueError(f"--{name} is given twice; give it once")
            keys[name] = value if has_value else "true"
            waiting = None if has_value else name
        elif waiting is not None:
            keys[waiting] = argument
            waiting = None
        else:
            raise ValueError(f"'{argument}' belongs to no key; write --key value")
    return keys
