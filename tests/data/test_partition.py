from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmed.data.manifest import ImageRecord
from fedmed.data.partition import moved_images, partition
from fedmed.data.spec import PartitionSpec
from fedmed.errors import ConfigError, DataError
from fedmed.types import Split


def record(
    row: int, patient: str, split: Split = Split.TRAIN, label: int = 0, site: str | None = None,
    **extras: str,
) -> ImageRecord:  # fmt: skip
    return ImageRecord(row, f"{row}.png", patient, split, label=label, site=site, extras=extras)


@st.composite
def tables(draw: st.DrawFn) -> list[ImageRecord]:
    """Patients with one to five images, labels and sites that may differ between images."""
    rows: list[ImageRecord] = []
    for patient in range(draw(st.integers(6, 25))):
        split = Split.TRAIN if patient < 6 else draw(st.sampled_from(list(Split)))
        for _ in range(draw(st.integers(1, 5))):
            label = draw(st.integers(0, 2))
            site = draw(st.sampled_from(["north", "south", "west"]))
            rows.append(record(len(rows) + 2, f"p{patient}", split, label, site, scanner=site[0]))
    return draw(st.permutations(rows))


specs = st.one_of(
    st.builds(PartitionSpec, kind=st.just("iid"), sites=st.integers(1, 6)),
    st.builds(
        PartitionSpec,
        kind=st.just("dirichlet"),
        sites=st.integers(1, 6),
        alpha=st.sampled_from([0.01, 0.3, 5.0, 1000.0]),
    ),
    st.just(PartitionSpec("site")),
    st.just(PartitionSpec("by_column", column="scanner")),
)


@given(rows=tables(), spec=specs, seed=st.integers(0, 2**32 - 1))
def test_nobody_is_at_two_sites_and_nothing_is_lost(
    rows: list[ImageRecord], spec: PartitionSpec, seed: int
) -> None:
    sites = partition(rows, spec, seed)
    assert Counter(r.row for own in sites.values() for r in own) == Counter(r.row for r in rows)
    homes = Counter(p for own in sites.values() for p in {r.patient_id for r in own})
    assert set(homes.values()) == {1}
    if spec.kind in ("iid", "dirichlet"):
        assert len(sites) == spec.sites
        for own in sites.values():
            assert any(r.split is Split.TRAIN for r in own)


@given(rows=tables(), spec=specs, seed=st.integers(0, 99))
def test_the_order_of_rows_does_not_matter(
    rows: list[ImageRecord], spec: PartitionSpec, seed: int
) -> None:
    def homes(rows: list[ImageRecord]) -> dict[int, str]:
        return {r.row: name for name, own in partition(rows, spec, seed).items() for r in own}

    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    assert homes(rows) == homes(shuffled)


@given(patients=st.integers(4, 40), sites=st.integers(1, 4), seed=st.integers(0, 99))
def test_iid_sites_have_equally_many_patients(patients: int, sites: int, seed: int) -> None:
    rows = [record(i + 2, f"p{i}") for i in range(patients)]
    sizes = [len(own) for own in partition(rows, PartitionSpec("iid", sites=sites), seed).values()]
    assert max(sizes) - min(sizes) <= 1


def test_the_seed_changes_who_is_where() -> None:
    rows = [record(i + 2, f"p{i}") for i in range(40)]
    spec = PartitionSpec("iid", sites=2)
    assert partition(rows, spec, 0) == partition(rows, spec, 0)
    assert partition(rows, spec, 0) != partition(rows, spec, 1)


def test_small_alpha_skews_labels_and_large_alpha_does_not() -> None:
    rows = [record(i + 2, f"p{i:03}", label=i % 4) for i in range(800)]

    def spread(alpha: float) -> float:
        spec = PartitionSpec("dirichlet", sites=4, alpha=alpha)
        shares = []
        for seed in range(5):
            for own in partition(rows, spec, seed).values():
                counts = np.bincount([r.label or 0 for r in own], minlength=4)
                shares.append(counts / counts.sum())
        return float(np.std(shares))

    assert spread(1000.0) < 0.03
    assert spread(0.1) > 0.2


@pytest.mark.parametrize("seed", range(10))
def test_no_site_is_left_without_a_training_patient(seed: int) -> None:
    rows = [record(i + 2, f"p{i}", label=i % 2) for i in range(6)]
    sites = partition(rows, PartitionSpec("dirichlet", sites=6, alpha=0.01), seed)
    assert [len(own) for own in sites.values()] == [1] * 6


def test_a_site_by_column_keeps_its_patients_whole() -> None:
    rows = [
        record(2, "p1", site="b"),
        record(3, "p1", site="b"),
        record(4, "p1", site="a"),
        record(5, "p2", site="b"),
        record(6, "p2", site="a"),
        record(7, "p3"),
        record(8, "p4", site="a"),
    ]
    sites = partition(rows, PartitionSpec("site"), 0)
    assert {name: [r.row for r in own] for name, own in sites.items()} == {
        "a": [5, 6, 8],
        "b": [2, 3, 4],
        "unknown": [7],
    }
    assert moved_images(rows) == 2


def test_faults_are_named() -> None:
    rows = [record(i + 2, f"p{i}", Split.TRAIN if i < 2 else Split.VAL) for i in range(6)]
    for kind in ("iid", "dirichlet"):
        with pytest.raises(DataError, match=r"data\.partition\.sites=3 is more than the 2"):
            partition(rows, PartitionSpec(kind, sites=3), 0)
    with pytest.raises(DataError, match="no values in column site"):
        partition(rows, PartitionSpec("site"), 0)
    with pytest.raises(DataError, match="no values in column ward"):
        partition(rows, PartitionSpec("by_column", column="ward"), 0)
    for name in ("../x", "a/b", ".hidden", "x" * 65, "a\nb"):
        with pytest.raises(DataError, match="cannot be a site's name"):
            partition([record(2, "p", site=name)], PartitionSpec("site"), 0)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"kind": "random"}, "data.partition.kind"),
        ({"sites": 0}, "data.partition.sites"),
        ({"alpha": 0.0}, "data.partition.alpha"),
        ({"alpha": float("nan")}, "data.partition.alpha"),
        ({"kind": "by_column"}, "data.partition.column"),
    ],
)
def test_a_wrong_rule_names_its_key(values: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        PartitionSpec(**values)  # type: ignore[arg-type]
