# SPDX-License-Identifier: Apache-2.0
"""Say what the results show: tables with intervals, a plot, and the figures of docs/evidence.md.

    python benchmarks/downstream/report.py             # from benchmarks/downstream/results
    python benchmarks/downstream/report.py --check     # exit status 1 if docs/evidence.md says something else

Computes everything from the committed results and nothing else. Where some are missing it says so and goes on with
those that there are. In docs/evidence.md it replaces what stands between its two marks; the words around them are
people's. Protocol.md says what is measured and what would count as help.
"""

import argparse
import json
import sys
from pathlib import Path

import arms
import numpy as np
from bootstrap import CONFIDENCE, Estimate, estimate
from settings import CONTEXTS, SEEDS, check_same, label_of

from nemo.utils.atomic_files import replacing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BEGIN, END = '<!-- figures: written by benchmarks/downstream/report.py -->', '<!-- end of the figures -->'
SKELETON = f"""# What the objectives and masks are worth to a streaming recogniser

{BEGIN}
{END}
"""
BY_SEED = (10, 0)  # the context whose errors are shown run by run
NEEDED = 3  # contexts, of four, in which an arm must be better with both amounts of speech
VERDICTS = {-1: 'helps', 0: 'not shown', 1: 'hurts'}
OPEN = 'open: seeds are missing'


class Results:
    """The results of a folder.

    Args:
        folder: with a JSON file for each arm and seed.

    Raises:
        ValueError: naming the file, if one cannot be read, or is of other settings or data than the first.
    """

    def __init__(self, folder: Path):
        self.by_arm: dict[str, dict[int, dict]] = {}
        first = None
        for path in sorted(folder.glob('*.json')):
            found = self._read(path)
            first = found if first is None else first
            check_same(found['settings'], first['settings'], path)
            for part in ('data', 'test'):
                if found[part] != first[part]:
                    raise ValueError(f"{path}: {part} is not that of the first result in {folder}")
            self.by_arm.setdefault(found['arm'], {})[found['seed']] = found
        self.by_arm = {name: self.by_arm[name] for name in sorted(self.by_arm, key=arms.order)}
        self.first = first

    @staticmethod
    def _read(path: Path) -> dict:
        try:
            found = json.loads(path.read_text())
            arms.find(found['arm'])
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is no result of run.py: {error}") from error
        return found

    @property
    def phones(self) -> np.ndarray:
        """How many phones each utterance of the test has, [U]."""
        return np.array(self.first['test']['phones'])

    @property
    def speakers(self) -> np.ndarray:
        """Who speaks each, [U]."""
        return np.array(self.first['test']['speakers'])

    @property
    def minutes(self) -> list[str]:
        """How much speech was fine-tuned on, as the results name it."""
        return list(self.first['errors'])

    @property
    def missing(self) -> list[str]:
        """Arms and seeds of the first round without a result, and seeds without one of refined arms that have some."""
        names = [*arms.ARMS, *(name for name in self.by_arm if name.endswith(arms.REFINED))]
        return [f'{name}-{seed}' for name in names for seed in SEEDS if seed not in self.by_arm.get(name, {})]

    def seeds(self, *names: str) -> list[int]:
        """Return the seeds that all of these arms have."""
        return sorted(set.intersection(*(set(self.by_arm[name]) for name in names)))

    def errors(self, name: str, minutes: str, context: str, seeds: list[int]) -> np.ndarray:
        """Return the errors of an arm, [S, U]."""
        return np.array([self.by_arm[name][seed]['errors'][minutes][context] for seed in seeds])

    def rate(self, name: str, minutes: str, context: str, by_speaker: bool = False) -> Estimate:
        """Return the error rate of an arm."""
        groups = self.speakers if by_speaker else None
        return estimate(self.errors(name, minutes, context, self.seeds(name)), self.phones, groups)

    def difference(self, first: str, second: str, minutes: str, context: str, by_speaker: bool = False) -> Estimate:
        """Return by how much the error rate of the second arm is above that of the first."""
        seeds, groups = self.seeds(first, second), self.speakers if by_speaker else None
        above = self.errors(second, minutes, context, seeds) - self.errors(first, minutes, context, seeds)
        return estimate(above, self.phones, groups)

    def pairs(self) -> list[tuple[str, str]]:
        """Return the arms that are compared and have a seed in common."""
        return [pair for pair in arms.compared(self.by_arm) if self.seeds(*pair)]


def labels() -> list[str]:
    """Return the labels of the contexts."""
    return [label_of(context) for context in CONTEXTS]


def verdict(results: Results, first: str, second: str, by_speaker: bool = False) -> str:
    """Say whether the second arm helps against the first, by the rule of protocol.md, once all seeds are there."""
    if results.seeds(first, second) != list(SEEDS):
        return OPEN
    signs = {
        minutes: [results.difference(first, second, minutes, label, by_speaker).sign for label in labels()]
        for minutes in results.minutes
    }
    for sign in (-1, 1):
        if all(of.count(sign) >= NEEDED and -sign not in of for of in signs.values()):
            return VERDICTS[sign]
    return VERDICTS[0]


