"""The app module of the worker nodes: pytest-celery's template with llmtasks installed.

pytest-celery replaces the three assignments below, to the letter, by those of the test.
"""

from celery import Celery

from llmtasks import install

imports = None

app = Celery("celery_test_app")
config = None

if config:
    app.config_from_object(config)
install(app)
