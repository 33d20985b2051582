"""Pseudonyms: what replaces a hospital's identifiers, dates and ages.

HMAC-SHA256 (RFC 2104) under a key that never leaves the site. Without the key a pseudonym cannot be
guessed back even from the short list of all the hospital's numbers; with it, the same patient
gets the same pseudonym in every later import, which is what keeps an opt-out alive.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import unicodedata
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Final

from fedmed.errors import DataError

KEY_NAME: Final = "identity.key"
KEY_BYTES: Final = 32
_DIGITS: Final = 32  # hexadecimal, 128 bits: no two patients meet
_MOST_SHIFT: Final = 3650  # days
OLDEST: Final = 90  # 45 CFR 164.514(b)(2)(i)(C): ages over 89 are one category
_AGE_EDGES: Final = (0, 1, 5, 10, 15, 18, *range(20, OLDEST + 1, 5))


@dataclass(frozen=True)
class SiteKey:
    """The site's secret and what is derived from it.

    Attributes:
        secret: 32 random bytes; never shown, logged or copied into the site folder.
    """

    secret: bytes = field(repr=False)

    def pseudonym(self, kind: str, text: str) -> str:
        """32 hexadecimal digits for an identifier; ``kind`` keeps name spaces apart.

        Spaces and NUL bytes around ``text`` play no part: DICOM pads with them (PS3.5, 6.2).
        """
        return self.token(kind, text.strip(" \0\t\r\n").encode("utf-8", "surrogatepass"))

    def patient(self, number: str) -> str:
        """Pseudonym of a patient number as `plain_number` reads it; ``""`` where nothing is left.

        Two people who became one this way share one privacy budget and one opt-out; one person
        who became two would have escaped both.
        """
        plain = plain_number(number)
        return self.pseudonym("patient", plain) if plain else ""

    def token(self, kind: str, content: bytes) -> str:
        """As `pseudonym`, for bytes."""
        message = f"fedmed/{kind}\0".encode() + content
        return hmac.new(self.secret, message, "sha256").hexdigest()[:_DIGITS]

    def shift(self, patient: str, day: date) -> date | None:
        """``day`` moved back by 1 to 3650 days, the same number for all days of a patient."""
        days = 1 + int(self.pseudonym("date-shift", patient), 16) % _MOST_SHIFT
        try:
            return day - timedelta(days=days)
        except OverflowError:
            return None


def load_key(path: Path, *, make: bool = True) -> SiteKey:
    """The key in ``path``; made, with mode 0600, if there is none yet.

    Raises:
        DataError: not a key, readable by others, or not there and ``make`` is false. A damaged
            key is never replaced: all pseudonyms would change, and withdrawn consent with them.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if make:
            return _make(path)
        raise DataError(
            f"{path} does not exist", "give the key of the first import with --private"
        ) from None
    if status.st_mode & 0o077:
        raise DataError(f"{path} may be read by others", f"run chmod 600 {path}")
    secret = path.read_bytes()
    if len(secret) != KEY_BYTES:
        raise DataError(f"{path} is no site key", "restore it from a backup of this folder")
    return SiteKey(secret)


def _make(path: Path) -> SiteKey:
    private_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    secret = secrets.token_bytes(KEY_BYTES)
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # fails where another import was quicker
    except FileExistsError:
        return load_key(path, make=False)
    except OSError as error:
        raise DataError(
            f"cannot write the site key {path} ({error.strerror})", "give another --private folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return SiteKey(secret)


def private_folder(path: Path) -> Path:
    """``path`` as a folder that only its owner may enter, made if need be."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as error:
        raise DataError(
            f"cannot use the private folder {path} ({error.strerror})",
            "give another one with --private",
        ) from error
    return path


def plain_number(number: str) -> str:
    """A patient number without what differs between a scanner, a list and a spreadsheet.

    Letters become capitals of one width (Unicode NFKC); white space and characters that nobody
    sees are dropped, wherever they stand.
    """
    capitals = unicodedata.normalize("NFKC", number).upper()
    return "".join(
        c for c in capitals if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf")
    )


def age_band(age: str, birth: date | None = None, day: date | None = None) -> str:
    """The lower edge, in years, of an age's band; ``""`` where the age is not known.

    Bands are 0, 1-4, 5-9, 10-14, 15-17, 18-19, then five years each up to 85-89; 90 stands for
    everybody older.

    Args:
        age: DICOM age string (PS3.5, VR AS): ``045Y``, ``018M``, ``003W``, ``010D``.
        birth: used with ``day`` where ``age`` is empty.
    """
    match = re.fullmatch(r"\s*([0-9]{1,3})([YMWD])\s*", age)
    if match:
        years = int(match[1]) / {"Y": 1, "M": 12, "W": 52, "D": 365}[match[2]]
    elif birth is not None and day is not None and birth <= day:
        years = day.year - birth.year - ((day.month, day.day) < (birth.month, birth.day))
    else:
        return ""
    return str(max(edge for edge in _AGE_EDGES if edge <= years))


def parse_date(text: str) -> date | None:
    """A DICOM date (``YYYYMMDD``), or None."""
    match = re.fullmatch(r"\s*([0-9]{4})[.]?([0-9]{2})[.]?([0-9]{2})\s*", text)
    try:
        return date(int(match[1]), int(match[2]), int(match[3])) if match else None
    except ValueError:
        return None
