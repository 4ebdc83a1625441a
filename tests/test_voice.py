"""One voice: the files and the words of a job are those of one process, and nobody asks for rank 0 but in one place."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distfit import log
from distfit.data import records
from distfit.warned import HELD_AT_MOST_S, MOST_SHOWN, QUIET_S, WHO, Collector
from tests.ranks import ROOT, environment, launch

RANKS = 3
# The rows that processes of a host share, gone when the run ends; and a folder in which a file without a name was made.
SHARED = re.compile(r"/distfit-rows-[^/]*$|^tmp$")


# --- the files and the words of a job


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """48 records in two files."""
    import tensorflow as tf

    def example(number):
        x = np.full(4, number / 48, np.float32)
        floats = {"x": x, "y": x[:1]}
        feature = {name: tf.train.Feature(float_list=tf.train.FloatList(value=value)) for name, value in floats.items()}
        return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()

    folder = tmp_path_factory.mktemp("records")
    for shard in range(2):
        name = folder / f"train-{shard:05d}-of-00002.tfrecord"
        records.write_records(name, [example(number) for number in range(shard, 48, 2)])
    return folder


class Left:
    """What a job of tests/voice_script.py left: its words, its files, and who opened them."""

    def __init__(self, folder: Path, data_set: Path, ranks: int) -> None:
        self.folder = folder
        for name in ("work", "home", "tmp", "told", "launcher"):
            (folder / name).mkdir()
        env = {
            "HOME": str(folder / "home"),
            "XDG_CACHE_HOME": str(folder / "home" / ".cache"),
            "TMPDIR": str(folder / "tmp"),
            "VOICE_CWD": str(folder / "work"),
            "VOICE_TOLD": str(folder / "told"),
            # The launcher's and other libraries' own files are no part of the run.
            "OMPI_MCA_orte_tmpdir_base": str(folder / "launcher"),
            "MPLCONFIGDIR": str(folder / "launcher"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        arguments = ["-m", "tests.voice_script", str(data_set)]
        self.job = launch(arguments, ranks, env=env, cwd=folder / "work", limit_s=300)
        assert self.job.code == 0, self.job.report()

    def tree(self) -> Counter[str]:
        """Every file and folder, of event files what is not the time, the host, the process or a number."""
        paths = [path for top in ("work", "home", "tmp") for path in (self.folder / top).rglob("*")]
        return Counter(self.normal(path) + ("/" if path.is_dir() else "") for path in paths)

    def opened(self) -> dict[str, list[int]]:
        """Which ranks opened a file for writing."""
        found: dict[str, list[int]] = {}
        for file in sorted((self.folder / "told").iterdir()):
            told = json.loads(file.read_text())
            for path in told["opened"]:
                found.setdefault(self.normal(Path(path)), []).append(told["rank"])
        return found

    def normal(self, path: Path) -> str:
        relative = path.relative_to(self.folder).as_posix()
        return re.sub(r"(?<=/events\.out\.tfevents\.)[^/]*?(?=(\.v2)?$)", "*", relative)


@pytest.fixture(scope="module")
def alone(data_set, tmp_path_factory):
    return Left(tmp_path_factory.mktemp("alone"), data_set, 1)


@pytest.fixture(scope="module")
def together(data_set, tmp_path_factory):
    return Left(tmp_path_factory.mktemp("together"), data_set, RANKS)


@pytest.mark.mpi
@pytest.mark.slow
def test_a_job_leaves_the_files_of_one_process_and_no_others(alone, together):
    assert together.tree() == alone.tree()
    expected = {"best.keras", "history.csv", "runs/kept/model.keras", "weights/2.weights.h5", "more-logs/"}
    assert {f"work/{name}" for name in expected} <= alone.tree().keys()
    assert any(name.startswith("work/runs/logs/") for name in alone.tree())
    assert (together.folder / "work" / "history.csv").read_text().count("\n") == 3


@pytest.mark.mpi
@pytest.mark.slow
def test_each_file_is_written_by_one_rank(together):
    opened = together.opened()
    shared = [name for name in opened if SHARED.search(name)]
    assert {name: ranks for name, ranks in opened.items() if len(ranks) > 1 and name not in shared} == {}
    assert len(shared) > 1
    assert [name for name in together.tree() if "distfit-rows" in name] == []
    assert {"work/history.csv", "work/best.keras"} <= {name for name, ranks in opened.items() if ranks == [0]}


@pytest.mark.mpi
@pytest.mark.slow
def test_standard_output_is_one_progress_in_plain_lines(alone, together):
    kinds = [kinds_of_lines(left.job.output) for left in (alone, together)]
    assert kinds[0] == kinds[1] == ["epoch 1/2", "epoch 2/2", "evaluating", "predicting"]
    for left in (alone, together):
        assert re.search(r"[\x1b\r\x08]", left.job.output) is None


def kinds_of_lines(output: str) -> list[str]:
    return [line.split(" - ")[0] for line in output.splitlines()]


@pytest.mark.mpi
@pytest.mark.slow
def test_each_warning_appears_once_with_who_has_it(alone, together):
    everywhere = f" (on all {RANKS} ranks)"
    found = together.job.errors
    assert lines_with("of everybody", found) == [f"UserWarning: of everybody{everywhere}"]
    assert lines_with("logged by everybody", found) == [f"logged by everybody{everywhere}"]
    assert lines_with("of the last rank", found) == [f"UserWarning: of the last rank (on rank 2 of {RANKS})"]
    assert lines_with("zero and two", found) == [f"distfit: warning: of zero and two (on ranks 0, 2 of {RANKS})"]
    # One process has nobody to share them with: as Python and its libraries do it.
    assert lines_with("of everybody", alone.job.errors) == ["UserWarning: of everybody"]
    assert lines_with("logged by everybody", alone.job.errors) == ["logged by everybody"] * 2
    assert "on rank" not in alone.job.errors


def lines_with(words: str, text: str) -> list[str]:
    """The lines that hold these words, without the file's name and without the source of the line."""
    lines = [line for line in text.splitlines() if words in line and not line.startswith("  ")]
    return [re.sub(r"^.*?:\d+: ", "", line) for line in lines]


