"""Several processes: their group, each rank's batches, the exchange between them."""
