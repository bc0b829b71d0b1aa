"""``basicsr list``: what is counted, against the published networks and by hand, and how it is shown."""

import json
import re
from collections.abc import Callable

import pytest
import torch
from published_figures import PARAMETERS
from torch import Tensor, nn

from attnsr import listing, options
from attnsr.archs.variants import SCALES, VARIANTS
from attnsr.cli import main

# Half of the last digit of the published figures.
ROUNDING = 0.05e9


@pytest.fixture(scope='module')
def counted() -> list[listing.Entry]:
    return listing.entries()


@pytest.fixture
def entries(counted: list[listing.Entry], monkeypatch: pytest.MonkeyPatch) -> list[listing.Entry]:
    """What is listed, counted once for all tests."""
    monkeypatch.setattr(listing, 'entries', lambda: counted)
    return counted


def fixed_products(variant: str, scale: int) -> int:
    """Those of the fixed convolutions with which the published ELAN shifts, and moves the mean before and after."""
    constants = VARIANTS[variant].build(scale).published_constants()
    a_pixel = sum(value.numel() for name, value in constants.items() if 'shift_conv' in name)
    return padded_pixels(scale, 16) * (a_pixel + 9 + 9 * scale**2)


def overlap_products(layers: int, dim: int, scale: int) -> int:
    """Those of attention and projection in DLGSANet's windows, less as many as there are pixels."""
    size = {2: 96, 3: 72, 4: 48}[scale]
    height, width = (side // scale for side in listing.OUTPUT)
    twice = -(-height // size) * size * -(-width // size) * size - height * width
    return twice * layers * (2 * dim * dim // 6 + dim * dim)


def projection_products(groups: int, scale: int) -> int:
    """Those of a projection of each of ASID's widths, for windows and for the grid, in groups that reuse attention."""
    return padded_pixels(scale, 8) * (groups - 1) * 2 * (36**2 + 24**2 + 12**2)


def padded_pixels(scale: int, multiple: int) -> int:
    height, width = (-(-(side // scale) // multiple) * multiple for side in listing.OUTPUT)
    return height * width


# What is more here than in the published network.
DIFFERENCES: dict[str, Callable[[int], int]] = {
    'elan': lambda scale: -fixed_products('elan', scale),
    'elan_light': lambda scale: -fixed_products('elan_light', scale),
    'dlgsanet': lambda scale: overlap_products(24, 90, scale),
    'dlgsanet_light': lambda scale: overlap_products(12, 48, scale),
    'dlgsanet_tiny': lambda scale: overlap_products(9, 48, scale),
    'asid': lambda scale: -projection_products(3, scale),
    'asid_d8': lambda scale: -projection_products(8, scale),
    'lcoan': lambda scale: 0,
}


def test_every_variant_at_every_scale_with_its_file(entries: list[listing.Entry]) -> None:
    assert [(entry.variant, entry.scale) for entry in entries] == [(name, s) for name in VARIANTS for s in SCALES]
    for entry in entries:
        assert entry.parameters == PARAMETERS[entry.variant][SCALES.index(entry.scale)]
        opt = options.load(options.find(entry.option_file))
        assert opt['scale'] == entry.scale
        assert opt['network_g']['type'] == VARIANTS[entry.variant].network.__name__


@pytest.mark.parametrize(
    ('variant', 'scale'), [(name, scale) for name, counts in listing.PUBLISHED_MACS.items() for scale in counts]
)
def test_the_published_networks_have_as_many(variant: str, scale: int, entries: list[listing.Entry]) -> None:
    (entry,) = (entry for entry in entries if (entry.variant, entry.scale) == (variant, scale))
    assert entry.published_macs == round(listing.PUBLISHED_MACS[variant][scale] * 1e9)
    assert entry.macs - DIFFERENCES[variant](scale) == pytest.approx(entry.published_macs, abs=ROUNDING)


def test_the_notes_have_the_right_numbers(entries: list[listing.Entry]) -> None:
    """Of all differences of more than a percent."""
    elan, light, least, most, asid, d8 = (float(share) for share in re.findall(r'([\d.]+) (?:%|to)', listing.NOTES))
    noted = {
        'elan': (-elan, -elan),
        'elan_light': (-light, -light),
        **dict.fromkeys(('dlgsanet', 'dlgsanet_light', 'dlgsanet_tiny'), (least, most)),
        'asid': (-asid, -asid),
        'asid_d8': (-d8, -d8),
        'lcoan': (0, 0),
    }
    for entry in entries:
        if entry.published_macs is not None:
            more = 100 * (entry.macs / entry.published_macs - 1)
            low, high = noted[entry.variant]
            assert low - 0.1 < more < high + 0.1


class Example(nn.Module):
    """Convolutions, attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8)
        self.linear = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.depthwise(self.norm(self.conv(x)).relu()).flatten(2).transpose(1, 2)
        y = (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        return self.linear(torch.einsum('bnc,bnc->bnc', y, tokens))


def test_convolutions_and_products_are_counted() -> None:
    with torch.device('meta'):
        net = Example()
    pixels, tokens = 10 * 14, 5 * 7
    products = pixels * 3 * 8 * 9 + tokens * 8 * 25 + 2 * tokens * tokens * 8 + tokens * 8 * 7
    assert listing.count_macs(net, 10, 14) == products
    with torch.no_grad():
        assert listing.count_macs(net, 10, 14) == products


def test_what_is_computed_again_without_autograd_is_counted_once(entries: list[listing.Entry]) -> None:
    """ELAN-light shares its attention, and at inference computes that of the larger windows a second time."""
    with torch.device('meta'):
        net = VARIANTS['elan_light'].build(4)
    with torch.no_grad():
        count = listing.count_macs(net, 180, 320)
    assert [count] == [entry.macs for entry in entries if (entry.variant, entry.scale) == ('elan_light', 4)]


def test_the_command_shows_the_table(entries: list[listing.Entry], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['list']) == 0
    out, err = capsys.readouterr()
    assert err == ''
    shown, notes = out.split('\n\n')
    assert notes == listing.NOTES + '\n'
    titles, line, *rows = shown.split('\n')
    assert set(line) == {'-'}
    starts = [titles.index(title) for title in ('network', 'scale', 'option file', 'paper')]
    ends = [titles.index(title) + len(title) for title in ('parameters', 'G MACs', 'published')]
    for entry, row in zip(entries, rows, strict=True):
        for start, text in zip(starts, (entry.title, f'x{entry.scale}', entry.option_file, entry.paper), strict=True):
            assert re.match(rf'{re.escape(text)}(  |$)', row[start:])
        known = '-' if entry.published_macs is None else f'{entry.published_macs / 1e9:.1f}'
        for end, text in zip(ends, (f'{entry.parameters:,}', f'{entry.macs / 1e9:.1f}', known), strict=True):
            assert row[:end].endswith(f' {text}')


def test_the_command_writes_json(entries: list[listing.Entry], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['list', '--json']) == 0
    out, err = capsys.readouterr()
    assert err == ''
    assert [listing.Entry(**entry) for entry in json.loads(out)] == entries
    assert '"published_macs": 53500000000' in out


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(['list', '--help'])
    assert ended.value.code == 0
    assert 'examples:\n  basicsr list\n  basicsr list --json\n' in capsys.readouterr().out
