"""Pixel data to arrays: stored values, real-world values, and what a viewer would show.

The grayscale pipeline is that of DICOM PS3.4, N.2: stored values, modality LUT or rescale
(PS3.3, C.11.1), VOI LUT or window (C.11.2), presentation (MONOCHROME1 is inverted). pydicom
decodes; its values are masked to the stored bits here, since old overlays lie in the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.data.importers.dicom.reading import Unusable, plain_numbers

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_FLOAT_KEYWORDS: Final = ("FloatPixelData", "DoubleFloatPixelData")
_LEAST_LIMIT: Final = 1 << 28  # decoded bytes that any file may have
_SWELLING: Final = 64  # decoded bytes a compressed byte may stand for, beyond that
_MOST_SIDE: Final = 1 << 15

Array = NDArray[Any]


class PixelSource:
    """The frames of one object, decoded one at a time.

    Raises:
        Unusable: the pixels are described in a way that cannot be decoded safely.
    """

    def __init__(self, dataset: Dataset, size: int) -> None:
        self._dataset = dataset
        self.frames = int(dataset.get("NumberOfFrames") or 1)
        self.shape = (int(dataset.Rows), int(dataset.Columns))
        self.photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
        keyword = next((k for k in ("PixelData", *_FLOAT_KEYWORDS) if k in dataset), None)
        if keyword is None:
            raise Unusable("no pixel data")
        self._float = keyword in _FLOAT_KEYWORDS
        syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
        if syntax is None or not str(syntax):
            syntax = _guessed_syntax(dataset)
        if syntax.is_private or not syntax.is_transfer_syntax:
            raise Unusable("unknown transfer syntax")
        self._decoder = _decoder(syntax)
        self._check(size)
        shared = dataset.get("SharedFunctionalGroupsSequence")
        self._shared = shared[0] if shared else None
        self._groups = dataset.get("PerFrameFunctionalGroupsSequence") or ()

    @property
    def colour(self) -> bool:
        """Whether frames are RGB once shown."""
        samples = int(self._dataset.get("SamplesPerPixel") or 1)
        return samples > 1 or self.photometric == "PALETTE COLOR"

    def stored(self, index: int) -> Array:
        """Frame ``index`` as stored: ``[rows, columns]``, or RGB ``[rows, columns, 3]``.

        Raises:
            Unusable: it cannot be decoded.
        """
        try:
            array, facts = self._decoder.as_array(self._dataset, index=index, raw=False)
        except MemoryError:
            raise
        except Exception as error:  # decoders of broken data raise whatever they like
            raise Unusable(_why(error, str(self._decoder.UID))) from error
        array = np.asarray(array)
        if array.shape[:2] != self.shape:
            raise Unusable("frame of another size than declared")
        self.photometric = str(facts.get("photometric_interpretation", self.photometric))
        return array if self._float else self._masked(array)

    def real(self, index: int) -> Array:
        """Real-world values (HU, …) of a grayscale frame: integers where they are exact."""
        values = self.stored(index)
        sequence = self._dataset.get("ModalityLUTSequence")
        if sequence:
            return _lookup(values, sequence[0])[0]
        slope = self._number("RescaleSlope", index)
        intercept = self._number("RescaleIntercept", index)
        if slope is None and intercept is None:
            slope = self._number("DoseGridScaling", index)
        slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
        if slope == 1 and intercept == 0:
            return values
        if not self._float and slope.is_integer() and intercept.is_integer():
            wide = values.astype(np.int64) * int(slope) + int(intercept)
            return wide.astype(np.int32) if abs(wide).max() < 1 << 31 else wide
        return (values * slope + intercept).astype(np.float64)

    def display(self, index: int, *, bits: int, window: tuple[float, ...] = ()) -> Array:
        """What a viewer would show: gray of 8 or 16 bits, or RGB of 8.

        Without a window or LUT of its own an image of 8 bits or fewer keeps its values, any
        other is stretched from its least to its greatest value.
        """
        if self.colour:
            return self._rgb(self.stored(index))
        values = self.real(index)
        shown = self._window(values, index, window)
        inverted = self._inverted()
        if shown is None and values.dtype.kind in "ui" and values.min() >= 0 and values.max() < 256:
            stored = int(self._dataset.get("BitsStored") or 16)
            if stored <= 8:
                most = (1 << stored) - 1
                plain = np.minimum(values, most).astype(np.uint8)
                return (most - plain).astype(np.uint8) if inverted else plain
        if shown is None:
            shown = _stretch(values)
        if inverted:
            shown = 1 - shown
        most = (1 << bits) - 1
        return np.rint(shown * most).astype(np.uint8 if bits == 8 else np.uint16)

    def group(self, index: int, name: str) -> Dataset | None:
        """Item of the functional group ``name`` that holds for a frame (PS3.3, C.7.6.16)."""
        own = self._groups[index] if index < len(self._groups) else None
        for groups in (own, self._shared):
            found = None if groups is None else groups.get(name)
            if found:
                item: Dataset = found[0]
                return item
        return None

    def _check(self, size: int) -> None:
        dataset = self._dataset
        rows, columns = self.shape
        samples = int(dataset.get("SamplesPerPixel") or 1)
        bits = int(dataset.get("BitsAllocated") or 0)
        if not (0 < rows <= _MOST_SIDE and 0 < columns <= _MOST_SIDE and self.frames > 0):
            raise Unusable("impossible image size")
        if bits not in (1, 8, 16, 32, 64) or samples not in (1, 3):
            raise Unusable("unsupported pixel format")
        if rows * columns * samples * self.frames * max(bits // 8, 1) > max(
            _LEAST_LIMIT, _SWELLING * size
        ):
            raise Unusable("too large")

    def _masked(self, array: Array) -> Array:
        """The stored bits alone, in native byte order, signed where declared."""
        allocated = int(self._dataset.get("BitsAllocated") or 16)
        stored = int(self._dataset.get("BitsStored") or allocated)
        high = int(self._dataset.get("HighBit") or stored - 1)
        if stored >= array.dtype.itemsize * 8 or allocated == 1:
            return array.astype(array.dtype.newbyteorder("="), copy=False)
        signed = array.dtype.kind == "i"
        wide = array.astype(np.int64) >> max(high - stored + 1, 0)
        wide &= (1 << stored) - 1
        if signed:
            wide -= (wide >> (stored - 1)) << stored
        return wide.astype(array.dtype.newbyteorder("="))

    def _number(self, name: str, index: int) -> float | None:
        item = self.group(index, "PixelValueTransformationSequence")
        for source in (item, self._dataset):
            value = None if source is None else source.get(name)
            if value not in (None, ""):
                number = float(value)
                if not np.isfinite(number):
                    raise Unusable("rescale is not a number")
                return number
        return None

    def _inverted(self) -> bool:
        shape = str(self._dataset.get("PresentationLUTShape") or "")
        return self.photometric == "MONOCHROME1" or shape == "INVERSE"

    def _window(
        self, values: Array, index: int, window: tuple[float, ...]
    ) -> NDArray[np.float64] | None:
        if window:
            return apply_window(values, window[0], window[1])
        lut = self._dataset.get("VOILUTSequence")
        if lut:
            found, most = _lookup(np.rint(values).astype(np.int64), lut[0])
            return found / most
        source = self.group(index, "FrameVOILUTSequence") or self._dataset
        centre, width = (_first(source.get(name)) for name in ("WindowCenter", "WindowWidth"))
        if centre is None or width is None or width <= 0:
            return None
        function = str(source.get("VOILUTFunction") or "LINEAR")
        return apply_window(values, centre, width, function)

    def _rgb(self, frame: Array) -> NDArray[np.uint8]:
        if self.photometric == "PALETTE COLOR":
            from pydicom.pixels.processing import apply_color_lut

            frame = apply_color_lut(frame, self._dataset)[..., :3]
            entry = self._dataset.RedPaletteColorLookupTableDescriptor[2]
            return (frame >> 8 if entry == 16 else frame).astype(np.uint8)
        if frame.dtype == np.uint8:
            return frame
        stored = int(self._dataset.get("BitsStored") or frame.dtype.itemsize * 8)
        return (frame.astype(np.int64) >> max(stored - 8, 0)).astype(np.uint8)


def apply_window(
    values: Array, centre: float, width: float, function: str = "LINEAR"
) -> NDArray[np.float64]:
    """A window as numbers from 0 to 1 (PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    x = values.astype(np.float64)
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (x - centre) / width, -700, 700))))
    if function == "LINEAR_EXACT":
        return np.clip((x - centre) / width + 0.5, 0, 1)
    if width <= 1:  # of LINEAR: a threshold
        return (x > centre - 0.5).astype(np.float64)
    return np.clip((x - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def _stretch(values: Array) -> NDArray[np.float64]:
    x = values.astype(np.float64)
    if not np.isfinite(x).all():
        raise Unusable("pixels that are not finite")
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else np.zeros_like(x)


def _lookup(values: Array, item: Dataset) -> tuple[Array, int]:
    """A modality or VOI LUT applied (PS3.3, C.11.1.1.1), and its greatest possible entry."""
    entries, first, bits = (int(n) for n in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if bits > 8 or len(data) >= 2 * entries else "u1")
    table = np.asarray(data, dtype=np.int64) & 0xFFFF
    entries = entries or 1 << 16
    if first >= 1 << 15 and values.min() < 0:
        first -= 1 << 16
    if len(table) < entries or not 1 <= bits <= 16:
        raise Unusable("lookup table cut short")
    positions = np.clip(values.astype(np.int64) - first, 0, entries - 1)
    return table[positions], (1 << bits) - 1


def _first(value: Any) -> float | None:
    if value is None:
        return None
    numbers = plain_numbers([value] if isinstance(value, int | float) else list(value)[:1], 1)
    return numbers[0] if numbers else None


def _decoder(syntax: Any) -> Any:
    from pydicom.pixels.decoders.base import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise Unusable("unknown transfer syntax") from error
    if not decoder.is_available:
        raise Unusable(f"no decoder for transfer syntax {syntax}")
    return decoder


def _guessed_syntax(dataset: Dataset) -> Any:
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def _why(error: Exception, syntax: str) -> str:
    """A fixed reason for a decoder's error, whose own text is never shown."""
    if isinstance(error, ValueError) and "less than expected" in str(error):
        return "pixel data cut short"
    return f"pixel data cannot be decoded (transfer syntax {syntax})"
