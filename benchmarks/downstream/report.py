# SPDX-License-Identifier: Apache-2.0
"""Compute the figures of docs/evidence.md from the committed CSV files, and draw its pictures.

    python benchmarks/downstream/report.py             # writes the page and the pictures
    python benchmarks/downstream/report.py --check     # exit status 1 if the page has other figures

It replaces the part of docs/evidence.md between two marks. protocol.md defines what is measured and what decides.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from arms import ARMS, COMPARED, FEATURES, KINDS, RUNNABLE, SEEDS
from bootstrap import CONFIDENCE, Estimate, estimate
from tables import label_of, rows_of

from nemo.utils.atomic_files import replacing, write_text

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / 'docs/evidence.md'
BEGIN, END = '<!-- figures: written by benchmarks/downstream/report.py -->', '<!-- end of the figures -->'
BETTER, WORSE, UNDECIDED, OPEN = 'better', 'worse', 'not shown', 'open'
EARLIER = {  # arms of the earlier rounds
    'scratch': 'from scratch',
    'stock': "stock's masks",
    'synchronised': 'following masks',
    'next_token': 'next tokens',
}
DRAWN = ('stock-40', 'following-40', 'next', 'both')  # whose loss is drawn by distance
COLOURS = {
    'stock': '#d1495b', 'following': '#00798c', 'next': '#edae49', 'both': '#7b5ea7', 'offline': '#66a182', '': '#555555'
}  # fmt: skip


def colour(arm: str) -> str:
    """Return the colour of an arm in every picture."""
    return COLOURS[next(family for family in COLOURS if arm.startswith(family))]


class Results:
    """The errors of all probes.

    Args:
        folder: of the CSV files.
    """

    def __init__(self, folder: Path):
        self.folder, self.errors = folder, {}
        self.phones = self.speakers = np.array([])
        for row in rows_of(folder / 'probe.csv'):
            if row['arm'] == '(speakers)':
                self.speakers = np.array(row['errors'].split())
                continue
            counts = np.array(row['errors'].split(), dtype=int)
            if row['arm'] == '(phones)':
                self.phones = counts
            else:
                key = (
                    row['kind'],
                    row['arm'],
                    int(row['seed']),
                    int(row['step']),
                    row['context'],
                    int(row['probe_seed']),
                )
                self.errors[key] = counts

    def seeds(self, kind: str, *names: str) -> list[int]:
        """Return the seeds whose last encoder is judged in both contexts, for all of these arms."""
        found = [{seed for seed in SEEDS if self.last(kind, name, seed) is not None} for name in names]
        return sorted(set.intersection(*found))

    def last(self, kind: str, name: str, seed: int) -> int | None:
        """Return the last step at which probe 0 judged an encoder in all judged contexts, or None."""
        wanted = KINDS[kind].judged[: 1 if name == FEATURES else None]
        keys = [key for key in self.errors if key[:3] == (kind, name, seed) and key[5] == 0]
        steps = [step for step in {key[3] for key in keys} if sum(key[3] == step for key in keys) == len(wanted)]
        return max(steps, default=None)

    def counts(self, kind: str, name: str, context, seeds: list[int]) -> np.ndarray:
        """Return the errors of an arm in a context, by the first probe seed, [S, U]."""
        return np.array([self.errors[kind, name, s, self.last(kind, name, s), label_of(context), 0] for s in seeds])

    def rates(self, kind: str, name: str, context) -> np.ndarray:
        """Return the error rate of each seed of an arm, in %, [S]."""
        counts = self.counts(kind, name, context, self.seeds(kind, name))
        return 100 * counts.sum(axis=1) / self.phones.sum()

    def rate(self, kind: str, name: str, context) -> Estimate:
        """Return the error rate of an arm."""
        return estimate(self.counts(kind, name, context, self.seeds(kind, name)), self.phones)

    def difference(self, kind: str, first: str, second: str, context, by_speaker: bool = False) -> Estimate:
        """Return the error rate of the first arm minus that of the second."""
        seeds = self.seeds(kind, first, second)
        above = self.counts(kind, first, context, seeds) - self.counts(kind, second, context, seeds)
        return estimate(above, self.phones, self.speakers if by_speaker else None)

    def rate_of(self, key: tuple) -> float:
        """Return the error rate of one probe, in %."""
        return 100 * self.errors[key].sum() / self.phones.sum()

    def probe_deviation(self) -> float | None:
        """Return the deviation of the error rate over probe seeds, in points, or None if it is not yet known."""
        groups = {}
        for key in self.errors:
            groups.setdefault(key[:5], []).append(self.rate_of(key))
        variances = [np.var(rates, ddof=1) for rates in groups.values() if len(rates) > 1]
        return float(np.sqrt(np.mean(variances))) if variances else None

    def verdict(self, kind: str, first: str, second: str) -> str:
        """Return what the comparison comes to, by the rule of protocol.md."""
        noise = self.probe_deviation()
        if noise is None or self.seeds(kind, first, second) != list(SEEDS):
            return OPEN
        signs = set()
        for context in KINDS[kind].judged:
            for by_speaker in (False, True):
                found = self.difference(kind, first, second, context, by_speaker)
                signs.add(found.sign if 100 * abs(found.value) > 2 * noise else 0)
        return {(-1,): BETTER, (1,): WORSE}.get(tuple(signs), UNDECIDED)

    def judged(self) -> list[tuple[str, str]]:
        """Return the kinds and arms with at least one seed."""
        return [(kind, name) for kind in KINDS for name in ARMS if self.seeds(kind, name)]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Lay a table out."""
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [head, ['---'] * len(head), *rows])


