"""The processes that compute: one worker serves one model (or a group, as threads)."""
