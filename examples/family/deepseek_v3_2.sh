# The set of DeepSeek-V3.2 (arXiv 2512.02556), on the embedded model and the built-in task.
# A KL estimate whose gradient is the KL's, without completions that are
# off the policy and bad, several steps a rollout.
# Run it from the repository's root, with the environment of `make install`; more flags may follow.
torchrun --standalone --nproc_per_node 2 train.py \
    --dataset arithmetic \
    --val_dataset arithmetic-test \
    --reward_funcs accuracy format \
    --torch_dtype float32 \
    --gradient_checkpointing false \
    --lora_rank 16 \
    --learning_rate 3e-4 \
    --weight_decay 0 \
    --num_generations 8 \
    --temperature 1.0 \
    --max_completion_length 32 \
    --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 128 \
    --num_generations_eval 1 \
    --eval_steps 10 \
    --max_steps 40 \
    --kl_unbiased true \
    --beta 0.04 \
    --off_policy_sequence_mask_delta 0.1 \
    --steps_per_generation 4 \
    --rollout_importance_sampling_mode token_truncate \
    --output_dir output/deepseek_v3_2 "$@"
