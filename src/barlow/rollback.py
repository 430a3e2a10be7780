"""`barlow rollback [VERSION]`: put an earlier version back into production; reads and writes only the registry.

With `--kind classifier` that of the classifier; each kind has its own versions.
"""

from __future__ import annotations

from barlow.core.errors import UserError
from barlow.encoder.registry import Registry, Version, now
from barlow.production import tags
from barlow.settings.params import Params


def run(params: Params, version: str | None = None, kind: str = "encoder") -> None:
    """Put `version`, by default the one before, into production; mark the current version as withdrawn.

    Raises:
        UserError: there is no such version, or it is damaged.
        Interrupted: another process holds the registry's lock.
    """
    registry = Registry(params.promote.registry, kind)
    with registry.locked():
        try:
            current = registry.production()
        except UserError:  # the version in production is gone, which may be the reason for the rollback
            if version is None:
                raise
            current = None
        target = registry.version(version) if version else _before(registry, current)
        if damage := target.damage():
            raise UserError(f"{target.name} is damaged: {damage}; choose another of {registry.folder / 'versions'}")
        if current == target:
            print(f"{target.name} is in production already")
            return
        registry.withdraw(current, instead=target)
        registry.point(target)
        done = {"time": now(), "production": target.name, "withdrawn": current.name if current else None}
        registry.log("rolled-back", done | {"tags": tags.tag(target)})
    print(f"rolled back: {target.name} is in production, {done['withdrawn'] or 'what was there'} is withdrawn")


def _before(registry: Registry, current: Version | None) -> Version:
    if current is None:
        raise UserError(f"nothing is in production in {registry.folder}; `barlow promote` puts a first version there")
    if (earlier := registry.before(current)) is None:
        raise UserError(
            f"{registry.folder} has no intact version before {current.name} to go back to; "
            f"`ls {registry.folder / 'versions'}` lists all, and `barlow rollback VERSION` takes one"
        )
    return earlier
