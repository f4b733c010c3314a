"""Rewards of your own: name this file in --external_plugins, and a reward in --reward_funcs."""

from swift.plugin import ORM, orms


class DummyLengthRewardFunction(ORM):
    def __call__(self, completions, **kwargs):
        return [1.0 if len(completion) > 1024 else 0.0 for completion in completions]


orms["dummy"] = DummyLengthRewardFunction
