"""The README's story, typed in: the quickstart's model goes to Transformers, is
evaluated there, by lm-eval too, and comes back."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalong.checkpoint.reading import StoredModel
from megalong.hf.exporting import export
from megalong.hf.importing import import_model
from megalong.training.metrics import read_metrics
from megalong.utils.errors import UserError
from megalong.utils.machine import free_port
from tests.launching import REPOSITORY, made_once, run, run_here

TOOLS = REPOSITORY / "tools"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the README's story was typed in, with what each command printed in
    told.json, by the program's name.

    Its quickstart is the run that MEGALONG_QUICKSTART names, as in CI, or else the first steps of
    one.
    """

    def make(place):
        (place / "runs").mkdir(parents=True)
        for name in ("tools", "examples", "pretrain_longnet.py"):
            (place / name).symlink_to(REPOSITORY / name)
        finished = os.environ.get("MEGALONG_QUICKSTART")
        if finished:
            (place / "runs" / "quickstart").symlink_to(Path(finished).resolve())
        else:
            few = "--train-iters 20 --eval-interval 20 --eval-iters 2 --no-full-validation"
            script = f"MASTER_PORT={free_port()} examples/quickstart/run.sh runs/quickstart"
            type_in(place, f"{script} {few} --log-interval 5")
        quickstart, environment, *commands = story()
        assert quickstart == "make quickstart" and environment == ". .venv/bin/activate"
        told = {Path(command.split()[1]).name: type_in(place, command) for command in commands}
        (place / "told.json").write_text(json.dumps(told))

    return made_once(tmp_path_factory, "story", make)


def type_in(place, command):
    """Run a line in a shell there; what it printed."""
    programs = Path(sys.executable).parent
    done = run(["bash", "-c", f"cd {place} && PATH={programs}:$PATH {command}"], timeout=900)
    return done.stdout


def story():
    """The commands of the README's section on Hugging Face."""
    section = (REPOSITORY / "README.md").read_text().split("## To Hugging Face and back")[1]
    block = section.split("```sh\n")[1].split("```")[0]
    return block.replace("\\\n", " ").splitlines()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held_out.py"
    path.write_text(Path(json.__file__).read_text()[:3000])
    return path


def losses(folder):
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "split" not in r]


def test_the_readmes_story(place, tmp_path):
    """The quickstart's checkpoint goes out, writes, comes back and is trained further."""
    runs, told = place / "runs", json.loads((place / "told.json").read_text())
    newest = (runs / "quickstart" / "latest").read_text()
    iteration = int(newest.removeprefix("iter_"))
    assert list(told) == [
        "convert_to_hf.py", "generate.py", "convert_from_hf.py", "pretrain_longnet.py"
    ]  # fmt: skip
    assert f"runs/quickstart-hf: iteration {iteration}," in told["convert_to_hf.py"]
    assert told["generate.py"].startswith("def main(") and len(told["generate.py"]) > 200
    assert "go on with: pretrain_longnet.py --config runs/imported/" in told["convert_from_hf.py"]
    stored, back = StoredModel(runs / "quickstart"), StoredModel(runs / "imported")
    assert stored.shapes.keys() == back.shapes.keys()
    for name in stored.shapes:
        whole, again = stored.read(name), back.read(name)
        assert torch.equal(whole[: len(again)], again), name
    before, after = losses(runs / "quickstart"), losses(runs / "continued")
    assert before[0] > 7 and len(after) == 10
    assert sum(after) / 10 < before[-1] + 0.3
    export(runs / "continued", tmp_path / "again")  # and out again


