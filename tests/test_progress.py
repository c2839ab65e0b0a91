"""What a long run says of itself: only what it knows, on a terminal and in a log."""

import threading

import pytest

from pipeline import progress as module
from pipeline.progress import KeptLines, Progress, Rate, TerminalReporter, _Lines, duration


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(clock):
    """(counter of 100,000 tokens, what it has said)."""
    reporter = KeptLines()
    return _Lines("capture", 100_000, "tokens", reporter, clock), reporter.lines


def work(progress, clock, seconds, rate, amount=100):
    """Results of `amount` each, evenly over so many seconds."""
    start = clock.now
    for count in range(1, round(seconds * rate / amount) + 1):
        clock.now = start + count * amount / rate
        progress.advance(amount)


def test_minutes_before_the_first_result_are_no_time_of_work(lines, clock):
    progress, said = lines
    clock.now += 300
    work(progress, clock, 16, rate=1000)
    assert said == ["capture: 15,100 of 100,000 tokens (15%), 1,000 tokens/s, 1m25s left"]


def test_nothing_is_said_of_a_rate_that_nothing_tells(lines, clock):
    progress, said = lines
    clock.now += 300
    progress.advance(1000)
    clock.now += 1
    progress.advance(1000)
    progress.close()
    assert said == ["capture: 2,000 of 100,000 tokens (2%)"]


def test_earlier_work_counts_towards_the_total_and_not_towards_the_rate(lines, clock):
    progress, said = lines
    progress.recall(50_000)
    work(progress, clock, 16, rate=1000)
    assert said == ["capture: 65,100 of 100,000 tokens (65%), 1,000 tokens/s, 35s left"]
    progress.recall(10_000)
    work(progress, clock, 16, rate=1000)
    assert said[1:] == ["capture: 90,200 of 100,000 tokens (90%), 1,000 tokens/s, 10s left"]


def test_rate_is_that_of_the_last_minute_and_at_the_end_that_of_the_whole(lines, clock):
    progress, said = lines
    work(progress, clock, 200, rate=100)
    work(progress, clock, 130, rate=500)
    assert "500 tokens/s, 1m14s left" in said[-1]
    progress.close()
    assert said[-1] == "capture: 85,000 of 100,000 tokens (85%), 258 tokens/s, 58s left"


@pytest.mark.parametrize("interval", [0.001, 7.0, 500.0])
def test_rate_of_results_that_come_often_or_seldom(clock, interval):
    rate = Rate(clock)
    for _ in range(50):
        clock.now += interval
        rate.add(10)
    if interval == 0.001:
        assert rate.lately() is None
    else:
        assert rate.lately() == pytest.approx(10 / interval)
        assert rate.overall() == pytest.approx(10 / interval)


def test_a_slow_rate_is_not_rounded_to_nothing(lines, clock):
    progress, said = lines
    work(progress, clock, 5000, rate=0.3, amount=10)
    assert "0.3 tokens/s" in said[-1]


class Terminal:
    """Standard error on a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_bar_begins_its_clock_with_the_first_result(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("tqdm.std.time", clock)
    progress = TerminalReporter().progress("capture", 100_000)
    progress.recall(50_000)
    clock.now += 300
    assert terminal.text == ""
    progress.advance(100)
    assert "50%" in terminal.text
    assert "left" not in terminal.text
    assert "?" in terminal.text.split("[")[-1]  # neither rate nor estimate
    work(progress, clock, 20, rate=1000)
    progress.recall(10_000)
    work(progress, clock, 10, rate=1000)
    progress.close()
    last = terminal.text.split("\r")[-1]
    assert "1.00k tokens/s" in last
    assert "90.1k/100k [00:30<00:09" in last


def test_silent_work_is_named_now_and_then_and_no_longer_than_it_lasts(monkeypatch):
    monkeypatch.setattr(module, "FIRST_LOG_INTERVAL_S", 0.01)
    said, enough = [], threading.Event()

    class Reporter(TerminalReporter):
        def log(self, line: str) -> None:
            said.append(line)
            if len(said) == 3:
                enough.set()

    def interrupted() -> None:
        with Reporter().waiting("loading the teacher"):
            assert enough.wait(60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(said) >= 3
    assert all(line == "loading the teacher: 0s so far" for line in said)
    assert not [thread for thread in threading.enumerate() if thread.name == "waiting"]


def test_short_silence_is_not_worth_a_line(monkeypatch):
    reporter = TerminalReporter()
    monkeypatch.setattr(reporter, "log", lambda line: pytest.fail(line))
    with reporter.waiting("loading"):
        pass


def test_a_library_says_nothing(capfd):
    progress = Progress()
    progress.recall(3)
    progress.advance(5, "note")
    with progress, module.Reporter().waiting("loading"):
        pass
    assert capfd.readouterr() == ("", "")


def test_callers_from_python_find_lines_and_notes_in_the_log(caplog):
    with caplog.at_level("INFO", "pipeline"):
        module.Reporter().log("100% done")
        module.Reporter().note("%s is slow here")
    assert caplog.record_tuples == [("pipeline", 20, "100% done"), ("pipeline", 30, "%s is slow here")]


def test_terminal_gets_each_line_once_and_the_log_nothing(caplog, capfd):
    with caplog.at_level("DEBUG"):
        TerminalReporter().log("100% done")
        TerminalReporter().note("bfloat16 is slow here")
    assert capfd.readouterr() == ("", "100% done\nbfloat16 is slow here\n")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (3599.7, "1h00m"), (18_120, "5h02m")]
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown
