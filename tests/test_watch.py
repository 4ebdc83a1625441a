"""The failure watch: the judge as a pure object, then real processes without any MPI.

Run as a program (`python tests/test_watch.py CASE`), this file is one rank: RANK, SIZE and MEETING (a folder
through which the chief's offer is broadcast) come from the environment.
"""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from distfit.errors import InputError, Preempted, RunError
from distfit.topology import Topology
from distfit.watch import Here, NoWatch, addresses, callbacks, calls, client, protocol, start
from distfit.watch.judge import Judge

# --- the ranks ---------------------------------------------------------------------------------------------


def broadcast(offer):
    """The chief's object on every rank, through a file."""
    path = Path(os.environ["MEETING"]) / "offer.json"
    if offer is not None:
        path.with_suffix(".tmp").write_text(json.dumps(offer))
        path.with_suffix(".tmp").rename(path)
    while not path.exists():
        time.sleep(0.005)
    return json.loads(path.read_text())


def collective():
    """Where a rank would hang without the watch; the harness kills what is still here after its limit."""
    time.sleep(60)


def train(watch, step="epoch 2, step 17"):
    with watch.running():
        watch.position = step
        with watch.waiting(step):
            collective()


def exception_on_rank_1(watch, rank):
    if rank == 1:
        with watch.running():
            watch.position = "epoch 2, step 17"
            raise ValueError("boom on one")
    train(watch)


def exception_on_chief(watch, rank):
    print("printed before", end="")
    if rank == 0:
        time.sleep(0.3)  # the others print as well
        watch.position = "epoch 1, step 3"
        raise ValueError("boom on zero")
    train(watch)


def exception_everywhere(watch, rank):
    watch.position = "epoch 1, step 1"
    raise ValueError(f"boom on {rank}")


def killed_rank(watch, rank):
    if rank == 2:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    train(watch)


def killed_chief(watch, rank):
    if rank == 0:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    train(watch)


def exit_while_others_train(watch, rank):
    if rank == 1:
        sys.exit(0)
    train(watch)


def chief_exits_while_others_train(watch, rank):
    if rank == 0:
        sys.exit(0)
    time.sleep(0.5)
    train(watch)


def normal_end(watch, rank):
    """Ranks leave at different times, the chief in the middle, the last one long after the others."""
    with watch.running(), watch.waiting("epoch 1, step 1"):
        time.sleep(0.01)
    time.sleep((0.1, 0.0, 0.4)[rank])


def slow_end_of_section(watch, rank):
    """The chief still writes its last checkpoint in the section that the others have completed and left."""
    with watch.running():
        time.sleep(0.5 if rank == 0 else 0.0)


def agreed_error(watch, rank):
    time.sleep(0.1 * rank)
    error = InputError("Expected a folder, received none. Name one.")
    error.agreed = True
    with watch.running():
        raise error


def interrupted(watch, rank):
    if rank == 1:
        raise KeyboardInterrupt
    train(watch)


def leaves_at_once(watch, rank):
    if rank == 1:
        with watch.running():
            watch.position = "epoch 2, step 17"
            watch.leave_at_once("preempted again (SIGTERM)", 75)
    train(watch)


def all_are_asked_to_end(watch, rank):
    with watch.running():
        raise Preempted


def secondary_before_primary(watch, rank):
    if rank == 2:
        watch.fail(RuntimeError("the collective was shut down"), secondary=True)
    if rank == 1:
        time.sleep(0.5)
        raise ValueError("the cause")
    train(watch)


def secondary_alone(watch, rank):
    if rank == 2:
        watch.fail(RuntimeError("the collective was shut down"), secondary=True)
    train(watch)


def sleeping_over_a_file():
    collective()


def stall(watch, rank):
    with watch.running():
        watch.position = "epoch 2, step 16"
        if rank == 2:
            sleeping_over_a_file()
        train(watch)


def child_fails(watch, rank):
    """A forked child raises, and leaves through the hooks and exit handlers that it inherited."""
    if os.fork() == 0:
        raise ValueError(f"in the child of {rank}")
    os.wait()
    with watch.running():
        time.sleep(0.2)  # a child that had spoken for its rank would end the run here


def child_survives(watch, rank):
    """A copy of the killed rank's socket in its child would keep the connection open."""
    if rank == 2:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        (Path(os.environ["MEETING"]) / "child").write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)
    train(watch)


