"""`distfit check` says the truth: about five models as keras.io writes them, and about what goes wrong."""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from distfit.checking import check
from distfit.checking import children as children_module
from distfit.checking.children import Children, available
from distfit.checking.compare import BLURS, FLOORS, Verdict, apart, limit, verdict
from distfit.checking.examine import examine, tried
from distfit.checking.plan import ALONE, AS_WRITTEN, PERMUTED, Engine, Run, Variant, engines_of, variants_of
from distfit.checking.spec import Facts, Failure, Outcome, Spec, read, write, write_failure
from distfit.checking.target import Kind, Target, target_of
from distfit.errors import InputError, RunError
from distfit.testing import launch_ranks
from tests.ranks import ROOT, launch, require

CASES = ROOT / "tests" / "check_cases"
TWO, THREE = Engine("2 devices", devices=2), Engine("3 devices", devices=3)
RANKS = Engine("2 ranks", ranks=2)
SYNC, OFF, BOTH = Variant(sync_batch_norm=True), Variant(random_off=True), Variant(True, True)
SCRIPT = Target(Kind.script, "train.py")


class Imagined:
    """Runs without processes: the weights of each are one device's, moved by what an effect adds."""

    def __init__(self, effects, facts=None, **failures):
        self.effects, self.facts, self.failures, self.made = effects, facts or Facts(steps=5), failures, []

    def __call__(self, runs):
        self.made += runs
        return {run: self.outcome(run) for run in runs}

    def outcome(self, run):
        if run.engine.name in self.failures:
            return self.failures[run.engine.name]
        moved = sum(effect(run) for effect in self.effects)
        numbers = {"weights/0:dense/kernel": np.array([1.0 + moved]), "losses/loss": np.array([2.0, 1.0 + moved])}
        return Outcome(numbers, self.facts)


def rounds(run):
    return 0.0 if run.engine == ALONE else 2e-8 if run.engine.permuted else 3e-8


def of_batch_norm(run):
    replicas = run.engine.devices * run.engine.ranks
    return 4e-2 if replicas > 1 and not run.variant.sync_batch_norm else 0.0


def of_random(run):
    return 3e-2 if run.engine.devices * run.engine.ranks > 1 and not run.variant.random_off else 0.0


def of_something(run):
    return 5e-3 if run.engine.devices * run.engine.ranks > 1 else 0.0


def examined(*effects, engines=(TWO, RANKS), strict=False, asked=5, facts=None, **failures):
    imagined = Imagined((rounds, *effects), facts, **failures)
    return examine(imagined, SCRIPT, engines, asked, strict=strict), imagined


def test_a_training_that_is_equal_to_rounding_is_run_once_on_each_engine():
    report, imagined = examined()
    assert (report.equal, report.explained, report.exit_code) == (True, True, 0)
    assert set(imagined.made) == {Run(ALONE), Run(PERMUTED), Run(TWO), Run(RANKS)}
    assert "to rounding 3e-8 (2e-8)" in str(report)
    assert report.causes == ()
    assert str(report).endswith("The same training on every engine.")


def test_batch_normalization_is_found_by_synchronising_it():
    report, imagined = examined(of_batch_norm, facts=Facts(steps=5, batch_norm=True))
    assert (report.equal, report.explained, report.exit_code) == (False, True, 0)
    assert "differs 4e-2 (2e-8)" in str(report)
    (cause,) = report.causes
    assert cause.startswith("BatchNormalization: a cause of 4e-2 (2 devices, most in dense/kernel)")
    assert cause.endswith("with sync_batch_norm=True 3e-8.")
    assert {run for run in imagined.made if run.variant != AS_WRITTEN} == {Run(TWO, SYNC), Run(RANKS, SYNC)}


