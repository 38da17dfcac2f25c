"""A server that lies in secure aggregation: it changes messages before they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tsugiki.server.run import secagg

Change = Callable[[str, str, Any], None]
"""Changes a message: gets its kind, the site's name and the content."""

MANY = 30_000

POLICY = """
[policy]
privacy_modes = ["distributed"]
secure_aggregation = true
min_sites = 3
min_noise_multiplier = 2.0
max_epsilon = 8.0
"""
"""What a demanding site adds to its site.toml."""


def lying(change: Change) -> Callable[..., Any]:
    """Return what takes the place of `secagg.address`: the same, with each message changed."""
    honest = secagg.address

    def address(cohort: Any, round_number: int, kind: str, content: Any, timeout_s: float) -> Any:
        names = {member.node_id: member.name for member in cohort}

        def changed(nonce: str, node: int) -> Any:
            record = content(nonce, node)
            change(kind, names[node], record)
            return record

        return honest(cohort, round_number, kind, changed, timeout_s)

    return address


def set_told(content: Any, section: str, name: str, value: Any) -> None:
    """Change a setting of the run in a message."""
    request = content.config_records["request"]
    told = json.loads(request["config"])
    told[section][name] = value
    request["config"] = json.dumps(told, sort_keys=True)


def invent_counts(kind: str, site: str, content: Any) -> None:
    """Say that all other sites are gateways of `MANY` clients, so that each client adds little noise.

    The plan that follows is as private as a site demands: a gateway that knows its own share leaves half of the noise.
    """
    set_told(content, "strategy", "min_clients", 2 * MANY + 1)
    set_told(content, "privacy", "max_clients_per_site", MANY)
    if kind == "query.shares":
        fields = content.config_records["secagg"]
        fields["clients"] = [1 if name == site else MANY for name in fields["keys_names"]]


def told_to_others(victim: str, section: str, name: str, value: Any) -> Change:
    """Return a change: all sites but one get another setting."""

    def change(kind: str, site: str, content: Any) -> None:
        if site != victim:
            set_told(content, section, name, value)

    return change
