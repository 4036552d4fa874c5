"""Tokenizers that are a SentencePiece model file, as tools/train_tokenizer.py writes it."""

from __future__ import annotations

import heapq
import io
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from megalong.data.tokenizers.tokenizer import EOD_PIECE, MASK_PIECE, SENTENCEPIECE_SPACE, Tokenizer
from megalong.utils.errors import UserError

_CUT_CHARACTERS = 4096
_WORD_END = re.compile("[^ ] ")
_WORD_END_BYTES = re.compile(b"[^ ] ")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file, as tools/train_tokenizer.py writes it."""

    def __init__(self, model_file: str) -> None:
        import sentencepiece

        if os.path.isdir(model_file):
            raise UserError(
                f"--tokenizer-model {model_file}: a folder, and a SentencePiece model is a file:"
                " for a tokenizer of Transformers set --tokenizer-type HuggingFaceTokenizer"
            )
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--tokenizer-model {model_file}: not a SentencePiece model ({error})"
            ) from error
        self._model = model
        eod = model.eos_id()
        if eod < 0:
            eod = model.piece_to_id(EOD_PIECE)
            if model.is_unknown(eod):
                raise UserError(
                    f"--tokenizer-model {model_file}: the model has neither an end-of-sentence "
                    f"token nor a piece {EOD_PIECE} to end documents with"
                )
        bos = model.bos_id() if model.bos_id() >= 0 else None
        mask = model.piece_to_id(MASK_PIECE)
        super().__init__(
            [self._piece_bytes(i) for i in range(model.get_piece_size())],
            eod,
            bos,
            mask if model.is_control(mask) else None,
        )
        self._mask_piece = None if model.is_unknown(mask) else mask
        # The library takes the space's stand-in for a space, so that this one character is
        # spelled with byte tokens instead (None: the model has none).
        ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SENTENCEPIECE_SPACE.encode()]
        self.stand_in_ids = ids if all(map(model.is_byte, ids)) else None
        # A model whose pieces never go on after a word and its space, and that leaves spaces as
        # they are, gives the same ids for a text cut between words.
        spaces = b"".join(self.pieces[i] for i in model.encode(" a  b "))
        self._may_cut = spaces == b" a  b " and not any(map(_WORD_END_BYTES.search, self.pieces))

    def with_mask(self) -> Tokenizer:
        """As of any tokenizer, but that a piece `<mask>`, a user-defined one say, is the mask token
        of the copy, and stands for no text there. Texts with this word still have its id."""
        if self.mask is not None or self._mask_piece is None:
            return super().with_mask()
        pieces = list(self.pieces)
        pieces[self._mask_piece] = b""
        return self.masking_with(self._mask_piece, pieces)

    def encode(self, text: str) -> list[int]:
        return [i for part in self._parts(text) for i in part]

    def encode_array(self, text: str) -> np.ndarray:
        # A stretch at a time: a Python list of a long document's ids takes ten times its array.
        parts = [np.array(part, dtype=np.int32) for part in self._parts(text)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    @property
    def special_names(self) -> list[str]:
        pieces = map(self._model.id_to_piece, range(self.vocab_size))
        return [piece for i, piece in enumerate(pieces) if not self.pieces[i]]

    def fast_encoder(self) -> Callable[[str], np.ndarray]:
        from megalong.data.tokenizers.backend import of_sentencepiece

        return of_sentencepiece(self.model_bytes, self.stand_in_ids)

    @property
    def model_bytes(self) -> bytes:
        """The content of the model's file."""
        return self._model.serialized_model_proto()

    def _parts(self, text: str) -> Iterator[list[int]]:
        text.encode("utf-8")  # a UnicodeEncodeError that says where, unlike the library's
        if SENTENCEPIECE_SPACE not in text or self.stand_in_ids is None:
            yield from self._encode(text)
            return
        first, *rest = text.split(SENTENCEPIECE_SPACE)
        yield from self._encode(first)
        for part in rest:
            yield self.stand_in_ids
            yield from self._encode(part)

    def _encode(self, text: str) -> Iterator[list[int]]:
        """The library's time grows faster than the text, so that long documents are cut."""
        if len(text) <= _CUT_CHARACTERS or not self._may_cut:
            yield self._model.encode(text)
            return
        start = 0
        while start < len(text):
            end = _WORD_END.search(text, start + _CUT_CHARACTERS)
            stop = end.start() + 1 if end else len(text)
            yield self._model.encode(text[start:stop])
            start = stop

    def _joins(self) -> bytes:
        scores = [self._model.get_score(i) for i in range(self._model.get_piece_size())]
        return np.array(scores, dtype="<f4").tobytes()

    def _piece_bytes(self, i: int) -> bytes:
        model = self._model
        if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
            return b""
        piece = model.id_to_piece(i)
        if model.is_byte(i):
            return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
        return piece.replace(SENTENCEPIECE_SPACE, " ").encode("utf-8")


