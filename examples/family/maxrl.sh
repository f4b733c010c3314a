# MaxRL (arXiv 2602.02710), on the embedded model and the built-in task.
# Rewards of 0 and 1 less their group's mean, divided by it: right answers count the more, the fewer there are.
# Run it from the repository's root, with the environment of `make model`; more flags may follow.
torchrun --standalone --nproc_per_node 2 train.py --config examples/family/common.yaml \
    --scale_rewards mean \
    --reward_weights 1 0 \
    --beta 0 \
    --output_dir output/maxrl "$@"