def in_probe(watch, everywhere=True):
    return watch.in_callback("Probe.on_epoch_end", everywhere)


def callback_of_the_chief_calls(watch, rank):
    """What stands under `if session.is_chief`, while the others are already in the next step."""
    with watch.running():
        watch.position = "epoch 2, step 16"
        if rank == 0:
            with in_probe(watch), watch.waiting("a gathering"):
                collective()
        train(watch)


def callback_on_the_chief_alone_calls(watch, rank):
    with watch.running():
        if rank == 0:
            with in_probe(watch, everywhere=False), watch.waiting("a gathering"):
                collective()
        train(watch)


def callbacks_call_different_things(watch, rank):
    with watch.running(), in_probe(watch):
        if rank == 2:
            time.sleep(3.0)  # writes a file: slow, and no reason for anything
        if rank == 1:
            with watch.running("predicting"):
                collective()
        with watch.running("evaluating"):
            collective()


def callback_calls_when_the_others_have_gone(watch, rank):
    with watch.running():
        if rank != 1:
            return
        time.sleep(0.5)
        with in_probe(watch), watch.waiting("a gathering"):
            collective()


def callbacks_call_together(watch, rank):
    """Sections and waits inside of callbacks, with nested callbacks; one rank is slow."""
    with watch.running(), watch.waiting("epoch 1, step 1"):
        pass
    with watch.running():
        watch.position = "epoch 1, step 4"
        with in_probe(watch):
            time.sleep(4.0 if rank == 2 else 0.0)
            with watch.running("evaluating"):
                watch.position = "evaluation, step 1"
                with watch.waiting("evaluation, step 1"), watch.in_callback("Probe.on_test_end", True):
                    pass
            assert watch.position == "epoch 1, step 4"
            with watch.waiting("a gathering"):
                pass
        report = Path(os.environ["MEETING"]) / f"section{rank}"
        report.write_text(f"{watch._here.inside} {watch._here.started} {watch._here.done}")
    assert watch._here.done == 3


def steps_with_callbacks(watch, rank):
    sent = []
    with watch.running():
        tell = watch._endpoint.send
        watch._endpoint.send = lambda message: sent.append(message) or tell(message)
        for step in range(100):
            watch.position = f"epoch 1, step {step}"
            with watch.waiting(watch.position):
                pass
            with watch.in_callback("Probe.on_train_batch_end", everywhere=True):
                pass
        del watch._endpoint.send
    (Path(os.environ["MEETING"]) / f"sent{rank}").write_text(json.dumps(sent))


def error_in_a_callback(watch, rank):
    with watch.running():
        watch.position = "epoch 2, step 17"
        if rank == 1:
            with watch.in_callback("Probe.on_train_batch_end", everywhere=True):
                raise ValueError("boom on one")
        train(watch)


def native_code_on_the_chief_holds_the_lock(watch, rank):
    with watch.running():
        with in_probe(watch):
            if rank == 0:
                ctypes.PyDLL(None).sleep(60)
        train(watch)


def strangers(watch, rank):
    """Nobody without the token gets in, however the connection is used; this is tried before the last rank
    joins, see `main`."""
    watch.running().__enter__()
    if rank == 1:
        raise ValueError("after the strangers")
    collective()


def knock(offer):
    hello = {"type": "hello", "rank": 2, "host": "h", "token": "0" * 32}
    for words in (protocol.encode(hello), b"GET / HTTP/1.0\r\n\r\n", b"[" * 4000 + b"\n", b'"\\ud800"\n'):
        with socket.create_connection(("127.0.0.1", offer["port"]), timeout=5) as stranger:
            stranger.sendall(words)
            assert stranger.recv(100) == b"", words


STALLS = {"stall": 2.0, "native_code_on_the_chief_holds_the_lock": 1.0}


def main(case):
    rank, size = int(os.environ["RANK"]), int(os.environ["SIZE"])
    if case == "strangers" and rank == 2:
        knock(broadcast(None))
    topology = Topology(rank=rank, size=size, host=f"h{rank}")
    watch = start(topology, broadcast, stall_limit_s=STALLS.get(case, 600.0))
    watch.install_hooks()
    globals()[case](watch, rank)


