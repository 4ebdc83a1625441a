"""What ranks tell each other first, and what is refused or advised then: pure, on made-up jobs."""

import pytest

from distfit import meeting
from distfit.differences import comparable, table

VERSIONS = {"Python": "3.12", "keras": "3.15.1", "distfit": "0.1.0 (aaaa)"}


def rank(host="n1", seen=(), taken=(), **versions):
    return {"host": host, "versions": {**VERSIONS, **versions}, "seen": list(seen), "taken": list(taken)}


def gpus(count, first=0):
    return [f"GPU-{number}" for number in range(first, first + count)]


def test_equal_ranks_have_no_problem():
    assert meeting.problem([rank(), rank("n2")]) is None


def test_other_versions_are_refused_with_a_table_of_what_differs():
    text = meeting.problem([rank(), rank(), rank("n2", keras="3.15.2"), rank("n3", keras="3.15.2")])
    assert "Expected the same versions on every rank, received:" in text
    assert text.splitlines()[1:-1] == [
        "           ranks 0-1    ranks 2-3",
        "  host     n1           n2 and 1 more",
        "  keras    3.15.1       3.15.2",
    ]
    assert "Install the same packages" in text


def test_another_source_of_the_same_version_is_refused():
    assert "0.1.0 (bbbb)" in meeting.problem([rank(), rank(distfit="0.1.0 (bbbb)")])


def test_versions_of_this_process_are_those_of_its_packages():
    import importlib.metadata

    found = meeting.versions()
    assert found["keras"] == importlib.metadata.version("keras")
    assert len(found["distfit"].rpartition("(")[2]) == 9


def test_the_digest_changes_with_a_file_and_with_its_name(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    digests = [meeting._digest(tmp_path)]
    (tmp_path / "a.py").write_text("x = 2")
    digests.append(meeting._digest(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    digests.append(meeting._digest(tmp_path))
    assert len(set(digests)) == 3


def test_two_ranks_on_one_gpu_are_refused_by_name():
    everybody = [rank(taken=["GPU-0"]), rank(taken=["GPU-1"]), rank(taken=["GPU-0"])]
    text = meeting.problem(everybody)
    assert "received GPU-0 of host n1 for ranks 0, 2." in text
    assert "CUDA_VISIBLE_DEVICES" in text


def test_the_same_number_on_another_host_is_another_gpu():
    assert meeting.problem([rank("n1", taken=["GPU 0"]), rank("n2", taken=["GPU 0"])]) is None


@pytest.mark.parametrize(
    ("everybody", "words"),
    [
        ([rank(seen=gpus(8), taken=gpus(1))], "7 of 8 on n1. Start one rank a GPU (distfit launch -np 8)"),
        ([rank(seen=gpus(8), taken=[gpu]) for gpu in gpus(2)], "6 of 8 on n1."),
        (
            [rank("n1", gpus(4), gpus(1)), rank("n2", gpus(4), gpus(1))],
            "3 of 4 on n1, 3 of 4 on n2. Start one rank a GPU (distfit launch -np 8)",
        ),
    ],
)
def test_idle_gpus_are_told(everybody, words):
    (warning,) = meeting.advice(everybody, {}, devices_were_chosen=False)
    assert words in warning


@pytest.mark.parametrize(
    "everybody",
    [
        [rank()],
        [rank(seen=gpus(2), taken=gpus(2))],
        [rank(seen=gpus(1), taken=gpus(1)), rank(seen=gpus(1, 1), taken=gpus(1, 1))],
        # Asked for on purpose: an engine on the CPU of a machine with GPUs.
        [rank(seen=gpus(8))],
    ],
)
def test_nothing_is_idle(everybody):
    assert meeting.advice(everybody, {}, devices_were_chosen=False) == []


def test_devices_that_were_chosen_leave_others_idle_without_a_word():
    assert meeting.advice([rank(seen=gpus(8), taken=gpus(2))], {}, devices_were_chosen=True) == []


BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_sbatch_without_srun_is_told():
    (warning,) = meeting.advice([rank()], BATCH_SCRIPT, devices_were_chosen=False)
    assert "Slurm allocated 8 tasks" in warning
    assert "Put srun" in warning


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**BATCH_SCRIPT, "SLURM_NTASKS": "1"},
        {**BATCH_SCRIPT, "SLURM_STEP_NUM_TASKS": "1"},
        {**BATCH_SCRIPT, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_srun_is_not_missed_where_a_launcher_ran_or_one_task_is_all(environment):
    assert meeting.advice([rank()], environment, devices_were_chosen=False) == []


def test_a_launcher_of_another_mpi_is_told():
    assert meeting.same_mpi(8, 8, []) is None
    text = meeting.same_mpi(8, 1, ["/opt/mpich/lib/libmpi.so.12"])
    assert "Expected the 8 ranks that the launcher started, received a job of 1" in text
    assert "/opt/mpich/lib/libmpi.so.12" in text
    assert "distfit doctor" in text


def test_two_mpi_libraries_in_one_process_are_told(tmp_path):
    (tmp_path / "libmpi.so.40").touch()
    (tmp_path / "libmpi.so").symlink_to(tmp_path / "libmpi.so.40")
    one = [str(tmp_path / "libmpi.so.40"), str(tmp_path / "libmpi.so")]
    assert meeting.several_mpis(one) is None
    assert "received 2: /a/libmpi.so, /b/libmpi.so" in meeting.several_mpis(["/a/libmpi.so", "/b/libmpi.so"])


def test_a_table_has_few_columns_and_short_cells():
    text = table([{"path": f"{rank}" * 60} for rank in range(9)])
    assert max(map(len, text.splitlines())) < 200
    assert text.splitlines()[-1] == "  and 5 more kinds of ranks"


def test_long_values_that_differ_at_their_end_are_told_apart():
    text = table([{"path": "x" * 50 + end} for end in ("one", "two", "two")])
    assert [line.split() for line in text.splitlines()] == [
        ["rank", "0", "ranks", "1-2"],
        ["path", "...xxxxxxxxxxone", "...xxxxxxxxxxtwo"],
    ]


def test_long_values_travel_short_and_differ_all_the_same():
    one, other = (comparable(["shard"] * 10_000 + [end]) for end in ("a", "b"))
    assert one != other
    assert max(len(one), len(other)) < 50
    assert len(table([{"data": one}, {"data": other}]).splitlines()) == 2


def test_a_fact_that_one_rank_lacks_is_a_difference():
    assert table([{"a": "1"}, {}]).splitlines()[-1].split() == ["a", "1", "-"]
