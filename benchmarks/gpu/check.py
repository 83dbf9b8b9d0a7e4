"""Whether GradLite's CUDA branches compute what they should: one line a check, with its figures; exit code 1 if one fails.

    PYTHONPATH=src python benchmarks/gpu/check.py [--device cuda|cpu]

Needs torch and transformers. A Llama of two layers with random weights; the truth is float32 backpropagation on the same
device, and for the optimizer GradLite on the CPU.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

import bare

bare.import_gradlite()

import torch  # noqa: E402 - gradlite comes first where pydantic is missing
from shapes import SHAPES, batches, build_model  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

import gradlite  # noqa: E402
from gradlite.attaching import attachment_of  # noqa: E402
from gradlite.hold.codec import INT8  # noqa: E402
from gradlite.hold.compiled import ENVIRONMENT_SWITCH, is_compiling_enabled, kernel  # noqa: E402
from gradlite.optim.moments import Int8Moments  # noqa: E402
from gradlite.optim.rounding import TABLE, TILE, NoiseTable, low_rank_update_  # noqa: E402

SHAPE = replace(SHAPES["tiny"], hidden=128, mlp=384, vocabulary=1000, seq_len=160)
HOLDS = ("exact", "int8", "recompute", "recompute-int8", "host")
Check = tuple[str, bool, str]
"""Name, whether it passed, its figures."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device; try --device cpu.")
        return 1
    num_failed = 0
    for check in (gradients, int8_kernels, compiling, short_formats, optimizer_against_cpu, resume, training):
        for name, has_passed, figures in _until_an_error(check, device):
            print(f"{'ok    ' if has_passed else 'FAILED'}  {name}: {figures}", flush=True)
            num_failed += not has_passed
    print(f"{num_failed} checks failed." if num_failed else "All checks passed.")
    return 1 if num_failed else 0


def _until_an_error(check: Callable[[torch.device], Iterator[Check]], device: torch.device) -> Iterator[Check]:
    """The checks of one kind; an error is a check that failed, and the other kinds come all the same."""
    try:
        yield from check(device)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong on a device that nobody has tried
        traceback.print_exc()
        yield check.__name__, False, f"{type(error).__name__}: {error}"


def gradients(device: torch.device) -> Iterator[Check]:
    """Every way of holding against exact backpropagation: the cosine and relative length of the whole gradient."""
    batch = _on(batches(SHAPE, 1)[0], device)
    model = build_model(SHAPE, device)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}  # bfloat16 weights, in both formats
    exact = _plain_gradients(_model(device, torch.float32, state), batch)
    for dtype, plain, int8 in ((torch.float32, 1.0 - 1e-6, 0.9998), (torch.bfloat16, 0.9995, 0.9995)):
        for hold in _holds(device):
            cosine, length = _compare(_model(device, dtype, state), hold, batch, exact)
            bound = int8 if "int8" in hold else plain
            tolerance = 1e-4 if bound == plain and dtype == torch.float32 else 0.01
            has_passed = cosine >= bound and abs(length - 1.0) <= tolerance
            name = f"gradient, {str(dtype).removeprefix('torch.')}, hold {hold}"
            yield name, has_passed, f"cosine {cosine:.7f} (at least {bound:.7g}), relative length {length:.5f}"


def _holds(device: torch.device) -> tuple[str, ...]:
    return HOLDS if device.type == "cuda" else HOLDS[:-1]  # a model on a CPU is in the host's memory already


def _model(device: torch.device, dtype: torch.dtype, state: dict[str, Tensor]) -> PreTrainedModel:
    model = build_model(SHAPE, device, dtype)
    model.load_state_dict(state)
    return model


def _plain_gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model(**batch).loss.backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}