# --- the harness -------------------------------------------------------------------------------------------


@dataclass
class Run:
    codes: list[int | None]
    out: list[str]
    err: list[str]
    seconds: float


@pytest.fixture
def launch(tmp_path):
    started = []

    def run(case, size=3, limit_s=40.0, ends=None):
        begin = time.monotonic()
        for rank in range(size):
            environment = os.environ | {"RANK": str(rank), "SIZE": str(size), "MEETING": str(tmp_path)}
            environment["PYTHONPATH"] = str(Path(__file__).parents[1])
            started.append(
                subprocess.Popen(
                    [sys.executable, __file__, case],
                    env=environment,
                    text=True,
                    stdout=(tmp_path / f"out{rank}").open("w"),
                    stderr=(tmp_path / f"err{rank}").open("w"),
                    start_new_session=True,
                )
            )
        ends = range(size) if ends is None else ends  # the others are killed below, as a launcher does
        codes = [
            p.wait(max(0.1, limit_s - (time.monotonic() - begin))) if rank in ends else None
            for rank, p in enumerate(started)
        ]
        texts = [[(tmp_path / f"{name}{rank}").read_text() for rank in range(size)] for name in ("out", "err")]
        return Run(codes, *texts, time.monotonic() - begin)

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def only_chief_reports(run):
    """The chief's report, after making sure that nobody else said anything."""
    assert run.err[1:] == [""] * (len(run.err) - 1)
    assert run.err[0].count("distfit: all ranks end with exit code") == 1
    return run.err[0]


# --- real processes ----------------------------------------------------------------------------------------


def test_exception_on_one_rank_is_reported_once_by_the_chief(launch):
    run = launch("exception_on_rank_1")
    report = only_chief_reports(run)
    assert run.codes == [1, 1, 1]
    assert report.startswith(
        "distfit: rank 1 of 3 on host h1 failed at epoch 2, step 17: ValueError: boom on one\nTraceback"
    )
    assert 'raise ValueError("boom on one")' in report
    assert report.endswith("distfit: all ranks end with exit code 1; nothing more was written\n")


def test_exception_on_the_chief_ends_all_and_loses_no_output(launch):
    run = launch("exception_on_chief")
    assert run.codes == [1, 1, 1]
    assert "rank 0 of 3 on host h0 failed at epoch 1, step 3: ValueError: boom on zero" in only_chief_reports(run)
    assert run.out == ["printed before"] * 3


def test_same_exception_on_all_ranks_is_printed_once(launch):
    run = launch("exception_everywhere")
    assert run.codes == [1, 1, 1]
    assert only_chief_reports(run).count("Traceback") == 1


def test_killed_rank_is_named_with_the_position(launch):
    run = launch("killed_rank")
    assert run.codes == [1, 1, -signal.SIGKILL]
    report = only_chief_reports(run)
    assert "rank 2 of 3 on host h2 was killed or crashed" in report
    assert "at epoch 2, step 17" in report


def test_killed_chief_ends_all_and_one_rank_says_so(launch):
    run = launch("killed_chief")
    assert run.codes == [-signal.SIGKILL, 1, 1]
    assert [text.count("rank 0 of 3 on host h0 (the chief) was killed") for text in run.err] == [0, 1, 0]
    assert "at epoch 2, step 17" in run.err[1]


def test_exit_of_one_rank_while_the_others_train_ends_all(launch):
    run = launch("exit_while_others_train")
    # On a busy machine rank 1 may have gone, with its own code, before the others begin; they miss it then.
    assert run.codes in ([1, 1, 1], [1, 0, 1])
    assert "rank 1 of 3 on host h1 exited while the others were training" in only_chief_reports(run)


def test_chief_that_left_is_missed_when_the_others_train(launch):
    run = launch("chief_exits_while_others_train", size=2)
    assert run.codes == [0, 1]
    assert "rank 0 of 2 on host h0 (the chief) exited while the others were training" in run.err[1]


@pytest.mark.parametrize("case", ["normal_end", "slow_end_of_section"])
def test_normal_end_is_silent(launch, case):
    run = launch(case)
    assert (run.codes, run.err) == ([0, 0, 0], ["", "", ""])


