"""Every setting of a run as a row of its documentation."""

from __future__ import annotations

from dataclasses import dataclass

from contract.config import RunConfig
from contract.setting import ConfigValue, key_of, wanted


@dataclass(frozen=True, slots=True)
class SchemaRow:
    """One setting, as the documentation shows it."""

    section: str
    key: str
    type: str
    default: ConfigValue
    meaning: str


def schema_rows() -> tuple[SchemaRow, ...]:
    """Every setting in order, grouped by section."""
    rows = []
    for name, field in RunConfig.model_fields.items():
        extra = field.json_schema_extra
        section = str(extra["section"]) if isinstance(extra, dict) else ""
        takes = wanted(field.annotation, field.metadata)
        rows.append(SchemaRow(section, key_of(name), takes, field.default, field.description or ""))
    return tuple(rows)
