"""The Celery app of this process and its settings."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import celery

from llmtasks import settings as settings_module
from llmtasks.settings import Settings

_settings: WeakKeyDictionary[celery.Celery, Settings] = WeakKeyDictionary()


def current_app() -> celery.Celery:
    """The Celery app that is current in this thread."""
    proxy: Any = celery.current_app
    app: celery.Celery = proxy._get_current_object()
    return app


def settings_of(app: celery.Celery | None = None) -> Settings:
    """The settings of an app, read at their first use."""
    app = app or current_app()
    found = _settings.get(app)
    if found is None:
        found = _settings[app] = settings_module.read(_Conf(app))
    return found


class _Conf(dict[str, Any]):
    """What Settings reads of an app: its configuration and its name."""

    def __init__(self, app: celery.Celery) -> None:
        super().__init__()
        self._app = app

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, of whichever case the configuration has it."""
        if key == "main":
            return self._app.main
        return self._app.conf.get(key, default)
