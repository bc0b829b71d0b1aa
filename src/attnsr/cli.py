"""Efficient-attention super-resolution on BasicSR: training, testing and the preparation of data."""

import argparse
import contextlib
import difflib
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from basicsr.train import train_pipeline
from tqdm import tqdm

import attnsr
from attnsr import evaluate, export, inference, listing, options, pictures, plot, quality, upscale, upscaler, weights
from attnsr.benchmarks import command as bench
from attnsr.data_prep import command as preparation
from attnsr.errors import UsageError
from attnsr.inspection import command as inspection
from attnsr.memory import is_out_of_memory
from attnsr.progress import training_bar

EPILOG = """\
examples:
  basicsr prepare sample                           make the demo data set, without any download
  basicsr train -opt options/demo_x2.yml           train on it
  basicsr test -opt options/demo_x2.yml --compare  measure the newest checkpoint and write pictures
  basicsr plot experiments/demo_x2                 its training curves
  basicsr inspect -w net.pth picture.png           what its attention does, in figures
  basicsr export -w net.pth -o net.onnx            for other programs: ONNX, torch.export, safetensors
  basicsr list                                     the published networks, their cost and their option files
  basicsr bench networks elan_light                how fast a network is on this machine
  basicsr train -opt elan_light_x4 --auto_resume   a published recipe, going on where it was

`basicsr COMMAND --help` explains a command. `python -m attnsr` is the same program.
"""

TRAIN_EPILOG = """\
examples:
  basicsr train -opt options/elan_x4.yml
  basicsr train -opt elan_x4 --auto_resume --force_yml datasets:train:batch_size_per_gpu=8
  torchrun --nproc_per_node 2 -m attnsr train -opt options/elan_x4.yml --launcher pytorch

Experiments go to ./experiments/NAME and ./tb_logger/NAME, or below path.experiments_root of the option file.
"""

TEST_EPILOG = """\
examples:
  basicsr test -opt options/elan_x4.yml            its val sets, with the newest checkpoint of that experiment
  basicsr test -opt options/elan_x4.yml -w net.pth
  basicsr test -opt my_test.yml --compare          a test option file of BasicSR's, with pictures
  basicsr test -w net.pth --data benchmark/Set5 datasets/Set14/HR_x4.lmdb
  basicsr test --network elan_light_x4 -w net.pth --data benchmark --ensemble x8 --rgb
  basicsr test --network bicubic --scale 4 --data benchmark

Results go to ./results/NAME, or below path.results_root: the log, images, results.json and results.md. Without an
option file they go to ./results/NAME, or to DIR of -o: results.json, results.md, results.csv and a contact sheet for
each set; the same weights and data give the same figures to the last digit, on any number of threads.
"""

PLOT_EPILOG = """\
examples:
  basicsr plot experiments/ELAN_light_x4           experiments/ELAN_light_x4/curves.png
  basicsr plot ELAN_light_x4 ASID_x4 -o both.pdf   several runs in one figure

Losses, learning rate and validation metrics over iterations, from the logs; a resumed run is one curve.
"""

UPSCALE_EPILOG = """\
examples:
  basicsr upscale photo.jpg -o large.png -w ELAN_light_x4.pth
  basicsr upscale photos 'scans/*.tif' -o enlarged -w net.pth --recursive --skip-existing
  basicsr upscale photo.jpg -o out --network asid_x4 --scale 3 --format webp --suffix _x3

PNG and TIFF files of 8 and 16 bits, JPEG, WebP and BMP: grey, RGB, with alpha or palette. They are turned upright;
colour profiles and resolution are kept. Large pictures are computed in tiles that blend into each other, in bounded
memory. A file that fails is told and does not keep the others from being done; the exit status is 1 then.
"""

LIST_EPILOG = """\
examples:
  basicsr list
  basicsr list --json
"""