def test_two_causes_are_told_apart_and_each_has_its_own_size():
    facts = Facts(steps=5, batch_norm=True, random=("Dropout",))
    report, imagined = examined(of_batch_norm, of_random, facts=facts)
    assert report.explained
    batch_norm, random = report.causes
    assert batch_norm.startswith("BatchNormalization: a cause of 4e-2 (2 devices with random layers off,")
    assert random.startswith("Random numbers (Dropout): a cause of 3e-2 (2 devices with sync_batch_norm=True,")
    # Each alone on the first engine, all of it on the other; the control is one without random numbers.
    assert {run for run in imagined.made if run.engine == RANKS} == {Run(RANKS), Run(RANKS, BOTH)}
    assert Run(PERMUTED) not in imagined.made
    assert Run(PERMUTED, OFF) in imagined.made


def test_a_layer_that_makes_no_difference_is_no_cause():
    facts = Facts(steps=5, batch_norm=True, random=("Dropout",))
    report, _ = examined(of_random, facts=facts)
    assert report.explained
    assert report.causes[0].startswith("BatchNormalization: no cause")


def test_strict_takes_no_excuse():
    report, _ = examined(of_random, facts=Facts(steps=5, random=("Dropout",)), strict=True)
    assert (report.explained, report.exit_code) == (True, 1)


def test_what_is_left_is_attributed_to_what_distfit_knows_of_the_model():
    facts = Facts(steps=5, batch_norm=True, notes=("The model's own train_step: what it computes counts as a mean.",))
    report, _ = examined(of_batch_norm, of_something, facts=facts)
    assert (report.equal, report.explained, report.exit_code) == (False, False, 1)
    assert report.causes[0].endswith("with sync_batch_norm=True 5e-3 is left.")
    assert report.causes[1].endswith("The model's own train_step: what it computes counts as a mean.")


def test_what_nothing_explains_is_said_to_be_unexplained():
    report, imagined = examined(of_something)
    assert report.exit_code == 1
    (cause,) = report.causes
    assert cause.startswith("Not explained (2 devices: weights differs 5e-3 (control 2e-8), most in dense/kernel")
    assert "report" in cause
    assert all(run.variant == AS_WRITTEN for run in imagined.made)


def test_a_difference_of_few_digits_asks_for_float64():
    report, _ = examined(lambda run: 5e-6 if run.engine == TWO else 0.0)
    assert report.exit_code == 1
    assert report.notes[-1] == "float32 does not tell rounding from a small difference here; --float64 does."
    report, _ = examined(lambda run: 5e-6 if run.engine == TWO else 0.0, facts=Facts(steps=5, dtype="float64"))
    assert report.notes == ()


def test_rounding_that_hides_everything_is_no_proof():
    report, _ = examined(lambda run: 0.0 if run.engine == ALONE else 1e-2)
    assert {row.cells["weights"].verdict for row in report.rows if not row.run.engine.permuted} == {Verdict.unclear}
    assert (report.equal, report.explained, report.exit_code) == (False, False, 1)


def test_other_data_make_every_comparison_void():
    digests = {"alone": (5, 6), "2 devices": (5, 7)}
    imagined = Imagined((rounds, of_something))
    usual = imagined.outcome

    def outcome(run):
        facts = Facts(steps=5, digests=digests.get(run.engine.name, (5, 6)), batch_norm=True)
        return dataclasses.replace(usual(run), facts=facts)

    imagined.outcome = outcome
    report = examine(imagined, SCRIPT, [TWO], 5)
    assert report.exit_code == 1
    assert report.causes[0].startswith("2 devices: trained on other data than one device, from step 2 on")
    assert all(run.variant == AS_WRITTEN for run in imagined.made)


def test_other_first_weights_make_every_comparison_void():
    imagined = Imagined((rounds, of_something))
    usual = imagined.outcome
    imagined.outcome = lambda run: dataclasses.replace(usual(run), facts=Facts(steps=5, initial=run.engine.name))
    assert "began with other weights" in examine(imagined, SCRIPT, [TWO], 5).causes[0]


