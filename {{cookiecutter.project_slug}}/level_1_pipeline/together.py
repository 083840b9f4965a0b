"""Several things at the same time, in threads: what can be done is done, also when another fails."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from core.errors import UserError

Made = TypeVar("Made")


def gather(
    work: Mapping[str, Callable[[], Made]],
    done: Callable[[Made], None] | None = None,
    *,
    told_once: bool = False,
) -> dict[str, Made]:
    """Call functions in threads, and let all of them finish.

    Args:
        work: name → what to call.
        done: gets each result, in the order of the names.
        told_once: a failure that several share, such as a missing Docker, is told once.

    Returns:
        Name → result.

    Raises:
        UserError: tells every failure. Another exception, which is nobody's mistake, comes through as it is.
    """
    made: dict[str, Made] = {}
    failures: list[tuple[list[str], str]] = []
    with ThreadPoolExecutor(max_workers=max(1, len(work))) as pool:
        running = {name: pool.submit(function) for name, function in work.items()}
        for name, result in running.items():
            try:
                made[name] = result.result()
            except UserError as error:
                alike = [
                    names for names, message in failures if told_once and message == str(error)
                ]
                if alike:
                    alike[0].append(name)
                else:
                    failures.append(([name], str(error)))
            else:
                if done:
                    done(made[name])
    if failures:
        raise UserError(
            "\n       ".join(f"{', '.join(names)}: {message}" for names, message in failures)
        )
    return made
