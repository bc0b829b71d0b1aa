"""What was measured: kept in one JSON file a device, and shown as tables."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from attnsr.errors import UsageError
from attnsr.files import write_atomically

NETWORKS = 'networks'

#: In which is computed, what matters most first.
DTYPES = ('bfloat16', 'float32')


@dataclass
class Figures:
    """Of one contestant.

    Attributes:
        seconds: Median of all rounds.
        least: Of the fastest round.
        most: Of the slowest.
        rounds: How many there were.
        error: The largest, in the unit that the benchmark says.
        peak: Bytes at the highest moment, beyond what was held before; None where that is not measured.
        held: Bytes that the process held before; None where it does other things too.
        seconds_kept: Median with a C library that keeps freed memory; None where that is not measured.
    """

    seconds: float
    least: float
    most: float
    rounds: int
    error: float
    peak: int | None = None
    held: int | None = None
    seconds_kept: float | None = None


@dataclass
class Measurement:
    """One comparison: contestants that were measured in turns.

    Attributes:
        what: ``'networks'``, or a mechanism of ``ops/``.
        case: The network, or whose layer it is.
        size: The size's name.
        extent: Batch, height and width of the input.
        dtype: In which it was computed; several of them where contestants differ in it.
        computed: ``'forward'``, ``'forward, backward'`` or ``'training step'``.
        base: The contestant that ratios refer to.
        bound: The largest error with which there are figures.
        figures: Of each contestant that agrees.
        absent: Why a contestant is not to be had.
        failed: What is wrong with a contestant that has no figures therefore.
        least_seconds: What the device's limits allow, and which of them it is; None for networks.
        remarks: What follows from the figures.
        environment: Versions, threads and date.
    """

    what: str
    case: str
    size: str
    extent: tuple[int, int, int]
    dtype: str
    computed: str
    base: str
    bound: float
    figures: dict[str, Figures] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    least_seconds: tuple[float, str] | None = None
    remarks: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def threads(self) -> int | None:
        """Of the CPU; None where it was measured on a GPU."""
        return self.environment.get('threads')

    @property
    def key(self) -> str:
        """What a later measurement replaces."""
        parts = [self.what, self.case, 'x'.join(map(str, self.extent)), self.dtype, self.computed]
        return '/'.join(parts if self.threads is None else [*parts, f'threads {self.threads}'])


@dataclass
class Results:
    """All measurements of a device: those that :func:`load` finds in a file, and those added since."""

    device: str
    measurements: dict[str, Measurement] = field(default_factory=dict)

    def add(self, measurement: Measurement) -> None:
        """In the place of what was measured of the same before."""
        self.measurements[measurement.key] = measurement

    def of(self, what: str) -> list[Measurement]:
        """Of one mechanism, or of the networks; those of a case one after the other."""
        found = [measurement for measurement in self.measurements.values() if measurement.what == what]
        cases = list(dict.fromkeys(measurement.case for measurement in found))
        return sorted(found, key=lambda measurement: cases.index(measurement.case))

    def what(self) -> list[str]:
        """Of what there are measurements."""
        return list(dict.fromkeys(measurement.what for measurement in self.measurements.values()))

    def save(self, path: Path) -> None:
        with write_atomically(path) as file:
            file.write((json.dumps(asdict(self), indent=1) + '\n').encode())


def load(path: Path) -> Results:
    """Read what :meth:`Results.save` wrote.

    Raises:
        UsageError: the file is not of that kind, or an entry in it has what cannot be measured.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
        results = Results(str(content['device']))
        for key, fields_of_one in content['measurements'].items():
            measurement = _measurement(fields_of_one)
            if wrong := _wrong(measurement):
                raise UsageError(f'{path}: {key}: {wrong}')
            results.add(measurement)
        return results
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f'{path}: this is not a file of results of basicsr bench') from None


