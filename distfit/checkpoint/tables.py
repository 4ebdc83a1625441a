"""How what is known of checkpoints is said: places, times and metrics for people, all fields as JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from typing import Any

# Raised when a field of the JSON changes its name or meaning, or goes.
JSON_VERSION = 1
_AGES = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))


def as_json(found: Any, **more: Any) -> str:
    """All fields by their names; a number that is not finite is a word, as JSON has none for it."""
    fields = {"version": JSON_VERSION, **more, **dataclasses.asdict(found)}
    return json.dumps(_finite(fields), indent=1, allow_nan=False)


def place_text(place: Mapping[str, Any]) -> str:
    """
    >>> place_text({"epoch": 2, "step": 17, "total": 217}), place_text({"epoch": 2, "step": 0, "total": 200})
    ('epoch 3, step 17', 'after epoch 2')
    """
    epoch, step = place.get("epoch"), place.get("step")
    if not isinstance(epoch, int) or not isinstance(step, int):
        return ""
    return f"epoch {epoch + 1:,}, step {step:,}" if step or not epoch else f"after epoch {epoch:,}"


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """
    >>> metrics_text({"loss": 0.25, "val_loss": float("nan")})
    'loss 0.25, val_loss nan'
    """
    return ", ".join(f"{name} {value:.5g}" for name, value in metrics.items() if isinstance(value, (int, float)))


def when(written: float, now: float) -> str:
    """Local time, and how long ago; both are seconds since 1970."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(written))} ({age(now - written)})"


def age(seconds: float) -> str:
    """
    >>> age(0.2), age(130), age(100 * 3600)
    ('now', '2 min ago', '4 days ago')
    """
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name} ago"
    return "now"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
