"""What the runs of a table cost: operations, seconds, bytes; and how they are dealt out to machines."""

from collections.abc import Sequence
from typing import NamedTuple

from utils.protocols import Cell, Row
from utils.resources import amount

START = 10.0      # seconds that a run takes before its first step: a guess
EVALUATION = 1 / 3  # of the work on an image in training: forwards only


class Price(NamedTuple):
    """Of a row's cells that are to be done."""
    cells: int
    images: int           # that are trained on
    seconds: float        # on one device
    disk: int             # bytes that stay
    chain: float = 0.0    # seconds at least, however many devices: a candidate, then a run that counts
    under_way: int = 0    # bytes more that a cell takes while it runs


def _images(cell: Cell, images: tuple[int, int]) -> tuple[int, int]:
    """(trained on, scored) in a cell, each evaluation's; images: of train and test."""
    (train, test), row, steps = images, cell.row, cell.option.steps
    held = int((row.held_out if cell.choosing else row.kept_back) * train)
    scored = -(-steps // (row.eval_every or steps)) * (held or test)
    return steps * row.batch, scored + (test if held else 0)  # at its end a run scores test, whatever it is for


def work(row: Row, seeds: int, images: tuple[int, int], flops: float) -> float:
    """Operations of all cells of a row, done or not: the same on each machine, for `shard`. flops: of a training step
    on one image."""
    cells = row.choosing() + row.finals(max(row.options, key=lambda option: option.steps), seeds)
    return flops * sum(trained + scored * EVALUATION for trained, scored in (_images(cell, images) for cell in cells))


def price(row: Row, seeds: int, images: tuple[int, int], rate: float, weights: int,
          to_do: Sequence[Cell] | None = None) -> Price:
    """images: of train and test; rate: images a second in training, measured or derived; weights: bytes of a file;
    to_do: the cells that count (`Grid.to_do`; one that was begun counts as a whole one); None: all."""
    longest = max(row.options, key=lambda option: option.steps)
    cells = row.choosing() + row.finals(longest, seeds) if to_do is None else to_do
    trained, chain = 0, {True: 0.0, False: 0.0}
    seconds = 0.0
    for cell in cells:
        learnt, scored = _images(cell, images)
        takes = START + (learnt + scored * EVALUATION) / rate
        trained, seconds = trained + learnt, seconds + takes
        chain[cell.choosing] = max(chain[cell.choosing], takes)
    # Of a finished run the weights stay, `last` and `best`; of one that is under way two generations of its state, too.
    return Price(len(cells), trained, seconds, len(cells) * 2 * weights, sum(chain.values()), 9 * weights)


def disk(prices: Sequence[Price], devices: int = 1) -> int:
    """Bytes that are needed at most, with so many cells under way at once: the largest, to be sure."""
    largest = sorted((p.under_way for p in prices for _ in range(p.cells)), reverse=True)[:devices]
    return sum(p.disk for p in prices) + sum(largest)


def said(prices: Sequence[Price], count: int) -> str:
    """The sum of prices in words, on so many devices."""
    cells, count = sum(p.cells for p in prices), max(count, 1)
    if not cells:
        return "nothing is left to be done"
    seconds = max([sum(p.seconds for p in prices) / count, *(p.chain for p in prices)])
    minutes = max(round(seconds / 60), 1)
    time = f"{seconds / 3600:,.1f} hours" if seconds > 5400 else f"{minutes} minute{'s' * (minutes > 1)}"
    return (f"{cells:,} run{'s' * (cells > 1)}, {sum(p.images for p in prices) / 1e6:,.1f} M training images, about "
            f"{time} on {count} device{'s' * (count > 1)}, {amount(disk(prices, count))} of disk")


def shard(rows: Sequence[Row], costs: Sequence[float], part: int, parts: int) -> list[Row]:
    """The rows of machine `part` of 1 ... `parts`, about equally dear, each row on one machine: its cells need one
    another's results.

    The same on all machines only if the costs are: from operations (`work`), never from what was measured or is done.
    """
    loads, mine = [0.0] * parts, []
    for cost, number in sorted(((cost, number) for number, cost in enumerate(costs)), key=lambda c: (-c[0], c[1])):
        least = loads.index(min(loads))
        loads[least] += cost
        if least == part - 1:
            mine.append(number)
    return [rows[number] for number in sorted(mine)]
