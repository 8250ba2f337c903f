
for needed in ray orpo-ray; do
    if ! command -v "$needed" > /dev/null; then
        echo "$needed is not on PATH; activate the environment of orpo-ray, then call sbatch again" >&2
        exit 3
    fi
done

# The token is this job's own. Whoever reads it runs any code here, so nobody else can.
private="$HOME/.orpo-ray/slurm-$SLURM_JOB_ID"
trap 'rm -rf "$private"' EXIT
rm -rf "$private"
(umask 077 && mkdir -p "$private" && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$private/token") || exit 1
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token"

# This script runs on the first node, which becomes Ray's head; 127.0.1.1, as some systems call themselves, is no use.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk '$1 !~ /^127\./ { print $1; exit }')
[ -n "$address" ] || address=$(hostname -I | awk '{ print $1 }')
# Where several interfaces lead out, gloo and NCCL would each take their own guess. Nodes are alike, so names are, too.
interface=$(ip -o -4 addr show to "$address" | awk '{ print $2; exit }')
[ -z "$interface" ] || export GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface"

# From a shared disk Ray may take longer to start than the 30 s that the nodes wait for each other, in two places; in the
# second one Ray gives up after a minute whatever it is told.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 RAY_py_gcs_connect_timeout_s=60

# Runs on the head. What Ray makes of the exit code depends on the other nodes, and on its own end.
# shellcheck disable=SC2016
driver='"${@:2}" & echo $! > "$1/pid"; wait $!; code=$?; echo "$code" > "$1/code"; exit "$code"'

# Once the head is done, the other nodes' Ray needs a minute to see it. A step does not inherit --cpus-per-task.
srun --nodes="$nodes" --ntasks="$nodes" --cpus-per-task="$cpus" --wait=90 \
    ray symmetric-run --address "$address:$gcs_port" --min-nodes "$nodes" \
    --num-cpus="$cpus" --num-gpus="$gpus" "${ray_options[@]}" -- \
    env RAY_ADDRESS="$address:$gcs_port" bash -c "$driver" driver "$private" "${train[@]}" &
step=$!

# Only what trains is told: it needs Ray to save a checkpoint, and `ray symmetric-run` would end both.
time_is_up=
trap 'time_is_up=yes; kill -TERM "$(cat "$private/pid" 2> /dev/null || echo "$step")"' TERM

wait "$step"
while kill -0 "$step" 2> /dev/null; do wait "$step"; done # the trap ends a wait, not the step

code=$(cat "$private/code" 2> /dev/null)
# What a bucket holds is not looked at from here: orpo-ray's own exit code, which is not Ray's, tells as much.
if [ -z "$result" ]; then
    [ "$code" != 0 ] || status=finished
else
    status=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["status"])' "$result" 2> /dev/null)
fi

# A finished run counts, whatever Ray's end was like. Code 2 refused the config: the result there is another run's.
if [ "$status" = finished ] && [ "$code" != 2 ]; then
    echo "finished: ${result:-the run is in its bucket}"
    exit 0
fi
# A run that never gets anywhere would come back for ever.
if [ -n "$time_is_up" ] && [ "$code" = 4 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
    echo "the time limit is near; the job comes back and goes on from its checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit 4
fi
echo "not finished: ${result:-orpo-ray} does not say so" >&2
[ "${code:-0}" -ne 0 ] || code=1
exit "$code"
