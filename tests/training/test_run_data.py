"""What a run reads: data that is hardly what was meant, its blend, and where it goes on."""

import json
import resource
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megalong.checkpoint.content import Progress
from megalong.config.arguments import parse_arguments
from megalong.data import document_order
from megalong.data.preprocessing.writer import DocumentWriter
from megalong.hf.tokenizer_files import export_tokenizer
from megalong.training import stages
from megalong.training.run_data import check_same_masks, describe_training, open_run_data
from megalong.training.stages import blend_from, make_orders, repeated
from megalong.utils.errors import UserError
from tests.launching import small_run_flags


def write(prefix, *documents):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize(
    "document, told",
    [
        ([65] * 199 + [256], []),
        ([256] + [65] * 199, []),
        ([65] * 200, ["its documents end without the end-of-document token, so"]),
        ([65, 256], ["its training part is 2 tokens, so that every sequence of --seq-length 128"]),
    ],
    ids=["in order", "an end before each", "without ends", "two tokens"],
)
def test_what_is_told(tmp_path, document, told):
    write(tmp_path / "data", document)
    flags = small_run_flags(tmp_path / "data", split="1,0,0")
    lines = open_run_data(parse_arguments(flags).resolve(1)).oddities
    assert len(lines) == len(told)
    assert all(words in line for line, words in zip(lines, told, strict=True))


def test_samples_that_begin_with_documents_and_weights_by_length(tmp_path):
    """The run says what they make of the data."""
    write(tmp_path / "data", [65] * 199 + [256], [65] * 49 + [256])
    own = {"split": "1,0,0", "sample_mode": "document", "length_upsampling": "128:2.5"}
    config = parse_arguments(small_run_flags(tmp_path / "data", **own)).resolve(1)
    data = open_run_data(config)
    assert data.train.tokens_per_epoch == 550
    assert sorted(data.train.document_bounds(i)[1][0] for i in range(4))[-2:] == [128, 128]
    assert list(describe_training(data.train, config)) == [
        "--length-upsampling, shares of the tokens in documents of less than 128 x 1: 20.0% ->"
        " 9.1%, 128 tokens and more x 2.5: 80.0% -> 90.9%",
        "--sample-mode document: share of the tokens that have so many of their own document"
        " before them in the sequence: 64 30.7% (uncut 60.4%); 49 on average",
    ]
    with pytest.raises(UserError, match="--length-upsampling 5: TOKENS:WEIGHT is expected"):
        parse_arguments([*small_run_flags("x", length_upsampling=5)]).resolve(1)


def test_masks_need_a_mask_token(tmp_path):
    """The byte tokenizer gets one, its data is the same; a folder of Transformers must have it."""
    write(tmp_path / "data", [65] * 300 + [256])
    masked = {"split": "1,0,0", "objective": "mlm"}
    flags = small_run_flags(tmp_path / "data", **masked)
    data = open_run_data(parse_arguments(flags).resolve(1))
    assert data.masking.mask == 257 and data.tokenizer.vocab_size == 258 == len(data.token_bytes)
    assert data.train.parts[0].vocab_size == 257
    full = small_run_flags(tmp_path / "data", **masked, padded_vocab_size=257)
    with pytest.raises(UserError, match=r"--padded-vocab-size 257: the mask token needs one row"):
        open_run_data(parse_arguments(full).resolve(1))
    for with_mask in (False, True):
        folder = tmp_path / f"tokenizer{with_mask}"
        folder.mkdir()
        export_tokenizer("ByteTokenizer", None, folder, 128, with_mask=with_mask)
        own = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": folder}
        config = parse_arguments(small_run_flags(tmp_path / "data", **masked, **own)).resolve(1)
        if with_mask:
            assert open_run_data(config).masking.mask == 257
        else:
            with pytest.raises(UserError, match=r"--objective mlm: .*False has no mask_token"):
                open_run_data(config)


