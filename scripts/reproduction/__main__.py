"""`python -m reproduction NAME [options]`: what scripts/reproduce_NAME.sh starts."""

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module(f"reproduction.{sys.argv[1]}").main(sys.argv[2:]))
