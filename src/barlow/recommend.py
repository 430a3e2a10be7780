"""`barlow recommend`: choose settings that suit the images, this machine and the minutes; write them into params.yaml.

Reads data/accepted.parquet, which it brings up to date, and a sample of the images. Measures training steps. Writes
params.yaml, with the reason above each setting, and data/recommended.json. The recipe is in advice/recipe.py.

A setting that the user has changed stays: one that is neither as shipped nor as this command last wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from barlow.advice import recipe
from barlow.core import files
from barlow.settings import editing, loading, strict
from barlow.settings.params import Params

RECOMMENDED = Path("data/recommended.json")


@dataclass(frozen=True)
class Recommended:
    """The content of data/recommended.json: what the last call went by, measured and wrote."""

    source: str
    minutes: float | None  # None: for the drawn data set
    facts: dict[str, Any]
    seconds_per_image: dict[str, float]  # of a training step, by network
    values: dict[str, Any]  # by dotted key


def run(params: Params, minutes: float | None = None, auto: bool = False) -> None:
    """Choose the settings, write and print them.

    With `auto`, as `make repro` calls it, do so only if ingest.source has changed since they were chosen.

    Raises:
        UserError: the minutes are not above 0, the source cannot be read, or it has nothing to train on.
    """
    recipe.require_minutes(minutes)
    last = read()
    fixed = touched(params, last)
    if auto and not is_due(params, last, fixed):
        return
    if auto:
        print(f"ingest.source={params.ingest.source}, and the settings are for other images: barlow recommend")
    if params.ingest.source == "synthetic":
        advice = {key: (value, "suits the drawn data set") for key, value in recipe.SYNTHETIC.items()}
        write(params, advice, fixed, Recommended("synthetic", None, {}, {}, {}), [])
    else:
        suit(params, minutes, last, fixed)


def read() -> Recommended:
    """Return what the last call wrote; where there was none, params.yaml is for the drawn data set."""
    if not RECOMMENDED.exists():
        return Recommended("synthetic", None, {}, {}, {})
    last: Recommended = strict.build(Recommended, files.read_json(RECOMMENDED), str(RECOMMENDED))
    return last


def touched(params: Params, last: Recommended) -> dict[str, Any]:
    """Return the settings of the recipe that the user has changed, by dotted key; a network for given weights too."""
    now = {key: current(params, key) for key in recipe.SYNTHETIC}
    return {
        key: value
        for key, value in now.items()
        if value not in (recipe.SYNTHETIC[key], last.values.get(key, recipe.SYNTHETIC[key]))
        or (key in recipe.NETWORK and params.model.weights is not None)
    }


def is_due(params: Params, last: Recommended, fixed: Mapping[str, Any]) -> bool:
    """Tell whether the settings are still those for other images. Who has set both learning rates is left alone."""
    free = [key for key in recipe.RATES if key not in fixed]
    shipped = [current(params, key) == recipe.SYNTHETIC[key] for key in free]
    if params.ingest.source == "synthetic":
        return not all(shipped)
    return bool(free) and (params.ingest.source != last.source or all(shipped))


def current(params: Params, key: str) -> Any:
    """Return the value of a dotted key as YAML has it."""
    value = attrgetter(key)(params)
    return list(value) if isinstance(value, tuple) else value


def suit(params: Params, minutes: float | None, last: Recommended, fixed: Mapping[str, Any]) -> None:
    """Look at the images, measure training steps, and write the settings that follow."""
    # Here, since `make repro` always runs this command, mostly needs none of them, and torch takes seconds to load.
    from barlow.advice import speed, survey
    from barlow.core.bands import PixelFormat
    from barlow.data import manifest
    from barlow.experiments import grid, runs

    runs.barlow("scan")
    runs.dvc("repro", "validate")
    device, accepted = speed.kind(params), manifest.read(files.ACCEPTED)
    minutes = minutes or last.minutes or recipe.MINUTES[device]
    with TemporaryDirectory(prefix=".sample-", dir=files.ACCEPTED.parent) as folder:
        sample = Path(folder, "pretrain-000000.tar")
        m = params.model
        form = PixelFormat(m.channels, m.bits)
        largest = recipe.KEPT_SIDE * max(recipe.SIZES[device])
        images = survey.look(accepted, manifest.root(params.ingest), fixed.get("shard.max_side", largest), sample, form)
        task = recipe.Task(images, device, minutes, fixed, m.weights is not None, m.projector[-1])
        facts = {"images": asdict(images), "hardware": speed.hardware(params), "minutes": minutes}
        print(f"{images}; {facts['hardware']}; {minutes:g} minutes of pretraining (--minutes)", flush=True)
        same = (last.source, last.facts) == (params.ingest.source, facts)
        measured = dict(last.seconds_per_image) if same else {}  # so that a second call gives the same settings

        def seconds(network: recipe.Network) -> float:
            name = f"{network}, batch {task.batch}"
            if name not in measured:
                values = {**network.settings(), "pretrain.batch_size": task.batch}
                tried = strict.build(Params, grid.apply(params, values, str(loading.PARAMS)), str(loading.PARAMS))
                measured[name] = round(speed.seconds_per_image(tried, [sample]), 6)
                print(f"a training step of {name}: {1 / measured[name]:,.0f} images/s", flush=True)
            return measured[name]

        network = recipe.choose(task, seconds)
        advice = recipe.settings(task, network, seconds(network))
    chosen = Recommended(params.ingest.source, minutes, facts, measured, {})
    write(params, advice, fixed, chosen, recipe.remarks(task, advice, seconds(network)))


def write(
    params: Params, advice: recipe.Advice, fixed: Mapping[str, Any], call: Recommended, remarks: list[str]
) -> None:
    """Write what is not `fixed` into params.yaml, the reasons above it; keep it in data/recommended.json; print it."""
    values = {key: value for key, (value, _) in advice.items() if key not in fixed}
    notes = {key: f"{value}: {advice[key][1]}" for key, value in values.items()} if call.minutes else {}
    editing.edit(editing.nested(values), "the recommended settings", notes)
    files.write_json(RECOMMENDED, asdict(call) | {"values": values})
    rows = [("setting", "value", "reason")]
    for key, (value, reason) in advice.items():
        now = current(params, key)
        if key in fixed:
            rows.append((key, f"{now}", f"yours, not changed; the recipe has {value}"))
        else:
            rows.append((key, f"{value}" if now == value else f"{now} -> {value}", reason))
    widths = [max(len(row[column]) for row in rows) + 2 for column in (0, 1)]
    print("\n".join(f"{key:<{widths[0]}}{value:<{widths[1]}}{reason}" for key, value, reason in rows))
    print("\n".join(remarks), end="\n" if remarks else "")
