#!/usr/bin/env bash
# Runs a scaling study: one small task that submits each point as a job of its own, waits, and writes table and figure.
#   sbatch slurm/scaling_study.sh configs/study_strong.yaml                       from the project's root
#   bash slurm/scaling_study.sh configs/study_strong.yaml                         the same on a login node
#   sbatch slurm/scaling_study.sh configs/study_weak.yaml --set at_once=1         one point at a time
#   sbatch slurm/scaling_study.sh configs/study_strong.yaml --retry-failed        failed points again
# Edit the site lines, or leave them: options of sbatch (`sbatch --account=climate ...`) win over them. The nodes of the
# points are asked for by section `slurm` of the study's file, not here. Before its time limit, and after SIGTERM, this
# job goes back to the queue; the points' jobs go on meanwhile, and it finds them again. Exit codes: 0 all points are
# done, 1 some have failed, 2 a mistake in the study's file or the config; none of these is requeued. `scancel JOB` ends
# it for good, and leaves the points' jobs.

# ---- site -----------------------------------------------------------------------------------------------------------
##SBATCH --partition=cpu
##SBATCH --account=climate
#SBATCH --time=12:00:00
#SBATCH --mem=4G                     # the stores of a weak study are made here
# ---- the same everywhere --------------------------------------------------------------------------------------------
#SBATCH --job-name=faconv-study
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --signal=B:USR1@120          # to this script, seconds before the limit
#SBATCH --requeue
#SBATCH --open-mode=append           # one log over all starts
#SBATCH --output=slurm-%j.log

module_lines() {                     # site: what a login shell has and a job lacks
    # module load cuda gcc
    if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
}

if [ $# -eq 0 ]; then
    echo "usage: sbatch slurm/scaling_study.sh STUDY.yaml [options of faconv study]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
module_lines
# What every job does at its start and its end, among it the rule for requeueing.
job_sh=faconv_hpc/launch/job.sh      # of this checkout; away from one, of the package that python finds
[ -f "$job_sh" ] || job_sh=$(python -c 'import faconv_hpc; print(faconv_hpc.__path__[0])' 2> /dev/null)/launch/job.sh
source "$job_sh" || { echo "start it from the project's root, or where python finds faconv_hpc" >&2; exit 2; }
command -v faconv > /dev/null || { echo "no faconv on PATH in the job: see module_lines in this script" >&2; exit 2; }
own_job=${SLURM_JOB_ID:-}
where=()
if [ -n "$own_job" ]; then
    where=(--cluster slurm)
fi

faconv study "${where[@]}" "$@" &
study=$!
asked=no
trap 'asked=yes; kill -TERM "$study" 2> /dev/null' USR1 TERM INT   # it leaves with 75; the points' jobs go on
while true; do
    wait "$study"
    code=$?
    kill -0 "$study" 2> /dev/null || break           # else a signal ended the waiting, not the study
done
faconv_end_study "$code" "$asked"
