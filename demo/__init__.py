"""The demo: a small base model, real text of four sites, and whether federation pays."""

import contract as contract  # before torch and transformers, as in clients
