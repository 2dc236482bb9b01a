"""Labels that may be written wrongly: two spellings of one label, or several labels in one."""

from __future__ import annotations

import html
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from itertools import combinations, takewhile

_SURE = ("|", ";", "；", "、", "，", "\t", "\n", ",", "/", "\\", "+", "&")
_WEAK = (":", " - ", " and ", "_", " ")
"""Marks that names often have of their own."""

_MARKS = (*_SURE, *_WEAK)
"""What may separate two labels in a cell."""

_ENTITY = re.compile(r"&(?:#\d+|#x[\da-f]+|\w+)(?:;|$)", re.IGNORECASE)
_SCORED = re.compile(r".*[^\W\d].*[:=(]\s*\d*\.?\d+%?\)?")
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ("<", ">"))

_NEVER_IN_NAMES = frozenset("|;；、\t\n")


def packed_labels(
    vocabulary: Sequence[str], *, one_each: bool = True
) -> tuple[str, list[str]] | None:
    """Find labels that may be several labels with a separator between them.

    A name may have a comma, a slash or a blank of its own (`traffic light`). So a mark counts as a
    separator only if the names with it are made of the parts of other names. Most of them must have
    no other part and, where the mark is a blank, one part that is a name itself. Of names with a
    comma, most must share a part with another name, and most parts must be shared. Names whose
    parts all are numbers count in any case. Names rarely have a `|`, a `;`, a tab or a line break
    of their own, so these also count if most names have one. Marks of `_WEAK` count only if two
    names or more have them.

    Args:
        vocabulary: the names.
        one_each: whether no image has two of them. Where one has, the separator that was used is
            right, and names may have the marks of `_WEAK`.

    Returns:
        the separator, and the names that have it, in the vocabulary's order; None if there are
        none.
    """
    for mark in _MARKS if one_each else _SURE:
        parts = {
            name: {part.strip() for part in name.split(mark)} for name in vocabulary if mark in name
        }
        packed = {name: inside for name, inside in parts.items() if "" not in inside}
        if not packed or any(map(_is_scored, packed)):
            continue
        alone = set(vocabulary) - set(packed)
        names_with = Counter(alone)
        for inside in packed.values():
            names_with.update(inside)
        shared = {part for part, count in names_with.items() if count > 1}
        if mark == ",":
            found = sum(not inside.isdisjoint(shared) for inside in packed.values())
            every = [part for inside in packed.values() for part in inside]
            likely = 2 * sum(part in shared for part in every) > len(every)
        else:
            found = sum(
                inside <= shared and (mark != " " or not inside.isdisjoint(alone))
                for inside in packed.values()
            )
            likely = True
        numeric = sum(all(part.isdecimal() for part in inside) for inside in packed.values())
        if 2 * numeric > len(packed):
            return mark, list(packed)
        if mark in _WEAK and len(packed) < 2:
            continue
        many = mark in _NEVER_IN_NAMES and 2 * len(packed) > len(vocabulary)
        if many or (likely and 2 * found > len(packed)):
            return mark, list(packed)
    return None


def is_list_like(name: str, mark: str) -> bool:
    """Whether the parts of a name between marks have quotes, or only one of two brackets."""
    return any(
        '"' in part
        or re.match(r"\s*'.*'\s*$", part) is not None
        or any(part.count(left) != part.count(right) for left, right in _PAIRS)
        for part in name.split(mark)
    )


def names_with_entities(vocabulary: Sequence[str]) -> list[str]:
    """The names with an HTML entity (`&amp;`), of which a split may have taken the end."""
    return [
        name
        for name in vocabulary
        if (found := _ENTITY.search(name)) and html.unescape(found[0] + ";") != found[0] + ";"
    ]


def names_with_scores(vocabulary: Sequence[str]) -> list[str]:
    """The names that end with a mark and a number (`cat:0.9`), if most do."""
    scored = [name for name in vocabulary if _is_scored(name)]
    return scored if 2 * len(scored) > len(vocabulary) else []


def _is_scored(name: str) -> bool:
    return _SCORED.fullmatch(name) is not None


def separator_of(name: str, vocabulary: Collection[str]) -> str | None:
    """The mark between the parts of a name that all are labels; None if it is no such name."""
    return next(
        (
            mark
            for mark in _MARKS
            if mark in name and all(part.strip() in vocabulary for part in name.split(mark))
        ),
        None,
    )


def similar_labels(vocabulary: Sequence[str]) -> list[tuple[str, str]]:
    """Find pairs of labels that may be two spellings of one label, in the vocabulary's order.

    The two differ only in case, blanks, `_` and `-`; or in one letter that is missing, replaced,
    or swapped with the next. Different short names often differ in one letter (cat, car), so names
    of at most four letters match only if one letter is missing (dog, dogs).
    """
    by_form: defaultdict[str, set[int]] = defaultdict(set)
    # The minus of a number is none of the marks.
    words = [re.sub(r"(?!^-\d)[\s_-]+", "", name.casefold()) for name in vocabulary]
    for label, word in enumerate(words):
        # Similar words have one of these forms in common, so not all pairs need be compared.
        for form in {word, *(word[:cut] + word[cut + 1 :] for cut in range(len(word)))}:
            by_form[form].add(label)
    pairs = {
        pair
        for labels in by_form.values()
        for pair in combinations(sorted(labels), 2)
        if _similar(words[pair[0]], words[pair[1]])
    }
    return [(vocabulary[first], vocabulary[second]) for first, second in sorted(pairs)]


def _similar(a: str, b: str) -> bool:
    """The rule of `similar_labels` for two words in lower case and without blanks."""
    start = _common_prefix(a, b)
    a, b = a[start:], b[start:]
    end = _common_prefix(a[::-1], b[::-1])
    length = start + max(len(a), len(b))
    a, b = a[: len(a) - end], b[: len(b) - end]
    if not a + b:
        return True
    if any(letter.isdigit() for letter in a + b):
        return False
    if not (a and b):
        return length >= 4 and len(a + b) == 1
    return length >= 5 and (len(a) == len(b) == 1 or (a == b[::-1] and len(a) == 2))


def _common_prefix(a: str, b: str) -> int:
    """The number of letters with which both words begin."""
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
