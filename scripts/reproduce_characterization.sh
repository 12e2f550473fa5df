#!/usr/bin/env bash
# Where time and memory go: dense, static and dynamic, by part, per batch size.
#   bash scripts/reproduce_characterization.sh [options]      # CHECKPOINT, DATA, FLAGS: as reproduce.sh says
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" characterization "$@"
