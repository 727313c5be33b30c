"""What a ledger row holds of a release: one text for one price, and nothing else is read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.errors import UnpricedError
from contract.privacy_records import ADVERSARIES, CHANNELS, PricedRelease, PrivacyEvent, View

numbers = st.floats(min_value=0.0, exclude_min=True, allow_nan=False, allow_infinity=False).map(float.hex)
events = st.builds(
    PrivacyEvent,
    st.sampled_from(["gaussian", "skellam"]),
    st.dictionaries(st.sampled_from(["noise_multiplier", "clip", "scale"]), numbers),
)
views = st.builds(View, st.integers(1, 1000), st.sampled_from(["1", (0.01).hex()]), st.just("zero-out"))
releases = st.builds(
    PricedRelease, st.sampled_from(CHANNELS), events, st.dictionaries(st.sampled_from(ADVERSARIES), views)
)


@given(releases)
def test_a_release_is_read_back_from_its_text(release: PricedRelease) -> None:
    assert PricedRelease.from_canonical(release.canonical()) == release


@given(releases, releases)
def test_only_equal_releases_have_the_same_text(one: PricedRelease, other: PricedRelease) -> None:
    assert (one.canonical() == other.canonical()) == (one == other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "not json",
        '["adapter_sum","gaussian",{}]',
        '["adapter_sum","gaussian",{},{"holder":[1,"1"]}]',
        '["adapter_sum","gaussian",{},[]]',
        '["adapter_sum", "gaussian", {}, {}]',
        '{"a":1,"b":2,"c":3,"d":4}',
    ],
)
def test_a_text_that_was_not_written_here_is_refused(text: str) -> None:
    with pytest.raises(UnpricedError, match="ledger row"):
        PricedRelease.from_canonical(text)


@given(releases)
def test_a_text_with_other_spacing_is_another_text(release: PricedRelease) -> None:
    with pytest.raises(UnpricedError, match="not written as it is"):
        PricedRelease.from_canonical(json.dumps(json.loads(release.canonical()), sort_keys=True, indent=1))


@pytest.mark.parametrize("value", ["", "0", "0x0.0p+0", "nan", "inf", "-0x1p+0", "one", "0x1p+5000", "9" * 400])
def test_a_parameter_that_is_no_number_above_nothing_is_named(value: str) -> None:
    event = PrivacyEvent("gaussian", {"noise_multiplier": value})
    with pytest.raises(UnpricedError, match="noise_multiplier of the gaussian event is"):
        event.number("noise_multiplier")


def test_a_whole_number_and_a_hex_float_are_read_to_the_bit() -> None:
    event = PrivacyEvent("skellam", {"size": "65536", "clip": (0.1).hex()})
    assert (event.number("size"), event.number("clip")) == (65536.0, 0.1)
