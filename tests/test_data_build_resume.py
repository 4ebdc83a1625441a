"""Builds that are interrupted: what stays, what is gone on with, and that the result is the same bytes."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from distfit.data import build
from distfit.data.build.journal import Journal
from distfit.data.build.whole_folder import work_folder_of
from distfit.errors import InputError
from tests.pictures import make_caltech
from tests.ranks import environment
from tests.test_data_build import bytes_of

# Shrunk and kept images, more shards than threads.
OPTIONS = {"max_side": 40, "shards": 6, "validation_shards": 2, "seed": 5}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """60 pictures of three classes, 48 pixels, of which half have 32."""
    folder = make_caltech(tmp_path_factory.mktemp("resume") / "pictures", classes=3, per_class=10)
    small = make_caltech(folder.parent / "small", classes=3, per_class=10, side=32, seed=1)
    for path in sorted(small.glob("*/*")):
        os.link(path, folder / path.parent.name / f"small{path.name}")
    return folder


@pytest.fixture
def pictures(originals, tmp_path):
    """A copy of its own, with the same times."""
    subprocess.run(["cp", "-a", originals, tmp_path / "pictures"], check=True)
    return tmp_path / "pictures"


@pytest.fixture(scope="module")
def whole(originals, tmp_path_factory):
    """The bytes of a build that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    build.build_images(originals, out, **OPTIONS)
    return bytes_of(out)


class Told:
    """What a build counts, and an interruption after so many."""

    def __init__(self, title="", after=0, how=None):
        self.title, self.after, self.how, self.totals = title, after, how, {}

    @contextlib.contextmanager
    def __call__(self, title, total, unit):
        self.totals[title] = total
        counted = 0

        def done(size=0):
            nonlocal counted
            counted += 1
            if title == self.title and counted == self.after:
                self.how()

        yield done


def stop():
    raise KeyboardInterrupt


KILLED = """
import os, signal, sys
from distfit.data import build
from distfit.data.build import check
from tests.test_data_build_resume import OPTIONS, Told

check._ENTRY = 1
told = Told(sys.argv[3], int(sys.argv[4]), lambda: os.kill(os.getpid(), signal.SIGKILL))
build.build_images(sys.argv[1], sys.argv[2], threads=1, count=told, **OPTIONS)
"""


def killed(pictures, out, title, after):
    """A build in a process of its own that is killed after so many of one stage."""
    command = [sys.executable, "-c", KILLED, pictures, out, title, str(after)]
    assert subprocess.run(command, env=environment(), timeout=120).returncode == -signal.SIGKILL


def interrupted(pictures, out, title="Writing", after=20, **options):
    with pytest.raises(KeyboardInterrupt):
        build.build_images(pictures, out, count=Told(title, after, stop), **{**OPTIONS, "threads": 1, **options})


@pytest.mark.parametrize("threads", [1, 4])
def test_the_bytes_do_not_depend_on_the_threads(originals, whole, tmp_path, threads):
    build.build_images(originals, tmp_path / "out", threads=threads, **OPTIONS)
    assert bytes_of(tmp_path / "out") == whole
    assert os.listdir(tmp_path) == ["out"]


def test_a_build_that_was_killed_while_writing_goes_on(originals, whole, tmp_path, capsys):
    """48 records for training in 6 shards of 8, written one after the other: two and a half were done."""
    killed(originals, tmp_path / "out", "Writing", 20)
    assert os.listdir(tmp_path) == [".out.build"]
    left = sorted(name for name in os.listdir(tmp_path / ".out.build" / "new") if not name.startswith("."))
    assert left == [f"train-{shard:05d}-of-00006.tfrecord" for shard in range(2)]
    told = Told()
    build.build_images(originals, tmp_path / "out", threads=3, count=told, **OPTIONS)
    assert told.totals == {"Checking": 0, "Writing": 60 - 16}
    assert "going on with the build that was interrupted" in capsys.readouterr().err
    assert bytes_of(tmp_path / "out") == whole
    assert os.listdir(tmp_path) == ["out"]


