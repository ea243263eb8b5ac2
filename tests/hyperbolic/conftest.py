"""What forked runs inherit, so that none of them loads it again."""

import io

import pytest
from matplotlib import pyplot


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """Load fonts once, not in every forked worker."""
    figure, axes = pyplot.subplots(layout="constrained")
    axes.plot([1, 2], label="warm")
    axes.legend()
    figure.savefig(io.BytesIO())
    pyplot.close(figure)
