"""The progress on a terminal and in a log file."""

import io
import re

import pytest

from megalong.utils.progress import clock, human_bytes, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        time = 100.0

    monkeypatch.setattr("tqdm.std.time", lambda: Clock.time)
    return Clock


def test_lines_in_a_log_file():
    stream = io.StringIO()
    with progress_bar(100_000, "B", "reading", interval=0, stream=stream) as bar:
        bar.update(50_000)
        bar.set_postfix_str("7 documents", refresh=False)
        bar.write("a remark", file=stream)
        bar.update(40_000)
    begin, half, remark, *rest = stream.getvalue().splitlines()
    assert begin.startswith("reading:   0% 0.00/100k [") and remark == "a remark"
    assert re.fullmatch(r"reading:  50% 50.0k/100k \[00:00<00:00, .*B/s\]", half)
    assert re.fullmatch(r"reading:  90% 90.0k/100k \[.*B/s, 7 documents\]", rest[-1])
    assert "\r" not in stream.getvalue() and stream.getvalue().endswith("]\n")


def test_a_line_has_count_rate_and_time_left(now):
    stream = io.StringIO()
    with progress_bar(100, "batch", "evaluating", stream=stream) as bar:
        for _ in range(9):
            now.time += 1
            bar.update(10)
    assert stream.getvalue().splitlines() == [  # every five seconds, and at the end
        "evaluating:  50% 50/100 [00:05<00:05, 10.00batch/s]",
        "evaluating:  90% 90/100 [00:09<00:01, 10.00batch/s]",
    ]


def test_rate_is_that_of_the_recent_past(now):
    with progress_bar(1000, "batch", "evaluating", stream=io.StringIO()) as bar:
        now.time += 100  # the first compiles
        bar.update()
        for _ in range(100):
            now.time += 1
            bar.update()
        line = str(bar)
    assert "101/1000 [03:20<" in line
    assert float(re.search(r"([\d.]+)s/batch", line)[1]) == pytest.approx(1, rel=0.1)


def test_bar_on_a_terminal():
    stream = Terminal()
    with progress_bar(4, "batch", "evaluating", stream=stream) as bar:
        bar.update(2)
    output = stream.getvalue()
    assert output.count("\n") == 1 and output.endswith("\n")
    last = output.rstrip("\n").split("\r")[-1]
    assert re.fullmatch(r"evaluating:  50%\|.+\| 2/4 \[00:00<00:00, .*batch/s\] *", last)


def test_silent_but_for_what_is_written():
    stream = Terminal()
    with progress_bar(4, "batch", "evaluating", enabled=False, stream=stream) as bar:
        bar.update()
        bar.write("important", file=stream)
    assert stream.getvalue() == "important\n"


def test_numbers():
    assert [human_bytes(v) for v in (0, 999, 1000, 1234567, 5e9, 7.1e12, 1e15)] == [
        *("0 B", "999 B", "1.0 kB", "1.2 MB", "5.0 GB", "7.1 TB", "1000.0 TB")
    ]
    assert [clock(v) for v in (0, 59.6, 65, 3725, 360000)] == [
        *("0:00", "1:00", "1:05", "1:02:05", "100:00:00")
    ]
