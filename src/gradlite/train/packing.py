"""Whether a model keeps examples apart that lie in one row, as packed training wants it."""

from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gradlite.errors import GradLiteError

_FIRST, _SECOND = 7, 5
_TOLERANCE = 1e-3


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raises GradLiteError for a model in which an example of a packed row sees the one before it.

    Packed rows come without a mask: where examples begin is told by their position numbers, which some models (OPT, BLOOM, MPT)
    do not take for that. Two rows that differ in their first example only must agree in the second one's logits.
    """
    was_training = model.training
    model.eval()
    try:
        first, other = (_second_logits(model, start) for start in (1, 2))
    except TypeError as error:
        raise GradLiteError(f"{type(model).__name__} does not take packed rows ({error}); leave out --packing.") from error
    finally:
        model.train(was_training)
    if (first - other).abs().max() > _TOLERANCE * first.abs().max():
        raise GradLiteError(
            f"{type(model).__name__} does not keep packed examples apart: each would see those before it in its row; "
            "leave out --packing."
        )


def _second_logits(model: PreTrainedModel, start: int) -> torch.Tensor:
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    tokens = [*range(start, start + 2 * _FIRST, 2), *range(3, 3 + _SECOND)]
    row = {"input_ids": [token % vocabulary for token in tokens], "seq_lengths": [_FIRST, _SECOND]}
    row["labels"] = row["input_ids"]
    batch: dict[str, Any] = DataCollatorForLanguageModeling(0, padding_free=True)([row])
    del batch["labels"]
    inputs = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits[0, _FIRST:].float()
