#!/bin/sh
# The main commands, once each, on a small model: train, sample, evaluate, export, fine-tune, compare. Leaves no files.
set -eu
python=${1:-python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" train.py --run.dir "$folder/run" --train.steps 20 --train.warmup_steps 2 --train.eval_tokens 4096 \
    --train.batch_tokens 1024 --train.sample_tokens 20
"$python" infer.py --ckpt "$folder/run" --prompt "    def" --max_new_tokens 20
"$python" eval.py --ckpt "$folder/run"
"$python" checkpoint.py export "$folder/run" "$folder/exported"
"$python" checkpoint.py push "$folder/exported" me/model --dry_run
"$python" infer.py --ckpt "$folder/exported" --prompt "import " --num_beams 3 --max_new_tokens 10
"$python" finetune.py --base_ckpt "$folder/run" --run.dir "$folder/sft" --steps 4 --warmup_steps 1 --batch_tokens 1024 \
    --eval_every 2 --eval_tokens 1024 --sample_tokens 8 --chat.limit 200 --lora.rank 4
"$python" infer.py --ckpt "$folder/sft" --instruct --prompt "Say hello." --max_new_tokens 10
"$python" checkpoint.py export "$folder/sft" "$folder/merged" --merge
"$python" checkpoint.py verify "$folder/sft"
"$python" -m nanoqwen.report compare "$folder/run" "$folder/sft" --output "$folder/compare.html"
echo "smoke: ok"
