"""Tables say what they must, cut nothing, and read the same in a pipe and on a terminal."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmed.report import wording
from fedmed.report.summary import SitePrivacy, Summary
from fedmed.report.tables import (
    comparison_table,
    print_table,
    result_table,
    to_markdown,
    to_text,
)

BINARY = {
    "loss": 0.3,
    "n": 312,
    "auroc": 0.9412,
    "average_precision": 0.9,
    "accuracy": 0.853,
    "sensitivity": 0.93,
    "specificity": None,
    "brier": 0.1,
}
RUN = Summary(
    experiment="pneumonia",
    mode="federated",
    strategy="fedavg",
    model="resnet",
    seed=0,
    rounds=20,
    seconds=187.3,
    synthetic=True,
    pooled=BINARY,
    sites={"a hospital with a long name [b]": BINARY | {"auroc": 0.9}, "b": BINARY},
    unit="patient",
    privacy={
        "a hospital with a long name [b]": SitePrivacy(2.981, 1e-4),
        "b": SitePrivacy(1.5, 1e-5),
    },
    failures={"deadline": 2},
)
PLAIN = replace(RUN, unit=None, privacy={}, synthetic=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def rows(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_result_table_in_a_pipe():
    title, header, *body, caption = rows(to_text(result_table(RUN)))
    assert title == ["pneumonia: federated, fedavg, resnet, 20 rounds, seed 0, 3 min 07 s"]
    assert header == [
        "site",
        "images",
        "AUROC",
        "accuracy",
        "sensitivity",
        "specificity",
        "ε",
        "δ",
        "unit",
    ]
    values = ["312", "0.900", "0.853", "0.930", "-", "2.99", "0.0001", "patient"]
    assert body[0] == ["a hospital with a long name [b]", *values]
    assert body[1][-3:] == ["1.50", "1e-05", "patient"]
    assert body[2] == ["pooled", "312", "0.941", "0.853", "0.930", "-", "2.99", "0.0001", "patient"]
    for words in ("synthetic phantoms", "per patient", "largest of any site", "deadline: 2"):
        assert words in caption[0]


def test_a_run_without_dp_says_so_and_real_images_are_not_called_phantoms():
    text = to_text(result_table(PLAIN))
    assert "no differential privacy" in text
    assert rows(text)[2][-3:] == ["-", "-", "no DP"]
    assert "synthetic" not in text


def test_segmentation_shows_dice_by_class_and_the_unit_of_hd95():
    values = {"n": 4, "dice": 0.9, "hd95": 2.5, "dice_front": 0.91, "dice_back": None}
    text = to_text(result_table(replace(RUN, pooled=values, sites={"a": values})))
    assert rows(text)[1][1:6] == ["images", "Dice", "HD95", "Dice front", "Dice back"]
    assert rows(text)[2][1:6] == ["4", "0.900", "2.50", "0.910", "-"]
    assert "HD95 in voxels" in text


def test_nothing_is_cut_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    screen, pipe = Terminal(), io.StringIO()
    print_table(result_table(RUN), screen)
    print_table(result_table(RUN), pipe)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "…" not in drawn
    assert "│" in drawn
    assert "│" not in pipe.getvalue()
    for cell in {cell for row in rows(pipe.getvalue()) for cell in row}:
        assert cell in drawn


def test_plain_text_lines_up_with_wide_characters():
    sites = {"東京": BINARY, "Köln": BINARY}
    _, header, first, second, *_ = to_text(result_table(replace(PLAIN, sites=sites))).splitlines()
    # 東京 fills four columns with two characters.
    assert first.index("312") + 2 == second.index("312") == header.index("images") + 3


def test_output_that_cannot_hold_greek_letters_still_gets_the_table():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_table(result_table(RUN), stream)
    stream.flush()
    assert b"0.941" in raw.getvalue()


def test_markdown_is_a_table():
    text = to_markdown(result_table(replace(RUN, sites={"a|b": BINARY})))
    title, table, caption = text.split("\n\n")
    assert title.startswith("**pneumonia")
    assert "synthetic phantoms" in caption
    lines = table.splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert lines[1].startswith("| :--- | ---: |")
    assert "a\\|b" in lines[2]


def test_modes_side_by_side():
    runs = [
        (mode, replace(base, mode=mode))
        for mode, base in (("federated", RUN), ("centralized", PLAIN), ("local", PLAIN))
    ]
    title, header, *body, caption = rows(to_text(comparison_table(runs)))
    assert title == ["3 runs: pneumonia"]
    assert header[:3] == ["run", "images", "AUROC"]  # the mode is the run's name already
    assert [row[0] for row in body] == ["federated", "centralized", "local"]
    assert [row[-4] for row in body] == ["2.99", "-", "-"]
    assert "some runs on synthetic phantoms" in caption[0]


def test_a_sweep_shows_what_differs_and_nothing_else():
    runs = [
        (
            {"privacy.target_epsilon": epsilon, "seed": seed, "optimizer.lr": 0.1},
            replace(RUN, seed=seed),
        )
        for epsilon in (1, 3)
        for seed in (0, 1)
    ]
    _, header, *body, _ = rows(to_text(comparison_table(runs)))
    assert header[:3] == ["privacy.target_epsilon", "seed", "images"]
    assert [row[:2] for row in body] == [["1", "0"], ["1", "1"], ["3", "0"], ["3", "1"]]


def test_names_cannot_steer_the_terminal():
    text = to_text(result_table(replace(PLAIN, sites={"a\x1b[31m\nb": BINARY})))
    assert "\x1b" not in text
    assert "a?[31m?b" in text


@given(st.floats(0, 1e6))
def test_epsilon_is_never_shown_below_what_was_spent(value):
    shown = float(wording.epsilon(value))
    assert value - 1e-9 <= shown < value + 0.01 + 1e-9


@pytest.mark.parametrize(("value", "shown"), [(1.1, "1.10"), (8.0, "8.00"), (0.29, "0.29")])
def test_epsilon_of_two_digits_is_shown_as_it_is(value, shown):
    assert wording.epsilon(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(3.21, "3.2 s"), (187.3, "3 min 07 s"), (7260, "2 h 01 min")]
)
def test_durations(seconds, shown):
    assert wording.duration(seconds) == shown
