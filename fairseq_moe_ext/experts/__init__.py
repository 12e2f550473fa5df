"""An expert's weights, and how they are computed where they lie."""
