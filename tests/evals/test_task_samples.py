"""Samples of tasks: what they have in common, and that their answers are what the text says."""

import re
from collections import Counter

import numpy as np
import pytest

from megalong.evals import STYLES, TASKS
from megalong.evals.language import MARKS, Ids, Mark
from megalong.evals.tasks import NEEDLE
from megalong.evals.trials import Trials, language_of
from megalong.utils.errors import UserError

IDS = range(1000)
FIRST = 1000
WITH_DEPTH = [
    "passkey", "copy", "variable_tracking", "niah_single", "niah_multikey", "niah_multivalue",
    "niah_multiquery",
]  # fmt: skip


def language(style: str):
    return language_of(style, lambda text: list(text.encode()), IDS, FIRST)


def trials_of(style: str, task: str, length: int, samples: int = 8, **options) -> Trials:
    return Trials(task, language(style), length, samples, **options)


def shortest(style: str, task: str) -> int:
    """The length that a refusal says is enough."""
    with pytest.raises(UserError) as refusal:
        trials_of(style, task, 2).check("--tasks", "--lengths")
    needed = int(re.search(r"set --lengths (\d+)", str(refusal.value))[1])
    assert f"--lengths 2: {task} needs at least {needed} tokens" in str(refusal.value)
    return needed


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", TASKS)
def test_answers_stand_where_they_are_said_to(style, task):
    least = shortest(style, task)
    for length in (least, least + 1, 1237, 4096):
        trials = trials_of(style, task, length)
        trials.check("--tasks", "--lengths")
        for number in range(trials.samples):
            sample = trials.sample(number)
            assert sample.tokens.shape == (length,) and sample.tokens.dtype == np.int64
            assert sample.tokens[0] == FIRST and FIRST not in sample.tokens[1:]
            assert sample.answers == trials.answers(number) and sample.answers
            for answer in sample.answers:
                size = answer.stop - answer.start
                there = sample.tokens[answer.place : answer.place + size]
                assert np.array_equal(sample.tokens[answer.start : answer.stop], there)
                assert 0 < answer.place <= answer.place + size <= answer.start < answer.stop
                assert answer.stop <= length


@pytest.mark.parametrize("task", TASKS)
def test_haystack_of_ids_follows_from_what_is_before_it(task):
    ids = language("ids")
    sample = trials_of("ids", task, 1237).sample(3)
    hay = np.flatnonzero(sample.hay)
    assert sorted(set(sample.tokens[hay])) == sorted(set(ids._hay) & set(sample.tokens))
    for place in hay:
        assert sample.tokens[place] == ids._hay[sample.tokens[max(place - 2, 0)] % len(ids._hay)]
    assert not (sample.answered & sample.hay).any()
    assert sample.answered.sum() == sum(answer.stop - answer.start for answer in sample.answers)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", TASKS)
