# What a site edits, read by every script here. Most can be given for one submission as well:
#   GPU_TYPE=H100 NODES=4 bash slurm/pretrain_plt_moe.sh
# shellcheck shell=bash disable=SC2034

# Who pays, and where jobs run. sbatch reads SBATCH_* by itself; unset means the cluster's default.
# (For a plain `sbatch slurm/X.sh`, run `source slurm/env.sh` in your shell before.)
#export SBATCH_ACCOUNT=my_project
#export SBATCH_PARTITION=gpu
#export SBATCH_QOS=normal
# Options of jobs that need no GPU (preprocess, convert, report).
CPU_OPTIONS=() # e.g. (--partition=cpu)

# GPU that tools/plan.py checks memory for; `python tools/plan.py --help` lists them. Empty: no check.
GPU_TYPE=${GPU_TYPE-H200}
# yes: `bash slurm/X.sh` looks before it submits whether data sets and tokenizer exist, and whether the
# model has a row for each piece. no: where the login node does not see their file system.
CHECK_DATA=${CHECK_DATA:-yes}

# Python of the environment (tools/setup_env.sh makes .venv). In a container: python.
PYTHON=${PYTHON:-.venv/bin/python}
# Container, one of two ways (docs/slurm.md has the recipe). Both empty: bare environment.
#   enroot/pyxis: options of srun, e.g.
#   (--container-image="$PWD/pltmoe.sqsh" --container-mounts="$PWD,/data" --container-workdir="$PWD")
SRUN_OPTIONS=()
#   Apptainer: what stands before the command, e.g. (apptainer exec --nv --bind /data pltmoe.sif)
CONTAINER=()

# Overrides of every run, before those of the command line, e.g. (tracking.mlflow_uri=http://mlflow:5000)
OVERRIDES=()

# Network. Interface names differ between sites: `ip -brief address` on a compute node shows them.
#export NCCL_SOCKET_IFNAME=ib0  # set-up messages of NCCL
#export GLOO_SOCKET_IFNAME=ib0  # CPU messages (checkpoints, small decisions)
#export NCCL_IB_HCA=mlx5        # InfiniBand adapters that carry the data
#export NCCL_DEBUG=WARN         # INFO when the network is to be debugged
# First port for the ranks to meet; a job takes this plus the last four digits of its number.
PORT_BASE=${PORT_BASE:-20000}
# Threads of each rank on the CPU.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# After a crash a job is requeued this often without a new checkpoint in between; 0: never.
MAX_CRASH_RESTARTS=${MAX_CRASH_RESTARTS:-2}
# yes: not on the node where the first rank crashed, or a rank hung (while there are enough others).
EXCLUDE_CRASHED_NODES=${EXCLUDE_CRASHED_NODES:-yes}
