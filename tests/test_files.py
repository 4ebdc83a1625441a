"""Which files a folder, a pattern or a list of files means."""

import pytest

from distfit.data import records
from distfit.data.files import expand
from distfit.errors import InputError


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        name = tmp_path / f"train-{shard:05d}-of-00003.tfrecord"
        records.write_records(name, [b"%d.%d" % (shard, number) for number in range(shard + 1)])
    return tmp_path


def test_folder_pattern_and_list_mean_the_same(shards):
    expected = [str(shards / f"train-{shard:05d}-of-00003.tfrecord") for shard in range(3)]
    assert expand(shards) == expected
    assert expand(str(shards / "train-*")) == expected
    assert expand(reversed(expected)) == expected


def test_a_folder_in_a_list_of_files_is_called_one(shards):
    (shards / "parts.tfrecord").mkdir()
    with pytest.raises(InputError, match=r"parts.tfrecord.*it is a folder.*part-\*"):
        expand([shards / "parts.tfrecord"])


def test_what_cannot_be_asked_is_no_missing_file(tmp_path):
    (tmp_path / "a.tfrecord").symlink_to("a.tfrecord")
    with pytest.raises(InputError, match=r"a\.tfrecord.*Too many levels of symbolic links"):
        expand(tmp_path / "a.tfrecord")


def test_a_folder_passes_over_what_are_no_records(shards):
    (shards / "dataset.json").write_text("{}")
    (shards / ".train-00000-of-00003.tfrecord.x1").write_bytes(b"half")
    assert len(expand(shards)) == 3


def test_missing_shards_are_named(shards):
    (shards / "train-00001-of-00003.tfrecord").unlink()
    for files in (shards, str(shards / "*.tfrecord"), sorted(shards.iterdir())):
        with pytest.raises(InputError, match=r"all 3 shards.*received 2: missing train-00001-of-00003\."):
            expand(files)


def test_one_shard_named_alone_is_taken(shards):
    one = str(shards / "train-00001-of-00003.tfrecord")
    assert expand(one) == [one]


def test_several_splits_in_a_folder_are_refused(shards):
    records.write_records(shards / "validation-00000-of-00001.tfrecord", [b"v"])
    with pytest.raises(InputError, match=r"received train, validation.*train-\*"):
        expand(shards)


def test_a_file_twice_is_refused(shards):
    one = str(shards / "train-00001-of-00003.tfrecord")
    with pytest.raises(InputError, match="twice"):
        expand([one, one])


def test_a_missing_folder_gets_the_nearest_name(tmp_path):
    (tmp_path / "digits").mkdir()
    for number in range(9):
        (tmp_path / f"other{number}").mkdir()
    with pytest.raises(InputError, match=r"no 'digts' in .*did you mean 'digits'"):
        expand(tmp_path / "digts")
    with pytest.raises(InputError, match=r"no 'digts' in .*did you mean 'digits'"):
        expand(str(tmp_path / "digts" / "train-*"))


def test_a_pattern_without_a_match_says_what_is_there(shards):
    with pytest.raises(InputError, match=r"no 'valid-\*' in .*train-00000-of-00003"):
        expand(str(shards / "valid-*"))


def test_a_missing_file_in_a_list_gets_the_nearest_name(shards):
    with pytest.raises(InputError, match="did you mean 'train-0000"):
        expand([shards / "train-00000-of-0003.tfrecord"])


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="received an empty folder"):
        expand(tmp_path)


def test_a_folder_without_records_says_what_it_holds(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"a folder with cat\.jpg"):
        expand(tmp_path)


def test_a_scheme_that_tensorflow_lacks_is_refused():
    with pytest.raises(InputError, match=r"can read here \(file://.*ram://\), received 'xyz://bucket/train-\*'.*mount"):
        expand("xyz://bucket/train-*")
