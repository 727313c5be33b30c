"""A site's node config as a deployment file holds it, read as Flower and the site read it."""

from __future__ import annotations

import re

from flwr.common.config import parse_config_args

from clients.site import read_site
from contract.config import RunConfig
from contract.identity import public_key_text
from tests.docs.pages import ROOT, Page

SIGNER = public_key_text(bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"))
"""The public key of RFC 8032's first test."""


def check_node_config(told: str) -> None:
    """Fails unless a site takes it as it stands, and each of its keys is on the deployment page."""
    text = re.sub(r"\s+", " ", re.sub(r'roster-signer="[^"]*"', f'roster-signer="{SIGNER}"', told)).strip()
    values = parse_config_args([text])
    site = read_site(values, RunConfig(), "1", "1", simulated=False)
    assert site.roster is not None, "a site in these files pins a roster"
    assert site.identity_named
    table = Page(ROOT / "docs" / "deployment.md").section("## Node config")
    documented = set(re.findall(r"`([a-z-]+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE))))
    assert set(values) - documented == set()
