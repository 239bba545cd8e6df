"""The tokenizer trained on captions, and the tokens that text towers take."""

import pytest
from transformers import AutoProcessor, AutoTokenizer

from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.text_processing import NUM_BASE_TOKENS, train_tokenizer

CAPTIONS = ["A dog runs on the grass .", "two dogs play in the snow", "a man rides a horse"] * 10


def processor_of(name: str, max_length: int = 12, vocab_size: int = 560):
    kind = METHODS[name].text_processor_class
    tokenizer = train_tokenizer(CAPTIONS, vocab_size, **kind.tokenizer_options(max_length))
    return kind(METHODS[name].processor_class.for_image_size(32), tokenizer)


def test_the_end_token_comes_last_and_is_never_an_unknown_character():
    """Pooled at the first end token, a text with an unseen character would be cut there."""
    tokenizer = train_tokenizer(CAPTIONS, 560)
    assert tokenizer.eos_token_id == len(tokenizer) - 1 and len(tokenizer) <= 560
    for text in ("zürich 漢字 \N{DOG FACE} q", "it's 42%"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids.index(tokenizer.eos_token_id) == len(ids) - 1
    assert "zürich 漢字 \N{DOG FACE} q" in tokenizer.decode(tokenizer("Zürich 漢字 \N{DOG FACE} q").input_ids)


def test_merges_are_learned_from_the_captions():
    tokenizer = train_tokenizer(CAPTIONS, 1000)
    assert len(tokenizer("a dog runs on the grass").input_ids) == 8  # a token each, start and end


def test_training_again_gives_the_same_tokenizer():
    first, second = (train_tokenizer(CAPTIONS, 560).get_vocab() for _ in range(2))
    assert first == second


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match=f"vocab_size 100 is less than the {NUM_BASE_TOKENS}"):
        train_tokenizer(CAPTIONS, 100)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_text_that_is_cut_keeps_its_end_token(name):
    processor = processor_of(name)
    ids = processor.tokenize(["a dog " * 50, "a dog"])["input_ids"]
    assert ids.shape == (2, 12) and ids[0, -1] == processor.tokenizer.eos_token_id


def test_clip_texts_have_a_mask_and_the_length_of_the_longest():
    tokens = processor_of("clip").tokenize(["a dog", "a dog runs"])
    assert tokens["input_ids"].shape[1] < 12
    assert tokens["attention_mask"].tolist()[0][-1] == 0


def test_siglip_texts_have_no_mask_and_always_the_full_length():
    tokens = processor_of("siglip").tokenize(["a dog"])
    assert tokens.keys() == {"input_ids"} and tokens["input_ids"].shape == (1, 12)
    assert tokens["input_ids"][0, -1] == processor_of("siglip").tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_tokenizer_of_a_folder_gives_the_same_tokens_to_transformers(name, tmp_path):
    processor = processor_of(name)
    processor.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 12
    assert set(loaded("a dog")) == set(type(processor).tokenizer_inputs)  # saved with it, not set afterwards
    assert loaded("A dog").input_ids == processor.tokenizer("a  dog").input_ids


def test_auto_processor_loads_both_halves_from_a_run(tmp_path):
    from tests.modeling.tiny import BY_NAME

    processor = processor_of("clip")
    BY_NAME["clip"].config().save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor) and loaded.image_processor.views == processor.image_processor.views
    assert loaded.tokenize(["a dog"])["input_ids"].equal(processor.tokenize(["a dog"])["input_ids"])
