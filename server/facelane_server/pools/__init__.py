"""The parent side of the workers: dispatch, batching, deadlines, one worker's life."""
