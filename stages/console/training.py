"""How a training is shown: its steps in a progress bar, its epochs there and in TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import MissingError
from pipeline.learning.loop import Row
from stages.console.progress import progress_bar


class TrainingDisplay:
    """Shows a training: its steps in a progress bar, and its epochs in TensorBoard if asked for."""

    def __init__(self, bar: Any, epochs: int, board: Callable[[Row], None] | None) -> None:
        self._bar = bar
        self._epochs = epochs
        self._board = board
        self._has_begun = False

    def step(self, done: int) -> None:
        """Show how many steps are done; at the first call, by an earlier attempt."""
        if self._has_begun:
            self._bar.update(done - self._bar.n)
        else:
            self._bar.resume(done)
            self._has_begun = True

    def end(self) -> None:
        """Show that no step is left, also of a training that stopped early."""
        self._bar.total = self._bar.n

    def epoch(self, row: Row) -> None:
        """Show a finished epoch."""
        numbers = {"epoch": f"{row['epoch']:g}/{self._epochs}", "loss": f"{row['train_loss']:.3f}"}
        self._bar.set_postfix(numbers, refresh=False)
        if self._board is not None:
            self._board(row)


@contextmanager
def displayed_training(
    name: str, epochs: int, per_epoch: int, tensorboard: Path | None
) -> Iterator[TrainingDisplay]:
    """Show a training until the block ends.

    Args:
        name: of its run.
        epochs: that it makes at most.
        per_epoch: steps of an epoch.
        tensorboard: folder for TensorBoard's files; None to write none.

    Raises:
        MissingError: TensorBoard is asked for and not installed.
    """
    with ExitStack() as stack:
        board = None if tensorboard is None else _board(tensorboard, stack)
        options = {"total": epochs * per_epoch, "desc": name, "unit": "step"}
        bar = stack.enter_context(progress_bar(**options))
        yield TrainingDisplay(bar, epochs, board)


def _board(folder: Path, stack: ExitStack) -> Callable[[Row], None]:
    """Return a function that writes a row of the history to ``folder``, until the stack is closed.

    Raises:
        MissingError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingError(
            f"--tensorboard needs the package `tensorboard`, which can't be imported ({error}).",
            "Run `pip install --editable '.[tensorboard]'` in the checkout, or leave the option "
            "out.",
        ) from error
    writer: SummaryWriter | None = None

    def add(row: Row) -> None:
        nonlocal writer
        epoch = int(row["epoch"])
        if writer is None:
            # A resumed training repeats epochs; this drops what an earlier attempt wrote of them.
            writer = stack.enter_context(SummaryWriter(str(folder), purge_step=epoch))
        for column in row.keys() - {"epoch"}:
            writer.add_scalar(column, row[column], epoch)

    return add
