"""Regular expressions for sets of module names, and what a configuration's expressions say of a name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from llmq.errors import CheckpointError
from llmq.formats.stored import shown
from llmq.types import QuantSpec

_LONGEST = 10_000  # characters of an expression
_MOST_STEPS = 10**8  # of a search

# There is no public way to look into an expression; up to Python 3.10 the module had another name, and two kinds less.
_parser: Any = getattr(re, "_parser", None) or vars(re)["sre_parse"]
_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT, getattr(_parser, "POSSESSIVE_REPEAT", None))
_ATOMIC = getattr(_parser, "ATOMIC_GROUP", None)

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a name that is a number
_WITHIN_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+\.(.+)")


def within_block(name: str) -> str | None:
    """Return the name that a module has within its block, or None if it is in no block."""
    found = _WITHIN_BLOCK.fullmatch(name)
    return found[1] if found else None


def patterns(names: Sequence[str], others: Iterable[str], tail: str = "") -> list[str]:
    """Return regular expressions that match `names`, followed by `tail`, and none of `others`.

    Names that differ in their numbers alone become one, where that hits none of the others.
    """
    others = list(others)
    found = []
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_NUMBER.sub("0", name), []).append(name)
    for members in families.values():
        digits = r"\d+".join(map(re.escape, _NUMBER.split(members[0])))
        joint = f"^{digits}{tail}$"
        if len(members) > 1 and not any(re.match(joint, other) for other in others):
            found.append(joint)
        else:
            found += [f"^{re.escape(name)}{tail}$" for name in members]
    return found


class Rule(NamedTuple):
    """One row of `dynamic`."""

    key: str  # as the configuration has it
    pattern: re.Pattern[str]
    settings: Mapping[str, Any] | None  # None: modules that match are not packed


class Rules:
    """What `dynamic` says of modules, in GPTQModel's meaning: the first row that matches a name's start decides.

    ``-:regex`` keeps modules dense; ``+:regex``, or a regex alone, changes settings for them.

    Raises:
        CheckpointError: a row is not of this kind.
    """

    def __init__(self, dynamic: object) -> None:
        if not isinstance(dynamic, Mapping | None):
            raise CheckpointError(f"quantization_config: dynamic is {shown(dynamic)}; llmq reads an object")
        self._rules: list[Rule] = []
        self._exact: dict[str, int] = {}  # position of the first row for a name in full: there may be one per module
        for position, (key, settings) in enumerate((dynamic or {}).items()):
            if not isinstance(settings, Mapping):
                raise CheckpointError(
                    f"quantization_config: dynamic {shown(key)} is {shown(settings)}; llmq reads an object"
                )
            bare = key[2:] if key.startswith(("+:", "-:")) else key
            rule = Rule(key, compiled(bare, "dynamic"), None if key.startswith("-:") else settings)
            self._rules.append(rule)
            if (name := _literal(bare)) is not None:
                self._exact.setdefault(name, position)
        self._open = [position for position, rule in enumerate(self._rules) if _literal(rule.pattern.pattern) is None]

    def first(self, name: str) -> Rule | None:
        """Return the row that decides about module `name`, or None."""
        best = self._exact.get(name, len(self._rules))
        for position in self._open:
            if position > best:
                break
            if matches(self._rules[position].pattern, name):
                return self._rules[position]
        return self._rules[best] if best < len(self._rules) else None


def by_rules(
    config: Mapping[str, Any], modules: Sequence[str], make: Callable[[Mapping[str, Any]], QuantSpec]
) -> dict[str, QuantSpec]:
    """Return what `config` says of each of `modules`: what `make` makes of it, with the changes of its `dynamic`.

    Raises:
        CheckpointError: `dynamic` is damaged, or keeps one of them dense.
    """
    rules = Rules(config.get("dynamic"))
    made: dict[str | None, QuantSpec] = {}
    found = {}
    for module in modules:
        rule = rules.first(module)
        if rule is not None and rule.settings is None:
            raise CheckpointError(
                f"quantization_config: dynamic {shown(rule.key)} keeps {module} dense, but it is packed"
            )
        key = None if rule is None else rule.key
        if key not in made:
            made[key] = make(config if rule is None else {**config, **(rule.settings or {})})
        found[module] = made[key]
    return found


def left_out(dense: Sequence[str]) -> dict[str, dict[str, object]]:
    """Return the rows of `dynamic` that keep these modules, and all below them, as they are."""
    return {rf"-:^{re.escape(name)}(\..*)?$": {} for name in dense}


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Return the regular expression `pattern`.

    Raises:
        CheckpointError: it is none, or one whose search of a name could take for ever.
    """
    if len(pattern) > _LONGEST:
        raise CheckpointError(
            f"quantization_config: {where} has an expression of {len(pattern)} characters, {shown(pattern)}; "
            f"llmq reads {_LONGEST}"
        )
    try:
        choices(pattern)
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"quantization_config: {where} has {shown(pattern)}, which is no regular expression: {error}"
        ) from error


def matches(pattern: re.Pattern[str], name: str) -> bool:
    """Return whether `pattern` matches the start of `name`.

    Raises:
        CheckpointError: to find out could take many seconds.
    """
    repeats, ways = choices(pattern.pattern)
    steps = math.comb(len(name) + repeats, repeats) * ways if repeats > 1 or ways > 1 else 0
    if steps > _MOST_STEPS:
        raise CheckpointError(
            f"quantization_config: {shown(pattern.pattern)} leaves too many choices open, {repeats} parts of any "
            f"length and {ways} alternatives, for the {len(name)} characters of {shown(name)}"
        )
    return pattern.match(name) is not None


@lru_cache(maxsize=4096)
def choices(pattern: str) -> tuple[int, int]:
    """Return how many parts of a regular expression can have several lengths, and the product of its alternatives.

    A search may try all ways to divide a name among the parts: their number is a binomial coefficient. Where one is
    within another that is repeated, as in ``(a+)+``, it is exponential.

    Raises:
        re.error: it is none, or has such a part; it may as well be RecursionError or OverflowError.
    """
    return _choices(list(_parser.parse(pattern)))


def _choices(nodes: list[tuple[Any, Any]]) -> tuple[int, int]:
    """Return what `choices` does of a parsed expression."""
    repeats, ways = 0, 1
    for kind, value in nodes:
        inside = [(0, 1)]
        if kind in _REPEATS:
            low, high, body = value
            own, alternatives = _choices(list(body))
            if (own or alternatives > 1) and high > 1:
                raise re.error("it repeats something that can match in several ways, which may take for ever")
            inside = [(own + (low != high), alternatives)]
        elif kind == _parser.BRANCH:
            inside = [_choices(list(branch)) for branch in value[1]]
        elif kind == _parser.SUBPATTERN:
            inside = [_choices(list(value[3]))]
        elif kind in (_parser.ASSERT, _parser.ASSERT_NOT):
            inside = [_choices(list(value[1]))]
        elif kind == _parser.GROUPREF_EXISTS:
            inside = [_choices(list(part)) for part in value[1:] if part is not None]
        elif kind == _ATOMIC:
            inside = [_choices(list(value))]
        repeats += max(count for count, _ in inside)
        ways *= sum(count for _, count in inside)
    return repeats, ways


def _literal(pattern: str) -> str | None:
    """Return the one name that `pattern` matches, if it is ``^name$`` with nothing but escapes in it."""
    if not re.fullmatch(r"\^(?:[^\\.^$*+?{}\[\]()|]|\\[^a-zA-Z0-9])*\$", pattern):
        return None
    return re.sub(r"\\(.)", r"\1", pattern[1:-1])
