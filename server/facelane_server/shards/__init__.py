"""One server of several processes: how many, what each is given, and what they say to each other.

The keeper (``facelane_server.keeper``) starts the shards; ``facelane_server.seat`` is the side of a
shard.
"""
