"""``dien-kernels prepare | check | train | evaluate | calibrate | compare | score | info``.

Room card. Lives here: arguments, and words for the terminal. May import: all of the package; what needs the
extra ``train`` only inside commands, so that ``info`` runs without it. Must not be here: decisions that a
library user needs.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dien_kernels import _info
from dien_kernels._options import user_path
from dien_kernels.ops._dispatch import BACKENDS

if TYPE_CHECKING:
    from dien_kernels.training import Config

EXTRAS = {"pyarrow", "polars", "numpy", "yaml", "tqdm", "tensorboard", "sklearn", "matplotlib"}
EXIT_ERROR, EXIT_INTERRUPTED = 2, 130
# What the package raises for wrong input or a failing disk; anything else is a bug, whose traceback is shown.
USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError, RuntimeError)

_WORD = re.compile(r"((data|model|optimizer|schedule|training|output)\.[^=]*=|[^-].*\.ya?ml$)")
_KEY = re.compile(r"[^=/]+\.[^=/]+=")  # of an override
_OPTION_OF = {"seed": "data-seed"}  # of arguments of prepare, where the name differs
_OVERRIDES = """\
Options of a config are section.key=value words, with the sections data, model, optimizer, schedule,
training and output:

  dien-kernels train amazon.yaml optimizer.lr=1e-3 model.options.embedding.size=16 output.folder=runs/wide
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for an error of the user's, 130 after an interruption."""
    parser = _parser()
    options, rest = parser.parse_known_args(_words_first(sys.argv[1:] if arguments is None else arguments))
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "words")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes words behind options for surplus
        options.words += rest
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", UserWarning)
    try:
        command: Callable[[argparse.Namespace], int] = options.run
        return command(options)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if options.debug or package not in EXTRAS:
            raise
        return _fail(f"{options.command} needs {package}: pip install 'dien_kernels[train]'")
    except USER_ERRORS as error:
        if options.debug:
            raise
        return _fail(_one_line(str(error)) or type(error).__name__)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _words_first(arguments: Sequence[str]) -> list[str]:
    """Config words right behind the command, where no option of several values (--seeds 0 1) takes them for its own."""
    if not arguments or arguments[0] not in ("train", "compare"):  # others have other words, and no such options
        return list(arguments)
    words = [word for word in arguments[1:] if _WORD.match(word)]
    return [arguments[0], *words, *(word for word in arguments[1:] if not _WORD.match(word))]


def _one_line(text: str) -> str:
    """The lines of a message as one; blanks inside a line, which may be those of a value, stay."""
    joined = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        joined += ("" if not joined else " " if joined.endswith((":", ";", ",")) else "; ") + line
    return joined


def _fail(text: str) -> int:
    print(f"dien-kernels: error: {text}", file=sys.stderr)
    return EXIT_ERROR


def _show_warning(message: Warning | str, *location: Any, **more: Any) -> None:
    print(f"dien-kernels: warning: {message}", file=sys.stderr)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Puts the names of the formats in place of ``FORMATS`` and ``SAMPLES``, only when help is shown: that needs an
    import."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text is None or "FORMATS" not in text:
            return text
        try:
            from dien_kernels.data.readers import FORMATS
            from dien_kernels.data.samples import SAMPLE_FORMATS
        except ModuleNotFoundError:
            return text.replace("; of samples: SAMPLES", "").replace("FORMATS", "those that the extra [train] brings")
        return text.replace("SAMPLES", ", ".join(SAMPLE_FORMATS)).replace("FORMATS", ", ".join(FORMATS))


