#!/usr/bin/env bash
# What is run first on a GPU? Five calls of at most six minutes each, in order of what matters:
#
#   bash bench/gpu_suite.sh first    does it run at all: every stage, resume, generate and chat, every back end and kernel once
#   bash bench/gpu_suite.sh 1        every test on the compiled kernels; norms, SwiGLU, RoPE against their peers
#   bash bench/gpu_suite.sh 2        the loss and its chunks, LoRA's paths, NF4, attention
#   bash bench/gpu_suite.sh 3        whole training steps: 124M, 1B, LoRA and QLoRA at 8B
#   bash bench/gpu_suite.sh 4        fine-tuning beside transformers, peft and bitsandbytes, and what QLoRA keeps for its backward
#
# Each takes up what earlier calls left: rows that are there, and files of tests that passed, are not run again, so a part
# that ran out of time is simply called once more. `first --dry_run` runs the same list on the CPU with tiny shapes; --again,
# --minutes and --jobs are bench/gpu_first.py's too. Nothing is downloaded. Results go to bench/results/DEVICE, or to the
# folder that the variable OUT names; then what bench/results/DEVICE holds already is read or copied from there first, and
# copying OUT's files back is left to the caller. COMMIT names the commit where there is no git checkout; PYTHON is the
# interpreter (default: python3).
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
commit=()
[ -n "${COMMIT:-}" ] && commit=(--commit "$COMMIT")

refuse() {
    echo "error: $1" >&2
    exit 2
}

part=${1:-}
case $part in
    "") sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2 ;;
    first)
        shift
        [ -n "${OUT:-}" ] && commit+=(--out "$OUT")
        exec "$python" bench/gpu_first.py ${commit[@]+"${commit[@]}"} "$@"
        ;;
    1 | 2 | 3 | 4)
        [ "${2:-}" = --dry_run ] && refuse "--dry_run goes with first alone: parts 1 to 4 measure a GPU"
        [ $# -gt 1 ] && refuse "part $part takes no arguments, not $2"
        ;;
    *) refuse "there is no part $part; choose first, 1, 2, 3 or 4" ;;
esac

