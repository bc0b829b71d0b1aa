#!/usr/bin/env bash
# Everything that needs a GPU, in one command that takes less than nine minutes, or what has room in them:
#
#     bash benchmarks/gpu_session.sh FOLDER
#
# leaves in FOLDER: summary.txt, tests.log, operations.log, networks.log, and <device>.json, from which
# `basicsr bench report` makes tables and plots. A part that fails or runs out of time does not keep the others from
# running; the exit status is 0 if all passed, and 1 otherwise. What is needed most comes first, and every comparison is
# kept as soon as it is made: little is lost where the time does not suffice for all, as on the first run on a machine,
# which compiles all kernels. attnsr need not be installed, but
# what it needs must be: it is built from here and imported from there. PYTHON chooses the interpreter.
set -uo pipefail

if (($# != 1)); then
    echo "usage: bash $0 FOLDER" >&2
    exit 2
fi
readonly ALL_SECONDS=525
mkdir -p "$1" && folder=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
built=$(mktemp -d) || exit 2
trap 'rm -rf "$built" "$folder"/*.writing-*' EXIT
: >"$folder/summary.txt"
failed=0
obstacle=''

# tell WORDS...: on the screen, and in the summary
tell() {
    echo "$*" | tee -a "$folder/summary.txt"
}

# part LOG SECONDS TITLE COMMAND...: run a command in the time that there is, with its output in LOG.log
part() {
    local log=$folder/$1.log seconds=$2 title=$3 left=$((ALL_SECONDS - SECONDS)) began=$SECONDS outcome status
    shift 3
    ((seconds <= left)) || seconds=$left
    ((seconds >= 5)) || obstacle='the time is up'
    if [[ $obstacle ]]; then
        tell "$title: not begun, $obstacle"
        failed=1
        return 1
    fi
    echo "== $title" >>"$log"
    timeout --kill-after=5 "$seconds" "$@" >>"$log" 2>&1
    status=$?
    case $status in
        0) outcome='passed' ;;
        124 | 137) outcome="ran out of its $seconds s" ;;
        *) outcome="FAILED with status $status" ;;
    esac
    tell "$title: $outcome, $((SECONDS - began)) s"
    ((status == 0)) && return
    awk '/^== /{text = ""; next} NF {text = text "    " $0 "\n"} END {printf "%s", text}' "$log" | tail -n 3 |
        tee -a "$folder/summary.txt"
    failed=1
    return 1
}

bench() {
    local log=$1 seconds=$2 title=$3
    shift 3
    part "$log" "$seconds" "$title" "$python" -m attnsr bench "$@" --device cuda --no-report --output "$folder"
}

rm -f "$folder"/{tests,operations,networks}.log
export PYTHONUNBUFFERED=1 PYTHONPATH=$built/lib${PYTHONPATH:+:$PYTHONPATH}
if ! part tests 60 'building attnsr' "$python" setup.py --quiet build --build-base "$built" --build-lib "$built/lib"; then
    tell 'attnsr cannot be built: see tests.log; it takes setuptools of at least 77'
    exit 1
fi
if ! part tests 60 'importing attnsr' "$python" -c 'import attnsr.benchmarks.command as c; print(c.__file__)'; then
    tell 'attnsr cannot be imported: see the last line above; pip install its dependencies, which pyproject.toml names'
    exit 1
fi

parallel=()
! "$python" -c 'import xdist' 2>/dev/null || parallel=(-n 14)
find_gpu='import sys, torch; torch.cuda.is_available() or sys.exit("this PyTorch finds no CUDA device")'
part tests 60 'finding a CUDA device' "$python" -c "$find_gpu" || obstacle='there is no CUDA device'
part tests 230 'tests of the kernels' \
    "$python" -m pytest tests/ops -m gpu -v -o addopts= -p no:cacheprovider "${parallel[@]}"

operations=(
    window_attention dynamic_conv channel_attention shift_linear cluster_attention gated_feed_forward separable_conv
)
networks=(elan_light asid dlgsanet_light lcoan)
for network in "${networks[@]}"; do
    bench networks 100 "$network" networks "$network" --seconds 0.5 --size 720p training
done
for operation in "${operations[@]}"; do
    bench operations 60 "$operation" "$operation" --seconds 0.15 --size 720p training --without torch.compile
done
for operation in "${operations[@]}"; do
    bench operations 60 "$operation to 1080p and 4K" \
        "$operation" --seconds 0.15 --size 1080p 4K --without torch.compile
done
# Compiling takes its time, so this comes late, for one size; it replaces what was measured of the same above.
for operation in "${operations[@]}"; do
    bench operations 60 "$operation with torch.compile" "$operation" --seconds 0.15 --size 1080p --dtype bfloat16
done
for network in "${networks[@]}"; do
    bench networks 120 "$network with torch.compile" \
        networks "$network" --seconds 0.5 --size 720p --dtype bfloat16 --with torch.compile
done
for network in "${networks[@]}"; do
    bench networks 60 "$network to 1080p and 4K" networks "$network" --seconds 0.5 --size 1080p 4K
done

if ((failed)); then
    tell "some parts did not pass, ${SECONDS} s in all"
else
    tell "all passed, ${SECONDS} s in all"
fi
exit "$failed"
