"""The line at the terminal's last row, and what `generate` shows in it."""

import os
import sys

import pytest

from fewfire.api import Experts, Generated
from fewfire.cli.generate import _experts_line, _state
from fewfire.cli.live import LiveLine


def generated(**experts):
    return Generated("a", [1, 2], 3, 10.0, 12.34, None, 0, 2**30, Experts(2**30, **experts))


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("fewfire.cli.live._is_terminal", lambda stream: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((40, 24)))
    return monkeypatch


def test_below_text_the_last_row_is_kept_out_of_what_scrolls(terminal, capsys):
    with LiveLine() as line:
        assert line.is_due(1.0) and not line.is_due(1.1) and line.is_due(1.3)
        line.show("x" * 100)
    shown = capsys.readouterr().err
    assert shown.index("\x1b[1;23r") < shown.index("\x1b[24;1H") < shown.rindex("\x1b[r")
    assert shown.count("x") == 39


def test_without_text_it_is_one_line_of_stderr(terminal, capsys):
    terminal.setattr("fewfire.cli.live._is_terminal", lambda stream: stream is sys.stderr)
    with LiveLine() as line:
        line.show("two")
    assert capsys.readouterr().err == "\r\x1b[2Ktwo\r\x1b[2K"


def test_nothing_where_there_is_no_terminal(capsys):
    with LiveLine() as line:
        assert not line.is_due(1.0)
        line.show("never")
    assert capsys.readouterr().err == ""


def test_what_it_says():
    assert _state(generated(hits=9)) == "2 tokens, 12.3/s" and _experts_line(Experts(1, 9)) == ""
    streamed = generated(hits=3, misses=1, bytes_read=2**21, stall_s=0.25, access="buffered, 0.50 GB/s")
    assert _state(streamed) == "2 tokens, 12.3/s; experts 75 % in memory, 2.0 MiB read, stalled 0.2 s"
    assert "75 % of 4 in memory (1.0 GiB), 2.0 MiB read buffered, 0.50 GB/s" in _experts_line(streamed.experts)
