"""Does a release hold? Every fault has a code and a line of its own."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from fedmed.codec import decode
from fedmed.errors import ConfigError, TrustError
from fedmed.evaluation.evidence import Evidence
from fedmed.release.criteria import check
from fedmed.release.folder import Found, measure, read_file, safe_path, walk
from fedmed.release.records import EVIDENCE, MANIFEST, WEIGHTS, Manifest, instant
from fedmed.release.signatures import NAME, Signature, read_signature
from fedmed.release.trust import Trust, same_person
from fedmed.report.wording import printable

_CLOCKS: Final = timedelta(minutes=5)  # by which two machines' clocks may differ
_AGAIN: Final = "obtain the release anew"
_CHANGED: Final = {
    WEIGHTS: "weights-changed", EVIDENCE: "evidence-changed",
    "report/card.json": "card-changed", "report/card.md": "card-changed",
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """Why a release is refused: a stable code, what is wrong, and what to do."""

    code: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        # names of files, groups and metrics are whatever the folder's maker wrote
        return printable(f"{self.code}: {self.problem}; {self.remedy}")


@dataclass(frozen=True)
class Checked:
    """A release and what was found.

    Attributes:
        manifest: None where it cannot be read.
        content: ``release.json`` as it was read.
        signatures: those that could be read, whether they count or not.
        faults: empty if the release holds.
    """

    root: Path
    manifest: Manifest | None
    content: bytes
    signatures: tuple[Signature, ...]
    faults: tuple[Fault, ...]

    @property
    def sha256(self) -> str:
        """What was signed: the hash of ``release.json``."""
        return hashlib.sha256(self.content).hexdigest()

    def listed(self, name: str) -> bytes:
        """A listed file's content, checked against the manifest as it is read.

        Raises:
            TrustError: not listed, or changed since.
        """
        entry = self.manifest.entry(name) if self.manifest else None
        if entry is None:
            raise TrustError(f"{MANIFEST} does not list {name}", _AGAIN)
        content = read_file(self.root, name, entry.size)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise TrustError(f"{name} was changed while it was read", _AGAIN)
        return content


def check_files(root: Path, now: datetime | None = None) -> Checked:
    """All that can be said without knowing whom to trust: files, criteria, expiry.

    Raises:
        TrustError: there is no folder that could be a release.
    """
    found = walk(root)
    try:
        content = read_file(root, MANIFEST)
        manifest = decode(Manifest, content.decode())
    except (TrustError, ConfigError, UnicodeDecodeError) as error:
        problem = error.problem if isinstance(error, TrustError | ConfigError) else "no text"
        fault = Fault("manifest-unreadable", f"{MANIFEST}: {problem}", "give a release folder")
        return Checked(root, None, b"", (), (fault,))
    checked = Checked(root, manifest, content, (), ())
    faults = [
        *_file_faults(root, manifest, found),
        *_evidence_faults(checked, manifest),
        *_expiry(manifest, now or datetime.now(UTC)),
    ]
    signatures: list[Signature] = []
    for path in found.files:
        if not NAME.fullmatch(path):
            continue
        try:
            signature = read_signature(root, path)
            signature.check()
            if signature.path() != path:
                raise TrustError(f"{path} belongs to another key or role")
        except TrustError as error:
            problem = error.problem if path in error.problem else f"{path}: {error.problem}"
            faults.append(Fault("signature-broken", problem, "remove it, and let its giver sign"))
        else:
            signatures.append(signature)
    return Checked(root, manifest, content, tuple(signatures), tuple(faults))


def verify(root: Path, trust: Trust, now: datetime | None = None) -> Checked:
    """Files, criteria, and signatures by the roles that release and trust file demand.

    A signature counts only while its key is valid, at its own time and now: the time is the
    signer's word, and whoever got hold of an expired key could date a signature back.

    Raises:
        TrustError: there is no folder that could be a release.
    """
    now = now or datetime.now(UTC)
    checked = check_files(root, now)
    if checked.manifest is None:
        return checked
    faults = list(checked.faults)
    counted: list[Signature] = []
    for signature in checked.signatures:
        own = tuple(_signature_faults(signature, checked, trust, now))
        faults += own
        if not own:
            counted.append(signature)
    faults += _same(checked.signatures)
    faults += _missing(counted, demanded(checked.manifest, trust))
    return Checked(root, checked.manifest, checked.content, checked.signatures, tuple(faults))


def demanded(manifest: Manifest, trust: Trust) -> Mapping[str, int]:
    """Signatures by role: the most that either asks, so that neither weakens the other."""
    asked = (trust.roles, manifest.criteria.roles)
    roles = {role for roles in asked for role in roles}
    return {role: max(r.get(role, 0) for r in asked) for role in sorted(roles)}


def _file_faults(root: Path, manifest: Manifest, found: Found) -> Iterator[Fault]:
    listed = [f.path for f in manifest.files]
    for path, count in Counter(listed).items():
        if count > 1:
            yield Fault("path-refused", f"{MANIFEST} lists {path!r} twice", _AGAIN)
    for name in found.odd:
        yield Fault("link-refused", f"{name!r} is a link or no regular file", _AGAIN)
    for entry in manifest.files:
        if not safe_path(entry.path):
            yield Fault("path-refused", f"{MANIFEST} lists the path {entry.path!r}", _AGAIN)
        elif entry.path not in found.files:
            if entry.path not in found.odd:
                yield Fault("file-missing", f"{entry.path} is missing", _AGAIN)
        else:
            try:
                same = measure(root, entry.path) == (entry.sha256, entry.size)
            except OSError as error:
                reason = error.strerror or "not a regular file"
                yield Fault("file-unreadable", f"{entry.path}: {reason}", "mend its permissions")
                continue
            if not same:
                code = _CHANGED.get(entry.path, "file-changed")
                yield Fault(code, f"{entry.path} is not the file that was released", _AGAIN)
    for name in sorted(set(found.files) - {*listed, MANIFEST}):
        if not NAME.fullmatch(name):
            yield Fault("file-extra", f"{name!r} does not belong to the release", "remove it")
    if WEIGHTS not in listed or EVIDENCE not in listed:
        yield Fault("file-missing", f"{MANIFEST} lists no weights or no evidence", _AGAIN)


def _evidence_faults(checked: Checked, manifest: Manifest) -> Iterator[Fault]:
    weights = manifest.entry(WEIGHTS)
    try:
        evidence = decode(Evidence, checked.listed(EVIDENCE).decode())
    except (TrustError, UnicodeDecodeError):
        return  # the file's own fault says so
    except ConfigError as error:
        yield Fault("evidence-unreadable", f"{EVIDENCE}: {error.problem}", _AGAIN)
        return
    if weights is not None and evidence.model_sha256 != weights.sha256:
        yield Fault("evidence-mismatch", f"{EVIDENCE} is about other weights", _AGAIN)
    findings = check(evidence, manifest.criteria)
    if findings != manifest.findings:
        yield Fault("findings-differ", f"{MANIFEST} does not say what the evidence shows", _AGAIN)
    for finding in findings:
        if not finding.passed:
            problem = f"{finding.criterion}: {finding.reason}"
            yield Fault("criterion-failed", problem, "release a model that meets its criteria")


def _expiry(manifest: Manifest, now: datetime) -> Iterator[Fault]:
    if manifest.expires is not None and now >= instant(manifest.expires):
        yield Fault("release-expired", f"it expired on {manifest.expires}", "judge the model anew")


def _signature_faults(
    signature: Signature, checked: Checked, trust: Trust, now: datetime
) -> Iterator[Fault]:
    path, who = signature.path(), f"{signature.name} ({signature.role})"
    anew = f"remove {path}, and let it be signed anew"
    if signature.release != checked.sha256:
        problem = f"{MANIFEST} is not what {who} signed"
        yield Fault("manifest-changed", problem, f"restore it, or {anew}")
    known = trust.keys.get(signature.public().fingerprint())
    if known is None:
        problem = f"the key of {who} is not in the trust file"
        yield Fault("key-unknown", problem, f"add it if you trust it, or remove {path}")
        return
    entry, _ = known
    if entry.role != signature.role:
        problem = f"the key of {who} is trusted as {entry.role}"
        yield Fault("key-of-other-role", problem, anew)
    if same_person(entry.name) != same_person(signature.name):
        problem = f"the key that signed as {who} is that of {entry.name}"
        yield Fault("key-of-other-person", problem, anew)
    if entry.revoked is not None:
        yield Fault("key-revoked", f"the key of {who} was revoked ({entry.revoked})", anew)
    begins, ends, time = entry.begins(), entry.ends(), instant(signature.time)
    if ends is not None and now >= ends:
        problem = f"the key of {who} expired ({entry.valid_until})"
        yield Fault("key-expired", problem, f"{anew} with a valid key")
    elif begins is not None and now < begins:
        yield Fault("key-not-yet-valid", f"the key of {who} counts later", "wait until then")
    if (ends is not None and time >= ends) or (begins is not None and time < begins):
        problem = f"{who} signed outside the key's validity"
        yield Fault("signed-outside-validity", problem, f"{anew} with a valid key")
    if time > now + _CLOCKS:
        yield Fault("signed-in-future", f"{who} signed at {signature.time}", "check both clocks")
    if checked.manifest and time < instant(checked.manifest.created) - _CLOCKS:
        yield Fault("signed-before-release", f"{who} signed before it was made", anew)


def _same(signatures: Sequence[Signature]) -> Iterator[Fault]:
    keys = Counter(s.public().fingerprint() for s in signatures)
    people = Counter(same_person(s.name) for s in signatures)
    for signature in signatures:
        once = f"keep one of the signatures; remove {signature.path()} or the other"
        if keys[signature.public().fingerprint()] > 1:
            yield Fault("same-key", f"one key signed twice, as {signature.role} too", once)
        elif people[same_person(signature.name)] > 1:
            yield Fault("same-person", f"{signature.name} signed twice", once)


def _missing(counted: Sequence[Signature], roles: Mapping[str, int]) -> Iterator[Fault]:
    people: dict[str, set[str]] = {}
    for signature in counted:
        people.setdefault(signature.role, set()).add(same_person(signature.name))
    for role, count in roles.items():
        have = len(people.get(role, ()))
        if have < count:
            problem = f"{have} of {count} signatures by a {role} count"
            yield Fault("role-missing", problem, f"fedmed release sign --role {role}")
