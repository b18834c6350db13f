"""The line that says how far things are."""

import sys

import pytest

from l2c_export.cli.progress import show_progress


def on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_a_terminal_gets_one_line_that_moves_and_is_wiped(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    with show_progress() as progress:
        progress("calls", 3, 20)
        progress("calls", 20, 20)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\n" not in err
    assert "s  calls 3/20" in err
    assert err.endswith("\r\033[K")


def test_bytes_are_shown_as_a_share(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    with show_progress() as progress:
        progress("weights", 1 << 20, 1 << 22)
    assert "s  weights 25 %" in capsys.readouterr().err


def test_what_is_done_can_leave_a_line_anywhere(capsys):
    with show_progress(keep=True) as progress:
        progress("graphs", 1, 2)
        progress("graphs", 2, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" s  graphs done")


@pytest.mark.parametrize("options", [{}, {"shown": False, "keep": True}])
def test_elsewhere_and_unasked_nothing_is_shown(capsys, options):
    with show_progress(**options) as progress:
        progress("calls", 20, 20)
    assert capsys.readouterr() == ("", "")


def test_the_line_is_wiped_when_the_work_fails(monkeypatch, capsys):
    on_a_terminal(monkeypatch)

    def work():
        with show_progress() as progress:
            progress("calls", 1, 2)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        work()
    assert capsys.readouterr().err.endswith("\r\033[K")
