"""From the configuration to what a run trains and evaluates on: examples as token ids with their answers marked."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
from transformers import PreTrainedTokenizerBase
from trl.data_utils import pack_dataset

from gradlite.errors import GradLiteError
from gradlite.train.config import DEFAULT_DATASET, TrainConfig
from gradlite.train.embedded import python_help
from gradlite.train.formats import Parsed, parse
from gradlite.train.sources import Source, load_source
from gradlite.train.tokens import Tokenized, Tokens, tokenize

_SPLIT_SEED = 0  # not the run's seed: runs that differ in their seed are judged on the same held-out rows


@dataclass(frozen=True)
class Data:
    """What a run works on. `notices` are sentences for the user: what was cut, dropped or left out, and how many."""

    train: list[Tokens]
    held_out: list[Tokens]
    columns: tuple[str, ...]
    notices: list[str]

    @property
    def num_tokens(self) -> int:
        """Tokens of the training examples, each counted once."""
        return sum(len(tokens.ids) for tokens in self.train)


def load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read, split and tokenise the configured data.

    Raises `GradLiteError` where a data set is missing or unreadable, has no usable columns, or nothing to train on.
    """
    if config.dataset == DEFAULT_DATASET and config.dataset_config is not None:
        raise GradLiteError(f"the embedded dataset {DEFAULT_DATASET!r} has no configurations; leave out --dataset-config.")
    source = _embedded() if config.dataset == DEFAULT_DATASET else load_source(config.dataset, config.dataset_config)
    notices: list[str] = []
    parsed = parse(source.train, config.dataset)
    held_out_name = config.dataset
    if config.eval_dataset is not None:
        held_out_name = config.eval_dataset
        other = _embedded() if config.eval_dataset == DEFAULT_DATASET else load_source(config.eval_dataset)
        parsed_held_out = _sample(parse(other.held_out or other.train, held_out_name), config.eval_examples)
    elif source.held_out:
        parsed_held_out = _sample(parse(source.held_out, held_out_name), config.eval_examples)
    else:
        parsed, parsed_held_out = _split_off(parsed, config)
    train, num_repeated = _without(parsed, parsed_held_out)
    if num_repeated:
        notices.append(f"{num_repeated} training rows are held-out rows word for word and were left out.")
    if parsed.num_empty:
        notices.append(f"{parsed.num_empty} rows without a question or an answer were left out.")
    if parsed_held_out.num_empty:
        notices.append(f"{parsed_held_out.num_empty} held-out rows without a question or an answer were left out.")
    if not train.examples:
        raise GradLiteError(
            f"all rows of dataset {config.dataset!r} are held-out rows; give more data or another --eval-dataset."
        )
    tokenized = _tokenize(train, tokenizer, config, config.dataset, notices)
    held_out = _tokenize(parsed_held_out, tokenizer, config, f"{held_out_name} (held-out)", notices)
    return Data(tokenized.kept, held_out.kept, parsed.columns, notices)


def sequences(examples: Sequence[Tokens], config: TrainConfig, packed: bool) -> datasets.Dataset:
    """Examples as the Trainer takes them: columns input_ids and labels; where `packed`, several in a row of seq_len."""
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": [tokens.ids for tokens in examples],
            "labels": [tokens.labels(config.train_on) for tokens in examples],
        }
    )
    return pack_dataset(rows, config.seq_len, "bfd") if packed else rows


def _embedded() -> Source:
    train, held_out = python_help()
    return Source(train, held_out)


def _split_off(parsed: Parsed, config: TrainConfig) -> tuple[Parsed, Parsed]:
    """Put `eval_examples` examples aside (at most a quarter), drawn with a fixed seed."""
    examples = parsed.examples
    if len(examples) < 2:
        raise GradLiteError(
            f"dataset {config.dataset!r} has one row only that says something; a held-out row is needed as well: "
            "give --eval-dataset."
        )
    aside = _sample(parsed, min(config.eval_examples, max(1, len(examples) // 4)))
    drawn = {id(example) for example in aside.examples}
    kept = [example for example in examples if id(example) not in drawn]
    return Parsed(kept, parsed.columns, parsed.num_empty), Parsed(aside.examples, parsed.columns, 0)


def _sample(parsed: Parsed, num_examples: int) -> Parsed:
    """At most `num_examples` examples, drawn with a fixed seed, in their order."""
    examples = parsed.examples
    if len(examples) <= num_examples:
        return parsed
    drawn = sorted(random.Random(_SPLIT_SEED).sample(range(len(examples)), num_examples))
    return Parsed([examples[number] for number in drawn], parsed.columns, parsed.num_empty)


def _without(parsed: Parsed, held_out: Parsed) -> tuple[Parsed, int]:
    """The training examples that are not also held out, word for word, and how many were."""
    seen = {repr(example) for example in held_out.examples}
    kept = [example for example in parsed.examples if repr(example) not in seen]
    return Parsed(kept, parsed.columns, parsed.num_empty), len(parsed.examples) - len(kept)


def _tokenize(
    parsed: Parsed, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, name: str, notices: list[str]
) -> Tokenized:
    tokenized = tokenize(parsed.examples, tokenizer, config.seq_len, config.train_on)
    if not tokenized.kept:
        raise GradLiteError(f"nothing to train on is left of dataset {name!r}: {_why_nothing(tokenized, config.seq_len)}.")
    if tokenized.num_cut_off:
        notices.append(
            f"{name}: {tokenized.num_cut_off} examples were dropped: cut to {config.seq_len} tokens, no answer is left."
        )
    if tokenized.num_unanswered:
        notices.append(f"{name}: {tokenized.num_unanswered} examples were dropped: no token of theirs is an answer's.")
    if tokenized.num_cut:
        notices.append(f"{name}: {tokenized.num_cut} examples were cut to {config.seq_len} tokens.")
    if tokenized.num_rewritten:
        notices.append(
            f"{name}: in {tokenized.num_rewritten} conversations the chat template renders earlier turns differently "
            "later on; those turns are not trained on."
        )
    return tokenized


def _why_nothing(tokenized: Tokenized, seq_len: int) -> str:
    """Why no example is left, and what helps."""
    if tokenized.num_cut_off:
        return f"after cutting to --seq-len {seq_len} tokens no example holds any token of its answer; raise --seq-len"
    if tokenized.num_rewritten:
        return (
            "the model's chat template renders every answer differently once another turn follows it, so no token of one can "
            "be told; end the conversations with the assistant's turn, or use another model"
        )
    return "no example holds a token of an answer that a loss could be taken of; give longer answers"