def _measurement(content: dict[str, Any]) -> Measurement:
    figures = {name: Figures(**of_one) for name, of_one in content['figures'].items()}
    limit = content['least_seconds'] and tuple(content['least_seconds'])
    return Measurement(**{**content, 'figures': figures, 'extent': tuple(content['extent']), 'least_seconds': limit})


def _wrong(m: Measurement) -> str | None:
    """What nothing can be made of, in a measurement that was read."""
    if m.dtype not in DTYPES:
        return f'dtype is {m.dtype!r}; valid: {", ".join(DTYPES)}'
    texts = (m.what, m.case, m.size, m.computed, m.base, *m.remarks, *m.absent.values(), *m.failed.values())
    if not all(isinstance(text, str) for text in texts) or not m.what.isidentifier():
        return 'a name or a remark in it is none'
    for name, value, may_be_0 in _numbers(m):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            return f'{name} is {value!r}, and must be a number'
        if not (value or may_be_0):
            return f'{name} is 0'
    return None


def _numbers(m: Measurement) -> Iterator[tuple[str, object, bool]]:
    """What must be a number in a measurement: its name, it, and whether it may be 0."""
    yield 'bound', m.bound, False
    batch, height, width = m.extent
    yield from (('extent', side, False) for side in (batch, height, width))
    if m.least_seconds:
        seconds, _ = m.least_seconds
        yield 'least_seconds', seconds, False
    if m.threads is not None:
        yield 'threads', m.threads, False
    for name, of in m.figures.items():
        for each in fields(of):
            value = getattr(of, each.name)
            if value is not None or each.default is MISSING:
                yield f'{each.name} of {name}', value, each.name in ('error', 'peak', 'held')


def slug(device: str) -> str:
    """A device's name as file name."""
    return re.sub('[^a-z0-9]+', '_', device.lower()).strip('_')


# Least widths of the columns.
_WIDTHS = {
    'case': 25,
    'size': 25,
    'dtype': 8,
    'threads': 7,
    'computed': 17,
    'contestant': 28,
    'ms': 7,
    'times as fast': 13,
    'of the limit': 15,
    'ms, memory kept': 15,
    'times as fast, memory kept': 26,
    'MB': 6,
    'of its memory': 13,
    'MB in all': 9,
    'error': 7,
}


def columns(measurements: Sequence[Measurement]) -> list[str]:
    """Titles of the columns of a table of measurements."""
    left_out = []
    if not threads_differ(measurements):
        left_out += ['threads']
    if not any(m.least_seconds for m in measurements):
        left_out += ['of the limit']
    if not any(of.held for m in measurements for of in m.figures.values()):
        left_out += ['ms, memory kept', 'times as fast, memory kept', 'MB in all']
    return [title for title in _WIDTHS if title not in left_out]


def heading(titles: Sequence[str]) -> list[str]:
    """The first lines of a Markdown table."""
    return [_line(titles, {title: title for title in titles}), _line(titles, {t: '-' * _WIDTHS[t] for t in titles})]


def rows(measurement: Measurement, titles: Sequence[str]) -> list[str]:
    """The lines of a Markdown table that show a measurement: one for each contestant, without those not to be had."""
    m = measurement
    first = {
        'case': m.case,
        'size': f'{m.size}, {" x ".join(map(str, m.extent))}',
        'dtype': m.dtype,
        'threads': str(m.threads or ''),
        'computed': m.computed,
    }
    lines = []
    for name in (*m.figures, *m.failed):
        cells = _cells(m, name) if name in m.figures else {'ms': 'failed'}
        lines.append(_line(titles, {**first, 'contestant': name, **cells}))
        first = {}
    return lines


