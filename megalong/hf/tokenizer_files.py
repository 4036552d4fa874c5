"""megalong's tokenizers as files that Transformers' AutoTokenizer reads, without code of ours.

Each gives the same ids as the tokenizer of the training, for any text, and gives every text back.
As is usual in Transformers, a text may name special tokens: `text + tokenizer.eos_token` ends with
the end of document. In training "<eod>" inside a text is just text, as here with
`split_special_tokens=True`. What is written is checked against the training tokenizer.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from megalong.checkpoint.content import HUGGINGFACE_FILES, SENTENCEPIECE_FILE
from megalong.data.tokenizers.huggingface_tokenizer import byte_level_alphabet
from megalong.data.tokenizers.tokenizer import (
    EOD_PIECE,
    MASK_PIECE,
    SENTENCEPIECE_SPACE,
    Tokenizer,
    build_tokenizer,
)
from megalong.utils.errors import UserError

if TYPE_CHECKING:
    from megalong.data.tokenizers.tiktoken_tokenizer import TiktokenTokenizer

_PROBES = (
    "",
    "The quick brown fox, 12345 times.  Two spaces, and a tab:\t\n\n",
    "def f(x):\n        return {'a': [x, 1.5e-3], \"b\": None}  # so\n\n\nclass A:\n\tpass\r\n",
    " a  b\tc\n\n    d\r\n e\u0301 \u00e9\u3042\U0001f600\u2581\u2047\0 ",
    "<eod> </s> <unk> <0x0A> <|endoftext|> \u2581\u2581x\t\t\t\t\t\t\t\t\t\t",
    "aaaaaaa bbbbbb ababababab ((((((( ======= ........... --------------------------------",
)


def export_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | None,
    folder: Path,
    max_length: int,
    prepend_bos: bool = False,
    with_mask: bool = False,
) -> Tokenizer:
    """Write the files of one of megalong's tokenizers; returns that tokenizer.

    max_length: tokens of a sequence of the training, which `truncation=True` cuts a text to.
    prepend_bos: whether the documents of the training began with its beginning-of-text token; then
    the texts that the written tokenizer is given do too, and else they do not.
    with_mask: with a mask token, as a masked-language model's is (`Tokenizer.with_mask`).
    Raises UserError where it cannot be expressed, and what `build_tokenizer` raises.
    """
    ours = build_tokenizer(tokenizer_type, tokenizer_model, with_mask)
    if tokenizer_type == "HuggingFaceTokenizer":
        for name in HUGGINGFACE_FILES:
            if (Path(tokenizer_model) / name).exists():
                shutil.copy(Path(tokenizer_model) / name, folder / name)
        settings = {}
    else:
        names, pieces = {}, tokenizer_type == "SentencePieceTokenizer"
        if pieces:
            backend, names = _sentencepiece_backend(tokenizer_model)
            # Beside tokenizer.json, for a way back without loss.
            shutil.copy(tokenizer_model, folder / SENTENCEPIECE_FILE)
        elif tokenizer_type == "TikTokenizer":
            backend = _tiktoken_backend(ours)
        else:
            backend = _bytes_backend()
        if with_mask:
            _add_mask(backend, strips_space=pieces)  # a word's piece has the space before it
            names["mask_token"] = backend.id_to_token(ours.mask)
        backend.save(str(folder / "tokenizer.json"))
        eod = backend.id_to_token(ours.eod)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": eod,
            **names,
            "eos_token": eod,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if ours.bos is not None:
            settings["bos_token"] = backend.id_to_token(ours.bos)
    _set(folder, settings | {"split_special_tokens": False, "model_max_length": max_length})
    _begin_texts(folder, ours.bos if prepend_bos else None)
    check_tokenizer(ours, folder, with_mask)
    return ours


def _set(folder: Path, changes: dict[str, Any]) -> None:
    """Settings of the tokenizer there that are otherwise now, or new."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | changes, indent=2, ensure_ascii=False) + "\n")


