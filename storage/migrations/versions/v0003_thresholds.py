"""How many clients a round's secure sum needs to its end."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("rounds", sa.Column("threshold", sa.BigInteger(), nullable=True))
