"""Rows' gradients through a real remote trunk, against a loop that gives each row a batch and a backward of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from clients import bookkeeping, opacus_gradients
from clients.example_gradients import Method, example_gradients
from clients.row_gradients import RowGradients, row_losses, trained_layers
from clients.split_model import remote_layers, trunk_state
from contract.adapter import adapter_parameters
from contract.errors import ConfigError
from contract.records import CutLayers, Factor
from tests.clients.conftest import ALL_LINEAR, opened
from tests.contract.families import attention, batch, save_model
from tests.contract.parity import reference, trained_adapter

ATTENTION = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
LORA = {"mixtral": ATTENTION, "qwen3_moe": ATTENTION}
FAMILIES = ("llama", "gpt2", "gemma3-text", "bloom", "falcon", "mixtral", "qwen3_moe", "phi3", "opt")
METHODS: tuple[Method, ...] = ("book-keeping", "hooks", "ghost")
NOT_BY_OPACUS = "opt"  # it flattens rows and tokens
CUT = CutLayers(1, 1)
ROWS = 4
MOST_ERROR = 1e-5


@dataclass(frozen=True)
class Trunks:
    """Where each family's checkpoint lies, and where its trunk listens, by cut."""

    checkpoints: dict[str, Path]
    addresses: dict[str, str]

    @contextmanager
    def model(
        self, family: str, lora: LoraConfig | None = None, cut: CutLayers = CUT, factor: Factor = "AB", **start: Any
    ) -> Iterator[PeftModel]:
        lora = lora or LORA.get(family, ALL_LINEAR)
        tensors = trained_adapter(self.checkpoints[family], lora)
        with opened(
            self.checkpoints[family],
            self.addresses[f"{family} {cut.head}-{cut.tail}"],
            cut,
            tensors,
            lora,
            attn_implementation=attention(family),
            trainable=factor,
            **{"trunk_frozen": True, **start},
        ) as model:
            yield model


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory, trunk_host: Callable[..., dict[str, str]]) -> Trunks:
    root = tmp_path_factory.mktemp("families")
    # OPT's own layerdrop would draw other layers in the loop than in the batch.
    changes = {"opt": {"layerdrop": 0.0}}
    checkpoints = {family: save_model(family, root / family, **changes.get(family, {})) for family in FAMILIES}
    cells = [(family, CUT) for family in FAMILIES] + [("llama", CutLayers(0, 1)), ("llama", CutLayers(2, 0))]
    return Trunks(
        checkpoints,
        trunk_host(
            {
                f"{family} {cut.head}-{cut.tail}": {
                    "model": str(checkpoints[family]),
                    "attn_implementation": attention(family),
                    "head": cut.head,
                    "tail": cut.tail,
                }
                for family, cut in cells
            }
        ),
    )


def rows(seed: int = 0) -> dict[str, Tensor]:
    """Rows of four lengths, the first tokens of each unlearned."""
    given = batch("none", rows=ROWS, seed=seed)
    lengths = torch.tensor([12, 5, 9, 7])[:, None]
    places = torch.arange(given.input_ids.shape[1])
    mask = (places < lengths).long()
    learned = (places < lengths) & (places >= torch.tensor([0, 1, 4, 2])[:, None])
    return {
        "input_ids": given.input_ids * mask,
        "attention_mask": mask,
        "labels": torch.where(learned, given.input_ids, -100),
    }


def one_by_one(model: nn.Module, given: dict[str, Tensor]) -> npt.NDArray[np.float64]:
    """[B, d]: each row alone, without padding, with the model's own loss."""
    parameters = [value for _, value in sorted(adapter_parameters(model).items()) if value.requires_grad]
    found = []
    for row in range(ROWS):
        length = int(given["attention_mask"][row].sum())
        model.zero_grad()
        model(**{name: tensor[row : row + 1, :length] for name, tensor in given.items()}).loss.backward()
        found.append(np.concatenate([value.grad.double().reshape(-1).numpy() for value in parameters]))
    model.zero_grad()
    return np.stack(found)


def clipped(expected: npt.NDArray[np.float64], clip: float) -> npt.NDArray[np.float64]:
    norms = np.linalg.norm(expected, axis=1, keepdims=True)
    return (expected * np.minimum(1.0, clip / norms)).sum(axis=0)


