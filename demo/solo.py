"""Does federation pay? The federated adapter against each client's own, on everybody's held-out text.

`python -m demo.solo EXPORT` trains every client's adapter alone, un-split, from the same first adapter and with the
same settings, so with as many optimiser steps as it took in the run. Then it judges the base model, the federated
adapter and the lone ones on the union of the clients' held-out text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from aggregation.rules import trainable_factor
from clients.data import SiteData, load_dataset, load_tokenizer, order_key
from clients.trainer import Judgement, judge, train
from contract.adapter import (
    WEIGHTS_FILE,
    adapter_parameters,
    adapter_shapes,
    add_lora,
    from_bytes,
    initial_adapter,
    load_adapter_,
    resolve_lora,
    run_lora,
    trainable_names,
)
from contract.config import RunConfig
from contract.errors import ModelError
from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk
from contract.partition import quiet_loading
from demo.settings import MODEL_DIR, RUN_CONFIG, SOURCES


@dataclass(frozen=True, slots=True)
class SiteLosses:
    """What the base model and the federated adapter lose on one source's own held-out text of `tokens` tokens."""

    source: str
    tokens: int
    base_loss: float
    federated_loss: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean losses in nats per token over the union of the clients' held-out text, `tokens` in all.

    `alone` holds the loss of each source's lone adapter; `solo_loss` is their mean. `sites` looks at each source alone.
    """

    base_loss: float
    federated_loss: float
    solo_loss: float
    alone: Mapping[str, float]
    tokens: int
    sites: tuple[SiteLosses, ...]

    @property
    def federation_pays(self) -> bool:
        """Whether the federated adapter beats both the base model and the mean of the lone adapters."""
        return self.federated_loss < min(self.base_loss, self.solo_loss)


def compare(
    adapter: Path, config: RunConfig, sources: Sequence[str], tell: Callable[[str], None] = lambda line: None
) -> Comparison:
    """Compares the exported `adapter` of a run by `config`, whose clients held `sources` (files or `stdlib:NAME`).

    `config.model` must be a whole checkpoint. `tell` gets a line after each lone client. Raises ModelError where
    `adapter` is no export of this model's adapter.
    """
    federated = _exported(adapter)
    tokenizer = load_tokenizer(config.model)
    sites = {
        source: load_dataset(source, tokenizer, config.max_length, config.eval_fraction, config.seed)
        for source in sources
    }
    spec = resolve_lora(config.model, run_lora(config))
    first = initial_adapter(adapter_shapes(config.model, spec), config.seed)
    model = add_lora(whole_model(config), spec)
    before = _judge_each(model, first, sites, config)
    after = _judge_each(model, federated, sites, config)
    alone: dict[str, float] = {}
    for source, site in sites.items():
        own = _train_alone(model, first, site, config, source)
        alone[source] = _over_union(_judge_each(model, own, sites, config))
        tell(f"{source} alone: loss {alone[source]:.3f} on everybody's held-out text")
    return Comparison(
        base_loss=_over_union(before),
        federated_loss=_over_union(after),
        solo_loss=sum(alone.values()) / len(alone),
        alone=alone,
        tokens=sum(judgement.tokens for judgement in before.values()),
        sites=tuple(SiteLosses(name, before[name].tokens, before[name].loss, after[name].loss) for name in sites),
    )


def _exported(directory: Path) -> dict[str, Tensor]:
    try:
        return from_bytes((directory / WEIGHTS_FILE).read_bytes())
    except OSError as error:
        raise ModelError(f"{directory}: no exported adapter can be read: {error.strerror or error}") from error


def whole_model(config: RunConfig) -> torch.nn.Module:
    """The un-split base model of a run; none of its weights is trained."""
    with quiet_loading():
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            config.model, dtype=config.dtype, attn_implementation=config.attn_implementation, use_safetensors=True
        )
    return model.requires_grad_(False)


def _train_alone(
    model: PeftModel, first: Mapping[str, Tensor], site: SiteData, config: RunConfig, source: str
) -> dict[str, Tensor]:
    """All of a run's rounds on one site: as in a run, each round starts its optimiser and schedule anew."""
    load_adapter_(model, first)
    live = adapter_parameters(model)
    for number in range(1, config.num_rounds + 1):
        trained = trainable_names(live, trainable_factor(config.aggregation, number))
        for name, parameter in live.items():
            parameter.requires_grad_(name in trained)
        train(model, site.train_rows, config, order_key(config.seed, "solo", number, source))
    return {name: parameter.detach().clone() for name, parameter in live.items()}


def _judge_each(
    model: PeftModel, adapter: Mapping[str, Tensor], sites: Mapping[str, SiteData], config: RunConfig
) -> dict[str, Judgement]:
    """By source: what `adapter` loses on the rows by which that site judges adapters in a run."""
    load_adapter_(model, adapter)
    return {source: judge(model, site.heldout_rows, config) for source, site in sites.items()}


def _over_union(judged: Mapping[str, Judgement]) -> float:
    """Loss per token over all sites' rows."""
    tokens = sum(judgement.tokens for judgement in judged.values())
    return sum(judgement.loss * judgement.tokens for judgement in judged.values()) / tokens


@cli_errors
def main(
    adapter: Annotated[Path, typer.Argument(help="The exported adapter of a demo run.")],
    model: Annotated[Path, typer.Option(help="The whole base model.")] = MODEL_DIR,
    clients: Annotated[int, typer.Option(min=1, help="How many clients the run had.")] = len(SOURCES),
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds it had.")] = int(RUN_CONFIG["num-rounds"]),
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Compare a demo run's adapter with what each client would get alone."""
    config = RunConfig.from_flower({**RUN_CONFIG, "model": str(model), "num-rounds": rounds})
    comparison = compare(adapter, config, SOURCES[:clients], talk)
    emit(comparison, output, title="Loss on everybody's held-out text")


if __name__ == "__main__":
    typer.run(main)