def markdown(head: list[str], rows: list[list[str]], numbers: int) -> str:
    """Lay a table out; the last so many columns are numbers, to the right."""
    marks = ['---'] * (len(head) - numbers) + ['---:'] * numbers
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [head, marks, *rows])


def context_heads() -> list[str]:
    """Return the contexts as heads of columns."""
    return [f'`{list(context)}`' for context in CONTEXTS]


def rates_table(results: Results, minutes: str) -> str:
    """Lay out the phone error rate of each arm in each context, with its interval."""
    rows = []
    for name, seeds in results.by_arm.items():
        cells = [results.rate(name, minutes, label) for label in labels()]
        rows.append([f'`{name}`', str(len(seeds)), *(f'{100 * e.value:.1f} ({_span(e)})' for e in cells)])
    return markdown(['arm', 'seeds', *context_heads()], rows, len(CONTEXTS))


def differences_table(results: Results, minutes: str) -> str:
    """Lay out the paired differences, in points of the error rate; * where the interval leaves 0 out."""
    rows = []
    for first, second in results.pairs():
        cells = [results.difference(first, second, minutes, label) for label in labels()]
        texts = [f"{100 * e.value:+.1f} ({_span(e, '+')}){'*' * abs(e.sign)}" for e in cells]
        rows.append([f'`{second}` against `{first}`', str(len(results.seeds(first, second))), *texts])
    return markdown(['arms', 'seeds', *context_heads()], rows, len(CONTEXTS))


def seeds_table(results: Results) -> str:
    """Lay out the error rate of each run in one context, and the last validation loss of its pre-training."""
    rows = []
    for name, seeds in results.by_arm.items():
        cells = [_run_rate(results, name, seed, minutes) for minutes in results.minutes for seed in SEEDS]
        losses = [_last_loss(seeds[seed]) for seed in SEEDS if seed in seeds]
        rows.append([f'`{name}`', *cells, ', '.join(losses)])
    heads = [f'{minutes} minutes, seed {seed}' for minutes in results.minutes for seed in SEEDS]
    return markdown(['arm', *heads, 'last validation loss'], rows, len(heads) + 1)


def _run_rate(results: Results, name: str, seed: int, minutes: str) -> str:
    if seed not in results.by_arm[name]:
        return '-'
    errors = results.errors(name, minutes, label_of(BY_SEED), [seed])
    return f'{100 * errors.sum() / results.phones.sum():.1f}'


def _last_loss(found: dict) -> str:
    losses = _logged(found, 'val_loss')
    return '-' if losses is None else f'{losses[-1]:.2f}'


def _logged(found: dict, tag: str):
    """Return what a run's pre-training logged under a tag, None if nothing."""
    return (found['pretraining'] or {}).get(tag)


def _span(found: Estimate, sign: str = '') -> str:
    return f'{100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f}'


def verdicts_table(results: Results) -> str:
    """Lay out what each comparison comes to, with utterances and with speakers drawn."""
    rows = []
    for first, second in results.pairs():
        words = [verdict(results, first, second, by_speaker) for by_speaker in (False, True)]
        rows.append([f'`{second}` against `{first}`', *words])
    return markdown(['arms', 'verdict', 'with speakers drawn, not utterances'], rows, 0)


def masks_table(results: Results) -> str:
    """Lay out what each arm's masks hid, as calibrated and as logged while it trained."""
    rows = []
    for name, seeds in results.by_arm.items():
        found = next(iter(seeds.values()))
        masks = found['masks']
        texts = [f"{masks['block_size']}", f"{masks['mask_prob']:.4f}"] if masks else ['-', '-']
        texts += [_mean(seeds, 'audit/masked_share', '{:.1%}') if masks else '-']
        texts += [f"{masks[key]:{form}}" if masks else '-' for key, form in MEASURED.items()]
        losses = _logged(found, 'val_loss')
        rows.append([f'`{name}`', *texts, '-' if losses is None else f'{losses[0]:.2f} to {losses[1]:.2f}'])
    head = ['arm', 'block (frames of 10 ms)', 'mask_prob', 'masked in training', 'masked', 'asked for']
    return markdown([*head, 'mean run (80 ms)', 'unanswerable', 'validation loss'], rows, len(head) + 2)


MEASURED = {'masked_share': '.1%', 'counted_share': '.1%', 'mean_run': '.2f', 'unanswerable_share': '.1%'}


def _mean(seeds: dict, tag: str, form: str) -> str:
    """Return the mean of what the seeds of an arm logged, as text."""
    values = [_logged(found, tag) for found in seeds.values()]
    values = [value for value in values if value is not None]
    return form.format(sum(values) / len(values)) if values else '-'


