"""The number format of a run: what was asked for, or what this machine is fast with."""

from gradlite.measure.machine import multiplies_bfloat16

SLOW = "This CPU has no fast bfloat16 products"


def number_format(asked: str) -> tuple[str, str | None]:
    """The format for what was asked for ("auto", "bfloat16" or "float32"), and what the user should know of it, or None."""
    if asked == "float32" or multiplies_bfloat16():
        return ("bfloat16" if asked == "auto" else asked), None
    if asked == "auto":
        return "float32", f"{SLOW}: float32 instead, which takes twice the memory for weights (--dtype bfloat16 insists)."
    return "bfloat16", f"{SLOW}: a step may take twenty times as long as with --dtype float32."
