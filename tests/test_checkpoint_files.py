"""Checkpoints on disk: whole or not there, whatever happens to the process, the disk, or the files afterwards."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from distfit.checkpoint import folder as folder_module
from distfit.checkpoint import lock as lock_module
from distfit.checkpoint import manifest as manifest_module
from distfit.checkpoint import tensors as tensors_module
from distfit.checkpoint.folder import LATEST, Checkpoints, Damaged, Entry, Newer
from distfit.checkpoint.lock import FILE, FRESH_S, RunLock
from distfit.checkpoint.manifest import FACTS, FORMAT, MANIFEST, TENSORS, Manifest
from distfit.checkpoint.retention import superseded
from distfit.checkpoint.tensors import Unreadable, check_file, read_tensors, specs_of, write_tensors
from distfit.errors import InputError, RunError
from distfit.testing import finished
from tests.checkpoint_files_script import KILLS, publish, tensors_of, value_of, without_exchange
from tests.ranks import ROOT, environment

SCRIPT = "tests.checkpoint_files_script"
FILES = (MANIFEST, FACTS, TENSORS)
TYPES = [
    *(np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64),
    *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        publish(tmp_path, step, float(step))
    return tmp_path


def newest_value(folder: Path) -> float:
    stored, _ = Checkpoints(folder).newest()
    assert stored is not None
    return value_of(stored)


def why_not(folder: Path, step: int = 2) -> str:
    """Why a checkpoint is refused; reading, verifying and looking for the newest all say so."""
    with pytest.raises(Damaged) as read:
        Checkpoints(folder).read(step)
    with pytest.raises(Damaged):
        Checkpoints(folder).verify(step)
    _, damaged = Checkpoints(folder).newest()
    assert [(one.path, one.why) for one in damaged] == [(read.value.path, read.value.why)]
    assert read.value.path.name == f"step-{step:012d}"
    assert str(read.value.path) in str(read.value)
    return read.value.why


def change_manifest(folder: Path, change, step: int = 2) -> None:
    path = Checkpoints(folder).path(step) / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    del manifest["sha256"]
    path.write_text(json.dumps({**manifest, "sha256": manifest_module._digest(manifest)}))


def forge(folder: Path, name: str, content: bytes, step: int = 2) -> None:
    """Another content of a file that the manifest vouches for: what a stranger could send."""
    (Checkpoints(folder).path(step) / name).write_bytes(content)
    fact = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(folder, lambda manifest: manifest["files"].update({name: fact}), step)


def run_script(*arguments, prefix=()) -> dict:
    argv = [*prefix, sys.executable, "-m", SCRIPT, *map(str, arguments)]
    job = finished(argv, environment(), limit_s=60, cwd=ROOT)
    assert job.code == 0, job.report()
    return json.loads(job.output.splitlines()[-1])


# --- tensors -----------------------------------------------------------------------------------------------------


def every_kind() -> dict[str, np.ndarray]:
    found = {}
    for kind in TYPES:
        name = np.dtype(kind).name
        found[f"{name}/matrix"] = np.arange(6).reshape(2, 3).astype(kind)
        found[f"{name}/scalar"] = np.asarray(1).astype(kind)
        found[f"{name}/empty"] = np.zeros((0, 4), kind)
    return found | {"": np.ones(3, np.float32), "ü/0": np.array([np.nan, np.inf, -0.0])}


def same(first: dict, second: dict) -> None:
    assert set(first) == set(second)
    for name, array in first.items():
        assert (array.dtype, array.shape) == (second[name].dtype, second[name].shape), name
        assert array.tobytes() == second[name].tobytes(), name


def test_tensors_of_every_type_and_shape_come_back_to_the_bit(tmp_path):
    fact = write_tensors(tmp_path / "t", every_kind())
    same(every_kind(), read_tensors(tmp_path / "t", fact))
    assert specs_of(tmp_path / "t")["bfloat16/matrix"] == ("BF16", (2, 3))
    assert fact.size == (tmp_path / "t").stat().st_size
    assert fact.sha256 == hashlib.sha256((tmp_path / "t").read_bytes()).hexdigest()


def test_the_library_itself_reads_what_we_write_and_we_what_it_writes(tmp_path):
    write_tensors(tmp_path / "ours", every_kind())
    found = dict(safetensors.deserialize((tmp_path / "ours").read_bytes()))
    assert {name: bytes(view["data"]) for name, view in found.items()} == {
        name: array.tobytes() for name, array in every_kind().items()
    }
    numpys_own = {name: array for name, array in every_kind().items() if array.dtype.kind in "biuf" and "/" in name}
    numpys_own = {name: array for name, array in numpys_own.items() if array.dtype.isbuiltin == 1}
    write_tensors(tmp_path / "for numpy", numpys_own)
    same(numpys_own, safetensors.numpy.load_file(tmp_path / "for numpy"))
    safetensors.numpy.save_file(numpys_own, tmp_path / "theirs", metadata={"format": "np"})
    same(numpys_own, read_tensors(tmp_path / "theirs"))


def test_what_does_not_lie_in_one_piece_is_written_as_it_is_seen(tmp_path):
    square = np.arange(12, dtype=np.int32).reshape(3, 4)
    write_tensors(tmp_path / "t", {"turned": square.T, "every second": square[:, ::2]})
    found = read_tensors(tmp_path / "t")
    np.testing.assert_array_equal(found["turned"], square.T)
    np.testing.assert_array_equal(found["every second"], square[:, ::2])


@pytest.mark.parametrize("array", [np.ones(2, ">f4"), np.ones(2, np.complex128), np.array(["a"])])
def test_a_type_that_the_format_has_not_is_refused_and_leaves_nothing(tmp_path, array):
    with pytest.raises(ValueError, match="x has the type"):
        Checkpoints(tmp_path).publish(1, {"x": array}, {})
    assert os.listdir(tmp_path) == []


def test_writing_and_verifying_hold_a_few_blocks_and_reading_one_copy(tmp_path):
    size = 48 << 20
    tensors = {"a": np.zeros(size // 4, np.float32)}

    def peak(call) -> int:
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    facts = []
    assert peak(lambda: facts.append(write_tensors(tmp_path / "t", tensors))) < 4 << 20
    assert peak(lambda: check_file(tmp_path / "t", facts[0])) < 4 << 20
    assert peak(lambda: read_tensors(tmp_path / "t", facts[0])) < size + (4 << 20)


def header_file(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"a": {"dtype": "OBJ", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        {"a": {"shape": [2]}},
        {"a": 3},
        [1],
        b"[" * 5000,
        b"{}",
        b"\xff\xfe",
        b"",
    ],
)
@pytest.mark.parametrize("library", [True, False])
def test_a_header_that_lies_is_refused_by_the_library_and_by_us(tmp_path, monkeypatch, header, library):
    if not library:
        monkeypatch.setattr(tensors_module, "_check_format", lambda reading: None)
    header_file(tmp_path / "t", header, b"\0" * 8)
    for read in (read_tensors, specs_of):
        with pytest.raises(Unreadable):
            read(tmp_path / "t")


@pytest.mark.parametrize("length", [2**63, 100_000_001, 9, 1])
def test_a_header_of_a_declared_size_that_cannot_be_is_not_read(tmp_path, length):
    with open(tmp_path / "t", "wb") as file:
        file.write(length.to_bytes(8, "little") + b"{}")
        file.truncate(1 << 28 if length == 100_000_001 else 16)
    with pytest.raises(Unreadable, match="cannot be"):
        read_tensors(tmp_path / "t")


# --- publishing --------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_with_its_facts_and_latest_names_the_newest(folder):
    stored, damaged = Checkpoints(folder).newest()
    assert (stored.step, value_of(stored), damaged) == (2, 2.0, [])
    assert [entry.step for entry in Checkpoints(folder).entries()] == [1, 2]
    assert (folder / LATEST).read_text().strip() == stored.path.name
    assert sorted(os.listdir(stored.path)) == sorted(FILES)
    assert sorted(os.listdir(folder)) == [LATEST, "step-000000000001", "step-000000000002"]


def test_the_manifest_says_what_retention_has_to_know(tmp_path):
    facts = {"metrics": {"loss": 0.5}, "time": 12.5, "nan": True, "versions": {"distfit": "7.1"}}
    manifest = Checkpoints(tmp_path).publish(3, tensors_of(1), facts).manifest
    assert (manifest.metrics, manifest.created, manifest.nan, manifest.written_by) == ({"loss": 0.5}, 12.5, True, "7.1")
    assert manifest.size == sum((Checkpoints(tmp_path).path(3) / name).stat().st_size for name in (FACTS, TENSORS))


def test_latest_is_a_hint_and_the_folders_are_the_truth(folder):
    (folder / LATEST).write_text("../../elsewhere")
    assert newest_value(folder) == 2.0
    (folder / LATEST).unlink()
    assert newest_value(folder) == 2.0


def test_a_folder_that_is_not_there_or_empty_has_no_checkpoints(tmp_path):
    for empty in (tmp_path, tmp_path / "none"):
        assert Checkpoints(empty).entries() == []
        assert Checkpoints(empty).newest() == (None, [])


@pytest.mark.parametrize("exchange", [True, False])
def test_a_step_that_is_published_again_is_there_at_every_moment(folder, monkeypatch, exchange):
    """Looked for before and after each call to the system that changes names, by somebody who only reads."""
    seen = []

    def watched(real):
        def call(*arguments, **more):
            seen.append(newest_value(folder))
            result = real(*arguments, **more)
            seen.append(newest_value(folder))
            return result

        return call

    if not exchange:
        monkeypatch.setattr(folder_module, "_change_places", without_exchange)
    for name in ("rename", "replace", "mkdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    monkeypatch.setattr(folder_module, "_change_places", watched(folder_module._change_places))
    publish(folder, 2, 22.0)
    assert set(seen) == {2.0, 22.0}
    assert seen == sorted(seen)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_everything_is_on_disk_before_it_has_its_name_and_latest_comes_last(folder, monkeypatch):
    """The order of calls: each file and the folder flushed, renamed, the parent flushed, then `latest`."""
    done: list[tuple[str, str]] = []
    flush, rename, replace = os.fsync, os.rename, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: (done.append(("fsync", os.readlink(f"/proc/self/fd/{number}"))), flush(number))[1]
    )
    monkeypatch.setattr(os, "rename", lambda *names: (done.append(("rename", str(names[1]))), rename(*names))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (done.append(("rename", str(names[1]))), replace(*names))[1])
    publish(folder, 3, 3.0)
    told = [(what, os.path.basename(name).split("-")[0]) for what, name in done]
    assert told == [
        *(("fsync", name) for name in (TENSORS, FACTS, MANIFEST)),
        ("fsync", ".partial"),
        ("rename", "step"),
        ("fsync", os.path.basename(folder).split("-")[0]),
        ("fsync", ".partial"),
        ("rename", LATEST),
        ("fsync", os.path.basename(folder).split("-")[0]),
    ]


def test_deleting_takes_a_checkpoint_away_and_cleaning_what_was_left_over(folder):
    Checkpoints(folder).delete(1)
    Checkpoints(folder).delete(1)
    assert [entry.step for entry in Checkpoints(folder).entries()] == [2]
    (folder / ".partial-000000000009-1").mkdir()
    (folder / ".going-000000000009-1").mkdir()
    (folder / ".partial-latest-1").write_text("")
    (folder / ".partial-link").symlink_to(folder / "step-000000000002")
    Checkpoints(folder).clean()
    assert sorted(os.listdir(folder)) == [LATEST, "step-000000000002"]
    assert newest_value(folder) == 2.0


def test_a_save_that_is_killed_at_any_byte_leaves_the_one_before_or_the_new_one(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    found = run_script("killed", tmp_path, seed)
    saves = found["saves"]
    assert len(saves) == KILLS
    assert sum(save["died"] for save in saves) > KILLS // 2, saves
    assert found["hidden"] > 0, "no kill left anything to clean"
    wrong = [save for save in saves if not (save["kept"] and save["next"] and save["clean"]) or save["damaged"]]
    assert not wrong, wrong


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_named_and_the_one_before_is_taken(folder, name):
    path = Checkpoints(folder).path(2) / name
    content = path.read_bytes()
    lengths = range(len(content)) if len(content) < 1500 else random.Random(0).sample(range(len(content)), 60)
    for length in lengths:
        os.truncate(path, length)
        with pytest.raises(Damaged, match=name.split(".")[0]):
            Checkpoints(folder).verify(2)
        stored, damaged = Checkpoints(folder).newest()
        assert (stored.step, len(damaged)) == (1, 1), length
        path.write_bytes(content)
    assert newest_value(folder) == 2.0


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_named_and_the_one_before_is_taken(folder, name):
    path = Checkpoints(folder).path(2) / name
    content, draw = path.read_bytes(), random.Random(1)
    for place in range(len(content)) if name == MANIFEST else draw.sample(range(len(content)), 60):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        stored, damaged = Checkpoints(folder).newest()
        assert (stored.step, [one.path.name for one in damaged]) == (1, ["step-000000000002"]), place
        with pytest.raises(Damaged):
            Checkpoints(folder).verify(2)
    path.write_bytes(content)
    assert newest_value(folder) == 2.0


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (Checkpoints(folder).path(2) / name).unlink()
    assert name in why_not(folder)


def test_with_none_whole_all_are_named_and_reading_touches_nothing(folder):
    for step in (1, 2):
        os.truncate(Checkpoints(folder).path(step) / TENSORS, 100)
    before = {path: path.lstat() for path in sorted(folder.rglob("*"))}
    stored, damaged = Checkpoints(folder).newest()
    assert stored is None
    assert [one.path.name[-1] for one in damaged] == ["2", "1"]
    assert all("tensors.safetensors has 100 bytes of 120," in one.why for one in damaged)
    after = {path: path.lstat() for path in sorted(folder.rglob("*"))}
    assert [(path, one.st_mtime_ns, one.st_size, one.st_ino) for path, one in before.items()] == [
        (path, one.st_mtime_ns, one.st_size, one.st_ino) for path, one in after.items()
    ]


def test_a_newest_that_was_found_damaged_takes_nobodys_place_in_retention(folder):
    """Its manifest is whole. Were it counted, keep=1 would take away every checkpoint that is good."""
    path = Checkpoints(folder).path(2) / TENSORS
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x55")
    run = Checkpoints(folder)
    assert run.newest()[0].step == 1
    (Checkpoints(folder).path(1)).rename(folder / "step-000000000000")  # the run goes on to a step before the damaged
    run.publish(1, tensors_of(1), {"value": 1.0})
    assert superseded(run.entries(), keep=1) == [0]
    path.write_bytes(content)
    run.verify(2)
    assert superseded(run.entries(), keep=1) == [0, 1], "somebody has put it right"


# --- from a stranger ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_of_the_folder_is_not_read(folder, tmp_path_factory, name, kind):
    path = Checkpoints(folder).path(2) / name
    if kind == "link":  # the same bytes, elsewhere
        shutil.move(path, elsewhere := tmp_path_factory.mktemp("elsewhere") / name)
        path.symlink_to(elsewhere)
    else:
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    assert name in why_not(folder)


def test_a_checkpoint_that_is_a_link_is_not_followed(folder, tmp_path_factory):
    shutil.move(Checkpoints(folder).path(2), elsewhere := tmp_path_factory.mktemp("elsewhere") / "step-000000000002")
    Checkpoints(folder).path(2).symlink_to(elsewhere)
    assert why_not(folder) == "it is a link"
    publish(folder, 2, 22.0)
    assert newest_value(folder) == 22.0
    assert value_of(Checkpoints(elsewhere.parent).read(2)) == 2.0


@pytest.mark.parametrize("name", ["../../step-000000000001/facts.json", "/etc/passwd", "model.pkl", ""])
def test_files_besides_the_two_are_refused(folder, name):
    change_manifest(folder, lambda manifest: manifest["files"].update({name: manifest["files"][FACTS]}))
    assert "instead of" in why_not(folder)
    change_manifest(folder, lambda manifest: manifest["files"].pop(FACTS))
    assert "instead of" in why_not(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", 3),
        ("step", True),
        ("step", -1),
        ("format", None),
        ("format", "1"),
        ("format", True),
        ("created", float("nan")),
        ("created", 10**400),
        ("metrics", [1]),
        ("metrics", {"loss": "x"}),
        ("files", {}),
        ("files", [FACTS, TENSORS]),
        ("files", {FACTS: {"size": -1, "sha256": "0" * 64}, TENSORS: {"size": 1, "sha256": "0" * 64}}),
        ("files", {FACTS: {"size": 1, "sha256": 5}, TENSORS: {"size": 1, "sha256": "0"}}),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_refused(folder, key, value):
    change_manifest(folder, lambda manifest: manifest.update({key: value}))
    assert MANIFEST in why_not(folder)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff", b"[" * 10**5, b'{"format": 1}', b"9" * 10**5])
def test_a_manifest_that_is_none_is_refused(folder, text):
    (Checkpoints(folder).path(2) / MANIFEST).write_bytes(text)
    assert MANIFEST in why_not(folder)


@pytest.mark.parametrize("text", [b"[]", b"null", b"\xff", b"[" * 10**5, b"9" * 10**5])
def test_facts_that_are_none_are_refused_though_the_manifest_vouches_for_them(folder, text):
    forge(folder, FACTS, text)
    with pytest.raises(Damaged, match=FACTS):
        Checkpoints(folder).read(2)


def test_sizes_are_looked_at_before_anything_is_read(folder):
    change_manifest(folder, lambda manifest: manifest["files"][TENSORS].update({"size": 2**60}))
    assert "of 1,152,921,504,606,846,976" in why_not(folder)
    change_manifest(folder, lambda manifest: manifest["files"][TENSORS].update({"size": 2**42}))
    os.truncate(Checkpoints(folder).path(2) / TENSORS, 2**42)  # sparse: four terabytes of nothing
    with pytest.raises(Damaged, match="more than this host has memory"):
        Checkpoints(folder).read(2)
    os.truncate(Checkpoints(folder).path(2) / MANIFEST, 2**33)
    assert "longer than" in why_not(folder)


def test_facts_that_do_not_fit_into_memory_are_not_read(folder, monkeypatch):
    monkeypatch.setattr(folder_module, "MOST_FACTS", 100)
    with pytest.raises(Damaged, match="longer than 100 bytes"):
        Checkpoints(folder).read(2)


def test_tensors_that_are_code_are_refused_and_not_run(folder):
    forge(folder, TENSORS, b"cos\nsystem\n(S'touch /tmp/distfit-was-here'\ntR.")
    with pytest.raises(Damaged, match="header"):
        Checkpoints(folder).read(2)


def test_a_newer_format_is_told_from_damage_and_names_the_version_that_wrote_it(folder):
    change_manifest(folder, lambda manifest: manifest.update(format=FORMAT + 1, written_by="9.4.0", files="unknown"))
    said = "manifest.json: it has format 2, which distfit 9.4.0 wrote; this one reads 1: install that version"
    stored, newer = Checkpoints(folder).newest()
    assert (stored.step, [(type(one), one.why) for one in newer]) == (1, [(Newer, said)])
    assert Checkpoints(folder).entries()[-1].damage == said
    with pytest.raises(Newer, match=r"9\.4\.0"):
        Checkpoints(folder).verify(2)


def test_what_a_later_version_adds_to_the_same_format_is_left_alone(folder):
    change_manifest(folder, lambda manifest: manifest.update(weather="fine"))
    assert newest_value(folder) == 2.0


# --- a disk that does not do it ----------------------------------------------------------------------------------


def check_said(found: dict, *words: str) -> None:
    assert found["said"]
    assert "\n" not in found["said"]
    assert len(found["said"]) < 500
    for word in ("Expected to write the checkpoint of step 2", "step-000000000001 is still there", *words):
        assert word in found["said"]
    assert found["newest"] == 1.0
    assert found["names"] == [LATEST, "step-000000000001"], "what was half-written is gone"


CALLS = ["mkdir", "open", "write", "fsync", "rename"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Make room there"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "writable"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "dmesg"),
        (errno.EFBIG, "ulimit"),
    ],
)
def test_an_error_of_the_system_is_one_paragraph_and_leaves_the_one_before(tmp_path, monkeypatch, call, number, remedy):
    publish(tmp_path, 1, 1.0)
    real = getattr(os, call)

    def failing(*arguments, **more):
        if call == "open" and not arguments[1] & os.O_CREAT:
            return real(*arguments, **more)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        with pytest.raises(RunError) as error:
            publish(tmp_path, 2, 2.0)
    found = {"said": str(error.value), "newest": newest_value(tmp_path), "names": sorted(os.listdir(tmp_path))}
    check_said(found, os.strerror(number), str(tmp_path), remedy)
    publish(tmp_path, 2, 2.0)
    assert newest_value(tmp_path) == 2.0


@pytest.mark.parametrize("exchange", [True, False])
def test_a_step_that_cannot_be_replaced_stays(folder, monkeypatch, exchange):
    def failing(real):
        def call(source, target):
            if ".partial-" in str(source):
                raise OSError(errno.EIO, "no")
            return real(source, target)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "_change_places", failing(lambda *names: None) if exchange else without_exchange)
        patched.setattr(os, "rename", failing(os.rename))
        with pytest.raises(RunError, match="step-000000000002 is still there"):
            publish(folder, 2, 22.0)
    assert newest_value(folder) == 2.0
    assert sorted(os.listdir(folder)) == [LATEST, "step-000000000001", "step-000000000002"]


def test_a_limit_on_the_size_of_files_is_said(tmp_path):
    check_said(run_script("limited", tmp_path), os.strerror(errno.EFBIG), "ulimit -f")


def on_small_disk(folder: Path) -> list[str]:
    """A command before another one: with a disk of 160 KiB under this folder, which is there for it alone."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespace to mount a small disk in; the same errors are injected above")
    mount = f"mount -t tmpfs -o size=160k none '{folder}' && exec \"$@\""
    return ["unshare", "-Urm", "sh", "-c", mount, "sh"]


