"""The block that opens a run."""

from distfit.monitor.start_block import StartFacts, start_block


def facts(**changes):
    given = {
        "strategy": "horovod",
        "ranks": 3,
        "hosts": ["h0", "h0", "h1"],
        "devices": ["CPU:0"] * 3,
        "replicas": 3,
        "global_batch": 64,
        "records": 1437,
        "steps_per_epoch": 23,
        "seed": 7,
        "log_dir": "runs/a/logs",
        "checkpoint": "runs/a",
        "notes": ["BatchNormalization: statistics are per replica."],
    }
    return StartFacts(**(given | changes))


def test_block_says_every_fact_in_aligned_columns():
    assert start_block(facts()) == "\n".join(
        [
            "distfit",
            "  strategy        horovod",
            "  ranks           3 on 2 x h0, h1",
            "  devices         3 x CPU:0",
            "  replicas        3",
            "  global batch    64 (22 or 21 per replica)",
            "  records         1,437 per epoch",
            "  steps           23 per epoch",
            "  seed            7",
            "  logs            runs/a/logs",
            "  checkpoint      runs/a",
            "  note            BatchNormalization: statistics are per replica.",
        ]
    )


def test_block_stays_within_80_columns():
    long = facts(
        hosts=[f"node-{number:04d}.cluster.example" for number in range(64)],
        log_dir="/scratch/" + "deep/" * 40,
        notes=["Random layers: each replica has its own stream, so that results differ from one process."] * 2,
    )
    lines = start_block(long).split("\n")
    assert max(map(len, lines)) <= 80
    assert sum("  note " in line for line in lines) == 2
    assert "cluster.example and 56 more devices" in " ".join(start_block(long).split())


def test_what_is_unknown_is_said():
    block = start_block(facts(global_batch=None, records=None, steps_per_epoch=None, seed=None))
    assert "global batch    as the data comes\n" in block
    assert "records         unknown\n" in block
    assert "steps           unknown until the first epoch ends\n" in block
    assert "seed            none: every run is another one\n" in block
    assert start_block(facts(log_dir=None, checkpoint=None)).count("  none") == 2


def test_seed_zero_is_a_seed():
    assert "  seed            0\n" in start_block(facts(seed=0))


def test_batch_per_replica_of_more_replicas_than_records():
    assert facts(global_batch=2, replicas=3).batch_per_replica == "1 or 0"


def test_epochs_that_are_no_pass_say_so():
    block = start_block(StartFacts("single", 1, ["h"], ["CPU"], 1, 32, records=1437, endless=True, steps_per_epoch=20))
    assert "records         1,437, read pass after pass" in block
    assert "20 per epoch" in block
