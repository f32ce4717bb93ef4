"""pytest-celery's nodes as local processes."""
