# SAPO (arXiv 2511.20347), on the embedded model and the built-in task.
# A soft gate in the clip's place.
# Run it from the repository's root, with the environment of `make model`; more flags may follow.
torchrun --standalone --nproc_per_node 2 train.py --config examples/family/common.yaml \
    --loss_type sapo \
    --tau_pos 1.0 \
    --tau_neg 1.05 \
    --beta 0 \
    --num_iterations 2 \
    --output_dir output/sapo "$@"