def test_a_build_that_was_killed_while_checking_goes_on(originals, whole, tmp_path):
    killed(originals, tmp_path / "out", "Checking", 42)
    told = Told()
    build.build_images(originals, tmp_path / "out", count=told, **OPTIONS)
    # One thread is up to two pieces of eight ahead of what is in the journal.
    assert told.totals["Writing"] == 60
    assert 60 - 40 <= told.totals["Checking"] <= 60 - 16
    assert bytes_of(tmp_path / "out") == whole


@pytest.mark.parametrize(("title", "after"), [("Checking", 30), ("Writing", 3), ("Writing", 59)])
def test_what_ctrl_c_interrupts_goes_on(originals, whole, tmp_path, title, after):
    interrupted(originals, tmp_path / "out", title, after)
    assert os.listdir(tmp_path) == [".out.build"]
    build.build_images(originals, tmp_path / "out", **OPTIONS)
    assert bytes_of(tmp_path / "out") == whole


def test_bad_files_that_were_found_before_are_not_forgotten(pictures, tmp_path, capsys):
    (pictures / "001.ak47" / "0.txt").write_text("no image")
    interrupted(pictures, tmp_path / "out", skip_bad=True)
    capsys.readouterr()
    build.build_images(pictures, tmp_path / "out", skip_bad=True, **OPTIONS)
    assert "left out 1, kept 60 images:\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 6}, "had seed 5 instead of 6: starting anew"),
        ({"max_side": None}, "had max_side 40 instead of None, quality 90 instead of None: starting anew"),
        ({"quality": 80, "skip_bad": True}, "had quality 90 instead of 80, skip_bad False instead of True: starting"),
        ({"shards": None, "shard_bytes": 10_000}, "had shards 6 instead of None, shard_bytes None instead of 10000"),
    ],
)
def test_other_arguments_start_anew(originals, tmp_path, capsys, options, sentence):
    interrupted(originals, tmp_path / "out")
    told = Told()
    build.build_images(originals, tmp_path / "out", count=told, **(OPTIONS | options))
    assert sentence in capsys.readouterr().err
    assert told.totals == {"Checking": 60, "Writing": 60}
    build.build_images(originals, tmp_path / "direct", **(OPTIONS | options))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "direct")


@pytest.mark.parametrize("change", ["touched", "new", "gone", "moved"])
def test_other_files_start_anew(pictures, tmp_path, capsys, change):
    one = pictures / "001.ak47" / "001_0001.jpg"
    interrupted(pictures, tmp_path / "out")
    {
        "touched": lambda: os.utime(one),
        "new": lambda: (pictures / "001.ak47" / "new.jpg").write_bytes(one.read_bytes()),
        "gone": one.unlink,
        "moved": lambda: one.rename(pictures / "257.clutter" / one.name),
    }[change]()
    told = Told()
    build.build_images(pictures, tmp_path / "out", count=told, **OPTIONS)
    assert "had other inputs: starting anew" in capsys.readouterr().err
    assert told.totals["Checking"] == told.totals["Writing"] == 60 + {"new": 1, "gone": -1}.get(change, 0)


def test_fresh_does_not_go_on(originals, tmp_path, capsys):
    interrupted(originals, tmp_path / "out")
    told = Told()
    build.build_images(originals, tmp_path / "out", fresh=True, count=told, **OPTIONS)
    assert told.totals == {"Checking": 60, "Writing": 60}
    assert capsys.readouterr().err == ""


def test_a_build_that_is_refused_keeps_nothing_of_the_one_before(pictures, tmp_path):
    interrupted(pictures, tmp_path / "out")
    (pictures / "001.ak47" / "0.txt").write_text("no image")
    with pytest.raises(InputError, match="is no image"):
        build.build_images(pictures, tmp_path / "out", **OPTIONS)
    assert os.listdir(tmp_path) == ["pictures"]


def test_a_shard_that_was_damaged_meanwhile_is_written_again(originals, whole, tmp_path):
    interrupted(originals, tmp_path / "out")
    shard = tmp_path / ".out.build" / "new" / "train-00000-of-00006.tfrecord"
    shard.write_bytes(shard.read_bytes()[:-1])
    told = Told()
    build.build_images(originals, tmp_path / "out", count=told, **OPTIONS)
    assert told.totals["Writing"] == 60 - 8
    assert bytes_of(tmp_path / "out") == whole