def live_sentence(results: Results) -> str:
    """Say whether the live session heard what was heard at once."""
    rows = [
        (len(found['live']['utterances']), of)
        for seeds in results.by_arm.values()
        for found in seeds.values()
        for of in found['live']['contexts'].values()
    ]
    streamed, same = sum(count for count, _ in rows), sum(of['same_texts'] for _, of in rows)
    errors, offline = (sum(of[key] for _, of in rows) for key in ('errors', 'errors_offline'))
    return (
        f'Streamed live, {same} of {streamed} utterances (a sample for each arm, seed and context) gave the phones '
        f'that they gave at once; {errors} errors live, {offline} at once.'
    )


def figures(results: Results) -> str:
    """Return all that is computed, as Markdown."""
    runs = sum(map(len, results.by_arm.values()))
    if not runs:
        return 'There are no results yet. Missing: ' + ', '.join(results.missing) + '.'
    parts = [
        f'{runs} runs of {len(results.by_arm)} arms; {len(results.phones)} test utterances of '
        f'{len(set(results.speakers))} speakers, {results.phones.sum()} phones. Intervals of {CONFIDENCE:.0%}.',
    ]
    if results.missing:
        parts.append('**Not all runs are done.** Missing: ' + ', '.join(results.missing) + '.')
    for minutes in results.minutes:
        parts += [
            f'## Fine-tuned on {minutes} minutes',
            'Phone error rate in %:',
            rates_table(results, minutes),
        ]
        if results.pairs():
            parts += [
                'Differences in points; below 0 the first named is better, * where the interval leaves 0 out:',
                differences_table(results, minutes),
            ]
    if results.pairs():
        parts += [
            '## What that comes to',
            f'An arm helps if it is better, 0 outside the interval, in {NEEDED} contexts or more with both amounts of '
            'speech, and worse in none.',
            verdicts_table(results),
        ]
    parts += [
        '## Run by run',
        f'Phone error rate in % in `{list(BY_SEED)}`:',
        seeds_table(results),
        '## What was masked',
        masks_table(results),
        live_sentence(results),
    ]
    return '\n\n'.join(parts)


def with_figures(page: str, made: str) -> str:
    """Return a page with new figures between its marks.

    Raises:
        ValueError: if the page does not have both marks once.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must have each of these lines once: {BEGIN} {END}")
    before, _, rest = page.partition(BEGIN)
    return f'{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}'


def plot(results: Results, path: Path) -> None:
    """Draw the error rates: an axis for each amount of speech, a line for each arm over the contexts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(results.minutes), 4.5), layout='constrained')
    axes = figure.subplots(1, len(results.minutes), squeeze=False, sharey=True)[0]
    for axis, minutes in zip(axes, results.minutes):
        for number, name in enumerate(results.by_arm):
            found = [results.rate(name, minutes, label) for label in labels()]
            places = np.arange(len(found)) + 0.04 * (number - len(results.by_arm) / 2)
            values, low, high = (100 * np.array(column) for column in zip(*found))
            axis.errorbar(places, values, [values - low, high - values], marker='o', markersize=3, lw=1, label=name)
        axis.set_xticks(range(len(CONTEXTS)), [str(list(context)) for context in CONTEXTS])
        axis.set_xlabel('attention context')
        axis.set_title(f'fine-tuned on {minutes} minutes')
    axes[0].set_ylabel('phone error rate, %')
    axes[-1].legend(fontsize=7)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format='png', metadata={'Software': None})


def summary(results: Results) -> dict:
    """Return rates, differences and verdicts as JSON holds them."""

    def by_minutes(of):
        return {minutes: {label: of(minutes, label)._asdict() for label in labels()} for minutes in results.minutes}

    return {
        'rates': {name: by_minutes(lambda *at: results.rate(name, *at)) for name in results.by_arm},
        'differences': [
            {
                'first': first,
                'second': second,
                'seeds': results.seeds(first, second),
                'points': by_minutes(lambda *at: results.difference(first, second, *at)),
                'verdict': verdict(results, first, second),
            }
            for first, second in results.pairs()
        ],
        'missing': results.missing,
    }


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--results', type=Path, default=HERE / 'results')
    parser.add_argument('--page', type=Path, default=ROOT / 'docs/evidence.md')
    parser.add_argument('--plot', type=Path, default=ROOT / 'docs/pictures/downstream.png')
    parser.add_argument('--json', type=Path, help='also write rates, differences and verdicts to this file')
    parser.add_argument('--check', action='store_true', help='write nothing; say whether the page is up to date')
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Report as the command line asks; returns the exit status."""
    options = arguments(argv)
    try:
        results = Results(options.results)
        page = options.page.read_text() if options.page.exists() else SKELETON
        text = figures(results)
        made = with_figures(page, text)
    except (ValueError, OSError) as error:
        print(f'report: error: {error}', file=sys.stderr)
        return 2
    if options.check:
        print(f"{options.page} {'is up to date' if made == page else 'does not say what the results do'}")
        return int(made != page)
    with replacing(options.page) as partial:
        partial.write_text(made)
    if results.by_arm:
        plot(results, options.plot)
    if options.json:
        with replacing(options.json) as partial:
            partial.write_text(json.dumps(summary(results) if results.by_arm else {}, indent=1) + '\n')
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
