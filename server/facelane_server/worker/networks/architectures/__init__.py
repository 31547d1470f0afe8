"""The networks themselves; ``models.architectures`` says which names a package may use."""