def test_two_builds_of_one_folder_are_not_made_at_a_time(originals, tmp_path):
    work = tmp_path / ".out.build"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="received another process that is at work on it"):
            build.build_images(originals, tmp_path / "out", **OPTIONS)
    build.build_images(originals, tmp_path / "out", **OPTIONS)
    assert os.listdir(tmp_path) == ["out"]


def test_a_kill_while_a_data_set_is_replaced_loses_neither(originals, whole, tmp_path):
    """What is replaced is moved into the work folder, then the new one out of it; here a kill came between."""
    out, work = tmp_path / "out", tmp_path / ".out.build"
    build.build_images(originals, out, **(OPTIONS | {"seed": 1}))
    before = bytes_of(out)
    interrupted(originals, out, force=True)
    os.rename(out, work / "old")
    interrupted(originals, out, "Writing", 3, force=True)
    assert bytes_of(out) == before
    build.build_images(originals, out, force=True, **OPTIONS)
    assert bytes_of(out) == whole
    assert os.listdir(tmp_path) == ["out"]


def test_a_source_without_a_name_for_its_state_leaves_nothing(tmp_path):
    """Nobody knows whether a function will give the same bytes again."""
    with pytest.raises(KeyboardInterrupt):
        build.build_digits(tmp_path / "new" / "out", count=Told("Writing", 500, stop))
    assert os.listdir(tmp_path) == []


def test_what_was_left_is_not_taken_for_another_source(originals, tmp_path):
    """The names of shards are the same, which alone says nothing."""
    interrupted(originals, tmp_path / "out")
    digits = {"shards": 6, "validation_shards": 2}
    build.build_digits(tmp_path / "out", **digits)
    build.build_digits(tmp_path / "direct", **digits)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "direct")
    assert sorted(os.listdir(tmp_path)) == ["direct", "out"]


# The thread that counts waits a little, so that the main one meets its signal before all is written.
SIGNALLED = """
import os, signal, sys, time
from distfit.cli import main
from distfit.monitor import counting
from tests.test_data_build_resume import Told

signal.signal(signal.SIGINT, signal.default_int_handler)
number = int(sys.argv.pop())
counting.shown = Told("Writing", 20, lambda: (os.kill(os.getpid(), number), time.sleep(0.5)))
main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_command_with_a_line_that_says_how_to_go_on(originals, whole, tmp_path, number, status):
    arguments = ["--images", originals, "--max-side", 40, "--seed", 5, "--shards", 6, "--validation-shards", 2]
    program = [sys.executable, "-c", SIGNALLED, "data", "build", *map(str, arguments), "out"]
    command = [*program, str(int(number))]
    ended = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == status, ended.stderr
    assert ended.stderr == (
        "distfit: interrupted; the same command goes on from here (--fresh starts anew). What is done lies in "
        f"{str(tmp_path / '.out.build')!r}.\n"
    )
    build.build_images(originals, tmp_path / "out", **OPTIONS)
    assert bytes_of(tmp_path / "out") == whole


@pytest.mark.parametrize("cut", [1, 5, 11, 12, 20])
def test_a_journal_drops_an_entry_that_is_not_whole(tmp_path, cut):
    path = str(tmp_path / "journal")
    with contextlib.closing(Journal(path)) as journal:
        for entry in (b"one", b"", b"three"):
            journal.append(entry)
    os.truncate(path, os.path.getsize(path) - cut)
    with contextlib.closing(Journal(path)) as journal:
        assert journal.entries == [b"one", b""]
        journal.append(b"again")
    with contextlib.closing(Journal(path)) as journal:
        assert journal.entries == [b"one", b"", b"again"]


def test_a_state_that_cannot_be_read_starts_anew(originals, whole, tmp_path):
    interrupted(originals, tmp_path / "out")
    state = tmp_path / ".out.build" / "state.json"
    assert json.loads(state.read_text())["seed"] == 5
    state.write_text("{")
    told = Told()
    build.build_images(originals, tmp_path / "out", count=told, **OPTIONS)
    assert told.totals == {"Checking": 60, "Writing": 60}
    assert bytes_of(tmp_path / "out") == whole


def test_the_place_of_the_work_follows_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to("disk")
    assert work_folder_of(tmp_path / "data" / "out") == str(tmp_path / "disk" / ".out.build")
