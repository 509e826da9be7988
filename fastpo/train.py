"""`python -m fastpo.train CONFIG [key.path=value ...] [--dry-run]`: trains what a YAML file describes.

`python -m fastpo.train --list` shows what it can name: losses, rewards, formats, families.

Under `torchrun --nproc-per-node N -m fastpo.train ...` or `deepspeed --module fastpo.train ...` on N ranks. The same
command continues a run that was killed.
"""

import argparse
import sys
from pathlib import Path

from fastpo.config import Run, load, warmup_run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpo.train", description=__doc__)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved run, its tokens and memory; train nothing"
    )
    parser.add_argument("--list", action="store_true", help="show losses, rewards, formats, families; train nothing")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # given by the deepspeed launcher
    args = parser.parse_intermixed_args(argv)
    if args.list:
        from fastpo.listing import listing

        return print(listing())
    if args.config is None:
        parser.error("the following arguments are required: config")
    try:
        run = load(args.config, args.overrides)  # before torch is imported: a typing error costs a second
        if args.dry_run:
            from fastpo.dryrun import report

            report(run)
        else:
            train(run)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def train(run: Run) -> None:
    """The warm-up where one is asked for, then the run itself."""
    from fastpo.fit import fit, make_data, on_sigterm  # torch and deepspeed take seconds to import

    stop = on_sigterm()
    make_data(run)
    if run.warmup is not None:
        last = fit(warmup_run(run), stop)
        run = run.model_copy(update={"model": run.model.model_copy(update={"path": str(last / "model")})})
    fit(run, stop)


if __name__ == "__main__":
    main()
