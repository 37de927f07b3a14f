"""Classes as people name them: by name, or by id."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

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


MOST_WORDS = 20
"""Of a prompt, that are held against the names: of a thousand classes that takes up to 0.7 s."""
CUTOFF = 0.75
"""How like a name (`difflib`'s ratio) words must be to stand for it."""
_DIGITS = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)}
_COMMON = frozenset({
    *("a", "an", "the", "my", "no", "and", "or", "is", "image", "photo", "picture"),
    *("at", "by", "for", "from", "in", "of", "on", "to", "with"),
})  # fmt: skip


def nearest_class(prompt: str, class_names: Sequence[str]) -> int:
    """The id of the class that a prompt names, or that its words come nearest to.

    A name counts before part of a name, and both before what is spelled almost like one; of several
    the longest, and of classes with one name the first. Commas stand between the names that a class
    has ("tench, Tinca tinca"). Where nothing is near, text may be an id. Raises `UnknownClassError`
    if it is not, or several are equally near.
    """
    if prompt.strip() in class_names:
        return class_names.index(prompt.strip())
    plain = _words(prompt)[:MOST_WORDS]
    numbered = [_NUMBERS.get(word, word) for word in plain]
    names = _by_name(class_names)
    for words in (plain, numbered):
        for span in _spans(words):
            if found := names.get(span):
                return found[0]
    for words in (plain, numbered):
        for span in _spans(words):
            if not _COMMON.issuperset(span.split()) and len(ids := _having(span, names)) == 1:
                return ids[0]
    likest = _likest(plain, names)
    if len(likest) == 1:
        return likest[0]
    if likest:
        could = " or ".join(repr(class_names[i]) for i in likest[:3])
        raise UnknownClassError(f"no class is named {prompt[:100]!r}: did you mean {could}?")
    return class_id(prompt.strip(), class_names)


def _words(text: str) -> list[str]:
    return re.sub(r"[\s_,.;:!?\"()]+", " ", text.casefold()).split()


def _spans(words: Sequence[str]) -> Iterator[str]:
    """Runs of words, longer ones first: "polar bear" before "bear"."""
    for length in range(len(words), 0, -1):
        for start in range(len(words) - length + 1):
            yield " ".join(words[start : start + length])


def _by_name(class_names: Sequence[str]) -> dict[str, list[int]]:
    """The ids of classes by each of their names."""
    ids: dict[str, list[int]] = {}
    for i, name in enumerate(class_names):
        for part in dict.fromkeys((name, *name.split(","))):
            if words := _words(part):
                ids.setdefault(" ".join(words), []).append(i)
    return ids


def _having(span: str, names: Mapping[str, list[int]]) -> list[int]:
    """The ids of classes in whose names a span stands, in whole words."""
    found = (i for name, ids in names.items() if f" {span} " in f" {name} " for i in ids)
    return list(dict.fromkeys(found))


def _likest(words: Sequence[str], names: Mapping[str, list[int]]) -> list[int]:
    """The ids of the classes whose names some of the words are likest; none if all are unlike."""
    best, likest = CUTOFF, list[int]()
    matcher = difflib.SequenceMatcher(autojunk=False)
    for span in _spans(words):
        matcher.set_seq2(span)
        for name, ids in names.items():
            matcher.set_seq1(name)
            if matcher.real_quick_ratio() < best or matcher.quick_ratio() < best:
                continue
            if (ratio := matcher.ratio()) >= best:
                likest = (likest if ratio == best else []) + ids
                best = ratio
    return list(dict.fromkeys(likest))
