"""The flow `watch`: are recent images still like those of training? Emits `encoder.drift` when they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.process import StepFailed
from flows.retrain import announce, step


@flow(name="watch", persist_result=False)
def watch(recent: str | None = None, minutes: float = 30) -> State[Any]:
    """Compare, keep the figures on the run's page, and emit the event after drift.breaches breaches in a row.

    Args:
        recent: a folder of images or a Parquet file of embeddings, instead of drift.recent of params.yaml.
        minutes: the deadline.
    """
    try:
        step.with_options(name="drift")("drift", ["barlow", "drift", *([recent] if recent else [])], minutes)
    except StepFailed as error:
        return Failed(message=str(error))
    found = json.loads(Path("models/drift.json").read_text())
    shown = [{"figure": key, "value": found[key]} for key in sorted(found)]
    create_table_artifact(key="drift", table=shown, description=found["verdict"])
    if found["drifted"]:
        announce("encoder.drift", found)
    return Completed(name="Drift" if found["drifted"] else "Completed", message=found["verdict"])


if __name__ == "__main__":
    watch()
