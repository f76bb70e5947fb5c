#!/bin/bash
# Train on several machines under Slurm, for as many time limits as it takes:
#
#   sbatch configs/slurm.sh --config configs/pretrain_124m.yaml --save_dir /shared/mine
#
# from groundup's folder, which all machines see, as they see --save_dir and the data. What follows are train.py's options.
# Before the time is up the ranks finish their step, save and leave, and the job is queued again. docs/hangs.md says what to
# look at where ranks do not find one another.

#SBATCH --job-name=groundup
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

source .venv/bin/activate
first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# one torchrun a machine, which starts a rank for each GPU; lost ranks are started again, from the newest whole checkpoint.
# Without --signals-to-handle SIGUSR1 would end torchrun and leave its ranks alone. A save may take 240 s of the 300.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_NNODES" --nproc_per_node="${RANKS_PER_MACHINE:-gpu}" --max-restarts=3 \
  --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-backend=c10d --rdzv-endpoint="$first_machine:29500" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=240 \
  train.py --checkpoint latest "$@" &
step=$!

time_is_up=""
trap 'time_is_up=yes; kill -USR1 "$step"' USR1 # srun passes it on to every torchrun, and these to their ranks

wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # the signal has ended `wait`, not srun
  wait "$step"
  code=$?
done
if [ -n "$time_is_up" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
