"""Which sites a study admits: kits out, certificates in, revocation."""

from __future__ import annotations

from pathlib import Path

from fedmed.coordinator.folder import StudyFolder
from fedmed.errors import ConfigError
from fedmed.federation.kit import Kit, write_kit
from fedmed.federation.study import check_name
from fedmed.trust import certificates


def invite(folder: StudyFolder, site: str, path: Path) -> Kit:
    """Add a site and write its start-up kit.

    Raises:
        ConfigError: the name is not usable, or the site was revoked.
    """
    check_name("site", site)
    settings = folder.settings
    known = {row.name: row.state for row in folder.store.sites()}
    if known.get(site) == "revoked":
        folder.store.reinstate(site)
    kit = Kit(
        study=folder.plan.study,
        site=site,
        host=settings.address,
        port=settings.port,
        plan=folder.plan.sha256(),
        authority=folder.authority.decode(),
        tls_authority=folder.tls[2].decode(),
    )
    write_kit(path, kit, folder.plan)
    if site not in known or known[site] == "revoked":
        folder.store.add_site(site)
        folder.note("site-invited", site=site, kit=kit.fingerprint())
    return kit


def admit(folder: StudyFolder, site: str, certificate: Path) -> str:
    """Enrol a site by the certificate that it sent back.

    Returns:
        Fingerprint of its key, to be compared with the site's staff by telephone.

    Raises:
        ConfigError: no such site, or the key belongs to another one.
        TrustError: the certificate is not that site's own.
    """
    try:
        pem = certificate.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {certificate}: {error.strerror}", "give the site's .crt file"
        ) from error
    parsed = certificates.load(pem)
    key = certificates.check_site(parsed, site)
    folder.store.admit(site, certificates.fingerprint(parsed), certificates.pem(parsed).decode())
    folder.note("site-enrolled", site=site, key=key.fingerprint())
    return key.fingerprint()


def revoke(folder: StudyFolder, site: str) -> None:
    """Shut a site out, from its next request on.

    Raises:
        ConfigError: there is no such site.
    """
    folder.store.revoke(site)
    folder.note("site-revoked", site=site)
