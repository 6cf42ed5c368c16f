"""Each objective on the emoji data: small enough to be trained in a few hundred steps of a CPU."""
