# CISPO, of MiniMax-M1 (arXiv 2506.13585), on the embedded model and the built-in task.
# The ratio is a bounded weight: no token loses its gradient.
# Run it from the repository's root, with the environment of `make model`; more flags may follow.
torchrun --standalone --nproc_per_node 2 train.py --config examples/family/common.yaml \
    --loss_type cispo \
    --epsilon_high 5 \
    --beta 0 \
    --num_iterations 2 \
    --output_dir output/cispo "$@"
