"""``import_report.html``: the same counts as the JSON, for people."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.2rem .8rem "
    ".2rem 0;border-bottom:1px solid #ccc}td:last-child,th:last-child{text-align:right}"
)


def report_page(report: Mapping[str, Any]) -> str:
    """A page without scripts or links, from `ImportReport.to_dict`."""
    rows = []
    for outcome, reasons in report["reasons"].items():
        rows.append(f"<tr><th>{escape(outcome)}</th><th></th><th>{report[outcome]}</th></tr>")
        rows += [
            f"<tr><td></td><td>{escape(reason)}</td><td>{count}</td></tr>"
            for reason, count in reasons.items()
        ]
    splits = ", ".join(f"{escape(name)} {count}" for name, count in report["splits"].items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Import report</title>'
        f"<style>{_STYLE}</style><h1>Import report</h1>"
        f"<p>{escape(report['source'])}, imported as {escape(report['kind'])}: images of "
        f"{report['patients']} patients ({splits}). Outcomes count {escape(report['unit'])}.</p>"
        f"<table>{''.join(rows)}</table><ul>{notes}</ul></html>\n"
    )
