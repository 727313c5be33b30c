"""The settings of one run: frozen, typed, the same for the orchestrator and for every client.

They come from `[tool.flwr.app.config]` in pyproject.toml with `flwr run --run-config` on top. Keys are kebab-case there
and snake_case here. What Hugging Face or PEFT has a name for keeps that name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from contract.addresses import trunk_addresses
from contract.determinism import check_deterministic
from contract.errors import ConfigError
from contract.privacy_settings import check_privacy
from contract.records import LARGEST_CLIP, MOST_TOKENS, SMALLEST_CLIP, CutLayers, gradient_codec
from contract.setting import ConfigValue as ConfigValue
from contract.setting import key_of, setting, wanted
from contract.trunk_arithmetic import TrunkArithmetic

MODEL_SECTION, SPLIT_SECTION, ROUNDS_SECTION = "Model and data", "The split", "Rounds"
AGGREGATION_SECTION, TRAINING_SECTION, LORA_SECTION = "Averaging", "Training on a client", "The adapter"
PRIVACY_SECTION = "Privacy"


class RunConfig(BaseModel):
    """Every setting of a run; build it with `RunConfig.from_flower`, whose errors name the key as a user writes it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        alias_generator=key_of,
        validate_by_name=True,
        protected_namespaces=(),
    )

    model: str = setting(
        "",
        MODEL_SECTION,
        "Checkpoint directory as the orchestrator sees it; it needs no more than config.json. "
        "Clients take theirs from the node config, and in a simulation from here.",
    )
    data: str = setting(
        "",
        MODEL_SECTION,
        "A simulation's training text: a file whose `{partition}` becomes the client's number, or `stdlib:NAME`. "
        "Real clients take theirs from the node config.",
    )
    max_length: int = setting(128, MODEL_SECTION, "Tokens per row; longer rows are cut.", ge=2)
    eval_fraction: float = setting(
        0.1, MODEL_SECTION, "Share of a client's rows held out to judge adapters; 0 judges nothing.", ge=0.0, lt=1.0
    )
    eval_batches: int = setting(0, MODEL_SECTION, "Most held-out batches judged per round; 0 means all.", ge=0)

    trunk_address: str = setting(
        "127.0.0.1:50051",
        SPLIT_SECTION,
        "HOST:PORT of the trunk as the orchestrator reaches it, or of several replicas of it, parted by commas; a "
        "deployed client's node config names its own way.",
    )
    head_layers: int = setting(1, SPLIT_SECTION, "Decoder layers on the client before the trunk.", ge=0)
    tail_layers: int = setting(1, SPLIT_SECTION, "Decoder layers on the client after the trunk.", ge=0)
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", SPLIT_SECTION, "Type of the frozen weights on both sides; adapters are always float32."
    )
    attn_implementation: Literal["sdpa", "eager"] = setting(
        "sdpa", SPLIT_SECTION, "Attention on both sides; another one gives other bits."
    )
    codec: Literal["identity", "bf16", "fp16", "int8", "int4-delta", "auto"] = setting(
        "identity",
        SPLIT_SECTION,
        "Encoding of activations on the wire; `identity` loses nothing, `int4-delta` sends what changed since a row "
        "went before, `auto` picks identity, bf16 or int8 by the measured link: no two runs need give the same bits.",
    )
    codec_backward: Literal["same", "identity", "bf16", "fp16", "int8", "auto"] = setting(
        "same",
        SPLIT_SECTION,
        "Encoding of gradients on the wire; `same` takes what `codec` says, int8 for `int4-delta`.",
    )
    trunk_autocast: Literal["off", "bfloat16", "auto"] = setting(
        "off",
        SPLIT_SECTION,
        "What the trunk computes in: `bfloat16` by autocast, which is faster where the processor has it, and no longer "
        "equals un-split training in float32; `auto` where the trunk found at its start that this gains.",
    )
    deterministic: bool = setting(
        False,
        SPLIT_SECTION,
        "The same clients, machines and settings give the same bits, in a run that was resumed too: the trunk takes "
        "no client into a pass with another and computes with all its threads, and batches are drawn by site names, "
        "not by Flower's ids. Slower with several clients.",
    )

    num_rounds: int = setting(3, ROUNDS_SECTION, "Rounds to commit.", ge=1)
    cohort_size: int = setting(
        0, ROUNDS_SECTION, "Clients asked in a round, drawn from those connected; 0 asks all.", ge=0
    )
    quorum: int = setting(
        2,
        ROUNDS_SECTION,
        "Fewest clients whose updates make a round; a run also waits for this many before it starts.",
        ge=1,
    )
    node_wait_s: float = setting(
        120.0, ROUNDS_SECTION, "Seconds to wait for enough connected clients before the run fails.", gt=0.0
    )
    round_timeout_s: float = setting(
        600.0,
        ROUNDS_SECTION,
        "Seconds without progress (a reply, or work seen by the trunk) after which missing clients count as late.",
        gt=0.0,
    )
    trunk_retries: int = setting(
        2,
        ROUNDS_SECTION,
        "How often a client whose trunk was lost begins its round again, before it drops out; with `dp` or `wire` it "
        "does so only until its session is open, since rows sent again under other noise show more of themselves.",
        ge=0,
    )
    trunk_wait_s: float = setting(
        120.0, ROUNDS_SECTION, "Seconds that clients and orchestrator wait for a lost trunk to serve again.", gt=0.0
    )
    early_stopping_patience: int = setting(
        0, ROUNDS_SECTION, "Rounds without a lower held-out loss before the run stops; 0 never stops early.", ge=0
    )
    seed: int = setting(0, ROUNDS_SECTION, "Seed of the first adapter, the cohorts and the data order.", ge=0, lt=2**32)

    resume_run: str = setting(
        "",
        ROUNDS_SECTION,
        "Id of a run to go on with from its last committed round; `trunkline runs resume` sets it.",
    )

    aggregation: Literal["ffa", "fedavg", "rolora"] = setting(
        "ffa",
        AGGREGATION_SECTION,
        "`ffa` freezes A and averages B (exact); `rolora` alternates, B first (exact); "
        "`fedavg` averages A and B apart (biased: the mean of products is not the product of means).",
    )
    secagg: Literal["on", "off"] = setting(
        "on",
        AGGREGATION_SECTION,
        "`on`: secure sums, of which the orchestrator learns totals over at least a threshold of clients and no "
        "client's update, loss or count; `off`, for debugging: it sees each client's.",
    )
    secagg_threshold: int = setting(
        0,
        AGGREGATION_SECTION,
        "Clients that a secure sum over N needs to its end; 0 takes floor(2N/3) + 1, and above 128 clients what "
        "`trunkline secagg plan` prints.",
        ge=0,
    )
    secagg_aborts: int = setting(
        3,
        AGGREGATION_SECTION,
        "Attempts at one round that may be aborted in a row under `secagg`, each tried again with fresh secrets; one "
        "more ends the run.",
        ge=0,
    )
    secagg_stage_timeout_s: float = setting(
        60.0,
        AGGREGATION_SECTION,
        "Seconds without any reply after which clients count as gone in a secure sum's stages, its training aside.",
        gt=0.0,
    )
    update_clip: float = setting(
        1.0,
        AGGREGATION_SECTION,
        "Largest change of one adapter value in a round; a client whose update exceeds it sends nothing and says so.",
        gt=0.0,
    )
    max_tokens: int = setting(
        0,
        AGGREGATION_SECTION,
        "Most tokens one client trains on in a round; fixes the scale of the fixed point. 0 takes "
        "local-steps x gradient-accumulation-steps x per-device-train-batch-size x max-length. "
        "Must be set when `local-steps` is 0.",
        ge=0,
    )

    dp: Literal["off", "client", "example"] = setting(
        "off",
        PRIVACY_SECTION,
        "Differential privacy of what is averaged: `client` hides whether all of a client's text was there, by noise "
        "shares in the secure sum; `example` whether one row was, by DP-SGD at the client; `off` hides neither.",
    )
    dp_epsilon: float = setting(
        8.0, PRIVACY_SECTION, "What a unit may spend in this run, against each adversary by itself.", gt=0.0
    )
    dp_delta: float = setting(
        1e-5,
        PRIVACY_SECTION,
        "The chance at which epsilon may not hold; one of a hundredth could lay every hundredth unit open.",
        gt=0.0,
        lt=0.01,
    )
    dp_noise_multiplier: float = setting(
        1.0,
        PRIVACY_SECTION,
        "Standard deviation of the noise over `dp-clip`: in a round's sum for `client`, in each step's for `example`. "
        "`trunkline budget plan` calibrates it.",
        gt=0.0,
    )
    dp_clip: float = setting(
        1.0,
        PRIVACY_SECTION,
        "L2 norm that a client's update (`client`) or a row's gradient (`example`) is cut to.",
        gt=0.0,
    )
    dp_colluders: int = setting(
        1,
        PRIVACY_SECTION,
        "For `client`: how many clients may tell the orchestrator their noise. Each share is made larger for it. One "
        "at least: every client knows its own.",
        ge=1,
    )
    dp_sample_rate: float = setting(
        0.05,
        PRIVACY_SECTION,
        "For `example`: the chance with which each row takes part in a step, drawn in secret at the client.",
        gt=0.0,
        le=1.0,
    )
    dp_gradients: Literal["book-keeping", "hooks", "ghost"] = setting(
        "book-keeping",
        PRIVACY_SECTION,
        "For `example`: how a row's gradient is got at. `hooks` and `ghost` are Opacus's; "
        "`book-keeping` needs neither the memory of `hooks` nor the second backward of `ghost`.",
    )
    trunk_adapter: Literal["trained", "frozen"] = setting(
        "trained",
        PRIVACY_SECTION,
        "`frozen`: the trunk's half of the adapter stays as it began. Under `dp` it must, unless `wire` is `dp` too.",
    )
    metrics: Literal["sum", "off"] = setting(
        "sum",
        PRIVACY_SECTION,
        "`sum`: losses and counts are told as totals, without noise: the orchestrator then gets no epsilon; `off`: "
        "nobody judges, and none are told.",
    )
    wire: Literal["off", "empirical", "dp"] = setting(
        "off",
        PRIVACY_SECTION,
        "What the trunk can read: `off`, the text; `empirical`, noise or masking that `trunkline audit run` measures, "
        'without an epsilon; `dp`, clipped and noised rows with an epsilon (needs `dp="example"`).',
    )
    wire_clip_forward: float = setting(
        1.0, PRIVACY_SECTION, 'For `wire="dp"`: norm that a row\'s activations are cut to.', gt=0.0
    )
    wire_clip_backward: float = setting(
        0.01, PRIVACY_SECTION, 'For `wire="dp"`: norm that a row\'s gradient at the tail cut is cut to.', gt=0.0
    )
    wire_noise_multiplier: float = setting(
        5.0, PRIVACY_SECTION, 'For `wire="dp"`: standard deviation of the noise over each of the two clips.', gt=0.0
    )
    wire_releases: int = setting(
        1, PRIVACY_SECTION, 'For `wire="dp"`: how often a row may be sent in a round; the client keeps to it.', ge=1
    )
    wire_noise: float = setting(
        0.0,
        PRIVACY_SECTION,
        'For `wire="empirical"`: standard deviation of the noise over a row\'s root mean square.',
        ge=0.0,
    )
    gradient_mask: Literal["none", "random", "top-k"] = setting(
        "none",
        PRIVACY_SECTION,
        'For `wire="empirical"`: which values of the gradient at the tail cut are sent; what is held back is added '
        "to the same row's next gradient.",
    )
    gradient_mask_keep: float = setting(
        0.1, PRIVACY_SECTION, "Share of the values that `gradient-mask` lets pass.", gt=0.0, le=1.0
    )
    wire_length_bucket: int = setting(
        0,
        PRIVACY_SECTION,
        "Rows are sent as long as the next multiple of this many tokens; `max-length` hides lengths; 0 shows them.",
        ge=0,
    )

    local_steps: int = setting(
        10, TRAINING_SECTION, "Optimiser steps of a client in a round; 0 counts epochs instead.", ge=0
    )
    local_epochs: int = setting(
        1, TRAINING_SECTION, "Passes over a client's rows in a round when `local-steps` is 0.", ge=1
    )
    per_device_train_batch_size: int = setting(8, TRAINING_SECTION, "Rows per microbatch.", ge=1)
    gradient_accumulation_steps: int = setting(1, TRAINING_SECTION, "Microbatches per optimiser step.", ge=1)
    pipeline_depth: int = setting(
        0,
        TRAINING_SECTION,
        "Most microbatches of a step under way at once, so that link and trunk work while the client computes; the "
        "result is the same. 0 adapts to the round trip, 1 waits for each. DP-SGD always waits.",
        ge=0,
    )
    learning_rate: float = setting(2e-4, TRAINING_SECTION, "Peak learning rate of AdamW on both sides.", gt=0.0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = setting(
        "constant", TRAINING_SECTION, "Learning rate over the steps of one round, after the warm-up."
    )
    warmup_ratio: float = setting(
        0.0, TRAINING_SECTION, "Share of a round's steps that warm the learning rate up.", ge=0.0, lt=1.0
    )
    weight_decay: float = setting(0.0, TRAINING_SECTION, "AdamW's weight decay.", ge=0.0)
    adam_beta1: float = setting(0.9, TRAINING_SECTION, "AdamW's first moment decay.", ge=0.0, lt=1.0)
    adam_beta2: float = setting(0.999, TRAINING_SECTION, "AdamW's second moment decay.", ge=0.0, lt=1.0)
    adam_epsilon: float = setting(1e-8, TRAINING_SECTION, "AdamW's term against division by zero.", gt=0.0)
    max_grad_norm: float = setting(
        1.0,
        TRAINING_SECTION,
        "Gradient norm over client and trunk together is clipped to this; 0: never.",
        ge=0.0,
    )
    threads: int = setting(0, TRAINING_SECTION, "Torch threads of a client; 0 leaves torch's own choice.", ge=0)

    lora_r: int = setting(8, LORA_SECTION, "Rank of the adapter.", ge=1)
    lora_alpha: float = setting(16.0, LORA_SECTION, "Scale of the adapter, divided by its rank.", gt=0.0)
    lora_dropout: float = setting(0.0, LORA_SECTION, "Dropout on the adapter's input.", ge=0.0, lt=1.0)
    use_rslora: bool = setting(False, LORA_SECTION, "Divide the scale by the root of the rank instead.")
    target_modules: str = setting(
        "all-linear", LORA_SECTION, "`all-linear`, or names of modules to adapt, parted by commas."
    )

    @model_validator(mode="after")
    def _check_together(self) -> RunConfig:
        trunk_addresses(self.trunk_address)
        if 0 < self.cohort_size < self.quorum:
            raise ConfigError(
                f"cohort-size is {self.cohort_size} and quorum is {self.quorum}; "
                "a round cannot have more survivors than clients asked: quorum must be at most cohort-size"
            )
        if self.secagg == "on" and self.cohort_size == 1:
            raise ConfigError("cohort-size is 1 and secagg is on; a sum over one client hides nothing: at least 2")
        if self.early_stopping_patience and self.metrics == "off":
            raise ConfigError(
                f"early-stopping-patience is {self.early_stopping_patience} but metrics is off; "
                "early stopping needs losses: metrics must be sum"
            )
        if self.early_stopping_patience and not self.eval_fraction:
            raise ConfigError(
                f"early-stopping-patience is {self.early_stopping_patience} but eval-fraction is 0; "
                "early stopping needs held-out rows: eval-fraction must be above 0"
            )
        if not self.local_steps and not self.max_tokens:
            raise ConfigError(
                "local-steps is 0 and max-tokens is 0; a round counted in epochs needs a bound on a client's tokens: "
                "set max-tokens to the size of the largest client's data times local-epochs"
            )
        together, most = max(self.cohort_size, self.quorum), self.max_weight()
        if most * together >= MOST_TOKENS:
            key = "max-tokens" if self.max_tokens else "local-steps x batch size x max-length"
            raise ConfigError(
                f"{key} lets a client train on {most} tokens in a round, and {together} clients on {most * together}; "
                f"a round's sum holds fewer than {MOST_TOKENS}"
            )
        if not SMALLEST_CLIP <= self.update_clip <= LARGEST_CLIP:
            raise ConfigError(
                f"update-clip is {self.update_clip:g}; it must be {SMALLEST_CLIP:.0e} to {LARGEST_CLIP:.0e}"
            )
        check_privacy(self)
        check_deterministic(self)
        if self.target_modules != "all-linear" and not all(self.target_module_names()):
            raise ConfigError(
                f"target-modules is {self.target_modules!r}; it must be all-linear or names parted by commas"
            )
        return self

    @classmethod
    def from_flower(cls, values: Mapping[str, ConfigValue]) -> RunConfig:
        """The settings in `values` (kebab-case keys) over the defaults.

        Raises ConfigError naming the first key that is unknown, of the wrong type, out of its limits, or impossible
        together with another.
        """
        unknown = sorted(set(values) - set(cls.keys()))
        if unknown:
            raise ConfigError(f"unknown config key {unknown[0]!r}; {_nearest(unknown[0], cls.keys())}")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_describe(error.errors()[0])) from error

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """Every key as a user writes it, in the order of the documentation."""
        return tuple(key_of(name) for name in cls.model_fields)

    def to_flower(self) -> dict[str, ConfigValue]:
        """Every setting with its kebab-case key; `from_flower` reads it back unchanged."""
        return self.model_dump(by_alias=True)

    def sha256(self) -> str:
        """The hash of every setting, by which two parties know that theirs are the same."""
        return hashlib.sha256(json.dumps(self.to_flower(), sort_keys=True).encode()).hexdigest()

    @property
    def cut(self) -> CutLayers:
        return CutLayers(self.head_layers, self.tail_layers)

    @property
    def gradient_codec(self) -> str:
        """What `codec-backward` comes to."""
        return gradient_codec(self.codec, self.codec_backward)

    @property
    def trunk_arithmetic(self) -> TrunkArithmetic:
        return TrunkArithmetic(self.trunk_autocast, self.deterministic)

    def target_module_names(self) -> tuple[str, ...]:
        """`target-modules` as single names, `("all-linear",)` for that."""
        return tuple(name.strip() for name in self.target_modules.split(","))

    def max_weight(self) -> int:
        """The largest weight of a client in an average: its trained tokens, or 1 where all must count alike."""
        return 1 if self.dp != "off" else self.max_trained_tokens()

    def max_trained_tokens(self) -> int:
        """Upper bound of the tokens that one client trains on in one round."""
        if self.max_tokens:
            return self.max_tokens
        rows = self.local_steps * self.gradient_accumulation_steps * self.per_device_train_batch_size
        return rows * self.max_length


def _describe(problem: ErrorDetails) -> str:
    """One line for pydantic's first complaint: key, what it got, what it wants."""
    key = str(problem["loc"][0])
    field = RunConfig.model_fields[key.replace("-", "_")]
    return f"{key} is {problem['input']!r}; it must be {wanted(field.annotation, field.metadata)}"


def _nearest(key: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "docs/configuration.md lists every key"
