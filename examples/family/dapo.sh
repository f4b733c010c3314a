# DAPO (arXiv 2503.14476), on the embedded model and the built-in task.
# Groups that teach nothing are drawn anew, the upper clip is wider, the loss
# is a mean over tokens, completions that were cut give no gradient, long ones are penalized.
# Run it from the repository's root, with the environment of `make model`; more flags may follow.
torchrun --standalone --nproc_per_node 2 train.py --config examples/family/common.yaml \
    --reward_funcs accuracy format soft_overlong \
    --loss_type dapo \
    --epsilon 0.2 \
    --epsilon_high 0.28 \
    --beta 0 \
    --dynamic_sample true \
    --max_resample_times 3 \
    --overlong_filter true \
    --soft_cache_length 8 \
    --steps_per_generation 2 \
    --output_dir output/dapo "$@"
