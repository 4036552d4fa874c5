"""The progress on a terminal and in a log file."""

import io

import pytest

from megalong import progress as module
from megalong.progress import ProgressBar, clock, human_bytes


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        time = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.time)
    return Clock


def test_lines_in_a_log_file(now):
    stream = io.StringIO()
    with ProgressBar(100, "B", "reading", stream=stream) as progress:
        for _ in range(9):
            now.time += 1
            progress.message = f"at {now.time:.0f}"
            progress.update(10)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "reading   50%  50 B/100 B  10 B/s  0:05 left  at 105",
        "reading   90%  90 B/100 B  10 B/s  0:01 left  at 109",
    ]


def test_bar_on_a_terminal(now, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with ProgressBar(4, "iterations", stream=stream) as progress:
        for _ in range(4):
            now.time += 2
            progress.update()
            if progress.count == 2:
                progress.print("a remark")
    output = stream.getvalue()
    assert output.count("\n") == 2 and "\r\x1b[Ka remark\n" in output
    last = output.split("\r\x1b[K")[-1]
    assert last == f"[{'#' * 24}]  100%  4/4 iterations  0.5/s  0:08\n"


def test_a_bar_is_not_wider_than_the_terminal(now, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with ProgressBar(4, "iterations", "a long description", stream=stream) as progress:
        progress.message = "a long message" * 5
    assert all(len(line.rstrip("\n")) < 40 for line in stream.getvalue().split("\r\x1b[K"))


def test_a_resumed_run_does_not_count_what_was_there(now):
    stream = io.StringIO()
    with ProgressBar(1000, "steps", initial=900, stream=stream) as progress:
        now.time += 5
        progress.update(10)
    assert stream.getvalue().startswith(" 91%  910/1,000 steps  2/s  0:45 left\n")


def test_rate_is_that_of_the_recent_past(now):
    with ProgressBar(None, stream=io.StringIO()) as progress:
        now.time += 100  # the first step compiles
        progress.update()
        for _ in range(100):
            now.time += 1
            progress.update()
        assert progress.rate == pytest.approx(1, rel=0.1)
        assert progress.seconds == 200


def test_silent_but_for_what_is_printed(now):
    stream = Terminal()
    with ProgressBar(4, stream=stream, enabled=False) as progress:
        now.time += 10
        progress.update()
        progress.print("important")
    assert stream.getvalue() == "important\n"


def test_numbers():
    assert [human_bytes(v) for v in (0, 999, 1000, 1234567, 5e9, 7.1e12, 1e15)] == [
        *("0 B", "999 B", "1.0 kB", "1.2 MB", "5.0 GB", "7.1 TB", "1000.0 TB")
    ]
    assert [clock(v) for v in (0, 59.6, 65, 3725, 360000)] == [
        *("0:00", "1:00", "1:05", "1:02:05", "100:00:00")
    ]
