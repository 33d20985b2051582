from __future__ import annotations

import pytest

from fedmed.data.importers.dicom.rules import Gaps, Output, Rules, load_rules
from fedmed.errors import DataError


def rules(tmp_path, text: str) -> Rules:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    return load_rules(path)


def test_rules_from_yaml(tmp_path):
    found = rules(
        tmp_path,
        """
series:
  - modality: [mr]
    description: "(?i)t1"
    exclude: scout
    slices: [20, 300]
    slice_spacing: [0.5, 7]
    output: volume
    spacing: [1, 1, 1]
    gaps: fill
  - modality: DX
    view: [PA, AP]
    body_part: CHEST
    bits: 8
    window: [40, 400]
""",
    )
    first, second = found.rules
    assert first.modality == ("MR",)
    assert (first.output, first.gaps) == (Output.VOLUME, Gaps.FILL)
    assert first.takes({"modality": "MR"}, "Sag T1 post")
    assert not first.takes({"modality": "MR"}, "T1 scout")
    assert not first.takes({"modality": "CT"}, "T1")
    assert second.takes({"modality": "DX", "view": "PA", "body_part": "CHEST"}, "")
    assert not second.takes({"modality": "DX", "view": "LL", "body_part": "CHEST"}, "")
    assert Rules.from_list(found.to_list()) == found
    assert found.digest() != Rules().digest()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("series: [{modalty: CT}]", "did you mean 'modality'"),
        ("series: [{modality: CTT}]", "did you mean CT"),
        ("series: [{slices: [9, 2]}]", "least number second"),
        ("series: [{slices: 9}]", "not a list of 2 numbers"),
        ("series: [{bits: 12}]", "not 8 or 16"),
        ("series: [{output: 4d}]", "output"),
        ("series: [{description: '('}]", "description"),
        ("series: [{spacing: [0, 1]}]", "not above 0"),
        ("rows: []", "series"),
        ("series: []", "no list"),
        ("series: [", "YAML"),
        ("series: [!!python/object/apply:os.system ['true']]", "YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, what):
    with pytest.raises(DataError, match=what.replace("(", r"\(")):
        rules(tmp_path, text)
