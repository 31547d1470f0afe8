"""Nouns of models that every side uses: packages, where they are found, what a model is."""
