"""Until when whoever drives a run holds it against others."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("runs", sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True))