def _begin_texts(folder: Path, bos: int | None) -> None:
    """Make the tokenizer there put this token before every text, or none."""

    def is_so() -> bool:
        return begins_with_bos(open_tokenizer(folder)) == (bos is not None)

    if is_so():
        return
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = None
    if bos is not None:
        token = Backend.from_file(str(path)).id_to_token(bos)
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        begin = {"SpecialToken": {"id": token, "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, begin, second],
            "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
        }
    path.write_text(json.dumps(content, ensure_ascii=False))
    _set(folder, {"add_bos_token": bos is not None})
    if not is_so():
        begin = "does not begin" if bos is not None else "begins"
        raise UserError(
            f"--tokenizer-model: in Transformers this tokenizer {begin} texts with its"
            " beginning-of-text token, other than the documents of the training, and this cannot be"
            " changed: export without it (--no-tokenizer) and add the tokenizer files by hand"
        )


def check_tokenizer(ours: Tokenizer, folder: Path, with_mask: bool = False) -> None:
    """Raise UserError where AutoTokenizer does not read the files of a folder as our tokenizer."""
    theirs = open_tokenizer(folder)

    def check(right: bool, what: str) -> None:
        if not right:
            raise UserError(
                f"--tokenizer-model: {what}. Export without the tokenizer (--no-tokenizer) and add"
                " its files by hand"
            )

    lossless = all(ours.decode(ours.encode(text)) == text for text in _PROBES)
    for text in _PROBES:
        if not lossless:  # one that adds a prefix adds another one after each stand-in
            text = text.replace(SENTENCEPIECE_SPACE, "")
        what = "this tokenizer cannot be expressed as one of Transformers"
        same = plain_ids(theirs, text) == ours.encode(text)
        check(same, f"{what}: {text!r} is cut into other tokens")
    ended = theirs.encode("a" + theirs.eos_token, add_special_tokens=False)
    what = f"in Transformers {theirs.eos_token!r} is not taken for the token that ends a document"
    check(ended == [*ours.encode("a"), ours.eod], what)
    what = f"in Transformers the mask token has id {theirs.mask_token_id}, here {ours.mask}"
    check(not with_mask or theirs.mask_token_id == ours.mask, what)


def _add_mask(backend, strips_space: bool) -> None:
    """Give a tokenizer a mask token, behind all others, if it has none. strips_space: the space
    before it in a text is a part of what is masked."""
    backend.add_special_tokens([AddedToken(MASK_PIECE, lstrip=strips_space, normalized=False)])


def _bytes_backend():
    """Byte-level BPE without merges: the 256 bytes in their own order, then the end of document."""
    backend = Backend(models.BPE(vocab=byte_level_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOD_PIECE, normalized=False)])
    return backend


def _tiktoken_backend(ours: TiktokenTokenizer):
    """An encoding of tiktoken as byte-level BPE: two neighbours merge wherever together they have a
    rank, and a piece of the text that has one is never cut."""
    spelled = {byte: character for character, byte in byte_level_alphabet().items()}
    vocabulary = {"".join(spelled[byte] for byte in piece): i for piece, i in ours.ranks.items()}
    merges = _merges({piece: -i for piece, i in vocabulary.items()})
    vocabulary |= ours.special_tokens  # with their ids, whatever these leave out
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    # The other library's expressions have no possessive counts, which only save time here, and "$"
    # is the end of a line.
    pattern = re.sub(r"([*+?}])\+", r"\1", ours.pattern)
    pattern = re.sub(r"(?<!\\)\$(?=\||$)", r"\\z", pattern)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ours.special_tokens])
    return backend


