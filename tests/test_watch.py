"""The failure watch: the judge as a pure object, then real processes without any MPI.

Run as a program (`python tests/test_watch.py CASE`), this file is one rank: RANK, SIZE and MEETING (a folder
through which the chief's offer is broadcast) come from the environment.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from distfit.errors import InputError, RunError
from distfit.topology import Topology
from distfit.watch import NoWatch, Watch, addresses, client, protocol
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


def main(case):
    rank, size = int(os.environ["RANK"]), int(os.environ["SIZE"])
    if case == "strangers" and rank == 2:
        knock(broadcast(None))
    topology = Topology(rank=rank, size=size, host=f"h{rank}")
    watch = Watch.start(topology, broadcast, stall_limit_s=2.0 if case == "stall" else 600.0)
    watch.install_hooks()
    globals()[case](watch, rank)


# --- the harness -------------------------------------------------------------------------------------------


@dataclass
class Run:
    codes: list[int]
    out: list[str]
    err: list[str]
    seconds: float


@pytest.fixture
def launch(tmp_path):
    started = []

    def run(case, size=3, limit_s=20.0):
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
        codes = [p.wait(max(0.1, limit_s - (time.monotonic() - begin))) for p in started]
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
    return {"type": "failed", "kind": kind, "header": header, "traceback": trace, "position": "", "code": 1}


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
        stacks = {"type": "stacks", "text": "thread MainThread", "waiting": "step 9", "position": ""}
        judge.receive(rank, stacks, now=1.0)
    assert judge.verdict(now=2.9) is None
    report = judge.verdict(now=3.0).text.split("\n")
    assert "rank 1 of 3 on host h0 has waited for the other ranks for 61 s" in report[0]
    assert report[1] == "rank 2 on host h1 does not answer: it is stopped or stuck"
    assert report[2] == 'each of ranks 0, 1 on host h0 waits in "step 9"; its stacks:'


def test_judge_says_when_every_rank_waits():
    judge = judge_of(size=2)
    judge.receive(0, {"type": "stalled", "what": "step 9", "seconds": 61.0, "limit_s": 60.0}, now=0.0)
    for rank in (0, 1):
        place = {"waiting": f"step {9 + rank}", "position": ""}
        judge.receive(rank, {"type": "stacks", "text": f"stack {rank}", **place}, now=1.0)
    assert "every rank waits, so they are in different collectives" in judge.verdict(now=1.0).text


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
    watch = Watch.start(Topology(), broadcast=None)
    watch.install_hooks()
    assert isinstance(watch, NoWatch)
    assert sys.excepthook is hook
    with watch.running(), watch.waiting("step 1"):
        watch.position = "step 1"
    with pytest.raises(ValueError, match="boom"):
        watch.fail(ValueError("boom"))
    watch.close()


if __name__ == "__main__":
    main(sys.argv[1])
