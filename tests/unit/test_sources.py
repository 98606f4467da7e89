"""Looking up a sample's source by bisecting the file, in any order, with gaps and damage."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbv3dist.data.files import UnusableFileError, read_bounded
from mbv3dist.data.idx import DamagedShardError, format_key, read_idx
from mbv3dist.data.sources import Sources


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.integers(0, 3_000_000_000), min_size=1, max_size=60, unique=True),
    data=st.data(),
)
def test_every_key_is_found_in_any_order(tmp_path_factory, keys, data):
    lengths = data.draw(
        st.lists(st.sampled_from([1, 7, 300, 9000, 20_000]), min_size=len(keys), max_size=len(keys))
    )
    paths = {key: f"{key % 97}/" + "x" * n for key, n in zip(sorted(keys), lengths, strict=True)}
    file = tmp_path_factory.mktemp("sources") / "train.sources.tsv"
    file.write_text("".join(f"{format_key(key)}\t{path}\n" for key, path in paths.items()))
    sources = Sources(file)
    for key in [*data.draw(st.permutations(keys)), *sorted(keys)]:
        assert sources.find(format_key(key)) == (format_key(key), paths[key])
    for missing in data.draw(st.lists(st.integers(0, 3_000_000_001), max_size=5)):
        if missing not in paths:
            later = [key for key in sorted(keys) if key > missing]
            expected = (format_key(later[0]), paths[later[0]]) if later else ("", "")
            assert sources.find(format_key(missing)) == expected


def test_damaged_and_empty_files_end(tmp_path):
    file = tmp_path / "train.sources.tsv"
    for content in (b"", b"\n\n\n", b"\0" * 50_000, b"no tab", b"000000005\ta", b"\xff" * 99):
        file.write_bytes(content)
        assert Sources(file).find("000000004")[0] != "000000004"


def test_pipes_are_not_waited_for(tmp_path):
    pipe = tmp_path / "000000.idx"
    os.mkfifo(pipe)
    for use in (lambda: read_bounded(pipe, 10), lambda: Sources(pipe)):
        with pytest.raises(UnusableFileError, match="it is a pipe"):
            use()
    with pytest.raises(DamagedShardError, match=r"000000.idx: it is a pipe"):
        read_idx(pipe)
