"""From facts and a job to a launcher's command line: nothing is started, the texts are what the real programs print."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from distfit import cgroups
from distfit.errors import InputError, RunError
from distfit.launchers import choice, environment, facts, job, start
from distfit.launchers.choice import Wanted, command_for, ranks_by_default
from distfit.launchers.command import Command, shown, threads_per_rank
from distfit.launchers.facts import Allocation, Facts, Family, Mpirun, Slurm
from distfit.launchers.job import Job, parse_hosts
from tests.ranks import ROOT
from tests.ranks import environment as of_a_job

PRINTED = {
    Family.open_mpi_4: "mpirun (Open MPI) 4.1.8\n\nReport bugs to http://www.open-mpi.org/community/help/\n",
    Family.open_mpi_5: "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n\n",
    Family.mpich: (
        "HYDRA build details:\n"
        "    Version:                                 5.0.2\n"
        "    Release Date:                            Fri Sep 25 20:45:26 UTC 2026\n"
        "    Process Manager:                         pmi\n"
        "    Launchers available:                     ssh rsh fork slurm ll lsf sge manual persist\n"
    ),
    Family.intel: (
        "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626 (id: b44796a)\n"
        "Copyright 2003-2026, Intel Corporation.\n"
    ),
}
VERSIONS = {"4.1.8": Family.open_mpi_4, "5.0.11": Family.open_mpi_5, "5.0.2": Family.mpich, "2021.18.1": Family.intel}
SRUN_TYPES = (
    "MPI plugin types are...\n\tpmix\n\tnone\n\tcray_shasta\n\tpmi2\nspecific pmix plugin versions available: pmix_v4\n"
)
SRUN_ALONE = (
    "srun: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
    "srun: fatal: Could not establish a configuration source\n"
)
PROGRAM = ("python", "train.py", "--name", "a b")
HOROVODRUN = "/env/bin/python -P -m distfit.launchers.horovodrun_program"
PAIR = parse_hosts("h1:4,h2:4")
SLURM = Slurm("/usr/bin/srun", "22.05.8", ("pmix", "none", "pmi2"))
GIVEN = Allocation("Slurm", tasks=8, hosts=2, cores=16, cores_per_task=4)
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "s3cr3t",
    "GITHUB_PAT": "s3cr3t",
    "TF_API_TOKEN": "s3cr3t",
    "TF_VAR_database": "s3cr3t",
    "HOROVOD_PASSWORD": "s3cr3t",
    "KERAS_PASSPHRASE": "s3cr3t",
    "TF_DB_PWD": "s3cr3t",
    "SLURM_JWT": "s3cr3t",
}
FOUND = {"PATH": "/env/bin:/usr/bin", "HOME": "/home/me", "PYTHONPATH": "/src", "NCCL_DEBUG": "INFO", **SECRETS}


def machine(family: Family | None = Family.open_mpi_4, **changes: object) -> Facts:
    """A machine of 16 cores with everything but an allocation, seen by an ordinary user."""
    plain = Facts(
        mpirun=Mpirun("/env/bin/mpirun", family, "1.2.3"),
        slurm=SLURM,
        horovod="0.28.1",
        allocation=None,
        cores=16,
        root=False,
        folder="/home/me/mine",
        python="/env/bin/python",
        environment=FOUND,
        inherited=FOUND,
    )
    return replace(plain, **changes)


def argv_of(job: Job, here: Facts, wanted: Wanted = Wanted.auto, **options: bool) -> list[str]:
    return list(command_for(job, here, wanted, **options).argv)


def before_program(argv: list[str]) -> str:
    assert argv[-len(PROGRAM) :] == list(PROGRAM)
    return " ".join(argv[: -len(PROGRAM)])


# --- what programs print


@pytest.mark.parametrize(("version", "family"), VERSIONS.items())
def test_each_mpirun_is_known_by_what_it_prints(version, family):
    assert facts.mpirun_of("/bin/mpirun", PRINTED[family]) == Mpirun("/bin/mpirun", family, version)


@pytest.mark.parametrize("printed", ["mpirun (Open MPI) 3.1.6\n", "IBM Spectrum MPI 10.3\n", "ls: no such option\n"])
def test_any_other_mpirun_is_refused_with_its_own_words(printed):
    other = facts.mpirun_of("/bin/mpirun", printed)
    assert other == Mpirun("/bin/mpirun", None, printed.strip())
    with pytest.raises(InputError, match=printed.split()[0]):
        command_for(Job(2, PROGRAM), machine(mpirun=other), Wanted.mpirun)
    assert facts.mpirun_of("/bin/mpirun", "") is None


def test_slurm_is_known_by_what_srun_prints_and_absent_where_it_reaches_no_controller():
    assert facts.slurm_of("/usr/bin/srun", "slurm-wlm 22.05.8\n", SRUN_TYPES) == Slurm(
        "/usr/bin/srun", "22.05.8", ("pmix", "none", "cray_shasta", "pmi2")
    )
    older = "srun: MPI types are...\nsrun: none\nsrun: pmix_v3\nsrun: pmix\n"
    assert facts.slurm_of("/usr/bin/srun", "slurm 20.11.9\n", older) == Slurm(
        "/usr/bin/srun", "20.11.9", ("none", "pmix_v3", "pmix")
    )
    assert facts.slurm_of("/usr/bin/srun", SRUN_ALONE, SRUN_ALONE) is None


def test_an_allocation_is_read_as_slurm_writes_it():
    written = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "8",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_CPUS_PER_NODE": "16(x2)",
        "SLURM_CPUS_PER_TASK": "4",
    }
    assert facts.allocation_of(written) == GIVEN
    assert facts.allocation_of({**written, "SLURM_STEP_ID": "0"}) == replace(GIVEN, in_step=True)
    assert facts.allocation_of({"PBS_NODEFILE": "/not/there"}) == Allocation("PBS")


@pytest.mark.parametrize("variable", ["PBS_NODEFILE", "OMPI_MCA_orte_default_hostfile"])
@pytest.mark.parametrize("lines", ["h1\nh1\nh2\nh2\n", "# ours\nh1 slots=2\nh2 slots=2\n\n", "h1:2\nh2:2\n"])
def test_a_file_of_hosts_is_an_allocation(tmp_path, variable, lines):
    (tmp_path / "hosts").write_text(lines)
    assert facts.allocation_of({variable: str(tmp_path / "hosts")}).hosts == 2


def test_this_machine_is_looked_at(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    here = facts.gather()
    assert here.cores >= 1
    assert here.python == sys.executable
    assert here.environment["PATH"].endswith(":/usr/bin")
    assert here.inherited["PATH"] == "/usr/bin"


# --- command lines


def test_open_mpi_on_one_machine():
    argv = before_program(argv_of(Job(2, PROGRAM), machine()))
    assert argv == (
        "/env/bin/mpirun -np 2 -H localhost:2 --map-by slot --bind-to none -x DISTFIT_CTRL_C -x NCCL_DEBUG "
        "-x OMP_NUM_THREADS -x PATH -x PYTHONPATH -x TF_NUM_INTEROP_THREADS -x TF_NUM_INTRAOP_THREADS"
    )


@pytest.mark.parametrize(
    ("family", "own"),
    [(Family.open_mpi_4, "--mca oob_tcp_if_include eth0"), (Family.open_mpi_5, "--prtemca prte_if_include eth0")],
)
def test_open_mpi_on_hosts_over_one_interface(family, own):
    command = command_for(Job(6, PROGRAM, PAIR, interface="eth0"), machine(family))
    argv = before_program(list(command.argv))
    assert argv.startswith("/env/bin/mpirun -np 6 -H h1:4,h2:4 --map-by slot --bind-to none --mca btl_tcp_if_include")
    assert f"btl_tcp_if_include eth0 {own} -x" in argv
    assert "-x NCCL_SOCKET_IFNAME" in argv
    assert command.environment["NCCL_SOCKET_IFNAME"] == "eth0"


@pytest.mark.parametrize("family", [Family.open_mpi_4, Family.open_mpi_5])
def test_open_mpi_on_one_machine_needs_no_interface_for_itself(family):
    argv = before_program(argv_of(Job(2, PROGRAM, interface="lo"), machine(family)))
    assert "--mca btl_tcp_if_include lo -x" in argv
    assert argv.count(" lo ") == 1


def test_open_mpi_takes_the_hosts_of_an_allocation():
    here = machine(allocation=Allocation("PBS"))
    assert " -H " not in before_program(argv_of(Job(2, PROGRAM), here))


@pytest.mark.parametrize(("cores", "ranks", "yields"), [(16, 8, False), (16, 9, True), (2, 2, True), (2, 1, False)])
def test_ranks_yield_where_no_core_is_left_for_waiting(cores, ranks, yields):
    option = "--mca mpi_yield_when_idle 1"
    assert (option in before_program(argv_of(Job(ranks, PROGRAM), machine(cores=cores)))) is yields
    given = Allocation("Slurm", tasks=2 * ranks, hosts=2, cores=cores)
    under_srun = command_for(Job(2 * ranks, PROGRAM), machine(cores=1, allocation=given))
    assert ("OMPI_MCA_mpi_yield_when_idle" in under_srun.environment) is yields
    assert ("OMPI_MCA_mpi_yield_when_idle" in " ".join(under_srun.argv)) is yields


def test_mpich_on_hosts():
    argv = before_program(argv_of(Job(6, PROGRAM, PAIR, interface="eth0"), machine(Family.mpich)))
    assert argv == (
        "/env/bin/mpirun -np 6 -hosts h1:4,h2:4 -bind-to none -iface eth0 -genvlist "
        "NCCL_DEBUG,NCCL_SOCKET_IFNAME,OMP_NUM_THREADS,PATH,PYTHONPATH,TF_NUM_INTEROP_THREADS,TF_NUM_INTRAOP_THREADS"
    )


def test_intel_mpi_takes_the_same_number_for_every_host():
    command = command_for(Job(8, PROGRAM, PAIR), machine(Family.intel))
    assert before_program(list(command.argv)).startswith(
        "/env/bin/mpirun -np 8 -hosts h1,h2 -ppn 4 -genvlist I_MPI_PIN,"
    )
    assert command.environment["I_MPI_PIN"] == "0"
    assert "-hosts h1 -ppn 4" in before_program(argv_of(Job(4, PROGRAM, PAIR), machine(Family.intel)))
    with pytest.raises(InputError, match="as many ranks on each host"):
        command_for(Job(6, PROGRAM, PAIR), machine(Family.intel))


def test_srun_in_an_allocation():
    argv = before_program(argv_of(Job(8, PROGRAM), machine(allocation=GIVEN)))
    assert argv == (
        "/usr/bin/srun --ntasks=8 --mpi=pmix --cpus-per-task=4 --kill-on-bad-exit=1 --disable-status --export=HOME,"
        "NCCL_DEBUG,OMP_NUM_THREADS,PATH,PYTHONPATH,TF_NUM_INTEROP_THREADS,TF_NUM_INTRAOP_THREADS"
    )
    on_hosts = before_program(argv_of(Job(8, PROGRAM, PAIR), machine(allocation=GIVEN)))
    assert "--ntasks=8 --nodes=2 --nodelist=h1,h2 --ntasks-per-node=4 --mpi=pmix" in on_hosts
    assert "--mpi=pmi2" in before_program(argv_of(Job(8, PROGRAM), machine(Family.mpich, allocation=GIVEN)))
    with pytest.raises(InputError, match="as many ranks on each host"):
        command_for(Job(5, PROGRAM, PAIR), machine(allocation=GIVEN))


def test_srun_shares_the_cores_of_an_interactive_shell():
    assert "--overlap" in argv_of(Job(8, PROGRAM), machine(allocation=replace(GIVEN, in_step=True)))
    assert "--overlap" not in argv_of(Job(8, PROGRAM), machine(allocation=GIVEN))


def test_a_slurm_without_pmix_leaves_open_mpi_to_mpirun():
    here = machine(allocation=GIVEN, slurm=replace(SLURM, mpi_types=("none", "pmi2")))
    assert argv_of(Job(8, PROGRAM), here)[0] == "/env/bin/mpirun"
    with pytest.raises(InputError, match=r"pmix.*none, pmi2.*--launcher mpirun"):
        command_for(Job(8, PROGRAM), here, Wanted.srun)


def test_horovodrun_on_one_machine():
    by_gloo = before_program(argv_of(Job(2, PROGRAM, interface="eth0"), machine(), gloo=True))
    assert by_gloo == f"{HOROVODRUN} -np 2 -H localhost:2 --gloo"
    by_mpi = argv_of(Job(2, PROGRAM), machine(cores=2), Wanted.horovodrun)
    options = ["-np", "2", "-H", "localhost:2", "--mpi", "--mpi-args=--mca mpi_yield_when_idle 1"]
    assert by_mpi == [*HOROVODRUN.split(), *options, *PROGRAM]


def test_horovodrun_across_hosts_leaves_sshs_host_keys_alone():
    by_gloo = before_program(argv_of(Job(6, PROGRAM, PAIR, interface="eth0"), machine(), gloo=True))
    assert by_gloo == f"{HOROVODRUN} -np 6 -H h1:4,h2:4 --network-interfaces eth0 --gloo"
    by_mpi = argv_of(Job(6, PROGRAM, PAIR), machine(), Wanted.horovodrun)
    assert "--mpi-args=--prefix /env" in by_mpi
    everything = [*(ROOT / "distfit").rglob("*.py"), *(ROOT / "launch").iterdir()]
    assert [path.name for path in everything if "StrictHostKeyChecking" in path.read_text()] == [
        "horovodrun_program.py"  # which takes it out
    ]


# --- which launcher


@pytest.mark.parametrize(
    ("changes", "launcher"),
    [
        ({}, "/env/bin/mpirun"),
        ({"slurm": None}, "/env/bin/mpirun"),
        ({"allocation": GIVEN}, "/usr/bin/srun"),
        ({"allocation": Allocation("PBS")}, "/env/bin/mpirun"),
        ({"mpirun": None}, "/env/bin/python"),
        ({"mpirun": None, "allocation": replace(GIVEN, hosts=1)}, "/env/bin/python"),
        ({"mpirun": Mpirun("/bin/mpirun", None, "IBM")}, "/env/bin/python"),
    ],
)
def test_the_launcher_is_chosen(changes, launcher):
    assert argv_of(Job(2, PROGRAM), machine(**changes))[0] == launcher


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"mpirun": None, "horovod": None}, {}, "distfit horovod install"),
        ({"mpirun": None}, {"wanted": Wanted.mpirun}, "distfit horovod install"),
        ({"horovod": None}, {"gloo": True}, "distfit horovod install"),
        ({}, {"wanted": Wanted.srun}, "Slurm allocation for srun, found none"),
        ({"slurm": None}, {"wanted": Wanted.srun}, "no srun that reaches Slurm"),
        ({}, {"wanted": Wanted.mpirun, "gloo": True}, "--gloo with --launcher horovodrun"),
        ({"mpirun": None}, {"wanted": Wanted.horovodrun}, "received no known mpirun. Use --gloo"),
        ({"inherited": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}}, {}, "rank 1 of 4"),
    ],
)
def test_what_cannot_be_started_says_what_to_do(changes, options, words):
    with pytest.raises(InputError, match=words):
        command_for(Job(2, PROGRAM), machine(**changes), **options)


def test_horovodrun_is_refused_where_it_would_fail():
    with pytest.raises(InputError, match="received Open MPI 5"):
        command_for(Job(2, PROGRAM), machine(Family.open_mpi_5), Wanted.horovodrun)
    with pytest.raises(InputError, match="does not ask Slurm for the 2 hosts"):
        command_for(Job(2, PROGRAM), machine(allocation=GIVEN), gloo=True)
    with pytest.raises(InputError, match="without spaces"):
        command_for(Job(2, PROGRAM, PAIR), machine(folder="/home/me/my work"), gloo=True)


# --- root


def test_root_is_refused_by_open_mpi_unless_it_was_allowed():
    root = machine(root=True)
    told = {**FOUND, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    for wanted in (Wanted.mpirun, Wanted.horovodrun):
        with pytest.raises(InputError, match="--allow-run-as-root"):
            command_for(Job(2, PROGRAM), root, wanted)
        command_for(Job(2, PROGRAM), replace(root, environment=told), wanted)
    assert "--allow-run-as-root" in argv_of(Job(2, PROGRAM, allow_root=True), root)
    assert "--allow-run-as-root" not in argv_of(Job(2, PROGRAM), machine())
    for free in (machine(Family.mpich, root=True), machine(root=True, allocation=GIVEN)):
        command_for(Job(2, PROGRAM), free)
    command_for(Job(2, PROGRAM), root, gloo=True)


# --- threads


@pytest.mark.parametrize(
    ("ranks", "hosts", "changes", "threads"),
    [
        (1, "", {}, 16),
        (4, "", {}, 4),
        (5, "", {}, 3),
        (40, "", {}, 1),
        (6, "h1:4,h2:4", {}, 4),
        (8, "", {"allocation": GIVEN}, 4),
        (8, "", {"allocation": replace(GIVEN, cores_per_task=None)}, 4),
        (8, "", {"allocation": replace(GIVEN, cores_per_task=None, cores=8), "cores": 1}, 2),
    ],
)
def test_ranks_share_the_cores_of_their_machine(ranks, hosts, changes, threads):
    here = machine(**changes)
    this = Job(ranks, PROGRAM, parse_hosts(hosts) if hosts else ())
    assert threads_per_rank(this, here) == threads
    given = command_for(this, here).environment
    assert given["OMP_NUM_THREADS"] == given["TF_NUM_INTRAOP_THREADS"] == str(threads)
    assert given["TF_NUM_INTEROP_THREADS"] == str(max(2, threads))


def test_thread_counts_of_the_user_stay():
    given = command_for(Job(4, PROGRAM), machine(environment={**FOUND, "OMP_NUM_THREADS": "7"})).environment
    assert (given["OMP_NUM_THREADS"], given["TF_NUM_INTRAOP_THREADS"]) == ("7", "4")


@pytest.mark.parametrize(("written", "cores"), [("max 100000\n", 16), ("250000 100000\n", 2), ("50000 100000\n", 1)])
def test_a_containers_limit_counts(written, cores, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(written)
    monkeypatch.setattr(cgroups, "of_this_process", lambda: [tmp_path])
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(16))
    assert facts._usable_cores() == cores


# --- a terminal, and files of ranks


def test_ranks_are_told_of_a_terminal_where_bytes_are_passed_on_as_they_come():
    wide = Job(2, PROGRAM, columns=132)
    for family in (Family.open_mpi_4, Family.open_mpi_5, Family.mpich, Family.intel):
        command = command_for(wide, machine(family))
        assert command.environment["DISTFIT_TERMINAL"] == "132"
        assert "DISTFIT_TERMINAL" in " ".join(command.argv)
        assert "DISTFIT_TERMINAL" not in command_for(Job(2, PROGRAM), machine(family)).environment
    # horovodrun and srun pass on whole lines.
    for here, options in ((machine(), {"gloo": True}), (machine(allocation=GIVEN), {})):
        assert "DISTFIT_TERMINAL" not in command_for(wide, here, **options).environment


def test_what_an_outer_launcher_said_of_its_terminal_is_not_passed_on():
    here = facts.gather({**os.environ, "DISTFIT_TERMINAL": "80"})
    assert "DISTFIT_TERMINAL" not in here.environment
    assert "DISTFIT_TERMINAL" in here.inherited


# --- the environment

EVERY_LAUNCHER = [
    ({}, {}),
    ({}, {"gloo": True}),
    ({}, {"wanted": Wanted.horovodrun}),
    ({"allocation": GIVEN}, {}),
    ({"mpirun": Mpirun("/bin/mpirun", Family.mpich, "5.0.2")}, {}),
    ({"mpirun": Mpirun("/bin/mpirun", Family.intel, "2021")}, {}),
]


@pytest.mark.parametrize(("changes", "options"), EVERY_LAUNCHER)
def test_no_secret_reaches_a_launcher(changes, options):
    here = machine(**changes)
    command = command_for(Job(8, PROGRAM, PAIR), here, **options)
    assert not SECRETS.keys() & command.environment.keys()
    everything = [*command.argv, *command.environment.values(), repr(command), repr(here), shown(command, FOUND)]
    assert not [text for text in everything if "s3cr3t" in text]


@pytest.mark.parametrize(("changes", "options"), EVERY_LAUNCHER)
def test_values_stay_off_the_command_line(changes, options):
    marked = {name: f"value-of-{name}" for name in ("PATH", "PYTHONPATH", "NCCL_DEBUG", "MINE")}
    here = machine(environment=marked, inherited=marked, **changes)
    command = command_for(Job(8, PROGRAM, PAIR, passed=("MINE",)), here, **options)
    assert command.environment["MINE"] == "value-of-MINE"
    assert "value-of" not in " ".join(command.argv) + shown(command, marked)


def test_a_secret_is_passed_by_its_name_alone_where_no_command_line_shows_it():
    wanted = Job(2, PROGRAM, passed=("AWS_SECRET_ACCESS_KEY",))
    assert command_for(wanted, machine()).environment["AWS_SECRET_ACCESS_KEY"] == "s3cr3t"
    with pytest.raises(InputError, match=r"--env AWS_SECRET_ACCESS_KEY.*command lines"):
        command_for(wanted, machine(), gloo=True)


def test_another_jobs_rank_is_not_passed_on():
    outer = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1", "PMIX_RANK": "0"}
    settings = {"HOROVOD_CYCLE_TIME": "1", "OMPI_MCA_plm_rsh_agent": "/opt/agent", "SSH_AUTH_SOCK": "/tmp/agent"}
    found = {**FOUND, **outer, **settings}
    command = command_for(Job(2, PROGRAM), machine(environment=found, inherited=found))
    assert not outer.keys() & command.environment.keys()
    assert settings.keys() <= command.environment.keys()
    assert "HOROVOD_CYCLE_TIME" in command.argv
    assert "SSH_AUTH_SOCK" not in command.argv


@pytest.mark.parametrize("name", ["MPI4PY_LIBMPI", "NCCL_IB_PKEY", "UCX_IB_PKEY"])
def test_without_these_ranks_would_load_another_mpi_or_find_no_network(name):
    found = {**FOUND, name: "1"}
    for changes, options in EVERY_LAUNCHER:
        command = command_for(Job(8, PROGRAM, PAIR), machine(environment=found, inherited=found, **changes), **options)
        assert command.environment[name] == "1"
        assert name in ",".join(command.argv) or "horovodrun_program" in ",".join(command.argv), "which passes all"


def test_an_mpis_settings_reach_ranks_that_no_mpirun_starts():
    found = {**FOUND, "PMIX_MCA_psec": "native"}
    argv = argv_of(Job(8, PROGRAM), machine(environment=found, inherited=found, allocation=GIVEN))
    assert "PMIX_MCA_psec" in next(word for word in argv if word.startswith("--export=")).split(",")


@pytest.mark.parametrize("name", ["NOT_THERE", "MINE=s3cr3t", "9", "a b", ""])
def test_env_takes_names_of_variables_that_are_set(name):
    with pytest.raises(InputError) as caught:
        command_for(Job(2, PROGRAM, passed=(name,)), machine())
    assert "s3cr3t" not in str(caught.value)


def test_the_session_is_the_persons_own():
    found = {"HOME": "/home/me", "LC_ALL": "C", "EDITOR": "vi", "USER": "me"}
    assert environment.of_the_session(found) == ["HOME", "LC_ALL", "USER"]


# --- what users type


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "name:slots"),
        ("h1:", "'h1:'"),
        ("h1:0", "'h1:0'"),
        ("h1:two", "'h1:two'"),
        ("h1:4 h2:4", "'h1:4 h2:4'"),
        ("h1,,h2", "''"),
        ("-oProxyCommand=x:1", "name:slots"),
        ("me@h1:2", "~/.ssh/config"),
        ("[::1]:2", "IPv4"),
        ("$(id):1", "name:slots"),
        ("h1:2,h2:2,h1:1", "h1 twice"),
    ],
)
def test_hosts_that_cannot_be_are_refused(text, words):
    with pytest.raises(InputError) as caught:
        parse_hosts(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"program": ()}, "a program after --"),
        ({"program": ("python", "train.py", ":", "x")}, "a colon alone"),
        ({"ranks": 0}, "-np 0"),
        ({"ranks": 9, "hosts": PAIR}, "at most 8 ranks, the slots of --hosts h1:4,h2:4, received -np 9"),
        ({"interface": "eth0;reboot"}, "network interface"),
        ({"interface": "-x"}, "network interface"),
    ],
)
def test_jobs_that_cannot_be_are_refused(fields, words):
    with pytest.raises(InputError) as caught:
        Job(**{"ranks": 2, "program": PROGRAM, **fields})
    assert words in str(caught.value)


def test_a_mistyped_program_is_refused_where_all_ranks_run_here():
    here = facts.gather()
    with pytest.raises(InputError, match=r"received 'trian.py', which is not on PATH\. .* -- python trian.py"):
        choice.refuse_missing_program(Job(2, ("trian.py",)), here)
    choice.refuse_missing_program(Job(2, ("sh", "-c", "true")), here)
    choice.refuse_missing_program(Job(2, ("trian.py",), PAIR), here)


def test_without_np_the_slots_or_the_allocation_say_how_many():
    assert ranks_by_default(machine(), 8) == 8
    assert ranks_by_default(machine(allocation=GIVEN), 0) == 8
    with pytest.raises(InputError, match="-np N"):
        ranks_by_default(machine(), 0)


def test_a_launcher_that_does_not_start_is_told():
    before = signal.getsignal(signal.SIGPIPE)
    with pytest.raises(RunError, match="/not/there"):
        start.run(Command(("/not/there",), {}))
    assert signal.getsignal(signal.SIGPIPE) == before


def test_the_launcher_gets_its_environment_and_no_signal_ignored_because_python_does():
    code = (
        "import sys; from distfit.launchers.start import run; from distfit.launchers.command import Command;"
        "sys.exit(run(Command(('/bin/sh', '-c', 'echo $A $HOME; grep Sig /proc/self/status; exit 7'), {'A': 'a'})))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=of_a_job(), capture_output=True, text=True, timeout=60)
    given, *lines = done.stdout.splitlines()
    assert (given, done.returncode) == ("a", 7)
    masks = dict(line.split() for line in lines if line.startswith(("SigIgn", "SigBlk")))
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        assert not int(masks["SigIgn:"], 16) >> (number - 1) & 1
    assert int(masks["SigBlk:"], 16) == 0


# A launcher that notes what it hears, and ends by what ends it or, with the ranks' code, by what it passes on.
LISTENS = r"""
import os, signal, sys, time
def heard(number, frame):
    os.write(1, (signal.Signals(number).name + "\n").encode())
    if number not in (signal.SIGUSR1, signal.SIGUSR2):
        sys.exit(1)
    if "stubborn" not in sys.argv:
        sys.exit(75)
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, heard)
print("ready", os.getppid(), os.getpid(), flush=True)
time.sleep(60)
"""


@contextmanager
def listening(deaf, *more, ctrl_c=start.CTRL_C):
    """distfit's process, around a launcher; and the process id of that."""
    code = (
        "import sys; from distfit.launchers.start import run; from distfit.launchers.command import Command;"
        f"sys.exit(run(Command((sys.executable, '-c', {LISTENS!r}, *{more!r}), {{}}, {deaf}, {int(ctrl_c)})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=of_a_job(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        word, parent, child = process.stdout.readline().split()
        assert (word, int(parent)) == ("ready", process.pid)
        yield process, int(child)
    finally:
        for pid in (process.pid, int(child)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


@pytest.mark.parametrize(
    ("told", "heard", "code"),
    [(signal.SIGTERM, "SIGUSR1", 75), (signal.SIGUSR1, "SIGUSR1", 75), (signal.SIGINT, "SIGUSR2", 130)],
)
@pytest.mark.parametrize("deaf", [True, False])
def test_a_signal_is_passed_on_as_one_that_launchers_hand_to_their_ranks(deaf, told, heard, code):
    """To the whole group, as a terminal and `timeout` do it: the launcher hears it from distfit alone."""
    with listening(deaf) as (process, _):
        os.killpg(process.pid, told) if told is not signal.SIGUSR1 else process.send_signal(told)
        assert (process.communicate(timeout=30)[0].split(), process.returncode) == ([heard], code)


@pytest.mark.parametrize(("deaf", "ended"), [(True, "SIGHUP"), (False, "SIGTERM")])
def test_a_second_signal_ends_the_launcher_and_so_does_the_end_of_distfit(deaf, ended):
    with listening(deaf, "stubborn") as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "SIGUSR1\n"
        time.sleep(start.SAME_WISH_S + 0.1)
        process.send_signal(signal.SIGTERM)
        assert (process.communicate(timeout=30)[0], process.returncode) == (f"{ended}\n", 1)
    with listening(deaf) as (process, _):
        process.kill()
        assert process.communicate(timeout=30)[0] == f"{ended}\n"


def type_launch(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distfit", "launch", *words]
    return subprocess.run(command, env=of_a_job(**more), capture_output=True, text=True, timeout=60)


def test_a_dry_run_can_be_pasted(tmp_path):
    """What it prints, given to a shell, runs the program with what a rank gets; no value of a secret is in it."""
    fake = tmp_path / "mpirun"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo "mpirun (Open MPI) 4.1.8"\nprintf "%s|" "$@"; env\n')
    fake.chmod(0o755)
    # A Python of no environment: its folder has no mpirun that would come first.
    (tmp_path / "python").symlink_to(sys.executable)
    more = {
        "AWS_SECRET_ACCESS_KEY": "s3cr3t",
        "NCCL_DEBUG": "INFO",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    shell = {**of_a_job(**more), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = [
        str(tmp_path / "python"),
        "-m",
        "distfit",
        "launch",
        "-np",
        "3",
        "--dry-run",
        "python",
        "a b.py",
        "--x=$HOME",
    ]
    done = subprocess.run(command, env=shell, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "s3cr3t" not in done.stdout
    ran = subprocess.run(["sh", "-c", done.stdout], env=shell, capture_output=True, text=True, check=True, timeout=60)
    received, _, variables = ran.stdout.rpartition("|")
    assert received.startswith("-np|3|-H|localhost:3|")
    assert received.endswith("|python|a b.py|--x=$HOME")
    assert "NCCL_DEBUG=INFO" in variables
    assert "OMP_NUM_THREADS=1" in variables
    assert "AWS_SECRET_ACCESS_KEY" not in variables


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "-np N"),
        (["-np", "2"], "a program after --"),
        (["-np", "2", "--"], "a program after --"),
        (["-np", "3", "--hosts", "h1:1,h2:1", "--", "python"], "at most 2 ranks"),
        (["-np", "2", "--env", "A=s3cr3t", "--", "python"], "Values stay off command lines"),
    ],
)
def test_a_wrong_command_line_is_one_paragraph(words, message):
    done = type_launch(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("distfit: error: Expected")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert "s3cr3t" not in done.stderr


def test_every_launcher_can_be_asked_for():
    assert set(choice.Wanted) == {"auto", "mpirun", "horovodrun", "srun"}
    assert job.in_words(PAIR) == "h1:4,h2:4"
