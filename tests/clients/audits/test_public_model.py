"""Guessing token by token with a cache gives what the whole forward gives, in any architecture and at any cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from clients.audits.public_model import PublicHead, PublicLanguageModel
from clients.data import TokenRow
from contract.config import RunConfig
from tests.contract.families import VOCAB, attention, batch, save_model

TOKENS = 9


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bloom", "opt", "gemma2"])
def test_guesses_at_the_head_are_what_the_whole_prefix_gives(family: str, tmp_path: Path) -> None:
    model_dir = save_model(family, tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=attention(family)).eval()
    tokens_RT = batch(rows=3, tokens=TOKENS).input_ids
    with torch.no_grad():
        states = whole(input_ids=tokens_RT, output_hidden_states=True).hidden_states
    for layers in (0, 1, 2):
        if family == "opt" and not layers:
            continue  # its embeddings are projected behind the first state that it shows
        config = RunConfig.from_flower({"attn-implementation": attention(family), "head-layers": layers})
        head = PublicHead(model_dir, config)
        prefix = head.begin()
        for place in range(TOKENS):
            tried_RS = torch.stack([(tokens_RT[:, place] + 1) % VOCAB, tokens_RT[:, place]], dim=1)
            found_RSD = head.try_tokens(prefix, tried_RS)
            torch.testing.assert_close(found_RSD[:, 1], states[layers][:, place], atol=1e-5, rtol=1e-4)
            assert not torch.allclose(found_RSD[:, 0], states[layers][:, place], atol=1e-3)
            some_RSD = head.try_tokens(prefix, tried_RS[[2]], rows=[2])
            torch.testing.assert_close(some_RSD[0], found_RSD[2], atol=1e-5, rtol=1e-4)
            head.extend(prefix, tokens_RT[:, place])


def test_the_language_model_says_the_same_step_by_step_and_at_once(tmp_path: Path) -> None:
    model_dir = save_model("llama", tmp_path / "model")
    model = PublicLanguageModel(model_dir, RunConfig())
    tokens_RT = batch(rows=2, tokens=TOKENS).input_ids
    rows = [
        TokenRow(n, t_T.numpy().astype(np.int32), t_T.numpy().astype(np.int32), False)
        for n, t_T in enumerate(tokens_RT)
    ]
    at_once = model.log_odds_of_next([*rows, TokenRow(9, rows[0].tokens_T[:4], rows[0].labels_T[:4], False)])
    prefix = model.begin()
    for place in range(TOKENS):
        odds_RV = model.extend(prefix, tokens_RT[:, place])
        for row in range(2):
            np.testing.assert_allclose(odds_RV[row], at_once[row][place], atol=1e-4)
    np.testing.assert_allclose(at_once[2], at_once[0][:4], atol=1e-5)