def percent(found: Estimate, sign: str = '') -> str:
    """Return a rate or a difference with its interval, in %."""
    return f'{100 * found.value:{sign}.1f} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})'


def rates_table(results: Results) -> str:
    """Lay out the phone error rate of each arm in each judged context."""
    heads = [f'{kind} `{list(context)}`' for kind in KINDS for context in KINDS[kind].judged]
    rows = []
    for name in ARMS:
        if any(own == name for _, own in results.judged()):
            cells = [cell for kind in KINDS for cell in _rates(results, kind, name)]
            rows.append([f'{ARMS[name].what} (`{name}`)', *cells])
    return markdown(['encoder (arm)', *heads], rows)


def _rates(results: Results, kind: str, name: str) -> list[str]:
    """Return the cells of an arm in the two contexts of a kind; missing seeds are named."""
    seeds = results.seeds(kind, name)
    if not seeds:
        return ['', '']
    contexts = KINDS[kind].judged[: 1 if name == FEATURES else None]
    few = '' if name == FEATURES or seeds == list(SEEDS) else f", seed {', '.join(map(str, seeds))}"
    cells = [percent(results.rate(kind, name, context)) + few for context in contexts]
    return cells + ['the same'] * (2 - len(cells))


def differences(results: Results) -> list[str]:
    """Return the differences of the pairs that have a seed, by question, each with its verdict."""
    lines = []
    for question, pairs in COMPARED.items():
        answers = []
        for first, second in pairs:
            kinds = [_difference(results, kind, first, second) for kind in KINDS if results.seeds(kind, first, second)]
            answers += [f"  - `{first}` minus `{second}`: {'; '.join(kinds)}."] if kinds else []
        lines += [f'- **{question}**', *answers] if answers else []
    return lines


def _difference(results: Results, kind: str, first: str, second: str) -> str:
    """Return the differences of two arms in the two contexts of a kind, and the verdict."""
    found = [results.difference(kind, first, second, context) for context in KINDS[kind].judged]
    return f"{kind} {' and '.join(percent(each, '+') for each in found)}, **{results.verdict(kind, first, second)}**"


def by_seed(results: Results) -> list[str]:
    """Return the rate of each seed, in the first context of each kind."""
    texts = []
    for kind in KINDS:
        arms = [name for own, name in results.judged() if own == kind and name != FEATURES]
        context = KINDS[kind].judged[0]
        rates = {name: [f'{rate:.1f}' for rate in results.rates(kind, name, context)] for name in arms}
        listed = [f"`{name}` {', '.join(found)}" for name, found in rates.items()]
        texts += [f"- Seeds, {kind} `{list(context)}`: {'; '.join(listed)}."] if listed else []
    return texts


def noise(results: Results) -> list[str]:
    """Return the sentences about the instrument's noise and about the order of one run's checkpoints."""
    deviation, runs = results.probe_deviation(), []
    for kind, name in results.judged():
        seed, context = results.seeds(kind, name)[0], KINDS[kind].judged[0]
        steps = sorted({key[3] for key in results.errors if key[:3] == (kind, name, seed) and key[5] == 0})
        if len(steps) > 1:
            rates = [f'{results.rate_of((kind, name, seed, step, label_of(context), 0)):.1f}' for step in steps]
            after = f"after {', '.join(map(str, steps))} steps {', '.join(rates)} %"
            runs.append(f'{kind} `{list(context)}`, `{name}`, seed {seed}, {after}')
    lines = [] if deviation is None else [f'- Standard deviation over probe seeds: {deviation:.2f} points.']
    return lines + ([f"- Checkpoints: {'; '.join(runs)}."] if runs else [])


