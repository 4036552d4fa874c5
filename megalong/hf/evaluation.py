"""How good a model is at each context length: perplexity, loss by position, tasks.

Of anything that `megalong.hf.loaded_model` loads.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megalong.evals.language import Ids
from megalong.evals.scores import AnswerSums, PositionLosses, TaskScore, perplexity
from megalong.evals.trials import Trials
from megalong.hf.loaded_model import LoadedModel
from megalong.hf.modeling_longnet import LongNetModel
from megalong.utils.errors import UserError

LOGIT_ROWS = 1024  # positions whose logits are held at once
CHUNK = 8192  # tokens that a LongNet reads at once


def hidden_states(
    loaded: LoadedModel, tokens: torch.Tensor, one_document: bool = False
) -> Iterator[torch.Tensor]:
    """Yield the hidden states of one sequence, (positions, hidden_size), a chunk after the other.

    tokens: ids, (1, positions). A LongNet keeps of the past what its cache does, so that memory
    does not grow with the length; other models, and dense attention, read all at once.
    one_document: whatever tokens end a document elsewhere.
    """
    loaded.check_length(tokens.shape[1])
    base = loaded.model.base_model
    if not isinstance(base, LongNetModel):
        yield base(tokens, use_cache=False).last_hidden_state[0]
        return
    dense = base.config.kinds == ["dense"]
    cache = None if dense else base.new_cache()
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    size = tokens.shape[1] if dense else CHUNK
    for chunk, places in zip(tokens.split(size, 1), positions.split(size, 1), strict=True):
        given = {"input_ids": chunk}
        if one_document:  # embeddings do not say where documents end, and positions do
            given = {"inputs_embeds": base.embed_tokens(chunk), "position_ids": places}
        yield base(**given, cache=cache, use_cache=not dense).last_hidden_state[0]


@torch.no_grad()
def token_losses(
    loaded: LoadedModel,
    tokens: Sequence[int],
    on_tokens: Callable[[int], object] = lambda count: None,
) -> torch.Tensor:
    """The loss of each token but the first, in nats, float32 on the CPU: (tokens - 1,).

    on_tokens: hears how many more are done.
    """
    ids = torch.tensor([tokens], device=loaded.model.device)
    head = loaded.model.get_output_embeddings()
    losses, done = [], 0
    for hidden in hidden_states(loaded, ids[:, :-1]):
        for rows in hidden.split(LOGIT_ROWS):
            labels = ids[0, done + 1 : done + 1 + len(rows)]
            losses.append(F.cross_entropy(head(rows).float(), labels, reduction="none"))
            done += len(rows)
        on_tokens(len(hidden))
    return torch.cat(losses).cpu()


def evaluate_texts(
    loaded: LoadedModel,
    texts: Sequence[str],
    context: int,
    edges: Sequence[int],
    on_bytes: Callable[[float], object] = lambda size: None,
) -> dict[str, Any]:
    """Perplexity and bits per byte of texts, cut into windows of `context` tokens.

    Every token of every text is predicted once, from what its window holds before it, or from the
    token before the window. longest_window: tokens of the longest, fewer than context where every
    text is shorter. edges: of the buckets of positions in the window, from 0 to context;
    the loss of one without predictions is None. on_bytes: hears how much more of the text is done.
    """
    losses, size, longest = PositionLosses(edges), 0, 0
    for text in texts:
        tokens, of_text = [loaded.first, *loaded.encode(text)], len(text.encode())
        size += of_text
        a_token = of_text / max(len(tokens) - 1, 1)
        for start in range(0, len(tokens) - 1, context):
            of_window = token_losses(
                loaded,
                tokens[start : start + context + 1],
                lambda count, size=a_token: on_bytes(count * size),
            )
            longest = max(longest, len(of_window))
            losses.add(torch.arange(len(of_window)), of_window[None])
    return {
        "context": context,
        "longest_window": longest,
        "tokens": losses.tokens,
        "bytes": size,
        "loss": losses.mean,
        "perplexity": perplexity(losses.mean),
        "bits_per_byte": losses.total / math.log(2) / size,
        "position_edges": list(edges),
        "loss_by_position": losses.by_position,
    }


def losses_by_prompt(
    loaded: LoadedModel,
    texts: Sequence[str],
    prompts: Sequence[int],
    suffix: int,
    on_stretch: Callable[[int], object] = lambda tokens: None,
) -> list[dict[str, Any]]:
    """The loss of the same tokens behind prompts of other lengths (arXiv 2307.02486, Figure 7b).

    Texts are cut into stretches of max(prompts) + suffix tokens, what is left over is not read. The
    last `suffix` tokens of each are predicted, for each length in `prompts`, from so many tokens
    before them, at least 1, and from each other. on_stretch: hears how many more tokens of text are
    done. Raises UserError where no text has a stretch.
    """
    length = max(prompts) + suffix
    losses: dict[int, list[torch.Tensor]] = {prompt: [] for prompt in prompts}
    for text in texts:
        tokens = loaded.encode(text)
        for start in range(0, len(tokens) - length + 1, length):
            stretch = tokens[start : start + length]
            for prompt, found in losses.items():
                found.append(token_losses(loaded, stretch[-(prompt + suffix) :])[-suffix:])
            on_stretch(length)
    if not losses[max(prompts)]:
        raise UserError(
            f"--prompt-lengths {max(prompts)}: no text of --input has {length} tokens, prompt and"
            " suffix together: give it longer ones, or set --prompt-lengths lower"
        )
    results = []
    for prompt, found in losses.items():
        mean = torch.cat(found).double().mean().item()
        result = {"prompt": prompt, "suffix": suffix, "tokens": suffix * len(found), "loss": mean}
        results.append(result | {"perplexity": perplexity(mean)})
    return results


@torch.no_grad()
def task_score(
    loaded: LoadedModel,
    trials: Trials,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> TaskScore:
    """How well the model does on the samples of a task, by teacher forcing.

    on_tokens: hears how many more tokens are read. A sample of bare ids is one document, as it is
    in data of `megalong.evals.trials`, which only such models know; text stands behind its first
    token as it does elsewhere.
    """
    one_document = isinstance(trials.language, Ids)
    sums, head = AnswerSums(trials), loaded.model.get_output_embeddings()
    for number in range(trials.samples):
        ids = torch.from_numpy(trials.sample(number).tokens).to(loaded.model.device)[None]
        done = 0
        for hidden in hidden_states(loaded, ids[:, :-1], one_document):
            places, rows = sums.places(number, done, done + len(hidden))
            chunks = (torch.tensor(x).split(LOGIT_ROWS) for x in (places, rows))
            for some, of_answers in zip(*chunks, strict=True):
                if not len(some):
                    continue
                logits = head(hidden[(some - done).to(hidden.device)]).float()
                labels = ids[0, (some + 1).to(ids.device)]
                losses = F.cross_entropy(logits, labels, reduction="none")
                sums.add(of_answers, (logits.argmax(-1) == labels).cpu(), losses.cpu())
            done += len(hidden)
            on_tokens(len(hidden))
    return sums.score()


_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back.\n"


@torch.no_grad()
def passkey(
    loaded: LoadedModel,
    length: int,
    depth: float,
    trials: int,
    seed: int = 0,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Whether the model finds a number that is said once in a long text.

    length: tokens of the text, with question and answer. depth: where the number is said, from 0
    (the beginning) to 1. accuracy: share of trials in which greedy decoding would give all of the
    number's tokens; loss: of those tokens, in nats. on_tokens: hears how many more tokens are read.
    Raises UserError where length is too short.
    """
    draw = random.Random(f"{seed} {length} {depth}")
    found, losses = 0, []
    for _ in range(trials):
        tokens, answer = _passkey_tokens(loaded, length, depth, draw.randint(10000, 99999))
        ids = torch.tensor([tokens], device=loaded.model.device)
        tail = None
        for hidden in hidden_states(loaded, ids[:, :-1]):
            tail = (hidden if tail is None else torch.cat((tail, hidden)))[-answer:]
            on_tokens(len(hidden))
        logits = loaded.model.get_output_embeddings()(tail).float()
        found += bool((logits.argmax(-1) == ids[0, -answer:]).all())
        losses.append(F.cross_entropy(logits, ids[0, -answer:]).item())
    result = {"length": length, "depth": depth, "accuracy": found / trials}
    return result | {"loss": sum(losses) / trials}


def _passkey_tokens(
    loaded: LoadedModel, length: int, depth: float, key: int
) -> tuple[list[int], int]:
    """The tokens of one trial, and how many at the end are the answer."""
    encode = loaded.encode
    said = encode(f"The pass key is {key}. Remember it: {key} is the pass key.\n")
    question = encode("What is the pass key? The pass key is")
    answer = encode(f" {key}")
    room = length - len(said) - len(question) - len(answer) - 1
    if room < 0:
        raise UserError(f"--passkey-lengths {length}: a trial needs {length - room} tokens")
    filler = encode(_FILLER)
    filler = (filler * (room // len(filler) + 1))[:room]
    before = round(room * depth)
    text = [loaded.first, *filler[:before], *said, *filler[before:], *question, *answer]
    return text, len(answer)
