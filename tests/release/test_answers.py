"""Calibrated probabilities, prediction sets and the flag for a person."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, softmax

from fedmed.release.answers import probabilities, read_answers
from fedmed.release.records import Preparation
from fedmed.types import TaskKind, TaskSpec

KINDS = {
    "binary": TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 1, (8, 8)),
    "multiclass": TaskSpec(TaskKind.MULTICLASS, ("a", "b", "c"), 2, 1, (8, 8)),
    "multilabel": TaskSpec(TaskKind.MULTILABEL, ("a", "b", "c"), 2, 1, (8, 8)),
}


def prepared(kind, **changes):
    values = {
        "format": 1, "task": KINDS[kind], "intensity": "none", "spacing": None,
        "temperatures": {}, "thresholds": {}, "level": 0.9, "conformal": None, "synthetic": False,
    }  # fmt: skip
    return Preparation(**{**values, **changes})


@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=5), st.floats(0.2, 9))
def test_binary_probabilities_are_those_of_scipy(logits, temperature):
    found = probabilities(
        torch.tensor(logits)[:, None], prepared("binary", temperatures={"yes": temperature})
    )
    expected = expit(np.array(logits, np.float32).astype(float) / temperature)
    np.testing.assert_allclose(found[:, 1], expected, atol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1)


@given(
    st.lists(st.tuples(*[st.floats(-300, 300, width=32)] * 3), min_size=1, max_size=5),
    st.floats(0.2, 9),
)
def test_multiclass_probabilities_are_those_of_scipy(logits, temperature):
    same = dict.fromkeys(("a", "b", "c"), temperature)
    found = probabilities(torch.tensor(logits), prepared("multiclass", temperatures=same))
    values = np.array(logits, np.float32).astype(float) / temperature
    np.testing.assert_allclose(found, softmax(values, axis=1), atol=1e-12)


def test_labels_have_a_temperature_each():
    logits = torch.tensor([[2.0, 2.0, 2.0]])
    found = probabilities(logits, prepared("multilabel", temperatures={"a": 2.0, "c": 4.0}))
    np.testing.assert_allclose(found, expit([[1.0, 2.0, 0.5]]))


@pytest.mark.parametrize(
    ("kind", "row", "changes", "prediction", "members", "refer"),
    [
        ("binary", [0.45, 0.55], {}, ("yes",), None, None),
        ("binary", [0.45, 0.55], {"thresholds": {"yes": 0.6}}, ("no",), None, None),
        ("binary", [0.40, 0.60], {"thresholds": {"yes": 0.6}}, ("yes",), None, None),
        ("binary", [0.1, 0.9], {"conformal": 0.3}, ("yes",), ("yes",), False),
        ("binary", [0.4, 0.6], {"conformal": 0.3}, ("yes",), ("no", "yes"), True),
        ("binary", [0.4, 0.6], {"conformal": 0.7}, ("yes",), (), True),
        # the threshold says yes where the set says no
        ("binary", [0.8, 0.2], {"conformal": 0.3, "thresholds": {"yes": 0.1}},
         ("yes",), ("no",), True),
        ("multiclass", [0.2, 0.5, 0.3], {"conformal": 0.4}, ("b",), ("b",), False),
        ("multiclass", [0.2, 0.5, 0.3], {"conformal": 0.3}, ("b",), ("b", "c"), True),
        ("multiclass", [0.2, 0.5, 0.3], {"thresholds": {"b": 0.9}}, ("b",), None, None),
        ("multilabel", [0.2, 0.5, 0.9], {}, ("b", "c"), None, None),
        ("multilabel", [0.2, 0.4, 0.3], {}, (), None, None),
        ("multilabel", [0.2, 0.6, 0.9], {"conformal": 0.5}, ("b", "c"), ("b", "c"), False),
        # as likely absent as present
        ("multilabel", [0.2, 0.5, 0.9], {"conformal": 0.5}, ("b", "c"), ("b", "c"), True),
        # neither absent nor present is likely enough
        ("multilabel", [0.2, 0.6, 0.9], {"conformal": 0.7}, ("b", "c"), ("c",), True),
        # surely absent, and above a low threshold
        ("multilabel", [0.2, 0.6, 0.9], {"conformal": 0.5, "thresholds": {"a": 0.1}},
         ("a", "b", "c"), ("b", "c"), True),
        ("multilabel", [0.2, 0.5, 0.9], {"conformal": 0.1}, ("b", "c"), ("a", "b", "c"), True),
    ],
)  # fmt: skip
def test_what_is_said_of_an_image(kind, row, changes, prediction, members, refer):
    (answer,) = read_answers(np.array([row]), prepared(kind, **changes))
    assert (answer.prediction, answer.members, answer.refer) == (prediction, members, refer)
    assert answer.probabilities == tuple(row)
