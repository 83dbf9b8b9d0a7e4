"""One example as the model sees it, with the tokens that the loss covers marked."""

from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gradlite.train.tokens import IGNORED, Tokens


def preview(tokens: Tokens, tokenizer: PreTrainedTokenizerBase, train_on: str) -> Text:
    """The example's text; what is trained on stands between ⟦ and ⟧ (and in green where there are colours)."""
    shown = Text()
    labels = [IGNORED, *tokens.labels(train_on)[1:]]  # the first token is given, never predicted
    pairs = zip(tokens.ids, labels, strict=True)
    for is_trained, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = str(tokenizer.decode([token for token, _ in group]))
        shown.append(f"⟦{text}⟧" if is_trained else text, style="green" if is_trained else "dim")
    return shown
