"""Scores of models that are known, on one rank and on many."""

import math
from itertools import product

import pytest
import torch

from megalong.evals.scores import AnswerSums, plot_by_distance, position_edges
from megalong.evals.trials import Trials, language_of, num_task_batches, task_batches

LENGTH, ALL = 120, (0, 128)


def trials_of(task: str = "mqar", samples: int = 5) -> Trials:
    return Trials(task, language_of("ids", lambda text: [], range(256), 256), LENGTH, samples)


def add(sums: AnswerSums, trials: Trials, model, **ranks) -> None:
    """What one rank adds. model: of a batch, whether each label is right, and its loss."""
    ranks = {"data_parallel_rank": 0, "data_parallel_size": 1, "sequence_range": ALL} | ranks
    for batch in task_batches(trials, sums, micro_batch_size=2, **ranks):
        right, losses = model(batch)
        sums.add(batch["answer"], right, losses)


def reads(batch):
    """Knows each label, whatever the other places' are; its loss is a tenth of the label."""
    return torch.ones_like(batch["labels"], dtype=torch.bool), batch["labels"] / 10


def reads_even(batch):
    """Knows the even labels, which alone cost nothing."""
    right = batch["labels"] % 2 == 0
    return right, 2.0 * ~right


def test_who_knows_all_is_right():
    trials = trials_of()
    sums = AnswerSums(trials)
    add(sums, trials, reads)
    score = sums.score()
    assert score.accuracy == score.token_accuracy == 1 and score.answers == 15 * 5
    labels = [
        trials.sample(i).tokens[answer.start] for i in range(5) for answer in trials.answers(i)
    ]
    assert score.loss == pytest.approx(sum(labels) / len(labels) / 10, rel=1e-6)
    assert score.distance_edges == position_edges(LENGTH)
    assert sum(score.answers_by_distance) == score.answers
    for share, count in zip(score.accuracy_by_distance, score.answers_by_distance, strict=True):
        assert share == (1 if count else None)
    none = AnswerSums(trials).score()
    assert none.accuracy == none.token_accuracy == none.loss == 0


@pytest.mark.parametrize("task", ["mqar", "copy", "niah_multivalue"])
def test_an_answer_is_right_where_all_its_tokens_are(task):
    trials = trials_of(task, samples=24)
    sums = AnswerSums(trials)
    add(sums, trials, reads_even)
    score = sums.score()
    found, tokens, by_bucket = [], [], {}
    for number in range(24):
        sample = trials.sample(number)
        for answer in sample.answers:
            even = [token % 2 == 0 for token in sample.tokens[answer.start : answer.stop]]
            found.append(all(even))
            tokens += even
            edge = max(e for e in score.distance_edges if e <= answer.distance)
            by_bucket.setdefault(edge, []).append(all(even))
    assert score.accuracy == pytest.approx(sum(found) / len(found))
    assert score.token_accuracy == pytest.approx(sum(tokens) / len(tokens))
    assert 0.3 < score.token_accuracy < 0.7 and score.accuracy <= score.token_accuracy
    assert score.loss == pytest.approx(2 * (1 - score.token_accuracy))
    for edge, share in zip(score.distance_edges, score.accuracy_by_distance, strict=False):
        answers = by_bucket.get(edge)
        assert share == (pytest.approx(sum(answers) / len(answers)) if answers else None)


@pytest.mark.parametrize("task", ["mqar", "copy"])
def test_ranks_add_up(task):
    """A row of 16 tokens lies on two shards of 16; the fifth sample is the last rank's only one."""
    trials, shards, replicas = trials_of(task), 8, 3
    whole, parts = AnswerSums(trials), AnswerSums(trials)
    add(whole, trials, reads_even)
    for shard, replica in product(range(shards), range(replicas)):
        add(
            parts,
            trials,
            reads_even,
            data_parallel_rank=replica,
            data_parallel_size=replicas,
            sequence_range=(16 * shard, 16 * shard + 16),
        )
    assert torch.equal(whole.sums, parts.sums) and whole.score() == parts.score()
    assert num_task_batches(trials, 2, 1) == 3 and num_task_batches(trials, 2, replicas) == 1


def test_a_batch_is_the_sample_and_asks_for_its_answers_only():
    trials = trials_of("copy", samples=3)
    sums = AnswerSums(trials)
    ranks = {"data_parallel_rank": 0, "data_parallel_size": 1, "sequence_range": ALL}
    one, two = task_batches(trials, sums, micro_batch_size=2, **ranks)
    sample = trials.sample(1)
    assert one["tokens"][1, :LENGTH].tolist() == sample.tokens.tolist()
    assert one["tokens"][1, LENGTH:].eq(0).all() and one["positions"].tolist() == [*range(128)]
    [answer] = sample.answers
    places = one["labels"][1] >= 0
    assert places.nonzero().flatten().tolist() == [*range(answer.start - 1, answer.stop - 1)]
    assert one["labels"][1, places].tolist() == sample.tokens[answer.start : answer.stop].tolist()
    assert torch.equal(places, one["answer"][1] == 1) and (one["answer"][1, ~places] == -1).all()
    assert (two["labels"][1] < 0).all() and two["tokens"][1].eq(0).all()


def test_the_plot_has_a_point_for_each_bucket_with_answers():
    from matplotlib.figure import Figure

    trials = trials_of()
    sums = AnswerSums(trials)
    add(sums, trials, reads)
    axis, score = Figure().subplots(), sums.score()
    plot_by_distance(axis, [score.record()])
    [line] = axis.lines
    assert len(line.get_xdata()) == sum(count > 0 for count in score.answers_by_distance)
    assert set(line.get_ydata()) == {1.0} and not any(map(math.isnan, line.get_xdata()))
    assert "mqar of 120 tokens: 100%" in line.get_label()
