"""Networks, what runs them, and the three tasks on top."""
