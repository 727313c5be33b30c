"""Trains the demo's base model: `python -m demo.pretrain --out demo/model`.

A byte-level BPE tokenizer and a Llama-class causal LM of 4.6 M parameters, both from `demo.corpus` alone, so that
fine-tuning on the clients' domains starts from a model that knows Python but not their modules. The model is judged on
documents that it never trains on; `pretraining.json` beside the weights says what it reached and how.

Weights are stored in bfloat16 safetensors, and judged as stored. The committed settings take about half an hour on two
CPU cores, minutes on a GPU; with the same seed, different machines reach nearly, not exactly, the same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clients.stdlib_text import Document
from demo.corpus import pretraining_documents

VOCABULARY = 4096
MAX_POSITIONS = 512
END = "<|endoftext|>"
TURN_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# The base model has seen no chat; the template lets a user's chat rows be tried on it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, beside the text."""

    seed: int = 0
    steps: int = 900
    batch_size: int = 16
    sequence_length: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    heldout_fraction: float = 0.03


@dataclass(frozen=True)
class TokenStreams:
    """Documents as two int64 streams, each document ended by the end-of-text token."""

    train_T: torch.Tensor
    heldout_T: torch.Tensor


def train_tokenizer(documents: Sequence[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens; any text is encoded without loss."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, *TURN_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((document.text for document in documents), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=list(TURN_TOKENS),
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def is_heldout(document: Document, recipe: Recipe) -> bool:
    """Whether `document` only judges the model: by the hash of its module's name."""
    digest = hashlib.sha256(document.module.encode()).digest()
    return int.from_bytes(digest[:8], "big") < recipe.heldout_fraction * 2**64


def split_streams(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> TokenStreams:
    """The documents' tokens, each document on one side as a whole."""
    streams: dict[bool, list[int]] = {True: [], False: []}
    shuffled = list(documents)
    random.Random(recipe.seed).shuffle(shuffled)
    end = tokenizer.convert_tokens_to_ids(END)
    for document in shuffled:
        streams[is_heldout(document, recipe)] += [
            *tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"],
            end,
        ]
    return TokenStreams(torch.tensor(streams[False]), torch.tensor(streams[True]))


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The model with random weights, float32."""
    end = tokenizer.convert_tokens_to_ids(END)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model


def train(
    model: LlamaForCausalLM, streams: TokenStreams, recipe: Recipe, device: torch.device
) -> list[dict[str, float]]:
    """Train in place; the curve of training and held-out loss in nats per token, twelve points.

    AdamW, linear warm-up, cosine to a hundredth, gradients clipped at norm 1, bfloat16 autocast.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = _training_batches(streams.train_T, recipe, generator)
    curve: list[dict[str, float]] = []
    recent: list[torch.Tensor] = []
    model.train()
    for step in range(1, recipe.steps + 1):
        tokens_BT = next(batches).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        if step % max(1, recipe.steps // 12) == 0 or step == recipe.steps:
            point = {
                "step": step,
                "train_loss": round(float(torch.stack(recent).mean()), 4),
                "heldout_loss": round(judge(model, streams.heldout_T, recipe, device), 4),
            }
            curve.append(point)
            recent.clear()
            typer.echo(json.dumps(point), err=True)
    return curve


def judge(model: LlamaForCausalLM, stream_T: torch.Tensor, recipe: Recipe, device: torch.device) -> float:
    """Mean loss in nats per token over whole windows of `stream_T`."""
    length = recipe.sequence_length
    windows = stream_T[: len(stream_T) // length * length].view(-1, length)
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for tokens_BT in torch.split(windows, recipe.batch_size):
            tokens_BT = tokens_BT.to(device)
            total += float(model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss) * len(tokens_BT)
    model.train(was_training)
    return total / len(windows)


def _rate(step: int, recipe: Recipe) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    progress = max(0.0, (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps))
    return warm * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def _training_batches(stream_T: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches of windows; each epoch cuts them at another offset and draws another order."""
    length = recipe.sequence_length
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        usable_T = stream_T[offset:]
        windows = usable_T[: len(usable_T) // length * length].view(-1, length)
        order = torch.randperm(len(windows), generator=generator)
        for chosen in torch.split(order, recipe.batch_size):
            if len(chosen) == recipe.batch_size:
                yield windows[chosen]


def main(
    out: Annotated[Path, typer.Option(help="Directory for the model, the tokenizer and pretraining.json.")],
    stdlib: Annotated[Path | None, typer.Option(help="A standard library to read instead of this Python's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = Recipe.steps,
    seed: Annotated[int, typer.Option(help="Decides initial weights and the order of text.")] = Recipe.seed,
) -> None:
    """Train the demo's tokenizer and base model and write them to OUT."""
    recipe = Recipe(seed=seed, steps=steps)
    documents = pretraining_documents(stdlib)
    tokenizer = train_tokenizer(documents)
    tokenizer.save_pretrained(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    streams = split_streams(documents, tokenizer, recipe)
    typer.echo(f"{len(streams.train_T)} tokens to learn, {len(streams.heldout_T)} held out, on {device}", err=True)
    torch.manual_seed(seed)
    model = build_model(tokenizer)
    model.to(device)
    started = time.monotonic()
    curve = train(model, streams, recipe, device)
    seconds = time.monotonic() - started
    model.to(torch.bfloat16).save_pretrained(out)
    model.to(torch.float32)
    report = {
        "command": " ".join(["python -m demo.pretrain", *sys.argv[1:]]),
        "recipe": asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "documents": len(documents),
        "train_tokens": len(streams.train_T),
        "heldout_tokens": len(streams.heldout_T),
        "epochs": round(steps * recipe.batch_size * recipe.sequence_length / len(streams.train_T), 2),
        "train_loss": curve[-1]["train_loss"],
        "heldout_loss": round(judge(model, streams.heldout_T, recipe, device), 4),
        "loss_unit": "nats per token; held-out as stored in bfloat16, over whole documents never trained on",
        "seconds": round(seconds),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "curve": curve,
    }
    (out / "pretraining.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
