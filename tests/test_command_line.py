"""Every command: `--help` without torch, one line for a mistake, one where packages are missing."""

import os
import re
import subprocess
import sys

import pytest

from megalong.attention import __all__ as attention_names
from megalong.utils.command_line import REQUIRED, ArgumentParser, run
from megalong.utils.errors import UserError
from tests.launching import REPOSITORY

# Each with arguments that are in order as far as the parser sees.
COMMANDS = {
    "pretrain_longnet.py": "--data-path x --tokenizer-type ByteTokenizer",
    "tools/convert_from_hf.py": "--input x --output y",
    "tools/convert_to_hf.py": "--load x --output y",
    "tools/evaluate.py": "--model x --passkey-lengths 9 --output y",
    "tools/generate.py": "--model x --prompt a",
    "tools/inspect_checkpoint.py": "x",
    "tools/inspect_dataset.py": "x",
    "tools/make_task_data.py": "--tasks mqar --length 99 --samples 2 --output-prefix y",
    "tools/merge_datasets.py": "--input x --output-prefix y",
    "tools/plot_run.py": "x",
    "tools/calibrate_device.py": "--output y",
    "tools/plan_run.py": "--cluster h100 --gpus 8",
    "tools/preprocess_data.py": "--input {file} --output-prefix y",
    "tools/train_tokenizer.py": "--input {file} --output-prefix y --vocab-size 9",
    "examples/quickstart/report.py": "x",
}
# Those of the scripts in tools/benchmarks that are not parts of others.
BENCHMARKS = {
    "attention.py": "--output y",
    "communication.py": "--output y",
    "memory.py": "ladder --output y",
    "training.py": "--output y",
}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A Python that has the repository neither installed nor on its path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=kept | environment, cwd="/", capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_every_tool_is_tried_here():
    tools = {f"tools/{path.name}" for path in (REPOSITORY / "tools").glob("*.py")}
    assert tools == {command for command in COMMANDS if command.startswith("tools/")}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_torch(command):
    probe = (
        "import os, runpy, sys; sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "slow = {'torch', 'transformers', 'matplotlib', 'megatron', 'deepspeed'} & {*sys.modules}\n"
        "assert not slow, slow"
    )
    done = python("-c", probe, str(REPOSITORY / command), "--help")
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_the_configuration_imports_no_torch():
    probe = (
        "import sys, megalong.config.arguments as arguments\n"
        "config = arguments.parse_arguments(sys.argv[1:]).resolve(1)\n"
        "assert config.attention.pattern(0).branches\n"
        "assert not {'torch', 'numpy'} & {*sys.modules}"
    )
    flags = COMMANDS["pretrain_longnet.py"].split()
    done = python("-c", probe, *flags, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr


NEEDING = {name: flags for name, flags in COMMANDS.items() if "report" not in name}
NEEDING |= {f"tools/benchmarks/{name}": flags for name, flags in BENCHMARKS.items()}


@pytest.mark.parametrize("command", NEEDING)
def test_missing_packages_are_one_line(command, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    arguments = NEEDING[command].format(file=tmp_path / "a.txt").split()
    # -S leaves out what is installed.
    done = python("-S", str(REPOSITORY / command), *arguments)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: \w+ is not installed for .*(activate|\[hf\]).*\n", done.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_one_line(command):
    done = python(str(REPOSITORY / command), "--no-such-flag", *COMMANDS[command].split())
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: .*--no-such-flag.*\n", done.stderr)


@pytest.mark.parametrize(
    "error, said",
    [
        (UserError("--lr is 0"), "error: --lr is 0\n"),
        (FileNotFoundError(2, "No such file or directory", "x"), "error: x: No such file or dir"),
        (ModuleNotFoundError("...", name="transformers"), "error: transformers is not inst"),
        (KeyboardInterrupt(), ""),
    ],
)
def test_what_ends_without_a_traceback(error, said, capsys):
    with pytest.raises(SystemExit) as end:
        run(lambda: (_ for _ in ()).throw(error))
    assert end.value.code == (2 if said else 130) and capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bug"),
        ConnectionError("lost"),
        ModuleNotFoundError("...", name="transformers.models"),  # a package that is incomplete
        ModuleNotFoundError("...", name="hjson"),  # DeepSpeed's requirement, not ours
        FileNotFoundError(2, "No such file or directory", "gcc"),  # where files have their flags
    ],
)
def test_everything_else_shows_its_traceback(error):
    with pytest.raises(type(error)) as raised:
        run(lambda: (_ for _ in ()).throw(error), system_errors=not isinstance(error, OSError))
    assert raised.value is error


def test_a_reader_that_has_seen_enough_is_no_error():
    probe = "from megalong.utils.command_line import run; run(lambda: print('line\\n' * 10**6))"
    line = f'set -o pipefail; "{sys.executable}" -c "{probe}" | head -n 1'
    done = subprocess.run(["bash", "-c", line], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "line\n", "")


def test_every_requirement_is_known():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    names = {re.split("[>;]", line)[0] for line in lines if not line.startswith("#")}
    modules = {"megatron-core": "megatron", "PyYAML": "yaml"}
    assert {modules.get(name, name) for name in names} == {*REQUIRED}


def test_exit_statuses_and_help():
    for status, code in ((None, None), (0, 0), (130, 130)):
        with pytest.raises(SystemExit) as end:
            run(lambda status=status: status)
        assert end.value.code == code
    parser = ArgumentParser("x")
    parser.add_argument("--rate", type=float, default=0.5, help="a share of 100%%")
    parser.add_argument("--lengths", nargs="+", default=[1, 2], help="tokens")
    parser.add_argument("--quick", action="store_true", help="do less")
    shown = " ".join(parser.format_help().split())
    for words in ("100% (default: 0.5)", "tokens (default: 1 2)", "do less (default: off)"):
        assert words in shown
    with pytest.raises(UserError, match=r"--a.*--help lists all flags"):
        ArgumentParser("x").parse_args(["--a"])
    parser = ArgumentParser("x")
    parser.add_argument("--model", required=True)
    with pytest.raises(UserError, match=r"--modl; did you mean --model\?"):
        parser.parse_args(["--modl", "y"])
    assert parser.parse_args(["--mod", "-- y"]).model == "-- y"


def test_torchrun_ends_its_words_with_ours(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit):
        run(lambda: (_ for _ in ()).throw(UserError("--lr is 0")))
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    lines = str(ChildFailedError("pretrain_longnet.py", {0: failure})).splitlines()
    assert lines[-2].endswith("error: --lr is 0")


def test_names_of_the_attention_room_are_not_hidden_by_its_files():
    import megalong.attention

    files = {path.stem for path in (REPOSITORY / "megalong" / "attention").glob("*.py")}
    assert not files & {*attention_names} and {*attention_names} <= {*dir(megalong.attention)}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        megalong.attention.nothing  # noqa: B018