def notes(measurements: Sequence[Measurement]) -> list[str]:
    """What there is to say besides: remarks, what failed, and what is not to be had."""
    lines = []
    absent: dict[tuple[str, str], list[Measurement]] = {}
    differ = threads_differ(measurements)
    for m in measurements:
        lines += [f'{_where(m, differ)}: {remark}' for remark in m.remarks]
        lines += [f'{_where(m, differ)}: no figures for {name}: {reason}' for name, reason in m.failed.items()]
        for name_and_reason in m.absent.items():
            absent.setdefault(name_and_reason, []).append(m)
    for (name, reason), lacking in absent.items():
        lines.append(f'without {name}{_places(lacking, measurements)}: {reason}')
    return lines


def threads_differ(measurements: Sequence[Measurement]) -> bool:
    """Whether it must be said on how many threads each was measured."""
    return len({m.threads for m in measurements}) > 1


def case_title(m: Measurement, with_threads: bool) -> str:
    """The case, and on how many threads where that is to be said."""
    return f'{m.case}, threads: {m.threads}' if with_threads and m.threads else m.case


def _where(m: Measurement, with_threads: bool) -> str:
    return f'{case_title(m, with_threads)}, {m.size}, {m.dtype}, {m.computed}'


def _places(chosen: Sequence[Measurement], measurements: Sequence[Measurement]) -> str:
    """Where something is so, as short as can be: nothing for everywhere, and whole cases by their name."""
    if len(chosen) == len(measurements):
        return ''
    cases = [
        case
        for case in dict.fromkeys(m.case for m in chosen)
        if all(m in chosen for m in measurements if m.case == case)
    ]
    differ = threads_differ(measurements)
    return f' for {"; ".join([*cases, *(_where(m, differ) for m in chosen if m.case not in cases)])}'


def markdown(results: Results) -> str:
    """All tables of a device."""
    lines = [f'# {results.device}', '']
    for what in results.what():
        measurements = results.of(what)
        titles = columns(measurements)
        lines += [f'## {what}', '', *heading(titles), *(line for m in measurements for line in rows(m, titles)), '']
        lines += [f'- {note}' for note in [*_explained(measurements), *notes(measurements)]] + ['']
    return '\n'.join(lines)


def _explained(measurements: Sequence[Measurement]) -> list[str]:
    environments = dict.fromkeys(
        ', '.join(f'{name} {value}' for name, value in m.environment.items()) for m in measurements
    )
    bounds = dict.fromkeys(f'{m.bound:g} ({m.dtype}, {m.computed})' for m in measurements)
    bases = dict.fromkeys(m.base for m in measurements)
    return [
        f'Measured with {"; ".join(environments)}.',
        f'Medians, the contestants in turns. Times as fast, and of its memory: as {" or ".join(bases)}.',
        f'No figures where the error is larger than {", ".join(bounds)}.',
    ]


def _cells(m: Measurement, name: str) -> dict[str, str]:
    of, base = m.figures[name], m.figures.get(m.base)
    cells = {'ms': _milliseconds(of.seconds), 'error': f'{of.error:.1e}'}
    if base:
        cells['times as fast'] = f'{base.seconds / of.seconds:.2f}'
    if m.least_seconds:
        cells['of the limit'] = f'{m.least_seconds[0] / of.seconds:.0%} {m.least_seconds[1]}'
    if of.peak is not None:
        cells['MB'] = f'{of.peak / 1e6:.1f}'
        if base and base.peak:
            cells['of its memory'] = f'{of.peak / base.peak:.2f}'
        if of.held is not None:
            cells['MB in all'] = f'{(of.held + of.peak) / 1e6:.0f}'
    if of.seconds_kept is not None:
        cells['ms, memory kept'] = _milliseconds(of.seconds_kept)
        if base and base.seconds_kept:
            cells['times as fast, memory kept'] = f'{base.seconds_kept / of.seconds_kept:.2f}'
    return cells


def _milliseconds(seconds: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(1e3 * seconds)))  # three in all
    return f'{1e3 * seconds:.{digits}f}'


def _line(titles: Sequence[str], cells: Mapping[str, str]) -> str:
    return f'| {" | ".join(cells.get(title, "").ljust(_WIDTHS[title]) for title in titles)} |'
