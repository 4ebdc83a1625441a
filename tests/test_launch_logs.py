"""What ranks print: a copy of it in files (--rank-logs), and the live line of a job that was started at a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from distfit.errors import InputError
from distfit.launchers import rank_log
from tests.ranks import ROOT, environment, require

LAUNCH = [sys.executable, "-m", "distfit", "launch", "-np", "2"]
# With it, Python writes a line in pieces, and those of several ranks would mix.
IN_LINES = {"PYTHONUNBUFFERED": ""}
LAUNCHERS = {"mpirun": ["--launcher", "mpirun", "--allow-run-as-root"], "gloo": ["--gloo"]}


def logged(folder: Path, *program: str, **more: object) -> subprocess.CompletedProcess[str]:
    """A program with the copier in front, as a rank without a launcher; its output by pipes."""
    argv = rank_log.wrapped(program, str(folder), sys.executable)
    settings = {
        "env": environment(**IN_LINES),
        "capture_output": True,
        "text": True,
        "timeout": 60,
        "check": False,
        **more,
    }
    return subprocess.run(argv, **settings)


def python(code: str) -> tuple[str, str, str]:
    return sys.executable, "-c", code


def kept(folder: Path, rank: int = 0) -> list[str]:
    """What each run left in the file of a rank, below the line that begins it; waited for, as the copier ends last."""
    file = folder / rank_log.name_of(rank)
    deadline = time.monotonic() + 10
    while copiers(folder):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return re.split(r"^=== rank \d+ of \d+ on host .*\n", file.read_text(), flags=re.MULTILINE)[1:]


def copiers(folder: Path) -> list[int]:
    """Processes that hold a file of this folder open."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if any(opened.path.startswith(str(folder)) for opened in process.open_files()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_the_screen_and_the_file_get_the_same_bytes(tmp_path):
    code = "import os; [print(n, 'x' * 60) for n in range(5000)]; os.write(1, bytes([13, 27, 255])); print('y', end='')"
    plain = subprocess.run(python(code), env=environment(**IN_LINES), capture_output=True, check=True, timeout=60)
    through = logged(tmp_path / "a" / "b", *python(code), text=False)
    assert through.stdout == plain.stdout
    kept_bytes = (tmp_path / "a" / "b" / "rank-0000.log").read_bytes()
    assert kept_bytes.partition(b"\n")[2] == plain.stdout


def test_the_program_takes_the_place_of_the_process_that_the_launcher_started(tmp_path):
    """Its number, its input, its exit code; and it has no child that it did not start."""
    code = (
        "import os, sys; print(os.getpid(), input())\n"
        "try: os.waitpid(-1, 0)\n"
        "except ChildProcessError: print('alone')\n"
        "print('error', file=sys.stderr); sys.exit(7)"
    )
    argv = rank_log.wrapped(python(code), str(tmp_path), sys.executable)
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    output, errors = process.communicate("typed\n", timeout=60)
    assert (output, errors, process.returncode) == (f"{process.pid} typed\nalone\n", "error\n", 7)
    assert sorted(kept(tmp_path)[0].splitlines()) == sorted([f"{process.pid} typed", "alone", "error"])


def test_nothing_is_lost_when_a_rank_is_killed(tmp_path):
    code = "import os, signal; print('the last word', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    done = logged(tmp_path, *python(code))
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "the last word\n")
    assert kept(tmp_path) == ["the last word\n"]


def test_a_file_is_there_of_a_rank_that_printed_nothing_and_a_second_run_goes_on_in_it(tmp_path):
    logged(tmp_path, *python("pass"))
    assert kept(tmp_path) == [""]
    logged(tmp_path, *python("print('no line', end='')"))
    logged(tmp_path, *python("import no_such_module"))
    _, second, third = kept(tmp_path)
    assert second == "no line\n"
    assert third.splitlines()[-1] == "ModuleNotFoundError: No module named 'no_such_module'"


def test_a_program_that_is_not_there_is_told_in_the_file_as_well(tmp_path):
    done = logged(tmp_path, "no-such-program")
    assert done.returncode == 1
    assert done.stderr.startswith("distfit: error: Expected to start no-such-program, received")
    assert kept(tmp_path) == [done.stderr]


def test_a_terminal_stays_one_and_lines_of_both_streams_keep_their_order(tmp_path):
    code = (
        "import os, sys; print(sys.stdout.isatty(), os.get_terminal_size().columns)\n"
        "for n in range(20): print('out', n); print('err', n, file=sys.stderr)"
    )
    shown = at_a_terminal(rank_log.wrapped(python(code), str(tmp_path), sys.executable), columns=77)
    lines = [word for n in range(20) for word in (f"out {n}", f"err {n}")]
    assert shown.splitlines() == ["True 77", *lines]
    assert kept(tmp_path)[0].splitlines() == ["True 77", *lines]


