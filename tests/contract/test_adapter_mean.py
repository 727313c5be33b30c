"""The weighted mean of adapters."""

from __future__ import annotations

import pytest
import torch

from contract.adapter import from_bytes, to_bytes
from contract.adapter_mean import AdapterMean
from contract.errors import AgreementError, UpdateError


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(7, 5, generator=generator) for name in ("a.lora_A.weight", "a.lora_B.weight")}


def test_a_mean_of_means_by_their_weights_is_the_mean_of_all() -> None:
    weights = {1: 3, 2: 500_000_000, 3: 17, 4: 1_000_003}
    whole, parts = AdapterMean(), [AdapterMean(), AdapterMean()]
    for seed, weight in weights.items():
        whole.add(str(seed), to_bytes(drawn(seed)), weight)
        parts[seed % 2].add(str(seed), to_bytes(drawn(seed)), weight)
    again = AdapterMean()
    for part in parts:
        again.add("part", part.to_bytes(), part.weight)
    assert again.weight == whole.weight == sum(weights.values())
    for name, tensor in from_bytes(whole.to_bytes()).items():
        assert torch.allclose(from_bytes(again.to_bytes())[name], tensor, rtol=2**-22, atol=2**-24)


def test_what_nobody_changed_stays_bit_for_bit_whatever_the_weights() -> None:
    mean, data = AdapterMean(), to_bytes(drawn(1))
    for weight in (7, 13, 1_000_003, 2**28):
        mean.add("one", data, weight)
    assert mean.to_bytes() == data


def test_other_tensors_and_no_weight_are_refused() -> None:
    mean = AdapterMean()
    mean.add("client 1", to_bytes(drawn(1)), 0)
    with pytest.raises(UpdateError, match="weights sum to 0"):
        mean.to_bytes()
    with pytest.raises(AgreementError, match="the adapters of client 1 and client 2 have different tensors"):
        mean.add("client 2", to_bytes({"a.lora_A.weight": torch.zeros(7, 5)}), 1)
