"""Several processes: their group, each rank's batches, the exchange between them."""

import fairseq_moe_ext.gating  # noqa: F401  before the modules here, which the layer still imports back