def test_agreed_error_is_one_paragraph_of_the_chief_with_its_exit_code_everywhere(launch):
    run = launch("agreed_error")
    assert run.codes == [2, 2, 2]
    assert run.err == ["distfit: error: Expected a folder, received none. Name one.\n", "", ""]


def test_interrupt_ends_all_quietly(launch):
    run = launch("interrupted")
    assert (run.codes, run.err) == ([130] * 3, ["distfit: interrupted\n", "", ""])


def test_a_rank_that_has_to_leave_at_once_ends_all_with_its_line(launch):
    run = launch("leaves_at_once")
    line = "distfit: preempted again (SIGTERM) on rank 1 of 3 on host h1 at epoch 2, step 17: ended at once; exit 75\n"
    assert (run.codes, run.err) == ([75] * 3, [line, "", ""])


def test_an_end_that_all_ranks_were_asked_for_needs_no_word(launch):
    run = launch("all_are_asked_to_end")
    assert (run.codes, run.err) == ([75] * 3, ["", "", ""])


def test_the_cause_is_printed_and_not_its_consequence(launch):
    report = only_chief_reports(launch("secondary_before_primary"))
    assert "ValueError: the cause" in report
    assert "shut down" not in report


def test_a_consequence_without_a_cause_is_printed(launch):
    run = launch("secondary_alone")
    assert run.codes == [1, 1, 1]
    assert "RuntimeError: the collective was shut down" in only_chief_reports(run)


def test_stall_prints_the_stacks_of_all_ranks_the_absent_one_first(launch):
    run = launch("stall")
    report = only_chief_reports(run)
    assert run.codes == [1, 1, 1]
    assert 'in "epoch 2, step 17" (limit 2 s)' in report
    absent = report.index("rank 2 on host h2 stays away at epoch 2, step 16")
    waiting = report.index('each of ranks 0, 1 on host h0, h1 waits in "epoch 2, step 17"')
    assert absent < report.index("in sleeping_over_a_file") < waiting < report.rindex("in collective")
    assert "distfit-watch" not in report


def test_collective_that_a_callback_calls_on_the_chief_only_is_reported_by_name(launch):
    run = launch("callback_of_the_chief_calls")
    assert run.codes == [1, 1, 1]
    first, remedy, _ = only_chief_reports(run).splitlines()
    assert re.fullmatch(
        r"distfit: rank 0 of 3 on host h0 called \S+ in Probe.on_epoch_end \(test_watch.py, "
        r'line \d+\) at epoch 2, step 16, which needs all ranks; ranks 1-2 did not, but wait in "epoch 2, step 17"',
        first,
    )
    assert remedy == calls.REMEDY


def test_callback_on_the_chief_alone_that_calls_all_ranks_is_an_error_at_once(launch):
    run = launch("callback_on_the_chief_alone_calls")
    assert run.codes == [1, 1, 1]
    report = only_chief_reports(run)
    assert "RunError: Probe.on_epoch_end runs on the chief alone and called " in report
    assert "distfit.on_every_rank(Probe(...))" in report


def test_callbacks_that_call_different_things_are_reported_and_a_slow_one_is_not(launch):
    report = only_chief_reports(launch("callbacks_call_different_things"))
    assert "rank 0 of 3 on host h0 called " in report
    assert "; rank 1 did not, but calls " in report
    assert "rank 2" not in report


def test_callback_that_calls_ranks_that_have_gone_is_reported(launch):
    run = launch("callback_calls_when_the_others_have_gone")
    assert run.codes[1] == 1
    (report,) = [text for text in run.err if text]
    assert "in Probe.on_epoch_end (test_watch.py, line " in report
    assert re.search("rank 0 .*exited|ranks 0, 2 did not, but have (ended|left)|have left the run", report)


def test_callbacks_that_call_the_same_meet_however_slow_one_is(launch, tmp_path):
    run = launch("callbacks_call_together")
    assert (run.err, run.codes) == (["", "", ""], [0, 0, 0])
    # The section around the nested one goes on, and is not complete.
    assert [(tmp_path / f"section{rank}").read_text() for rank in range(3)] == ["training 3 1"] * 3


def test_steps_and_their_callbacks_send_nothing(launch, tmp_path):
    run = launch("steps_with_callbacks")
    assert (run.codes, run.err) == ([0, 0, 0], ["", "", ""])
    assert [json.loads((tmp_path / f"sent{rank}").read_text()) for rank in range(3)] == [[], [], []]


