"""The settings of a run: what is accepted, what is refused and how it is named."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from contract.config import ConfigValue, RunConfig
from contract.config_schema import schema_rows
from contract.errors import ConfigError
from orchestrator import config_docs

REPOSITORY = Path(__file__).parents[2]
FROZEN: dict[str, ConfigValue] = {"trunk-adapter": "frozen"}


def test_defaults_survive_the_way_through_flower() -> None:
    config = RunConfig.from_flower({})
    assert RunConfig.from_flower(config.to_flower()) == config
    assert set(config.to_flower()) == set(RunConfig.keys()) == {row.key for row in schema_rows()}


def test_a_run_config_cannot_change_under_way() -> None:
    with pytest.raises(ValidationError):
        RunConfig.from_flower({}).quorum = 1  # type: ignore[misc]


def test_a_whole_number_is_taken_where_a_number_is_wanted() -> None:
    assert RunConfig.from_flower({"learning-rate": 1}).learning_rate == 1.0


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num-round": 3}, "unknown config key 'num-round'; did you mean 'num-rounds'?"),
        ({"learning_rate": 0.1}, "unknown config key 'learning_rate'; did you mean 'learning-rate'?"),
        ({"zzz": 3}, "unknown config key 'zzz'; docs/configuration.md lists every key"),
        ({"num-rounds": "3"}, "num-rounds is '3'; it must be a whole number, >= 1"),
        ({"num-rounds": True}, "num-rounds is True; it must be a whole number, >= 1"),
        ({"num-rounds": 2.5}, "num-rounds is 2.5; it must be a whole number, >= 1"),
        ({"use-rslora": 1}, "use-rslora is 1; it must be true or false"),
        ({"model": 7}, "model is 7; it must be text"),
        ({"learning-rate": float("nan")}, "learning-rate is nan; it must be a number, > 0.0"),
        ({"lora-dropout": 1.0}, "lora-dropout is 1.0; it must be a number, >= 0.0, < 1.0"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be float32 or bfloat16"),
        ({"trunk-address": "trunk"}, "trunk-address is 'trunk'; it must be HOST:PORT"),
        ({"max-tokens": 2**31}, "max-tokens lets a client train on 2147483648 tokens in a round, and 2 clients on"),
        ({"local-steps": 10**6, "max-length": 4096}, "local-steps x batch size x max-length lets a client train on"),
        ({"update-clip": 1e-13}, "update-clip is 1e-13; it must be 9e-13 to 1e+12"),
        ({"trunk-address": "trunk:0"}, "trunk-address is 'trunk:0'; it must be HOST:PORT"),
        ({"trunk-address": "trunk:65536"}, "trunk-address is 'trunk:65536'; it must be HOST:PORT"),
        ({"cohort-size": 2, "quorum": 3}, "cohort-size is 2 and quorum is 3; "),
        ({"early-stopping-patience": 1, "eval-fraction": 0}, "early-stopping-patience is 1 but eval-fraction is 0; "),
        ({"local-steps": 0}, "local-steps is 0 and max-tokens is 0; "),
        ({"target-modules": "q_proj,,v_proj"}, "target-modules is 'q_proj,,v_proj'; "),
        ({"target-modules": ""}, "target-modules is ''; "),
        ({"early-stopping-patience": 1, "metrics": "off"}, "early-stopping-patience is 1 but metrics is off; "),
        ({"dp": "client", "secagg": "off"}, "dp is client and secagg is off; "),
        ({"dp": "client"}, "dp is client and trunk-adapter is trained; "),
        ({"dp": "example"}, "dp is example and trunk-adapter is trained; "),
        ({**FROZEN, "dp": "example", "local-steps": 0, "max-tokens": 9}, "dp is example and local-steps is 0; "),
        ({**FROZEN, "dp": "client", "early-stopping-patience": 2}, "early-stopping-patience is 2 and dp is client; "),
        ({"wire": "dp", "metrics": "off"}, "wire is dp while dp is off and metrics is off; "),
        (
            {**FROZEN, "wire": "dp", "dp": "client", "metrics": "off"},
            "wire is dp while dp is client and metrics is off",
        ),
        ({"wire": "dp", "dp": "example"}, "wire is dp while dp is example and metrics is sum; "),
        ({"wire": "empirical"}, "wire is empirical, but wire-noise is 0 and gradient-mask is none: "),
        ({"wire-length-bucket": 129}, "wire-length-bucket is 129; it must be at most max-length, 128"),
        ({"dp-delta": 0.01}, "dp-delta is 0.01; it must be a number, > 0.0, < 0.01"),
        ({**FROZEN, "dp": "example", "dtype": "bfloat16"}, "dp is example and dtype is bfloat16; "),
        ({"dp-noise-multiplier": 0}, "dp-noise-multiplier is 0; it must be a number, > 0.0"),
        ({"dp-sample-rate": 1.5}, "dp-sample-rate is 1.5; it must be a number, > 0.0, <= 1.0"),
        ({"trunk-autocast": "float16"}, "trunk-autocast is 'float16'; it must be off or bfloat16 or auto"),
        ({"trunk-autocast": True}, "trunk-autocast is True; it must be off or bfloat16 or auto"),
        ({"deterministic": "yes"}, "deterministic is 'yes'; it must be true or false"),
        ({"deterministic": True, "trunk-autocast": "auto"}, "deterministic is true and trunk-autocast is auto; "),
        ({"deterministic": True, "codec": "auto"}, "deterministic is true and codec is auto; "),
        ({"deterministic": True, "codec": "int4-delta"}, "deterministic is true and codec is int4-delta; "),
        ({"deterministic": True, "cohort-size": 3}, "deterministic is true and cohort-size is 3; "),
        ({"deterministic": True, "trunk-address": "a:1,b:2"}, "deterministic is true and trunk-address is 'a:1,b:2'; "),
        (
            {"deterministic": True, "dp": "client", "trunk-adapter": "frozen"},
            "deterministic is true and dp is client; ",
        ),
        (
            {"deterministic": True, "wire": "empirical", "wire-noise": 1.0},
            "deterministic is true and wire is empirical; ",
        ),
        ({"deterministic": True, "codec-backward": "auto"}, "deterministic is true and codec-backward is auto; "),
    ],
)
def test_a_wrong_setting_is_refused_by_its_own_name(values: dict[str, ConfigValue], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flower(values)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_quorum_above_the_nodes_is_allowed_when_all_are_asked() -> None:
    assert RunConfig.from_flower({"quorum": 40}).cohort_size == 0


def test_a_clients_largest_weight_follows_from_its_steps_or_is_set() -> None:
    steps: dict[str, ConfigValue] = {
        "local-steps": 3,
        "gradient-accumulation-steps": 2,
        "per-device-train-batch-size": 4,
        "max-length": 16,
    }
    assert RunConfig.from_flower(steps).max_trained_tokens() == 3 * 2 * 4 * 16
    assert RunConfig.from_flower({"local-steps": 0, "max-tokens": 1000}).max_trained_tokens() == 1000


@pytest.mark.parametrize("dp", ["client", "example"])
def test_under_differential_privacy_every_client_weighs_the_same(dp: str) -> None:
    assert RunConfig.from_flower({**FROZEN, "dp": dp}).max_weight() == 1
    assert RunConfig.from_flower({}).max_weight() == RunConfig.from_flower({}).max_trained_tokens()


def test_a_trunk_that_learns_is_priced_by_the_wire_alone() -> None:
    settings: dict[str, ConfigValue] = {"dp": "example", "wire": "dp", "metrics": "off", "trunk-adapter": "trained"}
    assert RunConfig.from_flower(settings).trunk_adapter == "trained"


def test_target_modules_are_parted_by_commas() -> None:
    assert RunConfig.from_flower({"target-modules": "q_proj, v_proj"}).target_module_names() == ("q_proj", "v_proj")


def test_the_project_file_holds_every_default() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    assert RunConfig.from_flower({}).to_flower() == project["tool"]["flwr"]["app"]["config"]


def test_generated_pages_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert config_docs.main(["--check"]) == 0


def test_a_stale_page_is_noticed_and_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n\n[tool.flwr.app.config]\nquorum = 9\n", "utf-8")
    assert config_docs.main(["--check"]) == 1
    assert config_docs.main([]) == 0
    assert config_docs.main(["--check"]) == 0
    assert tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))["project"] == {"name": "x"}


def test_reading_the_settings_imports_no_torch() -> None:
    told = subprocess.run(
        [sys.executable, "-c", "import contract.config, sys; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert told.stdout.strip() == "False"
