"""An expert's weights, and how they are computed where they lie."""

import fairseq_moe_ext.gating  # noqa: F401  before the modules here, which the layer still imports back
