"""Values as people write them on a command line or in a file, and as they are shown again."""

import re
from fractions import Fraction
from typing import Any

import yaml

from gradlite.train.yaml_file import UniqueKeyLoader


def mapping(text: str) -> Any:
    """What YAML makes of a text, a mapping if all is well. Raises ValueError for no YAML, and for a key that is named twice."""
    try:
        return yaml.load(text, Loader=UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError("not a YAML mapping") from error


def int_or_float(text: str) -> int | float:
    """A number as people write it: 64, 0.0625, 1/16. A fraction is a float. Raises ValueError for other text."""
    if "/" in text:
        try:
            return float(Fraction(text.replace(" ", "")))
        except (ZeroDivisionError, OverflowError) as error:
            raise ValueError("no number") from error
    try:
        return int(text)
    except ValueError:
        return float(text)


def fraction_text(value: float) -> str | float:
    """1/16 for 0.0625: a unit fraction where it is exact and readable, else the number itself."""
    denominators = range(2, 1025)
    return next((f"1/{denominator}" for denominator in denominators if 1 / denominator == value), value)


def short_name(source: str) -> str:
    """A model's or data set's path or hub id in a directory's name: the last part, without a data file's suffix."""
    last = source.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    stem = re.sub(r"\.(jsonl|json|csv|parquet)$", "", last, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.").lower() or "run"
