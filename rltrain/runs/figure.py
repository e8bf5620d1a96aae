"""A matplotlib figure that a notebook shows as the value of a cell."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure made without pyplot, which notebooks would otherwise show as text."""

    def _repr_png_(self) -> bytes:
        """The picture, for IPython."""
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=80)
        return picture.getvalue()
