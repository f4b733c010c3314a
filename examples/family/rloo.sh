# RLOO (arXiv 2402.14740), on the embedded model and the built-in task.
# A completion's reward less the mean of the others', the KL as part of it.
# Run it from the repository's root, with the environment of `make model`; more flags may follow.
torchrun --standalone --nproc_per_node 2 train.py --config examples/family/common.yaml \
    --advantage_estimator rloo \
    --kl_in_reward true \
    --beta 0.04 \
    --loss_type dr_grpo \
    --output_dir output/rloo "$@"
