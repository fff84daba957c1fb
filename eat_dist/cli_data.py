"""The command line's ``data``: preparing shards, and looking at a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from eat_dist.config import DataConfig

# Modules that take seconds to import are imported by the command that needs them, so that --help is quick.
# ruff: noqa: PLC0415

app = typer.Typer(help="Prepare a dataset into shards, or look at one.", no_args_is_help=True)

Subset = Annotated[bool, typer.Option("--subset", help="The files are a part of the dataset.")]
TestRoot = Annotated[str | None, typer.Option(help="Folder or zip of the test classes (dataset 'folder').")]
TrainShare = Annotated[float | None, typer.Option(help="Share of the classes trained on ('folder', one root).")]
ClassSeed = Annotated[int | None, typer.Option(help="Which classes those are ('folder', one root).")]


@app.command()
def prepare(
    *,
    dataset: Annotated[str, typer.Option(help="Its name, e.g. cub200 or folder.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the shards.")],
    root: Annotated[str | None, typer.Option(help="Folder, URL or zip of the original files.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Scale larger images down to this shorter side; default: original files.")
    ] = None,
    subset: Subset = False,
    on_bad_image: Annotated[str, typer.Option(help="error: stop; skip: leave it out and list it.")] = "error",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other or damaged shards in --out.")] = False,
    test_root: TestRoot = None,
    train_share: TrainShare = None,
    class_seed: ClassSeed = None,
) -> None:
    """Decode and check every image once and store them as shards; after a stop the same command goes on."""
    from rich.filesize import decimal

    from eat_dist.console import Console
    from eat_dist.data.datasets import DATASETS
    from eat_dist.data.prepare import prepare as prepare_shards
    from eat_dist.storage import Folder

    config = _config(
        dataset=dataset,
        root=root,
        subset=subset,
        on_bad_image=on_bad_image,
        test_root=test_root,
        train_share=train_share,
        class_seed=class_seed,
    )
    console, folder = Console(), Folder.at(out)
    source = DATASETS[dataset](config)
    with console.preparing() as on_progress:
        manifest = prepare_shards(
            source,
            folder,
            image_size=image_size,
            on_bad_image=config.on_bad_image,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    if manifest.skipped:
        first = manifest.skipped[0]
        console.warn(f"{len(manifest.skipped)} undecodable images are left out, e.g. {first.name}: {first.reason}")
    images = ", ".join(f"{count:,} {role}" for role, count in manifest.images.items())
    size = decimal(sum(part.bytes for part in manifest.parts))
    console.say(f"{images} images in {len(manifest.parts)} parts, {size}")
    shards = out if folder.is_local else folder.argument
    console.say(f"train on them with --set data.dataset={dataset} --set data.shards={shards}")


@app.command()
def inspect(
    *,
    path: Annotated[str, typer.Argument(help="Folder of shards; with --dataset the original files.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Picture (PNG) of some images to write.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Name of the dataset whose original files are in PATH.")] = None,
    subset: Subset = False,
    test_root: TestRoot = None,
    train_share: TrainShare = None,
    class_seed: ClassSeed = None,
) -> None:
    """Count, verify and decode all images, find duplicates, and draw some; exit code 2 where something is damaged."""
    from eat_dist.console import Console
    from eat_dist.data.contact_sheet import contact_sheet
    from eat_dist.data.datasets import DATASETS
    from eat_dist.data.inspection import inspect_shards, inspect_source
    from eat_dist.errors import DataError
    from eat_dist.storage import Folder

    console = Console()
    with console.out.status(f"inspecting {path}") as status:

        def show(done: int, total: int) -> None:
            status.update(f"inspecting {path}: {done:,} of {total:,} images")

        if dataset is None:
            found = inspect_shards(Folder.at(path), on_progress=show)
        else:
            config = _config(
                dataset=dataset,
                root=path,
                subset=subset,
                test_root=test_root,
                train_share=train_share,
                class_seed=class_seed,
            )
            found = inspect_source(DATASETS[dataset](config), on_progress=show)
    for line in found.report():
        console.say(line)
    if output is not None:
        where, name = Folder.of_file(output)
        where.write(name, contact_sheet(found.sheet()))
        console.say(f"picture     {output}")
    if found.faults:
        raise DataError(f"'{path}' is damaged in {len(found.faults)} places, e.g. {found.faults[0]}")


def _config(**settings: str | float | None) -> DataConfig:
    """The options given, checked as a config file's are."""
    from eat_dist.config import parse_config

    given = {name: value for name, value in settings.items() if value is not None}
    return parse_config({"data": given}, source="eat-dist data").data