def test_a_sample_hangs_on_its_number_alone(style, task):
    one, again = (trials_of(style, task, 1500) for _ in range(2))
    samples = [one.sample(i).tokens for i in range(8)]
    assert all(np.array_equal(tokens, again.sample(i).tokens) for i, tokens in enumerate(samples))
    assert len({tokens.tobytes() for tokens in samples}) == 8
    other = trials_of(style, task, 1500, salt="data 0", spread=False)
    assert not {other.sample(i).tokens.tobytes() for i in range(8)} & {
        tokens.tobytes() for tokens in samples
    }


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", WITH_DEPTH)
def test_depths_are_spread_over_the_context(style, task):
    trials = trials_of(style, task, 8192, 16)
    distances = [trials.answers(i)[0].distance for i in range(16)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.9 * 8192 - 1000 and distances[-1] < 1000


def text_of(sample) -> str:
    return bytes(sample.tokens[1:].tolist()).decode()


def answers_of(sample) -> list[str]:
    return [
        bytes(sample.tokens[answer.start : answer.stop].tolist()).decode().strip()
        for answer in sample.answers
    ]


def needles(text: str) -> list[tuple[str, str]]:
    """Keys and values, in the order of the text."""
    return re.findall(r"^The magic number of ([a-z-]+) is (\d+)\.$", text, re.MULTILINE)


def solve_needles(text: str) -> list[str]:
    said = needles(text)
    assert len({key for key, _ in said}) == len({value for _, value in said}) == len(said)
    values = dict(said)
    return [values[key] for key in re.findall(r"What is the magic number of ([a-z-]+)\?", text)]


def solve_multivalue(text: str) -> list[str]:
    said = needles(text)
    [key] = re.findall(r"In their order, the magic numbers of ([a-z-]+) are", text)
    assert len({value for _, value in said}) == len(said) and {key for key, _ in said} == {key}
    return [value for _, value in said]


def solve_mqar(text: str) -> list[str]:
    pairs = re.findall(r"^ ([a-z-]+): (\d+)$", text, re.MULTILINE)
    told, asked = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    assert len({key for key, _ in told}) == len({value for _, value in told}) == len(told)
    assert {key for key, _ in told} == {key for key, _ in asked}
    return [dict(told)[key] for key, _ in asked]


def solve_copy(text: str) -> list[str]:
    [row] = re.findall(r"Remember these numbers:([ \d]+)\.", text)
    assert 2 <= len(set(row.split())) == len(row.split()) <= 16
    return [row.strip()]


def solve_variables(text: str) -> list[str]:
    values, order = {}, []
    assignment = re.compile(r"^VAR ([a-z-]+) =(?: (\d+)| VAR ([a-z-]+))\.$", re.MULTILINE)
    for name, value, other in assignment.findall(text):
        assert name not in values
        values[name] = value or values[other]
        order.append(name)
    assert len(order) in (4, 6, 8, 10) and len(set(values.values())) == 2
    [asked] = re.findall(r"the variables that have the value (\d+) are", text)
    return [name for name in order if values[name] == asked]


def listed(text: str) -> list[str]:
    [line] = re.findall(r"^ ([a-z-]+(?: [a-z-]+)+)$", text.split("\nThe ")[-2], re.MULTILINE)
    return line.split()


def solve_common(text: str) -> list[str]:
    words = listed(text)
    counts = Counter(words).most_common()
    assert counts[0][1] == counts[9][1] >= 2 * counts[10][1] > 0
    common = {word for word, _ in counts[:10]}
    return [word for word in dict.fromkeys(words) if word in common]


def solve_frequent(text: str) -> list[str]:
    counts = Counter(listed(text)).most_common()
    assert counts[0][1] > counts[1][1] > counts[2][1] > counts[3][1]
    return [word for word, _ in counts[:3]]


SOLVERS = {
    "passkey": solve_needles,
    "mqar": solve_mqar,
    "copy": solve_copy,
    "variable_tracking": solve_variables,
    "niah_single": solve_needles,
    "niah_multikey": solve_needles,
    "niah_multivalue": solve_multivalue,
    "niah_multiquery": solve_needles,
    "common_words": solve_common,
    "frequent_words": solve_frequent,
}


@pytest.mark.parametrize("task", TASKS)
def test_who_reads_the_text_finds_the_answers(task):
    for length in (shortest("text", task), 3000):
        trials = trials_of("text", task, length)
        for number in range(trials.samples):
            sample = trials.sample(number)
            assert answers_of(sample) == SOLVERS[task](text_of(sample))


def test_rows_and_chains_are_as_long_as_there_is_room_for():
    for task, sizes in (("copy", {16: 6, 32: 14, 64: 16}), ("variable_tracking", {32: 3, 64: 4})):
        for length, size in sizes.items():
            answers = trials_of("ids", task, length).answers(0)
            found = answers[0].stop - answers[0].start if task == "copy" else len(answers) - 1
            assert found == size


def test_every_phrase_has_an_id():
    assert all(mark < MARKS for mark in Mark)
    said = language("ids").say(NEEDLE, (500,), (700,))
    assert said == ([Mark.NEEDLE, 500, 700], [(1, 2), (2, 3)])


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match=rf"19 ids is too small .* at least {MARKS + 8}"):
        Ids(range(19), 19)
    small = Trials("passkey", Ids(range(20), 20), 64, 1)
    with pytest.raises(
        UserError, match=r"--tasks passkey: it takes 4 different keys, and .* has 3"
    ):
        small.check("--tasks", "--lengths")
