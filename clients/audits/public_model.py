"""What everybody has who has the base model: its head and its language model.

Both models go token by token with cached keys and values, so that a guess costs one token's work, not its prefix's.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from clients.audits.tap import batches_of_one_length
from clients.data import TokenRow, collate
from contract.architecture import decoder_layers
from contract.config import RunConfig
from contract.model_files import resolve_model
from contract.partition import DTYPES, load_part, quiet_loading
from contract.records import CutLayers


class PublicHead:
    """The base model's layers up to the head cut, for one batch of rows that grow by a token at a time."""

    def __init__(self, model_dir: str | Path, config: RunConfig) -> None:
        part = load_part(
            model_dir,
            CutLayers(config.head_layers, 0),
            "client",
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
        )
        self._config = part.config
        self._backbone, _, layers = decoder_layers(part)
        self._layers = config.head_layers
        self._hidden = torch.empty(0)
        layers[config.head_layers].register_forward_pre_hook(self._listen, with_kwargs=True)
        self._takes_positions = "position_ids" in inspect.signature(self._backbone.forward).parameters

    def begin(self) -> Prefix:
        """An empty prefix for any number of rows."""
        return Prefix(DynamicCache(config=self._config))

    def try_tokens(self, prefix: Prefix, tokens_RS: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """hidden_RSD at the head cut if the prefix of each row (or of `rows` alone) went on with each of S tokens."""
        cache = copy.deepcopy(prefix.cache)
        if rows is not None:
            cache.batch_select_indices(torch.tensor(list(rows)))
        cache.batch_repeat_interleave(tokens_RS.shape[1])
        hidden_ND = self._run(cache, tokens_RS.reshape(-1, 1), prefix.length)
        return hidden_ND.view(*tokens_RS.shape, -1)

    def extend(self, prefix: Prefix, tokens_R: Tensor) -> None:
        """Append one token to each row."""
        self._run(prefix.cache, tokens_R[:, None], prefix.length)
        prefix.length += 1

    def _run(self, cache: DynamicCache, tokens_N1: Tensor, before: int) -> Tensor:
        # Without layers nothing is cached, so that the model would take every token for a row's first.
        seen = before + 1 if self._layers else 1
        given: dict[str, Any] = {"attention_mask": torch.ones(len(tokens_N1), seen, dtype=torch.int64)}
        if self._takes_positions and not self._layers:
            given["position_ids"] = torch.full((len(tokens_N1), 1), before)
        with torch.no_grad():
            self._backbone(input_ids=tokens_N1, past_key_values=cache, use_cache=True, **given)
        return self._hidden[:, 0].float()

    def _listen(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden = cast(Tensor, args[0] if args else kwargs["hidden_states"]).detach()


class Prefix:
    """What rows have in common with what was guessed of them so far: `length` tokens, with their keys and values."""

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache
        self.length = 0


class PublicLanguageModel:
    """The whole base model."""

    def __init__(self, model_dir: str | Path, config: RunConfig) -> None:
        with quiet_loading():
            self._model = AutoModelForCausalLM.from_pretrained(
                str(resolve_model(model_dir)),
                dtype=DTYPES[config.dtype],
                attn_implementation=config.attn_implementation,
                use_safetensors=True,
            )
        self._model.eval().requires_grad_(False)

    def begin(self) -> Prefix:
        return Prefix(DynamicCache(config=self._model.config))

    def extend(self, prefix: Prefix, tokens_R: Tensor) -> Tensor:
        """Append one token to each row; the log probabilities of what comes next, [R, V] float32."""
        mask = torch.ones(len(tokens_R), prefix.length + 1, dtype=torch.int64)
        with torch.no_grad():
            logits_R1V = self._model(
                input_ids=tokens_R[:, None], attention_mask=mask, past_key_values=prefix.cache, use_cache=True
            ).logits
        prefix.length += 1
        return cast(Tensor, logits_R1V[:, 0].float().log_softmax(-1))

    def log_odds_of_next(self, rows: Sequence[TokenRow]) -> list[npt.NDArray[np.float32]]:
        """[T, V] for each row: log probabilities of the token after each, given the true ones up to it."""
        found: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(rows)
        for places in batches_of_one_length(rows):
            batch = collate([rows[place] for place in places])
            with torch.no_grad():
                logits_BTV = self._model(input_ids=batch["input_ids"], use_cache=False).logits
            for place, odds_TV in zip(places, logits_BTV.float().log_softmax(-1).numpy(), strict=True):
                found[place] = odds_TV
        return found