def test_error_in_a_callback_is_reported_with_its_name(launch):
    report = only_chief_reports(launch("error_in_a_callback"))
    assert report.startswith(
        "distfit: rank 1 of 3 on host h1 failed at epoch 2, step 17 in Probe.on_train_batch_end: ValueError: boom"
    )


def test_chief_that_is_stuck_in_native_code_ends_the_run_too(launch):
    run = launch("native_code_on_the_chief_holds_the_lock", size=2, ends=[1])
    assert run.codes == [None, 1]
    assert "rank 0 of 2 on host h0 (the chief) does not answer: it is stopped, or stuck in native code" in run.err[1]
    assert "callbacks that another rank ran last: Probe.on_epoch_end at epoch 2, step 17" in run.err[1]


def test_forked_child_that_fails_is_nobody_in_the_job(launch):
    run = launch("child_fails")
    assert run.codes == [0, 0, 0]
    assert [text.count("ValueError: in the child of") for text in run.err] == [1, 1, 1]
    assert "distfit:" not in "".join(run.err)


def test_forked_child_hides_no_death_of_its_rank(launch, tmp_path):
    try:
        run = launch("child_survives", limit_s=10.0)
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert run.codes == [1, 1, -signal.SIGKILL]
    assert "rank 2 of 3 on host h2 was killed or crashed" in only_chief_reports(run)


def test_strangers_without_the_token_are_hung_up_on(launch):
    run = launch("strangers")
    assert run.codes == [1, 1, 1]
    assert "ValueError: after the strangers" in only_chief_reports(run)


# --- pure --------------------------------------------------------------------------------------------------


def judge_of(size=3):
    judge = Judge(size, position=lambda: "epoch 1, step 5")
    for rank in range(size):
        judge.receive(rank, {"type": "hello", "host": f"h{rank // 2}"}, now=0.0)
    return judge


def running(what, started, done):
    return {"type": "running", "what": what, "started": started, "done": done}


def failed(kind, header="boom"):
    trace = "Traceback ...\n"
    return {
        "type": "failed",
        "kind": kind,
        "header": header,
        "traceback": trace,
        "position": "",
        "callback": "",
        "code": 1,
    }


def test_judge_says_nothing_while_all_is_well():
    judge = judge_of()
    judge.receive(1, running("training", 1, 0), now=0.0)
    assert judge.verdict(now=1e6) is None
    assert not judge.undecided


def test_judge_keeps_the_first_cause():
    judge = judge_of()
    judge.receive(2, failed("error", "first"), now=0.0)
    judge.receive(1, failed("error", "second"), now=0.0)
    judge.lost(2)
    assert "first" in judge.verdict(now=0.0).text


def test_judge_holds_a_consequence_back_for_two_seconds():
    judge = judge_of()
    judge.receive(2, failed("secondary"), now=10.0)
    assert judge.undecided
    assert judge.verdict(now=11.9) is None
    assert "boom" in judge.verdict(now=12.0).text


def test_judge_lets_a_rank_leave_that_has_completed_the_section_of_the_others():
    judge = judge_of()
    judge.receive(0, running("training", 1, 0), now=0.0)
    judge.receive(1, {"type": "bye", "done": 1}, now=0.0)
    judge.lost(1)
    assert judge.verdict(now=0.0) is None
    judge.receive(0, running("evaluating", 2, 1), now=0.0)
    assert "rank 1 of 3 on host h0 exited while the others were evaluating" in judge.verdict(now=0.0).text


def test_judge_reports_a_rank_that_does_not_answer_after_three_seconds():
    judge = judge_of()
    judge.receive(1, {"type": "stalled", "what": "step 9", "seconds": 61.0, "limit_s": 60.0}, now=0.0)
    assert judge.wants_stacks()
    assert not judge.wants_stacks()
    for rank in (0, 1):
        place = {"waiting": "step 9", "position": "", "callback": "", "ran": "Probe.on_epoch_end"}
        stacks = {"type": "stacks", "text": "thread MainThread", **place}
        judge.receive(rank, stacks, now=1.0)
    assert judge.verdict(now=2.9) is None
    report = judge.verdict(now=3.0).text.split("\n")
    assert "rank 1 of 3 on host h0 has waited for the other ranks for 61 s" in report[0]
    silent = "rank 2 on host h1 does not answer: it is stopped, or stuck in native code that holds Python's lock"
    assert report[1] == f"{silent}, maybe in one of the callbacks that another rank ran last: Probe.on_epoch_end"
    assert report[2] == 'each of ranks 0, 1 on host h0 waits in "step 9"; its stacks:'


