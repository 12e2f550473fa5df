#!/usr/bin/env bash
# Throughput against batch size: static, sparse static, dynamic; the largest batch within a memory limit.
#   bash scripts/reproduce_throughput.sh [options]      # CHECKPOINT, DATA, FLAGS: as reproduce.sh says
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" throughput "$@"
