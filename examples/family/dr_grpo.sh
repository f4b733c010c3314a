# Dr. GRPO (arXiv 2503.20783), on the embedded model and the built-in task.
# No division by the group's standard deviation, nor by a completion's length.
# Run it from the repository's root, with the environment of `make model`; more flags may follow.
torchrun --standalone --nproc_per_node 2 train.py --config examples/family/common.yaml \
    --loss_type dr_grpo \
    --scale_rewards none \
    --beta 0 \
    --num_iterations 2 \
    --output_dir output/dr_grpo "$@"
