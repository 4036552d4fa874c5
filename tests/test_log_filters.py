"""What the libraries say wrongly of our models is not passed on, and all else is."""

import logging

import pytest

from megalong.utils.command_line import filter_library_logs


@pytest.mark.parametrize(
    "module, false",
    [
        (
            "configuration_utils",
            "a model of type `longnet` to instantiate a model of type ``",
        ),
        ("tokenization_utils_base", "Token indices sequence length is longer than the specified"),
    ],
)
def test_false_warnings_of_transformers(module, false, caplog, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    filter_library_logs()
    logger = logging.getLogger(f"transformers.{module}")
    monkeypatch.setattr(logger.parent, "propagate", True)  # Transformers has a handler of its own
    for message in (false, "a model of type `llama` to instantiate a model of type `longnet`."):
        logger.warning(message)
    assert {record.getMessage()[:22] for record in caplog.records} == {"a model of type `llama"}