def last_losses(results: Results) -> list[str]:
    """Return how much the training loss of each arm still fell at the end, mean over its seeds."""
    curves: dict[tuple, list[float]] = {}
    for row in rows_of(results.folder / 'pretraining.csv'):
        curves.setdefault((row['kind'], row['arm'], row['seed']), []).append(float(row['train_loss']))
    changes: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for (kind, name, _), curve in curves.items():
        if name in RUNNABLE and ARMS[name].objective != 'ctc':
            change = np.mean(curve[-5:]) - np.mean(curve[-10:-5])  # each is the mean of 100 steps
            changes[kind].setdefault(name, []).append(change)
    texts = [
        f'{kind} ' + ', '.join(f'`{name}` {np.mean(found):+.2f}' for name, found in arms.items())
        for kind, arms in changes.items()
        if arms
    ]
    return [f"- Training loss, last 500 steps minus the 500 before, nats: {'; '.join(texts)}."] if texts else []


def tunings(results: Results) -> list[str]:
    """Return the error rates after fine-tuning to convergence, in the first context, with the steps that this took."""
    rows, texts = rows_of(results.folder / 'finetuning.csv'), []
    for kind in KINDS:
        context = KINDS[kind].judged[0]
        found = [
            f"`{row['arm']}` {rate_in(row, results.phones.sum()):.1f} after {row['step']} steps (seed {row['seed']})"
            for row in rows
            if (row['kind'], row['context']) == (kind, label_of(context))
        ]
        texts += [f"{kind} `{list(context)}`: {', '.join(found)}"] if found else []
    return [f"- Fine-tuned to convergence, {'; '.join(texts)}."] if texts else []


def rate_in(row: dict, phones: int) -> float:
    """Return the error rate of a row of errors per utterance, in %."""
    return 100 * sum(map(int, row['errors'].split())) / phones


def missing(results: Results) -> str:
    """Return how many runs are done."""
    total = sum(1 if name == FEATURES else 2 * len(SEEDS) for name in RUNNABLE)
    done = sum(len(results.seeds(kind, name)) for kind, name in results.judged() if name in RUNNABLE)
    return f'{done} of {total} runs are done.'


def earlier(folder: Path) -> str:
    """Return what the last of the earlier rounds found, seed by seed."""
    rows = [row for row in rows_of(folder / 'earlier_rounds.csv.gz') if row['round'] == 'sizes 3']
    phones = next(sum(map(int, row['errors'].split())) for row in rows if row['arm'] == '(phones)')
    texts = []
    for arm, what in EARLIER.items():
        own = [row for row in rows if (row['arm'], row['minutes'], row['context']) == (arm, '60', '10 0')]
        rates = [rate_in(row, phones) for row in sorted(own, key=lambda row: row['seed'])]
        texts.append(f"{what} {', '.join(f'{rate:.0f}' for rate in rates)}")
    return f"Phone error rates in % by seed, `[10, 0]`: {'; '.join(texts)}."


def figures(results: Results) -> str:
    """Return all that is computed, as Markdown."""
    parts = []
    if results.errors:
        parts = [
            f'{missing(results)} Phone error rates in %, {len(results.phones)} test utterances, '
            f'{results.phones.sum()} phones; in brackets intervals of {CONFIDENCE:.0%}.',
            rates_table(results),
        ]
        title = 'Differences in points, in the first and the last context of each kind (open: seeds are missing):'
        compared = differences(results)
        parts += [title, '\n'.join(compared)] if compared else []
        details = [*by_seed(results), *noise(results), *last_losses(results), *tunings(results)]
        parts += [
            'Each seed, the noise of the instrument, the end of pre-training, and fine-tuning:',
            '\n'.join(details),
        ]
        parts.append('![Phone error rate of each encoder, by kind of contexts](pictures/evidence_rates.png)')
    if rows_of(results.folder / 'distance.csv'):
        parts.append('![Loss by distance from the last visible frame](pictures/evidence_distance.png)')
    return '\n\n'.join([*parts, '## Earlier rounds, judged by fine-tuning', earlier(results.folder)])


