"""Reading one image or mask file, channel first, rows before columns.

MONAI's readers decode; everything a decoder may throw at a broken file becomes one line.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

PIL_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
SUFFIXES = (*PIL_SUFFIXES, *NIFTI_SUFFIXES, ".npy")

# Formats are named so that a file cannot reach a decoder its suffix does not promise.
_PIL_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_CAMERA = ("JPEG", "MPO")  # Pillow calls a JPEG with a preview MPO
_GRAY = {"1": "L", "LA": "L", "La": "L"}
_PLAIN = {"L", "RGB", "F", "I", "I;16", "I;16B", "I;16L"}
_EXIF_ORIENTATION = 0x0112
_MOST_CHANNELS = 4  # of an .npy whose layout nobody declared

RESTORE = "restore or remove it, or set data.prepare.on_unreadable=skip"


class UnreadableImageError(DataError):
    """A file that cannot be decoded to finite numbers; may be skipped when that is asked for."""


@dataclass(frozen=True)
class RawImage:
    """A decoded file.

    Attributes:
        voxels: ``[channels, *spatial]`` in the stored type; 2D is ``[C, rows, columns]``, NIfTI
            keeps its stored axes.
        affine: ``[4, 4]`` voxel to millimetre, of NIfTI volumes.
    """

    voxels: NDArray[Any]
    affine: NDArray[np.float64] | None = None

    @property
    def spatial(self) -> tuple[int, ...]:
        """Spatial shape."""
        return self.voxels.shape[1:]


def suffix_of(path: Path) -> str:
    """The suffix in lower case, ``.nii.gz`` in one piece."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def stored_shape(path: Path, what: str) -> tuple[int, ...]:
    """Shape from the file's header, without decoding: 2D images as (rows, columns).

    Raises:
        UnreadableImageError: as `read_image`.
    """
    suffix = _known_suffix(path, what)
    try:
        if suffix == ".npy":
            return tuple(np.load(path, mmap_mode="r", allow_pickle=False).shape)
        if suffix in NIFTI_SUFFIXES:
            import nibabel

            return tuple(int(n) for n in nibabel.load(path).shape)
        from PIL import Image

        with Image.open(path, formats=_PIL_FORMATS) as image:
            columns, rows = image.size
            turned = image.format in _CAMERA and image.getexif().get(_EXIF_ORIENTATION, 1) > 4
        return (columns, rows) if turned else (rows, columns)
    except MemoryError:
        raise
    except Exception as error:
        raise _undecodable(path, what, error) from error


def read_image(
    path: Path, what: str, *, dims: int | None = None, channels: int | None = None
) -> RawImage:
    """Decodes an image whole.

    Args:
        what: how messages name the file.
        dims: spatial dimensions that are expected; None takes what the file has.
        channels: tells channels from space in ``.npy`` files.

    Raises:
        UnreadableImageError: missing, truncated, of an unknown format, or with NaN or infinity.
        DataError: not ``dims``-dimensional.
    """
    raw = _decode(path, what, dims, channels, keep_palette=False)
    _check_dims(raw, dims, what)
    if raw.voxels.dtype.kind == "f" and not np.isfinite(raw.voxels).all():
        raise UnreadableImageError(f"{what} holds NaN or infinite values", RESTORE)
    return raw


def read_mask(path: Path, what: str, *, dims: int | None = None) -> RawImage:
    """Decodes a mask to whole numbers ``[1, *spatial]``, int64.

    Raises:
        UnreadableImageError: as `read_image`.
        DataError: several different channels, lossy compression, or values that are not labels.
    """
    if suffix_of(path) in (".jpg", ".jpeg"):
        raise DataError(f"{what} is a JPEG: its labels are blurred", "save masks as PNG or NIfTI")
    raw = _decode(path, what, dims, 1, keep_palette=True)
    _check_dims(raw, dims, what)
    voxels = raw.voxels
    if voxels.shape[0] > 1:
        if not (voxels == voxels[:1]).all():
            raise DataError(f"{what} is a mask in colour", "save one channel of label numbers")
        voxels = voxels[:1]
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise UnreadableImageError(f"{what} holds NaN or infinite values", RESTORE)
    labels = voxels.astype(np.int64)
    if (labels != voxels).any() or labels.min() < 0:
        raise DataError(f"{what} holds values that are no labels", "use whole numbers from 0")
    return RawImage(labels, raw.affine)


def same_grid(image: RawImage, mask: RawImage) -> str:
    """Why a mask does not lie on its image's grid; empty if it does."""
    if image.spatial != mask.spatial:
        return f"has shape {_by(mask.spatial)} where the image has {_by(image.spatial)}"
    both = image.affine is not None and mask.affine is not None
    if both and not np.allclose(image.affine, mask.affine, rtol=1e-3, atol=1e-2):  # type: ignore[arg-type]
        return "lies elsewhere in space than the image (different affine)"
    return ""