def test_an_evaluation_without_a_masked_token_is_refused(tmp_path):
    write(tmp_path / "data", [65] * 300, [65] * 5)
    flags = small_run_flags(tmp_path / "data", split="1,1,0", objective="mlm", mask_rate=0.01)
    with pytest.raises(UserError, match=r"--mask-rate 0.01: of the 5 tokens .* for validation"):
        open_run_data(parse_arguments(flags).resolve(1))


def test_a_loss_mask(tmp_path):
    """That it is heeded is said; what leaves nothing to predict, or has no meaning, is refused."""
    write(tmp_path / "data", [65] * 300, [65] * 400)
    mask = np.zeros(700, np.uint8)
    mask[100:200] = 1

    def opened(split, **changes):
        mask.tofile(tmp_path / "data.loss")
        config = parse_arguments(small_run_flags(tmp_path / "data", split=split, **changes))
        config = config.resolve(1)
        return open_run_data(config), config

    data, config = opened("1,0,0")
    assert config.data.masks_loss
    assert next(describe_training(data.train, config)) == (
        "loss masks: only some tokens of data are predicted"
        " (tools/inspect_dataset.py says how many)"
    )
    with pytest.raises(UserError, match=r"data: of the 400 tokens of --split 1,1,0 for validation"):
        opened("1,1,0")
    with pytest.raises(UserError, match=r"its loss mask .* and --objective mlm draws what is"):
        opened("1,0,0", objective="mlm")
    mask[500] = 1  # of the 101st token of the second document
    assert opened("1,1,0", eval_iters=1)[0].held_out["validation"].masks_loss


def opened(**changes):
    """The data of a run with these flags; `data_path` and `split` None leave them out."""
    flags = small_run_flags("", **changes)
    for name in ("data_path", "split"):
        if changes.get(name, ...) is None:
            flag = flags.index("--" + name.replace("_", "-"))
            flags[flag : flag + 2] = []
    return open_run_data(parse_arguments(flags).resolve(1))


@pytest.fixture
def three(tmp_path):
    """Three sources of ten documents, of 201, 401 and 601 tokens."""
    for number, name in enumerate(("code", "books", "wiki"), 1):
        write(tmp_path / name, *[[65 + number] * 200 * number + [256]] * 10)
    return tmp_path


def test_a_blend_with_a_split_has_held_out_sets_by_source(three):
    flags = {"data_path": f"0.7 {three}/code 0.3 prose={three}/books", "split": "8,1,1"}
    data = opened(**flags, train_iters=60)
    assert {name: float(share) for name, share in data.train.shares.items()} == {
        "code": 0.7,
        "prose": 0.3,
    }
    assert data.train.epoch_tokens == {"code": 8 * 201, "prose": 8 * 401}
    assert {name: part.tokens_per_epoch for name, part in data.held_out.items()} == {
        "validation/code": 201,
        "validation/prose": 401,
        "test/code": 201,
        "test/prose": 401,
    }


def test_sources_that_are_read_very_often_are_told_with_what_was_read_before(three):
    flags = {"data_path": f"0.7 {three}/code 0.3 prose={three}/books", "split": "8,1,1"}
    for iterations, begin, told in ((60, 0, 26.7), (8, 0, None), (16, 8, 7.1)):
        config = parse_arguments(small_run_flags(three, **flags, train_iters=iterations)).resolve(1)
        blend, samples = open_run_data(config).train, begin * 8
        if begin:
            blend, _ = blend.continued(samples, blend.history(samples))
        progress = Progress(iteration=begin, consumed_tokens=samples * 128)
        lines = [line for line in repeated(blend, progress, config) if "code" in line]
        assert bool(lines) == (told is not None)
        for line in lines:
            assert f"1,608 tokens, which are read {told} times until iteration {iterations}" in line


