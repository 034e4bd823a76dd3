import io
import logging
import re

import pytest

from fillm.rank.console import Console
from fillm.rank.ranking import Ranking


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def streams():
    return io.StringIO(), io.StringIO()


@pytest.fixture
def console(streams, clock):
    return Console(*streams, clock=clock)


@pytest.fixture
def ranking():
    rows = [
        {"name": "model.layers.0.mlp.up_proj.weight", "kind": "mlp", "layer": 0, "numel": 1200, "score": 123456.789,
         "score_low": 123395.060, "score_high": 123518.517},
        {"name": "head[bold]", "kind": "lm_head", "layer": -1, "numel": 7, "score": float("inf"),
         "note": "no retain gradient"},
        {"name": "norm", "kind": "norm", "layer": 1, "numel": 3, "score": 0.0, "note": "unused"},
    ]  # fmt: skip
    return Ranking.from_rows(rows, granularity="tensor", method="soir", objective="forget")


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_without_a_terminal_there_is_a_line_every_ten_seconds(console, streams, clock):
    with console.progress("retain pass", 360) as bar:
        for _ in range(36):
            clock.now += 2.5
            bar.advance(10, 620, loss=1.5)
    lines = streams[1].getvalue().splitlines()
    assert lines[0] == "retain pass: 360 samples"
    assert lines[1] == ("retain pass: 40 of 360 samples, 4.0 samples/s, 248.0 tokens/s, 10 s, 80 s left, loss 1.5")
    assert len(lines) == 2 + 8  # at 10, 20, ..., 80 s; at 90 s the pass is over
    assert lines[-1] == "retain pass: 360 samples in 90.0 s, 4.0 samples/s, 248.0 tokens/s"
    assert streams[0].getvalue() == ""


def test_a_short_pass_has_two_lines(console, streams, clock):
    with console.progress("forget pass", 2) as bar:
        clock.now += 7.3
        bar.advance(2, 22265)
    assert streams[1].getvalue().splitlines() == [
        "forget pass: 2 samples",
        "forget pass: 2 samples in 7.3 s, 0.3 samples/s, 3050 tokens/s",
    ]


def test_what_an_earlier_run_did_moves_the_bar_but_not_the_rates(console, streams, clock):
    with console.progress("retain pass", 100) as bar:
        bar.skip(80)
        clock.now += 10.0
        bar.advance(10, 100)
        clock.now += 10.0
        bar.advance(10, 100)
    lines = streams[1].getvalue().splitlines()
    assert lines[1] == "retain pass: 90 of 100 samples, 1.0 samples/s, 10.0 tokens/s, 10 s, 10 s left"
    assert lines[2] == "retain pass: 20 of 100 samples in 20.0 s, 1.0 samples/s, 10.0 tokens/s, 80 were done before"


def test_a_clock_that_stands_still_is_no_error(console, streams):
    with console.progress("forget pass", 2) as bar:
        bar.advance(2, 20)
    assert streams[1].getvalue().splitlines()[-1] == "forget pass: 2 samples in 0.0 s"


def test_a_pass_that_fails_does_not_say_that_it_is_done(console, streams):
    with pytest.raises(KeyError), console.progress("forget pass", 2):
        raise KeyError
    assert streams[1].getvalue() == "forget pass: 2 samples\n"


def test_a_terminal_gets_a_bar_and_the_last_line(clock):
    out, err = io.StringIO(), Terminal()
    console = Console(out, err, clock=clock)
    with console.progress("retain pass", 4) as bar:
        clock.now += 2.0
        bar.advance(3, 300, loss=0.25)
        console.warn("rows.jsonl[:3] is short")
        clock.now += 2.0
        bar.advance(1, 100)
    shown = plain(err.getvalue())
    assert "retain pass" in shown and "4/4" in shown and "━" in shown
    assert "warning: rows.jsonl[:3] is short\n" in shown
    assert shown.splitlines()[-1].endswith("retain pass: 4 samples in 4.0 s, 1.0 samples/s, 100.0 tokens/s")
    assert out.getvalue() == ""
    console.warn("after the bar")
    assert err.getvalue().endswith("warning: after the bar\n")


def test_results_go_to_stdout_and_the_rest_to_stderr(console, streams):
    console.say("run folder: out")
    console.note("noted")
    console.warn("forget and retain share 3 rows")
    console.once("halved", "batches are halved")
    console.once("halved", "batches are halved again")
    assert streams[0].getvalue() == "run folder: out\n"
    assert streams[1].getvalue().splitlines() == [
        "noted",
        "warning: forget and retain share 3 rows",
        "warning: batches are halved",
    ]


def test_the_processs_own_streams_are_the_default(capsys):
    console = Console()
    console.say("result")
    console.warn("careful")
    assert capsys.readouterr() == ("result\n", "warning: careful\n")


def test_silent_prints_nothing_and_logs_warnings(capsys, caplog, ranking):
    console = Console.silent()
    with caplog.at_level(logging.INFO, logger="fillm"):
        console.say("result")
        console.warn("careful")
        console.once("a", "said once")
        console.once("a", "said once")
        console.top_table(ranking)
        with console.progress("retain pass", 2) as bar:
            bar.advance(2, 20)
    assert capsys.readouterr() == ("", "")
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == ["careful", "said once"]


def test_the_plain_table_is_aligned(console, streams, ranking):
    console.top_table(ranking)
    lines = streams[0].getvalue().splitlines()
    assert lines == [
        "top 3 of 3: soir, objective forget",
        "rank  name                               kind     layer  numel       score  bracket %  note",
        "   1  head[bold]                         lm_head      -      7         inf      exact  no retain gradient",
        "   2  model.layers.0.mlp.up_proj.weight  mlp          0   1200  1.2346e+05        0.1",
        "   3  norm                               norm         1      3      0.0000      exact  unused",
    ]


def test_only_the_first_rows_are_shown(console, streams, ranking):
    console.top_table(ranking, rows=1)
    assert streams[0].getvalue().splitlines()[0] == "top 1 of 3: soir, objective forget"
    assert len(streams[0].getvalue().splitlines()) == 3


def test_rows_and_heads_show_their_index(console, streams):
    rows = [{"name": "w", "kind": "attn", "layer": 0, "index": 5, "numel": 4, "score": 0.012345678}]
    console.top_table(Ranking.from_rows(rows, granularity="head", method="soir", objective="retain"))
    assert streams[0].getvalue().splitlines()[1:] == [
        "rank  name  index  kind  layer  numel     score  bracket %  note",
        "   1  w         5  attn      0      4  0.012346      exact",
    ]


def test_the_terminals_table_has_the_same_cells(clock, ranking):
    out = Terminal()
    Console(out, io.StringIO(), clock=clock).top_table(ranking)
    shown = plain(out.getvalue())
    for cell in ("top 3 of 3", "bracket %", "head[bold]", "1.2346e+05", "0.1", "lm_head", "unused"):
        assert cell in shown