def to_channels(raw: RawImage, channels: int, what: str) -> NDArray[Any]:
    """Voxels with the declared number of channels; colour becomes luminance for one channel.

    Weights are those of ITU-R BT.601. No other conversion is made.

    Raises:
        DataError: another number of channels.
    """
    voxels = raw.voxels
    found = voxels.shape[0]
    if found == channels:
        return voxels
    if channels == 1 and found == 3 and raw.affine is None:
        if (voxels == voxels[:1]).all():
            return voxels[:1]
        weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
        gray = np.tensordot(weights, voxels.astype(np.float32), axes=1)[None]
        if voxels.dtype.kind == "u":
            gray = np.rint(gray)
        return gray.astype(voxels.dtype)
    raise DataError(
        f"{what} has {found} channel{'s' * (found != 1)} where data.channels={channels}",
        f"set data.channels={found}, or convert the image",
    )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _known_suffix(path: Path, what: str) -> str:
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise UnreadableImageError(
            f"{what} is of an unknown format", f"convert it to one of {', '.join(SUFFIXES)}"
        )
    return suffix


def _undecodable(path: Path, what: str, error: Exception) -> UnreadableImageError:
    if not path.exists():
        return UnreadableImageError(f"{what} does not exist", RESTORE)
    if isinstance(error, PermissionError):
        return UnreadableImageError(f"{what} may not be read", "give fedmed the right to read it")
    return UnreadableImageError(f"{what} cannot be decoded ({type(error).__name__})", RESTORE)


def _check_dims(raw: RawImage, dims: int | None, what: str) -> None:
    if dims is not None and len(raw.spatial) != dims:
        raise DataError(
            f"{what} is {len(raw.spatial)}D where data.dims={dims}",
            f"set data.dims={len(raw.spatial)}, or convert the image",
        )


def _decode(
    path: Path, what: str, dims: int | None, channels: int | None, *, keep_palette: bool
) -> RawImage:
    suffix = _known_suffix(path, what)
    try:
        if suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            raw = RawImage(_channel_first(array, dims, channels))
        elif suffix in NIFTI_SUFFIXES:
            raw = _read_nifti(path, dims)
        else:
            raw = RawImage(_read_pil(path, keep_palette=keep_palette))
    except MemoryError:
        raise
    except Exception as error:  # decoders of broken files raise whatever they like
        raise _undecodable(path, what, error) from error
    if raw.voxels.dtype.kind not in "buif" or raw.voxels.size == 0:
        raise UnreadableImageError(f"{what} does not hold real numbers", RESTORE)
    return raw


def _read_pil(path: Path, *, keep_palette: bool) -> NDArray[Any]:
    from monai.data import PILReader
    from PIL import Image

    with Image.open(io.BytesIO(path.read_bytes()), formats=_PIL_FORMATS) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format not in _CAMERA:
            raise ValueError("several frames")
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError("too many pixels")
        plain = _plain_mode(image, keep_palette=keep_palette)
        array, _ = PILReader(reverse_indexing=False).get_data(plain)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(np.moveaxis(array, -1, 0)) if array.ndim == 3 else array[None]


def _plain_mode(image: Image, *, keep_palette: bool) -> Image:
    """The image upright, as gray or RGB, alpha dropped."""
    from PIL import ImageOps

    if image.format in _CAMERA:
        image = ImageOps.exif_transpose(image)
    if image.mode in _PLAIN or (image.mode == "P" and keep_palette):
        return image
    return image.convert(_GRAY.get(image.mode, "RGB"))


def _read_nifti(path: Path, dims: int | None) -> RawImage:
    from monai.data import NibabelReader

    reader = NibabelReader()
    array, meta = reader.get_data(reader.read(path))
    affine = np.asarray(meta["affine"], dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise ValueError("affine")
    array = np.asarray(array)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1 and dims != 3):
        return RawImage(np.ascontiguousarray(array.reshape(array.shape[:2]).T)[None])
    if array.ndim == 4:
        return RawImage(np.ascontiguousarray(np.moveaxis(array, -1, 0)), affine)
    if array.ndim != 3:
        raise ValueError("dimensions")
    return RawImage(array[None], affine)


def _channel_first(array: NDArray[Any], dims: int | None, channels: int | None) -> NDArray[Any]:
    if array.ndim not in (2, 3, 4):
        raise ValueError("dimensions")
    if dims is None:
        ends = (array.shape[0], array.shape[-1])
        flat = array.ndim == 3 and min(ends) <= _MOST_CHANNELS < max(array.shape)
        dims = 2 if array.ndim == 2 or flat else 3
    if array.ndim == dims:
        return array[None]
    if array.ndim == dims + 1:
        first = array.shape[0] == channels if channels else array.shape[0] <= array.shape[-1]
        return array if first else np.ascontiguousarray(np.moveaxis(array, -1, 0))
    return array[None]
