"""Celery's settings, from the environment: plain `celery worker`, `celery beat` and `celery flower` find them here."""

import os

from llmtasks.settings import TaskDefaults, read
from llmtasks.settings import worker_pool as pool

_settings = read()

# What every task function gets where its registration says nothing.
TASK_CONFIG = {
    "max_workers": "auto",
    "default_timeout": 3600,
    "max_retries": 3,
    "retry_delay": 300,
}

# LLMTASKS_BROKER_URL, LLMTASKS_RESULT_URL and LLMTASKS_DATABASE_URL; by default all is under LLMTASKS_HOME.
broker_url = _settings.broker_url
result_backend = _settings.result_url
result_extended = True
# Without a broker .delay() fails after two seconds, not twenty; a result that could not be stored is told again later.
result_backend_transport_options = {
    "retry_policy": {"max_retries": 3, "interval_start": 0, "interval_step": 0.5, "interval_max": 1}
}

# LLMTASKS_IMPORTS: the modules that register task functions, separated by commas.
imports = ["llmtasks.install", *filter(None, os.environ.get("LLMTASKS_IMPORTS", "").split(","))]

beat_scheduler = "llmtasks"
beat_enable_remote_control = True
worker_consumer = "llmtasks.worker.consumer:RunConsumer"
# asyncio, prefork or threads.
worker_pool = pool(os.environ.get("LLMTASKS_POOL", "asyncio"))
worker_concurrency = TaskDefaults.read(TASK_CONFIG).concurrency(worker_pool)
worker_prefetch_multiplier = 1
# Start hooks may take so many seconds in a prefork child that replaces another; Celery's 4 are for importing modules.
worker_proc_alive_timeout = 60
worker_send_task_events = True
task_send_sent_event = True
# Quorum queues of RabbitMQ (task_default_queue_type = "quorum") need None here: they have no such priorities.
task_queue_max_priority = 9
broker_connection_retry_on_startup = True
broker_connection_max_retries = None
# Ten priorities, and LLMTASKS_REDIS_TRANSPORT.
broker_transport_options = _settings.transport_options
