"""Build the demo model's tokenizer: whole words of the corpus, and 256 bytes for other texts."""

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from demo_training.corpus import documents

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

SAMPLE_SEED = 1
SAMPLE_DOCUMENTS = 40_000
# Minimum count of a word. Rarer words are numbers and codes, which are not in the vocabulary.
SMALLEST_COUNT = 20
# Far below every word's log-probability, so that bytes are used only if no word matches.
BYTE_PENALTY = 10.0


def build_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """Build a byte-level Unigram tokenizer of about 1,000 ids that adds no special tokens.

    The vocabulary has the end-of-text token as id 0, every byte, and every word of a fixed sample
    of the corpus. A word includes the space before it, and its score is its log-frequency. Every
    text can be encoded without an unknown token and decoded without loss.
    """
    tokenizer = Tokenizer(models.Unigram(_vocabulary(), unk_id=None, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, with a portable class name."""
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _vocabulary() -> list[tuple[str, float]]:
    """Return the pieces, in the byte-level alphabet, with log-probabilities in order of ids."""
    counts = _word_counts()
    total = counts.total()
    words = sorted(word for word, count in counts.items() if count >= SMALLEST_COUNT)
    byte_score = -math.log(total) - BYTE_PENALTY
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [
        (END_OF_TEXT, byte_score),
        *((byte, byte_score) for byte in alphabet),
        *((word, math.log(counts[word] / total)) for word in words if word not in set(alphabet)),
    ]


def _word_counts() -> Counter[str]:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return Counter(
        word
        for document in islice(documents(SAMPLE_SEED), SAMPLE_DOCUMENTS)
        for word, _ in split.pre_tokenize_str(document)
    )
