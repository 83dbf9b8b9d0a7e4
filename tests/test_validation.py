"""pydantic's findings in a user's words."""

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gradlite.validation import in_words, sentence


class Inner(BaseModel):
    number: int


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: int = Field(1, gt=0)
    names: list[str] = Field(["a"], min_length=1)
    title: str = Field("t", min_length=1)
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, int] = (1, 2)
    inner: Inner = Inner(number=1)

    @field_validator("title")
    @classmethod
    def _no_sign(cls, title: str) -> str:
        if "?" in title:
            raise ValueError("no questions")
        return title


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"count": 0}, "X is 0, but it should be greater than 0."),
        ({"count": "two"}, "X is 'two', but it should be a valid integer."),
        ({"count": 2.5}, "X is 2.5, but it should be a valid integer."),
        ({"pair": [1]}, "X is [1], but it should have more items."),
        ({"names": []}, "X is [], but it should have at least 1 item."),
        ({"title": ""}, "X is '', but it should have at least 1 character."),
        ({"title": "a?"}, "X: no questions."),
        ({"kind": "c" * 200}, f"X is 'cc{'c' * 74}..., but it should be 'a' or 'b'."),
        ({"inner": 3}, "X is 3, but it should be a mapping."),
        ({"inner": {}}, "X is missing."),
        ({"cuont": 3}, "X is no known key; did you mean 'count'?"),
        ({"zzz": 3}, "X is no known key; known are count, names, title, kind, pair, inner."),
    ],
)
def test_what_is_wrong_is_a_sentence(given: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(given)
    assert sentence(in_words(caught.value.errors()[0], "X", list(Settings.model_fields))) == told
