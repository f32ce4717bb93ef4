"""Celery beat with schedules in the database: any number of beats, none leads."""

from llmtasks.beat.scheduler import ScheduleBeat

__all__ = ["ScheduleBeat"]
