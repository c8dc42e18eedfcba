"""A tokenizer as switchgen needs it: text that is only text, and the exact bytes of every token.

Tokenizers parse control tokens such as `<|im_end|>` inside any string they are given, and decode token lists in ways
that do not add up (spaces dropped, characters torn). Here text from users and candidates is tokenized without control
tokens, and every token has its bytes, so that the texts of a response's parts joined are the text of the whole.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from switchgen.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTENCE_END = (b".", b"!", b"?", b'."', b'!"', b'?"', b".'", b".)", b"!)", b"?)", "。".encode(), "…".encode())
_MARK = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")
# What a text is put behind to be tokenized as if in the middle of one; a control character is hardly ever merged.
_ANCHORS = ("\n", "\x01")
# Ending a segment inside a character waits for at most this many more tokens (a UTF-8 character has 4 bytes).
MAX_UTF8_EXTRA = 3


def _byte_level_map() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    mapping = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    mapping.update({chr(256 + offset): byte for offset, byte in enumerate(others)})
    return mapping


def _decoder_kinds(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    kinds = {decoder.get("type", "")}
    for inner in decoder.get("decoders", []):
        kinds |= _decoder_kinds(inner)
    return kinds


def _spelling_rules(normalizer: Any) -> Any:
    """The part of a normalizer that writes spaces as the vocabulary spells them; the rest changes the text."""
    if not isinstance(normalizer, dict):
        return None
    if normalizer.get("type") == "Sequence":
        kept = [rule for rule in map(_spelling_rules, normalizer["normalizers"]) if rule is not None]
        return {**normalizer, "normalizers": kept}
    spells = normalizer.get("type") == "Prepend" or normalizer.get("pattern") == {"String": " "}
    return normalizer if spells else None


class Vocabulary:
    """A fast tokenizer with its token bytes, control ids and text-only tokenization.

    Raises:
        ModelError: the tokenizer is not a fast one, or is of a kind whose tokens have no fixed bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{source}: its tokenizer is not a fast one (tokenizer.json); convert it and save it again"
            )
        self.tokenizer = tokenizer
        self.source = source
        self.token_bytes: list[bytes] = _token_bytes(tokenizer, source)
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control_ids: frozenset[int] = frozenset(special | set(tokenizer.all_special_ids))
        # Templates use some tokens as marks that are not declared special, such as Qwen's `<think>`: a model may write
        # them, a text never means them.
        marks = {
            index for index, token in tokenizer.added_tokens_decoder.items() if _MARK.fullmatch(token.content.strip())
        }
        self.marker_ids: frozenset[int] = self.control_ids | marks

    def __len__(self) -> int:
        return len(self.token_bytes)

    def encode_text(self, text: str, *, opens: bool = False) -> list[int]:
        """Tokens of a text in which nothing is control: `<|im_end|>` becomes the characters it is written with.

        Decoded, they are the text again, byte for byte; only what the vocabulary has no tokens for becomes its unknown
        token.

        Args:
            opens: whether the text begins what the model reads; sentencepiece-like tokenizers put a space there.
        """
        raw = text.encode()
        for ids in self._ways(text):
            read = self.decode_bytes(ids)
            if self.marker_ids.isdisjoint(ids) and (read == raw or (opens and read == b" " + raw)):
                return ids
        # Something in the text is not taken as text: cut it in two until that something is torn or stands alone.
        if len(text) == 1:
            return self._spell(text)
        middle = len(text) // 2
        return self.encode_text(text[:middle], opens=opens) + self.encode_text(text[middle:])

    def _ways(self, text: str) -> Iterator[list[int]]:
        """Ways to tokenize a text, the tokenizer's own first."""
        for encode in (self._encode, self._encode_as_written):
            if encode is not None:
                yield encode(text)
                # Sentencepiece-like tokenizers put a space before a text that stands alone: let it follow something.
                for anchor in _ANCHORS:
                    ahead, ids = encode(anchor), encode(anchor + text)
                    if ids[: len(ahead)] == ahead:
                        yield ids[len(ahead) :]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    @cached_property
    def _encode_as_written(self) -> Callable[[str], list[int]] | None:
        """The tokenizer without its Unicode normalization (NFC, NFKC, lower case), if it has any."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        kept = _spelling_rules(backend.get("normalizer"))
        if kept == backend.get("normalizer"):
            return None
        backend["normalizer"] = kept
        plain = type(self.tokenizer.backend_tokenizer).from_str(json.dumps(backend))
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True

        def encode(text: str) -> list[int]:
            ids: list[int] = plain.encode(text, add_special_tokens=False).ids
            return ids

        return encode

    def _spell(self, character: str) -> list[int]:
        """One character byte by byte; the unknown token where there are no tokens for its bytes."""
        raw = character.encode()
        if all(byte in self._byte_ids for byte in raw):
            return [self._byte_ids[byte] for byte in raw]
        return [] if self.tokenizer.unk_token_id is None else [self.tokenizer.unk_token_id]

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        return {
            token[0]: index
            for index, token in enumerate(self.token_bytes)
            if len(token) == 1 and index not in self.marker_ids
        }

    def encode_template(self, text: str, *, opens: bool = True) -> list[int]:
        """Tokens of text that we or the chat template wrote: control tokens count."""
        ids: list[int] = self._encode_template(text)
        if not opens and text[:1] != " " and self.decode_bytes(ids)[:1] == b" ":
            ahead, anchored = self._encode_template("\n"), self._encode_template("\n" + text)
            if anchored[: len(ahead)] == ahead:
                return anchored[len(ahead) :]
        return ids

    def _encode_template(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a token list; ids of padded embedding rows have none."""
        table = self.token_bytes
        return b"".join(table[index] if index < len(table) else b"" for index in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a token list; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def ends_inside_character(self, ids: Sequence[int]) -> bool:
        """Whether the last bytes are the beginning of a UTF-8 character that could still be completed."""
        tail = self.decode_bytes(ids[-MAX_UTF8_EXTRA:])[-MAX_UTF8_EXTRA:]
        return codecs.utf_8_decode(tail, "replace", False)[1] < len(tail)

    @cached_property
    def starts_with_space(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Per token: whether its text begins with white space."""
        return np.array([token[:1] in (b" ", b"\n", b"\t", b"\r") for token in self.token_bytes])

    @cached_property
    def ends_sentence(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Per token: whether its text ends with a sentence mark (the next token decides whether it was one)."""
        return np.array([token.endswith(_SENTENCE_END) for token in self.token_bytes])

    @cached_property
    def has_newline(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Per token: whether its text holds a line break."""
        return np.array([b"\n" in token for token in self.token_bytes])

    @cached_property
    def is_control(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Per token: whether it is a control token."""
        flags = np.zeros(len(self), dtype=bool)
        flags[[index for index in self.control_ids if index < len(self)]] = True
        return flags

    @cached_property
    def text_ids(self) -> dict[str, int]:
        """Tokens of text (control tokens left out) and their ids: what two vocabularies must agree on."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return {token: index for token, index in self.tokenizer.get_vocab().items() if token not in added}

    def first_difference(self, other: Vocabulary) -> str | None:
        """Where two vocabularies differ, in words; None if every text token has the same id in both."""
        if self.text_ids == other.text_ids:
            return None
        for token, index in sorted(self.text_ids.items(), key=lambda item: item[1]):
            there = other.text_ids.get(token)
            if there != index:
                place = "is not there" if there is None else f"has id {there}"
                return f"token {token!r} has id {index} in {self.source} and {place} in {other.source}"
        extra = min((index, token) for token, index in other.text_ids.items() if token not in self.text_ids)
        return f"token {extra[1]!r} has id {extra[0]} in {other.source} and is not there in {self.source}"


def continues_word(before: bytes, token: bytes) -> bool:
    """Whether a token goes on with the word that the text ends in.

    It does if the text ends in a letter, digit or mark (or inside a character) and the token begins with one (or with
    the rest of that character). Vocabularies mark words by a leading space, so this reads the bytes and not the
    token's kind. Where the token holds only the beginning of its first character, it goes on with the word if one of
    the characters that begin so would: a word is never cut for want of a byte.
    """
    if not before or not token:
        return False
    if token[0] & 0xC0 == 0x80:
        return True
    # Bytes that are no character, and are not made one by the token, are no part of a word either.
    if not _in_word(before[-4:].decode("utf-8", errors="replace")[-1]):
        return False
    first = codecs.utf_8_decode(token[:4], "replace", False)[0][:1]
    return _in_word(first) if first else _may_be_in_word(token)


def _in_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


@cache
def _may_be_in_word(beginning: bytes) -> bool:
    """Whether a character that begins with these bytes, fewer than it has, may be a letter, digit or mark."""
    length = 2 if beginning[0] < 0xE0 else 3 if beginning[0] < 0xF0 else 4
    number = beginning[0] & (0x7F >> length)
    for byte in beginning[1:]:
        number = number << 6 | byte & 0x3F
    bits = 6 * (length - len(beginning))
    return any(_in_word(chr(code)) for code in range(number << bits, min(number + 1 << bits, 0x110000)))


def _token_bytes(tokenizer: PreTrainedTokenizerBase, source: str) -> list[bytes]:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = _decoder_kinds(backend.get("decoder"))
    added = tokenizer.added_tokens_decoder
    size = max([*tokenizer.get_vocab().values(), *added, -1]) + 1
    table = [b""] * size
    byte_level = _byte_level_map() if "ByteLevel" in kinds else None
    if byte_level is None and not kinds & {"Metaspace", "ByteFallback", "Replace"}:
        raise ModelError(
            f"{source}: its tokenizer's decoder is {sorted(kinds) or 'missing'}; supported are byte-level BPE and "
            "sentencepiece-like tokenizers, whose tokens have fixed bytes"
        )
    for token, index in tokenizer.get_vocab().items():
        if index in added and (added[index].special or byte_level is not None):
            table[index] = b"" if added[index].special else token.encode()
        elif byte_level is not None:
            written = all(character in byte_level for character in token)
            table[index] = bytes(byte_level[character] for character in token) if written else token.encode()
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[index] = bytes([int(token[3:5], 16)])
        else:
            table[index] = token.replace("▁", " ").encode()
    for index in tokenizer.all_special_ids:
        table[index] = b""
    return table
