# REINFORCE++ with a baseline (arXiv 2501.03262), on the embedded model and the built-in task.
# A reward less its group's mean, scaled over the
# whole batch, the KL as part of it.
# Run it from the repository's root, with the environment of `make model`; more flags may follow.
torchrun --standalone --nproc_per_node 2 train.py --config examples/family/common.yaml \
    --advantage_estimator reinforce_plus_plus \
    --kl_in_reward true \
    --beta 0.01 \
    --loss_type dapo \
    --output_dir output/reinforce_plus_plus "$@"
