"""What runs inside a worker beside the attempts: requests in the main process, signals, the process's own heartbeat."""
