#!/bin/bash
# From the repository, on a file system that all nodes share, after `make setup`:
#   sbatch cluster/deploy/slurm.sh configs/runs/counterfact-gpt2-xl.yaml --out /shared/runs/gpt2-xl
# A preempted job is queued again by Slurm, one at its time limit by itself; both resume.
#SBATCH --job-name=rome-bench
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?must be set: start this with sbatch}"
# shellcheck source=/dev/null
source .venv/bin/activate

# A secret of this job alone; srun hands it to the nodes, and nobody else can read it there.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(hostname -I | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS=$head:$port

start_ray() { # NODE ARGUMENTS...
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" \
        ray start --block --disable-usage-stats --num-cpus="$SLURM_CPUS_PER_TASK" "${@:2}" &
}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
start_ray "${nodes[0]}" --head --node-ip-address="$head" --port="$port" \
    --dashboard-host=127.0.0.1 --temp-dir="/tmp/ray-$SLURM_JOB_ID"
# shellcheck disable=SC2016
timeout 120 bash -c 'until ray health-check --address "$RAY_ADDRESS"; do sleep 1; done'
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address="$RAY_ADDRESS"
done

# Workers of nodes that are not there yet wait for them. What the command line sets wins.
python -m jobs.evaluate --set workers.num_gpus=1 \
    --set workers.workers=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1})) "$@" &
driver=$!
stopping="" again=""
trap 'stopping=yes; kill -TERM "$driver" || true' TERM
trap 'stopping=yes; again=yes; kill -TERM "$driver" || true' USR1

status=0
wait "$driver" || status=$?
if [[ $stopping ]]; then # The signal ended that wait, not the driver.
    status=0
    wait "$driver" || status=$?
fi
# 130: it was stopped; 143: the signal came while it still looked at the model.
if [[ $again && ($status -eq 130 || $status -eq 143) ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
