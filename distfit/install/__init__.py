"""Installing the engines that pip alone cannot: `distfit horovod install`.

facts (what is here) -> recipe (what to do with it; pure) -> build, cache, environment, verify (doing it)
-> horovod (the order of it all).
"""
