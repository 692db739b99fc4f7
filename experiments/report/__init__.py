"""`lightning report`: what a study found, as one page, and its figures and tables as files.

The page is `report.html`, which needs no network; the figures are PNG and SVG, the tables Markdown and LaTeX. What the
report shows is named by the study's YAML: see `experiments.report.spec`.
"""

from __future__ import annotations

from pathlib import Path

from datamodules.errors import InputError, bad, did_you_mean
from experiments.arguments import value_of

OPTIONS = ("--out", "--wandb")


def report(args: list[str]) -> int:
    """Write the report of a study.

    Args:
        args: ``report DIR [--out DIR] [--wandb]``; without ``--out`` it is written into the study's folder.

    Raises:
        InputError: If the folder holds no study, or its figures and tables cannot be made; nothing is written then.
    """
    folder, out, wandb = "", "", False
    rest = iter(args[1:])
    for arg in rest:
        key, equals, value = arg.partition("=")
        if key == "--out":
            out = value if equals else value_of(rest, key)
        elif arg == "--wandb":
            wandb = True
        elif arg.startswith("-"):
            raise InputError(f"{arg}: there is no such option{did_you_mean(key, OPTIONS)}")
        elif folder:
            raise InputError(f"{arg}: one folder at a time; that of {folder} is given already")
        else:
            folder = arg
    if not folder:
        raise InputError("name the folder of a study: lightning report DIR")
    page = write_report(Path(folder), Path(out or folder), wandb=wandb)
    print(f"report: {page}")
    return 0


def write_report(folder: Path, out: Path | None = None, *, wandb: bool = False) -> Path:
    """Write ``report.html``, ``figures/<name>.png`` and ``.svg``, ``tables/<name>.md`` and ``.tex``.

    Each file is written next to its place and renamed; all are made before the first is written.

    Args:
        folder: The study's: study.yaml, results.csv and cells/.
        out: Where to; None: the study's folder.
        wandb: Whether to log figures and tables to W&B as well.

    Returns:
        The page.

    Raises:
        InputError: If the folder holds no study, or its figures and tables cannot be made; nothing is written then.
    """
    from experiments.report.results import check, read_results
    from experiments.report.spec import read_study

    if not folder.is_dir():
        raise bad("report", str(folder), "there is no such folder; give the one that `lightning study` wrote to")
    study, text = read_study(folder)
    results = read_results(folder)
    check(study, results)

    from datamodules.files import write_atomically
    from experiments.report import figures, page, plots, tables

    shown_plots: list[tuple[plots.Plot, str | None]] = []
    files: dict[str, bytes] = {}
    drawn: list[str] = []
    for figure in study.figures:
        plot = plots.plot(figure, study, results)
        if not plot.lines:
            shown_plots.append((plot, None))
            continue
        drawing = figures.draw(plot)
        shown_plots.append((plot, drawing.inline))
        drawn.append(figure.name)
        files |= {f"figures/{figure.name}.svg": drawing.svg, f"figures/{figure.name}.png": drawing.png}
    shown_tables = [tables.table(each, study, results) for each in study.tables]
    for table in shown_tables:
        files[f"tables/{table.spec.name}.md"] = tables.as_markdown(table).encode()
        files[f"tables/{table.spec.name}.tex"] = tables.as_latex(table).encode()
    shown = page.Shown(study, text, results, shown_plots, shown_tables, folder)
    files["report.html"] = page.page(shown).encode()
    out = out or folder
    for name, content in files.items():
        path = out / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise bad("out", str(out), f"cannot be written ({error.strerror}); choose another folder") from error
        write_atomically(path, content)
    if wandb:
        from experiments.report.upload import upload

        print(upload(study, results, shown_tables, drawn, out))
    return out / "report.html"
