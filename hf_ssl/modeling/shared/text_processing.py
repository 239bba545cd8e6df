"""Images with texts in: the processor that methods of both share, and a tokenizer trained on given captions.

The vocabulary is CLIP's byte-level BPE (arXiv 2103.00020, section 2.4): all bytes, all bytes that end a word,
merges, start and end token. transformers' own training of it keeps only the bytes that occur, so that a new
one would become the end token, at which texts are pooled.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer, ProcessorMixin

NUM_BASE_TOKENS = 2 * 256 + 2  # bytes, bytes that end a word, start, end


class SSLImageTextProcessor(ProcessorMixin):
    """An image processor and a tokenizer, with the padding that the text tower wants.

    Args:
        image_processor: of the method.
        tokenizer: whose `model_max_length` is that of the text tower.
    """

    padding = "longest"
    tokenizer_inputs: tuple[str, ...] = ("input_ids", "attention_mask")

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer)

    @classmethod
    def tokenizer_options(cls, max_length: int) -> dict[str, Any]:
        """What a tokenizer is built or loaded with for texts of this length; set later, it is not saved."""
        return {"model_max_length": max_length, "model_input_names": list(cls.tokenizer_inputs)}

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Tokens of texts as the text tower takes them, cut so that the end token stays the last."""
        tokens = self.tokenizer(texts, padding=self.padding, truncation=True, return_tensors="pt")
        return dict(tokens)


def train_tokenizer(captions: Iterable[str], vocab_size: int, **options: Any) -> CLIPTokenizer:
    """CLIP's tokenizer with merges learned from captions; any text can be written with it.

    Args:
        captions: texts to learn from.
        vocab_size: at most so many tokens; few captions give fewer.
        **options: of the tokenizer.

    Raises:
        ValueError: no room for the bytes.
    """
    if vocab_size < NUM_BASE_TOKENS:
        raise ValueError(
            f"vocab_size {vocab_size} is less than the {NUM_BASE_TOKENS} tokens of all bytes; give at least "
            f"{NUM_BASE_TOKENS + 100}"
        )
    symbols = sorted(ByteLevel.alphabet())
    ends = [f"{symbol}</w>" for symbol in symbols]
    # Ends named beforehand have fixed ids: by those, merges that occur equally often are put in order.
    learned = CLIPTokenizer().train_new_from_iterator(
        captions, vocab_size + 8, new_special_tokens=ends, show_progress=False
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers are forked after its threads
    merges = _merges_of(learned)[: vocab_size - NUM_BASE_TOKENS]
    names = [*symbols, *ends, *("".join(pair) for pair in merges)]
    names += [learned.bos_token, learned.eos_token]  # the end token has the largest id
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, **options)  # type: ignore[arg-type]


def _merges_of(tokenizer: Any) -> list[tuple[str, str]]:
    stored = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in stored)
    return [(first, second) for first, second in pairs]


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer as `AutoTokenizer` reads it, without where it was loaded from itself."""
    forget_origin(tokenizer)
    tokenizer.save_pretrained(str(folder))


def forget_origin(tokenizer: Any) -> None:
    """Drop what loading from a folder left in a tokenizer, so that it is not saved."""
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
