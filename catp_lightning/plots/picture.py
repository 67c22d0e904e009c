"""`Picture`: a drawn figure, shown by notebooks and saved as a PNG file."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from catp_lightning.utils.files import write_bytes
from catp_lightning.utils.plots import png


@dataclass(frozen=True, repr=False)
class Picture:
    """Drawn figure. A notebook shows it as the last value of a cell.

    Attributes:
        figure: the matplotlib figure; `figure.savefig("kept.pdf")` writes other formats.
    """

    figure: Figure

    def png(self) -> bytes:
        """Return the picture as the bytes of a PNG file, on an opaque ground: white, or that of matplotlib's style."""
        return png(self.figure)

    def jpeg(self, width: int = 640, height: int = 400, quality: int = 60) -> bytes:
        """Return the picture as the bytes of a small JPEG file, of at most `width` by `height` pixels."""
        with Image.open(BytesIO(self.png())) as whole:
            image = whole.convert("RGB")
        image.thumbnail((width, height))
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    def save(self, path: str | Path) -> Path:
        """Write the picture to a PNG file, whole or not at all.

        Args:
            path: path of the file, which ends in ".png"; its folder is made where it does not exist.

        Returns:
            `path`.

        Raises:
            ValueError: `path` has another ending.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise ValueError(
                f"A picture is saved as PNG, and {str(path)!r} does not end in .png: give a path that does, or write "
                "another format with picture.figure.savefig(path)."
            )
        return write_bytes(path, self.png(), durable=False)

    def _repr_png_(self) -> bytes:
        return self.png()

    def __repr__(self) -> str:
        width, height = self.figure.get_size_inches()
        return f"Picture({width:.1f} x {height:.1f} inches)"
