"""Tokenizers that are a folder of Transformers, with a tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megalong.data.tokenizers.tokenizer import SENTENCEPIECE_SPACE, Tokenizer
from megalong.utils.errors import UserError

# Ways to split a text before it is merged (GPT-2's, GPT-4's and Llama 3's, Qwen 2's, GPT-4o's) for
# which a text may be cut behind the end of a line: where neither line has a space there, nor the
# next one a "/" (GPT-4o's), none of them looks across, or takes characters of both sides.
_CUT_CHARACTERS = 1 << 16
_LINE_END = re.compile(r"(?<=\S)\n(?=[!-.0-~])")
_WORD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUT_PATTERNS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        *(
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}"
            for digits in (r"\p{N}{1,3}", r"\p{N}")
        ),
        rf"[^\r\n\p{{L}}\p{{N}}]?{_WORD}*{_SMALL}+{_CONTRACTION}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_WORD}+{_SMALL}*{_CONTRACTION}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}",
    }
)


class HuggingFaceTokenizer(Tokenizer):
    """A local folder that Transformers' AutoTokenizer loads as a fast tokenizer."""

    def __init__(self, folder: str) -> None:
        if Path(folder).is_file() and Path(folder).suffix == ".model":
            raise UserError(
                f"--tokenizer-model {folder}: a file of SentencePiece, not a folder of"
                " Transformers: set --tokenizer-type SentencePieceTokenizer"
            )
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise UserError(
                "--tokenizer-type HuggingFaceTokenizer needs the transformers package: "
                "pip install transformers"
            ) from error
        try:
            # Local files only: a job on a cluster must not depend on a download.
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UserError(f"--tokenizer-model {folder}: {error}") from error
        if not tokenizer.is_fast:
            raise UserError(f"--tokenizer-model {folder}: not a fast tokenizer (tokenizer.json)")
        if tokenizer.eos_token_id is None:
            raise UserError(f"--tokenizer-model {folder}: the tokenizer has no eos_token")
        self.library = tokenizer.backend_tokenizer
        self.library.encode_special_tokens = True  # "<eos>" inside a text is just text
        self.library.no_truncation()
        self.library.no_padding()
        self._may_cut = _may_cut(json.loads(self.library.to_str()))
        pieces = _huggingface_pieces(self.library, text_ids(tokenizer), folder)
        ids = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id
        super().__init__(pieces, *ids)
        self._folder = str(folder)

    def with_mask(self) -> Tokenizer:
        if self.mask is None:
            raise UserError(
                f"--objective mlm: the tokenizer in {self._folder} has no mask_token: add one"
                " with Transformers' add_special_tokens, save it, and preprocess the text again"
            )
        return self

    def __setstate__(self, state: dict) -> None:
        """A copy in another process needs the package tokenizers only."""
        self.__dict__ |= state
        self.library.encode_special_tokens = True  # which the library does not keep in a pickle

    def encode(self, text: str) -> list[int]:
        return [i for part in self._parts(text) for i in part]

    def encode_array(self, text: str) -> np.ndarray:
        parts = [np.array(part, dtype=np.int32) for part in self._parts(text)]
        return np.concatenate(parts)

    def _parts(self, text: str) -> Iterator[list[int]]:
        """The library takes a hundred bytes of memory for each byte of a text, so that long
        documents are cut where they can be."""
        text.encode("utf-8")
        start = 0
        while self._may_cut and start + _CUT_CHARACTERS < len(text):
            end = _LINE_END.search(text, start + _CUT_CHARACTERS)
            if end is None:
                break
            yield self._encode(text[start : end.end()])
            start = end.end()
        yield self._encode(text[start:])

    def _encode(self, text: str) -> list[int]:
        # Of the ways to the same ids the quickest: without the place in the text of each.
        [encoding] = self.library.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def _joins(self) -> bytes:
        # Earlier versions of the library write a merge as "a b", later ones as ["a", "b"].
        model = json.loads(self.library.to_str())["model"]
        merges = model.get("merges", ())
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        scores = [piece[1] for piece in model["vocab"]] if isinstance(model["vocab"], list) else []
        return json.dumps([pairs, scores]).encode()

    @property
    def special_names(self) -> list[str]:
        return [token.content for token in self.library.get_added_tokens_decoder().values()]

    def fast_encoder(self) -> Callable[[str], np.ndarray]:
        from megalong.data.tokenizers.backend import of_tokenizer_json

        return of_tokenizer_json(self.library.to_str())


def _may_cut(described: dict) -> bool:
    """Whether a text cut at _LINE_END has the same ids, by a tokenizer.json's content."""
    steps = described["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return False
    if last["use_regex"]:
        patterns_known = len(steps) == 1  # it is GPT-2's
    else:
        patterns_known = len(steps) == 2 and (
            steps[0].get("type") == "Split"
            and steps[0]["pattern"].get("Regex") in _CUT_PATTERNS
            and steps[0]["behavior"] == "Isolated"
            and not steps[0]["invert"]
        )
    normalizer = (described["normalizer"] or {}).get("type")
    taken_from_text = [token for token in described["added_tokens"] if not token["special"]]
    return (
        patterns_known
        and normalizer in (None, "NFC")
        and described["model"]["type"] == "BPE"
        and not any(
            "\n" in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
            for token in taken_from_text
        )
    )


def text_ids(tokenizer) -> list[int]:
    """The ids of any tokenizer of Transformers that stand for text, in order: ids that it leaves
    out are none, nor those that it calls special, or that its settings name."""
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | {*tokenizer.all_special_ids}
    return sorted({i for piece, i in tokenizer.get_vocab().items() if piece} - special)


def _huggingface_pieces(backend, text: list[int], folder: str) -> list[bytes]:
    """The bytes of every id of a fast tokenizer, from the two ways such vocabularies spell bytes:
    GPT-2's alphabet of 256 printable characters, or SentencePiece's "<0x0A>", with or without its
    "\u2581" for a space. text: the ids that stand for some."""
    decoder = str(json.loads(backend.to_str())["decoder"])
    if "ByteLevel" in decoder:
        spell = _byte_level_bytes
    elif SENTENCEPIECE_SPACE in decoder:
        spell = _sentencepiece_bytes
    elif "ByteFallback" in decoder:
        spell = _byte_fallback_bytes
    else:
        raise UserError(
            f"--tokenizer-model {folder}: how its tokens spell bytes is unknown (neither "
            "byte-level nor SentencePiece-like), so that bits per byte cannot be computed"
        )
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    pieces, of_text = [b""] * (max(vocabulary.values()) + 1), {*text}
    for piece, i in vocabulary.items():
        if i in of_text:  # an added one is plain text, whatever the alphabet of the others
            pieces[i] = piece.encode("utf-8") if i in added else spell(piece)
    return pieces


def _byte_level_bytes(piece: str) -> bytes:
    return bytes(_BYTE_OF_CHARACTER[character] for character in piece)


def _sentencepiece_bytes(piece: str) -> bytes:
    return _byte_fallback_bytes(piece.replace(SENTENCEPIECE_SPACE, " "))


def _byte_fallback_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.encode("utf-8")


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the other
    bytes, in order, for the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHARACTER = byte_level_alphabet()
