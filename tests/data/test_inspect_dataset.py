"""The tool that says what is in tokenized data."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from megalong.data.preprocessing.writer import DocumentWriter
from megalong.data.tokenizers.tokenizer import ByteTokenizer
from megalong.utils.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_dataset.py"
TEXTS = ["short", "a longer document, of some words", "x" * 300, "é"]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("inspect_dataset", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def inspect(tool, monkeypatch, capsys):
    """Runs the tool; gives what it printed."""

    def run(*arguments) -> str:
        monkeypatch.setattr("megalong.utils.command_line.filter_library_logs", lambda: None)
        monkeypatch.setattr("sys.argv", ["inspect_dataset.py", *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def prefix(tmp_path) -> str:
    """Four documents of the byte tokenizer, and an empty one."""
    tokenizer = ByteTokenizer()
    documents = [[*tokenizer.encode(text), tokenizer.eod] for text in TEXTS] + [[]]
    prefix = str(tmp_path / "texts")
    with DocumentWriter(prefix, np.uint16) as writer:
        writer.add(np.concatenate(documents).astype(np.uint16), [len(d) for d in documents])
        writer.commit(
            {"max_token_id": 256, "vocab_size": 257, "tokenizer_type": "ByteTokenizer"}
            | {"eod": 256, "append_eod": True, "inputs": [{"path": "a.txt"}], "inputs_in_all": 5}
            | {"tokenizer_sha256": tokenizer.fingerprint}
            | {"left_out": {"broken": 2, "empty": 0}, "repeats": {"documents": 1, "tokens": 6}}
        )
    return prefix


def test_counts_and_lengths(inspect, prefix):
    [found] = json.loads(inspect(prefix, "--json"))
    lengths = [6, 33, 301, 3, 0]
    assert (found["documents"], found["tokens"], found["dtype"]) == (5, sum(lengths), "uint16")
    assert found["bytes"] == 2 * sum(lengths) and found["empty_documents"] == 1
    assert found["lengths"]["shortest"] == 0 and found["lengths"]["longest"] == 301
    assert found["lengths"]["quantiles"]["0.5"] == 6
    rows = {(row["from"], row["to"]): row for row in found["histogram"]}
    assert list(rows)[:3] == [(0, 0), (1, 1), (2, 3)] and list(rows)[-1] == (256, 511)
    assert rows[4, 7]["documents"] == 1 and rows[4, 7]["tokens"] == 6
    assert sum(row["documents"] for row in found["histogram"]) == 5
    text = inspect(prefix, prefix)
    assert text.count(f"{prefix}: 5 documents, 343 tokens, uint16, 686 B\n") == 2
    assert "made with ByteTokenizer of 257 ids; a document ends with its" in text
    assert "of 5 files: a.txt\nleft out were documents: 2 broken\n" in text
    assert "texts that repeat another one: 1 document of 6 tokens; pre" in text
    assert "note: 1 document is empty: it is passed over" in text


def test_what_training_makes_of_it(inspect, prefix):
    flags = ("--seq-length", 16, "--split", "1,0,0", "--length-upsampling", "32:3")
    [found] = json.loads(inspect(prefix, *flags, "--json"))
    training = found["training"]
    assert training["tokens_per_epoch"] == 9 + 3 * 334
    assert [row["weight"] for row in training["length_upsampling"]] == [1, 3]
    assert training["length_upsampling"][1]["after"] == pytest.approx(1002 / 1011)
    modes = training["modes"]
    assert set(modes) == {"stream", "document"}
    assert all(0 < mode["mean_context"] < 8 for mode in modes.values())
    assert modes["document"]["mean_context"] > modes["stream"]["mean_context"]
    text = inspect(prefix, *flags, "--sample-mode", "document")
    assert "32 tokens and more x 3: 97.4% of the tokens -> 99.1%" in text
    assert "--sample-mode document: 63 sequences an epoch; share of the tokens" in text
    assert "--sample-mode stream" not in text


def test_documents_and_samples_as_text(inspect, prefix):
    text = inspect(prefix, "--decode", 1, 2, "--decode-tokens", 10)
    assert "=== document 1, 33 tokens\na lon\n[... 23 tokens ...]\nords<eod>\n" in text
    assert "=== document 2, 301 tokens\nxxxxx\n[..." in text
    flags = ("--seq-length", 16, "--split", "1,0,0", "--sample-mode", "document")
    [found] = json.loads(inspect(prefix, *flags, "--decode", *range(22), "--json"))
    starts = [sample["parts"][0]["text"] for sample in found["decoded"]]
    assert "a longer documen" in starts
    parts = [part["text"] for sample in found["decoded"] for part in sample["parts"]]
    assert {"short<eod>", "é<eod>"} & set(parts)


def test_another_tokenizer_is_told(inspect, prefix):
    sidecar = json.loads(Path(prefix + ".json").read_text()) | {"tokenizer_sha256": "5" * 64}
    Path(prefix + ".json").write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match=r"texts was made with another tokenizer than --tokenizer"):
        inspect(prefix, "--decode", 0)


def test_reading_all_of_it(inspect, prefix):
    text = inspect(prefix, "--verify")
    assert "sound: all tokens read, ids from 32 to 256; Megatron-core " in text
    assert "4 of 4 documents end with the end-of-document token" in text
    whole = Path(prefix + ".bin").read_bytes()
    Path(prefix + ".bin").write_bytes(whole[:-1] + b"\0")  # as a copy that was cut and filled up
    with pytest.raises(UserError, match=r"texts\.bin: document 3 does not end with .* 256, as all"):
        inspect(prefix, "--verify")
    with open(prefix + ".bin", "r+b") as file:
        file.seek(2 * 50)
        file.write(np.uint16(257).tobytes())
    inspect(prefix)  # which does not read it
    with pytest.raises(UserError, match=r"texts\.bin: document 2 holds token id 257 \(token 50 "):
        inspect(prefix, "--verify")
    with open(prefix + ".bin", "r+b") as file:
        file.write(np.full(343, 65, np.uint16).tobytes())
    with pytest.raises(UserError, match=r"its largest token id is 65, and .* says 256"):
        inspect(prefix, "--verify")


def test_a_loss_mask(inspect, tmp_path):
    tokens = [*b"what? this", 256, *b"and that", 256]
    prefix = str(tmp_path / "masked")
    counts = np.ones(20, bool)
    counts[:6] = counts[13:15] = False
    with DocumentWriter(prefix, np.uint16, masks_loss=True) as writer:
        writer.add(np.array(tokens, np.uint16), [11, 9], counts)
        writer.commit({"tokenizer_type": "ByteTokenizer", "max_token_id": 256})
    text = inspect(prefix, "--verify", "--decode", 0, 1)
    assert "12 tokens (60.0%) count in the loss, by 1 loss mask; the others are context" in text
    assert "1 loss mask read, and sound" in text
    assert "\n\u27e6what? \u27e7this<eod>\n" in text and "\nan\u27e6d \u27e7that<eod>\n" in text
    Path(prefix + ".loss").write_bytes(bytes(20))
    with pytest.raises(UserError, match=r"masked\.loss: tokens 0, and .*json says 12: the files"):
        inspect(prefix, "--verify")
    Path(prefix + ".json").unlink()
    assert "0 tokens (0.0%) count in the loss" in inspect(prefix)


def test_a_folder_of_pairs(inspect, prefix, tmp_path):
    for name in ("one", "two"):
        for suffix in (".bin", ".idx", ".json"):
            (tmp_path / "folder").mkdir(exist_ok=True)
            (tmp_path / "folder" / (name + suffix)).write_bytes(Path(prefix + suffix).read_bytes())
    folder = tmp_path / "folder"
    text = inspect(folder, "--verify", "--decode", 6)
    assert f"{folder}: 2 pairs, 10 documents, 686 tokens, uint16" in text
    assert "8 of 8 documents end" in text and "a longer document" in text
    (folder / "two.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"two\.bin: 0 bytes, but .* describes 686"):
        inspect(folder)


def test_a_plot(inspect, prefix, tmp_path):
    inspect(prefix, "--output", tmp_path / "plots")
    plot = tmp_path / "plots" / "texts_lengths.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="is there already"):
        inspect(prefix, "--output", tmp_path / "plots")
    inspect(prefix, "--output", tmp_path / "plots", "--overwrite")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sample-mode", "document"], "--sample-mode is about sequences: set --seq-length"),
        (["--length-upsampling", "9:1"], "--length-upsampling is about sequences"),
        (["--decode", "5"], "--decode 5: .* has 5 documents, numbered from 0"),
        (["--seq-length", "16", "--decode", "-1"], "numbered from 0"),
        (["--seq-length", "0"], "--seq-length 0: must be positive"),
        (["--decode-tokens", "0"], "--decode-tokens 0"),
        (["--tokenizer-type", "HuggingFaceTokenizer", "--decode", "0"], "--tokenizer-model"),
    ],
)
def test_bad_flags_in_one_line(inspect, prefix, flags, message):
    with pytest.raises(UserError, match=message):
        inspect(prefix, *flags)


def test_damage_in_one_line(inspect, prefix):
    Path(prefix + ".bin").write_bytes(b"x" * 685)
    with pytest.raises(UserError, match=r"texts\.bin: 685 bytes, but .*idx describes 686: cut"):
        inspect(prefix)
    with pytest.raises(UserError, match=r"no file .*none\.idx"):
        inspect(prefix + "/none")
