"""``fedmed release``: check, sign, verify and export a model that others are to use."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmed.release.criteria import Criteria, Finding
    from fedmed.release.verify import Checked


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    verb = verbs.add_parser("release", help="check, sign, verify and export a model")
    actions = verb.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_check(actions)
    _add_key(actions)
    _add_sign(actions)
    _add_verify(actions)
    _add_export(actions)


def _add_check(actions: Any) -> None:
    check = actions.add_parser(
        "check",
        help="does a run meet the criteria of a release?",
        description="Compare a run's evidence with the criteria; --out gathers the release if "
        "all are met. Exit status 1 if one is not.",
    )
    check.add_argument("run", metavar="RUN", type=Path, help="folder of a run with evidence")
    check.add_argument(
        "--criteria", metavar="FILE", type=Path, help="TOML; configs/release.toml is the default"
    )
    check.add_argument("--out", metavar="DIR", type=Path, help="make the release there")
    check.add_argument("--name", help="of the release; the experiment's if left out")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.set_defaults(handler=run_check)


def _add_key(actions: Any) -> None:
    key = actions.add_parser(
        "key",
        help="make a signer's key",
        description="Make an Ed25519 key, and print its public half as an entry of a trust file.",
    )
    key.add_argument("file", metavar="FILE", type=Path, help="where the private key is kept")
    key.add_argument("--role", required=True, help="clinician, privacy-officer, …")
    key.add_argument("--name", required=True, help="the signer's name")
    key.set_defaults(handler=run_key)


def _add_sign(actions: Any) -> None:
    sign = actions.add_parser(
        "sign",
        help="vouch for a release in a role",
        description="Sign a release whose files, evidence and criteria hold.",
    )
    sign.add_argument("dir", metavar="DIR", type=Path, help="folder of a release")
    sign.add_argument("--key", metavar="FILE", type=Path, required=True, help="private key")
    sign.add_argument("--role", required=True, help="a role that the release asks for")
    sign.add_argument("--name", required=True, help="the signer's name")
    sign.set_defaults(handler=run_sign)


def _add_verify(actions: Any) -> None:
    verify = actions.add_parser(
        "verify",
        help="is a release whole, and signed by those who are trusted?",
        description="Check every file, the criteria and the signatures; each fault has a line.",
    )
    verify.add_argument("dir", metavar="DIR", type=Path, help="folder of a release")
    _add_trust(verify)
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.set_defaults(handler=run_verify)


def _add_export(actions: Any) -> None:
    export = actions.add_parser(
        "export",
        help="write a release's network for other programs",
        description="Export a release that verifies; the export is kept only if it gives the "
        "same outputs on random inputs.",
    )
    export.add_argument("dir", metavar="DIR", type=Path, help="folder of a release")
    export.add_argument("out", metavar="OUT", type=Path, help="a file (onnx) or folder (bundle)")
    export.add_argument(
        "--format", choices=("onnx", "monai-bundle"), required=True, help="what is written"
    )
    _add_trust(export)
    export.set_defaults(handler=run_export)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust", metavar="FILE", type=Path,
        help="trust file; $FEDMED_TRUST or ~/.config/fedmed/trust.toml if left out",
    )  # fmt: skip


def run_check(args: argparse.Namespace) -> int:
    """Show the findings; make the release where all passed."""
    from fedmed.release.advice import advice
    from fedmed.release.build import make_release, read_candidate
    from fedmed.release.criteria import check

    criteria = _criteria(args.criteria)
    candidate = read_candidate(args.run)
    findings = check(candidate.evidence, criteria)
    passed = all(f.passed for f in findings)
    if passed and args.out is not None:
        make_release(candidate, args.out, criteria, args.name)
    if args.json:
        from fedmed.codec import plain

        facts = {
            "passed": passed,
            "findings": plain(findings),
            "advice": list(advice(candidate.evidence, criteria)),
            "release": str(args.out) if passed and args.out else None,
        }
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _show(findings)
        failed = sum(not f.passed for f in findings)
        print(f"{failed} of {len(findings)} criteria are not met" if failed else "all are met")
        for line in advice(candidate.evidence, criteria):
            print(line)
        if args.out is not None:
            print(f"release: {args.out}" if passed else "no release was made")
    return 0 if passed else 1


def run_key(args: argparse.Namespace) -> int:
    """Make a key."""
    from fedmed.errors import TrustError
    from fedmed.files import atomic_writer
    from fedmed.release.criteria import name_role
    from fedmed.release.trust import name_person
    from fedmed.trust.keys import SigningKey

    name_role(args.role)
    name_person(args.name)
    public = args.file.with_name(f"{args.file.name}.pub")
    if public.exists():
        raise TrustError(f"key {public} exists", "move it away if it is to be replaced")
    key = SigningKey.generate()
    key.save(args.file)
    pem = key.public().pem()
    with atomic_writer(public) as file:
        file.write(pem)
    # JSON's strings without escapes beyond TOML's are TOML's own
    name = json.dumps(args.name, ensure_ascii=False)
    print(f"# fingerprint {key.public().fingerprint()}")
    print(f'[[keys]]\nname = {name}\nrole = "{args.role}"\nkey = """\n{pem.decode()}"""')
    return 0


def run_sign(args: argparse.Namespace) -> int:
    """Sign."""
    from fedmed.errors import ConfigError
    from fedmed.release.signatures import add_signature
    from fedmed.release.verify import check_files
    from fedmed.trust.keys import SigningKey

    key = SigningKey.load(args.key)
    checked = check_files(args.dir)
    _refuse(checked)
    roles = checked.manifest.criteria.roles if checked.manifest else {}
    if args.role not in roles:
        raise ConfigError(
            f"the release asks for no {args.role!r}", f"its roles are {', '.join(roles)}"
        )
    signed = add_signature(args.dir, checked.content, checked.signatures, key, args.role, args.name)
    print(f"{signed.name} signed as {signed.role}: {args.dir / signed.path()}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Show the faults, or that there are none."""
    from fedmed.release.trust import find_trust, read_trust
    from fedmed.release.verify import verify

    checked = verify(args.dir, read_trust(find_trust(args.trust)))
    if args.json:
        print(json.dumps(_facts(checked), indent=2, ensure_ascii=False))
    elif checked.faults:
        for fault in checked.faults:
            print(fault)
        print(f"{args.dir} does not verify: {len(checked.faults)} faults")
    else:
        for signature in checked.signatures:
            print(f"{signature.name} signed as {signature.role} at {signature.time}")
        print(f"{args.dir} verifies: sha256 {checked.sha256}")
    return 1 if checked.faults else 0