# --- each warning once: the chief's collection


def test_a_warning_waits_until_every_rank_has_it_or_nobody_joins():
    collector = Collector(RANKS)
    collector.hear(0, "a", f"a{WHO}", now=0.0)
    collector.hear(1, "b", f"b{WHO}", now=0.5)
    collector.hear(2, "a", f"a{WHO}", now=1.0)
    assert collector.due(now=2.0) == []
    assert collector.next_due() == 0.5 + QUIET_S
    collector.hear(1, "a", f"a{WHO}", now=2.1)
    assert collector.due(now=2.1) == ["a (on all 3 ranks)"]
    assert collector.due(now=2.5) == ["b (on rank 1 of 3)"]
    assert collector.next_due() is None
    assert collector.rest() == []


def test_a_warning_is_not_held_back_for_ever():
    collector = Collector(100)
    for rank in range(50):
        collector.hear(rank, "a", f"a{WHO}", now=rank / 2)
        if said := collector.due(now=rank / 2):
            break
    assert (rank / 2, said) == (HELD_AT_MOST_S, ["a (on ranks 0-20 of 100)"])


def test_who_joins_late_is_named_at_the_end_once():
    collector = Collector(RANKS)
    collector.hear(0, "a", f"a{WHO}\n  of line two", now=0.0)
    assert collector.due(now=QUIET_S) == ["a (on rank 0 of 3)\n  of line two"]
    collector.hear(1, "a", f"a{WHO}", now=60.0)
    assert collector.due(now=100.0) == []
    assert collector.rest() == ["distfit: later the same (on ranks 0-1 of 3): a"]
    assert collector.rest() == []


def test_no_storm():
    collector = Collector(2)
    for number in range(MOST_SHOWN + 10):
        collector.hear(number % 2, str(number), f"{number}{WHO}", now=0.0)
    said = collector.rest()
    assert len(said) == MOST_SHOWN + 1
    assert said[-1] == "distfit: warning: 10 more warnings were not shown"


