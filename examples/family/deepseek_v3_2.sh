# The set of DeepSeek-V3.2 (arXiv 2512.02556), on the embedded model and the built-in task.
# A KL estimate whose gradient is the KL's, without completions that are
# off the policy and bad, several steps a rollout.
# Run it from the repository's root, with the environment of `make model`; more flags may follow.
torchrun --standalone --nproc_per_node 2 train.py --config examples/family/common.yaml \
    --kl_unbiased true \
    --beta 0.04 \
    --off_policy_sequence_mask_delta 0.1 \
    --steps_per_generation 4 \
    --rollout_importance_sampling_mode token_truncate \
    --output_dir output/deepseek_v3_2 "$@"
