"""Training a SentencePiece BPE model that is lossless and knows source code.

What makes it lossless: bytes as a fallback, and nothing normalized, stripped or prefixed.
What makes it fit code: it is trained on whole stretches of text instead of single lines, so that
line ends and indentation are merged like anything else ("):\n", "\n\nclass", eight spaces).
"""

import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator

from megalong.data.tokenizers.tokenizer import EOD_PIECE
from megalong.utils.errors import UserError

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
