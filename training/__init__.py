"""Recipe of the starter models: pack the data, train on one GPU, measure, write packages."""
