"""One way of holding, as the operators of a block see it: hand in a tensor, get a ticket."""

from collections.abc import Callable

import torch
from torch import Tensor

from gradlite.hold.codec import INT4, INT8, Codec
from gradlite.hold.compiled import kernel
from gradlite.hold.noise import Noise
from gradlite.hold.place import HERE, Place
from gradlite.hold.shelf import Shelf
from gradlite.hold.ticket import Held, Ticket


class Holder:
    """A codec and a place, with the model's noise and shelf.

    Operators that fuse the codec with their own work take these parts; the others call :meth:`hold`. ``projects``: a linear
    layer keeps its input's coordinates instead of the input, where that is enough.
    """

    def __init__(self, codec: Codec, noise: Noise, shelf: Shelf, place: Place = HERE, projects: bool = False) -> None:
        self.codec = codec
        self.noise = noise
        self.shelf = shelf
        self.place = place
        self.projects = projects

    def codec_for(self, width: int) -> Codec:
        """The codec for rows of this width: four-bit codes come in pairs, so odd widths take eight bits."""
        return INT8 if self.codec == INT4 and width % 2 else self.codec

    def noise_for(self, x_TN: Tensor) -> Tensor | None:
        """Noise for rounding ``x``, or None where the codec rounds nothing."""
        if not self.codec.is_lossy:
            return None
        return self.noise.take(x_TN.shape[0], x_TN.shape[1], x_TN.device)

    def hold(self, x: Tensor, dtype: torch.dtype | None = None) -> Held:
        """Holds ``x`` (any shape; in ``dtype`` if it is given), or finds that it is held already."""
        wanted = x.dtype if dtype is None else dtype
        held = self.shelf.find(x, wanted)
        if held is None:
            x_TN = x.detach().reshape(-1, x.shape[-1])  # or autograd would differentiate the codes, and save what that needs
            if dtype is not None:
                x_TN = x_TN.to(dtype)
            width, dtype = x_TN.shape[1], x_TN.dtype
            held = Held(Ticket(lambda *leaves: self.decode(leaves, width, dtype)), self.encode(x_TN))
            self.shelf.offer(x, held, wanted)
        held.ticket.issue()
        return held

    def ticket(self, rebuild: Callable[..., Tensor]) -> Ticket:
        """For what ``rebuild`` makes of an operator's own leaves, wherever they wait."""
        return Ticket(lambda *leaves: rebuild(*self.place.fetch(leaves)))

    def encode(self, x_TN: Tensor) -> tuple[Tensor, ...]:
        """The leaves of ``x``, asked for by no one else."""
        codec = self.codec_for(x_TN.shape[1])
        if not codec.is_lossy:
            return self.place.put(codec.encode(x_TN, None))
        return self.place.put(kernel(_encode, codec)(x_TN, self.noise_for(x_TN)))

    def decode(self, leaves: tuple[Tensor, ...], width: int, dtype: torch.dtype) -> Tensor:
        """The rows that :meth:`encode` took."""
        codec, leaves = self.codec_for(width), self.place.fetch(leaves)
        if not codec.is_lossy:
            return codec.decode(leaves, dtype)
        x_TN: Tensor = kernel(_decode, codec, dtype)(*leaves)
        return x_TN


def _encode(codec: Codec, x_TN: Tensor, noise_TN: Tensor | None) -> tuple[Tensor, ...]:
    return codec.encode(x_TN, noise_TN)


def _decode(codec: Codec, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
    return codec.decode(leaves, dtype)
