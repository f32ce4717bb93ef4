"""Tasks for LLM and RAG applications on Celery."""

from llmtasks.errors import LLMTasksError
from llmtasks.install import install
from llmtasks.lifespan import on_worker_loop_start, on_worker_loop_stop
from llmtasks.metrics import track_task_performance
from llmtasks.monitor import TaskMonitor
from llmtasks.registry import TaskRegistry, task_registry
from llmtasks.retry import retry_with_backoff
from llmtasks.store.runs import Run
from llmtasks.task import Task

__all__ = [
    "LLMTasksError",
    "Run",
    "Task",
    "TaskMonitor",
    "TaskRegistry",
    "install",
    "on_worker_loop_start",
    "on_worker_loop_stop",
    "retry_with_backoff",
    "task_registry",
    "track_task_performance",
]
