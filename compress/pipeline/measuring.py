"""Run the measurements of a recipe, and join their numbers into one record per artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from compress.artifact import Artifact
from compress.measure.measurement import Measurement
from compress.pipeline.inputs import Inputs
from compress.pipeline.keys import identity, key
from compress.pipeline.machine import environment
from compress.pipeline.records import Plain, join
from compress.pipeline.workdir import read_json, shown_path, write_json
from compress.recipe.references import Link

MEASUREMENTS = "measurements.json"
Records = dict[str, dict[str, Any]]


def measure(
    inputs: Inputs, links: Sequence[Link], artifacts: Mapping[str, Artifact], device: str, console: Console | None
) -> list[dict[str, Any]]:
    """Take every measurement and write ``measurements.json``. Numbers whose inputs have not changed are reused.

    The key of a measurement covers its config, the measured artifact, the data, and the machine it runs on.
    """
    workdir, machine = inputs.workdir, environment(device)
    roots, keys = _roots(inputs, links), measured_keys(inputs, links, artifacts)
    records: Records = {name: _record(artifact, name, workdir, keys[name]) for name, artifact in artifacts.items()}
    plain: Plain = {}
    for measurement in inputs.recipe.measure:
        for part in _parts(measurement, inputs, artifacts, roots):
            measured = _measured(part, inputs, artifacts, roots, machine, console)
            for name, numbers in measured.items():
                join(records[name], numbers, measurement, plain)
    result = {
        "artifacts": list(records.values()),
        "environment": machine,
        "conditions": [measurement.model_dump(mode="json") for measurement in inputs.recipe.measure],
    }
    write_json(workdir / MEASUREMENTS, result)
    return list(records.values())


def measured_keys(inputs: Inputs, links: Sequence[Link], artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Return a key per artifact, computed from the artifact and the data as it reads them.

    ``run.json`` and ``measurements.json`` both hold it, so that a report never joins an artifact with numbers of
    another one.
    """
    roots = _roots(inputs, links)
    data = {name: inputs.data(roots[name]) for name in artifacts}
    return {
        name: key([identity(artifact), found.digest if (found := data[name]) else ""])
        for name, artifact in artifacts.items()
    }


def _roots(inputs: Inputs, links: Sequence[Link]) -> dict[str, str]:
    return {name: name for name in inputs.recipe.models} | {item.name: item.root for item in links}


def _parts(
    measurement: Measurement, inputs: Inputs, artifacts: Mapping[str, Artifact], roots: Mapping[str, str]
) -> Iterator[Measurement]:
    """Yield one measurement per view of the data, because models with different tokenizers read different tokens."""
    if not measurement.needs_data:
        yield measurement
        return
    groups: dict[str, list[str]] = {}
    for name in measurement.chosen(artifacts):
        data = inputs.data(roots[name])
        groups.setdefault(data.digest if data else "", []).append(name)
    for names in groups.values():
        yield measurement.model_copy(update={"of": tuple(names)})


def _measured(
    measurement: Measurement,
    inputs: Inputs,
    artifacts: Mapping[str, Artifact],
    roots: Mapping[str, str],
    machine: Mapping[str, Any],
    console: Console | None,
) -> Records:
    chosen = measurement.chosen(artifacts)
    data = inputs.data(roots[next(iter(chosen))]) if measurement.needs_data else None
    covered = [
        measurement.model_dump(mode="json", exclude={"of"}),
        measurement.version,
        [identity(next(iter(artifacts.values())))],
        {name: identity(artifact) for name, artifact in chosen.items()},
        [identity(artifacts[name]) for name in measurement.compared_with],
        data.digest if data else "",
        dict(machine),
        *([depends_on] if (depends_on := measurement.depends_on) else []),
    ]
    path = inputs.workdir / "measured" / f"{measurement.type}-{key(covered)}.json"
    kept: Records | None = read_json(path)
    if console:
        console.print(f"[dim]  {measurement.type} {'reused' if kept else 'is measured'}[/dim]", highlight=False)
    if kept is not None:
        return kept
    device = "cuda" if machine["device"] != "cpu" else "cpu"
    numbers = measurement.run(artifacts, data=data, device=device, console=console)
    path.parent.mkdir(exist_ok=True)
    write_json(path, numbers)
    return numbers


def _record(artifact: Artifact, name: str, workdir: Path, of: str) -> dict[str, Any]:
    record: dict[str, Any] = {"name": name, "path": shown_path(artifact.path, workdir), "key": of}
    if artifact.manifest.lineage and artifact.manifest.lineage[-1].coverage:
        record["coverage"] = artifact.manifest.lineage[-1].coverage
    return record
