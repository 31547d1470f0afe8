"""Who can be recognised: subjects and templates at rest, in memory, and in decisions."""
