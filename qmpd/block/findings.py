"""What a check of an image finds, and its summary (spec/qcow2.md section 11). Plain data; any thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import numpy.typing as npt

#: Findings that are told one by one; the rest is only counted.
MAX_FINDINGS: Final = 256


class Severity(StrEnum):
    """What a finding means."""

    CORRUPTION = "corruption"  # data is, or may become, wrong
    LEAK = "leak"  # space is lost, nothing else
    ERROR = "error"  # something could not be checked


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: what is wrong with the ``field`` of the image file at ``offset`` (bytes), which holds ``value``."""

    severity: Severity
    offset: int
    field: str
    value: int
    text: str


@dataclass(slots=True)
class Report:
    """Collects findings: all are counted, the first :data:`MAX_FINDINGS` kept."""

    counts: dict[Severity, int] = field(default_factory=lambda: dict.fromkeys(Severity, 0))
    findings: list[Finding] = field(default_factory=list)

    def note(self, severity: Severity, offset: int, name: str, value: int, text: str, *, times: int = 1) -> None:
        """One fault, which counts ``times`` times."""
        self.counts[severity] += times
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(Finding(severity, offset, name, value, text))

    def corruption(self, offset: int, name: str, value: int, text: str, *, times: int = 1) -> None:
        """:meth:`note` for corruptions."""
        self.note(Severity.CORRUPTION, offset, name, value, text, times=times)

    def corruptions(
        self, name: str, text: str, offsets: npt.NDArray[Any], values: npt.NDArray[Any], *, times: int = 1
    ) -> None:
        """The same fault in many fields."""
        room = max(0, MAX_FINDINGS - len(self.findings))
        for offset, value in zip(offsets[:room].tolist(), values[:room].tolist(), strict=True):
            self.corruption(offset, name, value, text, times=times)
        self.counts[Severity.CORRUPTION] += times * max(0, len(offsets) - room)

    @property
    def sound(self) -> bool:
        """Was nothing found that makes the structure doubtful? Leaks do not."""
        return not self.counts[Severity.CORRUPTION] and not self.counts[Severity.ERROR]


@dataclass(slots=True)
class CheckResult:
    """Summary of a check, with the counts of QEMU's ImageCheck. ``image_end_offset`` in bytes."""

    report: Report
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    leaks_fixed: int = 0
    corruptions_fixed: int = 0

    @property
    def check_errors(self) -> int:
        return self.report.counts[Severity.ERROR]

    @property
    def corruptions(self) -> int:
        return self.report.counts[Severity.CORRUPTION]

    @property
    def leaks(self) -> int:
        return self.report.counts[Severity.LEAK]
