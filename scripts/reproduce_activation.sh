#!/usr/bin/env bash
# Which experts are active: shares per batch, idle experts against batch size, temporal locality.
#   bash scripts/reproduce_activation.sh [options]      # CHECKPOINT, DATA, FLAGS: as reproduce.sh says
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" activation "$@"
