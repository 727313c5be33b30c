"""What it costs, measured: each module is a command that runs both sides in one go."""

import contract as contract  # before torch and transformers, as in clients
