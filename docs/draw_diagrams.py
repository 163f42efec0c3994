# SPDX-License-Identifier: Apache-2.0
"""Draw the diagrams of architecture.md, and the two attention styles of contexts.md.

python docs/draw_diagrams.py
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy

matplotlib.use('Agg')
from matplotlib import pyplot

PICTURES = Path(__file__).resolve().parent / 'pictures'
OWN, STOCK, OWNER = '#d9e8f6', '#eeeeee', '#fde2b3'  # this project, NeMo and data, the owner of the context


@dataclass(frozen=True)
class Box:
    """A labelled box; ``x`` and ``y`` are its centre, in inches."""

    x: float
    y: float
    title: str
    text: str = ''
    colour: str = OWN
    width: float = 2.3
    height: float = 0.72

    def draw(self, axes) -> None:
        """Draw the box with its title in bold and its text below."""
        corner = (self.x - self.width / 2, self.y - self.height / 2)
        axes.add_patch(
            matplotlib.patches.FancyBboxPatch(
                corner, self.width, self.height, 'round,pad=0.02,rounding_size=0.08', fc=self.colour, ec='#444444'
            )
        )
        lift = 0.14 if self.text else 0.0
        axes.text(self.x, self.y + lift, self.title, ha='center', va='center', weight='bold', size=9)
        axes.text(self.x, self.y - 0.16, self.text, ha='center', va='center', size=7.5)

    def edge(self, toward: 'Box') -> tuple[float, float]:
        """Return the middle of the side that faces another box."""
        across, along = toward.x - self.x, toward.y - self.y
        if abs(across) * self.height > abs(along) * self.width:
            return self.x + self.width / 2 * (1 if across > 0 else -1), self.y
        return self.x, self.y + self.height / 2 * (1 if along > 0 else -1)


def arrow(axes, start: Box, end: Box, label: str = '', dashed: bool = False) -> None:
    """Draw an arrow between the facing sides of two boxes."""
    first, last = start.edge(end), end.edge(start)
    style = dict(arrowstyle='-|>', color='#a35c00' if dashed else '#333333', linestyle='--' if dashed else '-', lw=1.2)
    axes.annotate('', last, first, arrowprops=dict(style, shrinkA=2, shrinkB=2))
    middle = (first[0] + last[0]) / 2, (first[1] + last[1]) / 2
    axes.text(*middle, label, size=7.5, ha='center', va='center', bbox=dict(fc='white', ec='none', pad=1.0))


def figure(width: float, height: float):
    """Return a figure and its axes, one unit an inch."""
    made, axes = pyplot.subplots(figsize=(width, height))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis('off')
    made.subplots_adjust(0, 0, 1, 1)
    return made, axes


def imports():
    """Draw how ``import nemo...`` finds a patched module."""
    made, axes = figure(9.4, 3.1)
    script = Box(1.3, 2.3, 'your script', 'import nemo...masking', STOCK)
    finder = Box(4.7, 2.3, 'nemo_streaming_ssl', 'finder on sys.meta_path')
    patched = Box(8.1, 2.3, 'nemo/.../masking.py', 'this project: the difference')
    stock = Box(8.1, 0.7, 'nemo/.../masking.py', 'site-packages: stock NeMo', STOCK)
    other = Box(4.7, 0.7, 'all other modules', 'site-packages: stock NeMo', STOCK)
    for box in (script, finder, patched, stock, other):
        box.draw(axes)
    arrow(axes, script, finder)
    arrow(axes, finder, patched, 'patched')
    arrow(axes, finder, other, 'not patched')
    arrow(axes, patched, stock, 'upstream(): subclasses')
    return made


def batch():
    """Draw how a batch goes from the loader to the loss, with its one context."""
    made, axes = figure(9.4, 5.6)
    loader = Box(1.3, 4.9, 'data loader', 'clean and noisy samples', STOCK)
    model = Box(4.7, 4.9, 'ssl_models.py', 'one training step')
    encoder_owner = Box(8.1, 4.9, 'encoder: the context', 'active > override > policy', OWNER)
    preprocessor = Box(1.3, 3.5, 'preprocessor', 'features [B, D, T]', STOCK)
    masking = Box(4.7, 3.5, 'masking.py', 'masked features, masks')
    encoder = Box(4.7, 2.1, 'conformer_encoder.py', 'attention within the context')
    layers = Box(8.1, 2.1, 'layer contexts', 'each narrows the batch context')
    quantizer = Box(1.3, 2.1, 'quantizers.py', 'tokens of the clean features')
    objective = Box(3.0, 0.7, 'parts/objectives', 'loss at the loss positions')
    reports = Box(7.0, 0.7, 'ssl_reports', 'metrics, audit, figures')
    for box in (
        loader,
        model,
        encoder_owner,
        preprocessor,
        masking,
        encoder,
        layers,
        quantizer,
        objective,
        reports,
    ):
        box.draw(axes)
    arrow(axes, loader, model, 'batch')
    arrow(axes, encoder_owner, model, 'context')
    arrow(axes, loader, preprocessor)
    arrow(axes, preprocessor, masking, 'noisy')
    arrow(axes, preprocessor, quantizer, 'clean')
    arrow(axes, masking, encoder)
    arrow(axes, encoder_owner, masking, 'window', dashed=True)
    arrow(axes, encoder_owner, layers, 'context', dashed=True)
    arrow(axes, layers, encoder, dashed=True)
    arrow(axes, quantizer, objective, 'targets')
    arrow(axes, encoder, objective, 'encoded')
    arrow(axes, objective, reports, 'BatchRecord')
    return made


def styles(frames: int = 12, right: int = 3, left: int = 4):
    """Draw which frames each frame attends to, in both styles with the same context."""
    made, both = pyplot.subplots(1, 2, figsize=(9.4, 4.4), layout='constrained')
    query, key = numpy.indices((frames, frames))
    chunk = right + 1
    chunks = query // chunk - key // chunk
    seen = {
        'regular': (key >= query - left) & (key <= query + right),
        'chunked_limited': (chunks >= 0) & (chunks <= left // chunk),
    }
    for axes, (style, visible) in zip(both, seen.items()):
        axes.imshow(visible, cmap=matplotlib.colors.ListedColormap(['#ffffff', '#4a86c5']))
        axes.set(title=f'{style}, [{left}, {right}]', xlabel='frame attended to', ylabel='frame')
        axes.set_xticks(numpy.arange(frames + 1) - 0.5, minor=True)
        axes.set_yticks(numpy.arange(frames + 1) - 0.5, minor=True)
        axes.grid(which='minor', color='#cccccc', linewidth=0.6)
        axes.tick_params(which='minor', length=0)
    return made


def main() -> None:
    """Write all of them."""
    for name, draw in (
        ('architecture_imports', imports),
        ('architecture_batch', batch),
        ('attention_styles', styles),
    ):
        made = draw()
        made.savefig(PICTURES / f'{name}.png', dpi=150)
        pyplot.close(made)


if __name__ == '__main__':
    main()
