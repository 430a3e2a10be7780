#!/usr/bin/env bash
#SBATCH --job-name=barlow --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --time=24:00:00
#SBATCH --signal=USR1@120 --requeue --open-mode=append
# sbatch flows/cluster/slurm.sh, in the project's folder, which all nodes share: pretrain on all of them, then let the
# deployment do the rest. Two minutes before its time is over a job writes a checkpoint and queues itself again.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" DVC_NO_ANALYTICS=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1

remote=$(dvc config core.remote 2> /dev/null || true)
if [ "$remote" ]; then dvc pull --allow-missing; fi
barlow scan
for stage in ingest validate shard; do dvc repro --single-item "$stage"; done

begun=$(mktemp)
trap 'rm -f "$begun"' EXIT
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ! srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "${nodes[0]}:${RDZV_PORT:-29400}" --rdzv-id "$SLURM_JOB_ID" -m barlow.cli pretrain; then
  # Not where this job wrote none: what lies there is of other runs, or nothing was gained.
  if [ -n "$(find models/resume -name 'step-*' -newer "$begun" 2>/dev/null)" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit 1
fi
dvc commit --force pretrain # what ran outside of DVC is what DVC would have run
if [ "$remote" ]; then dvc push; fi
if [ "${PREFECT_API_URL:-}" ]; then prefect deployment run retrain/retrain-nightly; fi