def _compare(model: PreTrainedModel, hold: str, batch: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, float]:
    """Projected weights are compared inside their basis: ``C.grad`` against ``G P``."""
    gradlite.attach(model, rank=SHAPE.rank, hold=hold)  # type: ignore[arg-type]
    model(**batch).loss.backward()
    attachment = attachment_of(model)
    assert attachment is not None
    pairs = {}
    for (name, _), collector in zip(attachment.projected, attachment.window.collectors, strict=True):
        assert collector.coordinates.grad is not None
        assert collector.basis.matrix_NR is not None
        pairs[name] = (collector.coordinates.grad.double(), exact[name].double() @ collector.basis.matrix_NR.double())
    for name, parameter in model.named_parameters():
        if name not in pairs and name in exact and parameter.grad is not None:
            pairs[name] = (parameter.grad.double(), exact[name].double())
    assert pairs.keys() == exact.keys()
    dot, found, true = (
        sum(float((x * y).sum()) for x, y in sums)
        for sums in (pairs.values(), ((a, a) for a, _ in pairs.values()), ((b, b) for _, b in pairs.values()))
    )
    return dot / (found * true) ** 0.5, (found / true) ** 0.5


def int8_kernels(device: torch.device) -> Iterator[Check]:
    """Compiled by Triton (on a CPU by C++) against eager PyTorch, on the same noise."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x_TN = torch.randn(700, 384, generator=generator).to(device, dtype)
        noise_TN = torch.randint(256, (700, 384), generator=generator, dtype=torch.uint8).to(device)
        codes, scales = INT8.encode(x_TN, noise_TN)
        compiled_codes, compiled_scales = kernel(_encode)(x_TN, noise_TN)
        # A product may be contracted or rounded otherwise, which moves a value that stands just at the edge of a code.
        moved = float((codes != compiled_codes).float().mean())
        furthest = int((codes.int() - compiled_codes.int()).abs().max())
        decoded, compiled = INT8.decode((codes, scales), dtype), kernel(_decode, dtype)(codes, scales)
        error = float((decoded.float() - compiled.float()).norm() / decoded.float().norm())
        has_passed = moved < 1e-3 and furthest <= 1 and torch.equal(scales, compiled_scales) and error < 1e-6
        name = f"int8 kernels, {str(dtype).removeprefix('torch.')}"
        figures = f"{moved:.2e} of the codes differ, by at most {furthest}; decoded differ by {error:.1e}"
        yield name, has_passed, figures


def compiling(device: torch.device) -> Iterator[Check]:
    """Whether the kernels so far were compiled: one that cannot be turns compiling off, and GradLite is slower then."""
    is_off = os.environ.get(ENVIRONMENT_SWITCH) == "0"
    figures = f"off by {ENVIRONMENT_SWITCH}=0" if is_off else "kernels are compiled" if is_compiling_enabled() else "it failed"
    yield f"compiling for {device.type}", is_off or is_compiling_enabled(), figures


class _SameNoise(NoiseTable):
    """Numbers that a CPU drew, read from the same places on every device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.Generator().manual_seed(0), device)

    @cached_property
    def bits(self) -> Tensor:
        return torch.randint(1 << 16, (TABLE + TILE,), generator=self._generator, dtype=torch.int32).to(self._device)


def short_formats(device: torch.device) -> Iterator[Check]:
    """GradLite's default arithmetic: 8-bit moments, bfloat16 weights rounded stochastically; on the device and on the CPU."""
    generator = torch.Generator().manual_seed(1)
    gradients_MR = [torch.randn(384, 64, generator=generator) for _ in range(3)]
    weight_MN, right_NR = torch.randn(384, 512, generator=generator), torch.randn(512, 64, generator=generator)
    ends = []
    for place in (torch.device("cpu"), device):
        moments, noise = Int8Moments(), _SameNoise(place)
        state = moments.init(torch.Size((384, 64)), gradients_MR[0].to(place))
        weight = weight_MN.to(place, torch.bfloat16)
        for step, gradient_MR in enumerate(gradients_MR, 1):
            direction_MR, _ = moments.advance(state, gradient_MR.to(place), step, (0.9, 0.999), 1e-8, noise)
            low_rank_update_(weight, direction_MR, right_NR.to(place), -1e-2, 1.0, noise)
        ends.append((direction_MR.cpu(), weight.float().cpu()))
    (direction, updated), (other_direction, other) = ends
    moved = updated - weight_MN.bfloat16().float()
    errors = (float((direction - other_direction).norm() / direction.norm()), float((updated - other).norm() / moved.norm()))
    # A value at the edge of a code, or of two roundings, may fall to either side.
    yield "8-bit moments", errors[0] < 0.005, f"directions differ by {errors[0]:.1e}"
    yield "stochastic rounding", errors[1] < 0.02, f"updates differ by {errors[1]:.1e}"


