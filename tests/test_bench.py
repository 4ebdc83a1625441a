"""`distfit bench input`: its images, its ratios, its page, and that it runs."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import simplejpeg
from typer.testing import CliRunner

from benchmarks import input as benchmark
from distfit import cli
from distfit.bench import report, rounds, samples, targets, ways
from distfit.cli.bench import bench_input
from distfit.errors import InputError, RunError

RATES = {
    "25 KB": {
        "1": {"decode": [90.0, 80.0, 85.0], "libjpeg": [100.0, 100.0, 100.0], "transform": [10.0, 10.0, 10.0]},
        "2": {"decode": [80.0, 80.0, 80.0], "libjpeg": [100.0, 100.0, 100.0], "transform": [19.0, 20.0, 18.0]},
    }
}


@pytest.mark.parametrize("name", ["25 KB", "110 KB"])
def test_images_have_the_size_of_their_kind(name):
    kind = samples.KINDS[name]
    images = samples.encoded(kind)
    assert len(set(images)) == kind.images
    assert np.mean([len(image) for image in images]) == pytest.approx(kind.bytes, rel=0.1)
    assert {simplejpeg.decode_jpeg(image).shape for image in images} == {(kind.height, kind.width, 3)}


def test_shards_repeat_the_images(tmp_path):
    kind = samples.Kind("small", 30, 40, 900, detail=0.6, images=3, records=20, batch=4)
    files = samples.make(kind, str(tmp_path))
    sample = samples.loaded(kind, files)
    assert sample.encoded == samples.encoded(kind)
    assert len(files) == 5
    assert len({os.path.getsize(file) for file in files}) > 2


def test_ratios_are_medians_of_rounds():
    found = {(ratio.cores, ratio.name): ratio for ratio in targets.ratios(RATES)}
    decode = found["1", "decoding, of libjpeg-turbo alone"]
    assert (decode.value, decode.low, decode.high, decode.reached) == (0.85, 0.8, 0.9, True)
    assert not found["2", "decoding, of libjpeg-turbo alone"].reached
    assert found["2", "two cores, of one"].value == 1.9


def test_what_is_missed_is_named():
    text = report.text(RATES, {"processor": "abacus"})
    assert "2 of 3 ratios are as they should be." in text
    assert "Missed: decoding, of libjpeg-turbo alone, at least 0.85: 0.80 (25 KB, 2 cores)." in text
    assert "**0.80**" in report.markdown_ratios(RATES)


def test_every_way_that_a_ratio_needs_is_there():
    for kind in samples.KINDS.values():
        assert set(targets.ways_of(kind)) <= set(ways.WAYS)
    assert set(targets.ways_of(samples.KINDS[samples.SCALED])) == set(ways.WAYS)


def test_a_child_that_ends_is_told(tmp_path):
    kind = samples.KINDS["25 KB"]
    request = {"kind": kind.name, "files": [str(tmp_path / "none")], "cores": [0], "seconds": 0.1}
    with rounds._child(request) as ask, pytest.raises(RunError, match=r"exit code 1\. Its last words: .*none"):
        ask("libjpeg")


@pytest.mark.parametrize(
    ("arguments", "words"), [({"cores": "1,many"}, "--cores"), ({"cores": "4096"}, "cores"), ({"images": "1 GB"}, "KB")]
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(InputError, match=words):
        bench_input(**arguments)


@pytest.mark.slow
def test_it_runs_and_tells_every_rate(tmp_path):
    file = tmp_path / "results.json"
    arguments = ["bench", "input", "--quick", "--cores", "1", "--images", "25 KB", "--json", str(file)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    results = rounds.Results(**json.loads(file.read_text()))
    assert set(results.rates["25 KB"]["1"]) == set(targets.ways_of(samples.KINDS["25 KB"]))
    assert all(rate > 0 for way in results.rates["25 KB"]["1"].values() for rate in way)
    assert "ratios are as they should be" in done.output


@pytest.mark.skipif(not benchmark.RESULTS.exists(), reason="nobody has measured yet")
def test_the_page_says_what_was_measured():
    assert benchmark.main(["--check"]) == 0
