"""Medical images: DICOM files, with the window that makes their values visible."""

from __future__ import annotations

import importlib.util
from io import BytesIO
from typing import Any

import numpy as np

from biggan.data.images import ImageError
from biggan.data.sources.source import SourceError

MAGIC = b"DICM"
"""At byte 128 of every DICOM file."""

Window = tuple[float, float] | None
"""Level and width."""


def require_pydicom() -> None:
    """Raises `SourceError` if the reader of DICOM files is not installed."""
    if importlib.util.find_spec("pydicom") is None:
        raise SourceError(
            "DICOM images need pydicom, which is not installed:"
            " pip install 'biggan-platform[medical]'"
        )


def decode_dicom(content: bytes, window: Window = None) -> np.ndarray:
    """A DICOM file's image as uint8 `[H, W]`, or its colours `[H, W, 3]`.

    Grey values are rescaled by the file's slope and intercept and cut to `window`, else to the
    first of the file's own windows, else to the range of the values (8 bits stay as they are).
    MONOCHROME1, where 0 is white, is inverted. Raises `ImageError` for several frames in one file.
    """
    require_pydicom()
    import pydicom
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

    header = pydicom.dcmread(BytesIO(content))
    frames = int(header.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ImageError(f"{frames} frames: save each as a file of its own, with its own label")
    if "PixelData" not in header:
        raise ImageError(f"no pixels in it (modality {header.get('Modality', 'unknown')})")
    stored = header.pixel_array
    if header.PhotometricInterpretation == "PALETTE COLOR":
        colours: np.ndarray = apply_color_lut(stored, header)
        return colours
    if stored.ndim == 3:
        return stored  # pydicom has turned YBR to RGB.
    values = apply_modality_lut(stored, header)
    grey = _visible(values, stored, header, window)
    return 255 - grey if header.PhotometricInterpretation == "MONOCHROME1" else grey


def _visible(values: np.ndarray, stored: np.ndarray, header: Any, window: Window) -> np.ndarray:
    """Values as uint8, black to white over the window."""
    chosen = window or _own_window(header)
    if chosen:
        shape = "LINEAR" if window else str(header.get("VOILUTFunction") or "LINEAR")
        return _bytes(_windowed(values.astype(np.float64), *chosen, shape))
    if "VOILUTSequence" in header:
        from pydicom.pixels.processing import apply_voi_lut

        values = apply_voi_lut(stored, header)
    elif header.BitsStored == 8 and values.min() >= 0 and values.max() <= 255:
        return values.round().astype(np.uint8)
    within = values[stored != header.get("PixelPaddingValue")]
    low, high = (float(within.min()), float(within.max())) if within.size else (0.0, 0.0)
    return _bytes((values - low) / max(high - low, np.finfo(np.float64).tiny))


def _own_window(header: Any) -> Window:
    def first(name: str) -> float | None:
        value = header.get(name)
        if value is None or value == "":
            return None
        return float(value if not hasattr(value, "__len__") else value[0])

    level, width = first("WindowCenter"), first("WindowWidth")
    return (level, width) if level is not None and width is not None and width > 0 else None


def _windowed(values: np.ndarray, level: float, width: float, shape: str) -> np.ndarray:
    """Values from 0 to 1 (DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    if shape == "SIGMOID":
        bright: np.ndarray = 1 / (1 + np.exp(-4 * (values - level) / width))
        return bright
    if shape == "LINEAR_EXACT":
        return (values - level) / width + 0.5
    return (values - (level - 0.5)) / max(width - 1, np.finfo(np.float64).tiny) + 0.5


def _bytes(unit: np.ndarray) -> np.ndarray:
    return (unit.clip(0, 1) * 255).round().astype(np.uint8)
