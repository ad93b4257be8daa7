"""What the tools for a trained model share: flags, the file of the output, errors in a sentence and exit codes."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm.contrib.logging import logging_redirect_tqdm

from utils.resources import out_of_memory
from utils.runs import WEIGHTS
from utils.settings import Parser, image_size
from utils.state import replacing_text


class Marked(logging.Formatter):
    """The message alone, with a word before it where it is a warning."""

    def format(self, record: logging.LogRecord) -> str:
        return "warning: " * (record.levelno >= logging.WARNING) + super().format(record)


def start_log(stream: TextIO, level: int = logging.INFO) -> None:
    """Sends the log of this process there, and the chatter of libraries nowhere."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Marked())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in ("httpx", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)


def worker_number(text: str) -> int:
    if text != "-1" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no number of processes: give 0 or more, or -1")
    return int(text)


def add_shared(p: Parser) -> None:
    """The flags of every tool that asks a trained model; those of train.py have the same names."""
    p.add_argument("checkpoint", metavar="CHECKPOINT|RUN", help="weights of any format, or the folder of a run")
    p.add_argument("--weights", choices=["auto", *WEIGHTS], default="auto", help="of a run; auto: best where a "
                   "held-out part has chosen it, else last (default: auto)")
    p.add_argument("--img_size", type=image_size, metavar="N|H,W", help="another size than the weights are for")
    p.add_argument("--model_type", metavar="NAME", help="what the weights must be; tells the number of heads where "
                   "they do not")
    p.add_argument("--batch_size", type=at_least_one, default=64, metavar="N", help="images at a time (default: 64)")
    p.add_argument("--num_workers", type=worker_number, default=-1, metavar="N", help="processes that decode images; "
                   "-1: one a core, at most 8 (default: -1)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    p.add_argument("--overwrite", action="store_true", help="replace the file of --output")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")


def check_free(output: str | None, overwrite: bool) -> None:
    """ValueError: --output is there already, or is a folder. Before any work."""
    if output is None:
        return
    if Path(output).is_dir():
        raise ValueError(f"{output} is a folder; a file would go there. Choose another --output.")
    if Path(output).exists() and not overwrite:
        raise ValueError(f"{output} exists. Choose another --output, or --overwrite it.")
    if not Path(output).absolute().parent.is_dir():
        raise ValueError(f"{output} cannot be written: there is no folder {Path(output).parent}.")


@contextmanager
def opened(output: str | None) -> Iterator[TextIO]:
    """Where text goes: standard output, or a file that takes its place when it is complete (`replacing_text`)."""
    if output is None:
        sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout
        sys.stdout.flush()
        return
    with replacing_text(Path(output)) as file:
        yield file


def run(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> None:
    """Does the work and ends with its exit code: 0, or 1 where images were skipped. The log goes to standard error.

    An error is one or two sentences and exit code 2 (--debug: its traceback); Ctrl-C is 130.
    """
    start_log(sys.stderr)
    try:
        with logging_redirect_tqdm():
            code = work(args)
    except KeyboardInterrupt:
        print("\nInterrupted." + f" {args.output} was not written." * bool(args.output), file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read the output (`| head`) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again at its end
        raise SystemExit(0) from None
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        full = out_of_memory(error)
        if args.debug or (isinstance(error, RuntimeError) and not full):
            raise
        print(f"error: {'The memory is full: try a smaller --batch_size.' if full else error}", file=sys.stderr)
        code = 2
    if code:
        raise SystemExit(code)
