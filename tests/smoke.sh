#!/bin/sh
# A new user's first minutes, in miniature: train, continue a text, export. About a minute; leaves nothing behind.
set -eu
python=${1:-python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" train.py --run.dir "$folder/run" --train.steps 20 --train.warmup_steps 2 --train.eval_tokens 4096 \
    --train.batch_tokens 1024 --train.sample_tokens 20
"$python" infer.py --ckpt "$folder/run" --prompt "def " --max_new_tokens 20
"$python" checkpoint.py export "$folder/run" "$folder/exported"
"$python" infer.py --ckpt "$folder/exported" --prompt "import " --num_beams 3 --max_new_tokens 10
echo "smoke: ok"
