#!/usr/bin/env bash
# Trains configs/global_era5_025.yaml, or another config, and goes on over any number of time limits.
#   sbatch slurm/train_global.sh                                       from the project's root
#   sbatch slurm/train_global.sh my.yaml --set training.steps=50000    another config, other values
# Edit the site lines, or leave them: options of sbatch (`sbatch --account=climate --nodes=2 ...`) win over them.
# slurm/README.md says what to look at. `scancel JOB` ends a run for good.

# ---- site -----------------------------------------------------------------------------------------------------------
##SBATCH --partition=gpu
##SBATCH --account=climate
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=4          # one rank per GPU; nodes x this = replicas x lat x lon of the config
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
# ---- the same everywhere --------------------------------------------------------------------------------------------
#SBATCH --job-name=faconv-global
#SBATCH --signal=USR1@120            # seconds before the limit; training.usr_grace_s of the config says the same
#SBATCH --requeue
#SBATCH --open-mode=append           # one log over all starts
#SBATCH --output=slurm-%j.log

module_lines() {                     # site: what a login shell has and a job lacks
    # module load cuda gcc
    if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
}

if [ -z "$SLURM_JOB_ID" ]; then
    echo "this is not a job: start it with sbatch slurm/train_global.sh [CONFIG] [options of faconv train]" >&2
    exit 2
fi
config=${1:-configs/global_era5_025.yaml}
[ $# -gt 0 ] && shift
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
module_lines
export SLURM_EXPORT_ENV=ALL                           # what is set here reaches the ranks, whatever --export says
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}   # since Slurm 22.05 srun does not take it from sbatch
echo "$(date --iso-8601=seconds) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"

# What cannot work is found before the ranks train, and ends the job; at a later start, which began well, it is only
# told. PREFLIGHT=no leaves it out.
if [ "${PREFLIGHT:-yes}" != no ]; then
    settings=() before=              # of the options only --set means something to doctor
    for word in "$@"; do
        case $before,$word in
            --set,*) settings+=(--set "$word") ;;
            *,--set=*) settings+=("$word") ;;
        esac
        before=$word
    done
    srun --kill-on-bad-exit=1 --wait=60 faconv doctor "$config" "${settings[@]}" --quick
    if [ $? -eq 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then exit 2; fi
fi

srun --kill-on-bad-exit=1 --wait=60 faconv train "$config" "$@"
code=$?
# 75: stopped by a signal, or a rank was lost. Above 128: a rank was killed. Never for 2 (a mistake in the config
# or the data), 1 (failed) or 93 (starting again leads nowhere).
if [ "$code" -eq 75 ] || [ "$code" -gt 128 ]; then
    for again in 1 2 3 4 5 6; do scontrol requeue "$SLURM_JOB_ID" && break; sleep 10; done
    sleep 60  # meanwhile Slurm ends this script
fi
exit "$code"
