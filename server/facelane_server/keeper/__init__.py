"""The parent of shards: it starts, watches, restarts and ends them, and answers for all of them
where no shard can. Never a frame passes through it."""
