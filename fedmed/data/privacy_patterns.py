"""What an identifier looks like in text; each pattern has a name fit for a message."""

from __future__ import annotations

import re
from typing import Final

_DAY: Final = r"(?:0[1-9]|[12]\d|3[01])"
_MONTH: Final = r"(?:0[1-9]|1[0-2])"
_YEAR: Final = r"(?:19|20)\d\d"
_UID: Final = r"(?<![\d.])[0-2](?!\.2\.840\.10008\.)(?:\.\d{1,39}){6,}(?!\.?\d)"
_RECORD: Final = r"(?i)(?<![^\W_])(?:mrn|acc|ssn|nhs|pat(?:ient)?[ _-]?(?:nr|no))[ _:#.-]*\d{4,}"

DATE: Final = "a full date"
PATTERNS: Final[tuple[tuple[str, re.Pattern[str]], ...]] = (
    ("a DICOM person name", re.compile(r"[^\W\d_]{2,}\^+[^\W\d_]{1,}")),
    # the roots of DICOM's own classes and transfer syntaxes identify nobody
    ("a DICOM unique identifier", re.compile(_UID)),
    ("an e-mail address", re.compile(r"[\w.+-]+@[\w-]+\.[A-Za-z]{2,}")),
    ("a social security number", re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])")),
    ("a telephone number", re.compile(r"(?<!\w)\+\d{1,3}[ -]?(?:\(?\d+\)?[ -]?){6,12}(?!\w)")),
    ("a record number", re.compile(_RECORD)),
    (DATE, re.compile(rf"(?<!\d){_YEAR}[-./]{_MONTH}[-./]{_DAY}(?!\d)")),
    (DATE, re.compile(rf"(?<!\d){_DAY}[./]{_MONTH}[./]{_YEAR}(?!\d)")),
    (DATE, re.compile(rf"(?<![0-9A-Fa-f]){_YEAR}{_MONTH}{_DAY}(?![0-9A-Fa-f])")),
)  # fmt: skip
FORBIDDEN_COLUMN: Final = re.compile(
    r"(?i)^(?:(?:patient|subject|first|last|sur|given|family|full|maiden)?[ _-]?names?|"
    r"(?:date[ _-]?of[ _-]?birth|birth[ _-]?(?:date|day)|dob)|mrn|medical[ _-]?record.*|ssn|"
    r"(?:street|home|postal)?[ _-]?address|zip(?:[ _-]?code)?|post(?:al)?[ _-]?code|"
    r"(?:tele)?phone.*|e-?mail|accession.*|insurance.*|(?:referring|performing)?[ _-]?physician.*|"
    r"(?:study|series|sop)[ _-]?instance[ _-]?uid)$"
)
_TWO_WORDS: Final = re.compile(r"[^\W\d_]{2,},? [^\W\d_]{2,}")


def find(text: str) -> tuple[str, str] | None:
    """What the first identifier-like part of ``text`` looks like, and the part; or None."""
    for what, pattern in PATTERNS:
        match = pattern.search(text)
        if match:
            return what, match.group()
    return None


def looks_like_a_name(text: str) -> bool:
    """Two words of letters: John Doe, or Doe, John."""
    return _TWO_WORDS.fullmatch(text.strip()) is not None


def masked(text: str) -> str:
    """``text`` with every identifier-like part replaced by dots: fit for a message."""
    for _, pattern in PATTERNS:
        text = pattern.sub("…", text)
    return text