def test_a_refusal_and_a_lost_run_are_results_of_their_rows():
    refused = Outcome(failure=Failure.refused, problem="Expected a compiled model, received none.")
    lost = Outcome(failure=Failure.lost, problem="it did not answer within 300 s", details="File train.py, line 3")
    report, _ = examined(**{"2 devices": refused, "2 ranks": lost})
    assert report.exit_code == 1
    assert report.causes[0] == "2 devices: distfit refuses it. Expected a compiled model, received none."
    assert report.causes[1] == "2 ranks: failed, it did not answer within 300 s\n    File train.py, line 3"
    assert [row.failure for row in report.rows] == [None, Failure.refused, Failure.lost]
    assert "refused" in str(report)


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (Failure.no_fit, InputError, "it ended without"),
        (Failure.refused, InputError, "distfit refuses it there: why"),
        (Failure.script, RunError, "it fails there: why\ntraceback"),
        (Failure.lost, RunError, "it fails there: why"),
    ],
)
def test_what_fails_on_one_device_cannot_be_compared(failure, kind, words):
    with pytest.raises(kind, match=words):
        examined(alone=Outcome(failure=failure, problem="why", details="traceback"))


def test_a_failing_control_leaves_the_smallest_limit():
    report, _ = examined(**{PERMUTED.name: Outcome(failure=Failure.script, problem="why")})
    (row,) = [row for row in report.rows if row.run == Run(TWO)]
    assert row.cells["weights"].control == 0.0
    assert row.same


def test_what_else_is_to_be_known_is_said():
    facts = Facts(steps=3, left_out=("ModelCheckpoint", "log_dir"), not_evaluated="no test_step")
    report, _ = examined(facts=facts)
    assert [note.split()[0] for note in report.notes] == ["The", "Not", "No"]
    assert "3 steps, not 5" in report.notes[0]
    assert "ModelCheckpoint, log_dir" in report.notes[1]


def test_a_verdict_depends_on_difference_control_and_dtype_alone():
    for dtype, floor in FLOORS.items():
        assert limit(0.0, dtype) == floor < BLURS[dtype]
        assert verdict(floor, 0.0, dtype) is Verdict.rounding
        assert verdict(floor * 1.01, 0.0, dtype) is Verdict.differs
        assert verdict(floor * 1.01, floor, dtype) is Verdict.rounding
        assert verdict(BLURS[dtype] * 2, BLURS[dtype] * 1.1, dtype) is Verdict.unclear
        assert verdict(0.0, 1.0, dtype) is Verdict.equal


def test_numbers_that_are_missing_or_not_finite_are_far_apart():
    nan, one = np.array([1.0, np.nan]), np.array([1.0, 1.0])
    assert apart({"losses/loss": nan}, {"losses/loss": nan})["losses"].size == 0
    assert apart({"losses/loss": nan}, {"losses/loss": one})["losses"].size == np.inf
    assert apart({"losses/loss": one}, {})["losses"].size == np.inf
    assert apart({"weights/0:a": one}, {"weights/0:a": one[:1]})["weights"].size == np.inf
    assert apart({"weights/0:a": np.zeros(2)}, {"weights/0:a": np.zeros(2)})["weights"].size == 0


def test_the_variable_that_moved_most_is_named():
    expected = {"weights/0:a/kernel": np.ones(100), "weights/1:a/bias": np.zeros(1)}
    received = {"weights/0:a/kernel": np.ones(100) * 1.01, "weights/1:a/bias": np.full(1, 1e-4)}
    assert apart(expected, received)["weights"].where == "a/kernel"


def test_changes_are_tried_alone_and_together():
    assert variants_of(False, False) == []
    assert tried([TWO, RANKS], variants_of(False, True)) == [
        Run(ALONE, OFF),
        Run(PERMUTED, OFF),
        Run(TWO, OFF),
        Run(RANKS, OFF),
    ]
    assert tried([TWO], [SYNC]) == [Run(TWO, SYNC)]
    assert Run(TWO, SYNC).truth == Run(ALONE)
    assert Run(TWO, BOTH).control == Run(PERMUTED, OFF)


