"""Text comes out whole, whatever the tokens are that it comes in."""

import pytest
import torch

from megalong.hf.generation import Printer
from megalong.hf.loaded_model import LoadedModel


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
