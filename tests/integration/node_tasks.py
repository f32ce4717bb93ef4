"""Task functions of the worker nodes: pytest-celery copies this module to the worker."""

import os

from celery import shared_task


@shared_task(name="nodes.doubled")
def doubled(number: int) -> int:
    return number * 2


@shared_task(name="nodes.process_id")
def process_id() -> int:
    return os.getppid()