def _encode(x_TN: Tensor, noise_TN: Tensor) -> tuple[Tensor, ...]:
    return INT8.encode(x_TN, noise_TN)


def _decode(dtype: torch.dtype, codes_TN: Tensor, scale_TG: Tensor) -> Tensor:
    return INT8.decode((codes_TN, scale_TG), dtype)


def optimizer_against_cpu(device: torch.device) -> Iterator[Check]:
    """Three steps with a refresh in between, from the same bases: what the weights moved by, on the device and on the CPU."""
    work = batches(SHAPE, 3)
    cpu = torch.device("cpu")
    state = build_model(SHAPE, cpu, torch.float32).state_dict()
    for feedback in ("off", "feedback"):
        moved: list[Tensor] = []
        bases: list[Tensor] = []
        for place in (cpu, device):
            model = _model(place, torch.float32, state)
            optimizer = gradlite.GradLite(
                model, lr=1e-3, rank=SHAPE.rank, moments="fp32", feedback=feedback, feedback_memory="fp32", refresh_interval=2
            )
            window = optimizer._attachment.window
            for collector in window.collectors:  # all of the residual: what is drawn would differ between devices
                collector.sample_count = SHAPE.tokens
            model(**_on(work[0], place)).loss.backward()  # makes the bases, from random starts
            optimizer.zero_grad()
            if not bases:
                bases = [basis.matrix_NR for basis in window.bases() if basis.matrix_NR is not None]
            for basis, matrix_NR in zip(window.bases(), bases, strict=True):
                basis.matrix_NR = matrix_NR.to(place)
            for batch in work:
                model(**_on(batch, place)).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            ends = model.state_dict()
            moved.append(torch.cat([(tensor.cpu() - state[name]).flatten() for name, tensor in ends.items()]).double())
        error = float((moved[0] - moved[1]).norm() / moved[0].norm())
        yield f"optimizer on {device.type} and on the CPU, feedback {feedback}", error < 0.02, f"updates differ by {error:.2e}"


def resume(device: torch.device) -> Iterator[Check]:
    """Six steps at once, and three, saved, loaded into a new model, and three more: the weights at the end."""
    work = batches(SHAPE, 6)

    def make() -> tuple[PreTrainedModel, gradlite.GradLite]:
        model = build_model(SHAPE, device)
        return model, gradlite.GradLite(model, lr=1e-3, rank=SHAPE.rank, hold="int8", feedback="feedback", refresh_interval=2)

    model, optimizer = make()
    _train(model, optimizer, work[:3], device)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    _train(model, optimizer, work[3:], device)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = make()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    _train(other, resumed, work[3:], device)
    ended, again = model.state_dict(), other.state_dict()
    distance = sum(float((ended[name].float() - again[name].float()).square().sum()) for name in ended) ** 0.5
    length = sum(float((ended[name].float() - saved["model"][name].float()).square().sum()) for name in ended) ** 0.5
    # On CUDA the look-up table's gradient is summed in any order, so that sums differ in their last bits.
    bound = 0.0 if device.type == "cpu" else 0.05
    yield "resume", distance <= bound * length, f"weights differ by {distance / length:.2e} of what three steps moved them"


def training(device: torch.device) -> Iterator[Check]:
    """bfloat16 training on one batch learns it, whatever the way of holding."""
    batch = batches(SHAPE, 1)[0]
    for hold in _holds(device):
        model = build_model(SHAPE, device)
        optimizer = gradlite.GradLite(model, lr=3e-3, rank=SHAPE.rank, hold=hold)  # type: ignore[arg-type]
        losses = _train(model, optimizer, [batch] * 12, device)
        figures = f"loss {losses[0]:.3f}, after 12 steps {losses[-1]:.3f}"
        yield f"training, hold {hold}", losses[-1] < losses[0] - 0.5 and optimizer.skipped_steps == 0, figures


def _train(
    model: PreTrainedModel, optimizer: gradlite.GradLite, work: list[dict[str, Tensor]], device: torch.device
) -> list[float]:
    losses = []
    for batch in work:
        loss = model(**_on(batch, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _on(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: part.to(device) for key, part in batch.items()}


if __name__ == "__main__":
    sys.exit(main())
