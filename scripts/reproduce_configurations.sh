#!/usr/bin/env bash
# Table 1, parameters, experts, capacity and dims, of the registered architectures.
#   bash scripts/reproduce_configurations.sh [options]      # CHECKPOINT, DATA, FLAGS: as reproduce.sh says
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" configurations "$@"
