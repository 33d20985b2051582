"""A hospital's folder as its checks see it: every part may be missing or damaged."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Final

from cryptography import x509

from fedmed.audit.log import held
from fedmed.data.check import CheckReport, check_folder
from fedmed.data.manifest import ImageRecord, read_optout, scan_manifest
from fedmed.data.targets import with_target
from fedmed.errors import ConfigError, DataError, PolicyRefused, TrustError
from fedmed.federation.accounts import Account, Accounts
from fedmed.federation.gate import Progress
from fedmed.federation.kit import Kit
from fedmed.federation.policy import public_size
from fedmed.federation.study import StudyPlan
from fedmed.hospital.checks_base import Missing, Part, Parts
from fedmed.hospital.folder import HospitalFolder
from fedmed.hospital.rules import Rules
from fedmed.privacy.ledger import Ledger
from fedmed.trust import certificates
from fedmed.types import DPSpec, PackedArrays, PrivacyUnit, Split

NEW_KEY: Final = (
    "make a new one with fedmed site init KIT in another folder, put its keys/site.pem here and "
    "have its .crt enrolled"
)
"""What is left where a key is lost or too old: it cannot enrol its successor."""

REMEDIES: Final = {
    "model-not-allowed": "add it to allowed_models in site.toml, or have the plan changed",
    "too-many-steps": "raise max_local_steps in site.toml, or have the plan changed",
    "unit-not-allowed": "add it to allowed_units in site.toml, or have the plan changed",
    "plan-too-short": "tell the coordinator's staff: their plan cannot be carried out",
    "dp-required": 'have the plan ask for privacy; max_epsilon = "inf" is for public data only',
    "budget-exhausted": "raise max_epsilon in site.toml if those who answer for the data agree, "
    "or have the plan ask for less",
    "metrics-withheld": "that is metrics under [release] in site.toml; noisy ones are charged",
    "noise-required": "have the plan ask with evaluation.target_epsilon",
    "unit-mixed": "name another cohort and ledger in site.toml, or have the plan changed",
}
"""What a hospital can do, by reason code of a refusal."""


class Site(Parts):
    """A hospital's folder that may be damaged anywhere.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def running(self) -> bool:
        """Whether a client of this site is at work."""
        return held(self.folder.audit_path)

    @Part
    def folder(self) -> HospitalFolder:
        """The folder, if it is a site's."""
        return HospitalFolder(self.path)

    @Part
    def kit(self) -> Kit:
        """What the coordinator's staff sent."""
        try:
            return self.folder.kit
        except (ConfigError, ValueError) as error:
            problem = error.problem if isinstance(error, ConfigError) else "it is not UTF-8"
            raise ConfigError(
                f"{self.path / 'kit.json'} is damaged ({problem})",
                "take kit.json out of the kit's archive again",
            ) from error

    @Part
    def plan(self) -> StudyPlan:
        """The study's plan."""
        try:
            return self.folder.plan
        except ConfigError as error:
            raise ConfigError(
                error.problem, "take plan.json out of the kit's archive again"
            ) from error

    @Part
    def rules(self) -> Rules:
        """The hospital's own rules."""
        try:
            return self.folder.rules
        except ConfigError as error:
            if (self.path / "site.toml").is_file():
                raise
            raise ConfigError(
                error.problem, "restore it from a backup; fedmed site init writes a fresh one"
            ) from error

    @Part
    def key(self) -> bytes:
        """The file with the site's private key and certificate."""
        path = self.folder.key_path
        try:
            return path.read_bytes()
        except OSError as error:
            raise TrustError(
                f"the private key {path} cannot be read ({error.strerror})",
                f"restore it from a backup, or {NEW_KEY}",
            ) from error

    @Part
    def certificate(self) -> x509.Certificate:
        """The site's certificate, which belongs to its key."""
        try:
            certificate = certificates.load(self.key)
            own = certificates.key_of(certificate)
        except TrustError as error:
            raise TrustError(
                f"{self.folder.key_path} holds no certificate", f"restore it, or {NEW_KEY}"
            ) from error
        try:
            key = self.folder.key
        except TrustError:
            return certificate  # the key's own check says what is wrong with it
        if key.public().fingerprint() != own.fingerprint():
            raise TrustError(
                f"key and certificate in {self.folder.key_path} do not belong together",
                f"restore the file from a backup, or {NEW_KEY}",
            )
        return certificate

    @Part
    def authority(self) -> x509.Certificate:
        """The certificate by which the coordinator is known."""
        path = self.folder.identity.authority
        if not path.is_file() or path.read_text(errors="replace") != self.kit.tls_authority:
            raise TrustError(
                f"{path} is not the certificate that the kit brought",
                "restore it: it is tls_authority in the kit's kit.json",
            )
        return certificates.load(path.read_bytes())

    @Part
    def state(self) -> Path:
        """Where the client keeps its books and its files."""
        path = self.folder.state
        if not path.is_dir():
            raise ConfigError(
                f"{path} is no folder",
                "restore it from a backup (it holds the budget); for a new site: "
                f"mkdir -m 700 {path}",
            )
        return path

    @Part
    def progress(self) -> dict[str, int]:
        """Last round asked for, by run."""
        tasks = Progress(self.state / "progress").last_tasks()
        return {run: round_ for run, (round_, _) in tasks.items()}

    @Part
    def ledger(self) -> Ledger | None:
        """The cohort's ledger, or None before the first charge: a check makes no file."""
        self.need("rules")
        path = self.folder.ledger_path
        return Ledger(path, timeout=5.0) if path.exists() else None

    @Part
    def data(self) -> CheckReport:
        """What is in the folder with the images."""
        self.need("rules")
        root = self.folder.data
        if not root.is_dir():
            raise DataError(
                f"the data folder {root} is not there", "mount it, or correct data in site.toml"
            )
        return check_folder(root, self.plan.task if self.has("plan") else None, deep=False)

    @cached_property
    def learnable(self) -> tuple[ImageRecord, ...]:
        """Images that have what the plan's task learns."""
        manifest, _ = scan_manifest(self.data.root)
        try:
            return with_target(manifest, self.plan.task)
        except DataError as error:
            raise Missing("data") from error  # which says so

    def units(self, unit: PrivacyUnit) -> int:
        """Patients or images that would be trained on today, opt-outs left out."""
        gone = read_optout(self.data.root)
        training = [
            r for r in self.learnable if r.split is Split.TRAIN and r.patient_id not in gone
        ]
        if unit is PrivacyUnit.PATIENT:
            return len({r.patient_id for r in training})
        return len(training)

    @Part
    def privacy(self) -> DPSpec | None:
        """The mechanism that would run here, if the rules admit the plan before any charge."""
        dp, policy = self.plan.dp, self.rules.policy()
        size = self.declared_size(dp.unit if dp else PrivacyUnit.PATIENT)
        try:
            spec = policy.admit(self.plan.train_task("check", 1, self._no_arrays), size)
            with tempfile.TemporaryDirectory() as empty:
                self.carry(Ledger(Path(empty) / "ledger.db"), 1, spec)
        except PolicyRefused as error:
            raise PolicyRefused(error.code, error.problem, REMEDIES[error.code]) from error
        return spec

    def declared_size(self, unit: PrivacyUnit) -> int:
        """The cohort's public size: as the rules or the ledger say, or as it would be today."""
        size = self.rules.policy().cohort_size
        if size is None and self.has("ledger") and self.ledger is not None:
            size = self.ledger.declared_size(f"{self.kit.site}/{unit}")
        return public_size(self.units(unit)) if size is None else size

    def figures(self) -> DPSpec | None:
        """The mechanism that figures would be told with. Raises PolicyRefused."""
        task = self.plan.evaluate_task("check", self._no_arrays)
        policy = self.rules.policy()
        return policy.admit_evaluation(task, self.declared_size(PrivacyUnit.PATIENT))

    def carry(self, ledger: Ledger, first: int, spec: DPSpec | None) -> None:
        """Refuse if a ledger cannot carry the plan from round ``first`` to its end.

        Raises:
            PolicyRefused: as at run time.
        """
        accounts = Accounts([Account(ledger, self.rules.cohort)], self.rules.policy())
        accounts.check_plan(self.plan.train_task("check", first, self._no_arrays), spec)

    @property
    def _no_arrays(self) -> PackedArrays:
        """Rules and budget do not depend on weights."""
        return PackedArrays(self.plan.tensors, {})