CHUNK_CHARACTERS = 4096
# The trainer uses the tab itself to mark boundaries and never learns a piece with it.
TAB_PIECES = ["\t" * count for count in range(1, 9)]


def train_sentencepiece(
    chunks: list[str],
    vocab_size: int,
    *,
    character_coverage: float = 0.9995,
    verbose: bool = False,
) -> bytes:
    """Trains a BPE model of exactly `vocab_size` ids and returns the content of its .model file.

    chunks: stretches of text, of sample_chunks() or any others.
    Ids: 0 unknown (never produced), 1 end of document, runs of tabs, the 256 bytes, then merges.
    Deterministic. Raises UserError where the text is too little, or its characters too many, for
    the vocabulary size.
    """
    import sentencepiece

    if not any(chunks):
        raise UserError("--input: no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # Letters and punctuation may merge ("(self", ".append("): 8% fewer tokens on code.
            split_by_unicode_script=False,
            split_digits=True,
            user_defined_symbols=TAB_PIECES,
            unk_id=0,
            eos_id=1,
            eos_piece=EOD_PIECE,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 30,  # longer ones would be dropped silently
            num_threads=4,  # a constant, since the model file records it
            minloglevel=0 if verbose else 2,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def sample_chunks(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """Cuts texts into chunks of whole lines; where they exceed max_bytes, keeps a uniform sample.

    Every chunk draws a random key, and those with the smallest keys stay: the sample is uniform
    without knowing the total beforehand, and memory is bounded by max_bytes. In input order.
    """
    draw = random.Random(seed).random
    kept: list[tuple[float, int, str]] = []  # a heap with the largest key on top
    total = 0
    for index, chunk in enumerate(chunk for text in texts for chunk in _chunks(text)):
        heapq.heappush(kept, (-draw(), index, chunk))
        total += len(chunk.encode("utf-8"))
        while total > max_bytes and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2].encode("utf-8"))
    return [chunk for _, _, chunk in sorted(kept, key=lambda entry: entry[1])]


def _chunks(text: str) -> Iterator[str]:
    """Whole lines up to CHUNK_CHARACTERS at a time; a longer line alone is cut in pieces."""
    start = 0
    while start < len(text):
        stop = start + CHUNK_CHARACTERS
        if stop < len(text):
            line_end = text.rfind("\n", start, stop) + 1
            stop = line_end or stop
        # The trainer warns about every NUL and cannot learn it; the byte fallback covers it.
        yield text[start:stop].replace("\0", "")
        start = stop


def _explain(message: str, vocab_size: int) -> str:
    limit = re.search(r"set it to a value <= (\d+)", message)
    if limit:
        return (
            f"--vocab-size {vocab_size}: the text supports at most {limit[1]} (more text, or a "
            "smaller vocabulary)"
        )
    required = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if required:
        return (
            f"--vocab-size {vocab_size}: bytes and single characters alone need {required[1]} "
            "(a larger vocabulary, or a smaller --character-coverage)"
        )
    reason = message.rpartition("] ")[2].strip() or message  # behind the place in its source
    return f"--vocab-size {vocab_size}: SentencePiece could not train: {reason}"
