"""What a client process keeps between messages: tokenised shards. `common/model/load.py` keeps the base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tsugiki.client.site.site import Site
from tsugiki.client.training import validation
from tsugiki.client.training.trainer import Watch
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.shard import Shard
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks import Task
from tsugiki.common.tasks.base import Encoded, Tail


def load_at(site: Site, config: RunConfig) -> Graft:
    """Return the base with the run's adapter on it; what the run names is loaded from where the site says.

    Raises:
        ModelError: `model-unknown`, the site does not know a name; and as `load_graft`.
    """

    def source_of(name: str) -> str:
        return site.model_source(name) if name else ""  # what a run leaves out, `load_graft` refuses by its own name

    source = site.model_source(config.model.name)
    here = {name: getattr(config, name).resolved(source_of) for name in ("task", "adapter")}
    return load_graft(config.model_copy(update=here), source, config.run.seed)


@dataclass
class Desk:
    """One for each process."""

    encoded: dict[tuple[str, str, str], Encoded | None] = field(default_factory=dict)
    clients: dict[tuple[str, str, str], list[list[int]]] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tails: dict[tuple[str, str, str], tuple[Graft, Tail | None]] = field(default_factory=dict)
    moments: dict[tuple[str, str, str], tuple[int, dict[str, Any]]] = field(default_factory=dict)
    watch: Watch = lambda step, steps, losses: None

    def graft(self, site: Site, config: RunConfig) -> Graft:
        """Return the base with the run's adapter on it."""
        return load_at(site, config)

    def rows(self, site: Site, config: RunConfig, part: str) -> Encoded | None:
        """Return the site's tokenised rows for "train", "validation" or "evaluation"."""
        graft, key = self.graft(site, config), self._key(site, config, part)
        if key not in self.encoded:
            shard = _shard(site, graft.task, config, part)
            rows = self.encoded[key] = None if shard is None else graft.task.encode(shard, graft.base)
            if shard is not None and rows is not None and part == "train":
                self.notes[site.name] = shard.notes + rows.notes
                validated = config.train.validate_every_steps > 0  # then there is one client, with what is left
                self.clients[key] = [list(range(len(shard)))] if validated else site.clients(shard)
        return self.encoded[key]

    def rows_of_clients(self, site: Site, config: RunConfig) -> list[list[int]]:
        """Return which of the site's training rows belong to each of its clients."""
        self.rows(site, config, "train")
        return self.clients[self._key(site, config, "train")]

    def tail(self, site: Site, config: RunConfig) -> Tail | None:
        """Return the end of the network with the features of the site's training rows, computed once for a base."""
        graft, key, rows = self.graft(site, config), self._key(site, config, "train"), self.rows(site, config, "train")
        if key not in self.tails or self.tails[key][0] is not graft:
            self.tails = {known: kept for known, kept in self.tails.items() if kept[0] is graft}
            self.tails[key] = (graft, None if rows is None else graft.task.tail(graft.base, rows))
        return self.tails[key][1]

    def moments_of(self, site: Site, config: RunConfig, round_: int, client: str) -> dict[str, Any] | None:
        """Return what a client's optimiser remembers in a run, to be changed in place: nothing yet in round 1.

        Of other runs nothing is kept, and nothing of a round that is still to come: that was an earlier run.
        """
        if not config.train.persist_optimizer:
            return None
        key = site.identity(), config.sha256, client
        self.moments = {known: kept for known, kept in self.moments.items() if known[1] == config.sha256}
        last, kept = self.moments.get(key, (0, {}))
        if round_ == 1 or last > round_:
            kept = {}
        self.moments[key] = (round_, kept)
        return kept

    def _key(self, site: Site, config: RunConfig, part: str) -> tuple[str, str, str]:
        graft = self.graft(site, config)
        limit = getattr(graft.base.tokenizer, "model_max_length", 0)  # virtual tokens shorten texts
        settings = f"{config.task.model_dump_json()}{config.model.dtype}{config.model.quantization}{limit}"
        if config.train.validate_every_steps:
            settings += f" {config.run.seed} {config.train.validation_fraction}"
        return site.identity(), part, f"{graft.spec.base_fingerprint}{settings}"


def _shard(site: Site, task: Task, config: RunConfig, part: str) -> Shard | None:
    if part == "train":
        return validation.training_shard(site, task, config)
    return validation.validation_shard(site, task, config) if part == "validation" else site.evaluation_shard(task)
