"""The flow `rollback`: run `barlow rollback` and emit an event, so that the webhook is notified, as of promotions."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed, Failed

from flows.process import StepFailed
from flows.retrain import step


@flow(name="rollback", persist_result=False)
def rollback(version: str | None = None) -> State[Any]:
    """Put `version`, by default the one before, back into production."""
    try:
        done = step.with_options(name="rollback")(
            "rollback", ["barlow", "rollback", *([version] if version else [])], 10
        )
    except StepFailed as error:
        return Failed(message=str(error))
    emit_event(
        "encoder.rolled-back",
        resource={"prefect.resource.id": "barlow.encoder.encoder"},
        payload={"message": done["lines"][-1]},
    )
    return Completed(message=done["lines"][-1])


if __name__ == "__main__":
    rollback()