def with_figures(page: str, made: str) -> str:
    """Return a page with new figures between its marks.

    Raises:
        ValueError: if the page does not have both marks once.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must have each of these lines once: {BEGIN} {END}")
    before, _, rest = page.partition(BEGIN)
    return f'{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}'


def draw_rates(results: Results, path: Path) -> None:
    """Draw the error rate of each arm, on an axis for each kind of contexts."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in KINDS if any(own == kind for own, _ in results.judged())]
    names = [name for name in ARMS if any(own == name for _, own in results.judged())]
    names.sort(
        key=lambda name: [-results.rate(k, name, KINDS[k].judged[0]).value for k in kinds if results.seeds(k, name)]
    )
    figure = Figure(figsize=(3 + 3.2 * len(kinds), 1.2 + 0.4 * len(names)), layout='constrained')
    axes = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axis, kind in zip(axes, kinds):
        for place, name in enumerate(names):
            _draw_arm(axis, results, kind, name, place)
        axis.set_xlabel('phone errors, %')
        filled, empty = (list(context) for context in KINDS[kind].judged)
        axis.set_title(f'{kind}\nfilled: {filled}, empty: {empty}', fontsize=9)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0].set_yticks(range(len(names)), [ARMS[name].what for name in names])
    for label, name in zip(axes[0].get_yticklabels(), names):
        label.set_color(colour(name))
    save(figure, path)


def _draw_arm(axis, results: Results, kind: str, name: str, place: int) -> None:
    """Draw a dot for each seed, and a line for the interval, in each judged context."""
    seeds = results.seeds(kind, name)
    for context, shift, fill in zip(KINDS[kind].judged, (0.13, -0.13), (colour(name), 'white')):
        if seeds and not (name == FEATURES and shift < 0):
            found = results.rate(kind, name, context)
            rates = results.rates(kind, name, context)
            axis.plot([100 * found.low, 100 * found.high], [place + shift] * 2, lw=1.5, color=colour(name))
            axis.plot(rates, [place + shift] * len(rates), 'o', ms=4, color=colour(name), markerfacecolor=fill)


def draw_distances(folder: Path, path: Path, kind: str = 'causal', farthest: int = 7) -> None:
    """Draw nats below the unigram entropy by the distance from the last visible frame."""
    from matplotlib.figure import Figure

    context = label_of(KINDS[kind].judged[0])
    lines: dict[tuple, dict[int, list]] = {}
    for row in rows_of(folder / 'distance.csv'):
        drawn = row['arm'] in DRAWN and (row['kind'], row['context']) == (kind, context)
        if drawn and 1 <= int(row['left']) <= farthest:
            sums = lines.setdefault((row['arm'], row['part']), {}).setdefault(int(row['left']), [0, 0.0])
            sums[0] += int(row['frames'])
            sums[1] += int(row['frames']) * float(row['nats_below'])
    figure = Figure(figsize=(7.5, 3.8), layout='constrained')
    axis = figure.subplots()
    for (arm, part), sums in lines.items():
        places = sorted(sums)
        values = [sums[place][1] / sums[place][0] for place in places]
        axis.plot(
            places,
            values,
            '-' if part == 'masked' else '--',
            marker='o',
            ms=4,
            color=colour(arm),
            label=label(arm, part),
        )
    axis.legend(frameon=False, fontsize=9, labelcolor='linecolor')
    axis.axhline(0, lw=0.8, color='#555555')
    axis.set_xlabel(f'frames of 80 ms after the last visible frame; {kind}, [{context.replace(" ", ", ")}]')
    axis.set_ylabel('nats below the unigram entropy')
    axis.spines[['top', 'right']].set_visible(False)
    save(figure, path)


def label(arm: str, part: str) -> str:
    """Return the name of a line: of the arm, and of its part where it has both."""
    both = ARMS[arm].objective == 'both'
    return ARMS[arm].what + (f": {'masked' if part == 'masked' else 'next'} tokens" if both else '')


def save(figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format='png', metadata={'Software': None})


def main(argv=None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--results', type=Path, default=HERE / 'results')
    parser.add_argument('--page', type=Path, default=PAGE)
    parser.add_argument('--check', action='store_true', help='write nothing; exit status 1 if the page differs')
    options = parser.parse_args(argv)
    results = Results(options.results)
    page = options.page.read_text(encoding='utf-8')
    made = with_figures(page, figures(results))
    if options.check:
        return int(made != page)
    write_text(options.page, made)
    if results.errors:
        draw_rates(results, options.page.parent / 'pictures/evidence_rates.png')
    if (options.results / 'distance.csv').exists():
        draw_distances(options.results, options.page.parent / 'pictures/evidence_distance.png')
    return 0


if __name__ == '__main__':
    sys.exit(main())