def test_sources_without_weights_are_as_much_as_they_have_tokens(three):
    """Whatever --train-iters says, which is told."""
    shares = [
        opened(data_path=f"{three}/code {three}/books", split="1,0,0", train_iters=n).train.shares
        for n in (3, 3000)
    ]
    assert shares[0] == shares[1] == {"code": Fraction(201, 602), "books": Fraction(401, 602)}
    file = three / "blend.yaml"
    file.write_text(
        f"- {{name: code, path: {three}/code, epochs: 2}}\n"
        f"- {{name: books, path: {three}/books, tokens: 12030}}\n"
    )
    data = opened(data_path=None, data_blend=file, split="1,0,0", train_iters=10)
    assert data.train.shares["code"] == Fraction(4020, 4020 + 12030)
    assert data.oddities[0] == (
        "the shares of the sources are the ratio of their tokens, whatever --train-iters is: 16,050"
        " tokens were asked for, the run takes 10,240"
    )


def test_a_folder_is_one_source(three):
    """Of the run's tokenizer, as a single pair has to be."""
    data = opened(data_path=f"0.5 {three} 0.5 {three}/code", split="1,0,0")
    assert data.train.epoch_tokens == {three.name: 2010 + 4010 + 6010, "code": 2010}
    sidecar = {"documents": 10, "tokens": 2010, "vocab_size": 257, "tokenizer_sha256": "0" * 64}
    (three / "code.json").write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match=f"--data-path {three} was made with another tokenizer"):
        opened(data_path=three)


def test_paths_by_purpose(three):
    paths = {"train_data_path": f"{three}/code", "valid_data_path": f"a={three}/books {three}/wiki"}
    data = opened(data_path=None, split=None, **paths, test_data_path=f"{three}/wiki")
    assert data.train.tokens_per_epoch == 2010
    assert list(data.held_out) == ["validation/a", "validation/wiki", "test"]
    assert not data.oddities
    paths["valid_data_path"] = f"{three}/books"
    assert list(opened(data_path=None, split=None, **paths).held_out) == ["validation"]


def test_what_is_evaluated_on_and_trained_on_is_told(three):
    """Whatever its folder is called, and as one of the pairs of a folder too; not with weight 0."""
    (three / "other").symlink_to(three)
    whole = {"data_path": None, "split": None}
    paths = {"train_data_path": f"1 {three}/code 0 {three}/wiki"}
    held_out = f"{three}/books a={three}/other/code {three}/wiki"
    told = opened(**whole, **paths, valid_data_path=held_out).oddities
    assert told == [
        f"--valid-data-path {three}/other/code: is trained on, too, as source code: its loss is not"
        " that of new text"
    ]
    paths = {"train_data_path": f"all={three}", "test_data_path": f"{three}/wiki"}
    (told,) = opened(**whole, **paths).oddities
    assert told.startswith(f"--test-data-path {three}/wiki: is trained on, too, as source all")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"valid_data_path": "{}/code", "split": None},
            "--data-path is divided by --split, which --valid-data-path stands in for: set"
            " --train-data-path",
        ),
        (
            {"train_data_path": "{}/code", "split": None},
            "--data-path and --train-data-path both say what to train on",
        ),
        (
            {"data_path": "0.5 {0}/code 0.5 {0}/nowhere"},
            "--data-path {}/nowhere: no file",
        ),
        (
            {"data_path": "0.5 {0}/code 0.5 {0}/one", "split": "1,9,0"},
            "--split 1,9,0 leaves no document of {}/one for training",
        ),
        (
            {"data_path": "0.5 {0}/code 0.5 {0}/none", "split": "1,1,0"},
            "no tokens in documents 0 to 1 (end excluded) of the 2 of {}/none",
        ),
        (
            {"data_path": "0.5 {0}/of257 0.5 {0}/other"},
            "--data-path {}/other was made with a tokenizer of 500 ids, and {}/of257 with one of",
        ),
        (
            {
                "data_path": "0.5 {0}/code 0.5 {0}/books",
                "keep_best": True,
                "keep_best_by": "book",
                "save": "x",
                "save_interval": 1000,
            },
            "--keep-best-by book: no such validation set; did you mean books?",
        ),
        ({"keep_best_by": "books"}, "--keep-best-by books"),
        (
            {
                "data_path": None,
                "split": None,
                "train_data_path": "{}/code",
                "keep_best": True,
                "save": "x",
            },
            "--keep-best goes by the validation loss, and there is no --valid-data-path: leave it",
        ),
    ],
)
def test_what_contradicts_itself(three, changes, message):
    write(three / "one", [65, 256])
    write(three / "none", [], [66, 256])
    for name, ids in (("of257", 257), ("other", 500)):
        write(three / name, *[[65, 256]] * 10)
        sidecar = {"documents": 10, "tokens": 20, "vocab_size": ids}
        (three / f"{name}.json").write_text(json.dumps(sidecar))
    here = {
        name: value.format(three) if isinstance(value, str) else value
        for name, value in ({"data_path": "{}/code"} | changes).items()
    }
    with pytest.raises(UserError) as error:
        opened(**here)
    assert str(error.value).startswith(message.replace("{}", str(three)))


