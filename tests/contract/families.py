"""Tiny random configurations of the families that the split is proved on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

hf_logging.disable_progress_bar()

VOCAB = 96
TOKENS = 12
WINDOW = 5  # shorter than TOKENS, so that a lost window shows

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_KV = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**_GPT, "scale_attn_by_inverse_layer_idx": True}),
    "llama": ("llama", _COMMON),
    "mistral": ("mistral", {**_COMMON, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", {**_COMMON, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**_COMMON, "head_dim": 8, "sliding_window": WINDOW, "layer_types": _MIXED}),
    "gemma3-text": ("gemma3_text", {**_COMMON, "head_dim": 8, "sliding_window": WINDOW, "layer_types": _MIXED}),
    "phi3": ("phi3", {**_COMMON, "sliding_window": WINDOW}),
    "phi": ("phi", _COMMON),
    "opt": (
        "opt",
        {**_NO_KV, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": True, "dropout": 0.0}
        | {"layerdrop": 0.5},
    ),
    "gpt_neox": ("gpt_neox", _NO_KV),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 4, "n_head": 4, "pad_token_id": 0}),
    "falcon": (
        "falcon",
        {**_NO_KV, "alibi": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    ),
    "olmo2": ("olmo2", _COMMON),
    "mixtral": (
        "mixtral",
        {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**_COMMON, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"mlp_only_layers": [1], "decoder_sparse_step": 1},
    ),
    "stablelm": ("stablelm", _COMMON),
    "granite": (
        "granite",
        {**_COMMON, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "starcoder2": (
        "starcoder2",
        {**_COMMON, "sliding_window": WINDOW, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
}
EAGER_ONLY = frozenset({"bloom", "gemma2", "gptj"})


def attention(family: str) -> str:
    """The attention implementation that both sides and the reference use."""
    return "eager" if family in EAGER_ONLY else "sdpa"


@dataclass(frozen=True)
class Batch:
    """Token ids, mask and labels, all of shape (B, T); the mask is None where nothing is padded."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """True at the positions that hold a token."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()

    def inputs(self) -> dict[str, torch.Tensor]:
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}
        return {name: value for name, value in given.items() if value is not None}


def family_config(family: str, **changes: Any) -> PretrainedConfig:
    """The tiny configuration of `family` (a key of FAMILIES), with `changes` over it."""
    model_type, settings = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**settings, **changes})


def random_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model with weights large enough that every layer matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = family_config(family, **changes)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention(family)
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.1)
    return model


def save_model(family: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random model of `family` as a safetensors checkpoint; answers its directory."""
    random_model(family, seed, **changes).save_pretrained(directory)
    return directory


def batch(padding: str = "none", rows: int = 2, tokens: int = TOKENS, seed: int = 0) -> Batch:
    """Random text of `rows` rows; the first is padded "left" or "right", or "none" of them is."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    pad = tokens // 3
    if padding == "left":
        mask[0, :pad] = 0
    elif padding == "right":
        mask[0, tokens - pad :] = 0
    ids = torch.where(mask.bool(), ids, torch.zeros_like(ids))
    labels = torch.where(mask.bool(), ids, torch.full_like(ids, -100))
    return Batch(ids, None if padding == "none" else mask, labels)
