"""The yardsticks of the codecs' benchmark: what is planted is there, and changes the model little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import hadamard, outliers
from contract import codec
from contract.partition import quiet_loading
from demo.settings import MODEL_DIR


def test_planted_outliers_are_at_both_cuts_and_nowhere_else_and_the_loss_stays(tmp_path: Path) -> None:
    tokens_BT = torch.randint(1, 4096, (4, 32), generator=torch.Generator().manual_seed(0))
    channels = outliers.plant(MODEL_DIR, tokens_BT, tmp_path / "planted")
    found = []
    for directory in (MODEL_DIR, tmp_path / "planted"):
        with quiet_loading(), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            found.append(model(input_ids=tokens_BT, labels=tokens_BT, output_hidden_states=True, use_cache=False))
    plain, planted = found
    assert float(planted.loss) == pytest.approx(float(plain.loss), rel=0.1)
    apart = [codec.encode(hidden, "int8")[0].outlier_channels for hidden in planted.hidden_states]
    assert apart[1] == apart[5] == len(channels)
    assert apart[2:5] == [0, 0, 0]


def test_the_rotation_is_undone_by_itself() -> None:
    for hidden in (512, 768, 7):
        values_ND = torch.randn(16, hidden, generator=torch.Generator().manual_seed(0))
        back_ND = hadamard.unpack(*hadamard.pack(values_ND))
        assert float((back_ND - values_ND).norm() / values_ND.norm()) < 0.01
