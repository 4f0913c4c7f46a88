# What every job of ours does, whoever wrote its batch script. `faconv submit` puts this text into the script that it
# gives to sbatch; slurm/train_global.sh and slurm/scaling_study.sh read it when they start. Bash, and Slurm's client.

# A line for every start of a job: one log holds them all. The ranks are told how long the job may run and where they
# meet: here, as Slurm is asked once then, and not by each of them.
faconv_say_start() {
    local shown first
    if [ -z "$SLURM_JOB_END_TIME" ]; then
        shown=$(scontrol show job "$SLURM_JOB_ID" 2> /dev/null)
        SLURM_JOB_START_TIME=$(faconv_seconds StartTime "$shown")
        SLURM_JOB_END_TIME=$(faconv_seconds EndTime "$shown")
        export SLURM_JOB_START_TIME SLURM_JOB_END_TIME
    fi
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2> /dev/null | head -n 1)
    shown=$(scontrol show node "$first" 2> /dev/null | grep -m1 -oE "\bNodeAddr=[^ ]+")
    shown=${shown#NodeAddr=}
    export FACONV_FIRST_NODE=${shown:-$first}   # of a step on all nodes
    echo "$(date --iso-8601=seconds) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
}

# Unix time of a date in what `scontrol show job` says; nothing where there is none, as without a time limit.
faconv_seconds() {
    local found
    found=$(grep -m1 -oE "\b$1=[0-9T:-]+" <<< "$2") && date -d "${found#*=}" +%s 2> /dev/null
}

# Runs `... faconv doctor ...`. What cannot work is found before the ranks train, and ends the job; at a later start,
# which began well, it is only told.
faconv_preflight() {
    "$@"
    if [ $? -eq 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then exit 2; fi
}

# Ends the job with the exit code of its ranks (errors.py says what each means), or puts it back into the queue.
# 75: stopped by a signal, or a rank was lost. Above 128: a rank was killed. Never for 2 (a mistake in the config or the
# data), 1 (failed), 93 (starting again leads nowhere) or 130 (interrupted by its user).
faconv_end() {
    if [ "$1" -eq 75 ] || { [ "$1" -gt 128 ] && [ "$1" -ne 130 ]; }; then faconv_requeue; fi
    exit "$1"
}

# The same for the job of a study, which starts no ranks itself: above 128 stands for a signal, and counts if the job was
# `asked` (yes) to end. Outside a job there is nothing to put back.
faconv_end_study() {
    if [ -n "$SLURM_JOB_ID" ] && { [ "$1" -eq 75 ] || { [ "$2" = yes ] && [ "$1" -gt 128 ]; }; }; then faconv_requeue; fi
    exit "$1"
}

# Puts this job back into the queue; where Slurm does not answer, for a minute again and again. Of an array only this
# task: the number of the last one stands for the whole array.
faconv_requeue() {
    local again state job=$SLURM_JOB_ID
    if [ -n "$SLURM_ARRAY_TASK_ID" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    for again in 1 2 3 4 5 6; do
        state=$(scontrol show job "$job" | grep -m1 -o "JobState=[A-Z]*")
        # A job that scancel ends is no longer RUNNING: it stays ended.
        if [ -n "$state" ] && [ "$state" != JobState=RUNNING ]; then
            echo "job $job is ${state#*=}: not put back" >&2
            return
        fi
        if [ -n "$state" ] && scontrol requeue "$job"; then sleep 60; fi   # meanwhile Slurm ends this script
        sleep 10
    done
    echo "Slurm does not take this job back: start the same command again" >&2
}
