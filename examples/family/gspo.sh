# GSPO (arXiv 2507.18071), on the embedded model and the built-in task.
# One ratio a completion, and a clip as narrow as that asks for.
# Run it from the repository's root, with the environment of `make model`; more flags may follow.
torchrun --standalone --nproc_per_node 2 train.py --config examples/family/common.yaml \
    --importance_sampling_level sequence \
    --epsilon 3e-4 \
    --epsilon_high 4e-4 \
    --beta 0 \
    --steps_per_generation 4 \
    --output_dir output/gspo "$@"
