"""Sets of samples: subsets, fingerprints, rows that two sets share."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fillm.data import Sample, SampleSet, shared_rows, take
from fillm.errors import UsageError


def make(count: int, source: str = "set") -> SampleSet:
    return SampleSet([Sample(f"{source}#{i}", (i, i + 1, 7), (-100, i + 1, 7)) for i in range(count)], source)


def test_a_set_is_a_sequence() -> None:
    samples = make(5)
    samples.shortened = ["set#1", "set#4"]
    samples.skipped = [("set, row 9", "bad")]
    assert len(samples) == 5
    assert samples[-1] is samples.samples[4]
    assert [sample.id for sample in samples[1:3]] == ["set#1", "set#2"]
    assert samples[1:3].shortened == ["set#1"]
    assert samples[1:3].skipped == samples.skipped
    assert samples.num_tokens == 15
    assert samples.lengths == [3] * 5
    assert samples[0] in samples
    assert samples[0].num_counted == 2


def test_the_fingerprint_is_sha256_over_int64_and_minds_the_order() -> None:
    samples = make(3)
    expected = hashlib.sha256()
    for i in range(3):
        expected.update(struct.pack("<7q", 3, i, i + 1, 7, -100, i + 1, 7))
    assert samples.fingerprint == expected.hexdigest()
    assert samples.subset([1, 0, 2]).fingerprint != samples.fingerprint
    renamed = SampleSet([Sample("other", s.input_ids, s.labels) for s in samples], "other")
    assert renamed.fingerprint == samples.fingerprint
    moved = SampleSet([Sample("a", (1, 2, 3), (-100, 2, 3)), Sample("b", (4, 5), (-100, 5))], "x")
    split = SampleSet([Sample("a", (1, 2), (-100, 2)), Sample("b", (3, 4, 5), (-100, 4, 5))], "x")
    assert moved.fingerprint != split.fingerprint


@given(count=st.integers(1, 30), seed=st.integers(0, 5), data=st.data())
def test_take_is_a_seeded_ordered_subset(count: int, seed: int, data: st.DataObject) -> None:
    samples = make(count)
    size = data.draw(st.integers(1, count))
    taken = take(samples, size, seed)
    ids = [int(sample.id.partition("#")[2]) for sample in taken]
    assert len(ids) == size
    assert ids == sorted(set(ids))
    assert taken.fingerprint == take(samples, size, seed).fingerprint
    assert set(take(samples, data.draw(st.integers(1, size)), seed)) <= set(taken)  # smaller is part of larger


def test_take_depends_on_the_seed_and_says_what_is_too_many() -> None:
    samples = make(30)
    assert take(samples, None, 0) is samples
    assert take(samples, 30, 3).fingerprint == samples.fingerprint
    assert len({take(samples, 10, seed).fingerprint for seed in range(20)}) == 20
    for count in (0, -1, 31):
        with pytest.raises(UsageError, match=f"^--num-retain {count}: set has 30 samples; give 1 to 30"):
            take(samples, count, 0, option="--num-retain")


def test_shared_rows_are_those_with_equal_tokens_and_labels() -> None:
    a, b = make(4, "a"), make(6, "b")
    b.samples = [Sample("b#x", (1, 2, 7), (-100, -100, 7)), *b.samples[2:], b.samples[2]]
    assert shared_rows(a, b) == [("a#2", "b#2"), ("a#3", "b#3")]
    assert shared_rows(b, make(1, "c")) == []
