"""Open all that a run reads before any process group exists: bad input ends the run at once."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megalong.config import Config
from megalong.data.batches import (
    ADD_A_ROW,
    IGNORE_INDEX,
    NO_BORDERS,
    DocumentRules,
    Masking,
    evaluation_batches,
    num_evaluation_batches,
)
from megalong.data.blend import Blend, Source
from megalong.data.document_order import IndexCache
from megalong.data.document_samples import DocumentSamples
from megalong.data.indexed import IndexedDocuments, is_sharded, pair_prefixes
from megalong.data.sources import SourceSpec, shares_of
from megalong.data.stream import TokenStream, check_tokenizer, split_documents
from megalong.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megalong.evals.trials import Trials, language_of
from megalong.utils.errors import UserError, counted, did_you_mean, system_errors_of


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and its tokens as the beginning of a document."""

    text: str
    tokens: tuple[int, ...]


def prompts_of(config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    """Read what `--sample-prompts` has. Raises UserError, also for a prompt that is too long."""
    samples, seq_length = config.samples, config.model.seq_length
    if samples.sample_prompts is None:
        return []
    first = tokenizer.bos if config.data.prepend_bos else tokenizer.eod
    assert first is not None and samples.sample_tokens is not None
    found = []
    for text in _texts(samples.sample_prompts):
        try:
            tokens = (first, *tokenizer.encode(text))
        except UnicodeEncodeError:
            raise UserError(f"--sample-prompts {text!r}: not a text of UTF-8") from None
        if len(tokens) + samples.sample_tokens > seq_length:
            raise UserError(
                f"--sample-prompts {text[:20]!r}: {len(tokens)} tokens, and --sample-tokens"
                f" {samples.sample_tokens} more, are longer than --seq-length {seq_length}: shorten"
                " one of the two"
            )
        found.append(Prompt(text, tokens))
    return found


def _texts(given: Iterable[str]) -> Iterable[str]:
    for text in given:
        if not text.endswith(".txt"):
            yield text
            continue
        try:
            with system_errors_of("--sample-prompts", text):
                lines = [line for line in Path(text).read_text("utf-8").splitlines() if line]
        except UnicodeDecodeError as error:
            raise UserError(f"--sample-prompts {text}: not UTF-8 (byte {error.start})") from None
        if not lines:
            raise UserError(f"--sample-prompts {text}: there is no text in it")
        yield from lines


def trials_of(config: Config, tokenizer: Tokenizer) -> list[Trials]:
    """Make what `--eval-tasks` asks for: each task at each length. Raises UserError."""
    tasks = config.tasks
    if not tasks.eval_tasks:
        return []
    first = tokenizer.bos if config.data.prepend_bos else tokenizer.eod
    assert first is not None
    style = tasks.eval_task_style
    try:
        language = language_of(style, tokenizer.encode, tokenizer.text_ids, first)
    except UserError as error:
        raise UserError(f"--eval-task-style {style}: {error}") from None
    found = []
    for task in tasks.eval_tasks:
        for length in tasks.eval_task_lengths:
            trials = Trials(task, language, length, tasks.eval_task_samples)
            trials.check("--eval-tasks", "--eval-task-lengths")
            found.append(trials)
    return found


FILES_OF_A_PAIR, OTHER_FILES = 4, 256  # open at a time, of a .bin/.idx pair and of all else


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    train: as it is at the beginning of a run. held_out: by "validation" and "test", or by
    "validation/NAME" where there are several or they were named. oddities: a line each.
    token_bytes: UTF-8 bytes that each token id stands for, int32 (vocab size,).
    masking: None where next tokens are predicted. documents: what their borders mean.
    """

    tokenizer: Tokenizer
    token_bytes: np.ndarray
    train: Blend
    held_out: dict[str, TokenStream]
    oddities: list[str]
    masking: Masking | None = None
    documents: DocumentRules = NO_BORDERS
    tasks: Sequence[Trials] = ()
    prompts: Sequence[Prompt] = ()


def check_same_masks(data: RunData) -> None:
    """Raise UserError on every rank where they find different loss masks beside the data: whether
    there are any decides what they count together."""
    held_out = [name for name, stream in data.held_out.items() if stream.masks_loss]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, [*data.train.masked, *held_out])
    words = [f"of {', '.join(masked)}" if masked else "of none" for masked in found]
    for rank, theirs in enumerate(words):
        if theirs != words[0]:
            raise UserError(
                f"rank {rank} finds loss masks (PREFIX.loss) {theirs}, and rank 0 {words[0]}: they"
                " have to lie beside the data on all nodes"
            )


def open_run_data(config: Config) -> RunData:
    """Open everything that `config.data` names. Raises UserError naming the flag or the file."""
    data = config.data
    tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    of_texts, masking = tokenizer, None
    if not config.training.causal:
        tokenizer = tokenizer.with_mask()
        masking = Masking.of(tokenizer, config.training.mask_rate)
        if of_texts.vocab_size == config.model.padded_vocab_size < tokenizer.vocab_size:
            raise UserError(f"--padded-vocab-size {of_texts.vocab_size}: {ADD_A_ROW}")
    config.model.vocabulary_rows(tokenizer.vocab_size)  # an error, where they are too few
    _allow_open_files(config)
    opened = _Opened(config, of_texts)
    train, divided, oddities = _open_training(config, opened)
    held_out = divided
    for part, specs in data.held_out_sources().items():
        for spec in specs:
            documents = opened.documents(spec)
            label = f"{part}/{spec.name}" if spec.named or len(specs) > 1 else part
            held_out[label] = opened.stream(documents, range(documents.num_documents), label, False)
    rules = DocumentRules(
        isolated=data.isolates_documents,
        unpredicted_from=tokenizer.eod if data.eod_mask_loss else None,
    )
    for label, part in held_out.items():  # too small to evaluate on: found now, not at the end
        if masking is None:
            num_evaluation_batches(part, micro_batch_size=1, data_parallel_size=1)
        if masking is not None or part.masks_loss:
            _check_predictions(label, part, masking, rules, config)
    _check_best(held_out, config)
    return RunData(
        tokenizer=tokenizer,
        token_bytes=tokenizer.token_bytes(),
        train=train,
        held_out=held_out,
        oddities=[*oddities, *_oddities(train, config, tokenizer), *_seen_in_training(config)],
        masking=masking,
        documents=rules,
        tasks=trials_of(config, tokenizer),
        prompts=prompts_of(config, tokenizer),
    )


def describe_training(blend: Blend, config: Config) -> Iterator[str]:
    """Describe the training data in lines, by the lengths of all documents."""
    mode, upsampling = config.data.sample_mode, config.data.upsampling
    if upsampling is not None:
        for name, part in zip(blend.sources, blend.parts, strict=True):
            of = f"source {name}: " if len(blend.parts) > 1 else ""
            yield of + upsampling.describe(part.lengths)
    if blend.masks_loss:
        yield (
            f"loss masks: only some tokens of {', '.join(blend.masked)} are predicted"
            " (tools/inspect_dataset.py says how many)"
        )
    yield f"--sample-mode {mode}: {blend.context_report().in_words()}"


def validation_sets(held_out: Iterable[str]) -> list[str]:
    """Those of the held-out sets that the training is watched by."""
    return [label for label in held_out if label.split("/")[0] == "validation"]


def best_set(held_out: Iterable[str], config: Config) -> str:
    """The one that `--keep-best` goes by."""
    name = config.run.keep_best_by
    return validation_sets(held_out)[0] if name is None else f"validation/{name}"


class _Opened:
    """Opens documents, and makes streams of them, for one run."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        cache = config.data.data_cache_path
        self._cache = None if cache is None else IndexCache(cache)
        self._made_with: dict[int, str] = {}

    def documents(self, spec: SourceSpec) -> IndexedDocuments:
        """The documents of a source, if they are of the run's tokenizer. Raises UserError."""
        data = self._config.data
        with system_errors_of(spec.place.removesuffix(f" {spec.path}"), spec.path):
            documents = IndexedDocuments(spec.path, spec.place)
        made_with = documents.vocab_size
        for ids, other in self._made_with.items():
            if made_with not in (None, ids):
                raise UserError(
                    f"{spec.place} was made with a tokenizer of {made_with} ids, and {other} with"
                    f" one of {ids}: what is trained on together has to be of one tokenizer"
                )
        check_tokenizer(documents, self._tokenizer, data.tokenizer_flag, spec.place)
        if made_with is not None:
            self._made_with.setdefault(made_with, spec.path)
        if documents.prepend_bos not in (None, data.prepend_bos):
            made, flag = ("with", "") if documents.prepend_bos else ("without", "no-")
            raise UserError(
                f"{spec.place} was made {made} --prepend-bos: set --{flag}prepend-bos, or"
                " preprocess the text again"
            )
        if documents.masks_loss and not self._config.training.causal:
            raise UserError(
                f"{spec.place}: its loss mask says which next tokens are predicted, and --objective"
                " mlm draws what is: give data without one, made without --prompt-key or --loss"
                " answers"
            )
        return documents

    def samples(
        self, documents: IndexedDocuments, part: range, name: str, salt: int = 0
    ) -> TokenStream | DocumentSamples:
        """A range of them to train on. Raises UserError where it holds nothing."""
        stream = self.stream(documents, part, name, True, salt)
        return DocumentSamples(stream) if self._config.data.sample_mode == "document" else stream

    def stream(
        self, documents: IndexedDocuments, part: range, name: str, shuffle: bool, salt: int = 0
    ) -> TokenStream:
        """A range of them as a stream. Raises UserError where it holds nothing."""
        config = self._config
        upsampling, cache = (config.data.upsampling, self._cache) if shuffle else (None, None)
        return TokenStream(
            documents, part, config.model.seq_length, config.training.seed, shuffle=shuffle,
            upsampling=upsampling, vocab_size=self._tokenizer.vocab_size, name=name, salt=salt,
            cache=cache,
        )  # fmt: skip


def _open_training(
    config: Config, opened: _Opened
) -> tuple[Blend, dict[str, TokenStream], list[str]]:
    """The blend to train on, what `--split` leaves of its sources to evaluate on, and oddities."""
    data, specs = config.data, config.data.training_sources()
    several = len(specs) > 1
    makers, held_out, oddities = [], {}, []
    for spec in specs:
        documents = opened.documents(spec)
        parts = [range(documents.num_documents)]
        if data.divided:
            assert data.split is not None
            parts = list(split_documents(documents.num_documents, data.split))
        if not parts[0]:
            of = f" of {spec.path}" if several else ""
            raise UserError(f"--split {data.split} leaves no document{of} for training")
        makers.append(partial(opened.samples, documents, parts[0], spec.name))
        for label, part in zip(("validation", "test"), parts[1:], strict=False):
            label = f"{label}/{spec.name}" if several else label
            tokens = int(documents.lengths[part.start : part.stop].sum())
            if part and (tokens > 1 or not several):
                held_out[label] = opened.stream(documents, part, label, False)
    epoch_tokens = [make().tokens_per_epoch for make in makers]  # an error, where there are none
    shares = shares_of(specs, epoch_tokens)
    sources = [
        Source(spec.name, share, make)
        for spec, share, make in zip(specs, shares, makers, strict=True)
    ]
    # By kind: all that is watched, then all that is tested in the end.
    held_out = dict(sorted(held_out.items(), key=lambda item: item[0].startswith("test")))
    blend = Blend(sources)
    if several:
        oddities = _amounts(specs, blend, config)
    return blend, held_out, oddities


def _amounts(specs: list[SourceSpec], blend: Blend, config: Config) -> list[str]:
    """Say how much of the sources was asked for, where the run takes as much as it does anyway."""
    if any(spec.unit == "weight" for spec in specs):
        return []
    training = config.training
    iterations = training.train_iters - training.lr_begin_iters  # of the stage
    planned = iterations * training.global_batch_size * config.model.seq_length
    wanted = sum(
        spec.amount * (blend.epoch_tokens[spec.name] if spec.unit == "epochs" else 1)
        for spec in specs
    )
    return [
        "the shares of the sources are the ratio of their tokens, whatever --train-iters is:"
        f" {int(wanted):,} tokens were asked for, the run takes {planned:,}"
    ]


def _allow_open_files(config: Config) -> None:
    """Raise this process's limit of open files, if its sources need that. Raises UserError."""
    paths = [config.data.training_sources(), *config.data.held_out_sources().values()]
    needed = FILES_OF_A_PAIR * sum(map(len, paths)) + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"so many sources need {needed:,} open files, and the limit (ulimit -Hn) is {hard:,}:"
            " raise it, or put the pairs of several sources into one folder"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _check_best(held_out: dict[str, TokenStream], config: Config) -> None:
    """Raise UserError where there is nothing for `--keep-best` to go by."""
    if not config.run.keep_best:
        return
    sets, data = validation_sets(held_out), config.data
    if not sets:
        why = f"--split {data.split} leaves no document for validation"
        change = "change --split"
        if not data.divided:
            why, change = "there is no --valid-data-path", "set that"
        raise UserError(
            f"--keep-best goes by the validation loss, and {why}: leave it out, or {change}"
        )
    if best_set(held_out, config) not in sets:
        names = [label.partition("/")[2] for label in sets if "/" in label]
        known = f"there are {', '.join(names)}" if names else "there is one, without a name"
        raise UserError(
            f"--keep-best-by {config.run.keep_best_by}: no such validation set"
            f"{did_you_mean(config.run.keep_best_by, names) or f'; {known}'}"
        )


def _check_predictions(
    label: str, part: TokenStream, masking: Masking | None, rules: DocumentRules, config: Config
) -> None:
    """Raise UserError where an evaluation would have nothing to predict."""
    size = config.run.eval_iters * config.training.global_batch_size
    rank = {"micro_batch_size": 1, "data_parallel_rank": 0, "data_parallel_size": 1}
    batches = evaluation_batches(
        part, num_samples=size or None, masking=masking, documents=rules, **rank
    )
    if any((batch["labels"] != IGNORE_INDEX).any() for batch in batches):
        return
    split = f" of --split {config.data.split}" if config.data.divided else ""
    of = f"of the {part.tokens_per_epoch:,} tokens{split} for {label} none would be"
    what = f"{part.documents.prefix}: {of} predicted in an evaluation, by its loss mask"
    raises = "--eval-iters"
    if masking is not None:
        what = f"--mask-rate {config.training.mask_rate:g}: {of} masked in an evaluation"
        raises = "--mask-rate or --eval-iters"
    raise UserError(f"{what}: give it more, or raise {raises}")


def _oddities(train: Blend, config: Config, tokenizer: Tokenizer) -> list[str]:
    lines = []
    specs = config.data.training_sources()
    for spec, stream in zip(specs, train.parts, strict=True):
        if stream.tokens_per_epoch <= config.model.seq_length:
            lines.append(
                f"{spec.place}: its training part is {counted(stream.tokens_per_epoch, 'token')},"
                f" so that every sequence of --seq-length {config.model.seq_length} repeats them"
            )
        if config.training.causal and not _marks_ends(stream, tokenizer):
            lines.append(
                f"{spec.place}: its documents end without the end-of-document token, so that the"
                " model learns no end of a text: preprocess_data.py --append-eod"
            )
    return lines


def _seen_in_training(config: Config) -> Iterator[str]:
    """Which of the data to evaluate on is trained on, too."""
    held_out = config.data.held_out_sources()
    if not held_out:
        return
    trained_on = [spec for spec in config.data.training_sources() if spec.amount]
    sources = {pair: spec for spec in trained_on for pair in _pairs_of(spec)}
    for specs in held_out.values():
        for spec in specs:
            source = next(filter(None, map(sources.get, _pairs_of(spec))), None)
            if source is not None:
                yield (
                    f"{spec.place}: is trained on, too, as source {source.name}: its loss is not"
                    " that of new text"
                )


def _pairs_of(spec: SourceSpec) -> list[str]:
    """The prefixes of a source's pairs, the same however their folders are named."""
    sharded = is_sharded(spec.path)
    prefixes = pair_prefixes(spec.path, spec.place) if sharded else [spec.path]
    folders = {folder: os.path.realpath(folder) for folder in map(os.path.dirname, prefixes)}
    return [os.path.join(folders[os.path.dirname(p)], os.path.basename(p)) for p in prefixes]


def _marks_ends(stream: TokenStream | DocumentSamples, tokenizer: Tokenizer) -> bool:
    """Whether some of the first documents end with the token for that, or begin with it, so that it
    follows on the document before."""
    documents, lengths = stream.documents, stream.documents.lengths
    looked_at = [i for i in stream.document_range[:100] if lengths[i]][:10]
    return any(
        int(documents.read(i, place, place + 1)[0]) == tokenizer.eod
        for i in looked_at
        for place in (0, int(lengths[i]) - 1)
    )
