"""Read the tokenizer of a model folder exactly as its files describe it, or refuse it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from januslens_server.errors import ModelFailed
from januslens_server.models.chat import MAX_TEMPLATE, ChatTemplate
from januslens_server.models.tokenizer import Vocabulary
from januslens_server.models.vetting import read_json

# Tokenizer classes that `vocab.json` and `merges.txt` describe completely (GPT-2's byte-level BPE),
# and families that use them, for folders that name no class.
GPT2_CLASSES = {"GPT2Tokenizer", "GPT2TokenizerFast"}
GPT2_FAMILIES = {"gpt2", "gpt_neo", "gptj", "opt"}
GPT2_SPECIAL = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")

_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read the tokenizer of a model folder as its `tokenizer.json` describes it.

    transformers rebuilds the normaliser and pre-tokenizer of many tokenizer classes from the class
    alone, so the `tokenizers` library reads the file itself. Further tokens that
    `tokenizer_config.json` or `added_tokens.json` list are added. Without the file, only GPT-2's
    tokenizer is read, because the remaining files of others do not describe how texts are split.

    Raises:
        ModelFailed: The tokenizer is not described, or the files contradict each other.
    """
    described = {
        name: read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    }
    config, special_tokens, added = described.values()
    named = {token.content: token for token in _named_tokens({**config, **special_tokens})}
    listed = {
        int(token_id): _added_token(token, special=token.get("special", False))
        for token_id, token in config.get("added_tokens_decoder", {}).items()
    } or {
        token_id: named.get(text, AddedToken(text, normalized=True))
        for text, token_id in added.items()
    }
    file = folder / "tokenizer.json"
    if file.is_file():
        tokenizer = Tokenizer.from_file(str(file))
        _add_listed_tokens(tokenizer, listed)
    else:
        tokenizer = _gpt2_tokenizer(folder, {**GPT2_SPECIAL, **config, **special_tokens}, listed)
    return Vocabulary(tokenizer, named, _chat_template(folder, {**config, **special_tokens}))


def _chat_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate:
    """Read the chat template as transformers finds it, with the special tokens by their names.

    Raises `ModelFailed` if it is too long or no text.
    """
    file = folder / "chat_template.jinja"
    source = file.read_text() if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    if source is not None and not (isinstance(source, str) and len(source) <= MAX_TEMPLATE):
        raise ModelFailed(f"invalid chat template; expected at most {MAX_TEMPLATE} characters")
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    variables = {
        key: _added_token(token, special=True).content
        for key, token in tokens.items()
        if _is_token(token)
    }
    return ChatTemplate(source, variables)


def _named_tokens(described: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Yield the special tokens of a description: `bos_token` and the like, and further lists."""
    for key, value in described.items():
        tokens: list[Any] = [value] if key.endswith("_token") else []
        if key in {"additional_special_tokens", "extra_special_tokens"}:
            tokens = list(value.values() if isinstance(value, dict) else value or ())
        # Keys such as add_bos_token hold no token.
        yield from (_added_token(token, special=True) for token in tokens if _is_token(token))


def _is_token(described: object) -> bool:
    content = described.get("content") if isinstance(described, dict) else described
    return isinstance(content, str)


def _added_token(described: str | Mapping[str, Any], *, special: bool) -> AddedToken:
    """Build a token from a text or from an object with flags."""
    if isinstance(described, str):
        return AddedToken(described, normalized=False, special=special)
    flags = {flag: described[flag] for flag in _FLAGS if flag in described}
    return AddedToken(described["content"], special=special, **flags)


def _add_listed_tokens(tokenizer: Tokenizer, listed: Mapping[int, AddedToken]) -> None:
    """Add the listed tokens that the tokenizer lacks, in the order of their ids.

    Raises `ModelFailed` if a token has another id than listed.
    """
    for token_id, token in sorted(listed.items()):
        known = tokenizer.token_to_id(token.content)
        if known is None:
            tokenizer.add_tokens([token])
            known = tokenizer.token_to_id(token.content)
        if known != token_id:
            raise ModelFailed(
                f"token {token.content!r} has the id {token_id} in tokenizer_config.json, "
                f"but {known} in the tokenizer; make the folder's files agree"
            )


def _gpt2_tokenizer(
    folder: Path, config: Mapping[str, Any], listed: Mapping[int, AddedToken]
) -> Tokenizer:
    """Read GPT-2's byte-level BPE from `vocab.json` and `merges.txt`."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    kind = config.get("tokenizer_class")
    family = read_json(folder / "config.json").get("model_type")
    known = kind in GPT2_CLASSES if kind else family in GPT2_FAMILIES
    if not (known and vocab.is_file() and merges.is_file()):
        raise ModelFailed(
            f"tokenizer.json is missing, and the other tokenizer files of {kind or family} cannot "
            "be read; add the tokenizer.json that the tokenizer's save_pretrained writes"
        )
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    prefixed = bool(config.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed)
    tokenizer.decoder = decoders.ByteLevel()
    _add_listed_tokens(tokenizer, listed)
    tokenizer.add_special_tokens(list(_named_tokens(config)))
    if config.get("add_bos_token", False) and _is_token(config["bos_token"]):
        bos = _added_token(config["bos_token"], special=True).content
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer
