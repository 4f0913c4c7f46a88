#!/usr/bin/env bash
# Trains configs/global_era5_025.yaml, or another config, and goes on over any number of time limits.
#   sbatch slurm/train_global.sh                                       from the project's root
#   sbatch slurm/train_global.sh my.yaml --set training.steps=50000    another config, other values
# Edit the site lines, or leave them: options of sbatch (`sbatch --account=climate --nodes=2 ...`) win over them.
# docs/cluster.md says what to look at. `scancel JOB` ends a run for good.

# ---- site -----------------------------------------------------------------------------------------------------------
##SBATCH --partition=gpu
##SBATCH --account=climate
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=4          # one rank per GPU; nodes x this = replicas x lat x lon of the config
#SBATCH --gpus-per-node=4            # where Slurm knows of no GPUs: `sbatch --gpus-per-node=0 ...`, or it refuses the job
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

# What every job does at its start and its end, among it the rule for requeueing.
job_sh=faconv_hpc/launch/job.sh      # of this checkout; away from one, of the package that python finds
[ -f "$job_sh" ] || job_sh=$(python -c 'import faconv_hpc; print(faconv_hpc.__path__[0])' 2> /dev/null)/launch/job.sh
source "$job_sh" || { echo "start it from the project's root, or where python finds faconv_hpc" >&2; exit 2; }
command -v faconv > /dev/null || { echo "no faconv on PATH in the job: see module_lines in this script" >&2; exit 2; }
faconv_say_start
if [ "${PREFLIGHT:-yes}" != no ]; then   # PREFLIGHT=no leaves it out
    settings=() before=                  # of the options only --set means something to doctor
    for word in "$@"; do
        case $before,$word in
            --set,*) settings+=(--set "$word") ;;
            *,--set=*) settings+=("$word") ;;
        esac
        before=$word
    done
    faconv_preflight srun --kill-on-bad-exit=1 --wait=60 faconv doctor "$config" "${settings[@]}" --quick
fi
srun --kill-on-bad-exit=1 --wait=60 faconv train "$config" "$@"
faconv_end $?
