"""Classes as people name them: by name, or by id."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from biggan.errors import UserError


class UnknownClassError(UserError):
    """A class that the generator does not have; says which there are, or the nearest."""


def class_id(wanted: str | int, class_names: Sequence[str]) -> int:
    """The id of a class given by name or id; raises `UnknownClassError` if there is none such.

    An `int` is an id. Text is a name first, so that folders named "2" and "7" mean themselves,
    and an id if no class has that name.
    """
    last = len(class_names) - 1
    if isinstance(wanted, str):
        if wanted in class_names:
            return class_names.index(wanted)
        if not (wanted.isascii() and wanted.isdecimal() and len(wanted) < 10):
            near = difflib.get_close_matches(wanted[:100], class_names, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"ids go from 0 to {last}"
            raise UnknownClassError(f"no class is named {wanted[:100]!r}: {hint}")
        wanted = int(wanted)
    if not 0 <= wanted <= last:
        raise UnknownClassError(f"class {wanted} does not exist: ids go from 0 to {last}")
    return wanted
