"""What somebody needs before asking for help: `distfit doctor`.

    from distfit.doctor import examine
    report = examine.examine("runs/a")
    print(report.as_text())

facts (frozen) <- gather: machine (what the kernel says), probe and rank_probe (child programs), asking (programs
with a limit), answers (what they said) -> software, mpi, hardware, bugs (pure: facts to lines) -> lines (the
report) -> examine (all of it).

Nothing is imported here that a broken environment could break: TensorFlow, Horovod and mpi4py are only ever
loaded in child programs, each with a limit.
"""
