#!/usr/bin/env bash
# Makes .venv if it is missing, then runs ruff and the whole CPU test suite. Arguments go to pytest:
#
#   bash tools/test.sh                              everything, on 3 processes
#   bash tools/test.sh tests/unit/config -k loops   a part of it
#   bash tools/test.sh -n 0 --pdb                   in one process, with a debugger
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_env.sh
.venv/bin/ruff check .

# One thread a process: the workers, and the ranks they start, share the cores. Tests of one
# xdist_group run on one worker, so that they share the ranks they keep warm.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n 3 --dist loadgroup --durations 25 --durations-min 5 "$@"
