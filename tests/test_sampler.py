"""The sampler: log-probabilities against plain forward passes, samples against exact probabilities,
weights on their way into an engine."""

import random
import threading

import pytest
import torch
import torch.distributed as torch_dist
from conftest import ARCHITECTURES, tiny_model

import lora
from dist import World
from run import machine
from run.engine import OnRank0
from run.weights import WeightGroup, receive_weights, send_weights
from sampler import (
    Completion,
    Decoder,
    ModelSampler,
    SamplerError,
    VLLMSampler,
    sample_tokens,
)

ENDS = [2, *range(11, 21)]  # many end-of-sequence tokens, so that rows end at different times
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def prompts_of(counts=(4, 4, 4), lengths=(3, 6, 1), beginning=(5, 6, 7, 8)):
    rng = random.Random(0)
    prompts = [list(beginning) + [rng.randrange(3, 97) for _ in range(n)] for n in lengths]
    return [p for p, count in zip(prompts, counts) for _ in range(count)]


def p_value(observed, expected) -> float:
    """Of a chi-square test."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(observed) - 1) / 2.0).double()
    return torch.special.gammaincc(freedom, statistic.double() / 2).item()


# The model itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logps_equal_a_plain_forward_pass(architecture):
    model, prompts = tiny_model(architecture), prompts_of()
    ends, longest = ENDS[:4], 33
    own = ModelSampler(model, eos_token_ids=ends, max_new_tokens=longest, temperature=0.8)
    completions = own.generate(prompts, range(len(prompts)))
    for prompt, completion in zip(prompts, completions):
        logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        drawn = torch.tensor(completion.ids)[:, None]
        expected = (logits / 0.8).log_softmax(-1).gather(1, drawn)[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-4, rtol=0)
        assert completion.finished == (completion.ids[-1] in ends)
        assert not set(completion.ids[:-1]) & set(ends)
        assert completion.finished or len(completion.ids) == longest
    lengths = {len(c.ids) for c in completions}
    assert len(lengths) > 3 and max(lengths) > 28  # rows did end at different times


def test_samples_follow_the_distribution():
    """Pairs of tokens against exact probabilities, by chi-square, through prefill and a step."""
    model = tiny_model(vocab_size=7)
    own = ModelSampler(model, eos_token_ids=[2], max_new_tokens=2, temperature=1.3)
    prompt, count = [3, 4, 5, 3], 6000
    drawn = [tuple(c.ids) for c in own.generate([prompt] * count, range(count))]
    first = (model(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1)
    exact = {}
    for a in range(7):
        second = (model(torch.tensor([prompt + [a]])).logits[0, -1] / 1.3).softmax(-1)
        if a == 2:
            exact[(a,)] = first[a].item()
        else:
            exact |= {(a, b): (first[a] * second[b]).item() for b in range(7)}
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5) and set(drawn) <= set(exact)
    often = [pair for pair, p in exact.items() if p * count >= 5]
    rare = [pair for pair in exact if pair not in often]
    observed = [sum(d == pair for d in drawn) for pair in often]
    observed.append(sum(d in rare for d in drawn) + 1e-9)
    expected = [exact[pair] * count for pair in often]
    expected.append(sum(exact[pair] for pair in rare) * count + 1e-9)
    assert p_value(torch.tensor(observed), torch.tensor(expected)) > 1e-3


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 3), (0.7, 4)])
def test_truncated_sampling_draws_from_the_renormalized_head(top_p, top_k):
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0])
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    kept = []
    for rank, i in enumerate(order):
        if probabilities[order[:rank]].sum() < top_p and (not top_k or rank < top_k):
            kept.append(i)
    expected = torch.zeros(6)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    tokens, logps = sample_tokens(logits.expand(20_000, 6), uniforms, 1.0, top_p, top_k)
    # Of the whole distribution, as in the objective.
    torch.testing.assert_close(logps, probabilities.log()[tokens])
    observed = torch.bincount(tokens, minlength=6).float()
    assert not observed[expected == 0].any()
    assert p_value(observed[expected > 0], expected[expected > 0] * 20_000) > 1e-3


def test_no_uniform_number_draws_a_token_of_probability_zero():
    logits = torch.full((3, 1000), float("-inf"))
    logits[:, 400:500] = torch.randn(100)
    tokens, _ = sample_tokens(logits, torch.tensor([0.0, 1 - 2**-24, 0.5]), 1.0)
    assert ((tokens >= 400) & (tokens < 500)).all()


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 5), (1.0, 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_of_logits_that_are_not_finite_a_token_is_drawn_that_has_no_probability(
    value, top_p, top_k
):
    logits = torch.randn(3, 1000)
    logits[1, slice(None) if value < 0 else 7] = value
    tokens, logps = sample_tokens(logits, torch.tensor([0.0, 0.5, 0.9]), 0.8, top_p, top_k)
    assert ((tokens >= 0) & (tokens < 1000)).all()
    assert logps.isfinite().tolist() == [True, False, True]


def test_a_completion_is_the_same_in_any_batch():
    prompts = prompts_of()
    own = ModelSampler(tiny_model(), eos_token_ids=ENDS, max_new_tokens=12)
    together = own.generate(prompts, range(100, 112))
    apart = [own.generate([p], [100 + i])[0] for i, p in enumerate(prompts)]
    assert [c.ids for c in together] == [c.ids for c in apart]
    again = own.generate(prompts, range(100, 112))
    assert [c.ids for c in again] == [c.ids for c in together]
    others = own.generate(prompts, range(200, 212))
    assert [c.ids for c in others] != [c.ids for c in together]


def test_equal_prompts_are_prefilled_once_and_ended_rows_leave_the_batch(monkeypatch):
    model, prompts = tiny_model(), prompts_of()
    fed, forward = [], type(model).forward

    def counted(self, **settings):
        fed.append(tuple(settings["input_ids"].shape))
        return forward(self, **settings)

    monkeypatch.setattr(type(model), "forward", counted)
    own = ModelSampler(model, eos_token_ids=ENDS, max_new_tokens=12)
    lengths = [len(c.ids) for c in own.generate(prompts, range(12))]
    assert fed[0] == (3, 4 + 6)  # three different prompts, the longest of ten tokens
    for t, (rows, width) in enumerate(fed[1:], start=1):
        alive = sum(n > t for n in lengths)
        assert width == 1
        assert alive <= rows <= max(alive / 0.75, 12 * (t == 1), 1)
    assert len(fed) > 6 and fed[-1][0] < 12


@pytest.mark.parametrize("rows, waves", [(5, [5, 5, 2]), (12, [12]), (0, [1] * 12)])
def test_what_memory_has_no_room_for_is_decoded_later_and_comes_out_the_same(
    monkeypatch, rows, waves
):
    model, prompts, batches = tiny_model(), prompts_of(), []

    class Counted(Decoder):
        def __init__(self, model, prompts, row_of):
            batches.append(len(row_of))
            super().__init__(model, prompts, row_of)

    own = ModelSampler(
        model,
        eos_token_ids=ENDS,
        max_new_tokens=12,
        decoder=Counted,
        rows_at_once=machine.rows_at_once,
    )
    together = own.generate(prompts, range(12))
    batches.clear()
    tokens = max(map(len, prompts)) + 12 + machine.ROOM
    row = 2 * 4 * 3 * 2 * 8 * tokens + 40 * 97  # float32, 3 layers, 2 key heads of 8
    monkeypatch.setattr("run.machine.free_memory", lambda device: 2 * rows * row)
    assert [c.ids for c in own.generate(prompts, range(12))] == [c.ids for c in together]
    assert batches == waves
    assert own.generate([], []) == []


def test_a_call_may_have_a_temperature_of_its_own_and_0_takes_the_likeliest_token():
    model, prompts, settings = tiny_model(), prompts_of(), {"eos_token_ids": [2]}
    hot = ModelSampler(model, max_new_tokens=9, temperature=1.5, top_k=30, **settings)
    cool = ModelSampler(model, max_new_tokens=9, temperature=0.6, top_k=30, **settings)
    assert hot.generate(prompts, range(12), 0.6) == cool.generate(prompts, range(12))
    assert hot.generate(prompts, range(12)) != cool.generate(prompts, range(12))
    for prompt, completion in zip(prompts, hot.generate(prompts, range(12), temperature=0.0)):
        ids = list(prompt)
        for token in completion.ids:
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)


def test_the_sampler_leaves_the_model_in_training_mode_and_takes_no_gradient():
    model = tiny_model().train()
    own = ModelSampler(model, eos_token_ids=[2], max_new_tokens=3)
    completions = own.generate([[5, 6]], [0])
    assert model.training and len(completions) == 1
    assert all(p.grad is None for p in model.parameters())
    assert own.generate([], []) == []


# Weights into an engine, without vLLM -----------------------------------------------------------


def test_weights_are_merged_without_touching_the_model():
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=True)
    names = [name for name, _ in model.named_parameters()]
    lora.inject(model, 4, 8)
    for _, layer in lora.layers(model):
        torch.nn.init.normal_(layer.lora_B)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    merged = {name: tensor.clone() for name, tensor in lora.merged_parameters(model)}
    assert list(merged) == names == [name for name, _ in lora.plain_parameters(model)]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    for name, layer in lora.layers(model):
        change = 2.0 * layer.lora_B @ layer.lora_A  # 8 / 4
        before[f"{name}.weight"] = (layer.weight.float() + change).to(torch.bfloat16)
    assert all(torch.equal(merged[name], before[name]) for name in names)
    adapted = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged[adapted], model.get_parameter(adapted))


class ThreadEngine:
    """What receives weights, and says the same of any prompt, in a thread of this process."""

    def __init__(self, change=lambda tensor: tensor):
        self.change, self.received, self.transfers, self.requests = change, {}, 0, []
        store = torch_dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        meeting = threading.Thread(target=self.meet, args=[store.port])
        meeting.start()
        self.group = WeightGroup(store, 0, "gloo", CPU)
        meeting.join()

    def meet(self, port: int) -> None:
        store = torch_dist.TCPStore("127.0.0.1", port, 2, is_master=False)
        self.theirs = WeightGroup(store, 1, "gloo", CPU)

    def announce(self, tensors) -> None:
        self.sent = {}

        def receive():
            receive_weights(self.theirs, tensors, self.received.update)

        self.transfers += 1
        self.thread = threading.Thread(target=receive)
        self.thread.start()

    def send(self, name, tensor) -> None:
        self.sent[name] = tensor
        self.group.send(self.change(tensor), lambda: True, timeout=20.0)

    def check_arrived(self) -> None:
        self.thread.join()
        if any(not torch.equal(self.received[name], sent) for name, sent in self.sent.items()):
            raise SamplerError("received other weights than were sent")

    def complete(self, requests, sampling) -> list[Completion]:
        self.requests, self.sampling = requests, sampling
        drawn = []
        for prompt, n, seed in requests:
            drawn += [Completion([*prompt, seed + i], [0.0], True) for i in range(n)]
        return drawn


def adapted_model():
    model = lora.inject(tiny_model(dtype=torch.bfloat16, tie_word_embeddings=True), 4, 8)
    for _, layer in lora.layers(model):
        torch.nn.init.normal_(layer.lora_B)
    return model


def test_what_is_received_is_what_was_sent_and_a_changed_tensor_is_told():
    model, engine = adapted_model(), ThreadEngine()
    announced = [(name, p.shape, p.dtype) for name, p in lora.plain_parameters(model)]
    send_weights(engine, announced, lora.merged_parameters(model))
    expected = dict(lora.merged_parameters(model))
    assert list(engine.received) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(engine.received[name], tensor) and tensor.dtype == torch.bfloat16
    engine.change = lambda tensor: tensor + 1
    with pytest.raises(SamplerError, match="received other weights than were sent"):
        send_weights(engine, announced, lora.merged_parameters(model))


def test_weights_are_sent_once_before_they_are_needed():
    model, engine = adapted_model(), ThreadEngine()
    settings = {"eos_token_ids": [2, 7], "max_new_tokens": 5, "temperature": 0.5, "top_k": 9}
    vllm = VLLMSampler(model, ALONE, OnRank0(ALONE, lambda: engine), **settings)
    prompts = [[3, 4], [3, 4], [5]]
    completions = vllm.generate(prompts, [10, 11, 20])
    assert engine.transfers == 1 and vllm.metrics["time/sync"] > 0
    # One request a group, whose i-th completion has the seed plus i.
    assert engine.requests == [([3, 4], 2, 10), ([5], 1, 20)]
    assert [c.ids for c in completions] == [[3, 4, 10], [3, 4, 11], [5, 20]]
    assert engine.sampling["stop_token_ids"] == [2, 7] and engine.sampling["max_tokens"] == 5
    vllm.generate(prompts, [10, 11, 20])
    assert engine.transfers == 1 and vllm.metrics["time/sync"] == 0.0
    vllm.take_weights(model)
    vllm.take_weights(model)
    assert engine.transfers == 1
    vllm.generate(prompts, [10, 11, 20])
    assert engine.transfers == 2
    for temperature, told in ((None, (0.5, 9)), (0.8, (0.8, 9)), (0.0, (1.0, 1))):
        vllm.generate(prompts, [10, 11, 20], temperature)
        assert (engine.sampling["temperature"], engine.sampling["top_k"]) == told


def test_an_engine_that_does_not_start_is_told_in_one_line():
    def start():
        raise OSError(28, "No space left on device", "vllm.log")

    with pytest.raises(SamplerError, match=r"^--use_vllm true: .*No space left on device: 'vllm"):
        OnRank0(ALONE, start)
