"""Small tokenizers of every kind that causal models use."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from januslens_server.models.tokenizer import Vocabulary

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNKNOWN = "<unk>"
SPECIAL = ["<s>", "</s>", UNKNOWN]


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return a tokenizer that adds `<s>` before and `</s>` after a text."""
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return Vocabulary(with_template(tokenizer, ["<s>"], ["</s>"]))


def with_template(tokenizer: Tokenizer, before: list[str], behind: list[str]) -> Tokenizer:
    """Return the tokenizer with these tokens around a text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A", *behind]),
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in before + behind],
    )
    return tokenizer


def sentencepiece(scheme: str, words: Sequence[str]) -> Tokenizer:
    """Return a Unigram model of whole words, as SentencePiece trains it, with byte fallback."""
    pieces = [*SPECIAL, *BYTES, SPACE, 2 * SPACE, *words, *sorted(set("".join(words)))]
    scores = [(piece, -float(len(piece) == 1)) for piece in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=True))
    if scheme == "legacy":
        steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def byte_level(add_prefix_space: bool, words: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer with all bytes and, by merges from the left, some words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = [split.pre_tokenize_str(word)[0][0] for word in words]
    merges = [(word[:end], word[end]) for word in written for end in range(1, len(word))]
    entries = [*alphabet, *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_piece(words: Sequence[str]) -> Tokenizer:
    """Return BERT's kind: lower case, no spaces, `##` before a piece that continues a word."""
    entries = {entry: i for i, entry in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordPiece(entries, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def bare(words: Sequence[str]) -> Tokenizer:
    """Return a tokenizer of words between spaces, without a decoder."""
    entries = {entry: i for i, entry in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
