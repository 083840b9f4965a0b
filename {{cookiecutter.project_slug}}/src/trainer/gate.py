"""Decide whether a new model (the challenger) may replace the champion."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Decision:
    """Result of the gate and its reason as text."""

    passed: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return asdict(self)


def decide(
    scores: Mapping[str, Any], metric: str, threshold: float, max_regression: float
) -> Decision:
    """Pass a challenger that reaches the threshold and is not much worse than the champion.

    Args:
        scores: metrics on the same test rows: {"challenger": metrics, "champion": metrics or None,
            "champion_version": number or None, "champion_problem": text or None,
            "champion_predicts": the champion's label if it differs, else None}.
    """
    value, number = scores["challenger"][metric], scores["champion_version"]
    if value < threshold:
        return Decision(False, f"{metric} {value:.4f} does not reach the threshold {threshold:.4f}")
    reached = f"{metric} {value:.4f} reaches the threshold {threshold:.4f}"
    if scores.get("champion_predicts"):
        other_question = f"champion {number} predicts '{scores['champion_predicts']}', another column, for those who ask it"
        anew = "to begin anew, move the registry away: here the folder registry/, in the cloud that in the bucket"
        return Decision(False, f"{reached}, but {other_question}; {anew}")
    if scores["champion_problem"]:
        return Decision(
            True, f"{reached}; champion {number} cannot be compared: {scores['champion_problem']}"
        )
    if scores["champion"] is None:
        return Decision(True, f"{reached}; there is no champion yet")
    other = scores["champion"][metric]
    compared = f"champion {number} has {other:.4f} on the same test rows, allowed regression {max_regression:.4f}"
    # A tolerance for binary floating point: 0.95 - 0.05 is not exactly 0.9.
    if value < other - max_regression - 1e-12:
        return Decision(False, f"{reached}, but {compared}")
    return Decision(True, f"{reached}; {compared}")


def only_tested(decision: Decision) -> Decision:
    """Return a negative decision for a run that registers nothing, with the original reason."""
    return Decision(
        False, f"this run only tests, and registers nothing; otherwise: {decision.reason}"
    )
