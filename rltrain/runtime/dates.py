"""Dates of problems, and the cut-off that the audit compares them by."""

from __future__ import annotations

import calendar
import datetime
import re
from dataclasses import dataclass
from typing import Any

from rltrain.errors import require, require_date

PERIOD = re.compile(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?(?:[T ].*)?")
NO_DATE = "no date"


@dataclass(kw_only=True)
class AuditConfig:
    """What ``rltrain.audit --probe N`` compares: accuracy and completion before and after a cut-off."""

    date_field: str | None = None  # entry of problem.meta with a problem's date; null: no audit by date
    cutoff: str | None = None  # first day after the model's training data, as 2024-07-26

    def __post_init__(self) -> None:
        require_date("audit.cutoff", self.cutoff)
        require(
            (self.date_field is None) == (self.cutoff is None),
            f"audit.date_field={self.date_field} with audit.cutoff={self.cutoff}: one without the other has no effect; "
            "set both",
        )


def period(value: Any) -> tuple[datetime.date, datetime.date] | None:
    """First and last day of a date, of ``2024-07-26``, ``2024-07`` or ``2024`` with or without a time; else None."""
    if isinstance(value, datetime.date):  # a datetime is one
        day = datetime.date(value.year, value.month, value.day)
        return day, day
    found = PERIOD.fullmatch(str(value).strip())
    if found is None:
        return None
    year, month, day = (int(part) if part else None for part in found.groups())
    try:
        first = datetime.date(year or 0, month or 1, day or 1)
        last_month = month or 12
        last = datetime.date(year or 0, last_month, day or calendar.monthrange(first.year, last_month)[1])
    except (ValueError, calendar.IllegalMonthError):
        return None
    return first, last


def side(value: Any, cutoff: datetime.date) -> str:
    """``before`` or ``after`` (the cut-off's day itself is after), else why neither."""
    days = period(value)
    if days is None:
        return NO_DATE
    if days[1] < cutoff:
        return "before"
    return "after" if days[0] >= cutoff else "spans the cut-off"
