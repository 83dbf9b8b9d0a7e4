"""Turns a model's linear and embedding layers into backward-friendly twins, says what it did, and undoes it."""

from gradlite.attaching.attachment import Attachment, attach, attachment_of, check_unchanged, detach, tiles_its_loss
from gradlite.attaching.coverage import Coverage, Entry

__all__ = ["Attachment", "Coverage", "Entry", "attach", "attachment_of", "check_unchanged", "detach", "tiles_its_loss"]