def test_many_sources_need_many_open_files(three, monkeypatch):
    changed = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changed.append(limits))
    for limits, expected in (((512, 4096), []), ((200, 4096), [(264, 4096)])):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        opened(data_path=f"{three}/code {three}/books")
        assert changed == expected
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 260))
    with pytest.raises(UserError, match=r"264 open files, and the limit \(ulimit -Hn\) is 260"):
        opened(data_path=f"{three}/code {three}/books")


@pytest.mark.parametrize("theirs", [["code", "validation"], []])
def test_ranks_that_find_other_loss_masks_end(monkeypatch, theirs):
    """They would wait for each other: what counts is counted together."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)

    def gather(found, ours):
        found[:] = [ours, theirs]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    validation = SimpleNamespace(masks_loss=True)
    data = SimpleNamespace(
        train=SimpleNamespace(masked=["code"]), held_out={"validation": validation}
    )
    if theirs:
        return check_same_masks(data)
    with pytest.raises(UserError, match=r"rank 1 finds .* of none, and rank 0 of code, validation"):
        check_same_masks(data)


AT = 100  # the sample it goes on with, in a later epoch of both sources


def write_run_blend(prefix, documents: int):
    with DocumentWriter(str(prefix), np.uint16) as writer:
        writer.add(np.full(documents * 50, 65, np.uint16), [50] * documents)
        writer.commit({})


@pytest.mark.parametrize("mode", ["stream", "document"])
def test_the_orders_made_are_those_that_the_run_begins_with(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(document_order, "LARGE", 1)
    for name, documents in (("code", 40), ("books", 30)):
        write_run_blend(tmp_path / name, documents)
    cache = tmp_path / "cache"
    flags = small_run_flags(
        f"0.7 {tmp_path}/code 0.3 {tmp_path}/books",
        split="1,0,0", sample_mode=mode, data_cache_path=cache,
    )  # fmt: skip
    config = parse_arguments(flags).resolve(1)
    blend = open_run_data(config).train
    seen = set()

    def new() -> int:
        made = {*cache.glob("*.npy")} - seen
        seen.update(made)
        return len(made)

    assert new() == 0
    make_orders(blend, None, config)
    assert new() == 2  # the first epoch of each
    progress = Progress(consumed_tokens=AT * 128, blend=blend.history(AT).values())
    monkeypatch.setattr(stages, "read_progress", lambda checkpoint: progress)
    make_orders(blend, Path("checkpoint"), config)
    assert new() == 2
    resumed, news = blend_from(blend, progress, config)
    samples = [resumed.sample(i).tolist() for i in range(AT, AT + 3)]
    assert not news and {resumed.source(i) for i in range(AT, AT + 3)} == {0, 1}
    assert new() == 0
    assert samples == [blend.sample(i).tolist() for i in range(AT, AT + 3)]
