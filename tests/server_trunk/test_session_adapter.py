"""What one session's half of the adapter tells of its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contract.records import LoraSpec
from server_trunk.session_adapter import Layout, SessionAdapter


def _adapter(values: int) -> SessionAdapter:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    layout = Layout(LoraSpec(rank=1, alpha=1.0, target_modules=("q_proj",)), "AB", {name: (values,)})
    return SessionAdapter(layout, {}, {name: torch.zeros(values)})


@given(st.integers(1, 600_000), st.integers(-44, 38), st.integers(0, 1 << 30))
def test_the_gradients_norm_is_that_of_exact_sums_at_any_scale(values: int, exponent: int, seed: int) -> None:
    adapter = _adapter(values)
    gradient_K = torch.randn(values, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) * 10.0**exponent
    adapter.accumulator().copy_(gradient_K)
    assert adapter.gradient_norm() == pytest.approx(math.hypot(*gradient_K.tolist()), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_shows_in_the_norm(bad: float) -> None:
    adapter = _adapter(1000)
    adapter.accumulator()[500] = bad
    assert not math.isfinite(adapter.gradient_norm())


def test_a_gradient_that_never_came_has_norm_zero() -> None:
    assert _adapter(10).gradient_norm() == 0.0