def test_a_disk_that_is_full_is_said_and_what_is_half_written_goes(tmp_path):
    check_said(run_script("full", tmp_path, prefix=on_small_disk(tmp_path)), os.strerror(errno.ENOSPC), "Make room")


def test_a_file_system_that_has_become_read_only_is_said(tmp_path):
    found = run_script("readonly", tmp_path, prefix=on_small_disk(tmp_path))
    check_said(found, os.strerror(errno.EROFS))
    assert "run.lock" in found["lock"]
    assert os.strerror(errno.EROFS) in found["lock"]


def test_a_folder_that_vanishes_is_said(folder):
    checkpoints = Checkpoints(folder)
    shutil.rmtree(folder)
    with pytest.raises(RunError, match=r"there is none before it\. Bring the folder back"):
        checkpoints.publish(3, tensors_of(3), {})
    assert not folder.exists()


def test_one_that_cannot_be_deleted_is_said_and_stays(folder, monkeypatch):
    def failing(*names):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", failing)
        with pytest.raises(RunError, match="delete the checkpoint of step 1 in"):
            Checkpoints(folder).delete(1)
    assert [entry.step for entry in Checkpoints(folder).entries()] == [1, 2]


# --- retention ---------------------------------------------------------------------------------------------------

values = st.one_of(st.floats(-2, 2), st.just(float("nan")), st.sampled_from([0.0, 1.0]))
entry_facts = st.tuples(st.booleans(), st.booleans(), st.floats(0, 400_000), st.dictionaries(st.just("loss"), values))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.integers(0, 99), entry_facts, max_size=12),
    st.integers(1, 4),
    st.sampled_from([None, ("loss", "min"), ("loss", "max"), ("accuracy", "max")]),
    st.sampled_from([None, 1, 24]),
)
def test_what_stays_is_the_newest_the_best_and_one_of_each_span(facts, keep, best, every_hours):
    """Against a second way to say it: sets of steps, by brute force."""
    entries = [
        Entry(step, Path(), Manifest(step, {}, created, metrics, nan, "") if whole else None, "" if whole else "cut")
        for step, (whole, nan, created, metrics) in sorted(facts.items())
    ]
    whole = {entry.step: entry.manifest for entry in entries if entry.manifest}
    stay = {step for step in whole if sum(other > step for other in whole) < keep}
    if best:
        known = {
            step: one.metrics[best[0]]
            for step, one in whole.items()
            if not one.nan and one.metrics.get(best[0], float("nan")) == one.metrics.get(best[0])
        }
        top = (min if best[1] == "min" else max)(known.values(), default=None)
        stay |= {min(step for step, value in known.items() if value == top)} if known else set()
    if every_hours:
        spans = {step: one.created // (3600 * every_hours) for step, one in whole.items()}
        stay |= {step for step in whole if not any(spans[other] == spans[step] for other in whole if other < step)}
    gone = superseded(entries, keep, best, every_hours)
    assert {step for step in whole if step not in gone} == stay
    assert not whole or max(whole) not in gone
    assert {step for step in gone if step not in whole} == {
        entry.step for entry in entries if not entry.manifest and stay and entry.step < min(stay)
    }


# --- lock --------------------------------------------------------------------------------------------------------


def foreign(folder: Path, age_s: float, **more) -> None:
    held = {"host": "node-17", "pid": 1, "since": 1_700_000_000.0, "who": "distfit.fit", "step": 37} | more
    (folder / FILE).write_text(json.dumps(held))
    os.utime(folder / FILE, (time.time() - age_s, time.time() - age_s))


def test_a_second_run_is_refused_while_the_first_lives_and_a_killed_one_is_taken_over(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-m", SCRIPT, "held", str(tmp_path)],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert json.loads(first.stdout.readline()) == {"pid": first.pid}
        with pytest.raises(InputError) as error:
            RunLock(tmp_path, "second").acquire()
        for word in ("the first run", socket.gethostname(), f"process {first.pid},", time.strftime("%Y-%m-%d")):
            assert word in str(error.value)
        first.send_signal(signal.SIGKILL)
    finally:
        first.kill()
        first.communicate(timeout=30)
    with RunLock(tmp_path, "second") as lock:
        assert (lock.left["step"], lock.left["pid"]) == (37, first.pid)


def test_two_locks_of_one_process_exclude_each_other_and_a_released_one_says_so(tmp_path):
    with RunLock(tmp_path, "first") as first:
        assert first.left is None
        first.touch(step=5)
        with pytest.raises(InputError, match="first on host"):
            RunLock(tmp_path, "second").acquire()
        assert json.loads((tmp_path / FILE).read_text())["step"] == 5
    assert set(json.loads((tmp_path / FILE).read_text())) == {"released"}
    with RunLock(tmp_path, "third") as third:
        assert third.left is None


@pytest.fixture
def looks(monkeypatch):
    """Time passes when somebody sleeps, and something may happen then; how often it was looked at a lock."""
    began, passed, happens = time.time(), [], {}

    def sleep(seconds):
        passed.append(seconds)
        happens.get(len(passed), lambda: None)()

    clock = SimpleNamespace(time=lambda: began + sum(passed), monotonic=lambda: sum(passed), sleep=sleep)
    clock.strftime, clock.localtime = time.strftime, time.localtime
    monkeypatch.setattr(lock_module, "time", clock)
    return happens, passed


def test_another_host_that_shows_a_sign_of_life_is_respected(tmp_path, looks, monkeypatch):
    happens, passed = looks
    said = []
    monkeypatch.setattr(lock_module, "say", said.append)
    foreign(tmp_path, age_s=20)
    happens[7] = lambda: foreign(tmp_path, age_s=0, step=38)
    with pytest.raises(InputError, match=r"host node-17, process 1, since 2023-11-1\d .* choose another folder"):
        RunLock(tmp_path, "second").acquire()
    assert len(passed) == 7
    assert len(said) == 1
    assert "in use by distfit.fit on host node-17 20 s ago; waiting 40 s at most" in said[0]


def test_another_host_that_has_failed_is_waited_for_and_then_taken_over(tmp_path, looks):
    _, passed = looks
    foreign(tmp_path, age_s=20)
    with RunLock(tmp_path, "second") as lock:
        assert lock.left["step"] == 37
    assert sum(passed) == pytest.approx(FRESH_S - 20, abs=2)


def test_another_host_that_ends_while_it_is_waited_for_leaves_the_folder(tmp_path, looks):
    happens, passed = looks
    foreign(tmp_path, age_s=0)
    happens[3] = lambda: foreign(tmp_path, age_s=0, released=1.0, step=40)
    with RunLock(tmp_path, "second") as lock:
        assert lock.left["step"] == 40
    assert len(passed) == 3


@pytest.mark.parametrize("age_s", [FRESH_S + 10, 10 * FRESH_S])
def test_another_host_that_was_silent_for_long_is_not_waited_for(tmp_path, looks, age_s):
    foreign(tmp_path, age_s)
    with RunLock(tmp_path, "second") as lock:
        assert lock.left["step"] == 37
    assert looks[1] == []


def test_a_clock_that_is_ahead_is_waited_for_no_longer(tmp_path, looks):
    foreign(tmp_path, age_s=-3600)
    with RunLock(tmp_path, "second") as lock:
        assert lock.left["step"] == 37
    assert sum(looks[1]) == pytest.approx(FRESH_S, abs=2)


def test_every_step_is_known_to_the_next_holder(tmp_path):
    lock = RunLock(tmp_path, "first")
    lock.acquire()
    lock.at(3)  # nobody has said a step yet: there is no room for one
    assert "step" not in json.loads((tmp_path / FILE).read_text())
    lock.touch(step=3)
    for step in (4, 10**12, 41):
        lock.at(step)
        held = json.loads((tmp_path / FILE).read_text())
        assert (held["step"], held["who"], held["pid"]) == (step, "first", os.getpid())
    os.close(lock._number)  # as the kernel does for a run that was killed
    lock._number = None
    with RunLock(tmp_path, "second") as second:
        assert second.left["step"] == 41


def test_touching_is_a_sign_of_life(tmp_path):
    with RunLock(tmp_path, "first") as lock:
        os.utime(tmp_path / FILE, (0, 0))
        lock.touch()
        assert time.time() - (tmp_path / FILE).stat().st_mtime < FRESH_S


def test_what_a_killed_run_of_another_host_said_is_kept_without_locking_others_out(tmp_path):
    foreign(tmp_path, age_s=FRESH_S + 10)
    lock = RunLock(tmp_path, "prune")
    lock.acquire()
    lock.release(keep=lock.left)
    with RunLock(tmp_path, "second") as second:
        assert (second.left["step"], second.left["host"]) == (37, "node-17")


def test_facts_that_are_kept_for_the_next_do_not_lock_it_out(tmp_path):
    lock = RunLock(tmp_path, "a run that failed")
    lock.acquire()
    lock.release(keep={"step": 40})
    with RunLock(tmp_path, "the next") as second:
        assert second.left == {"step": 40}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 3000])
