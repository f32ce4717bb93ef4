"""Everything that is SQL: tables, migrations, and statements grouped by what they are about.

Functions that take a ``Connection`` run inside the caller's transaction; nothing here publishes a message.
"""
