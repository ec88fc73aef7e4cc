"""Batches and the shared prefix: what goes through the model, and that nothing changes what comes out."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.evaluation import scorer as scorer_module
from lowmem_rmu.evaluation.scorer import Request, RequestBatch, Scorer, cost, find_batch_tokens, plan_batches
from lowmem_rmu.model.layers import can_share_prefix
from lowmem_rmu.model.loading import load_model
from tests.families import Family

PAD = 2


@pytest.fixture(scope="module")
def model(small_model_folder: Path) -> PreTrainedModel:
    return load_model(
        ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32"), torch.device("cpu")
    )


def made_up(
    seed: int, prefix: int, lengths: list[int], positions: int = 1, alternatives: int = 4
) -> list[Request]:
    made = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(made.randrange(3, 300) for _ in range(count))

    shared = ids(prefix)
    return [
        Request(shared + ids(length), tuple(ids(alternatives) for _ in range(positions)))
        for length in lengths
    ]


def plain(model: PreTrainedModel, request: Request) -> list[float]:
    with torch.no_grad():
        logprobs = (
            model(torch.tensor([request.ids])).logits[0].double().log_softmax(-1)[-len(request.wanted) :]
        )
    return [
        sum(logprobs[place, ids[which]].item() for place, ids in enumerate(request.wanted))
        for which in range(len(request.wanted[0]))
    ]


@pytest.mark.parametrize(("positions", "alternatives"), [(1, 4), (3, 1)])
@pytest.mark.parametrize("batch_tokens", [1, 60, 1000])
def test_scores_equal_a_plain_forward_pass(
    model: PreTrainedModel, positions: int, alternatives: int, batch_tokens: int
) -> None:
    requests = made_up(0, 20, [5, 11, 7, 3, 30, 8], positions, alternatives) + made_up(
        1, 0, [9, 4, 17], positions, alternatives
    )
    batches, scorer = plan_batches(requests, [range(6), range(6, 9)], batch_tokens), Scorer(model, PAD)
    assert {batch.prefix for batch in batches} == {0, 20}
    found = {
        number: row
        for batch in batches
        for number, row in zip(batch.numbers, scorer.score(requests, batch), strict=True)
    }
    assert sorted(found) == list(range(9))
    for number, request in enumerate(requests):
        assert found[number] == pytest.approx(plain(model, request), abs=1e-4)


def test_every_family_scores_as_a_plain_forward_pass_does(family: Family) -> None:
    """With a prefix longer than the sliding windows; shared only where the cache holds keys and values throughout."""
    model = load_model(family.settings, torch.device("cpu"))
    requests = made_up(0, 40, [5, 11, 3, 20])
    shares = can_share_prefix(model)
    assert shares == (family.name not in ("lfm2", "mamba"))
    batches, scorer = plan_batches(requests, [range(4)], 1000, shares), Scorer(model, PAD)
    assert {batch.prefix for batch in batches} == ({40} if shares else {0})
    found = {
        number: row
        for batch in batches
        for number, row in zip(batch.numbers, scorer.score(requests, batch), strict=True)
    }
    for number, request in enumerate(requests):
        assert found[number] == pytest.approx(plain(model, request), abs=1e-3)


def test_the_prefix_is_read_once_for_all_batches_of_a_group(model: PreTrainedModel) -> None:
    requests = made_up(0, 40, [5, 6, 7, 8, 9, 10])
    widths: list[int] = []
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    )
    scorer, batches = Scorer(model, PAD), plan_batches(requests, [range(6)], 40)
    for batch in batches:
        scorer.score(requests, batch)
    hook.remove()
    assert len(batches) == 3
    assert widths == [40, 10, 8, 6]


def test_the_prefix_leaves_every_position_that_is_asked_for(model: PreTrainedModel) -> None:
    """Of two prompts, one begins with the other as a whole."""
    short, *_ = made_up(0, 12, [3], positions=2, alternatives=1)
    long = Request((*short.ids, 5, 6, 7, 8), short.wanted)
    [batch] = plan_batches([short, long], [[0, 1]], 1000)
    assert batch.prefix == 13
    assert Scorer(model, PAD).score([short, long], batch) == [
        pytest.approx(plain(model, each), abs=1e-4) for each in (long, short)
    ]


def test_batches_keep_within_their_tokens_longest_first() -> None:
    requests = made_up(0, 30, [random.Random(number).randrange(3, 60) for number in range(40)])
    batches = plan_batches(requests, [range(40)], 300)
    assert sorted(number for batch in batches for number in batch.numbers) == list(range(40))
    longest = [max(cost(requests[number], batch.prefix) for number in batch.numbers) for batch in batches]
    assert all(len(batch.numbers) * most <= 300 for batch, most in zip(batches, longest, strict=True))
    assert longest == sorted(longest, reverse=True)
    assert max(len(batch.numbers) for batch in batches) > 5


def test_small_groups_that_share_little_go_through_together() -> None:
    groups = [range(start, start + 2) for start in range(0, 10, 2)]
    requests = [request for seed in range(5) for request in made_up(seed, 3, [20, 25])]
    assert len(plan_batches(requests, groups, 1000)) == 1
    assert len(plan_batches(requests, groups, 45)) == 10  # each group fills batches of its own
    sharing = [request for seed in range(5) for request in made_up(seed, 100, [20, 25])]
    assert [batch.prefix for batch in plan_batches(sharing, groups, 1000)] == [100] * 5


def test_a_batch_that_runs_out_of_memory_is_halved_and_so_are_those_after_it(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, rows = made_up(0, 16, [8] * 12), list[int]()
    batch = RequestBatch(16, tuple(range(12)))
    expected, logits_at = Scorer(model, PAD).score(requests, batch), scorer_module.logits_at

    def cramped(model: Any, positions: Any, **inputs: Any) -> Any:
        rows.append(len(positions))
        if len(positions) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits_at(model, positions, **inputs)

    monkeypatch.setattr(scorer_module, "logits_at", cramped)
    scorer = Scorer(model, PAD)
    for _ in range(2):
        found = scorer.score(requests, batch)
        assert all(one == pytest.approx(other, abs=1e-5) for one, other in zip(found, expected, strict=True))
    assert rows == [12, 6, 3, 3, 3, 3, 3, 3, 3, 3]


def test_one_request_that_does_not_fit_is_an_error(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes"
        )

    monkeypatch.setattr(scorer_module, "logits_at", full)
    with pytest.raises(RuntimeError, match="not enough memory"):
        Scorer(model, PAD).score(made_up(0, 0, [4]), RequestBatch(0, (0,)))


def test_another_error_is_not_taken_for_a_lack_of_memory(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def broken(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(scorer_module, "logits_at", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        Scorer(model, PAD).score(made_up(0, 0, [4, 4]), RequestBatch(0, (0, 1)))
    assert len(calls) == 1


@pytest.mark.parametrize(("room", "chosen"), [(1024, 1024), (4096, 4096), (10**9, 32768)])
def test_the_trial_takes_the_largest_batch_that_still_gains_and_fits(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, room: int, chosen: int
) -> None:
    """On a device whose every batch takes the same time."""
    clock = iter(range(1000))

    def constant_time(self: Scorer, requests: list[Request], batch: RequestBatch) -> list[list[float]]:
        if len(batch.numbers) * 128 > room:
            self.most = room
        return [[0.0]] * len(batch.numbers)

    monkeypatch.setattr(Scorer, "score", constant_time)
    monkeypatch.setattr(scorer_module, "perf_counter", lambda: next(clock))
    assert find_batch_tokens(model, PAD) == chosen


def test_the_trial_stops_where_larger_batches_gain_nothing(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device whose batches take time by their tokens."""
    now = [0.0]

    def proportional(self: Scorer, requests: list[Request], batch: RequestBatch) -> list[list[float]]:
        now[0] += len(batch.numbers)
        return [[0.0]] * len(batch.numbers)

    monkeypatch.setattr(Scorer, "score", proportional)
    monkeypatch.setattr(scorer_module, "perf_counter", lambda: now[0])
    assert find_batch_tokens(model, PAD) == 512
