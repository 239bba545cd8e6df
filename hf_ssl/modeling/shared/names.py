"""One sentence for every refused name: what was given, what it is probably meant to be, what exists."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name_message(what: str, name: str, known: Iterable[str]) -> str:
    """Error text for a name that is not in a closed list.

    Args:
        what: the kind of thing, singular ("schedule", "option of crop").
        name: the name that was given.
        known: the names that exist.

    Returns:
        One line with the nearest known name, if any is near, and all known names.
    """
    choices = sorted(known)
    nearest = get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown {what} '{name}'{hint} (known: {', '.join(choices)})"
