"""A checkpoint whose activations hold outlier channels at both cuts, and which computes nearly the same function.

Large models have a few channels of the residual stream that are far above the rest, and nearly constant. Here the layer
below a cut adds a constant to some channels, and the attention above it takes it away again; only the one norm between
sees it. That norm's gain is raised by as much as the constant raises the root mean square of a token, and the planted
channels are left out of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TIMES = 60.0
"""How far a planted channel is above the mean magnitude of the others."""
CHANNELS = 4


def plant(model_dir: Path, tokens_BT: Tensor, directory: Path) -> tuple[int, ...]:
    """Write to `directory` the Llama of `model_dir` with outliers at the cut (1, 1), and tell their channels.

    What the constant and the gain must be is measured on `tokens_BT`.
    """
    model = _with_biases(model_dir)
    with torch.no_grad():
        hidden = model(input_ids=tokens_BT, output_hidden_states=True, use_cache=False).hidden_states
        channels = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(0))[:CHANNELS]
        layers = model.model.layers
        for below in (0, len(layers) - 2):
            _plant_between(layers[below], layers[below + 1], hidden[below + 1], channels)
    model.save_pretrained(directory)
    for file in model_dir.glob("token*"):
        shutil.copy(file, directory)
    return tuple(sorted(channels.tolist()))


def _plant_between(below: nn.Module, above: nn.Module, hidden_BTD: Tensor, channels_K: Tensor) -> None:
    constant = TIMES * hidden_BTD.abs().mean()
    planted_BTD = hidden_BTD.index_add(2, channels_K, constant.expand(*hidden_BTD.shape[:2], len(channels_K)))
    below.get_parameter("mlp.down_proj.bias")[channels_K] += constant
    above.get_parameter("self_attn.o_proj.bias")[channels_K] -= constant
    gain_D = above.get_parameter("input_layernorm.weight").data
    gain_D *= _root_mean_square(planted_BTD) / _root_mean_square(hidden_BTD)
    gain_D[channels_K] = 0.0


def _root_mean_square(hidden_BTD: Tensor) -> Tensor:
    """The middle token's."""
    return hidden_BTD.square().mean(-1).sqrt().median()


def _with_biases(model_dir: Path) -> PreTrainedModel:
    """The same function; biases, all of them zero, are where a constant can be added."""
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, use_safetensors=True)
    config = AutoConfig.from_pretrained(model_dir)
    config.mlp_bias = config.attention_bias = True
    config.dtype = torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if name.endswith(".bias")}
    model.load_state_dict({**plain.state_dict(), **zeros})
    return model.requires_grad_(False)
