"""Models as the workers see them: packages, networks, and the three tasks on top."""