def _path(word: str) -> str:
    """A path of the command line, with the home folder for ``~``."""
    try:
        return str(user_path(word))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _pairs(words: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` words as a mapping."""
    for word in words:
        if not all(word.partition("=")):
            raise ValueError(f"must look like NAME=VALUE, got {word!r}")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dien-kernels", description="The Deep Interest Evolution Network, from behaviour logs to scores."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, **more: Any) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text, formatter_class=_Help, **more)
        subparser.set_defaults(run=run)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return subparser

    prepare = command("prepare", _prepare, "turn behaviour logs into a prepared folder")
    prepare.add_argument(
        "sources", nargs="+", type=_path, help="files of a log, or their folder (Parquet, or as --format says)"
    )
    prepare.add_argument("--out", required=True, type=_path, metavar="FOLDER", help="the prepared folder to write")
    either = prepare.add_mutually_exclusive_group()
    either.add_argument("--overwrite", action="store_true", help="replace a folder that is prepared already")
    either.add_argument(
        "--append", action="store_true", help="add the events of new days to a folder that is prepared already"
    )
    prepare.add_argument(
        "--tail", type=int, metavar="N", help="with --append: behaviours of the past before a user's new ones (200)"
    )
    _log_options(prepare)

    check = command("check", _check, "compare a prepared folder, whoever wrote it, with all that the format promises")
    check.add_argument("folder", type=_path, help="the prepared folder")

    train = command("train", _train, "train a model, evaluate it, write a report", epilog=_OVERRIDES)
    train.add_argument("--resume", type=_path, metavar="FOLDER", help="go on with the run in this folder")
    train.add_argument(
        "--from",
        dest="start_from",
        type=_path,
        metavar="RUN",
        help="begin with the weights of this run (training.start_from), and with its config where none is named",
    )
    _config_options(train)

    evaluate = command("evaluate", _evaluate, "the metrics of a run's best model on a split")
    evaluate.add_argument("folder", type=_path, help="of the run")
    evaluate.add_argument("words", nargs="*", metavar="section.key=value", help="e.g. training.backend=torch")
    evaluate.add_argument("--split", choices=("train", "valid", "test"), help="of prepared data (default: test)")
    evaluate.add_argument(
        "--data", type=_path, metavar="PATH", help="other data: raw logs, or a prepared folder grown from the run's"
    )
    _log_options(evaluate, prepares=False)

    calibrate = command("calibrate", _calibrate, "make probabilities of a run's scores; score --calibrated uses it")
    calibrate.add_argument("folder", type=_path, help="of the run")
    calibrate.add_argument("words", nargs="*", metavar="section.key=value", help="e.g. training.device=cpu")
    calibrate.add_argument(
        "--method",
        choices=("none", "sampling", "validation"),
        default="validation",
        help="validation (default): fit two numbers; sampling: by the ratio of negatives; none: remove it",
    )
    calibrate.add_argument("--base-rate", type=float, metavar="SHARE", help="of clicks among what will be scored")

    compare = command("compare", _compare, "train the rows of the paper's table on the same data", epilog=_OVERRIDES)
    compare.add_argument("--models", nargs="+", metavar="NAME", help="rows of the table (default: all)")
    compare.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    compare.add_argument("--samples", type=int, default=1000, help="bootstrap draws (default: 1000)")
    _config_options(compare)

    score = command(
        "score",
        _score,
        "score a file of requests: lists 'history' and 'candidates' of item ids, and a column for each further feature "
        "of the model, named as it",
    )
    score.add_argument("folder", type=_path, help="of the run")
    score.add_argument("requests", type=_path, help="Parquet or JSON lines (.jsonl) to read")
    score.add_argument(
        "out", type=_path, help="to write, of the kind that its ending says: the requests and a list 'scores'"
    )
    score.add_argument(
        "--chunk", type=int, help="candidates scored at a time (default: as many as read 2^18 behaviours)"
    )
    score.add_argument("--calibrated", action="store_true", help="with what calibrate has stored beside the run")
    score.add_argument("words", nargs="*", metavar="section.key=value", help="e.g. training.device=cpu")

    script = command("run", _run_script, "run a script of yours with classes of other libraries on our kernels")
    script.add_argument(
        "--patch",
        action="append",
        required=True,
        metavar="NAME",
        help="torch, deepctr_torch; several times for several",
    )
    script.add_argument("script", help="what python would run")
    script.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")

    command("info", _show_info, "versions, build facts, and which backend can run which op, or why not")
    return parser


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="config.yaml | section.key=value", help="config and overrides")
    parser.add_argument("--data", type=_path, metavar="PATH", help="a prepared folder or raw logs (data.path)")
    parser.add_argument("--out", type=_path, metavar="FOLDER", help="of the run (output.folder)")
    parser.add_argument("--backend", help=f"of the ops: auto, {', '.join(BACKENDS)} (training.backend)")
    parser.add_argument("--threads", type=int, help="of torch (training.threads)")
    parser.add_argument("--seed", type=int, help="of the training (training.seed)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar (output.progress=false)")
    _log_options(parser)


def _log_options(parser: argparse.ArgumentParser, *, prepares: bool = True) -> None:
    """Options for raw logs; what is not given keeps the default of ``prepare``. With ``prepares`` False only those that
    say how they are read."""
    group = parser.add_argument_group("raw logs")
    formats = "FORMATS; of samples: SAMPLES" if prepares else "FORMATS"
    group.add_argument("--format", help=f"one of {formats} (default: as a file's name tells, else parquet)")
    for role in ("user", "item", "timestamp", "label"):
        group.add_argument(f"--{role}", metavar="COLUMN", help=f"the {role} column (default: the usual names)")
    for kind, text in (
        ("item-fields", "further item-side columns (default: category, where there is one)"),
        ("user-fields", "user-side columns"),
        ("dense", "columns of numbers"),
        ("behaviour-fields", "columns of a behaviour itself: action, page, device"),
        ("behaviour-dense", "columns of numbers of a behaviour: dwell time, rating"),
    ):
        group.add_argument(f"--{kind}", nargs="+", metavar="COLUMN", help=text)
    group.add_argument(
        "--delimiters", nargs="+", metavar="FIELD=TEXT", help="between the values of an item field: genres='|'"
    )
    group.add_argument("--sequence", metavar="COLUMN", help="the column that tells the sequence of a row")
    group.add_argument(
        "--sequences",
        nargs="+",
        metavar="NAME=VALUE,...",
        help="the sequences of a user, the main one first: clicks=pv purchases=buy",
    )
    group.add_argument("--time-format", help="of times that are text, as for strptime: '%%m/%%d/%%Y %%H:%%M'")
    group.add_argument("--time-unit", help="of times that are numbers: s, ms, us, ns, number or float")
    group.add_argument("--missing", nargs="+", metavar="WORD", help="words for missing (default: NULL, NaN, NA, ...)")
    group.add_argument("--delimiter", help="between columns, for csv (default: a comma; .tsv: a tab)")
    group.add_argument("--behaviours", nargs="+", metavar="KIND", help="for taobao: pv, cart, fav, buy (default: pv)")
    group.add_argument("--max-bad-lines", type=int, help="unreadable lines to skip before giving up")
    names = ["labels", "targets", "split_by", "fractions", "negatives", "negative_sampling", "min_count", "data_seed"]
    names += ["buckets", "duplicates"]
    if not prepares:
        parser.set_defaults(**dict.fromkeys(names))
        return
    group.add_argument("--labels", help="next: predict the next behaviour; given: the label column")
    group.add_argument("--targets", help="last: one for each user; every: each position of a history")
    group.add_argument("--split", dest="split_by", help="user or time")
    group.add_argument("--fractions", nargs=3, type=float, metavar="SHARE", help="train, valid, test (0.8 0.1 0.1)")
    group.add_argument("--negatives", type=int, help="fixed negatives of a validation or test positive")
    group.add_argument("--negative-sampling", help="popularity or uniform")
    group.add_argument("--min-count", type=int, help="rarer items become unknown")
    group.add_argument(
        "--buckets", nargs="+", metavar="FIELD=NUMBER", help="fields whose values share so many ids by their hash"
    )
    group.add_argument("--duplicates", help="rows that say the same as an earlier one: keep or drop (default: keep)")
    group.add_argument("--data-seed", type=int, help="of the split and the fixed negatives")


def _given_log_options(options: argparse.Namespace) -> dict[str, Any]:
    roles = ["user", "item", "timestamp", "label", "item_fields", "user_fields", "dense"]
    roles += ["behaviour_fields", "behaviour_dense", "sequence"]
    columns = {role: getattr(options, role) for role in roles if getattr(options, role) is not None}
    if options.delimiters is not None:
        columns["delimiters"] = _pairs(options.delimiters)
    if options.sequences is not None:
        columns["sequences"] = {name: values.split(",") for name, values in _pairs(options.sequences).items()}
    buckets = {}
    for name, number in _pairs(options.buckets or ()).items():
        if not number.isdecimal():
            raise ValueError(f"--buckets must look like FIELD=NUMBER, got {name}={number}")
        buckets[name] = int(number)
    names = {
        "format": "format",
        "labels": "labels",
        "targets": "targets",
        "split_by": "split",
        "fractions": "fractions",
        "delimiter": "delimiter",
        "behaviours": "behaviours",
        "time_format": "time_format",
        "time_unit": "time_unit",
        "missing": "missing",
        "negatives": "negatives",
        "negative_sampling": "negative_sampling",
        "min_count": "min_count",
        "duplicates": "duplicates",
        "max_bad_lines": "max_bad_lines",
        "data_seed": "seed",
    }
    given = {key: getattr(options, name) for name, key in names.items() if getattr(options, name) is not None}
    return given | ({"columns": columns} if columns else {}) | ({"buckets": buckets} if buckets else {})


def _is_path(word: str) -> bool:
    """Whether a word is a path rather than an override: those may have a "=", too (runs/lr=1e-3/config.yaml)."""
    if "=" not in word:
        return True
    is_yaml, exists = word.endswith((".yaml", ".yml")), os.path.isfile(word)
    return (is_yaml or exists) and (not _KEY.match(word) or (is_yaml and exists))


def _config(options: argparse.Namespace, base: Path | None = None) -> Config:
    """The config that a command line means; ``base`` is that of the run to resume."""
    from dien_kernels.training import load
    from dien_kernels.training.upgrade import load_saved

    files = [word for word in options.words if _is_path(word)]
    overrides = [word for word in options.words if not _is_path(word)]
    for word in files:
        if not word.endswith((".yaml", ".yml")):  # a log may be large, and is not to be read as YAML
            raise ValueError(
                f"{word} is neither a config (.yaml, .yml) nor section.key=value; logs are named with --data {word}"
            )
    if len(files) + (base is not None) > 1:
        raise ValueError(f"only one config can be used, got {', '.join([*files, *([str(base)] if base else [])])}")
    config = load(files[0] if files else None, overrides) if base is None else load_saved(base).override(overrides)
    logs = _given_log_options(options)
    if logs:
        prepare = dict(config.data.prepare)
        columns = dict(prepare.get("columns") or {}) | logs.get("columns", {})
        config = config.with_("data", prepare=prepare | logs | ({"columns": columns} if columns else {}))
    if options.data is not None:
        config = config.with_("data", path=options.data)
    if options.out is not None:
        config = config.with_("output", folder=options.out)
    for key in ("backend", "threads", "seed"):
        if getattr(options, key) is not None:
            config = config.with_("training", **{key: getattr(options, key)})
    return config.with_("output", progress=False) if options.quiet else config


def _prepare(options: argparse.Namespace) -> int:
    from dien_kernels.data import append, prepare
    from dien_kernels.training.setup import prepare_options

    # The summary has the warnings.
    logging.getLogger("dien_kernels.data").addHandler(logging.NullHandler())
    given = prepare_options(_given_log_options(options), Path(options.sources[0]))
    if options.append:
        settled = [_OPTION_OF.get(name, name) for name in given if name not in inspect.signature(append).parameters]
        if settled:
            words = ", ".join(f"--{name.replace('_', '-')}" for name in settled)
            raise ValueError(f"--append takes the options of the log only, as the folder has the others, got {words}")
        tail = {} if options.tail is None else {"tail": options.tail}
        print(append(options.sources, options.out, **tail, **given).summary())
        return 0
    if options.tail is not None:
        raise ValueError(f"--tail is for --append, got --tail {options.tail} without it")
    print(prepare(options.sources, options.out, overwrite=options.overwrite, **given).summary())
    return 0


def _run_script(options: argparse.Namespace) -> int:
    from dien_kernels.integrations._run import run_script

    return run_script(options.patch, options.script, options.arguments)


def _check(options: argparse.Namespace) -> int:
    from dien_kernels.data import Prepared, verify

    prepared = Prepared.open(options.folder)
    lines = verify(prepared)
    if not lines:
        print(prepared.summary())
        return 0
    print("\n".join(lines))
    faults = f"{len(lines)} faults or more" if len(lines) >= 100 else f"{len(lines)} fault{'s' * (len(lines) > 1)}"
    return _fail(f"{prepared.path} is not as the format says: {faults}; prepare it again, or correct what wrote it")


def _train(options: argparse.Namespace) -> int:
    from dien_kernels.training import Interrupted, train

    base = None if options.resume is None else Path(options.resume) / "config.yaml"
    if base is not None and not base.exists():
        raise FileNotFoundError(f"{base.parent} holds no run: there is no {base.name}")
    config = _config(options, base) if options.start_from is None else _config_from(options)
    if base is not None:
        config = config.with_("output", folder=str(base.parent))
    try:
        result = train(config, resume=base is not None)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return EXIT_INTERRUPTED
    _print_metrics("test", result["test"])
    print(
        f"best of {result['steps']:,} steps: {result['best_step']:,}; "
        f"{result['samples_per_second']:,.0f} samples/s, {result['training_seconds']:.0f} s of training"
    )
    folder = Path(config.output.folder)
    print(f"report: {folder / 'report.html'}" if config.output.report else f"run: {folder}")
    return 0


def _config_from(options: argparse.Namespace) -> Config:
    """The config of ``train --from``: that of the earlier run, unless another one is named."""
    from dien_kernels.training.upgrade import load_saved

    base = Path(options.start_from) / "config.yaml"
    if options.resume is not None:
        raise ValueError(f"--from must be left out with --resume, got {options.start_from}")
    if not base.exists():
        raise FileNotFoundError(f"{base.parent} holds no run: there is no {base.name}")
    named = any(_is_path(word) for word in options.words)
    config = _config(options, None if named else base)
    if config.output.folder == load_saved(base).output.folder:
        raise ValueError(f"--out must name a folder for the new run, got that of {base.parent}")
    if options.data is not None and (Path(options.data) / "meta.json").exists() and not _given_log_options(options):
        config = config.with_("data", prepare={})
    return config.with_("training", start_from=options.start_from)


def _evaluate(options: argparse.Namespace) -> int:
    from dien_kernels.training import evaluate

    log = _given_log_options(options)
    metrics = evaluate(options.folder, options.split, options.words, data=options.data, log=log)
    named = options.split or ("test" if options.data is None or os.path.exists(f"{options.data}/meta.json") else "all")
    _print_metrics(named, metrics.to_dict())
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from dien_kernels.training import calibrate

    found = calibrate(options.folder, options.method, base_rate=options.base_rate, overrides=options.words)
    print(f"{found.method}: logits become {found.slope:.4f} x + {found.offset:.4f}; on the test split:")
    for name, numbers in (("before", found.before), ("after", found.after)):
        print(
            f"  {name}: calibration error {numbers['calibration_error']:.4f}, mean prediction "
            f"{numbers['mean_prediction']:.4f}, base rate {numbers['base_rate']:.4f}"
        )
    return 0


def _print_metrics(split: str, metrics: dict[str, Any]) -> None:
    def number(value: float | None) -> str:
        return "not defined" if value is None else f"{value:.4f}"

    print(
        f"{split}: AUC {number(metrics['auc'])}, per-user AUC {number(metrics['user_auc'])} over "
        f"{metrics['users']:,} users, log loss {number(metrics['log_loss'])}, {metrics['rows']:,} rows"
    )
    if metrics.get("unknown"):
        print(f"  {metrics['unknown']:,} rows are of items that the model does not know")
    for name, reason in metrics["reasons"].items():
        print(f"  {name} is not defined: {reason}")


def _compare(options: argparse.Namespace) -> int:
    from dien_kernels.training import Interrupted, compare
    from dien_kernels.training.compare import ROWS, table

    config = _config(options)
    try:
        content = compare(config, options.models or tuple(ROWS), options.seeds, samples=options.samples)
    except Interrupted:
        print("\ninterrupted; all is saved. The same command goes on.", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(table(content))
    print(f"written: {Path(config.output.folder) / 'comparison.json'} and .csv")
    return 0


def _score(options: argparse.Namespace) -> int:
    from dien_kernels.ops import use_backend
    from dien_kernels.serving import Scorer
    from dien_kernels.training import open_run, read_calibration

    config, prepared, model = open_run(options.folder, options.words)
    calibration = read_calibration(options.folder) if options.calibrated else None
    with use_backend(config.training.backend):
        scorer = Scorer(
            model,
            prepared,
            max_length=config.data.max_length,
            read_history=config.data.history,
            calibration=calibration,
        )
        counts = scorer.score_file(options.requests, options.out, chunk=options.chunk)
    # Behind scores that are written to the standard output, words would be no part of the file.
    print(f"{options.out}: {counts.words()}", file=sys.stderr if _is_stdout(options.out) else sys.stdout)
    return 0


def _is_stdout(path: str) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


def _show_info(options: argparse.Namespace) -> int:
    print(_info.report())
    return 0
