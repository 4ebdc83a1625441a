"""`distfit launch`: ranks on this machine, on several, or in a Slurm allocation."""

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
    dry_run: DryRun = False,
) -> None:
    """Start the ranks of a job with mpirun, srun or horovodrun.

    \b
    Example:
      distfit launch -np 2 -- python train.py
      distfit launch --hosts h1:4,h2:4 --interface eth0 -- distfit train configs/digits.yaml
      distfit launch -np 2 --dry-run -- python train.py
    """
    from distfit.launchers.choice import command_for, ranks_by_default, refuse_missing_program
    from distfit.launchers.command import shown
    from distfit.launchers.facts import gather
    from distfit.launchers.job import Job, parse_hosts
    from distfit.launchers.start import start

    facts = gather()
    machines = () if hosts is None else parse_hosts(hosts)
    job = Job(
        ranks=ranks_by_default(facts, sum(host.slots for host in machines)) if ranks is None else ranks,
        program=tuple(program or ()),
        hosts=machines,
        interface=interface,
        passed=tuple(env or ()),
        allow_root=allow_run_as_root,
    )
    command = command_for(job, facts, launcher, gloo=gloo)
    if dry_run:
        print(shown(command, facts.inherited))
    else:
        refuse_missing_program(job, facts)
        start(command)
