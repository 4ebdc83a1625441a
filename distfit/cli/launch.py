"""`distfit launch`: ranks on this machine, on several, or in a Slurm allocation."""

import os
import sys
from dataclasses import replace
from typing import Annotated

import typer

from distfit.launchers.choice import Wanted

# Everything from the program's first word on is the program's, with or without a -- in front of it.
CONTEXT = {"allow_interspersed_args": False}

Program = Annotated[list[str] | None, typer.Argument(metavar="-- PROGRAM [ARGUMENT]...", help="What each rank runs.")]
Ranks = Annotated[
    int | None, typer.Option("-np", "-n", help="How many ranks; all slots of --hosts or Slurm's --ntasks by default.")
]
Hosts = Annotated[
    str | None,
    typer.Option("--hosts", "-H", metavar="NAME:SLOTS,...", help="Machines, and how many ranks each one takes."),
]
Launcher = Annotated[Wanted, typer.Option(help="auto: srun in a Slurm allocation, else mpirun, else horovodrun.")]
Gloo = Annotated[bool, typer.Option("--gloo", help="Without MPI: horovodrun with Gloo.")]
Interface = Annotated[
    str | None, typer.Option(metavar="NAME", help="The network interface that ranks talk over, e.g. eth0.")
]
Env = Annotated[
    list[str] | None, typer.Option("--env", metavar="NAME", help="Pass one more environment variable; repeatable.")
]
Root = Annotated[
    bool, typer.Option("--allow-run-as-root", help="Let root start ranks with Open MPI, say in a container.")
]
RankLogs = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Copy all that each rank prints to DIR/rank-0000.log, rank-0001.log, ..."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command instead of starting it.")]


def launch(
    program: Program = None,
    ranks: Ranks = None,
    hosts: Hosts = None,
    launcher: Launcher = Wanted.auto,
    gloo: Gloo = False,
    interface: Interface = None,
    env: Env = None,
    allow_run_as_root: Root = False,
    rank_logs: RankLogs = None,
    dry_run: DryRun = False,
) -> None:
    """Start the ranks of a job with mpirun, srun or horovodrun.

    \b
    Example:
      distfit launch -np 2 -- python train.py
      distfit launch --hosts h1:4,h2:4 --interface eth0 -- distfit train configs/digits.yaml
      distfit launch -np 2 --rank-logs runs/logs -- python train.py
      distfit launch -np 2 --dry-run -- python train.py
    """
    from distfit.launchers import choice, rank_log
    from distfit.launchers.command import shown
    from distfit.launchers.facts import gather
    from distfit.launchers.job import Job, parse_hosts
    from distfit.launchers.start import run
    from distfit.monitor.terminal import columns_of

    facts = gather()
    machines = () if hosts is None else parse_hosts(hosts)
    job = Job(
        ranks=choice.ranks_by_default(facts, sum(host.slots for host in machines)) if ranks is None else ranks,
        program=tuple(program or ()),
        hosts=machines,
        interface=interface,
        passed=tuple(env or ()),
        allow_root=allow_run_as_root,
        # A file cannot be redrawn.
        columns=None if rank_logs is not None else columns_of(sys.stdout, os.environ),
    )
    logged = job if rank_logs is None else replace(job, program=rank_log.wrapped(job.program, rank_logs, facts.python))
    command = choice.command_for(logged, facts, launcher, gloo=gloo)
    if dry_run:
        print(shown(command, facts.inherited))
    else:
        choice.refuse_missing_program(job, facts)
        if rank_logs is not None:
            rank_log.made(rank_logs)
        raise typer.Exit(run(command))
