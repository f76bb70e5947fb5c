#!/usr/bin/env bash
# What is measured first on a GPU? Four parts of under ten minutes each, in order of what matters:
#
#   bash bench/gpu_suite.sh 1    every test on the compiled kernels; norms, SwiGLU, RoPE against their peers
#   bash bench/gpu_suite.sh 2    the loss and its chunks, LoRA's paths, NF4, attention
#   bash bench/gpu_suite.sh 3    whole training steps: 124M, 1B, LoRA and QLoRA at 8B
#   bash bench/gpu_suite.sh 4    fine-tuning beside transformers, peft and bitsandbytes, and what QLoRA keeps for its backward
#
# Each takes up what earlier calls left: rows that are there are not measured again, so a part that ran out of time is
# simply called once more. Nothing is downloaded. Results go to bench/results/DEVICE, or to the folder that the variable
# OUT names; then what bench/results/DEVICE holds already is copied there first, and copying OUT's files back is left to
# the caller. COMMIT names the commit where there is no git checkout; PYTHON is the interpreter (default: python3).
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
part=${1:-}
case $part in
    1 | 2 | 3 | 4) ;;
    *) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
device=$("$python" -c '
import sys; sys.path.insert(0, ".")
import torch; from bench.measure import device_slug
sys.exit("torch sees no CUDA device") if not torch.cuda.is_available() else print(device_slug(torch.device("cuda")))
') || exit 1
kept=bench/results/$device
out=${OUT:-$kept}
mkdir -p "$out"
for file in "$kept"/*.json; do
    [ -e "$file" ] && [ ! -e "$out/$(basename "$file")" ] && cp "$file" "$out/"
done
exec > >(tee "$out/suite_$part.log") 2>&1
tee=$!
echo "part $part on $device, results in $out"
failed=0
common=(--out "$out")
[ -n "${COMMIT:-}" ] && common+=(--commit "$COMMIT")

# limited SECONDS COMMAND…: the scripts end by themselves (--minutes); this ends what hangs
limited() {
    echo "== ${*:2}"
    timeout --kill-after=10 "$@" || { echo "== exit code $?"; failed=1; }
}

run_tests() {
    local workers=()
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8 --dist loadfile) # most of the time goes into compiling
    limited 280 "$python" -m pytest -m gpu -q -p no:cacheprovider "${workers[@]}" > "$out/pytest_gpu.log"
    tail -n 25 "$out/pytest_gpu.log"
}

case $part in
    1)
        run_tests
        limited 265 "$python" bench/kernels.py "${common[@]}" --minutes 4 \
            --only add_rms_norm rms_norm swiglu rope add_rms_norm_fp32_stream
        ;;
    2)
        limited 240 "$python" bench/kernels.py "${common[@]}" --minutes 3.5 --only linear_cross_entropy --sweeps
        limited 90 "$python" bench/lora_paths.py
        cp kernels/lora_measured.json "$out/"
        limited 240 "$python" bench/kernels.py "${common[@]}" --minutes 3.5 \
            --only lora_linear norm_lora_linear nf4_dequantise nf4_linear nf4_few_rows attention token_statistics
        ;;
    3)
        [ -e "$out/lora_measured.json" ] && cp "$out/lora_measured.json" kernels/
        # torch.compile of 32 layers takes minutes, so it comes last
        limited 290 "$python" bench/step.py "${common[@]}" --minutes 4.5 --task qlora lora pretrain \
            --ways eager ours "ours augmented" peft "peft + bitsandbytes" unsloth transformers "transformers + liger"
        limited 260 "$python" bench/step.py "${common[@]}" --minutes 4 --task pretrain qlora lora
        ;;
    4)
        limited 120 "$python" bench/nf4_memory.py --out "$out"
        limited 450 "$python" bench/finetune.py --out "$out"
        ;;
esac
[ "$out" = "$kept" ] && "$python" bench/kernels.py --docs
echo "== targets"
"$python" bench/kernels.py --targets --out "$out"
exec >&- 2>&- # tee writes what it still holds
wait "$tee"
exit $failed
