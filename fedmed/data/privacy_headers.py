"""Text that hides in image files beside the pixels: PNG chunks, EXIF, TIFF tags, NIfTI headers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedmed.data.images import NIFTI_SUFFIXES, PIL_SUFFIXES, suffix_of

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNKS: Final = (b"tEXt", b"zTXt", b"iTXt")
_MOST: Final = 1 << 20  # bytes of a header that are looked at
_NIFTI_FIELDS: Final = ("descrip", "aux_file", "intent_name", "db_name", "data_type")
_DICOM_EXTENSION: Final = 2
DAMAGED: Final = "header that cannot be read whole"
"""A place that may hold any text: nothing is known of what was not read."""


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """Name of the place and its text, for every text in a file's headers.

    Raises:
        OSError: the file cannot be read. Where a header is damaged, :data:`DAMAGED` is one of the
            places.
    """
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":
        yield "DICOM file", ""
    suffix = suffix_of(path)
    if suffix in NIFTI_SUFFIXES:
        yield from _gzip_name(path)
        yield from _nifti(path)
    elif head.startswith(_PNG):
        yield from _png(path)
    elif suffix in PIL_SUFFIXES:
        yield from _pillow(path)


def _png(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        file.seek(len(_PNG))
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind in _TEXT_CHUNKS:
                text, whole = _chunk_text(kind, file.read(min(length, _MOST)))
                yield f"PNG {kind.decode()} chunk", text
                if not whole:
                    yield DAMAGED, ""
                file.seek(max(0, length - _MOST) + 4, 1)
            elif kind == b"eXIf":
                data = file.read(min(length, _MOST))
                yield "EXIF", "".join(chr(b) if 32 <= b < 127 else " " for b in data)
                file.seek(max(0, length - _MOST) + 4, 1)
            else:
                file.seek(length + 4, 1)
            if kind == b"IEND":
                rest = file.read(_MOST)
                if rest.strip(b"\0"):
                    yield "bytes after the PNG image", rest.decode("latin-1")
                return


def _chunk_text(kind: bytes, data: bytes) -> tuple[str, bool]:
    """The chunk's text, and whether all of it could be read."""
    key, _, rest = data.partition(b"\0")
    whole = True
    if kind == b"zTXt":
        rest, whole = _inflated(rest[1:])
    elif kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
        if packed:
            rest, whole = _inflated(rest)
    return f"{key.decode('latin-1')}: {rest.decode('utf-8', 'replace')}", whole


def _inflated(data: bytes) -> tuple[bytes, bool]:
    """What can be unpacked, and whether it ends as it should."""
    stream, found = zlib.decompressobj(), bytearray()
    try:
        for byte in data:  # one at a time, so that all text before a damaged place is kept
            found += stream.decompress(bytes((byte,)), _MOST)
            if len(found) >= _MOST:
                break
    except zlib.error:
        return bytes(found), False
    return bytes(found), stream.eof


def _pillow(path: Path) -> Iterator[tuple[str, str]]:
    from PIL import Image
    from PIL.ExifTags import GPSTAGS, IFD, TAGS

    try:
        with Image.open(path) as image:
            comment = image.info.get("comment")
            if comment:
                yield "JPEG comment", _plain(comment)
            exif = image.getexif()
            for tag, value in exif.items():
                if isinstance(value, str | bytes):
                    yield f"EXIF {TAGS.get(tag, tag)}", _plain(value)
            for ifd, names in ((IFD.Exif, TAGS), (IFD.GPSInfo, GPSTAGS)):
                for tag, value in exif.get_ifd(ifd).items():
                    if isinstance(value, str | bytes) or ifd == IFD.GPSInfo:
                        yield f"EXIF {names.get(tag, tag)}", _plain(value)
    except Exception:  # whatever Pillow raises for what it was given
        yield DAMAGED, ""


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return str(value).replace("\0", " ").strip()


def _gzip_name(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:2] == b"\x1f\x8b" and head[3] & 8:
        start = 10 + (2 + int.from_bytes(head[10:12], "little") if head[3] & 4 else 0)
        yield "name in the gzip header", head[start:].partition(b"\0")[0].decode("latin-1")


def _nifti(path: Path) -> Iterator[tuple[str, str]]:
    import nibabel

    try:
        header = nibabel.load(path).header
        for field in _NIFTI_FIELDS:
            if field in header:
                text = bytes(header[field]).rstrip(b"\0").decode("latin-1").strip()
                yield f"NIfTI header field {field}", text
        for extension in getattr(header, "extensions", ()):
            code = extension.get_code()
            kind = "DICOM extension of NIfTI" if code == _DICOM_EXTENSION else "NIfTI extension"
            content = extension.get_content()
            yield kind, content.decode("latin-1") if isinstance(content, bytes) else str(content)
    except Exception:  # whatever nibabel raises for what it was given
        yield DAMAGED, ""
