"""The flow `watch`: run `barlow drift`, and emit `encoder.drift` if recent images differ from those of training."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from barlow.core import files
from flows.process import StepFailed
from flows.retrain import announce, step


@flow(name="watch", persist_result=False)
def watch(recent: str | None = None, minutes: float = 30) -> State[Any]:
    """Compare, put the figures on the run's page, and emit the event after drift.breaches breaches in a row.

    Args:
        recent: a folder of images or a Parquet file of embeddings, instead of drift.recent of params.yaml.
        minutes: deadline of the comparison.
    """
    try:
        step.with_options(name="drift")("drift", ["barlow", "drift", *([recent] if recent else [])], minutes)
    except StepFailed as error:
        return Failed(message=str(error))
    result = files.read_json(files.DRIFT)
    figures = [{"figure": key, "value": result[key]} for key in sorted(result)]
    create_table_artifact(key="drift", table=figures, description=result["verdict"])
    if result["drifted"]:
        announce("encoder.drift", result)
    return Completed(name="Drift" if result["drifted"] else "Completed", message=result["verdict"])


if __name__ == "__main__":
    watch()
