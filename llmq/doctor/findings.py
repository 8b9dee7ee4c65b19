"""What a check reports, and what can be done about it without guessing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Repair:
    """A change that makes a finding disappear and keeps every code, scale and zero what it was meant to be."""

    settings: Mapping[str, Any] = field(default_factory=dict)  # of quantization_config; writing again is enough if none
    transposed: tuple[str, ...] = ()  # tensors that are stored with their two dimensions exchanged
    indexed: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # inputs and group size, by name of the index


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    name: str  # of the kind, a key of docs/doctor.md
    severity: str  # error: some reader computes something else, or nothing; warning: suspicious; note
    where: tuple[str, ...]  # files, modules or tensors
    seen: str  # with values
    advice: str
    repair: Repair | None = None

    def line(self) -> str:
        """Return the finding as a person reads it."""
        more = f" and {len(self.where) - 1} more" if len(self.where) > 1 else ""
        place = f" {self.where[0]}{more}:" if self.where else ""
        fix = " (--fix does it)" if self.repair is not None else ""
        return f"{self.severity}: {self.name}:{place} {self.seen}; {self.advice}{fix}"


def of_all(name: str, severity: str, found: Sequence[tuple[str, str]], advice: str) -> Iterator[Finding]:
    """Report all places that were `found`, if there are any, with what was seen at the first."""
    if found:
        yield Finding(name, severity, tuple(place for place, _ in found), found[0][1], advice)
