"""The one place that knows where matplotlib is."""

from typing import Any


def require_matplotlib(what: str) -> None:
    """Nothing where matplotlib is installed: better asked before the work than after it.

    Raises:
        ValueError: If it is not.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError(f'{what}: pip install "passreid-models[viz]"') from None


def new_figure(width: float, height: float, what: str = "plot") -> Any:
    """A figure of that many inches.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    require_matplotlib(what)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
