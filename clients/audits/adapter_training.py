"""Adapters to attack: trained on this machine as a site would, on the whole model, with nothing sent anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from aggregation.rules import trainable_factor
from clients.audits.tap import batches_of_one_length
from clients.data import IGNORED, TokenRow, collate, order_key
from clients.private_training import train_privately
from clients.trainer import tell_nobody, train
from contract import adapter
from contract.architecture import probe
from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError, ModelError
from contract.model_files import resolve_model
from contract.partition import DTYPES, quiet_loading
from contract.records import Factor, LoraSpec
from privacy.stream import SecretStream

Entropy = Callable[[int], bytes]

_OVERFIT_STEPS, _OVERFIT_TIMES, _OVERFIT_RATE = 40, 10, 2e-3
_OVERFIT_LOSS = 0.25
"""A control is trained on until its loss is this part of the base model's."""


class AdapterTrainer:
    """The whole base model with an adapter that starts anew for each training."""

    def __init__(self, model_dir: str | Path, config: RunConfig, entropy: Entropy = os.urandom) -> None:
        """Raises ConfigError for `dp=client`: its noise is in the sum over clients, which one site cannot make."""
        if config.dp == "client":
            raise ConfigError(
                "dp is client: its noise is in the sum over clients, which one site cannot make; audit the adapter "
                "that the run exported, with --adapter, --members and --nonmembers"
            )
        self._config, self._entropy = config, entropy
        spec = adapter.resolve_lora(resolve_model(model_dir), adapter.run_lora(config))
        if config.dp != "off" or config.trunk_adapter == "frozen":
            spec = _client_spec(spec, model_dir, config)
        self._first = adapter.initial_adapter(adapter.adapter_shapes(model_dir, spec), config.seed)
        self.model = adapter.add_lora(whole_model(model_dir, config), spec)

    def as_in_a_run(self, rows: Sequence[TokenRow]) -> PeftModel:
        """All rounds of the run on `rows`, without other clients: what each adds only hides this one."""
        adapter.load_adapter_(self.model, self._first)
        stream = SecretStream(self._entropy)
        for number in range(1, self._config.num_rounds + 1):
            self._train_only(trainable_factor(self._config.aggregation, number))
            if self._config.dp == "example":
                train_privately(self.model, rows, self._config, stream, tell_nobody)
            else:
                train(self.model, rows, self._config, order_key(self._config.seed, "audit", number, "site"))
        return self.model

    def overfitted(self, rows: Sequence[TokenRow]) -> PeftModel:
        """Trained without privacy until it knows `rows` by heart, or 400 steps long."""
        adapter.load_adapter_(self.model, self._first)
        self._train_only("AB")
        plain: dict[str, ConfigValue] = {
            "dp": "off",
            "wire": "off",
            "local-steps": _OVERFIT_STEPS,
            "learning-rate": _OVERFIT_RATE,
        }
        steady: dict[str, ConfigValue] = {"lr-scheduler-type": "constant", "warmup-ratio": 0.0, "lora-dropout": 0.0}
        config = RunConfig.from_flower({**self._config.to_flower(), **plain, **steady})
        enough = _OVERFIT_LOSS * sum(row_losses(self.model, rows)) / len(rows)
        for number in range(1, _OVERFIT_TIMES + 1):
            done = train(self.model, rows, config, order_key(config.seed, "overfit", number, "site"))
            if done.loss < enough:
                break
        return self.model

    def _train_only(self, factor: Factor) -> None:
        live = adapter.adapter_parameters(self.model)
        trained = adapter.trainable_names(live, factor)
        for name, parameter in live.items():
            parameter.requires_grad_(name in trained)


def whole_model(model_dir: str | Path, config: RunConfig) -> torch.nn.Module:
    """The whole base model, frozen."""
    with quiet_loading():
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            str(resolve_model(model_dir)),
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
        )
    return model.eval().requires_grad_(False)


def released_model(model_dir: str | Path, adapter_dir: str | Path, config: RunConfig) -> PeftModel:
    """The base model under an exported adapter. Raises ModelError where `adapter_dir` holds none for this model."""
    try:
        with adapter.peft_refusals():
            return PeftModel.from_pretrained(whole_model(model_dir, config), str(adapter_dir)).eval()
    # PEFT says with errors of many classes that a directory is no adapter, or none for this model.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(f"{adapter_dir}: no adapter for this model can be loaded: {reason}") from error


def row_losses(model: torch.nn.Module, rows: Sequence[TokenRow]) -> list[float]:
    """Each row's mean loss over the tokens that count, in nats, in the order of `rows`."""
    found = [0.0] * len(rows)
    for places in batches_of_one_length(rows):
        batch = collate([rows[place] for place in places])
        with torch.no_grad():
            logits_BTV = model(input_ids=batch["input_ids"]).logits.float()
        targets_BT = batch["labels"][:, 1:]
        losses_BT = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].transpose(1, 2), targets_BT, reduction="none", ignore_index=IGNORED
        )
        means_B = losses_BT.sum(dim=1) / (targets_BT != IGNORED).sum(dim=1)
        for place, loss in zip(places, means_B.tolist(), strict=True):
            found[place] = loss
    return found


def _client_spec(spec: LoraSpec, model_dir: str | Path, config: RunConfig) -> LoraSpec:
    """What of `spec` lies on the client's side: the trunk's half stays as it began."""
    found = probe(model_dir)
    trunk = {f"{found.layers_path}.{index}." for index in config.cut.kept(found.layers, "trunk")}
    return spec.only(lambda target: not any(target.startswith(layer) for layer in trunk))
