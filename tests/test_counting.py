"""Long counts: what is shown of them, work ahead in threads, and Ctrl-C."""

import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from distfit.data.ahead import ahead
from distfit.monitor.counting import in_lines, silent
from tests.pictures import make_caltech
from tests.ranks import environment


def counted(seconds_each, total=40):
    now = iter(range(0, 10**9, seconds_each))
    stream = io.StringIO()
    with in_lines("Checking", total, "images", stream, clock=lambda: float(next(now))) as done:
        for _ in range(total):
            done()
    return stream.getvalue().splitlines()


def test_a_line_every_ten_seconds_says_how_far_and_how_long():
    lines = counted(seconds_each=3)
    assert lines[0] == "Checking 4/40 images - 0.3 images/s - left 1:48"
    assert len(lines) == 40 * 3 // 12


def test_bytes_are_shown_where_they_are_counted():
    stream = io.StringIO()
    clock = iter([0.0, 5.0, 10.0])
    with in_lines("Writing", 4, "records", stream, clock=lambda: next(clock)) as done:
        done(25_000_000)
        done(5_000_000)
    assert stream.getvalue() == "Writing 2/4 records - 0.2 records/s, 3.0 MB/s - left 10s\n"


def test_counts_of_several_threads_are_all_counted():
    stream, now = io.StringIO(), itertools.count(step=10.0)
    with in_lines("Writing", 400, "records", stream, clock=lambda: next(now)) as done:
        workers = [threading.Thread(target=lambda: [done() for _ in range(100)]) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    counts = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert counts == list(range(1, 401))


def test_what_is_over_at_once_says_nothing():
    assert counted(seconds_each=1, total=9) == []
    with silent("Checking", 3, "images") as done:
        assert done() is None


def test_results_come_in_order_from_several_threads():
    threads = set()

    def slow_first(number):
        threads.add(threading.current_thread().name)
        time.sleep(0.05 if number % 5 == 0 else 0)
        return number

    assert list(ahead(slow_first, range(30), threads=3)) == list(range(30))
    assert len(threads) > 1


def test_no_more_is_begun_than_can_be_held():
    begun = []
    results = ahead(lambda number: begun.append(number) or number, range(1000), threads=2)
    assert next(results) == 0
    results.close()
    assert len(begun) <= 5


def test_an_error_comes_at_its_item():
    results = ahead(lambda number: 1 / (3 - number), range(10), threads=2)
    assert [next(results) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


# Ctrl-C, which a shell may have made this process ignore.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from distfit.cli import main
main()
"""


def test_ctrl_c_on_a_terminal_says_how_to_go_on(tmp_path):
    pictures = make_caltech(tmp_path / "pictures", classes=2, per_class=1)
    for number in range(2, 3000):
        os.link(pictures / "001.ak47" / "001_0001.jpg", pictures / "001.ak47" / f"{number}.jpg")
    terminal, end = os.openpty()
    command = [sys.executable, "-c", PROGRAM, "data", "build", "--images", pictures, tmp_path / "new" / "out"]
    # Of its own kind and width, whatever terminal the tests themselves have.
    process = subprocess.Popen(command, env=environment(TERM="xterm", COLUMNS="100"), stdout=end, stderr=end)
    os.close(end)
    try:
        shown = read_until(terminal, lambda: any((tmp_path / "new").glob(".out.*/new/.train-*")))
        process.send_signal(signal.SIGINT)
        shown += read_until(terminal, lambda: process.poll() is not None)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert process.returncode == 130, shown
    assert "Checking" in shown
    assert "/3000" in shown
    assert "images/s" in shown
    line = shown.rstrip().splitlines()[-1]
    assert "distfit: interrupted; the same command goes on from here" in line
    assert line.endswith(f"{str(tmp_path / 'new' / '.out.build')!r}.")
    assert os.listdir(tmp_path / "new") == [".out.build"]


def read_until(terminal, reached, limit_s=120):
    """What the terminal shows until something is reached."""
    os.set_blocking(terminal, False)
    shown, end = b"", time.monotonic() + limit_s
    while time.monotonic() < end:
        last = reached()
        with contextlib.suppress(BlockingIOError, OSError):  # nothing yet, or nobody there any more
            shown += os.read(terminal, 65536)
        if last:
            return shown.decode()
        time.sleep(0.005)
    raise AssertionError(shown.decode())
