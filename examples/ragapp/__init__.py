"""A small RAG application on llmtasks: it reads documents and mail, answers questions, and reports."""
