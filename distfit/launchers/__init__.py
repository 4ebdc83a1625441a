"""`distfit launch`: the command line of a job's ranks, for the launcher that is there, and its start.

    from distfit.launchers import choice, facts, job, start
    command = choice.command(job.Job(2, ("python", "train.py")), facts.gather())
    code = start.run(command)            # mpirun, horovodrun or srun, with the signals that this process gets

`facts` looks at this machine; `open_mpi`, `hydra`, `srun` and `horovodrun` are pure functions from facts and
a job to (argv, environment); `start` is the one function that runs them. No shell is in between, ranks get an
allow-list of the environment (`environment`), and ssh checks host keys as it is configured.
"""
