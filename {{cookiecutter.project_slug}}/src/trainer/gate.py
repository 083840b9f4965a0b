"""The gate: may a challenger replace the champion?"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Decision:
    """The gate's answer and its reason, in words."""

    passed: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


def decide(
    scores: Mapping[str, Any], metric: str, threshold: float, max_regression: float
) -> Decision:
    """The gate: a challenger passes when it reaches the threshold and is at most `max_regression` worse than the champion.

    Args:
        scores: {"challenger": metrics, "champion": metrics or None, "champion_version": number or None,
            "champion_problem": text or None, "champion_predicts": the champion's label if it is another one}, all
            measured on the same test rows.
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
    # Compared with a little room: 0.95 - 0.05 is not 0.9 in binary.
    if value < other - max_regression - 1e-12:
        return Decision(False, f"{reached}, but {compared}")
    return Decision(True, f"{reached}; {compared}")


def only_tested(decision: Decision) -> Decision:
    """The gate's answer in a run that registers nothing: no, and what it would have been."""
    return Decision(
        False, f"this run only tests, and registers nothing; otherwise: {decision.reason}"
    )
