"""``site.toml``: the hospital's own rules, and one line for each thing that is wrong in them."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from importlib.resources import files

import pytest

from fedmed.cli.main import main
from fedmed.errors import ConfigError
from fedmed.hospital.rules import Operation, Release, Rules, read_rules
from fedmed.types import Disclosure, PrivacyUnit

TEMPLATE = files("fedmed.hospital").joinpath("site.toml").read_text()
LEAST = 'data = "data"\nmax_epsilon = 3.0\n'


@pytest.fixture
def read(tmp_path):
    def reading(text):
        path = tmp_path / "site.toml"
        path.write_text(text)
        return read_rules(path)

    return reading


def test_template_says_what_the_defaults_are(read):
    assert read(TEMPLATE) == read(LEAST) == Rules("data", 3.0)


def test_every_commented_line_of_the_template_can_be_used(read):
    """Taking the comment sign away gives a file that is read, with another rule."""
    lines = TEMPLATE.splitlines()
    for number, line in enumerate(lines):
        text = line.removeprefix("# ")
        if text == line or not text.partition(" = ")[0].replace("_", "").replace("-", "").isalpha():
            continue
        if " = " in text:
            changed = "\n".join([*lines[:number], text, *lines[number + 1 :]])
            rules = read(changed)
            assert text.startswith("delta") or rules != Rules("data", 3.0), text


def test_whole_file(read):
    rules = read(
        """
        data = "/images"
        max_epsilon = 2
        ledger = "/books/ledger.db"
        cohort = "thorax"
        min_noise_multiplier = 0.5
        delta = 1e-6
        cohort_size = 500
        allowed_units = ["patient", "image"]
        accountant = "prv"
        allowed_models = ["densenet121"]
        max_local_steps = 100
        [approvals]
        data-protection = "roles/dp.pub"
        [release]
        metrics = "noisy"
        min_cell = 20
        [operation]
        window = "20:00-06:00"
        megabytes_per_second = 10
        proxy = "proxy:3128"
        device = "cuda:1"
        devices = 2
        drain_seconds = 60
        """
    )
    policy = rules.policy()
    assert (policy.max_epsilon, policy.delta, policy.cohort_size) == (2.0, 1e-6, 500)
    assert policy.allowed_units == (PrivacyUnit.PATIENT, PrivacyUnit.IMAGE)
    assert (policy.accountant, policy.max_local_steps) == ("prv", 100)
    assert policy.allowed_models == ("densenet121",)
    assert policy.min_noise_multiplier == 0.5
    assert rules.approvals == {"data-protection": "roles/dp.pub"}
    assert rules.release == Release(Disclosure.NOISY, 20)
    assert (policy.metrics, policy.min_cell) == (Disclosure.NOISY, 20)
    assert rules.operation == Operation("20:00-06:00", 10.0, "proxy:3128", "cuda:1", 2, 60.0)


def test_training_without_privacy_has_to_be_spelt_out(read):
    assert math.isinf(read('data = "d"\nmax_epsilon = "inf"').policy().max_epsilon)


BAD = {
    # line: (key that is named, words of the remedy)
    'max_epsilon = "infinite"': ("max_epsilon", 'give a number, or "inf"'),
    'max_epsilon = "3"': ("max_epsilon", 'give a number, or "inf"'),
    "max_epsilon = 0": ("max_epsilon", "see the comments"),
    "max_epsilon = -1.0": ("max_epsilon", "see the comments"),
    "max_epsilon = inf": ("max_epsilon", "see the comments"),
    "max_epsilon = nan": ("max_epsilon", "see the comments"),
    "max_epsilon = true": ("max_epsilon", "see the comments"),
    "max_epsilon = [1]": ("max_epsilon", "see the comments"),
    "delta = 0.0": ("delta", "see the comments"),
    "delta = 1": ("delta", "see the comments"),
    "delta = '1e-5'": ("delta", "see the comments"),
    "cohort_size = 0": ("cohort_size", "see the comments"),
    "cohort_size = 1.5": ("cohort_size", "see the comments"),
    "min_noise_multiplier = -0.1": ("min_noise_multiplier", "see the comments"),
    "min_noise_multiplier = nan": ("min_noise_multiplier", "see the comments"),
    "max_local_steps = 0": ("max_local_steps", "see the comments"),
    'accountant = "gdp"': ("accountant", "use rdp or prv"),
    'allowed_units = ["hospital"]': ("allowed_units", "see the comments"),
    'allowed_units = "patient"': ("allowed_units", "see the comments"),
    'allowed_models = "resnet"': ("allowed_models", "see the comments"),
    "ledger = 1": ("ledger", "see the comments"),
    "data = 1": ("data", "see the comments"),
    "max_epsilom = 3": ("max_epsilom", "did you mean 'max_epsilon'"),
    "zzz = 3": ("zzz", "there are data, max_epsilon"),
    '[approvals]\n"Data Protection" = "x.pub"': ("Data Protection", "lower case letters and -"),
    '[approvals]\n"../x" = "x.pub"': ("../x", "lower case letters and -"),
    "[approvals]\nlegal = 1": ("approvals.legal", "see the comments"),
    "[release]\nmetrics = 'auroc'": ("release.metrics", "see the comments"),
    '[release]\nmetrics = "exact"': ("release.metrics", 'needs max_epsilon = "inf"'),
    "[release]\nmetrics = ['noisy']": ("release.metrics", "see the comments"),
    "[release]\nmin_cell = '10'": ("release.min_cell", "see the comments"),
    "[release]\nmin_cell = 0": ("release.min_cell", "see the comments"),
    "[release]\nfigures = []": ("release.figures", "see the comments"),
    '[operation]\nwindow = "20-6"': ("operation.window", 'write it as "20:00-06:00"'),
    '[operation]\nwindow = "24:00-06:00"': ("operation.window", 'write it as "20:00-06:00"'),
    '[operation]\nwindow = "20:60-06:00"': ("operation.window", 'write it as "20:00-06:00"'),
    '[operation]\nwindow = "20:00-06:00 "': ("operation.window", 'write it as "20:00-06:00"'),
    '[operation]\nwindow = "20:00-20:00"': ("never opens", "leave it out"),
    "[operation]\nwindow = 20": ("operation.window", "see the comments"),
    "[operation]\nmegabytes_per_second = 0": ("megabytes_per_second", "see the comments"),
    "[operation]\nmegabytes_per_second = inf": ("megabytes_per_second", "see the comments"),
    '[operation]\nproxy = "proxy"': ("operation.proxy", 'write it as "host:port"'),
    '[operation]\nproxy = ":3128"': ("operation.proxy", 'write it as "host:port"'),
    '[operation]\nproxy = "p:0"': ("operation.proxy", 'write it as "host:port"'),
    '[operation]\nproxy = "p:65536"': ("operation.proxy", 'write it as "host:port"'),
    '[operation]\nproxy = "http://p"': ("operation.proxy", 'write it as "host:port"'),
    '[operation]\nproxy = "p:²"': ("operation.proxy", 'write it as "host:port"'),
    "[operation]\ndevices = 0": ("operation.devices", "see the comments"),
    "[operation]\ndrain_seconds = -1": ("operation.drain_seconds", "see the comments"),
    "[operation]\nwindw = 1": ("operation.windw", "see the comments"),
    "max_epsilon 3": ("TOML", "mend that line"),
    "data = 'x'\ndata = 'y'": ("TOML", "mend that line"),
}


@pytest.mark.parametrize(("line", "named"), BAD.items(), ids=BAD)
def test_bad_value_is_one_line_with_key_and_remedy(read, tmp_path, line, named):
    key = line.split(" = ")[0]
    kept = [k for k in LEAST.splitlines() if k.split(" = ")[0] != key]
    with pytest.raises(ConfigError) as caught:
        read("\n".join([*kept, line, ""]))
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "site.toml"))
    assert "\n" not in text
    where, remedy = named
    assert where in caught.value.problem
    assert remedy in text


@pytest.mark.parametrize("key", ["data", "max_epsilon"])
def test_what_the_hospital_has_to_say_itself(read, key):
    text = "\n".join(k for k in LEAST.splitlines() if not k.startswith(key))
    with pytest.raises(ConfigError, match=f"missing field site.toml.{key}; see the comments"):
        read(text)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "site.toml"
    with pytest.raises(ConfigError, match="No such file or directory; make it"):
        read_rules(path)
    path.write_bytes(b'data = "\xff"')
    with pytest.raises(ConfigError, match="is not TOML"):
        read_rules(path)


def test_command_line_points_at_the_file_and_not_elsewhere(tmp_path, capsys):
    """A remedy of another part (``fedmed config show``) would send the reader astray."""
    (tmp_path / "kit.json").write_text("{}")
    (tmp_path / "site.toml").write_text('data = "d"\nmax_epsilon = -1\n')
    assert main(["site", "budget", "--folder", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "max_epsilon=-1" in line
    assert "see the comments in the file" in line
    assert "fedmed config" not in line


# ---- when


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("08:00-17:30", ("08:00", "12:00", "17:29"), ("07:59", "17:30", "00:00", "23:59")),
        ("20:00-06:00", ("20:00", "23:59", "00:00", "05:59"), ("06:00", "12:00", "19:59")),
        ("00:00-12:00", ("00:00", "11:59"), ("12:00", "23:59")),
        ("23:59-00:00", ("23:59",), ("00:00", "23:58", "12:00")),
        (None, ("00:00", "12:00", "23:59"), ()),
    ],
)
def test_hours_of_work(window, inside, outside):
    operation = Operation(window=window)
    for clock in inside:
        assert operation.open_at(datetime.fromisoformat(f"2026-03-29 {clock}:00"))
        assert operation.open_at(datetime.fromisoformat(f"2026-03-29 {clock}:59.999"))
    for clock in outside:
        assert not operation.open_at(datetime.fromisoformat(f"2026-03-29 {clock}:00"))


@pytest.mark.parametrize(("first", "last"), [("20:00", "06:00"), ("06:00", "20:00")])
def test_a_window_and_its_counterpart_share_the_day(first, last):
    night, day = Operation(window=f"{first}-{last}"), Operation(window=f"{last}-{first}")
    clock = datetime(2026, 1, 1)
    for _ in range(24 * 60):
        assert night.open_at(clock) != day.open_at(clock)
        clock += timedelta(minutes=1)
