"""Between the server and its workers: typed messages, a channel, shared-memory arenas."""