BENCH_EPILOG = """\
examples:
  basicsr bench all
  basicsr bench all --quick                        does everything work here?
  basicsr bench networks elan_light asid --dtype float32
  basicsr bench window_attention --device cuda --size 1080p --without torch.compile
  basicsr bench networks asid --with torch.compile   torch.compile takes part too: takes minutes
  basicsr bench report benchmarks/results/nvidia_h200.json

Contestants take turns in one run, each after it was compared with the reference in double precision: where one
disagrees it has no figures, and the exit status is 1. Results go to DIR/<device>.json (not those of --quick, unless
--output is given), where they replace what was measured of the same before; tables and plots of all that is there go
beside it (plots: pip install 'attnsr[bench]').
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 for a failure, 2 for a wrong command or option file, 130 after Ctrl-C, 143 after SIGTERM.
    """
    gc.freeze()  # what is imported stays: looking for garbage in it would take a second when the process ends
    parser = argparse.ArgumentParser(prog='basicsr', **_texts(__doc__, EPILOG))
    versions = f'attnsr {attnsr.__version__}, torch {torch.__version__}'
    parser.add_argument('--version', action='version', version=versions)
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for add_command in (
        _add_train,
        _add_test,
        _add_upscale,
        _add_inspect,
        _add_export,
        _add_prepare,
        _add_plot,
        _add_list,
        _add_bench,
    ):
        add_command(commands)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(unknown, commands.choices[args.command])
    try:
        attnsr.get_backend()  # a wrong ATTNSR_BACKEND is told before anything is done
        # What starts the processes of a training ends them too.
        with contextlib.nullcontext() if args.command == 'train' else _ended_as_by_ctrl_c():
            return args.run(args, list(sys.argv[1:] if argv is None else argv)[1:]) or 0
    except UsageError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # whoever read the output has seen enough
        _tell_nobody()
    except OSError as error:
        return _fail(f'{error.filename}: {error.strerror}' if error.filename else error.strerror or str(error), 1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(f'out of memory: {str(error).partition(". ")[0] or "close other programs"}', 1)
    except KeyboardInterrupt as error:
        what, status = ('terminated', 143) if isinstance(error, Terminated) else ('interrupted', 130)
        return _fail(what + getattr(args, 'advice', ''), status)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it: a command ends as after Ctrl-C, and leaves nothing half-written."""


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    def end(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # who calls from Python has its own
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse(unknown: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """End because of arguments that a command does not know."""
    known = [option for action in parser._actions for option in action.option_strings]
    near = [difflib.get_close_matches(each.partition('=')[0], known, 1) for each in unknown if each.startswith('-')]
    meant = ', '.join(option for options in near for option in options)
    parser.error(f'unrecognized arguments: {" ".join(unknown)}' + (f'; did you mean {meant}?' if meant else ''))


def _add_train(commands: Any) -> None:
    text = 'Train a network by an option file, through BasicSR.'
    parser = commands.add_parser('train', help=text, **_texts(text, TRAIN_EPILOG))
    options.add_arguments(parser, is_train=True)
    parser.set_defaults(run=_train, advice='; --auto_resume goes on from its last state')


def _train(args: argparse.Namespace, arguments: list[str]) -> None:
    sys.argv = ['basicsr train', *arguments]  # where BasicSR's pipelines read their arguments
    with training_bar():
        train_pipeline(str(_experiments_root(args)))


def _add_test(commands: Any) -> None:
    text = 'Test weights on benchmark sets, or on those of an option file through BasicSR; bicubic stands beside them.'
    parser = commands.add_parser('test', help=text, **_texts(text, TEST_EPILOG))
    options.add_arguments(parser, is_train=False, required=False)
    quality.add_arguments(parser)
    parser.add_argument(
        '--compare', action='store_true', help='write pictures of bicubic, result and HR side by side, with a detail'
    )
    parser.set_defaults(run=_test)


def _test(args: argparse.Namespace, arguments: list[str]) -> None:
    if measured := quality.run_command(args):
        files = (measured.root / f'results.{suffix}' for suffix in ('json', 'md', 'csv'))
        sheets = (measured.root / f'{each.name}.png' for each in measured.sets)
        print('\n'.join([measured.table(), '', *map(str, [*files, *sheets])]))
        return
    sys.argv = ['basicsr test', *(argument for argument in arguments if argument != '--compare')]
    results = evaluate.run(str(Path.cwd()), args.compare)
    if results.table():
        print(f'\n{results.table()}\n\n{results.root / "results.json"}\n{results.root / "results.md"}')


def _add_upscale(commands: Any) -> None:
    text = 'Upscale picture files with the weights of a network.'
    parser = commands.add_parser('upscale', help=text, **_texts(text, UPSCALE_EPILOG))
    add = parser.add_argument
    add('input', nargs='+', metavar='INPUT', help='file, folder, or pattern in quotes')
    add('-o', '--output', type=_path, required=True, metavar='OUT', help='folder; of one input file also a file name')
    add('-w', '--weights', metavar='FILE', help='checkpoint, or a training, whose newest one is taken')
    add('--network', metavar='NAME', help='what the weights are of; alone: the newest checkpoint of its training')
    add('--scale', type=float, metavar='S', help="of the result; where it is not the network's, that is resized")
    add('--tile', type=_tile, default='auto', metavar='auto|N', help='side of tiles in LR pixels; default: auto, the '
        'whole picture where memory suffices, and else as large as it does')  # fmt: skip
    add(
        '--overlap',
        type=int,
        default=upscaler.OVERLAP,
        metavar='N',
        help='of tiles, in LR pixels; default: %(default)s',
    )
    add('--device', default='auto', help='auto, cpu, cuda or cuda:N; default: auto')
    add('--dtype', choices=['auto', *inference.DTYPES], default='auto', help='default: auto, which is float32')
    add('--fast', action='store_true', help='on a GPU: launch all kernels of a tile at once, by CUDA graphs')
    add(
        '--compile',
        action='store_true',
        help='by torch.compile, for each size of tile: takes minutes, for many pictures',
    )
    add('--format', type=_format, help=f'{", ".join(pictures.FORMATS)}; default: that of the input')
    add('--quality', type=int, metavar='0-100', help='of JPEG and WebP; default: 95; WebP is lossless with 100')
    add('--suffix', default='', help='behind the names of files, such as _x4')
    add('--recursive', action='store_true', help='folders below folders too')
    add('--skip-existing', action='store_true', help='leave out what is there already: goes on after an interruption')
    parser.set_defaults(run=_upscale, advice='; --skip-existing goes on with the pictures that are not there yet')


def _upscale(args: argparse.Namespace, arguments: list[str]) -> int:
    if not (args.weights or args.network):
        raise UsageError('weights are needed: -w FILE')
    tasks = upscale.plan(args.input, args.output, format=args.format, suffix=args.suffix, recursive=args.recursive)
    upscale.check_quality(tasks, args.quality)
    net = weights.load_network(args.network, args.weights or args.network)
    try:
        scaler = upscaler.Upscaler(
            net,
            scale=args.scale,
            device=args.device,
            dtype=args.dtype,
            tile=args.tile,
            overlap=args.overlap,
            fast=args.fast,
            compiled=args.compile,
        )
    except UsageError as error:  # which begins with the name of the option
        raise UsageError(f'--{error}') from None
    report = upscale.run(
        tasks, scaler, quality=args.quality, skip_existing=args.skip_existing, tell=_tell, fail=_tell_error
    )
    _tell(str(report))
    return int(bool(report.failed or report.left))


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is '', which names nothing; name a folder or a file")
    return Path(text)


def _tile(text: str) -> int | str:
    if text == 'auto':
        return text
    if not text.isdecimal() or int(text) < upscaler.LEAST_TILE:
        raise argparse.ArgumentTypeError(
            f'must be auto or a whole number of pixels, at least {upscaler.LEAST_TILE}, got {text}'
        )
    return int(text)


def _format(text: str) -> str:
    try:
        return pictures.format_named(text)
    except pictures.PictureError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tell(line: str) -> None:
    """The pictures are done where nobody reads any more, too."""
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except OSError:
        _tell_nobody()


def _tell_nobody() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_error(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _add_inspect(commands: Any) -> None:
    text = 'Look inside a network: figures of what its attention does on a picture, and the local attribution map.'
    parser = commands.add_parser('inspect', help=text, **_texts(text, inspection.EPILOG))
    inspection.add_arguments(parser)
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace, arguments: list[str]) -> None:
    inspection.run(args)


def _add_export(commands: Any) -> None:
    text = 'Write a network for other programs: ONNX, torch.export, safetensors; compared with PyTorch first.'
    parser = commands.add_parser('export', help=text, **_texts(text, export.EPILOG))
    export.add_arguments(parser)
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace, arguments: list[str]) -> None:
    export.run(args)


def _add_prepare(commands: Any) -> None:
    text = 'Make LMDB data sets from folders of images, and verify them.'
    parser = commands.add_parser('prepare', help=text, **_texts(text, preparation.EPILOG))
    preparation.add_arguments(parser, _texts)
    parser.set_defaults(run=_prepare)


def _prepare(args: argparse.Namespace, arguments: list[str]) -> int:
    return preparation.run(args)


def _add_plot(commands: Any) -> None:
    text = 'Draw the training curves of experiments.'
    parser = commands.add_parser('plot', help=text, **_texts(text, PLOT_EPILOG))
    parser.add_argument('experiment', nargs='+', metavar='EXPERIMENT', help='folder, or name below ./experiments')
    default = 'curves.png in the folder of the experiment; of several, in the current one'
    parser.add_argument('-o', '--output', type=Path, metavar='FILE', help=f'.png, .pdf or .svg; default: {default}')
    parser.set_defaults(run=_plot)


def _plot(args: argparse.Namespace, arguments: list[str]) -> None:
    print(plot.write(args.experiment, args.output))


def _add_list(commands: Any) -> None:
    text = 'List the published networks: parameters, multiply-accumulates, option file and paper.'
    parser = commands.add_parser('list', help=text, **_texts(text, LIST_EPILOG))
    parser.add_argument('--json', action='store_true', help='as a list of JSON objects, with all digits of the numbers')
    parser.set_defaults(run=_list)


def _list(args: argparse.Namespace, arguments: list[str]) -> None:
    entries = listing.entries()
    text = json.dumps([asdict(entry) for entry in entries], indent=2) if args.json else listing.table(entries)
    print(text, flush=True)


def _add_bench(commands: Any) -> None:
    text = 'Measure mechanisms and networks: times, memory, and how near they come to the limits of the device.'
    parser = commands.add_parser('bench', help=text, **_texts(text, BENCH_EPILOG))
    subjects = parser.add_subparsers(dest='subject', metavar='WHAT', required=True)
    for subject, text in bench.SUBJECTS.items():
        parser = subjects.add_parser(subject, help=text, **_texts(text, BENCH_EPILOG))
        bench.add_arguments(parser, subject)
        parser.set_defaults(run=_bench)
    text = 'Write tables and plots of a file of results again.'
    parser = subjects.add_parser('report', help=text, **_texts(text, BENCH_EPILOG))
    parser.add_argument('file', type=Path, metavar='FILE', help='<device>.json')
    parser.set_defaults(run=_bench_report)


def _bench(args: argparse.Namespace, arguments: list[str]) -> int:
    return bench.run(args)


def _bench_report(args: argparse.Namespace, arguments: list[str]) -> None:
    bench.report(args.file)


def _experiments_root(args: argparse.Namespace) -> Path:
    """Where TensorBoard files go beside the experiments: ``path.experiments_root``, or the current directory."""
    opt = options.load(options.find(args.opt))
    options.force(opt, args.force_yml or [])
    path = opt.get('path')
    root = path.get('experiments_root') if isinstance(path, dict) else None
    return Path(root).expanduser().resolve() if isinstance(root, str) else Path.cwd()


def _texts(description: str | None, epilog: str) -> dict[str, Any]:
    return {
        'description': description,
        'epilog': epilog,
        'formatter_class': argparse.RawDescriptionHelpFormatter,
        'allow_abbrev': False,
    }


def _fail(message: str, status: int) -> int:
    rank = int(os.environ.get('RANK', 0))
    print(f'rank {rank}: {message}' if rank else message, file=sys.stderr)
    return status