def _sentencepiece_backend(model_file: str):
    """A SentencePiece model as a fast tokenizer, and what it has of "unk_token" and "pad_token".

    Where bytes stand for what has no piece, no text has the unknown token, which can then be that
    of padding: who fine-tunes learns nothing from padding, but has to from the end of document.

    Spaces stay spaces: pieces are spelled with them instead of SentencePiece's stand-in, which in
    a text is then one unknown character more, made of bytes, as in the training tokenizer.
    """
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    proto = protobuf.ModelProto()
    proto.ParseFromString(Path(model_file).read_bytes())
    kinds = protobuf.ModelProto.SentencePiece
    pieces = [piece.piece.replace(SENTENCEPIECE_SPACE, " ") for piece in proto.pieces]
    kind_of = [piece.type for piece in proto.pieces]
    unknown = kind_of.index(kinds.UNKNOWN)
    byte_fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == protobuf.TrainerSpec.BPE:
        mergeable = {
            piece: proto.pieces[i].score
            for i, piece in enumerate(pieces)
            if kind_of[i] == kinds.NORMAL
        }
        model = models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=_merges(mergeable),
            unk_token=pieces[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    elif proto.trainer_spec.model_type == protobuf.TrainerSpec.UNIGRAM:
        # What is not a piece of text must never be found in one.
        scores = [
            piece.score if kind in (kinds.NORMAL, kinds.USER_DEFINED) else -1e6
            for piece, kind in zip(proto.pieces, kind_of, strict=True)
        ]
        model = models.Unigram(
            list(zip(pieces, scores, strict=True)), unk_id=unknown, byte_fallback=byte_fallback
        )
    else:
        raise UserError(
            f"--tokenizer-model {model_file}: a SentencePiece model of words or characters has no"
            " fast tokenizer; export without it (--no-tokenizer)"
        )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for add, of_kinds in (
        (backend.add_special_tokens, (kinds.CONTROL, kinds.UNKNOWN)),
        (backend.add_tokens, (kinds.USER_DEFINED,)),
    ):
        found = (piece for piece, kind in zip(pieces, kind_of, strict=True) if kind in of_kinds)
        add([AddedToken(piece, normalized=False) for piece in found])
    names = {"unk_token": pieces[unknown]}
    if proto.trainer_spec.pad_id >= 0:
        names["pad_token"] = pieces[proto.trainer_spec.pad_id]
    elif byte_fallback:
        names["pad_token"] = pieces[unknown]
    return backend, names


def _normalizers(spec) -> list:
    """SentencePiece's normalization, on spaces that stay spaces."""
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return steps


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model: every way to make a piece of two others, the piece
    of the best score first. scores: of the pieces that merging can make."""
    merges = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [pair for pair in halves if pair[0] in scores and pair[1] in scores]
    return merges


def open_tokenizer(folder: Path):
    """The tokenizer of a folder of Transformers; downloads nothing, and runs no code out of it."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def plain_ids(tokenizer, text: str) -> list[int]:
    """The ids of a text by a tokenizer of Transformers, without any that the text only names."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def begins_with_bos(tokenizer) -> bool:
    """Whether a tokenizer of Transformers begins every text with a token for that, as the models of
    those that do expect."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id


def tokenizer_of_export(folder: Path) -> tuple[str, str | None]:
    """Which of megalong's tokenizers (type and model) the files of an exported model are."""
    if (folder / SENTENCEPIECE_FILE).exists():
        return "SentencePieceTokenizer", str(folder / SENTENCEPIECE_FILE)
    tokenizer_json = folder / "tokenizer.json"
    if not tokenizer_json.exists():
        raise UserError(
            f"{folder} has no tokenizer.json: give --tokenizer-type and --tokenizer-model"
        )
    found, bytes_ = Backend.from_file(str(tokenizer_json)).to_str(), _bytes_backend()
    plain = bytes_.to_str()
    _add_mask(bytes_, strips_space=False)
    if found in (plain, bytes_.to_str()):
        return "ByteTokenizer", None
    return "HuggingFaceTokenizer", str(folder)
