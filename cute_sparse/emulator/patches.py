"""Changes to other modules that last while a device is entered."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class Patches:
    """Attributes, class attributes and environment variables that are set for a while."""

    _ABSENT = object()

    def __init__(self):
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> Any:
        """Sets owner.name and returns what was there."""
        own = vars(owner).get(name, self._ABSENT)
        previous = getattr(owner, name, None)
        setattr(owner, name, value)
        self._undo.append(lambda: delattr(owner, name) if own is self._ABSENT else setattr(owner, name, own))
        return previous

    def set_environment(self, name: str, value: str) -> None:
        previous = os.environ.get(name)
        os.environ[name] = value

        def undo() -> None:
            if previous is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = previous

        self._undo.append(undo)

    def on_restore(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def restore(self) -> None:
        while self._undo:
            self._undo.pop()()
