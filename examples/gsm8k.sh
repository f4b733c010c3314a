# GSM8K's word problems on the embedded model: on two cores its reward rises within ten minutes.
# The rows are the hub's. From a file of them:  GSM8K=train.jsonl sh examples/gsm8k.sh
# Run it from the repository's root, with the environment of `make model`; more flags may follow.
python examples/gsm8k.py "${GSM8K:-openai/gsm8k:main}" output/gsm8k.jsonl &&
torchrun --standalone --nproc_per_node 2 train.py \
    --model models/SmolLM2-135M-Instruct \
    --torch_dtype float32 \
    --dataset output/gsm8k.jsonl \
    --split_dataset_ratio 0 \
    --response_prefix '<think>' \
    --external_plugins examples/train/grpo/plugin/close.py \
    --reward_funcs accuracy format close \
    --reward_weights 1 0.5 1 \
    --gradient_checkpointing false \
    --lora_rank 16 \
    --learning_rate 5e-4 \
    --lr_scheduler_type constant \
    --weight_decay 0 \
    --beta 0 \
    --num_generations 8 \
    --per_device_train_batch_size 16 \
    --max_completion_length 48 \
    --temperature 0.9 \
    --max_steps 20 \
    --log_completions true \
    --output_dir output/gsm8k "$@"