def test_a_lock_file_that_was_cut_off_locks_nobody_out(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with RunLock(tmp_path, "first") as lock:
        assert lock.left is None


def test_a_lock_that_is_a_link_or_in_no_folder_is_refused(tmp_path):
    (tmp_path / FILE).symlink_to(tmp_path / "elsewhere")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"run\.lock, received"):
            RunLock(folder, "first").acquire()
    assert not (tmp_path / "elsewhere").exists()


def test_where_there_are_no_locks_the_file_tells(tmp_path, monkeypatch):
    def unsupported(number, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(lock_module, "_SETTLED_S", 0.0)
    with RunLock(tmp_path, "first"), pytest.raises(InputError, match=f"process {os.getpid()},"):
        RunLock(tmp_path, "second").acquire()
    foreign(tmp_path, age_s=0, host=socket.gethostname(), pid=2**22 + 1)
    with RunLock(tmp_path, "after one that is gone") as lock:
        assert lock.left["step"] == 37
    foreign(tmp_path, age_s=0, host=socket.gethostname(), pid=os.getpid(), since=1.0)
    with RunLock(tmp_path, "after one whose number another process has now"):
        assert stat.S_ISREG((tmp_path / FILE).stat().st_mode)


def test_of_two_that_begin_at_once_without_locks_the_last_to_write_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(RunLock, "_lock", lambda self, number: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: foreign(tmp_path, age_s=0))
    with pytest.raises(InputError, match="node-17"):
        RunLock(tmp_path, "first").acquire()


def test_a_worker_that_outlives_its_run_holds_no_lock(tmp_path):
    """The kernel's lock is of the open file, which a forked child shares."""
    lock = RunLock(tmp_path, "the run")
    lock.acquire()
    (waits, go), (hears, began) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.write(began, b"x")
        os.read(waits, 1)  # until the test ends
        os._exit(0)
    try:
        os.read(hears, 1)
        os.close(lock._number)  # as the kernel does for a run that was killed
        lock._number = None
        with RunLock(tmp_path, "the next") as following:
            assert following.left["who"] == "the run"
    finally:
        os.close(go)
        os.waitpid(child, 0)