def test_judge_says_when_every_rank_waits():
    judge = judge_of(size=2)
    judge.receive(0, {"type": "stalled", "what": "step 9", "seconds": 61.0, "limit_s": 60.0}, now=0.0)
    for rank in (0, 1):
        place = {"waiting": f"step {9 + rank}", "position": "", "callback": "", "ran": ""}
        judge.receive(rank, {"type": "stacks", "text": f"stack {rank}", **place}, now=1.0)
    assert "every rank waits, so they are in different collectives" in judge.verdict(now=1.0).text


def call(number=5, called="distfit.evaluate", **other):
    facts = {"what": "evaluating", "callback": "Probe.on_epoch_end", "place": "probe.py, line 12"}
    facts |= {"position": "epoch 1, step 4", "inside": "training", "section": 1}
    return calls.Call(number=number, called=called, **(facts | other))


def announced(*by_rank):
    """Calls of a job of as many ranks; None for one that has announced nothing."""
    found = calls.Calls(len(by_rank))
    for rank, one in enumerate(by_rank):
        if one is not None:
            found.announce(rank, one, now=0.0)
    return found


def contradiction(found, *progress):
    ranks = [*progress, *[calls.Progress()] * (found._size - len(progress))]
    return found.contradiction(ranks, lambda rank: f"rank {rank} of {found._size}")


def test_calls_are_met_once_when_all_ranks_announced_the_same():
    found = announced(call(), call(), None)
    assert not found.met()
    found.announce(2, call(place="probe.py, line 14", position=""), now=9.0)
    assert found.pending
    assert found.met()
    assert (found.pending, found.met()) == (False, False)


def test_a_rank_on_its_way_to_a_call_is_no_problem_however_long_it_takes():
    found = announced(call(5), None)
    assert contradiction(found) is None
    # It waits in what the other one has done already, or has done it and works.
    for place in ({"what": "epoch 1, step 4", "number": 4}, {"what": "", "number": 4}):
        found.place(1, place)
        assert found.problem(1e6, [calls.Progress()] * 2, str) is None


@pytest.mark.parametrize(
    ("others_call", "place", "progress", "instead"),
    [
        (None, {"what": "the end of an epoch", "number": 5}, {}, 'waits in "the end of an epoch"'),
        (None, {"what": "epoch 2, step 1", "number": 9}, {}, 'waits in "epoch 2, step 1"'),
        (None, None, {"done": 1}, 'has ended "training"'),
        (None, None, {"gone": True}, "has left the run"),
        (call(called="distfit.predict"), None, {}, "calls distfit.predict in Probe.on_epoch_end (probe.py, line 12)"),
        (call(6), None, {}, "calls distfit.evaluate in Probe.on_epoch_end (probe.py, line 12)"),
    ],
)
def test_rank_that_took_another_way_is_reported_with_where_it_is(others_call, place, progress, instead):
    found = announced(call(5), others_call)
    if place is not None:
        found.place(1, place)
    said, remedy = contradiction(found, calls.Progress(), calls.Progress(**progress)).split("\n")
    assert said == (
        "rank 0 of 2 called distfit.evaluate in Probe.on_epoch_end (probe.py, line 12) at epoch 1, step 4, which needs "
        f"all ranks; rank 1 did not, but {instead}"
    )
    assert remedy == calls.REMEDY


def test_ranks_in_the_same_place_are_reported_together():
    found = announced(call(), None, None, call(), call(8, inside=""))
    for rank in (1, 2):
        found.place(rank, {"what": "the end of an epoch", "number": 5})
    said = contradiction(found)
    assert said.startswith("ranks 0, 3 of 5 called ")
    assert '; ranks 1-2 did not, but wait in "the end of an epoch"; rank 4 did not, but calls ' in said