def test_a_full_disk_is_told_and_the_program_goes_on(tmp_path):
    code = "for n in range(3000): print(n)"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    done = logged(tmp_path, *python(code), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit)))
    assert done.returncode == 0
    assert done.stdout.splitlines() == [str(n) for n in range(3000)]
    assert done.stderr == "distfit: warning: the file of this rank in --rank-logs takes no more; its disk may be full\n"


@pytest.mark.parametrize(
    ("folder", "why"), [("/dev/null/logs", "Not a directory"), ("/proc/logs", "No such file or directory")]
)
def test_a_folder_that_cannot_be_made_is_refused(folder, why):
    with pytest.raises(InputError, match=f"--rank-logs .* received {folder}: {why}"):
        rank_log.made(folder)


def test_the_refusal_comes_before_any_rank(tmp_path):
    argv = [*LAUNCH, *LAUNCHERS["mpirun"], "--rank-logs", "/dev/null/logs", "--", "touch", str(tmp_path / "ran")]
    require("mpirun")
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("distfit: error: Expected --rank-logs to be a folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["logs"], ["logs", "--"], ["logs", "python", "train.py"]])
def test_a_wrong_line_in_front_of_a_rank_is_told(arguments):
    with pytest.raises(InputError, match="a folder, -- and a program"):
        rank_log.main(arguments)


@pytest.mark.mpi
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_rank_has_its_file_under_every_launcher(launcher, tmp_path):
    """Import errors included, a rank that dies as well; the screen has what it would have without."""
    require("mpirun" if launcher == "mpirun" else "horovodrun")
    code = (
        "import os, time; from distfit.topology import from_environment; rank = from_environment(os.environ).rank\n"
        "print('rank', rank, flush=True)\n"
        "if rank == 0: open('spoken', 'w').close(); os._exit(0)\n"
        "while not os.path.exists('spoken'): time.sleep(0.05)\n"  # the launcher ends all when one has failed
        "import no_such_module"
    )
    argv = [*LAUNCH, *LAUNCHERS[launcher], "--rank-logs", "logs", "--", *python(code)]
    done = subprocess.run(
        argv, env=environment(**IN_LINES), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert kept(tmp_path / "logs", 0) == ["rank 0\n"]
    first, *_, last = kept(tmp_path / "logs", 1)[0].splitlines()
    assert (first, last) == ("rank 1", "ModuleNotFoundError: No module named 'no_such_module'")
    assert {"rank 0", "rank 1"} <= {line.split(">:")[-1] for line in done.stdout.splitlines()}
    assert done.stderr.count("ModuleNotFoundError") == 1


PROGRESS = """
import os, sys, time
from distfit.monitor.progress import Board, Pace
from distfit.monitor.terminal import live_here
from distfit.topology import from_environment
here = from_environment(os.environ)
if here.is_chief:
    board = Board(Pace(8, 64, 8), 1, 1, None, sys.stdout, live_here(here.size, os.environ))
    board.begin_training()
    board.begin_epoch(0)
    for step in range(8):
        time.sleep(0.1)
        board.step(step + 1, {"loss": 1.0})
    board.end_epoch({"loss": 1.0})
    board.end_training()
"""


@pytest.mark.mpi
@pytest.mark.parametrize("logs", [False, True])
def test_a_job_that_is_started_at_a_terminal_has_a_live_line(logs, tmp_path):
    """As wide as the terminal; with files of ranks it is plain lines, as a file cannot be redrawn."""
    require("mpirun")
    options = ["--rank-logs", str(tmp_path)] if logs else []
    shown = at_a_terminal([*LAUNCH, *LAUNCHERS["mpirun"], *options, "--", *python(PROGRESS)], columns=120)
    last = re.sub(r"^.*(\r|\x1b\[2K)", "", shown.splitlines()[-1])
    assert re.match(r"epoch 1/1 - 8 steps - \d+s - loss: 1\.0000", last)
    if logs:
        assert re.search(r"\x1b|\r(?!\n)", shown) is None
        assert kept(tmp_path)[0] == f"{last}\n"
    else:
        assert re.search(r"\r\x1b\[2K.*step [1-8]/8", shown)


def at_a_terminal(argv: list[str] | tuple[str, ...], columns: int) -> str:
    """What a program shows on a terminal of so many columns."""
    screen, own_end = pty.openpty()
    fcntl.ioctl(own_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = environment(TERM="xterm", **IN_LINES)
    for name in ("COLUMNS", "LINES"):
        env.pop(name, None)
    process = subprocess.Popen(
        argv, env=env, cwd=ROOT, stdin=own_end, stdout=own_end, stderr=own_end, start_new_session=True
    )
    os.close(own_end)
    shown = b""
    while data := _read(screen):
        shown += data
    os.close(screen)
    assert process.wait(timeout=60) == 0, shown.decode()
    return shown.decode()


def _read(screen: int) -> bytes:
    try:
        return os.read(screen, 4096)
    except OSError:  # everybody has closed it
        return b""
