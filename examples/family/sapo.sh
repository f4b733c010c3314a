# SAPO (arXiv 2511.20347), on the embedded model and the built-in task.
# A soft gate in the clip's place.
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
    --loss_type sapo \
    --tau_pos 1.0 \
    --tau_neg 1.05 \
    --beta 0 \
    --num_iterations 2 \
    --output_dir output/sapo "$@"
