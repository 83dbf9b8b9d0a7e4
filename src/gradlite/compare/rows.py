"""The rows that a run trains on and is judged on: prepared as `gradlite train` prepares them, and the same for every method."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gradlite.compare.runs import RunSpec
from gradlite.errors import GradLiteError
from gradlite.train.config import DEFAULT_DATASET
from gradlite.train.embedded import python_help
from gradlite.train.formats import Example, parse
from gradlite.train.sources import Rows, load_source
from gradlite.train.tokens import Tokens, tokenize

_HELD_OUT_SEED = 0  # not the run's seed: all runs are judged on the same rows
_TRAIN_ON = "answer"

TokenRow = Mapping[str, list[int]]


class TooShort(GradLiteError):
    """No row fills the sequence, as an experiment wants; another one may not want it."""


@dataclass(frozen=True)
class Work:
    """Each step's rows, and the held-out rows: input_ids and labels (-100 where the loss does not look).

    ``notices``: sentences that say what was left out, and how many.
    """

    steps: list[list[TokenRow]]
    held_out: list[TokenRow]
    notices: list[str]


def prepare(spec: RunSpec, tokenizer: PreTrainedTokenizerBase) -> Work:
    """Read the data set, put the held-out rows aside, and tokenise what the run needs and no more.

    The order of the training rows follows from the seed alone. Raises GradLiteError where the data cannot be read or is too
    little for what is asked.
    """
    rows = enough_rows(spec.dataset, spec.held_out_from_last)
    border = len(rows) - spec.held_out_from_last
    aside = sorted(random.Random(_HELD_OUT_SEED).sample(range(border, len(rows)), spec.held_out_rows))
    held_out = parse([rows[number] for number in aside], spec.dataset).examples if aside else []
    repeated = {repr(example) for example in held_out}
    parsed = parse([rows[number] for number in range(border)], spec.dataset)
    train = [example for example in parsed.examples if repr(example) not in repeated]
    kept = tokenize(held_out, tokenizer, spec.seq_len, _TRAIN_ON).kept
    if held_out and not kept:
        raise GradLiteError(f"no held-out row of {spec.dataset!r} has an answer within {spec.seq_len} tokens; raise seq_len.")
    passed_over: set[int] = set()
    endless = _endless(train, tokenizer, spec, passed_over)
    steps = [[next(endless) for _ in range(spec.batch_size)] for _ in range(spec.steps)]
    counts = {
        "training rows without a question or an answer were left out": parsed.num_empty,
        "training rows are held-out rows word for word and were left out": len(parsed.examples) - len(train),
        f"training rows have no answer within {spec.seq_len} tokens and were passed over": len(passed_over),
        "held-out rows without a question or an answer are not evaluated": len(aside) - len(held_out),
        f"held-out rows have no answer within {spec.seq_len} tokens and are not evaluated": len(held_out) - len(kept),
    }
    return Work(steps, [_row(tokens) for tokens in kept], [f"{count} {what}." for what, count in counts.items() if count])


def enough_rows(dataset: str, held_out_from_last: int) -> Rows:
    """All rows of a data set. Raises GradLiteError where none is left to train on."""
    rows = _all_rows(dataset)
    if len(rows) <= held_out_from_last:
        raise GradLiteError(
            f"dataset {dataset!r} has {len(rows)} rows, and held_out_from_last puts {held_out_from_last} aside; "
            "give more rows, or a smaller number in an experiment file."
        )
    return rows


def _all_rows(dataset: str) -> Rows:
    if dataset != DEFAULT_DATASET:
        return load_source(dataset).train
    train, held_out = python_help()
    return [*train, *held_out]


def _endless(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, spec: RunSpec, passed_over: set[int]
) -> Iterator[TokenRow]:
    """Usable rows, epoch after epoch, each epoch in an order of its own; the numbers of rows without an answer go to
    ``passed_over``.
    """
    chance = random.Random(spec.seed)
    while True:
        order = chance.sample(range(len(examples)), len(examples))
        usable = False
        for number in order:
            kept = tokenize([examples[number]], tokenizer, spec.seq_len, _TRAIN_ON).kept
            if not kept:
                passed_over.add(number)
            for tokens in kept:
                if len(tokens.ids) == spec.seq_len or not spec.full_rows:
                    usable = True
                    yield _row(tokens)
        if not usable and spec.full_rows:
            raise TooShort(
                f"no training row of {spec.dataset!r} fills {spec.seq_len} tokens; give another seq_len or more data."
            )
        if not usable:
            raise GradLiteError(
                f"no training row of {spec.dataset!r} has an answer within {spec.seq_len} tokens; raise seq_len."
            )


def _row(tokens: Tokens) -> dict[str, Any]:
    return {"input_ids": tokens.ids, "labels": tokens.labels(_TRAIN_ON)}
