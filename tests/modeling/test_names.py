"""The sentence that refuses a name."""

from hf_ssl.modeling.shared.names import unknown_name_message


def test_message_names_the_nearest_and_all_known():
    message = unknown_name_message("schedule", "cosin", ["step", "cosine"])
    assert message == "unknown schedule 'cosin'; did you mean 'cosine'? (known: cosine, step)"


def test_message_guesses_nothing_when_nothing_is_near():
    assert unknown_name_message("schedule", "qqq", ["step"]) == "unknown schedule 'qqq' (known: step)"
