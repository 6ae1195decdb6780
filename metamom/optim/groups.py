"""How torch's schedulers that cycle a momentum find one in an optimizer with a beta."""

from __future__ import annotations

from typing import Any


class Defaults(dict[str, Any]):
    """An optimizer's defaults. OneCycleLR and CyclicLR ask these whether the optimizer has a momentum to cycle."""

    def __contains__(self, key: object) -> bool:
        return key == "momentum" or super().__contains__(key)


def take_scheduled_momentum(group: dict[str, Any]) -> None:
    """Turn a momentum that a scheduler has put into the group into ``beta = 1 - momentum``."""
    if "momentum" in group:
        group["beta"] = 1 - group.pop("momentum")