# --- on the way to the chief


class Rank:
    """One rank of three in this process: what it sends."""

    def __init__(self, chief: bool, rank: int) -> None:
        self.sent: list[dict] = []
        self.taken = True
        log.speak_as(chief, RANKS)
        self.rank = rank

    def connect(self) -> None:
        log.connect(self.rank, RANKS, self.send)

    def send(self, message: dict) -> bool:
        self.sent.append(message)
        return self.taken

    def texts(self) -> list[str]:
        log.disconnect()
        return [message["text"].replace(WHO, "|").split(": ", 1)[-1] for message in self.sent]


@pytest.fixture
def rank(monkeypatch):
    """A rank that is not the chief; afterwards this process is alone again."""
    monkeypatch.setattr(log, "_said", set())
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield Rank(chief=False, rank=1)
        log.disconnect()
        assert warnings.showwarning is shown
    log.speak_as(True)


def test_what_is_warned_of_before_there_is_a_connection_is_sent_first(rank, capsys):
    warnings.warn("early", stacklevel=1)
    log.warn_once("ours")
    rank.connect()
    warnings.warn("late", stacklevel=1)
    sent = rank.texts()
    assert [text.split("\n")[0] for text in sent] == ["UserWarning: early|", "warning: ours|", "UserWarning: late|"]
    assert capsys.readouterr() == ("", "")


def test_the_same_warning_travels_once_and_its_words_do_not_depend_on_the_folder(rank):
    rank.connect()
    for folder in ("/a", "/b"):
        for _ in range(3):
            warnings.showwarning("slow disk", UserWarning, f"{folder}/train.py", 7)
    assert rank.texts() == ["UserWarning: slow disk|"]
    assert rank.sent[0]["key"] == "UserWarning train.py:7 slow disk"


def test_records_of_logging_travel_and_errors_stay(rank, caplog):
    rank.connect()
    stream = open(os.devnull, "w")  # noqa: SIM115
    mine = logging.StreamHandler(stream)
    logging.getLogger("absl").addHandler(mine)
    seen = []
    mine.addFilter(lambda record: bool(seen.append(record.getMessage())) or True)
    logging.getLogger("absl").warning("to a file")
    logging.lastResort.handle(logging.makeLogRecord({"msg": "lost", "levelno": logging.ERROR}))
    assert not logging.lastResort.filter(logging.makeLogRecord({"msg": "slow", "levelno": logging.WARNING}))
    logging.getLogger("absl").removeHandler(mine)
    stream.close()
    assert rank.texts() == ["slow|"]
    assert seen == ["to a file"]


def test_a_record_whose_words_and_values_do_not_fit_is_left_to_its_handler(rank):
    rank.connect()
    assert logging.lastResort.filter(logging.makeLogRecord({"msg": "%d", "args": ("x",), "levelno": logging.WARNING}))
    assert rank.texts() == []


def test_a_child_of_a_rank_is_nobody_in_the_job(rank, capsys):
    rank.connect()
    log.warn_once("of the rank")
    child = os.fork()
    if child == 0:
        try:
            log.warn_once("of the child")
            log.disconnect()
        finally:
            os._exit(len(rank.sent))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) <= 1
    assert rank.texts() == ["warning: of the rank|"]
    assert capsys.readouterr().err == ""


def test_what_the_chief_no_longer_hears_is_printed_where_it_arises(rank, capsys):
    rank.connect()
    rank.taken = False
    log.warn_once("left alone")
    log.flush()
    assert capsys.readouterr().err == "distfit: warning: left alone (on rank 1 of 3)\n"


def test_a_rank_sends_so_many_and_says_that_there_were_more(rank):
    rank.connect()
    for number in range(3 * log.MOST_SENT):
        log.warn_once(f"number {number}")
    log.warn_once("x" * 10 * log.MOST_CHARACTERS)
    texts = rank.texts()
    assert len(texts) == log.MOST_SENT + 1
    assert "more than 100 different warnings" in texts[-1]
    assert max(map(len, texts)) <= log.MOST_CHARACTERS + 10


