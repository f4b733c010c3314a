# GSPO (arXiv 2507.18071), on the embedded model and the built-in task.
# One ratio a completion, and a clip as narrow as that asks for.
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
    --importance_sampling_level sequence \
    --epsilon 3e-4 \
    --epsilon_high 4e-4 \
    --beta 0 \
    --steps_per_generation 4 \
    --output_dir output/gspo "$@"
