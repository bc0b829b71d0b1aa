"""A progress bar over the iterations of a training, where there is a terminal to show it on."""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any

from basicsr import train
from basicsr.utils.dist_util import get_dist_info
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


@contextlib.contextmanager
def training_bar() -> Iterator[None]:
    """While BasicSR trains within: a bar below its log lines on a terminal, and nothing but the lines elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    build_model = train.build_model

    with contextlib.ExitStack() as stack:

        def build_model_with_bar(opt: dict[str, Any]) -> Any:
            model = build_model(opt)
            if get_dist_info()[0] == 0:
                stack.enter_context(logging_redirect_tqdm([logging.getLogger('basicsr')]))
                bar = stack.enter_context(tqdm(total=int(opt['train']['total_iter']), unit='it', dynamic_ncols=True))
                _advance(bar, model)
            return model

        train.build_model = build_model_with_bar
        try:
            yield
        finally:
            train.build_model = build_model


def _advance(bar: 'tqdm[Any]', model: Any) -> None:
    optimize_parameters = model.optimize_parameters

    @functools.wraps(optimize_parameters)
    def optimize_and_show(current_iter: int) -> None:
        optimize_parameters(current_iter)
        if not bar.n and current_iter > 1:  # resumed: the rate is that of this run alone
            bar.initial = bar.n = current_iter - 1
        bar.set_postfix_str(' '.join(f'{name} {value:.3e}' for name, value in model.log_dict.items()), refresh=False)
        bar.update()

    model.optimize_parameters = optimize_and_show