def run_export(args: argparse.Namespace) -> int:
    """Export a release that verifies."""
    from fedmed.release.source import open_release

    source = open_release(args.dir, args.trust)
    if args.format == "onnx":
        from fedmed.release.export_onnx import export_onnx

        difference = export_onnx(source, args.out)
    else:
        from fedmed.release.export_bundle import export_bundle

        difference = export_bundle(source, args.out)
    print(f"{args.out}: same outputs, largest difference {difference:.1g}")
    return 0


def _criteria(path: Path | None) -> Criteria:
    from fedmed.release.criteria import read_criteria

    if path is None:
        from fedmed.config.compose import config_dir

        path = config_dir() / "release.toml"
    return read_criteria(path)


def _refuse(checked: Checked) -> None:
    from fedmed.release.source import refuse

    refuse(checked)


def _facts(checked: Checked) -> dict[str, Any]:
    from fedmed.codec import plain

    return {
        "verified": not checked.faults,
        "name": checked.manifest.name if checked.manifest else None,
        "sha256": checked.sha256 if checked.manifest else None,
        "signatures": [
            {"name": s.name, "role": s.role, "time": s.time, "key": s.public().fingerprint()}
            for s in checked.signatures
        ],
        "faults": plain(checked.faults),
    }


def _show(findings: tuple[Finding, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedmed.report.wording import printable

    table = Table(box=None, pad_edge=False)
    for column in ("criterion", "asked", "found", "outcome"):
        table.add_column(column, overflow="fold")
    for f in findings:
        outcome = "met" if f.passed else f"NOT MET: {f.reason}"
        table.add_row(*map(printable, (f.criterion, f.asked, f.found, outcome)))
    Console(markup=False, highlight=False).print(table)