device=$("$python" -c '
import sys; sys.path.insert(0, ".")
import torch; from bench.measure import device_slug
sys.exit("torch sees no CUDA device") if not torch.cuda.is_available() else print(device_slug(torch.device("cuda")))
') || exit 1
kept=bench/results/$device
out=${OUT:-$kept}
mkdir -p "$out"
for file in "$kept"/*.json "$kept/passed_tests.txt"; do
    [ -e "$file" ] && [ ! -e "$out/$(basename "$file")" ] && cp "$file" "$out/"
done
exec > >(tee "$out/suite_$part.log") 2>&1
tee=$!
echo "part $part on $device, results in $out"
failed=0
common=(--out "$out" ${commit[@]+"${commit[@]}"})

# left SECONDS: that many, or what is left of the part's 335 (SECONDS counts from the start of this script)
left() {
    local rest=$((335 - SECONDS))
    echo $((rest < $1 ? rest : $1))
}

# minutes SECONDS: for a script that starts nothing after --minutes and lets what it started come to its end in 25 s
minutes() {
    awk -v seconds="$(left "$1")" 'BEGIN { printf "%.2f", (seconds > 35 ? (seconds - 25) / 60 : 0.1) }'
}

# limited SECONDS COMMAND…: the scripts end by themselves (--minutes); this ends what hangs
limited() {
    local seconds
    seconds=$(left "$1")
    echo "== ${*:2}"
    [ "$seconds" -lt 10 ] && { echo "== out of time; the same command goes on from here"; return; }
    timeout --kill-after=5 "$seconds" "${@:2}" || { echo "== exit code $?"; failed=1; }
}

# eight files of tests at a time, as most of the time goes into compiling; those that passed are not run again
run_tests() {
    export python out
    touch "$out/passed_tests.txt"
    { grep -lr 'mark\.gpu' tests --include='test_*.py'; ls tests/kernels/test_*.py; } | sort -u |
        grep -vxFf "$out/passed_tests.txt" > "$out/.tests"
    : > "$out/pytest_gpu.log"
    limited 190 xargs -a "$out/.tests" -P 8 -I{} bash -c '
        log=$(mktemp)
        "$python" -m pytest -m gpu -q -p no:cacheprovider "$1" > "$log" 2>&1
        code=$? # 5: no test of this file needs a GPU
        cat "$log" >> "$out/pytest_gpu.log"
        { [ $code -eq 0 ] || [ $code -eq 5 ]; } && echo "$1" >> "$out/passed_tests.txt"
        tail -n 1 "$log" | sed "s|^|$1: |"
        rm "$log"
        [ $code -eq 0 ] || [ $code -eq 5 ]
    ' _ {}
    rm "$out/.tests"
}

# the shapes of bench/lora_paths.py that this device has no figures of
lora_shapes() {
    "$python" - << 'END'
import json, sys
sys.path.insert(0, ".")
from bench.lora_paths import MEASURED, SHAPES, device_name
import torch
rows = json.loads(MEASURED.read_text()) if MEASURED.exists() else []
mine = [row for row in rows if (row["device"], row["dtype"]) == (device_name(torch.device("cuda")), "bfloat16")]
measured = {tuple(row[key] for key in ("rows", "N", "K", "R", "adapters")) for row in mine}
print(*(text for text in SHAPES["cuda"] if tuple(map(int, (text + "x1").split("x")[:5])) not in measured))
END
}

# what an earlier call measured, on a machine that may be gone
take_lora_measured() {
    local file=$out/lora_measured.json
    [ -e "$file" ] && ! cmp -s "$file" kernels/lora_measured.json && cp "$file" kernels/
}

# the shapes of bench/nf4_memory.py that are not there with all their parts
nf4_sizes() {
    "$python" - "$out/nf4_memory.json" << 'END'
import sys
from pathlib import Path
sys.path.insert(0, ".")
from bench.measure import read_results
from bench.nf4_memory import PARTS, SHAPES
found = read_results(Path(sys.argv[1]))
print(*(size for size in SHAPES if not set(PARTS) <= set(found.get(size, {}))))
END
}

case $part in
    1)
        run_tests
        limited 335 "$python" bench/kernels.py "${common[@]}" --minutes "$(minutes 335)" \
            --only add_rms_norm rms_norm swiglu rope add_rms_norm_fp32_stream
        ;;
    2)
        take_lora_measured
        limited 130 "$python" bench/kernels.py "${common[@]}" --minutes "$(minutes 130)" --only linear_cross_entropy --sweeps
        read -ra shapes <<< "$(lora_shapes)"
        [ ${#shapes[@]} -gt 0 ] && limited 70 "$python" bench/lora_paths.py --shapes "${shapes[@]}"
        cp kernels/lora_measured.json "$out/"
        limited 335 "$python" bench/kernels.py "${common[@]}" --minutes "$(minutes 335)" \
            --only lora_linear norm_lora_linear nf4_dequantise nf4_linear nf4_few_rows attention token_statistics
        ;;
    3)
        take_lora_measured
        # torch.compile of 32 layers takes minutes, so it comes last, and has a whole call for itself once the rest is there
        limited 200 "$python" bench/step.py "${common[@]}" --minutes "$(minutes 200)" --task qlora lora pretrain \
            --ways eager ours "ours augmented" peft "peft + bitsandbytes" unsloth transformers "transformers + liger"
        limited 335 "$python" bench/step.py "${common[@]}" --minutes "$(minutes 335)" --task pretrain qlora lora
        ;;
    4)
        read -ra sizes <<< "$(nf4_sizes)"
        [ ${#sizes[@]} -gt 0 ] && limited 100 "$python" bench/nf4_memory.py --out "$out" --size "${sizes[@]}"
        limited 335 "$python" bench/finetune.py --out "$out"
        ;;
esac
[ "$out" = "$kept" ] && "$python" bench/kernels.py --docs
echo "== targets"
"$python" bench/kernels.py --targets --out "$out"
exec >&- 2>&- # tee writes what it still holds
wait "$tee"
exit $failed