def test_a_warning_amid_the_sending_of_another_one_does_not_block(rank):
    """As when an object warns while it is destroyed, which may happen between any two lines."""

    def send(message: dict) -> bool:
        if "first" in message["text"]:
            log.warn_once("second")
        rank.sent.append(message)
        return True

    rank.send = send
    rank.connect()
    log.warn_once("first")
    assert rank.texts() == ["warning: first|", "warning: second|"]


def test_the_chief_prints_what_it_has_and_what_others_have(monkeypatch, capsys):
    monkeypatch.setattr(log, "_said", set())
    chief = Rank(chief=True, rank=0)
    log.warn_once("held back until the start has failed")
    log.disconnect()
    assert capsys.readouterr().err == "distfit: warning: held back until the start has failed\n"
    log.speak_as(True, RANKS)
    key = "distfit distfit: warning: of the chief"
    log.hear(1, {"key": key, "text": f"by the first of all{WHO}"})
    chief.connect()
    log.warn_once("of the chief")
    log.flush()
    for rank in (1, 2):
        log.hear(rank, {"key": key, "text": ""})
    log.hear(1, {"key": "other", "text": f"other{WHO}"})
    said = log.remaining()
    assert said[-1] == "other (on rank 1 of 3)"
    log.disconnect()
    log.speak_as(True)
    # Either of them, as soon as all ranks have it.
    assert (capsys.readouterr().err.splitlines() + said)[0] == "by the first of all (on all 3 ranks)"
    assert chief.sent == []  # it need not tell itself


def test_one_process_is_left_alone(monkeypatch):
    shown, filters = warnings.showwarning, list(logging.lastResort.filters)
    log.speak_as(True)
    assert (warnings.showwarning, logging.lastResort.filters) == (shown, filters)
    assert log.remaining() == []


# Ranks without MPI: the failure watch alone connects them.
RANK_OF_THREE = """
import os, sys, time, warnings
from distfit import log
from distfit.topology import Topology
from distfit.watch import start
from tests.test_watch import broadcast
rank = int(os.environ["RANK"])
log.speak_as(rank == 0, 3)
warnings.warn("before they are connected")
watch = start(Topology(rank, 3), broadcast)
watch.install_hooks()
log.flush()
open(os.path.join(os.environ["MEETING"], f"flushed-{rank}"), "w").close()
while len(os.listdir(os.environ["MEETING"])) < 4: time.sleep(0.01)
with watch.running():
    if rank == 2 and sys.argv[1] == "fails":
        log.warn_once("just before the end")
        raise ValueError("broken")
    with watch.waiting("step 1"):
        if sys.argv[1] == "fails":
            time.sleep(60)
warnings.warn("with the last line")
"""


@pytest.mark.parametrize("ending", ["fails", "ends well"])
def test_warnings_come_before_the_end_of_a_job_however_it_ends(ending, tmp_path):
    argv = [sys.executable, "-W", "always::UserWarning", "-c", RANK_OF_THREE, ending]
    env = environment(MEETING=str(tmp_path))
    pipe = subprocess.PIPE
    ranks = [
        subprocess.Popen(argv, env={**env, "RANK": str(rank)}, stdout=pipe, stderr=pipe, text=True) for rank in range(3)
    ]
    chief, *others = [each.communicate(timeout=60) for each in ranks]
    assert others == [("", "")] * 2
    assert lines_with("they are connected", chief[1]) == ["UserWarning: before they are connected (on all 3 ranks)"]
    if ending == "fails":
        assert {each.returncode for each in ranks} == {1}
        words = ("just before the end (on rank 2 of 3)", "failed: ValueError: broken", "Traceback", "all ranks end")
        assert [chief[1].index(each) for each in words] == sorted(chief[1].index(each) for each in words)
    else:
        assert {each.returncode for each in ranks} == {0}
        assert lines_with("the last line", chief[1]) == ["UserWarning: with the last line (on all 3 ranks)"]


# --- who is the chief is decided in one place

