#!/bin/bash
# sbatch configs/slurm.sh CONFIG.yaml [key=value ...]
# Starts one task per GPU. Two minutes before its time is over, the job saves a checkpoint, ends with status 75, and is
# queued again under its own number, which names the run's folder. A job that is preempted does the same.
#SBATCH --job-name=ilvr_lightning
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" python train.py "$@" resume=auto \
    trainer.devices="$SLURM_NTASKS_PER_NODE" trainer.num_nodes="$SLURM_NNODES"
status=$?
case $status in  # 138 and 143: SIGUSR1 or SIGTERM came before the training began
    75 | 138 | 143) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $status