def test_a_spec_and_an_outcome_come_back_as_they_were(tmp_path):
    spec = Spec(Target(Kind.configuration, "a.yaml", ("b=1",)), Run(TWO, BOTH), 4, True, 30.0, ("/x",))
    spec.write(tmp_path)
    assert Spec.read(tmp_path) == spec
    facts = Facts(3, "float64", True, ("Dropout",), ("note",), ("log_dir",), "", (1, 2), "ab")
    write(tmp_path, {"weights/0:a": np.arange(3)}, facts)
    outcome = read(tmp_path, "was ended by SIGKILL", "", 1.5)
    assert (outcome.facts, outcome.failure, outcome.seconds) == (facts, None, 1.5)
    np.testing.assert_array_equal(outcome.numbers["weights/0:a"], np.arange(3))
    write_failure(tmp_path, Failure.script, "why", "where")
    outcome = read(tmp_path, None, "", 1.5)
    assert (outcome.failure, outcome.problem, outcome.details) == (Failure.script, "why", "where")


@pytest.mark.parametrize(
    ("ended", "problem"),
    [
        ("did not answer within 5 s", "it did not answer within 5 s"),
        ("was ended by SIGKILL", "it was ended by SIGKILL"),
        (None, "it left no result"),
    ],
)
def test_a_process_that_leaves_nothing_is_lost(tmp_path, ended, problem):
    outcome = read(tmp_path, ended, "the end of it", 1.0)
    assert (outcome.failure, outcome.problem, outcome.details) == (Failure.lost, problem, "the end of it")


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(InputError, match=r"received 'no_such\.py', which is no file"):
        check("no_such.py")
    with pytest.raises(InputError, match="no arguments behind the function"):
        target_of("jobs:arguments", ["--epochs", "3"])
    with pytest.raises(InputError, match="that other processes can import"):
        target_of(lambda: {})
    with pytest.raises(InputError, match="at least 2"):
        check(CASES / "cnn.py", devices=(1,))
    with pytest.raises(InputError, match="none of both"):
        check(CASES / "cnn.py", devices=(), ranks=())
    with pytest.raises(InputError, match="steps"):
        check(CASES / "cnn.py", steps=0)
    with pytest.raises(InputError, match="limit_s"):
        check(CASES / "cnn.py", limit_s=0)


def test_a_function_is_named_by_its_module():
    assert target_of(examined) == Target(Kind.function, f"{__name__}:examined")
    assert target_of(CASES / "cnn.py", ["--a"]) == Target(Kind.script, str(CASES / "cnn.py"), ("--a",))
    assert [engine.name for engine in engines_of([3, 3], [2])] == ["3 devices", "2 ranks"]


def test_ranks_are_left_out_with_the_reason_where_they_cannot_be_started(monkeypatch):
    monkeypatch.setattr(children_module, "ranks_have_an_engine", lambda: False)
    here, missing = available([TWO, RANKS])
    assert here == [TWO]
    assert missing[0].engine == RANKS
    assert "distfit horovod install" in missing[0].why
    report = examine(Imagined((rounds,)), SCRIPT, here, 5, [("2 ranks", missing[0].why)])
    assert report.exit_code == 0
    assert "2 ranks: left out; there is no Horovod" in str(report)
    with pytest.raises(InputError, match="ranks alone"):
        check(CASES / "cnn.py", devices=(), ranks=(2,))


class Sleeping(Children):
    """Children that do nothing for a while, known by their last argument."""

    def _command(self, engine, folder):
        return [sys.executable, "-c", "import time; time.sleep(50)", str(folder)], {}


def left_of(marker):
    return [one for one in psutil.process_iter(["cmdline"]) if marker in " ".join(one.info["cmdline"] or [])]


def test_a_run_that_hangs_is_ended_at_its_limit(tmp_path):
    said = []
    with Sleeping(SCRIPT, 5, False, 0.5, show=lambda *line: said.append(line)) as children:
        (outcome,) = children.run([Run(TWO)]).values()
        folder = children._folder.name
    assert (outcome.failure, outcome.problem) == (Failure.lost, "it did not answer within 0 s")
    assert said == [("2 devices", None), ("2 devices", "lost")]
    assert left_of(folder) == []
    assert not Path(folder).exists()


