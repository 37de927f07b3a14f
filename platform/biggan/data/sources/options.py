"""How to read what does not explain itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "auto",
    "folders",
    "zip",
    "tar",
    "webdataset",
    "parquet",
    "huggingface",
    "cifar",
    "idx",
    "npz",
    "dicom",
    "hdf5",
    "table",
    "digits",
    "prepared",
]
Split = Literal["train", "test", "val", "all"]


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source; the defaults are right for what explains itself."""

    kind: Kind = "auto"
    """What the source is. auto: found out by looking at it."""
    image_column: str = ""
    """Column (of Parquet, Hugging Face or a table), array (of HDF5 or NumPy) or file extension (of
    WebDataset) that holds the images, or their paths. Empty: found by its name or type."""
    label_column: str = ""
    """Column, array, file extension or JSON key that holds the labels. Empty: found by its name or
    type."""
    split: Split = "train"
    """Which part of a source that comes in parts. all: everything, and its test part (validation
    where there is none) is set aside for the reference statistics."""
    labels: str = ""
    """A CSV or Parquet table (path or URI) that labels the images of a folder; the folder's own
    sub-folders then say nothing."""
    window: tuple[float, float] | None = None
    """Level (centre) and width of the values that DICOM images show from black to white, after
    rescaling (Hounsfield units for CT). By default the file's own, else all its values."""
    classes: tuple[str, ...] = ()
    """Take these classes only, in this order, by name. Empty: all of them."""


DEFAULTS = SourceOptions()
