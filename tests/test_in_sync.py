"""Replicas that no longer hold the same model are found and named, those that begin differently are refused, and nobody
else is.

The runs are in tests/in_sync_script.py: once on three logical devices, once on three ranks.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

from distfit.backends.hooks import optimizers_of
from distfit.errors import InputError
from distfit.topology import Topology
from distfit.training import signature, suspicion
from distfit.training.fingerprint import fingerprints
from distfit.training.in_sync import Verdict, judge, variables_in_common
from distfit.training.signature import Fact
from distfit.training.suspicion import Compared, Moment, divergence_of
from tests.in_sync_script import DIFFERENCES, EPOCHS, EVERY, FAULTS, FINE, STEPS
from tests.ranks import launch

REPLICAS = 3
JOBS = {"mirrored-3": ("none", 1, "mirrored:3"), "horovod": ("mpirun", 3, "horovod")}
SEVERAL = [
    pytest.param("mirrored-3", marks=pytest.mark.slow),
    pytest.param("horovod", marks=[pytest.mark.slow, pytest.mark.mpi]),
]
RANKS = [SEVERAL[1]]
AGREE = "3 replicas agree to the bit; the first update applied the gradients of all"
# The replica at fault, as each engine's message calls it; and all of them.
FAULTY = {"mirrored-3": "replica 1", "horovod": "rank 1"}
OTHERS = {"mirrored-3": "replicas 0, 2", "horovod": "ranks 0, 2"}
EACH = {"mirrored-3": "replica 0 / replica 1 / replica 2", "horovod": "rank 0 / rank 1 / rank 2"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """From an engine to what each of its ranks saw; each job is launched when it is first asked for."""
    folder = tmp_path_factory.mktemp("in_sync")

    def of(engine):
        launcher, ranks, name = JOBS[engine]
        files = [folder / f"{engine}-{rank}.json" for rank in range(ranks)]
        if not files[0].exists():
            job = launch(["-m", "tests.in_sync_script", str(folder), name], ranks, launcher, limit_s=900)
            assert job.code == 0, job.report()
        return [json.loads(file.read_text()) for file in files]

    return of


def error(seen, engine, case, kind="RunError"):
    """What all ranks were told alike."""
    found = [of_rank[case.__name__ if callable(case) else case] for of_rank in seen(engine)]
    assert [(one["error"], one.get("agreed")) for one in found] == [(kind, True)] * len(found), found
    assert len({one["message"] for one in found}) == 1, found
    return found[0]["message"]


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("engine", SEVERAL)
class TestFaults:
    def test_a_sum_that_returns_what_each_sent_is_found_at_the_first_update(self, seen, engine):
        message = error(seen, engine, "nothing_is_summed")
        assert "received on each of them its own gradient alone, at epoch 1, step 1: nothing was summed" in message

    def test_gradients_that_never_reach_the_wire_are_found_at_the_first_update(self, seen, engine):
        message = error(seen, engine, "reduction_taken_away")
        assert f"received different ones on {EACH[engine]}, at epoch 1, step 1 (1 step of this run" in message
        assert "net/first/kernel is the first of 12 that differ, of 14 variables" in message
        assert "at the start, all were the same" in message
        assert suspicion._NOT_SUMMED in message

    def test_one_bit_of_one_weight_is_found_at_the_next_comparison(self, seen, engine):
        message = error(seen, engine, "a_bit_of_a_weight")
        assert f"received another one on {FAULTY[engine]}, at epoch 2, step 3 (8 steps of this run" in message
        assert "net/last/kernel differs (1 of its 24 elements, by " in message
        assert "alone of 15 variables" in message
        assert "at epoch 1, step 4, all were the same" in message
        assert "ECC" in message

    def test_a_learning_rate_that_one_rank_sets_is_named_with_its_values(self, seen, engine):
        message = error(seen, engine, "a_callback_sets_the_learning_rate")
        assert f"learning_rate is 0.5 on {OTHERS[engine]} and 0.25 on {FAULTY[engine]}" in message
        assert "at epoch 2, step 3" in message

    def test_the_last_good_model_stays_byte_by_byte(self, seen, engine):
        message = error(seen, engine, "found_before_the_model_is_saved")
        assert "at epoch 2, step 5, before the model is saved (10 steps of this run" in message
        assert "model.keras was left as it is" in message
        (chief, *_) = seen(engine)
        assert chief["found_before_the_model_is_saved"]["kept"] == [True]
        assert chief["found_before_the_model_is_saved"]["left"] == ["model.keras", "run.lock"]

    def test_what_the_last_callback_changes_is_found_at_the_end(self, seen, engine):
        message = error(seen, engine, "the_last_callback_of_all")
        assert f"at epoch {EPOCHS}, step {STEPS}, at the end of the training" in message
        assert f"another one on {FAULTY[engine]}" in message

    def test_the_same_gradient_everywhere_is_a_warning(self, seen, engine):
        for rank in seen(engine):
            found = rank["the_same_rows_everywhere"]
            assert found["error"] is None
            assert [text for text in found["warnings"] if "all replicas computed the same gradient" in text]

    def test_gradients_of_zero_prove_nothing_which_is_said(self, seen, engine):
        for rank in seen(engine):
            found = rank["no_gradient_ever"]
            assert (found["error"], found["proven"]) == (None, "")
            assert [text for text in found["warnings"] if "no replica sent a gradient" in text]

    def test_a_variable_of_each_kind_is_compared_and_named(self, seen, engine):
        (found, *others) = [rank["one_variable_of_each_kind"]["kinds"] for rank in seen(engine)]
        assert all(other == found for other in others)
        assert found.pop("no number")["error"] is None
        expected = {
            "a bias": ("net/first/bias differs (8 of its 8 elements)", suspicion._ONE_VARIABLE),
            "a frozen weight": ("/kernel is the first of 2 that differ", suspicion._OF_KINDS[suspicion.STATE]),
            "moving statistics": ("/moving_mean is the first of 2", suspicion._OF_KINDS[suspicion.STATE]),
            "slots": ("_kernel_velocity is the first of 2", suspicion._OF_KINDS[suspicion.SLOT]),
            "a random stream": ("seed_generator_state differs", suspicion._OF_KINDS[suspicion.STREAM]),
            "iterations": (f"iteration is 0 on {OTHERS[engine]} and 1 on {FAULTY[engine]}", "made more updates"),
            "a learning rate": (f"learning_rate is 0.5 on {OTHERS[engine]} and 1.5 on {FAULTY[engine]}", "callback"),
        }
        assert found.keys() == expected.keys()
        for name, texts in expected.items():
            assert found[name]["error"] == "RunError", name
            assert found[name]["agreed"]
            assert f"received another one on {FAULTY[engine]}, at the start" in found[name]["message"]
            assert [text for text in texts if text not in found[name]["message"]] == [], found[name]["message"]


DIFFERENT = {
    "another_learning_rate": "optimizer: SGD learning_rate is 0.25 on ranks 0, 2 and 0.5 on rank 1",
    "another_seed": "Expected the same seed on every rank, received 40 on ranks 0-1 and 41 on rank 2",
    "another_order_of_layers": "layer 3 is Dropout on ranks 0, 2 and Activation on rank 1",
    "another_activation": "layer 3: Dense activation is elu on ranks 0, 2 and relu on rank 1",
    "another_size": "layer 3: Dense units is 32 on ranks 0, 2 and 64 on rank 1",
    "another_dtype": "layer 3: Dense dtype is float32 on ranks 0, 2 and float64 on rank 1",
    "another_connection": "model: Functional connections",
    "another_loss": "compile: loss ignore_class is None on ranks 0, 2 and 2 on rank 1",
    "another_type_of_data": "int64 on ranks 0, 2 and TensorSpec rows of () int32 on rank 1",
    "another_number_of_records": "records is 47 on ranks 0, 2 and 48 on rank 1",
}


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("engine", RANKS)
@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_begin_differently_are_refused_before_the_first_step(seen, engine, case):
    assert DIFFERENT.keys() == {one.__name__ for one in DIFFERENCES}
    assert DIFFERENT[case] in error(seen, engine, case, "InputError")
    assert [rank[case]["comparisons"] for rank in seen(engine)] == [0] * REPLICAS


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("engine", SEVERAL)
@pytest.mark.parametrize("case", [case.__name__ for case in FINE])
def test_nothing_is_found_where_nothing_is_wrong(seen, engine, case):
    trained = case != "nothing_is_trained"
    for rank in seen(engine):
        found = rank[case]
        assert found["error"] is None, found
        assert found["warnings"] == []
        assert found["proven"] == (AGREE if trained else "")
        assert found["comparisons"] >= 3


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("engine", SEVERAL)
def test_a_comparison_is_one_exchange_and_between_two_of_them_nothing_is_read(seen, engine):
    """[calls between ranks, graphs that ran]; flags of steps that nobody may read are passed (`Unread`)."""
    assert EVERY == 4
    for rank in seen(engine):
        assert rank["exchanges"]["proven"] == AGREE
        assert rank["exchanges"]["counts"] == {
            "start": [1, 1],
            "first update": [2, 1],
            "two steps": [0, 0],
            "the fourth": [1, 1],
            "saved at once": [0, 0],
            "a call of two": [0, 0],
            "saved": [1, 1],
            "a call over the eighth": [1, 1],
            "end": [1, 1],
        }


def test_every_fault_has_its_test():
    tested = {name for name in vars(TestFaults) if name.startswith("test_")}
    assert len(tested) == len(FAULTS) + 1  # and a variable of each kind


# --- fingerprints

FLOATS = ["float16", "bfloat16", "float32", "float64", "complex64"]
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool"]


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_each_bit_of_each_element_changes_the_fingerprint(dtype):
    """Over a length that fills no word, and chunks of two words."""
    kind = tf.as_dtype(dtype)
    width = 1 if dtype == "bool" else kind.size
    base = np.random.default_rng(3).integers(0, 2 if dtype == "bool" else 256, 11 * width).astype(np.uint8)
    copies = [base]
    for position in range(base.size):
        for bit in range(1 if dtype == "bool" else 8):
            copy = base.copy()
            copy[position] ^= 1 << bit
            copies.append(copy)
    tensors = [tf.constant(np.frombuffer(copy.tobytes(), kind.as_numpy_dtype)) for copy in copies]
    found = fingerprints(tensors, chunk=2).numpy()
    assert len(set(found.tolist())) == len(copies)
    assert (fingerprints(tensors[:1], chunk=2).numpy() == found[:1]).all()


def test_elements_that_change_places_or_cancel_each_other_change_the_fingerprint():
    base = np.arange(40, dtype=np.int64)
    copies = [base, base[::-1].copy(), np.roll(base, 1), np.roll(base, 16)]
    for other in (1, 2, 16, 17):  # neighbours, and the same place of another chunk
        opposite = base.copy()
        opposite[0] += 5
        opposite[other] -= 5
        copies.append(opposite)
    second_difference = base.copy()
    second_difference[:3] += [1, -2, 1]
    found = fingerprints([tf.constant(copy) for copy in (*copies, second_difference)], chunk=16).numpy()
    assert len(set(found.tolist())) == len(copies) + 1


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_flipped_signs_do_not_cancel_each_other(dtype):
    """The highest bit of a word times any odd number is the highest bit."""
    base = np.arange(1, 17).astype(dtype)
    copies = [base, -base, np.where(np.arange(16) % 2, base, -base), np.where(np.arange(16) % 2, -base, base)]
    copies += [np.where(np.isin(np.arange(16), pair), -base, base) for pair in itertools.combinations(range(16), 2)]
    found = fingerprints([tf.constant(copy) for copy in copies]).numpy()
    assert len(set(found.tolist())) == len(copies)


def test_only_where_it_is_asked_for_is_one_nan_as_good_as_another():
    quiet, negative = np.array([0x7FC00000, 0xFFC00001], np.uint32).view(np.float32)
    pair = [tf.constant([1.0, quiet]), tf.constant([1.0, negative])]
    assert len(set(fingerprints(pair).numpy().tolist())) == 2
    assert len(set(fingerprints(pair, nan_alike=True).numpy().tolist())) == 1
    zeros = [tf.constant([0.0]), tf.constant([-0.0])]
    assert len(set(fingerprints(zeros, nan_alike=True).numpy().tolist())) == 2


def test_nothing_has_a_fingerprint_too():
    assert fingerprints([]).shape == (0,)
    assert fingerprints([tf.zeros([0, 3])]).numpy().tolist() == [0]


# --- what is compared


def test_metrics_and_gradients_between_updates_are_not_compared_and_all_else_is():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dropout(0.1), keras.layers.Dense(1, name="last")])
    inner = keras.optimizers.Adam(gradient_accumulation_steps=2, use_ema=True)
    model.compile(keras.optimizers.LossScaleOptimizer(inner), "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    paths = [variable.path for variable in variables_in_common(model)]
    assert not [path for path in paths if "accumul" in path or path.startswith(("loss/", "mae/", "mean"))]
    for part in ("last/kernel", "seed_generator_state", "learning_rate", "iteration", "velocity", "dynamic_scale"):
        assert [path for path in paths if part in path], part
    assert [path for path in paths if "average" in path]
    held = sum(len(one._accumulated_gradients) for one in optimizers_of(model) if one.gradient_accumulation_steps)
    assert held == 2


# --- the verdict on the first update


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        ([(1.0, 2.0), (3.0, 1.0)], Verdict.SUMMED),
        ([(1.0, 0.0), (0.0, 1.0)], Verdict.SUMMED),  # one replica has rows
        ([(1.0, 0.0), (3.0, 0.0)], Verdict.LOCAL),
        ([(1.0, 0.0), (0.0, 0.0)], Verdict.LOCAL),
        ([(0.0, 0.0), (0.0, 0.0)], Verdict.NOTHING),
        ([(np.inf, np.nan), (1.0, np.inf)], Verdict.NOT_FINITE),
        ([(np.nan, np.nan), (np.nan, np.nan)], Verdict.NOT_FINITE),
        ([(2.0, 8.0), (2.0, 8.0), (2.0, 8.0)], Verdict.ALIKE),
        ([(2.0, 2.0), (2.0, 2.0), (0.0, 8.0)], Verdict.ALIKE),  # the third has no rows
    ],
)
def test_what_an_update_says_of_the_sum(evidence, verdict):
    assert judge(evidence) is verdict


# --- the message

JOB = Topology(0, 4, 0, 4)
TWO_EACH = Topology(0, 2, 0, 2).with_replicas(2)
KINDS = [suspicion.WEIGHT, suspicion.WEIGHT, suspicion.STATE, suspicion.SLOT, suspicion.STREAM, suspicion.SCALE]
VARIABLES = [Compared(f"v{index}", kind) for index, kind in enumerate(KINDS)]


def found(*differing, replicas=(2,), **more):
    vectors = [[int(index in differing and replica in replicas) for index in range(len(KINDS))] for replica in range(4)]
    return replace(divergence_of(VARIABLES, vectors), **more)


@pytest.mark.parametrize(
    ("differing", "first_update", "text"),
    [
        ((0,), False, suspicion._ONE_VARIABLE),
        ((0,), True, suspicion._ONE_VARIABLE),
        ((0, 1), True, suspicion._NOT_SUMMED),
        ((0, 1, 3), True, suspicion._NOT_SUMMED),
        ((0, 1), False, suspicion._ANYTHING),
        ((0, 3), True, suspicion._ANYTHING),
        ((2,), False, suspicion._ONE_VARIABLE),
        ((3,), False, suspicion._ONE_VARIABLE),
        ((4,), False, suspicion._OF_KINDS[suspicion.STREAM]),
        ((2, 4), False, suspicion._ANYTHING),
    ],
)
def test_what_is_suspected(differing, first_update, text):
    assert suspicion.suspicion(found(*differing), JOB, first_update) == text


def test_a_number_that_differs_is_suspected_before_all_that_it_changes():
    rates = [Compared("a/kernel", suspicion.WEIGHT), Compared("sgd/learning_rate", suspicion.RATE)]
    divergence = replace(
        divergence_of(rates, [[1, 1], [1, 1], [2, 2], [1, 1]]), values={1: ["0.1", "0.1", "0.5", "0.1"]}
    )
    text = suspicion.suspicion(divergence, JOB, first_update=True)
    assert text.startswith("sgd/learning_rate is 0.1 on ranks 0-1, 3 and 0.5 on rank 2: a callback")
    scales = found(5, values={5: ["8.0", "8.0", "4.0", "8.0"]})
    assert "v5 is 8.0 on ranks 0-1, 3 and 4.0 on rank 2" in suspicion.suspicion(scales, JOB, first_update=False)


def test_the_message_says_what_is_known_and_nothing_else():
    moment = Moment("epoch 2, step 31", 62, 162, "epoch 1, step 40", kept="runs/a/model.keras")
    assert suspicion.paragraph(found(0, 3), JOB, moment) == (
        "Expected all 4 replicas to hold the same model, received another one on rank 2, at epoch 2, step 31 (62 steps "
        "of this run, 162 updates of its optimizer): v0 is the first of 2 that differ, of 6 variables. When they were "
        "compared before, at epoch 1, step 40, all were the same. runs/a/model.keras was left as it is. "
        f"{suspicion._ANYTHING}"
    )
    alone = suspicion.paragraph(found(1, extent="1 of its 8 elements"), JOB, Moment("the start", 0))
    assert (
        "at the start (0 steps of this run): v1 differs (1 of its 8 elements), alone of 6 variables. Something" in alone
    )


@pytest.mark.parametrize(
    ("topology", "replicas", "text"),
    [
        (JOB, (2,), "another one on rank 2,"),
        (JOB, (1, 2, 3), "another one on rank 0,"),
        (JOB, (1, 3), "different ones on ranks 0, 2 / ranks 1, 3,"),
        (Topology().with_replicas(4), (1,), "another one on replica 1,"),
        (TWO_EACH, (2, 3), "different ones on replicas 0-1 / replicas 2-3,"),
    ],
)
def test_the_few_are_named_or_all_groups_where_there_is_no_majority(topology, replicas, text):
    assert text in suspicion.paragraph(found(0, replicas=replicas), topology, Moment("the start", 0))


def test_equal_vectors_are_no_divergence():
    assert divergence_of(VARIABLES, [np.arange(6)] * 4) is None


# --- the signature


class Opaque(keras.layers.Layer):
    """Keras cannot describe it: its argument is an object of no kind that it knows."""

    def __init__(self, thing):
        super().__init__()
        self.thing = thing

    def call(self, x):
        return x


class Own(keras.Model):
    def __init__(self, thing, width=4):
        super().__init__()
        self.thing = thing
        self.parts = [keras.layers.Dense(width), Opaque(thing)]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def built(model):
    model.compile("adam", "mse", metrics=[keras.metrics.MeanAbsoluteError()])
    model.build((None, 3))
    model.optimizer.build(model.trainable_variables)
    return model


def stacked(*layers):
    return built(keras.Sequential([keras.Input((3,)), *layers]))


def test_what_keras_cannot_describe_counts_by_its_class_and_its_variables():
    assert signature.of_model(built(Own(object()))) == signature.of_model(built(Own(object())))
    place, other = signature.first_difference(
        signature.of_model(built(Own(object()))), signature.of_model(built(Own(object(), width=5)))
    )
    assert place > 0
    assert "units" in other.what


def test_no_fact_has_an_address_a_path_or_a_number_drawn_anew():
    def make():
        activation = keras.layers.Activation(lambda x: x if "a" in {"a", "b"} else -x)
        drop = keras.layers.Dropout(0.1, seed=next(seeds))
        return stacked(keras.layers.Dense(2, kernel_initializer=keras.initializers.HeNormal()), activation, drop)

    seeds = itertools.count()

    facts = signature.of_model(make())
    assert facts == signature.of_model(make())
    assert [fact for fact in facts if " at 0x" in fact.value or __file__ in fact.value] == []


def test_a_script_counts_by_its_content_and_not_by_the_interpreter_that_it_names(tmp_path, monkeypatch):
    def facts_of(text):
        script = tmp_path / "train"
        script.write_text(text)
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
        return signature.of_code()

    program = "import distfit\n"
    assert facts_of(f"#!/one/bin/python\n{program}") == facts_of(f"#!/other/bin/python\n{program}")
    assert facts_of(program) != facts_of(f"{program}# another\n")
    assert facts_of(program)[0].what == "the script train"


def test_names_that_keras_made_count_by_their_place_and_given_names_as_they_are():
    first = signature.of_model(stacked(keras.layers.Dense(2), keras.layers.Dense(3)))
    assert signature.of_model(stacked(keras.layers.Dense(2), keras.layers.Dense(3))) == first
    one, other = (signature.of_model(stacked(keras.layers.Dense(2, name=name))) for name in ("block_1", "block_2"))
    assert signature.first_difference(one, other)[1] == Fact("layer 2: Dense name", "block_2")


def test_a_function_without_a_name_counts_by_what_it_does():
    double, triple, same = (
        stacked(keras.layers.Lambda(function)) for function in (lambda x: x * 2, lambda x: x * 3, lambda x: x * 2)
    )
    assert signature.of_model(double) == signature.of_model(same)
    assert "code" in signature.first_difference(signature.of_model(double), signature.of_model(triple))[1].what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda model: setattr(model.optimizer, "learning_rate", 0.5), "optimizer: Adam learning_rate"),
        (lambda model: setattr(model.layers[0], "trainable", False), "layer 2: Dense trainable"),
        (lambda model: model.compile("sgd", "mse"), "optimizer"),
        (lambda model: model.compile("adam", "mae"), "compile: loss"),
        (lambda model: model.compile("adam", "mse", metrics=["mse"]), "compile: metrics"),
    ],
)
def test_what_is_compared_of_a_compiled_model(change, what):
    one, other = stacked(keras.layers.Dense(2)), stacked(keras.layers.Dense(2))
    change(other)
    assert signature.first_difference(signature.of_model(one), signature.of_model(other))[1].what.startswith(what)


def test_values_of_weights_are_no_facts():
    one, other = stacked(keras.layers.Dense(2)), stacked(keras.layers.Dense(2))
    other.layers[0].kernel.assign(other.layers[0].kernel + 1)
    assert signature.of_model(one) == signature.of_model(other)


def test_a_rank_with_more_facts_than_the_chief_is_shown_too():
    facts = [Fact("layer 1", "Dense")]
    more = [*facts, Fact("layer 2", "Dropout")]
    by_rank = [signature.first_difference(facts, theirs) for theirs in (facts, more)]
    assert "nothing more" in signature.paragraph(facts, by_rank)
    assert "layer 2 Dropout on rank 1" in signature.paragraph(facts, by_rank)


def test_a_rank_without_a_seed_takes_that_of_the_job():
    signature.of_seeds([None, 3, 3])
    with pytest.raises(InputError, match="received 3 on ranks 0, 2 and 4 on rank 1") as refused:
        signature.of_seeds([3, 4, 3, None])
    assert refused.value.agreed
