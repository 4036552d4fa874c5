"""Text comes out whole, whatever the tokens are that it comes in."""

import importlib.util

import pytest
import torch

from megalong.hf.loaded_model import Continuation, LoadedModel, Printer
from tests.launching import REPOSITORY


@pytest.mark.parametrize("prompt", [b"prompt \xe2\x82\xac", b""])
@pytest.mark.parametrize(
    "content",
    [
        "plain",
        "caf\u00e9 \u20ac \U0001f600!",
        b"cut \xe2\x82",
        b"\xff wrong \x80\x80 bytes\xf0",
        b"",
    ],
)
def test_tokens_of_a_byte_each(capsys, prompt, content):
    content = content.encode() if isinstance(content, str) else content
    decode = lambda tokens: bytes(tokens).decode(errors="replace")  # noqa: E731
    printer = Printer(LoadedModel(None, None, decode, first=0))
    printer.put(torch.tensor([[0, *prompt]]))
    assert capsys.readouterr().out == prompt.decode()
    for byte in content:
        printer.put(torch.tensor([byte]))
    printer.end()
    assert capsys.readouterr().out == decode(content) + "\n"


@pytest.mark.parametrize(
    "content, stop, shown",
    [
        ("one. two", [". "], "one"),
        ("one. two", ["x", "two", "one. tw"], ""),
        ("aaab", ["aab"], "a"),  # what could have begun it has been held back
        ("one.", [". "], "one."),
        ("caf\u00e9 \u20ac\u20ac", ["\u20ac"], "caf\u00e9 "),
    ],
)
def test_a_text_to_stop_at_is_left_out(capsys, content, stop, shown):
    decode = lambda tokens: bytes(tokens).decode(errors="replace")  # noqa: E731
    printer = Printer(LoadedModel(None, None, decode, first=0), stop, echo=False)
    printer.put(torch.tensor([[0, *b"a prompt"]]))
    for byte in content.encode():
        if printer.stopped:
            break
        printer.put(torch.tensor([byte]))
    printer.end()
    assert capsys.readouterr().out == shown + "\n" and printer.printed == shown
    assert printer.stopped == (shown != content)


def test_a_conversation_goes_on_with_all_that_was_said(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("generate", REPOSITORY / "tools" / "generate.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    flags = "x --model y --prompt begin --interactive --max-new-tokens 7 --stop END"
    monkeypatch.setattr("sys.argv", flags.split())
    lines, asked = iter(["one", "two", ""]), []
    monkeypatch.setattr("builtins.input", lambda _: next(lines))

    def go_on(text, echo):
        asked.append(text)
        return Continuation(f"<{len(asked)}>", ended=len(asked) == 1)

    tool.converse(go_on, "begin", tool.parse_arguments())
    assert asked == ["beginone\n", "beginone\n<1>ENDtwo\n"]
    assert capsys.readouterr().err == "(cut off after --max-new-tokens 7)\n"
