"""`python -m flows.automations [WEBHOOK]`: create the automations of the Prefect server. Safe to repeat.

If the process of a run and its worker both die, the run would stay `Running` for ever. So the server sets a run without
heartbeats to `Crashed`. WEBHOOK is a URL that takes a POST of JSON ({"text": ...}), like those of Slack and Mattermost.
It is notified of failures, promotions and rollbacks.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta

from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

MISSED = 100  # seconds without a heartbeat; a run sends one every 30 (pyproject.toml)
ENDED = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
ENDED |= {
    f"prefect.flow-run.{name}" for name in ("Promoted", "Unchanged", "Refused", "Drift")
}  # our own states, all of type Completed
RUNS = ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]})


def zombies() -> Automation:
    """Return the automation that sets a run without heartbeats to Crashed."""
    return Automation(
        name="a run without heartbeats has crashed",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat"} | ENDED,
            match=RUNS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=MISSED),
        ),
        actions=[
            ChangeFlowRunState(  # type: ignore[call-arg]
                state=StateType.CRASHED, message=f"no heartbeat for {MISSED} s: its process and its worker are gone"
            )
        ],
    )


async def notifications(url: str) -> list[Automation]:
    """Return the automations that notify a webhook of failures, promotions and rollbacks."""
    block = CustomWebhookNotificationBlock(
        name="barlow", url=url, json_data={"text": "{{subject}}\n{{body}}"}, headers=None, cookies=None
    )
    identity = await block.asave("barlow-notifications", overwrite=True)
    kinds = {
        "failures": ({"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}, RUNS, "{{ flow_run.state.message }}"),
        "promotions": ({"encoder.promoted"}, ResourceSpecification({}), "{{ event.payload.reason }}"),
        "rollbacks": ({"encoder.rolled-back"}, ResourceSpecification({}), "{{ event.payload.message }}"),
    }
    return [
        Automation(
            name=f"tell of {kind}",
            trigger=EventTrigger(
                expect=events, match=match, posture=Posture.Reactive, threshold=1, within=timedelta(0)
            ),
            actions=[SendNotification(block_document_id=identity, subject="{{ event.event }}", body=body)],
        )
        for kind, (events, match, body) in kinds.items()
    ]


async def main(webhook: str | None = None) -> None:
    """Create each automation, or replace the one of the same name."""
    for automation in [zombies(), *(await notifications(webhook) if webhook else [])]:
        try:
            automation.id = (await Automation.aread(name=automation.name)).id
            await automation.aupdate()
        except ValueError:
            await automation.acreate()
        print(automation.name)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
