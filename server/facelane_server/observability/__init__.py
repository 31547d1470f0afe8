"""What the server says of itself: logs, metrics, and the port that metrics are read from."""