# Of a tensor, `rank` is the number of its dimensions; `by_rank` and `of_rank` are what ranks have.
RANK = re.compile(r"(^|[._])(rank|RANK)(\(\)|'\])?$")
OTHER = re.compile(r"(shape\.rank|\b(by|of)_rank|tf\.rank\(.*|local_rank)$")
FIRST = {(ast.Eq, 0), (ast.NotEq, 0), (ast.Gt, 0), (ast.LtE, 0), (ast.GtE, 1), (ast.Lt, 1), (ast.Is, 0), (ast.IsNot, 0)}
TURNED = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}


def is_rank(node: ast.AST) -> bool:
    """A name or attribute that ends with "rank", the call of one, or what is found under one."""
    if not isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.Subscript)):
        return False
    text = ast.unparse(node)
    return bool(RANK.search(text)) and not OTHER.search(text)


def number(node: ast.AST) -> int | None:
    """0 for 0, "0" and False, and so on; None for what is no such constant."""
    value = node.value if isinstance(node, ast.Constant) else None
    return int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdigit()) else None


def asks_for_the_first(left: ast.AST, operator: ast.cmpop, right: ast.AST) -> bool:
    if is_rank(right):
        left, right, operator = right, left, TURNED.get(type(operator), type(operator))()
    if not is_rank(left):
        return False
    if isinstance(operator, (ast.In, ast.NotIn)):
        return isinstance(right, (ast.Tuple, ast.List, ast.Set)) and [number(each) for each in right.elts] == [0]
    return (type(operator), number(right)) in FIRST


def asking_for_the_first(tree: ast.AST) -> list[str]:
    """Where a program branches on a rank being the first one: compared, matched, or taken for true or false."""
    found = []
    for node in ast.walk(tree):
        truths: list[ast.AST] = []
        wrong = False
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            wrong = any(map(asks_for_the_first, sides, node.ops, sides[1:]))
        elif isinstance(node, ast.Match):
            wrong = is_rank(node.subject)
        elif isinstance(node, ast.Subscript):
            wrong = is_rank(node.slice) and isinstance(node.value, (ast.Tuple, ast.List))
        elif isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            truths = [node.test]
        elif isinstance(node, ast.BoolOp):
            truths = node.values
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            truths = [node.operand]
        elif isinstance(node, ast.comprehension):
            truths = node.ifs
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "bool":
            truths = list(node.args)
        if wrong or any(map(is_rank, truths)):
            found.append(ast.unparse(node))
    return found


MODULES = sorted(path.relative_to(ROOT / "distfit").as_posix() for path in (ROOT / "distfit").rglob("*.py"))


def test_who_is_the_chief_is_decided_in_one_place():
    found = {name: asking_for_the_first(ast.parse((ROOT / "distfit" / name).read_text())) for name in MODULES}
    assert {name: lines for name, lines in found.items() if lines} == {"topology.py": ["rank == 0"]}


@pytest.mark.parametrize(
    "code",
    [
        "if rank == 0: pass",
        "if self.rank != 0: pass",
        "if 0 == session.rank: pass",
        "if 0 < rank < size: pass",
        "if topology.rank > 0: pass",
        "if rank < 1: pass",
        "rank >= 1",
        "if not hvd.rank(): pass",
        "if rank: pass",
        "x = 1 if self._rank else 2",
        "rank or print('hello')",
        "[x for x in y if not my_rank]",
        "match rank:\n    case 0: pass",
        "if rank in (0,): pass",
        "rank is 0",
        "('chief', 'other')[rank]",
        "bool(rank)",
        "environ['OMPI_COMM_WORLD_RANK'] == '0'",
    ],
)
def test_each_way_of_asking_for_the_first_rank_is_seen(code):
    with warnings.catch_warnings(action="ignore"):  # of `is` with a number
        assert asking_for_the_first(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    ["if 0 <= rank < size: pass", "rank == other", "ranks > 1", "if x.shape.rank == 0: pass", "local_rank == 0"],
)
def test_other_questions_are_let_through(code):
    assert asking_for_the_first(ast.parse(code)) == []
