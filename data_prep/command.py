"""``basicsr prepare``: from folders of photographs to LMDBs, and the verification of LMDBs."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attnsr.data_prep import layouts, sample
from attnsr.data_prep.lmdb_dataset import DataSetError, Summary
from attnsr.data_prep.pairs import Job, prepare
from attnsr.data_prep.verify import check_folder, verify

EPILOG = """\
examples:
  basicsr prepare div2k ~/downloads                  datasets/DIV2K/, as the training option files name it
  basicsr prepare benchmark ~/downloads              datasets/Set5/, Set14/, B100/, Urban100/, Manga109/
  basicsr prepare pairs photos --scale 4 --out datasets/photos
  basicsr prepare pairs photos --scale 2 3 4 --crop 480 --step 240 --out datasets/photos_sub
  basicsr prepare pairs HR --lr 'LR_bicubic/X{scale}' --scale 2 3 4 --out datasets/mine
  basicsr prepare verify datasets/DIV2K/*.lmdb
  basicsr prepare verify datasets/photos/HR.lmdb --against photos
  basicsr prepare sample                             the demo's data set, without any download

LR images are made as MATLAB's imresize makes them, unless there are LR files. All files are checked before anything is
written. The same command again goes on where it was interrupted, and keeps what is there.
"""

#: Said of a run that is interrupted.
GOES_ON = '; the same command goes on from there'

#: Side of the sub-images of training presets, and the step between them, as BasicSR prepares DIV2K.
SUB_IMAGES = 480, 240


def add_arguments(parser: argparse.ArgumentParser, texts: Callable[[str, str], dict[str, Any]]) -> None:
    """Add a parser for each thing that can be prepared; ``texts`` makes what is common to all parsers."""
    subjects = parser.add_subparsers(dest='data_set', metavar='WHAT', required=True)

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int], advice: str) -> argparse.ArgumentParser:
        subject = subjects.add_parser(name, help=text, **texts(text, EPILOG))
        subject.set_defaults(run_prepare=run, advice=advice)
        return subject

    pairs = add('pairs', 'HR and LR LMDBs from a folder of photographs.', _pairs, GOES_ON)
    pairs.add_argument('hr', type=Path, metavar='HR_DIR', help='photographs, in this folder and below')
    pairs.add_argument(
        '--lr', metavar='LR_DIR', help="LR images, where there are; with several scales: 'DIR/X{scale}' (default: made)"
    )
    pairs.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder for the LMDBs')
    _add_sub_images(pairs)
    _add_common(pairs)
    for name, preset in layouts.PRESETS.items():
        subject = add(name, preset.description, _preset, GOES_ON)
        subject.add_argument('root', type=Path, metavar='DIR', help='folder where the archives were unpacked')
        subject.add_argument('--out', type=Path, default=Path('datasets'), metavar='DIR', help='default: %(default)s')
        if preset.training:
            _add_sub_images(subject, *SUB_IMAGES)
        _add_common(subject)

    text = "HR and LR LMDBs from the photographs that scikit-image ships: the demo's data set, made offline."
    subject = add('sample', text, _sample, GOES_ON)
    subject.add_argument('--out', default='datasets/sample', metavar='DIR', help='default: %(default)s')
    _add_scale(subject)
    _add_overwrite(subject)
    _add_quiet(subject)

    subject = add('verify', 'See whether LMDBs are whole, unchanged, and what they were made of.', _verify, '')
    subject.add_argument('lmdb', type=Path, nargs='+', metavar='LMDB', help='for example datasets/DIV2K/*.lmdb')
    subject.add_argument(
        '--against', type=Path, metavar='DIR', help='folder of the images that they were made of, to compare pixels'
    )
    _add_workers(subject)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say.

    Returns:
        The exit status: 0, or 1 if an LMDB is not what it should be.
    """
    return args.run_prepare(args)


def _add_sub_images(parser: argparse.ArgumentParser, crop: int | None = None, step: int | None = None) -> None:
    if crop:
        texts = f'0 for whole images; default: {crop}', f'{step} with --crop {crop}, otherwise that of --crop'
    else:
        texts = 'default: whole images', 'that of --crop'
    parser.add_argument('--crop', type=int, metavar='N', help=f'side of the HR sub-images in pixels, {texts[0]}')
    parser.add_argument('--step', type=int, metavar='N', help=f'from one HR sub-image to the next; default: {texts[1]}')


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_scale(parser)
    parser.add_argument(
        '--compression', type=int, default=1, metavar='N', help='of PNG, 0 (none, fastest to read) to 9; default: 1'
    )
    _add_overwrite(parser)
    _add_workers(parser)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--overwrite', action='store_true', help='replace LMDBs that are there and hold something else')


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--scale', type=int, nargs='+', default=[2, 3, 4], metavar='N', help='default: 2 3 4')


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--workers', type=int, metavar='N', help='threads; default: one a core')
    _add_quiet(parser)


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--quiet', action='store_true', help='no progress bars, no text but warnings and errors')


def _pairs(args: argparse.Namespace) -> int:
    jobs, notes = layouts.jobs_from_folders(args.hr, args.lr, _scales(args), args.out, args.crop or None, args.step)
    return _prepare(args, jobs, notes)


def _preset(args: argparse.Namespace) -> int:
    preset = layouts.PRESETS[args.data_set]
    if not preset.training:
        return _prepare(args, *preset.jobs(args.root, args.out, _scales(args)))
    usual_crop, usual_step = SUB_IMAGES
    crop = usual_crop if args.crop is None else args.crop or None
    if args.step is not None and not crop:
        raise DataSetError('step: has no meaning without crop')
    step = usual_step if args.step is None and crop == usual_crop else args.step
    return _prepare(args, *preset.jobs(args.root, args.out, _scales(args), crop, step))


def _prepare(args: argparse.Namespace, jobs: Sequence[Job], notes: Sequence[str]) -> int:
    summary = prepare(jobs, args.compression, args.workers, args.overwrite, args.quiet)
    summary.notes[:0] = notes
    if not args.quiet:
        _print(summary)
        for scale in _scales(args):
            block = layouts.datasets_block(jobs, scale, summary)
            print(f'\nTo train or validate at x{scale}, in an option file:\n\n{block}')
    return 0


def _sample(args: argparse.Namespace) -> int:
    summary = sample.build(args.out, args.scale, args.overwrite)
    if not args.quiet:
        _print(summary)
    return 0


def _verify(args: argparse.Namespace) -> int:
    for path in args.lmdb:  # a name that is wrong is told before hours have passed
        check_folder(path)
    status = 0
    for path in args.lmdb:
        report = verify(path, args.against, args.workers, args.quiet)
        for problem in report.problems:
            status = 1
            print(problem, flush=True)
        if not report.problems and not args.quiet:
            compared = ', '.join(report.compared)
            count = '1 image is' if report.images == 1 else f'{report.images} images are'
            print(f'{path}: {count} right (compared with {compared})', flush=True)
    return status


def _print(summary: Summary) -> None:
    print(summary)
    for note in summary.notes:
        print(note)


def _scales(args: argparse.Namespace) -> tuple[int, ...]:
    return tuple(sorted(set(args.scale)))