def test_problem_is_reported_when_it_has_stood_for_two_seconds():
    found, ranks = announced(call(), None), [calls.Progress()] * 2
    found.place(1, {"what": "a step", "number": 5})
    assert found.problem(10.0, ranks, str) is None
    found.place(1, {"what": "", "number": 0})
    assert found.problem(11.0, ranks, str) is None
    found.place(1, {"what": "a step", "number": 5})
    assert found.problem(12.0, ranks, str) is None
    assert found.problem(13.9, ranks, str) is None
    assert found.problem(14.0, ranks, str) is not None


def test_places_are_asked_for_after_a_second_and_twice_a_second():
    found = announced(None, None)
    assert not found.wants_places(100.0)
    found.announce(0, call(), now=100.0)
    assert [found.wants_places(now) for now in (100.9, 101.0, 101.4, 101.5)] == [False, True, False, True]


def test_what_another_library_does_is_reported_and_takes_no_part_in_calls_of_distfit():
    unasked = call(called="horovod.tensorflow.allreduce", unasked=True)
    found = announced(unasked, unasked)
    assert not found.met()
    assert contradiction(found) is None
    found.announce(1, None, now=0.0)
    found.place(1, {"what": "epoch 2, step 1", "number": 5})
    assert "rank 0 of 2 called horovod.tensorflow.allreduce in Probe.on_epoch_end" in contradiction(found)
    # Seen late by the watch's thread: this rank is about to make a call of distfit by now.
    found.announce(0, call(), now=0.0)
    found.announce(0, unasked, now=0.0)
    found.announce(0, None, now=0.0)
    found.announce(1, call(), now=0.0)
    assert found.met()


def test_function_of_another_library_is_seen_from_outside():
    here = Here(600.0)
    unasked, news = callbacks.Unasked(here), []
    library = types.ModuleType("horovod.tensorflow.mpi_ops")
    exec("def allreduce(look):\n    look()", vars(library))

    def look():
        news.extend(unasked.news() for _ in range(3))

    with callbacks.InCallback(here, "Probe.on_epoch_end", everywhere=True):
        look()
        library.allreduce(look)
        look()
    told, withdrawn = [message["call"] for message in news if message is not None]
    assert (told["called"], told["callback"], told["unasked"]) == (
        "horovod.tensorflow.mpi_ops.allreduce",
        "Probe.on_epoch_end",
        True,
    )
    assert withdrawn is None


def test_deputy_is_on_another_host_where_there_is_one():
    assert (judge_of(size=2).deputy(), judge_of(size=4).deputy()) == (1, 2)


def test_lines_refuse_what_is_too_long_or_no_object():
    for data in (b"x" * 11, b"12345678901\n", b"[1]\n", b"nonsense\n", b"\xff\n"):
        with pytest.raises(ValueError):
            protocol.Lines(limit=10).feed(data)


def test_unreachable_chief_is_an_error_that_names_what_was_tried(monkeypatch):
    monkeypatch.setenv(addresses.VARIABLE, "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    offer = {"addresses": addresses.offered(), "port": port, "token": "t", "host": "h0"}
    with pytest.raises(RunError, match=rf"127\.0\.0\.1 .*refused.*set {addresses.VARIABLE}"):
        client.connect(offer, Topology(rank=1, size=2))


def test_offered_addresses_end_with_loopback(monkeypatch):
    monkeypatch.delenv(addresses.VARIABLE, raising=False)
    assert addresses.offered()[-1] in ("127.0.0.1", "::1")
    monkeypatch.setenv(addresses.VARIABLE, "10.0.0.1, node7")
    assert addresses.offered() == ["10.0.0.1", "node7"]


def test_one_process_needs_no_watch_and_keeps_its_exceptions():
    hook = sys.excepthook
    watch = start(Topology(), broadcast=None)
    watch.install_hooks()
    assert isinstance(watch, NoWatch)
    assert sys.excepthook is hook
    with watch.running(), watch.waiting("step 1"):
        watch.position = "step 1"
        with watch.in_callback("Probe.on_epoch_end", everywhere=False), watch.running("evaluating"):
            watch.position = "evaluation, step 1"
        assert watch.position == "step 1"
    with pytest.raises(ValueError, match="boom"):
        watch.fail(ValueError("boom"))
    watch.close()


if __name__ == "__main__":
    main(sys.argv[1])