def error(expected: npt.NDArray[np.float64], got: npt.NDArray[Any]) -> float:
    return float((np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_gradients_equal_a_loop_over_the_rows(trunks: Trunks, family: str) -> None:
    with trunks.model(family) as model:
        expected = one_by_one(model, rows())
        norms = np.sort(np.linalg.norm(expected, axis=1))
        assert norms[0] > 0
        for method in METHODS if family != NOT_BY_OPACUS else METHODS[:1]:
            with example_gradients(model, method) as gradients:
                if method != "ghost":
                    microbatch = gradients.forward(rows())
                    assert isinstance(microbatch, RowGradients)
                    assert error(expected, microbatch.rows()) < MOST_ERROR, method
                for clip in (norms[0] / 2, (norms[1] + norms[2]) / 2, 10 * norms[-1]):
                    got = gradients.forward(rows()).clipped_sum(clip)
                    assert error(clipped(expected, clip), got) < MOST_ERROR, f"{method} at {clip}"
            assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize(
    ("cut", "factor"), [(CutLayers(0, 1), "B"), (CutLayers(2, 0), "A")], ids=["no head, B", "no tail, A"]
)
def test_other_cuts_and_single_factors_are_no_less_right(trunks: Trunks, cut: CutLayers, factor: Factor) -> None:
    with trunks.model("llama", cut=cut, factor=factor) as model:
        expected = one_by_one(model, rows())
        clip = float(np.median(np.linalg.norm(expected, axis=1)))
        for method in METHODS:
            with example_gradients(model, method) as gradients:
                got = gradients.forward(rows()).clipped_sum(clip)
                assert error(clipped(expected, clip), got) < MOST_ERROR, method
        sent = remote_layers(model).trunk.wire_log.summary()
        assert ("trunk.backward" in sent) == (cut.head > 0)  # none is asked for where no layer would take it


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_trunk_gets_the_gradient_of_the_rows_losses_once(trunks: Trunks, method: Method) -> None:
    with trunks.model("llama", trunk_frozen=False) as model:
        for row in range(ROWS):
            model(**{name: tensor[row : row + 1] for name, tensor in rows().items()}).loss.backward()
        expected = trunk_state(model, gradients=True)
        norm = float(remote_layers(model).anchor.grad)
        model.zero_grad()
        sent = sent_bytes(model)
        with example_gradients(model, method) as gradients:
            assert sent_bytes(model) == sent  # proved without a word to the trunk
            gradients.forward(rows()).clipped_sum(1e-3)
            got = trunk_state(model, gradients=True)
            assert float(remote_layers(model).anchor.grad) == pytest.approx(norm, rel=1e-5)
            assert remote_layers(model).anchor.requires_grad
        for name, value in expected.items():
            assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-6 * norm), name


def sent_bytes(model: nn.Module) -> int:
    return remote_layers(model).trunk.wire_log.sent_bytes


def test_all_ways_cross_the_wire_once(trunks: Trunks) -> None:
    sizes = []
    with trunks.model("llama") as model:
        for method in METHODS:
            with example_gradients(model, method) as gradients:
                before = sent_bytes(model)
                gradients.forward(rows()).clipped_sum(1.0)
                sizes.append(sent_bytes(model) - before)
    assert len(set(sizes)) == 1, dict(zip(METHODS, sizes, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_dropout_falls_in_rows_gradients_as_it_does_in_the_forward(trunks: Trunks, method: Method) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["v_proj", "down_proj"])
    model = whole_model(trunks.checkpoints["llama"], lora)
    with example_gradients(model, method) as gradients:
        model.train()
        torch.manual_seed(5)
        got = gradients.forward(rows()).clipped_sum(1e9)
    torch.manual_seed(5)
    row_losses(model, rows()).sum().backward()
    parameters = [value for _, value in sorted(adapter_parameters(model).items())]
    expected = np.concatenate([value.grad.double().reshape(-1).numpy() for value in parameters])
    assert error(expected, got) < MOST_ERROR


# ---- several in flight ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first first", "last first"])
def test_book_keeping_keeps_two_microbatches_apart_in_both_orders(trunks: Trunks, order: tuple[int, int]) -> None:
    with trunks.model("llama") as model:
        given = [rows(seed=1), rows(seed=2)]
        expected = [one_by_one(model, each) for each in given]
        with example_gradients(model, "book-keeping") as gradients:
            waiting = [gradients.forward(each) for each in given]
            for index in order:
                microbatch = waiting[index]
                assert isinstance(microbatch, RowGradients)
                assert error(expected[index], microbatch.rows()) < MOST_ERROR
        assert error(expected[0], expected[1]) > 0.1  # the two could be told apart


@pytest.mark.parametrize("method", ["hooks", "ghost"])
def test_opacus_is_given_one_microbatch_at_a_time(trunks: Trunks, method: Method) -> None:
    with trunks.model("llama") as model, example_gradients(model, method) as gradients:
        waiting = gradients.forward(rows(seed=1))
        with pytest.raises(ConfigError, match=f"dp-gradients is {method}, which can hold one microbatch at a time"):
            gradients.forward(rows(seed=2))
        assert waiting.clipped_sum(1.0).any()
        assert gradients.forward(rows(seed=2)).clipped_sum(1.0).any()


def test_opacus_alone_would_mix_two_microbatches(trunks: Trunks, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the refusal above is for."""
    monkeypatch.setattr(opacus_gradients._OneWaiting, "begin", lambda self: [layer.train() for layer in self._layers])
    with trunks.model("llama") as model:
        expected = one_by_one(model, rows(seed=1))
        with example_gradients(model, "hooks") as gradients:
            first = gradients.forward(rows(seed=1))
            gradients.forward(rows(seed=2))
            assert isinstance(first, RowGradients)
            assert error(expected, first.rows()) > 0.1


# ---- what is caught before training --------------------------------------------------------------------------------


@pytest.fixture
def whole(trunks: Trunks) -> PeftModel:
    return whole_model(trunks.checkpoints["llama"], ALL_LINEAR)


def whole_model(checkpoint: Path, lora: LoraConfig, family: str = "llama") -> PeftModel:
    return reference(checkpoint, lora, trained_adapter(checkpoint, lora), attention(family))


@pytest.mark.parametrize("method", ["hooks", "ghost"])
def test_a_wrong_loss_reduction_is_caught(whole: PeftModel, monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    monkeypatch.setattr(opacus_gradients, "_REDUCTION", "mean")
    with pytest.raises(ConfigError, match=r"on made-up rows the clipped gradients' sum is off by"):
        with example_gradients(whole, method):
            pytest.fail("training would have begun")
    assert not any(hasattr(value, "grad_sample") for value in whole.parameters())


def mean_losses(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The mistake: each row's loss over the tokens of all."""
    output = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    losses = nn.functional.cross_entropy(output.logits[:, :-1].mT, given["labels"][:, 1:], reduction="none")
    return losses.sum(dim=1) / (given["labels"][:, 1:] != -100).sum()


def test_a_loss_that_depends_on_the_other_rows_is_caught(whole: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookkeeping, "row_losses", mean_losses)
    with pytest.raises(ConfigError, match="on made-up rows"):
        with example_gradients(whole, "book-keeping"):
            pytest.fail("training would have begun")


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_mixes_rows_is_caught(whole: PeftModel, method: Method) -> None:
    block = whole.get_base_model().model.layers[2]
    block.register_forward_hook(lambda _, args, output: output + 0.1 * output.mean(dim=0, keepdim=True))
    with pytest.raises(ConfigError, match="on made-up rows"):
        with example_gradients(whole, method):
            pytest.fail("training would have begun")


def test_the_proof_leaves_the_model_as_it_was(whole: PeftModel) -> None:
    before = {name: value.detach().clone() for name, value in adapter_parameters(whole).items()}
    whole.train()
    with example_gradients(whole, "book-keeping"):
        pass
    assert whole.training
    assert all(torch.equal(value, before[name]) for name, value in adapter_parameters(whole).items())
    assert all(value.grad is None for value in whole.parameters())


def test_flattened_rows_are_refused_where_opacus_cannot_tell_them_apart(trunks: Trunks) -> None:
    whole = whole_model(trunks.checkpoints["opt"], ALL_LINEAR, "opt")
    for method in ("hooks", "ghost"):
        with pytest.raises(ConfigError, match=r"fc1\.lora_A.* sees rows and tokens as one.*book-keeping"):
            with example_gradients(whole, method):
                pytest.fail("training would have begun")


REFUSED = {
    "fused experts": (
        "mixtral",
        ALL_LINEAR,
        "LoRA on a bare parameter, as fused experts are, cannot",
    ),
    "dora": ("llama", LoraConfig(r=2, use_dora=True, target_modules=["v_proj"]), r"v_proj: LoRA on DoRA"),
    "embedding": ("llama", LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"]), "LoRA on an embedding"),
    "more than the adapter": (
        "llama",
        LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]),
        "lm_head.* is trained and no part of the adapter",
    ),
    "a bias": (
        "llama",
        LoraConfig(r=2, target_modules=["v_proj"], lora_bias=True),
        r"lora_B\.bias is no linear layer's weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_proved_is_refused_by_name(trunks: Trunks, case: str) -> None:
    family, lora, reason = REFUSED[case]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(trunks.checkpoints[family]), copy.deepcopy(lora))
    with pytest.raises(ConfigError, match=reason):
        trained_layers(model)


def test_a_client_half_that_trains_nothing_is_refused(whole: PeftModel) -> None:
    for value in whole.parameters():
        value.requires_grad_(False)
    with pytest.raises(ConfigError, match="hold nothing that is trained"):
        trained_layers(whole)


def test_a_layer_that_takes_part_twice_is_refused(whole: PeftModel) -> None:
    layers = whole.get_base_model().model.layers
    layers[2] = layers[1]
    with pytest.raises(ConfigError, match="takes part twice in one pass"):
        with example_gradients(whole, "book-keeping"):
            pytest.fail("training would have begun")


def test_gradient_checkpointing_is_refused(whole: PeftModel) -> None:
    whole.enable_input_require_grads()
    whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with example_gradients(whole, "book-keeping") as gradients:  # its proof runs without
        whole.train()
        with pytest.raises(ConfigError, match="cannot use gradient checkpointing"):
            gradients.forward(rows())
