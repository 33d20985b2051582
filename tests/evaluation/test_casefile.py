"""Judged cases on disk come back bit by bit, and a broken file is said to be one."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmed.errors import DataError
from fedmed.evaluation.casefile import read_cases, write_cases
from fedmed.evaluation.cases import GRID, Cases, SegmentationScores
from fedmed.evaluation.records import Predictions

_UNIT = st.floats(0, 1, width=32)


def _frame(n: int) -> dict[str, object]:
    return {
        "sites": tuple("ab"[i % 2] for i in range(n)),
        "patients": np.arange(n, dtype=np.int64) // 2,
        "groups": {"sex": tuple((None, "F", "M")[i % 3] for i in range(n))},
    }


def _equal(ours: Cases, theirs: Cases) -> None:
    assert ours.sites == theirs.sites
    assert ours.groups == theirs.groups
    np.testing.assert_array_equal(ours.patients, theirs.patients)


@given(outputs=arrays(np.float32, (7, 3), elements=_UNIT), with_loss=st.booleans())
def test_probabilities_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, outputs: np.ndarray, with_loss: bool
) -> None:
    loss = outputs.sum(1, dtype=np.float64) / 3 if with_loss else None
    targets = np.arange(21, dtype=np.int64).reshape(7, 3) % 2
    cases = Cases(**_frame(7), predictions=Predictions(outputs, targets, loss))  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("cases") / "cases.jsonl"
    write_cases(path, cases)
    back = read_cases(path)
    _equal(back, cases)
    assert back.predictions is not None
    assert back.predictions.outputs.dtype == np.float32
    np.testing.assert_array_equal(back.predictions.outputs, outputs)
    np.testing.assert_array_equal(back.predictions.truth(), targets)
    assert (back.predictions.loss is None) == (loss is None)
    if loss is not None:
        np.testing.assert_array_equal(back.predictions.loss, loss)


def test_scores_that_are_undefined_come_back_undefined(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 8).reshape(4, 2) / 3
    values[1, 0] = np.nan
    grid = np.linspace(0, 1, 4 * len(GRID)).reshape(4, -1)
    scores = SegmentationScores(values, values, values * 9, values - 1, grid, grid[::-1].copy())
    cases = Cases(**_frame(4), scores=scores)  # type: ignore[arg-type]
    write_cases(tmp_path / "c", cases)
    back = read_cases(tmp_path / "c")
    assert back.scores is not None
    assert back.predictions is None
    np.testing.assert_array_equal(back.scores.dice, values)
    np.testing.assert_array_equal(back.scores.missed, grid)


def test_no_case_at_all(tmp_path: Path) -> None:
    cases = Cases((), np.empty(0, np.int64), {}, Predictions(np.empty(0), np.empty(0)))
    write_cases(tmp_path / "c", cases)
    assert len(read_cases(tmp_path / "c")) == 0


@pytest.mark.parametrize(
    "text", ["{", '{"site": "a"}', "[1, 2]", "3", '{"site":"a","patient":"x"}']
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "c").write_text(text + "\n")
    with pytest.raises(DataError, match="fedmed evaluate") as caught:
        read_cases(tmp_path / "c")
    assert "\n" not in str(caught.value)
