"""Why a low-level TensorFlow loop trains worse than `fit` with the same model and data: the experiments behind
docs/why-loops-differ.md.

    python -m benchmarks.why_loops_differ                     all runs; writes results.json, the figures and the page
    python -m benchmarks.why_loops_differ --data digits --causes small_buffer,no_reshuffle --seeds 2     printed
    python -m benchmarks.why_loops_differ --page              the figures and the page from results.json; runs nothing
    python -m benchmarks.why_loops_differ --check             do two epochs of every cause give what results.json has?

`loop.Loop` is the loop that equals `fit` to the bit. Each mistake in `causes` is that loop with one method replaced,
so that nothing else differs. The modules: `pictures` (makes the folder of images), `tasks` (data, models), `loop`,
`causes`, `runs` (trains, measures, keeps), `figures` (the curves), `page` (tables). Needs matplotlib (`distfit[docs]`).
"""
