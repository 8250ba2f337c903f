
for needed in ray orpo-ray; do
    if ! command -v "$needed" > /dev/null; then
        echo "$needed is not on PATH; activate the environment of orpo-ray, call sbatch again" >&2
        exit 3
    fi
done

# The token is this job's own. It allows to run any code here, so only this user can read it.
private="$HOME/.orpo-ray/slurm-$SLURM_JOB_ID"
trap 'rm -rf "$private"' EXIT
rm -rf "$private"
(
    umask 077 && mkdir -p "$private" &&
        od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$private/token"
) || exit 1
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token"

# This script runs on the first node, which becomes Ray's head. Some systems resolve their own name
# to 127.0.1.1, which other nodes cannot reach.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk '$1 !~ /^127\./ { print $1; exit }')
[ -n "$address" ] || address=$(hostname -I | awk '{ print $1 }')
# On a node with several interfaces, gloo and NCCL would each guess which one to use. All nodes are
# taken to have the same interface names.
interface=$(ip -o -4 addr show to "$address" | awk '{ print $2; exit }')
[ -z "$interface" ] || export GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface"

# From a slow shared disk Ray may take longer to start than 30 s, which is how long nodes wait for
# each other by default. There are two such waits, and Ray ends the second after a minute at most.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 RAY_py_gcs_connect_timeout_s=60

# Runs on the head, and keeps the exit code in a file. Ray's own exit code also depends on the other
# nodes and on how Ray ends.
# shellcheck disable=SC2016
driver='"${@:2}" & echo $! > "$1/new" && mv "$1/new" "$1/pid"
wait $!; code=$?; echo "$code" > "$1/code"; exit "$code"'

# When the head is done, Ray on the other nodes needs a minute to notice. A step does not inherit
# --cpus-per-task, so it is given again.
srun --nodes="$nodes" --ntasks="$nodes" --cpus-per-task="$cpus" --wait=90 \
    ray symmetric-run --address "$address:$gcs_port" --min-nodes "$nodes" \
    --num-cpus="$cpus" --num-gpus="$gpus" "${ray_options[@]}" -- \
    env RAY_ADDRESS="$address:$gcs_port" bash -c "$driver" driver "$private" "${train[@]}" &
step=$!

# Only the command that trains gets the signal. It needs Ray until its checkpoint is saved, and a
# signal to `ray symmetric-run` would end both.
time_is_up=
trap 'time_is_up=yes; kill -TERM "$(cat "$private/pid" 2> /dev/null || echo "$step")"' TERM

wait "$step"
while kill -0 "$step" 2> /dev/null; do wait "$step"; done # a signal ends `wait`, but not the step

code=$(cat "$private/code" 2> /dev/null)
# For a run in a bucket, the exit code of orpo-ray itself says whether it is finished.
if [ -z "$result" ]; then
    [ "$code" != 0 ] || status=finished
else
    read_status='import json, sys; print(json.load(open(sys.argv[1]))["status"])'
    status=$(python3 -c "$read_status" "$result" 2> /dev/null)
fi

# A finished run is a success, however Ray ended. With code 2 the config was refused, so the result
# is that of another run.
if [ "$status" = finished ] && [ "$code" != 2 ]; then
    echo "finished: ${result:-the run is in its bucket}"
    exit 0
fi
# The limit of 100 ends a run that makes no progress.
if [ -n "$time_is_up" ] && [ "$code" = 4 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
    echo "the time limit is near; the job is queued again and resumes from its checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit 4
fi
echo "not finished: ${result:-orpo-ray} does not say so" >&2
[ "${code:-0}" -ne 0 ] || code=1
exit "$code"