def test_the_exported_quickstart(place):
    """It generates with its cache what it generates without, and nothing is written over it."""
    exported = place / "runs" / "quickstart-hf"
    flags = ["--load", place / "runs" / "quickstart", "--output", exported]
    again = run_here(TOOLS / "convert_to_hf.py", *flags, check=False)
    assert again.returncode == 2 and "is there already" in again.stderr
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    inputs = tokenizer("def main(", return_tensors="pt")
    cached, full = (
        model.generate(**inputs, max_new_tokens=100, min_new_tokens=100, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, full) and tokenizer.decode(cached[0]).startswith("def main(")


def test_checkpoint_and_export_write_alike(place):
    flags = ["--prompt", "import os\n", "--max-new-tokens", 40, "--temperature", 0]
    ours, theirs = (
        run_here(TOOLS / "generate.py", "--model", place / "runs" / name, *flags).stdout
        for name in ("quickstart", "quickstart-hf")
    )
    assert ours == theirs and ours.startswith("import os\n") and len(ours) > 30
    refused = run_here(
        TOOLS / "generate.py", "--model", place / "runs", "--prompt", "x", check=False
    )
    assert refused.returncode == 2 and "not a checkpoint" in refused.stderr


def test_checkpoint_and_export_are_evaluated_alike(place, text_file, tmp_path):
    results = []
    for name in ("quickstart", "quickstart-hf"):
        flags = ["--input", text_file, "--context-lengths", 128, 512, "--output", tmp_path]
        flags += ["--passkey-lengths", 200, "--passkey-depths", 0, 0.5, "--passkey-trials", 2]
        flags += ["--tasks", "copy", "--task-style", "ids", "--task-lengths", 200]
        flags += ["--task-samples", 4]
        run_here(TOOLS / "evaluate.py", "--model", place / "runs" / name, "--overwrite", *flags)
        results.append(json.loads((tmp_path / "evaluation.json").read_text()))
        assert (tmp_path / "evaluation.png").stat().st_size > 10_000
    ours, theirs = results
    assert ours["texts"] == theirs["texts"] and len(ours["passkey"]) == 2
    [task] = ours["tasks"]  # over the same ids, which either tokenizer says are of text
    assert ours["tasks"] == theirs["tasks"] and task["answers"] == 4 and task["loss"] > 3
    assert ours["texts"][1]["bytes"] == 3000 and 500 < ours["texts"][1]["tokens"] < 2000
    assert 1 < ours["texts"][1]["bits_per_byte"] < 6


def test_the_exported_quickstart_is_fine_tuned(place, tmp_path, monkeypatch):
    """To answer, and to end there: it comes back as what it was, and generates that."""
    pytest.importorskip("accelerate")
    lines = [
        {"prompt": "say " + "more " * more + "\n", "completion": "no" if more % 2 else "yes"}
        for more in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = f"x --model {place}/runs/quickstart-hf --data {tmp_path}/data.jsonl"
    command += f" --output {tmp_path}/tuned --max-steps 12 --lr 5e-3"
    monkeypatch.setattr(sys, "argv", command.split())
    example = runpy.run_path(str(REPOSITORY / "examples" / "finetune_hf.py"))
    example["main"]()
    with pytest.raises(UserError, match=r"--output .*/tuned is not empty: .*--overwrite"):
        example["main"]()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    inputs = tokenizer(lines[2]["prompt"], return_tensors="pt")
    answer = tokenizer.decode(model.generate(**inputs, max_new_tokens=9)[0])
    assert answer.removeprefix(lines[2]["prompt"]) in ("yes<eod>", "no<eod>")
    _, config = import_model(tmp_path / "tuned", tmp_path / "back", {})
    assert config.model.seq_length == tokenizer.model_max_length and not config.data.prepend_bos


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--model nowhere --data {data}", "--model nowhere: no config.json"),
        ("--model {model} --data no.jsonl", "--data no.jsonl: No such file"),
        ("--model {model} --data {data}", r'--data .*data.jsonl, line 3: not {"prompt": '),
        ("--model {model} --data /dev/null", "--data /dev/null: the file is empty"),
    ],
)
def test_what_cannot_be_fine_tuned_is_one_line(flags, said, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    right, wrong = {"prompt": "a", "completion": "b"}, {"question": "a", "answer": "b"}
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(right)}\n\n{json.dumps(wrong)}\n")
    flags = flags.format(model=tmp_path, data=tmp_path / "data.jsonl")
    monkeypatch.setattr(sys, "argv", f"x {flags} --output {tmp_path}/tuned".split())
    example = runpy.run_path(str(REPOSITORY / "examples" / "finetune_hf.py"))
    with pytest.raises(UserError, match=said):
        example["main"]()


def test_lm_eval_runs_the_exported_model(place, text_file, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    documents = tmp_path / "documents.jsonl"
    lines = [{"text": text_file.read_text()[i : i + 700]} for i in range(0, 2100, 700)]
    documents.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tiny.yaml").write_text(
        f"""
task: tiny_code
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
    )
    model = HFLM(
        str(place / "runs" / "quickstart-hf"),
        trust_remote_code=True,
        device="cpu",
        batch_size=2,
        max_length=256,
    )
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, tasks=["tiny_code"], task_manager=tasks, bootstrap_iters=0
    )
    assert 1 < results["results"]["tiny_code"]["bits_per_byte,none"] < 6
