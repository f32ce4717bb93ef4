"""Alembic's entry: migrates on the connection that Database.migrate holds."""

from alembic import context

from llmtasks.store.rows import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
