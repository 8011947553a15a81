"""Where numbers come from: model, protocol, data, code and machine, as rows of label and value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robustbench_cure.evaluation.record import Record
from robustbench_cure.report.wording import count, data_words, duration, threat_words


@dataclass(frozen=True)
class Fact:
    """One line of provenance: a value for each model; `exact` marks digests, commands and the like."""

    name: str
    values: tuple[str, ...]
    exact: bool

    @property
    def shared(self) -> bool:
        """Whether all models have the same value."""
        return len(set(self.values)) == 1


def facts(records: Sequence[Record]) -> list[Fact]:
    """Everything the manifests say about how the numbers were made; lines without any value are left out."""
    columns = [_facts(record) for record in records]
    lines = [
        Fact(name, tuple(column[name][0] for column in columns), exact)
        for name, (_, exact) in columns[0].items()
    ]
    return [line for line in lines if any(line.values)]


def _facts(record: Record) -> dict[str, tuple[str, bool]]:
    m = record.manifest
    model, data, config, machine, battery = m.model, m.data, m.config, m.environment, m.battery
    forwards = sum(cost.forwards for cost in m.cost.values())
    backwards = sum(cost.backwards for cost in m.cost.values())
    share, rate = m.gradient_share, machine.gradient_rate
    dirty = " with uncommitted changes" if machine.git_dirty else ""
    plain = {
        "Model": f"{model.name} ({model.id})",
        "Weights from": model.source,
        "Architecture": f"{model.architecture}, {count(model.parameters)} parameters",
        "Training": model.training,
        "Row in published tables": model.published_row,
        "Battery": f"{battery.name} ({battery.id}, version {battery.version})",
        "Protocol source": battery.source,
        "Threat model": threat_words(battery.threat),
        "Data": data_words(data),
        "Data notes": data.notes,
        "Classes": ", ".join(data.classes),
        "Seed": str(config.seed),
        "Precision of the search": f"{config.precision}; every success verified in fp32",
        "Device": f"{config.device}, {machine.device_name}",
        "Threads": str(machine.threads),
        "Batch and shard size": f"{config.batch_size}, {config.shard_size}",
        "Shard": config.shard,
        "Unreliable models": "allowed on request" if config.allow_unreliable else "",
        "Versions": f"robustbench-cure {machine.version}, Python {machine.python}, torch {machine.torch}",
        "Started": m.started,
        "Finished": m.finished,
        "Status": m.status,
        "Wall time": duration(m.wall_seconds),
        "Work": f"{count(forwards)} forward and {count(backwards)} backward passes of one image",
        "Rate of passes": f"{100 * share:.0f} % of that of bare gradients, {count(round(rate))} a second"
        if share
        else "",
    }
    exact = {
        "Code": f"{machine.git_commit}{dirty}" if machine.git_commit else "",
        "Command": machine.command,
        "SHA-256 of the weights": model.weights_sha256,
        "SHA-256 of the model card": model.card_digest,
        "SHA-256 of the battery": m.battery_digest,
        "SHA-256 of the data": data.digest,
    }
    return {k: (v, False) for k, v in plain.items()} | {k: (v, True) for k, v in exact.items()}