def test_an_interrupt_ends_all_runs(monkeypatch):
    said = []
    with Sleeping(SCRIPT, 5, False, 60.0, show=lambda *line: said.append(line)) as children:
        marker = children._folder.name

        def interrupted(futures):
            while len(left_of(marker)) < 2:
                time.sleep(0.05)
            raise KeyboardInterrupt

        monkeypatch.setattr(children_module, "as_completed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            children.run([Run(ALONE), Run(TWO), Run(THREE)])
    assert left_of(marker) == []
    assert said == [("alone", None), ("2 devices", None)]


def test_the_notes_that_are_examined_are_told_from_the_others():
    from distfit.checking.caught import EXAMINED
    from distfit.monitor import announce

    source = Path(announce.__file__).read_text()
    assert all(f'"{beginning}' in source for beginning in EXAMINED)


def checked(case, *arguments, **options):
    lines = []
    target = case if ":" in case else CASES / case
    report = check(target, arguments, show=lambda run, ended: lines.append((run, ended)), **options)
    assert {run for run, ended in lines if ended is None} == {run for run, ended in lines if ended is not None}
    return report


def cells(report, engine, variant=AS_WRITTEN):
    (row,) = [row for row in report.rows if row.run == Run(engine, variant)]
    assert row.failure is None, report
    return row.cells


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cnn_differs_by_batch_normalization_and_dropout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # In float32 its ReLUs and pools have kinks near which rounding decides, on one processor and not on another.
    report = checked("cnn.py", devices=(2,), ranks=(), float64=True, limit_s=400)
    assert (report.equal, report.explained, report.exit_code) == (False, True, 0), report
    assert cells(report, TWO)["weights"].difference > 1e-3
    for variant in (SYNC, OFF):
        assert cells(report, TWO, variant)["weights"].verdict is Verdict.differs
    assert set(cells(report, TWO, BOTH)) == {"weights", "losses", "metrics", "evaluation"}
    assert all(cell.verdict.same for cell in cells(report, TWO, BOTH).values())
    assert [cause.split(":")[0] for cause in report.causes] == ["BatchNormalization", "Random numbers (Dropout)"]
    assert "ModelCheckpoint, log_dir" in report.notes[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_transformer_differs_by_dropout_alone():
    report = checked("transformer.py", devices=(3,), ranks=(), limit_s=400)
    assert (report.equal, report.explained) == (False, True), report
    assert [cause.split(":")[0] for cause in report.causes] == ["Random numbers (Dropout)"]


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(900)
def test_the_recurrent_network_is_equal():
    require("mpirun")
    job = launch(
        [*("-m", "distfit", "check", "--devices", "", "--ranks", "2", "--float64", "--limit-s", "400")]
        + [str(CASES / "recurrent.py"), "--units", "6"],
        limit_s=800,
    )
    assert job.code == 0, job.report()
    assert "5 steps in float64" in job.output
    assert job.output.rstrip().endswith("The same training on every engine."), job.report()
    assert {line.split(":")[0] for line in job.errors.splitlines()} == {"alone", "alone, rows permuted", "2 ranks"}


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_the_autoencoder_differs_by_its_noise_alone():
    report = checked("tests.check_cases.autoencoder:arguments", devices=(3,), ranks=(), float64=True, limit_s=400)
    assert (report.equal, report.explained, report.dtype) == (False, True, "float64"), report
    (cause,) = report.causes
    assert cause.startswith("Random numbers (Sampling): a cause of")
    assert cells(report, THREE, OFF)["weights"].difference < 1e-12


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.mpi
@pytest.mark.timeout(900)
def test_the_gan_differs_by_its_noise_alone(tmp_path, monkeypatch):
    require("mpirun")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    report = checked("gan.py", devices=(), ranks=(2,), limit_s=400)
    assert (report.equal, report.explained, report.exit_code) == (False, True, 0), report
    (cause,) = report.causes
    assert cause.startswith("Random numbers (Dropout, GAN, tf.random): a cause of")
    assert all(cell.verdict.same for cell in cells(report, RANKS, OFF).values())
    assert report.notes[0].startswith("Not used")
    assert "GANMonitor" in report.notes[0]
    assert report.notes[1] == "No evaluation: the model has a train_step of its own, and no test_step."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hand_written_loop_is_checked_like_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = checked("loop.py", devices=(3,), ranks=(), steps=4, limit_s=400)
    assert (report.equal, report.explained, report.steps) == (False, True, 4), report
    assert [cause.split(":")[0] for cause in report.causes] == ["BatchNormalization"]
    found = cells(report, THREE, SYNC)
    assert set(found) == {"weights", "losses", "metrics"}
    assert all(cell.verdict.same for cell in found.values())
    assert "checkpoint" in report.notes[0]
    assert list(tmp_path.iterdir()) == []


WRONG = """
import numpy as np, keras, distfit
keras.utils.set_random_seed(1)

class Mine(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)
    def call(self, x):
        return self.dense(x)
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.sum(keras.ops.square(y - y_pred))

model = Mine()
model.compile("sgd")
x = np.random.default_rng(0).random((64, 3))
distfit.fit(model, x, x[:, :1], batch_size=16)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_loss_that_sums_over_the_batch_is_found_and_named(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    report = check(tmp_path / "wrong.py", devices=(2,), ranks=(), steps=3, limit_s=300)
    assert (report.explained, report.exit_code) == (False, 1), report
    (cause,) = report.causes
    assert cause.startswith("What is left (2 devices: weights differs")
    assert "The model's own compute_loss counts as a mean over rows" in cause


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("import distfit\nprint('no training here')\n", 2, "distfit: error: Expected {} to train with distfit.fit"),
        ("def build():\n    raise ValueError('no such layer')\nbuild()\n", 1, "ValueError: no such layer"),
    ],
)
def test_a_script_that_does_not_train_is_told_so(tmp_path, script, code, words):
    path = tmp_path / "train.py"
    path.write_text(script)
    job = launch(["-m", "distfit", "check", "--devices", "2", "--ranks", "", str(path)], limit_s=300)
    assert job.code == code, job.report()
    assert words.format(path) in job.errors
    if code == 1:
        assert f'File "{path}", line 2, in build' in job.errors
        assert "runpy" not in job.errors


def test_the_command_refuses_what_is_no_list_of_numbers():
    job = launch(["-m", "distfit", "check", "--ranks", "two", str(CASES / "cnn.py")])
    assert job.code == 2
    assert "Expected --ranks to be whole numbers separated by commas, received 'two'" in job.errors


def test_a_report_is_printed_with_colours_on_a_terminal():
    from rich.console import Console

    report, _ = examined(of_something)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    report.print(console)
    assert "\x1b[31mdiffers 5e-3 (2e-8)" in console.file.getvalue()


HANGS = "import sys, time\nprint('begun', flush=True)\ntime.sleep(float(sys.argv[1]))\n"


def test_a_job_of_one_rank_is_run_to_its_end(tmp_path):
    (tmp_path / "train.py").write_text(f"{HANGS}sys.exit(3)\n")
    job = launch_ranks(["train.py", "0"], ranks=1, cwd=tmp_path, env={"MINE": "1"})
    assert (job.code, job.output) == (3, "begun\n")
    assert "exit code 3" in job.report()


def test_a_job_that_hangs_shows_its_stacks_and_is_gone(tmp_path):
    (tmp_path / "train.py").write_text(HANGS)
    with pytest.raises(RunError, match=r"(?s)hung: ended after 2 s.*begun.*train\.py\", line 3"):
        launch_ranks([str(tmp_path / "train.py"), "51.25"], ranks=1, limit_s=2)
    assert left_of("51.25") == []


@pytest.mark.mpi
def test_real_ranks_that_hang_all_show_their_stacks(tmp_path, monkeypatch):
    require("mpirun")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    (tmp_path / "train.py").write_text(HANGS)
    # In one write: what two ranks print may be mixed.
    program = "import os; os.write(1, f'rank {os.environ[\"OMPI_COMM_WORLD_RANK\"]}\\n'.encode())"
    job = launch_ranks(["-c", program], ranks=2, limit_s=60)
    assert sorted(job.output.split("\n")) == ["", "rank 0", "rank 1"], job.report()
    with pytest.raises(RunError) as hung:
        launch_ranks([str(tmp_path / "train.py"), "52.25"], ranks=2, limit_s=5)
    assert str(hung.value).count('train.py", line 3') == 2
    assert left_of("52.25") == []
